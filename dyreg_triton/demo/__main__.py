"""`python -m dyreg_triton.demo [options]`; see `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .._core.console import command

STEPS = 1200  # two and a half minutes on one core of today


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) > 0 and int(columns) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no grid; write ROWSxCOLUMNS, such as 2x2")
    return int(rows), int(columns)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {error}") from error
    return device


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dyreg_triton.demo",
        description="Train a small network with one DyReG layer to name moving digits, and see where its regions go.",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips (default: %(default)s)")
    parser.add_argument("--steps", type=_count, help=f"of training (default: {STEPS})")
    parser.add_argument("--grid", type=_grid, default="2x2", help="rows and columns of nodes (default: %(default)s)")
    parser.add_argument("--profile", choices=("linear", "gaussian", "log-linear"), default="linear")
    parser.add_argument("--variant", choices=("full", "lite"), default="full", help="which generator of regions")
    parser.add_argument("--device", type=_device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--quick", action="store_true", help="two steps, to see that it runs; the figures mean nothing")
    return parser.parse_args(arguments)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the demo shows what it promises, 1 where it does not, 2 where something is missing or a file cannot be
    written, 130 on Ctrl-C."""
    given = _parse(arguments)
    try:
        from .report import Options
        from .run import run
    except ModuleNotFoundError as error:
        print(f"the demo needs {error.name}; install it by: pip install 'dyreg-triton[demo]'", file=sys.stderr)
        return 2
    options = Options(
        out=given.out,
        seed=given.seed,
        steps=given.steps or (2 if given.quick else STEPS),
        test_clips=8 if given.quick else 256,
        timing_rounds=2 if given.quick else 15,
        grid=given.grid,
        profile=given.profile,
        variant=given.variant,
        device=given.device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    try:
        problems = run(options)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; no half-written file is left", file=sys.stderr)
        return 130
    if given.quick:
        return 0
    for problem in problems:
        print(f"NOT MET: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
