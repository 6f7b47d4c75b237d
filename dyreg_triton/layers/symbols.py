"""The transform of maps whose sizes are symbols, as one op: a compiler's graph then holds for maps of any size.

How a map is cut follows from its sizes by divisions, of which every question makes another graph: the ninth size would
be an error with fullgraph=True. Inside the op sizes are numbers, and the convolutions that predict the matrices are
taken by their tensors. Nothing of it is fused with what is around; graphs of one size are traced through instead.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._core.autocast import full_precision, lowered
from .._core.dispatch import backend, choose, current_backend
from .._core.layouts import memory_format
from ..ops.bilinear import products
from ..ops.custom import once_only, op
from ..ops.torch_symbols import recorded
from .leaves import readable
from .transform import Axes, Options, Predictors, axes_of, predicted, transformed


def symbolic(x: Tensor) -> bool:
    """Whether x is met by a compiler (not an exporter, whose program shall hold torch's own ops) as of any size."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(n) for n in x.shape[2:])


class _Form(NamedTuple):
    """The options as the op takes them: numbers in a list, and names, with the backend's, in one text."""

    window: int
    temporal_window: int
    groups: int
    temporal_groups: int
    normalisation: str
    softmax_axis: str
    window_rule: str
    remainder: str


Filters = tuple[Tensor | None, ...]  # weight and bias of each predictor


def read_filters(predictors: Predictors, kind: Any) -> Filters | None:
    """Weight and bias of each predictor where they may be read instead of calling it, else None."""
    filters: list[Tensor | None] = []
    for predictor in predictors:
        if predictor is None:
            filters += [None, None]
            continue
        leaf = readable(cast(Any, predictor), kind)
        if leaf is None:
            return None
        filters += [leaf.weight, leaf.bias]
    return tuple(filters)


def transformed_at_once(x: Tensor, out: Tensor, filters: Filters, options: Options) -> Tensor:
    """`transformed(x, predicted(out, ...), ...)` of the predictors' filters."""
    x = lowered(x)
    form = _Form(*(getattr(options, name) for name in _Form._fields))
    choose("bilinear_transform", x, {"x": x})  # which refuses, before anything is traced, what cannot run
    filters = tuple(None if t is None else lowered(t) for t in filters)
    return _at_once(x, lowered(out), *filters, [*form[:4]], " ".join((*form[4:], current_backend())))


def _predictors(filters: Filters) -> Predictors:
    def convolution(weight: Tensor | None, bias: Tensor | None) -> Any:
        if weight is None:
            return None
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[weight.dim() - 3]
        return functools.partial(conv, weight=weight, bias=bias)

    return Predictors(*(convolution(*filters[i : i + 2]) for i in (0, 2, 4)))


def _cut(x: Tensor, sizes: list[int], how: str) -> tuple[Axes, _Form]:
    form = _Form(*sizes, *how.split()[:4])  # type: ignore[arg-type]
    return axes_of(x, form), form


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _transformed(x: Any, out: Any, *given: Any) -> Tensor:
    *filters, sizes, how = given
    axes, form = _cut(x, sizes, how)
    with backend(how.split()[4]), full_precision(x.device.type):
        return transformed(x, predicted(out, axes, _predictors(tuple(filters)), form), axes)


@op("bilinear_attention")
def _at_once(
    x: Tensor, out: Tensor, wp: Tensor, bp: Tensor | None, wq: Tensor, bq: Tensor | None, wt: Tensor | None,
    bt: Tensor | None, sizes: list[int], how: str,
) -> Tensor:  # fmt: skip
    return _like(x).copy_(_transformed(x, out, wp, bp, wq, bq, wt, bt, sizes, how))  # it may be a part of another


@_at_once.register_fake
def _(x, out, wp, bp, wq, bq, wt, bt, sizes, how):
    return _like(x)


def _counts(x: Tensor, wp: Tensor, wq: Tensor, wt: Tensor | None, sizes: list[int], how: str) -> list[int]:
    """Multiply-adds of the predictors of P, Q and R; then the extended map, as the op's own formulas take it."""
    axes, form = _cut(x, sizes, how)
    frames = 1 if x.dim() == 4 else x.shape[2] + (axes.time.extension if axes.time else 0)
    found = [
        2 * x.shape[0] * frames * weight.numel() * (axis.cells - form.window + 1)
        for weight, axis in ((wp, axes.down), (wq, axes.across))
    ]
    times = 0 if axes.time is None else axes.time.cells - form.temporal_window + 1
    return [*found, 0 if wt is None else 2 * x.shape[0] * wt.numel() * times]


@_at_once.register_flops
def _(x, out, wp, bp, wq, bq, wt, bt, sizes, how):
    axes, _ = _cut(x, sizes, how)
    return sum(_counts(x, wp, wq, wt, sizes, how)) + sum(products(*_sides(x, axes)))


def _sides(x: Tensor, axes: Axes) -> tuple[int, int, int, int | None]:
    """Numbers of the extended map, and the sides of P, of the map's rows, and of R."""
    numbers, sizes = x.shape[0] * x.shape[1], [axis.length + axis.extension for axis in axes if axis is not None]
    frames = x.shape[2] if x.dim() == 5 and axes.time is None else 1
    return numbers * frames * math.prod(sizes), axes.down.cells, sizes[-1], axes.time.cells if axes.time else None


@op("bilinear_attention_backward")
def _at_once_backward(
    dy: Tensor, x: Tensor, out: Tensor, wp: Tensor, bp: Tensor | None, wq: Tensor, bq: Tensor | None,
    wt: Tensor | None, bt: Tensor | None, sizes: list[int], how: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, out and those filters that are there; matrices are predicted again."""
    with recorded():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, out, wp, bp, wq, bq, wt, bt)]
        there = [t for t in leaves if t is not None]
        gradients = torch.autograd.grad(_transformed(*leaves, sizes, how), there, dy)
    return [
        _like(x).copy_(gradients[0]),
        *(torch.empty_like(t).copy_(g) for t, g in zip(there[1:], gradients[1:], strict=True)),
    ]


@_at_once_backward.register_fake
def _(dy, x, out, wp, bp, wq, bq, wt, bt, sizes, how):
    return [_like(x), *(torch.empty_like(t) for t in (out, wp, bp, wq, bq, wt, bt) if t is not None)]


@_at_once_backward.register_flops
def _(dy, x, out, wp, bp, wq, bq, wt, bt, sizes, how):
    axes, _ = _cut(x, sizes, how)
    return 2 * (sum(_counts(x, wp, wq, wt, sizes, how)) + sum(products(*_sides(x, axes))))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.sizes, ctx.how = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    saved = ctx.saved_tensors
    gradients = iter(_at_once_backward(dy, *saved, ctx.sizes, ctx.how))
    return *(None if t is None else next(gradients) for t in saved), None, None


_at_once.register_autograd(_autograd, _setup)
once_only(_at_once_backward, "bilinear_transform")
