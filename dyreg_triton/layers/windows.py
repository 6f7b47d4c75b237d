"""Matrices for maps of any size from a predictor of one size: sliding windows (BAT supplement, section 2).

An axis of n cells and a window of s: scale = n // s, m = ceil(n / scale) coarse cells of `scale` each, for which the
axis is extended to m * scale by repeating its last cell. m - s + 1 windows slide over the coarse cells with stride 1;
window i predicts rows and columns i to i + s of the m x m matrix, and where windows overlap they are averaged.

Where the published code runs, n is a multiple of its scale and m is s or s + 1, and this is what it does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Axis(NamedTuple):
    """An axis cut into `cells` coarse cells of `scale` each."""

    length: int
    cells: int
    scale: int

    @property
    def extension(self) -> int:
        """How often the last cell is repeated."""
        return self.cells * self.scale - self.length


def cut(length: int, window: int) -> Axis:
    """The coarse cells of an axis at least as long as a window."""
    scale = length // window
    return Axis(length, -(-length // scale), scale)


def cut_columns(length: int, window: int, rows: Axis) -> Axis:
    """The coarse cells of the columns, by themselves but for one case, for which the published code is followed.

    It takes the rows' number for both: where two windows slide over the rows, they do over columns that it divides.
    """
    if rows.cells == window + 1 and rows.extension == 0 and length % rows.cells == 0:
        return Axis(length, rows.cells, length // rows.cells)
    return cut(length, window)


def extended(x: Tensor, dim: int, times: int) -> Tensor:
    """x with the last slice of a dimension repeated; its gradient is a sum in fixed order, unlike that of padding."""
    if times == 0:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([x, last.expand(*[times if i == dim % x.dim() else -1 for i in range(x.dim())])], dim)


def assembled(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """The m x m matrices of n windows, (*, n, s, s) -> (*, m, m), 0 where no window is, and where that is, (m, m).

    None where one window covers all.
    """
    windows, size = logits.shape[-3], logits.shape[-1]
    if windows == 1:
        return logits.squeeze(-3), None
    cells = windows + size - 1
    # window i begins at (i, i), which is i * (cells + 1) in a flat matrix: rows that are this much longer than a
    # matrix, read as if they were not, have shifted each window to its place
    whole, shift = cells * cells, cells + 1
    flat = F.pad(F.pad(logits, (0, cells - size)).flatten(-2), (0, whole + shift - size * cells))
    flat = flat.flatten(-2)[..., : windows * whole].unflatten(-1, (windows, whole))
    i = torch.arange(cells, device=logits.device, dtype=torch.int64)
    first = (torch.maximum(i[:, None], i) - (size - 1)).clamp(min=0)
    last = torch.minimum(i[:, None], i).clamp(max=windows - 1)
    count = (last - first + 1).clamp(min=0)
    return flat.sum(-2).unflatten(-1, (cells, cells)) / count.clamp(min=1), count == 0


def normalised(logits: Tensor, axis: int, kind: str, rule: str) -> Tensor:
    """Weights (*, m, m) that sum to 1 along `axis`, of the logits of windows (*, n, s, s), in float32 or wider.

    kind: "softmax", or "sigmoid" divided by its sum. rule: cells that no window covers have "weight" 0 or "logit" 0.
    """
    logits, bare = assembled(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    if kind == "sigmoid":  # exp(log sigmoid) divided by its sum, which is never 0 / 0
        logits = F.logsigmoid(logits)
    if bare is not None and rule == "weight":
        logits = logits.masked_fill(bare, -torch.inf)
    return logits.softmax(axis)
