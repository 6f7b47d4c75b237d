"""Region kernel, pooling and re-mapping in plain torch.

Each axis is normalised by its own sum (sum K = sum f_y * sum f_x), so nothing of the map's size is divided or reduced
for the normaliser, and pooling and re-mapping are one batched matrix product with the (N, H*W) kernel. On CPU that
product runs at the speed of BLAS; contracting one axis after the other would store C*H*N numbers instead of N*H*W.
Sums accumulate in float32 (float64 for float64). Arguments are checked by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.autocast import full_precision

_NARROW = 1e-9  # a gaussian narrower than this weighs one cell, and squares of it stay representable


def _axis(center: Tensor, extent: Tensor, length: int, profile: str, temperature: float) -> Tensor:
    """One axis of the kernel, normalised to sum 1 (or 0 where the region is empty): (*, N, length)."""
    cells = torch.arange(length, dtype=center.dtype, device=center.device)
    d = (cells - center.unsqueeze(-1)).abs()
    s = extent.unsqueeze(-1)
    if profile == "gaussian":
        if length == 0:
            return d
        nearest = d.detach().amin(-1, keepdim=True)  # shifting by a constant leaves softmax and its gradient alone
        width = s.clamp(min=_NARROW)
        k = torch.softmax(-0.5 * (d - nearest) * (d + nearest) / width / width, dim=-1)
        return torch.where(s <= 0, 0, k)
    f = torch.relu(s - d)
    if profile == "log-linear":
        f = torch.log1p(temperature * f)
    total = f.sum(-1, keepdim=True)
    return f / torch.where(total == 0, 1, total)


def _kernel(regions: Tensor, size: tuple[int, int], profile: str, temperature: float) -> Tensor:
    center, extent = regions[..., :2], regions[..., 2:]  # each (*, N, 2) = across, down
    if size[0] == size[1]:  # both axes at once: on small maps the calls cost more than the arithmetic
        k_x, k_y = _axis(center, extent, size[0], profile, temperature).unbind(-2)
    else:
        k_x = _axis(center[..., 0], extent[..., 0], size[1], profile, temperature)
        k_y = _axis(center[..., 1], extent[..., 1], size[0], profile, temperature)
    return k_y.unsqueeze(-1) * k_x.unsqueeze(-2)


def region_kernel(regions: Tensor, size: tuple[int, int], profile: str, temperature: float) -> Tensor:
    """K (*, N, H, W) in the dtype of `regions`."""
    wide = regions.to(torch.promote_types(regions.dtype, torch.float32))
    return _kernel(wide, size, profile, temperature).to(regions.dtype).contiguous()


def region_pool(x: Tensor, regions: Tensor, profile: str, temperature: float, position: Tensor | None = None) -> Tensor:
    """nodes (*, N, C) = K (x + position)^T, where one position map (C, H, W) serves all frames."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with full_precision(x.device.type):
        k = _kernel(regions.to(wide), (x.shape[-2], x.shape[-1]), profile, temperature)
        k = k.flatten(-2)
        nodes = torch.matmul(k, x.to(wide).flatten(-2).mT)
        if position is not None:  # one product for all frames, and no second map of x's size
            nodes = nodes + F.linear(k, position.to(wide).flatten(1))
        return nodes.to(x.dtype)


def region_remap(nodes: Tensor, regions: Tensor, size: tuple[int, int], profile: str, temperature: float) -> Tensor:
    """y (*, C, H, W) = nodes^T K."""
    wide = torch.promote_types(nodes.dtype, torch.float32)
    with full_precision(nodes.device.type):
        k = _kernel(regions.to(wide), size, profile, temperature)
        y = torch.matmul(nodes.to(wide).mT, k.flatten(-2)).unflatten(-1, size)
        return y.to(nodes.dtype)
