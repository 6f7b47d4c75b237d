"""What is measured, in cells; what is kept of it, in rows: only contenders whose outputs and gradients were right in
that run are timed, and without ours there is no row."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from dyreg_triton._core.atomic_files import replacing
from dyreg_triton._core.numerics import TOLERANCE

from .measure import Machine, Times, relative_error, rotated

SCHEMA = 2
DTYPES = {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.float32,)}  # that ops are measured in, the first most
ROW_SECONDS = {"cuda": 0.3, "cpu": 1.5}  # to spend on a row's repeats, by each clock
Row = dict[str, Any]
Rows = Generator[Row | None, None, None]  # None for one whose results were wrong, which has been said
Tensors = tuple[Tensor, ...]


class Rank(IntEnum):
    """How telling cells are: a run that may be cut short goes from the least number to the most, by `Rank.STAGE + i`
    in turns through the suites."""

    LIMITS = 0  # of the device
    SMALL = 100  # quickly done
    STAGE = 200  # what networks have, in the dtype that matters most
    SWEEP = 300
    OTHER = 400  # dtypes and lengths


class Cell(NamedTuple):
    """`number` rows that are made together, since they share what takes long to make; each is given when measured."""

    rank: int
    op: str
    part: str
    label: str
    number: int
    rows: Callable[[Machine], Rows]

    def __str__(self) -> str:
        return f"{self.op} {self.part} {self.label}"


class Check(NamedTuple):
    """How far an op's results are off in one case, which is looked at before anything is measured."""

    op: str
    label: str
    error: Callable[[], float]
    tolerance: float


@dataclass(frozen=True)
class Contender:
    """A step that turns inputs into results, and how far off they are: by default against `wanted`, as they come."""

    step: Callable[..., Tensors]
    inputs: Tensors
    wanted: Tensors = ()
    error_of: Callable[[Tensors], float] | None = None

    def error(self, found: Tensors | None = None) -> float:
        """Of results `found`, by default those of a step."""
        if found is None:
            found = self.step(*self.inputs)
        if self.error_of is not None:
            return self.error_of(found)
        return relative_error(found, self.wanted[: len(found)])


class Floor(NamedTuple):
    """What cannot be avoided: bytes moved and floating-point operations."""

    bytes: int
    operations: int


def name_of(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def compared(
    machine: Machine,
    contenders: Mapping[str, Contender],
    about: Row,
    dtype: torch.dtype,
    floor: Floor,
    *,
    graphs: bool = False,
) -> Row | None:
    """A row: "ours" among `contenders` against the others that are right and against the floor; None if ours is wrong.

    `about` is what the row says of its case: suite, op, part, label, mode, shape, and the quantities of sweeps. With
    `graphs` those that can be captured are replayed as CUDA graphs as well, where there is CUDA.
    """
    # convolutions round float32 to TensorFloat-32 by default, which is not the precision that is compared here
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        errors = _errors(contenders, TOLERANCE[dtype])
        right = {name: c for name, c in contenders.items() if errors.get(name, math.inf) <= TOLERANCE[dtype]}
        if "ours" not in right:
            print(f"WRONG, not kept: {' '.join(str(about[k]) for k in ('op', 'part', 'mode', 'label'))} {dtype}")
            return None
        calls = [partial(_on, c.step, rotated(c.inputs, machine.device)) for c in right.values()]
        seconds = ROW_SECONDS[machine.device.type]
        repeats = machine.repeats(calls, seconds)
        device = dict(zip(right, machine.interleaved(calls, repeats), strict=True))
        wall = device  # the CPU has one clock
        if machine.cuda:
            wall = dict(zip(right, machine.wall(calls, repeats), strict=True))
        extra = {name: machine.extra_bytes(call) for name, call in zip(right, calls, strict=True)}
        replayed = _replayed(machine, right, TOLERANCE[dtype], repeats) if graphs and machine.cuda else {}
    rate, ours = machine.matrix_rate(dtype), device["ours"].median
    least = max(floor.bytes / machine.bandwidth, floor.operations / rate)
    return {
        "schema": SCHEMA,
        **about,
        "dtype": name_of(dtype),
        "repeats": repeats,
        **_timed("", device),
        **_timed("wall_", wall),
        **({"graph_seconds": {name: times.median for name, times in replayed.items()}} if replayed else {}),
        "floor_bytes": floor.bytes,
        "operations": floor.operations,
        "matrix_rate": rate,
        "floor_seconds": least,
        "of_floor": least / ours,
        "of_matrix_rate": floor.operations / ours / rate,
        "extra_bytes": extra,
        "output_bytes": sum(t.numel() * t.element_size() for t in right["ours"].step(*right["ours"].inputs)),
        "less_memory": {name: extra[name] / max(extra["ours"], 1) for name in right if name != "ours"},
        "errors": {name: error if math.isfinite(error) else None for name, error in errors.items()},
        "tolerance": TOLERANCE[dtype],
    }


def _on(step: Callable[..., Tensors], inputs: Callable[[], Tensors]) -> Tensors:
    return step(*inputs())


def _errors(contenders: Mapping[str, Contender], tolerance: float) -> dict[str, float]:
    """Of each contender that can run; memory or a compiler may fail another than ours."""
    errors = {}
    for name, contender in contenders.items():
        try:
            errors[name] = contender.error()
        except Exception as failure:
            if name == "ours":
                raise
            print(f"not timed, {name} fails: {_said(failure)}")
            continue
        if not errors[name] <= tolerance:
            print(f"{name} has error {errors[name]:.2g} > {tolerance:g}: left out")
    return errors


def _replayed(
    machine: Machine, contenders: Mapping[str, Contender], tolerance: float, repeats: int
) -> dict[str, Times]:
    """Device times of the contenders that can be captured, and whose replay gives the right results."""
    replays = {}
    for name, contender in contenders.items():
        try:
            replay, results = machine.captured(partial(contender.step, *contender.inputs))
        except Exception as failure:
            print(f"not replayed, {name} cannot be captured: {_said(failure)}")
            continue
        replay()
        error = contender.error(results)
        if error <= tolerance:
            replays[name] = replay
        else:
            print(f"not replayed, {name} has error {error:.2g} > {tolerance:g} in a graph")
    return dict(zip(replays, machine.interleaved(list(replays.values()), repeats), strict=True))


def _timed(clock: str, times: Mapping[str, Times]) -> Row:
    """Medians, spreads and ratios by one clock."""
    others = [name for name in times if name != "ours"]
    return {
        f"{clock}seconds": {name: t.median for name, t in times.items()},
        f"{clock}spread": {name: [t.lower, t.upper] for name, t in times.items()},
        f"{clock}speedup": {name: times[name].median / times["ours"].median for name in others},
    }


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def line(row: Row) -> str:
    """A row of `compared` in one line."""
    ratios = [f"{value:.2f}x {name} ({row['less_memory'][name]:.1f}x memory)" for name, value in row["speedup"].items()]
    return (
        f"{row['op']:20} {row['part']:8} {row['mode']:16} {row['label']:48} {row['dtype']:8} "
        f"{row['seconds']['ours'] * 1e3:9.3f} ms, {row['extra_bytes']['ours'] / 2**20:7.1f} MiB, "
        f"{', '.join(ratios) or 'alone'}, {row['of_floor']:.0%} of the floor's speed, error {row['errors']['ours']:.0e}"
    )


def append(path: Path, row: Row) -> None:
    """Add a row to a JSONL file, whole or not at all, while no other process does.

    Raises:
        ValueError: the row holds a number that is not finite, which JSON does not have.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    with FileLock(Path(tempfile.gettempdir()) / f"bench-{hashlib.sha256(bytes(path.resolve())).hexdigest()[:16]}.lock"):
        former = path.read_text(encoding="utf-8") if path.exists() else ""
        with replacing(path) as temporary:
            temporary.write_text(former + line, encoding="utf-8")
