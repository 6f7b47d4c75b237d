"""The bilinear attentional transform, literally (BAT, Chi et al.): Y = P X Q in each group of channels and frame, then
a product over time, with every matrix written out by kron(., I) to the size of its axis."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.autocast import full_precision
from .._core.layouts import memory_format
from ..validate.bilinear import bilinear_arguments


def _written_out(matrices: Tensor, length: int) -> Tensor:
    """kron(M, I) of each matrix M (*, S, S), (*, length, length)."""
    times = length // matrices.shape[-1]
    identity = torch.eye(times, dtype=matrices.dtype, device=matrices.device)
    return torch.einsum("...ij,uv->...iujv", matrices, identity).flatten(-4, -3).flatten(-2)


def bilinear_transform(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None = None) -> Tensor:
    """y = kron(T, I) over time of kron(P, I) x kron(Q, I); arguments and errors as `dt.ops.bilinear_transform`."""
    bilinear_arguments("bilinear_transform", {"x": x, "p": p, "q": q, "t": t})
    wide = torch.promote_types(x.dtype, torch.float32)
    frames, height, width = x.shape[-3:]
    with full_precision(x.device.type):
        by_row, by_column = _written_out(p.to(wide), height), _written_out(q.to(wide), width)
        y = x.to(wide).unflatten(1, (p.shape[1], -1))  # (B, G, C / G, T, H, W)
        y = torch.einsum("bgtij,bgctjl,bgtlk->bgctik", by_row, y, by_column).flatten(1, 2)
        if t is not None:
            y = y.unflatten(1, (t.shape[1], -1))
            y = torch.einsum("bgst,bgcthw->bgcshw", _written_out(t.to(wide), frames), y).flatten(1, 2)
        return y.to(x.dtype).contiguous(memory_format=memory_format(x))
