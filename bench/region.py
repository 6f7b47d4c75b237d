"""`python -m bench run region`: pooling and re-mapping, forward and forward + backward.

Rows come in parts: "stage", maps as networks have them; "small", where launching takes longer than computing, on CUDA
replayed as a graph too; "nodes", "channels" and "batch", cost against the number of regions, channels and frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import dyreg_triton as dt
from dyreg_triton._core.numerics import TOLERANCE

from .measure import Machine
from .rows import DTYPES, Cell, Check, Contender, Floor, Rank, Rows, Tensors, compared, line, name_of

OPS = ("region_pool", "region_remap")


@dataclass(frozen=True)
class Problem:
    """A map (frames, C, H, W) and its regions, a square number, as a fresh DyReG layer has them."""

    frames: int
    channels: int
    height: int
    width: int
    nodes: int = 9
    init: str = "center"

    @property
    def label(self) -> str:
        return f"{self.frames}x{self.channels}x{self.height}x{self.width}, N {self.nodes}, {self.init}"

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def inputs(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        """x, nodes and regions; the regions jittered off the kinks."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.frames, self.nodes, 4, generator=generator, dtype=torch.float32, device="cpu") * 0.1
        side = math.isqrt(self.nodes)
        regions = dt.layers.regions_from_offsets(noise, grid=(side, side), size=self.size, init=self.init)
        x = torch.randn(self.frames, self.channels, *self.size, generator=generator, dtype=torch.float32, device="cpu")
        nodes = torch.randn(
            self.frames, self.nodes, self.channels, generator=generator, dtype=torch.float32, device="cpu"
        )
        return x.to(device, dtype), nodes.to(device, dtype), regions.to(device)

    def floor(self, op: str, backward: bool, dtype: torch.dtype, regions: Tensor) -> Floor:
        """Each map, and each set of nodes and regions, once per use; a multiply-add of every channel where a region
        reaches a cell, and as many for each of the backward's two gradients."""
        a = self.frames * self.channels * self.height * self.width * dtype.itemsize
        v = self.frames * self.nodes * self.channels * dtype.itemsize
        r = regions.numel() * regions.element_size()
        moved = a + v + r
        if backward and op == "region_pool":  # x and grad nodes -> grad x and grad regions
            moved += 2 * a + v + 2 * r
        elif backward:  # grad y and nodes -> grad nodes and grad regions
            moved += a + 2 * v + 2 * r
        reached = int(dt.reference.region_kernel(regions, self.size).count_nonzero())
        return Floor(moved, 2 * self.channels * reached * (3 if backward else 1))


# --- contenders -----------------------------------------------------------------------------------------------------


def published_kernel(regions: Tensor, height: int, width: int) -> Tensor:
    """The dense kernel, normalised over the map, as the published code forms it."""
    cx, cy, w, h = (t[..., None] for t in regions.unbind(-1))
    rows = torch.arange(height, device=regions.device, dtype=torch.int64)
    columns = torch.arange(width, device=regions.device, dtype=torch.int64)
    k = F.relu(h - (rows - cy).abs())[..., :, None] * F.relu(w - (columns - cx).abs())[..., None, :]
    return k / (k.sum((-2, -1), keepdim=True) + 1e-37)


def published_pool(x: Tensor, regions: Tensor, size: tuple[int, int]) -> Tensor:
    k = published_kernel(regions, *size).to(x.dtype)
    return (x.flatten(2) @ k.flatten(2).transpose(1, 2)).transpose(1, 2)


def published_remap(nodes: Tensor, regions: Tensor, size: tuple[int, int]) -> Tensor:
    k = published_kernel(regions, *size).to(nodes.dtype)
    return (nodes.transpose(1, 2) @ k.flatten(2)).unflatten(-1, size)


def our_pool(x: Tensor, regions: Tensor, size: tuple[int, int]) -> Tensor:
    return dt.ops.region_pool(x, regions)


def our_remap(nodes: Tensor, regions: Tensor, size: tuple[int, int]) -> Tensor:
    return dt.ops.region_remap(nodes, regions, size)


Call = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
OURS: dict[str, Call] = {"region_pool": our_pool, "region_remap": our_remap}
PUBLISHED: dict[str, Call] = {"region_pool": published_pool, "region_remap": published_remap}


def _step(
    call: Call, size: tuple[int, int], backward: bool, features: Tensor, regions: Tensor, gradient: Tensor
) -> Tensors:
    """The op's result, and with `backward` the gradients of features and regions."""
    if not backward:
        with torch.no_grad():
            return (call(features, regions, size),)
    features, regions = features.detach().requires_grad_(), regions.detach().requires_grad_()
    result = call(features, regions, size)
    return result, *torch.autograd.grad(result, (features, regions), gradient)


def _given(op: str, problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[Tensors, Tensors]:
    """Features, regions and the result's gradient; and, in float64, the result and the gradients that it has."""
    x, nodes, regions = problem.inputs(dtype, device)
    features, like = (x, nodes) if op == "region_pool" else (nodes, x)
    given = features, regions, torch.randn_like(like)
    with dt.backend("reference"):
        return given, _step(OURS[op], problem.size, True, *(t.double() for t in given))


# --- cells ----------------------------------------------------------------------------------------------------------

STAGES = {
    "cuda": [
        Problem(160, 512, 14, 14), Problem(160, 2048, 7, 7), Problem(160, 256, 28, 28),
        Problem(512, 512, 28, 28), Problem(64, 256, 56, 56), Problem(16, 64, 16, 16),
    ],
    "cpu": [Problem(80, 32, 16, 16), Problem(16, 512, 14, 14), Problem(8, 256, 28, 28), Problem(4, 64, 56, 56)],
}  # fmt: skip
INITS = ("center", "grid")
SMALL = Problem(8, 64, 14, 14)
SWEPT = {"cuda": Problem(160, 512, 14, 14, init="grid"), "cpu": Problem(16, 128, 14, 14, init="grid")}
NODES = {"cuda": (1, 4, 9, 16, 36, 64), "cpu": (1, 9, 25, 64)}
CHANNELS = {"cuda": (64, 256, 1024, 2048), "cpu": (32, 128, 512)}
FRAMES = {"cuda": (8, 32, 128, 512), "cpu": (4, 16, 64)}


def checks(machine: Machine) -> Iterator[Check]:
    """Both ops on the small problem, forward and backward, in every dtype measured."""

    def error(op: str, dtype: torch.dtype) -> float:
        given, wanted = _given(op, SMALL, dtype, machine.device)
        return Contender(partial(_step, OURS[op], SMALL.size, True), given, wanted).error()

    for dtype in DTYPES[machine.device.type]:
        for op in OPS:
            yield Check(op, f"{SMALL.label}, {name_of(dtype)}", partial(error, op, dtype), TOLERANCE[dtype])


def cells(kind: str, *, quick: bool) -> Iterator[Cell]:
    """What a run measures on "cuda" or "cpu"; a quick one the small problem only."""
    first, *others = DTYPES[kind]
    swept = SWEPT[kind]

    def each(rank: int, part: str, problems: Sequence[Problem], dtype: torch.dtype = first) -> Iterator[Cell]:
        for op in OPS:
            rows = partial(_rows, op, part, problems, dtype)
            yield Cell(rank, op, part, f"{problems[0].label}, {name_of(dtype)}", 2 * len(problems), rows)

    yield from each(Rank.SMALL, "small", [SMALL])
    if quick:
        return
    for i, problem in enumerate(STAGES[kind]):
        yield from each(Rank.STAGE + i, "stage", [replace(problem, init=init) for init in INITS])
        for dtype in others:
            yield from each(Rank.OTHER + i, "stage", [problem], dtype)
    for part, problems in {
        "nodes": [replace(swept, nodes=n) for n in NODES[kind]],
        "channels": [replace(swept, channels=n) for n in CHANNELS[kind]],
        "batch": [replace(swept, frames=n) for n in FRAMES[kind]],
    }.items():
        for i, problem in enumerate(problems):
            yield from each(Rank.SWEEP + i, part, [problem])


def _rows(op: str, part: str, problems: Sequence[Problem], dtype: torch.dtype, machine: Machine) -> Rows:
    """Forward, then forward and backward, of each problem: all of one size."""
    calls = {"ours": OURS[op], "published": PUBLISHED[op]}
    if part == "stage":
        torch._dynamo.reset()
        calls["compiled"] = torch.compile(PUBLISHED[op], dynamic=False)
    for problem in problems:
        given, wanted = _given(op, problem, dtype, machine.device)
        for backward in (False, True):
            contenders = {
                name: Contender(partial(_step, call, problem.size, backward), given, wanted)
                for name, call in calls.items()
            }
            about = {
                "suite": "region",
                "op": op,
                "part": part,
                "label": problem.label,
                "mode": "forward+backward" if backward else "forward",
                "shape": [problem.frames, problem.channels, *problem.size],
                "nodes": problem.nodes,
                "channels": problem.channels,
                "batch": problem.frames,
                "init": problem.init,
            }
            floor = problem.floor(op, backward, dtype, given[1])
            row = compared(machine, contenders, about, dtype, floor, graphs=part == "small")
            if row is not None:
                print(line(row))
            yield row
