"""Comparators, poisoned buffers and random cases shared by the tests."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dyreg_triton import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-10}
PROFILES = ("linear", "gaussian", "log-linear")
REGION_OPS = ("region_pool", "region_remap", "region_kernel")

# --- backends -------------------------------------------------------------------------------------------------------


def backends(*names: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Parameters for `backend`: those of `names` (default: all) that can run here; Triton's carries its mark."""
    return [
        pytest.param(name, marks=pytest.mark.kernels if name == "triton" else ())
        for name in names or dispatch.BACKENDS[1:]
        if dispatch.can_run(name, device=DEVICE, dtype=dtype)
    ]


def backends_and_dtypes(*dtypes: torch.dtype) -> list[Any]:
    """Parameters for `backend, dtype`: the pairs that can run here."""
    return [
        pytest.param(*p.values, dtype, marks=p.marks, id=f"{p.values[0]}-{str(dtype)[6:]}")
        for dtype in dtypes or TOLERANCE
        for p in backends(dtype=dtype)
    ]


# --- comparators ----------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """||actual - expected|| / max(||expected||, floor) in float64; 0 / 0 is 0."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    difference = (actual - expected).norm().item()
    return difference and difference / max(expected.norm().item(), floor, 1e-300)


def mismatch(
    actual: Tensor | None, expected: Tensor | None, *, tolerance: float | None = None, floor: float = 0.0
) -> str | None:
    """What is wrong with `actual` in words, or None where it is within the tolerance of `expected`.

    tolerance: of `relative_error`; by default that of the dtype of `actual`.
    floor: the norm below which `expected` counts as cancellation of larger terms; errors are relative to it there.
    """
    if actual is None or expected is None:
        return None if actual is expected else f"is {'absent' if actual is None else 'present'}"
    if actual.shape != expected.shape:
        return f"has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.isfinite().all():
        return "cannot be compared: the expected values are not finite"
    if not actual.isfinite().all():
        return f"has {(~actual.isfinite()).sum().item()} of {actual.numel()} values not finite"
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected, floor=floor)
    if error <= tolerance:
        return None
    if not actual.any():
        return f"is all zero where the expected norm is {expected.double().norm().item():.3g}"
    return f"has relative error {error:.3g} > {tolerance:.3g}"


def assert_close(actual: Tensor | None, expected: Tensor | None, name: str = "result", **options: float | None) -> None:
    """Fail unless `actual` is within the tolerance of `expected`; options as `mismatch`."""
    problem = mismatch(actual, expected, **options)  # type: ignore[arg-type]
    assert problem is None, f"{name} {problem}"


def assert_all_close(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    *,
    tolerance: float | None = None,
    floors: Mapping[str, float] | None = None,
) -> None:
    """`assert_close` of every entry; the failure lists every entry that is wrong."""
    assert actual.keys() == expected.keys(), f"entries differ: {sorted(actual.keys() ^ expected.keys())}"
    problems = {
        name: mismatch(actual[name], expected[name], tolerance=tolerance, floor=(floors or {}).get(name, 0.0))
        for name in expected
    }
    wrong = [f"{name} {problem}" for name, problem in problems.items() if problem]
    assert not wrong, "; ".join(wrong)


def assert_identical(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Fail unless both hold the same bits (so NaN equals NaN) in the same shape and dtype."""
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name} is {actual.dtype}, expected {expected.dtype}"
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    different = actual.detach().contiguous().view(bits) != expected.detach().contiguous().view(bits)
    assert not different.any(), f"{name}: {different.sum().item()} of {actual.numel()} values differ"


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], grad_output: Tensor | None = None
) -> dict[str, Tensor | None]:
    """{"out": function(**inputs), "grad_<input>": the gradient of each} for the cotangent `grad_output`.

    Inputs that do not require a gradient have none in the result. An output that has no graph gives gradients None.
    """
    out = function(**inputs)
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if out.requires_grad:
        cotangent = torch.ones_like(out) if grad_output is None else grad_output
        grads = torch.autograd.grad(out, list(wanted.values()), cotangent, allow_unused=True)
    return {"out": out.detach(), **{f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}}


# --- poisoned memory ------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "transposed", "channels_last", "reversed", "sliced", "expanded")


class Guarded:
    """Values laid out in a larger buffer in which every other element is NaN.

    Reading outside the tensor gives NaN in the result; writing to the buffer at all makes `check` fail.

    Args:
        values: what the tensor holds; "expanded" repeats its first entry along the first dimension.
        layout: one of LAYOUTS. "transposed" swaps the last two dimensions in memory, "channels_last" has the third
            from the end innermost, "reversed" the first; "sliced" leaves gaps everywhere; "expanded" has stride 0.
    """

    MARGIN = 67  # odd, so that the data are not aligned to more than one element

    def __init__(self, values: Tensor, layout: str = "contiguous"):
        values = values.detach()
        rank = values.dim()
        order = list(range(rank))  # outermost first
        if layout == "transposed" and rank >= 2:
            order[-2:] = order[:-3:-1]
        elif layout == "channels_last" and rank >= 3:
            order[-3:] = [rank - 2, rank - 1, rank - 3]
        elif layout == "reversed":
            order.reverse()
        strides, step = [0] * rank, 2 if layout == "sliced" else 1
        for axis in reversed(order):
            if layout == "expanded" and axis == 0:
                continue
            strides[axis] = step
            step = step * max(values.shape[axis], 1) + (3 if layout == "sliced" else 0)
        if layout == "expanded" and rank and values.shape[0]:
            values = values[:1].expand_as(values)
        self.buffer = values.new_full((step + 2 * self.MARGIN,), math.nan)
        self.tensor = self.buffer.as_strided(values.shape, strides, self.MARGIN)
        if layout == "expanded" and rank and values.shape[0]:
            self.tensor[0] = values[0]
        else:
            self.tensor.copy_(values)
        self._before = self.buffer.clone()

    def check(self, name: str = "input") -> None:
        """Fail if anything was written to the buffer."""
        assert_identical(self.buffer, self._before, f"memory of {name}")


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Inside, uninitialised floating tensors made from Python hold NaN and lie between NaN.

    What is never written shows in the result; writing outside of one fails at the end.
    """
    margin = 64  # whole cache lines, so that the tensors are aligned as they are elsewhere
    buffers: list[tuple[Tensor, int]] = []

    def poisoned(make: Callable[..., Tensor], plain_empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            if not t.is_floating_point() or t.device.type == "meta":
                return t
            span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
            with torch.no_grad():
                buffer = plain_empty(span + 2 * margin, dtype=t.dtype, device=t.device).fill_(math.nan)
                buffers.append((buffer, span))
                return buffer.as_strided(t.shape, t.stride(), margin).requires_grad_(t.requires_grad)

        return made

    plain_empty = torch.empty
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name), plain_empty)))
        yield
    for buffer, span in buffers:
        outside = torch.cat([buffer[:margin], buffer[margin + span :]])
        assert outside.isnan().all(), "memory outside of an output was written"


# --- random regions -------------------------------------------------------------------------------------------------

REGION_KINDS = ("inside", "outside", "empty", "tiny", "covering", "mixed")


def _axis(kind: str, side: int, uniform: Callable[[float, float], float]) -> tuple[float, float]:
    """A center and half-extent along an axis of `side` cells."""
    if kind == "outside":
        beyond = uniform(0.1, 4.0)
        return (-beyond if uniform(0, 1) < 0.5 else side - 1 + beyond), uniform(0.3, 8.0)
    center = uniform(-0.4, side - 0.6)
    if kind == "empty":
        return center, (0.0 if uniform(0, 1) < 0.5 else -uniform(0.1, 3.0))
    if kind == "tiny":
        return center, uniform(0.1, 0.45)
    if kind == "covering":
        return center, uniform(2.0, 10.0) * side
    return center, uniform(0.7, max(1.5, side / 2))


def _off_kinks(center: float, extent: float, side: int, margin: float) -> bool:
    """Whether the profile is smooth within `margin` at every cell: neither d = 0 nor d = s is near."""
    distances = [abs(center - p) for p in range(side)]
    return all(d >= margin and abs(d - extent) >= margin for d in distances)


def random_regions(
    shape: tuple[int, ...],
    size: tuple[int, int],
    *,
    kind: str = "inside",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    margin: float = 1e-3,
) -> Tensor:
    """Regions (*shape, 4) on the CPU whose profile has no kink within `margin` of a cell, as held in `dtype`.

    kind: one of REGION_KINDS; "empty" is so along one axis or both, "mixed" draws a kind for each region.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def held(value: float) -> float:
        return torch.tensor(value, dtype=torch.float64).to(dtype).item()

    def draw(kind: str, side: int) -> tuple[float, float]:
        while True:
            center, extent = map(held, _axis(kind, side, uniform))
            if extent <= 0 or _off_kinks(center, extent, side, margin):
                return center, extent

    rows = []
    for _ in range(math.prod(shape)):
        own = REGION_KINDS[int(uniform(0, len(REGION_KINDS) - 1))] if kind == "mixed" else kind
        (cx, w), (cy, h) = draw(own, size[1]), draw(own, size[0])
        if own == "empty" and uniform(0, 1) < 0.5:
            cy, h = draw("inside", size[0])
        rows.append([cx, cy, w, h])
    return torch.tensor(rows, dtype=torch.float64).reshape(*shape, 4).to(dtype)


@dataclass(frozen=True)
class RegionCase:
    """One call of a region op, small enough to print: the tensors follow from it."""

    op: str
    lead: tuple[int, ...]
    nodes: int
    channels: int
    size: tuple[int, int]
    profile: str = "linear"
    temperature: float = 1.0
    kind: str = "inside"
    dtype: torch.dtype = torch.float32
    regions_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    regions_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"profile": self.profile, "temperature": self.temperature}

    def input_names(self) -> tuple[str, ...]:
        return {"region_pool": ("x", "regions"), "region_remap": ("nodes", "regions"), "region_kernel": ("regions",)}[
            self.op
        ]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of x, nodes, regions or out."""
        if name == "out":
            name = {"region_pool": "nodes", "region_remap": "x", "region_kernel": "kernel"}[self.op]
        tail = {
            "x": (self.channels, *self.size),
            "nodes": (self.nodes, self.channels),
            "regions": (self.nodes, 4),
            "kernel": (self.nodes, *self.size),
        }[name]
        return (*self.lead, *tail)

    def out_dtype(self) -> torch.dtype:
        return self.regions_dtype if self.op == "region_kernel" else self.dtype

    def values(self) -> dict[str, Tensor]:
        """Contiguous inputs and `grad_output`, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors = {}
        for name in self.input_names():
            if name == "regions":
                tensors[name] = random_regions(
                    self.shape_of(name)[:-1], self.size, kind=self.kind, dtype=self.regions_dtype, seed=self.seed
                )
            else:
                tensors[name] = torch.randn(self.shape_of(name), generator=generator).to(self.dtype)
        tensors["grad_output"] = torch.randn(self.shape_of("out"), generator=generator).to(self.out_dtype())
        return tensors

    def guarded(self, device: torch.device | str = DEVICE) -> dict[str, Guarded]:
        """The same, each in a poisoned buffer in this case's layouts."""
        layouts = {"regions": self.regions_layout, "grad_output": self.grad_layout}
        return {name: Guarded(t.to(device), layouts.get(name, self.layout)) for name, t in self.values().items()}

    def function(self, module: ModuleType) -> Callable[..., Tensor]:
        """The op of `module` (dt.ops or dt.reference) as a function of its tensors, by name."""
        op = getattr(module, self.op)
        if self.op == "region_pool":
            return lambda x, regions: op(x, regions, **self.options)
        if self.op == "region_remap":
            return lambda nodes, regions: op(nodes, regions, self.size, **self.options)
        return lambda regions: op(regions, self.size, **self.options)

    def floors(self, inputs: Mapping[str, Tensor], grad_output: Tensor) -> dict[str, float]:
        """The norm below which a gradient is mere cancellation: 2 % of the terms that cancel.

        A region that reaches a single cell weights it 1 wherever it is: its gradient is zero, the difference of terms
        that are as large as 1 / (extent - distance).
        """
        regions, grad = inputs["regions"].detach().double().abs(), grad_output.double().abs()
        if not regions.numel() or not grad.numel():
            return {}
        cotangent = grad
        if self.op == "region_pool":
            cotangent = torch.einsum("...nc,...chw->...nhw", grad, inputs["x"].detach().double().abs())
        elif self.op == "region_remap":
            cotangent = torch.einsum("...chw,...nc->...nhw", grad, inputs["nodes"].detach().double().abs())
        cx, cy, w, h = inputs["regions"].detach().double().unbind(-1)
        across, down = self._axis_terms(cx, w, self.size[1]), self._axis_terms(cy, h, self.size[0])
        terms = [
            torch.einsum("...nhw,...nh,...nw->...n", cotangent, ky, kx)
            for ky, kx in ((down[0], across[1]), (down[1], across[0]))
        ]
        return {"grad_regions": 0.02 * torch.stack(terms).norm().item()}

    def _axis_terms(self, center: Tensor, extent: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """A normalised axis, and the sum of the sizes of the terms of its derivative."""
        distance = (center.unsqueeze(-1) - torch.arange(side, device=center.device)).abs()
        extent = extent.unsqueeze(-1)
        if self.profile == "gaussian":
            extent = extent.clamp(min=1e-3)
            weight = torch.softmax(-(distance**2) / (2 * extent**2), dim=-1)
            slope = weight * (distance / extent**2 + distance**2 / extent**3)
            return weight, slope + weight * slope.sum(-1, keepdim=True)
        inside = (extent - distance).clamp(min=0)
        weight, slope = inside, (inside > 0).double()
        if self.profile == "log-linear":
            weight, slope = (
                (inside * self.temperature).log1p(),
                slope * self.temperature / (1 + self.temperature * inside),
            )
        total = weight.sum(-1, keepdim=True).clamp(min=1e-300)
        weight, slope = weight / total, slope / total
        return weight, slope + weight * slope.sum(-1, keepdim=True)


def region_cases(op: str, *, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> st.SearchStrategy[RegionCase]:
    """Cases of one op: sizes at the edges of blocks, degenerate regions, every layout and profile.

    Interpreted kernels take milliseconds per program, so sizes are smaller there.
    """
    small = INTERPRETED
    side = st.sampled_from((1, 2, 5, 15, 16, 17, 20) if small else (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65))
    lead = [(), (1,), (2,), (0,), (1, 2), (2, 1, 1)] + ([] if small else [(3,), (2, 2), (2, 1, 3), (2, 0, 1)])

    @st.composite
    def cases(draw: st.DrawFn) -> RegionCase:
        dtype = draw(st.sampled_from(list(dtypes)))
        wide = [dtype, torch.float32] if op != "region_kernel" and dtype != torch.float32 else [dtype]
        height, width = draw(side), draw(side)
        channels = st.sampled_from((1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 70, 0))
        if op == "region_pool" and draw(st.integers(0, 15)) == 15:
            height = 0
        return RegionCase(
            op=op,
            lead=draw(st.sampled_from(lead)),
            nodes=draw(st.sampled_from((1, 2, 9, 0, 12) if small else (1, 2, 9, 15, 16, 17, 33, 64, 65, 0))),
            channels=1 if op == "region_kernel" else draw(channels),
            size=(height, width),
            profile=draw(st.sampled_from(PROFILES)),
            temperature=draw(st.sampled_from((1.0, 0.3, 4.0))),
            kind=draw(st.sampled_from(REGION_KINDS)),
            dtype=dtype,
            regions_dtype=draw(st.sampled_from(wide)),
            layout=draw(st.sampled_from(LAYOUTS)),
            regions_layout=draw(st.sampled_from(LAYOUTS)),
            grad_layout=draw(st.sampled_from(LAYOUTS)),
            seed=draw(st.integers(0, 2**16)),
        )

    return cases()


def settings(examples: int) -> hypothesis.settings:
    """Hypothesis settings: the same examples in every run, fewer of them where kernels are interpreted."""
    return hypothesis.settings(
        max_examples=max(examples // 8, 5) if INTERPRETED else examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[p for p in hypothesis.Phase if p is not hypothesis.Phase.explain],
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
