"""Comparisons that fail for the reasons that matter: wrong values anywhere, one wrong element, NaN, a lost gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import numerics
from .._core.numerics import TOLERANCE
from .._core.validation import function as callable_function
from .._core.validation import is_dense, mapping, what


def require(condition: bool, failure: str) -> None:
    """Fail (AssertionError); the statement `assert` would not under python -O."""
    if not condition:
        raise AssertionError(failure)


def _comparable(op: str, name: str, t: object, *, real: bool = True) -> None:
    """Check that `t` is a tensor whose values can be looked at one by one."""
    if not is_dense(t) or t.is_meta or t.is_quantized or (real and t.is_complex()):
        kind = "a dense, real torch.Tensor with data" if real else "a dense torch.Tensor with data"
        raise TypeError(f"{op}: {name} is {what(t)}; accepted is {kind}")


def _bound(op: str, name: str, bound: object) -> None:
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 <= bound < 1e300:
        raise ValueError(f"{op}: {name} is {bound!r}; accepted is a number >= 0")


def relative_error(actual: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """||actual - expected|| / max(||expected||, floor), in float64; 0 / 0 is 0; infinite where one is not finite.

    Raises TypeError for what is no tensor, and ValueError for another shape or a negative floor.
    """
    _comparable("relative_error", "actual", actual)
    _comparable("relative_error", "expected", expected)
    _bound("relative_error", "floor", floor)
    if actual.shape != expected.shape:
        raise ValueError(
            f"relative_error: expected has shape {tuple(expected.shape)}; accepted is that of actual, "
            f"{tuple(actual.shape)}"
        )
    return numerics.relative_error(actual, expected, floor)


def _double(t: Tensor) -> Tensor:
    return t.detach().double().cpu()


def mismatch(
    actual: Tensor | None,
    expected: Tensor | None,
    *,
    tolerance: float | None = None,
    element: float | None = None,
    floor: float = 0.0,
) -> str | None:
    """What is wrong with `actual`, in words, or None where it is as close to `expected` as it should be.

    Args:
        actual, expected: tensors of one shape; None stands for a gradient that is absent.
        tolerance: bound of the relative L2 error; by default `TOLERANCE` of the dtype of `actual`.
        element: bound of the largest single error, relative to the largest expected value; by default four times the
            tolerance. It sees one wrong element among millions, which a norm does not.
        floor: the norm below which `expected` is the difference of larger terms; there errors are relative to it.

    Raises:
        TypeError: an argument that is neither a tensor nor None, or a dtype without a tolerance.
        ValueError: a negative bound.
    """
    for name, t in (("actual", actual), ("expected", expected)):
        if t is not None:
            _comparable("assert_close", name, t)
    for name, bound in (("tolerance", tolerance), ("element", element), ("floor", floor)):
        if bound is not None or name == "floor":
            _bound("assert_close", name, bound)
    if actual is None or expected is None:
        return None if actual is expected else f"is {'absent' if actual is None else 'present'}"
    if tolerance is None:
        if actual.dtype not in TOLERANCE:
            accepted = ", ".join(str(t)[6:] for t in TOLERANCE)
            raise TypeError(
                f"assert_close: actual is {what(actual)}; accepted without a tolerance are {accepted}; "
                f"expected is {what(expected)}"
            )
        tolerance = TOLERANCE[actual.dtype]
    element = 4 * tolerance if element is None else element

    if actual.shape != expected.shape:
        return f"has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not _double(expected).isfinite().all():
        return "cannot be compared: the expected values are not finite"
    finite = _double(actual).isfinite()
    if not finite.all():
        return f"has {(~finite).sum().item()} of {actual.numel()} values not finite"
    error = numerics.relative_error(actual, expected, floor)
    if error > tolerance:
        if not expected.any() and not floor:
            return (
                f"is up to {_double(actual).abs().max().item():.3g} where 0 is expected; where that is a difference "
                "of larger terms, give their norm as a floor"
            )
        if not _double(actual).any():
            return f"is all zero where the expected norm is {_double(expected).norm().item():.3g}"
        return f"has relative error {error:.3g} > {tolerance:.3g}"
    if actual.numel():
        difference = (_double(actual) - _double(expected)).abs()
        largest = max(_double(expected).abs().max().item(), floor / actual.numel() ** 0.5)
        if difference.max().item() > element * largest:
            at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
            return (
                f"is {actual[at].item():.6g} at {at}, expected {expected[at].item():.6g}: off by "
                f"{difference.max().item() / largest:.3g} > {element:.3g} of the largest expected value"
            )
    return None


def assert_close(actual: Tensor | None, expected: Tensor | None, name: str = "result", **options: Any) -> None:
    """Fail (AssertionError) unless `actual` is within the bounds of `expected`; options and errors as `mismatch`."""
    problem = mismatch(actual, expected, **options)
    require(problem is None, f"{name} {problem}")


def assert_all_close(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    *,
    tolerance: float | None = None,
    element: float | None = None,
    floors: Mapping[str, float] | None = None,
) -> None:
    """`assert_close` of every entry; the failure lists every entry that is wrong."""
    for name, entries in (("actual", actual), ("expected", expected), ("floors", {} if floors is None else floors)):
        mapping("assert_all_close", name, entries)
    require(actual.keys() == expected.keys(), f"entries differ: {sorted(actual.keys() ^ expected.keys())}")
    floors = floors or {}
    problems = {
        name: mismatch(actual[name], expected[name], tolerance=tolerance, element=element, floor=floors.get(name, 0.0))
        for name in expected
    }
    wrong = [f"{name} {problem}" for name, problem in problems.items() if problem]
    require(not wrong, "; ".join(wrong))


def assert_identical(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Fail unless both hold the same bits (so NaN equals NaN) in the same shape and dtype."""
    for argument, t in (("actual", actual), ("expected", expected)):
        _comparable("assert_identical", argument, t, real=False)
    shapes = tuple(actual.shape), tuple(expected.shape)
    require(shapes[0] == shapes[1], f"{name} has shape {shapes[0]}, expected {shapes[1]}")
    require(actual.dtype == expected.dtype, f"{name} is {actual.dtype}, expected {expected.dtype}")
    if actual.dtype == torch.bool or actual.is_complex():
        different = actual.detach() != expected.detach()
    else:
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        different = actual.detach().contiguous().view(bits) != expected.detach().contiguous().view(bits)
    count = int(different.sum())
    require(count == 0, f"{name}: {count} of {actual.numel()} values differ")


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], grad_output: Tensor | None = None
) -> dict[str, Tensor | None]:
    """{"out": function(**inputs), "grad_<input>": the gradient of each} for the cotangent `grad_output`.

    Inputs that do not require a gradient have none in the result. An output that has no graph gives gradients None.
    """
    op = "value_and_gradients"
    callable_function(op, "function", function)
    for name, t in mapping(op, "inputs", inputs).items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: inputs[{name!r}] is {what(t)}; accepted is a torch.Tensor")
    if grad_output is not None and not isinstance(grad_output, Tensor):
        raise TypeError(f"{op}: grad_output is {what(grad_output)}; accepted is a torch.Tensor or None")
    out = function(**inputs)
    if not isinstance(out, Tensor):
        raise TypeError(f"{op}: function returned a {type(out).__name__}; accepted is a torch.Tensor")
    if grad_output is not None:
        fits = is_dense(grad_output) and (grad_output.shape, grad_output.device) == (out.shape, out.device)
        kind = [(t.is_complex(), t.is_floating_point()) for t in (grad_output, out)]
        if not fits or kind[0] != kind[1]:
            raise ValueError(f"{op}: grad_output is {what(grad_output)}; accepted is one like the output, {what(out)}")
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if out.requires_grad:
        cotangent = torch.ones_like(out) if grad_output is None else grad_output
        grads = torch.autograd.grad(out, list(wanted.values()), cotangent, allow_unused=True)
    return {"out": out.detach(), **{f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}}
