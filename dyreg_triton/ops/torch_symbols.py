"""What the ops take from torch's private modules. Where a torch lacks one of what their short way goes by, every op
takes torch's public way."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
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
    """Whoever sees calls at torch's dispatcher, and what the dispatcher does to a tensor before an op sees its data.

    None is what this torch lacks.
    """

    dispatch_modes: Callable[[], int] | None
    function_modes: Callable[[], int] | None
    innermost_transform: Callable[[], Any] | None
    transforms: Callable[[], Any] | None
    trace: Callable[[], Any] | None
    is_profiled: Callable[[], bool] | None
    is_zero: Callable[[torch.Tensor], bool] | None
    is_batched: Callable[[torch.Tensor], bool] | None
    forward_level: Callable[[], int] | None


def found() -> Symbols:
    """Those that this torch has."""
    return Symbols(**{name: _symbol(path) for name, path in _PATHS.items()})


def _symbol(path: str) -> Any:
    owner, _, name = path.rpartition(".")
    try:
        module = operator.attrgetter(owner)(torch)
        symbol = getattr(module, name)
    except AttributeError:
        return None
    return symbol if callable(symbol) else lambda: getattr(module, name)  # a number, which torch sets anew


_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Inside an op's implementation, which is below autograd: what is computed can be differentiated."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD:
        excluded = excluded - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
