"""Argument checks that ops, layers and tools share. Each failure names the argument, its value, what is accepted, and
the shapes of the call. They run before anything is launched."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from .autocast import autocast_is_on

PROFILES = ("linear", "gaussian", "log-linear")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CAST = FLOATS[:3]  # by autocast, which leaves float64 as it is
_CELLS = 2**40  # a map, or grid, of more fits into no memory; torch would fill an axis of it before it says so
_SMALLEST, _LARGEST = 1e-15, 1e15  # of a factor; its square is within float32


def describe(tensors: Mapping[str, object]) -> str:
    """`x (2, 3) float32 cpu, ...`: the shapes of a call, for an error message."""
    parts = []
    for name, t in tensors.items():
        if isinstance(t, Tensor):
            parts.append(f"{name} {what(t)}")
        else:
            parts.append(f"{name} {t!r:.200}")
    return ", ".join(parts)


def what(value: object) -> str:
    """A tensor's shape, dtype and device, or the repr of anything else."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_nested:
        return "a nested tensor"
    layout = "" if value.layout == torch.strided else f" {value.layout}"
    return f"{tuple(value.shape)} {str(value.dtype)[6:]} {value.device}{layout}"


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor with strides and one shape."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def is_integer(value: object) -> bool:
    """Whether `value` counts things: an int of Python, numpy or torch, not a bool."""
    return isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def positive_int(op: str, name: str, value: Any) -> Any:
    """`value` as an int > 0."""
    if not is_integer(value) or not 0 < value < 2**31:
        raise ValueError(f"{op}: {name} is {value!r}; accepted is an integer > 0 and below 2**31")
    return value if isinstance(value, torch.SymInt) else int(value)


def flag(op: str, name: str, value: object) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {name} is {value!r}; accepted are True and False")
    return value


def layer_input(
    op: str, name: str, x: object, parameter: Tensor | None, shape: tuple[int | None, ...], form: str
) -> None:
    """Check a layer's input: a dense tensor of this shape (None is any size), and of the parameter's dtype and device.

    Under autocast, and without a parameter to tell by, any but float64 will do, which autocast does not cast. `form`
    says the accepted shape in words.
    """
    if not is_dense(x):
        given = what(x) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {given}; accepted is a dense torch.Tensor {form}")
    wrong = (want is not None and want != have for want, have in zip(shape, x.shape, strict=False))
    if x.dim() != len(shape) or any(wrong):
        raise ValueError(f"{op}: {name} is {what(x)}; accepted is {form}")
    dtype = None if parameter is None else parameter.dtype
    if parameter is not None and x.device != parameter.device:
        raise ValueError(f"{op}: {name} is {what(x)}; accepted is the layer's device, {parameter.device}")
    cast = dtype is None or (autocast_is_on(x.device.type) and dtype in _CAST)
    if cast and dtype not in (None, torch.float32) and dtype != torch.get_autocast_dtype(x.device.type):
        raise TypeError(
            f"{op}: {name} is {what(x)}, of a layer in {str(dtype)[6:]}; accepted under autocast to "
            f"{str(torch.get_autocast_dtype(x.device.type))[6:]} is a layer in that dtype or in float32"
        )
    if x.dtype not in _CAST if cast else x.dtype != dtype:
        own = "" if dtype is None else f"the layer's dtype, {str(dtype)[6:]}"
        under = ", or under autocast " if dtype in _CAST else ""
        any_of = "float16, bfloat16 or float32" if dtype is None or dtype in _CAST else ""
        raise TypeError(f"{op}: {name} is {what(x)}; accepted is {own}{under}{any_of}")


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
        rows, columns = cast(tuple[int, int], (v if isinstance(v, torch.SymInt) else int(v) for v in value))
        symbolic = any(isinstance(v, torch.SymInt) for v in value)
        if rows > 0 and columns > 0 and (symbolic or rows * columns < _CELLS):
            return rows, columns
    raise ValueError(
        f"{op}: {name} is {what(value)}; accepted are two positive integers (rows, columns), "
        f"fewer than 2**40 cells{_of(call)}"
    )


def triple(op: str, name: str, value: object) -> tuple[int, int, int]:
    """`value` as three positive integers (time, rows, columns); one integer stands for all three."""
    sides = (value,) * 3 if is_integer(value) else value
    if isinstance(sides, (tuple, list, torch.Size)) and len(sides) == 3 and all(map(is_integer, sides)):
        times, rows, columns = (int(side) for side in cast(tuple[int, int, int], sides))
        if min(times, rows, columns) > 0 and times * rows * columns < _CELLS:
            return times, rows, columns
    raise ValueError(
        f"{op}: {name} is {what(value)}; accepted are three positive integers (time, rows, columns), or one for all, "
        "of a product below 2**40"
    )


def positive_number(op: str, name: str, value: Any, call: Mapping[str, object] | None = None) -> Any:
    """`value` as a finite number > 0."""
    error: type[Exception] = TypeError
    if isinstance(value, (int, float, torch.SymFloat)) and not isinstance(value, bool):
        if _SMALLEST <= value <= _LARGEST:
            return value
        error = ValueError
    raise error(f"{op}: {name} is {value!r}; accepted is a number > 0, from 1e-15 to 1e15{_of(call)}")


def probability(op: str, name: str, value: Any) -> float:
    """`value` as a number from 0 to 1."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ValueError(f"{op}: {name} is {what(value)}; accepted is a probability, 0 to 1")
    return float(value)


def as_device(op: str, value: Any) -> torch.device:
    """`value` as a torch.device."""
    error: type[Exception] = TypeError
    if isinstance(value, (str, torch.device)):
        try:
            return torch.device(value)
        except RuntimeError:
            error = ValueError
    raise error(f"{op}: device is {value!r}; accepted is a torch.device or the name of one")


def function(op: str, name: str, value: Any) -> Any:
    """`value` as something that can be called."""
    if not callable(value):
        raise TypeError(f"{op}: {name} is {value!r}; accepted is a callable")
    return value


def mapping(op: str, name: str, value: Any) -> Mapping[str, Any]:
    """`value` as a mapping from names."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, {what(value)}; accepted is a mapping from names")
    return value


def shape_of(op: str, name: str, value: Any) -> tuple[int, ...]:
    """`value` as a tensor's shape."""
    if not isinstance(value, (tuple, list)) or not all(is_integer(n) and 0 <= n < 2**31 for n in value):
        raise ValueError(f"{op}: {name} is {what(value)}; accepted is a tuple of integers >= 0 and below 2**31")
    return tuple(value)


def seed_of(op: str, value: Any) -> int:
    """`value` as the seed of a generator."""
    if not is_integer(value) or not 0 <= value < 2**63 - 1:
        raise ValueError(f"{op}: seed is {what(value)}; accepted is an integer >= 0 and below 2**63")
    return int(value)


def dtypes_of(op: str, value: Any) -> tuple[torch.dtype, ...]:
    """`value` as one dtype or more."""
    error: type[Exception] = TypeError
    if isinstance(value, (tuple, list)) and all(isinstance(t, torch.dtype) for t in value):
        if value:
            return tuple(value)
        error = ValueError
    raise error(f"{op}: dtypes is {what(value)}; accepted is one torch.dtype or more")


def profile_arguments(op: str, profile: object, temperature: object, call: Mapping[str, object] | None = None) -> None:
    """Check a region profile's name and its temperature."""
    choice(op, "profile", profile, PROFILES, call)
    positive_number(op, "temperature", temperature, call)
