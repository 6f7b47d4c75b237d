"""Launch configs of the bilinear transform: the heuristic that fits the smallest GPU, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from .._core.layouts import units
from .keys import BYTES, Key, KeyForm
from .space import ConfigSpace, power_of_two, varied

KEYS = KeyForm(
    "bilinear",
    kinds=("forward", "backward", "forward_mixed", "backward_mixed", "mix", "mix_backward"),
    sizes=("clips", "channels", "t", "h", "w", "groups", "sh", "sw", "mixes", "ts"),
)


def key_of(
    kind: str, shape: tuple[int, ...], groups: int, cells: tuple[int, int], mixes: int, ts: int, tensor: Tensor
) -> Key:
    """A kernel of the bilinear transform of a clip of `shape`; arguments as `heuristic`'s."""
    return KEYS.key(kind, tensor, *shape, groups, *cells, mixes, ts)


LIMIT = {"Sh": 64, "Sw": 64, "Ts": 64}
_JOINT = 64  # coarse cells up to which kron(P, Q^T) is one tensor-core tile
# Of a kernel that does it in one product or in two, for operands of two and four bytes: elements of a tile that a warp
# has, and of all frames of a phase; warps; stages. The most with which few kernels spill on any target, read from the
# machine code: in float32's exact products all operands are held twice.
_TILES = {
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
    rows, columns = (power_of_two(n) for n in cells)
    if not joint:
        return max(rows, 16), max(columns, 16)
    while rows * columns < 16:
        rows, columns = (rows, columns * 2) if columns <= rows else (rows * 2, columns)
    return rows, columns


@lru_cache(maxsize=4096)
def heuristic(
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
        most = (4096 if itemsize <= 2 else 2048) // max(power_of_two(ts), 16)
        return BilinearConfig(block_n=max(16, min(most, power_of_two(positions))))
    mixed = kind.endswith("mixed")
    joint = max(power_of_two(cells[0]) * power_of_two(cells[1]), 16) <= _JOINT
    tile = math.prod(padded_cells(cells, joint))
    held = tile * power_of_two(ts) if mixed else tile
    of_tile, of_held, warps, stages = _TILES[kind, joint][itemsize > 2]
    large = tile >= 2048  # one column a tile, and nothing loaded ahead: the matrices fill the shared memory
    if large:
        warps, stages = 8, 1
    if family == "amd":  # a wavefront is two warps
        warps = 4
    if mixed and width // cells[1] % 2:  # narrow accesses, of many addresses
        of_tile, of_held = of_tile // 2, of_held // 2
    wide = channels // count * (height // cells[0]) * (width // cells[1])
    least = 16 if joint else 1  # the other products have more columns: those of every coarse row
    block = max(least, min(64, power_of_two(wide), of_tile * warps // tile, of_held * warps // held))
    fused = not mixed or (not large and held * least <= of_held * warps)
    tiles = -(-wide // block)
    programs = clips * count * (frames // ts if mixed else frames) * tiles
    enough = 1 if family == "interpreted" else 512 if mixed else 1024  # programs for a large GPU
    several = not large and kind != "forward_mixed" and not (mixed and itemsize > 2)  # these hold as much as they can
    steps = max(1, min(tiles, programs // enough)) if several else 1
    return BilinearConfig(block, steps, joint, fused, warps, stages)


# --- the space around it ----------------------------------------------------------------------------------------------


def _default(key: Key, family: str) -> BilinearConfig:
    clips, channels, t, h, w, groups, sh, sw, mixes, ts = key.sizes
    shape, itemsize = (clips, channels, t, h, w), BYTES[key.element]
    return heuristic(key.kind, shape, groups, (sh, sw), mixes, ts, itemsize, family)


def _similar(key: Key) -> Hashable:
    """How many elements a column has decides what fits."""
    sh, sw, _, ts = key.sizes[6:]
    return power_of_two(sh), power_of_two(sw), power_of_two(ts)


def _wide(key: Key) -> int:
    """How many columns there are; one of a key in a file that no call has."""
    _, channels, _, h, w, groups, sh, sw, mixes, _ = key.sizes
    cells = h * w if key.kind.startswith("mix") else (h // sh) * (w // sw)
    return max(1, channels // units(groups, mixes) * cells)


def _within(config: BilinearConfig, key: Key) -> BilinearConfig:
    """No tile wider than what there is, and no more steps than tiles."""
    least = 16 if config.joint or key.kind.startswith("mix") else 1
    wide = _wide(key)
    block = max(least, min(config.block_n, power_of_two(wide)))
    return replace(config, block_n=block, steps=min(config.steps, -(-wide // block)))


def _fitted(config: BilinearConfig, key: Key, family: str) -> BilinearConfig:
    return _within(replace(config, steps=_default(key, family).steps), key)


def _steps(config: BilinearConfig, key: Key) -> Iterator[BilinearConfig]:
    n = config.block_n
    choices: dict[str, Any] = {
        "block_n": (n * 2, n // 2),
        "num_warps": (config.num_warps * 2, config.num_warps // 2),
        "num_stages": (config.num_stages + 1, config.num_stages - 1),
    }
    sh, sw, _, ts = key.sizes[6:]
    if not key.kind.startswith("mix"):
        choices["joint"] = (True, False)
        choices["steps"] = (config.steps * 2, config.steps // 2)
        if key.kind.endswith("mixed"):
            choices["fused"] = (True, False)
    for step in varied(config, **choices):
        down, across = padded_cells((sh, sw), step.joint)
        tile = (16 if key.kind.startswith("mix") else down * across) * step.block_n
        held = tile * (power_of_two(ts) if key.kind.endswith("mixed") and step.fused else 1)
        within = step.num_warps <= 16 and step.num_stages <= 4 and held <= 1 << 15
        if within and not (step.joint and down * across > 256) and _within(step, key) == step:
            yield step


_IN_PASSES = {  # where frames are not mixed in the same pass
    "forward_mixed": ("forward", "mix"),
    "backward_mixed": ("mix_backward", "forward", "backward"),
}


def _launches(key: Key, config: BilinearConfig) -> tuple[str, ...]:
    return (key.kind,) if config.fused else _IN_PASSES.get(key.kind, (key.kind,))


SPACE = ConfigSpace(
    KEYS, BilinearConfig, ("common", "bilinear"), _default, _similar, _within, _fitted, _steps, _launches,
)  # fmt: skip
