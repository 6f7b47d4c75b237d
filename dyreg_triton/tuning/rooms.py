"""What tuning knows of each op: its config's type and heuristic, where a config may be taken over, what to try next."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..layouts import units
from . import heuristics
from .heuristics import BilinearConfig, Config, RelationalConfig, padded_cells
from .keys import BYTES, Key


@dataclass(frozen=True)
class Room:
    """One op.

    Attributes:
        config: the type of its configs.
        sources: its kernel files, without .py.
        default: the heuristic, from (key, family of GPUs).
        similar: what of a key decides whether a config fits at all; nearest keys agree in it.
        within: a config with nothing larger than the sizes of a key.
        fitted: a config of a similar key, made to fit this one's sizes; what depends on them alone is the heuristic's.
        steps: configs one step away from a config.
        launches: the kinds of the kernels that are launched for a key with a config; by default its own.
    """

    config: type
    sources: tuple[str, ...]
    default: Callable[[Key, str], Any]
    similar: Callable[[Key], Hashable]
    within: Callable[[Any, Key], Any]
    fitted: Callable[[Any, Key, str], Any]
    steps: Callable[[Any, Key], Iterator[Any]]
    launches: Callable[[Key, Any], tuple[str, ...]] = lambda key, config: (key.kind,)


def _power(n: int, least: int = 1) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def _varied(config: Any, **choices: Any) -> Iterator[Any]:
    """`config` with one field at a time set to one of its choices, those that a config may have."""
    for name, values in choices.items():
        for value in values:
            if value != getattr(config, name):
                try:
                    yield replace(config, **{name: value})
                except ValueError:  # not a config: beyond a limit
                    continue


# --- region ---------------------------------------------------------------------------------------------------------


def _region_default(key: Key, family: str) -> Config:
    frames, nodes, channels, cells = key.sizes
    return heuristics.region(key.kind, frames, nodes, channels, cells, BYTES[key.element], family)


def _region_within(config: Config, key: Key) -> Config:
    """No block larger than what there is."""
    _, nodes, channels, cells = key.sizes
    return replace(
        config,
        block_n=min(config.block_n, _power(nodes, 16)),
        block_c=min(config.block_c, _power(channels, 16)),
        block_p=min(config.block_p, _power(cells, 16)),
    )


def _region_fitted(config: Config, key: Key, family: str) -> Config:
    return _region_within(replace(config, block_n=_region_default(key, family).block_n), key)


def _region_steps(config: Config, key: Key) -> Iterator[Config]:
    c, p = config.block_c, config.block_p
    found = list(_varied(config, num_warps=(config.num_warps * 2, config.num_warps // 2)))
    if key.kind != "dense_moments":
        found += _varied(config, block_p=(p * 2, p // 2))
    if not key.kind.startswith("dense"):
        found += _varied(config, block_c=(c * 2, c // 2))
        found += [replace(config, block_c=c * 2, block_p=p // 2), replace(config, block_c=c // 2, block_p=p * 2)]
    if key.kind.endswith("moments"):
        found += _varied(config, registers=(None, 128, 168, 255))
    for step in found:
        tile = step.block_c * step.block_p
        within = step.block_c >= 16 and step.block_p >= 16 and tile <= 1 << 14 and 2 <= step.num_warps <= 16
        if within and _region_within(step, key) == step:
            yield step


# --- relational -----------------------------------------------------------------------------------------------------


def _relational_default(key: Key, family: str) -> RelationalConfig:
    clips, t, h, w, queries, c, d, e, f, *window = key.sizes
    return heuristics.relational(
        key.kind, clips, (t, h, w), queries, (c, d, e, f), (window[0], window[1], window[2]), BYTES[key.element], family
    )


def _relational_similar(key: Key) -> Hashable:
    queries, c, d, e, f = key.sizes[4:9]
    return _power(queries), _power(c, 8), _power(d, 16), _power(e, 8), _power(f, 16)


def _relational_within(config: RelationalConfig, key: Key) -> RelationalConfig:
    """No tile, split or part larger than what there is."""
    clips, t, h, w = key.sizes[:4]
    blocks = clips * -(-(t * h * w) // config.block_p)
    return replace(
        config,
        plane=(min(config.plane[0], _power(h)), min(config.plane[1], _power(w))),
        splits=min(config.splits, blocks),
        clips=min(config.clips, clips),
    )


def _relational_fitted(config: RelationalConfig, key: Key, family: str) -> RelationalConfig:
    default = _relational_default(key, family)
    return _relational_within(replace(config, splits=default.splits, clips=default.clips), key)


_USED = {  # which fields a kernel's launch reads
    "pack": "block_p block_m num_warps",
    "forward": "block_p block_c order num_warps num_stages",
    "backward": "block_p block_c order num_warps num_stages",
    "fold_keys": "plane block_p block_c block_d num_warps num_stages",
    "fold_values": "plane block_p block_d num_warps num_stages",
    "by_h1": "block_p block_m block_c block_d splits num_warps num_stages",
    "by_h2": "block_p block_m splits num_warps num_stages",
}


def _relational_steps(config: RelationalConfig, key: Key) -> Iterator[RelationalConfig]:
    h, w = config.plane
    choices: dict[str, Any] = {
        name: (getattr(config, name) * 2, getattr(config, name) // 2)
        for name in ("block_p", "block_m", "block_c", "block_d", "splits", "num_warps")
    }
    choices["num_stages"] = (config.num_stages + 1, config.num_stages - 1)
    choices["order"] = ("first", "second")
    choices["plane"] = [(a, b) for a, b in ((h * 2, w), (h, w * 2), (h // 2, w), (h, w // 2)) if a and b]
    for step in _varied(config, **{name: choices[name] for name in _USED[key.kind].split()}):
        within = step.num_warps <= 16 and step.num_stages <= 4 and math.prod(step.plane) <= 256 and step.block_p <= 128
        if within and _relational_within(step, key) == step:
            yield step


# --- bilinear -------------------------------------------------------------------------------------------------------


def _bilinear_default(key: Key, family: str) -> BilinearConfig:
    clips, channels, t, h, w, groups, sh, sw, mixes, ts = key.sizes
    shape, itemsize = (clips, channels, t, h, w), BYTES[key.element]
    return heuristics.bilinear(key.kind, shape, groups, (sh, sw), mixes, ts, itemsize, family)


def _bilinear_similar(key: Key) -> Hashable:
    """How many elements a column has decides what fits."""
    sh, sw, _, ts = key.sizes[6:]
    return _power(sh), _power(sw), _power(ts)


def _bilinear_wide(key: Key) -> int:
    """How many columns there are; one of a key in a file that no call has."""
    _, channels, _, h, w, groups, sh, sw, mixes, _ = key.sizes
    cells = h * w if key.kind.startswith("mix") else (h // sh) * (w // sw)
    return max(1, channels // units(groups, mixes) * cells)


def _bilinear_within(config: BilinearConfig, key: Key) -> BilinearConfig:
    """No tile wider than what there is, and no more steps than tiles."""
    least = 16 if config.joint or key.kind.startswith("mix") else 1
    wide = _bilinear_wide(key)
    block = max(least, min(config.block_n, _power(wide)))
    return replace(config, block_n=block, steps=min(config.steps, -(-wide // block)))


def _bilinear_fitted(config: BilinearConfig, key: Key, family: str) -> BilinearConfig:
    return _bilinear_within(replace(config, steps=_bilinear_default(key, family).steps), key)


def _bilinear_steps(config: BilinearConfig, key: Key) -> Iterator[BilinearConfig]:
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
    for step in _varied(config, **choices):
        down, across = padded_cells((sh, sw), step.joint)
        tile = (16 if key.kind.startswith("mix") else down * across) * step.block_n
        held = tile * (_power(ts) if key.kind.endswith("mixed") and step.fused else 1)
        within = step.num_warps <= 16 and step.num_stages <= 4 and held <= 1 << 15
        if within and not (step.joint and down * across > 256) and _bilinear_within(step, key) == step:
            yield step


_IN_PASSES = {  # where frames are not mixed in the same pass
    "forward_mixed": ("forward", "mix"),
    "backward_mixed": ("mix_backward", "forward", "backward"),
}


def _bilinear_launches(key: Key, config: BilinearConfig) -> tuple[str, ...]:
    return (key.kind,) if config.fused else _IN_PASSES.get(key.kind, (key.kind,))


ROOMS = {
    "bilinear": Room(
        BilinearConfig, ("common", "bilinear"), _bilinear_default, _bilinear_similar, _bilinear_within,
        _bilinear_fitted, _bilinear_steps, _bilinear_launches,
    ),
    "region": Room(
        Config, ("common", "profiles", "region"), _region_default, lambda key: (), _region_within, _region_fitted,
        _region_steps,
    ),
    "relational": Room(
        RelationalConfig, ("common", "relational", "relational_gradients"), _relational_default, _relational_similar,
        _relational_within, _relational_fitted, _relational_steps,
    ),
}  # fmt: skip


@functools.cache
def kernel_hash(op: str) -> str:
    """Of the text of the op's kernels: a config that was measured with other kernels says nothing of these."""
    digest = hashlib.sha256()
    for name in ROOMS[op].sources:
        spec = importlib.util.find_spec(f"dyreg_triton.kernels.{name}")
        if spec is None or spec.origin is None:
            raise ImportError(f"the file of the kernels {name!r} is not installed")
        digest.update(Path(spec.origin).read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:16]


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a config."""
    return dataclasses.asdict(config)


def from_json(op: str, fields: Any) -> Any:
    """The config of these fields; ValueError where they are not one's."""
    kind = ROOMS[op].config
    if not isinstance(fields, dict) or set(fields) != {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"config is {fields!r}; accepted are the fields of {kind.__name__}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    defaults = {field.name: field.type for field in dataclasses.fields(kind)}
    for name, value in values.items():
        accepted = {
            "int": type(value) is int, "bool": type(value) is bool, "int | None": value is None or type(value) is int,
            "str": isinstance(value, str),
            "tuple[int, int]": isinstance(value, tuple) and len(value) == 2 and all(type(n) is int for n in value),
        }  # fmt: skip
        if not accepted[str(defaults[name])]:
            raise ValueError(f"config's {name} is {value!r}; accepted is {defaults[name]}")
    return kind(**values)
