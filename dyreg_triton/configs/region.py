"""Launch configs of the region kernels: the heuristic that fits the smallest GPU, and what to try next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from .keys import BYTES, Key, KeyForm
from .space import ConfigSpace, power_of_two, varied

KEYS = KeyForm(
    "region",
    kinds=("gather", "scatter", "gather_moments", "scatter_moments", "dense", "dense_moments"),
    sizes=("frames", "nodes", "channels", "cells"),
)


def key_of(kind: str, frames: int, nodes: int, channels: int, cells: int, tensor: Tensor) -> Key:
    """A kernel of kernels/region.py, which `kind` names."""
    return KEYS.key(kind, tensor, frames, nodes, channels, cells)


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


# --- the heuristic ----------------------------------------------------------------------------------------------------


# (channels, cells, warps) of a program: few instructions for what it reads and writes, and so few registers that two or
# more programs share a multiprocessor of sm_90 and hide each other's latency (read from the machine code). The weights
# of a tile's cells cost the same for few channels as for many, and each warp sums the axes for itself: hence many
# channels and few warps.
_TILES = {
    "gather": ((64, 128, 4), (64, 32, 8)),  # 16-bit, 32-bit
    "scatter": ((64, 64, 4), (64, 32, 4)),
    "gather_moments": ((128, 64, 8), (32, 16, 4)),
    "scatter_moments": ((64, 64, 8), (32, 16, 4)),
    "dense": ((16, 256, 4), (16, 256, 4)),
    "dense_moments": ((16, 64, 4), (16, 64, 4)),
}
_FILL = 2048  # warps that fill a large GPU, at about 16 a multiprocessor


@lru_cache(maxsize=4096)
def heuristic(
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
    block_c, block_p, num_warps = _TILES[kind][itemsize >= 4]
    moments, dense = kind in ("gather_moments", "scatter_moments"), kind.startswith("dense")
    fits = {"gather_moments": 32, "scatter_moments": 16, "dense": 32, "scatter": 64 if nodes <= 64 else 32}
    block_n = min(fits.get(kind, 64), max(16, power_of_two(nodes)))
    shrink = (block_n // 16) ** (2 if moments or dense else 1)
    whole = max(16, power_of_two(cells))
    if shrink == 1 and whole <= 64 and not dense:
        block_c, block_p, num_warps = 64 if itemsize >= 4 else 128, whole, 8 if moments else 4
    if shrink > 1 and not dense:  # more regions need more registers
        num_warps = 8
    if family == "amd":  # a wavefront is two warps
        num_warps = min(num_warps, 4)
    if not dense and cells > 64 and cells % 2 == 1:  # narrow loads, of many addresses
        block_p //= 2
    block_p = max(16, min(block_p // shrink, whole))
    block_c = max(16, min(block_c, power_of_two(channels)))
    while block_c > 16 and frames * -(-channels // block_c) * num_warps < _FILL:
        block_c //= 2
    tile = block_c * block_p
    unlimited = moments and (tile <= 1024 or itemsize >= 4 or (cells > 64 and cells % 2 == 1) or family == "blackwell")
    if tile <= (1024 if shrink == 1 else 512):
        num_warps = 4
    return Config(block_n, block_c, block_p, num_warps, 255 if unlimited else None)


# --- the space around it ----------------------------------------------------------------------------------------------


def _default(key: Key, family: str) -> Config:
    frames, nodes, channels, cells = key.sizes
    return heuristic(key.kind, frames, nodes, channels, cells, BYTES[key.element], family)


def _within(config: Config, key: Key) -> Config:
    """No block larger than what there is."""
    _, nodes, channels, cells = key.sizes
    return replace(
        config,
        block_n=min(config.block_n, power_of_two(nodes, 16)),
        block_c=min(config.block_c, power_of_two(channels, 16)),
        block_p=min(config.block_p, power_of_two(cells, 16)),
    )


def _fitted(config: Config, key: Key, family: str) -> Config:
    return _within(replace(config, block_n=_default(key, family).block_n), key)


def _steps(config: Config, key: Key) -> Iterator[Config]:
    c, p = config.block_c, config.block_p
    found = list(varied(config, num_warps=(config.num_warps * 2, config.num_warps // 2)))
    if key.kind != "dense_moments":
        found += varied(config, block_p=(p * 2, p // 2))
    if not key.kind.startswith("dense"):
        found += varied(config, block_c=(c * 2, c // 2))
        found += [replace(config, block_c=c * 2, block_p=p // 2), replace(config, block_c=c // 2, block_p=p * 2)]
    if key.kind.endswith("moments"):
        found += varied(config, registers=(None, 128, 168, 255))
    for step in found:
        tile = step.block_c * step.block_p
        within = step.block_c >= 16 and step.block_p >= 16 and tile <= 1 << 14 and 2 <= step.num_warps <= 16
        if within and _within(step, key) == step:
            yield step


SPACE = ConfigSpace(
    KEYS, Config, ("common", "profiles", "region"), _default, lambda key: (), _within, _fitted, _steps,
)  # fmt: skip
