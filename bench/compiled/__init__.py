"""Compile kernels for GPUs that need not be present, and read the machine code: `python -m bench compiled`.

The op's own host code runs on `device="meta"` tensors under a stand-in driver, with every launch turned into a
compile; so each kernel is specialised exactly as a real launch would specialise it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Protocol

import torch
from triton.backends.compiler import GPUTarget

from dyreg_triton.ops import launch

from .machine_code import Code, inspect

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Code]]:
    """Inside, launches on meta tensors compile for `target` and append their `Code` to the list."""
    codes: list[Code] = []

    def seen(made: launch.Launch, args: tuple[Any, ...], compiled: Any) -> None:
        codes.append(
            dataclasses.replace(inspect(compiled, target), programs=made.programs, given=made.given_by_name(args))
        )

    with launch.compiling(TARGETS[target], 1000 + list(TARGETS).index(target), seen):
        yield codes


DTYPES = ("bfloat16", "float16", "float32", "tf32")  # tf32: float32 with torch's matmul precision at "high"


class Case(Protocol):
    """One call of an op: what it launches, and what must be true of the code."""

    @property
    def dtype(self) -> str:
        """One of DTYPES."""

    @property
    def may_spill(self) -> bool:
        """Whether some of its kernels are known to spill."""

    def launch(self) -> None:
        """Through the op's own host code, on meta tensors."""

    def problems(self, code: Code) -> list[str]:
        """What is wrong with a kernel of this case, beyond what `misfits` sees."""

    def about(self) -> str:
        """The case in a few columns."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that one of DTYPES names."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


def compile_case(target: str, case: Case) -> list[Code]:
    """Compile one case, under the matmul precision that its dtype names."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    try:
        with compiling(target) as codes:
            case.launch()
    finally:
        torch.set_float32_matmul_precision(former)
    return codes


def problems(case: Case, code: Code) -> list[str]:
    """What is wrong with a kernel, in words: spills, too much shared memory, and what its case says."""
    found = []
    if code.spills and not case.may_spill:
        found.append("spills")
    if code.shared > SHARED_LIMIT[code.target]:
        found.append("too much shared memory")
    return found + case.problems(code)


HEADER = "target  kernel                  w regs spill shared  mma load store  case"


def _row(case: Case, code: Code) -> str:
    return (
        f"{code.target:7} {code.kernel:22} {code.num_warps:2} {code.registers:4} {code.spills:5} {code.shared:6} "
        f"{code.tensor_core:4} {code.load_bytes:4} {code.store_bytes:5}  {case.dtype:8} {case.about()}"
    )


def _rows(task: tuple[str, Case]) -> list[tuple[str, list[str]]]:
    target, case = task
    return [(_row(case, code), problems(case, code)) for code in compile_case(target, case)]


def _report(compiled: Iterable[list[tuple[str, list[str]]]]) -> int:
    print(HEADER, flush=True)
    total = bad = 0
    for row, wrong in itertools.chain.from_iterable(compiled):
        total, bad = total + 1, bad + bool(wrong)
        print(f"{row}{'  <- ' + ', '.join(wrong) if wrong else ''}", flush=True)
    print(f"{total} kernels, {bad} that do not fit")
    return 1 if bad else 0


def main(everything: bool = False, jobs: int | None = None) -> int:
    """Print one line per compiled kernel; 1 if any spills, exceeds its target's shared memory, or accesses narrowly.

    `everything` takes tens of minutes, on `jobs` processes (by default one per core).
    """
    from . import bilinear, region, relational

    cases: list[Case] = [case for op in (region, relational, bilinear) for case in op.cases(everything)]
    tasks = list(itertools.product(TARGETS, cases))
    if not everything:
        return _report(map(_rows, tasks))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return _report(pool.map(_rows, tasks, chunksize=8))
