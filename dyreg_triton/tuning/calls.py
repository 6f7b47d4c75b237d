"""Calls of ops to tune for: recorded from a model, read from a file, or of a preset."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..replacing import replacing
from ..validate import what

DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("contiguous", "channels_last")
TENSORS = {  # of each op: those that there must be, and those that there may be
    "bilinear_transform": (("x", "p", "q"), ("t",)),
    "region_pool": (("x", "regions"), ()),
    "region_remap": (("nodes", "regions"), ()),
    "region_kernel": (("regions",), ()),
    "relational_attention": (("q", "v", "h2"), ("k", "h1", "p1", "g", "identity")),
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "bilinear_transform": (),
    "region_pool": ("profile", "temperature"),
    "region_remap": ("size", "profile", "temperature"),
    "region_kernel": ("size", "profile", "temperature"),
    "relational_attention": ("eps",),
}
PRESETS = ("papers", "quick")


class TunedCall(NamedTuple):
    """One call of an op.

    Attributes:
        op: "region_pool", "region_remap", "region_kernel", "relational_attention" or "bilinear_transform".
        tensors: by name {"shape": [...], "dtype": "bfloat16", "layout": "contiguous" or "channels_last"}.
        options: its other arguments by name, such as {"profile": "linear"} or {"eps": 1e-6}.
        backward: whether its backward runs too, or the names of the tensors that want a gradient where not all do.
    """

    op: str
    tensors: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    backward: bool | list[str]

    def wants(self, *names: str) -> bool:
        """Whether the gradient of one of these tensors is wanted."""
        return any(name in self.tensors and (self.backward is True or name in (self.backward or ())) for name in names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self.tensors[name]["shape"])

    def dtype(self) -> torch.dtype:
        """Of its features."""
        return getattr(torch, next(iter(self.tensors.values()))["dtype"])


# --- recording ------------------------------------------------------------------------------------------------------

recorders: list[list[TunedCall]] = []  # innermost last


@contextlib.contextmanager
def recording() -> Iterator[list[TunedCall]]:
    """Gives a list to which every call of this library's ops inside, on any backend, adds itself once."""
    found: list[TunedCall] = []
    recorders.append(found)
    try:
        yield found
    finally:
        for i in reversed(range(len(recorders))):
            if recorders[i] is found:
                del recorders[i]


def note(op: str, tensors: Mapping[str, Tensor | None], **options: Any) -> None:
    """Tell whoever records of a call that passed its checks."""
    there = {name: t for name, t in tensors.items() if t is not None}
    if any(0 in t.shape for t in there.values()) or 0 in options.get("size", ()):
        return  # nothing runs
    call = TunedCall(
        op,
        {name: _spec(name, t, op) for name, t in there.items()},
        {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        _wanted(there),
    )
    for found in recorders:
        if call not in found:
            found.append(call)


def _wanted(tensors: Mapping[str, Tensor]) -> bool | list[str]:
    names = [name for name, t in tensors.items() if t.requires_grad] if torch.is_grad_enabled() else []
    return len(names) == len(tensors) or names or False


def _spec(name: str, t: Tensor, op: str) -> dict[str, Any]:
    channels = -3 if op.startswith("region") else -4
    innermost = name in ("x", "q", "k", "v") and t.stride(channels) == 1 and not t.is_contiguous()
    layout = "channels_last" if innermost else "contiguous"
    return {"shape": list(t.shape), "dtype": str(t.dtype)[6:], "layout": layout}


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
    need(isinstance(op, str) and op in TENSORS, f"an op of {', '.join(TENSORS)}")
    must, may = TENSORS[op]
    named = isinstance(tensors, dict) and set(must) <= set(tensors) <= {*must, *may}
    need(named, f"the tensors {must} of {op}" + (f", and those of {may} that there are" if may else ""))
    for name, spec in tensors.items():
        need(isinstance(spec, dict) and set(spec) == {"shape", "dtype", "layout"}, f"a shape, dtype, layout of {name}")
        shape = spec["shape"] if isinstance(spec["shape"], (list, tuple)) else ()
        sizes = len(shape) > 0 and all(type(n) is int and 0 < n < 2**31 for n in shape)
        need(sizes and math.prod(shape) < 2**40, f"a list of integers > 0, below 2^40 in all, as {name}'s shape")
        need(spec["dtype"] in DTYPES, f"a dtype of {', '.join(DTYPES)} of {name}")
        need(spec["layout"] in LAYOUTS, f"a layout of {', '.join(LAYOUTS)} of {name}")
    need(isinstance(options, dict) and set(options) <= set(OPTIONS[op]), f"options of {', '.join(OPTIONS[op])}")
    wanted = fields["backward"]
    names = isinstance(wanted, list) and all(isinstance(n, str) and n in tensors for n in wanted) and wanted != []
    need(isinstance(wanted, bool) or names, "true, false or names of tensors for backward")
    call = TunedCall(op, tensors, options, fields["backward"])
    _take(call)
    return call


def _take(call: TunedCall) -> None:
    """Run the op's own checks of a call, on tensors without data; ValueError where the op would not take it."""
    from ..validate.bilinear import bilinear_arguments
    from ..validate.region import region_arguments
    from ..validate.relational import relational_arguments

    tensors: dict[str, Any] = {
        name: torch.empty(spec["shape"], dtype=getattr(torch, spec["dtype"]), device="meta")
        for name, spec in call.tensors.items()
    }
    must, may = TENSORS[call.op]
    every = dict.fromkeys((*must, *may)) | tensors
    try:
        if call.op == "relational_attention":
            relational_arguments(call.op, every, call.options.get("eps"))
        elif call.op == "bilinear_transform":
            bilinear_arguments(call.op, every)
        else:
            size = call.options.get("size")
            tensors["size"] = tuple(size) if isinstance(size, (list, tuple)) else size
            profile, temperature = call.options.get("profile", "linear"), call.options.get("temperature", 1.0)
            regions = tensors.pop("regions")
            region_arguments(call.op, regions, profile, temperature, **tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"accepted is a call that the op takes: {error}") from error


# --- presets --------------------------------------------------------------------------------------------------------


def preset(name: str, dtypes: Sequence[str]) -> list[TunedCall]:
    """The calls of a preset in these dtypes.

    "papers": DyReG's on the last three stages of a ResNet-50 (16 clips of 10 frames, 9 regions), RSANet-R50's four
    stages (8 clips of 8 frames, window 5x7x7), and the blocks of the ResNet-50 with BAT (8 clips of 4 frames, 8 groups,
    frames mixed and not). "quick": one small call of each op.
    """
    found = []
    for dtype in dtypes:
        maps = [(160, 256, 28, 28), (160, 512, 14, 14), (160, 2048, 7, 7)] if name == "papers" else [(16, 64, 14, 14)]
        for frames, channels, height, width in maps:
            found += region_calls(frames, 9, channels, (height, width), dtype)
        stages = [(8, 56), (16, 28), (32, 14), (64, 7)] if name == "papers" else [(8, 14)]
        for channels, side in stages:
            found.append(relational_call(8 if name == "papers" else 1, channels, (8, side, side), dtype))
        blocks = [(256, 28), (512, 14)] if name == "papers" else [(32, 14)]
        for channels, side in blocks:
            clips = 8 if name == "papers" else 1
            found += [bilinear_call((clips, channels, 4, side, side), 8, mixes, dtype) for mixes in (0, 4)]
    return found


def region_calls(frames: int, nodes: int, channels: int, size: tuple[int, int], dtype: str) -> list[TunedCall]:
    """Pooling and re-mapping of one layer."""
    regions = {"shape": [frames, nodes, 4], "dtype": "float32", "layout": "contiguous"}
    x = {"shape": [frames, channels, *size], "dtype": dtype, "layout": "contiguous"}
    v = {"shape": [frames, nodes, channels], "dtype": dtype, "layout": "contiguous"}
    options = {"profile": "linear", "temperature": 1.0}
    return [
        TunedCall("region_pool", {"x": x, "regions": regions}, options, True),
        TunedCall("region_remap", {"nodes": v, "regions": regions}, {"size": list(size), **options}, True),
    ]


def relational_call(clips: int, channels: int, size: tuple[int, int, int], dtype: str) -> TunedCall:
    """RSANet's layer: eight queries, C = D = E = F, a window of 5x7x7, kernel and context both."""
    c, window = channels, (5, 7, 7)
    shapes = {
        "q": (clips, 8, c, *size), "k": (clips, c, *size), "v": (clips, c, *size), "h2": (c, *window),
        "h1": (c, c, *window), "p1": (c, c), "g": (c, *window), "identity": (c, c),
    }  # fmt: skip
    tensors = {name: {"shape": list(s), "dtype": dtype, "layout": "contiguous"} for name, s in shapes.items()}
    return TunedCall("relational_attention", tensors, {"eps": 1e-6}, True)


def bilinear_call(shape: tuple[int, int, int, int, int], groups: int, mixes: int, dtype: str) -> TunedCall:
    """A block of BAT: windows of 7 x 7 coarse cells and 4 frames; without mixed frames where `mixes` is 0."""
    clips, _, frames, _, _ = shape
    shapes: dict[str, tuple[int, ...]] = {
        "x": shape,
        "p": (clips, groups, frames, 7, 7),
        "q": (clips, groups, frames, 7, 7),
    }
    if mixes:
        shapes["t"] = (clips, mixes, 4, 4)
    tensors = {
        name: {"shape": list(s), "dtype": dtype if name == "x" else "float32", "layout": "contiguous"}
        for name, s in shapes.items()
    }
    return TunedCall("bilinear_transform", tensors, {}, True)
