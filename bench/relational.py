"""`python -m bench run relational`: relational self-attention, forward and forward + backward.

Rows come in parts: "stage", the layers of RSANet-R50; "small", where launching takes longer than computing, on CUDA
replayed as a graph too; "taps", "channels" and "batch", cost against the window's M, a query's channels and the batch;
"table1", the paper's Table 1: the transform before it is made efficient, made efficient, with L queries, and ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import dyreg_triton as dt
from dyreg_triton._core.numerics import TOLERANCE

from .measure import Machine, relative_error
from .rows import DTYPES, Cell, Check, Contender, Floor, Rank, Row, Rows, Tensors, compared, line, name_of

OP = "relational_attention"
EPS = 1e-6
WINDOW = (5, 7, 7)
QUERIES = 8
Weights = Tensors  # h1, p1, h2, g, identity


@dataclass(frozen=True)
class Problem:
    """Sizes of a call with kernel V+R and context V+R in which C = D = E = F."""

    batch: int
    channels: int
    size: tuple[int, int, int]
    queries: int = QUERIES
    window: tuple[int, int, int] = WINDOW

    @property
    def label(self) -> str:
        sizes, window = ("x".join(map(str, n)) for n in (self.size, self.window))
        return f"B {self.batch}, L {self.queries}, C {self.channels}, {sizes}, window {window}"

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    @property
    def positions(self) -> int:
        return self.batch * math.prod(self.size)

    def projected(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Queries, key and value as one projection in a layer gives them."""
        generator = torch.Generator().manual_seed(0)
        channels = (self.queries + 2) * self.channels
        return torch.randn(self.batch, channels, *self.size, generator=generator, dtype=torch.float32, device="cpu").to(
            device, dtype
        )

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, views."""
        q, k, v = projected.split([self.queries * self.channels, self.channels, self.channels], dim=1)
        return q.unflatten(1, (self.queries, self.channels)), k, v

    def weights(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """h1, p1, h2, g and identity, of a size that gives outputs of order one."""
        generator = torch.Generator().manual_seed(1)
        c = self.channels
        shapes = ((c, c, *self.window), (c, c), (c, *self.window), (c, *self.window))
        scales = ((c / self.taps) ** 0.5, 1.0, self.taps**-0.5, self.taps**-0.5)
        drawn = [
            torch.randn(s, generator=generator, dtype=torch.float32, device="cpu") * scale
            for s, scale in zip(shapes, scales, strict=True)
        ]
        return tuple(w.to(device, dtype) for w in (*drawn, torch.eye(c, dtype=torch.float32, device="cpu")))

    def gradient(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of y (B, L, F, T, H, W), in the memory of the published channel order (B, F * L, T, H, W)."""
        generator = torch.Generator().manual_seed(2)
        g = torch.randn(
            self.batch, self.channels, self.queries, *self.size, generator=generator, dtype=torch.float32, device="cpu"
        )
        return g.to(device, dtype).transpose(1, 2)

    def neighbours(self) -> int:
        """Pairs of a position and a neighbour inside the clip: what lies outside is 0 and costs nothing."""
        axes = zip(self.size, self.window, strict=True)
        return self.batch * math.prod(sum(max(0, n - abs(i - k // 2)) for i in range(k)) for n, k in axes)

    def multiply_adds(self) -> int:
        """Of the forward: those that the cheaper order of evaluation cannot do without."""
        c = d = e = f = self.channels
        m, n = self.neighbours(), self.positions * self.queries  # of all positions
        first = m * e * (d + f) + n * e * (d + f)  # H2^T X^V and (X^V)^T G, then their products with the queries
        second = self.queries * m * (d + 2 * e + f) + n * e * f  # kernels and correlations per neighbour; identity
        return m * c * d + n * c * d + min(first, second)

    def operations(self, backward: bool) -> int:
        """Useful floating-point operations. A product of two factors has two gradients, each of the same cost, so the
        backward has twice the forward's; what it computes again to save memory is not useful and does not count."""
        return 2 * self.multiply_adds() * (3 if backward else 1)

    def floor_bytes(self, itemsize: int, backward: bool) -> int:
        """Bytes that cannot be avoided: every input and output once per use."""
        c, n = self.channels, self.queries
        y, qkv = self.positions * n * c, self.positions * (n + 2) * c
        weights = c * c * (self.taps + 2) + 2 * c * self.taps
        # inputs -> y; then y's gradient and the inputs -> the inputs' gradients
        return itemsize * (qkv + weights + y + (y + 2 * (qkv + weights) if backward else 0))


# --- contenders -----------------------------------------------------------------------------------------------------


def ours(q: Tensor, k: Tensor, v: Tensor, h1: Tensor, p1: Tensor, h2: Tensor, g: Tensor, identity: Tensor) -> Tensor:
    return dt.ops.relational_attention(q, k, v, h2=h2, h1=h1, p1=p1, g=g, identity=identity, eps=EPS)


def published(
    q: Tensor, k: Tensor, v: Tensor, h1: Tensor, p1: Tensor, h2: Tensor, g: Tensor, identity: Tensor
) -> Tensor:
    """Convolutions for what is summed over a window, then batched products with a matrix for every position."""
    batch, _, channels, *size = q.shape
    margin = [k // 2 for k in h2.shape[1:]]

    def unit(x: Tensor, dim: int) -> Tensor:
        return x / (x.square().sum(dim, keepdim=True) + EPS).sqrt()

    def by_position(x: Tensor) -> Tensor:  # (B, I, J, T, H, W) -> (B * T * H * W, I, J)
        return x.permute(0, 3, 4, 5, 1, 2).reshape(-1, *x.shape[1:3])

    def of_values(taps: Tensor) -> Tensor:  # each channel by itself
        return by_position(F.conv3d(values, taps.unsqueeze(1), padding=margin).unflatten(0, (batch, -1)))

    keys_h1 = F.conv3d(unit(k, 1), h1.flatten(0, 1).unsqueeze(1), padding=margin, groups=channels)
    projection = by_position(keys_h1.unflatten(1, (channels, -1))) + p1
    kernel = torch.einsum("nlc,ncd->nld", by_position(unit(q, 2)), projection)
    values = unit(v, 1).reshape(-1, 1, *size)
    context = torch.einsum("ned,nef->nfd", of_values(h2), of_values(g) + identity)
    y = torch.einsum("nld,nfd->nfl", kernel, context)
    return y.unflatten(0, (batch, *size)).permute(0, 5, 4, 1, 2, 3)


def vanilla(q: Tensor, k: Tensor, v: Tensor, h: Tensor, p: Tensor, g: Tensor, identity: Tensor) -> Tensor:
    return dt.reference.vanilla_relational_attention(q, k, v, h=h, p=p, g=g, identity=identity, eps=EPS)


def vanilla_weights(h1: Tensor, p1: Tensor, h2: Tensor, g: Tensor, identity: Tensor) -> Weights:
    taps = h2.flatten(1)
    return torch.einsum("cdxyz,dm->cxyzm", h1, taps), torch.einsum("cd,dm->mc", p1, taps), g, identity


@dataclass(frozen=True)
class Transform:
    """A call of q, k, v and weights; `prepare` makes them, before it is timed, of those of the equation."""

    call: Callable[..., Tensor]
    problem: Problem
    prepare: Callable[..., Weights] | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """The projected tensor, the gradient of y and the weights."""
        weights = self.problem.weights(dtype, device)
        prepared = weights if self.prepare is None else tuple(w.contiguous() for w in self.prepare(*weights))
        return self.problem.projected(dtype, device), self.problem.gradient(dtype, device), *prepared

    def step(self, backward: bool, projected: Tensor, gradient: Tensor, *weights: Tensor) -> Weights:
        """y, and with `backward` the gradients of q, k, v and the weights."""
        leaves = [t.detach() for t in (*self.problem.split(projected), *weights)]
        if not backward:
            with torch.no_grad():
                return (self.call(*leaves),)
        leaves = [t.requires_grad_() for t in leaves]
        y = self.call(*leaves)
        return y, *torch.autograd.grad(y, leaves, gradient)

    def error(self, wanted: Weights, dtype: torch.dtype, device: torch.device, found: Weights) -> float:
        """Of a step's results, its gradients taken on to the weights that the equation has."""
        if self.prepare is not None and len(found) > 1:
            weights = [w.double().requires_grad_() for w in self.problem.weights(dtype, device)]
            grads = torch.autograd.grad(self.prepare(*weights), weights, [g.double() for g in found[4:]])
            found = *found[:4], *grads
        return relative_error(found, wanted[: len(found)])

    def contender(self, backward: bool, wanted: Weights, dtype: torch.dtype, device: torch.device) -> Contender:
        """What a row compares."""
        error_of = partial(self.error, wanted, dtype, device)
        return Contender(partial(self.step, backward), self.inputs(dtype, device), error_of=error_of)


def exact(problem: Problem, dtype: torch.dtype, device: torch.device) -> Weights:
    """y and all gradients by the reference in float64, a clip at a time: it holds every window."""
    projected, gradient, *weights = (t.double() for t in Transform(ours, problem).inputs(dtype, device))
    with dt.backend("reference"):
        clip = Transform(ours, replace(problem, batch=1))
        parts = [clip.step(True, x, g, *weights) for x, g in zip(projected.split(1), gradient.split(1), strict=True)]
    columns = list(zip(*parts, strict=True))
    return *(torch.cat(c) for c in columns[:4]), *(torch.stack(c).sum(0) for c in columns[4:])


# --- cells ----------------------------------------------------------------------------------------------------------

STAGES = [(8, 56), (16, 28), (32, 14), (64, 7)]  # channels of a query, height and width
FRAMES = {"cuda": (8, 16), "cpu": (8,)}
BATCH = {"cuda": 8, "cpu": 1}
SMALL = Problem(1, 8, (4, 14, 14), window=(3, 5, 5))
SWEPT = (32, 14)  # the stage at which windows, channels and batches vary
WINDOWS = [(3, 3, 3), (3, 5, 5), (3, 7, 7), (5, 7, 7), (5, 9, 9)]
CHANNELS = [8, 16, 32, 64]
BATCHES = {"cuda": [1, 2, 4, 8, 16], "cpu": [1, 2, 4]}
TABLE1 = {"cuda": Problem(8, 8, (4, 14, 14), window=(3, 5, 5)), "cpu": Problem(1, 8, (4, 14, 14), window=(3, 5, 5))}


def checks(machine: Machine) -> Iterator[Check]:
    """The small problem, forward and backward, in every dtype measured."""

    def error(dtype: torch.dtype) -> float:
        wanted = exact(SMALL, dtype, machine.device)
        return Transform(ours, SMALL).contender(True, wanted, dtype, machine.device).error()

    for dtype in DTYPES[machine.device.type]:
        yield Check(OP, f"{SMALL.label}, {name_of(dtype)}", partial(error, dtype), TOLERANCE[dtype])


def cells(kind: str, *, quick: bool) -> Iterator[Cell]:
    """What a run measures on "cuda" or "cpu"; a quick one the small problem only."""
    first, *others = DTYPES[kind]
    few, *more = FRAMES[kind]

    def cell(rank: int, part: str, problem: Problem, dtype: torch.dtype = first) -> Cell:
        return Cell(rank, OP, part, f"{problem.label}, {name_of(dtype)}", 2, partial(_rows, part, problem, dtype))

    def stage(channels: int, side: int, frames: int = few) -> Problem:
        return Problem(BATCH[kind], channels, (frames, side, side))

    yield cell(Rank.SMALL, "small", SMALL)
    if quick:
        return
    for i, sizes in enumerate(STAGES):
        yield cell(Rank.STAGE + i, "stage", stage(*sizes))
        yield from (cell(Rank.OTHER + i, "stage", stage(*sizes), dtype) for dtype in others)
        yield from (cell(Rank.OTHER + len(STAGES) + i, "stage", stage(*sizes, frames)) for frames in more)
    yield cell(Rank.STAGE + len(STAGES), "table1", TABLE1[kind])
    swept = stage(*SWEPT)
    for part, problems in {
        "taps": [replace(swept, window=window) for window in WINDOWS],
        "channels": [replace(swept, channels=channels) for channels in CHANNELS],
        "batch": [replace(swept, batch=batch) for batch in BATCHES[kind]],
    }.items():
        yield from (cell(Rank.SWEEP + i, part, problem) for i, problem in enumerate(problems))


def _transforms(part: str, problem: Problem) -> dict[str, Transform]:
    """Who takes part; in "table1" others have the same features in one query of more channels."""
    transforms = {"ours": Transform(ours, problem)}
    if part == "table1":
        single = replace(problem, queries=1, channels=problem.queries * problem.channels)
        transforms["vanilla"] = Transform(vanilla, single, vanilla_weights)
        transforms["efficient"] = Transform(published, single)
        transforms["multi-query"] = Transform(published, problem)
    else:
        transforms["published"] = Transform(published, problem)
    if part == "stage":
        torch._dynamo.reset()
        transforms["compiled"] = Transform(torch.compile(published, dynamic=False), problem)
    return transforms


def _rows(part: str, problem: Problem, dtype: torch.dtype, machine: Machine) -> Rows:
    """Forward, then forward and backward."""
    device, transforms = machine.device, _transforms(part, problem)
    wanted = {p: exact(p, dtype, device) for p in {t.problem for t in transforms.values()}}
    for backward in (False, True):
        contenders = {name: t.contender(backward, wanted[t.problem], dtype, device) for name, t in transforms.items()}
        about: Row = {
            "suite": "relational",
            "op": OP,
            "part": part,
            "label": problem.label,
            "mode": "forward+backward" if backward else "forward",
            "shape": [problem.batch, problem.queries, problem.channels, *problem.size],
            "batch": problem.batch,
            "queries": problem.queries,
            "channels": problem.channels,
            "window": list(problem.window),
            "taps": problem.taps,
        }
        if part == "table1":
            about["queries_of"] = {name: t.problem.queries for name, t in transforms.items()}
            about["channels_of"] = {name: t.problem.channels for name, t in transforms.items()}
        floor = Floor(problem.floor_bytes(dtype.itemsize, backward), problem.operations(backward))
        row = compared(machine, contenders, about, dtype, floor, graphs=part == "small")
        if row is not None:
            print(line(row))
        yield row
