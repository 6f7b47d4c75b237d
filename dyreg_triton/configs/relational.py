"""Launch configs of relational self-attention: the heuristic that fits the smallest GPU, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from .keys import BYTES, Key, KeyForm
from .space import ConfigSpace, power_of_two, varied

KEYS = KeyForm(
    "relational",
    kinds=("pack", "forward", "backward", "fold_keys", "fold_values", "by_h1", "by_h2"),
    sizes=("clips", "t", "h", "w", "queries", "c", "d", "e", "f", "kt", "kh", "kw"),
)


def key_of(
    kind: str,
    clips: int,
    size: tuple[int, int, int],
    queries: int,
    channels: tuple[int, int, int, int],
    window: tuple[int, int, int],
    tensor: Tensor,
) -> Key:
    """A kernel of relational self-attention; arguments as `heuristic`'s."""
    return KEYS.key(kind, tensor, clips, *size, queries, *channels, *window)


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


# --- the heuristic ----------------------------------------------------------------------------------------------------


LIMIT = {"L": 16, "C": 128, "D": 128, "E": 128, "F": 128, "M": 65536}
_WIDTHS = (8, 16, 32, 64, 128)

# Blocks by width of the tiles, of the widths above: large ones with which RSANet's stages compile for every target of
# the family within the least of their shared memories and without spills, read from the machine code. Four-byte
# operands beyond 64 channels do spill, and TF32's a few bytes on sm_80.
_BLOCKS: dict[tuple[str, bool], dict[str, tuple[RelationalConfig, ...]]] = {}


def _blocks(names: str, *rows: tuple[Any, ...]) -> tuple[RelationalConfig, ...]:
    """One config per width; the last row holds for the widths beyond."""
    found = [RelationalConfig(**dict(zip(names.split(), row, strict=True))) for row in rows]
    return tuple(found + [found[-1]] * (len(_WIDTHS) - len(found)))


_CHAIN = "block_p block_c num_warps num_stages"
_FOLD_KEYS = "plane block_p block_c block_d num_warps num_stages"
_FOLD_VALUES = "plane block_p block_d num_warps num_stages"
_BY_H1 = "block_m block_c block_d num_warps num_stages"
_BY_H2 = "block_p block_m num_warps num_stages"
_BLOCKS["nvidia", True] = {
    "forward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (8, 16, 8, 2)),
    "backward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2), (8, 8, 8, 1)),
    "fold_keys": _blocks(
        _FOLD_KEYS, ((8, 8), 16, 16, 32, 4, 2), ((8, 8), 16, 16, 32, 8, 2), ((8, 8), 16, 16, 32, 8, 2),
        ((8, 8), 16, 8, 32, 8, 2),
    ),
    "fold_values": _blocks(
        _FOLD_VALUES, ((8, 8), 8, 32, 4, 2), ((8, 8), 8, 32, 8, 2), ((8, 8), 16, 16, 8, 2),
        ((8, 8), 16, 16, 8, 2), ((8, 8), 8, 16, 8, 2),
    ),
    "by_h1": _blocks(_BY_H1, (32, 16, 32, 4, 2), (32, 16, 32, 4, 2), (32, 16, 32, 8, 2)),
    "by_h2": _blocks(_BY_H2, (16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 8, 2), (16, 16, 8, 2), (8, 16, 8, 2)),
}  # fmt: skip
_BLOCKS["nvidia", False] = {
    "forward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (8, 8, 8, 1), (4, 8, 8, 1)),
    "backward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (4, 8, 8, 1)),
    "fold_keys": _blocks(_FOLD_KEYS, ((8, 8), 16, 16, 32, 8, 2), ((4, 8), 16, 8, 16, 8, 2), ((4, 8), 16, 8, 16, 8, 1)),
    "fold_values": _blocks(_FOLD_VALUES, ((8, 8), 8, 32, 4, 2), ((8, 8), 8, 32, 8, 2), ((4, 8), 8, 16, 8, 1)),
    "by_h1": _blocks(
        _BY_H1, (32, 16, 32, 4, 2), (32, 16, 32, 8, 2), (16, 16, 32, 8, 2),
        (16, 16, 32, 8, 2), (16, 16, 16, 8, 1),
    ),
    "by_h2": _blocks(_BY_H2, (8, 16, 8, 2), (8, 16, 4, 2), (8, 16, 4, 2), (4, 16, 4, 1), (2, 16, 4, 1)),
}  # fmt: skip
_BLOCKS["amd", True] = {
    "forward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (8, 16, 4, 2), (4, 8, 4, 1)),
    "backward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (8, 16, 4, 2), (8, 16, 4, 2), (4, 8, 4, 1)),
    "fold_keys": _blocks(
        _FOLD_KEYS, ((4, 8), 16, 16, 32, 8, 1), ((4, 8), 16, 8, 16, 8, 1), ((4, 8), 16, 8, 16, 8, 2),
        ((4, 8), 16, 8, 16, 8, 1),
    ),
    "fold_values": _blocks(
        _FOLD_VALUES, ((8, 8), 8, 16, 8, 1), ((8, 8), 8, 32, 8, 2), ((8, 8), 16, 16, 8, 2),
        ((8, 8), 8, 16, 8, 2), ((8, 8), 8, 32, 4, 2),
    ),
    "by_h1": _blocks(_BY_H1, (32, 16, 32, 4, 2), (32, 16, 32, 4, 2), (32, 16, 32, 8, 2)),
    "by_h2": _blocks(_BY_H2, (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (8, 16, 4, 2), (2, 16, 4, 1)),
}  # fmt: skip
_BLOCKS["amd", False] = {
    "forward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2), (4, 8, 4, 1), (2, 8, 4, 1)),
    "backward": _blocks(_CHAIN, (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1), (4, 8, 4, 1), (2, 8, 4, 1)),
    "fold_keys": _blocks(
        _FOLD_KEYS, ((4, 8), 16, 16, 32, 8, 1), ((4, 8), 16, 8, 16, 8, 1), ((4, 8), 16, 16, 16, 8, 1),
        ((4, 8), 16, 8, 16, 8, 2),
    ),
    "fold_values": _blocks(_FOLD_VALUES, ((4, 8), 8, 32, 8, 2), ((4, 8), 8, 32, 8, 2), ((8, 8), 8, 16, 8, 2)),
    "by_h1": _blocks(_BY_H1, (32, 16, 32, 4, 2), (16, 16, 32, 4, 1)),
    "by_h2": _blocks(_BY_H2, (16, 16, 4, 2), (16, 16, 4, 2), (8, 16, 4, 2), (8, 16, 4, 1), (4, 16, 4, 1)),
}  # fmt: skip


@lru_cache(maxsize=4096)
def heuristic(
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
        table = _BLOCKS["amd" if family == "amd" else "nvidia", itemsize <= 2]
        config = table[kind][min(power_of_two(width).bit_length() - 4, len(_WIDTHS) - 1)]
    if queries > 8 and kind in ("fold_values", "by_h2"):  # their products run over positions and queries
        config = replace(config, block_p=max(config.block_p // 2, 2))
    if family == "blackwell" and kind == "forward" and width > 32:
        config = replace(config, num_stages=1)  # two spill there
    positions = math.prod(size)
    blocks = clips * -(-positions // config.block_p)
    c, d = (max(least, power_of_two(n)) for least, n in zip((8, 16), channels, strict=False))
    by_taps = -(-math.prod(window) // 32) * 32 // config.block_m
    programs = by_taps if kind == "by_h2" else by_taps * -(-c // config.block_c) * -(-d // config.block_d)
    plane = [min(most, power_of_two(n)) for most, n in zip(config.plane, size[1:], strict=True)]
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


# --- the space around it ----------------------------------------------------------------------------------------------


def _default(key: Key, family: str) -> RelationalConfig:
    clips, t, h, w, queries, c, d, e, f, *window = key.sizes
    return heuristic(
        key.kind, clips, (t, h, w), queries, (c, d, e, f), (window[0], window[1], window[2]), BYTES[key.element], family
    )


def _similar(key: Key) -> Hashable:
    queries, c, d, e, f = key.sizes[4:9]
    return power_of_two(queries), power_of_two(c, 8), power_of_two(d, 16), power_of_two(e, 8), power_of_two(f, 16)


def _within(config: RelationalConfig, key: Key) -> RelationalConfig:
    """No tile, split or part larger than what there is."""
    clips, t, h, w = key.sizes[:4]
    blocks = clips * -(-(t * h * w) // config.block_p)
    return replace(
        config,
        plane=(min(config.plane[0], power_of_two(h)), min(config.plane[1], power_of_two(w))),
        splits=min(config.splits, blocks),
        clips=min(config.clips, clips),
    )


def _fitted(config: RelationalConfig, key: Key, family: str) -> RelationalConfig:
    default = _default(key, family)
    return _within(replace(config, splits=default.splits, clips=default.clips), key)


_USED = {  # which fields a kernel's launch reads
    "pack": "block_p block_m num_warps",
    "forward": "block_p block_c order num_warps num_stages",
    "backward": "block_p block_c order num_warps num_stages",
    "fold_keys": "plane block_p block_c block_d num_warps num_stages",
    "fold_values": "plane block_p block_d num_warps num_stages",
    "by_h1": "block_p block_m block_c block_d splits num_warps num_stages",
    "by_h2": "block_p block_m splits num_warps num_stages",
}


def _steps(config: RelationalConfig, key: Key) -> Iterator[RelationalConfig]:
    h, w = config.plane
    choices: dict[str, Any] = {
        name: (getattr(config, name) * 2, getattr(config, name) // 2)
        for name in ("block_p", "block_m", "block_c", "block_d", "splits", "num_warps")
    }
    choices["num_stages"] = (config.num_stages + 1, config.num_stages - 1)
    choices["order"] = ("first", "second")
    choices["plane"] = [(a, b) for a, b in ((h * 2, w), (h, w * 2), (h // 2, w), (h, w // 2)) if a and b]
    for step in varied(config, **{name: choices[name] for name in _USED[key.kind].split()}):
        within = step.num_warps <= 16 and step.num_stages <= 4 and math.prod(step.plane) <= 256 and step.block_p <= 128
        if within and _within(step, key) == step:
            yield step


SPACE = ConfigSpace(
    KEYS, RelationalConfig, ("common", "relational", "relational_gradients"), _default, _similar, _within, _fitted,
    _steps,
)  # fmt: skip
