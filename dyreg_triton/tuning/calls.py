"""Calls of ops to tune for: recorded from a model, read from a file, or of a preset."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._core.atomic_files import replacing
from .._core.validation import what
from ..ops.recording import TunedCall
from ..ops.table import OPS

DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("contiguous", "channels_last")
PRESETS = ("papers", "quick")


# --- files ----------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], calls: Sequence[TunedCall]) -> None:
    """Write calls as a JSON list, one a line."""
    if not all(isinstance(call, TunedCall) for call in calls):
        raise TypeError(f"save: calls is {what(calls)}; accepted is a list of TunedCall")
    text = "[\n" + ",\n".join(f" {json.dumps(call._asdict())}" for call in calls) + "\n]\n"
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load(path: str | os.PathLike[str]) -> list[TunedCall]:
    """Read what `save` wrote, or a person; ValueError names the file, the entry and what is accepted."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise ValueError(
            f"shapes is {str(path)!r}; accepted are the presets {', '.join(PRESETS)} and a JSON list of calls: {error}"
        ) from error
    if not isinstance(content, list):
        raise ValueError(f"shapes is {str(path)!r}, which holds {content!r:.80}; accepted is a JSON list of calls")
    found = []
    for i, fields in enumerate(content):
        try:
            found.append(checked(fields))
        except ValueError as error:
            raise ValueError(f"shapes is {str(path)!r}, of which entry {i} is {fields!r:.200}: {error}") from error
    return found


def checked(fields: Any) -> TunedCall:
    """The call of these fields; ValueError says what is accepted."""

    def need(condition: bool, accepted: str) -> None:
        if not condition:
            raise ValueError(f"accepted is {accepted}")

    need(isinstance(fields, dict) and set(fields) == set(TunedCall._fields), f"an object of {TunedCall._fields}")
    op, tensors, options = fields["op"], fields["tensors"], fields["options"]
    need(isinstance(op, str) and op in OPS, f"an op of {', '.join(sorted(OPS))}")
    may = OPS[op].optional
    must = tuple(name for name in OPS[op].tensors if name not in may)
    named = isinstance(tensors, dict) and set(must) <= set(tensors) <= {*must, *may}
    need(named, f"the tensors {must} of {op}" + (f", and those of {may} that there are" if may else ""))
    for name, spec in tensors.items():
        need(isinstance(spec, dict) and set(spec) == {"shape", "dtype", "layout"}, f"a shape, dtype, layout of {name}")
        shape = spec["shape"] if isinstance(spec["shape"], (list, tuple)) else ()
        sizes = len(shape) > 0 and all(type(n) is int and 0 < n < 2**31 for n in shape)
        need(sizes and math.prod(shape) < 2**40, f"a list of integers > 0, below 2^40 in all, as {name}'s shape")
        need(spec["dtype"] in DTYPES, f"a dtype of {', '.join(DTYPES)} of {name}")
        layouts = LAYOUTS if name in OPS[op].channels else LAYOUTS[:1]
        need(spec["layout"] in layouts, f"the layout {' or '.join(layouts)} of {name}")
    need(isinstance(options, dict) and set(options) <= set(OPS[op].options), f"options of {', '.join(OPS[op].options)}")
    wanted = fields["backward"]
    names = isinstance(wanted, list) and all(isinstance(n, str) and n in tensors for n in wanted) and wanted != []
    need(isinstance(wanted, bool) or names, "true, false or names of tensors for backward")
    call = TunedCall(op, tensors, options, fields["backward"])
    _take(call)
    return call


def _take(call: TunedCall) -> None:
    """Run the op's own checks of a call, on tensors without data; ValueError where the op would not take it."""
    tensors = {
        name: torch.empty(spec["shape"], dtype=getattr(torch, spec["dtype"]), device="meta")
        for name, spec in call.tensors.items()
    }
    try:
        OPS[call.op].check(tensors, call.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"accepted is a call that the op takes: {error}") from error


# --- presets --------------------------------------------------------------------------------------------------------


def preset(name: str, dtypes: Sequence[str]) -> list[TunedCall]:
    """The calls of a preset in these dtypes.

    "papers": DyReG's on the last three stages of a ResNet-50 (16 clips of 10 frames, 9 regions), RSANet-R50's four
    stages (8 clips of 8 frames, window 5x7x7), and the blocks of the ResNet-50 with BAT (8 clips of 4 frames, 8 groups,
    frames mixed and not). "quick": one small call of each op.
    """
    return [call for dtype in dtypes for spec in OPS.values() for call in getattr(spec, name)(dtype)]
