"""Garbage for every argument of every public function: a right result, or an error of this library's own making.

Own means: TypeError, ValueError or RuntimeError, raised by a line of this package, that names the function or the
argument and says what is accepted. What Python says of missing and unexpected keywords will do, and so will torch's
word that nobody has so much memory.
"""

from __future__ import annotations

import collections
import contextlib
import fractions
import functools
import re
import signal
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DEVICE, LAYOUTS, PROFILES, REGION_KINDS, REGION_OPS, settings
from torch import Tensor, nn

import dyreg_triton as dt
from dyreg_triton import testing
from dyreg_triton._core.dispatch import BACKENDS, can_run, current_backend
from dyreg_triton._core.validation import FLOATS
from dyreg_triton.layers.dyreg import GENERATORS
from dyreg_triton.layers.variants import REGIONS
from dyreg_triton.testing import strategies

# --- what a call may come to ----------------------------------------------------------------------------------------

REFUSED = object()
BINDING = r"unexpected keyword|required (positional|keyword-only) argument|positional arguments? but|multiple values"
NO_MEMORY = r"allocate|overflow|out of memory"
OWN = r"accepted|cannot run here"


class Hung(BaseException):
    """A call takes too long."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what is inside after so many seconds, where the system has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise Hung

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def last_line(error: BaseException) -> str:
    """The module of the line that raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals["__name__"]


def wrong_with(error: Exception, names: Iterable[object]) -> str | None:
    """What is wrong with an error, or None where it is one of this library's own that names one of `names`."""
    words = str(error)
    if type(error) is TypeError and re.search(BINDING, words):
        return None
    if isinstance(error, RuntimeError) and re.search(NO_MEMORY, words):
        return None
    if type(error) not in (TypeError, ValueError, RuntimeError):
        return "is of another type"
    if not last_line(error).startswith("dyreg_triton"):
        return f"was raised in {last_line(error)}"
    if not re.search(OWN, words):
        return "does not say what is accepted"
    if not any(re.search(rf"(?<!\w){re.escape(str(name))}(?!\w)", words) for name in names):
        return "names neither function nor argument"
    return None


def attempt(
    name: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *positional: Any,
    known: Iterable[object] = (),
) -> Any:
    """The result of a call, or REFUSED where it was refused as this library refuses; anything else fails.

    `known`: more names of which the error may use one.
    """
    try:
        with at_most(5), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*positional, **arguments)
    except Hung:
        raise AssertionError(f"{name} still runs after five seconds") from None
    except AssertionError:
        raise
    except Exception as error:
        wrong = wrong_with(error, (name, *arguments, *known))
        if wrong is not None:
            raise AssertionError(f"the error {wrong}: {type(error).__name__}: {error}") from error
        return REFUSED


# --- garbage --------------------------------------------------------------------------------------------------------

HUGE = (2**60, 2**62, 2**63, 10**30)  # at once beyond any memory: nothing is allocated
Pair = collections.namedtuple("Pair", "rows columns")
NUMBERS: list[Any] = [0, -1, 1, 2, 3, *HUGE, 0.0, 1.0, 2.5, -1.0, 1e-320, 1e39, float("nan"), float("inf"), 1j]
NUMBERS += [True, False, np.int64(2), np.uint8(3), np.float32(2), np.float64(0.5), np.bool_(True), np.float64("nan")]
NUMBERS += [fractions.Fraction(1, 2), torch.tensor(2), torch.tensor(2.0), torch.tensor(True), np.array(2)]
NAMES: list[Any] = ["", "x", "linear", "grid", "gru", "lstm", "sum", "eager", "cpu", "Linear", "\0", "a" * 99, b"sum"]
PAIRS: list[Any] = [(3, 4), [3, 4], torch.Size([3, 4]), Pair(3, 4), (np.int64(3), np.int32(4)), (3.0, 4), (3, True)]
PAIRS += [(3,), (3, 4, 5), (0, 4), (3, -4), ((3,), 4), (None, 4), "34", b"34", range(3, 5), {3, 4}, {3: 1, 4: 1}]
PAIRS += [np.array([3, 4]), torch.tensor([3, 4]), (torch.tensor(3), torch.tensor(4)), (np.float32(3), 4), 5]
PAIRS += [(HUGE[0], HUGE[0]), (HUGE[1], 1), (3, HUGE[2]), (HUGE[3], HUGE[3]), (float("nan"), 3)]
OBJECTS: list[Any] = [None, ..., object(), int, len, (), [], {}, set(), [[1]], [None], {"a": 1}, {1: 2}, {None: 1}]
OBJECTS += [nn.Linear(1, 1), torch.float32, torch.device("meta"), slice(3), torch, NotImplemented, ValueError("x")]
OBJECTS += [np.array([]), np.ones((2, 4)), np.array(["linear"]), np.array([object()]), mock.MagicMock()]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.complex128]
DTYPES += [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "uint16") if hasattr(torch, name)]


class Subclass(Tensor):
    """A tensor of another class."""


def as_kind(t: Tensor, kind: str) -> Tensor:
    """`t` as a tensor of another kind, or as it is where there is none such."""
    made: Callable[[], Tensor] = {
        "plain": lambda: t,
        "grad": lambda: t.clone().requires_grad_(),
        "parameter": lambda: nn.Parameter(t, requires_grad=t.is_floating_point()),
        "subclass": lambda: t.as_subclass(Subclass),
        "expanded": lambda: t[..., :1].expand_as(t),
        "transposed": lambda: t.mT.contiguous().mT,
        "meta": lambda: t.to("meta"),
        "sparse": lambda: t.to_sparse(),
        "csr": lambda: t.to_sparse_csr(),
        "quantised": lambda: torch.quantize_per_tensor(t, 1.0, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor([t]),
        "mkldnn": lambda: t.to_mkldnn(),
    }[kind]
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError, TypeError, IndexError):
        warnings.simplefilter("ignore")
        return made()
    return t


USUAL = ("plain", "grad", "parameter", "subclass", "expanded", "transposed")
KINDS = (*USUAL, "meta", "sparse", "csr", "quantised", "nested", "mkldnn")


@st.composite
def tensors(draw: st.DrawFn, *shape: int, kinds: tuple[str, ...] = KINDS, dtypes: Any = DTYPES) -> Tensor:
    """A tensor of any kind, dtype and values, of this shape or of any small one."""
    if not shape:
        shape = tuple(draw(st.lists(st.integers(0, 3) | st.just(4), max_size=6)))
    seed, spoilt = draw(st.integers(0, 99)), draw(st.sampled_from([None, None, float("nan"), float("inf"), -1e30]))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    if spoilt is not None and values.numel():
        values.view(-1)[seed % values.numel()] = spoilt
    return as_kind(values.to(draw(st.sampled_from(dtypes))).to(DEVICE), draw(st.sampled_from(kinds)))


@st.composite
def good_tensors(draw: st.DrawFn, *shape: int, dtypes: Any = FLOATS) -> Tensor:
    """A dense tensor of this shape, with data and of a dtype that the ops take."""
    return draw(tensors(*shape, kinds=USUAL, dtypes=dtypes))


JUNK = st.sampled_from([*OBJECTS, *NUMBERS, *NAMES, *PAIRS]) | tensors() | st.builds(iter, st.just([3, 4]))


@st.composite
def spoiled(
    draw: st.DrawFn, good: Mapping[str, Any], near: Mapping[str, st.SearchStrategy] | None = None, most: int = 2
) -> dict[str, Any]:
    """Good arguments, up to `most` of them replaced, now and then one missing or one too many."""
    arguments = {name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in good.items()}
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=draw(st.integers(0, most)), unique=True)):
        close = near is not None and name in near and draw(st.booleans())
        arguments[name] = draw(near[name] if close else JUNK)
    change = draw(st.integers(0, 24))
    if change == 24:
        del arguments[draw(st.sampled_from(sorted(good)))]
    if change == 23:
        arguments["unexpected"] = draw(JUNK)
    return arguments


POSITIVE = st.sampled_from([0.5, 1, 1.0, 3.0, np.float64(2), 10])
NEAR_PAIR, NEAR_NUMBER, NEAR_NAME = st.sampled_from(PAIRS), st.sampled_from(NUMBERS), st.sampled_from(NAMES)


# --- ops ------------------------------------------------------------------------------------------------------------


@st.composite
def op_calls(draw: st.DrawFn, op: str, most: int = 2) -> dict[str, Any]:
    sides = st.integers(1, 4)
    lead = tuple(draw(st.lists(st.integers(0, 2), max_size=4)))
    nodes, channels, size = draw(st.integers(0, 3)), draw(st.integers(0, 3)), (draw(sides), draw(sides))
    dtypes = [draw(st.sampled_from(FLOATS))]
    wide = dtypes if op == "region_kernel" else [*dtypes, torch.float32]
    shapes = {"x": (*lead, channels, *size), "nodes": (*lead, nodes, channels), "regions": (*lead, nodes, 4)}
    good: dict[str, Any] = {"regions": good_tensors(*shapes["regions"], dtypes=wide)}
    for name in {"region_pool": ["x"], "region_remap": ["nodes"]}.get(op, []):
        good[name] = good_tensors(*shapes[name], dtypes=dtypes)
    if op != "region_pool":
        good["size"] = size
    good |= {"profile": st.sampled_from(PROFILES), "temperature": POSITIVE}
    near = {name: tensors(*shape) for name, shape in shapes.items()}
    return draw(spoiled(good, {**near, "size": NEAR_PAIR, "temperature": NEAR_NUMBER, "profile": NEAR_NAME}, most))


def check_op_result(op: str, out: Any, call: Mapping[str, Any]) -> None:
    """Shape, dtype, device and strides of a result, its values, and a gradient for whatever wants one."""
    regions = call["regions"]
    features = {"region_pool": "x", "region_remap": "nodes", "region_kernel": "regions"}[op]
    lead, number = regions.shape[:-2], regions.shape[-2]
    size = tuple(map(int, call["size"])) if "size" in call else ()
    shape = {
        "region_pool": lambda: (*lead, number, call["x"].shape[-3]),
        "region_remap": lambda: (*lead, call["nodes"].shape[-1], *size),
        "region_kernel": lambda: (*lead, number, *size),
    }[op]()
    assert isinstance(out, Tensor)
    assert out.layout == torch.strided
    assert out.is_contiguous()
    assert tuple(out.shape) == shape
    assert (out.dtype, out.device) == (call[features].dtype, call[features].device)
    tensors = {name: t.detach() for name, t in call.items() if isinstance(t, Tensor)}
    if out.device.type != "meta" and all((t.abs() < 99).all() for t in tensors.values()):
        exact = getattr(dt.reference, op)(**(call | {name: t.double() for name, t in tensors.items()}))
        torch.testing.assert_close(out.detach().double(), exact, rtol=2e-2, atol=2e-2)
    wanted = [t for t in call.values() if isinstance(t, Tensor) and t.requires_grad]
    assert out.requires_grad == bool(wanted)
    if wanted:
        for t, grad in zip(wanted, torch.autograd.grad(out.sum(), wanted), strict=True):
            assert (grad.shape, grad.dtype) == (t.shape, t.dtype)


@pytest.mark.parametrize("module", [dt.ops, dt.reference], ids=["ops", "reference"])
@pytest.mark.parametrize("op", REGION_OPS)
def test_region_ops(op: str, module: types.ModuleType) -> None:
    @settings(300)
    @given(call=op_calls(op), backend=st.sampled_from(["auto", "eager", "reference"]))
    def fuzz(call: dict[str, Any], backend: str) -> None:
        with dt.backend(backend):
            out = attempt(op, getattr(module, op), call)
        if out is not REFUSED:
            check_op_result(op, out, call)

    fuzz()


@pytest.mark.kernels
@pytest.mark.parametrize("op", REGION_OPS)
def test_region_ops_on_triton(op: str) -> None:
    @settings(900)
    @given(call=op_calls(op, most=1))
    def fuzz(call: dict[str, Any]) -> None:
        with dt.backend("triton"):
            out = attempt(op, getattr(dt.ops, op), call)
        if out is not REFUSED:
            check_op_result(op, out, call)

    fuzz()


RELATIONAL_FORMS = {
    "q": "blcthw", "k": "bcthw", "v": "bethw", "h1": "cdijk", "p1": "cd", "h2": "dijk", "g": "fijk", "identity": "ef",
}  # fmt: skip
NEAR_EPS = st.sampled_from([None, 1e-6, 1e-2, 1, 30.0, *NUMBERS])


@st.composite
def relational_op_calls(draw: st.DrawFn, most: int = 2) -> dict[str, Any]:
    """Any kernel and context; up to `most` arguments are garbage, and now and then a size disagrees."""
    sizes = {letter: draw(st.integers(1, 3)) for letter in "blcdefthwijk"}
    sizes["b"] = draw(st.integers(0, 2))
    dtypes = [draw(st.sampled_from(FLOATS))]
    names = {"q", "v", "h2"} | draw(st.sampled_from([{"p1"}, {"k", "h1"}, {"k", "h1", "p1"}]))
    names |= draw(st.sampled_from([set(), {"g"}, {"g", "identity"}]))
    good: dict[str, Any] = {"k": None, "eps": st.sampled_from([None, 0.1, 1, 1e-3])}
    near: dict[str, Any] = {"eps": NEAR_EPS}
    for name, form in RELATIONAL_FORMS.items():
        shape = tuple(sizes[letter] for letter in form)
        if name in names:
            good[name] = good_tensors(*shape, dtypes=dtypes)
        axis = draw(st.integers(0, len(shape) - 1))
        other = (*shape[:axis], draw(st.integers(0, 3)), *shape[axis + 1 :])
        near[name] = st.none() | tensors(*shape) | tensors(*other, dtypes=dtypes)
    return draw(spoiled(good, near, most))


def check_relational_result(y: Any, call: Mapping[str, Any]) -> None:
    """As `check_op_result`, and in the memory order that the op promises."""
    q, v, g = call["q"], call["v"], call.get("g")
    assert isinstance(y, Tensor)
    assert tuple(y.shape) == (*q.shape[:2], v.shape[1] if g is None else g.shape[0], *q.shape[3:])
    assert (y.dtype, y.device) == (q.dtype, q.device)
    tensors = {name: t.detach() for name, t in call.items() if isinstance(t, Tensor)}
    if y.device.type != "meta" and all((t.abs() < 99).all() for t in tensors.values()):
        exact = dt.reference.relational_attention(**(call | {name: t.double() for name, t in tensors.items()}))
        if y.isfinite().all():  # float16 may overflow
            scale = exact.abs().max().item() if exact.numel() else 0.0
            torch.testing.assert_close(y.detach().double(), exact, rtol=3e-2, atol=3e-2 * scale)
        else:
            assert y.dtype == torch.float16
    wanted = [t for t in call.values() if isinstance(t, Tensor) and t.requires_grad]
    assert y.requires_grad == bool(wanted)
    if wanted:
        for t, grad in zip(wanted, torch.autograd.grad(y.sum(), wanted), strict=True):
            assert (grad.shape, grad.dtype) == (t.shape, t.dtype)


@pytest.mark.parametrize("module", [dt.ops, dt.reference], ids=["ops", "reference"])
def test_relational_attention(module: types.ModuleType) -> None:
    @settings(300)
    @given(call=relational_op_calls(), backend=st.sampled_from(["auto", "eager", "reference"]))
    def fuzz(call: dict[str, Any], backend: str) -> None:
        with dt.backend(backend):
            y = attempt("relational_attention", module.relational_attention, call)
        if y is not REFUSED:
            check_relational_result(y, call)

    fuzz()


@pytest.mark.kernels
def test_relational_attention_on_triton() -> None:
    @settings(300)
    @given(call=relational_op_calls(most=1))
    def fuzz(call: dict[str, Any]) -> None:
        with dt.backend("triton"):
            y = attempt("relational_attention", dt.ops.relational_attention, call)
        if y is not REFUSED:
            check_relational_result(y, call)

    fuzz()


@st.composite
def bilinear_op_calls(draw: st.DrawFn, most: int = 2) -> dict[str, Any]:
    """With and without t; up to `most` arguments are garbage, and now and then a size disagrees."""
    channels, frames = draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.sampled_from([1, 2, 3, 4]))
    batch, rows, columns = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups, temporal = (draw(st.sampled_from([n for n in (1, 2, 3, 6) if channels % n == 0])) for _ in range(2))
    steps = draw(st.sampled_from([n for n in (1, 2, 4) if frames % n == 0]))
    shapes = {
        "x": (batch, channels, frames, rows * draw(st.integers(1, 2)), columns * draw(st.integers(1, 3))),
        "p": (batch, groups, frames, rows, rows),
        "q": (batch, groups, frames, columns, columns),
        "t": (batch, temporal, steps, steps),
    }
    dtype = draw(st.sampled_from(FLOATS))
    good: dict[str, Any] = {"t": None}
    near: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name != "t" or draw(st.booleans()):
            good[name] = good_tensors(*shape, dtypes=[dtype] if name == "x" else [dtype, torch.float32])
        axis = draw(st.integers(0, len(shape) - 1))
        other = (*shape[:axis], draw(st.integers(0, 4)), *shape[axis + 1 :])
        square = (*shape[:-2], *(draw(st.integers(0, 4)),) * 2)
        near[name] = st.none() | tensors(*shape) | tensors(*other, dtypes=[dtype]) | tensors(*square, dtypes=[dtype])
    return draw(spoiled(good, near, most))


def check_bilinear_result(y: Any, call: Mapping[str, Any]) -> None:
    """As `check_op_result`, but that y may have its channels last as well."""
    x = call["x"]
    assert isinstance(y, Tensor)
    assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last_3d)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    tensors = {name: t.detach() for name, t in call.items() if isinstance(t, Tensor)}
    if y.device.type != "meta" and all((t.abs() < 99).all() for t in tensors.values()):
        exact = dt.reference.bilinear_transform(**(call | {name: t.double() for name, t in tensors.items()}))
        if y.isfinite().all():  # float16 may overflow
            scale = exact.abs().max().item() if exact.numel() else 0.0
            torch.testing.assert_close(y.detach().double(), exact, rtol=3e-2, atol=3e-2 * scale)
        else:
            assert y.dtype == torch.float16
    wanted = [t for t in call.values() if isinstance(t, Tensor) and t.requires_grad]
    assert y.requires_grad == bool(wanted)
    if wanted:
        for t, grad in zip(wanted, torch.autograd.grad(y.sum(), wanted), strict=True):
            assert (grad.shape, grad.dtype) == (t.shape, t.dtype)


@pytest.mark.parametrize("module", [dt.ops, dt.reference], ids=["ops", "reference"])
def test_bilinear_transform(module: types.ModuleType) -> None:
    @settings(300)
    @given(call=bilinear_op_calls(), backend=st.sampled_from(["auto", "eager", "reference"]))
    def fuzz(call: dict[str, Any], backend: str) -> None:
        with dt.backend(backend):
            y = attempt("bilinear_transform", module.bilinear_transform, call)
        if y is not REFUSED:
            check_bilinear_result(y, call)

    fuzz()


@pytest.mark.kernels
def test_bilinear_transform_on_triton() -> None:
    @settings(300)
    @given(call=bilinear_op_calls(most=1))
    def fuzz(call: dict[str, Any]) -> None:
        with dt.backend("triton"):
            y = attempt("bilinear_transform", dt.ops.bilinear_transform, call)
        if y is not REFUSED:
            check_bilinear_result(y, call)

    fuzz()


@pytest.mark.parametrize("module", [dt.ops, dt.reference], ids=["ops", "reference"])
@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-30, 1e30, 1e39, 1e300, 10**30, 10**400])
def test_any_temperature(temperature: float, module: types.ModuleType) -> None:
    """One beyond float32's reach is refused, or counts as very large or small; it gives neither NaN nor nothing."""
    call = {"regions": torch.tensor([[2.0, 2.0, 1.5, 1.5]], device=DEVICE), "temperature": temperature}
    k = attempt("region_kernel", module.region_kernel, {**call, "size": (5, 6), "profile": "log-linear"})
    if k is not REFUSED:
        torch.testing.assert_close(k.sum(), torch.ones((), device=DEVICE), rtol=1e-4, atol=1e-4)


# --- layers ---------------------------------------------------------------------------------------------------------

COUNTS, SIDES = st.integers(1, 4), st.tuples(st.integers(3, 7), st.integers(3, 7))
GRAPH: dict[str, Any] = {
    "iterations": st.integers(1, 2),
    "recurrence": st.sampled_from(["gru", "lstm"]),
    "combine": st.sampled_from(["concatenate", "sum"]),
    "send_layers": st.integers(1, 2),
    "update_layers": st.integers(0, 2),
    "aggregation": st.sampled_from(["dot", "mean"]),
    "order": st.sampled_from(["space-time", "time-space"]),
}
DYREG: dict[str, Any] = {
    "in_channels": COUNTS,
    "size": SIDES,
    "grid": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "node_channels": st.none() | COUNTS,
    "project": st.sampled_from([None, True]),
    "regions": st.sampled_from(REGIONS),
    "size_ratio": st.none() | POSITIVE,
    "region_channels": COUNTS,
    "generator": st.sampled_from(GENERATORS),
    "weights_over": st.sampled_from(["locations", "nodes"]),
    "init": st.sampled_from([None, "center", "grid"]),
    "region_rule": st.sampled_from(["paper", "published"]),
    "offset_bias": st.booleans(),
    "profile": st.sampled_from(PROFILES),
    "temperature": POSITIVE,
    "train_size": st.none() | SIDES,
    "connection": st.sampled_from(["residual", "serial"]),
    "return_regions": st.booleans(),
}
NEAR_SIZES = dict.fromkeys(("size", "grid", "train_size"), NEAR_PAIR)
NEAR_COUNTS = dict.fromkeys(
    ("in_channels", "node_channels", "region_channels", "size_ratio", "temperature"), NEAR_NUMBER
)
CLIPS = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(250)
@given(call=spoiled({**DYREG, **GRAPH}, NEAR_SIZES | NEAR_COUNTS), clip=CLIPS)
def test_dyreg(call: dict[str, Any], clip: tuple[int, int]) -> None:
    layer = attempt("DyReG", dt.layers.DyReG, call)
    if layer is REFUSED or layer.dynamic_graph.rstg.iterations > 9:
        return
    x = torch.randn(*clip, call["in_channels"], *call["size"])
    y, regions = layer(x, return_regions=True)
    number = layer.dynamic_graph.num_nodes
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert regions.shape == (
        (*clip, number, *call["size"]) if call.get("regions") == "semantic" else (*clip, number, 4)
    )
    assert isinstance(layer(x), tuple) == call.get("return_regions", False)


@settings(150)
@given(call=spoiled({"channels": COUNTS, **GRAPH}, {"channels": NEAR_NUMBER}), clip=CLIPS, number=st.integers(0, 3))
def test_rstg(call: dict[str, Any], clip: tuple[int, int], number: int) -> None:
    layer = attempt("RSTG", dt.layers.RSTG, call)
    if layer is not REFUSED and layer.iterations <= 9:
        nodes = torch.randn(*clip, number, call["channels"])
        assert layer(nodes).shape == nodes.shape


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DyReG": (lambda: dt.layers.DyReG(3, (4, 3), grid=(2, 1), node_channels=2, region_channels=2), (3, 4, 3)),
    "DyReG semantic": (lambda: dt.layers.DyReG(3, (4, 3), grid=(2, 1), regions="semantic"), (3, 4, 3)),
    "DyReG static": (lambda: dt.layers.DyReG(3, (4, 3), grid=(2, 1), regions="static"), (3, 4, 3)),
    "RSTG": (lambda: dt.layers.RSTG(3), (4, 3)),
    "ops.rstg.RSTG": (lambda: dt.compat.build("ops.rstg.RSTG", node_dim=3, num_nodes=4), (3, 4)),
    "ops.dyreg.DynamicGraph": (
        lambda: dt.compat.build("ops.dyreg.DynamicGraph", node_dim=3, backbone_dim=3, H=4, W=3, h=1, keep_regions=True),
        (3, 4, 3),
    ),
    "ops.dyreg.DynamicGraphWrapper": (
        lambda: dt.compat.build("ops.dyreg.DynamicGraphWrapper", node_dim=3, in_channels=3, H=4, W=3, h=1),
        (3, 4, 3),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_input_of_layers(name: str) -> None:
    """Anything as the input; NaN goes through and leaves the shape alone."""
    build, shape = LAYERS[name]
    layer = build().to(DEVICE)
    owner = "DyReG" if "dyreg" in name.lower() else name

    @settings(120)
    @given(clip=CLIPS, among=st.sampled_from(["fitting", "shaped", "any"]), data=st.data())
    def fuzz(clip: tuple[int, int], among: str, data: st.DataObject) -> None:
        fitting = good_tensors(*clip, *shape, dtypes=[torch.float32])
        x = data.draw({"fitting": fitting, "shaped": tensors(*clip, *shape), "any": JUNK}[among])
        options = {}
        if name.startswith("DyReG"):
            options = {"return_regions": data.draw(st.sampled_from([None, True, False]) | JUNK)}
        y = attempt(owner, layer, options, x)
        if y is REFUSED:
            return
        if name.startswith("DyReG"):
            assert options["return_regions"] in (None, True, False)
            assert isinstance(y, tuple) == bool(options["return_regions"])
            y = y[0] if isinstance(y, tuple) else y
        assert (y.dtype, y.device) == (x.dtype, x.device)
        assert tuple(y.shape) == (tuple(x.shape) if "Wrapper" not in name else (x.shape[0] * x.shape[1], *x.shape[2:]))

    fuzz()


@settings(300)
@given(
    call=spoiled(
        {
            "offsets": good_tensors(2, 6, 4),
            "grid": st.sampled_from([(2, 3), (3, 2), (6, 1), [1, 6]]),
            "size": SIDES,
            "init": st.sampled_from(["center", "grid"]),
            "rule": st.sampled_from(["paper", "published"]),
            "size_ratio": st.none() | POSITIVE,
        },
        {"offsets": tensors(2, 6, 4), "grid": NEAR_PAIR, "size": NEAR_PAIR, "size_ratio": NEAR_NUMBER},
    )
)
def test_regions_from_offsets(call: dict[str, Any]) -> None:
    regions = attempt("regions_from_offsets", dt.layers.regions_from_offsets, call)
    if regions is not REFUSED:
        assert regions.shape == call["offsets"].shape
        assert regions.dtype == torch.promote_types(call["offsets"].dtype, torch.float32)
        assert regions.device == call["offsets"].device


# --- compat ---------------------------------------------------------------------------------------------------------

PARAMS: dict[str, Any] = {
    "full_res": st.booleans(),
    "rstg_combine": "plus",
    "dynamic_regions": "dyreg",
    "offset_lstm_dim": COUNTS,
    "offset_generator": st.sampled_from(["big", "small"]),
    "init_regions": st.sampled_from(["center", "grid"]),
    "combine_by_sum": st.booleans(),
    "aggregation_type": st.sampled_from(["dot", "sum"]),
    "send_layers": st.integers(1, 2),
    "update_layers": st.integers(0, 2),
}
SIZES = {"node_dim": 3, "H": 5, "W": 4, "h": 2, "w": 1, "iH": 4, "iW": 3, "num_nodes": 2, "project_i3d": False}
SMALL: dict[str, dict[str, Any]] = {
    "ops.dyreg.DynamicGraph": {**SIZES, "backbone_dim": 3},
    "ops.dyreg.DynamicGraphWrapper": {**SIZES, "in_channels": 3},
    "ops.rstg.RSTG": {"node_dim": 3, "num_nodes": 2},
}
MODULES = tuple(SMALL)
INNER = ("ops.dyreg.DynamicGraph", "DyReG", "RSTG", "region_channels", *PARAMS)  # what an error may name as well
NO_PARAMS: list[Any] = [{}, None, {1: 2}, {None: 1, "a": 2}, {"full_res": None}, types.SimpleNamespace()]


class Strange:
    """An object with unfit attributes, one of which is not there when it is asked for."""

    offset_lstm_dim, combine_by_sum = 2.5, None

    @property
    def update_layers(self) -> int:
        raise AttributeError("update_layers")


def as_params(params: dict[str, Any], form: str) -> Any:
    """dyregParams as they come: a dict, another mapping, an object."""
    if form == "object":
        return types.SimpleNamespace(**{str(key): value for key, value in params.items()})
    forms = {"dict": dict, "proxy": types.MappingProxyType, "user": collections.UserDict}
    return forms[form](params)


@st.composite
def configs(draw: st.DrawFn, name: str) -> dict[Any, Any]:
    params = draw(spoiled(PARAMS, {"offset_lstm_dim": NEAR_NUMBER}, most=1))
    config = {**SMALL[name], "params": as_params(params, draw(st.sampled_from(["dict", "proxy", "user", "object"])))}
    config |= {"rnn_type": st.sampled_from(["LSTM", "GRU"]), "iterations": COUNTS, "keep_regions": st.booleans()}
    near = {**dict.fromkeys(config, NEAR_NUMBER), "params": st.builds(Strange) | st.sampled_from(NO_PARAMS)}
    config = draw(spoiled(config, near))
    if draw(st.integers(0, 15)) == 0:
        config[draw(st.sampled_from([None, 1, ("a",), "", "nodes", 2.5]))] = 1
    return config


@pytest.mark.parametrize("name", MODULES)
def test_compat_build(name: str) -> None:
    @settings(200)
    @given(config=configs(name), keywords=st.booleans(), clip=CLIPS)
    def fuzz(config: dict[Any, Any], keywords: bool, clip: tuple[int, int]) -> None:
        by_name = keywords and all(isinstance(key, str) for key in config)
        built = (name,) if by_name else (name, config)
        known = (name, *INNER, *config)
        module = attempt("compat.build", dt.compat.build, config if by_name else {}, *built, known=known)
        if module is REFUSED:
            return
        graph = getattr(module, "dynamic_graph", module)
        if getattr(graph, "rstg", graph).iterations > 9:
            return
        if name == "ops.rstg.RSTG":
            x = torch.randn(*clip, graph.channels, min(graph.num_nodes, 9))
            assert graph.num_nodes > 9 or module(x).shape == x.shape
        else:
            x = torch.randn(*clip, graph.in_channels, *graph.size)
            assert module(x).shape == (x.shape if graph is module else (clip[0] * clip[1], *x.shape[2:]))

    fuzz()


@settings(150)
@given(name=st.sampled_from(MODULES) | JUNK, config=JUNK)
def test_compat_build_of_nothing_known(name: Any, config: Any) -> None:
    module = attempt("compat.build", dt.compat.build, {}, name, config, known=("name", "config", *INNER, *MODULES))
    assert module is REFUSED or isinstance(module, nn.Module)


# --- backends -------------------------------------------------------------------------------------------------------


@settings(200)
@given(name=st.sampled_from(BACKENDS) | JUNK)
def test_backend(name: Any) -> None:
    """What was refused changes nothing."""
    with dt.backend("eager"):
        chosen = attempt("backend", dt.backend, {"name": name})
        assert current_backend() == ("eager" if chosen is REFUSED else name)
    assert current_backend() == "auto"


@settings(250)
@given(
    call=spoiled(
        {
            "name": st.sampled_from(BACKENDS[1:]),
            "device": st.sampled_from(
                ["cpu", "meta", "cuda", "cuda:77", torch.device("cpu"), torch.device("cuda", 99)]
            ),
            "dtype": st.sampled_from(DTYPES),
            "raise_error": st.booleans(),
        },
        {"device": st.sampled_from(["gpu", "cpu:-1", "cuda:", "", 0, -1, 10**30])},
    )
)
def test_can_run(call: dict[str, Any]) -> None:
    asked = attempt("backend", can_run, call)
    assert asked in (True, False, REFUSED)
    if asked is REFUSED and call.keys() == {"name", "device", "dtype", "raise_error"} and call["raise_error"] is False:
        good = isinstance(call["dtype"], torch.dtype) and isinstance(call["device"], torch.device)
        assert not good or call["name"] not in ("eager", "reference")


# --- the testing kit ------------------------------------------------------------------------------------------------

BOUNDS = st.sampled_from([0, 1e-3, 1.0, np.float64(0.5)])
COMPARED = {"actual": tensors(2, 3), "expected": tensors(2, 3)}
SAME = {"actual": good_tensors(2, 3), "expected": good_tensors(2, 3)}
NEAR_BOUND = dict.fromkeys(("tolerance", "element", "floor"), NEAR_NUMBER)


def compared(name: str, call: Mapping[str, Any], *positional: Any) -> Any:
    """`attempt`, in which a failed comparison counts as an answer where it says what is wrong."""
    try:
        return attempt(name, getattr(testing, name), call, *positional, known=("assert_close", "floor"))
    except AssertionError as error:
        if not last_line(error).startswith("dyreg_triton"):
            raise
        return AssertionError


@settings(200)
@given(call=spoiled({**SAME, "floor": BOUNDS}, {**COMPARED, "floor": NEAR_NUMBER}))
def test_relative_error(call: dict[str, Any]) -> None:
    error = attempt("relative_error", testing.relative_error, call)
    if error is not REFUSED:
        assert isinstance(error, float)
        assert not error < 0
        assert call["actual"].shape == call["expected"].shape


@settings(300)
@given(
    call=spoiled(
        {**SAME, "tolerance": st.none() | BOUNDS, "element": st.none() | BOUNDS, "floor": BOUNDS},
        {**COMPARED, **NEAR_BOUND},
    )
)
def test_mismatch(call: dict[str, Any]) -> None:
    wrong = attempt("mismatch", testing.mismatch, call)
    asserted = compared("assert_close", call)
    assert (asserted is REFUSED) == (wrong is REFUSED)
    assert (asserted is AssertionError) == isinstance(wrong, str)
    if wrong is None and call["actual"] is not None:
        assert call["actual"].shape == call["expected"].shape
        assert call["actual"].isfinite().all()


@settings(200)
@given(
    call=spoiled(
        {
            "actual": st.fixed_dictionaries({"a": tensors(2, 3) | st.none(), "b": good_tensors(2)}),
            "expected": st.fixed_dictionaries({"a": tensors(2, 3) | st.none(), "b": good_tensors(2)}),
            "tolerance": st.none() | BOUNDS,
            "element": st.none() | BOUNDS,
            "floors": st.sampled_from([None, {}, {"a": 1.0}, {"a": "1"}, {"a": None}, {"c": 1.0}]),
        },
        {**NEAR_BOUND, "actual": st.dictionaries(st.sampled_from(["a", 1, None]), JUNK, max_size=2)},
    )
)
def test_assert_all_close(call: dict[str, Any]) -> None:
    compared("assert_all_close", call)


@settings(200)
@given(call=spoiled({**SAME, "name": "a"}, COMPARED))
def test_assert_identical(call: dict[str, Any]) -> None:
    if any(isinstance(t, Tensor) and t.is_quantized for t in call.values()):
        return  # torch dies of them; test_errors.py sees them refused
    same = compared("assert_identical", call)
    if same is None:
        assert call["actual"].shape == call["expected"].shape
        assert call["actual"].dtype == call["expected"].dtype


FUNCTIONS = st.sampled_from([lambda x: x * 2, lambda x: x.sum(), lambda x: x.detach(), lambda x: torch.zeros(2, 3)])


@settings(200)
@given(
    call=spoiled(
        {
            "function": FUNCTIONS,
            "inputs": st.fixed_dictionaries({"x": good_tensors(2, 3)}),
            "grad_output": st.none() | good_tensors(2, 3),
        },
        {
            "function": st.sampled_from([lambda x: None, lambda x: (x, x), lambda x: 3.0, lambda x: "x"]),
            "inputs": st.fixed_dictionaries({"x": tensors(2, 3)}) | st.just({}) | st.just({1: torch.ones(2)}),
            "grad_output": tensors(2, 3),
        },
    )
)
def test_value_and_gradients(call: dict[str, Any]) -> None:
    """What fails in the function given is the function's own affair."""

    def function(x: Any) -> Any:
        try:
            return call["function"](x)
        except Exception:
            return None

    arguments = {**call, "function": function} if callable(call.get("function")) else call
    got = attempt("value_and_gradients", testing.value_and_gradients, arguments)
    if got is not REFUSED:
        assert isinstance(got["out"], Tensor)
        assert set(got) <= {"out", *(f"grad_{name}" for name in call["inputs"])}


@settings(250)
@given(
    call=spoiled(
        {"values": good_tensors(2, 3), "layout": st.sampled_from(LAYOUTS)}, {"values": tensors(), "layout": NEAR_NAME}
    )
)
def test_guarded(call: dict[str, Any]) -> None:
    guarded = attempt("Guarded", testing.Guarded, call)
    if guarded is not REFUSED:
        assert guarded.tensor.shape == call["values"].shape
        assert guarded.tensor.dtype == call["values"].dtype
        if guarded.tensor.device.type != "meta":
            guarded.check()


@settings(100)
@given(shape=JUNK)
def test_poisoned_outputs(shape: Any) -> None:
    """torch says the same of what it cannot make, and is itself again afterwards."""
    before = torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided

    def tried() -> Any:
        try:
            return torch.empty(shape).shape
        except (TypeError, RuntimeError, ValueError) as error:
            return type(error)

    plain = tried()
    with testing.poisoned_outputs():
        inside = tried()
    assert inside == plain
    with pytest.raises(KeyError), testing.poisoned_outputs():  # noqa: PT012
        torch.empty(2)
        raise KeyError
    assert before == (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
    assert attempt("poisoned_outputs", testing.poisoned_outputs, {"shape": shape}) is REFUSED


NEAR_SHAPE = st.sampled_from(
    [(), (0,), (2, 0), [2], (-1,), (1.5,), ("a",), (True,), (HUGE[0],), (HUGE[3],), (np.int64(2),)]
)


@settings(200)
@given(
    call=spoiled(
        {
            "shape": st.lists(st.integers(0, 2), max_size=2).map(tuple),
            "size": SIDES,
            "kind": st.sampled_from(REGION_KINDS),
            "dtype": st.sampled_from(FLOATS),
            "seed": st.integers(0, 99),
            "margin": st.sampled_from([0.0, 1e-3, 0.01]),
        },
        {
            "shape": NEAR_SHAPE,
            "size": NEAR_PAIR,
            "seed": NEAR_NUMBER,
            "margin": NEAR_NUMBER,
            "dtype": st.sampled_from(DTYPES),
        },
    )
)
def test_random_regions(call: dict[str, Any]) -> None:
    regions = attempt("random_regions", testing.random_regions, call)
    if regions is not REFUSED:
        assert tuple(regions.shape) == (*call["shape"], 4)
        assert regions.dtype == call.get("dtype", torch.float32)
        assert regions.isfinite().all()


SPECS = {
    "shape": st.lists(st.integers(0, 3), max_size=4).map(tuple),
    "dtype": st.sampled_from(DTYPES),
    "layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 99),
}
NEAR_SPECS = {"shape": NEAR_SHAPE, "seed": NEAR_NUMBER, "layout": NEAR_NAME}


@settings(200)
@given(spec=spoiled(SPECS, NEAR_SPECS))
def test_tensor_spec(spec: dict[str, Any]) -> None:
    values = attempt("TensorSpec", lambda **k: testing.TensorSpec(**k).values(), spec)
    if values is not REFUSED:
        assert (tuple(values.shape), values.dtype) == (tuple(spec["shape"]), spec.get("dtype", torch.float32))


@settings(200)
@given(
    call=spoiled(
        {
            "tensors": st.builds(lambda: {"x": testing.TensorSpec((2, 3))}),
            "options": st.sampled_from([{}, {"p": 1}]),
            "grad_layout": st.sampled_from(LAYOUTS),
            "seed": st.integers(0, 99),
            "floors": st.sampled_from([None, lambda inputs, grad: {}]),
        },
        {"tensors": st.sampled_from([{}, {1: 2}, {"x": torch.ones(2)}]), "grad_layout": NEAR_NAME, "seed": NEAR_NUMBER},
    ),
    device=st.sampled_from(["cpu", "cpu", torch.device("cpu")]) | JUNK,
)
def test_call(call: dict[str, Any], device: Any) -> None:
    def make(**arguments: Any) -> tuple[dict[str, Any], testing.Guarded]:
        made = testing.Call(**arguments)
        return made.inputs(device), made.cotangent(torch.ones(2, 3))

    made = attempt("Call", make, call, known=("device", "layout"))
    if made is not REFUSED:
        assert set(made[0]) == set(call["tensors"])
        assert made[1].tensor.shape == (2, 3)


VALUES = [*OBJECTS, *NUMBERS, *NAMES, *PAIRS]


def right(x: Tensor) -> Tensor:
    return x * 2


# --- strategies -----------------------------------------------------------------------------------------------------

DIMS = st.sampled_from(["N", "C", "*", 0, 3, "", "1a", "**", -1, 2.5, None, True, ("N",), np.int64(2)])
TYPES = st.none() | st.lists(st.sampled_from([torch.float32, torch.float16]), min_size=1).map(tuple)


def small_call(drawn: Any) -> bool:
    return isinstance(drawn, testing.Call) and all(isinstance(t, testing.TensorSpec) for t in drawn.tensors.values())


@settings(200)
@given(
    call=spoiled({"block": st.integers(1, 40), "blocks": st.integers(1, 5), "empty": st.booleans()}, NEAR_BOUND),
    data=st.data(),
)
def test_strategies_dims(call: dict[str, Any], data: st.DataObject) -> None:
    made = attempt("dims", strategies.dims, call)
    if made is not REFUSED:
        assert data.draw(made) >= 0


@pytest.mark.parametrize("name", ["leads", "layouts", "profiles"])
def test_strategies_without_arguments(name: str) -> None:
    for value in VALUES:
        assert attempt(name, getattr(strategies, name), {}, value) is REFUSED
        assert attempt(name, getattr(strategies, name), {"size": value}) is REFUSED


@settings(200)
@given(accepted=st.lists(st.sampled_from(DTYPES) | JUNK, max_size=3), data=st.data())
def test_strategies_dtypes(accepted: list[Any], data: st.DataObject) -> None:
    made = attempt("dtypes", strategies.dtypes, {}, *accepted)
    if made is not REFUSED:
        assert isinstance(data.draw(made), torch.dtype)


@settings(300)
@given(
    shape=st.lists(DIMS | JUNK, max_size=3),
    name=st.sampled_from(["tensor", "regions", "size"]),
    options=spoiled({"dtypes": TYPES, "size": st.sampled_from([("H", "W"), (2, 3)])}, {"size": st.tuples(DIMS, DIMS)}),
    data=st.data(),
)
def test_strategies_tensor_regions_size(
    shape: list[Any], name: str, options: dict[str, Any], data: st.DataObject
) -> None:
    kept = {"tensor": ("dtypes", "unexpected"), "regions": tuple(options), "size": ("unexpected",)}[name]
    known = {k: v for k, v in options.items() if k in kept}
    argument = attempt(name, getattr(strategies, name), known, *shape)
    if argument is not REFUSED:
        calls = strategies.calls(x=strategies.tensor(2), a=argument)
        assert small_call(data.draw(calls))


@settings(250)
@given(
    call=spoiled(
        {
            "dims": st.sampled_from([None, {}, {"A": st.just(2)}]),
            "dtypes": TYPES.filter(bool),
            "floors": None,
            "x": strategies.tensor("*", "A", 2),
            "regions": strategies.regions("*", "N", size=("H", 3)),
            "size": strategies.size("H", 3),
            "profile": strategies.profiles(),
        },
        {"dims": st.sampled_from([{"Z": st.just(2)}, {"A": 2}, {1: st.just(2)}]), "dtypes": st.sampled_from(DTYPES)},
    ),
    data=st.data(),
)
def test_strategies_calls(call: dict[str, Any], data: st.DataObject) -> None:
    made = attempt("calls", strategies.calls, call)
    if made is not REFUSED:
        assert small_call(data.draw(made))


@settings(100)
@given(call=spoiled({"op": st.sampled_from(REGION_OPS), "dtypes": TYPES.filter(bool)}), data=st.data())
def test_strategies_region_calls(call: dict[str, Any], data: st.DataObject) -> None:
    made = attempt("region_calls", strategies.region_calls, call)
    if made is not REFUSED:
        assert small_call(data.draw(made))


@settings(50)
@given(call=spoiled({"dtypes": TYPES.filter(bool)}), data=st.data())
def test_strategies_relational_calls(call: dict[str, Any], data: st.DataObject) -> None:
    made = attempt("relational_calls", strategies.relational_calls, call)
    if made is not REFUSED:
        assert small_call(data.draw(made))


@settings(50)
@given(call=spoiled({"dtypes": TYPES.filter(bool)}), data=st.data())
def test_strategies_bilinear_calls(call: dict[str, Any], data: st.DataObject) -> None:
    made = attempt("bilinear_calls", strategies.bilinear_calls, call)
    if made is not REFUSED:
        assert small_call(data.draw(made))


# --- one argument at a time -----------------------------------------------------------------------------------------

ONES = torch.ones(2, 3)
BUILT = {"rnn_type": "GRU", "iterations": 1, "keep_regions": True, "params": {"offset_lstm_dim": 2}, "name": "a"}
SURFACE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "region_pool": (dt.ops.region_pool, {"x": torch.ones(2, 3, 4, 5), "regions": torch.ones(2, 2, 4)}),
    "region_remap": (
        dt.ops.region_remap,
        {"nodes": torch.ones(2, 2, 3), "regions": torch.ones(2, 2, 4), "size": (4, 5), "profile": "gaussian"},
    ),
    "region_kernel": (
        dt.ops.region_kernel,
        {"regions": torch.ones(2, 4), "size": (4, 5), "profile": "log-linear", "temperature": 1.0},
    ),
    "reference.region_kernel": (
        dt.reference.region_kernel,
        {"regions": torch.ones(2, 4), "size": (4, 5), "profile": "log-linear", "temperature": 1.0},
    ),
    **{
        f"{name}relational_attention": (
            module.relational_attention,
            {
                "q": torch.ones(1, 2, 3, 2, 1, 2), "k": torch.ones(1, 3, 2, 1, 2), "v": torch.ones(1, 2, 2, 1, 2),
                "h1": torch.ones(3, 2, 1, 2, 3), "p1": torch.ones(3, 2), "h2": torch.ones(2, 1, 2, 3),
                "g": torch.ones(4, 1, 2, 3), "identity": torch.ones(2, 4), "eps": 1e-6,
            },
        )
        for name, module in (("", dt.ops), ("reference.", dt.reference))
    },
    **{
        f"{name}bilinear_transform": (
            module.bilinear_transform,
            {
                "x": torch.ones(1, 4, 4, 2, 6), "p": torch.ones(1, 2, 4, 2, 2), "q": torch.ones(1, 2, 4, 3, 3),
                "t": torch.ones(1, 4, 2, 2),
            },
        )
        for name, module in (("", dt.ops), ("reference.", dt.reference))
    },
    "DyReG": (
        dt.layers.DyReG,
        {
            "in_channels": 2, "size": (3, 4), "grid": (1, 2), "node_channels": 3, "project": True, "regions": "full",
            "size_ratio": 2.0, "region_channels": 2, "generator": "pooled", "weights_over": "nodes", "init": "grid",
            "region_rule": "paper", "offset_bias": True, "recurrence": "gru", "profile": "linear", "temperature": 1.0,
            "train_size": (3, 3), "iterations": 1, "connection": "serial", "return_regions": False,
        },
    ),
    "RSTG": (
        dt.layers.RSTG,
        {
            "channels": 2, "iterations": 1, "recurrence": "gru", "combine": "sum", "send_layers": 1,
            "update_layers": 1, "aggregation": "dot", "order": "space-time",
        },
    ),
    "regions_from_offsets": (
        dt.layers.regions_from_offsets,
        {
            "offsets": torch.zeros(2, 2, 4), "grid": (1, 2), "size": (3, 4), "init": "grid", "rule": "paper",
            "size_ratio": 2.0,
        },
    ),
    **{name: (functools.partial(dt.compat.build, name), {**SMALL[name], **BUILT}) for name in MODULES[:2]},
    "ops.rstg.RSTG": (
        functools.partial(dt.compat.build, "ops.rstg.RSTG"),
        {**SMALL["ops.rstg.RSTG"], "rnn_type": "GRU", "iterations": 1, "keep_regions": True, "params": {}},
    ),
    "params": (
        lambda **params: dt.compat.build(MODULES[0], SMALL[MODULES[0]], params=params),
        {
            "full_res": True, "rstg_combine": "plus", "dynamic_regions": "dyreg", "offset_lstm_dim": 2,
            "offset_generator": "big", "init_regions": "grid", "combine_by_sum": True, "aggregation_type": "dot",
            "send_layers": 1, "update_layers": 0,
        },
    ),
    "compat.build": (
        lambda name, config: dt.compat.build(name, config),
        {"name": MODULES[2], "config": {"node_dim": 2}},
    ),
    "backend": (dt.backend, {"name": "auto"}),
    "can_run": (can_run, {"name": "triton", "device": "cpu", "dtype": torch.float32, "raise_error": False}),
    "relative_error": (testing.relative_error, {"actual": ONES, "expected": ONES, "floor": 0.0}),
    "assert_close": (
        testing.assert_close,
        {"actual": ONES, "expected": ONES, "name": "a", "tolerance": 1e-3, "element": 1e-3, "floor": 0.0},
    ),
    "assert_all_close": (
        testing.assert_all_close,
        {"actual": {"a": ONES}, "expected": {"a": ONES}, "tolerance": 1e-3, "element": 1e-3, "floors": {"a": 0.0}},
    ),
    "assert_identical": (testing.assert_identical, {"actual": ONES, "expected": ONES, "name": "a"}),
    "value_and_gradients": (
        testing.value_and_gradients,
        {"function": right, "inputs": {"x": torch.ones(2, 3, requires_grad=True)}, "grad_output": ONES},
    ),
    "Guarded": (testing.Guarded, {"values": ONES, "layout": "contiguous"}),
    "random_regions": (
        testing.random_regions,
        {"shape": (2,), "size": (3, 4), "kind": "mixed", "dtype": torch.float32, "seed": 0, "margin": 1e-3},
    ),
    "TensorSpec": (
        lambda **spec: testing.Call({"x": testing.TensorSpec(**spec)}).inputs("cpu"),
        {"shape": (2, 3), "dtype": torch.float32, "layout": "contiguous", "seed": 0},
    ),
    "RelationalSpec": (
        lambda **spec: testing.Call({"x": testing.RelationalSpec(**spec)}).inputs("cpu"),
        {"shape": (1, 2, 3, 1, 2), "dtype": torch.float32, "layout": "sliced", "seed": 0, "scale": 0.5, "zeros": True},
    ),
    "BilinearSpec": (
        lambda **spec: testing.Call({"x": testing.BilinearSpec(**spec)}).inputs("cpu"),
        {"shape": (1, 2, 3, 3), "dtype": torch.float32, "layout": "sliced", "seed": 0, "kind": "weights"},
    ),
    "Call": (
        lambda **call: testing.check_call(right, right, testing.Call(**call)),
        {
            "tensors": {"x": testing.TensorSpec((2, 3))}, "options": {}, "grad_layout": "sliced", "seed": 0,
            "floors": lambda inputs, grad: {},
        },
    ),
    "check_call": (
        testing.check_call,
        {
            "op": right, "reference": right, "call": testing.Call({"x": testing.TensorSpec((2, 3))}), "device": "cpu",
            "tolerance": 1e-3, "element": 1e-3, "repeat": True, "opcheck": True,
        },
    ),
    "check_op": (
        testing.check_op,
        {
            "op": right, "reference": right, "strategy": strategies.calls(x=strategies.tensor("A")), "examples": 1,
            "device": "cpu", "tolerance": 1e-3, "element": 1e-3, "repeat": True, "opcheck": True,
        },
    ),
    "dims": (strategies.dims, {"block": 2, "blocks": 2, "empty": True}),
    "dtypes": (lambda dtype: strategies.dtypes(dtype).validate(), {"dtype": torch.float32}),
    "tensor": (lambda dim, dtypes: strategies.tensor(dim, dtypes=dtypes), {"dim": "N", "dtypes": (torch.float32,)}),
    "regions": (
        lambda dim, size, dtypes: strategies.regions(dim, size=size, dtypes=dtypes),
        {"dim": "N", "size": ("H", 3), "dtypes": (torch.float32,)},
    ),
    "size": (lambda dim: strategies.size(dim), {"dim": "N"}),
    "calls": (
        lambda **call: strategies.calls(x=strategies.tensor("A"), **call).validate(),
        {"dims": {"A": st.just(2)}, "dtypes": (torch.float32,), "floors": None},
    ),
    "region_calls": (
        lambda **call: strategies.region_calls(**call).validate(),
        {"op": "region_pool", "dtypes": (torch.float32,)},
    ),
    "relational_calls": (
        lambda **call: strategies.relational_calls(**call).validate(),
        {"dtypes": (torch.float32,)},
    ),
    "bilinear_calls": (
        lambda **call: strategies.bilinear_calls(**call).validate(),
        {"dtypes": (torch.float32,)},
    ),
}  # fmt: skip


def values_for(argument: str, good: Any) -> list[Any]:
    """Everything that is in no way an argument, and where it is a tensor, that tensor in every kind and dtype."""
    ones = good if isinstance(good, Tensor) else ONES
    values = [*OBJECTS, *NUMBERS, *NAMES, *PAIRS, iter([3, 4])]
    values += [as_kind(ones, kind) for kind in KINDS] + [ones.to(dtype) for dtype in DTYPES]
    values += [ones[0], ones[None], ones[:0], ones[..., :0], ones[..., :1], torch.full_like(ones, float("nan"))]
    if callable(good):  # what a function given does wrong is its own affair
        return [v for v in values if not callable(v)]
    if argument in ("examples", "iterations"):  # who asks for so many gets them
        return [v for v in values if not any(v is huge for huge in HUGE)]
    return values


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, (_, good) in SURFACE.items() for a in good])
def test_one_argument(name: str, argument: str) -> None:
    """All values that an argument may not have, one after another."""
    function, good = SURFACE[name]
    holes: dict[str, str] = {}  # by what was said, one value each
    for value in values_for(argument, good[argument]):
        if name == "assert_identical" and isinstance(value, Tensor) and value.is_quantized:
            continue  # torch dies of them; test_errors.py sees them refused
        try:
            attempt(
                name.split(".")[-1],
                function,
                {**good, argument: value},
                known=(name, "backend", "assert_close", *INNER),
            )
        except AssertionError as error:
            if not last_line(error).startswith("dyreg_triton"):
                holes.setdefault(f"{error!s:.200}", f"{type(value).__name__} {value!r:.60}")
            if "still runs" in str(error):
                break
    assert not holes, "\n".join(f"{argument} = {value}: {said}" for said, value in holes.items())
