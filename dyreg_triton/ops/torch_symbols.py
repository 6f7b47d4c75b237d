"""What the ops take from torch's private modules, found once: where a later torch lacks one of these, every op takes
torch's public way."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_PATHS = {
    "dispatch_modes": "_C._len_torch_dispatch_stack",
    "function_modes": "_C._len_torch_function_stack",
    "innermost_transform": "_C._functorch.peek_interpreter_stack",
    "transforms": "_C._functorch.get_interpreter_stack",
    "trace": "_C._get_tracing_state",
    "is_profiled": "_C._autograd._profiler_enabled",
    "is_zero": "Tensor._is_zerotensor",
    "is_batched": "_C._functorch.is_legacy_batchedtensor",
    "forward_level": "autograd.forward_ad._current_level",
}


class Symbols(NamedTuple):
    """Whoever sees calls at torch's dispatcher, and what the dispatcher does to a tensor before an op sees its data."""

    dispatch_modes: Callable[[], int]
    function_modes: Callable[[], int]
    innermost_transform: Callable[[], Any]
    transforms: Callable[[], Any]
    trace: Callable[[], Any]
    is_profiled: Callable[[], bool]
    is_zero: Callable[[torch.Tensor], bool]
    is_batched: Callable[[torch.Tensor], bool]
    forward_level: Callable[[], int]


def found() -> Symbols | None:
    """All of them, or None where this torch lacks one."""
    try:
        symbols = {name: operator.attrgetter(path)(torch) for name, path in _PATHS.items()}
    except AttributeError:
        return None
    module = torch.autograd.forward_ad  # its level is a number that it sets anew
    return Symbols(**symbols | {"forward_level": lambda: module._current_level})
