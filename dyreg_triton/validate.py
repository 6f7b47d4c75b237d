"""Argument checks shared by the backends of an op. Each failure names the argument, its value, what is accepted, and
the shapes of the call. They run before anything is launched."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .autocast import autocast_is_on

PROFILES = ("linear", "gaussian", "log-linear")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(tensors: Mapping[str, object]) -> str:
    """`x (2, 3) float32 cpu, ...`: the shapes of a call, for an error message."""
    parts = []
    for name, t in tensors.items():
        if isinstance(t, Tensor):
            parts.append(f"{name} {what(t)}")
        else:
            parts.append(f"{name} {t!r}")
    return ", ".join(parts)


def what(value: object) -> str:
    """A tensor's shape, dtype and device, or the repr of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype)[6:]} {value.device}"
    return repr(value)


def is_integer(value: object) -> bool:
    """Whether `value` counts things: an int of Python, numpy or torch, not a bool."""
    return isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def positive_int(op: str, name: str, value: Any) -> Any:
    """`value` as an int > 0."""
    if not is_integer(value) or value <= 0:
        raise ValueError(f"{op}: {name} is {value!r}; accepted is an integer > 0")
    return value if isinstance(value, torch.SymInt) else int(value)


def flag(op: str, name: str, value: object) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {name} is {value!r}; accepted are True and False")
    return value


def layer_input(op: str, name: str, x: object, parameter: Tensor, shape: tuple[int | None, ...], form: str) -> None:
    """Check a layer's input: a dense tensor of this shape (None is any size) and of the layer's dtype.

    Under autocast any floating dtype will do. `form` says the accepted shape in words.
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        raise TypeError(f"{op}: {name} is {type(x).__name__}; accepted is a dense torch.Tensor {form}")
    if x.dim() != len(shape) or any(want not in (None, have) for want, have in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{op}: {name} is {what(x)}; accepted is {form}")
    if x.dtype != parameter.dtype and not (x.is_floating_point() and autocast_is_on(x.device.type)):
        raise TypeError(
            f"{op}: {name} is {what(x)}; accepted is the layer's dtype, {str(parameter.dtype)[6:]}, "
            "or any floating dtype under autocast"
        )


def _of(call: Mapping[str, object] | None) -> str:
    """The end of a message: the shapes of the call, where they are known."""
    return "" if call is None else f"; call: {describe(call)}"


def choice(
    op: str, name: str, value: object, accepted: tuple[str, ...], call: Mapping[str, object] | None = None
) -> str:
    """`value` as one of the accepted names."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{op}: {name} is {value!r}; accepted are {', '.join(map(repr, accepted))}{_of(call)}")
    return value


def pair(op: str, name: str, value: object, call: Mapping[str, object] | None = None) -> tuple[int, int]:
    """`value` as two positive integers (rows, columns)."""
    if isinstance(value, (tuple, list, torch.Size)) and len(value) == 2 and all(map(is_integer, value)):
        rows, columns = value
        if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(f"{op}: {name} is {value!r}; accepted are two positive integers (rows, columns){_of(call)}")


def positive_number(op: str, name: str, value: Any, call: Mapping[str, object] | None = None) -> Any:
    """`value` as a finite number > 0."""
    error: type[Exception] = TypeError
    if isinstance(value, (int, float, torch.SymFloat)) and not isinstance(value, bool):
        if 0 < value < math.inf:
            return value
        error = ValueError
    raise error(f"{op}: {name} is {value!r}; accepted is a finite number > 0{_of(call)}")


def profile_arguments(op: str, profile: object, temperature: object, call: Mapping[str, object] | None = None) -> None:
    """Check a region profile's name and its temperature."""
    choice(op, "profile", profile, PROFILES, call)
    positive_number(op, "temperature", temperature, call)


def region_arguments(
    op: str,
    regions: Tensor,
    profile: str,
    temperature: float,
    *,
    x: Tensor | None = None,
    nodes: Tensor | None = None,
    size: object = None,
) -> tuple[int, int]:
    """Check a call of a region op and return its map size (H, W).

    Raises TypeError for arguments of the wrong type or dtype and ValueError for wrong values, ranks and shapes.
    """
    call: dict[str, object] = {
        name: t for name, t in (("x", x), ("nodes", nodes), ("regions", regions)) if t is not None
    }
    if size is not None:
        call["size"] = size
    for name, t in call.items():
        if name != "size" and (not isinstance(t, Tensor) or t.layout != torch.strided):
            raise TypeError(
                f"{op}: {name} is a {type(t).__name__}{f' of layout {t.layout}' if isinstance(t, Tensor) else ''}; "
                f"accepted is a dense torch.Tensor; call: {describe(call)}"
            )
    profile_arguments(op, profile, temperature, call)

    def fail(name: str, what: str, accepted: str, error: type[Exception] = ValueError) -> None:
        raise error(f"{op}: {name} {what}; accepted is {accepted}; call: {describe(call)}")

    if regions.dim() < 2 or regions.shape[-1] != 4:
        fail("regions", f"has shape {tuple(regions.shape)}", "(*, N, 4) = (cx, cy, w, h) in cells of the map")
    lead = regions.shape[:-2]
    features, name, rank = (x, "x", 3) if x is not None else (nodes, "nodes", 2)
    if features is not None:
        form = "(*, C, H, W)" if rank == 3 else "(*, N, C)"
        if features.dim() < rank:
            fail(name, f"has {features.dim()} dimensions", form)
        if features.shape[:-rank] != lead:
            fail(name, f"has leading dimensions {tuple(features.shape[:-rank])}", f"those of regions, {tuple(lead)}")
        if rank == 2 and features.shape[-2] != regions.shape[-2]:
            fail(name, f"has {features.shape[-2]} nodes", f"the number of regions, {regions.shape[-2]}")
        if features.dtype not in FLOATS:
            fail(name, f"is {str(features.dtype)[6:]}", "float16, bfloat16, float32 or float64", TypeError)
        if regions.dtype not in (features.dtype, torch.float32):
            fail("regions", f"is {str(regions.dtype)[6:]}", f"{name}'s dtype or float32", TypeError)
        if regions.device != features.device:
            fail("regions", f"is on {regions.device}", f"{name}'s device, {features.device}")
    elif regions.dtype not in FLOATS:
        fail("regions", f"is {str(regions.dtype)[6:]}", "float16, bfloat16, float32 or float64", TypeError)
    if x is not None:
        return x.shape[-2], x.shape[-1]
    return pair(op, "size", size, call)
