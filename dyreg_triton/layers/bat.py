"""Bilinear attentional transform layers (BAT: Chi et al., 'Non-Local Neural Networks with Grouped Bilinear Attentional
Transforms', CVPR 2020)."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .._core.validation import choice, is_integer, layer_input, positive_int, probability, what
from ..pretrained import Pretrained
from .leaves import tensor_of
from .symbols import read_filters, symbolic, transformed_at_once
from .transform import Axes, Matrices, Predictors, axes_of, predicted, transformed

NORMALISATIONS = ("softmax", "sigmoid")
AXES = ("input", "output")
RULES = ("weight", "logit")
REMAINDERS = ("repeat", "refuse")


def convolution(dimensions: int) -> Any:
    """The convolution over so many dimensions."""
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]


def _pointwise(inputs: int, outputs: int, dimensions: int) -> nn.Sequential:
    """A 1x1 convolution, batch norm and ReLU, with the published names."""
    norm = nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm3d
    return nn.Sequential(convolution(dimensions)(inputs, outputs, 1), norm(outputs), nn.ReLU(inplace=True))


def start(module: nn.Module, norm_weight: float, *, biases: bool = True) -> None:
    """The published start: convolutions of Kaiming's variance, and with `biases` without bias; norms of this weight."""
    for part in module.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if biases and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)):
            nn.init.constant_(part.weight, norm_weight)
            nn.init.zeros_(part.bias)


def clip_input(op: str, x: Any, like: Tensor | None, channels: int, dimensions: int) -> None:
    """Check the input of a layer over `dimensions`, of `like`'s dtype and device; only the batch may be empty."""
    sizes = ("L", "H, W", "T, H, W")[dimensions - 1]
    form = f"(B, {channels}, {sizes}) for in_channels {channels}, {sizes.replace(', W', ' and W')} > 0"
    layer_input(op, "x", x, like, (None, channels, *[None] * dimensions), form)
    if 0 in x.shape[2:]:
        raise ValueError(f"{op}: x is {what(x)}; accepted is {form}")


class BATransform(Pretrained):
    """Grouped bilinear attentional transform of a clip or an image.

    A map of few channels, conv1(x), is max-pooled to its coarse rows and columns; a convolution over a window of these
    predicts each group's P and Q in each frame, and one over the average of each frame a matrix R over time. Then

        z = kron(P, I) x kron(Q, I) in each frame,   y[f'] = sum_f kron(R, I)[f', f] z[f],   and conv2(y)

    Any map at least as large as a window is taken; how coarse cells and windows lie is in `layers/windows.py`.
    Parameters have the published names and shapes.

    Args:
        in_channels: channels of x, a multiple of groups and of temporal_groups.
        window: s, coarse rows and columns of a window.
        temporal_window: ts, coarse frames of one.
        groups: k, how many P and Q there are; each transforms a run of in_channels / k channels.
        temporal_groups: tk, how many R; 0 for none, which is the default for images, and 1 for clips.
        dimensions: 3 for clips (B, C, T, H, W), 2 for images (B, C, H, W).
        normalisation: "softmax", or "sigmoid" divided by its sum, as in the published code for images.
        softmax_axis: weights sum to 1 over the "input", so that an output is a weighted mean (rows of P and R, columns
            of Q, as published), or over the "output".
        window_rule: cells of a matrix that no window covers have "weight" 0 (the supplement), or "logit" 0 before they
            are normalised (the published code).
        remainder: where a map is no multiple of its coarse cells, "repeat" its last row, column or frame for as long as
            it is transformed, or "refuse" it.

    Shapes: x (B, C, T, H, W), or (B, C, H, W) with dimensions 2, any strides -> y of the same shape. B may be 0.

    Raises ValueError or TypeError for an argument outside those named, and for x of another shape, or smaller than a
    window.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        window: int = 7,
        temporal_window: int = 4,
        groups: int = 4,
        temporal_groups: int | None = None,
        dimensions: int = 3,
        normalisation: str = "softmax",
        softmax_axis: str = "input",
        window_rule: str = "weight",
        remainder: str = "repeat",
    ):
        super().__init__()
        op = "BATransform"
        self.in_channels = positive_int(op, "in_channels", in_channels)
        self.window = s = positive_int(op, "window", window)
        self.temporal_window = ts = positive_int(op, "temporal_window", temporal_window)
        self.groups = k = positive_int(op, "groups", groups)
        if not is_integer(dimensions) or dimensions not in (2, 3):
            raise ValueError(f"{op}: dimensions is {what(dimensions)}; accepted are 2 (images) and 3 (clips)")
        self.dimensions = dimensions
        tk = (1 if dimensions == 3 else 0) if temporal_groups is None else temporal_groups
        if not is_integer(tk) or not 0 <= tk < 2**31 or (tk and dimensions == 2):
            raise ValueError(
                f"{op}: temporal_groups is {what(tk)} with dimensions {dimensions}; accepted is an integer >= 0, "
                "and for images 0"
            )
        self.temporal_groups = tk = int(tk)
        for name, value in {"groups": k, "temporal_groups": tk}.items():
            if value and in_channels % value:
                raise ValueError(f"{op}: {name} is {value}; accepted is a divisor of in_channels, {in_channels}")
        self.normalisation = choice(op, "normalisation", normalisation, NORMALISATIONS)
        self.softmax_axis = choice(op, "softmax_axis", softmax_axis, AXES)
        self.window_rule = choice(op, "window_rule", window_rule, RULES)
        self.remainder = choice(op, "remainder", remainder, REMAINDERS)

        conv = convolution(dimensions)
        frame = (1,) if dimensions == 3 else ()
        self.conv1 = _pointwise(in_channels, k, dimensions)
        self.conv_p = conv(k, s * s * k, (*frame, s, 1))
        self.conv_q = conv(k, s * s * k, (*frame, 1, s))
        if tk:
            self.conv_t = conv(k, ts * ts * tk, (ts, 1, 1))
        self.conv2 = _pointwise(in_channels, in_channels, dimensions)

    def matrices(self, x: Tensor) -> Matrices:
        """P, Q and R of an input, which is extended where it is no multiple: T, H and W are then the extended ones."""
        self._check(x)
        axes = self.axes(x)  # which refuses what it cannot take, before anything runs
        return predicted(self.conv1(x), axes, self._predictors(), self)

    def _check(self, x: Tensor) -> None:
        clip_input("BATransform", x, tensor_of(self.conv2, self), self.in_channels, self.dimensions)

    def accept(self, x: Tensor) -> None:
        """Raise ValueError for an x, of any channels, that is smaller than a window."""
        s, ts = self.window, self.temporal_window
        names = {"H": (-2, s), "W": (-1, s)} | ({"T": (-3, ts)} if self.temporal_groups else {})
        for name, (dim, window) in names.items():
            if x.shape[dim] < window:
                option = "temporal_window" if name == "T" else "window"
                raise ValueError(
                    f"BATransform: x is {what(x)}, of {name} = {x.shape[dim]}; accepted is at least one window, "
                    f"{option} = {window}"
                )

    def axes(self, x: Tensor) -> Axes:
        """How frames, rows and columns of an x of any channels are cut.

        Raises ValueError where x is smaller than a window, or is no multiple and the layer refuses it.
        """
        self.accept(x)
        return axes_of(x, self)

    def _predictors(self) -> Predictors:
        """The convolutions that predict P, Q and, where frames are mixed, R."""
        return Predictors(self.conv_p, self.conv_q, self.conv_t if self.temporal_groups else None)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if symbolic(x) and (filters := read_filters(self._predictors(), convolution(self.dimensions))) is not None:
            self.accept(x)
            return self.conv2(transformed_at_once(x, self.conv1(x), filters, self))
        axes = self.axes(x)
        return self.conv2(transformed(x, predicted(self.conv1(x), axes, self._predictors(), self), axes))

    def extra_repr(self) -> str:
        sizes = ("window", "temporal_window", "groups", "temporal_groups", "dimensions")
        names = (*sizes, "normalisation", "softmax_axis", "window_rule", "remainder")
        return f"{self.in_channels}, " + ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


_OPTIONS = tuple(inspect.signature(BATransform.__init__).parameters)[2:]


class BATBlock(Pretrained):
    """A residual block around a transform of fewer channels: x + dropout(conv2(batransform(conv1(x)))).

    Args:
        in_channels: channels of x.
        reduction: r; the transform has in_channels // r channels.
        dropout: the probability with which a channel of the residual is dropped in training.
        dimensions, options: of `BATransform`.

    Shapes: as `BATransform`. Raises as `BATransform`.
    """

    _starts = True  # as the authors' networks start it; their constructor leaves that to them

    def __init__(
        self, in_channels: int, *, reduction: int = 2, dropout: float = 0.2, dimensions: int = 3, **options: Any
    ):
        super().__init__()
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise TypeError(f"BATBlock: got {', '.join(unknown)}; accepted are {', '.join(_OPTIONS)}")
        self.in_channels = positive_int("BATBlock", "in_channels", in_channels)
        self.reduction = positive_int("BATBlock", "reduction", reduction)
        probability("BATBlock", "dropout", dropout)
        if reduction > in_channels:
            raise ValueError(f"BATBlock: reduction is {reduction}; accepted is at most in_channels, {in_channels}")
        inner = in_channels // reduction
        transform = BATransform(inner, dimensions=dimensions, **options)
        self.dimensions = dimensions
        self.conv1 = _pointwise(in_channels, inner, dimensions)
        self.batransform = transform
        self.conv2 = _pointwise(inner, in_channels, dimensions)
        self.dropout = (nn.Dropout2d if dimensions == 2 else nn.Dropout3d)(dropout)
        if self._starts:
            self.init_modules()

    def init_modules(self) -> None:
        """Start as published."""
        start(self, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        clip_input("BATBlock", x, tensor_of(self.conv1, self), self.in_channels, self.dimensions)
        if symbolic(x):  # what else is refused then is so when it runs
            self.batransform.accept(x)
        else:
            self.batransform.axes(x)  # refuses what it cannot take, before anything runs
        return self.dropout(self.conv2(self.batransform(self.conv1(x)))) + x

    def extra_repr(self) -> str:
        return f"{self.in_channels}, reduction={self.reduction}"
