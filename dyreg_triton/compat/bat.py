"""The published `models.non_local` (clips) and `model_zoo.non_local` (images)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._core.validation import flag, is_integer, positive_int, probability, what
from ..layers import bat, nonlocal_block
from ..layers.bat import clip_input, convolution, start
from ..layers.leaves import tensor_of
from ..layers.nonlocal_block import embedded_gaussian
from ..pretrained import Pretrained
from .families import Family, register

_PUBLISHED: dict[str, Any] = {"window_rule": "logit"}
_IMAGES: dict[str, Any] = {"dimensions": 2, "normalisation": "sigmoid", **_PUBLISHED}


def _sizes(op: str, in_channels: int, r: int = 1, tk: int = 0, **positive: int) -> dict[str, Any]:
    """Check the authors' sizes under their names; the layer's options that they are."""
    for name, value in {"in_channels": in_channels, "r": r, **positive}.items():
        positive_int(op, name, value)
    if not is_integer(tk) or tk >= 2**31:
        raise ValueError(f"{op}: tk is {what(tk)}; accepted is an integer below 2**31, and up to 0 for none")
    inner = in_channels // r
    if not inner:
        raise ValueError(f"{op}: r is {r}; accepted is at most in_channels, {in_channels}")
    for name, groups in {"k": positive["k"], "tk": tk}.items():
        if groups > 0 and inner % groups:
            channels = "in_channels" if r == 1 else "in_channels // r"
            raise ValueError(f"{op}: {name} is {groups}; accepted is a divisor of {channels}, {inner}")
    options = {"window": positive["s"], "groups": positive["k"]}
    return options | ({"temporal_window": positive["ts"], "temporal_groups": max(tk, 0)} if "ts" in positive else {})


# keep_regions is accepted for every module; these have no regions


class BATransform(bat.BATransform):
    """The published BATransform of clips (B, C, T, H, W); cells that no window covers have logit 0."""

    def __init__(self, in_channels: int, s: int, ts: int, k: int, tk: int, *, keep_regions: bool = False):
        op = "models.non_local.BATransform"
        flag(op, "keep_regions", keep_regions)
        super().__init__(in_channels, **_sizes(op, in_channels, tk=tk, s=s, ts=ts, k=k), **_PUBLISHED)


class BATBlock(bat.BATBlock):
    """The published BATBlock of clips."""

    _starts = False

    def __init__(
        self,
        in_channels: int,
        r: int = 2,
        s: int = 7,
        ts: int = 4,
        k: int = 4,
        tk: int = 1,
        dropout: float = 0.2,
        *,
        keep_regions: bool = False,
    ):
        op = "models.non_local.BATBlock"
        flag(op, "keep_regions", keep_regions)
        sizes = _sizes(op, in_channels, r, tk, s=s, ts=ts, k=k)
        super().__init__(in_channels, reduction=r, dropout=probability(op, "dropout", dropout), **sizes, **_PUBLISHED)


class ImageBATransform(bat.BATransform):
    """The published BATransform of images (B, C, H, W): a sigmoid divided by its sum."""

    def __init__(self, in_channels: int, s: int, k: int, *, keep_regions: bool = False):
        op = "model_zoo.non_local.BATransform"
        flag(op, "keep_regions", keep_regions)
        super().__init__(in_channels, **_sizes(op, in_channels, s=s, k=k), **_IMAGES)


class ImageBATBlock(bat.BATBlock):
    """The published BATBlock of images."""

    _starts = False

    def __init__(
        self, in_channels: int, r: int = 2, s: int = 4, k: int = 4, dropout: float = 0.2, *, keep_regions: bool = False
    ):
        op = "model_zoo.non_local.BATBlock"
        flag(op, "keep_regions", keep_regions)
        sizes = _sizes(op, in_channels, r, s=s, k=k)
        super().__init__(in_channels, reduction=r, dropout=probability(op, "dropout", dropout), **sizes, **_IMAGES)

    def init_modules(self) -> None:
        """Start as published: convolutions keep their biases."""
        start(self, 1.0, biases=False)


class _NonLocal(nonlocal_block.NonLocalBlock):
    """The published non-local block over `_DIMENSIONS`.

    `init_modules` starts it as published: with `zero_init` and `bn_layer` it is the identity for ever, because W and
    the norm's scale are both 0, and neither has a gradient.
    """

    _DIMENSIONS = 3
    _starts = False

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        head: int = 1,
        sub_sample: bool = True,
        bn_layer: bool = True,
        use_scale: bool = True,
        zero_init: bool = False,
        *,
        keep_regions: bool = False,
    ):
        op = f"models.non_local.{type(self).__name__}"
        positive_int(op, "in_channels", in_channels)
        if inter_channels is not None:
            positive_int(op, "inter_channels", inter_channels)
        inner = max(in_channels // 2, 1) if inter_channels is None else inter_channels
        if inner % positive_int(op, "head", head):
            raise ValueError(f"{op}: head is {head}; accepted is a divisor of inter_channels, {inner}")
        flags = {"sub_sample": sub_sample, "bn_layer": bn_layer, "use_scale": use_scale, "zero_init": zero_init}
        for name, value in {**flags, "keep_regions": keep_regions}.items():
            flag(op, name, value)
        norm = "batch" if bn_layer else "none"
        super().__init__(
            in_channels, inter_channels, dimensions=self._DIMENSIONS, heads=head, sub_sample=sub_sample,
            scale=use_scale, norm=norm, zero_init=zero_init,
        )  # fmt: skip

    def init_modules(self) -> None:
        """Start as published."""
        super().init_modules()
        if isinstance(self.W, nn.Sequential):
            nn.init.zeros_(self.W[1].weight)  # type: ignore[arg-type]


class NONLocalBlock1D(_NonLocal):
    """The published block over (B, C, L)."""

    _DIMENSIONS = 1


class NONLocalBlock2D(_NonLocal):
    """The published block over (B, C, H, W)."""

    _DIMENSIONS = 2


class NONLocalBlock3D(_NonLocal):
    """The published block over (B, C, T, H, W)."""


class NonLocal(Pretrained):
    """The published non-local block of images, x + bn(z(softmax(t^T p / sqrt(c)) g))."""

    def __init__(self, inplanes: int, use_scale: bool = True, *, keep_regions: bool = False):
        super().__init__()
        op = "model_zoo.non_local.NonLocal"
        flag(op, "keep_regions", keep_regions)
        self.use_scale = flag(op, "use_scale", use_scale)
        self.inplanes = positive_int(op, "inplanes", inplanes)
        if inplanes < 2:
            raise ValueError(f"{op}: inplanes is {inplanes}; accepted is an integer > 1: half as many attend")
        planes = inplanes // 2
        self.t, self.p, self.g = (nn.Conv2d(inplanes, planes, 1) for _ in range(3))
        self.z = nn.Conv2d(planes, inplanes, 1)
        self.bn = nn.BatchNorm2d(inplanes)

    def init_modules(self) -> None:
        """Start as published: as the identity."""
        start(self, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        clip_input("model_zoo.non_local.NonLocal", x, tensor_of(self.z, self), self.inplanes, 2)
        y = embedded_gaussian(self.t(x), self.p(x), self.g(x), 1, self.use_scale)
        return self.bn(self.z(y)) + x


# --- how they are known in a model ----------------------------------------------------------------------------------


def _images(module: nn.Module) -> bool:
    """Whether a module's first convolution is over images."""
    found = next((part for part in module.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    return isinstance(found, nn.Conv2d)


def _clips(module: nn.Module) -> bool:
    return not _images(module)


def _transform(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("in_channels", "s", "ts", "k", "tk")}


def _image_transform(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("in_channels", "s", "k")}


def _block(module: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Of the block around a transform of these settings."""
    inner = settings.pop("in_channels")
    outer = module.conv1[0].in_channels
    return {"in_channels": outer, "r": outer // inner, "dropout": module.dropout.p, **settings}


def _attention(module: Any) -> dict[str, Any]:
    settings = {
        name: getattr(module, name)
        for name in ("in_channels", "inter_channels", "head", "sub_sample", "use_scale", "zero_init")
    }
    return settings | {"bn_layer": isinstance(module.W, nn.Sequential)}


def _clip_shape(ours: Any) -> tuple[int, ...]:
    """Where matrices are written out on every axis, and two windows slide over rows and columns."""
    inner = ours if isinstance(ours, bat.BATransform) else ours.batransform
    scale, cells = (2 if inner.window > 2 else 1), inner.window + 1
    return 2, ours.in_channels, 2 * inner.temporal_window, scale * cells, (scale + 1) * cells


def _image_shape(ours: Any) -> tuple[int, ...]:
    inner = ours if isinstance(ours, bat.BATransform) else ours.batransform
    return 2, ours.in_channels, 2 * inner.window, 2 * inner.window


def _attends(kind: type[_NonLocal]) -> Family:
    """The family of a block over so many dimensions; a published one may be of their common class."""
    conv = convolution(kind._DIMENSIONS)
    return Family(
        kind.__name__,
        kind,
        ("g", "W", "theta", "phi"),
        _attention,
        lambda ours: (2, ours.in_channels, 3, 5, 4)[: 2 + ours.dimensions],
        fits=lambda module: isinstance(getattr(module, "theta", None), conv),
    )


def _image_attention(module: Any) -> dict[str, Any]:
    return {"inplanes": module.z.out_channels, "use_scale": module.use_scale}


_TRANSFORM = ("conv1", "conv_p", "conv_q", "conv2")
_BLOCK = ("conv1", "batransform", "conv2", "dropout")
register(Family("BATBlock", BATBlock, _BLOCK, lambda m: _block(m, _transform(m.batransform)), _clip_shape, fits=_clips))
register(
    Family(
        "BATBlock", ImageBATBlock, _BLOCK, lambda m: _block(m, _image_transform(m.batransform)), _image_shape,
        fits=_images,
    )
)  # fmt: skip
register(Family("BATransform", BATransform, _TRANSFORM, _transform, _clip_shape, fits=_clips))
register(Family("BATransform", ImageBATransform, _TRANSFORM, _image_transform, _image_shape, fits=_images))
register(
    Family(
        "NonLocal", NonLocal, ("t", "p", "g", "z", "bn"), _image_attention,
        lambda ours: (2, ours.inplanes, 5, 4), fits=_images,
    )
)  # fmt: skip
for kind in (NONLocalBlock1D, NONLocalBlock2D, NONLocalBlock3D):
    register(_attends(kind))
