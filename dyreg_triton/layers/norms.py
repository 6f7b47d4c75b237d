"""Layer normalisation over everything but the leading dimensions, with one scale and bias per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelAffineNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias, mean and variance joint over the last `dims` dimensions.

    Parameters `scale` and `bias` have `shape`, which broadcasts against x: (C,) for channels last, (1, C, 1, 1) for
    feature maps. `start` is the scale's initial value; 0 makes a residual branch start as nothing.
    """

    def __init__(self, shape: tuple[int, ...], dims: int, *, start: float = 1.0, eps: float = 1e-5):
        super().__init__()
        self.dims = dims
        self.eps = eps
        self.scale = nn.Parameter(torch.full(shape, start))
        self.bias = nn.Parameter(torch.zeros(shape))

    def standardise(self, x: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps)."""
        return F.layer_norm(x, x.shape[-self.dims :], eps=self.eps)

    def affine(self, x: Tensor) -> Tensor:
        """x * scale + bias; it commutes with an average over anything but the channels."""
        return x * self.scale + self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(self.standardise(x))

    def extra_repr(self) -> str:
        return f"{tuple(self.scale.shape)}, dims={self.dims}, eps={self.eps}"
