"""The command line: `python -m dyreg_triton`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any

from ._core.console import command
from .tuning import command as tune
from .viz import command as viz


def version_of(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> str:
    """What a bug report needs, one `name: value` a line, and which backend `auto` would choose and why."""
    import torch

    from ._core.dispatch import BACKENDS, current_backend, why_not
    from ._core.installed import triton_version
    from ._core.version import __version__

    lines = {
        "dyreg_triton": __version__,
        "torch": torch.__version__,
        "triton": triton_version(),
        "numpy": version_of("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "cuda": str(torch.version.cuda or torch.version.hip or "none in this build"),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "unset"),
    }
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines[f"gpu {i}"] = (
                f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
                f"{p.total_memory / 2**30:.0f} GiB"
            )
            devices.append(torch.device("cuda", i))
    lines["backend set"] = current_backend()
    for device in devices:
        refusal = why_not("triton", device, torch.float32)
        if refusal is None:
            lines[f"auto on {device}"] = "triton, because it can run"
        else:
            lines[f"auto on {device}"] = f"eager, because triton cannot run: {refusal}"
    lines["backends"] = ", ".join(BACKENDS)
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def _shape(text: str) -> tuple[int, ...]:
    parts = re.split("[,x]", text)
    shape = tuple(int(n) for n in parts if re.fullmatch("[1-9][0-9]{0,9}", n))
    if len(shape) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted are positive integers with commas, such as 2,3,8,224,224")
    return shape


def _factory(text: str) -> str:
    where, colon, what = text.partition(":")
    if not (where and colon and what):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is package.module:factory")
    return text


def _device(text: str) -> Any:
    import torch

    try:
        return torch.device(text)
    except RuntimeError as failure:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is cpu, cuda, cuda:1, ...") from failure


def _model(factory: str, arguments: Sequence[str]) -> Any:
    """What `package.module:factory` names, called if it is no module yet; it sees `arguments` as its command line.

    The authors' modules read theirs where they are imported.
    """
    from torch import nn

    where, _, what = factory.partition(":")
    if os.getcwd() not in sys.path:  # the installed command does not look there by itself
        sys.path.insert(0, os.getcwd())
    kept, sys.argv = sys.argv, [where, *arguments]
    try:
        found: Any = importlib.import_module(where)
        for name in what.split("."):
            found = getattr(found, name)
        if not isinstance(found, nn.Module):
            if not callable(found):
                raise TypeError(f"{what} is a {type(found).__name__}, no function and no torch.nn.Module")
            found = found()
            if not isinstance(found, nn.Module):
                raise TypeError(f"{what} returns a {type(found).__name__}, no torch.nn.Module")
    except (Exception, SystemExit) as failure:
        raise ValueError(
            f"factory is {factory!r}; accepted is what makes a torch.nn.Module here: "
            f"{type(failure).__name__}: {failure}"
        ) from failure
    finally:
        sys.argv = kept
    return found


def _swap(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Swap the layers of a user's own model, and say what came of it."""
    import torch

    from .swapping import swap

    model = _model(options.factory, arguments)
    model.train(options.train)  # a statement of its own: the authors' networks return nothing here
    try:
        model.to(options.device, getattr(torch, options.dtype or "", None))
    except (RuntimeError, AssertionError) as failure:
        raise ValueError(f"device is {str(options.device)!r}; accepted is one that is here: {failure}") from failure
    first = next(
        (p for p in model.parameters() if p.is_floating_point()), torch.zeros((), dtype=torch.float32, device="cpu")
    )
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(first)
        for shape in options.example
    ]
    report = swap(model, only=options.only or None, example=tuple(inputs) or None, keep_regions=options.keep_regions)
    return str(report)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, which `console` explains."""
    parser = argparse.ArgumentParser(prog="dyreg-triton", description="Fast, exact layers for video understanding.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("env", help="print what a bug report needs, and which backend would run here and why")
    replace = commands.add_parser(
        "swap",
        help="replace the published layers in your model, and compare and time both",
        epilog="What follows -- is the command line that the factory's module sees.",
    )
    replace.add_argument("factory", type=_factory, help="package.module:factory, which makes the model, or is one")
    replace.add_argument(
        "--example",
        type=_shape,
        action="append",
        default=[],
        metavar="2,3,8,224,224",
        help="shape of an input of the model, to run both on; once for each input",
    )
    replace.add_argument(
        "--only",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="replace only these: paths, folders, patterns of paths, published classes",
    )
    replace.add_argument("--device", type=_device, default="cpu", help="where to run (cpu)")
    replace.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), help="the model's (its own)")
    replace.add_argument("--train", action="store_true", help="in training mode; else in evaluation mode")
    replace.add_argument(
        "--keep-regions", action="store_true", help="let dynamic graphs leave their regions to be read"
    )
    tuned = commands.add_parser(
        "tune",
        help="measure on this GPU which launch configs are fastest, and keep them in a file that every later run reads",
        epilog="What follows -- is the command line that the module of --from sees.",
    )
    tune.add_arguments(tuned, _factory, _shape, _device)
    shown = commands.add_parser(
        "viz",
        help="draw what the bilinear attentional transforms in your model attend to, over a clip",
        epilog="What follows -- is the command line that the factory's module sees.",
    )
    viz.add_arguments(shown, _factory, _device)
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    if options.command == "env":
        print(environment())
        return 0
    arguments = given[end + 1 :]
    try:
        if options.command == "tune":
            return tune.main(options, lambda factory: _model(factory, arguments))
        if options.command == "viz":
            return viz.main(options, lambda factory: _model(factory, arguments))
        print(_swap(options, arguments))
    except (ValueError, TypeError, RuntimeError, OSError) as refusal:
        print(refusal, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
