"""Whether backends agree on the trained regions, and how long the layer takes beside the published formulation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._core import dispatch
from .._core.numerics import relative_error
from ..layers.dyreg import DynamicGraph
from . import published


def _pool_and_remap(x: Tensor, regions: Tensor, profile: str) -> list[Tensor]:
    """Nodes, the map they are written back to, and the gradients for x and the regions."""
    x, regions = x.detach().requires_grad_(), regions.detach().requires_grad_()
    nodes = ops.region_pool(x, regions, profile=profile)
    y = ops.region_remap(nodes, regions, (x.shape[-2], x.shape[-1]), profile=profile)
    gradients = torch.autograd.grad((y * x.detach()).sum(), (x, regions))
    return [nodes.detach(), y.detach(), *gradients]


def agreement(x: Tensor, regions: Tensor, profile: str) -> dict[str, float | str]:
    """By backend, the largest relative L2 difference to the reference in float64, or why it cannot run here."""
    with dispatch.backend("reference"):
        expected = _pool_and_remap(x.double(), regions.double(), profile)
    found: dict[str, float | str] = {}
    for name in ("triton", "eager", "reference"):
        reason = dispatch.why_not(name, x.device, x.dtype)
        if reason is None:
            with dispatch.backend(name):
                found[name] = max(map(relative_error, _pool_and_remap(x, regions, profile), expected))
        else:
            found[name] = reason
    return found


class Times(NamedTuple):
    """Medians in seconds of a forward and backward, and how far apart the outputs are (relative L2)."""

    ours: float
    published: float
    difference: float


def _timed(run: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    (run(x) * weight).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_times(layer: DynamicGraph, x: Tensor, *, rounds: int) -> Times:
    """Time both on the same input and parameters, in turns, so that a busy machine disturbs both alike."""

    def ours(x: Tensor) -> Tensor:
        return layer(x)[0]

    def plain(x: Tensor) -> Tensor:
        return published.branch(layer, x)

    layer.train()  # cuDNN's recurrences have a backward in training only; nothing in the layer differs otherwise
    x = x.detach().requires_grad_()
    with torch.no_grad():
        expected = plain(x)
        difference = relative_error(ours(x), expected.double())
    weight = torch.randn(
        expected.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(0), dtype=torch.float32
    )
    samples: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 2):
        for run, kept in zip((ours, plain), samples, strict=True):
            x.grad = None
            layer.zero_grad(set_to_none=True)
            seconds = _timed(run, x, weight)
            if turn >= 2:  # the first turns warm caches up, or compile
                kept.append(seconds)
    return Times(statistics.median(samples[0]), statistics.median(samples[1]), difference)
