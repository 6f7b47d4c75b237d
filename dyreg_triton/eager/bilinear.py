"""The bilinear attentional transform in plain torch.

Channels that share P, Q and T are a unit; nothing is expanded to single channels. One copy brings a unit's coarse rows
to the front, where P is one matrix product over all of its channels; the rows that come out of it are contiguous, so Q
is another without a copy, and so is T, since frames lead. Arguments are checked by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.autocast import full_precision
from .._core.layouts import memory_format, units


def _of_units(matrices: Tensor, count: int) -> Tensor:
    """(B, G, ...) for `count` units: each group's as often as it has units."""
    times = count // matrices.shape[1]
    return matrices if times == 1 else matrices.repeat_interleave(times, 1)


def bilinear_transform(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None = None) -> Tensor:
    """y (B, C, T, H, W), y = kron(T, I) over time of kron(P, I) x kron(Q, I)."""
    batch, channels, frames, height, width = x.shape
    down, across = p.shape[-1], q.shape[-1]
    count = units(p.shape[1], *(() if t is None else (t.shape[1],)))
    each, rows = channels // count, height // down
    wide = torch.promote_types(x.dtype, torch.float32)
    with full_precision(x.device.type):
        p, q = (_of_units(m.to(wide), count) for m in (p, q))
        z = x.to(wide).reshape(batch, count, each, frames, down, rows * width)
        z = z.permute(0, 1, 3, 4, 2, 5)  # batch, unit, frame, coarse row; channel, the rest of the row
        z = p @ z.flatten(-2)
        fine = width // across
        if fine > 1:  # its zeros cost less than a second copy
            identity = torch.eye(fine, dtype=wide, device=x.device)
            q = (q[..., :, None, :, None] * identity[:, None, :]).flatten(-4, -3).flatten(-2)
        z = z.reshape(batch, count, frames, each * height, width) @ q
        if t is not None:
            phases = frames // t.shape[-1]
            z = _of_units(t.to(wide), count) @ z.reshape(batch, count, t.shape[-1], phases * each * height * width)
        z = z.view(batch, count, frames, down, each, rows, width).permute(0, 1, 4, 2, 3, 5, 6)
        return z.reshape(x.shape).to(x.dtype).contiguous(memory_format=memory_format(x))
