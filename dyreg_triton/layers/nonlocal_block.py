"""Non-local block (Wang et al., 'Non-local Neural Networks', CVPR 2018), embedded Gaussian, as in the code of BAT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._core.layouts import memory_format
from .._core.validation import choice, flag, is_integer, positive_int, what
from ..pretrained import Pretrained
from .bat import clip_input, convolution, start
from .leaves import tensor_of

NORMS = ("batch", "group", "none")


class FramePool(nn.MaxPool2d):
    """A maximum over 2 x 2 cells of each frame (B, C, T, H, W); in two dimensions its gradient is deterministic."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1, 2)).unflatten(1, input.shape[1:3])


def embedded_gaussian(theta: Tensor, phi: Tensor, g: Tensor, heads: int, scale: bool) -> Tensor:
    """softmax(theta^T phi / sqrt(c)) g of each head of c = C / heads channels, in theta's shape.

    theta is (B, C, *), phi and g are (B, C, *') over positions of their own; scale: whether scores are divided.
    """
    rows = [t.flatten(2).unflatten(1, (heads, -1)).transpose(-2, -1) for t in (theta, phi, g)]
    # channels innermost: torch's fused attention takes nothing else, and falls back to storing weights without a word;
    # a clone, because a head of one channel counts as contiguous whatever its stride is
    query, key, value = (t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format) for t in rows)
    y = F.scaled_dot_product_attention(query, key, value, scale=None if scale else 1.0)
    y = y.transpose(-2, -1).reshape(theta.shape)
    return y.contiguous(memory_format=memory_format(theta))  # it lies channels last, and the norm would take it so


class NonLocalBlock(Pretrained):
    """Non-local block: every position attends to all others, y = x + W(softmax(theta(x)^T phi(x) / sqrt(c)) g(x)).

    The attention is torch's scaled_dot_product_attention, which stores no weights. Parameters have the published names
    and shapes. It starts as the identity: the norm's scale, or W without one, is 0, and with `zero_init` W in any case.

    Args:
        in_channels: channels of x.
        inner_channels: of theta, phi and g; by default half of in_channels, at least 1. A multiple of heads.
        dimensions: 1, 2 or 3: x is (B, C, L), (B, C, H, W) or (B, C, T, H, W).
        heads: each attends by its own c = inner_channels / heads channels.
        sub_sample: whether phi and g are of a maximum over two cells along each axis but time.
        scale: whether scores are divided by sqrt(c).
        norm: after W: "batch", "group" (32 groups, or as many as divide in_channels) or "none".
        zero_init: whether W's convolution starts at 0 and the norm's scale at 1, not the other way round: were both 0,
            neither would ever have a gradient.

    Shapes: x (B, C, *), any strides -> y of the same shape. B may be 0.

    Raises ValueError or TypeError for an argument outside those named, and for x of another shape.
    """

    _starts = True  # as the authors' networks start it; their constructor leaves that to them

    def __init__(
        self,
        in_channels: int,
        inner_channels: int | None = None,
        *,
        dimensions: int = 3,
        heads: int = 1,
        sub_sample: bool = True,
        scale: bool = True,
        norm: str = "batch",
        zero_init: bool = False,
    ):
        super().__init__()
        op = "NonLocalBlock"
        self.in_channels = channels = positive_int(op, "in_channels", in_channels)
        inner = max(channels // 2, 1) if inner_channels is None else inner_channels
        self.inner_channels = inner = positive_int(op, "inner_channels", inner)
        if not is_integer(dimensions) or dimensions not in (1, 2, 3):
            raise ValueError(f"{op}: dimensions is {what(dimensions)}; accepted are 1, 2 and 3")
        self.dimensions = dimensions
        self.heads = positive_int(op, "heads", heads)
        if inner % heads:
            raise ValueError(f"{op}: heads is {heads}; accepted is a divisor of inner_channels, {inner}")
        self.sub_sample, self.scale = flag(op, "sub_sample", sub_sample), flag(op, "scale", scale)
        self.norm = choice(op, "norm", norm, NORMS)
        self.zero_init = flag(op, "zero_init", zero_init)

        conv = convolution(dimensions)
        self.g: nn.Module = conv(channels, inner, 1)
        last = conv(inner, channels, 1)
        if norm == "batch":
            batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
            self.W: nn.Module = nn.Sequential(last, batch(channels))
        elif norm == "group":
            groups = max(n for n in range(1, 33) if channels % n == 0)
            self.W = nn.Sequential(last, nn.GroupNorm(groups, channels))
        else:
            self.W = last
        self.theta = conv(channels, inner, 1)
        self.phi: nn.Module = conv(channels, inner, 1)
        if sub_sample:
            pool = (nn.MaxPool1d, nn.MaxPool2d, FramePool)[dimensions - 1]
            self.g, self.phi = nn.Sequential(pool(2), self.g), nn.Sequential(pool(2), self.phi)
        if self._starts:
            self.init_modules()

    def init_modules(self) -> None:
        """Start as the identity."""
        start(self, 1.0 if self.zero_init else 0.0)
        last: Any = self.W[0] if isinstance(self.W, nn.Sequential) else self.W
        nn.init.normal_(last.weight, 0.0, 0.0 if self.zero_init or last is self.W else 0.01)

    def forward(self, x: Tensor) -> Tensor:
        clip_input("NonLocalBlock", x, tensor_of(self.theta, self), self.in_channels, self.dimensions)
        if self.sub_sample and min(x.shape[-2:] if self.dimensions > 1 else x.shape[-1:]) < 2:
            raise ValueError(f"NonLocalBlock: x is {what(x)}; accepted with sub_sample is two cells or more a side")
        y = embedded_gaussian(self.theta(x), self.phi(x), self.g(x), self.heads, self.scale)
        return self.W(y) + x

    def extra_repr(self) -> str:
        names = ("dimensions", "heads", "sub_sample", "scale", "norm", "zero_init")
        return f"{self.in_channels}, {self.inner_channels}, " + ", ".join(f"{n}={getattr(self, n)!r}" for n in names)
