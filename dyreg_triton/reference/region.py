"""Region kernel, pooling and re-mapping, literally (DyReG, Duta et al., equations 5-7, 10 and 14-17).

With d = |centre - cell| on an axis and s the region's half-extent, an axis profile f is
    linear       max(0, s - d)
    gaussian     exp(-d^2 / (2 s^2))
    log-linear   log(1 + temperature * max(0, s - d))
and 0 for s <= 0. K[n, h, w] = f_y[n, h] f_x[n, w] / sum over the map, or 0 where that sum is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.autocast import full_precision
from ..validate.region import region_arguments


def _profile(center: Tensor, extent: Tensor, length: int, profile: str, temperature: float) -> Tensor:
    """f (*, N, length), up to a positive factor per region."""
    cells = torch.arange(length, dtype=center.dtype, device=center.device)
    d = (cells - center[..., None]).abs()
    s = extent[..., None]
    if profile == "linear":
        return torch.relu(s - d)
    if profile == "log-linear":
        return torch.log1p(temperature * torch.relu(s - d))
    positive = torch.where(s <= 0, 1, s)  # keeps the gradient of the unused branch finite
    # softmax divides by the sum and subtracts the maximum: a plain sum underflows where the centre is far away
    return torch.where(s <= 0, 0, torch.softmax(-(d**2) / (2 * positive**2), dim=-1))


def _kernel(regions: Tensor, size: tuple[int, int], profile: str, temperature: float) -> Tensor:
    cx, cy, w, h = regions.unbind(-1)
    k_y = _profile(cy, h, size[0], profile, temperature)
    k_x = _profile(cx, w, size[1], profile, temperature)
    k = torch.einsum("...h,...w->...hw", k_y, k_x)
    total = k.sum((-2, -1), keepdim=True)
    return k / torch.where(total == 0, 1, total)


def region_kernel(
    regions: Tensor, size: tuple[int, int], *, profile: str = "linear", temperature: float = 1.0
) -> Tensor:
    """K (*, N, H, W) in the dtype of `regions`; arguments and errors as `dt.ops.region_kernel`."""
    size = region_arguments("region_kernel", regions, profile, temperature, size=size)
    wide = regions.to(torch.promote_types(regions.dtype, torch.float32))
    with full_precision(regions.device.type):
        return _kernel(wide, size, profile, temperature).to(regions.dtype).contiguous()


def region_pool(x: Tensor, regions: Tensor, *, profile: str = "linear", temperature: float = 1.0) -> Tensor:
    """nodes (*, N, C), nodes[n, c] = sum_hw K[n, h, w] x[c, h, w] (equation 7); as `dt.ops.region_pool`."""
    size = region_arguments("region_pool", regions, profile, temperature, x=x)
    wide = torch.promote_types(x.dtype, torch.float32)
    with full_precision(x.device.type):
        k = _kernel(regions.to(wide), size, profile, temperature)
        return torch.einsum("...nhw,...chw->...nc", k, x.to(wide)).to(x.dtype).contiguous()


def region_remap(
    nodes: Tensor, regions: Tensor, size: tuple[int, int], *, profile: str = "linear", temperature: float = 1.0
) -> Tensor:
    """y (*, C, H, W), y[c, h, w] = sum_n K[n, h, w] nodes[n, c] (equation 10); as `dt.ops.region_remap`."""
    size = region_arguments("region_remap", regions, profile, temperature, nodes=nodes, size=size)
    wide = torch.promote_types(nodes.dtype, torch.float32)
    with full_precision(nodes.device.type):
        k = _kernel(regions.to(wide), size, profile, temperature)
        return torch.einsum("...nhw,...nc->...chw", k, nodes.to(wide)).to(nodes.dtype).contiguous()
