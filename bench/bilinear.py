"""`python -m bench run bilinear`: the bilinear attentional transform, forward and forward + backward.

Rows come in parts: "stage", clips as the transforms of networks have them; "small", where launching takes longer than
computing, on CUDA replayed as a graph too; "channels", "batch" and "cells", cost against channels, clips and the coarse
cells of a side; "block", the layer around the op, in training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyreg_triton as dt
from dyreg_triton._core.numerics import TOLERANCE

from .measure import Machine, relative_error
from .rows import DTYPES, Cell, Check, Contender, Floor, Rank, Row, Rows, Tensors, compared, line, name_of

OP = "bilinear_transform"


@dataclass(frozen=True)
class Problem:
    """A clip (B, C, T, H, W), its k matrices P and Q of `cells` rows and columns, and its tk matrices over frames.

    tk 0: frames are not mixed.
    """

    batch: int
    channels: int
    frames: int
    height: int
    width: int
    k: int = 8
    tk: int = 4
    cells: int = 7

    @property
    def label(self) -> str:
        return f"B {self.batch}, C {self.channels}, {self.sizes}"

    @property
    def sizes(self) -> str:
        """All but clips and channels, in words."""
        mixed = f"tk {self.tk}, ts {self.ts}" if self.tk else "tk 0"
        return f"{self.frames}x{self.height}x{self.width}, k {self.k}, {mixed}, window {self.cells}"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.channels, self.frames, self.height, self.width

    @property
    def ts(self) -> int:
        """Rows of a matrix over frames, 0 without one."""
        return min(4, self.frames) if self.tk else 0

    def about(self) -> Row:
        """The sizes that a row says."""
        return {
            "shape": list(self.shape), "batch": self.batch, "channels": self.channels, "cells": self.cells,
            "k": self.k, "tk": self.tk, "ts": self.ts,
        }  # fmt: skip

    def inputs(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        """x, the gradient of y, p and q, and t where frames are mixed; matrices as a layer predicts them."""
        generator = torch.Generator().manual_seed(0)
        x, gradient = (
            torch.randn(self.shape, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2)
        )
        square = self.batch, self.k, self.frames, self.cells, self.cells
        p = (2 * torch.randn(square, generator=generator, dtype=torch.float32, device="cpu")).softmax(-1)
        q = (2 * torch.randn(square, generator=generator, dtype=torch.float32, device="cpu")).softmax(-2)
        found = [x, gradient, p, q]
        if self.tk:
            over_time = self.batch, self.tk, self.ts, self.ts
            found.append(
                (2 * torch.randn(over_time, generator=generator, dtype=torch.float32, device="cpu")).softmax(-1)
            )
        return tuple(tensor.to(device, dtype) for tensor in found)

    def matrices(self) -> int:
        """Numbers in p, q and t."""
        return self.batch * (2 * self.k * self.frames * self.cells**2 + self.tk * self.ts**2)

    def floor(self, backward: bool, itemsize: int) -> Floor:
        """Each tensor once per use; the multiply-adds of one axis after the other, and as many for each of the
        backward's two gradients of every product."""
        clip, matrices = math.prod(self.shape), self.matrices()
        # x -> y; then y's gradient and x -> x's gradient, by the matrices and with theirs
        moved = 2 * clip + matrices + (3 * clip + 2 * matrices if backward else 0)
        return Floor(itemsize * moved, 2 * clip * (2 * self.cells + self.ts) * (3 if backward else 1))


# --- contenders -----------------------------------------------------------------------------------------------------


def ours(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None = None) -> Tensor:
    return dt.ops.bilinear_transform(x, p, q, t)


def written_out(matrices: Tensor, times: int) -> Tensor:
    """kron(M, I) of (..., S, S) as the published code puts it together: a block for each weight, then rows of blocks
    beneath one another, then columns side by side."""
    if times == 1:
        return matrices
    one = torch.eye(times, dtype=matrices.dtype, device=matrices.device)
    blocks = matrices[..., None, None] * one
    columns = torch.cat(blocks.unbind(-4), -2)  # (..., S, S times, times)
    return torch.cat(columns.unbind(-3), -1)


def published(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None = None) -> Tensor:
    """Matrices of every channel, written out to the size of its rows, columns and frames, and products with them; that
    over frames is of every position as well."""
    batch, channels, frames, height, width = x.shape

    def of_channels(matrices: Tensor) -> Tensor:  # (B, G, ...) -> (B, C, ...)
        wide = matrices[:, :, None].expand(-1, -1, channels // matrices.shape[1], *matrices.shape[2:])
        return wide.reshape(batch, channels, *matrices.shape[2:])

    y = written_out(of_channels(p), height // p.shape[-1]) @ x @ written_out(of_channels(q), width // q.shape[-1])
    if t is not None:
        everywhere = of_channels(t)[:, :, None].expand(-1, -1, height * width, -1, -1).contiguous()
        over_time = written_out(everywhere, frames // t.shape[-1])  # (B, C, H * W, T, T)
        columns = y.flatten(3).transpose(2, 3).contiguous()[..., None]
        y = (over_time @ columns)[..., 0].transpose(2, 3).reshape(x.shape)
    return y.contiguous()


def _step(call: Callable[..., Tensor], backward: bool, x: Tensor, gradient: Tensor, *matrices: Tensor) -> Tensors:
    """y, and with `backward` the gradients of x, p, q and t."""
    if not backward:
        with torch.no_grad():
            return (call(x, *matrices),)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *matrices)]
    y = call(*leaves)
    return y, *torch.autograd.grad(y, leaves, gradient)


def _given(problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[Tensors, Tensors]:
    """What a step takes; and y and all gradients, in float64."""
    given = problem.inputs(dtype, device)
    with dt.backend("reference"):
        return given, _step(ours, True, *(tensor.double() for tensor in given))


# --- the block around it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A published BATBlock that transforms half of its channels, whose maps are one window of coarse cells.

    `inner` is what its transform has; the block itself has twice the channels.
    """

    inner: Problem

    @property
    def label(self) -> str:
        return f"BATBlock, B {self.inner.batch}, C {2 * self.inner.channels}, {self.inner.sizes}"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, channels, *size = self.inner.shape
        return batch, 2 * channels, *size  # type: ignore[return-value]

    def about(self) -> Row:
        return {**self.inner.about(), "shape": list(self.shape), "channels": self.shape[1]}

    def module(self, device: torch.device) -> nn.Module:
        """With norms that keep what goes into a ReLU above 0, where rounding would choose the gradient; and without
        dropout, where chance would."""
        n = self.inner
        arguments = {"s": n.cells, "ts": max(n.ts, 1), "k": n.k, "tk": n.tk, "dropout": 0.0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            block = dt.compat.build("models.non_local.BATBlock", in_channels=2 * n.channels, **arguments)
        for part in block.modules():
            if isinstance(part, nn.BatchNorm3d):
                nn.init.constant_(part.bias, 4.0)
        return block.to(device)

    def inputs(self, device: torch.device) -> Tensors:
        """x and the gradient of y."""
        generator = torch.Generator().manual_seed(0)
        x, gradient = (
            torch.randn(self.shape, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2)
        )
        return x.to(device), gradient.to(device)

    def floor(self, backward: bool, module: nn.Module) -> Floor:
        """x -> y by the parameters, then y's gradient and x to the gradients of x and of the parameters; and the
        multiply-adds of its products."""
        n = self.inner
        parameters = sum(parameter.numel() for parameter in module.parameters())
        clip = math.prod(self.shape)
        positions = clip // self.shape[1]
        pointwise = positions * n.channels * (2 * self.shape[1] + n.channels + n.k)
        windows = n.batch * n.k**2 * n.frames * 2 * n.cells**3 + n.batch * n.k * n.tk * n.ts**3
        operations = 2 * (pointwise + windows) + n.floor(False, 4).operations
        moved = 2 * clip + parameters + (3 * clip + 2 * parameters if backward else 0)
        return Floor(4 * moved, operations * (3 if backward else 1))


def our_block(block: Any, x: Tensor) -> Tensor:
    return block(x)


def published_block(block: Any, x: Tensor) -> Tensor:
    """The same layer, of the same parameters, by the published formulation."""
    layer = block.batransform
    batch, frames, s, ts = x.shape[0], x.shape[2], layer.window, layer.temporal_window
    inner = block.conv1(x)
    few = layer.conv1(inner)
    by_row = layer.conv_p(F.adaptive_max_pool3d(few, (frames, s, 1))).view(batch, layer.groups, s, s, frames)
    by_column = layer.conv_q(F.adaptive_max_pool3d(few, (frames, 1, s))).view(batch, layer.groups, s, s, frames)
    p, q = (m.movedim(-1, 2).contiguous() for m in (by_row.softmax(3), by_column.softmax(2)))
    t = None
    if layer.temporal_groups:
        over_time = layer.conv_t(F.adaptive_avg_pool3d(few, (ts, 1, 1)))
        t = over_time.view(batch, layer.temporal_groups, ts, ts).softmax(3)
    y = layer.conv2(published(inner, p, q, t))
    return block.dropout(block.conv2(y)) + x


def _block_step(call: Callable[..., Tensor], block: nn.Module, backward: bool, x: Tensor, gradient: Tensor) -> Tensors:
    """y, and with `backward` the gradients of x and of all parameters."""
    if not backward:
        with torch.no_grad():
            return (call(block, x),)
    x = x.detach().requires_grad_()
    y = call(block, x)
    return y, *torch.autograd.grad(y, (x, *block.parameters()), gradient)


def _block_error(wanted: Tensors, found: Tensors) -> float:
    """Of a step's results, all parameters' gradients together: before a norm that of a bias is 0, by which nothing can
    be divided."""

    def together(results: Tensors) -> Tensors:
        return *results[:2], torch.cat([gradient.flatten() for gradient in results[2:]])

    return relative_error(found, wanted[:1]) if len(found) == 1 else relative_error(together(found), together(wanted))


# --- cells ----------------------------------------------------------------------------------------------------------

STAGES = {
    "cuda": [
        Problem(8, 256, 8, 28, 28), Problem(8, 512, 8, 14, 14), Problem(8, 512, 4, 28, 28),
        Problem(64, 256, 1, 56, 56),
    ],
    "cpu": [
        Problem(1, 128, 8, 28, 28), Problem(1, 256, 8, 14, 14), Problem(1, 512, 4, 14, 14), Problem(4, 64, 1, 56, 56),
    ],
}  # fmt: skip
GROUPS = (8, 4)  # k
MIXES = (4, 0)  # tk
SMALL = Problem(1, 64, 4, 14, 14, k=4)
# The stage at which channels and clips vary, and coarse cells: of such a map 4, 7, 8 and 14 are equal parts.
SWEPT = {"cuda": Problem(8, 128, 4, 56, 56), "cpu": Problem(1, 64, 4, 56, 56)}
CHANNELS = {"cuda": (64, 128, 256, 512), "cpu": (32, 64, 128)}
BATCHES = {"cuda": (1, 2, 4, 8, 16), "cpu": (1, 2, 4)}
CELLS = (4, 7, 8, 14)
BLOCKS = {
    "cuda": [Block(Problem(8, 128, 8, 28, 28)), Block(Problem(8, 256, 8, 14, 14))],
    "cpu": [
        Block(Problem(1, 128, 8, 28, 28)), Block(Problem(1, 128, 8, 28, 28, tk=0)), Block(Problem(1, 256, 8, 14, 14)),
    ],
}  # fmt: skip


def checks(machine: Machine) -> Iterator[Check]:
    """The small problem with frames mixed and without, forward and backward, in every dtype measured."""

    def error(problem: Problem, dtype: torch.dtype) -> float:
        given, wanted = _given(problem, dtype, machine.device)
        return Contender(partial(_step, ours, True), given, wanted).error()

    for dtype in DTYPES[machine.device.type]:
        for problem in (SMALL, replace(SMALL, tk=0)):
            yield Check(OP, f"{problem.label}, {name_of(dtype)}", partial(error, problem, dtype), TOLERANCE[dtype])


def cells(kind: str, *, quick: bool) -> Iterator[Cell]:
    """What a run measures on "cuda" or "cpu"; a quick one the small problem only."""
    first, *others = DTYPES[kind]

    def cell(rank: int, part: str, problem: Problem, dtype: torch.dtype = first) -> Cell:
        return Cell(rank, OP, part, f"{problem.label}, {name_of(dtype)}", 2, partial(_rows, part, problem, dtype))

    yield cell(Rank.SMALL, "small", SMALL)
    if quick:
        return
    stages = STAGES[kind]
    for n, k in enumerate(GROUPS):
        for i, problem in enumerate(stages, n * len(stages)):
            for tk in MIXES:
                varied = replace(problem, k=k, tk=tk)
                yield cell(Rank.STAGE + i, "stage", varied)
                yield from (cell(Rank.OTHER + i, "stage", varied, dtype) for dtype in others)
    for i, block in enumerate(BLOCKS[kind]):
        label = f"{block.label}, {name_of(torch.float32)}"
        yield Cell(Rank.STAGE + i, OP, "block", label, 2, partial(_block_rows, block))
    swept = SWEPT[kind]
    for part, problems in {
        "channels": [replace(swept, channels=n) for n in CHANNELS[kind]],
        "batch": [replace(swept, batch=n) for n in BATCHES[kind]],
        "cells": [replace(swept, cells=n) for n in CELLS],
    }.items():
        yield from (cell(Rank.SWEEP + i, part, problem) for i, problem in enumerate(problems))


def _rows(part: str, problem: Problem, dtype: torch.dtype, machine: Machine) -> Rows:
    """Forward, then forward and backward."""
    calls = {"ours": ours, "published": published}
    if part == "stage":
        torch._dynamo.reset()
        calls["compiled"] = torch.compile(published, dynamic=False)
    given, wanted = _given(problem, dtype, machine.device)
    for backward in (False, True):
        contenders = {name: Contender(partial(_step, call, backward), given, wanted) for name, call in calls.items()}
        floor = problem.floor(backward, dtype.itemsize)
        yield _row(machine, contenders, part, problem, backward, dtype, floor)


def _block_rows(block: Block, machine: Machine) -> Rows:
    """The same of the whole layer, in float32: rounding to fewer bits moves the maxima that it pools, and with them
    gradients."""
    module, given = block.module(machine.device), block.inputs(machine.device)
    with dt.backend("reference"):
        exact = copy.deepcopy(module).double()
        wanted = _block_step(our_block, exact, True, *(tensor.double() for tensor in given))
    del exact
    for backward in (False, True):
        contenders = {
            name: Contender(partial(_block_step, call, module, backward), given, error_of=partial(_block_error, wanted))
            for name, call in {"ours": our_block, "published": published_block}.items()
        }
        yield _row(machine, contenders, "block", block, backward, torch.float32, block.floor(backward, module))


def _row(
    machine: Machine, contenders: dict[str, Contender], part: str, problem: Problem | Block, backward: bool,
    dtype: torch.dtype, floor: Floor,
) -> Row | None:  # fmt: skip
    about = {
        "suite": "bilinear",
        "op": OP,
        "part": part,
        "label": problem.label,
        "mode": "forward+backward" if backward else "forward",
        **problem.about(),
    }
    row = compared(machine, contenders, about, dtype, floor, graphs=part == "small")
    if row is not None:
        print(line(row))
    return row
