"""The weights of P and Q, laid out on the map that they transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .._core.validation import describe, flag, is_dense, is_integer, pair, what


def attention_weights(
    matrices: Any,
    size: Sequence[int],
    *,
    coarse: Sequence[int] | None = None,
    group: int | Sequence[int] | None = None,
) -> Tensor:
    """The weight with which each cell enters the outputs, all of them together: (B, G, T, H, W).

        A[m, n] = (sum over i of P[i, m]) (sum over j of Q[n, j])

    which is the sum of the contribution maps of all (i, j). Where rows of P and columns of Q sum to 1, an output is a
    weighted mean and the mean of A is 1: above 1 are cells that count more than others. What T, the temporal matrix,
    mixes afterwards is not in it.

    matrices: anything with p (B, G, T, Sh, Sh) and q (B, G, T, Sw, Sw), as `BATransform.matrices(x)` gives.
    size: (H, W) of the map. P acts on coarse cells of a x b cells, and each of these has its coarse cell's value; a map
        that was extended to whole coarse cells is cut again.
    coarse: (a, b); by default the smallest that cover the map, ceil(H / Sh) and ceil(W / Sw). Only a map that is no
        multiple can have larger ones (`Recorded` knows them).
    group: of which groups, one or several, in this order; all by default.

    float32, or float64 where the matrices are. Raises TypeError or ValueError for other arguments.
    """
    op = "attention_weights"
    p, q, (height, width), (a, b) = _checked(op, matrices, size, coarse)
    p, q = _chosen(op, group, p, q)
    rows = p.sum(-2).repeat_interleave(a, -1)[..., :height]
    columns = q.sum(-1).repeat_interleave(b, -1)[..., :width]
    return rows.unsqueeze(-1) * columns.unsqueeze(-2)


def contribution_maps(
    matrices: Any,
    size: Sequence[int],
    cell: Sequence[int],
    *,
    coarse: Sequence[int] | None = None,
    group: int | Sequence[int] | None = None,
    exact: bool = False,
) -> Tensor:
    """What the output at `cell` = (row, column) of the map is made of: (B, G, T, H, W).

        C[m, n] = P[i, m] Q[n, j]        (Chi et al., supplement, equation 1)

    with (i, j) the coarse cell that holds `cell`. kron(P, I_a) links only cells at the same offset inside their coarse
    cells: row i a + u of the output takes from rows m a + u alone, and columns likewise. So a coarse cell has one cell
    in it that `cell` is made of. By default the whole coarse cell is shown with its weight, as a picture wants it. With
    exact=True the weight is at that one cell and all others are 0; then, without the temporal mix,

        y[b, c, t, row, column] = sum over m, n of C[b, g(c), t, m, n] x[b, c, t, m, n]

    also where the map was extended by repeating its last row and column: the weights of the repeated cells are added to
    the cell that they repeat. (By default they are cut off, as in `attention_weights`.)

    The other arguments, dtype and errors are those of `attention_weights`.
    """
    op = "contribution_maps"
    flag(op, "exact", exact)
    p, q, (height, width), (a, b) = _checked(op, matrices, size, coarse)
    row, column = cell_of(op, cell, (height, width))
    p, q = _chosen(op, group, p, q)
    rows, columns = p[..., row // a, :], q[..., :, column // b]
    if exact:
        rows, columns = _at_offset(rows, a, row % a, height), _at_offset(columns, b, column % b, width)
    else:
        rows = rows.repeat_interleave(a, -1)[..., :height]
        columns = columns.repeat_interleave(b, -1)[..., :width]
    return rows.unsqueeze(-1) * columns.unsqueeze(-2)


def _at_offset(weights: Tensor, step: int, offset: int, length: int) -> Tensor:
    """Weight m of (*, S) at cell m step + offset of (*, length), or at the last cell where that is beyond it."""
    where = (torch.arange(weights.shape[-1], device=weights.device, dtype=torch.int64) * step + offset).clamp(
        max=length - 1
    )
    return weights.new_zeros(*weights.shape[:-1], length).index_add(-1, where, weights)


def _checked(op: str, matrices: Any, size: Any, coarse: Any) -> tuple[Tensor, Tensor, tuple[int, int], tuple[int, int]]:
    """P and Q in float32 or wider, the map's size and that of a coarse cell."""
    p, q = getattr(matrices, "p", None), getattr(matrices, "q", None)
    for name, matrix in (("p", p), ("q", q)):
        if not is_dense(matrix) or not matrix.is_floating_point():
            raise TypeError(
                f"{op}: {name} of matrices is {what(matrix)}; accepted is a dense floating-point torch.Tensor, "
                "in what BATransform.matrices(x) gives"
            )
        if matrix.dim() != 5 or matrix.shape[-1] != matrix.shape[-2] or 0 in matrix.shape[1:]:
            raise ValueError(
                f"{op}: {name} is {what(matrix)}; accepted is (B, G, T, S, S), of which only B may be 0; "
                f"call: {describe({'p': p, 'q': q})}"
            )
    p, q = cast(Tensor, p), cast(Tensor, q)
    if p.shape[:3] != q.shape[:3] or p.device != q.device:
        raise ValueError(
            f"{op}: q is {what(q)}; accepted is (B, G, T, Sw, Sw) with p's B, G, T and device; "
            f"call: {describe({'p': p, 'q': q})}"
        )
    height, width = pair(op, "size", size)
    sides = p.shape[-1], q.shape[-1]
    if coarse is None:
        steps = -(-height // sides[0]), -(-width // sides[1])
    else:
        steps = pair(op, "coarse", coarse)
    for axis, length, side, step in zip(("rows", "columns"), (height, width), sides, steps, strict=True):
        if not (side - 1) * step < length <= side * step:
            raise ValueError(
                f"{op}: size is {(height, width)}, of which the {axis} are not {side} coarse cells of {step}; accepted "
                f"are {(side - 1) * step + 1} to {side * step} {axis} with these matrices and coarse cells; "
                f"call: {describe({'p': p, 'q': q, 'coarse': coarse})}"
            )
    wide = torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)
    return p.to(wide), q.to(wide), (height, width), steps


def cell_of(op: str, cell: Any, size: tuple[int, int]) -> tuple[int, int]:
    """`cell` as a row and a column of the map."""
    if (
        not isinstance(cell, (tuple, list, torch.Size))
        or len(cell) != 2
        or not all(is_integer(at) and 0 <= at < length for at, length in zip(cell, size, strict=True))
    ):
        raise ValueError(
            f"{op}: cell is {what(cell)}; accepted are two integers (row, column), from 0 to below the map's {size}"
        )
    return int(cell[0]), int(cell[1])


def _chosen(op: str, group: Any, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The groups asked for."""
    if group is None:
        return p, q
    groups = [group] if is_integer(group) else group
    count = p.shape[1]
    if (
        not isinstance(groups, (tuple, list, range))
        or not groups
        or not all(is_integer(g) and 0 <= g < count for g in groups)
    ):
        raise ValueError(
            f"{op}: group is {what(group)}; accepted is None, an integer from 0 to {count - 1}, or several"
        )
    where = torch.tensor([int(g) for g in groups], device=p.device, dtype=torch.int64)
    return p.index_select(1, where), q.index_select(1, where)
