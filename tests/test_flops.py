"""FLOP counts under torch's counter: the triton backend's ops count what the eager backend's count there."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import (
    DEVICE,
    PATIENCE,
    RELATIONAL_CONTEXTS,
    RELATIONAL_KERNELS,
    BilinearCase,
    RegionCase,
    RelationalCase,
    bilinear_cases,
    random_regions,
    region_cases,
    settings,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import dyreg_triton as dt
from dyreg_triton._core import dispatch
from dyreg_triton.eager import relational as eager_relational
from dyreg_triton.ops import flops
from dyreg_triton.ops.region import pool_placed

Case = RegionCase | BilinearCase | RelationalCase
Tensors = Mapping[str, Tensor]
OPS = torch.ops.dyreg_triton
kernels = pytest.mark.kernels


@pytest.fixture
def everywhere() -> Iterator[None]:
    """The triton backend may be chosen where no kernel can run: for fake tensors, whose ops launch nothing."""
    with dispatch.standing_in(lambda device, dtype: None):
        yield


fakes = pytest.mark.usefixtures("everywhere")


def counted(backend: str, call: Callable[..., Tensor], tensors: Tensors, wanted: Iterable[str]) -> tuple[int, int]:
    """What a forward counts, and its backward to the inputs named."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    with dt.backend(backend), FlopCounterMode(display=False) as counter:
        y = call(**leaves)
        forward = counter.get_total_flops()
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    return forward, counter.get_total_flops() - forward


def counted_fake(call: Callable[..., Tensor], tensors: Tensors, wanted: Iterable[str]) -> tuple[int, int]:
    """The same on fake tensors, of the triton backend."""
    with FakeTensorMode() as mode:
        return counted("triton", call, {name: mode.from_tensor(t) for name, t in tensors.items()}, wanted)


def inputs(case: Case) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in case.values().items() if name != "grad_output"}


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    names = list(names)
    return [some for n in range(len(names) + 1) for some in itertools.combinations(names, n)]


# --- every op, over random shapes and options -----------------------------------------------------------------------


@st.composite
def small_relational_cases(draw: st.DrawFn) -> RelationalCase:
    size, axis = st.integers(1, 5), st.integers(1, 4)
    return RelationalCase(
        kernel=draw(st.sampled_from(RELATIONAL_KERNELS)),
        context=draw(st.sampled_from(RELATIONAL_CONTEXTS)),
        kernel_size=(draw(axis), draw(axis), draw(axis)),
        clip=(draw(axis), draw(axis), draw(axis)),
        batch=draw(st.integers(0, 2)),
        queries=draw(size),
        channels=draw(size),
        latent=draw(size),
        value_channels=draw(size),
        mixed=draw(size),
        eps=draw(st.sampled_from((None, 1e-2))),
    )


CASES: dict[str, st.SearchStrategy[Any]] = {
    **{op: region_cases(op, dtypes=[torch.float32]) for op in ("region_pool", "region_remap", "region_kernel")},
    "relational_attention": small_relational_cases(),
    "bilinear_transform": bilinear_cases(dtypes=[torch.float32]),
}


@pytest.mark.parametrize("op", CASES)
@fakes
def test_ops_count_what_eager_counts(op: str) -> None:
    """Whichever inputs want gradients, on fake tensors."""

    @settings(25)
    @hypothesis.given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(CASES[op])
        tensors, call = inputs(case), case.function(dt.ops)
        wanted = data.draw(st.sets(st.sampled_from(case.input_names())))
        assert counted_fake(call, tensors, wanted) == counted("eager", call, tensors, wanted)

    check()


SMALL: list[Case] = [
    RegionCase("region_pool", (2,), 2, 3, (3, 4)),
    RegionCase("region_remap", (2,), 2, 3, (3, 4)),
    RegionCase("region_kernel", (2,), 2, 1, (3, 4)),
    BilinearCase(cells=(2, 1), size=(2, 3), temporal=(1, 2), frames=2, batch=1, channels=2, groups=1),
    RelationalCase("R", "R", clip=(1, 2, 3), channels=2, latent=3, value_channels=1, mixed=2),
]


on_cases = pytest.mark.parametrize("case", SMALL, ids=lambda case: getattr(case, "op", type(case).__name__))


@kernels
@on_cases
def test_launched_ops_count_what_eager_counts(case: Case) -> None:
    tensors, call, names = inputs(case), case.function(dt.ops), case.input_names()
    for wanted in ((), names[:1], names):
        assert counted("triton", call, tensors, wanted) == counted("eager", call, tensors, wanted), wanted


@on_cases
@fakes
def test_every_subset_of_wanted_gradients(case: Case) -> None:
    tensors, call = inputs(case), case.function(dt.ops)
    for wanted in subsets(case.input_names()):
        assert counted_fake(call, tensors, wanted) == counted("eager", call, tensors, wanted), wanted


@fakes
def test_a_relational_call_that_eager_computes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with one convolution for each channel of the keys."""
    case = RelationalCase(kernel_size=(3, 2, 3), clip=(4, 3, 3), batch=2)
    tensors, call = inputs(case), case.function(dt.ops)
    whole = counted("eager", call, tensors, tensors)
    monkeypatch.setattr(eager_relational, "_NUMBERS", 100)
    monkeypatch.setattr(eager_relational, "_FEW", 0)
    assert counted_fake(call, tensors, tensors) == counted("eager", call, tensors, tensors) == whole


def placed(x: Tensor, regions: Tensor, position: Tensor) -> Tensor:
    return pool_placed(x, position, regions, "gaussian", 1.0)


PLACED = {
    "x": torch.randn(2, 1, 3, 4, 5),
    "regions": random_regions((2, 1, 6), (4, 5)),
    "position": torch.ones(3, 4, 5),
}


@fakes
def test_a_pool_with_an_embedding() -> None:
    """Eager multiplies with the embedding alone."""
    tensors = {name: t.to(DEVICE) for name, t in PLACED.items()}
    each = 2 * (2 * 6) * 3 * (4 * 5)
    for wanted in subsets(tensors):
        found = counted_fake(placed, tensors, wanted)
        assert found == counted("eager", placed, tensors, wanted), wanted
        moving = ("x" in wanted) + ("position" in wanted) + 2 * ("regions" in wanted)
        assert found == (2 * each, moving * each), wanted


@kernels
def test_a_launched_pool_with_an_embedding() -> None:
    tensors = {name: t.to(DEVICE) for name, t in PLACED.items()}
    for wanted in (("position",), tuple(tensors)):
        assert counted("triton", placed, tensors, wanted) == counted("eager", placed, tensors, wanted), wanted


def test_no_op_is_without_a_formula() -> None:
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dyreg_triton::")]
    assert len(names) >= 10
    for name in names:
        assert getattr(OPS, name.partition("::")[2]) in flops._formulas, name


# --- layers ---------------------------------------------------------------------------------------------------------

DYREG: dict[str, Any] = {"grid": (2, 2), "region_channels": 8, "iterations": 1}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "RSA": (lambda: dt.layers.RSA(4, num_queries=2, kernel_size=(1, 3, 3)), (2, 4, 2, 3, 4)),
    "RSA V": (lambda: dt.layers.RSA(4, num_queries=2, kernel="V", context="V", kernel_size=(2, 2, 2)), (1, 4, 2, 3, 3)),
    "DyReG": (lambda: dt.layers.DyReG(4, (5, 6), **DYREG), (1, 2, 4, 5, 6)),
    "DyReG published": (lambda: dt.layers.DyReG(4, (5, 6), **DYREG, **dt.layers.dyreg.PUBLISHED), (1, 2, 4, 5, 6)),
    "DyReG static": (lambda: dt.layers.DyReG(4, (5, 6), **DYREG, regions="static"), (1, 2, 4, 5, 6)),
    "BATransform": (lambda: dt.layers.BATransform(4, window=2, temporal_window=2, groups=2), (2, 4, 2, 4, 6)),
    "BATBlock": (lambda: dt.layers.BATBlock(8, window=2, temporal_window=2), (1, 8, 2, 4, 4)),
}


def by_module(backend: str, layer: nn.Module, x: Tensor, x_wants: bool) -> list[dict[str, int]]:
    """What each module counts forward, and with the backward."""
    x = x.detach().requires_grad_(x_wants)
    tables = []
    with dt.backend(backend), FlopCounterMode(display=False) as counter:
        y = layer(x)
        for last in (False, True):
            if last:
                y.sum().backward()
            found = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
            tables.append({name: count for name, count in found.items() if count})
    return tables


@pytest.mark.parametrize("x_wants", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@fakes
def test_layers_count_the_same_on_both_backends(name: str, x_wants: bool) -> None:
    """In every module of torch's table, forward and backward."""
    make, shape = LAYERS[name]
    with FakeTensorMode():
        layer, x = make(), torch.randn(shape)
        triton, eager = (by_module(backend, layer, x, x_wants) for backend in ("triton", "eager"))
    assert triton == eager
    assert triton[1]["Global"] > triton[0]["Global"] > 0
    assert type(layer).__name__ in triton[0]


@kernels
def test_a_launched_layer() -> None:
    """Of an RSA nothing but its projections was counted once."""
    layer, x = dt.layers.RSA(8, num_queries=2, kernel_size=(3, 3, 3)).to(DEVICE), torch.randn(1, 8, 2, 4, 4).to(DEVICE)
    with dt.backend("triton"), FlopCounterMode(display=False) as counter:
        layer(x)
    counts = counter.get_flop_counts()["RSA"]
    assert counts.keys() == {torch.ops.aten.convolution, OPS.relational_attention}
    assert counts[OPS.relational_attention] > counts[torch.ops.aten.convolution]
    assert by_module("triton", layer, x, True) == by_module("eager", layer, x, True)


# --- where counters are, and when -----------------------------------------------------------------------------------


@kernels
def test_a_backward_alone() -> None:
    """Of a forward that went past the dispatcher, which nobody watched."""
    case = RelationalCase()
    tensors, call = inputs(case), case.function(dt.ops)
    with dt.backend("triton"):
        y = call(**{name: t.requires_grad_() for name, t in tensors.items()})
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    assert counter.get_total_flops() == counted("eager", call, tensors, tensors)[1]


def pool_arguments(device: str = "meta") -> tuple[Any, ...]:
    """For the registered op: 2 * (2 * 6) * 3 * (4 * 5) = 1440 operations."""
    return torch.ones(2, 3, 4, 5, device=device), torch.ones(2, 6, 4, device=device), [False], "linear", 1.0


def test_a_counter_that_is_older_than_our_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a copy of torch's registry; an inner counter is told as the outer is. On meta tensors nothing is run."""
    for packet in flops._formulas:
        monkeypatch.delitem(flop_counter.flop_registry, packet, raising=False)
    outer, inner = FlopCounterMode(display=False), FlopCounterMode(display=False)
    assert OPS.region_pool not in flop_counter.flop_registry
    with outer, inner:
        OPS.region_pool(*pool_arguments())
    assert inner.get_flop_counts()["Global"] == outer.get_flop_counts()["Global"] == {OPS.region_pool: 1440}
    assert flops._formulas.keys() <= flop_counter.flop_registry.keys()


def test_a_formula_of_ones_own() -> None:
    counter = FlopCounterMode(display=False, custom_mapping={OPS.region_pool: lambda *args, out_shape, **_: 7})
    with counter:
        OPS.region_pool(*pool_arguments())
    assert counter.get_total_flops() == 7


@pytest.mark.slow
def test_whatever_is_imported_first() -> None:
    """Torch's counters are imported by who wants them, for they import triton."""
    code = """
import sys, torch, dyreg_triton
early = "torch.utils.flop_counter" in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    regions = torch.ones(2, 6, 4, device="meta")
    torch.ops.dyreg_triton.region_pool(torch.ones(2, 3, 4, 5, device="meta"), regions, [False], "linear", 1.0)
print(early, counter.get_total_flops())
"""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.stdout.split() == ["False", "1440"], done.stderr[-2000:]


# --- compiled graphs ------------------------------------------------------------------------------------------------


@pytest.fixture
def compilers() -> Iterator[None]:
    """Which functions torch compiles, and which it leaves alone from now on, is forgotten before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def chain(x: Tensor, regions: Tensor, position: Tensor) -> Tensor:
    """Two ops, one of them in both directions."""
    nodes = pool_placed(x, position, regions, "linear", 1.0)
    return dt.ops.region_remap(nodes, regions, (4, 5))


@kernels
@pytest.mark.usefixtures("compilers")
def test_graphs_of_a_compiler() -> None:
    """What a compiler makes of the ops counts as they do: here each graph is run under a counter of its own."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    counters = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable:
        counter = FlopCounterMode(display=False)
        counters.append(counter)

        def run(*args: Any) -> Any:
            with counter:
                return graph(*args)

        return make_boxed_func(run)

    leaves = {name: t.to(DEVICE).requires_grad_() for name, t in PLACED.items()}
    with dt.backend("triton"):
        compiled = torch.compile(chain, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
        compiled(**leaves).sum().backward()
    assert tuple(c.get_total_flops() for c in counters) == counted("eager", chain, leaves, leaves)


@kernels
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("compilers")
def test_a_compiled_backward(compiler: str) -> None:
    """A counter around the forward would make torch.compile step aside; around the backward it does not."""
    leaves = {name: t.to(DEVICE).requires_grad_() for name, t in PLACED.items() if name != "position"}
    with dt.backend("triton"):
        y = torch.compile(dt.ops.region_pool, backend=compiler, fullgraph=True)(**leaves)
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    assert counter.get_total_flops() == counted("eager", dt.ops.region_pool, leaves, leaves)[1] > 0


@kernels
@pytest.mark.usefixtures("compilers")
def test_a_compiled_call_inside_a_counter() -> None:
    """Torch runs it uncompiled there."""
    tensors = {name: t.to(DEVICE) for name, t in PLACED.items()}
    found = counted("triton", torch.compile(chain, backend="aot_eager"), tensors, tensors)
    assert found == counted("eager", chain, tensors, tensors)


@kernels
def test_an_exported_program() -> None:
    """With any number of frames."""

    class Pool(nn.Module):
        def forward(self, x: Tensor, regions: Tensor) -> Tensor:
            return dt.ops.region_pool(x, regions)

    frames = torch.export.Dim("frames", min=1, max=64)
    x, regions = torch.randn(2, 3, 4, 5).to(DEVICE), random_regions((2, 6), (4, 5)).to(DEVICE)
    with dt.backend("triton"):
        program = torch.export.export(Pool(), (x, regions), dynamic_shapes={"x": {0: frames}, "regions": {0: frames}})
    with FlopCounterMode(display=False) as counter:
        program.module()(torch.cat([x, x]), torch.cat([regions, regions]))
    assert counter.get_total_flops() == 2 * 1440
