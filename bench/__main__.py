"""`python -m bench run SUITE|all` measures, `report` shows what was measured, `compare` says what has changed between
two files of rows, and `compiled` reads the machine code of GPUs not present."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from dyreg_triton._core.console import command

if TYPE_CHECKING:
    from .measure import Machine
    from .rows import Check

# Each is a module of this package with `checks(machine)` and `cells(kind, quick=...)`, of which bench.rows tells.
SUITES = ("device", "region", "relational", "bilinear", "overhead")
RESULTS = Path(__file__).parent / "results"
BUDGET = 510.0  # seconds of `run all`, where none is given


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    run = commands.add_parser("run", help="measure ops against the published formulations and the floor")
    run.add_argument("suite", choices=(*SUITES, "all"))
    run.add_argument("--quick", action="store_true", help="one small problem an op, no torch.compile: a minute on CPU")
    run.add_argument("--out", type=Path, help="append rows to this JSONL instead of bench/results/SUITE-DEVICE.jsonl")
    run.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    run.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"end with the row that is in progress then, the most telling first (all: {BUDGET:.0f}; one suite: none)",
    )
    report = commands.add_parser("report", help="tables and plots of all rows")
    report.add_argument("--results", type=Path, default=RESULTS, help="the folder of rows (bench/results)")
    report.add_argument("--out", type=Path, default=RESULTS.parent / "REPORT.md", help="Markdown (bench/REPORT.md)")
    report.add_argument("--html", type=Path, default=RESULTS.parent / "report.html", help="HTML (bench/report.html)")
    compare = commands.add_parser("compare", help="what has changed, beyond the noise, from rows A to rows B")
    compare.add_argument("a", type=Path, metavar="A")
    compare.add_argument("b", type=Path, metavar="B")
    compiled = commands.add_parser("compiled", help="compile every kernel for sm_80, sm_90, sm_100 and gfx942")
    compiled.add_argument("--all", action="store_true", help="every config, profile, dtype and layout: tens of minutes")
    compiled.add_argument("--jobs", type=int, help="processes for --all; by default one per core")
    compiled.add_argument("--report", action="store_true", help="write what the default configs compile to as rows")
    args = parser.parse_args(argv)

    if args.command == "compiled":
        from dyreg_triton._core.installed import triton_fault

        fault = triton_fault()
        if fault is not None:
            print(f"nothing is compiled: the package triton is {fault}", file=sys.stderr)
            return 1
        if args.report:
            return importlib.import_module("bench.compiled.report").main(RESULTS / "compiled.jsonl")
        return importlib.import_module("bench.compiled").main(args.all, args.jobs)
    if args.command == "report":
        return importlib.import_module("bench.report").main(args.results, args.out, args.html)
    if args.command == "compare":
        return importlib.import_module("bench.compare").main(args.a, args.b)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints when it starts and stops
    start = time.monotonic()

    import torch

    from .measure import Machine

    if args.device not in (None, "cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device is {args.device!r}; accepted are cpu, and cuda where torch sees a GPU")
    if args.out is not None and not _writable(args.out):
        parser.error(f"--out is {args.out}; accepted is a file in a folder that can be written")
    if args.budget is not None and not args.budget > 0:
        parser.error(f"--budget is {args.budget}; accepted is a positive number of seconds")
    suites = SUITES if args.suite == "all" else (args.suite,)
    budget = args.budget or (BUDGET if args.suite == "all" else float("inf"))
    try:
        return _run(Machine.here(args.device), suites, args.quick, args.out, start + budget)
    except OSError as error:  # a row that cannot be written; it names the file
        print(error, file=sys.stderr)
        return 1


def _run(machine: Machine, suites: Iterable[str], quick: bool, out: Path | None, deadline: float) -> int:
    """Check, then measure cell by cell until `deadline`, and keep each row as it comes; 1 if anything was wrong."""
    from .rows import append

    modules = {suite: importlib.import_module(f"bench.{suite}") for suite in suites}
    files = {suite: out or RESULTS / f"{suite}-{machine.slug}.jsonl" for suite in modules}
    print(machine, flush=True)
    wrong = {check.op for module in modules.values() for check in module.checks(machine) if not _passes(check)}
    kind, kept, failed = machine.device.type, dict.fromkeys(files.values(), 0), bool(wrong)
    planned = [(suite, cell) for suite in modules for cell in modules[suite].cells(kind, quick=quick)]
    left = []
    for suite, cell in sorted(planned, key=lambda one: one[1].rank):
        if cell.op in wrong:
            continue
        done = 0
        with closing(cell.rows(machine)) as rows:
            while done < cell.number and time.monotonic() < deadline:
                try:
                    row = next(rows)
                except Exception:
                    print(f"FAILED: {cell}\n{traceback.format_exc(limit=-8)}", flush=True)
                    failed = True
                    break
                done += 1
                if row is None:
                    failed = True
                else:
                    append(files[suite], {**row, **machine.about()})  # so that a run cut short leaves what it has
                    kept[files[suite]] += 1
                sys.stdout.flush()
            else:
                if done < cell.number:
                    left.append(f"  {cell}: {cell.number - done} of {cell.number} rows")
    for file, number in kept.items():
        print(f"{number} rows -> {file}")
    if left:
        print("left out, for the time was over:", *left, sep="\n")
    return 1 if failed else 0


def _writable(file: Path) -> bool:
    """Whether it can be written, and its folder made where it is not there."""
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK) and not file.is_dir()


def _passes(check: Check) -> bool:
    """Whether the op's results are right there, which is said."""
    try:
        error = check.error()
    except Exception:
        print(f"FAILED: {check.op} {check.label}, no row of it is kept\n{traceback.format_exc(limit=-8)}", flush=True)
        return False
    right = error <= check.tolerance
    said = "right:" if right else "WRONG, no row of it is kept:"
    print(f"{said} {check.op} {check.label}, error {error:.1g} of {check.tolerance:g} accepted", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
