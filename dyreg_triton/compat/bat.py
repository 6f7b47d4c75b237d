"""The published `models.non_local` (clips) and `model_zoo.non_local` (images)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layers import bat, nonlocal_block
from ..layers.bat import clip_input, convolution, start
from ..layers.nonlocal_block import embedded_gaussian
from ..pretrained import Pretrained
from ..validate import flag, is_integer, positive_int, what
from .families import Family, register

_PUBLISHED = {"window_rule": "logit"}
_IMAGES = {"dimensions": 2, "normalisation": "sigmoid", **_PUBLISHED}


def _count(op: str, name: str, value: object) -> int:
    if not is_integer(value) or not 0 <= value < 2**31:  # type: ignore[operator]
        raise ValueError(f"{op}: {name} is {what(value)}; accepted is an integer >= 0 and below 2**31")
    return int(value)  # type: ignore[call-overload]


class BATransform(bat.BATransform):
    """The published BATransform of clips (B, C, T, H, W); cells that no window covers have logit 0."""

    def __init__(
        self, in_channels: int, s: int, ts: int, k: int, tk: int, *, keep_regions: bool = False
    ):  # keep_regions: accepted for every module; this one has no regions
        flag("models.non_local.BATransform", "keep_regions", keep_regions)
        tk = _count("models.non_local.BATransform", "tk", tk)
        options: dict[str, Any] = {"temporal_groups": tk, **_PUBLISHED}
        super().__init__(in_channels, window=s, temporal_window=ts, groups=k, **options)


class BATBlock(bat.BATBlock):
    """The published BATBlock of clips."""

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
        flag("models.non_local.BATBlock", "keep_regions", keep_regions)
        tk = _count("models.non_local.BATBlock", "tk", tk)
        options: dict[str, Any] = {"temporal_groups": tk, **_PUBLISHED}
        super().__init__(in_channels, reduction=r, dropout=dropout, window=s, temporal_window=ts, groups=k, **options)


class ImageBATransform(bat.BATransform):
    """The published BATransform of images (B, C, H, W): a sigmoid divided by its sum."""

    def __init__(self, in_channels: int, s: int, k: int, *, keep_regions: bool = False):
        flag("model_zoo.non_local.BATransform", "keep_regions", keep_regions)
        super().__init__(in_channels, window=s, groups=k, **_IMAGES)  # type: ignore[arg-type]


class ImageBATBlock(bat.BATBlock):
    """The published BATBlock of images."""

    def __init__(
        self, in_channels: int, r: int = 2, s: int = 4, k: int = 4, dropout: float = 0.2, *, keep_regions: bool = False
    ):
        flag("model_zoo.non_local.BATBlock", "keep_regions", keep_regions)
        super().__init__(in_channels, reduction=r, dropout=dropout, window=s, groups=k, **_IMAGES)  # type: ignore[arg-type]


class _NonLocal(nonlocal_block.NonLocalBlock):
    """The published non-local block over `_DIMENSIONS`."""

    _DIMENSIONS = 3

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
        flag(op, "keep_regions", keep_regions)
        norm = "batch" if flag(op, "bn_layer", bn_layer) else "none"
        super().__init__(
            in_channels, inter_channels, dimensions=self._DIMENSIONS, heads=head, sub_sample=sub_sample,
            scale=use_scale, norm=norm, zero_init=zero_init,
        )  # fmt: skip


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
        if positive_int(op, "inplanes", inplanes) < 2:
            raise ValueError(f"{op}: inplanes is {inplanes}; accepted is an integer > 1: half as many attend")
        planes = inplanes // 2
        self.t, self.p, self.g = (nn.Conv2d(inplanes, planes, 1) for _ in range(3))
        self.z = nn.Conv2d(planes, inplanes, 1)
        self.bn = nn.BatchNorm2d(inplanes)

    def init_modules(self) -> None:
        """Start as published: as the identity."""
        start(self, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        clip_input("model_zoo.non_local.NonLocal", x, self.z, self.bn.num_features, 2)
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
    """Two coarse rows of a window, three columns, two frames."""
    inner = ours if isinstance(ours, bat.BATransform) else ours.batransform
    return 2, ours.in_channels, 2 * inner.temporal_window, 2 * inner.window, 3 * inner.window


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
        lambda ours: (2, ours.bn.num_features, 5, 4), fits=_images,
    )
)  # fmt: skip
for kind in (NONLocalBlock1D, NONLocalBlock2D, NONLocalBlock3D):
    register(_attends(kind))
