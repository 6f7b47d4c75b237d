"""Which way a call takes past torch, and what happens to a config that does not fit."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEVICE, assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton._core.gpu import gpu_of
from dyreg_triton.configs import files
from dyreg_triton.ops import launch
from dyreg_triton.ops.custom import Op, op, signature
from dyreg_triton.tuning import Config

# --- the short way --------------------------------------------------------------------------------------------------

CALLS: list[str] = []


def _thrice(x: Tensor, y: Tensor | None, factor: float) -> Tensor:
    CALLS.append("grad" if torch.is_grad_enabled() else "no grad")
    return x * 3 * factor


@pytest.fixture(scope="module")
def thrice() -> Op:
    made = op("test_thrice")(_thrice)
    made.register_fake(lambda x, y, factor: torch.empty_like(x))
    made.register_autograd(lambda ctx, grad: (grad * 3 * ctx.factor, None, None), setup)
    return made


def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.factor = inputs[2]


class Seen(TorchDispatchMode):
    """Names of the custom ops that torch's dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dyreg_triton":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_gradients_are_those_of_the_custom_op(thrice: Op) -> None:
    x = torch.randn(4, requires_grad=True)
    y = thrice(x, None, 2.0)
    assert type(y.grad_fn).__name__.startswith("thrice_direct")
    (direct,) = torch.autograd.grad(y.sum(), x)
    (custom,) = torch.autograd.grad(thrice.custom(x, None, 2.0).sum(), x)
    assert direct.equal(custom)
    assert direct.eq(6).all()


@pytest.mark.parametrize("wanted", [True, False])
def test_without_gradient_there_is_no_graph(thrice: Op, wanted: bool) -> None:
    x = torch.randn(4, requires_grad=wanted)
    with torch.set_grad_enabled(not wanted):
        assert thrice(x, None, 1.0).grad_fn is None


def test_whoever_listens_hears(thrice: Op) -> None:
    x = torch.randn(4, requires_grad=True)
    with Seen() as mode:
        thrice(x, None, 1.0)
    assert mode.names == ["dyreg_triton::test_thrice"]
    with torch.profiler.profile() as profile:
        thrice(x, None, 1.0)
    assert any(event.name == "dyreg_triton::test_thrice" for event in profile.events())
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: thrice(x, None, 1.0))(x.detach())
    assert any("test_thrice" in str(node.target) for node in traced.graph.nodes)
    with torch._subclasses.FakeTensorMode() as fake:
        assert thrice(fake.from_tensor(x), None, 1.0).shape == (4,)
    compiled = torch.compile(lambda x: thrice(x, None, 1.0), backend="eager", fullgraph=True)
    assert compiled(x).equal(x * 3)


@pytest.mark.parametrize("place", ["x", "y"])
def test_a_subclass_goes_through_the_dispatcher(thrice: Op, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have a rule of its own for the op."""
    heard: list[Any] = []
    monkeypatch.setattr(thrice, "custom", lambda *args: heard.append(args))
    plain, other = torch.randn(4), torch.randn(4).as_subclass(Subclass)
    thrice(*((other, plain) if place == "x" else (plain, other)), 1.0)
    assert heard
    heard.clear()
    thrice(torch.nn.Parameter(plain), plain, 1.0)
    assert not heard


def test_what_the_checks_look_at() -> None:
    x = torch.randn(2, 3)
    assert signature([x, None], 1) == signature([torch.zeros(2, 3), None], 1)
    others = [torch.randn(3, 2), x.double(), x.to("meta"), x.to_sparse(), None]
    assert len({signature([t], 1) for t in [x, *others]}) == 6
    assert signature([x], 1) != signature([x], 2)
    assert signature([x.as_subclass(Subclass)]) is None
    assert signature([torch.nested.nested_tensor([x, x[:1]])]) is None


@pytest.mark.kernels
@pytest.mark.parametrize("which", ["x", "gradient"])
def test_a_sign_that_was_not_yet_applied(which: str) -> None:
    """torch keeps the imaginary part of a conjugate as its negative, in a bit that a kernel does not see."""
    negative = torch.complex(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)).to(DEVICE).conj().imag
    regions = torch.rand(2, 6, 4, device=DEVICE) + 1
    assert negative.is_neg()
    x = negative if which == "x" else torch.randn(2, 3, 4, 5, device=DEVICE)
    grad = torch.complex(torch.randn(2, 6, 3), torch.randn(2, 6, 3)).to(DEVICE).conj().imag
    found = {}
    for name in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        with dt.backend(name):
            y = dt.ops.region_pool(leaf, regions)
        found[name] = y, *torch.autograd.grad(y, leaf, grad)
    for one, other in zip(*found.values(), strict=True):
        assert_close(one, other)


@pytest.mark.kernels
def test_batched_gradients_and_zeros_without_memory() -> None:
    x, regions = torch.randn(2, 3, 4, 5, device=DEVICE, requires_grad=True), torch.rand(2, 6, 4, device=DEVICE) + 1
    with dt.backend("triton"):
        y = dt.ops.region_pool(x, regions)
        several = torch.randn(3, *y.shape, device=DEVICE)
        (batched,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
        for one, grad in zip(batched, several, strict=True):
            assert_close(one, torch.autograd.grad(y, x, grad, retain_graph=True)[0])
        zero = torch._efficientzerotensor(y.shape, device=DEVICE)
        assert torch.autograd.grad(y, x, zero)[0].eq(0).all()
        assert dt.ops.region_pool(torch._efficientzerotensor(x.shape, device=DEVICE), regions).eq(0).all()


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tf32_by_torchs_newer_settings(dtype: torch.dtype) -> None:
    """With which torch's older question raises."""
    code = f"""
import torch, dyreg_triton as dt
from dyreg_triton._core.gpu import matmul_precision
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert matmul_precision() == "high"
x, r = torch.randn(1, 3, 4, 5, dtype={dtype}, device="{DEVICE}"), torch.rand(1, 2, 4, device="{DEVICE}") + 1
with dt.backend("triton"):
    dt.ops.region_pool(x, r)
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert matmul_precision() == "highest"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plans() -> Iterator[None]:
    launch.forget()
    yield
    launch.forget()


@pytest.mark.usefixtures("plans")
def test_a_plan_is_made_once_for_each_signature() -> None:
    made: list[tuple] = []

    def make(x: Tensor, y: Tensor | None, *options: Any) -> tuple:
        made.append(options)
        return tuple(x.shape), options

    x = torch.randn(4, 6)
    same = [(x, None), (torch.zeros(4, 6), None)]
    assert len({launch.planned(make, tensors, "a") for tensors in same}) == len(made) == 1
    others = [x.double(), x.T, x[:2], x.to("meta"), x.expand(2, 4, 6)]
    for i, other in enumerate(others):
        launch.planned(make, (other, None), "a")
        assert len(made) == i + 2
    launch.planned(make, (x, x), "a")
    launch.planned(make, (x, None), "b")
    assert len(made) == 8
    former = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        launch.planned(make, (x, None), "a")
    finally:
        torch.set_float32_matmul_precision(former)
    with tuning.override(lambda key, config: config):
        launch.planned(make, (x, None), "a")
    assert len(made) == 10


def test_an_override_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="choose is 3"), tuning.override(3):
        pass


@pytest.mark.usefixtures("plans")
def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST", 3)
    for i in range(20):
        assert launch.planned(lambda x, i: i, (torch.empty(1),), i) == i
        assert len(launch._plans) <= 3


# --- a config that does not fit -------------------------------------------------------------------------------------


class OutOfResources(Exception):
    """As Triton's: what a kernel raises that needs more than there is, before it runs."""


@pytest.mark.kernels
@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("error", [OutOfResources, RuntimeError])
@pytest.mark.parametrize("backward", [False, True])
def test_a_config_that_does_not_fit_is_reported_and_the_heuristic_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backward: bool, error: type[Exception]
) -> None:
    """Of the very key and of a nearest one; a call is never lost for it."""
    x, regions = torch.randn(2, 20, 5, 6, device=DEVICE), torch.rand(2, 3, 4, device=DEVICE) + 1
    kind = "scatter_moments" if backward else "gather"
    key = tuning.region_key(kind, 2, 3, 20, 30, x)
    too_large = Config(16, 16, 32, 2)
    near = key._replace(sizes=(4, 3, 20, 30))
    default = tuning.origin(key, DEVICE).config
    path = tmp_path / "a.json"
    files.merge(path, gpu_of(x.device), {near: files.Entry(too_large, 1e-6, default, 2e-6, True)})
    launches: list[launch.Launch] = []
    real = launch.Launch._launch

    def limited(self: launch.Launch, args: tuple[Any, ...]) -> None:
        if self.key.kind == kind and self.constants["num_warps"] == 2:
            monkeypatch.setattr(self, "kernel", {(self.programs,): refuse})
        launches.append(self)
        real(self, args)

    def refuse(*_: Any, **__: Any) -> None:
        raise error("shared memory")

    monkeypatch.setattr(launch.Launch, "_launch", limited)
    leaves = x.clone().requires_grad_(), regions.clone().requires_grad_()
    with tuning.use(path), dt.backend("triton"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = dt.ops.region_pool(*leaves)
            found = torch.autograd.grad(y.sum(), leaves)
        assert tuning.config(key, x) == default
    messages = [str(w.message) for w in caught if str(path) in str(w.message)]
    assert len(messages) == 1
    assert str(near) in messages[0]
    assert "shared memory" in messages[0]
    assert [each.constants["num_warps"] for each in launches if each.key.kind == kind].count(2) == 1
    with dt.backend("eager"):
        expected = dt.ops.region_pool(*leaves)
        wanted = torch.autograd.grad(expected.sum(), leaves)
    assert_close(y, expected)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.kernels
@pytest.mark.usefixtures("plans")
def test_a_default_that_does_not_fit_is_an_error() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OutOfResources("shared memory")

    spoil = launch.watched(lambda ready, _: setattr(ready, "kernel", {(ready.programs,): refuse}))
    with spoil, pytest.raises(OutOfResources), dt.backend("triton"):
        dt.ops.region_pool(torch.randn(1, 3, 4, 4, device=DEVICE), torch.rand(1, 2, 4, device=DEVICE) + 1)
