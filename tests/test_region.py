"""The region ops on every backend that can run, against the reference and against literal loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from support import (
    DEVICE,
    FULL,
    INTERPRETED,
    LAYOUTS,
    PROFILES,
    REGION_KINDS,
    REGION_OPS,
    RegionCase,
    assert_all_close,
    assert_close,
    assert_identical,
    backends,
    backends_and_dtypes,
    in_full,
    poisoned_outputs,
    random_regions,
    region_cases,
    relative_error,
    settings,
    value_and_gradients,
)
from torch import Tensor
from torch.autograd import forward_ad

import dyreg_triton as dt
from dyreg_triton.testing import check_call

HALVES = (torch.float16, torch.bfloat16)
on_backends = pytest.mark.parametrize("backend", backends())
on_profiles = pytest.mark.parametrize("profile", PROFILES)
on_ops = pytest.mark.parametrize("op", REGION_OPS)


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def reference_results(case: RegionCase, inputs: dict[str, Tensor], grad_output: Tensor) -> dict[str, Tensor | None]:
    """Output and gradients of the reference in float64."""
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    return value_and_gradients(case.function(dt.reference), wide, grad_output.double())


def check(case: RegionCase, backend: str) -> None:
    """Output and every gradient against the float64 reference, in poisoned memory; the second run gives the same."""
    op = getattr(dt.ops, case.op)

    def contiguous(*args: Tensor, **options: Any) -> Tensor:
        out = op(*args, **options)
        assert out.is_contiguous()
        assert out.dtype == case.out_dtype()
        return out

    with dt.backend(backend):
        check_call(contiguous, getattr(dt.reference, case.op), case.call(), repeat=not INTERPRETED, opcheck=False)


# --- against the reference ------------------------------------------------------------------------------------------


def hypothesis_test(op: str, dtypes: tuple[torch.dtype, ...], examples: int) -> Callable[..., None]:
    """A test of `op` over random cases: 300 over the dtypes of a GPU. `backend` comes from the caller's mark."""

    @settings(examples // 2 if INTERPRETED and not FULL else examples)
    @given(case=region_cases(op, dtypes=dtypes))
    @example(case=RegionCase(op, (2, 1), 9, 17, (15, 17), kind="mixed", dtype=dtypes[0], regions_dtype=dtypes[0]))
    def test(backend: str, case: RegionCase) -> None:
        check(case, backend)

    return test


test_pool_float32 = on_backends(hypothesis_test("region_pool", (torch.float32,), 200))
test_remap_float32 = on_backends(hypothesis_test("region_remap", (torch.float32,), 200))
test_kernel_float32 = on_backends(hypothesis_test("region_kernel", (torch.float32,), 200))
test_pool_halves = on_backends(hypothesis_test("region_pool", HALVES, 100))
test_remap_halves = on_backends(hypothesis_test("region_remap", HALVES, 100))
test_kernel_halves = on_backends(hypothesis_test("region_kernel", HALVES, 100))
on_float64_backends = pytest.mark.parametrize("backend", backends(dtype=torch.float64))
test_pool_float64 = on_float64_backends(hypothesis_test("region_pool", (torch.float64,), 40))
test_remap_float64 = on_float64_backends(hypothesis_test("region_remap", (torch.float64,), 40))
test_kernel_float64 = on_float64_backends(hypothesis_test("region_kernel", (torch.float64,), 40))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
@pytest.mark.parametrize("kind", REGION_KINDS)
@on_profiles
@on_ops
def test_every_kind_of_region(op: str, profile: str, kind: str, backend: str, dtype: torch.dtype) -> None:
    lead = (1,) if INTERPRETED else (2,)
    check(RegionCase(op, lead, 5, 6, (7, 9), profile, 2.0, kind, dtype, dtype, seed=3), backend)


@on_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["layout", "regions_layout", "grad_layout"])
@pytest.mark.parametrize("op", ["region_pool", "region_remap"])
def test_every_layout(op: str, which: str, layout: str, backend: str) -> None:
    check(RegionCase(op, (2, 2), 3, 5, (6, 7), kind="mixed", seed=1, **{which: layout}), backend)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(torch.float16, torch.float32))
@pytest.mark.parametrize("nodes", [64, 70])
@on_ops
def test_many_nodes(op: str, nodes: int, backend: str, dtype: torch.dtype) -> None:
    """As many as one program holds, and more."""
    check(RegionCase(op, (2,), nodes, 17, (5, 7), kind="mixed", dtype=dtype, regions_dtype=dtype, seed=2), backend)


@pytest.mark.parametrize("backend", backends("eager") + ([] if INTERPRETED else backends("triton")))
@pytest.mark.parametrize("op", ["region_pool", "region_remap"])
def test_large(op: str, backend: str) -> None:
    channels = 4096 if DEVICE.type == "cuda" else 512
    check(RegionCase(op, (1,), 64, channels, (128, 96), kind="mixed", seed=2), backend)


@pytest.mark.parametrize("backend", backends("eager") + ([] if INTERPRETED else backends("triton")))
def test_large_kernel(backend: str) -> None:
    check(RegionCase("region_kernel", (2,), 64, 1, (96, 128), kind="mixed", seed=2), backend)


# --- the definition, in loops ---------------------------------------------------------------------------------------


def literal_axis(center: float, extent: float, side: int, profile: str, temperature: float) -> list[float]:
    """One axis of a kernel, normalised, cell by cell."""
    if extent <= 0:
        return [0.0] * side
    weights = []
    for p in range(side):
        d = abs(center - p)
        if profile == "linear":
            weights.append(max(0.0, extent - d))
        elif profile == "gaussian":
            weights.append(math.exp(-(d**2) / (2 * extent**2)))
        else:
            weights.append(math.log(1 + temperature * max(0.0, extent - d)))
    total = sum(weights)
    return [w / total if total > 0 else 0.0 for w in weights]


def literal_kernel(regions: Tensor, size: tuple[int, int], profile: str, temperature: float) -> Tensor:
    kernels = []
    for cx, cy, w, h in regions.tolist():
        across = literal_axis(cx, w, size[1], profile, temperature)
        down = literal_axis(cy, h, size[0], profile, temperature)
        kernels.append([[ky * kx for kx in across] for ky in down])
    return torch.tensor(kernels, dtype=torch.float64)


BY_HAND = [
    [2.3, 1.2, 1.6, 0.9],
    [4.0, 3.0, 2.0, 2.0],  # on kinks
    [-1.0, 5.5, 3.3, 4.1],  # outside on both sides
    [1.1, 1.1, 0.0, 2.0],  # empty across
    [1.1, 1.1, 2.0, -1.0],  # empty down
    [2.5, 1.5, 0.3, 0.7],  # reaches no column
    [3.0, 2.0, 40.0, 60.0],
]


@pytest.mark.parametrize("temperature", [1.0, 0.25, 7.5])
@on_profiles
@pytest.mark.parametrize("backend", backends(dtype=torch.float32))
def test_by_hand(backend: str, profile: str, temperature: float, device: torch.device) -> None:
    size = (5, 6)
    regions = torch.tensor(BY_HAND, dtype=torch.float32)
    if profile == "gaussian":
        regions = regions[[0, 1, 2, 3, 4, 6]]  # the loops underflow where a region is narrow
    kernel = literal_kernel(regions.double(), size, profile, temperature)
    options = {"profile": profile, "temperature": temperature}
    x, nodes = torch.randn(3, *size), torch.randn(len(regions), 3)
    regions = regions.to(device)
    with dt.backend(backend):
        assert_close(dt.ops.region_kernel(regions, size, **options), kernel)
        pooled = dt.ops.region_pool(x.to(device), regions, **options)
        mapped = dt.ops.region_remap(nodes.to(device), regions, size, **options)
    assert_close(pooled, torch.einsum("nhw,chw->nc", kernel, x.double()))
    assert_close(mapped, torch.einsum("nhw,nc->chw", kernel, nodes.double()))


@on_profiles
def test_reference_by_hand_in_float64(profile: str) -> None:
    regions = torch.tensor([r for r in BY_HAND if r[2] != 0.3], dtype=torch.float64)
    actual = dt.reference.region_kernel(regions, (5, 6), profile=profile, temperature=0.7)
    assert_close(actual, literal_kernel(regions, (5, 6), profile, 0.7), tolerance=1e-13)


@on_backends
def test_axes_are_not_mixed_up(backend: str, device: torch.device) -> None:
    """One cell in column 4 of row 1; one whole row; one whole column."""
    regions = torch.tensor([[4.0, 1.0, 0.5, 0.5], [3.0, 2.0, 1e6, 0.5], [5.0, 1.0, 0.5, 1e6]], device=device)
    with dt.backend(backend):
        kernel = dt.ops.region_kernel(regions, (3, 7)).cpu()
    cell, row, column = torch.zeros(3, 7), torch.zeros(3, 7), torch.zeros(3, 7)
    cell[1, 4] = 1
    row[2] = 1 / 7
    column[:, 5] = 1 / 3
    assert_close(kernel, torch.stack([cell, row, column]).double())


@on_profiles
@on_backends
def test_kernels_sum_to_one(backend: str, profile: str, device: torch.device) -> None:
    regions = random_regions((2, 20), (9, 14), kind="inside", seed=4).to(device)
    with dt.backend(backend):
        sums = dt.ops.region_kernel(regions, (9, 14), profile=profile).sum((-1, -2))
    assert_close(sums, torch.ones(2, 20, dtype=torch.float64))


@on_backends
def test_temperature_is_of_log_linear_only(backend: str, device: torch.device) -> None:
    regions = random_regions((4,), (6, 8)).to(device)
    with dt.backend(backend):
        for profile in PROFILES:
            cold, hot = (dt.ops.region_kernel(regions, (6, 8), profile=profile, temperature=t) for t in (0.1, 10.0))
            assert cold.equal(hot) == (profile != "log-linear")
        assert dt.ops.region_kernel(regions, (6, 8)).equal(
            dt.ops.region_kernel(regions, (6, 8), profile="linear", temperature=1.0)
        )
        default = dt.ops.region_kernel(regions, (6, 8), profile="log-linear")
        assert default.equal(dt.ops.region_kernel(regions, (6, 8), profile="log-linear", temperature=1.0))


@on_backends
def test_integer_temperature(backend: str, device: torch.device) -> None:
    regions = random_regions((4,), (6, 8)).to(device)
    with dt.backend(backend):
        one = dt.ops.region_kernel(regions, (6, 8), profile="log-linear", temperature=2)
        assert one.equal(dt.ops.region_kernel(regions, (6, 8), profile="log-linear", temperature=2.0))


# --- sub-gradients at the kinks -------------------------------------------------------------------------------------


def literal_axis_derivatives(
    center: float, extent: float, side: int, profile: str, temperature: float
) -> tuple[list[float], list[float]]:
    """d(normalised axis) / d(center) and / d(extent), with slope 0 at d = 0 and at d = s."""
    if extent <= 0:
        return [0.0] * side, [0.0] * side
    raw, by_center, by_extent = [], [], []
    for p in range(side):
        d = abs(center - p)
        sign = (center > p) - (center < p)
        inside = max(0.0, extent - d)
        if profile == "gaussian":
            k = math.exp(-(d**2) / (2 * extent**2))
            raw.append(k)
            by_center.append(-k * d * sign / extent**2)
            by_extent.append(k * d**2 / extent**3)
            continue
        slope = 1.0 if profile == "linear" else temperature / (1 + temperature * inside)
        raw.append(inside if profile == "linear" else math.log(1 + temperature * inside))
        by_center.append(-slope * sign if inside > 0 else 0.0)
        by_extent.append(slope if inside > 0 else 0.0)
    total = sum(raw)
    if total == 0:
        return [0.0] * side, [0.0] * side
    return tuple(  # type: ignore[return-value]
        [(own - k * sum(every) / total) / total for own, k in zip(every, raw, strict=True)]
        for every in (by_center, by_extent)
    )


@on_profiles
@on_ops
@on_backends
def test_subgradients_at_kinks(backend: str, op: str, profile: str, device: torch.device) -> None:
    """Centers on cells and extents that end on cells: the slope is 0 at d = 0 and at d = s."""
    size, temperature = (6, 7), 0.5
    regions = torch.tensor(
        [[3.0, 2.0, 2.0, 1.0], [2.5, 3.5, 1.5, 0.5], [0.0, 5.0, 4.0, 3.0], [6.0, 0.0, 1.0, 2.0], [-1.0, 7.0, 2.0, 2.0]]
    )
    case = RegionCase(op, (), len(regions), 3, size, profile, temperature)
    values = case.values() | {"regions": regions}
    grad = values.pop("grad_output").double()
    if op == "region_pool":
        grad = torch.einsum("nc,chw->nhw", grad, values["x"].double())
    elif op == "region_remap":
        grad = torch.einsum("chw,nc->nhw", grad, values["nodes"].double())
    expected = torch.zeros(len(regions), 4, dtype=torch.float64)
    for n, (cx, cy, w, h) in enumerate(regions.tolist()):
        kx, ky = (
            torch.tensor(literal_axis(c, s, side, profile, temperature), dtype=torch.float64)
            for c, s, side in ((cx, w, size[1]), (cy, h, size[0]))
        )
        across = torch.tensor(literal_axis_derivatives(cx, w, size[1], profile, temperature), dtype=torch.float64)
        down = torch.tensor(literal_axis_derivatives(cy, h, size[0], profile, temperature), dtype=torch.float64)
        expected[n, 0::2] = torch.einsum("hw,h,dw->d", grad[n], ky, across)
        expected[n, 1::2] = torch.einsum("hw,dh,w->d", grad[n], down, kx)
    leaves = {name: t.to(device).requires_grad_() for name, t in values.items()}
    with dt.backend(backend):
        actual = value_and_gradients(case.function(dt.ops), leaves, case.values()["grad_output"].to(device))
    assert_close(actual["grad_regions"], expected, "grad_regions")


# --- degenerate regions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extents", [(0.0, 2.0), (2.0, 0.0), (-1.0, 2.0), (2.0, -1e-6), (-3.0, -3.0), (-math.inf, 1.0)])
@on_profiles
@on_ops
@on_backends
def test_empty_region(backend: str, op: str, profile: str, extents: tuple[float, float], device: torch.device) -> None:
    """Nothing in, nothing out, no gradient; the regions beside it are as without it."""
    case = RegionCase(op, (), 3, 4, (5, 6), profile, seed=1)
    values = {name: t.to(device) for name, t in case.values().items()}
    values["regions"][1] = torch.tensor([2.2, 1.3, *extents])
    grad_output = values.pop("grad_output")
    with dt.backend(backend):
        actual = value_and_gradients(case.function(dt.ops), {name: leaf(t) for name, t in values.items()}, grad_output)
        kernel = dt.ops.region_kernel(values["regions"], case.size, profile=profile)
    assert not kernel[1].any()
    assert actual["grad_regions"][1].eq(0).all()
    others = [0, 2]
    assert actual["grad_regions"][others].ne(0).any(0).all()
    if op == "region_remap":
        assert actual["grad_nodes"][1].eq(0).all()
        fewer = values | {"nodes": values["nodes"][others]}
    else:
        assert actual["out"][1].eq(0).all()
        fewer, grad_output = dict(values), grad_output[others]
    fewer["regions"] = values["regions"][others]
    with dt.backend(backend):
        expected = value_and_gradients(
            case.function(dt.ops), {name: leaf(t.double().to(t.dtype)) for name, t in fewer.items()}, grad_output
        )
    kept = {
        name: t if name == "grad_x" or (name, op) == ("out", "region_remap") else t[others]
        for name, t in actual.items()
    }
    assert_all_close(kept, expected)


@pytest.mark.parametrize("profile", ["linear", "log-linear"])
@pytest.mark.parametrize(
    "region",
    [
        [-3.0, 2.0, 2.5, 2.0],
        [9.0, 2.0, 2.5, 2.0],
        [2.0, -9.0, 2.0, 5.0],
        [2.0, 1e30, 2.0, 5.0],
        [2.5, 2.0, 0.4, 2.0],
        [-2.0, 2.0, 2.0, 2.0],  # d = s at the edge
    ],
)
@on_ops
@on_backends
def test_compact_region_that_reaches_no_cell(
    backend: str, op: str, region: list[float], profile: str, device: torch.device
) -> None:
    case = RegionCase(op, (), 1, 4, (5, 6), profile)
    values = {name: t.to(device) for name, t in case.values().items()}
    values["regions"] = torch.tensor([region], device=device)
    grad_output = values.pop("grad_output")
    with dt.backend(backend):
        actual = value_and_gradients(case.function(dt.ops), {name: leaf(t) for name, t in values.items()}, grad_output)
    for name, t in actual.items():
        assert t.eq(0).all(), name


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
@pytest.mark.parametrize("distance", [20.0, 1e3, 2e4])
def test_gaussian_never_vanishes(distance: float, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """However far the center and small the extent, the nearest cell has the largest weight and the sum is one."""
    if dtype == torch.float16:
        distance = min(distance, 1e4)
    regions = torch.tensor([[-distance, 2.0, 1.0, 2.0], [3.0, 4 + distance, 2.0, 0.5], [distance, -distance, 0.1, 0.1]])
    regions = regions.to(device, dtype).requires_grad_()
    with dt.backend(backend):
        kernel = dt.ops.region_kernel(regions, (5, 6), profile="gaussian")
    assert_close(kernel.sum((-1, -2)), torch.ones(3, dtype=torch.float64))
    corners = kernel.detach().cpu()
    assert corners[0].sum(0).argmax() == 0
    assert corners[1].sum(1).argmax() == 4
    assert corners[2].argmax() == 5
    (grad,) = torch.autograd.grad(kernel.double().square().sum(), regions)
    assert grad.isfinite().all()


@on_ops
@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_far_gaussian_is_precise(backend: str, op: str, device: torch.device) -> None:
    """The squared distance is large there, and only its differences between cells matter.

    The reference squares as the paper does, and is so precise in float64 only.
    """
    case = RegionCase(op, (), 4, 3, (6, 7), "gaussian", seed=3)
    values = {name: t.to(device) for name, t in case.values().items()}
    values["regions"] = torch.tensor(
        [[2e4, 2.2, 160.0, 2.0], [-3e4, 2.2, 190.0, 2.0], [3.1, 4e4, 3.0, 230.0], [2.8, -2e4, 3.0, 165.0]],
        device=device,
    )
    grad_output = values.pop("grad_output")
    expected = reference_results(case, values, grad_output)
    with dt.backend(backend):
        actual = value_and_gradients(case.function(dt.ops), {name: leaf(t) for name, t in values.items()}, grad_output)
    assert_all_close(actual, expected)


@on_backends
def test_half_precision_sums_do_not_overflow(backend: str, device: torch.device) -> None:
    """Neither values near the largest of float16 nor the sum of a kernel over the whole map overflow."""
    x = torch.full((2, 20, 18), 6e4, dtype=torch.float16, device=device)
    regions = torch.tensor([[8.0, 9.0, 3e4, 6e4], [8.0, 9.0, 6.0, 6.0]], dtype=torch.float16, device=device)
    with dt.backend(backend):
        pooled = dt.ops.region_pool(x, regions)
        kernel = dt.ops.region_kernel(regions, (20, 18))
    assert_close(pooled, torch.full((2, 2), 6e4, dtype=torch.float64))
    assert_close(kernel[0], torch.full((20, 18), 1 / 360, dtype=torch.float64))


@on_backends
def test_bfloat16_sums_accumulate_in_float32(backend: str, device: torch.device) -> None:
    """A bfloat16 accumulator would stop at 256 of these; a float32 one does not."""
    nodes = torch.ones(600, 3, dtype=torch.bfloat16, device=device)
    regions = torch.tensor([1.0, 1.0, 0.5, 0.5], device=device).repeat(600, 1)
    with dt.backend(backend):
        y = dt.ops.region_remap(nodes, regions, (3, 3))
    assert_close(y[:, 1, 1], torch.full((3,), 600.0, dtype=torch.float64))


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(torch.float16, torch.float32))
@pytest.mark.parametrize("parameter", range(4), ids=["cx", "cy", "w", "h"])
@on_profiles
@on_ops
def test_nan_region_stays_where_it_is(
    op: str, profile: str, parameter: int, backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    """It spoils its own node in pool and kernel, its own leading index in remap and in the gradients, nothing else."""
    case = RegionCase(op, (2,), 3, 4, (4, 5), profile, dtype=dtype, regions_dtype=dtype, seed=2)
    values = {name: t.to(device) for name, t in case.values().items()}
    grad_output = values.pop("grad_output")
    spoiled = {name: t.clone() for name, t in values.items()}
    spoiled["regions"][1, 1, parameter] = math.nan
    with dt.backend(backend):
        clean, dirty = (
            value_and_gradients(case.function(dt.ops), {name: leaf(t) for name, t in given.items()}, grad_output)
            for given in (values, spoiled)
        )
    if op == "region_remap":
        assert dirty["out"][1].isnan().any()
    else:
        assert dirty["out"][1, 1].isnan().all()
        assert_close(dirty["out"][1, [0, 2]], clean["out"][1, [0, 2]].double())
    assert dirty["grad_regions"][1, 1].isnan().any()
    if op == "region_pool":
        assert dirty["grad_x"][1].isnan().any()
    elif op == "region_remap":
        assert dirty["grad_nodes"][1, 1].isnan().all()
    for name, t in dirty.items():
        assert_close(t[0], clean[name][0].double(), name)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3), (1, 1, 1), (1, 2, 1, 3)])
@on_ops
@on_backends
def test_leading_dimensions(backend: str, op: str, lead: tuple[int, ...], device: torch.device) -> None:
    """Every leading index is a call of its own."""
    case = RegionCase(op, lead, 3, 4, (5, 6), "log-linear", seed=3)
    values = {name: t.to(device) for name, t in case.values().items()}
    values.pop("grad_output")
    with dt.backend(backend):
        whole = case.function(dt.ops)(**values)
        assert whole.shape == case.shape_of("out")
        for index in itertools.product(*map(range, lead)):
            alone = case.function(dt.ops)(**{name: t[index] for name, t in values.items()})
            assert_close(whole[index], alone.double())


EMPTY_SIZES = [
    {"lead": (0,)},
    {"lead": (2, 0)},
    {"lead": (0, 1, 2)},
    {"nodes": 0},
    {"lead": (0,), "nodes": 0},
    {"channels": 0},
    {"nodes": 0, "channels": 0},
    {"size": (0, 4)},
    {"size": (3, 0)},
    {"size": (0, 0)},
    {"size": (0, 4), "nodes": 0},
]


def empty_sizes(op: str) -> list[dict]:
    """Those that concern `op`: a kernel has no channels, and the size of a map to make is positive."""
    absent = {"region_pool": (), "region_remap": ("size",), "region_kernel": ("size", "channels")}[op]
    return [sizes for sizes in EMPTY_SIZES if not any(name in sizes for name in absent)]


@pytest.mark.parametrize(("op", "sizes"), [(op, sizes) for op in REGION_OPS for sizes in empty_sizes(op)], ids=str)
@on_backends
def test_empty_sizes(backend: str, op: str, sizes: dict, device: torch.device) -> None:
    """Empty in, empty or zero out, and gradients of the right shapes that are zero."""
    case = RegionCase(**{"op": op, "lead": (2,), "nodes": 3, "channels": 4, "size": (3, 4), **sizes})
    regions = random_regions(case.shape_of("regions")[:-1], (3, 4)).to(device).requires_grad_()
    leaves = {"regions": regions}
    for name in case.input_names():
        if name != "regions":
            leaves[name] = torch.randn(case.shape_of(name), device=device, requires_grad=True)
    with dt.backend(backend), poisoned_outputs():
        out = case.function(dt.ops)(**leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), allow_unused=True)
    assert out.shape == case.shape_of("out")
    assert out.is_contiguous()
    assert op == "region_kernel" or out.eq(0).all()
    for t, grad in zip(leaves.values(), grads, strict=True):
        assert grad is not None
        assert grad.shape == t.shape
        assert grad.eq(0).all()


# --- dtypes and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
@pytest.mark.parametrize("wide_regions", [False, True])
@on_ops
def test_dtypes(op: str, wide_regions: bool, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    case = RegionCase(
        op, (2,), 3, 4, (5, 60), dtype=dtype, regions_dtype=torch.float32 if wide_regions else dtype, seed=7
    )
    check(case, backend)


@pytest.mark.parametrize("wanted", ["features", "regions", "none"])
@pytest.mark.parametrize("op", ["region_pool", "region_remap"])
@on_backends
def test_gradient_of_one_input_only(backend: str, op: str, wanted: str, device: torch.device) -> None:
    case = RegionCase(op, (2,), 3, 4, (5, 6), seed=8)
    values = {name: t.to(device) for name, t in case.values().items()}
    grad_output = values.pop("grad_output")
    expected = reference_results(case, values, grad_output)
    features = case.input_names()[0]
    chosen = {"features": features, "regions": "regions", "none": ""}[wanted]
    for name, t in values.items():
        t.requires_grad_(name == chosen)
    with dt.backend(backend):
        out = case.function(dt.ops)(**values)
        assert out.requires_grad == (wanted != "none")
        if out.requires_grad:
            out.backward(grad_output)
    assert_close(out, expected["out"])
    for name, t in values.items():
        assert_close(t.grad, expected[f"grad_{name}"] if name == chosen else None, name)


@on_ops
@on_backends
def test_no_graph_under_no_grad(backend: str, op: str, device: torch.device) -> None:
    case = RegionCase(op, (2,), 3, 4, (5, 6))
    values = {name: t.to(device).requires_grad_() for name, t in case.values().items()}
    values.pop("grad_output")
    with dt.backend(backend):
        with_graph = case.function(dt.ops)(**values)
        for without in (torch.no_grad(), torch.inference_mode()):
            with without:
                out = case.function(dt.ops)(**values)
            assert not out.requires_grad
            assert_close(out, with_graph.double())


@on_ops
@on_backends
def test_backward_twice_and_bit_identical(backend: str, op: str, device: torch.device) -> None:
    """The same bits from run to run, and from one graph used twice."""
    case = RegionCase(op, (1,), 9, 33, (9, 11) if INTERPRETED else (17, 18), "log-linear", kind="mixed", seed=9)
    values = {name: t.to(device) for name, t in case.values().items()}
    grad_output = values.pop("grad_output")
    with dt.backend(backend):
        runs = [
            value_and_gradients(case.function(dt.ops), {name: leaf(t) for name, t in values.items()}, grad_output)
            for _ in range(3)
        ]
        leaves = {name: leaf(t) for name, t in values.items()}
        out = case.function(dt.ops)(**leaves)
        kept = [torch.autograd.grad(out, list(leaves.values()), grad_output, retain_graph=True) for _ in range(2)]
    for run in runs[1:]:
        for name, t in run.items():
            assert_identical(t, runs[0][name], name)
    for grads in kept:
        for name, grad in zip(leaves, grads, strict=True):
            assert_identical(grad, runs[0][f"grad_{name}"], name)


@on_ops
@on_backends
def test_input_changed_before_backward(backend: str, op: str, device: torch.device) -> None:
    """The gradient is that of the values of the forward, or it is refused."""
    case = RegionCase(op, (2,), 3, 4, (5, 6))
    values = {name: t.to(device).requires_grad_() for name, t in case.values().items()}
    grad_output = values.pop("grad_output").detach()
    expected = reference_results(case, values, grad_output)
    with dt.backend(backend):
        out = case.function(dt.ops)(**values)
        with torch.no_grad():
            values["regions"].add_(1)
        try:
            grads = torch.autograd.grad(out, list(values.values()), grad_output)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            return
    for name, grad in zip(values, grads, strict=True):
        assert_close(grad, expected[f"grad_{name}"], name)


@on_profiles
@on_ops
@pytest.mark.parametrize("backend", backends("eager", "reference"))
def test_gradcheck(backend: str, op: str, profile: str, device: torch.device) -> None:
    case = RegionCase(op, (2,), 3, 2, (4, 5), profile, 0.7, "inside", torch.float64, torch.float64, seed=4)
    values = [t.to(device).requires_grad_() for name, t in case.values().items() if name != "grad_output"]
    function = case.function(dt.ops)
    with dt.backend(backend):
        assert torch.autograd.gradcheck(
            lambda *tensors: function(**dict(zip(case.input_names(), tensors, strict=True))), values, atol=1e-7
        )


@on_profiles
@on_ops
@pytest.mark.parametrize("backend", backends("eager"))
def test_double_backward(backend: str, op: str, profile: str, device: torch.device) -> None:
    case = RegionCase(op, (2,), 2, 2, (3, 4), profile, 0.7, "inside", torch.float64, torch.float64, seed=4)
    values = [t.to(device).requires_grad_() for name, t in case.values().items() if name != "grad_output"]
    function = case.function(dt.ops)
    with dt.backend(backend):
        assert torch.autograd.gradgradcheck(
            lambda *tensors: function(**dict(zip(case.input_names(), tensors, strict=True))), values, atol=1e-6
        )


@pytest.mark.kernels
@on_ops
def test_double_backward_is_refused_by_triton(op: str, device: torch.device) -> None:
    case = RegionCase(op, (2,), 3, 4, (5, 6))
    values = {name: t.to(device).requires_grad_() for name, t in case.values().items()}
    values.pop("grad_output")

    def second_derivative() -> None:
        out = case.function(dt.ops)(**values)
        first = torch.autograd.grad(out.square().sum(), list(values.values()), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), list(values.values()))

    with dt.backend("triton"), pytest.raises(RuntimeError, match=rf"(?s)(?=.*{op})(?=.*eager)"):
        second_derivative()


# --- torch's transforms ---------------------------------------------------------------------------------------------


def tangent_case(op: str, dtype: torch.dtype, device: torch.device) -> tuple[Callable[..., Tensor], tuple, tuple]:
    case = RegionCase(op, (2,), 3, 4, (5, 6), "log-linear", 0.7, "inside", dtype, dtype, seed=5)
    values = case.values()
    values.pop("grad_output")
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(t.shape, generator=generator, dtype=dtype).to(device) for t in values.values())
    primals = tuple(t.to(device) for t in values.values())
    function = case.function(dt.ops)
    return lambda *ts: function(**dict(zip(case.input_names(), ts, strict=True))), primals, tangents


@on_ops
@pytest.mark.parametrize("backend", backends("eager"))
def test_forward_mode(backend: str, op: str, device: torch.device) -> None:
    function, primals, tangents = tangent_case(op, torch.float64, device)
    step = 1e-6
    with dt.backend(backend):
        ahead, behind = (
            function(*(p + sign * step * t for p, t in zip(primals, tangents, strict=True))) for sign in (1, -1)
        )
        expected = (ahead - behind) / (2 * step)
        out, derivative = torch.func.jvp(function, primals, tangents)
        assert_close(out, function(*primals))
        assert_close(derivative, expected, tolerance=1e-7)
        with forward_ad.dual_level():
            dual = function(*map(forward_ad.make_dual, primals, tangents))
            assert_close(forward_ad.unpack_dual(dual).tangent, expected, tolerance=1e-7)


@pytest.mark.kernels
@on_ops
def test_forward_mode_is_refused_by_triton(op: str, device: torch.device) -> None:
    function, primals, tangents = tangent_case(op, torch.float32, device)
    refused = pytest.raises(RuntimeError, match=rf"(?s)(?=.*{op})(?=.*eager)")
    with dt.backend("triton"):
        with refused:
            torch.func.jvp(function, primals, tangents)
        with forward_ad.dual_level(), refused:
            function(*map(forward_ad.make_dual, primals, tangents))


@on_ops
@pytest.mark.parametrize("backend", backends("eager"))
def test_func_transforms(backend: str, op: str, device: torch.device) -> None:
    """vmap over the leading dimension, and vmap of grad, are the batched call."""
    function, primals, _ = tangent_case(op, torch.float64, device)
    every = tuple(range(len(primals)))
    with dt.backend(backend):
        batched = function(*primals)
        assert_close(torch.func.vmap(function)(*primals), batched)
        leaves = [p.clone().requires_grad_() for p in primals]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        actual = torch.func.vmap(torch.func.grad(lambda *ts: function(*ts).square().sum(), every))(*primals)
        for name, got, want in zip(every, actual, expected, strict=True):
            assert_close(got, want, f"gradient {name}")


@on_ops
@pytest.mark.parametrize("backend", [*backends("triton", "eager"), *in_full(backends("reference"))])
def test_compile_without_graph_breaks(backend: str, op: str, device: torch.device) -> None:
    torch._dynamo.reset()
    case = RegionCase(op, (2,), 3, 4, (5, 6), "gaussian", seed=6)
    function = case.function(dt.ops)
    compiled = torch.compile(lambda **ts: function(**ts) * 2, backend="aot_eager", fullgraph=True)
    with dt.backend(backend):
        for lead in ((2,), (3,), (2, 2)):  # the second length makes the dimension dynamic
            values = {
                name: t.to(device)
                for name, t in RegionCase(op, lead, 3, 4, (5, 6), "gaussian", seed=6).values().items()
            }
            grad_output = values.pop("grad_output")
            expected = reference_results(case, values, 2 * grad_output) | {}
            expected["out"] = 2 * expected["out"]
            actual = value_and_gradients(compiled, {name: leaf(t) for name, t in values.items()}, grad_output)
            assert_all_close(actual, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("low", HALVES)
@on_ops
@on_backends
def test_autocast(backend: str, op: str, low: torch.dtype, device: torch.device) -> None:
    """Features are cast to the autocast dtype, regions never are."""
    case = RegionCase(op, (2,), 3, 4, (5, 6), seed=7)
    values = {name: t.to(device) for name, t in case.values().items()}
    grad_output = values.pop("grad_output")
    features = case.input_names()[0]
    cast = values if op == "region_kernel" else values | {features: values[features].to(low)}
    grad_output = grad_output if op == "region_kernel" else grad_output.to(low)
    function = case.function(dt.ops)
    with dt.backend(backend):
        expected = value_and_gradients(function, {name: leaf(t) for name, t in cast.items()}, grad_output)
        leaves = {name: leaf(t) for name, t in values.items()}
        with torch.autocast(device.type, dtype=low):
            out = function(**leaves)
            with torch.autocast(device.type, enabled=False):
                assert function(**values).dtype == torch.float32
        grads = torch.autograd.grad(out, list(leaves.values()), grad_output)
    assert out.dtype == (torch.float32 if op == "region_kernel" else low)
    assert_identical(out, expected["out"])
    for (name, t), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == t.dtype == torch.float32
        assert_identical(grad, expected[f"grad_{name}"].float(), name)


@on_backends
def test_autocast_does_not_move_regions(backend: str, device: torch.device) -> None:
    """Centers that bfloat16 would round by a sixteenth and more."""
    regions = torch.tensor([[17.1, 9.16, 1.5, 1.5]])
    weight = literal_kernel(regions.double(), (12, 20), "linear", 1.0)[0, 9, 17]
    x = torch.zeros(1, 12, 20, device=device)
    x[0, 9, 17] = 1
    with dt.backend(backend), torch.autocast(device.type, dtype=torch.bfloat16):
        pooled = dt.ops.region_pool(x, regions.to(device))
        mapped = dt.ops.region_remap(torch.ones(1, 1, device=device), regions.to(device), (12, 20))
    for value in (pooled[0, 0], mapped[0, 9, 17]):
        assert_close(value, weight, tolerance=5e-3)


@on_ops
@pytest.mark.parametrize("backend", [p for p in backends() if p.values[0] != "reference"])
def test_agrees_with_reference_in_its_own_dtype(backend: str, op: str, device: torch.device) -> None:
    """The reference takes the same arguments, and float32 too."""
    case = RegionCase(op, (2,), 3, 4, (5, 6), seed=8)
    values = {name: t.to(device) for name, t in case.values().items()}
    values.pop("grad_output")
    with dt.backend(backend):
        actual = case.function(dt.ops)(**values)
    with dt.backend("reference"):
        chosen = case.function(dt.ops)(**values)
    direct = case.function(dt.reference)(**values)
    assert_identical(chosen, direct)
    assert direct.dtype == torch.float32
    assert relative_error(actual, direct) < 1e-5


@on_backends
def test_compile_with_sizes_and_temperatures_that_change(backend: str, device: torch.device) -> None:
    """Neither a new size nor an annealed temperature may break the graph."""

    def call(x: Tensor, regions: Tensor, temperature: float) -> Tensor:
        return dt.ops.region_pool(x, regions, profile="log-linear", temperature=temperature)

    with dt.backend(backend):
        compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
        for frames, side, temperature in ((2, 6, 1.0), (3, 7, 2.0), (4, 8, 3.5), (5, 9, 4.5)):
            x = torch.randn(frames, 3, side, side + 1, device=device)
            regions = random_regions((frames, 2), (side, side + 1), seed=side).to(device)
            assert_close(compiled(x, regions, temperature), call(x, regions, temperature))
