"""`python -m bench run device`: the limits that the ops' speeds are fractions of.

Copy bandwidth in bytes a second, read and written, and the rate of a large square matrix product in operations a
second, for every dtype that the ops are measured in. Rows of ops measured in the same run use the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from dyreg_triton._core.numerics import TOLERANCE

from .measure import Machine, Rate
from .rows import SCHEMA, Cell, Check, Rank, Row, Rows, name_of

DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32,)}


def checks(machine: Machine) -> Iterator[Check]:
    """None: the rows check themselves."""
    return iter(())


def cells(kind: str, *, quick: bool) -> Iterator[Cell]:
    """Before everything else, for everything else uses them."""
    yield Cell(Rank.LIMITS, "copy", "device", "large uint8", 1, _copy)
    for dtype in DTYPES[kind]:
        yield Cell(Rank.LIMITS, "matmul", "device", f"large {name_of(dtype)}", 1, partial(_matmul, dtype=dtype))


def _copy(machine: Machine) -> Rows:
    yield _row("copy", "uint8", "GB/s", machine.copy(), 0.0)


def _matmul(machine: Machine, dtype: torch.dtype) -> Rows:
    yield _row("matmul", name_of(dtype), "Gop/s", machine.matrix(dtype), TOLERANCE[dtype])


def _row(op: str, dtype: str, unit: str, rate: Rate, tolerance: float) -> Row | None:
    if not rate.error <= tolerance:
        print(f"WRONG, not kept: {op} {dtype} has error {rate.error:.2g} > {tolerance:g}")
        return None
    spread = " to ".join(f"{value / 1e9:,.1f}" for value in (rate.lower, rate.upper))
    print(f"{op:20} {dtype:8} {rate.best / 1e9:,.1f} {unit}, half of the time {spread}")
    return {
        "schema": SCHEMA,
        "suite": "device",
        "op": op,
        "part": "device",
        "label": f"large {dtype}",
        "dtype": dtype,
        "rate": rate.best,
        "spread": [rate.lower, rate.upper],
        "errors": {"ours": rate.error},
        "tolerance": tolerance,
    }
