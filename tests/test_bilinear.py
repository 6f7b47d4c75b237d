"""The bilinear transform on every backend that can run, against the reference, literal loops and explicit Kronecker
products."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
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
    MATRIX_KINDS,
    BilinearCase,
    assert_all_close,
    assert_close,
    assert_identical,
    backends,
    backends_and_dtypes,
    bilinear_cases,
    in_full,
    poisoned_outputs,
    settings,
    value_and_gradients,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton._core.dispatch import can_run
from dyreg_triton.ops.launch import Launch, watched
from dyreg_triton.testing import BilinearSpec, Call, TensorSpec, check_call, check_op, strategies

OP = "bilinear_transform"
HALVES = (torch.float16, torch.bfloat16)
NAMES = ("x", "p", "q", "t")
on_backends = pytest.mark.parametrize("backend", backends())
on_eager = pytest.mark.parametrize("backend", backends("eager"))
on_temporal = pytest.mark.parametrize("temporal", [None, (2, 2)], ids=["space", "space and time"])


def short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def some(*values: Any, few: int) -> list[Any]:
    """All of `values`, or where kernels are interpreted the first `few`: each program takes milliseconds there."""
    return list(values[:few] if INTERPRETED else values)


def channels_last(t: Tensor) -> bool:
    """Whether `t` is in channels_last_3d, and not contiguous as well."""
    return t.is_contiguous(memory_format=torch.channels_last_3d) and not t.is_contiguous()


def assert_memory(y: Tensor, x: Tensor) -> None:
    """y is contiguous, or channels_last_3d where x is."""
    if channels_last(x):
        assert y.is_contiguous(memory_format=torch.channels_last_3d), y.stride()
    else:
        assert y.is_contiguous(), y.stride()


def loose(backend: str, dtype: torch.dtype) -> dict[str, float]:
    """The interpreter stores bfloat16 by rounding towards zero."""
    return {"tolerance": 3e-2} if INTERPRETED and backend == "triton" and dtype == torch.bfloat16 else {}


def check(case: BilinearCase, backend: str, **options: Any) -> None:
    """Output and every gradient against the float64 reference, in poisoned memory; the second run gives the same."""

    def op(**arguments: Any) -> Tensor:
        y = dt.ops.bilinear_transform(**arguments)
        if backend != "reference":
            assert_memory(y, arguments["x"])
        return y

    with dt.backend(backend):
        check_call(
            op, dt.reference.bilinear_transform, case.call(), repeat=not INTERPRETED, opcheck=False,
            **(loose(backend, case.dtype) | options),
        )  # fmt: skip


def precise(backend: str) -> torch.dtype:
    """The widest dtype that this backend takes here."""
    return torch.float64 if can_run(backend, device=DEVICE, dtype=torch.float64) else torch.float32


def inputs(case: BilinearCase, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors by name, and the incoming gradient, on the device of the tests."""
    values = {name: t.to(DEVICE, dtype or t.dtype) for name, t in case.values().items()}
    grad_output = values.pop("grad_output")
    return values, grad_output


def results(
    case: BilinearCase, backend: str, values: dict[str, Tensor] | None = None, grad_output: Tensor | None = None
) -> dict[str, Tensor | None]:
    """Output and gradients of the op."""
    own, own_grad = inputs(case)
    leaves = {name: leaf(t) for name, t in (own if values is None else values).items()}
    with dt.backend(backend):
        return value_and_gradients(case.function(dt.ops), leaves, own_grad if grad_output is None else grad_output)


def exact(
    values: dict[str, Tensor], grad_output: Tensor, function: Callable[..., Tensor] = dt.reference.bilinear_transform
) -> dict[str, Tensor | None]:
    """Output and gradients in float64."""
    return value_and_gradients(function, {name: leaf(t.double()) for name, t in values.items()}, grad_output.double())


def reference_results(case: BilinearCase) -> dict[str, Tensor | None]:
    return exact(*inputs(case))


def call_op(backend: str, values: dict[str, Tensor], **changed: Tensor) -> Tensor:
    with dt.backend(backend):
        return dt.ops.bilinear_transform(**{**values, **changed})


# --- against the reference ------------------------------------------------------------------------------------------


def hypothesis_test(dtypes: tuple[torch.dtype, ...], examples: int) -> Callable[..., None]:
    """A test over random cases. `backend` comes from the caller's mark.

    On a GPU each is compiled, so there are fewer, unless FULL=1.
    """
    compiles = DEVICE.type == "cuda" and os.environ.get("FULL", "0") != "1"

    @settings(examples // 4 if INTERPRETED else examples // 4 if compiles else examples)
    @given(case=bilinear_cases(dtypes=dtypes))
    @example(case=BilinearCase((3, 2), (3, 6), (4, 3), 6, 1, 4, 2, dtype=dtypes[0], layouts={"x": "sliced"}, seed=5))
    def test(backend: str, case: BilinearCase) -> None:
        check(case, backend)

    return test


test_float32 = on_backends(hypothesis_test((torch.float32,), 200))
test_halves = on_backends(hypothesis_test(HALVES, 120))
test_float64 = pytest.mark.parametrize("backend", backends(dtype=torch.float64))(hypothesis_test((torch.float64,), 40))


@pytest.mark.parametrize("matrices", [None, torch.float32], ids=["one dtype", "float32 matrices"])
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(*HALVES, torch.float32, torch.float64))
@on_temporal
def test_dtypes(temporal: tuple[int, int] | None, backend: str, dtype: torch.dtype, matrices: torch.dtype | None):
    check(BilinearCase(temporal=temporal, kind="weights", dtype=dtype, matrices_dtype=matrices, seed=4), backend)


# --- sizes ----------------------------------------------------------------------------------------------------------

SIDES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33]


@pytest.mark.parametrize("cells", some(*((n, 18 - n if n < 18 else n - 15) for n in SIDES), few=9), ids=str)
@on_backends
def test_cells(backend: str, cells: tuple[int, int]) -> None:
    """At the edges of blocks, and one cell for each row and column."""
    check(BilinearCase(cells, cells, None, 1 if INTERPRETED else 2, 1, 3, 3, seed=6), backend)


@pytest.mark.parametrize("times", [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2), (5, 7)], ids=str)
@on_temporal
@on_backends
def test_multiples(backend: str, temporal: tuple[int, int] | None, times: tuple[int, int]) -> None:
    case = BilinearCase((3, 2), (3 * times[0], 2 * times[1]), temporal, 2, 1, 2, 1, seed=7)
    check(case, backend)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("steps", some(1, 2, 3, 5, 4, 7, 8, 9, 16, 17, few=4))
@on_backends
def test_steps(backend: str, steps: int, times: int) -> None:
    check(BilinearCase((2, 1), (2, 2), (1, steps), steps * times, 1, 2, 1, seed=8), backend)


GROUPS = [(6, g, gt) for g in (1, 2, 3, 6) for gt in (1, 2, 3, 6)] + [(1, 1, 1), (17, 1, 17), (17, 17, 1), (15, 3, 5)]


@pytest.mark.parametrize(
    ("channels", "groups", "temporal"), GROUPS + ([] if INTERPRETED else [(64, 4, 1), (65, 5, 13), (128, 1, 4)])
)
@on_backends
def test_groups(backend: str, channels: int, groups: int, temporal: int) -> None:
    """Of channels, in any combination: those of t need not nest in those of p and q, nor the other way round."""
    check(BilinearCase((2, 1), (2, 2), (temporal, 2), 2, 1, channels, groups, seed=9), backend)


@pytest.mark.parametrize("temporal", [None, (1, 1), (2, 5)], ids=str)
@on_backends
def test_everything_of_size_one(backend: str, temporal: tuple[int, int] | None) -> None:
    frames = 1 if temporal is None else temporal[1]
    check(BilinearCase((1, 1), (1, 1), temporal, frames, 1, 2, 2, seed=10), backend)


# Channels, side and frames where the network of the paper has its transform, and the same at a side of 15
STAGES = [(256, 28, 8, 7), (512, 14, 8, 7), (256, 15, 4, 8), (64, 56, 16, 7)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU, and kernels that are not interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(("channels", "side", "frames", "cells"), STAGES)
@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_stages_of_the_network(
    backend: str, channels: int, side: int, frames: int, cells: int, dtype: torch.dtype
) -> None:
    side = -(-side // cells) * cells
    check(
        BilinearCase((cells, cells), (side, side), (1, 4), frames, 2, channels, 4, "weights", dtype, seed=11), backend
    )


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU, and kernels that are not interpreted")
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_many_programs(backend: str, batch: int) -> None:
    """As many as a GPU runs at once, and more."""
    check(BilinearCase((13, 8), (26, 32), (3, 5), 20, batch, 96, 8, seed=12), backend)


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["all", *some("x", "matrices", "gradient", few=1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@on_backends
def test_every_layout(backend: str, layout: str, which: str) -> None:
    chosen = {"all": NAMES, "x": ("x",), "matrices": NAMES[1:], "gradient": ()}[which]
    case = BilinearCase(layouts=dict.fromkeys(chosen, layout), size=(2, 6), channels=2, seed=13)
    check(dataclasses.replace(case, grad_layout=layout if which in ("all", "gradient") else "contiguous"), backend)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
@on_temporal
def test_memory_of_the_output(temporal: tuple[int, int] | None, backend: str, dtype: torch.dtype) -> None:
    """Contiguous, or channels_last_3d where x is; a gradient in whatever layout changes nothing of it."""
    case = BilinearCase(size=(2, 6), temporal=temporal, dtype=dtype, seed=14)
    values, grad_output = inputs(case)
    plain = call_op(backend, values)
    assert (plain.shape, plain.dtype, plain.device.type) == (case.out_shape(), dtype, DEVICE.type)
    if backend == "reference":
        return
    assert plain.is_contiguous()
    x = values["x"].contiguous(memory_format=torch.channels_last_3d)
    last = call_op(backend, values, x=x)
    assert channels_last(x)
    assert channels_last(last)
    assert_close(last, plain.double(), **loose(backend, dtype))
    for odd in (x[..., ::2], values["x"].mT.contiguous().mT, values["x"][:1].expand_as(x)):
        assert call_op(backend, values, x=odd).is_contiguous()
    found = results(case, backend, {**values, "x": x}, grad_output.mT.contiguous().mT)
    assert_all_close(found, exact(values, grad_output), tolerance=loose(backend, dtype).get("tolerance"))


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last_3d": lambda t: t.contiguous(memory_format=torch.channels_last_3d),
    "columns before rows": lambda t: t.mT.contiguous().mT,
    "frames outermost": lambda t: t.movedim(2, 0).contiguous().movedim(0, 2),
    "frames before channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "a window": lambda t: F.pad(t, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "one frame for all": lambda t: t[:, :, :1].expand_as(t),
    "one row for all": lambda t: t[..., :1, :].expand_as(t),
    "one channel for all": lambda t: t[:, :1].expand_as(t),
    "one number for all": lambda t: t[:1, :1, :1, :1, :1].expand_as(t),
}
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "a part": lambda t: F.pad(t, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "one group for all": lambda t: t[:, :1].expand_as(t),
    "one clip for all": lambda t: t[:1].expand_as(t),
    "one row for all": lambda t: t[..., :1, :].expand_as(t),
    "one column for all": lambda t: t[..., :1].expand_as(t),
    "groups innermost": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("change", [*FEATURES, *MATRICES])
@on_backends
def test_layouts_that_come_of_use(backend: str, change: str) -> None:
    """Of x and of the incoming gradient, or of the matrices; none of them is written."""
    case = BilinearCase(size=(2, 6), seed=15)
    values, grad_output = inputs(case)
    made = FEATURES.get(change) or MATRICES[change]
    given = {name: made(t) if (name == "x") == (change in FEATURES) else t for name, t in values.items()}
    grad_output = made(grad_output) if change in FEATURES else grad_output
    kept = {name: t.clone() for name, t in {**given, "grad": grad_output}.items()}
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    with dt.backend(backend):
        actual = value_and_gradients(case.function(dt.ops), leaves, grad_output)
    assert_all_close(actual, exact(given, grad_output))
    for name, t in {**given, "grad": grad_output}.items():
        assert_identical(t, kept[name], name)


@on_backends
def test_constant_incoming_gradient(backend: str) -> None:
    """As y.sum() gives: stride 0 in every dimension."""
    values, _ = inputs(BilinearCase(seed=16))
    leaves = {name: leaf(t) for name, t in values.items()}
    y = call_op(backend, leaves)
    y.sum().backward()
    expected = exact(values, torch.ones_like(y))
    assert_all_close({"out": y, **{f"grad_{name}": t.grad for name, t in leaves.items()}}, expected)


@on_backends
def test_matrices_from_one_projection(backend: str) -> None:
    """p and q are views of one tensor, and p serves as q too: gradients add up."""
    case = BilinearCase((3, 3), (6, 3), None, 2, 2, 4, 2, seed=17)
    values, grad_output = inputs(case)
    both = torch.cat([values["p"], values["q"]], -1)

    def split(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, both: op(x, *both.split(3, -1)) + op(x, both[..., 3:], both[..., 3:].mT)

    leaves = {"x": leaf(values["x"]), "both": leaf(both)}
    with dt.backend(backend):
        actual = value_and_gradients(split(dt.ops.bilinear_transform), leaves, grad_output)
    expected = exact({"x": values["x"], "both": both}, grad_output, split(dt.reference.bilinear_transform))
    assert_all_close(actual, expected)


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="takes virtual memory, which a GPU does not have")
@pytest.mark.parametrize("axis", range(5))
def test_strides_beyond_int32(axis: int) -> None:
    """In a process of its own: what goes wrong here is a segmentation fault."""
    code = f"""
import torch, dyreg_triton as dt
strides = [1, 2, 4, 8, 16]
strides[{axis}] = 2**31
x = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 2, 2, 2, 2), strides)
x.copy_(torch.arange(32).view(x.shape))
p, q, t = torch.tensor([[0.0, 1], [2, -1]]), torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([[1.0, -1], [1, 0]])
arguments = p.expand(2, 1, 2, 2, 2), q.expand(2, 1, 2, 2, 2), t.expand(2, 1, 2, 2)
found = []
for backend in ("triton", "eager"):
    leaves = [m.detach().clone().requires_grad_() for m in arguments]
    with dt.backend(backend):
        y = dt.ops.bilinear_transform(x if backend == "triton" else x.contiguous(), *leaves)
        found.append([y, *torch.autograd.grad(y, leaves, x if backend == "triton" else x.contiguous())])
for a, b in zip(*found):
    assert torch.allclose(a, b, rtol=2e-2), (a, b)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# --- the definition, in loops ---------------------------------------------------------------------------------------


def literal(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None = None) -> Tensor:
    """One element of y after the other; what has no weight is not touched."""
    channels, frames, height, width = x.shape[1:]
    elements: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for name, tensor in (("x", x), ("p", p), ("q", q), *((("t", t),) if t is not None else ())):
        index = itertools.product(*map(range, tensor.shape))
        elements[name] = dict(zip(index, tensor.flatten().unbind(), strict=True))
    a, b = height // p.shape[-1], width // q.shape[-1]

    def g(c: int) -> int:
        return c // (channels // p.shape[1])

    z: dict[tuple[int, ...], Tensor] = {}
    for n, c, f, h, w in itertools.product(*map(range, x.shape)):
        terms = []
        for j, k in itertools.product(range(p.shape[-1]), range(q.shape[-1])):
            row = elements["p"][n, g(c), f, h // a, j]
            column = elements["q"][n, g(c), f, k, w // b]
            terms.append(row * elements["x"][n, c, f, j * a + h % a, k * b + w % b] * column)
        z[n, c, f, h, w] = torch.stack(terms).sum()
    y = []
    for n, c, f, h, w in itertools.product(*map(range, x.shape)):
        if t is None:
            y.append(z[n, c, f, h, w])
            continue
        d = frames // t.shape[-1]
        terms = [
            elements["t"][n, c // (channels // t.shape[1]), f // d, m] * z[n, c, m * d + f % d, h, w]
            for m in range(t.shape[-1])
        ]
        y.append(torch.stack(terms).sum())
    return torch.stack(y).view(x.shape)


def with_kronecker(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None = None) -> Tensor:
    """The equations with every block matrix built."""
    batch, channels, frames, height, width = x.shape

    def blocks(m: Tensor, side: int) -> Tensor:
        return torch.kron(m, torch.eye(side // m.shape[-1], dtype=m.dtype, device=m.device))

    clips = []
    for n in range(batch):
        maps = []
        for c in range(channels):
            g = c // (channels // p.shape[1])
            frame = [blocks(p[n, g, f], height) @ x[n, c, f] @ blocks(q[n, g, f], width) for f in range(frames)]
            z = torch.stack(frame)
            if t is not None:
                z = (blocks(t[n, c // (channels // t.shape[1])], frames) @ z.flatten(1)).view(z.shape)
            maps.append(z)
        clips.append(torch.stack(maps))
    return torch.stack(clips)


HAND = [
    BilinearCase((2, 3), (4, 6), (2, 2), 4, 1, 4, 2, seed=18),
    BilinearCase((3, 1), (3, 2), None, 2, 2, 3, 3, seed=19),
    *some(
        BilinearCase((2, 2), (2, 6), (1, 3), 6, 1, 2, 2, seed=20),
        BilinearCase((1, 3), (2, 3), (3, 1), 2, 1, 6, 2, seed=21),
        BilinearCase((4, 2), (4, 2), (2, 2), 2, 1, 2, 1, kind="weights", seed=22),
        few=1,
    ),
]


@pytest.mark.parametrize("case", HAND, ids=lambda case: str(case.seed))
@pytest.mark.parametrize("function", [literal, with_kronecker], ids=["loops", "kron"])
@on_backends
def test_by_hand(backend: str, function: Callable[..., Tensor], case: BilinearCase) -> None:
    values, grad_output = inputs(case)
    expected = exact({name: t.cpu() for name, t in values.items()}, grad_output.cpu(), function)
    assert_all_close(results(case, backend), expected)


@pytest.mark.parametrize("case", HAND, ids=lambda case: str(case.seed))
@pytest.mark.parametrize("function", [literal, with_kronecker], ids=["loops", "kron"])
def test_reference_by_hand_in_float64(function: Callable[..., Tensor], case: BilinearCase) -> None:
    values, grad_output = inputs(case, torch.float64)
    values = {name: t.cpu() for name, t in values.items()}
    grad_output = grad_output.cpu()
    assert_all_close(exact(values, grad_output), exact(values, grad_output, function), tolerance=1e-13)


@on_backends
def test_directions(backend: str) -> None:
    """The only weight of P moves row 1 to row 0, that of Q column 0 to column 1, that of T frame 1 to frame 0."""
    x = torch.arange(1.0, 9.0).view(1, 1, 2, 2, 2).to(DEVICE)
    eye = torch.eye(2, device=DEVICE).expand(1, 1, 2, 2, 2)
    up = torch.tensor([[0.0, 1.0], [0.0, 0.0]], device=DEVICE)
    zero = torch.zeros_like(x)
    with dt.backend(backend):
        rows = dt.ops.bilinear_transform(x, up.expand_as(eye), eye)
        columns = dt.ops.bilinear_transform(x, eye, up.expand_as(eye))
        frames = dt.ops.bilinear_transform(x, eye, eye, up.expand(1, 1, 2, 2))
    expected = zero.clone()
    expected[..., 0, :] = x[..., 1, :]
    assert_identical(rows, expected, "rows")
    expected = zero.clone()
    expected[..., 1] = x[..., 0]
    assert_identical(columns, expected, "columns")
    expected = zero.clone()
    expected[:, :, 0] = x[:, :, 1]
    assert_identical(frames, expected, "frames")


@pytest.mark.parametrize(
    ("c", "f", "h", "w"), [(0, 0, 0, 0), (3, 5, 5, 3), (1, 2, 3, 1), (2, 1, 4, 2), (4, 3, 2, 3), (5, 4, 1, 0)]
)
@on_backends
def test_axes_are_not_mixed_up(backend: str, c: int, f: int, h: int, w: int) -> None:
    """One element of x is 1 and the weights are all different: y has their products where they move it to.

    Sh = 3 and a = 2, Sw = 2 and b = 2, Ts = 3 and d = 2, G = 2 and Gt = 3.
    """
    x = torch.zeros(1, 6, 6, 6, 4)
    x[0, c, f, h, w] = 1
    p = torch.arange(1.0, 1 + 2 * 6 * 9).view(1, 2, 6, 3, 3)
    q = torch.arange(1.0, 1 + 2 * 6 * 4).view(1, 2, 6, 2, 2)
    t = torch.arange(1.0, 1 + 3 * 9).view(1, 3, 3, 3)
    space, time = torch.zeros_like(x).double(), torch.zeros_like(x).double()
    for i, k in itertools.product(range(3), range(2)):
        weight = p[0, c // 3, f, i, h // 2] * q[0, c // 3, f, w // 2, k]
        space[0, c, f, i * 2 + h % 2, k * 2 + w % 2] = weight
        for m in range(3):
            time[0, c, m * 2 + f % 2, i * 2 + h % 2, k * 2 + w % 2] = weight * t[0, c // 2, m, f // 2]
    x, p, q, t = (tensor.to(DEVICE) for tensor in (x, p, q, t))
    with dt.backend(backend):
        assert_close(dt.ops.bilinear_transform(x, p, q), space, "without t")
        assert_close(dt.ops.bilinear_transform(x, p, q, t), time, "with t")
        assert_close(dt.ops.bilinear_transform(x, p, q, t=t), time, "with t by name")


# --- symmetries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@on_backends
def test_linear_in_each(backend: str, name: str) -> None:
    values, _ = inputs(BilinearCase(seed=23))
    one, other = values[name], torch.randn_like(values[name])
    y = call_op(backend, values, **{name: 2 * one - 3 * other})
    expected = 2 * call_op(backend, values).double() - 3 * call_op(backend, values, **{name: other}).double()
    assert_close(y, expected)


def matrix(m: Tensor, like: Tensor) -> Tensor:
    return m.to(like).expand_as(like)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
@on_temporal
def test_identity_matrices_give_x(temporal: tuple[int, int] | None, backend: str, dtype: torch.dtype) -> None:
    """To the bit, and the gradient of x is the incoming one."""
    case = BilinearCase((3, 5), (6, 5), temporal, channels=2, dtype=dtype, seed=24)
    values, grad_output = inputs(case)
    same = {name: t if name == "x" else matrix(torch.eye(t.shape[-1]), t) for name, t in values.items()}
    found = results(case, backend, same)
    assert_identical(found["out"], values["x"])
    assert_identical(found["grad_x"], grad_output)


@on_backends
def test_permutation_matrices_permute(backend: str) -> None:
    """Whole blocks of rows, columns and frames, as indexing does."""
    case = BilinearCase((4, 5), (8, 15), (1, 3), 6, channels=2, groups=1, seed=25)
    values, _ = inputs(case)
    orders = {"p": [2, 0, 3, 1], "q": [4, 2, 0, 1, 3], "t": [1, 2, 0]}
    eyes = {name: torch.eye(len(order)) for name, order in orders.items()}
    moved = {
        "p": matrix(eyes["p"][orders["p"]], values["p"]),
        "q": matrix(eyes["q"][:, orders["q"]], values["q"]),
        "t": matrix(eyes["t"][orders["t"]], values["t"]),
    }
    rows = [2 * i + u for i in orders["p"] for u in range(2)]
    columns = [3 * i + u for i in orders["q"] for u in range(3)]
    frames = [2 * i + u for i in orders["t"] for u in range(2)]
    expected = values["x"][..., rows, :][..., columns][:, :, frames]
    assert_identical(call_op(backend, {"x": values["x"], **moved}), expected)


@on_backends
def test_no_t_is_an_identity_t(backend: str) -> None:
    """Of any size and number of groups, gradients included."""
    case = BilinearCase(temporal=None, seed=26)
    values, grad_output = inputs(case)
    plain = results(case, backend)
    for groups, steps in ((1, 1), (4, 2), (2, 4)):
        t = torch.eye(steps, device=DEVICE).expand(2, groups, steps, steps)
        found = results(case, backend, {**values, "t": t}, grad_output)
        del found["grad_t"]
        assert_all_close(found, {name: value.double() for name, value in plain.items()})
    with dt.backend(backend):
        assert_identical(dt.ops.bilinear_transform(**values, t=None), plain["out"])


@on_backends
def test_two_transforms_are_one_of_products(backend: str) -> None:
    """P2 (P1 x Q1) Q2 = (P2 P1) x (Q1 Q2): on the left in this order, on the right in the other."""
    values, _ = inputs(BilinearCase(temporal=None, seed=27))
    others, _ = inputs(BilinearCase(temporal=None, seed=28))
    twice = call_op(backend, others, x=call_op(backend, values))
    once = call_op(backend, values, p=others["p"] @ values["p"], q=values["q"] @ others["q"])
    assert_close(twice, once.double())


@on_backends
def test_gradient_is_the_transform_by_transposed_matrices(backend: str) -> None:
    case = BilinearCase(seed=29)
    values, grad_output = inputs(case)
    found = results(case, backend)
    with dt.backend(backend):
        if case.temporal is not None:  # first over time, then in space: they do not commute where P depends on t
            eyes = {name: matrix(torch.eye(values[name].shape[-1]), values[name]) for name in "pq"}
            grad_output = dt.ops.bilinear_transform(grad_output, **eyes, t=values["t"].mT)
        expected = dt.ops.bilinear_transform(grad_output, values["p"].mT, values["q"].mT)
    assert_close(found["grad_x"], expected.double())


@on_temporal
@on_backends
def test_constant_maps_stay_constant(backend: str, temporal: tuple[int, int] | None) -> None:
    """Under rows of P and T and columns of Q that sum to 1."""
    values, _ = inputs(BilinearCase(temporal=temporal, kind="weights", seed=30))
    x = torch.full_like(values["x"], -2.5)
    assert_close(call_op(backend, values, x=x, q=values["q"].mT), x.double())


@pytest.mark.parametrize(
    ("axis", "temporal"),
    [("clips", (2, 2)), ("clips", None), ("groups", (2, 2)), ("groups", None), ("frames", None)],
    ids=str,
)
@on_backends
def test_nothing_sees_another(backend: str, axis: str, temporal: tuple[int, int] | None) -> None:
    """Clips, groups and, without t, frames are computed as if alone, gradients included."""
    case, dim = BilinearCase(temporal=temporal, seed=31), ["clips", "groups", "frames"].index(axis)
    values, grad_output = inputs(case)
    whole = results(case, backend)
    halves = [
        results(case, backend, {name: t.chunk(2, dim)[i] for name, t in values.items()}, grad_output.chunk(2, dim)[i])
        for i in range(2)
    ]
    assert_all_close(whole, {name: torch.cat([half[name] for half in halves], dim).double() for name in whole})


@on_backends
def test_fine_positions_do_not_see_each_other(backend: str) -> None:
    """Rows of one remainder by a, and columns by b, and frames by d, are transformed as if alone."""
    case = BilinearCase((2, 3), (6, 6), (2, 2), 6, channels=2, groups=2, seed=32)
    values, _ = inputs(case)
    for name in ("p", "q"):  # then a call on every third frame has the same matrices
        values[name] = values[name][:, :, :1].expand_as(values[name])
    y = call_op(backend, values)
    for u, v, e in itertools.product(range(3), range(2), some(0, 1, 2, few=1)):
        part = {name: values[name][:, :, e::3] for name in ("p", "q")}
        alone = call_op(backend, {**values, **part, "x": values["x"][:, :, e::3, u::3, v::2]})
        assert_close(y[:, :, e::3, u::3, v::2], alone.double(), f"at {u}, {v}, {e}")


# --- what is not finite ---------------------------------------------------------------------------------------------


NAN_AT = {
    "x": (1, 2, 1, 3, 1), "p": (1, 0, 2, 0, 1), "q": (0, 1, 3, 2, 0), "t": (1, 0, 1, 0), "grad_output": (0, 3, 0, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", NAN_AT)
@on_temporal
@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_a_nan_spoils_what_it_reaches(backend: str, temporal: tuple[int, int] | None, name: str) -> None:
    """And no other map or matrix: not another clip, group or channel, nor a frame that t does not mix it with."""
    case = BilinearCase((2, 3), (4, 3), temporal, seed=33)
    values, grad_output = inputs(case)
    if name == "t" and temporal is None:
        return
    (grad_output if name == "grad_output" else values[name])[NAN_AT[name]] = float("nan")
    expected = exact({n: t.cpu() for n, t in values.items()}, grad_output.cpu(), literal)
    found = results(case, backend, values, grad_output)
    assert any(not t.isfinite().all() for t in expected.values())
    for key, want in expected.items():
        actual, wanted = ~found[key].isfinite().cpu(), ~want.isfinite()
        assert not (wanted & ~actual).any(), f"{key} hides a NaN"
        whole = wanted.any(-1, keepdim=True).any(-2, keepdim=True).expand_as(wanted)
        assert not (actual & ~whole).any(), f"{key} has NaN in {(actual & ~whole).any(-1).any(-1).nonzero().tolist()}"


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@on_backends
def test_infinity_stays_in_its_map(backend: str, value: float) -> None:
    values, _ = inputs(BilinearCase(temporal=None, seed=34))
    values["x"][0, 1, 2, 1, 3] = value
    y = call_op(backend, values)
    assert not y[0, 1, 2].isfinite().all()
    y[0, 1, 2] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("scales", [(1e-4, 1e4), (1e4, 1e-4)], ids=str)
@pytest.mark.parametrize("matrices", [torch.float16, torch.float32], ids=short)
@on_temporal
@on_backends
def test_float16_of_extreme_scales(
    backend: str, temporal: tuple[int, int] | None, matrices: torch.dtype, scales: tuple[float, float]
) -> None:
    """P and Q of very different sizes make a result of order one; half way there float16 over- or underflows."""
    case = BilinearCase(
        (2, 3), (2, 3), temporal, channels=2, groups=2, dtype=torch.float16, matrices_dtype=matrices, seed=35
    )
    values, grad_output = inputs(case)
    values["x"] = values["x"] * 8
    values["p"], values["q"] = values["p"] * scales[0], values["q"] * scales[1]
    grad_output = grad_output / 32  # so that the gradient of the smaller matrix stays within float16
    expected = exact(values, grad_output)
    assert all(t.abs().max() < 6e4 for t in expected.values())
    assert_all_close(results(case, backend, values, grad_output), expected, tolerance=1e-2)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(*HALVES))
def test_sums_are_taken_in_float32(backend: str, dtype: torch.dtype) -> None:
    """1,024 ones: in bfloat16 their sum would stop growing at 256."""
    case = BilinearCase((1, 64), (1, 64), (1, 1), 1, 1, 16, 1, dtype=dtype)
    values = {name: torch.ones_like(t) for name, t in inputs(case)[0].items()}
    values["q"] = values["q"] / 64
    grad_output = torch.ones_like(values["x"])
    found = results(case, backend, values, grad_output)
    assert found["grad_p"].item() == found["grad_t"].item() == 1024
    assert_all_close(found, exact(values, grad_output), tolerance=1e-3)


@on_backends
def test_what_follows_may_have_no_gradient(backend: str) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    values = {name: leaf(t) for name, t in inputs(BilinearCase(seed=37))[0].items()}
    Stop.apply(call_op(backend, values)).backward()
    assert all(t.grad is None or not t.grad.any() for t in values.values())


# --- beyond and below -----------------------------------------------------------------------------------------------

BEYOND = {
    "Sh": BilinearCase((65, 1), (65, 1), None, 1, 1, 1, 1),
    "Sw": BilinearCase((1, 66), (1, 66), None, 1, 1, 1, 1),
    "Ts": BilinearCase((1, 1), (1, 1), (1, 65), 65, 1, 1, 1),
}


@pytest.mark.kernels
@pytest.mark.parametrize("letter", BEYOND)
def test_sizes_beyond_the_kernels(letter: str) -> None:
    """Asked for by name, Triton refuses and says what takes them; "auto" takes eager, and says so."""
    case = BEYOND[letter]
    values, _ = inputs(case)
    size = case.temporal[1] if letter == "Ts" and case.temporal else case.cells[letter == "Sw"]
    named, limit = rf"{letter} = {size}", tuning.BILINEAR_LIMIT[letter]
    said = rf"(?s)(?=.*{OP})(?=.*{named})(?=.*accepted)(?=.*\b{limit}\b)(?=.*eager)"
    with dt.backend("triton"), pytest.raises(ValueError, match=said + r".*call: x \("):
        case.function(dt.ops)(**values)
    with dt.backend("auto"), pytest.warns(UserWarning, match=said):
        y = case.function(dt.ops)(**values)
    with dt.backend("eager"):
        assert_identical(y, case.function(dt.ops)(**values))
    compiled = torch.compile(case.function(dt.ops), backend="aot_eager", fullgraph=True)
    with dt.backend("auto"), pytest.warns(UserWarning, match=said):
        compiled(**values)
    torch._dynamo.reset()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case",
    [
        BilinearCase((64, 1), (64, 1), None, 1, 1, 1, 1, seed=38),
        BilinearCase((1, 64), (1, 64), None, 1, 1, 1, 1, seed=38),
        BilinearCase((1, 1), (1, 1), (1, 64), 64, 1, 1, 1, seed=38),
        BilinearCase((64, 64), (64, 64), None, 1, 1, 1, 1, seed=38),
        BilinearCase((60, 50), (60, 50), (1, 1), 1, 1, 1, 1, seed=38),
    ],
    ids=["Sh", "Sw", "Ts", "both", "no power of two"],
)
def test_largest_sizes_of_the_kernels(case: BilinearCase) -> None:
    check(case, "triton")


def test_limits_of_the_kernels() -> None:
    assert tuning.BILINEAR_LIMIT == {"Sh": 64, "Sw": 64, "Ts": 64}


@on_eager
@pytest.mark.parametrize("letter", BEYOND)
def test_eager_takes_any_size(backend: str, letter: str) -> None:
    check(BEYOND[letter], backend)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
@on_temporal
def test_empty_batch(temporal: tuple[int, int] | None, backend: str, dtype: torch.dtype) -> None:
    """Nothing in, nothing out; whoever asks for a gradient gets one of its own shape."""
    case = BilinearCase(batch=0, temporal=temporal, dtype=dtype)
    values, grad_output = inputs(case)
    with poisoned_outputs():
        found = results(case, backend, values, grad_output)
    assert found["out"].shape == case.out_shape()
    assert found["out"].dtype == dtype
    for name, t in values.items():
        grad = found[f"grad_{name}"]
        assert grad is not None, name
        assert (grad.shape, grad.dtype) == (t.shape, t.dtype)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [*[c for n in (1, 2) for c in itertools.combinations("pqt", n)]], ids="+".join)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(*HALVES, torch.float64))
def test_each_matrix_has_a_dtype_of_its_own(wide: tuple[str, ...], backend: str, dtype: torch.dtype) -> None:
    """x's or float32, and its gradient has the same."""
    case = BilinearCase(size=(2, 3), frames=2, dtype=dtype, seed=39)
    values, grad_output = inputs(case)
    values = {name: t.float() if name in wide else t for name, t in values.items()}
    found = results(case, backend, values)
    assert found["out"].dtype == dtype
    for name, t in values.items():
        grad = found[f"grad_{name}"]
        assert grad.dtype == t.dtype, name
        assert name not in wide or not grad.equal(grad.to(torch.float16).float()), f"{name}'s gradient was rounded"
        assert name not in wide or not grad.equal(grad.bfloat16().float()), f"{name}'s gradient was rounded"
    tolerance = 1e-5 if dtype == torch.float64 else loose(backend, dtype).get("tolerance", 1e-2)
    assert_all_close(found, exact(values, grad_output), tolerance=tolerance)


@pytest.mark.parametrize("low", HALVES, ids=short)
@on_temporal
@on_backends
def test_autocast(backend: str, temporal: tuple[int, int] | None, low: torch.dtype) -> None:
    """x is cast to autocast's dtype, p, q and t are not, and each gradient arrives in the dtype of its input."""
    case = BilinearCase(temporal=temporal, kind="weights", seed=41)
    values, grad_output = inputs(case)
    expected = results(case, backend, {**values, "x": values["x"].to(low)}, grad_output.to(low))
    lowered = {name: t.to(low) for name, t in values.items()}
    with dt.backend(backend):
        leaves = {name: leaf(t) for name, t in values.items()}
        with torch.autocast(DEVICE.type, dtype=low):
            y = case.function(dt.ops)(**leaves)
            all_low = case.function(dt.ops)(**lowered)
            with torch.autocast(DEVICE.type, enabled=False):
                assert case.function(dt.ops)(**values).dtype == torch.float32
        grads = torch.autograd.grad(y, list(leaves.values()), grad_output.to(low))
        assert_identical(all_low, case.function(dt.ops)(**lowered), "what has autocast's dtype already")
    assert_identical(y, expected["out"])
    for (name, t), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == t.dtype == torch.float32
        assert_identical(grad, expected[f"grad_{name}"].float(), name)


@on_backends
def test_autocast_of_mixed_dtypes(backend: str) -> None:
    """A convolution's output beside matrices of either dtype, as in every layer."""
    case = BilinearCase(kind="weights", seed=42)
    values, grad_output = inputs(case)
    given = {name: t.bfloat16() if name in "xq" else t for name, t in values.items()}
    expected = results(case, backend, given, grad_output.bfloat16())
    with dt.backend(backend), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        leaves = {name: leaf(t) for name, t in given.items()}
        y = case.function(dt.ops)(**leaves)
    assert_identical(y, expected["out"])
    grads = torch.autograd.grad(y, list(leaves.values()), grad_output.bfloat16())
    for (name, t), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == t.dtype
        assert_identical(grad, expected[f"grad_{name}"], name)


@on_backends
def test_autocast_leaves_float64_alone(backend: str) -> None:
    if precise(backend) == torch.float64:
        values, _ = inputs(BilinearCase(dtype=torch.float64, seed=43))
        plain = call_op(backend, values)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert_identical(call_op(backend, values), plain)


@pytest.mark.parametrize("backend", [p for p in backends() if p.values[0] != "reference"])
def test_agrees_with_reference_in_its_own_dtype(backend: str) -> None:
    case = BilinearCase(seed=44)
    values, _ = inputs(case)
    direct = case.function(dt.reference)(**values)
    assert direct.dtype == torch.float32
    assert_identical(call_op("reference", values), direct)
    assert_close(call_op(backend, values), direct.double())


# --- gradients ------------------------------------------------------------------------------------------------------

SUBSETS = [c for n in range(5) for c in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda names: "+".join(names) or "none")
@on_backends
def test_gradients_of_some_inputs_only(backend: str, wanted: tuple[str, ...]) -> None:
    case = BilinearCase(size=(2, 6), batch=1, channels=2, seed=45)
    values, grad_output = inputs(case)
    for name, t in values.items():
        t.requires_grad_(name in wanted)
    y = call_op(backend, values)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(grad_output)
    expected = reference_results(case)
    assert_close(y, expected["out"])
    for name, t in values.items():
        assert_close(t.grad, expected[f"grad_{name}"] if name in wanted else None, f"grad_{name}")


@pytest.mark.parametrize("wanted", [("x",), ("p",), ("q",), ("p", "q"), ("x", "p", "q")], ids="+".join)
@on_backends
def test_gradients_of_some_inputs_only_without_t(backend: str, wanted: tuple[str, ...]) -> None:
    case = BilinearCase(size=(2, 6), temporal=None, batch=1, channels=2, seed=46)
    values, grad_output = inputs(case)
    for name, t in values.items():
        t.requires_grad_(name in wanted)
    call_op(backend, values).backward(grad_output)
    expected = reference_results(case)
    for name, t in values.items():
        assert_close(t.grad, expected[f"grad_{name}"] if name in wanted else None, f"grad_{name}")


@on_temporal
@on_backends
def test_no_graph_under_no_grad(backend: str, temporal: tuple[int, int] | None) -> None:
    values = {name: leaf(t) for name, t in inputs(BilinearCase(temporal=temporal, seed=47))[0].items()}
    with_graph = call_op(backend, values)
    assert with_graph.requires_grad
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            y = call_op(backend, values)
        assert not y.requires_grad
        assert_close(y, with_graph.double())


@on_temporal
@on_backends
def test_backward_twice_and_bit_identical(backend: str, temporal: tuple[int, int] | None) -> None:
    """The same bits from run to run, and from one graph used twice; maps for several programs."""
    size = {"channels": 4} if INTERPRETED else {"size": (34, 39), "cells": (17, 13), "channels": 24, "frames": 8}
    case = BilinearCase(temporal=temporal, seed=48, **size)
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
    case = BilinearCase(size=(2, 3), frames=2, seed=49)
    values, grad_output = inputs(case)
    values = {own: t.requires_grad_() for own, t in values.items()}
    expected = reference_results(case)
    y = call_op(backend, values)
    with torch.no_grad():
        values[name].add_(1)
    try:
        grads = torch.autograd.grad(y, list(values.values()), grad_output)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    for own, grad in zip(values, grads, strict=True):
        assert_close(grad, expected[f"grad_{own}"], own)


def positional(case: BilinearCase) -> Callable[..., Tensor]:
    function, names = case.function(dt.ops), case.input_names()
    return lambda *ts: function(**dict(zip(names, ts, strict=True)))


SMALLEST = BilinearCase((2, 1), (2, 2), (1, 2), 2, 1, 2, 2, dtype=torch.float64, seed=50)
CHECKED = [
    SMALLEST,
    dataclasses.replace(SMALLEST, temporal=None, cells=(1, 3), size=(2, 3), groups=1),
    dataclasses.replace(SMALLEST, temporal=(2, 2), frames=4, groups=1),
    dataclasses.replace(SMALLEST, layouts={"x": "channels_last_3d", "p": "transposed"}),
]


@pytest.mark.parametrize("case", CHECKED, ids=["smallest", "space", "time", "layouts"])
@pytest.mark.parametrize("backend", backends("eager", "reference", dtype=torch.float64))
def test_gradcheck(backend: str, case: BilinearCase) -> None:
    made = {name: t.tensor.detach() for name, t in case.call().inputs(DEVICE).items()}
    values = tuple(t.requires_grad_() for t in made.values())
    with dt.backend(backend):
        assert torch.autograd.gradcheck(positional(case), values, atol=1e-7)


@pytest.mark.parametrize("case", CHECKED[:3], ids=["smallest", "space", "time"])
@pytest.mark.parametrize("backend", backends("eager", "reference", dtype=torch.float64))
def test_double_backward(backend: str, case: BilinearCase) -> None:
    case = dataclasses.replace(case, size=(case.cells[0], case.cells[1]))
    values = tuple(t.requires_grad_() for t in inputs(case)[0].values())
    with dt.backend(backend):
        assert torch.autograd.gradgradcheck(positional(case), values, atol=1e-6)


SAYS_EAGER = rf"(?s)(?=.*{OP})(?=.*eager)"


@pytest.mark.kernels
@pytest.mark.parametrize("wanted", [NAMES, *[(name,) for name in NAMES]], ids="+".join)
def test_double_backward_is_refused_by_triton(wanted: tuple[str, ...]) -> None:
    case = BilinearCase(size=(2, 3), frames=2, batch=1, channels=2, seed=51)
    values = {name: t.requires_grad_(name in wanted) for name, t in inputs(case)[0].items()}
    leaves = [values[name] for name in wanted]

    def second_derivative() -> None:
        y = case.function(dt.ops)(**values)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with dt.backend("triton"), pytest.raises(RuntimeError, match=SAYS_EAGER):
        second_derivative()


# --- torch's transforms ---------------------------------------------------------------------------------------------


def tangent_case(
    dtype: torch.dtype, temporal: tuple[int, int] | None = (2, 2)
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    case = BilinearCase(size=(4, 3), frames=2, temporal=temporal, dtype=dtype, seed=52)
    values, _ = inputs(case)
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(t.shape, generator=generator, dtype=dtype).to(DEVICE) for t in values.values())
    return positional(case), tuple(values.values()), tangents


@pytest.mark.parametrize("backend", backends("eager", "reference", dtype=torch.float64))
@on_temporal
def test_forward_mode(backend: str, temporal: tuple[int, int] | None) -> None:
    function, primals, tangents = tangent_case(torch.float64, temporal)
    step = 1e-5
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
        for i in range(len(primals)):  # a tangent of one input only
            with forward_ad.dual_level(), refused:
                function(*[forward_ad.make_dual(p, t) if j == i else p
                           for j, (p, t) in enumerate(zip(primals, tangents, strict=True))])  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("argument", range(4), ids=NAMES)
def test_func_grad_is_refused_by_triton(argument: int) -> None:
    function, primals, _ = tangent_case(torch.float32)
    with dt.backend("triton"), pytest.raises(RuntimeError, match=SAYS_EAGER):
        torch.func.grad(lambda *ts: function(*ts).sum(), argument)(*primals)


@pytest.mark.parametrize("backend", backends("eager", "reference", dtype=torch.float64))
@on_temporal
def test_func_transforms(backend: str, temporal: tuple[int, int] | None) -> None:
    """grad is autograd's, and vmap of op and of grad are calls one by one."""
    function, primals, tangents = tangent_case(torch.float64, temporal)
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


@pytest.mark.parametrize(
    ("backend", "temporal"),
    [
        *(pytest.param(*p.values, mixed, marks=p.marks) for p in backends("triton") for mixed in (None, (2, 2))),
        ("eager", (2, 2)),
        *in_full([("eager", None)]),
    ],
)
def test_compile_without_graph_breaks(backend: str, temporal: tuple[int, int] | None) -> None:
    torch._dynamo.reset()
    case = BilinearCase(size=(2, 3), temporal=temporal, frames=2, seed=53)
    function = case.function(dt.ops)
    compiled = torch.compile(lambda **ts: function(**ts) * 2, backend="aot_eager", fullgraph=True)
    with dt.backend(backend):
        for batch, frames, size in ((2, 2, (2, 3)), (3, 4, (4, 6))):  # sizes become dynamic
            own = dataclasses.replace(case, batch=batch, frames=frames, size=size)
            values, grad_output = inputs(own)
            actual = value_and_gradients(compiled, {name: leaf(t) for name, t in values.items()}, grad_output / 2)
            expected = reference_results(own)
            expected["out"] = 2 * expected["out"]
            assert_all_close(actual, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [*in_full([None]), True])
@pytest.mark.parametrize(
    ("backend", "temporal"),
    [
        *(pytest.param(*p.values, mixed, marks=p.marks) for p in backends("triton") for mixed in (None, (2, 2))),
        ("eager", None),
        *in_full([("eager", (2, 2))]),  # whose symbols torch reasons about for a minute
    ],
)
def test_compile_for_any_channels_and_groups(
    backend: str, dynamic: bool | None, temporal: tuple[int, int] | None
) -> None:
    """How many runs of channels there are follows from numbers of groups, which are symbols then."""
    torch._dynamo.reset()
    case = BilinearCase(size=(2, 3), frames=2, temporal=temporal, seed=55)
    compiled = torch.compile(case.function(dt.ops), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with dt.backend(backend):
        for channels, groups in ((4, 2), (6, 3), (6, 2), (12, 4)):
            own = dataclasses.replace(case, channels=channels, groups=groups)
            values, _ = inputs(own)
            assert_close(compiled(**values), case.function(dt.reference)(**values), "out")
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_compile_in_channels_last(backend: str) -> None:
    torch._dynamo.reset()
    case = BilinearCase(size=(2, 3), frames=2, seed=54)
    values, grad_output = inputs(case)
    values["x"] = values["x"].contiguous(memory_format=torch.channels_last_3d)
    compiled = torch.compile(case.function(dt.ops), backend="aot_eager", fullgraph=True)
    leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
    with dt.backend(backend):
        actual = value_and_gradients(compiled, leaves, grad_output)
    assert channels_last(actual["out"])
    assert_all_close(actual, exact(values, grad_output))
    torch._dynamo.reset()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case",
    [
        BilinearCase((2, 3), (2, 3), (1, 2), 2, 1, 2, 2, seed=55),
        BilinearCase((2, 1), (2, 2), None, 1, 1, 2, 1, dtype=torch.bfloat16, matrices_dtype=torch.float32, seed=56),
        BilinearCase((1, 2), (2, 2), (2, 1), 1, 1, 2, 1, layouts={"x": "channels_last_3d", "q": "expanded"}, seed=57),
    ],
    ids=["both", "space", "layouts"],
)
def test_opcheck(case: BilinearCase) -> None:
    """Each custom op that runs inside, forward and backward."""
    with dt.backend("triton"):
        check_call(
            dt.ops.bilinear_transform, dt.reference.bilinear_transform, case.call(), repeat=False,
            **loose("triton", case.dtype),
        )  # fmt: skip


# --- the kit's part -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="draws what the other tests draw")
def test_public_strategy() -> None:
    calls = strategies.bilinear_calls(dtypes=(torch.float32, torch.bfloat16))
    check_op(dt.ops.bilinear_transform, dt.reference.bilinear_transform, calls, examples=15)


@pytest.mark.skipif(INTERPRETED, reason="draws fewer sizes where kernels are interpreted")
def test_what_is_drawn() -> None:
    """Every layout, dtype and kind, groups that do not nest, maps that are not square, and empty batches."""
    seen: list[BilinearCase] = []

    @settings(400)
    @given(case=bilinear_cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
    def draw(case: BilinearCase) -> None:
        seen.append(case)
        call = case.call()
        assert isinstance(call, Call)
        assert {name: tuple(spec.shape) for name, spec in call.tensors.items()} == case.shapes()
        assert case.channels % case.groups == 0
        assert all(n % cells == 0 for n, cells in zip(case.size, case.cells, strict=True))
        if case.temporal is not None:
            assert case.channels % case.temporal[0] == case.frames % case.temporal[1] == 0

    draw()
    assert {layout for c in seen for layout in c.layouts.values()} == {c.grad_layout for c in seen} == set(LAYOUTS)
    low, high = (torch.bfloat16, torch.float16), torch.float32
    assert {(c.dtype, c.matrices_dtype) for c in seen} == {(high, high), *((d, m) for d in low for m in (d, high))}
    assert {n for c in seen for n in c.cells} == {1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17}
    assert {n // s for c in seen for n, s in zip(c.size, c.cells, strict=True)} == {1, 2, 3, 4}
    assert {c.kind for c in seen} == set(MATRIX_KINDS)
    assert any(c.batch == 0 for c in seen)
    assert any(c.temporal is None for c in seen)
    temporal = [(c, *c.temporal) for c in seen if c.temporal is not None]
    assert any(1 < c.groups < groups < c.channels for c, groups, _ in temporal)
    assert any(1 < groups < c.groups < c.channels for c, groups, _ in temporal)
    assert any(max(c.groups, g) % min(c.groups, g) for c, g, _ in temporal)
    assert any(1 < steps < c.frames for c, _, steps in temporal)
    assert any(steps == c.frames > 1 for c, _, steps in temporal)


def test_results_are_of_order_one() -> None:
    """However many cells there are: 16 bits neither overflow nor vanish."""
    for kind, cells, steps in itertools.product(MATRIX_KINDS, ((1, 1), (4, 9), (33, 64)), (1, 16)):
        case = BilinearCase(cells, cells, (2, steps), steps, 2, 4, 4, kind, seed=58)
        y = dt.reference.bilinear_transform(**inputs(case)[0])
        assert 0.03 < y.square().mean().sqrt() < 30, (kind, cells, steps)


def test_matrices_of_the_spec() -> None:
    signed = BilinearSpec((2, 3, 16, 16), seed=1).values()
    assert signed.std().item() == pytest.approx(0.25, rel=0.1)
    weights = BilinearSpec((2, 3, 16, 16), seed=1, kind="weights").values()
    assert weights.ge(0).all()
    assert_close(weights.sum(-1), torch.ones(2, 3, 16), "rows")
    assert (weights.sum(-2) - 1).abs().max() > 0.1, "columns do not"
    assert_identical(
        BilinearSpec((2, 1, 1), torch.float16, "sliced", 5).values(),
        TensorSpec((2, 1, 1), torch.float16, "sliced", 5).values(),
    )


def test_floor_of_a_result_that_cancels() -> None:
    """Two equal rows under weights 1 and -1: what the terms would make if they did not cancel."""
    x = torch.ones(1, 1, 1, 2, 1)
    p = torch.tensor([1.0, -1.0]).expand(1, 1, 1, 2, 2)
    call = BilinearCase((2, 1), (2, 1), None, 1, 1, 1, 1).call()
    assert call.floors is not None
    floors = call.floors({"x": x, "p": p, "q": torch.ones(1, 1, 1, 1, 1)}, torch.ones_like(x))
    assert floors["out"] == pytest.approx(2)  # two elements of two terms each
    assert floors["grad_q"] == pytest.approx(2)  # one of four
    assert set(floors) == {"out", "grad_x", "grad_p", "grad_q"}


# --- configs --------------------------------------------------------------------------------------------------------

FORWARD, BACKWARD = ("forward", "forward_mixed"), ("backward", "backward_mixed")
TRANSFORMS = (*FORWARD, *BACKWARD)
# how many groups of t, of how many frames each, and how many frames there are
MIXED = [((1, 1), 1), ((1, 1), 4), ((2, 2), 4), ((1, 2), 6), ((2, 3), 6)]


@contextmanager
def forced(*kinds: str, **fields: Any) -> Iterator[list[Launch]]:
    """Launch configs of these kinds (default: of all) say this; gives what is launched."""
    launches: list[Launch] = []

    def choose(key: tuning.Key, config: Any) -> Any:
        return dataclasses.replace(config, **(fields if not kinds or key.kind in kinds else {}))

    with tuning.override(choose), watched(lambda launch, _: launches.append(launch)):
        yield launches


def kinds_of(launches: list[Launch]) -> set[str]:
    return {launch.key.kind for launch in launches}


def expected_kinds(*, forward: bool, backward: bool) -> set[str]:
    """What runs of a call with t, if frames are mixed in the same pass or not."""
    first = {"forward_mixed"} if forward else {"forward", "mix"}
    return first | ({"backward_mixed"} if backward else {"mix_backward", "forward", "backward"})


@pytest.mark.kernels
@pytest.mark.parametrize("temporal", [None, (2, 2)], ids=["space", "space and time"])
@pytest.mark.parametrize(
    ("cells", "times"),
    [((3, 5), (2, 1)), ((7, 7), (1, 2)), ((2, 2), (1, 3)), ((1, 1), (2, 2)), ((8, 4), (1, 1))],
    ids=str,
)
@pytest.mark.parametrize("joint", [True, False])
def test_one_product_or_two(
    joint: bool, cells: tuple[int, int], times: tuple[int, int], temporal: tuple[int, int] | None
) -> None:
    """By kron(P, Q^T), or by P and Q one after the other, whichever the heuristic prefers."""
    size = (cells[0] * times[0], cells[1] * times[1])
    with forced(*TRANSFORMS, joint=joint, block_n=16) as launches:
        check(BilinearCase(cells, size, temporal, 2, 1, 4, 2, seed=60), "triton")
    transforms = [launch for launch in launches if launch.key.kind in TRANSFORMS]
    assert kinds_of(transforms) == (
        {"forward", "backward"} if temporal is None else {"forward_mixed", "backward_mixed"}
    )
    assert {launch.constants["JOINT"] for launch in transforms} == {joint}


@pytest.mark.kernels
@pytest.mark.parametrize("one", FORWARD)
@pytest.mark.parametrize("joint", [True, False])
def test_forward_and_backward_differ_in_products(one: str, joint: bool) -> None:
    """Each has a config of its own."""
    temporal = (1, 2) if one == "forward_mixed" else None
    other = "backward_mixed" if temporal else "backward"
    with forced(other, joint=not joint, block_n=16) as launches, forced(one, joint=joint, block_n=16):
        check(BilinearCase((3, 2), (3, 4), temporal, 2, 1, 2, 1, seed=61), "triton")
    assert {launch.key.kind: launch.constants["JOINT"] for launch in launches} == {one: joint, other: not joint}


@pytest.mark.kernels
@pytest.mark.parametrize(("temporal", "frames"), MIXED, ids=str)
@pytest.mark.parametrize("backward", [True, False], ids=["backward in one", "backward in passes"])
@pytest.mark.parametrize("forward", [True, False], ids=["forward in one", "forward in passes"])
def test_frames_mixed_in_one_pass_or_in_passes(
    forward: bool, backward: bool, temporal: tuple[int, int], frames: int
) -> None:
    """Independently in the forward and in the backward."""
    case = BilinearCase((2, 3), (4, 3), temporal, frames, 2, 4, 2, seed=62)
    with forced("forward_mixed", fused=forward) as launches, forced("backward_mixed", fused=backward):
        check(case, "triton")
    assert kinds_of(launches) == expected_kinds(forward=forward, backward=backward)


@pytest.mark.kernels
@pytest.mark.parametrize("frames", [1, 4, 6])
@pytest.mark.parametrize("fused", [True, False])
def test_without_t_there_is_nothing_to_fuse(fused: bool, frames: int) -> None:
    with forced(fused=fused) as launches:
        check(BilinearCase((2, 3), (4, 3), None, frames, 1, 4, 2, seed=63), "triton")
    assert kinds_of(launches) == {"forward", "backward"}


# columns of a tile, tiles of a program and one product or two, where there are forty columns
COLUMNS = [
    (16, 1, True), (16, 2, True), (16, 5, True), (32, 2, True), (64, 1, True), (64, 3, True), (1, 7, False),
    (2, 20, False), (4, 3, False), (8, 2, False), (16, 1, False), (16, 2, False), (64, 2, False),
]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize(("block_n", "steps", "joint"), COLUMNS, ids=str)
@pytest.mark.parametrize("kinds", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("mixed", [None, True, False], ids=["space", "in one pass", "in passes"])
def test_tiles_and_steps(mixed: bool | None, kinds: tuple[str, ...], block_n: int, steps: int, joint: bool) -> None:
    """Fewer columns than a tile has, and more; programs of one tile, of some, and of more than there are."""
    case = BilinearCase((2, 3), (4, 12), None if mixed is None else (1, 2), 2, 1, 5, 1, seed=64)
    with (
        forced("forward_mixed", "backward_mixed", fused=bool(mixed)) as launches,
        forced(*kinds, block_n=block_n, steps=steps, joint=joint),
    ):
        check(case, "triton")
    found = [launch for launch in launches if launch.key.kind in kinds]
    assert found
    for launch in found:
        assert (launch.constants["BLOCK_N"], launch.constants["JOINT"]) == (block_n, joint)
        programs = {-(-40 // (block_n * steps))}
        if launch.key.kind == "forward_mixed":  # which holds all frames of one tile, and may have no use for steps
            programs.add(-(-40 // block_n))
        assert launch.programs in {n if mixed else n * 2 for n in programs}


@pytest.mark.kernels
@pytest.mark.parametrize("fused", [True, False])
def test_one_column_a_tile(fused: bool) -> None:
    with (
        forced(*TRANSFORMS, block_n=1, steps=1, joint=False) as launches,
        forced("forward_mixed", "backward_mixed", fused=fused),
    ):
        check(BilinearCase((2, 3), (4, 3), (1, 2), 2, 1, 3, 1, seed=81), "triton")
    assert {launch.programs for launch in launches if launch.key.kind in TRANSFORMS} == {6 if fused else 12}


@pytest.mark.kernels
@pytest.mark.parametrize("block_n", [16, 32, 128, 512])
@pytest.mark.parametrize("ts", [1, 2, 3])
def test_tiles_of_a_pass_that_mixes(ts: int, block_n: int) -> None:
    """Forty-eight columns for each group of t."""
    case = BilinearCase((2, 3), (4, 6), (2, ts), 2 * ts, 1, 4, 1, layouts={"x": "channels_last_3d"}, seed=65)
    with (
        forced("mix", "mix_backward", block_n=block_n) as launches,
        forced("forward_mixed", "backward_mixed", fused=False),
    ):
        check(case, "triton")
    found = [launch for launch in launches if launch.key.kind.startswith("mix")]
    assert kinds_of(found) == {"mix", "mix_backward"}
    assert {(launch.constants["BLOCK_N"], launch.programs) for launch in found} == {(block_n, 4 * -(-48 // block_n))}


@pytest.mark.kernels
@pytest.mark.parametrize("warps_and_stages", [(1, 1), (2, 3), (8, 2), (16, 1)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_warps_and_stages(fused: bool, warps_and_stages: tuple[int, int]) -> None:
    warps, stages = warps_and_stages
    with forced(fused=fused, num_warps=warps, num_stages=stages) as launches:
        check(BilinearCase((3, 5), (3, 10), (1, 2), 4, 1, 2, 1, seed=66), "triton")
    assert kinds_of(launches) == expected_kinds(forward=fused, backward=fused)
    assert {(launch.constants["num_warps"], launch.constants["num_stages"]) for launch in launches} == {(warps, stages)}


@pytest.mark.kernels
@pytest.mark.parametrize("which", ["all", "x", *some("gradient", "matrices", few=0)])
@pytest.mark.parametrize("layout", ["channels_last_3d", "sliced", *some("transposed", "expanded", few=0)])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("mixed", [None, True, False], ids=["space", "in one pass", "in passes"])
def test_layouts_under_every_config(mixed: bool | None, joint: bool, layout: str, which: str) -> None:
    """In more tiles than one."""
    chosen = {"all": NAMES, "x": ("x",), "matrices": NAMES[1:], "gradient": ()}[which]
    case = BilinearCase(
        (2, 3), (4, 9), None if mixed is None else (1, 2), 4, 1, 4, 1, layouts=dict.fromkeys(chosen, layout),
        grad_layout=layout if which in ("all", "gradient") else "contiguous", seed=67,
    )  # fmt: skip
    with forced(fused=bool(mixed)) as launches, forced(*TRANSFORMS, joint=joint, block_n=16 if joint else 8):
        check(case, "triton")
    expected = {"forward", "backward"} if mixed is None else expected_kinds(forward=mixed, backward=mixed)
    assert kinds_of(launches) == expected


@pytest.mark.kernels
@pytest.mark.parametrize("matrices", [None, torch.float32], ids=["one dtype", "float32 matrices"])
@pytest.mark.parametrize(("backend", "dtype"), [p for p in backends_and_dtypes() if p.values[0] == "triton"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("mixed", [None, True, False], ids=["space", "in one pass", "in passes"])
def test_dtypes_under_every_config(
    mixed: bool | None, joint: bool, backend: str, dtype: torch.dtype, matrices: torch.dtype | None
) -> None:
    case = BilinearCase(
        (3, 5), (6, 5), None if mixed is None else (2, 3), 3, 1, 4, 1, dtype=dtype, matrices_dtype=matrices, seed=68
    )
    with forced(fused=bool(mixed)) as launches, forced(*TRANSFORMS, joint=joint, block_n=16 if joint else 2):
        check(case, backend)
    expected = {"forward", "backward"} if mixed is None else expected_kinds(forward=mixed, backward=mixed)
    assert kinds_of(launches) == expected


@pytest.mark.kernels
@pytest.mark.parametrize("scales", [(1e-4, 1e4), (1e4, 1e-4)], ids=str)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_float16_of_extreme_scales_under_every_config(fused: bool, joint: bool, scales: tuple[float, float]) -> None:
    """Half way there float16 over- or underflows, whichever way that is."""
    case = BilinearCase((2, 3), (2, 3), channels=2, dtype=torch.float16, matrices_dtype=torch.float32, seed=69)
    values, grad_output = inputs(case)
    values["p"], values["q"], values["x"] = values["p"] * scales[0], values["q"] * scales[1], values["x"] * 8
    grad_output = grad_output / 32
    expected = exact(values, grad_output)
    with forced(fused=fused), forced(*TRANSFORMS, joint=joint, block_n=16):
        assert_all_close(results(case, "triton", values, grad_output), expected, tolerance=1e-2)


@pytest.mark.kernels
@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_some_inputs_only_under_every_config(fused: bool, wanted: tuple[str, ...]) -> None:
    """In passes only those run that are needed."""
    case = BilinearCase(size=(2, 6), batch=1, channels=2, frames=6, temporal=(2, 3), seed=70)
    values, grad_output = inputs(case)
    for name, t in values.items():
        t.requires_grad_(name in wanted)
    with forced("forward_mixed", "backward_mixed", fused=fused) as launches:
        y = call_op("triton", values)
        del launches[:]
        if wanted:
            y.backward(grad_output)
    kinds = [launch.key.kind for launch in launches]
    if not wanted or fused:
        assert kinds == ["backward_mixed"] * bool(wanted)
    else:
        others = any(name in wanted for name in "xpq")
        assert sorted(kinds) == sorted(["mix_backward"] + ["forward"] * ("t" in wanted) + ["backward"] * others)
    expected = reference_results(case)
    assert_close(y, expected["out"])
    for name, t in values.items():
        assert_close(t.grad, expected[f"grad_{name}"] if name in wanted else None, f"grad_{name}")


@pytest.mark.kernels
@pytest.mark.parametrize("backward", [True, False], ids=["backward in one", "backward in passes"])
@pytest.mark.parametrize("joint", [True, False])
def test_same_bits_under_one_config(joint: bool, backward: bool) -> None:
    """Whatever it is, from run to run; and no input is written, nor the incoming gradient."""
    case = BilinearCase((2, 3), (4, 9), (2, 2), 4, 1, 4, 1, layouts={"x": "channels_last_3d"}, seed=71)
    values, grad_output = inputs(case)
    kept = {name: t.clone() for name, t in {**values, "grad": grad_output}.items()}
    with forced(*TRANSFORMS, joint=joint, block_n=16, steps=2), forced("backward_mixed", fused=backward, steps=1):
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        with dt.backend("triton"):
            y = case.function(dt.ops)(**leaves)
            runs = [
                torch.autograd.grad(y, list(leaves.values()), grad_output, retain_graph=True)
                for _ in range(2 if INTERPRETED else 4)
            ]
    for run in runs[1:]:
        for name, first, again in zip(leaves, runs[0], run, strict=True):
            assert_identical(again, first, name)
    for name, t in {**values, "grad": grad_output}.items():
        assert_identical(t, kept[name], name)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["forward_mixed", "backward_mixed"])
def test_every_group_in_passes(kind: str) -> None:
    """Groups of t that do not nest in those of p and q, of which a pass over space alone knows nothing."""
    for channels, groups, temporal in some((6, 2, 3), (6, 3, 2), (6, 6, 1), (15, 3, 5), (17, 1, 17), few=4):
        with forced(kind, fused=False) as launches:
            check(BilinearCase((2, 1), (2, 2), (temporal, 2), 2, 1, channels, groups, seed=72), "triton")
        assert kinds_of(launches) == expected_kinds(forward=kind != "forward_mixed", backward=kind != "backward_mixed")


# clips, channels and size that a config is chosen for: those of the case, or larger ones
CHOSEN_FOR = {"itself": None, "a large map": (8, 512, (28, 28))}


@pytest.mark.kernels
@pytest.mark.parametrize("chosen_for", CHOSEN_FOR)
@pytest.mark.parametrize(
    "case",
    [
        BilinearCase((7, 7), (7, 14), (1, 2), 4, 1, 3, 1, seed=73),
        BilinearCase((7, 7), (14, 7), None, 2, 1, 4, 2, seed=74),
        *some(
            BilinearCase((3, 2), (6, 2), (2, 3), 3, 1, 4, 1, seed=75),
            BilinearCase((12, 5), (12, 5), (1, 2), 2, 1, 2, 1, seed=76),
            BilinearCase((17, 3), (17, 3), None, 1, 1, 3, 1, seed=77),
            BilinearCase((33, 20), (33, 20), (1, 2), 2, 1, 1, 1, seed=78),
            BilinearCase((2, 2), (4, 4), (1, 16), 16, 1, 1, 1, seed=79),
            few=6,
        ),
    ],
    ids=lambda case: f"{case.cells} {case.temporal}",
)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("family", ["nvidia", "blackwell", "amd"])
def test_blocks_of_every_family(family: str, itemsize: int, case: BilinearCase, chosen_for: str) -> None:
    """What other GPUs would choose, for other sizes and dtypes too, gives the same numbers."""
    if chosen_for != "itself" and not (INTERPRETED or family != "amd"):
        pytest.skip("blocks of another GPU may need more than this one has")
    launches: list[Launch] = []

    def choose(key: tuning.Key, _: Any) -> Any:
        clips, channels, t, h, w, groups, sh, sw, mixes, ts = key.sizes
        larger = CHOSEN_FOR[chosen_for]
        if larger is not None:
            clips, channels = larger[0], channels * -(-larger[1] // channels)
            h, w = (side * -(-most // side) for side, most in zip((h, w), larger[2], strict=True))
        return tuning.bilinear(key.kind, (clips, channels, t, h, w), groups, (sh, sw), mixes, ts, itemsize, family)

    with tuning.override(choose), watched(lambda launch, _: launches.append(launch)):
        check(case, "triton")
    assert launches


NO_CONFIGS = [
    *[("block_n", value) for value in (0, -16, 3, 48, 8192, 2**70)],
    *[("num_warps", value) for value in (0, -4, 3, 64)],
    *[(name, value) for name in ("steps", "num_stages") for value in (0, -1, 2**31)],
    *[(name, value) for name in ("joint", "fused") for value in (0, 1, None)],
    ("block_n", 8),  # of one product, which takes sixteen
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), NO_CONFIGS, ids=str)
def test_no_configs(field: str, value: int) -> None:
    """Each names what is wrong, and what is accepted."""
    with pytest.raises(ValueError, match=rf"BilinearConfig: {field} is {value}; accepted"):
        tuning.BilinearConfig(**{field: value})
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(tuning.BilinearConfig(), **{field: value})


def test_configs_up_to_their_limits() -> None:
    for fields in (
        {"block_n": 1, "joint": False},
        {"block_n": 16},
        {"block_n": 4096},
        {"num_warps": 1},
        {"num_warps": 32},
        {"steps": 2**31 - 1},
    ):
        assert dataclasses.asdict(tuning.BilinearConfig(**fields)).items() >= fields.items()


@pytest.mark.kernels
@pytest.mark.parametrize("changed", [{"block_n": 12}, {"steps": 0}, {"num_warps": 0}], ids=str)
def test_no_config_is_launched(changed: dict[str, int]) -> None:
    """An override that makes one is refused before anything runs."""
    values, _ = inputs(BilinearCase((2, 1), (2, 1), None, 1, 1, 1, 1, seed=80))
    (field,) = changed
    with forced(**changed) as launches, pytest.raises(ValueError, match=field):
        call_op("triton", values)
    assert not launches
    assert call_op("triton", values).isfinite().all()
