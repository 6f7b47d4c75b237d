"""From a network's raw outputs to regions on a map (DyReG, Duta et al., appendix A, equations 11-13)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.validation import FLOATS, choice, is_dense, pair, positive_number, what

INITS = ("center", "grid")
RULES = ("published", "paper")
_EDGE = 1 - 1e-7  # atanh's argument stays inside (-1, 1)
_LARGEST = 20.0  # of log sizes, up or down: such regions are flat on any map or a point; beyond, infinite or 0


def _across_down(across: float, down: float, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Two numbers as a tensor, made on the device: from Python it would be a copy that the host waits for."""
    return torch.linspace(across, down, 2, dtype=dtype, device=device)


def initial_centers(grid: tuple[int, int], size: tuple[int, int], init: str, device: torch.device | None) -> Tensor:
    """(N, 2) = (x, y) in cells, float32: "center" puts every node in the middle, "grid" in that of its own cell.

    On a device, or where it is None on torch's default one.
    """
    (rows, columns), (height, width) = grid, size
    if init == "center":
        return _across_down(width / 2, height / 2, torch.float32, device).repeat(rows * columns, 1)
    y = torch.linspace(0, height, 2 * rows + 1, device=device, dtype=torch.float32)[1::2]
    x = torch.linspace(0, width, 2 * columns + 1, device=device, dtype=torch.float32)[1::2]
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=-1)


def regions_from_centers(
    offsets: Tensor,
    centers: Tensor,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    rule: str = "published",
    size_ratio: float | None = None,
) -> Tensor:
    """`regions_from_offsets` with the initial centers (N, 2) = (x, y) given."""
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
    log_size, shift = offsets.unflatten(-1, (2, 2)).flip(-1).unbind(-2)  # both now (*, N, 2) = across, down
    log_size = log_size.clamp(-_LARGEST, _LARGEST)
    extent = _across_down(size[1], size[0], offsets.dtype, offsets.device)
    at_rest = torch.atanh((2 * centers.to(offsets.dtype) / extent - 1).clamp(-_EDGE, _EDGE))
    center = (torch.tanh(shift + at_rest) + 1) * (extent / 2)
    if rule == "published":
        center = torch.minimum(center.clamp(min=0), extent - 1)
    if rule == "published" and size_ratio is None:
        start = _across_down(size[1] / (2 * grid[1]), size[0] / (2 * grid[0]), offsets.dtype, offsets.device)
        half = log_size.exp() * (start + 1) + 1
    else:
        half = log_size.exp() * (extent / (6 if size_ratio is None else size_ratio))
    return torch.cat([center, half], dim=-1)


def regions_from_offsets(
    offsets: Tensor,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    init: str = "center",
    rule: str = "published",
    size_ratio: float | None = None,
) -> Tensor:
    """Map raw offsets to regions (cx, cy, w, h) in cells that stay on the map.

    With (o_h, o_w, o_y, o_x) the offsets of a node, c its initial center and (rows, columns) the grid, down the map
    (and likewise across):

        cy = H/2 (1 + tanh(o_y + atanh(2 c_y / H - 1))),   clamped to [0, H - 1]   (equation 13)
        h  = exp(o_h) (H / (2 rows) + 1) + 1                                       (equation 11)

    `rule="paper"` takes h = exp(o_h) H / 6 and leaves the center unclamped, as the paper writes.

    Args:
        offsets: (*, N, 4) = (log height, log width, down, across), N = rows * columns; any floating dtype.
        grid: (rows, columns) of nodes.
        size: (H, W) of the map.
        init: "center" (all nodes in the middle of the map) or "grid" (each in the middle of its cell of the grid).
        rule: "published" or "paper".
        size_ratio: lambda > 0: h = exp(o_h) H / lambda under either rule (the paper's appendix B.3).

    Returns:
        regions (*, N, 4) = (cx, cy, w, h), float32 or wider: a region in 16 bits is percents off.

    Raises:
        TypeError: offsets is no floating tensor.
        ValueError: a wrong shape, grid, size, init, rule or size_ratio.
    """
    op = "regions_from_offsets"
    if not is_dense(offsets) or offsets.dtype not in FLOATS:
        raise TypeError(
            f"{op}: offsets is {what(offsets)}; accepted is a dense floating tensor (*, N, 4): "
            "float16, bfloat16, float32 or float64"
        )
    call = {"offsets": offsets, "grid": grid, "size": size}
    grid, size = pair(op, "grid", grid, call), pair(op, "size", size, call)
    choice(op, "init", init, INITS, call)
    choice(op, "rule", rule, RULES, call)
    if size_ratio is not None:
        positive_number(op, "size_ratio", size_ratio, call)
    if offsets.dim() < 2 or offsets.shape[-1] != 4 or offsets.shape[-2] != grid[0] * grid[1]:
        raise ValueError(
            f"{op}: offsets has shape {tuple(offsets.shape)}; accepted is (*, {grid[0] * grid[1]}, 4) for grid {grid}"
        )
    centers = initial_centers(grid, size, init, offsets.device)
    return regions_from_centers(offsets, centers, grid=grid, size=size, rule=rule, size_ratio=size_ratio)
