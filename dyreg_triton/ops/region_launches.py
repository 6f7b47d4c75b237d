"""Launches of the region kernels, and which of them a call needs."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..configs import lookup
from ..configs.keys import Key
from ..configs.region import Config, key_of
from ..configs.table import SPACES
from .launch import Launch, accumulator, leading, map_layout, planned, precision, register_limit, wider
from .recording import TunedCall


def _launch(
    kernel: Any, key: Key, config: Config, programs: int, features: Tensor, profile: str, *static: Any,
    **constants: Any,
) -> Launch:  # fmt: skip
    """A launch on the map and regions that `key` names."""
    return Launch(
        kernel, programs, key, *static, **constants,
        PROFILE=profile, ACC=accumulator(features.dtype),
        BLOCK_N=config.block_n, BLOCK_P=config.block_p, BLOCK_AXIS=32, num_warps=config.num_warps,
        **register_limit(config.registers, features),
    )  # fmt: skip


def gather(
    x: Tensor, v: Tensor | None, regions: Tensor, profile: str, temperature: float, *, nodes: bool
) -> tuple[Tensor, Tensor]:
    """One pass over map x: (nodes, region gradient), the first empty unless `nodes`, the second unless v is given."""
    launch, pooled_shape, rows_shape = planned(_plan_gather, (x, v, regions), profile, nodes)
    pooled = x.new_empty(pooled_shape)
    rows = x.new_empty(rows_shape, dtype=wider(x.dtype))
    launch(x, x if v is None else v.contiguous(), regions.contiguous(), pooled, rows, temperature)
    return pooled, rows if v is None else _summed(rows, regions)


def _plan_gather(
    x: Tensor, v: Tensor | None, regions: Tensor, profile: str, nodes: bool
) -> tuple[Launch, tuple[int, ...], tuple[int, ...]]:
    """The launch, and the shapes of nodes and of the moments' rows."""
    from ..kernels.region import region_gather

    (channels, height, width), number = x.shape[-3:], regions.shape[-2]
    frames = math.prod(x.shape[:-3])
    key = key_of("gather" if v is None else "gather_moments", frames, number, channels, height * width, x)
    config = lookup.config(key, x)
    c_blocks = -(-channels // config.block_c)
    lead1, lead2, (lead,) = leading(x)
    layout = map_layout(x, lead)
    launch = _launch(
        region_gather, key, config, frames * c_blocks * -(-number // config.block_n), x, profile,
        channels, lead1, lead2, *layout.strides,
        given=3, N=number, H=height, W=width, NODES=nodes, MOMENTS=v is not None,
        PRECISION=precision(x), BLOCK_C=config.block_c, **layout.constants(),
    )  # fmt: skip
    return (
        launch,
        (*x.shape[:-3], number, channels) if nodes else (0,),
        ((0,) if v is None else (frames, c_blocks, number, 4)),
    )


def scatter(y: Tensor, v: Tensor, x: Tensor | None, regions: Tensor, profile: str, temperature: float) -> Tensor | None:
    """Write map y from nodes v; with map x return the region gradient too."""
    launch, rows_shape = planned(_plan_scatter, (y, v, x, regions), profile)
    if launch is None:
        scatter(y, v, None, regions, profile, temperature)
        return gather(cast(Tensor, x), v, regions, profile, temperature, nodes=False)[1]
    rows = y.new_empty(rows_shape, dtype=wider(y.dtype))
    launch(v.contiguous(), y if x is None else x, regions.contiguous(), y, rows, temperature)
    return None if x is None else _summed(rows, regions)


def _plan_scatter(
    y: Tensor, v: Tensor, x: Tensor | None, regions: Tensor, profile: str
) -> tuple[Launch | None, tuple[int, ...]]:
    """The launch, or None where one program cannot hold the moments of all regions; and the shape of their rows."""
    from ..kernels.region import region_scatter

    (channels, height, width), number = y.shape[-3:], regions.shape[-2]
    frames = math.prod(y.shape[:-3])
    key = key_of("scatter" if x is None else "scatter_moments", frames, number, channels, height * width, y)
    config = lookup.config(key, y)
    if x is not None and number > config.block_n:
        return None, ()
    c_blocks = -(-channels // config.block_c)
    read = y if x is None else x
    lead1, lead2, (x_lead, y_lead) = leading(read, y)
    x_layout, y_layout = map_layout(read, x_lead), map_layout(y, y_lead)
    launch = _launch(
        region_scatter, key, config, frames * c_blocks, y, profile,
        channels, lead1, lead2, *x_layout.strides, *y_layout.strides,
        N=number, H=height, W=width, MOMENTS=x is not None,
        PRECISION=precision(y), BLOCK_C=config.block_c, **x_layout.constants("X_"), **y_layout.constants("Y_"),
    )  # fmt: skip
    return launch, (0,) if x is None else (frames, c_blocks, number, 4)


def dense(k: Tensor, regions: Tensor, profile: str, temperature: float) -> None:
    """Write the kernels."""
    planned(_plan_dense, (k, regions), profile)(regions.contiguous(), k, temperature)


def _plan_dense(k: Tensor, regions: Tensor, profile: str) -> Launch:
    from ..kernels.region import region_dense

    number, height, width = k.shape[-3:]
    frames, cells = math.prod(k.shape[:-3]), height * width
    key = key_of("dense", frames, number, 1, cells, k)
    config = lookup.config(key, k)
    programs = frames * -(-number // config.block_n) * -(-cells // config.block_p)
    return _launch(region_dense, key, config, programs, k, profile, N=number, H=height, W=width)


def dense_moments(grad: Tensor, regions: Tensor, profile: str, temperature: float) -> Tensor:
    """The region gradient from that of the kernels."""
    launch, rows_shape = planned(_plan_dense_moments, (grad, regions), profile)
    rows = grad.new_empty(rows_shape, dtype=wider(grad.dtype))
    launch(regions.contiguous(), grad.contiguous(), rows, temperature)
    return _summed(rows, regions)


def _plan_dense_moments(grad: Tensor, regions: Tensor, profile: str) -> tuple[Launch, tuple[int, ...]]:
    from ..kernels.region import region_dense_backward

    number, height, width = grad.shape[-3:]
    frames = math.prod(grad.shape[:-3])
    key = key_of("dense_moments", frames, number, 16, height * width, grad)
    config = lookup.config(key, grad)
    programs = frames * -(-number // config.block_n)
    launch = _launch(region_dense_backward, key, config, programs, grad, profile, N=number, H=height, W=width)
    return launch, (frames, 1, number, 4)


def _summed(rows: Tensor, regions: Tensor) -> Tensor:
    """Region gradients from one row per program, summed in fixed order: bit-identical from run to run."""
    total = rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(1)
    return total.to(regions.dtype).view(regions.shape)


# --- for tuning -----------------------------------------------------------------------------------------------------


def keys_of(call: TunedCall, family: str) -> list[Key]:
    """The keys of the kernels that a call of one of the three ops launches, in order."""
    feature = torch.empty(0, dtype=call.dtype(), device="cpu")
    lead = call.shape("regions")[:-2]
    frames, nodes = math.prod(lead), call.shape("regions")[-2]
    if call.op == "region_pool":
        channels, height, width = call.shape("x")[-3:]
    else:
        height, width = call.options["size"]
        channels = 1 if call.op == "region_kernel" else call.shape("nodes")[-1]

    def key(kind: str, channels: int = channels) -> Key:
        return key_of(kind, frames, nodes, channels, height * width, feature)

    if call.op == "region_kernel":
        return [key("dense")] + ([key("dense_moments", 16)] if call.backward else [])
    if call.op == "region_remap":
        backward = [key("gather_moments" if call.wants("regions") else "gather")] if call.backward else []
        return [key("scatter"), *backward]
    fused = key("scatter_moments")
    one_pass = nodes <= SPACES["region"].default(fused, family).block_n
    if call.wants("x") and call.wants("regions"):
        backward = [fused] if one_pass else [key("scatter"), key("gather_moments")]
    else:
        backward = [key("scatter")] * call.wants("x") + [key("gather_moments")] * call.wants("regions")
    return [key("gather"), *backward]
