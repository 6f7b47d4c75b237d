"""Calls of ops as shapes, dtypes, layouts and options: what tuning, and whoever asks, hears of what a model calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def record(op: str, tensors: Mapping[str, Tensor | None], channels: Mapping[str, int], **options: Any) -> None:
    """Tell whoever records of a call that passed its checks; `channels` as the op's `OpSpec` has them."""
    there = {name: t for name, t in tensors.items() if t is not None}
    if any(0 in t.shape for t in there.values()) or 0 in options.get("size", ()):
        return  # nothing runs
    call = TunedCall(
        op,
        {name: _described(t, channels.get(name)) for name, t in there.items()},
        {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        _wanted(there),
    )
    for found in recorders:
        if call not in found:
            found.append(call)


def _wanted(tensors: Mapping[str, Tensor]) -> bool | list[str]:
    names = [name for name, t in tensors.items() if t.requires_grad] if torch.is_grad_enabled() else []
    return len(names) == len(tensors) or names or False


def _described(t: Tensor, channels: int | None) -> dict[str, Any]:
    innermost = channels is not None and t.stride(channels) == 1 and not t.is_contiguous()
    return described(t.shape, str(t.dtype)[6:], "channels_last" if innermost else "contiguous")


def described(shape: Sequence[int], dtype: str, layout: str = "contiguous") -> dict[str, Any]:
    """A tensor as a call has it."""
    return {"shape": list(shape), "dtype": dtype, "layout": layout}
