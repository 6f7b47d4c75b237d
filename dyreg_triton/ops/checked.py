"""The checks of a call, made once for all calls like it, and the sizes that the kernels do not take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from .._core.autocast import autocast_is_on
from .._core.dispatch import choose, current_backend
from .._core.validation import describe
from .custom import signature

_good: dict[tuple, list[str]] = {}  # calls that passed the checks, and what of them is beyond the kernels


def checked(op: str, check: Callable[[], list[str]], tensors: Iterable[Any], option: Any = None) -> list[str]:
    """`check()`, unless a call of `op` like this one was good before: the sizes beyond the kernels, in words.

    `option` is the call's argument beside the tensors.
    """
    tensors = list(tensors)
    plain = option is None or type(option) in (float, int)
    call = signature(tensors, op, type(option), option) if plain else None
    known = None if call is None else _good.get(call)
    if known is not None:
        return known
    beyond = check()
    if call is not None and not autocast_is_on(tensors[0].device.type):  # under autocast dtypes may differ
        if len(_good) >= 4096:
            _good.clear()
        _good[call] = beyond
    return beyond


def beyond(sizes: Mapping[str, int], limit: Mapping[str, int]) -> list[str]:
    """Those of the sizes that exceed their limit, in words."""
    return [f"{letter} = {size}" for letter, size in sizes.items() if size > limit[letter]]


def choose_within(
    op: str, features: Tensor, beyond: list[str], limit: Mapping[str, int], tensors: Mapping[str, Tensor | None]
) -> str:
    """The backend of a call; for sizes beyond the kernels "auto" takes eager, and says so."""
    name = choose(op, features, tensors)
    if name != "triton" or not beyond:
        return name
    accepted = ", ".join(f"{letter} <= {size}" for letter, size in limit.items())
    message = f"{op}: {', '.join(beyond)}; accepted on the triton backend is {accepted}"
    if current_backend() == "triton":
        call = {name: t for name, t in tensors.items() if t is not None}
        raise ValueError(f'{message}; dyreg_triton.backend("eager") takes any; call: {describe(call)}')
    _say(f"{message}; the eager backend computes this call")
    return "eager"


def _say(message: str) -> None:
    warnings.warn(message, stacklevel=4)


_say._dynamo_marked_constant = True  # type: ignore[attr-defined]  # when compiling: once, while tracing
