"""Triton's interpreter, the same in a third of the time: what it makes again for each operation is kept.

Most of its time goes into patching `triton.language` again for each call of a function within a kernel, into the types
of tensors, and into sums that nobody sees. What a kernel computes stays as it is. `make full` runs without all this.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter, whose names these are in Triton 3.6 and 3.7."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch.setattr(interpreter.InterpretedFunction, "__call__", _within)
    patch.setattr(interpreter, "_get_np_dtype", _numpy_dtype(interpreter._get_np_dtype, core))
    patch.setattr(core.block_type, "__init__", _typed(core.block_type.__init__, core))
    patch.setattr(core.tensor, "__init__", _shaped(core))
    patch.setattr(core.tuple, "__eq__", _compared(core.tuple.__eq__, core))
    patch.setattr(TritonSemantic, "broadcast_impl_value", _broadcast(TritonSemantic.broadcast_impl_value))
    options = interpreter.interpreter_builder.options
    if not options.debug:  # then nobody hears of an overflow, for which each sum of integers is done twice
        patch.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))


def _within(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call within a kernel; the language that it uses is mostly patched already, by the launch or another call."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    if any(is_builtin(language.arange) for language in _languages(function)):
        interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@functools.cache
def _languages(function: Any) -> list[Any]:
    from triton import language

    return [value for value in function.fn.__globals__.values() if value is language or value is language.core]


def _numpy_dtype(original: Any, core: Any) -> Any:
    of_element = functools.cache(original)

    def numpy_dtype(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, core.block_type) else kind
        return original(element) if isinstance(element, core.pointer_type) else of_element(element)

    return numpy_dtype


def _typed(original: Any, core: Any) -> Any:
    """Of the type of a block: one for each element and shape."""
    made: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element: Any, shape: Any) -> None:
        key = type(element), element.name, *[n.value if isinstance(n, core.constexpr) else n for n in shape]
        fields = made.get(key)
        if fields is None:
            original(self, element, shape)
            # what of it a tensor of this type has as its own
            sizes = [n.value if isinstance(n, core.constexpr) else n for n in self.shape]
            self.of_tensors = core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(n) for n in sizes])
            made[key] = dict(vars(self))
        else:
            vars(self).update(fields, element_ty=element)

    return init


def _shaped(core: Any) -> Any:
    scalar = core.constexpr(1), core.tuple([])

    def init(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = kind.of_tensors if kind.is_block() else scalar

    return init


def _compared(original: Any, core: Any) -> Any:
    """Shapes, as lists of numbers, are compared with by the million."""

    def equal(self: Any, other: Any) -> Any:
        if type(other) is list and all(type(n) is int for n in other):
            return core.constexpr(self.values == other)
        return original(self, other)

    return equal


def _broadcast(original: Any) -> Any:
    """Of two operands of one shape nothing has to be made."""

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast
