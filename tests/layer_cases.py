"""Every public layer and published module, with the options that change what it computes, and a small input's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

import dyreg_triton as dt

CLIP = (2, 8, 4, 4, 5)  # (B, C, T, H, W)
MAPS = (2, 3, 8, 6, 7)  # (B, T, C, H, W)
NODES = (2, 3, 4, 8)  # (B, T, N, C)


class LayerCase(NamedTuple):
    """A layer, small, and the shape of an input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _rstg(**options: Any) -> LayerCase:
    return LayerCase(lambda: dt.layers.RSTG(8, **options), NODES)


def _dyreg(**options: Any) -> LayerCase:
    options = {"grid": (2, 2), "region_channels": 6} | options
    return LayerCase(lambda: dt.layers.DyReG(8, (6, 7), **options), MAPS)


def _rsa(**options: Any) -> LayerCase:
    return LayerCase(lambda: dt.layers.RSA(8, **{"num_queries": 2, "kernel_size": 3} | options), CLIP)


def _bat(dimensions: int = 3, **options: Any) -> LayerCase:
    options = {"window": 2, "temporal_window": 2, "groups": 2, "dimensions": dimensions} | options
    return LayerCase(lambda: dt.layers.BATransform(8, **options), CLIP if dimensions == 3 else (2, 8, 4, 5))


def _block(dimensions: int = 3, **options: Any) -> LayerCase:
    options = {"window": 2, "temporal_window": 2, "groups": 2, "dimensions": dimensions} | options
    return LayerCase(lambda: dt.layers.BATBlock(8, **options), CLIP if dimensions == 3 else (2, 8, 4, 5))


def _attends(dimensions: int = 3, **options: Any) -> LayerCase:
    shape = {1: (2, 8, 6), 2: (2, 8, 4, 5), 3: CLIP}[dimensions]
    return LayerCase(lambda: dt.layers.NonLocalBlock(8, dimensions=dimensions, **options), shape)


def _published(name: str, shape: tuple[int, ...], **arguments: Any) -> LayerCase:
    return LayerCase(lambda: dt.compat.build(name, **arguments), shape)


LAYERS: dict[str, LayerCase] = {
    "RSTG": _rstg(),
    "RSTG published": _rstg(
        recurrence="lstm", combine="sum", send_layers=1, update_layers=0, order="time-space"
    ),
    "RSTG mean": _rstg(aggregation="mean", send_layers=1, update_layers=1),
    "DyReG": _dyreg(),
    "DyReG published": _dyreg(**dt.layers.dyreg.PUBLISHED),
    "DyReG projected": _dyreg(node_channels=6, profile="gaussian"),
    "DyReG pooled": _dyreg(generator="pooled", profile="log-linear"),
    "DyReG position": _dyreg(regions="position", size_ratio=3.0),
    "DyReG constant_time": _dyreg(regions="constant_time"),
    "DyReG static": _dyreg(regions="static"),
    "DyReG grid": _dyreg(regions="grid"),
    "DyReG semantic": _dyreg(regions="semantic", weights_over="nodes"),
    "DyReG serial": _dyreg(connection="serial"),
    "DyReG larger": _dyreg(train_size=(4, 5)),
    "RSA": _rsa(),
    "RSA basic": _rsa(kernel="V", context="V"),
    "RSA basic as published": _rsa(kernel="V", context="V", basic_projection=False),
    "RSA relational": _rsa(kernel="R", context="R"),
    "RSA strided": _rsa(stride=2, correlation_groups=1),
    "BATransform": _bat(),
    "BATransform frames apart": _bat(temporal_groups=0, normalisation="sigmoid", softmax_axis="output"),
    "BATransform images": _bat(2),
    "BATBlock": _block(),
    "BATBlock images": _block(2, normalisation="sigmoid", window_rule="logit"),
    "NonLocalBlock": _attends(),
    "NonLocalBlock images": _attends(2, norm="group", heads=2),
    "NonLocalBlock sequences": _attends(1, norm="none", sub_sample=False, scale=False),
    "NonLocalBlock zero_init batch": _attends(zero_init=True),
    "NonLocalBlock zero_init group": _attends(zero_init=True, norm="group"),
    "NonLocalBlock zero_init none": _attends(zero_init=True, norm="none"),
    "ops.rstg.RSTG": _published("ops.rstg.RSTG", (2, 3, 8, 4), node_dim=8, num_nodes=4),
    "ops.dyreg.DynamicGraph": _published(
        "ops.dyreg.DynamicGraph", (2, 3, 8, 6, 6), params={"offset_lstm_dim": 6}, backbone_dim=8, node_dim=8, H=6, W=6
    ),
    "ops.dyreg.DynamicGraphWrapper": _published(
        "ops.dyreg.DynamicGraphWrapper", (2, 3, 8, 6, 6), params={"offset_lstm_dim": 6, "offset_generator": "small"},
        in_channels=8, node_dim=6, H=6, W=6, project_i3d=True,
    ),
    "ops.rsa.RSA": _published(
        "ops.rsa.RSA", CLIP, d_in=8, d_out=8, nh=2, dk=4, kernel_size=(3, 3, 3), kernel_type="VplusR",
        feat_type="VplusR",
    ),
    "models.non_local.BATransform": _published(
        "models.non_local.BATransform", CLIP, in_channels=8, s=2, ts=2, k=2, tk=2
    ),
    "models.non_local.BATBlock": _published("models.non_local.BATBlock", CLIP, in_channels=8, s=2, ts=2, k=2),
    "models.non_local.NONLocalBlock1D": _published("models.non_local.NONLocalBlock1D", (2, 8, 6), in_channels=8),
    "models.non_local.NONLocalBlock2D": _published("models.non_local.NONLocalBlock2D", (2, 8, 4, 5), in_channels=8),
    "models.non_local.NONLocalBlock3D": _published(
        "models.non_local.NONLocalBlock3D", CLIP, in_channels=8, zero_init=True
    ),
    "model_zoo.non_local.BATransform": _published(
        "model_zoo.non_local.BATransform", (2, 8, 4, 4), in_channels=8, s=2, k=2
    ),
    "model_zoo.non_local.BATBlock": _published("model_zoo.non_local.BATBlock", (2, 8, 4, 4), in_channels=8, s=2, k=2),
    "model_zoo.non_local.NonLocal": _published("model_zoo.non_local.NonLocal", (2, 8, 4, 5), inplanes=8),
}  # fmt: skip
