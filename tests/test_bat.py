"""Bilinear attentional transforms and non-local blocks as layers: against literal formulas, and the published ways."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import published
import published_images
import pytest
import torch
from support import assert_close, assert_identical, assert_results_close, awake, backends, in_full, relative_error, run
from test_errors import NothingRuns, refused
from test_golden import BAT, NONLOCAL, Golden
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dyreg_triton as dt
from dyreg_triton.layers import windows

VIDEO, IMAGES = "models.non_local.", "model_zoo.non_local."
SMALL: dict[str, Any] = {"window": 3, "temporal_window": 2, "groups": 2, "temporal_groups": 4}
SMALL_IMAGES: dict[str, Any] = {"window": 3, "groups": 2, "dimensions": 2}
DEFAULTS: dict[str, Any] = {
    "window": 7,
    "temporal_window": 4,
    "groups": 4,
    "temporal_groups": None,
    "dimensions": 3,
    "normalisation": "softmax",
    "softmax_axis": "input",
    "window_rule": "weight",
    "remainder": "repeat",
}
on_backends = pytest.mark.parametrize("backend", backends())


def lively(layer: Any, seed: int = 7) -> Any:
    """Off its start: no bias is 0, norms have seen something, and the matrices are far from uniform."""
    awake(layer, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in layer.state_dict().items():
            last = name.rpartition(".")[2]
            if name.rpartition(".")[0].endswith(("conv_p", "conv_q", "conv_t")):
                t.mul_(3)
            if last == "running_mean":
                t.copy_(0.2 * torch.randn(t.shape, generator=generator))
            if last == "running_var":
                t.copy_(0.5 + torch.rand(t.shape, generator=generator))
            if t.dim() == 1 and last == "weight":  # of a norm
                t.copy_(1 + 0.3 * torch.randn(t.shape, generator=generator))
    return layer.eval()


def make(in_channels: int = 8, **options: Any) -> Any:
    small = SMALL_IMAGES if options.get("dimensions") == 2 else SMALL
    return lively(dt.layers.BATransform(in_channels, **{**small, **options}))


def block(in_channels: int = 8, **options: Any) -> Any:
    small = SMALL_IMAGES if options.get("dimensions") == 2 else {**SMALL, "temporal_groups": 2}
    return lively(dt.layers.BATBlock(in_channels, **{**small, **options}))


def nonlocal_block(in_channels: int = 8, **options: Any) -> Any:
    return lively(dt.layers.NonLocalBlock(in_channels, **options))


def clips(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 8, 4, 6, 6), dtype=dtype).to(device)


def tiny(device: torch.device, **options: Any) -> tuple[Any, Tensor]:
    """A layer and a clip for what is slow: interpreted kernels, compilers. Windows slide, sides are no multiples."""
    layer = make(4, **{"temporal_groups": 2, **options}).to(device)
    return layer, clips(1, 4, 3, 7, 4, device=device)


def fed(layer: nn.Module, x: Tensor, name: str = "conv2") -> Tensor:
    """What a submodule is called with."""
    seen: list[Tensor] = []
    handle = layer.get_submodule(name).register_forward_hook(lambda m, inputs, y: seen.append(inputs[0].detach()))
    layer(x)
    handle.remove()
    (found,) = seen
    return found


# --- the literal formula --------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """One axis of a map, by trial."""

    scale: int
    cells: int
    extended: int
    windows: int


def axis(n: int, window: int) -> Axis:
    scale = max(a for a in range(1, n + 1) if a * window <= n)
    cells = min(m for m in range(1, n + 1) if m * scale >= n)
    return Axis(scale, cells, cells * scale, sum(start + window <= cells for start in range(cells)))


def across(m: int, n: int, window: int) -> Axis:
    """The columns of an n x m map: by themselves, but where the published code takes the rows' two windows for both."""
    rows = axis(n, window)
    if rows.windows == 2 and rows.extended == n and m % rows.cells == 0:
        return Axis(m // rows.cells, rows.cells, m, 2)
    return axis(m, window)


def extended(x: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) to larger sizes, its last frame, row and column repeated."""
    for dim, size in enumerate(sizes, start=2):
        x = torch.cat([x, *[x.narrow(dim, x.shape[dim] - 1, 1)] * (size - x.shape[dim])], dim)
    return x


def assembled(conv: nn.Module, pooled: Tensor, window: int, groups: int) -> tuple[Tensor, Tensor]:
    """Logits (B, groups, F, cells, cells) of pooled features (B, k, F, cells), and which cells a window covers."""
    weight, bias = conv.weight.flatten(2), conv.bias
    cells = pooled.shape[-1]
    total = pooled.new_zeros(pooled.shape[0], groups, pooled.shape[2], cells, cells)
    count = pooled.new_zeros(cells, cells)
    for start in range(cells - window + 1):
        logits = torch.einsum("oks,bkfs->bof", weight, pooled[..., start : start + window]) + bias[:, None]
        place = (..., slice(start, start + window), slice(start, start + window))
        total[place] += logits.unflatten(1, (groups, window, window)).permute(0, 1, 4, 2, 3)
        count[place] += 1
    return total / count.clamp(min=1), count > 0


def normalised(logits: Tensor, covered: Tensor, dim: int, options: dict[str, Any]) -> Tensor:
    weights = logits.exp() if options["normalisation"] == "softmax" else 1 / (1 + (-logits).exp())
    if options["window_rule"] == "weight":
        weights = weights * covered
    return weights / weights.sum(dim, keepdim=True)


def kron_identity(matrix: Tensor, times: int) -> Tensor:
    one = torch.eye(times, dtype=matrix.dtype, device=matrix.device)
    return torch.einsum("...ij,uv->...iujv", matrix, one).flatten(-4, -3).flatten(-2, -1)


class Explicit(NamedTuple):
    p: Tensor
    q: Tensor
    t: Tensor | None
    x: Tensor  # extended
    mixed: Tensor  # before conv2, cut off
    out: Tensor


def explicit(layer: Any, x: Tensor, **given: Any) -> Explicit:
    """Windows one by one, matrices for every channel, block matrices; exact where norms are in evaluation."""
    options = {**DEFAULTS, **given}
    flat, dims = x.dim() == 4, options["dimensions"]
    assert flat == (dims == 2)
    k, window = options["groups"], options["window"]
    temporal = {2: 0, 3: 1}[dims] if options["temporal_groups"] is None else options["temporal_groups"]
    features = layer.conv1(x)
    x, features = (t[:, :, None] if flat else t for t in (x, features))
    frames, height, width = x.shape[2:]
    rows, columns = axis(height, window), across(width, height, window)
    times = axis(frames, options["temporal_window"]) if temporal else Axis(1, frames, frames, 1)
    sizes = (times.extended, rows.extended, columns.extended)
    x, features = extended(x, sizes), extended(features, sizes)
    a, b, d = rows.scale, columns.scale, times.scale

    tall = [features[..., i * a : (i + 1) * a, :].amax((-2, -1)) for i in range(rows.cells)]
    wide = [features[..., i * b : (i + 1) * b].amax((-2, -1)) for i in range(columns.cells)]
    p_dim, q_dim = (-1, -2) if options["softmax_axis"] == "input" else (-2, -1)
    p = normalised(*assembled(layer.conv_p, torch.stack(tall, -1), window, k), p_dim, options)
    q = normalised(*assembled(layer.conv_q, torch.stack(wide, -1), window, k), q_dim, options)
    each = x.shape[1] // k
    left = kron_identity(p, a).repeat_interleave(each, 1)
    right = kron_identity(q, b).repeat_interleave(each, 1)
    mixed = torch.einsum("bcfij,bcfjm,bcfmn->bcfin", left, x, right)
    t = None
    if temporal:
        long = [features[:, :, i * d : (i + 1) * d].mean((2, 3, 4)) for i in range(times.cells)]
        logits, covered = assembled(
            layer.conv_t, torch.stack(long, -1)[:, :, None], options["temporal_window"], temporal
        )
        t = normalised(logits[:, :, 0], covered, p_dim, options)
        over_time = kron_identity(t, d).repeat_interleave(x.shape[1] // temporal, 1)
        mixed = torch.einsum("bcuf,bcfhw->bcuhw", over_time, mixed)
    mixed = mixed[:, :, :frames, :height, :width]
    if flat:
        mixed = mixed[:, :, 0]
    return Explicit(p, q, t, x, mixed, layer.conv2(mixed))


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sigmoid": {"normalisation": "sigmoid"},
    "over outputs": {"softmax_axis": "output"},
    "logit 0": {"window_rule": "logit"},
    "logit 0, over outputs": {"window_rule": "logit", "softmax_axis": "output"},
    "sigmoid, logit 0": {"normalisation": "sigmoid", "window_rule": "logit"},
    "sigmoid, over outputs": {"normalisation": "sigmoid", "softmax_axis": "output"},
    "without time": {"temporal_groups": 0},
    "one group": {"groups": 1, "temporal_groups": None},
    "a group for each channel": {"groups": 8, "temporal_groups": 8},
    "more groups in space": {"groups": 8, "temporal_groups": 2},
    "windows of one": {"window": 1, "temporal_window": 1},
    "larger windows": {"window": 4, "temporal_window": 3},
    "images": {"dimensions": 2, "temporal_groups": None},
    "images, logit 0": {"dimensions": 2, "temporal_groups": 0, "window_rule": "logit"},
    "images, sigmoid": {"dimensions": 2, "temporal_groups": None, "normalisation": "sigmoid"},
}
# one window; multiples; two windows; three and uncovered cells; three and remainders; each side of its own
SIZES = [(2, 3, 3), (4, 6, 6), (2, 4, 4), (3, 5, 5), (5, 7, 8), (3, 4, 11)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_is_the_literal_formula(case: str, size: tuple[int, int, int]) -> None:
    """Output, matrices, what is mixed, and every gradient, in float64."""
    options = {**SMALL, **OPTIONS[case]}
    if min(size[1:]) < options["window"] or size[0] < options["temporal_window"]:
        pytest.skip("smaller than a window")
    layer = make(**options).double()
    x = clips(2, 8, *(size[1:] if options.get("dimensions") == 2 else size), dtype=torch.float64)
    wanted = explicit(layer, x, **options)
    found = layer.matrices(x)
    assert_close(found.p, wanted.p, "p", tolerance=1e-9)
    assert_close(found.q, wanted.q, "q", tolerance=1e-9)
    assert (found.t is None) == (wanted.t is None)
    if wanted.t is not None:
        assert_close(found.t, wanted.t, "t", tolerance=1e-9)
    assert_close(fed(layer, x), wanted.mixed, "mixed", tolerance=1e-9)
    expected = run(layer, x, call=lambda x: explicit(layer, x, **options).out)
    assert_results_close(run(layer, x), expected, 1e-8)


@pytest.mark.parametrize("case", ["defaults", "logit 0", "without time", "over outputs", "images", "sigmoid"])
@on_backends
def test_is_the_literal_formula_on_each_backend(backend: str, case: str, device: torch.device) -> None:
    options = {**SMALL, "temporal_groups": 2, **OPTIONS[case]}
    layer, x = tiny(device, **options)
    x = x[:, :, 0] if options.get("dimensions") == 2 else x
    double = copy.deepcopy(layer).double()
    expected = run(double, x.double(), call=lambda x: explicit(double, x, **options).out)
    with dt.backend(backend):
        actual = run(layer, x)
    assert_results_close(actual, expected, 2e-5)
    for name, value in actual.items():
        assert value is not None, name
        assert value.any(), name


@pytest.mark.parametrize("case", ["defaults", "sigmoid, logit 0", "images"])
def test_in_training(case: str) -> None:
    """Norms see the map."""
    options = {**SMALL, **OPTIONS[case]}
    layer = make(**options).double().train()
    x = clips(2, 8, *((6, 4) if options.get("dimensions") == 2 else (2, 6, 4)), dtype=torch.float64)
    twin = copy.deepcopy(layer)
    expected = run(twin, x, call=lambda x: explicit(twin, x, **options).out)
    assert_results_close(run(layer, x), expected, 1e-8)
    for name, value in twin.state_dict().items():
        assert_close(layer.state_dict()[name].double(), value.double(), name, tolerance=1e-9)


@pytest.mark.parametrize("normalisation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rule", ["weight", "logit"])
@pytest.mark.parametrize("over", ["input", "output"])
def test_weights_sum_to_one(over: str, rule: str, normalisation: str) -> None:
    layer = make(softmax_axis=over, window_rule=rule, normalisation=normalisation).double()
    p, q, t = matrices = layer.matrices(clips(2, 8, 5, 5, 7, dtype=torch.float64))
    assert matrices._fields == ("p", "q", "t")
    assert p.shape == (2, 2, 6, 5, 5)
    assert q.shape == (2, 2, 6, 4, 4)
    assert t.shape == (2, 4, 3, 3)
    rows, columns = (-1, -2) if over == "input" else (-2, -1)
    for matrix, dim, window in ((p, rows, 3), (q, columns, 3), (t, rows, 2)):
        sums = matrix.sum(dim)
        assert_close(sums, torch.ones_like(sums), tolerance=1e-12)
        places = torch.arange(matrix.shape[-1])
        uncovered = (places[:, None] - places).abs() >= window
        assert uncovered.any()
        assert (matrix[..., ~uncovered] > 0).all()
        assert (matrix[..., uncovered] == 0).all() == (rule == "weight")
        assert (matrix[..., uncovered] > 0).all() == (rule == "logit")


def test_a_mean_stays_within_its_inputs() -> None:
    """Over inputs, an output is a weighted mean of a map; and of a constant map that constant."""
    layer = make()
    x = clips(2, 8, 5, 7, 8)
    mixed = fed(layer, x)
    assert (mixed.amax((2, 3, 4)) <= x.amax((2, 3, 4)) + 1e-5).all()
    assert (mixed.amin((2, 3, 4)) >= x.amin((2, 3, 4)) - 1e-5).all()
    constant = torch.arange(8.0)[None, :, None, None, None].expand(2, 8, 5, 7, 8)
    assert_close(fed(layer, constant), constant.double(), tolerance=1e-6)


@pytest.mark.parametrize(("groups", "temporal"), [(1, 1), (2, 4), (4, 2), (8, 0)])
def test_groups_are_contiguous_channels(groups: int, temporal: int) -> None:
    layer = make(groups=groups, temporal_groups=temporal)
    x = clips(1, 8, 4, 6, 6)
    x[:] = x[:, :1]
    mixed = fed(layer, x)[0].flatten(1)
    same = torch.tensor([[torch.allclose(a, b, atol=1e-6) for a in mixed] for b in mixed])
    channel = torch.arange(8)
    key = torch.stack([channel * groups // 8, channel * max(temporal, 1) // 8], 1)
    assert same.equal((key[:, None] == key).all(-1))


# --- the rule of an axis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7])
def test_rule_of_an_axis(window: int) -> None:
    """Cells and windows of H, W and T against trial."""
    flat = dt.layers.BATransform(1, window=window, groups=1, dimensions=2).eval()
    long = dt.layers.BATransform(1, window=1, temporal_window=window, groups=1, temporal_groups=1).eval()
    seen: dict[str, Tensor] = {}
    for name, conv in (("p", flat.conv_p), ("q", flat.conv_q), ("t", long.conv_t)):
        conv.register_forward_hook(lambda m, i, y, name=name: seen.update({name: y}))
    sizes = range(window, 41)
    pairs = [
        *zip(sizes, reversed(sizes), strict=True),
        *((n, times * axis(n, window).cells) for n in sizes for times in (2, 3, 5)),
    ]
    for n, m in pairs:
        rows, columns = axis(n, window), across(m, n, window)
        assert rows.windows == rows.cells - window + 1 >= 1
        assert rows.scale == n // window
        assert rows.cells == math.ceil(n / rows.scale)
        p, q, t = flat.matrices(torch.randn(1, 1, n, m))
        assert t is None
        assert (p.shape, q.shape) == ((1, 1, 1, *[rows.cells] * 2), (1, 1, 1, *[columns.cells] * 2)), (n, m)
        assert (seen["p"].shape[2:], seen["q"].shape[2:]) == ((rows.windows, 1), (1, columns.windows)), (n, m)
        p, q, t = long.matrices(torch.randn(1, 1, n, 1, 1))
        assert t.shape == (1, 1, rows.cells, rows.cells), n
        assert seen["t"].shape[2:] == (rows.windows, 1, 1), n
        assert p.shape == q.shape == (1, 1, rows.extended, 1, 1), n


@pytest.mark.parametrize("size", [(5, 7, 8), (4, 5, 11), (3, 8, 7), (4, 6, 6)], ids=str)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_matrices_are_what_the_output_comes_from(dimensions: int, size: tuple[int, int, int]) -> None:
    layer = make(dimensions=dimensions).double()
    x = clips(2, 8, *size[3 - dimensions :], dtype=torch.float64)
    whole = x if dimensions == 3 else x[:, :, None]
    frames, height, width = whole.shape[2:]
    times = axis(frames, 2).extended if dimensions == 3 else 1
    whole = extended(whole, (times, axis(height, 3).extended, axis(width, 3).extended))
    y = dt.ops.bilinear_transform(whole, *layer.matrices(x))[:, :, :frames, :height, :width]
    y = y if dimensions == 3 else y[:, :, 0]
    assert_close(fed(layer, x), y, tolerance=1e-12)
    assert_close(layer(x), layer.conv2(y), tolerance=1e-12)


@pytest.mark.parametrize(
    ("window", "size"), [(3, (4, 7, 7)), (3, (4, 7, 8)), (4, (2, 9, 13)), (4, (3, 15, 10)), (3, (3, 6, 6))], ids=str
)
def test_remainders_are_repeated(window: int, size: tuple[int, int, int]) -> None:
    """As of a map that was extended by hand, and cut off again; of those whose scale that leaves alone."""
    layer = make(window=window).double()
    x = clips(2, 8, *size, dtype=torch.float64)
    rows, columns = axis(size[1], window), axis(size[2], window)
    assert axis(rows.extended, window) == rows
    assert axis(columns.extended, window) == columns
    whole = extended(x, (size[0], rows.extended, columns.extended))
    assert_close(layer(x), layer(whole)[:, :, : size[0], : size[1], : size[2]], tolerance=1e-12)


@pytest.mark.parametrize(
    ("size", "number"),
    [((4, 6, 6), None), ((4, 4, 5), None), ((4, 9, 8), None), ((4, 7, 6), 7), ((4, 6, 11), 11), ((5, 6, 6), 5)],
    ids=str,
)
def test_remainders_are_refused_on_request(size: tuple[int, int, int], number: int | None) -> None:
    layer, x = make(remainder="refuse"), clips(2, 8, *size)
    if number is None:
        twin = make()
        twin.load_state_dict(layer.state_dict(), strict=True)
        assert_identical(layer(x), twin(x))
        return
    for call in (layer, layer.matrices):
        with refused(ValueError, "BATransform", number, "remainder", "'repeat'"), NothingRuns():
            call(x)
    layer = block(remainder="refuse")
    with refused(ValueError, number, "remainder", "'repeat'"), NothingRuns():
        layer(x)


ANY = [(4, 15, 15), (5, 29, 17), (4, 8, 13), (7, 7, 7), (6, 14, 9), (4, 31, 7), (9, 16, 16), (13, 11, 23)]


@pytest.mark.parametrize("size", ANY, ids=str)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_any_map_as_large_as_a_window(dimensions: int, size: tuple[int, int, int]) -> None:
    layer = lively(dt.layers.BATransform(8, dimensions=dimensions))
    x = clips(1, 8, *size[3 - dimensions :])
    results = run(layer, x)
    assert results["out"].shape == x.shape
    for name, value in results.items():
        assert value is not None, name
        assert value.isfinite().all(), name
        assert value.any(), name
    p, q, t = layer.matrices(x)
    for matrix, dim in ((p, -1), (q, -2), (t, -1)):
        if matrix is not None:
            assert_close(matrix.sum(dim), torch.ones_like(matrix.sum(dim)).double(), tolerance=1e-5)


@on_backends
def test_a_prime_map_on_each_backend(backend: str, device: torch.device) -> None:
    layer = lively(dt.layers.BATransform(2, window=5, temporal_window=3, groups=2, temporal_groups=1)).to(device)
    x = clips(1, 2, 5, 13, 7, device=device)
    with dt.backend("reference"):
        expected = run(copy.deepcopy(layer).double(), x.double())
    with dt.backend(backend):
        assert_results_close(run(layer, x), expected, 2e-5)


# --- the published modules ------------------------------------------------------------------------------------------

CRASHES = (RuntimeError, ZeroDivisionError, AssertionError)


def both(name: str, package: str = VIDEO, **config: Any) -> tuple[Any, Any]:
    """A stand-in for the authors' module, and the module under its name, with the same state, in float64."""
    stand_in = getattr(published if package == VIDEO else published_images, name)(**config)
    ours = dt.compat.build(package + name, config)
    ours.load_state_dict(lively(stand_in).state_dict(), strict=True)
    return stand_in.double(), ours.double().eval()


def published_result(stand_in: nn.Module, x: Tensor) -> Tensor | None:
    try:
        return stand_in(x)
    except CRASHES:
        return None


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_equals_the_published_wherever_that_runs(window: int) -> None:
    """Over many maps; where the published one crashes ours runs; natively where H = W or both are multiples."""
    config = {"in_channels": 4, "s": window, "ts": 2, "k": 2, "tk": 0}
    stand_in, ours = both("BATransform", **config)
    options: dict[str, Any] = {"window": window, "groups": 2, "temporal_groups": 0}
    native = {
        rule: dt.layers.BATransform(4, window_rule=rule, **options).double().eval() for rule in ("weight", "logit")
    }
    for layer in native.values():
        layer.load_state_dict(stand_in.state_dict(), strict=True)
    ran = crashed = slid = 0
    for height, width in itertools.product(range(1, 17), repeat=2):
        x = clips(1, 4, 2, height, width, dtype=torch.float64)
        expected = published_result(stand_in, x)
        if min(height, width) < window:
            assert expected is None
            with pytest.raises(ValueError, match="window"):
                ours(x)
            continue
        y = ours(x)
        if expected is None:
            crashed += 1
            assert y.shape == x.shape
            assert y.isfinite().all()
            continue
        ran += 1
        assert_close(y, expected, f"{height} x {width}", tolerance=1e-10)
        if height == width or (height % window == width % window == 0):
            assert_close(native["logit"](x), expected, f"{height} x {width}, natively", tolerance=1e-10)
            slides = axis(height, window).windows > 1
            slid += slides
            same = relative_error(native["weight"](x), expected) < 1e-10
            assert same == (not slides), (height, width)
    assert ran > 2
    assert crashed > 2 or window == 1
    assert slid >= 1 or window == 1


@pytest.mark.parametrize("temporal", [0, 1, 2, 4])
def test_equals_the_published_over_time(temporal: int) -> None:
    ran = 0
    for frames, ts, k in itertools.product(range(1, 7), (1, 2, 3, 4), (1, 2, 4)):
        stand_in, ours = both("BATransform", in_channels=4, s=2, ts=ts, k=k, tk=temporal)
        x = clips(2, 4, frames, 4, 4, dtype=torch.float64)
        expected = published_result(stand_in, x)
        if temporal and frames < ts:
            assert expected is None
            with pytest.raises(ValueError, match=r"temporal_window|ts"):
                ours(x)
            continue
        y = ours(x)
        if expected is not None:
            ran += 1
            assert_close(y, expected, f"T {frames}, ts {ts}, k {k}", tolerance=1e-10)
    assert ran == 3 * (24 if temporal == 0 else 12)


def test_equals_the_published_on_images() -> None:
    ran = 0
    for window in (1, 2, 3, 7):
        stand_in, ours = both("BATransform", IMAGES, in_channels=4, s=window, k=2)
        native = dt.layers.BATransform(4, window=window, groups=2, dimensions=2, normalisation="sigmoid")
        native.load_state_dict(stand_in.state_dict(), strict=True)
        native.double().eval()
        for height, width in itertools.product(range(window, 17), repeat=2):
            x = clips(1, 4, height, width, dtype=torch.float64)
            expected, y = published_result(stand_in, x), ours(x)
            assert y.shape == x.shape
            if expected is not None:
                ran += 1
                assert_close(y, expected, f"{height} x {width}", tolerance=1e-10)
                assert_close(native(x), expected, f"{height} x {width}, natively", tolerance=1e-10)
    assert ran >= 16 + 8 + 5 + 2


PUBLISHED: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "transform": (VIDEO, "BATransform", {"in_channels": 8, "s": 3, "ts": 2, "k": 4, "tk": 2}, (2, 8, 4, 6, 9)),
    "transform that slides": (
        VIDEO,
        "BATransform",
        {"in_channels": 8, "s": 3, "ts": 2, "k": 2, "tk": 1},
        (2, 8, 4, 4, 8),
    ),
    "one scale": (VIDEO, "BATransform", {"in_channels": 8, "s": 2, "ts": 2, "k": 2, "tk": 8}, (2, 8, 2, 3, 6)),
    "block": (VIDEO, "BATBlock", {"in_channels": 16}, (2, 16, 4, 7, 7)),
    "block with options": (
        VIDEO,
        "BATBlock",
        {"in_channels": 9, "r": 2, "s": 2, "ts": 1, "k": 4, "tk": 4, "dropout": 0.5},
        (2, 9, 3, 4, 4),
    ),
    "block without time": (VIDEO, "BATBlock", {"in_channels": 8, "s": 3, "k": 2, "tk": 0}, (2, 8, 3, 6, 6)),
    "nonlocal 1d": (VIDEO, "NONLocalBlock1D", {"in_channels": 8}, (2, 8, 9)),
    "nonlocal 2d": (VIDEO, "NONLocalBlock2D", {"in_channels": 8, "head": 2}, (2, 8, 5, 6)),
    "nonlocal 3d": (VIDEO, "NONLocalBlock3D", {"in_channels": 8}, (2, 8, 3, 5, 6)),
    "nonlocal with options": (
        VIDEO,
        "NONLocalBlock3D",
        {"in_channels": 8, "inter_channels": 6, "head": 3, "sub_sample": False, "bn_layer": False, "use_scale": False},
        (2, 8, 2, 3, 4),
    ),
    "nonlocal of one channel": (VIDEO, "NONLocalBlock2D", {"in_channels": 1, "zero_init": True}, (2, 1, 5, 6)),
    "transform of images": (IMAGES, "BATransform", {"in_channels": 8, "s": 3, "k": 4}, (2, 8, 6, 6)),
    "block of images": (IMAGES, "BATBlock", {"in_channels": 16}, (2, 16, 8, 8)),
    "nonlocal of images": (IMAGES, "NonLocal", {"inplanes": 9}, (2, 9, 5, 6)),
    "nonlocal of images without a scale": (IMAGES, "NonLocal", {"inplanes": 8, "use_scale": False}, (2, 8, 5, 6)),
}
on_published = pytest.mark.parametrize("case", PUBLISHED)


@on_published
def test_published_modules_and_their_gradients(case: str) -> None:
    package, name, config, shape = PUBLISHED[case]
    stand_in, ours = both(name, package, **config)
    assert list(ours.state_dict()) == list(stand_in.state_dict())
    x = clips(*shape, dtype=torch.float64)

    def drawing(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            torch.manual_seed(3)
            return module(x)

        return call

    for training in (False, True):
        stand_in.train(training), ours.train(training)
        actual, expected = (run(module, x, call=drawing(module)) for module in (ours, stand_in))
        assert_results_close(actual, expected, 1e-8)
    for key, value in stand_in.state_dict().items():
        assert_close(ours.state_dict()[key].double(), value.double(), key, tolerance=1e-9)


@on_published
def test_published_starts(case: str) -> None:
    """init_modules(), where the published one has it."""
    package, name, config, shape = PUBLISHED[case]
    stand_in, ours = both(name, package, **config)
    assert hasattr(ours, "init_modules") == hasattr(stand_in, "init_modules") == (name != "BATransform")
    if name == "BATransform":
        return
    torch.manual_seed(1)
    stand_in.init_modules()
    torch.manual_seed(1)
    ours.init_modules()
    for key, value in stand_in.state_dict().items():
        found = ours.state_dict()[key]
        if value.dim() > 1 and value.any():  # drawn; in which order is nobody's business
            assert found.any(), key
            if value.numel() > 100:
                assert abs(found.std() / value.std() - 1) < 0.3, key
        else:
            assert_identical(found, value, key)
    if name != "BATBlock":
        x = clips(*shape, dtype=torch.float64)
        assert_identical(ours(x), x)


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_constructors_start_nothing(case: str) -> None:
    """As there: torch's own start, until the network calls init_modules()."""
    package, name, config, _ = PUBLISHED[case]
    ours = dt.compat.build(package + name, config)
    convolutions = [m for m in ours.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    assert all(conv.bias.any() for conv in convolutions)
    norms = [m for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(norm.weight.eq(1).all() for norm in norms)


def test_no_frames_are_mixed_by_a_negative_tk() -> None:
    """The published code asks whether tk > 0."""
    module = dt.compat.build("models.non_local.BATBlock", in_channels=8, s=2, k=2, tk=-1)
    assert module.batransform.temporal_groups == 0


def test_unknown_options_of_the_block() -> None:
    with pytest.raises(TypeError, match="BATBlock: got windows; accepted are window, temporal_window, groups"):
        dt.layers.BATBlock(8, windows=3)


def test_dropout_may_be_any_number() -> None:
    assert dt.layers.BATBlock(8, dropout=np.float32(0.25)).dropout.p == 0.25


@pytest.mark.parametrize("size", [-200.0, 200.0])
def test_sigmoids_that_vanish_still_sum_to_one(size: float) -> None:
    """The published code divides 0 by 0 there."""
    weights = windows.normalised(torch.full((1, 1, 3, 3), size), -1, "sigmoid", "weight")
    assert_close(weights, torch.full((1, 3, 3), 1 / 3).double(), tolerance=1e-6)


@pytest.mark.parametrize("case", [*BAT, *NONLOCAL])
def test_published_state_loads_natively(case: str, device: torch.device) -> None:
    golden = Golden(case, device)
    config: Any = golden.json("ctor")
    package, _, name = golden.metadata["upstream_class"].rpartition(".")
    images = package.startswith("model_zoo")
    renamed = {"s": "window", "ts": "temporal_window", "k": "groups", "tk": "temporal_groups", "r": "reduction"}
    options = {renamed.get(key, key): value for key, value in config.items()}
    if name == "NonLocal":
        pytest.skip("has other names")
    if name.startswith("NONLocalBlock"):
        layer: Any = dt.layers.NonLocalBlock(dimensions=int(name[-2]), **options)
    else:
        options |= {"window_rule": "logit", "normalisation": "sigmoid" if images else "softmax"}
        layer = getattr(dt.layers, name)(dimensions=2 if images else 3, **options)
    layer.load_state_dict(golden.under("state"), strict=True)
    y = layer.to(device).eval()(golden.under("input")["x"])
    assert relative_error(y, golden.under("output")["y"]) < 1e-5


def test_published_defaults() -> None:
    for package, name, config in (
        (VIDEO, "BATBlock", {"in_channels": 16}),
        (IMAGES, "BATBlock", {"in_channels": 16}),
        (VIDEO, "NONLocalBlock1D", {"in_channels": 6}),
        (IMAGES, "NonLocal", {"inplanes": 6}),
    ):
        stand_in, ours = both(name, package, **config)
        shapes = [{key: t.shape for key, t in module.state_dict().items()} for module in (stand_in, ours)]
        assert shapes[0] == shapes[1]
    for package in (VIDEO, IMAGES):
        assert dt.compat.build(package + "BATBlock", in_channels=16).dropout.p == 0.2


@pytest.mark.parametrize(
    ("name", "config", "parts"),
    [
        ("models.non_local.BATransform", {"s": 0}, ("s is 0", "integer > 0")),
        ("models.non_local.BATransform", {"ts": 1.5}, ("ts is 1.5", "integer > 0")),
        ("models.non_local.BATransform", {"in_channels": True}, ("in_channels is True", "integer > 0")),
        ("models.non_local.BATransform", {"k": 0}, ("k is 0", "integer > 0")),
        ("models.non_local.BATransform", {"k": 3}, ("k is 3", "8")),
        ("models.non_local.BATransform", {"tk": 1.5}, ("tk is 1.5", "integer")),
        ("models.non_local.BATransform", {"tk": 3}, ("tk is 3", "8")),
        ("models.non_local.BATransform", {"window": 3}, ("window", "accepted are", "'s'")),
        ("models.non_local.BATBlock", {"r": 0}, ("r is 0", "integer > 0")),
        ("models.non_local.BATBlock", {"r": 9}, ("r is 9", "8")),
        ("models.non_local.BATBlock", {"k": 8}, ("k is 8", "4")),
        ("models.non_local.BATBlock", {"dropout": 1.5}, ("dropout is 1.5",)),
        ("models.non_local.BATBlock", {"dropout": "much"}, ("dropout is 'much'",)),
        ("models.non_local.NONLocalBlock3D", {"inter_channels": 0}, ("inter_channels is 0", "integer > 0")),
        ("models.non_local.NONLocalBlock3D", {"head": 3}, ("head", "3", "4")),
        ("models.non_local.NONLocalBlock3D", {"sub_sample": 1}, ("sub_sample is 1", "True and False")),
        ("models.non_local.NONLocalBlock2D", {"bn_layer": None}, ("bn_layer is None", "True and False")),
        ("models.non_local.NONLocalBlock1D", {"use_scale": "yes"}, ("use_scale is 'yes'", "True and False")),
        ("models.non_local.NONLocalBlock1D", {"dimension": 2}, ("dimension", "accepted are", "'head'")),
        ("model_zoo.non_local.BATransform", {"s": -3}, ("s is -3", "integer > 0")),
        ("model_zoo.non_local.BATransform", {"k": 5}, ("k is 5", "8")),
        ("model_zoo.non_local.BATransform", {"tk": 1}, ("tk", "accepted are", "'s'")),
        ("model_zoo.non_local.BATBlock", {"r": 2.0}, ("r is 2.0", "integer > 0")),
        ("model_zoo.non_local.NonLocal", {"inplanes": 0}, ("inplanes is 0", "integer > 0")),
        ("model_zoo.non_local.NonLocal", {"use_scale": 0}, ("use_scale is 0", "True and False")),
        ("model_zoo.non_local.NonLocal", {"head": 2}, ("head", "accepted are", "'use_scale'")),
    ],
    ids=str,
)
def test_arguments_of_the_published_modules(name: str, config: dict, parts: tuple[str, ...]) -> None:
    good: dict[str, Any] = {"in_channels": 8, "s": 3, "ts": 2, "k": 2, "tk": 1}
    if name == "model_zoo.non_local.BATransform":
        good = {"in_channels": 8, "s": 3, "k": 2}
    elif name.endswith("NonLocal"):
        good = {"inplanes": 8}
    elif not name.endswith("BATransform"):
        good = {"in_channels": 8}
    dt.compat.build(name, good)
    with refused(ValueError, name, *parts), NothingRuns():
        dt.compat.build(name, {**good, **config})


# --- defaults and kin -----------------------------------------------------------------------------------------------


def shapes_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in layer.state_dict().items()}


def norm_of(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{part}": (channels,) for part in names}, f"{name}.num_batches_tracked": ()}


def test_defaults() -> None:
    layer = dt.layers.BATransform(16)
    assert shapes_of(layer) == {
        "conv1.0.weight": (4, 16, 1, 1, 1),
        "conv1.0.bias": (4,),
        **norm_of("conv1.1", 4),
        "conv_p.weight": (196, 4, 1, 7, 1),
        "conv_p.bias": (196,),
        "conv_q.weight": (196, 4, 1, 1, 7),
        "conv_q.bias": (196,),
        "conv_t.weight": (16, 4, 4, 1, 1),
        "conv_t.bias": (16,),
        "conv2.0.weight": (16, 16, 1, 1, 1),
        "conv2.0.bias": (16,),
        **norm_of("conv2.1", 16),
    }
    flat = shapes_of(dt.layers.BATransform(16, dimensions=2))
    assert (flat["conv_p.weight"], flat["conv_q.weight"]) == ((196, 4, 7, 1), (196, 4, 1, 7))
    assert not any(name.startswith("conv_t") for name in flat)
    assert not hasattr(dt.layers.BATransform(16, temporal_groups=0), "conv_t") or (
        dt.layers.BATransform(16, temporal_groups=0).conv_t is None
    )
    for name, value in DEFAULTS.items():
        assert_identical_options(dt.layers.BATransform(16), dt.layers.BATransform(16, **{name: value}))


def assert_identical_options(one: nn.Module, other: nn.Module) -> None:
    other.load_state_dict(one.state_dict(), strict=True)
    x = clips(1, 16, 5, 9, 15)
    assert_identical(other.eval()(x), one.eval()(x))


def test_block_defaults() -> None:
    layer = dt.layers.BATBlock(32)
    assert [name for name, _ in layer.named_children()] == ["conv1", "batransform", "conv2", "dropout"]
    assert isinstance(layer.batransform, dt.layers.BATransform)
    assert isinstance(layer.dropout, nn.Dropout3d)
    assert layer.dropout.p == 0.2
    shapes = shapes_of(layer)
    assert shapes["conv1.0.weight"] == (16, 32, 1, 1, 1)
    assert shapes["conv2.0.weight"] == (32, 16, 1, 1, 1)
    inner = {name.removeprefix("batransform."): s for name, s in shapes.items() if name.startswith("batransform.")}
    assert inner == shapes_of(dt.layers.BATransform(16))
    flat = dt.layers.BATBlock(32, dimensions=2, reduction=4)
    assert isinstance(flat.dropout, nn.Dropout2d)
    assert shapes_of(flat)["conv1.0.weight"] == (8, 32, 1, 1)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_block_is_its_parts(training: bool, dimensions: int) -> None:
    """Whole channels are dropped, and nothing follows the sum."""
    layer = block(dimensions=dimensions, dropout=0.5, reduction=1).train(training)
    nn.init.constant_(layer.conv2[1].bias, 2.0)  # or a ReLU would cut channels off, too
    x = 3 * clips(2, 8, *(4, 6, 6)[3 - dimensions :])
    twin = copy.deepcopy(layer)
    dropout = F.dropout3d if dimensions == 3 else F.dropout2d

    def parts(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return x + dropout(twin.conv2(twin.batransform(twin.conv1(x))), 0.5, training)

    def whole(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return layer(x)

    actual = run(layer, x, call=whole)
    assert_results_close(actual, run(twin, x, call=parts), 1e-5)
    dropped = (actual["out"] - x).flatten(2).eq(0).all(-1)
    assert dropped.any() == training
    assert not dropped.all()
    assert (actual["out"] < 0).any()


def test_block_passes_options_on() -> None:
    options = {"softmax_axis": "output", "window_rule": "logit", "normalisation": "sigmoid", "groups": 4}
    layer = block(**options, reduction=2).double()
    x = clips(2, 8, 3, 5, 7, dtype=torch.float64)
    inner = explicit(layer.batransform, layer.conv1(x), **{**SMALL, "temporal_groups": 2, **options}).out
    assert_close(layer(x), x + layer.conv2(inner), tolerance=1e-9)


@pytest.mark.parametrize("rule", ["weight", "logit"])
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (9, 10)], ids=str)
def test_images_are_clips_of_one_frame(size: tuple[int, int], rule: str) -> None:
    flat = make(dimensions=2, window_rule=rule).double()
    clip = make(temporal_groups=0, window_rule=rule).double()
    state = {
        name: t[:, :, None] if t.dim() == 4 else t for name, t in flat.state_dict().items()
    }  # frames are the first axis
    clip.load_state_dict(state, strict=True)
    x = clips(2, 8, *size, dtype=torch.float64)
    expected, actual = run(clip, x[:, :, None]), run(flat, x)
    for name, value in expected.items():
        assert_close(actual[name], value.view_as(actual[name]), name, tolerance=1e-10)
    for found, wanted in zip(flat.matrices(x), clip.matrices(x[:, :, None]), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert_identical(found, wanted)


# --- non-local blocks -----------------------------------------------------------------------------------------------


def attention(layer: Any, x: Tensor, heads: int = 1, sub_sample: bool = True, scale: bool = True) -> Tensor:
    """Scores of every query, written out."""
    state = dict(layer.named_parameters())
    pools = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
    fewer = pools[x.dim()](x, (1, 2, 2) if x.dim() == 5 else 2) if sub_sample else x

    def projected(name: str, x: Tensor) -> Tensor:
        name = name if f"{name}.weight" in state else f"{name}.1"
        y = torch.einsum("oi,bin->bon", state[f"{name}.weight"].flatten(1), x.flatten(2))
        return (y + state[f"{name}.bias"][:, None]).unflatten(1, (heads, -1))

    theta, phi, g = projected("theta", x), projected("phi", fewer), projected("g", fewer)
    scores = torch.einsum("bhcn,bhcm->bhnm", theta, phi)
    if scale:
        scores = scores / theta.shape[2] ** 0.5
    weights = scores.exp()
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.einsum("bhnm,bhcm->bhcn", weights, g).flatten(1, 2)
    return x + layer.W(y.view(*y.shape[:2], *x.shape[2:]))


NONLOCAL_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "two heads": {"heads": 2},
    "a head for each channel": {"heads": 4},
    "all positions": {"sub_sample": False},
    "no scale": {"scale": False, "heads": 2},
    "norm in groups": {"norm": "group"},
    "no norm": {"norm": "none"},
    "channels of its own": {"inner_channels": 6, "heads": 3, "sub_sample": False},
}
NONLOCAL_SIZES = {1: (9,), 2: (5, 6), 3: (3, 4, 5)}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", NONLOCAL_OPTIONS)
def test_nonlocal_is_the_explicit_softmax(case: str, training: bool, dimensions: int) -> None:
    options = NONLOCAL_OPTIONS[case]
    layer = nonlocal_block(dimensions=dimensions, **options).double().train(training)
    x = clips(2, 8, *NONLOCAL_SIZES[dimensions], dtype=torch.float64)
    ways = {name: value for name, value in options.items() if name in ("heads", "sub_sample", "scale")}
    twin = copy.deepcopy(layer)
    expected = run(twin, x, call=lambda x: attention(twin, x, **ways))
    actual = run(layer, x)
    scale = max(t.norm().item() for t in expected.values() if t is not None)
    for name, value in expected.items():  # a key's bias adds the same to all scores of a query
        floor = scale if name in ("phi.bias", "phi.1.bias") else 1e-4 * scale
        assert_close(actual[name], value, name, tolerance=1e-8, floor=floor)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_nonlocal_starts_as_the_identity(dimensions: int) -> None:
    x = clips(2, 8, *NONLOCAL_SIZES[dimensions])
    for options in ({}, {"norm": "group"}, {"norm": "batch", "zero_init": True}, {"norm": "none", "zero_init": True}):
        layer = dt.layers.NonLocalBlock(8, dimensions=dimensions, **options)  # type: ignore[arg-type]
        for training in (True, False):
            assert_identical(layer.train(training)(x), x)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_nonlocal_stores_no_weights(heads: int, dimensions: int) -> None:
    """torch's fused attention takes channels innermost only, and falls back to storing weights without a word."""
    layer = dt.layers.NonLocalBlock(16, dimensions=dimensions, heads=heads)
    x = torch.randn(2, 16, *(4, 6, 8)[-dimensions:])
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION]):
        layer(x).sum().backward()


def test_nonlocal_defaults() -> None:
    layer = dt.layers.NonLocalBlock(8)
    assert shapes_of(layer) == {
        "g.1.weight": (4, 8, 1, 1, 1),
        "g.1.bias": (4,),
        "W.0.weight": (8, 4, 1, 1, 1),
        "W.0.bias": (8,),
        **norm_of("W.1", 8),
        "theta.weight": (4, 8, 1, 1, 1),
        "theta.bias": (4,),
        "phi.1.weight": (4, 8, 1, 1, 1),
        "phi.1.bias": (4,),
    }
    assert shapes_of(dt.layers.NonLocalBlock(1, dimensions=2))["theta.weight"] == (1, 1, 1, 1)
    plain = shapes_of(dt.layers.NonLocalBlock(8, dimensions=1, sub_sample=False, norm="none"))
    assert list(plain) == [f"{part}.{kind}" for part in ("g", "W", "theta", "phi") for kind in ("weight", "bias")]
    assert isinstance(dt.layers.NonLocalBlock(8, norm="group").W[1], nn.GroupNorm)


# --- in use ---------------------------------------------------------------------------------------------------------

Built = tuple[Callable[[], Any], tuple[int, ...]]
BUILT: dict[str, Built] = {
    "transform": (make, (2, 8, 4, 6, 7)),
    "transform of images": (lambda: make(dimensions=2, normalisation="sigmoid"), (2, 8, 6, 7)),
    "transform with options": (lambda: make(softmax_axis="output", window_rule="logit"), (2, 8, 5, 5, 5)),
    "block": (block, (2, 8, 4, 6, 7)),
    "block of images": (lambda: block(dimensions=2), (2, 8, 6, 7)),
    "nonlocal": (nonlocal_block, (2, 8, 3, 4, 5)),
    "nonlocal of images": (lambda: nonlocal_block(dimensions=2, heads=2, norm="group"), (2, 8, 5, 6)),
    **{
        f"published {case}": (
            lambda package=package, name=name, config=config: lively(dt.compat.build(package + name, config)),
            shape,
        )
        for case, (package, name, config, shape) in PUBLISHED.items()
    },
}
OURS = [name for name in BUILT if not name.startswith("published")]
on_built = pytest.mark.parametrize("name", BUILT)
on_ours = pytest.mark.parametrize("name", OURS)


@on_backends
def test_clips_are_apart(backend: str, device: torch.device) -> None:
    layer, _ = tiny(device)
    x = clips(2, 4, 3, 7, 4, device=device)
    with dt.backend(backend):
        assert_close(layer(x)[1:], layer(x[1:]).double(), tolerance=1e-5)


@on_built
def test_empty_batch_leaves_zero_gradients(name: str, device: torch.device) -> None:
    """Not absent ones: in distributed training a rank without a clip would wait for them."""
    make, shape = BUILT[name]
    layer = make().to(device)
    y = layer(clips(0, *shape[1:], device=device))
    assert y.shape == (0, *shape[1:])
    y.sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key


@pytest.mark.parametrize("dimensions", [2, 3])
@on_backends
def test_layouts_of_the_input(backend: str, dimensions: int, device: torch.device) -> None:
    layer, x = tiny(device, dimensions=dimensions, temporal_groups=None)
    x = x[:, :, 0] if dimensions == 2 else x
    last = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    views = [
        x.contiguous(memory_format=last),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    ]
    with dt.backend(backend):
        expected = run(layer, x)
        for view in views:
            assert not view.is_contiguous()
            leaf = view.detach().requires_grad_()
            assert_close(layer(leaf), expected["out"].double(), tolerance=1e-5)
        layer.to(memory_format=last)
        assert_results_close(run(layer, views[0]), expected, 2e-5)


@on_built
def test_channels_last(name: str) -> None:
    make, shape = BUILT[name]
    if len(shape) == 3:
        pytest.skip("has no such layout")
    layer, x = make(), clips(*shape)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    expected = layer(x)
    y = layer.to(memory_format=last)(x.contiguous(memory_format=last))
    assert_close(y, expected.double(), tolerance=1e-4)  # group norms of torch are less exact then


@on_backends
def test_autocast(backend: str, device: torch.device) -> None:
    layer, x = tiny(device)
    x.requires_grad_()
    with dt.backend(backend):
        plain = layer(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert relative_error(y, plain) < 0.05
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.dtype == torch.float32, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


@on_ours
def test_autocast_of_each(name: str, device: torch.device) -> None:
    make, shape = BUILT[name]
    layer, x = make().to(device), clips(*shape, device=device)
    plain = run(layer, x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run(layer, x)
    assert relative_error(actual["out"], plain["out"]) < 0.05
    for key, value in actual.items():
        assert value is not None, key
        assert value.isfinite().all(), key
        if key != "out":
            assert value.dtype == torch.float32, key


@on_built
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_other_dtypes(dtype: torch.dtype, name: str, device: torch.device) -> None:
    make, shape = BUILT[name]
    layer, x = make().to(device), clips(*shape, device=device)
    expected = layer(x)
    with dt.backend("eager"):
        results = run(layer.to(dtype), x.to(dtype))
    assert relative_error(results["out"], expected) < (1e-5 if dtype == torch.float64 else 0.05)
    for key, value in results.items():
        assert value is not None, key
        assert value.dtype == dtype, key
        assert value.isfinite().all(), key


@pytest.fixture
def deterministic() -> Iterator[None]:
    former = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(former[0], warn_only=former[1])


@pytest.mark.usefixtures("deterministic")
@on_ours
def test_deterministic_algorithms(name: str, device: torch.device) -> None:
    """No operation of theirs is refused, and gradients are the same bits."""
    make, shape = BUILT[name]
    layer, x = make().to(device).train(), clips(*shape, device=device)

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer(x)

    one, two = run(layer, x, call=call), run(layer, x, call=call)
    for key, value in one.items():
        assert_identical(two[key], value, key)


@pytest.mark.usefixtures("deterministic")
@on_backends
def test_deterministic_on_each_backend(backend: str, device: torch.device) -> None:
    layer, x = tiny(device)
    with dt.backend(backend):
        one, two = run(layer, x), run(layer, x)
    for key, value in one.items():
        assert_identical(two[key], value, key)


@on_backends
def test_compiles_without_graph_breaks(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    layer, x = tiny(device)
    with dt.backend(backend):
        expected = run(layer, x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        actual = {name.removeprefix("_orig_mod."): t for name, t in run(compiled, x).items()}
    torch._dynamo.reset()
    assert_results_close(actual, expected, 1e-5)


@pytest.mark.parametrize("name", ["transform of images", "block", "nonlocal", "nonlocal of images"])
def test_each_compiles_without_graph_breaks(name: str) -> None:
    make, shape = BUILT[name]
    layer, x = make(), clips(*shape)
    torch._dynamo.reset()
    expected = run(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    actual = {name.removeprefix("_orig_mod."): t for name, t in run(compiled, x).items()}
    torch._dynamo.reset()
    for key, value in expected.items():
        scale = max(t.norm().item() for t in expected.values())
        floor = scale if "phi" in key and key.endswith("bias") else 1e-4 * scale
        assert_close(actual[key], value.double(), key, tolerance=1e-5, floor=floor)


@pytest.mark.parametrize(
    "name",
    [name for name in OURS if "images" not in name] + in_full(n for n in BUILT if n not in OURS or "images" in n),
)
def test_exports_with_any_batch(name: str) -> None:
    make, shape = BUILT[name]
    layer = make()
    batch = torch.export.Dim("batch", min=1, max=64)
    with dt.backend("eager"):
        program = torch.export.export(layer, (clips(*shape),), dynamic_shapes={"x": {0: batch}})
        x = clips(5, *shape[1:])
        assert_close(program.module()(x), layer(x).double(), tolerance=1e-5)


@on_backends
def test_checkpointed_gradients_are_the_same(backend: str, device: torch.device) -> None:
    layer, x = tiny(device)
    with dt.backend(backend):
        expected = run(layer, x)
        actual = run(layer, x, call=lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_results_close(actual, expected, 1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@on_built
def test_copies_compute_the_same(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    make, shape = BUILT[name]
    layer, x = make(), clips(*shape)
    expected = run(layer, x)
    twin = copied(layer)
    assert not {id(t) for t in twin.parameters()} & {id(t) for t in layer.parameters()}
    assert_identical(twin(x), expected["out"])
    other = lively(make(), seed=8)
    assert not torch.equal(other(x), expected["out"])
    other.load_state_dict(twin.state_dict(), strict=True)
    assert_identical(other(x), expected["out"])


@on_built
def test_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    make, shape = BUILT[name]
    layer, x = make(), clips(*shape)
    expected = layer(x)
    layer.save_pretrained(tmp_path)
    again = type(layer).from_pretrained(tmp_path)
    assert type(again) is type(layer)
    assert_identical(again.eval()(x), expected)
    assert str(again) == str(layer)
    for key, value in layer.state_dict().items():
        assert_identical(again.state_dict()[key], value, key)


@pytest.mark.parametrize("name", ["block", "block of images", "nonlocal"])
def test_training_lowers_a_loss(name: str, device: torch.device) -> None:
    make, shape = BUILT[name]
    x = clips(*shape, device=device)
    with torch.no_grad():
        target = make().to(device)(x)
    torch.manual_seed(4)
    layer = lively(make(), seed=9).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (
            functools.partial(make, softmax_axis="output", window_rule="logit", remainder="refuse"),
            ("8", "window=3", "temporal_window=2", "groups=2", "temporal_groups=4", "'output'", "'logit'", "'refuse'"),
        ),
        (
            functools.partial(nonlocal_block, heads=2, norm="group", scale=False),
            ("8", "heads=2", "'group'", "scale=False"),
        ),
    ],
    ids=["transform", "nonlocal"],
)
def test_representation_tells_the_options(build: Callable[[], Any], parts: tuple[str, ...]) -> None:
    told = build().extra_repr()
    for part in parts:
        assert part in told


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"in_channels": 0}, ("in_channels is 0", "integer > 0")),
        ({"in_channels": 8.0}, ("in_channels is 8.0", "integer > 0")),
        ({"window": 0}, ("window is 0", "integer > 0")),
        ({"window": (3, 3)}, ("window is (3, 3)", "integer > 0")),
        ({"temporal_window": -2}, ("temporal_window is -2", "integer > 0")),
        ({"groups": 0}, ("groups is 0", "integer > 0")),
        ({"groups": True}, ("groups is True", "integer > 0")),
        ({"groups": 3}, ("groups is 3", "in_channels", "8")),
        ({"groups": 16}, ("groups is 16", "in_channels", "8")),
        ({"temporal_groups": -1}, ("temporal_groups is -1", "integer")),
        ({"temporal_groups": 1.0}, ("temporal_groups is 1.0", "integer")),
        ({"temporal_groups": 3}, ("temporal_groups is 3", "in_channels", "8")),
        ({"dimensions": 2, "temporal_groups": 2}, ("temporal_groups is 2", "dimensions")),
        ({"dimensions": 1}, ("dimensions is 1", "2", "3")),
        ({"dimensions": "3"}, ("dimensions is '3'", "2", "3")),
        ({"dimensions": None}, ("dimensions is None", "2", "3")),
        ({"normalisation": "tanh"}, ("normalisation is 'tanh'", "'softmax', 'sigmoid'")),
        ({"normalisation": None}, ("normalisation is None", "'softmax', 'sigmoid'")),
        ({"softmax_axis": "rows"}, ("softmax_axis is 'rows'", "'input', 'output'")),
        ({"softmax_axis": -1}, ("softmax_axis is -1", "'input', 'output'")),
        ({"window_rule": "zero"}, ("window_rule is 'zero'", "'weight', 'logit'")),
        ({"window_rule": 0}, ("window_rule is 0", "'weight', 'logit'")),
        ({"remainder": "pad"}, ("remainder is 'pad'", "'repeat', 'refuse'")),
        ({"remainder": True}, ("remainder is True", "'repeat', 'refuse'")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["BATransform", "BATBlock"])
def test_arguments(name: str, arguments: dict, parts: tuple[str, ...]) -> None:
    good = {"in_channels": 8, "window": 3, "groups": 2}
    if name == "BATBlock":
        good["reduction"] = 1
    build = getattr(dt.layers, name)
    build(**good)
    with refused(ValueError, "BAT", *parts), NothingRuns():
        build(**{**good, **arguments})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"reduction": 0}, ("reduction is 0", "integer > 0")),
        ({"reduction": 1.5}, ("reduction is 1.5", "integer > 0")),
        ({"reduction": 9}, ("reduction is 9", "8")),
        ({"groups": 8}, ("groups is 8", "4")),
        ({"dropout": -0.1}, ("dropout is -0.1", "0", "1")),
        ({"dropout": 1.5}, ("dropout is 1.5", "0", "1")),
        ({"dropout": "some"}, ("dropout is 'some'", "0", "1")),
        ({"dropout": float("nan")}, ("dropout is nan", "0", "1")),
    ],
    ids=str,
)
def test_arguments_of_the_block(arguments: dict, parts: tuple[str, ...]) -> None:
    with refused((ValueError, TypeError), "BAT", *parts), NothingRuns():
        dt.layers.BATBlock(**{"in_channels": 8, "window": 3, "groups": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"in_channels": 0}, ("in_channels is 0", "integer > 0")),
        ({"inner_channels": 0}, ("inner_channels is 0", "integer > 0")),
        ({"inner_channels": 2.5}, ("inner_channels is 2.5", "integer > 0")),
        ({"heads": 0}, ("heads is 0", "integer > 0")),
        ({"heads": 3}, ("inner_channels", "4", "heads", "3")),
        ({"inner_channels": 6, "heads": 4}, ("inner_channels", "6", "heads", "4")),
        ({"dimensions": 0}, ("dimensions is 0", "1", "2", "3")),
        ({"dimensions": 4}, ("dimensions is 4", "1", "2", "3")),
        ({"dimensions": "2"}, ("dimensions is '2'", "1", "2", "3")),
        ({"sub_sample": 1}, ("sub_sample is 1", "True and False")),
        ({"scale": None}, ("scale is None", "True and False")),
        ({"zero_init": "no"}, ("zero_init is 'no'", "True and False")),
        ({"norm": "layer"}, ("norm is 'layer'", "'batch', 'group', 'none'")),
        ({"norm": None}, ("norm is None", "'batch', 'group', 'none'")),
    ],
    ids=str,
)
def test_arguments_of_the_nonlocal_block(arguments: dict, parts: tuple[str, ...]) -> None:
    with refused(ValueError, "NonLocalBlock", *parts), NothingRuns():
        dt.layers.NonLocalBlock(**{"in_channels": 8, **arguments})


@pytest.mark.parametrize("name", ["BATransform", "BATBlock", "NonLocalBlock"])
def test_unknown_argument(name: str) -> None:
    with refused(TypeError, "kernel_size"):
        getattr(dt.layers, name)(8, kernel_size=3)


def test_options_go_by_name() -> None:
    with pytest.raises(TypeError):
        dt.layers.BATransform(8, 3)  # type: ignore[misc]
    with pytest.raises(TypeError):
        dt.layers.BATBlock(8, 2)  # type: ignore[misc]


FORM = "(B, 8, T, H, W)"
BAD_CLIPS: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
    (torch.ones(2, 8, 6, 6), ValueError, ("x is (2, 8, 6, 6)", FORM)),
    (torch.ones(2, 7, 4, 6, 6), ValueError, ("x is (2, 7, 4, 6, 6)", FORM)),
    (torch.ones(2, 8, 4, 2, 6), ValueError, ("(2, 8, 4, 2, 6)", "2", "window", "3")),
    (torch.ones(2, 8, 4, 6, 1), ValueError, ("(2, 8, 4, 6, 1)", "1", "window", "3")),
    (torch.ones(2, 8, 1, 6, 6), ValueError, ("(2, 8, 1, 6, 6)", "1", "temporal_window", "2")),
    (torch.ones(2, 8, 4, 0, 6), ValueError, ("(2, 8, 4, 0, 6)",)),
    (torch.ones(2, 8, 0, 6, 6), ValueError, ("(2, 8, 0, 6, 6)",)),
    (torch.ones(0, 8, 4, 2, 6), ValueError, ("(0, 8, 4, 2, 6)", "window")),
    (torch.ones(2, 8, 4, 6, 6).long(), TypeError, ("int64", "the layer's dtype, float32")),
    (torch.ones(2, 8, 4, 6, 6).half(), TypeError, ("float16", "the layer's dtype, float32")),
    (torch.ones(2, 8, 4, 6, 6, device="meta"), ValueError, ("meta", "the layer's device, cpu")),
    (torch.ones(2, 8, 4, 6, 6).to_sparse(), TypeError, ("sparse", "dense torch.Tensor")),
    (None, TypeError, ("x is NoneType", "dense torch.Tensor")),
    ([1.0], TypeError, ("x is list", "dense torch.Tensor")),
]
on_bad_clips = pytest.mark.parametrize(("x", "error", "parts"), BAD_CLIPS, ids=lambda v: str(getattr(v, "shape", v)))


@on_bad_clips
@pytest.mark.parametrize("method", ["forward", "matrices"])
def test_input(method: str, x: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    layer = make()
    with refused(error, "BATransform", *parts), NothingRuns():
        getattr(layer, method)(x)


@on_bad_clips
def test_input_of_the_block(x: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    """Before its first convolution."""
    layer = block()
    with refused(error, "BAT", *parts), NothingRuns():
        layer(x)


@pytest.mark.parametrize("name", ["BATransform", "BATBlock"])
@on_bad_clips
def test_input_of_the_published(name: str, x: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    config = {"in_channels": 8, "s": 3, "ts": 2, "k": 2, "tk": 2}
    layer = dt.compat.build(VIDEO + name, config)
    with refused(error, *[part for part in parts if "window" not in part]), NothingRuns():
        layer(x)


@pytest.mark.parametrize(
    ("x", "error", "parts"),
    [
        (torch.ones(2, 8, 4, 6, 6), ValueError, ("x is (2, 8, 4, 6, 6)", "(B, 8, H, W)")),
        (torch.ones(2, 9, 6, 6), ValueError, ("x is (2, 9, 6, 6)", "(B, 8, H, W)")),
        (torch.ones(2, 8, 6, 2), ValueError, ("(2, 8, 6, 2)", "2", "window", "3")),
        (torch.ones(2, 8, 0, 6), ValueError, ("(2, 8, 0, 6)",)),
        (torch.ones(2, 8, 6, 6).int(), TypeError, ("int32", "the layer's dtype, float32")),
        ("x", TypeError, ("x is str", "dense torch.Tensor")),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
@pytest.mark.parametrize("build", [make, block])
def test_input_of_images(build: Callable[..., Any], x: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    layer = build(dimensions=2)
    with refused(error, "BAT", *parts), NothingRuns():
        layer(x)


def test_frames_are_any_number_without_a_temporal_window() -> None:
    layer = make(temporal_groups=0)
    for frames in (1, 2, 3):
        x = clips(1, 8, frames, 6, 6)
        assert layer(x).shape == x.shape
        assert layer.matrices(x).p.shape[2] == frames


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_input_of_the_nonlocal_block(dimensions: int) -> None:
    layer, size = nonlocal_block(dimensions=dimensions), NONLOCAL_SIZES[dimensions]
    for x, error, parts in (
        (torch.ones(2, 8, *size, 1), ValueError, (f"x is {(2, 8, *size, 1)}", "(B, 8, ")),
        (torch.ones(2, 4, *size), ValueError, (f"x is {(2, 4, *size)}", "(B, 8, ")),
        (torch.ones(2, 8, *size).long(), TypeError, ("int64", "the layer's dtype, float32")),
        (torch.ones(2, 8, *size, device="meta"), ValueError, ("meta", "the layer's device, cpu")),
        (torch.ones(2, 8, *size[:-1], 0), ValueError, (str((2, 8, *size[:-1], 0)),)),
        (None, TypeError, ("x is NoneType", "dense torch.Tensor")),
    ):
        with refused(error, "NonLocalBlock", *parts), NothingRuns():
            layer(x)
