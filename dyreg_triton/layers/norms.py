"""Layer normalisation over everything but the leading dimensions, with one scale and bias per channel."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .leaves import readable


def is_affine(norm: nn.Module) -> bool:
    """Whether `standardise` and then `affine` do all that a call of `norm` does."""
    inner = norm._modules.get("norm")
    if inner is None:
        return readable(norm, ChannelAffineNorm) is not None
    published = {*norm._parameters} == {"scale", "bias"} and {*norm._modules} == {"norm"}
    return published and readable(norm, type(norm)) is not None and readable(inner, nn.LayerNorm) is not None


def standardise(norm: nn.Module, x: Tensor, dims: int) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last `dims` dimensions.

    `norm` is a `ChannelAffineNorm` or the published module in its place, whose eps is in an inner nn.LayerNorm.
    """
    eps: Any = getattr(norm, "norm", norm).eps
    return F.layer_norm(x, x.shape[-dims:], eps=eps)


def affine(norm: nn.Module, x: Tensor) -> Tensor:
    """x * scale + bias; it commutes with an average over anything but the channels."""
    return x * cast(Tensor, norm.scale) + cast(Tensor, norm.bias)


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

    def forward(self, x: Tensor) -> Tensor:
        return affine(self, standardise(self, x, self.dims))

    def extra_repr(self) -> str:
        return f"{tuple(self.scale.shape)}, dims={self.dims}, eps={self.eps}"
