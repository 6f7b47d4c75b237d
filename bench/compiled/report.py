"""What compiled code says of every default config, without a GPU: `python -m bench compiled --report`.

A row per kernel of the shapes that are measured, in `bench/results/compiled.jsonl`, and a table, the worst first. Worst
is by `issue_limit`: the floor's time over the time in which the schedulers can issue the instructions that the kernel
is predicted to run, memory and latency apart. It is an upper bound for the share of the floor's speed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dyreg_triton._core.atomic_files import replacing

from . import SHARED_LIMIT, TARGETS, Case, Code, compile_case
from .bilinear import BilinearCase
from .model import Work, work
from .occupancy import LIMITS, occupancy
from .region import RegionCase
from .relational import RelationalCase

DTYPES = ("bfloat16", "float32")
OPS = {
    "gather": "region_pool", "scatter_moments": "region_pool",
    "scatter": "region_remap", "gather_moments": "region_remap",
}  # fmt: skip


def cases() -> Iterator[tuple[str, str, Case]]:
    """Label, op and case: the region shapes and the stages of the other ops that a run on a GPU measures first."""
    from .. import bilinear, region, relational

    for problem, dtype in itertools.product(region.STAGES["cuda"], DTYPES):
        frames, channels, size = problem.frames, problem.channels, problem.size
        label = f"{frames}x{channels}x{size[0]}x{size[1]}, N {problem.nodes}"
        for kind, op in OPS.items():
            yield label, op, RegionCase(kind, frames, problem.nodes, channels, size, dtype)
    frames, batch = relational.FRAMES["cuda"][0], relational.BATCH["cuda"]
    for (channels, side), dtype in itertools.product(relational.STAGES, DTYPES):
        label = relational.Problem(batch, channels, (frames, side, side)).label
        case = RelationalCase(channels, (side, side), dtype, frames, batch=batch)
        yield label, "relational_attention", case
    for stage, mixes, dtype in itertools.product(bilinear.STAGES["cuda"], bilinear.MIXES, DTYPES):
        n = replace(stage, tk=mixes)
        square, size = (n.cells, n.cells), (n.height, n.width)
        yield n.label, bilinear.OP, BilinearCase(n.channels, n.frames, size, dtype, n.k, n.tk, square, n.ts, n.batch)


def rows_of(target: str, label: str, op: str, case: Case) -> list[dict[str, Any]]:
    """One row per kernel of a case.

    Where one is launched more than once, as by a backward that takes a few clips at a time, the row is of the first
    launch.
    """
    found: dict[str, dict[str, Any]] = {}
    for code in compile_case(target, case):
        if op.startswith("region") and code.given["MOMENTS"] and not code.given.get("NODES", True):
            continue  # a backward whose features need no gradient, which is not measured
        kind = case.kind if isinstance(case, RegionCase) else code.kernel.partition("_")[2]
        if code.given.get("BACKWARD"):  # the same kernel in the other direction
            kind += "_backward"
        name = f"{code.kernel} {kind}"
        if name in found:
            found[name]["launches"] += 1
        else:
            found[name] = {"op": op, "kernel": code.kernel, "kind": kind, "case": label, **row(code, case.dtype)}
    return list(found.values())


def row(code: Code, dtype: str) -> dict[str, Any]:
    """What is known of one launch; bytes, operations and instructions are of one."""
    held = occupancy(code.target, code.num_warps, code.registers, code.shared)
    done = work(code.kernel, code.given, code.programs)
    loop = code.loop
    issued = instructions(code, done)
    return {
        "dtype": dtype,
        "target": code.target,
        "launches": 1,
        "num_warps": code.num_warps,
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "shared_limit": SHARED_LIMIT[code.target],
        "occupancy": round(held.occupancy, 4),
        "limited_by": held.limited_by,
        "programs": code.programs,
        "waves": round(held.waves(code.programs, code.target), 3) if held.resident else None,
        "load_bytes": code.load_bytes,
        "narrowest": code.narrowest,
        "store_bytes": code.store_bytes,
        "tensor_core": code.tensor_core,
        "tensor_core_kind": code.tensor_core_kind,
        "loop": loop and {
            "instructions": loop.instructions, "mix": loop.mix(), "whole": loop.whole, "bytes": code.loop_bytes,
            "operations": code.loop_operations,
        },
        "bytes_moved": done and done.bytes_moved,
        "floor_bytes": done and done.floor_bytes,
        "operations": done and done.operations,
        "floor_operations": done and done.floor_operations,
        "instructions": issued,
        "issue_limit": issue_limit(code, done, dtype, issued),
    }  # fmt: skip


def instructions(code: Code, done: Work | None) -> int | None:
    """How many a launch is predicted to issue at the least, over all warps.

    By the turns of the one loop where they are known; else as if all products were made at the rate of the hot loop,
    and none by several warps alike: good for an order, not for comparing blocks that share products among warps.
    """
    if done is None or code.loop is None:
        return None
    if code.loop.whole:
        turns = 1
    elif done.turns is not None:
        turns = done.turns
    else:
        return code.loop.instructions * done.operations // code.loop_operations if code.loop_operations else None
    once = code.instructions - code.loop.instructions
    return code.programs * code.num_warps * (done.rounds * once + turns * code.loop.instructions)


def issue_limit(code: Code, done: Work | None, dtype: str, issued: int | None) -> float | None:
    """The floor's time over that of issuing the instructions, on all schedulers of the largest GPU of the kind."""
    if done is None or not issued:
        return None
    limits = LIMITS[code.target]
    # a scheduler's 32 lanes multiply and add; four clocks for a wavefront's 64
    rate = limits.operations_per_slot if dtype != "float32" else 2.0 * limits.lanes
    slots = max(done.floor_bytes / limits.bytes_per_slot, done.floor_operations / rate)
    return round(slots / issued, 4)


def _task(task: tuple[str, tuple[str, str, Case]]) -> list[dict[str, Any]]:
    target, (label, op, case) = task
    return rows_of(target, label, op, case)


def rows(jobs: int = 1) -> Iterator[dict[str, Any]]:
    """All rows, in a fixed order; of `jobs` processes where there are more than one."""
    tasks = list(itertools.product(TARGETS, cases()))
    with contextlib.ExitStack() as stack:
        run: Any = map
        if jobs > 1:
            run = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))).map
        for found in run(_task, tasks):
            yield from ({"schema": 2, "suite": "compiled", **each} for each in found)


def main(out: Path, jobs: int = 1) -> int:
    """Write the rows to `out`, whole or not at all, and print them; 1 if a kernel spills or does not fit."""
    found = list(rows(jobs))
    unwritten = None
    try:
        with replacing(out) as temporary:
            temporary.write_text("".join(json.dumps(each) + "\n" for each in found), encoding="utf-8")
    except OSError as error:
        unwritten = error
    print(table(found))  # either way: it took minutes
    if unwritten is not None:
        print(unwritten, file=sys.stderr)
        return 1
    print(f"{len(found)} rows -> {out}")
    return 1 if any(each["spills"] or each["shared"] > each["shared_limit"] for each in found) else 0


COLUMNS = (
    ("kernel", 21), ("dtype", 8), ("case", 48), ("issue", 5), ("bytes", 6), ("ops", 5), ("regs", 4), ("spill", 5),
    ("shared", 6), ("occ", 4), ("by", 13), ("waves", 6), ("w", 2), ("load", 5), ("mma", 4), ("loop", 4), ("ops/i", 5),
    ("mix", 0),
)  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Rows as text, a target at a time, the worst first: see `issue_limit`.

    bytes and ops: what is moved and computed, in terms of the floor. load: the widest and the narrowest. ops/i: of
    matrix products per instruction of the loop.
    """
    parts = []
    for target in TARGETS:
        mine = [each for each in found if each["target"] == target]
        mine.sort(key=lambda each: (each["issue_limit"] is None, each["issue_limit"] or 0.0))
        parts += [f"\n{target}", _line({name: name for name, _ in COLUMNS})]
        parts += [_line(_cells(each)) for each in mine]
    return "\n".join(parts)


def _line(cells: dict[str, str]) -> str:
    return " ".join(cells[name].ljust(width) for name, width in COLUMNS).rstrip()


def _cells(each: dict[str, Any]) -> dict[str, str]:
    def over(a: str, b: str) -> str:
        return f"{each[a] / each[b]:.2f}" if each[b] else "-"

    loop = each["loop"] or {"instructions": 0, "mix": {}, "operations": None}
    main_parts = sorted(loop["mix"].items(), key=lambda item: -item[1])[:4]
    return {
        "kernel": each["kind"] + (f" x{each['launches']}" if each["launches"] > 1 else ""),
        "dtype": each["dtype"],
        "case": each["case"],
        "issue": "-" if each["issue_limit"] is None else f"{each['issue_limit']:.2f}",
        "bytes": over("bytes_moved", "floor_bytes"),
        "ops": over("operations", "floor_operations"),
        "regs": str(each["registers"]),
        "spill": str(each["spills"]),
        "shared": str(each["shared"]),
        "occ": f"{each['occupancy']:.2f}",
        "by": each["limited_by"],
        "waves": "-" if each["waves"] is None else f"{each['waves']:.1f}",
        "w": str(each["num_warps"]),
        "load": f"{each['load_bytes']}/{each['narrowest']}",
        "mma": str(each["tensor_core"]),
        "loop": str(loop["instructions"]),
        "ops/i": f"{loop['operations'] / loop['instructions']:.0f}" if loop["operations"] else "-",
        "mix": ", ".join(f"{name} {share:.0%}" for name, share in main_parts),
    }
