"""`python -m bench run overhead`: what a call of an op costs the host, from the call to its return, and on what.

The problems are so small that the device is always waiting. On CUDA launches are real, and the queue is drained
between batches of calls, so that the host never waits for the device. Where there is no GPU, Triton's own launcher
runs up to a pretended driver (`bench.standin`): that leaves out what the real driver takes.

`spent` is the median of a call, shared out by where samples of its stack found it.
"""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from linecache import getline
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import dyreg_triton as dt
from dyreg_triton._core.installed import triton_fault
from dyreg_triton._core.numerics import TOLERANCE
from dyreg_triton.ops.launch import Launch, redirected, watched

from . import bilinear, region, relational
from .measure import Machine, Times, relative_error
from .rows import SCHEMA, Cell, Check, Rank, Row, Rows, Tensors, name_of

OPS = ("region_kernel", *region.OPS, relational.OP, bilinear.OP)
DTYPE = torch.float32
MODES = ("forward", "forward with gradient", "backward")
GOAL = {"forward with gradient": 25e-6}  # seconds
LEAST = 10  # batches, at least
BATCH = 20  # calls between two drains: all their launches fit a GPU's queue
SECONDS = 0.3  # to spend on a row's times, and again on its samples
REGIONS = region.Problem(4, 64, 14, 14)
CLIPS = relational.Problem(1, 8, (4, 7, 7), window=(3, 3, 3))
MAPS = bilinear.Problem(1, 16, 4, 14, 14, k=4)
LABELS = dict.fromkeys(OPS, REGIONS.label) | {relational.OP: CLIPS.label, bilinear.OP: MAPS.label}


@dataclass(frozen=True)
class Op:
    """An op on inputs that all have gradients, and the published formulation of it."""

    label: str
    inputs: Tensors
    ours: Callable[..., Tensor]
    published: Callable[..., Tensor]

    def call(self, function: Callable[..., Tensor], mode: str) -> Callable[[], Any]:
        """What is timed in that mode."""
        if mode == "forward":

            def without_gradient() -> Tensor:
                with torch.no_grad():
                    return function(*self.inputs)

            return without_gradient
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        if mode == "forward with gradient":
            return lambda: function(*leaves)
        y = function(*leaves)
        gradient = torch.ones_like(y)
        return lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True)

    def error(self) -> float:
        """Of our result and gradients, against the reference in float64."""

        def results(inputs: Tensors) -> Tensors:
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = self.ours(*leaves)
            return y, *torch.autograd.grad(y.square().sum(), leaves)

        with dt.backend("reference"):
            wanted = results(tuple(t.double() for t in self.inputs))
        return relative_error(results(self.inputs), wanted)


def _op(name: str, device: torch.device) -> Op:
    if name == relational.OP:
        problem = relational.Transform(relational.ours, CLIPS)
        projected, _, *weights = problem.inputs(DTYPE, device)
        inputs = (*CLIPS.split(projected), *weights)
        return Op(CLIPS.label, inputs, relational.ours, relational.published)
    if name == bilinear.OP:
        x, _, *matrices = MAPS.inputs(DTYPE, device)
        return Op(MAPS.label, (x, *matrices), bilinear.ours, bilinear.published)
    x, nodes, regions = REGIONS.inputs(DTYPE, device)
    if name == "region_kernel":
        return Op(
            REGIONS.label,
            (regions,),
            lambda r: dt.ops.region_kernel(r, REGIONS.size),
            lambda r: region.published_kernel(r, *REGIONS.size),
        )

    def sized(call: region.Call) -> Callable[..., Tensor]:
        return lambda features, regions: call(features, regions, REGIONS.size)

    inputs = (x if name == "region_pool" else nodes, regions)
    return Op(REGIONS.label, inputs, sized(region.OURS[name]), sized(region.PUBLISHED[name]))


# --- cells ----------------------------------------------------------------------------------------------------------


def checks(machine: Machine) -> Iterator[Check]:
    """None: the rows check themselves."""
    return iter(())


def cells(kind: str, *, quick: bool) -> Iterator[Cell]:
    """Every op; none where there is neither a GPU nor what can stand in for one, which is said."""
    if kind == "cpu" and (reason := _no_standin()) is not None:
        print(f"no launch overhead is measured: {reason}")
        return
    for op in OPS:
        yield Cell(Rank.SMALL, op, "launch", f"{LABELS[op]}, {name_of(DTYPE)}", len(MODES), partial(_rows, op))


def _no_standin() -> str | None:
    fault = triton_fault()
    if fault is not None:
        return f"the package triton is {fault}"
    try:
        from .standin import why_not
    except ImportError as error:
        return str(error)
    return why_not()


def _rows(name: str, machine: Machine) -> Rows:
    if machine.cuda:
        op = _op(name, machine.device)
        error, tolerance = op.error(), TOLERANCE[DTYPE]
        for mode in MODES:
            calls = {"ours": op.call(op.ours, mode), "published": op.call(op.published, mode)}
            yield _row(machine, name, op, mode, calls, _count(calls["ours"]), error, tolerance)
        return
    from .standin import standin

    with standin("sm_90") as driver:
        op = _op(name, machine.device)
        for mode in MODES:
            call = op.call(op.ours, mode)
            launched = _launched(driver, call)
            with redirected(Launch.by_triton):  # its own way from arguments to a compiled kernel
                wanted = _launched(driver, call)
            odd = sum(a != b for a, b in zip_longest(launched, wanted)) if wanted else 1
            yield _row(machine, name, op, mode, {"ours": call}, len(launched), float(odd), 0.0)


def _row(
    machine: Machine,
    name: str,
    op: Op,
    mode: str,
    calls: dict[str, Callable[[], Any]],
    launches: int,
    error: float,
    tolerance: float,
) -> Row | None:
    if not error <= tolerance:
        print(f"WRONG, not kept: {name} launch {mode} has error {error:.2g} > {tolerance:g}")
        return None
    times = {contender: host_times(call, machine.synchronize, SECONDS) for contender, call in calls.items()}
    shares = samples(calls["ours"], machine.synchronize, SECONDS)
    ours, total = times["ours"].median, sum(shares.values())
    spent = {what: ours * count / total for what, count in shares.most_common()}
    row = {
        "schema": SCHEMA,
        "suite": "overhead",
        "op": name,
        "part": "launch",
        "label": op.label,
        "mode": mode,
        "shape": list(op.inputs[0].shape),
        "dtype": name_of(DTYPE),
        "host_seconds": {contender: t.median for contender, t in times.items()},
        "host_spread": {contender: [t.lower, t.upper] for contender, t in times.items()},
        "repeats": LEAST,
        "launches": launches,
        "goal_seconds": GOAL.get(mode),
        "spent": spent,
        "stand_in": not machine.cuda,
        "errors": {"ours": error},
        "tolerance": tolerance,
    }
    print(_line(row))
    return row


def _line(row: Row) -> str:
    goal = f" of {row['goal_seconds'] * 1e6:.0f} wanted" if row["goal_seconds"] else ""
    parts = ", ".join(f"{what} {seconds * 1e6:.1f}" for what, seconds in row["spent"].items())
    return (
        f"{row['op']:20} {row['part']:8} {row['mode']:21} {row['launches']} launches, "
        f"{row['host_seconds']['ours'] * 1e6:.1f} us{goal}: {parts}{' (stand-in driver)' if row['stand_in'] else ''}"
    )


# --- what is launched -----------------------------------------------------------------------------------------------


def _launched(driver: Any, call: Callable[[], Any]) -> list[Any]:
    """The launches of a call that is not the first of its kind, but for the addresses of memory."""
    call()
    driver.clear()
    call()
    return [launch.without_pointers() for launch in driver.launches()]


def _count(call: Callable[[], Any]) -> int:
    """How many kernels of this library a call launches."""
    counted: list[object] = []
    with watched(lambda launch, _: counted.append(launch)):
        call()
    return len(counted)


# --- the host's clock -----------------------------------------------------------------------------------------------


def host_times(call: Callable[[], Any], drain: Callable[[], None], seconds: float) -> Times:
    """Of a call, from the call to its return: means of batches, between which `drain` waits for the device."""

    def batch() -> float:
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        taken = time.perf_counter() - start
        drain()
        return taken / BATCH

    once = min(batch() for _ in range(3))
    return Times.of([batch() for _ in range(max(LEAST, int(seconds / (once * BATCH))))])


# The innermost frame that is at one of these places says what a sample was spent on: part of a file's path, and
# functions where not all of the file is meant. The first place that fits counts.
_PLACES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("validation", "/dyreg_triton/validate/", ()),
    ("validation", "/dyreg_triton/_core/validation.py", ()),
    ("choice of backend", "/dyreg_triton/_core/dispatch.py", ()),
    ("choice of backend", "/dyreg_triton/_core/autocast.py", ()),
    ("dispatch and autograd", "/dyreg_triton/ops/custom.py", ()),
    ("dispatch and autograd", "/dyreg_triton/ops/torch_symbols.py", ()),
    ("dispatch and autograd", "/torch/autograd/", ()),
    ("dispatch and autograd", "/torch/_library/", ()),
    ("dispatch and autograd", "/torch/_ops.py", ()),
    ("launch", "/dyreg_triton/ops/launch.py", ("__call__", "_launch")),
    ("launch", "/triton/runtime/", ()),
    ("launch", "/triton/compiler/", ()),
    ("launch", "/triton/backends/", ()),
    ("plan lookup", "/dyreg_triton/ops/launch.py", ()),
    ("plan lookup", "/dyreg_triton/configs/", ()),
    ("plan lookup", "/dyreg_triton/_core/gpu.py", ()),
    ("the op's own code", "/dyreg_triton/ops/", ()),
)


def _what(frame: FrameType | None) -> str | None:
    """What the stack of `frame` is at; None where it is at none of the places."""
    while frame is not None:
        path, function = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
        if "/dyreg_triton/" in path and re.search(r"empty(_like)?\(", getline(path, frame.f_lineno or 0)):
            return "allocation"
        for what, place, functions in _PLACES:
            if place in path and (not functions or function in functions):
                return what
        frame = frame.f_back
    return None


def samples(call: Callable[[], Any], drain: Callable[[], None], seconds: float) -> Counter[str]:
    """How many samples of the stack found a call, repeated, at what; "rest" is everything that has no name.

    A timer interrupts the main thread, which must be the caller's, wherever it is; Python looks where that was when
    the C code that was running is done, so that C code counts for the Python that called it.
    """
    counts: Counter[str] = Counter()
    inside, over = False, False

    def look(_: int, frame: FrameType | None) -> None:
        if inside:
            counts[_what(frame) or "rest"] += 1
        if not over:
            signal.setitimer(signal.ITIMER_REAL, 1e-4)  # once each time, so that a slow look is not looked at

    former = signal.signal(signal.SIGALRM, look)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        # torch computes gradients on a GPU in a thread of its own, unless told otherwise
        with torch.autograd.set_multithreading_enabled(False):
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or not counts:
                inside = True
                for _ in range(BATCH):
                    call()
                inside = False
                drain()
    finally:
        inside, over = False, True  # before the timer ends: a look that is due would start it again
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    return counts
