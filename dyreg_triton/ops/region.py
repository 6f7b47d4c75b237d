"""Region kernel, pooling and re-mapping (DyReG, Duta et al., equations 5-7, 10 and 14-17).

A region is (cx, cy, w, h) in cells of the map: centre column and row, half-extent in columns and rows. Its kernel is
separable, K[n, h, w] = k_y[n, h] k_x[n, w], each axis a profile f(s, d) of the distance d to the centre, normalised
to sum 1 over the map:

    linear       f = max(0, s - d)
    gaussian     f = exp(-d^2 / (2 s^2))
    log-linear   f = log(1 + temperature * max(0, s - d))

A region with s <= 0 on an axis, or one that reaches no cell, is empty: its kernel and all its gradients are 0.
Sub-gradients at d = 0 and d = s are 0. A NaN region spoils its own node in pooling, and its own map in re-mapping.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .. import reference, tuning
from ..autocast import beside, lowered
from ..dispatch import choose
from ..eager import region as eager
from ..launch import Launch, accumulator, leading, map_layout, planned, precision, register_limit, wider
from ..tuning import calls
from ..validate.region import region_arguments
from .custom import once_only, op, refuse_transforms


def region_kernel(
    regions: Tensor, size: tuple[int, int], *, profile: str = "linear", temperature: float = 1.0
) -> Tensor:
    """The dense kernel K of each region.

    Args:
        regions: (*, N, 4) = (cx, cy, w, h) in cells; float16, bfloat16, float32 or float64.
        size: (H, W), positive.
        profile: "linear", "gaussian" or "log-linear".
        temperature: > 0; sharpness of "log-linear" (equation 17), unused by the others.

    Returns:
        (*, N, H, W) in the dtype of `regions`, contiguous.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype not named above.
        ValueError: a wrong rank, size, profile or temperature.
        RuntimeError: the backend asked for cannot run here.
    """
    size = region_arguments("region_kernel", regions, profile, temperature, size=size)
    name = choose("region_kernel", regions, {"regions": regions, "size": size})
    if calls.recorders:
        calls.note("region_kernel", {"regions": regions}, size=size, profile=profile, temperature=temperature)
    if name == "reference":
        return reference.region_kernel(regions, size, profile=profile, temperature=temperature)
    if name == "triton":
        refuse_transforms("region_kernel", regions)
        return _kernel(regions, *size, profile, float(temperature))
    return eager.region_kernel(regions, size, profile, temperature)


def region_pool(x: Tensor, regions: Tensor, *, profile: str = "linear", temperature: float = 1.0) -> Tensor:
    """Pool one feature vector per region (equation 7): nodes[n, c] = sum_hw K[n, h, w] x[c, h, w].

    Args:
        x: (*, C, H, W), any strides; float16, bfloat16, float32, or float64 (not on a GPU's Triton path).
        regions: (*, N, 4) = (cx, cy, w, h) in cells, with x's leading dimensions; x's dtype or float32.
        profile, temperature: as `region_kernel`.

    On Triton the backward is one launch for up to 16 regions, and two beyond, for the same bytes.

    Returns:
        nodes (*, N, C) in x's dtype, contiguous. Sums accumulate in float32 (float64 for float64). Under autocast x
        is cast to the autocast dtype; regions are not. A cell of weight 0 may be left unread.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype not named above.
        ValueError: a wrong rank, shape, device, profile or temperature.
        RuntimeError: the backend asked for cannot run here.
    """
    return pool_placed(x, None, regions, profile, temperature)


def pool_placed(x: Tensor, position: Tensor | None, regions: Tensor, profile: str, temperature: float) -> Tensor:
    """`region_pool` of x + position, position (C, H, W): a linear map of each region's kernel, added to its node.

    K W^T = pool(W.view(C, H, W)), so an embedding of the kernel needs no kernel.
    """
    region_arguments("region_pool", regions, profile, temperature, x=x)
    x = lowered(x)
    regions = beside(regions, x)
    name = choose("region_pool", x, {"x": x, "regions": regions})
    if calls.recorders:
        calls.note("region_pool", {"x": x, "regions": regions}, profile=profile, temperature=temperature)
    if name == "eager":
        return eager.region_pool(x, regions, profile, temperature, position)
    summands = [x.requires_grad]
    if position is not None:
        summands.append(position.requires_grad)
        x = x + position.to(x.dtype)
    if name == "reference":
        return reference.region_pool(x, regions, profile=profile, temperature=temperature)
    refuse_transforms("region_pool", x, regions)
    lead = x.shape[:-3]
    if len(lead) > 3:  # the kernels address up to three leading dimensions in place
        x, regions = x.flatten(0, -4), regions.flatten(0, -3)
    nodes = _pool(x, regions, summands, profile, float(temperature))
    return nodes if len(lead) <= 3 else nodes.unflatten(0, lead)


def region_remap(
    nodes: Tensor, regions: Tensor, size: tuple[int, int], *, profile: str = "linear", temperature: float = 1.0
) -> Tensor:
    """Map node features back onto their regions (equation 10): y[c, h, w] = sum_n K[n, h, w] nodes[n, c].

    Args:
        nodes: (*, N, C), any strides; dtypes as `region_pool`'s x.
        regions: (*, N, 4) = (cx, cy, w, h) in cells, with the nodes' leading dimensions; their dtype or float32.
        size: (H, W), positive.
        profile, temperature: as `region_kernel`.

    Returns:
        y (*, C, H, W) in the dtype of `nodes`, contiguous; precision and autocast as `region_pool`.

    Raises:
        TypeError, ValueError, RuntimeError: as `region_pool`.
    """
    size = region_arguments("region_remap", regions, profile, temperature, nodes=nodes, size=size)
    nodes = lowered(nodes)
    regions = beside(regions, nodes)
    name = choose("region_remap", nodes, {"nodes": nodes, "regions": regions, "size": size})
    if calls.recorders:
        tensors = {"nodes": nodes, "regions": regions}
        calls.note("region_remap", tensors, size=size, profile=profile, temperature=temperature)
    if name == "reference":
        return reference.region_remap(nodes, regions, size, profile=profile, temperature=temperature)
    if name == "triton":
        refuse_transforms("region_remap", nodes, regions)
        lead = nodes.shape[:-2]
        if len(lead) > 3:
            nodes, regions = nodes.flatten(0, -3), regions.flatten(0, -3)
        y = _remap(nodes, regions, *size, profile, float(temperature))
        return y if len(lead) <= 3 else y.unflatten(0, lead)
    return eager.region_remap(nodes, regions, size, profile, temperature)


# --- the Triton path: launches ------------------------------------------------------------------------------


def _launch(
    kernel: Any, key: tuning.Key, config: tuning.Config, programs: int, features: Tensor, profile: str, *static: Any,
    **constants: Any,
) -> Launch:  # fmt: skip
    """A launch on the map and regions that `key` names."""
    return Launch(
        kernel, programs, key, *static, **constants,
        PROFILE=profile, ACC=accumulator(features.dtype),
        BLOCK_N=config.block_n, BLOCK_P=config.block_p, BLOCK_AXIS=32, num_warps=config.num_warps,
        **register_limit(config.registers, features),
    )  # fmt: skip


def _gather(
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
    key = tuning.region_key("gather" if v is None else "gather_moments", frames, number, channels, height * width, x)
    config = tuning.config(key, x)
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


def _scatter(
    y: Tensor, v: Tensor, x: Tensor | None, regions: Tensor, profile: str, temperature: float
) -> Tensor | None:
    """Write map y from nodes v; with map x return the region gradient too."""
    launch, rows_shape = planned(_plan_scatter, (y, v, x, regions), profile)
    if launch is None:
        _scatter(y, v, None, regions, profile, temperature)
        return _gather(cast(Tensor, x), v, regions, profile, temperature, nodes=False)[1]
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
    key = tuning.region_key("scatter" if x is None else "scatter_moments", frames, number, channels, height * width, y)
    config = tuning.config(key, y)
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


def _dense(k: Tensor, regions: Tensor, profile: str, temperature: float) -> None:
    planned(_plan_dense, (k, regions), profile)(regions.contiguous(), k, temperature)


def _plan_dense(k: Tensor, regions: Tensor, profile: str) -> Launch:
    from ..kernels.region import region_dense

    number, height, width = k.shape[-3:]
    frames, cells = math.prod(k.shape[:-3]), height * width
    key = tuning.region_key("dense", frames, number, 1, cells, k)
    config = tuning.config(key, k)
    programs = frames * -(-number // config.block_n) * -(-cells // config.block_p)
    return _launch(region_dense, key, config, programs, k, profile, N=number, H=height, W=width)


def _dense_moments(grad: Tensor, regions: Tensor, profile: str, temperature: float) -> Tensor:
    launch, rows_shape = planned(_plan_dense_moments, (grad, regions), profile)
    rows = grad.new_empty(rows_shape, dtype=wider(grad.dtype))
    launch(regions.contiguous(), grad.contiguous(), rows, temperature)
    return _summed(rows, regions)


def _plan_dense_moments(grad: Tensor, regions: Tensor, profile: str) -> tuple[Launch, tuple[int, ...]]:
    from ..kernels.region import region_dense_backward

    number, height, width = grad.shape[-3:]
    frames = math.prod(grad.shape[:-3])
    key = tuning.region_key("dense_moments", frames, number, 16, height * width, grad)
    config = tuning.config(key, grad)
    programs = frames * -(-number // config.block_n)
    launch = _launch(region_dense_backward, key, config, programs, grad, profile, N=number, H=height, W=width)
    return launch, (frames, 1, number, 4)


def _summed(rows: Tensor, regions: Tensor) -> Tensor:
    """Region gradients from one row per program, summed in fixed order: bit-identical from run to run."""
    total = rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(1)
    return total.to(regions.dtype).view(regions.shape)


# --- the Triton path: each op is schema, implementation, fake, autograd, and a backward op of its own -------


@op("region_pool")
def _pool(x: Tensor, regions: Tensor, summands: list[bool], profile: str, temperature: float) -> Tensor:
    """`summands` is for counting: of each map whose sum x is, whether it wants a gradient."""
    nodes = x.new_empty(*x.shape[:-3], regions.shape[-2], x.shape[-3])
    if nodes.numel() == 0 or x.numel() == 0:
        return nodes.zero_()
    return _gather(x, None, regions, profile, temperature, nodes=True)[0]


@_pool.register_fake
def _(x: Tensor, regions: Tensor, summands: list[bool], profile: str, temperature: float) -> Tensor:
    return x.new_empty(*x.shape[:-3], regions.shape[-2], x.shape[-3])


def _pooled(x: Tensor, regions: Tensor) -> int:
    """What the product of kernels (N, H*W) and a map counts."""
    return 2 * math.prod(regions.shape[:-1]) * math.prod(x.shape[-3:])


@_pool.register_flops
def _(x: Tensor, regions: Tensor, summands: list[bool], profile: str, temperature: float) -> int:
    return len(summands) * _pooled(x, regions)  # eager pools each alone


@op("region_pool_backward")
def _pool_backward(
    grad: Tensor, x: Tensor, regions: Tensor, summands: list[bool], profile: str, temperature: float, need_x: bool,
    need_regions: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0 or regions.numel() == 0:
        by_x, by_regions = _pool_gradients(x, regions, need_x, need_regions)
        return by_x.zero_(), by_regions.zero_()
    if not need_x:
        return x.new_empty(0), _gather(x, grad, regions, profile, temperature, nodes=False)[1]
    by_x = torch.empty_like(x)
    moments = _scatter(by_x, grad, x if need_regions else None, regions, profile, temperature)
    return by_x, regions.new_empty(0) if moments is None else moments


def _pool_gradients(x: Tensor, regions: Tensor, need_x: bool, need_regions: bool) -> tuple[Tensor, Tensor]:
    by_x = torch.empty_like(x) if need_x else x.new_empty(0)
    return by_x, regions.new_empty(regions.shape if need_regions else 0)


@_pool_backward.register_fake
def _(grad, x, regions, summands, profile, temperature, need_x, need_regions):
    return _pool_gradients(x, regions, need_x, need_regions)


@_pool_backward.register_flops
def _(grad, x, regions, summands, profile, temperature, need_x, need_regions):
    return (need_x * sum(summands) + need_regions * len(summands)) * _pooled(x, regions)


@op("region_remap")
def _remap(nodes: Tensor, regions: Tensor, height: int, width: int, profile: str, temperature: float) -> Tensor:
    y = nodes.new_empty(*nodes.shape[:-2], nodes.shape[-1], height, width)
    if y.numel() == 0 or nodes.numel() == 0:
        return y.zero_()
    _scatter(y, nodes, None, regions, profile, temperature)
    return y


@_remap.register_fake
def _(nodes: Tensor, regions: Tensor, height: int, width: int, profile: str, temperature: float) -> Tensor:
    return nodes.new_empty(*nodes.shape[:-2], nodes.shape[-1], height, width)


@_remap.register_flops
def _(nodes: Tensor, regions: Tensor, height: int, width: int, profile: str, temperature: float) -> int:
    return 2 * math.prod(nodes.shape) * height * width


@op("region_remap_backward")
def _remap_backward(
    grad: Tensor, nodes: Tensor, regions: Tensor, profile: str, temperature: float, need_nodes: bool, need_regions: bool
) -> tuple[Tensor, Tensor]:
    if grad.numel() == 0 or regions.numel() == 0:
        by_nodes, by_regions = _remap_gradients(nodes, regions, need_nodes, need_regions)
        return by_nodes.zero_(), by_regions.zero_()
    v = nodes if need_regions else None
    by_nodes, by_regions = _gather(grad, v, regions, profile, temperature, nodes=need_nodes)
    return by_nodes, by_regions if need_regions else regions.new_empty(0)


def _remap_gradients(nodes: Tensor, regions: Tensor, need_nodes: bool, need_regions: bool) -> tuple[Tensor, Tensor]:
    return nodes.new_empty(nodes.shape if need_nodes else 0), regions.new_empty(regions.shape if need_regions else 0)


@_remap_backward.register_fake
def _(
    grad: Tensor, nodes: Tensor, regions: Tensor, profile: str, temperature: float, need_nodes: bool, need_regions: bool
):
    return _remap_gradients(nodes, regions, need_nodes, need_regions)


@_remap_backward.register_flops
def _(grad, nodes, regions, profile, temperature, need_nodes, need_regions):
    return (need_nodes + need_regions) * 2 * math.prod(nodes.shape) * math.prod(grad.shape[-2:])


@op("region_kernel")
def _kernel(regions: Tensor, height: int, width: int, profile: str, temperature: float) -> Tensor:
    k = regions.new_empty(*regions.shape[:-1], height, width)
    if k.numel():
        _dense(k, regions, profile, temperature)
    return k


@_kernel.register_fake
def _(regions: Tensor, height: int, width: int, profile: str, temperature: float) -> Tensor:
    return regions.new_empty(*regions.shape[:-1], height, width)


@_kernel.register_flops
def _(*_: Any) -> int:
    return 0  # an outer product, which is elementwise


@op("region_kernel_backward")
def _kernel_backward(grad: Tensor, regions: Tensor, profile: str, temperature: float) -> Tensor:
    if grad.numel() == 0:
        return regions.new_zeros(regions.shape)
    return _dense_moments(grad, regions, profile, temperature)


@_kernel_backward.register_fake
def _(grad: Tensor, regions: Tensor, profile: str, temperature: float) -> Tensor:
    return regions.new_empty(regions.shape)


@_kernel_backward.register_flops
def _(*_: Any) -> int:
    return 0


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.options = [a for a in inputs if not isinstance(a, Tensor)]
    ctx.rest = (None,) * (len(inputs) - 2)
    ctx.save_for_backward(*[t for t in inputs if isinstance(t, Tensor)])


def _wanted(ctx: Any, *gradients: Tensor) -> tuple:
    """The gradients that were asked for, and None for every other input."""
    return tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)) + ctx.rest


def _pool_autograd(ctx: Any, grad: Tensor) -> tuple:
    return _wanted(ctx, *_pool_backward(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:2]))


def _remap_autograd(ctx: Any, grad: Tensor) -> tuple:
    return _wanted(ctx, *_remap_backward(grad, *ctx.saved_tensors, *ctx.options[2:], *ctx.needs_input_grad[:2]))


def _kernel_autograd(ctx: Any, grad: Tensor) -> tuple:
    return (_kernel_backward(grad, *ctx.saved_tensors, *ctx.options[2:]), None, None, None, None)


_pool.register_autograd(_pool_autograd, _setup)
_remap.register_autograd(_remap_autograd, _setup)
_kernel.register_autograd(_kernel_autograd, _setup)
once_only(_pool_backward, "region_pool")
once_only(_remap_backward, "region_remap")
once_only(_kernel_backward, "region_kernel")
