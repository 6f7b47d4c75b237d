"""Configs that are legal on the smallest supported GPU, chosen from the shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..layouts import units


@dataclass(frozen=True)
class Config:
    """Block sizes and warps of one launch."""

    block_n: int
    block_c: int
    block_p: int
    num_warps: int = 4
    registers: int | None = None  # the most that a thread may have, on NVIDIA; None leaves it to the compiler

    def __post_init__(self) -> None:
        for name, most in (("block_n", 1 << 30), ("block_c", 1 << 30), ("block_p", 1 << 30), ("num_warps", 32)):
            value = getattr(self, name)
            if not 0 < value <= most or value & (value - 1):
                raise ValueError(f"Config: {name} is {value!r}; accepted is a power of two up to {most}")
        if self.registers is not None and not 0 < self.registers <= 255:
            raise ValueError(f"Config: registers is {self.registers!r}; accepted are 1 to 255, and None")


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RelationalConfig:
    """Block sizes of one launch of relational self-attention: positions, taps of the window, channels, latent channels.

    `block_m` is 16 or 32, to which the taps are padded.
    `order` of evaluation: "first" by matrices per position, "second" by kernels and correlations per neighbour.
    `plane`: rows and columns of the tile of positions whose keys' or values' gradient a program sums.
    `splits`: how many programs share the sum of a weight's gradient.
    `clips`: how many the backward takes at once, since that is what its intermediate gradients are held for.
    """

    block_p: int = 16
    block_m: int = 16
    block_c: int = 16
    block_d: int = 32
    order: str = "first"
    plane: tuple[int, int] = (8, 8)
    splits: int = 1
    clips: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        # products contract over 16 terms or more: taps, latent channels, and positions times queries, of at least 8
        least = {"block_p": 2, "block_m": 16, "block_c": 8, "block_d": 16, "num_warps": 1, "num_stages": 1}
        most = {"block_m": 32}
        powers = {
            **{name: getattr(self, name) for name in least if name != "num_stages"},
            "plane": math.prod(self.plane) if min(self.plane) > 0 else 0,
        }
        for name, value in powers.items():
            low, high = least.get(name, 1), most.get(name, 1024)
            if not low <= value <= high or value & (value - 1):
                raise ValueError(
                    f"RelationalConfig: {name} is {getattr(self, name)!r}; accepted are powers of two "
                    f"from {low} to {high}"
                )
        for name in ("splits", "clips", "num_stages"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"RelationalConfig: {name} is {getattr(self, name)!r}; accepted is an integer > 0")
        if self.order not in ("first", "second"):
            raise ValueError(f"RelationalConfig: order is {self.order!r}; accepted are 'first' and 'second'")


# (channels, cells, warps) of a program: few instructions for what it reads and writes, and so few registers that two or
# more programs share a multiprocessor of sm_90 and hide each other's latency (read from the machine code). The weights
# of a tile's cells cost the same for few channels as for many, and each warp sums the axes for itself: hence many
# channels and few warps.
_REGION = {
    "gather": ((64, 128, 4), (64, 32, 8)),  # 16-bit, 32-bit
    "scatter": ((64, 64, 4), (64, 32, 4)),
    "gather_moments": ((128, 64, 8), (32, 16, 4)),
    "scatter_moments": ((64, 64, 8), (32, 16, 4)),
    "dense": ((16, 256, 4), (16, 256, 4)),
    "dense_moments": ((16, 64, 4), (16, 64, 4)),
}
_FILL = 2048  # warps that fill a large GPU, at about 16 a multiprocessor


@lru_cache(maxsize=4096)
def region(
    kind: str, frames: int, nodes: int, channels: int, cells: int, itemsize: int, family: str = "nvidia"
) -> Config:
    """Blocks for a region kernel: `kind` is what it does, see kernels/region.py.

    A program takes all regions up to 64 (32 where it keeps moments, writes kernels, or where there are more than 64 to
    scatter, 16 where it both reads and writes a map, beyond which registers spill), and cells shrink as regions grow,
    faster where moments are kept or kernels written; channels shrink while there are too few warps to fill a large GPU.
    A map of up to 64 cells is one tile, for it is read and written as one run of wide accesses. No block exceeds what
    its dimension needs, and none falls below the matrix product's least, 16. Four warps work on a small tile, and on
    any of AMD's, whose warps are twice as wide, so that a thread's share is still a wide access. Where moments meet
    float32 products, small tiles, maps of an odd number of cells or Blackwell, the compiler would rather spill a
    register than run fewer programs at once, unless it is told otherwise.
    """
    block_c, block_p, num_warps = _REGION[kind][itemsize >= 4]
    moments, dense = kind in ("gather_moments", "scatter_moments"), kind.startswith("dense")
    fits = {"gather_moments": 32, "scatter_moments": 16, "dense": 32, "scatter": 64 if nodes <= 64 else 32}
    block_n = min(fits.get(kind, 64), max(16, _power_of_two(nodes)))
    shrink = (block_n // 16) ** (2 if moments or dense else 1)
    whole = max(16, _power_of_two(cells))
    if shrink == 1 and whole <= 64 and not dense:
        block_c, block_p, num_warps = 64 if itemsize >= 4 else 128, whole, 8 if moments else 4
    if shrink > 1 and not dense:  # more regions need more registers
        num_warps = 8
    if family == "amd":  # a wavefront is two warps
        num_warps = min(num_warps, 4)
    if not dense and cells > 64 and cells % 2 == 1:  # narrow loads, of many addresses
        block_p //= 2
    block_p = max(16, min(block_p // shrink, whole))
    block_c = max(16, min(block_c, _power_of_two(channels)))
    while block_c > 16 and frames * -(-channels // block_c) * num_warps < _FILL:
        block_c //= 2
    tile = block_c * block_p
    unlimited = moments and (tile <= 1024 or itemsize >= 4 or (cells > 64 and cells % 2 == 1) or family == "blackwell")
    if tile <= (1024 if shrink == 1 else 512):
        num_warps = 4
    return Config(block_n, block_c, block_p, num_warps, 255 if unlimited else None)


RELATIONAL_LIMIT = {"L": 16, "C": 128, "D": 128, "E": 128, "F": 128, "M": 65536}
_WIDTHS = (8, 16, 32, 64, 128)

# Blocks by width of the tiles, of the widths above: large ones with which RSANet's stages compile for every target of
# the family within the least of their shared memories and without spills, read from the machine code. Four-byte
# operands beyond 64 channels do spill, and TF32's a few bytes on sm_80.
_RELATIONAL: dict[tuple[str, bool], dict[str, tuple[RelationalConfig, ...]]] = {}


def _blocks(names: str, *rows: tuple[Any, ...]) -> tuple[RelationalConfig, ...]:
    """One config per width; the last row holds for the widths beyond."""
    found = [RelationalConfig(**dict(zip(names.split(), row, strict=True))) for row in rows]
    return tuple(found + [found[-1]] * (len(_WIDTHS) - len(found)))


_CHAIN = "block_p block_c num_warps num_stages"
_KEYS = "plane block_p block_c block_d num_warps num_stages"
_VALUES = "plane block_p block_d num_warps num_stages"
_BY_H1 = "block_m block_c block_d num_warps num_stages"
_BY_H2 = "block_p block_m num_warps num_stages"
_RELATIONAL["nvidia", True] = {
    "forward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (8, 16, 8, 2)),
    "backward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2), (8, 8, 8, 1)),
    "fold_keys": _blocks(
        _KEYS, ((8, 8), 16, 16, 32, 4, 2), ((8, 8), 16, 16, 32, 8, 2), ((8, 8), 16, 16, 32, 8, 2),
        ((8, 8), 16, 8, 32, 8, 2),
    ),
    "fold_values": _blocks(
        _VALUES, ((8, 8), 8, 32, 4, 2), ((8, 8), 8, 32, 8, 2), ((8, 8), 16, 16, 8, 2),
        ((8, 8), 16, 16, 8, 2), ((8, 8), 8, 16, 8, 2),
    ),
    "by_h1": _blocks(_BY_H1, (32, 16, 32, 4, 2), (32, 16, 32, 4, 2), (32, 16, 32, 8, 2)),
    "by_h2": _blocks(_BY_H2, (16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 8, 2), (16, 16, 8, 2), (8, 16, 8, 2)),
}  # fmt: skip
_RELATIONAL["nvidia", False] = {
    "forward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (8, 8, 8, 1), (4, 8, 8, 1)),
    "backward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (4, 8, 8, 1)),
    "fold_keys": _blocks(_KEYS, ((8, 8), 16, 16, 32, 8, 2), ((4, 8), 16, 8, 16, 8, 2), ((4, 8), 16, 8, 16, 8, 1)),
    "fold_values": _blocks(_VALUES, ((8, 8), 8, 32, 4, 2), ((8, 8), 8, 32, 8, 2), ((4, 8), 8, 16, 8, 1)),
    "by_h1": _blocks(
        _BY_H1, (32, 16, 32, 4, 2), (32, 16, 32, 8, 2), (16, 16, 32, 8, 2),
        (16, 16, 32, 8, 2), (16, 16, 16, 8, 1),
    ),
    "by_h2": _blocks(_BY_H2, (8, 16, 8, 2), (8, 16, 4, 2), (8, 16, 4, 2), (4, 16, 4, 1), (2, 16, 4, 1)),
}  # fmt: skip
_RELATIONAL["amd", True] = {
    "forward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (8, 16, 4, 2), (4, 8, 4, 1)),
    "backward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (8, 16, 4, 2), (8, 16, 4, 2), (4, 8, 4, 1)),
    "fold_keys": _blocks(
        _KEYS, ((4, 8), 16, 16, 32, 8, 1), ((4, 8), 16, 8, 16, 8, 1), ((4, 8), 16, 8, 16, 8, 2),
        ((4, 8), 16, 8, 16, 8, 1),
    ),
    "fold_values": _blocks(
        _VALUES, ((8, 8), 8, 16, 8, 1), ((8, 8), 8, 32, 8, 2), ((8, 8), 16, 16, 8, 2),
        ((8, 8), 8, 16, 8, 2), ((8, 8), 8, 32, 4, 2),
    ),
    "by_h1": _blocks(_BY_H1, (32, 16, 32, 4, 2), (32, 16, 32, 4, 2), (32, 16, 32, 8, 2)),
    "by_h2": _blocks(_BY_H2, (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (8, 16, 4, 2), (2, 16, 4, 1)),
}  # fmt: skip
_RELATIONAL["amd", False] = {
    "forward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2), (4, 8, 4, 1), (2, 8, 4, 1)),
    "backward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1), (4, 8, 4, 1), (2, 8, 4, 1)),
    "fold_keys": _blocks(
        _KEYS, ((4, 8), 16, 16, 32, 8, 1), ((4, 8), 16, 8, 16, 8, 1), ((4, 8), 16, 16, 16, 8, 1),
        ((4, 8), 16, 8, 16, 8, 2),
    ),
    "fold_values": _blocks(_VALUES, ((4, 8), 8, 32, 8, 2), ((4, 8), 8, 32, 8, 2), ((8, 8), 8, 16, 8, 2)),
    "by_h1": _blocks(_BY_H1, (32, 16, 32, 4, 2), (16, 16, 32, 4, 1)),
    "by_h2": _blocks(_BY_H2, (16, 16, 4, 2), (16, 16, 4, 2), (8, 16, 4, 2), (8, 16, 4, 1), (4, 16, 4, 1)),
}  # fmt: skip


@lru_cache(maxsize=4096)
def relational(
    kind: str,
    clips: int,
    size: tuple[int, int, int],
    queries: int,
    channels: tuple[int, int, int, int],
    window: tuple[int, int, int],
    itemsize: int,
    family: str = "nvidia",
) -> RelationalConfig:
    """Blocks for a kernel of relational self-attention.

    Args:
        kind: "pack", "forward", "backward", "fold_keys", "fold_values", "by_h1" or "by_h2".
        clips, size: B and (T, H, W).
        queries, channels: L and (C, D, E, F).
        window: (kt, kh, kw).
        itemsize: bytes of an element.
        family: "nvidia", "blackwell" or "amd"; or "interpreted", where few and simple programs are the fastest.

    The order of evaluation is the first where E <= 2 L: M E (D + F) multiplications per position against
    L M (D + 2 E + F). Tiles are as wide as the widest of C, D, E, F, and count double for more than eight queries. The
    sum of a weight's gradient is split among about 256 programs, and the backward takes as many clips at once as have
    about 16,384 positions: both fill a large GPU, and bound what is held.
    """
    if kind == "pack":
        return RelationalConfig(block_p=32, block_m=32)
    values = channels[2]
    width = max(max(channels) * (2 if queries > 8 else 1), 8)
    if family == "interpreted":
        config = RelationalConfig(block_m=32)
    else:
        table = _RELATIONAL["amd" if family == "amd" else "nvidia", itemsize <= 2]
        config = table[kind][min(_power_of_two(width).bit_length() - 4, len(_WIDTHS) - 1)]
    if queries > 8 and kind in ("fold_values", "by_h2"):  # their products run over positions and queries
        config = replace(config, block_p=max(config.block_p // 2, 2))
    if family == "blackwell" and kind == "forward" and width > 32:
        config = replace(config, num_stages=1)  # two spill there
    positions = math.prod(size)
    blocks = clips * -(-positions // config.block_p)
    c, d = (max(least, _power_of_two(n)) for least, n in zip((8, 16), channels, strict=False))
    by_taps = -(-math.prod(window) // 32) * 32 // config.block_m
    programs = by_taps if kind == "by_h2" else by_taps * -(-c // config.block_c) * -(-d // config.block_d)
    plane = [min(most, _power_of_two(n)) for most, n in zip(config.plane, size[1:], strict=True)]
    tiles = clips * size[0] * -(-size[1] // plane[0]) * -(-size[2] // plane[1])
    if kind == "fold_values" and tiles < 128 and plane[0] > 4:  # half a large GPU would idle
        plane[0] //= 2
    return replace(
        config,
        order="first" if values <= 2 * queries else "second",
        plane=(plane[0], plane[1]),
        splits=max(1, min(blocks, (2 if family == "interpreted" else 256) // programs)),
        clips=max(1, min(clips, -(-16384 // positions))),
    )


BILINEAR_LIMIT = {"Sh": 64, "Sw": 64, "Ts": 64}
_JOINT = 64  # coarse cells up to which kron(P, Q^T) is one tensor-core tile
# Of a kernel that does it in one product or in two, for operands of two and four bytes: elements of a tile that a warp
# has, and of all frames of a phase; warps; stages. The most with which few kernels spill on any target, read from the
# machine code: in float32's exact products all operands are held twice.
_BILINEAR = {
    ("forward", True): ((1024, 1024, 4, 2), (512, 512, 4, 2)),
    ("forward", False): ((1024, 1024, 4, 2), (512, 512, 4, 2)),
    ("backward", True): ((1024, 1024, 4, 2), (512, 512, 4, 2)),
    ("backward", False): ((512, 512, 4, 2), (256, 256, 4, 2)),
    ("forward_mixed", True): ((1024, 4096, 4, 2), (512, 2048, 4, 1)),
    ("forward_mixed", False): ((1024, 2048, 8, 2), (512, 1024, 8, 2)),
    ("backward_mixed", True): ((512, 2048, 4, 1), (256, 2048, 4, 1)),
    ("backward_mixed", False): ((256, 2048, 8, 1), (128, 1024, 8, 1)),
}


@dataclass(frozen=True)
class BilinearConfig:
    """Block sizes of one launch of the bilinear transform.

    `block_n`: columns of a tile, each with all coarse cells.
    `steps`: how many tiles, one after the other, a program transforms by the same matrices.
    `joint`: whether kron(P, Q^T) is made and multiplied by, or Q and P one after the other.
    `fused`: whether frames are mixed in the same pass.
    """

    block_n: int = 16
    steps: int = 1
    joint: bool = True
    fused: bool = True
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name, most in (("block_n", 4096), ("num_warps", 32)):
            value = getattr(self, name)
            if not 0 < value <= most or value & (value - 1):
                raise ValueError(f"BilinearConfig: {name} is {value!r}; accepted is a power of two up to {most}")
        for name in ("steps", "num_stages"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"BilinearConfig: {name} is {getattr(self, name)!r}; accepted is an integer > 0")
        for name in ("joint", "fused"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"BilinearConfig: {name} is {getattr(self, name)!r}; accepted are True and False")
        if self.joint and self.block_n < 16:
            raise ValueError(f"BilinearConfig: block_n is {self.block_n!r}; accepted with joint is at least 16")


def padded_cells(cells: tuple[int, int], joint: bool) -> tuple[int, int]:
    """Coarse rows and columns as powers of two: together sixteen or more where joint, else each; products need that."""
    rows, columns = (_power_of_two(n) for n in cells)
    if not joint:
        return max(rows, 16), max(columns, 16)
    while rows * columns < 16:
        rows, columns = (rows, columns * 2) if columns <= rows else (rows * 2, columns)
    return rows, columns


@lru_cache(maxsize=4096)
def bilinear(
    kind: str, shape: tuple[int, int, int, int, int], groups: int, cells: tuple[int, int], mixes: int, ts: int,
    itemsize: int, family: str = "nvidia",
) -> BilinearConfig:  # fmt: skip
    """Blocks for a kernel of the bilinear transform.

    Args:
        kind: "forward", "backward", the same with "_mixed", which mix frames too, "mix" or "mix_backward".
        shape: (B, C, T, H, W).
        groups, cells: G and (Sh, Sw).
        mixes, ts: Gt and Ts; 1 and 1 where frames are not mixed.
        itemsize: bytes of an element.
        family: "nvidia", "blackwell" or "amd"; or "interpreted", where few programs are the fastest.

    A tile has up to 64 columns, fewer where its coarse cells are many, so that a thread's share stays in registers.
    A program transforms several tiles by the same matrices as long as there are programs enough to fill a large GPU.
    """
    clips, channels, frames, height, width = shape
    count = units(groups, mixes)
    if kind.startswith("mix"):
        positions = channels // count * height * width
        most = (4096 if itemsize <= 2 else 2048) // max(_power_of_two(ts), 16)
        return BilinearConfig(block_n=max(16, min(most, _power_of_two(positions))))
    mixed = kind.endswith("mixed")
    joint = max(_power_of_two(cells[0]) * _power_of_two(cells[1]), 16) <= _JOINT
    tile = math.prod(padded_cells(cells, joint))
    held = tile * _power_of_two(ts) if mixed else tile
    of_tile, of_held, warps, stages = _BILINEAR[kind, joint][itemsize > 2]
    large = tile >= 2048  # one column a tile, and nothing loaded ahead: the matrices fill the shared memory
    if large:
        warps, stages = 8, 1
    if family == "amd":  # a wavefront is two warps
        warps = 4
    if mixed and width // cells[1] % 2:  # narrow accesses, of many addresses
        of_tile, of_held = of_tile // 2, of_held // 2
    wide = channels // count * (height // cells[0]) * (width // cells[1])
    least = 16 if joint else 1  # the other products have more columns: those of every coarse row
    block = max(least, min(64, _power_of_two(wide), of_tile * warps // tile, of_held * warps // held))
    fused = not mixed or (not large and held * least <= of_held * warps)
    tiles = -(-wide // block)
    programs = clips * count * (frames // ts if mixed else frames) * tiles
    enough = 1 if family == "interpreted" else 512 if mixed else 1024  # programs for a large GPU
    several = not large and kind != "forward_mixed" and not (mixed and itemsize > 2)  # these hold as much as they can
    steps = max(1, min(tiles, programs // enough)) if several else 1
    return BilinearConfig(block, steps, joint, fused, warps, stages)
