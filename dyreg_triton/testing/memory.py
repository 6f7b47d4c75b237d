"""Poisoned memory: NaN around and between a tensor's elements, so that reading or writing outside of it shows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._core.validation import choice, is_dense, what
from .comparators import assert_identical, require

LAYOUTS = (
    "contiguous", "aligned", "transposed", "channels_last", "channels_last_3d", "reversed", "sliced", "expanded",
)  # fmt: skip


# NaN that no computation makes: what an op writes outside of its outputs, NaN read from elsewhere included, has others
_POISON = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FC5A5A5),
    torch.float64: (torch.int64, 0x7FF85A5A5A5A5A5A),
}


class Guarded:
    """Values laid out in a larger buffer in which every other element is NaN.

    Reading outside the tensor gives NaN in the result; writing to the buffer at all makes `check` fail.

    Args:
        values: what the tensor holds, of a floating dtype; "expanded" repeats its first entry along the first
            dimension.
        layout: one of LAYOUTS. Data start at an odd element, but for "aligned", which is contiguous at a multiple
            of 128. "transposed" swaps the last two dimensions in memory, "channels_last" has the third from the end
            innermost, "channels_last_3d" the fourth, "reversed" the first; "sliced" leaves gaps everywhere;
            "expanded" has stride 0.

    `tensor` is the tensor, `buffer` the memory around it.
    """

    # At least, on either side: wider than a block. Odd, so that the data are not aligned to more than one element.
    MARGIN = 1027

    def __init__(self, values: Tensor, layout: str = "contiguous"):
        if not is_dense(values) or not values.is_floating_point():
            raise TypeError(
                f"Guarded: values is {what(values)}; accepted is a dense floating tensor, for the poison is NaN"
            )
        choice("Guarded", "layout", layout, LAYOUTS, {"values": values})
        values = values.detach()
        rank = values.dim()
        order = list(range(rank))  # outermost first
        if layout == "transposed" and rank >= 2:
            order[-2:] = order[:-3:-1]
        elif layout == "channels_last" and rank >= 3:
            order[-3:] = [rank - 2, rank - 1, rank - 3]
        elif layout == "channels_last_3d" and rank >= 4:
            order[-4:] = [rank - 3, rank - 2, rank - 1, rank - 4]
        elif layout == "reversed":
            order.reverse()
        strides, step = [0] * rank, 2 if layout == "sliced" else 1
        for axis in reversed(order):
            if layout == "expanded" and axis == 0:
                continue
            strides[axis] = step
            step = step * max(values.shape[axis], 1) + (3 if layout == "sliced" else 0)
        if layout == "expanded" and rank and values.shape[0]:
            values = values[:1].expand_as(values)
        start = 1152 if layout == "aligned" else self.MARGIN
        self.buffer = values.new_full((start + step + self.MARGIN,), math.nan)
        self.tensor = self.buffer.as_strided(values.shape, strides, start)
        if layout == "expanded" and rank and values.shape[0]:
            self.tensor[0] = values[0]
        else:
            self.tensor.copy_(values)
        self._before = self.buffer.clone()

    def __getstate__(self) -> dict[str, Any]:
        """The tensor as a place in the buffer: pickle would give it memory of its own, and `check` see nothing."""
        t = self.tensor
        return {**self.__dict__, "tensor": (t.shape, t.stride(), t.storage_offset(), t.requires_grad)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        shape, strides, start, wants_gradient = state["tensor"]
        self.tensor = self.buffer.as_strided(shape, strides, start).requires_grad_(wants_gradient)

    def check(self, name: str = "input") -> None:
        """Fail if anything was written to the buffer."""
        assert_identical(self.buffer, self._before, f"memory of {name}")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner` has this attribute in the place of its own, or of one that it inherits."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Inside, uninitialised floating tensors made from Python hold NaN and lie between NaN.

    What is never written shows in the result; writing outside of one, be it NaN, fails at the end. torch's functions
    are replaced for all threads meanwhile.
    """
    margin = 1024  # wider than a block, and whole cache lines, so that the tensors are aligned as they are elsewhere
    buffers: list[tuple[Tensor, int]] = []

    def poisoned(make: Callable[..., Tensor], plain_empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            if t.dtype not in _POISON or t.device.type == "meta" or kwargs.get("out") is not None:
                return t
            span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
            with torch.no_grad():
                buffer = plain_empty(span + 2 * margin, dtype=t.dtype, device=t.device)
                bits, pattern = _POISON[t.dtype]
                buffer.view(bits).fill_(pattern)
                buffers.append((buffer, span))
                return buffer.as_strided(t.shape, t.stride(), margin).requires_grad_(t.requires_grad)

        return made

    plain_empty = torch.empty
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            stack.enter_context(_replaced(owner, name, poisoned(getattr(owner, name), plain_empty)))
        yield
    for buffer, span in buffers:
        bits, pattern = _POISON[buffer.dtype]
        outside = torch.cat([buffer[:margin], buffer[margin + span :]]).view(bits)
        require(bool(outside.eq(pattern).all()), "memory outside of an output was written")
