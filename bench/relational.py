"""`python -m bench run relational`: relational self-attention, forward and forward + backward.

Rows come in parts: "stage", the layers of RSANet-R50; "taps" and "batch", cost against the window's M and the batch;
"table1", the paper's Table 1: the transform before it is made efficient, made efficient, with L queries, and ours.
`python -m bench plot relational` draws the parts "taps" and "batch".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dyreg_triton as dt

from .measure import Machine, relative_error, rotated

EPS = 1e-6
WINDOW = (5, 7, 7)
QUERIES = 8
STAGES = [(8, 56), (16, 28), (32, 14), (64, 7)]  # channels of a query, height and width
FRAMES = {"cuda": (8, 16), "cpu": (8,)}
BATCH = {"cuda": 8, "cpu": 1}
SWEPT = (32, 14)  # the stage at which windows and batches vary
WINDOWS = [(3, 3, 3), (3, 5, 5), (3, 7, 7), (5, 7, 7), (5, 9, 9)]
BATCHES = [1, 2, 4, 8]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROW_SECONDS = {"cuda": 1.0, "cpu": 3.0}  # to spend on a row's repeats
Weights = tuple[Tensor, ...]  # h1, p1, h2, g, identity


@dataclass(frozen=True)
class Problem:
    """Sizes of a call with kernel V+R and context V+R in which C = D = E = F."""

    batch: int
    channels: int
    size: tuple[int, int, int]
    queries: int = QUERIES
    window: tuple[int, int, int] = WINDOW

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
        return torch.randn(self.batch, channels, *self.size, generator=generator).to(device, dtype)

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
        drawn = [torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, scales, strict=True)]
        return tuple(w.to(device, dtype) for w in (*drawn, torch.eye(c)))

    def gradient(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of y (B, L, F, T, H, W), in the memory of the published channel order (B, F * L, T, H, W)."""
        generator = torch.Generator().manual_seed(2)
        g = torch.randn(self.batch, self.channels, self.queries, *self.size, generator=generator)
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
class Contender:
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

    def results(self, backward: bool, dtype: torch.dtype, device: torch.device) -> Weights:
        """Of a step, with the gradients of the weights that the equation has."""
        found = self.step(backward, *self.inputs(dtype, device))
        if self.prepare is None or not backward:
            return found
        weights = [w.double().requires_grad_() for w in self.problem.weights(dtype, device)]
        grads = torch.autograd.grad(self.prepare(*weights), weights, [g.double() for g in found[4:]])
        return *found[:4], *grads


def exact(problem: Problem, dtype: torch.dtype, device: torch.device) -> Weights:
    """y and all gradients by the reference in float64, a clip at a time: it holds every window."""
    projected, gradient, *weights = (t.double() for t in Contender(ours, problem).inputs(dtype, device))
    with dt.backend("reference"):
        clip = Contender(ours, replace(problem, batch=1))
        parts = [clip.step(True, x, g, *weights) for x, g in zip(projected.split(1), gradient.split(1), strict=True)]
    columns = list(zip(*parts, strict=True))
    return *(torch.cat(c) for c in columns[:4]), *(torch.stack(c).sum(0) for c in columns[4:])


# --- rows -----------------------------------------------------------------------------------------------------------

QUICK = Problem(1, 8, (4, 14, 14), window=(3, 5, 5))
TABLE1 = {"cuda": Problem(8, 8, (4, 14, 14), window=(3, 5, 5)), "cpu": Problem(1, 8, (4, 14, 14), window=(3, 5, 5))}


def parts(kind: str) -> Iterator[tuple[str, Problem]]:
    """What a full run measures on "cuda" or "cpu", the most telling first, for a run may be cut short."""
    few, *more = FRAMES[kind]

    def stage(channels: int, side: int, frames: int = few) -> Problem:
        return Problem(BATCH[kind], channels, (frames, side, side))

    yield from (("stage", stage(*sizes)) for sizes in STAGES)
    yield from (("taps", replace(stage(*SWEPT), window=window)) for window in WINDOWS)
    yield from (("batch", replace(stage(*SWEPT), batch=batch)) for batch in BATCHES)
    yield "table1", TABLE1[kind]
    yield from (("stage", stage(*sizes, frames)) for frames in more for sizes in STAGES)


def run(machine: Machine, *, quick: bool) -> Iterator[dict[str, Any] | None]:
    """A row for every part, dtype and mode as it is measured; None for one whose results were wrong."""
    kind = machine.device.type
    dtypes = [torch.bfloat16, torch.float32] if kind == "cuda" and not quick else [torch.float32]
    for part, problem in [("stage", QUICK)] if quick else parts(kind):
        for dtype in dtypes if part == "stage" else dtypes[:1]:
            contenders = {"ours": Contender(ours, problem)}
            if part == "table1":
                single = replace(problem, queries=1, channels=problem.queries * problem.channels)
                contenders["vanilla"] = Contender(vanilla, single, vanilla_weights)
                contenders["efficient"] = Contender(published, single)
                contenders["multi-query"] = Contender(published, problem)
            else:
                contenders["published"] = Contender(published, problem)
                if part == "stage" and not quick:
                    torch._dynamo.reset()
                    contenders["compiled"] = Contender(torch.compile(published, dynamic=False), problem)
            wanted = {p: exact(p, dtype, machine.device) for p in {c.problem for c in contenders.values()}}
            for backward in (False, True):
                row = _row(machine, part, problem, dtype, contenders, wanted, backward)
                if row is None:
                    print(f"WRONG, not kept: relational_attention {part} {problem} {dtype}")
                else:
                    print(_line(row))
                yield row


def _errors(
    contenders: dict[str, Contender],
    wanted: dict[Problem, Weights],
    backward: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Of each contender that can run; memory or a compiler may fail another than ours."""
    errors = {}
    for name, contender in contenders.items():
        try:
            found = contender.results(backward, dtype, device)
        except Exception as error:
            if name == "ours":
                raise
            print(f"not timed, {name} fails: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        errors[name] = relative_error(found, wanted[contender.problem][: len(found)])
    return errors


def _row(
    machine: Machine,
    part: str,
    problem: Problem,
    dtype: torch.dtype,
    contenders: dict[str, Contender],
    wanted: dict[Problem, Weights],
    backward: bool,
) -> dict[str, Any] | None:
    """Time the contenders that are right; None where ours is not."""
    device = machine.device
    # convolutions round float32 to TensorFloat-32 by default, which is not the precision that is compared here
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        errors = _errors(contenders, wanted, backward, dtype, device)
        for name, error in errors.items():
            if not error <= TOLERANCE[dtype]:
                print(f"{name} has error {error:.2g} > {TOLERANCE[dtype]:g}: left out")
        contenders = {name: c for name, c in contenders.items() if errors.get(name, math.inf) <= TOLERANCE[dtype]}
        if "ours" not in contenders:
            return None
        sources = {name: rotated(lambda c=c: c.inputs(dtype, device), device) for name, c in contenders.items()}
        calls = [lambda name=name, c=c: c.step(backward, *sources[name]()) for name, c in contenders.items()]
        once = sum(map(machine.seconds, calls))
        repeats = max(5, min(24, int(ROW_SECONDS[device.type] / once)))
        seconds = dict(zip(contenders, machine.interleaved(calls, repeats), strict=True))
        wall = seconds  # the CPU has one clock
        if device.type == "cuda":
            wall = dict(zip(contenders, machine.wall(calls, repeats), strict=True))
        extra = {name: machine.extra_bytes(call) for name, call in zip(contenders, calls, strict=True)}
    floor_bytes, operations = problem.floor_bytes(dtype.itemsize, backward), problem.operations(backward)
    rate = machine.matrix_rate(dtype)
    floor = max(floor_bytes / machine.bandwidth, operations / rate)
    return {
        "op": "relational_attention",
        "part": part,
        "mode": "forward+backward" if backward else "forward",
        "shape": [problem.batch, problem.queries, problem.channels, *problem.size],
        "batch": problem.batch,
        "queries": {name: c.problem.queries for name, c in contenders.items()},
        "channels": {name: c.problem.channels for name, c in contenders.items()},
        "window": list(problem.window),
        "taps": problem.taps,
        "dtype": str(dtype)[6:],
        "repeats": repeats,
        "seconds": seconds,
        "wall_seconds": wall,
        "speedup": {name: seconds[name] / seconds["ours"] for name in contenders if name != "ours"},
        "wall_speedup": {name: wall[name] / wall["ours"] for name in contenders if name != "ours"},
        "floor_bytes": floor_bytes,
        "operations": operations,
        "matrix_rate": rate,
        "floor_seconds": floor,
        "of_floor": floor / seconds["ours"],
        "of_matrix_rate": operations / seconds["ours"] / rate,
        "extra_bytes": extra,
        "less_memory": {name: extra[name] / max(extra["ours"], 1) for name in contenders if name != "ours"},
        "errors": errors,
    }


def _line(row: dict[str, Any]) -> str:
    ratios = ", ".join(f"{row['speedup'][n]:.2f}x {n} ({row['less_memory'][n]:.1f}x memory)" for n in row["speedup"])
    return (
        f"{row['part']:6} {row['mode']:17} {'x'.join(map(str, row['shape'])):17} M {row['taps']:3} {row['dtype']:9}"
        f"{row['seconds']['ours'] * 1e3:9.3f} ms, {row['extra_bytes']['ours'] / 2**20:7.1f} MiB, {ratios}, "
        f"{row['of_floor']:.0%} of the floor's speed, error {row['errors']['ours']:.0e}"
    )


# --- plot -----------------------------------------------------------------------------------------------------------


def plot(files: Sequence[Path], out: Path) -> None:
    """Draw time and memory against M and against the batch, a line of plots for every device in the rows of `files`.

    Raises:
        ImportError: without matplotlib.
        ValueError: there are no rows of those parts.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is missing; pip install "dyreg-triton[viz]" has it') from error

    sweeps = {"taps": "neighbours M of the window", "batch": "batch"}
    rows: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}  # by device; of equal cells the last is kept
    for line in (line for file in files for line in file.read_text().splitlines()):
        row = json.loads(line)
        if row.get("part") in sweeps:
            cell = row["part"], row["mode"], row["dtype"], row[row["part"]]
            rows.setdefault(row["device"], {})[cell] = row
    if not rows:
        raise ValueError(f"no rows of the parts {' and '.join(sweeps)} in {', '.join(map(str, files)) or 'no file'}")
    with rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(14, 4 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 4, squeeze=False)
        for line_of_axes, (device, cells) in zip(axes, rows.items(), strict=True):
            quantities = [(part, quantity) for part in sweeps for quantity in ("seconds", "extra_bytes")]
            for ax, (part, quantity) in zip(line_of_axes, quantities, strict=True):
                for name, color in (("ours", "#1b6ca8"), ("published", "#c8553d")):
                    for mode, style in (("forward", "--"), ("forward+backward", "-")):
                        _draw(ax, cells, part, quantity, name, mode, color, style)
                ax.set(
                    xlabel=sweeps[part],
                    ylabel="milliseconds" if quantity == "seconds" else "peak memory, MiB",
                    title=_title(device, part, cells),
                    xlim=(0, None),
                    ylim=(0, None),
                )
                ax.grid(alpha=0.3)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None})


def _draw(
    ax: Any,
    cells: dict[tuple[Any, ...], dict[str, Any]],
    part: str,
    quantity: str,
    name: str,
    mode: str,
    color: str,
    style: str,
) -> None:
    scale = 1e3 if quantity == "seconds" else 2**-20
    points = sorted(
        (row[part], row[quantity][name] * scale)
        for row in cells.values()
        if row["part"] == part and row["mode"] == mode and name in row[quantity]
    )
    if points:
        ax.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=4, label=f"{name}, {mode}")


def _title(device: str, part: str, cells: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    row = next((row for row in cells.values() if row["part"] == part), None)
    if row is None:
        return device
    batch, queries, channels, *size = row["shape"]
    fixed = f"batch {batch}" if part == "taps" else f"M {row['taps']}"
    return f"{device}, {row['dtype']}\nL {queries}, C {channels}, {'x'.join(map(str, size))}, {fixed}"
