"""Relational self-attention layer (RSA: Kim et al., 'Relational Self-Attention', equations 5-12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .._core.autocast import full_precision
from .._core.validation import choice, flag, is_integer, layer_input, positive_int, triple, what
from ..pretrained import Pretrained
from .leaves import tensor_of, weight_of

KINDS = ("V", "R", "V+R")
EPS = 1e-6  # under the square root of the L2 norms, as published


def _filters(count: int, kernel_size: tuple[int, int, int], groups: int = 1) -> nn.Conv3d:
    """Weights (count, 1, kt, kh, kw) under the published name, shape and start. Never called: the op takes them."""
    t, h, w = kernel_size
    return nn.Conv3d(groups, count, kernel_size, padding=(t // 2, h // 2, w // 2), groups=groups, bias=False)


def _averaged(y: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """An average over three cells along each axis that strides, zeros around the clip counted.

    One axis after another or at once is the same; in two dimensions its gradient is deterministic on every device.
    """
    if max(stride[1:]) > 1:
        window = [3 if s > 1 else 1 for s in stride[1:]]
        frames = F.avg_pool2d(y.flatten(1, 2), window, stride[1:], [k // 2 for k in window])
        y = frames.unflatten(1, y.shape[1:3])
    if stride[0] > 1:
        times = F.avg_pool2d(y.flatten(3), (3, 1), (stride[0], 1), (1, 0))
        y = times.unflatten(3, y.shape[3:])
    return y


class RSA(Pretrained):
    """Multi-query relational self-attention over a space-time window.

    x is projected to L queries, one key and one value, each L2-normalised over its channels. For each position n with
    its window X_n of M = kt * kh * kw neighbours (equations 8-12):

        kappa^V = q_n P1 H2^T                       basic kernel (L, M)
        kappa^R = q_n (X_n^K * H1) H2^T             relational kernel (L, M)
        y_n = (kappa^V + kappa^R) X_n^V (I + (X_n^V)^T G)    I: basic context, G: relational context

    Defaults are the paper's. The parameters are the published code's, under its names and in its shapes, so its
    checkpoints load with strict=True.

    Args:
        in_channels: channels of x.
        out_channels: channels of y, a multiple of num_queries; by default in_channels, or num_queries * value_channels.
        num_queries: L; all queries share the key and the value.
        key_channels: C of a query and of the key; by default value_channels.
        value_channels: E of the value, out_channels / num_queries.
        latent_channels: D between H1, P1 and H2; by default key_channels.
        kernel_size: (kt, kh, kw) or one number for all; tap i of k lies at i - k // 2.
        stride: (st, sh, sw) or one number for all. y is averaged over three cells along each axis that strides;
            (1, 2, 2) is the published code's.
        kernel: "V" (basic), "R" (relational) or "V+R".
        context: "V" (basic), "R" (relational) or "V+R".
        correlation_groups: G of the paper's table 4d: query and key are correlated in G groups of their channels, each
            with one filter of H1. By default C, the Hadamard product; 1 is the dot product. Not for kernel "V".
        basic_projection: whether kernel "V" has P1, as in the paper; the published code's has none, kappa^V = q H2^T.

    Shapes: x (B, in_channels, T, H, W), any strides -> y (B, out_channels, T', H', W') with T' = ceil(T / st) and so
    on; channel e * L + l of y is channel e of query l, as published. B may be 0.

    Raises ValueError or TypeError for an argument outside those named, and for x of another shape.
    """

    H1: nn.Conv3d | None
    P1: nn.Parameter | None
    G: nn.Conv3d | None
    I: nn.Parameter | None  # noqa: E741  # the authors' name

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        num_queries: int = 8,
        key_channels: int | None = None,
        value_channels: int | None = None,
        latent_channels: int | None = None,
        kernel_size: int | Sequence[int] = (5, 7, 7),
        stride: int | Sequence[int] = 1,
        kernel: str = "V+R",
        context: str = "V+R",
        correlation_groups: int | None = None,
        basic_projection: bool = True,
    ):
        super().__init__()

        def count(name: str, value: int | None, default: int) -> int:
            return positive_int("RSA", name, default if value is None else value)

        self.in_channels = inputs = positive_int("RSA", "in_channels", in_channels)
        self.num_queries = queries = positive_int("RSA", "num_queries", num_queries)
        outputs = inputs if value_channels is None else queries * positive_int("RSA", "value_channels", value_channels)
        self.out_channels = outputs = count("out_channels", out_channels, outputs)
        if outputs % queries:
            raise ValueError(f"RSA: out_channels is {outputs}; accepted is a multiple of num_queries, {queries}")
        self.value_channels = values = count("value_channels", value_channels, outputs // queries)
        if outputs != queries * values:
            raise ValueError(
                f"RSA: value_channels is {values}; accepted is out_channels / num_queries, {outputs} / {queries}"
            )
        self.key_channels = keys = count("key_channels", key_channels, values)
        self.latent_channels = latent = count("latent_channels", latent_channels, keys)
        self.kernel_size = size = triple("RSA", "kernel_size", kernel_size)
        self.stride = triple("RSA", "stride", stride)
        self.kernel = choice("RSA", "kernel", kernel, KINDS)
        self.context = choice("RSA", "context", context, KINDS)
        self.correlation_groups = groups = count("correlation_groups", correlation_groups, keys)
        if correlation_groups is not None and kernel == "V":
            raise ValueError(
                f"RSA: correlation_groups is {groups} with kernel 'V'; accepted with it is None: it correlates nothing"
            )
        if keys % groups:
            raise ValueError(f"RSA: correlation_groups is {groups}; accepted is a divisor of key_channels, {keys}")
        if not flag("RSA", "basic_projection", basic_projection) and (kernel != "V" or keys != latent):
            raise ValueError(
                f"RSA: basic_projection is False with kernel {kernel!r}, key_channels {keys} and latent_channels "
                f"{latent}; accepted is kernel 'V' with as many latent_channels as key_channels"
            )

        basic, relational = basic_projection and kernel != "R", kernel != "V"
        self.projection = nn.Conv3d(inputs, (queries + relational) * keys + values, 1, bias=False)
        start = math.sqrt(1 / (math.prod(size) * latent))
        self.P1 = nn.Parameter(torch.randn(1, keys, latent) * start) if basic else None
        self.H1 = _filters(groups * latent, size, groups) if relational else None
        self.H2 = _filters(latent, size)
        self.G = _filters(values, size) if context != "V" else None
        self.I = nn.Parameter(torch.eye(values)[None]) if context == "V+R" else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries (B, L, C, T, H, W), key (B, C, T, H, W) or None, and value (B, E, T, H, W), not yet normalised."""
        queries, keys = self.num_queries, self.key_channels
        widths = [queries * keys, keys, self.value_channels]
        if self.H1 is None:
            del widths[1]
        q, *k, v = self.projection(x).split(widths, dim=1)
        return q.unflatten(1, (queries, keys)), k[0] if k else None, v

    def weights(self, dtype: torch.dtype) -> dict[str, Any]:
        """The parameters as `relational_attention` takes them, in one dtype: reshapes, and copies only of tied H1."""
        h1 = self.H1
        if h1 is not None:
            each = self.key_channels // self.correlation_groups
            h1 = weight_of(self, "H1", nn.Conv3d)[:, 0].unflatten(0, (self.correlation_groups, 1, self.latent_channels))
            h1 = h1.expand(-1, each, -1, -1, -1, -1).flatten(0, 1)
        parameters = {
            "h1": h1,
            "p1": None if self.P1 is None else self.P1[0],
            "h2": weight_of(self, "H2", nn.Conv3d)[:, 0],
            "g": None if self.G is None else weight_of(self, "G", nn.Conv3d)[:, 0],
            "identity": None if self.I is None else self.I[0],
        }
        return {name: None if p is None else p.to(dtype) for name, p in parameters.items()}

    def kernels(self, x: Tensor, position: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """The basic and the relational kernel at position (t, h, w) of each clip, for a look at them (figure 3).

        Each is (B, L, kt, kh, kw) in float32 or wider, or None where the layer has no such kernel; their sum is applied
        to the L2-normalised value. Only the window around the position is computed.
        """
        self._check(x)
        sizes = x.shape[2:]
        if (
            not isinstance(position, (tuple, list))
            or len(position) != 3
            or not all(is_integer(p) and 0 <= p < n for p, n in zip(position, sizes, strict=True))
        ):
            raise ValueError(
                f"RSA: position is {what(position)}; accepted are three integers (t, h, w), "
                f"from 0 to below the clip's {tuple(sizes)}"
            )
        margins: list[int] = []
        for axis, (p, k, n) in enumerate(zip(position, self.kernel_size, sizes, strict=True), start=2):
            first, end = p - k // 2, p - k // 2 + k
            x = x.narrow(axis, max(first, 0), min(end, n) - max(first, 0))
            margins = [max(-first, 0), max(end - n, 0), *margins]
        q, key, _ = self.project(F.pad(x, margins))  # without a bias, what is 0 outside the clip projects to 0
        t, h, w = (k // 2 for k in self.kernel_size)
        wide = torch.promote_types(q.dtype, torch.float32)
        with full_precision(x.device.type):
            q = _normalised(q[..., t, h, w].to(wide), 2)
            weights = self.weights(wide)
            h1, p1, h2 = weights["h1"], weights["p1"], weights["h2"]
            basic = relational = None
            if self.kernel != "R":
                basic = torch.einsum("bld,dthw->blthw", q if p1 is None else q @ p1, h2)
            if key is not None:
                correlated = torch.einsum("blc,bcthw,cdthw->bld", q, _normalised(key.to(wide), 1), h1)
                relational = torch.einsum("bld,dthw->blthw", correlated, h2)
        return basic, relational

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        q, k, v = self.project(x)
        y = ops.relational_attention(q, k, v, **self.weights(q.dtype), eps=EPS)
        return self.average(y.transpose(1, 2).flatten(1, 2))

    def average(self, y: Tensor) -> Tensor:
        """The output, averaged where the layer strides."""
        return _averaged(y, self.stride)

    def _check(self, x: Tensor) -> None:
        form = f"(B, {self.in_channels}, T, H, W) for in_channels {self.in_channels}, T, H and W > 0"
        layer_input("RSA", "x", x, tensor_of(self.projection, self), (None, self.in_channels, None, None, None), form)
        if 0 in x.shape[2:]:
            raise ValueError(f"RSA: x is {what(x)}; accepted is {form}")

    def extra_repr(self) -> str:
        channels = ("num_queries", "key_channels", "value_channels", "latent_channels")
        names = (*channels, "kernel_size", "stride", "kernel", "context", "correlation_groups")
        return f"{self.in_channels}, {self.out_channels}, " + ", ".join(f"{n}={getattr(self, n)!r}" for n in names)


def _normalised(x: Tensor, dim: int) -> Tensor:
    return x / (x.square().sum(dim, keepdim=True) + EPS).sqrt()
