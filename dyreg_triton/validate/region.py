"""Argument checks of the region ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.validation import FLOATS, describe, is_dense, pair, profile_arguments, what

OPERANDS = {"region_pool": ("x", "regions"), "region_remap": ("nodes", "regions"), "region_kernel": ("regions",)}


def region_arguments(
    op: str,
    regions: Tensor,
    profile: str,
    temperature: float,
    *,
    x: Tensor | None = None,
    nodes: Tensor | None = None,
    size: object = None,
) -> tuple[int, int]:
    """Check a call of a region op and return its map size (H, W).

    Raises TypeError for arguments of the wrong type or dtype and ValueError for wrong values, ranks and shapes.
    """
    tensors = {"x": x, "nodes": nodes, "regions": regions}
    call: dict[str, object] = {name: tensors[name] for name in OPERANDS[op]}
    if size is not None:
        call["size"] = size
    for name, t in call.items():
        if name != "size" and not is_dense(t):
            raise TypeError(
                f"{op}: {name} is {what(t)}, a {type(t).__name__}; accepted is a dense torch.Tensor; "
                f"call: {describe(call)}"
            )
    profile_arguments(op, profile, temperature, call)

    def fail(name: str, what: str, accepted: str, error: type[Exception] = ValueError) -> None:
        raise error(f"{op}: {name} {what}; accepted is {accepted}; call: {describe(call)}")

    if regions.dim() < 2 or regions.shape[-1] != 4:
        fail("regions", f"has shape {tuple(regions.shape)}", "(*, N, 4) = (cx, cy, w, h) in cells of the map")
    lead = regions.shape[:-2]
    features, name, rank = (x, "x", 3) if x is not None else (nodes, "nodes", 2)
    if features is not None:
        form = "(*, C, H, W)" if rank == 3 else "(*, N, C)"
        if features.dim() < rank:
            fail(name, f"has {features.dim()} dimensions", form)
        if features.shape[:-rank] != lead:
            fail(name, f"has leading dimensions {tuple(features.shape[:-rank])}", f"those of regions, {tuple(lead)}")
        if rank == 2 and features.shape[-2] != regions.shape[-2]:
            fail(name, f"has {features.shape[-2]} nodes", f"the number of regions, {regions.shape[-2]}")
        if features.dtype not in FLOATS:
            fail(name, f"is {str(features.dtype)[6:]}", "float16, bfloat16, float32 or float64", TypeError)
        if regions.dtype not in (features.dtype, torch.float32):
            fail("regions", f"is {str(regions.dtype)[6:]}", f"{name}'s dtype or float32", TypeError)
        if regions.device != features.device:
            fail("regions", f"is on {regions.device}", f"{name}'s device, {features.device}")
    elif regions.dtype not in FLOATS:
        fail("regions", f"is {str(regions.dtype)[6:]}", "float16, bfloat16, float32 or float64", TypeError)
    if x is not None:
        return x.shape[-2], x.shape[-1]
    return pair(op, "size", size, call)
