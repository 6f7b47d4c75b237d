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

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-self.dims :], eps=self.eps) * self.scale + self.bias

    def of_average(self, averages: Tensor, x: Tensor) -> Tensor:
        """The same normalisation of x followed by an average over some of its entries per channel, given the averages.

        A weighted mean (weights summing to 1) commutes with an affine map that is constant per channel, so x itself
        is never normalised; x gives the statistics.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(-self.dims)
        var, mean = torch.var_mean(wide, dim=-1, correction=0)
        extra = (1,) * (averages.dim() - mean.dim())
        mean, rstd = mean.view(*mean.shape, *extra), torch.rsqrt(var + self.eps).view(*var.shape, *extra)
        return ((averages - mean) * rstd).to(averages.dtype) * self.scale + self.bias

    def extra_repr(self) -> str:
        return f"{tuple(self.scale.shape)}, dims={self.dims}, eps={self.eps}"
