"""What a bilinear attentional transform computes between its convolutions: matrices for a map, and the map by them.

Functions of tensors; a layer's options are read from whatever has them as attributes, `Options`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.nn import functional as F

from .. import ops
from .._core.autocast import full_precision, lowered
from .._core.validation import what
from .windows import Axis, cut, cut_columns, extended, normalised


class Matrices(NamedTuple):
    """What the op is called with: p (B, G, T, mh, mh), q (B, G, T, mw, mw), and t (B, Gt, mt, mt) or None."""

    p: Tensor
    q: Tensor
    t: Tensor | None


class Options(Protocol):
    """Of `BATransform`, those that its matrices depend on."""

    @property
    def window(self) -> int: ...
    @property
    def temporal_window(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def temporal_groups(self) -> int: ...
    @property
    def normalisation(self) -> str: ...
    @property
    def softmax_axis(self) -> str: ...
    @property
    def window_rule(self) -> str: ...
    @property
    def remainder(self) -> str: ...


class Predictors(NamedTuple):
    """Of a window's logits of P, of Q, and of R or None."""

    p: Callable[[Tensor], Tensor]
    q: Callable[[Tensor], Tensor]
    t: Callable[[Tensor], Tensor] | None


class Axes(NamedTuple):
    """How frames (None: they are not mixed), rows and columns are cut."""

    time: Axis | None
    down: Axis
    across: Axis


def axes_of(x: Tensor, options: Options) -> Axes:
    """How an x that is at least a window is cut; raises ValueError where it is no multiple and the layer refuses it."""
    s, ts = options.window, options.temporal_window
    down = cut(x.shape[-2], s)
    axes = Axes(cut(x.shape[-3], ts) if options.temporal_groups else None, down, cut_columns(x.shape[-1], s, down))
    for name, axis in zip("THW", (axes.time, axes.down, axes.across), strict=True):
        if axis is not None and options.remainder == "refuse" and axis.extension:
            raise ValueError(
                f"BATransform: x is {what(x)}, of {name} = {axis.length}, which {axis.cells} coarse cells of "
                f"{axis.scale} exceed; accepted with remainder='refuse' is a size without remainder, such as "
                f"{axis.cells * axis.scale}, and any with remainder='repeat'"
            )
    return axes


def _extended(x: Tensor, axes: Axes) -> Tensor:
    for dim, axis in zip((-3, -2, -1), axes, strict=True):
        if axis is not None:
            x = extended(x, dim, axis.extension)
    return x


def predicted(out: Tensor, axes: Axes, predictors: Predictors, options: Options) -> Matrices:
    """P, Q and R of the map of few channels `out`, (B, k, T, H, W) or (B, k, H, W), extended as it is cut."""
    s, time = options.window, axes.time
    out = _extended(out, axes)
    rows = _pooled(out, (axes.down.scale, out.shape[-1]))
    columns = _pooled(out, (out.shape[-2], axes.across.scale))
    p = _weights(predictors.p(rows).squeeze(-1), options.groups, s, -1, options)
    q = _weights(predictors.q(columns).squeeze(-2), options.groups, s, -2, options)
    if time is None or predictors.t is None:
        return Matrices(p, q, None)
    frames = out.mean((-2, -1)).unflatten(-1, (time.cells, time.scale)).mean(-1)
    logits = predictors.t(frames[..., None, None]).flatten(2)
    return Matrices(p, q, _weights(logits, options.temporal_groups, options.temporal_window, -1, options).squeeze(2))


def _pooled(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """The maximum of each cell; frame by frame in two dimensions, whose gradient is deterministic on a GPU."""
    return F.max_pool2d(x.flatten(1, -3), cell).unflatten(1, x.shape[1:-2])


def _weights(logits: Tensor, groups: int, size: int, axis: int, options: Options) -> Tensor:
    """Matrices (B, groups, T, m, m) of the logits (B, size * size * groups, T, n) of n windows."""
    if logits.dim() == 3:  # no frames
        logits = logits.unsqueeze(2)
    logits = logits.unflatten(1, (groups, size, size)).permute(0, 1, 4, 5, 2, 3)
    if options.softmax_axis == "output":
        axis = -3 - axis
    with full_precision(logits.device.type):
        return normalised(logits, axis, options.normalisation, options.window_rule)


def transformed(x: Tensor, matrices: Matrices, axes: Axes) -> Tensor:
    """The map x, a clip or an image, by its matrices: extended where it is no multiple, and cut back."""
    size = x.shape[2:]
    x = _extended(lowered(x), axes)  # lowered as the op does, because autocast's cat takes no other 16 bits
    image = x.dim() == 4
    y: Any = ops.bilinear_transform(x.unsqueeze(2) if image else x, *matrices)
    if image:
        y = y.squeeze(2)
    if y.shape[2:] != size:
        for dim, length in zip(range(-len(size), 0), size, strict=True):
            y = y.narrow(dim, 0, length)
    return y
