"""`python -m dyreg_triton tune`: its arguments, what it runs, what it prints."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..configs.table import SPACES, to_json
from ..ops.recording import TunedCall, recording
from .calls import DTYPES, PRESETS
from .engine import Progress, Summary

TARGETS = {
    "sm_80": ("8.0", "nvidia"),
    "sm_90": ("9.0", "nvidia"),
    "sm_100": ("10.0", "blackwell"),
    "gfx942": ("gfx942", "amd"),
}


def seconds(text: str) -> float:
    """90, 90s, 5m or 1h."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([smh]?)", text)
    value = float(found.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[found.group(2)] if found else 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is a time such as 90s, 5m or 1h")
    return value


def add_arguments(parser: argparse.ArgumentParser, factory: Any, shape: Any, device: Any) -> None:
    """The options of the command; `factory`, `shape` and `device` are the types that other commands use too."""
    parser.add_argument("--ops", nargs="+", choices=tuple(SPACES), help="only these (all)")
    parser.add_argument(
        "--shapes", default="papers", metavar="|".join((*PRESETS, "FILE")), help="what to tune for (papers)"
    )
    parser.add_argument(
        "--from", dest="factory", type=factory, metavar="package.module:factory",
        help="tune for exactly what this model calls in one forward and backward of --example",
    )  # fmt: skip
    parser.add_argument(
        "--example", type=shape, action="append", default=[], metavar="2,3,8,224,224",
        help="shape of an input of that model; once for each input",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES[:3], help="of the presets (bfloat16 float32), or of the model (its own)"
    )
    parser.add_argument(
        "--precision", choices=("highest", "high", "medium"),
        help="torch's float32 matmul precision: high and medium are TF32, which is tuned apart (torch's own)",
    )  # fmt: skip
    parser.add_argument("--budget", type=seconds, metavar="5m", help="stop after this long (no limit)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes that compile ahead (one for each core but one)"
    )
    parser.add_argument("--device", type=device, help="where to measure (cuda)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the tuning file (the user's, which lookups read)")
    parser.add_argument("--again", action="store_true", help="measure again what the file already holds")
    parser.add_argument("--show", action="store_true", help="measure nothing: list what would be used, and from where")
    parser.add_argument(
        "--target", choices=tuple(TARGETS), help="with --show: the heuristics of a GPU that is not here"
    )


def main(options: argparse.Namespace, model: Callable[[str], Any]) -> int:
    """Run the command; `model` makes what --from names. Returns the exit status."""
    import torch

    from .. import tuning
    from .tuner import usable_device

    if options.precision is not None:
        torch.set_float32_matmul_precision(options.precision)
    if options.show:
        print(_shown(options, model))
        return 0
    device = usable_device(options.device)
    calls = _recorded(options, model, device) if options.factory else None
    path = options.out if options.out is not None else _user_file(device)
    try:
        summary = tuning.tune(
            calls, shapes=options.shapes, ops=options.ops, dtypes=options.dtype or ("bfloat16", "float32"),
            budget=options.budget, path=path, device=device, again=options.again,
            jobs=options.jobs, progress=_bar(sys.stderr),
        )  # fmt: skip
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {_count(path, device)} kernels are in {path}; the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    print(f"\n{_said(summary)}\n-> {path}")
    return 0


def _user_file(device: Any) -> Path:
    from .._core.gpu import gpu_of
    from ..configs.files import user_file

    return user_file(gpu_of(device))


def _count(path: Path, device: Any) -> int:
    from .._core.gpu import gpu_of
    from ..configs.files import Unusable, read

    try:
        return len(read(path, gpu_of(device)))
    except Unusable:
        return 0


def _said(summary: Summary) -> str:
    def number(keys: Any) -> int:
        return len(keys) if isinstance(keys, list) else keys

    tuned, kept, skipped, left = (number(keys) for keys in summary[:4])
    text = f"{tuned} kernels are faster with another config, {kept} keep the default, {skipped} were in the file"
    if left:
        text += f", {left} are left for lack of time: the same command goes on"
    return f"{text}; {summary.refused} configs were refused"


def _bar(stream: Any) -> Callable[[Progress], None]:
    """One line that is written over where that can be, else a line for each kernel."""
    last: list[Any] = [None]

    def show(progress: Progress) -> None:
        left = "" if progress.left_seconds is None else f", at most {_clock(progress.left_seconds)} left"
        share = progress.done / max(progress.of, 1)
        filled = round(20 * share)
        line = (
            f"[{'#' * filled}{'.' * (20 - filled)}] {progress.done}/{progress.of} {_clock(progress.elapsed)}{left}  "
            f"{progress.key}"
        )
        if stream.isatty():
            stream.write(f"\r\x1b[K{line[:150]}")
            stream.flush()
        elif last[0] != progress.key:
            print(line, file=stream)
        last[0] = progress.key

    return show


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def _recorded(options: argparse.Namespace, make: Callable[[str], Any], device: Any) -> list[TunedCall]:
    """The calls of the user's model, in each dtype."""
    import torch

    if not options.example:
        raise ValueError(
            "example is not given; accepted with --from is the shape of each input: --example 2,3,8,224,224"
        )
    found: list[TunedCall] = []
    for dtype in options.dtype or [None]:
        model = make(options.factory)
        model.to(device, getattr(torch, dtype or "", None))
        first = next(
            (p for p in model.parameters() if p.is_floating_point()),
            torch.zeros((), device=device, dtype=torch.float32),
        )
        inputs = [
            torch.randn(shape, dtype=torch.float32, device="cpu").to(first).requires_grad_()
            for shape in options.example
        ]
        try:
            with recording() as recorded, torch.enable_grad():
                outputs = [t for t in _tensors(model(*inputs)) if t.requires_grad]
                if outputs:
                    torch.autograd.backward([t.sum() for t in outputs])
        except Exception as failure:
            raise ValueError(
                f"{options.factory} does not run on inputs of {options.example}: {type(failure).__name__}: {failure}"
            ) from failure
        found += [call for call in recorded if call not in found]
    if not found:
        raise ValueError(
            f"{options.factory} calls no op of dyreg_triton, so there is nothing to tune; a model with published "
            "layers does after dt.swap(model)"
        )
    return found


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)


def _shown(options: argparse.Namespace, make: Callable[[str], Any]) -> str:
    """What would be used on the device here, or on the target named; without either, on sm_90."""
    from .._core.gpu import Gpu, family, gpu_of
    from ..configs.lookup import origin_on
    from .problems import keys_of
    from .tuner import _calls, usable_device

    try:
        device = usable_device(options.device) if options.target is None else None
    except RuntimeError as reason:
        if options.device is not None:
            raise
        device, why = None, f"# {reason}; these are the heuristics of sm_90\n"
    else:
        why = ""
    if device is not None:
        gpu, kind = gpu_of(device), family(device)
    else:
        capability, kind = TARGETS[options.target or "sm_90"]
        gpu = Gpu(options.target or "sm_90", capability, 0)
    calls = None
    if options.factory:
        if device is None:
            raise ValueError("--from runs the model, for which a device is needed")
        calls = _recorded(options, make, device)
    lines = []
    wanted = _calls(calls, options.shapes, options.ops, options.dtype or ("bfloat16", "float32"))
    for key in dict.fromkeys(key for call in wanted for key in keys_of(call, kind)):
        found = origin_on(key, gpu, kind)
        lines.append(f"{key}\n    {_fields(found.config)}\n    {_where(key, found)}")
    return f"{why}# {gpu}\n" + "\n".join(lines)


def _fields(config: Any) -> str:
    return " ".join(f"{name}={value}".replace(" ", "") for name, value in to_json(config).items() if value is not None)


def _where(key: Any, found: Any) -> str:
    if found.entry is None:
        return "heuristic"
    text = f"{found.source}: {found.path}"
    if found.key != key:
        return f"{text}, nearest key {found.key}, {key.distance(found.key):.2f} away"
    entry = found.entry
    return f"{text}, {entry.seconds * 1e6:.1f} us, default {entry.default_seconds * 1e6:.1f} us"
