"""Relational self-attention on every backend that can run, against the reference, literal loops and its other forms."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import example, given
from support import (
    DEVICE,
    INTERPRETED,
    LAYOUTS,
    RELATIONAL_CONTEXTS,
    RELATIONAL_KERNELS,
    RelationalCase,
    assert_all_close,
    assert_close,
    assert_identical,
    backends,
    backends_and_dtypes,
    poisoned_outputs,
    relational_cases,
    settings,
    value_and_gradients,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton._core.dispatch import can_run
from dyreg_triton.testing import Call, RelationalSpec, TensorSpec, check_call, check_op, strategies

OP = "relational_attention"
HALVES = (torch.float16, torch.bfloat16)
NAMES = ("q", "k", "v", "h2", "h1", "p1", "g", "identity")
on_backends = pytest.mark.parametrize("backend", backends())
on_eager = pytest.mark.parametrize("backend", backends("eager"))
on_kernels = pytest.mark.parametrize("kernel", RELATIONAL_KERNELS)
on_contexts = pytest.mark.parametrize("context", RELATIONAL_CONTEXTS)


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def some(*values: Any, few: int) -> list[Any]:
    """All of `values`, or where kernels are interpreted the first `few`: each program takes milliseconds there."""
    return list(values[:few] if INTERPRETED else values)


def check(case: RelationalCase, backend: str, **options: Any) -> None:
    """Output and every gradient against the float64 reference, in poisoned memory; the second run gives the same."""

    def op(**arguments: Any) -> Tensor:
        y = dt.ops.relational_attention(**arguments)
        assert backend == "reference" or y.transpose(1, 2).is_contiguous(), "y is no view of (B, F, L, T, H, W) memory"
        return y

    if INTERPRETED and backend == "triton" and case.dtype == torch.bfloat16:
        options.setdefault("tolerance", 3e-2)  # the interpreter stores by rounding towards zero
    with dt.backend(backend):
        check_call(op, dt.reference.relational_attention, case.call(), repeat=not INTERPRETED, opcheck=False, **options)


def precise(backend: str) -> torch.dtype:
    """The widest dtype that this backend takes here."""
    return torch.float64 if can_run(backend, device=DEVICE, dtype=torch.float64) else torch.float32


def inputs(case: RelationalCase, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors by name, and the incoming gradient, on the device of the tests."""
    values = {name: t.to(DEVICE, dtype or t.dtype) for name, t in case.values().items()}
    grad_output = values.pop("grad_output")
    return values, grad_output


def results(
    case: RelationalCase, backend: str, values: dict[str, Tensor] | None = None, grad_output: Tensor | None = None
) -> dict[str, Tensor | None]:
    """Output and gradients of the op."""
    own, own_grad = inputs(case)
    leaves = {name: leaf(t) for name, t in (own if values is None else values).items()}
    with dt.backend(backend):
        return value_and_gradients(case.function(dt.ops), leaves, own_grad if grad_output is None else grad_output)


def reference_results(case: RelationalCase) -> dict[str, Tensor | None]:
    """Output and gradients of the reference in float64."""
    values, grad_output = inputs(case, torch.float64)
    return value_and_gradients(case.function(dt.reference), {name: leaf(t) for name, t in values.items()}, grad_output)


# --- against the reference ------------------------------------------------------------------------------------------


def hypothesis_test(dtypes: tuple[torch.dtype, ...], examples: int) -> Callable[..., None]:
    """A test over random cases: 300 over the dtypes of a GPU. `backend` comes from the caller's mark.

    On a GPU each is compiled, nine kernels for seconds, so there are fewer, unless FULL=1.
    """
    compiles = DEVICE.type == "cuda" and os.environ.get("FULL", "0") != "1"

    @settings(examples // 4 if INTERPRETED else examples // 8 if compiles else examples)
    @given(case=relational_cases(dtypes=dtypes))
    @example(case=RelationalCase(kernel_size=(2, 3, 3), queries=3, eps=1e-2, zeros=True, dtype=dtypes[0], seed=5))
    def test(backend: str, case: RelationalCase) -> None:
        check(case, backend)

    return test


test_float32 = on_backends(hypothesis_test((torch.float32,), 200))
test_halves = on_backends(hypothesis_test(HALVES, 100))
test_float64 = pytest.mark.parametrize("backend", backends(dtype=torch.float64))(hypothesis_test((torch.float64,), 40))


@pytest.mark.parametrize("eps", some(1e-6, None, few=1))
@on_contexts
@on_kernels
@on_backends
def test_every_kernel_and_context(backend: str, kernel: str, context: str, eps: float | None) -> None:
    check(RelationalCase(kernel, context, (2, 3, 3), (2, 2, 3), 1, 2, eps=eps, zeros=eps is not None, seed=3), backend)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(*HALVES, torch.float32, torch.float64))
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_dtypes(eps: float | None, backend: str, dtype: torch.dtype) -> None:
    check(RelationalCase(kernel_size=(3, 3, 3), channels=16, mixed=17, eps=eps, dtype=dtype, seed=4), backend)


@pytest.mark.parametrize("which", some("all", "features", "weights", "gradient", few=1))
@pytest.mark.parametrize("layout", LAYOUTS)
@on_backends
def test_every_layout(backend: str, layout: str, which: str) -> None:
    chosen = {"all": NAMES, "features": NAMES[:3], "weights": NAMES[3:], "gradient": ()}[which]
    layouts = dict.fromkeys(chosen, layout)
    clip = (1, 2, 3) if INTERPRETED else (2, 3, 4)
    case = RelationalCase(clip=clip, batch=2, layouts=layouts, eps=1e-2 if which == "features" else None, seed=5)
    check(dataclasses.replace(case, grad_layout=layout if which in ("all", "gradient") else "contiguous"), backend)


@pytest.mark.parametrize(
    ("kernel_size", "clip"),
    [
        ((1, 1, 1), (2, 3, 4)),
        ((3, 1, 1), (4, 2, 2)),
        ((1, 3, 1), (2, 4, 2)),
        ((1, 1, 3), (2, 2, 4)),
        ((3, 3, 3), (3, 3, 3)),
        ((2, 1, 1), (4, 2, 2)),
        ((1, 2, 1), (2, 4, 2)),
        ((1, 1, 4), (1, 2, 5)),
        ((2, 4, 2), (3, 3, 3)),
        ((5, 7, 7), (2, 1, 2)),
        ((3, 5, 7), (1, 1, 2)),
        ((1, 9, 8), (1, 3, 1)),
    ],
    ids=str,
)
@on_backends
def test_windows(backend: str, kernel_size: tuple[int, int, int], clip: tuple[int, int, int]) -> None:
    check(RelationalCase(kernel_size=kernel_size, clip=clip, seed=6), backend)


@pytest.mark.parametrize("clip", [(1, 1, 1), (1, 1, 5), (1, 5, 1), (5, 1, 1), (2, 7, 1), (1, 3, 11)], ids=str)
@on_backends
def test_clips(backend: str, clip: tuple[int, int, int]) -> None:
    check(RelationalCase(kernel_size=(3, 3, 3), clip=clip, batch=1 if INTERPRETED else 2, seed=7), backend)


CHANNELS = [(8, 8, 8, 8), (4, 5, 8, 16), (17, 4, 5, 8), (16, 17, 24, 4), (24, 16, 4, 17), (1, 1, 1, 1), (2, 3, 1, 2)]
MANY_CHANNELS = [(64, 64, 64, 64), (32, 33, 31, 65), (128, 127, 128, 63), (65, 4, 127, 128), (15, 128, 4, 33)]


@pytest.mark.parametrize("channels", CHANNELS + ([] if INTERPRETED else MANY_CHANNELS), ids=str)
@on_backends
def test_channels(backend: str, channels: tuple[int, int, int, int]) -> None:
    """C, D, E and F at the edges of blocks and below the smallest."""
    c, d, e, f = channels
    check(RelationalCase(clip=(1, 2, 3), channels=c, latent=d, value_channels=e, mixed=f, seed=8), backend)


@pytest.mark.parametrize("queries", [1, 3, 16] if INTERPRETED else range(1, 17))
@on_backends
def test_queries(backend: str, queries: int) -> None:
    check(RelationalCase(clip=(1, 2, 3), queries=queries, channels=8, value_channels=8, seed=9), backend)


# Channels of a query in the four stages of RSANet-50, and the grid's side.
STAGES = [(8, 56), (16, 28), (32, 14), (64, 7)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU, and kernels that are not interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("frames", [8, 16])
@pytest.mark.parametrize(("channels", "side"), STAGES)
@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_stages_of_rsanet(backend: str, channels: int, side: int, frames: int, dtype: torch.dtype) -> None:
    case = RelationalCase(
        kernel_size=(5, 7, 7), clip=(frames, side, side), queries=8, channels=channels, latent=channels,
        value_channels=channels, mixed=channels, eps=1e-6, dtype=dtype, seed=10,
    )  # fmt: skip
    check(case, backend)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU, and kernels that are not interpreted")
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_many_positions(backend: str, batch: int) -> None:
    """As many programs as a GPU runs at once, and more."""
    check(RelationalCase(clip=(4, 33, 65), batch=batch, queries=8, channels=8, value_channels=8, seed=11), backend)


# --- the definition, in loops ---------------------------------------------------------------------------------------


def literal(
    q: Tensor, v: Tensor, h2: Tensor, k: Tensor | None = None, h1: Tensor | None = None, p1: Tensor | None = None,
    g: Tensor | None = None, identity: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Equation 12, one position and query after the other."""
    batch, queries, _, *clip = q.shape
    taps = list(itertools.product(*map(range, h2.shape[1:])))
    y = []
    for b, n in itertools.product(range(batch), itertools.product(*map(range, clip))):

        def window(x: Tensor, b: int = b, n: tuple[int, ...] = n) -> Tensor:
            """(M, channels) around n."""
            rows = []
            for tap in taps:
                at = [p + i - size // 2 for p, i, size in zip(n, tap, h2.shape[1:], strict=True)]
                inside = all(0 <= p < side for p, side in zip(at, clip, strict=True))
                rows.append(x[(b, slice(None), *at)] if inside else 0 * x[b, :, 0, 0, 0])
            return torch.stack(rows)

        values = window(v)
        for query in range(queries):
            x = q[(b, query, slice(None), *n)]
            a = x if p1 is None and h1 is None else 0
            if p1 is not None:
                a = a + x @ p1
            if h1 is not None and k is not None:
                keys = window(k)
                a = a + x @ sum(keys[m][:, None] * h1[(slice(None), slice(None), *tap)] for m, tap in enumerate(taps))
            z = a @ (h2.flatten(1) @ values)
            out = 0 * z if g is not None and identity is None else z if identity is None else z @ identity
            if g is not None:
                out = z @ (values.mT @ g.flatten(1).mT) + (out if identity is not None else 0)
            y.append(out)
    return torch.stack(y).view(batch, *clip, queries, -1).permute(0, 4, 5, 1, 2, 3)


@pytest.mark.parametrize(("kernel_size", "clip"), some(((1, 2, 3), (1, 3, 2)), ((2, 2, 4), (2, 2, 3)), few=1), ids=str)
@on_contexts
@on_kernels
@on_backends
def test_by_hand(
    backend: str, kernel: str, context: str, kernel_size: tuple[int, int, int], clip: tuple[int, int, int]
) -> None:
    case = RelationalCase(kernel, context, kernel_size, clip, seed=12)
    values, grad_output = inputs(case)
    wide = {name: leaf(t.double().cpu()) for name, t in values.items()}
    expected = value_and_gradients(literal, wide, grad_output.double().cpu())
    assert_all_close(results(case, backend), expected)


def test_reference_by_hand_in_float64() -> None:
    case = RelationalCase(kernel_size=(2, 3, 4), clip=(2, 3, 3), dtype=torch.float64, seed=12)
    values, grad_output = inputs(case)
    expected = value_and_gradients(literal, {name: leaf(t.cpu()) for name, t in values.items()}, grad_output.cpu())
    assert_all_close(reference_results(case), expected, tolerance=1e-13)


@on_backends
def test_axes_and_taps_are_not_mixed_up(backend: str) -> None:
    """One value of 1 and taps numbered from 1: each position sees the tap at which the value lies from there."""
    for kernel_size, at in (((3, 5, 7), (1, 2, 2)), ((2, 4, 3), (1, 1, 2)), ((1, 1, 2), (2, 0, 4))):
        clip = (3, 4, 5)
        taps = torch.arange(1.0, 1 + kernel_size[0] * kernel_size[1] * kernel_size[2]).view(1, *kernel_size)
        v = torch.zeros(1, 1, *clip)
        v[(0, 0, *at)] = 1
        expected = torch.zeros(clip, dtype=torch.float64)
        for n in itertools.product(*map(range, clip)):
            tap = [p - q + size // 2 for p, q, size in zip(at, n, kernel_size, strict=True)]
            if all(0 <= i < size for i, size in zip(tap, kernel_size, strict=True)):
                expected[n] = taps[(0, *tap)]
        with dt.backend(backend):
            q = torch.ones(1, 1, 1, *clip, device=DEVICE)
            y = dt.ops.relational_attention(q, None, v.to(DEVICE), h2=taps.to(DEVICE))
        assert_close(y[0, 0, 0], expected)


# --- other forms of the same ----------------------------------------------------------------------------------------


def vanilla(kernel: str, context: str) -> Callable[..., Tensor]:
    """Equations 5-8 with H = H1 H2^T and P = H2 P1."""

    def function(q: Tensor, v: Tensor, h2: Tensor, **given: Tensor) -> Tensor:
        k, h1, p1 = (given.get(name) for name in ("k", "h1", "p1"))
        if kernel == "V published":
            p1 = torch.eye(q.shape[2], dtype=q.dtype, device=q.device)
        if k is None or h1 is None:
            k, h1 = torch.zeros_like(q[:, 0]), torch.zeros(q.shape[2], *h2.shape).to(q)
        h = torch.einsum("cdthw,dm->cthwm", h1, h2.flatten(1))
        p = None if p1 is None else torch.einsum("dm,cd->mc", h2.flatten(1), p1)
        return dt.reference.vanilla_relational_attention(
            q, k, v, h=h, p=p, g=given.get("g"), identity=given.get("identity")
        )

    return function


def reordered(q: Tensor, k: Tensor, v: Tensor, h2: Tensor, h1: Tensor, p1: Tensor, g: Tensor, identity: Tensor):
    """The products from left to right: nothing of D x E or E x F per position."""
    from dyreg_triton.reference.relational import windows

    size = (h2.shape[1], h2.shape[2], h2.shape[3])
    values, keys = windows(v, size), windows(k, size)
    weight = p1[..., None, None, None] + torch.einsum("bcthwm,cdm->bcdthw", keys, h1.flatten(2))
    a = torch.einsum("blcthw,bcdthw->bldthw", q, weight)
    kappa = torch.einsum("bldthw,dm->blmthw", a, h2.flatten(1))
    z = torch.einsum("blmthw,bethwm->blethw", kappa, values)
    s = torch.einsum("blethw,bethwm->blmthw", z, values)
    return torch.einsum("blethw,ef->blfthw", z, identity) + torch.einsum("blmthw,fm->blfthw", s, g.flatten(1))


@pytest.mark.parametrize(
    ("kernel", "context"),
    [
        *[("V+R", "V+R"), ("V published", "R"), ("R", "V")],
        *([] if INTERPRETED else itertools.product(RELATIONAL_KERNELS, RELATIONAL_CONTEXTS)),
    ],
)
@on_backends
def test_vanilla_and_decomposed_agree(backend: str, kernel: str, context: str) -> None:
    """Outputs, and gradients of the tensors that both have."""
    case = RelationalCase(kernel, context, (2, 3, 2), (2, 2, 3), dtype=precise(backend), seed=13)
    values, grad_output = inputs(case, torch.float64)
    expected = value_and_gradients(vanilla(kernel, context), {name: leaf(t) for name, t in values.items()}, grad_output)
    assert_all_close(results(case, backend), expected)


@on_backends
def test_reordered_and_fused_agree(backend: str) -> None:
    case = RelationalCase(kernel_size=(2, 3, 2), clip=(2, 2, 3), dtype=precise(backend), seed=14)
    values, grad_output = inputs(case, torch.float64)
    expected = value_and_gradients(reordered, {name: leaf(t) for name, t in values.items()}, grad_output)
    assert_all_close(results(case, backend), expected)


@on_backends
def test_one_tap_has_a_closed_form(backend: str) -> None:
    case = RelationalCase(kernel_size=(1, 1, 1), clip=(2, 3, 4), batch=2, dtype=precise(backend), seed=15)

    def closed(q: Tensor, k: Tensor, v: Tensor, h2: Tensor, h1: Tensor, p1: Tensor, g: Tensor, identity: Tensor):
        h2, h1, g = (t.flatten(-4) if t is h1 else t.flatten() for t in (h2, h1, g))
        a = torch.einsum("blcthw,cd->bldthw", q, p1)
        a = a + torch.einsum("blcthw,bcthw,cd->bldthw", q, k, h1.view(p1.shape))
        kappa = torch.einsum("bldthw,d->blthw", a, h2)
        z = torch.einsum("blthw,bethw->blethw", kappa, v)
        return torch.einsum("blethw,ef->blfthw", z, identity) + torch.einsum("blethw,bethw,f->blfthw", z, v, g)

    values, grad_output = inputs(case, torch.float64)
    expected = value_and_gradients(closed, {name: leaf(t) for name, t in values.items()}, grad_output)
    assert_all_close(results(case, backend), expected)


@pytest.mark.parametrize("eps", [None, 1e-2])
@on_backends
def test_parts_add_up(backend: str, eps: float | None) -> None:
    """Both kernels are the sum of the two, and so are both contexts."""
    values, _ = inputs(RelationalCase(eps=eps, dtype=precise(backend), seed=16))
    q, k, v, h2, h1, p1, g, identity = (values[name] for name in NAMES)
    with dt.backend(backend):

        def y(k: Tensor | None = None, **given: Tensor) -> Tensor:
            return dt.ops.relational_attention(q, k, v, h2=h2, eps=eps, **given)

        whole = y(k, h1=h1, p1=p1, g=g, identity=identity)
        kernels = y(p1=p1, g=g, identity=identity) + y(k, h1=h1, g=g, identity=identity)
        basic = torch.einsum("blethw,ef->blfthw", y(k, h1=h1, p1=p1), identity)
        contexts = y(k, h1=h1, p1=p1, g=g) + basic
        projected = dt.ops.relational_attention(q, None, v, h2=torch.einsum("cd,dthw->cthw", p1, h2))
        published = dt.ops.relational_attention(q, None, v, h2=h2, p1=p1)
    assert_close(kernels, whole.double(), "kernels")
    assert_close(contexts, whole.double(), "contexts")
    assert_close(projected, published.double(), "without p1")


@on_backends
def test_channels_tied_in_groups(backend: str) -> None:
    """Group-wise correlation: h1 of a group stands for all of its channels, and collects their gradients."""
    case = RelationalCase(channels=6, dtype=precise(backend), seed=17)
    values, grad_output = inputs(case)
    for groups in (1, 2, 3):
        small = values["h1"][:groups]
        each = 6 // groups

        def tied(small: Tensor, each: int = each, **rest: Tensor) -> Tensor:
            h1 = small.unsqueeze(1).expand(-1, each, -1, -1, -1, -1).flatten(0, 1)
            assert len(small) > 1 or h1.stride(0) == 0
            return case.function(dt.ops)(h1=h1, **rest)

        def by_groups(small: Tensor, each: int = each, **rest: Tensor) -> Tensor:
            return case.function(dt.reference)(h1=torch.repeat_interleave(small, each, 0), **rest)

        given = {**{n: t for n, t in values.items() if n != "h1"}, "small": small}
        with dt.backend(backend):
            actual = value_and_gradients(tied, {n: leaf(t) for n, t in given.items()}, grad_output)
        wide = {n: leaf(t.double()) for n, t in given.items()}
        assert_all_close(actual, value_and_gradients(by_groups, wide, grad_output.double()))


# --- symmetries -----------------------------------------------------------------------------------------------------


def call_op(backend: str, values: dict[str, Tensor], eps: float | None = None, **changed: Tensor) -> Tensor:
    with dt.backend(backend):
        return dt.ops.relational_attention(**{"k": None, **values, **changed}, eps=eps)


@pytest.mark.parametrize("eps", [None, 1e-6])
@on_backends
def test_moves_with_its_input(backend: str, eps: float | None) -> None:
    """A clip inside of a larger, empty one gives the same wherever it lies; it is cut off at the border only."""
    values, _ = inputs(RelationalCase(kernel_size=(2, 3, 3), clip=(1, 2, 2), eps=eps, seed=18))
    canvas, home = (3, 4, 5), call_op(backend, values, eps)

    def placed(x: Tensor, t: int, h: int, w: int) -> Tensor:
        large = x.new_zeros(*x.shape[:-3], *canvas)
        large[..., t : t + 1, h : h + 2, w : w + 2] = x
        return large

    for place in ((0, 0, 0), (1, 1, 2), (2, 2, 3)):
        y = call_op(backend, {n: placed(t, *place) if n in "qkv" else t for n, t in values.items()}, eps)
        assert_close(y, placed(home, *place).double(), f"at {place}")


@on_backends
def test_linear_in_queries(backend: str) -> None:
    case = RelationalCase(seed=19)
    values, _ = inputs(case)
    one, other = values["q"], torch.randn_like(values["q"])
    y = call_op(backend, values, q=2 * one - 3 * other)
    expected = 2 * call_op(backend, values).double() - 3 * call_op(backend, values, q=other).double()
    assert_close(y, expected)


@pytest.mark.parametrize("eps", [None, 1e-6])
@on_backends
def test_queries_do_not_see_each_other(backend: str, eps: float | None) -> None:
    case = RelationalCase(queries=5, eps=eps, seed=20)
    values, _ = inputs(case)
    y = call_op(backend, values, eps)
    order = [3, 0, 4, 1, 2]
    assert_close(call_op(backend, values, eps, q=values["q"][:, order]), y[:, order].double(), "permuted")
    assert_close(call_op(backend, values, eps, q=values["q"][:, 3:4]), y[:, 3:4].double(), "alone")


@on_backends
def test_clips_of_a_batch_do_not_see_each_other(backend: str) -> None:
    """Nor in the gradients; those of the weights add up."""
    clip = (1, 2, 2) if INTERPRETED else (2, 2, 3)
    case = RelationalCase(kernel_size=(3, 3, 3), clip=clip, batch=3, eps=1e-2, seed=21)
    values, grad_output = inputs(case)
    whole = results(case, backend)
    sums: dict[str, Tensor] = {}
    for b in range(3):
        own = {n: t[b : b + 1] if n in "qkv" else t for n, t in values.items()}
        alone = results(case, backend, own, grad_output[b : b + 1])
        for name, t in alone.items():
            assert t is not None
            if name in ("out", "grad_q", "grad_k", "grad_v"):
                assert_close(t, whole[name][b : b + 1].double(), name)
            else:
                sums[name] = sums.get(name, 0) + t.double()
    assert_all_close({name: whole[name] for name in sums}, sums)


@pytest.mark.parametrize("kernel_size", some((2, 3, 4), (5, 7, 9), (4, 6, 8), (3, 8, 3), few=1), ids=str)
@on_backends
def test_window_larger_than_the_clip_is_cropped(backend: str, kernel_size: tuple[int, int, int]) -> None:
    """Taps that reach no position from any other change nothing and get no gradient."""
    clip = (1, 1, 2) if INTERPRETED else (2, 2, 2)
    case = RelationalCase(kernel_size=kernel_size, clip=clip, eps=1e-2, seed=22)
    whole = results(case, backend)
    values, _ = inputs(case)
    spans = [slice(max(0, k // 2 - n + 1), min(k, k // 2 + n)) for k, n in zip(kernel_size, clip, strict=True)]
    crop = (..., *spans)
    windowed = ("h2", "h1", "g")
    cropped = results(case, backend, {n: t[crop].contiguous() if n in windowed else t for n, t in values.items()})
    for name in windowed:
        full = whole[f"grad_{name}"]
        outside = full.clone()
        outside[crop] = 0
        assert outside.eq(0).all(), name
        whole[f"grad_{name}"] = full[crop]
    assert_all_close(whole, {name: t.double() for name, t in cropped.items()})


@pytest.mark.parametrize("axis", [0, 1, 2])
@on_backends
def test_even_window_is_an_odd_one_without_its_last_tap(backend: str, axis: int) -> None:
    size = [3, 3, 3]
    size[axis] = 2
    case = RelationalCase(kernel_size=(size[0], size[1], size[2]), clip=(2, 2, 2), eps=1e-2, seed=23)
    even = results(case, backend)
    values, _ = inputs(case)
    margin = [0] * 6
    margin[2 * (2 - axis) + 1] = 1
    windowed = ("h2", "h1", "g")
    odd = results(case, backend, {n: F.pad(t, margin) if n in windowed else t for n, t in values.items()})
    for name in windowed:
        odd[f"grad_{name}"] = odd[f"grad_{name}"].narrow(axis - 3, 0, 2)
    assert_all_close(even, {name: t.double() for name, t in odd.items()})


# --- normalisation inside -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", some(1e-3, 1.0, few=1))
@pytest.mark.parametrize("eps", some(1e-6, 1e-2, 1, 30.0, few=1))
@on_kernels
@on_backends
def test_eps_normalises_as_by_hand(backend: str, kernel: str, eps: float, scale: float) -> None:
    case = RelationalCase(kernel, eps=eps, scale=scale, zeros=True, clip=(1, 3, 3), seed=24)
    values, grad_output = inputs(case, torch.float64)

    def by_hand(**tensors: Tensor) -> Tensor:
        for name, dim in (("q", 2), ("k", 1), ("v", 1)):
            if name in tensors:
                t = tensors[name]
                tensors[name] = t / torch.sqrt((t * t).sum(dim, keepdim=True) + eps)
        return dt.reference.relational_attention(**{"k": None, **tensors})

    expected = value_and_gradients(by_hand, {name: leaf(t) for name, t in values.items()}, grad_output)
    assert_all_close(results(case, backend), expected)


@on_backends
def test_zeros_stay_zero_under_eps(backend: str) -> None:
    """A position without signal is divided by sqrt(eps); what is 0 stays 0 and its gradient is finite."""
    case = RelationalCase(eps=1e-6, clip=(1, 3, 3), seed=25)
    values, _ = inputs(case)
    for name in ("q", "k", "v"):
        values[name] = values[name].clone()
        values[name][..., 1, 1] = 0
    found = results(case, backend, values)
    assert found["out"][..., 1, 1].eq(0).all()
    for name, t in found.items():
        assert t.isfinite().all(), name
    assert found["grad_q"][..., 1, 1].abs().max() > 10 * found["grad_q"][..., 0, 0].abs().max()


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(*HALVES))
def test_norms_are_taken_in_float32(backend: str, dtype: torch.dtype) -> None:
    """The squares of these overflow float16, and their sum stops growing in bfloat16."""
    case = RelationalCase(eps=1e-2, channels=32, value_channels=32, clip=(1, 2, 3), dtype=dtype, seed=26)
    values, _ = inputs(case)
    for name in ("q", "k", "v"):
        values[name] = values[name].abs() * 200 + 100
    wide = {name: leaf(t.double()) for name, t in values.items()}
    with dt.backend(backend):
        y = case.function(dt.ops)(**values)
    rounding = 3e-2 if INTERPRETED and backend == "triton" and dtype == torch.bfloat16 else 1e-2  # see check
    assert_close(y, case.function(dt.reference)(**wide), tolerance=rounding)


@pytest.mark.parametrize("eps", [1, 2, torch.finfo(torch.float32).eps])
@on_backends
def test_eps_may_be_any_number(backend: str, eps: float) -> None:
    values, _ = inputs(RelationalCase(clip=(1, 2, 2), seed=27))
    assert_identical(call_op(backend, values, eps), call_op(backend, values, float(eps)))


# --- both orders of evaluation --------------------------------------------------------------------------------------


@contextmanager
def forced(**fields: Any) -> Iterator[list[object]]:
    """Every launch config says this; gives what was asked for."""
    seen: list[object] = []

    def choose(key: tuning.Key, config: Any) -> Any:
        seen.append(key)
        return dataclasses.replace(config, **fields)

    with tuning.override(choose):
        yield seen


@pytest.mark.kernels
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    ("queries", "channels", "kernel", "context", "dtype"),
    [
        (8, 4, "V+R", "V+R", torch.float32),
        (1, 17, "V+R", "V+R", torch.float32),
        (2, 4, "V+R", "V+R", torch.float32),
        (2, 5, "R", "R", torch.float32),
        (3, 8, "V", "V+R", torch.float32),
        (2, 8, "V published", "R", torch.float32),
        (1, 8, "R", "V", torch.float32),
        (2, 16, "V+R", "V+R", torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_both_orders(queries: int, channels: int, kernel: str, context: str, dtype: torch.dtype, order: str) -> None:
    """Whatever the rule prefers: E is below, at and above 2 L here."""
    case = RelationalCase(
        kernel, context, (1, 3, 3), (2, 2, 3), 1, queries, channels, 5, channels, 4, eps=1e-2, dtype=dtype, seed=28
    )
    with forced(order=order) as seen:
        check(case, "triton")
    assert seen


@pytest.mark.kernels
@pytest.mark.parametrize("kernel_size", some((1, 1, 1), (2, 2, 4), (5, 7, 7), few=2), ids=str)
@pytest.mark.parametrize("order", ["first", "second"])
def test_windows_in_both_orders(order: str, kernel_size: tuple[int, int, int]) -> None:
    with forced(order=order):
        check(RelationalCase(kernel_size=kernel_size, clip=(2, 2, 2), seed=29), "triton")


@pytest.mark.kernels
@pytest.mark.parametrize("clips", [1, 2, 4])
def test_clips_in_parts(clips: int) -> None:
    """The backward takes some clips at a time; the last part may be smaller."""
    with forced(clips=clips):
        check(RelationalCase(kernel_size=(1, 3, 3), clip=(1, 2, 2), batch=3, eps=1e-2, seed=31), "triton")


@pytest.mark.kernels
@pytest.mark.parametrize("fields", some(
    {"plane": (2, 2), "block_p": 8, "block_c": 8}, {"splits": 3, "block_m": 32, "block_d": 16},
    {"plane": (4, 1), "block_p": 4}, {"splits": 2, "clips": 2}, few=4), ids=str)  # fmt: skip
def test_other_blocks(fields: dict[str, Any]) -> None:
    """Whatever a tuner may choose: tiles smaller and larger than the map, sums of several programs."""
    case = RelationalCase(
        kernel_size=(2, 3, 3), clip=(2, 5, 3), batch=2, queries=2, channels=12, latent=20, value_channels=9, mixed=18,
        eps=1e-2, seed=32,
    )  # fmt: skip
    kinds = ("fold_keys", "fold_values") if "plane" in fields else ("by_h1", "by_h2", "backward")
    with tuning.override(lambda key, config: dataclasses.replace(config, **(fields if key.kind in kinds else {}))):
        check(case, "triton")


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("family", "itemsize", "width"), [("nvidia", 4, 128), ("nvidia", 2, 64), ("amd", 2, 128), ("amd", 4, 16)], ids=str
)
def test_blocks_of_every_family(family: str, itemsize: int, width: int) -> None:
    """What other GPUs would choose for other widths gives the same numbers."""
    case = RelationalCase(
        kernel_size=(1, 3, 3), clip=(1, 5, 3), batch=2, queries=2, channels=20, value_channels=12, mixed=12, eps=1e-2,
        seed=33,
    )  # fmt: skip

    def choose(key: tuning.Key, _: Any) -> Any:
        clips, t, h, w, queries, *_, kt, kh, kw = key.sizes
        return tuning.relational(key.kind, clips, (t, h, w), queries, (width,) * 4, (kt, kh, kw), itemsize, family)

    with tuning.override(choose):
        check(case, "triton")


# --- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v"])
@on_backends
def test_a_nan_spoils_what_it_reaches(backend: str, name: str) -> None:
    """And nothing else: a neighbour outside a window is not read, nor one that the padding of taps would reach."""
    case = RelationalCase(kernel_size=(1, 3, 3), clip=(2, 4, 9), queries=2, eps=1e-2, seed=34)
    values, grad_output = inputs(case)
    values[name][..., 1, 2, 4] = float("nan")
    found = results(case, backend, values, grad_output)
    wide = {key: leaf(t.double()) for key, t in values.items()}
    expected = value_and_gradients(case.function(dt.reference), wide, grad_output.double())
    for key in ("out", "grad_q", "grad_k", "grad_v"):
        spoilt, wanted = ~found[key].isfinite(), ~expected[key].isfinite()
        assert wanted.any() or key == "grad_v"
        assert not wanted.all()
        if backend == "triton" and key == "grad_v":  # a tile of it shares its neighbours
            assert not (wanted & ~spoilt).any()
            assert not spoilt[..., 0, :, :].any(), "another frame"
        else:
            assert_identical(spoilt, wanted)


@on_backends
def test_what_follows_may_have_no_gradient(backend: str) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    case = RelationalCase(clip=(1, 2, 2))
    values = {name: leaf(t) for name, t in inputs(case)[0].items()}
    with dt.backend(backend):
        Stop.apply(case.function(dt.ops)(**values)).backward()
    assert all(t.grad is None or not t.grad.any() for t in values.values())


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("beyond", "named"),
    [({"queries": 17}, "L = 17"), ({"channels": 129}, "C = 129"), ({"latent": 130}, "D = 130"),
     ({"value_channels": 131, "mixed": 131}, "E = 131, F = 131")],
    ids=str,
)  # fmt: skip
def test_sizes_beyond_the_kernels(beyond: dict[str, int], named: str) -> None:
    """Asked for by name, Triton refuses and says what takes them; "auto" takes eager, and says so."""
    case = RelationalCase(kernel_size=(1, 1, 1), clip=(1, 1, 2), **beyond)
    values, _ = inputs(case)
    with dt.backend("triton"), pytest.raises(ValueError, match=rf"{named}; accepted .*16.*128.*eager.*call: q \("):
        case.function(dt.ops)(**values)
    with dt.backend("auto"), pytest.warns(UserWarning, match=f"{named}; .*eager backend computes this call"):
        y = case.function(dt.ops)(**values)
    with dt.backend("eager"):
        assert_identical(y, case.function(dt.ops)(**values))
    compiled = torch.compile(case.function(dt.ops), backend="aot_eager", fullgraph=True)
    with dt.backend("auto"), pytest.warns(UserWarning, match=f"{named}; .*eager backend computes this call"):
        compiled(**values)


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_p", 1), ("block_p", 3), ("block_m", 8), ("block_m", 64), ("block_c", 4), ("block_d", 8), ("splits", 0),
     ("clips", 0), ("plane", (3, 4)), ("num_warps", 3), ("num_stages", 0), ("order", "third")],
)  # fmt: skip
def test_configs_that_no_kernel_takes(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"RelationalConfig: {field} is .*; accepted"):
        tuning.RelationalConfig(**{field: value})


@pytest.mark.parametrize("eps", [None, 1e-6])
@on_contexts
@on_kernels
@on_backends
def test_empty_batch(backend: str, kernel: str, context: str, eps: float | None) -> None:
    """Nothing in, nothing out; weights get a gradient of zeros."""
    case = RelationalCase(kernel, context, batch=0, eps=eps)
    values, grad_output = inputs(case)
    leaves = {name: leaf(t) for name, t in values.items()}
    with dt.backend(backend), poisoned_outputs():
        found = value_and_gradients(case.function(dt.ops), leaves, grad_output)
    assert found["out"].shape == case.out_shape()
    assert found["out"].dtype == case.dtype
    for name, t in values.items():
        grad = found[f"grad_{name}"]
        assert grad is not None, name
        assert grad.shape == t.shape
        assert grad.eq(0).all()


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
@on_contexts
def test_memory_of_the_output(context: str, backend: str, dtype: torch.dtype) -> None:
    """(B, F, L, T, H, W): the published order of channels, value-major, costs nothing."""
    case = RelationalCase(context=context, batch=2, queries=3, clip=(1, 2, 3), dtype=dtype)
    values, _ = inputs(case)
    y = call_op(backend, values)
    assert y.shape == case.out_shape()
    assert (y.dtype, y.device.type) == (dtype, DEVICE.type)
    assert y.transpose(1, 2).is_contiguous()
    published = y.transpose(1, 2).flatten(1, 2)
    assert published.data_ptr() == y.data_ptr()
    assert_identical(published[:, 4], y[:, 1, 1])  # channel = f * L + l


def everywhere(t: Tensor) -> Tensor:
    """A constant gradient, as y.sum() gives: stride 0 in every dimension."""
    return torch.ones((), device=t.device, dtype=t.dtype).expand_as(t)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last_3d": lambda t: t.movedim(-4, -1).contiguous().movedim(-1, -4),
    "columns before rows": lambda t: t.mT.contiguous().mT,
    "frames outermost": lambda t: t.movedim(-3, 0).contiguous().movedim(0, -3),
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "a window": lambda t: F.pad(t, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "one frame for all": lambda t: t[..., :1, :, :].expand_as(t),
    "one row for all": lambda t: t[..., :1, :].expand_as(t),
    "one channel for all": lambda t: t.narrow(-4, 0, 1).expand_as(t),
}


@pytest.mark.parametrize("change", CHANGES)
@on_backends
def test_layouts_that_come_of_use(backend: str, change: str) -> None:
    """Of features and of the incoming gradient, none of which is written."""
    case = RelationalCase(clip=(1, 2, 2) if INTERPRETED else (2, 2, 4), batch=2, eps=1e-2, seed=30)
    values, grad_output = inputs(case)
    given = {name: CHANGES[change](t) if name in "qkv" else t for name, t in values.items()}
    grad_output = CHANGES[change](grad_output)
    kept = {name: t.clone() for name, t in {**given, "grad": grad_output}.items()}
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    with dt.backend(backend):
        actual = value_and_gradients(case.function(dt.ops), leaves, grad_output)
    wide = {name: leaf(t.double()) for name, t in given.items()}
    expected = value_and_gradients(case.function(dt.reference), wide, grad_output.double())
    assert_all_close(actual, expected)
    for name, t in {**given, "grad": grad_output}.items():
        assert_identical(t, kept[name], name)


@on_backends
def test_queries_that_are_one_tensor(backend: str) -> None:
    """q expanded over queries, q, k and v from one projection, and a constant incoming gradient."""
    generator = torch.Generator().manual_seed(31)
    projection = torch.randn(2, 3 * 4, 2, 2, 3, generator=generator).to(DEVICE)
    case = RelationalCase(batch=2, queries=3, clip=(2, 2, 3), eps=1e-2, seed=31)
    values, _ = inputs(case)
    weights = {name: t for name, t in values.items() if name not in "qkv"}

    def function(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(projection: Tensor, **weights: Tensor) -> Tensor:
            q, k, v = projection.split(4, 1)
            return op(q=q.unsqueeze(1).expand(-1, 3, -1, -1, -1, -1), k=k, v=v, **weights)

        return call

    leaves = {name: leaf(t) for name, t in {"projection": projection, **weights}.items()}
    with dt.backend(backend):
        out = function(case.function(dt.ops))(**leaves)
        out.sum().backward()
    wide = {name: leaf(t.double()) for name, t in {"projection": projection, **weights}.items()}
    expected = value_and_gradients(function(case.function(dt.reference)), wide)
    assert_all_close({"out": out, **{f"grad_{name}": t.grad for name, t in leaves.items()}}, expected)


# --- gradients ------------------------------------------------------------------------------------------------------

SUBSETS = [*[(name,) for name in NAMES], ("q", "k", "v"), ("h2", "h1", "p1", "g", "identity"), ("k", "g"), ("v", "h1")]


@pytest.mark.parametrize("wanted", [*SUBSETS, ()], ids="+".join)
@on_backends
def test_gradients_of_some_inputs_only(backend: str, wanted: tuple[str, ...]) -> None:
    case = RelationalCase(clip=(1, 2, 3), eps=1e-2, seed=32)
    values, grad_output = inputs(case)
    for name, t in values.items():
        t.requires_grad_(name in wanted)
    with dt.backend(backend):
        y = case.function(dt.ops)(**values)
        assert y.requires_grad == bool(wanted)
        if wanted:
            y.backward(grad_output)
    expected = reference_results(case)
    assert_close(y, expected["out"])
    for name, t in values.items():
        assert_close(t.grad, expected[f"grad_{name}"] if name in wanted else None, f"grad_{name}")


@on_backends
def test_no_graph_under_no_grad(backend: str) -> None:
    case = RelationalCase(eps=1e-6, clip=(1, 2, 3))
    values = {name: leaf(t) for name, t in inputs(case)[0].items()}
    with dt.backend(backend):
        with_graph = case.function(dt.ops)(**values)
        for without in (torch.no_grad(), torch.inference_mode()):
            with without:
                y = case.function(dt.ops)(**values)
            assert not y.requires_grad
            assert_close(y, with_graph.double())


@pytest.mark.parametrize(
    "sizes", some({"queries": 1, "channels": 16, "value_channels": 16}, {"queries": 8}, few=1), ids=str
)
@on_backends
def test_backward_twice_and_bit_identical(backend: str, sizes: dict[str, int]) -> None:
    """The same bits from run to run, and from one graph used twice; positions for several programs."""
    clip = (2, 4, 5) if INTERPRETED else (4, 17, 18)
    case = RelationalCase(clip=clip, eps=1e-2, seed=33, **sizes)
    values, grad_output = inputs(case)
    runs = [results(case, backend) for _ in range(2 if INTERPRETED else 4)]
    with dt.backend(backend):
        leaves = {name: leaf(t) for name, t in values.items()}
        y = case.function(dt.ops)(**leaves)
        kept = [torch.autograd.grad(y, list(leaves.values()), grad_output, retain_graph=True) for _ in range(2)]
    for run in runs[1:]:
        for name, t in run.items():
            assert_identical(t, runs[0][name], name)
    for grads in kept:
        for name, grad in zip(leaves, grads, strict=True):
            assert_identical(grad, runs[0][f"grad_{name}"], name)


@pytest.mark.parametrize("name", NAMES)
@on_backends
def test_input_changed_before_backward(backend: str, name: str) -> None:
    """The gradient is that of the values of the forward, or it is refused."""
    case = RelationalCase(clip=(1, 2, 2), seed=34)
    values, grad_output = inputs(case)
    values = {name: t.requires_grad_() for name, t in values.items()}
    expected = reference_results(case)
    with dt.backend(backend):
        y = case.function(dt.ops)(**values)
        with torch.no_grad():
            values[name].add_(1)
        try:
            grads = torch.autograd.grad(y, list(values.values()), grad_output)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            return
    for own, grad in zip(values, grads, strict=True):
        assert_close(grad, expected[f"grad_{own}"], own)


@pytest.mark.kernels
@pytest.mark.parametrize("context", ["V", "V+R"])
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_little_is_saved_for_backward(eps: float | None, context: str) -> None:
    """The inputs, and at most two tensors of the size of q."""
    size, clip = 8, (1, 3, 4)
    case = RelationalCase(
        context=context, clip=clip, queries=2, channels=size, latent=size, value_channels=size, mixed=size, eps=eps
    )
    leaves = {name: leaf(t) for name, t in inputs(case)[0].items()}
    own, kept = {t.untyped_storage().data_ptr() for t in leaves.values()}, {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with dt.backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = case.function(dt.ops)(**leaves)
    assert y.requires_grad
    assert len(kept) <= 2
    assert sum(kept.values()) <= 4 * 2 * leaves["q"].numel()


SMALLEST = RelationalCase(clip=(1, 2, 2), queries=2, channels=2, latent=2, value_channels=3, mixed=2)


@pytest.mark.parametrize("eps", [None, 0.5])
@on_contexts
@on_kernels
@pytest.mark.parametrize("backend", backends("eager", "reference", dtype=torch.float64))
def test_gradcheck(backend: str, kernel: str, context: str, eps: float | None) -> None:
    case = dataclasses.replace(
        SMALLEST, kernel=kernel, context=context, kernel_size=(1, 2, 3), eps=eps, dtype=torch.float64, seed=35
    )
    values = {name: t.requires_grad_() for name, t in inputs(case)[0].items()}
    function = case.function(dt.ops)
    with dt.backend(backend):
        assert torch.autograd.gradcheck(
            lambda *ts: function(**dict(zip(values, ts, strict=True))), tuple(values.values()), atol=1e-7
        )


@pytest.mark.parametrize(("kernel", "context"), [("V+R", "V+R"), ("R", "R"), ("V published", "V")])
@on_eager
def test_double_backward(backend: str, kernel: str, context: str) -> None:
    case = dataclasses.replace(
        SMALLEST, kernel=kernel, context=context, clip=(1, 1, 2), kernel_size=(1, 1, 2), eps=0.5, dtype=torch.float64,
        seed=36,
    )  # fmt: skip
    values = {name: t.requires_grad_() for name, t in inputs(case)[0].items()}
    function = case.function(dt.ops)
    with dt.backend(backend):
        assert torch.autograd.gradgradcheck(
            lambda *ts: function(**dict(zip(values, ts, strict=True))), tuple(values.values()), atol=1e-6
        )


SAYS_EAGER = rf"(?s)(?=.*{OP})(?=.*eager)"


@pytest.mark.kernels
@pytest.mark.parametrize("wanted", [NAMES, ("q",), ("h2",)], ids="+".join)
def test_double_backward_is_refused_by_triton(wanted: tuple[str, ...]) -> None:
    case = RelationalCase(clip=(1, 2, 2))
    values = {name: t.requires_grad_(name in wanted) for name, t in inputs(case)[0].items()}
    leaves = [values[name] for name in wanted]

    def second_derivative() -> None:
        y = case.function(dt.ops)(**values)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with dt.backend("triton"), pytest.raises(RuntimeError, match=SAYS_EAGER):
        second_derivative()


# --- torch's transforms ---------------------------------------------------------------------------------------------


def tangent_case(dtype: torch.dtype) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    case = RelationalCase(clip=(1, 2, 3), batch=2, eps=0.1, dtype=dtype, seed=37)
    values, _ = inputs(case)
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(t.shape, generator=generator, dtype=dtype).to(DEVICE) for t in values.values())
    function = case.function(dt.ops)
    return lambda *ts: function(**dict(zip(values, ts, strict=True))), tuple(values.values()), tangents


@on_eager
def test_forward_mode(backend: str) -> None:
    function, primals, tangents = tangent_case(torch.float64)
    step = 1e-6
    with dt.backend(backend):
        ahead, behind = (
            function(*(p + sign * step * t for p, t in zip(primals, tangents, strict=True))) for sign in (1, -1)
        )
        expected = (ahead - behind) / (2 * step)
        y, derivative = torch.func.jvp(function, primals, tangents)
        assert_close(y, function(*primals))
        assert_close(derivative, expected, tolerance=1e-7)
        with forward_ad.dual_level():
            dual = function(*map(forward_ad.make_dual, primals, tangents))
            assert_close(forward_ad.unpack_dual(dual).tangent, expected, tolerance=1e-7)


@pytest.mark.kernels
def test_forward_mode_is_refused_by_triton() -> None:
    function, primals, tangents = tangent_case(torch.float32)
    refused = pytest.raises(RuntimeError, match=SAYS_EAGER)
    with dt.backend("triton"):
        with refused:
            torch.func.jvp(function, primals, tangents)
        with forward_ad.dual_level(), refused:
            function(*map(forward_ad.make_dual, primals, tangents))
        for i in (0, 3, len(primals) - 1):  # a tangent of one input only
            with forward_ad.dual_level(), refused:
                function(*[forward_ad.make_dual(p, t) if j == i else p
                           for j, (p, t) in enumerate(zip(primals, tangents, strict=True))])  # fmt: skip


@pytest.mark.kernels
def test_func_grad_is_refused_by_triton() -> None:
    """Or it is right; torch's own words would not say what to do."""
    function, primals, _ = tangent_case(torch.float32)
    with dt.backend("eager"):
        expected = torch.func.grad(lambda q: function(q, *primals[1:]).sum())(primals[0])
    with dt.backend("triton"):
        try:
            actual = torch.func.grad(lambda q: function(q, *primals[1:]).sum())(primals[0])
        except RuntimeError as error:
            assert "eager" in str(error) and OP in str(error), error  # noqa: PT017, PT018
            return
    assert_close(actual, expected.double())


@on_eager
def test_func_transforms(backend: str) -> None:
    """grad is autograd's, and vmap of op and of grad are calls one by one."""
    function, primals, tangents = tangent_case(torch.float64)
    every = tuple(range(len(primals)))

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda *ts: function(*ts).square().sum(), every)(*tensors)

    with dt.backend(backend):
        leaves = [leaf(p) for p in primals]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for i, (got, want) in enumerate(zip(gradients(*primals), expected, strict=True)):
            assert_close(got, want, f"gradient {i}")
        batched = [torch.stack(pair) for pair in zip(primals, tangents, strict=True)]
        y = torch.func.vmap(function)(*batched)
        assert_close(y, torch.stack([function(*primals), function(*tangents)]))
        both = torch.func.vmap(gradients)(*batched)
        for i, (got, *want) in enumerate(zip(both, gradients(*primals), gradients(*tangents), strict=True)):
            assert_close(got, torch.stack(want), f"gradient {i} of a batch")


@pytest.mark.parametrize(("kernel", "context"), [("V+R", "V+R"), ("V published", "V")])
@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_compile_without_graph_breaks(backend: str, kernel: str, context: str) -> None:
    torch._dynamo.reset()
    case = RelationalCase(kernel, context, clip=(1, 2, 3), batch=2, eps=1e-2, seed=38)
    function = case.function(dt.ops)
    compiled = torch.compile(lambda **ts: function(**ts) * 2, backend="aot_eager", fullgraph=True)
    with dt.backend(backend):
        for batch, clip in ((2, (1, 2, 3)), (3, (2, 2, 2))):  # sizes become dynamic
            own = dataclasses.replace(case, batch=batch, clip=clip)
            values, grad_output = inputs(own)
            actual = value_and_gradients(compiled, {name: leaf(t) for name, t in values.items()}, grad_output / 2)
            expected = reference_results(own)
            expected["out"] = 2 * expected["out"]
            assert_all_close(actual, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("low", HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("kernel", "context"), [("V+R", "V+R"), ("V", "V")])
@on_backends
def test_autocast(backend: str, kernel: str, context: str, low: torch.dtype) -> None:
    """Every tensor is cast to autocast's dtype, and each gradient arrives in the dtype of its input."""
    case = RelationalCase(kernel, context, clip=(1, 2, 3), eps=1e-2, seed=39)
    values, grad_output = inputs(case)
    lowered = {name: t.to(low) for name, t in values.items()}
    expected = results(case, backend, lowered, grad_output.to(low))
    with dt.backend(backend):
        leaves = {name: leaf(t) for name, t in values.items()}
        with torch.autocast(DEVICE.type, dtype=low):
            y = case.function(dt.ops)(**leaves)
            with torch.autocast(DEVICE.type, enabled=False):
                assert case.function(dt.ops)(**values).dtype == torch.float32
        grads = torch.autograd.grad(y, list(leaves.values()), grad_output.to(low))
    assert_identical(y, expected["out"])
    for (name, t), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == t.dtype == torch.float32
        assert_identical(grad, expected[f"grad_{name}"].float(), name)


@on_backends
def test_autocast_of_mixed_dtypes(backend: str) -> None:
    """What a convolution under autocast gives, beside weights in float32: as in every layer."""
    case = RelationalCase(clip=(1, 2, 3), eps=1e-2, seed=40)
    values, grad_output = inputs(case)
    mixed = {name: leaf(t.bfloat16() if name in "qkv" else t) for name, t in values.items()}
    lowered = {name: t.bfloat16() for name, t in values.items()}
    expected = results(case, backend, lowered, grad_output.bfloat16())
    with dt.backend(backend):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            y = case.function(dt.ops)(**mixed)
        grads = torch.autograd.grad(y, list(mixed.values()), grad_output.bfloat16())
    assert_identical(y, expected["out"])
    for (name, t), grad in zip(mixed.items(), grads, strict=True):
        assert_identical(grad, expected[f"grad_{name}"].to(t.dtype), name)


@on_backends
def test_autocast_leaves_float64_alone(backend: str) -> None:
    if precise(backend) == torch.float64:
        case = RelationalCase(clip=(1, 2, 2), dtype=torch.float64, seed=41)
        values, _ = inputs(case)
        plain = call_op(backend, values)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert_identical(call_op(backend, values), plain)


@pytest.mark.parametrize("backend", [p for p in backends() if p.values[0] != "reference"])
def test_agrees_with_reference_in_its_own_dtype(backend: str) -> None:
    case = RelationalCase(seed=42)
    values, _ = inputs(case)
    direct = case.function(dt.reference)(**values)
    assert direct.dtype == torch.float32
    assert_identical(call_op("reference", values), direct)
    assert_close(call_op(backend, values), direct.double())


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case",
    [
        RelationalCase(kernel_size=(1, 1, 3), clip=(1, 1, 2), eps=1e-6),
        RelationalCase("V published", "V", (1, 1, 1), (1, 1, 2), dtype=torch.bfloat16),
        RelationalCase("R", "R", (1, 1, 2), (1, 1, 2), layouts={"q": "channels_last_3d", "h1": "expanded"}),
    ],
    ids=["both", "basic", "relational"],
)
def test_opcheck(case: RelationalCase) -> None:
    """Each custom op that runs inside, forward and backward."""
    with dt.backend("triton"):
        check_call(dt.ops.relational_attention, dt.reference.relational_attention, case.call(), repeat=False)


# --- the kit's part -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="draws what the other tests draw")
def test_public_strategy() -> None:
    """As docs/testing.md has it."""
    calls = strategies.relational_calls(dtypes=(torch.float32, torch.bfloat16))
    check_op(dt.ops.relational_attention, dt.reference.relational_attention, calls, examples=15)


@pytest.mark.skipif(INTERPRETED, reason="draws fewer sizes where kernels are interpreted")
def test_what_is_drawn() -> None:
    """Every kernel, context, layout and dtype, even windows and ones larger than the clip, and empty batches."""
    seen: list[RelationalCase] = []

    @settings(900)
    @given(case=relational_cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
    def draw(case: RelationalCase) -> None:
        seen.append(case)
        call = case.call()
        assert isinstance(call, Call)
        assert {name: tuple(spec.shape) for name, spec in call.tensors.items()} == case.shapes()

    draw()
    assert {(c.kernel, c.context) for c in seen} == set(itertools.product(RELATIONAL_KERNELS, RELATIONAL_CONTEXTS))
    assert {layout for c in seen for layout in c.layouts.values()} == {c.grad_layout for c in seen} == set(LAYOUTS)
    assert {c.dtype for c in seen} == {torch.float32, torch.bfloat16, torch.float16}
    assert {c.queries for c in seen} == set(range(1, 17))
    assert {c.eps for c in seen} == {None, 1e-6, 1e-2, 1.0}
    sizes = {n for c in seen for n in (c.channels, c.latent, c.value_channels, c.mixed)}
    assert sizes == {4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128}
    assert any(c.batch == 0 for c in seen)
    assert any(c.zeros and c.scale < 1 for c in seen)
    pairs = [pair for c in seen for pair in zip(c.kernel_size, c.clip, strict=True)]
    assert any(k % 2 == 0 for k, _ in pairs)
    assert any(k == 1 for k, _ in pairs)
    assert any(k >= 2 * n for k, n in pairs)


@pytest.mark.parametrize("zeros", [False, True])
def test_results_are_of_order_one(zeros: bool) -> None:
    """However many channels and taps there are: 16 bits neither overflow nor vanish."""
    for kernel, context in itertools.product(RELATIONAL_KERNELS, RELATIONAL_CONTEXTS):
        for channels, size, eps in ((4, (1, 1, 1), None), (64, (3, 5, 5), None), (64, (3, 5, 5), 1e-6)):
            case = RelationalCase(
                kernel, context, size, (3, 5, 5), 1, 2, channels, channels, channels, channels, eps, zeros=zeros
            )
            y = dt.reference.relational_attention(**{"k": None, **inputs(case)[0]}, eps=eps)
            assert 0.03 < y.square().mean().sqrt() < 30, (kernel, context, channels, size, eps)


def test_zeros_of_the_spec() -> None:
    values = RelationalSpec((2, 3, 16, 4, 5, 6), seed=1, scale=1e-3, zeros=True).values()
    empty = values.eq(0).all(2)
    assert 0.15 < empty.float().mean() < 0.35
    assert values.ne(0).all(2).eq(~empty).all()
    assert values[~empty.unsqueeze(2).expand_as(values)].std().item() == pytest.approx(1e-3, rel=0.1)
    plain = RelationalSpec((2, 3), torch.float16, "sliced", 5).values()
    assert_identical(plain, TensorSpec((2, 3), torch.float16, "sliced", 5).values())
