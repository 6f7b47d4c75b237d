"""Region kernel, pooling and re-mapping (DyReG, Duta et al., equations 5-7, 10 and 14-17).

A region is (cx, cy, w, h) in cells of the map: centre column and row, half-extent in columns and rows. Its kernel is
separable, K[n, h, w] = k_y[n, h] k_x[n, w], each axis a profile f(s, d) of the distance d to the centre, normalised
to sum 1 over the map:

    linear       f = max(0, s - d)
    gaussian     f = exp(-d^2 / (2 s^2))
    log-linear   f = log(1 + temperature * max(0, s - d))

A region with s <= 0 on an axis, or one that reaches no cell, is empty: its kernel and all its gradients are 0.
Sub-gradients at d = 0 and d = s are 0. A NaN region spoils its own node in pooling, and its own map in re-mapping.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..dispatch import choose
from ..eager import region as eager
from ..validate import region_arguments


def _autocast(features: Tensor) -> Tensor:
    """Under autocast x and nodes take its dtype, as in a matrix product; regions never do."""
    kind = features.device.type
    if features.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return features.to(torch.get_autocast_dtype(kind))
    return features


def region_kernel(
    regions: Tensor, size: tuple[int, int], *, profile: str = "linear", temperature: float = 1.0
) -> Tensor:
    """The dense kernel K of each region.

    Args:
        regions: (*, N, 4) = (cx, cy, w, h) in cells; float16, bfloat16, float32 or float64.
        size: (H, W), positive.
        profile: "linear", "gaussian" or "log-linear".
        temperature: > 0; sharpness of "log-linear" (equation 17), unused by the others.

    Returns:
        (*, N, H, W) in the dtype of `regions`, contiguous.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype not named above.
        ValueError: a wrong rank, size, profile or temperature.
        RuntimeError: the backend asked for cannot run here.
    """
    size = region_arguments("region_kernel", regions, profile, temperature, size=size)
    name = choose("region_kernel", regions.device, regions.dtype)
    if name == "reference":
        return reference.region_kernel(regions, size, profile=profile, temperature=temperature)
    return eager.region_kernel(regions, size, profile, temperature)


def region_pool(x: Tensor, regions: Tensor, *, profile: str = "linear", temperature: float = 1.0) -> Tensor:
    """Pool one feature vector per region (equation 7): nodes[n, c] = sum_hw K[n, h, w] x[c, h, w].

    Args:
        x: (*, C, H, W), any strides; float16, bfloat16, float32, or float64 (not on a GPU's Triton path).
        regions: (*, N, 4) = (cx, cy, w, h) in cells, with x's leading dimensions; x's dtype or float32.
        profile, temperature: as `region_kernel`.

    Returns:
        nodes (*, N, C) in x's dtype, contiguous. Sums accumulate in float32 (float64 for float64). Under autocast x
        is cast to the autocast dtype; regions are not. A cell of weight 0 may be left unread.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype not named above.
        ValueError: a wrong rank, shape, device, profile or temperature.
        RuntimeError: the backend asked for cannot run here.
    """
    region_arguments("region_pool", regions, profile, temperature, x=x)
    x = _autocast(x)
    name = choose("region_pool", x.device, x.dtype)
    if name == "reference":
        return reference.region_pool(x, regions, profile=profile, temperature=temperature)
    return eager.region_pool(x, regions, profile, temperature)


def region_remap(
    nodes: Tensor, regions: Tensor, size: tuple[int, int], *, profile: str = "linear", temperature: float = 1.0
) -> Tensor:
    """Map node features back onto their regions (equation 10): y[c, h, w] = sum_n K[n, h, w] nodes[n, c].

    Args:
        nodes: (*, N, C), any strides; dtypes as `region_pool`'s x.
        regions: (*, N, 4) = (cx, cy, w, h) in cells, with the nodes' leading dimensions; their dtype or float32.
        size: (H, W), positive.
        profile, temperature: as `region_kernel`.

    Returns:
        y (*, C, H, W) in the dtype of `nodes`, contiguous; precision and autocast as `region_pool`.

    Raises:
        TypeError, ValueError, RuntimeError: as `region_pool`.
    """
    size = region_arguments("region_remap", regions, profile, temperature, nodes=nodes, size=size)
    nodes = _autocast(nodes)
    name = choose("region_remap", nodes.device, nodes.dtype)
    if name == "reference":
        return reference.region_remap(nodes, regions, size, profile=profile, temperature=temperature)
    return eager.region_remap(nodes, regions, size, profile, temperature)
