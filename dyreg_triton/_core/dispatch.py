"""Which backend computes an op: one predicate selects it and explains a refusal.

Backends: `triton` (CUDA, or CPU when Triton's interpreter is on), `eager` (efficient pure torch, any device),
`reference` (the papers' equations, literally). `auto` takes triton where it can run and eager elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, SupportsIndex

import torch

from .installed import triton_fault
from .validation import as_device, describe, flag

BACKENDS = ("auto", "triton", "eager", "reference")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)


class _State(threading.local):  # not a ContextVar: that breaks torch.compile(fullgraph=True)
    name = "auto"


_state = _State()


class backend:  # lower case because it is used as `with dt.backend("eager"):`
    """Choose the backend of every op called from this thread.

    `dt.backend("eager")` sets it from here on; `with dt.backend("eager"):` restores the former one at the end. An op
    whose inputs the chosen backend cannot take raises RuntimeError and says why; only "auto" chooses.

    An op's backward uses its forward's choice. Activation checkpointing runs the forward again during backward, under
    what is set then: write `with dt.backend(name):` inside the checkpointed function.

    Raises ValueError for a name other than "auto", "triton", "eager" and "reference"; TypeError where the setting
    itself is copied or pickled, for it belongs to its thread.
    """

    def __init__(self, name: str):
        if not isinstance(name, str) or name not in BACKENDS:
            raise ValueError(f"backend: name is {name!r}; accepted are {', '.join(map(repr, BACKENDS))}")
        self.name = name
        self._formers = [_state.name]  # what to go back to, innermost last
        self._entered = False
        _state.name = name

    def __enter__(self) -> backend:
        if self._entered or _state.name != self.name:  # the constructor's setting is over
            self._formers.append(_state.name)
            _state.name = self.name
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        _state.name = self._formers.pop()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"backend: a setting of one thread cannot be copied or pickled; accepted is dt.backend({self.name!r}) "
            "where it shall hold"
        )


def current_backend() -> str:
    """The name last set in this thread with `dt.backend`; "auto" at first."""
    return _state.name


def _interpreted() -> bool:
    # Asking costs an import of triton, so it is asked only where somebody wants the interpreter or kernels are loaded.
    unset = os.environ.get("TRITON_INTERPRET", "").lower() in ("", "0", "false", "off", "no", "n")
    if unset and "dyreg_triton.kernels.common" not in sys.modules:
        return False
    if triton_fault() is not None:
        return False
    from ..kernels.common import interpreted

    return interpreted()


def runs(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether backend `name` can take tensors of this device and dtype."""
    return name != "triton" or _refusal(device, dtype) is None


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where backend `name` can take tensors of this device and dtype, else the reason in words."""
    refusal = _refusal(device, dtype) if name == "triton" else None
    if refusal is None:
        return None
    # Another device or dtype would not help whoever has no triton, so that comes first.
    fault = triton_fault()
    return refusal if fault is None else f"the package triton is {fault}"


# What torch.compiler.assume_constant_result sets; that function itself would import all of torch._dynamo for everybody.
runs._dynamo_marked_constant = True  # type: ignore[attr-defined]
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where kernels can run on tensors of this device and dtype, else the reason in words."""
    # Where nobody wants the interpreter, tensors on the CPU are refused without a look at triton.
    interpreted = _interpreted()
    accepted = (*TRITON_DTYPES, torch.float64) if interpreted else TRITON_DTYPES
    if dtype not in accepted:
        return f"its kernels take {', '.join(str(t)[6:] for t in accepted)}, not {str(dtype)[6:]}"
    if device.type == "cuda" and not interpreted:
        if (device.index or 0) >= torch.cuda.device_count():
            return f"torch sees no GPU {device}"
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < MIN_CAPABILITY:
            return f"GPU {device} has compute capability {capability}; the kernels need {MIN_CAPABILITY} or later"
        fault = triton_fault()
        return None if fault is None else f"the package triton is {fault}"
    if device.type == "cpu" and interpreted:
        return None
    return (
        f"the tensors are on {device}; kernels run on CUDA, or on the CPU under Triton's interpreter "
        "(start Python with TRITON_INTERPRET=1)"
    )


_refusal: Callable[[torch.device, torch.dtype], str | None] = why_not_triton


@contextlib.contextmanager
def standing_in(why_not: Callable[[torch.device, torch.dtype], str | None]) -> Iterator[None]:
    """Inside, `why_not(device, dtype)` says for all threads what the triton backend takes: for stand-ins of a GPU."""
    global _refusal
    former, _refusal = _refusal, why_not
    try:
        yield
    finally:
        _refusal = former


def can_run(name: str, *, device: torch.device | str, dtype: torch.dtype, raise_error: bool = False) -> bool:
    """Whether backend `name` ("triton", "eager" or "reference") can take tensors of this device and dtype.

    With `raise_error=True` a refusal raises RuntimeError with the reason instead of returning False.
    """
    if not isinstance(name, str) or name not in BACKENDS[1:]:
        raise ValueError(f"can_run: name is {name!r}; accepted are {', '.join(map(repr, BACKENDS[1:]))}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"can_run: dtype is {dtype!r}; accepted is a torch.dtype")
    flag("can_run", "raise_error", raise_error)
    device = as_device("can_run", device)
    if raise_error and (reason := why_not(name, device, dtype)) is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return runs(name, device, dtype)


def choose(op: str, features: torch.Tensor, call: Mapping[str, object]) -> str:
    """The backend that computes `op` on `features`: the one asked for, or auto's choice. `call` is for the message."""
    device, dtype = features.device, features.dtype
    name = _state.name
    if name == "auto":
        return "triton" if runs("triton", device, dtype) else "eager"
    reason = why_not(name, device, dtype)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {name!r} cannot run here: {reason}; call: {describe(call)}")
    return name
