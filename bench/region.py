"""`python -m bench run region`: pooling and re-mapping, forward and forward + backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dyreg_triton as dt

from .measure import Machine, relative_error, rotated

NODES = 9
SHAPES = {  # (frames, C, H, W)
    "cuda": [
        (160, 512, 14, 14), (160, 2048, 7, 7), (160, 256, 28, 28),
        (512, 512, 28, 28), (64, 256, 56, 56), (16, 64, 16, 16),
    ],
    "cpu": [(80, 32, 16, 16), (16, 512, 14, 14), (8, 256, 28, 28), (4, 64, 56, 56)],
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def published_kernel(regions: Tensor, height: int, width: int) -> Tensor:
    """The dense kernel, normalised over the map, as the published code forms it."""
    cx, cy, w, h = (t[..., None] for t in regions.unbind(-1))
    rows = torch.arange(height, device=regions.device)
    columns = torch.arange(width, device=regions.device)
    k = F.relu(h - (rows - cy).abs())[..., :, None] * F.relu(w - (columns - cx).abs())[..., None, :]
    return k / (k.sum((-2, -1), keepdim=True) + 1e-37)


def published_pool(x: Tensor, regions: Tensor) -> Tensor:
    k = published_kernel(regions, *x.shape[-2:]).to(x.dtype)
    return (x.flatten(2) @ k.flatten(2).transpose(1, 2)).transpose(1, 2)


def published_remap(nodes: Tensor, regions: Tensor, height: int, width: int) -> Tensor:
    k = published_kernel(regions, height, width).to(nodes.dtype)
    return (nodes.transpose(1, 2) @ k.flatten(2)).unflatten(-1, (height, width))


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, init: str, seed: int = 0):
    """(x, nodes, regions) with regions as a fresh DyReG layer has them, jittered off the kinks."""
    frames, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(frames, NODES, 4, generator=generator) * 0.1
    regions = dt.layers.regions_from_offsets(noise, grid=(3, 3), size=(height, width), init=init).to(device)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    nodes = torch.randn(frames, NODES, channels, generator=generator).to(device, dtype)
    return x, nodes, regions


def _stages(shape: tuple[int, ...]) -> dict[str, tuple[Callable, Callable, int]]:
    """Per stage: ours and the published one as (features, regions) -> result, and which input the features are."""
    _, _, height, width = shape
    return {
        "region_pool": (dt.ops.region_pool, published_pool, 0),
        "region_remap": (
            lambda v, r: dt.ops.region_remap(v, r, (height, width)),
            lambda v, r: published_remap(v, r, height, width),
            1,
        ),
    }


def _floor_bytes(op: str, backward: bool, x: Tensor, nodes: Tensor, regions: Tensor) -> int:
    """Bytes that cannot be avoided: each map, and each set of nodes and regions, once per use."""
    a, v, r = (t.numel() * t.element_size() for t in (x, nodes, regions))
    if op == "region_pool":  # x -> nodes; then x and grad nodes -> grad x and grad regions
        return a + v + r + (2 * a + v + 2 * r if backward else 0)
    return a + v + r + (a + 2 * v + 2 * r if backward else 0)  # nodes -> y; then grad y -> grad nodes, grad regions


def run(machine: Machine, *, quick: bool) -> Iterator[dict[str, Any] | None]:
    """A row for every shape, dtype and stage as it is measured; None for one whose results were wrong."""
    device = machine.device
    shapes = SHAPES["cuda" if device.type == "cuda" else "cpu"]
    dtypes = [torch.bfloat16, torch.float32] if device.type == "cuda" else [torch.float32]
    cells = [(s, d, i) for s in (shapes[:1] if quick else shapes) for d in dtypes for i in ("center", "grid")]
    for shape, dtype, init in cells[: 1 if quick else None]:
        for op, (ours, published, which) in _stages(shape).items():
            torch._dynamo.reset()
            compiled = None if quick else torch.compile(published)
            contenders = {"ours": ours, "published": published, "compiled": compiled}
            contenders = {name: call for name, call in contenders.items() if call is not None}
            for backward in (False, True):
                row = _row(machine, shape, dtype, init, op, which, contenders, backward)
                if row is None:
                    print(f"WRONG, not kept: {op} {shape} {dtype}")
                else:
                    print(_line(row))
                yield row


def _row(
    machine: Machine,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    init: str,
    op: str,
    which: int,
    contenders: dict[str, Callable],
    backward: bool,
) -> dict[str, Any] | None:
    """Time the contenders that are right; None where ours is not."""
    device = machine.device
    tensors = _inputs(shape, dtype, device, init)
    x, nodes, regions = tensors
    gradient = torch.randn_like(nodes if op == "region_pool" else x)

    def step(call: Callable, features: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (call(features, r),)
        features, r = features.detach().requires_grad_(), r.detach().requires_grad_()
        result = call(features, r)
        return result, *torch.autograd.grad(result, (features, r), g.to(result.dtype))

    with dt.backend("reference"):
        exact = step(contenders["ours"], tensors[which].double(), regions.double(), gradient.double())
    errors = {
        name: relative_error(step(call, tensors[which], regions, gradient), exact) for name, call in contenders.items()
    }

    contenders = {name: call for name, call in contenders.items() if errors[name] <= TOLERANCE[dtype]}
    if "ours" not in contenders:
        return None

    def make() -> tuple[Tensor, ...]:
        return tensors[which].clone(), regions.clone(), gradient.clone()

    sources = {name: rotated(make, device) for name in contenders}
    calls = [lambda name=name, call=call: step(call, *sources[name]()) for name, call in contenders.items()]
    seconds = dict(zip(contenders, machine.interleaved(calls), strict=True))
    wall = dict(zip(contenders, machine.wall(calls), strict=True))
    extra = {name: machine.extra_bytes(call) for name, call in zip(contenders, calls, strict=True)}
    floor_bytes = _floor_bytes(op, backward, x, nodes, regions)
    return {
        "op": op,
        "mode": "forward+backward" if backward else "forward",
        "shape": list(shape),
        "nodes": NODES,
        "init": init,
        "dtype": str(dtype)[6:],
        "seconds": seconds,
        "wall_seconds": wall,
        "speedup": {name: seconds[name] / seconds["ours"] for name in contenders if name != "ours"},
        "wall_speedup": {name: wall[name] / wall["ours"] for name in contenders if name != "ours"},
        "floor_bytes": floor_bytes,
        "floor_seconds": floor_bytes / machine.bandwidth,
        "of_floor": floor_bytes / machine.bandwidth / seconds["ours"],
        "extra_bytes": extra,
        "errors": errors,
    }


def _line(row: dict[str, Any]) -> str:
    ratios = ", ".join(f"{value:.2f}x {name}" for name, value in row["speedup"].items())
    return (
        f"{row['op']:13} {row['mode']:17} {'x'.join(map(str, row['shape'])):16} {row['init']:7} {row['dtype']:9}"
        f"{row['seconds']['ours'] * 1e3:9.3f} ms, {ratios}, {row['of_floor']:.0%} of the floor's speed, "
        f"error {row['errors']['ours']:.0e}"
    )
