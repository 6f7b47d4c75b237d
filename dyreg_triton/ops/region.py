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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._core.autocast import beside, lowered
from .._core.dispatch import choose
from ..configs.region import SPACE
from ..eager import region as eager
from ..validate.region import OPERANDS, region_arguments
from . import recording
from . import region_launches as launches
from .custom import once_only, op, refuse_transforms
from .spec import OpSpec


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
    if recording.recorders:
        recording.record(
            "region_kernel", {"regions": regions}, _CHANNELS, size=size, profile=profile, temperature=temperature
        )
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
    if recording.recorders:
        recording.record(
            "region_pool", {"x": x, "regions": regions}, _CHANNELS, profile=profile, temperature=temperature
        )
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
    if recording.recorders:
        tensors = {"nodes": nodes, "regions": regions}
        recording.record("region_remap", tensors, _CHANNELS, size=size, profile=profile, temperature=temperature)
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


# --- the Triton path: each op is schema, implementation, fake, autograd, and a backward op of its own ---------------


@op("region_pool")
def _pool(x: Tensor, regions: Tensor, summands: list[bool], profile: str, temperature: float) -> Tensor:
    """`summands` is for counting: of each map whose sum x is, whether it wants a gradient."""
    nodes = x.new_empty(*x.shape[:-3], regions.shape[-2], x.shape[-3])
    if nodes.numel() == 0 or x.numel() == 0:
        return nodes.zero_()
    return launches.gather(x, None, regions, profile, temperature, nodes=True)[0]


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
        return x.new_empty(0), launches.gather(x, grad, regions, profile, temperature, nodes=False)[1]
    by_x = torch.empty_like(x)
    moments = launches.scatter(by_x, grad, x if need_regions else None, regions, profile, temperature)
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
    launches.scatter(y, nodes, None, regions, profile, temperature)
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
    by_nodes, by_regions = launches.gather(grad, v, regions, profile, temperature, nodes=need_nodes)
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
        launches.dense(k, regions, profile, temperature)
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
    return launches.dense_moments(grad, regions, profile, temperature)


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


# --- what they are, in the table of ops -----------------------------------------------------------------------------

_CHANNELS = {"x": -3}
_FORMS = {"x": "(*, C, H, W)", "nodes": "(*, N, C)", "regions": "(*, N, 4)"}
_MAPS = ((256, 28), (512, 14), (2048, 7))  # channels and side of a ResNet-50's last three stages


def _checked(op: str) -> Callable[[Mapping[str, Any], Mapping[str, Any]], object]:
    def check(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> object:
        given = {"profile": "linear", "temperature": 1.0, **options, **tensors}
        if isinstance(given.get("size"), list):
            given["size"] = tuple(given["size"])
        return region_arguments(op, **given)

    return check


def _call(op: str, frames: int, channels: int, side: int, dtype: str) -> recording.TunedCall:
    """Of nine regions."""
    shapes = {"x": (frames, channels, side, side), "nodes": (frames, 9, channels)}
    names = OPERANDS[op]
    tensors = {name: recording.described(shapes[name], dtype) for name in names if name != "regions"}
    tensors["regions"] = recording.described((frames, 9, 4), "float32")
    size = {} if "x" in names else {"size": [side, side]}
    return recording.TunedCall(op, tensors, {**size, "profile": "linear", "temperature": 1.0}, True)


def _spec(function: Callable[..., Tensor], *options: str, maps: Sequence[tuple[int, int]] = ()) -> OpSpec:
    op = function.__name__
    return OpSpec(
        name=op,
        function=function,
        reference=getattr(reference, op),
        tensors={name: _FORMS[name] for name in OPERANDS[op]},
        optional=(),
        options=(*options, "profile", "temperature"),
        channels=_CHANNELS,
        check=_checked(op),
        space=SPACE,
        keys=launches.keys_of,
        papers=lambda dtype: [_call(op, 160, channels, side, dtype) for channels, side in maps],  # 16 clips, 10 frames
        quick=lambda dtype: [_call(op, 16, 64, 14, dtype)] if maps else [],
    )


SPECS = (
    _spec(region_pool, maps=_MAPS),
    _spec(region_remap, "size", maps=_MAPS),
    _spec(region_kernel, "size"),  # no network calls it
)
