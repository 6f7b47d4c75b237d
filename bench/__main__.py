"""`python -m bench run region|relational|all` measures, `python -m bench plot relational` draws what was measured, and
`python -m bench compiled` reads the machine code of GPUs not present."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

SUITES = ("region", "relational")
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    run = commands.add_parser("run", help="measure an op against the published formulation and the floor")
    run.add_argument("suite", choices=(*SUITES, "all"))
    run.add_argument("--quick", action="store_true", help="one small shape, no torch.compile: under a minute on CPU")
    run.add_argument("--out", type=Path, help="append rows to this JSONL instead of bench/results/SUITE-DEVICE.jsonl")
    run.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    plot = commands.add_parser("plot", help="draw an op's time and memory from the rows of bench/results")
    plot.add_argument("suite", choices=("relational",))
    plot.add_argument("--out", type=Path, help="one SVG of all devices instead of one beside each file of rows")
    compiled = commands.add_parser("compiled", help="compile every kernel for sm_80, sm_90, sm_100 and gfx942")
    compiled.add_argument("--all", action="store_true", help="every config, profile, dtype and layout: tens of minutes")
    compiled.add_argument("--jobs", type=int, help="processes for --all; by default one per core")
    args = parser.parse_args(argv)

    if args.command == "compiled":
        from .compiled import main as compile_all

        return compile_all(args.all, args.jobs)

    if args.command == "plot":
        return _plot(parser, args.suite, args.out)

    import importlib

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints when it starts and stops

    import torch

    from .measure import Machine

    if args.device not in (None, "cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device is {args.device!r}; accepted are cpu, and cuda where torch sees a GPU")
    if args.out is not None and not os.access(args.out.parent if args.out.parent.exists() else ".", os.W_OK):
        parser.error(f"--out is {args.out}; accepted is a file in a folder that can be written")
    machine = Machine.here(args.device)
    print(machine)
    failed = False
    for suite in SUITES if args.suite == "all" else (args.suite,):
        out = args.out or RESULTS / f"{suite}-{machine.slug}.jsonl"
        kept = 0
        for row in importlib.import_module(f"bench.{suite}").run(machine, quick=args.quick):
            failed |= row is None
            if row is not None:
                machine.append(out, row)  # as it comes, so that a run cut short leaves what it has
                kept += 1
        print(f"{kept} rows -> {out}")
    return 1 if failed else 0


def _plot(parser: argparse.ArgumentParser, suite: str, out: Path | None) -> int:
    import importlib

    files = sorted(RESULTS.glob(f"{suite}-*.jsonl"))
    if not files:
        parser.error(f"there are no rows; `python -m bench run {suite}` writes {RESULTS / f'{suite}-DEVICE.jsonl'}")
    figures = [(files, out)] if out is not None else [([file], file.with_suffix(".svg")) for file in files]
    for rows, figure in figures:
        try:
            importlib.import_module(f"bench.{suite}").plot(rows, figure)
        except (ImportError, ValueError) as error:
            parser.error(str(error))
        print(f"-> {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
