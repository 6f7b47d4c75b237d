"""`dt.swap` on models in the published style: the same numbers, objects and training, and the way back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import published
import published_images
import pytest
import torch
from support import (
    DEVICE,
    PATIENCE,
    assert_all_close,
    assert_close,
    assert_identical,
    awake,
    backends,
    in_full,
    relative_error,
    run,
)
from swap_cases import (
    CLIP,
    IMAGES,
    MAPS,
    SWAPPED,
    TOLERANCES,
    VARIANTS,
    VIDEO,
    Log,
    assert_gradients_same,
    assert_same,
    assert_same_log,
    assert_untouched,
    block,
    graph,
    holder,
    is_ours,
    named,
    network,
    objects,
    on_few,
    on_networks,
    on_variants,
    rsa,
    snapshot,
    untouched,
    values,
)
from test_ecosystem import GLOO, in_parallel, python
from test_golden import BAT, NONLOCAL, Golden, assert_gradients, assert_largest_close, check_intermediates, watch
from torch import Tensor, nn
from torch.nn import functional as F

import dyreg_triton as dt
from dyreg_triton.compat import families

# --- the models of these tests --------------------------------------------------------------------------------------

GOLDEN = (
    *("rsa_R_V", "rsa_V_VplusR", "rsa_stride122", "rsa_dims_R_R", "rsa_din_ne_dout"),
    *("rstg_dot_gru_upd1", "rstg_sum_default", "rstg_dot_mlp2_cat"),
    *("dyreg_small_glore", "dyreg_fullres_16_from_14", "dyreg_wrapper_i3d_14", "dyreg_gru_center"),
    *BAT,
    *NONLOCAL,
)


@pytest.mark.parametrize("case", GOLDEN)
def test_models_here_compute_what_the_published_do(case: str, device: torch.device) -> None:
    golden = Golden(case, device)
    config: Any = golden.json("ctor")
    for key in ("input", "iterations", "num_nodes"):
        config.pop(key, None)
    settings = {"rnn_type": config.pop("rnn_type", "LSTM"), "offset_lstm_dim": 1}
    if "params" in config:
        config["params"] = published.dyregParams(**config["params"])
        settings["offset_lstm_dim"] = config["params"].offset_lstm_dim
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    with mock.patch.multiple(published.ARGS, **settings):
        package, _, name = golden.metadata["upstream_class"].rpartition(".")
        module = getattr(published_images if package.startswith("model_zoo") else published, name)(**config)
    module.load_state_dict(golden.under("state"), strict=True)
    module.to(device, torch.float64).eval()
    kept: dict[str, Tensor] = {}
    if case in BAT + NONLOCAL:
        watch(module, kept)
    x = golden.under("input")["x"].double().requires_grad_()
    y = module(x)
    y.backward(golden.under("input")["g"].double())
    assert_largest_close(y.detach(), golden.under("output")["y"], "output.y")
    assert_close(x.grad, golden.under("grad")["x"], "grad.x", tolerance=1e-6)
    assert_gradients(golden, module, dict(module.named_parameters()))
    if case in BAT + NONLOCAL:
        stored_names = {name for name in golden.tensors if name.startswith("mid.")}
        assert check_intermediates(golden, module, kept) == stored_names
    if case.startswith("dyreg_"):
        inner = getattr(module, "dynamic_graph", module)
        left = {"kernel": inner.kernel, "regions": inner.offsets, "nodes": inner.nodes}
        left |= {"nodes_wo_position": inner.nodes_wo_position}
        left |= {f"aux.{name}": value for name, value in inner.aux_feats.items()}
        assert len(left) == 8
        for name, value in left.items():
            stored = golden.tensors[f"mid.{name}"].float()
            assert_largest_close(value.detach().view(stored.shape), stored, name)


# --- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*in_full([torch.float32]), torch.float64], ids=lambda d: str(d)[6:])
@on_variants
def test_outputs_and_gradients_stay(variant: str, dtype: torch.dtype) -> None:
    model, x = holder(variant, dtype)
    original = copy.deepcopy(model)
    before = type(model.inner).__name__
    report = dt.swap(model)
    assert named(report.modules) == [("inner", before)]
    assert is_ours(model.inner)
    for training in (True, False):
        assert_same(run(model.train(training), x), run(original.train(training), x), dtype)


@on_variants
def test_takes_over_the_very_same_objects(variant: str) -> None:
    model, x = holder(variant)
    run(model, x)  # leaves gradients, which stay too
    model.inner.remark = "mine"
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    before, gradients = objects(model), [p.grad for p in parameters]
    leaves = {path: m for path, m in model.named_modules() if list(m.parameters()) and not list(m.children())}
    dt.swap(model)
    assert objects(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    for path, leaf in leaves.items():
        assert model.get_submodule(path) is leaf, path
    assert model.inner.remark == "mine"


def test_settings_stay_readable() -> None:
    model, _ = holder("wrapper")
    attention = rsa()
    model.append(attention)
    params, inner = model.inner.params, model.inner.dynamic_graph
    dt.swap(model)
    assert model.inner.params is params
    for name in ("H", "W", "h", "w", "C", "num_nodes", "backbone_dim", "project_i3d", "name", "iH"):
        assert getattr(model.inner.dynamic_graph, name) == getattr(inner, name), name
    for name in ("d_in", "d_out", "nh", "dk", "dv", "dd", "kernel_type", "feat_type", "kernel_size"):
        assert getattr(model[-1], name) == getattr(attention, name), name


TRANSFORMS = ("s", "k", "in_channels")
SETTINGS = {
    "transform": (*TRANSFORMS, "ts", "tk"),
    "transform of images": TRANSFORMS,
    "nonlocal 2d": ("dimension", "head", "sub_sample", "use_scale", "zero_init", "in_channels", "inter_channels"),
    "nonlocal of images": ("use_scale",),
}


@pytest.mark.parametrize("variant", SETTINGS)
def test_settings_of_blocks_stay_readable(variant: str) -> None:
    model, _ = holder(variant)
    before = {name: getattr(model.inner, name) for name in SETTINGS[variant]}
    dt.swap(model)
    assert is_ours(model.inner)
    assert {name: getattr(model.inner, name) for name in before} == before


@on_networks
def test_networks_compute_the_same(name: str) -> None:
    """Batch norms, and training mode that differs from module to module."""
    model, x = network(name)
    model.eval()
    first = model.get_submodule(SWAPPED[name][0])
    first.train()
    flags = {path: m.training for path, m in model.named_modules()}
    original = copy.deepcopy(model)
    report = dt.swap(model)
    assert [row.path for row in report.modules] == SWAPPED[name]
    assert report.model is model
    assert all(is_ours(model.get_submodule(path)) for path in SWAPPED[name])
    assert {path: m.training for path, m in model.named_modules()} == flags
    assert_same(run(model, x), run(original, x))
    assert_same(run(model.train(), x), run(original.train(), x))
    for key, value in original.state_dict().items():  # and batch norms saw the same
        assert_close(model.state_dict()[key], value, key, tolerance=1e-4)


@pytest.mark.parametrize("variant", ["rsa VplusR VplusR", "rsa V R", "wrapper", "wrapper projected"])
def test_autocast(variant: str) -> None:
    """As close to the result in float32 as the original is."""
    model, x = holder(variant)
    original = copy.deepcopy(model)
    exact = run(original, x)
    dt.swap(model)

    def lowered(one: nn.Module) -> dict[str, Any]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return one(x)

        return run(one, x, call=call)

    actual, expected = lowered(model), lowered(original)
    assert actual["out"].dtype == expected["out"].dtype
    outputs, gradients = TOLERANCES[torch.bfloat16]
    for names, tolerance in ((["out"], outputs), ([name for name in exact if name != "out"], gradients)):
        whole = [
            torch.cat([r[name].double().flatten() for name in names if exact[name] is not None])
            for r in (actual, expected, exact)
        ]
        assert 1e-5 < relative_error(whole[0], whole[2]) <= 2 * relative_error(whole[1], whole[2]) + tolerance


def test_whole_module_in_16_bits() -> None:
    model, x = holder("rsa VplusR VplusR", torch.bfloat16)
    original = copy.deepcopy(model)
    dt.swap(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_same(run(model, x), run(original, x), torch.bfloat16)


@on_few
def test_nothing_is_seen_of_the_probe(variant: str) -> None:
    """Not by parameters, buffers and gradients, not by a graph that waits for its backward, nor by random numbers."""
    model, x = holder(variant)
    original = copy.deepcopy(model)
    expected = run(original, x)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    state, random, grads_on = model.state_dict(keep_vars=True), torch.get_rng_state(), torch.is_grad_enabled()
    before = {name: (id(t), t._version, t.clone()) for name, t in state.items()}
    dt.swap(model)
    assert torch.get_rng_state().equal(random)
    assert torch.is_grad_enabled() == grads_on
    for name, t in model.state_dict(keep_vars=True).items():
        assert (id(t), t._version) == before[name][:2], name
        assert_identical(t, before[name][2], name)
        assert t.grad is None
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).sin().to(y))
    assert_identical(leaf.grad, expected["grad_x"])


@on_few
def test_after_a_forward(variant: str) -> None:
    """A published module keeps tensors with graphs on itself, which cannot be copied."""
    model, x = holder(variant)
    expected = run(model, x)
    kept = model(x)
    assert kept.requires_grad
    dt.swap(model)
    assert is_ours(model.inner)
    assert_same(run(model, x), expected)
    copy.deepcopy(model)  # nothing of that graph is left


@pytest.mark.parametrize("variant", ["rsa VplusR VplusR", "wrapper"])
def test_weights_that_are_not_numbers(variant: str) -> None:
    model, x = holder(variant)
    with torch.no_grad():
        next(model.inner.parameters()).view(-1)[0] = torch.nan
    before = {name: t.clone() for name, t in model.state_dict().items()}
    dt.swap(model)
    assert is_ours(model.inner)
    for name, t in model.state_dict().items():
        assert_identical(t, before[name], name)
    assert model(x).isnan().any()


def test_frozen_weights_and_sixty_four_bits_by_default() -> None:
    model, x = holder("wrapper")
    model.requires_grad_(False)
    original = copy.deepcopy(model)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            dt.swap(model, example=x)
            assert not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
    assert is_ours(model.inner)
    assert not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32
    assert_same(run(model, x), run(original, x))


@on_few
def test_replicas_of_data_parallel(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold tensors as plain attributes. On one device: torch's own replicate, copies in place of broadcasts."""
    replicate = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda ts, devices, detach=False: [[1 * t for t in ts] for _ in devices],
    )
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(replicate, "_replicatable_module", lambda *_: True)
    model, x = holder(variant)
    expected = model(x)
    dt.swap(model)
    one, two = replicate.replicate(model, [0, 1])  # type: ignore[attr-defined]
    assert_close(one(x), expected, tolerance=1e-4)
    two(x).square().sum().backward()
    assert next(model.parameters()).grad.any()  # type: ignore[union-attr]


class ByName(nn.Module):
    def __init__(self, inner: nn.Module, name: str):
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(**{self.name: x})


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *(("rsa V V", "x"), ("graph", "input_feats"), ("wrapper", "x"), ("rstg", "input")),
        *(("transform", "x"), ("block of images", "x"), ("nonlocal 1d", "x"), ("nonlocal of images", "x")),
    ],
)
def test_inputs_by_the_published_names(variant: str, name: str) -> None:
    inner, x = holder(variant)
    model = ByName(inner.inner, name).to(DEVICE)
    expected = run(copy.deepcopy(model), x)
    dt.swap(model)
    assert is_ours(model.inner)
    assert_same(run(model, x), expected)


def test_a_module_that_is_held_elsewhere_too() -> None:
    """Who reads the original's regions would read those of another input: they are gone, and after undo back."""
    model, x = holder("graph")
    original = model.inner
    model(x)
    kernel = original.kernel
    report = dt.swap(model, example=x, keep_regions=True)
    model(x + 1)
    with pytest.raises(AttributeError):
        _ = original.kernel
    assert model.inner.kernel.shape == kernel.shape
    report.undo()
    model(x)
    assert_identical(original.kernel.detach(), kernel.detach())


def test_nothing_of_the_example_is_kept() -> None:
    model, x = holder("graph")
    original = model.inner
    model(x)
    left = weakref.ref(original.kernel)
    seen: list[weakref.ref[Tensor]] = []
    model.inner.register_forward_hook(lambda module, inputs, y: seen.append(weakref.ref(vars(module).get("kernel", y))))
    report = dt.swap(model, example=x)
    gc.collect()
    assert seen
    assert [t() for t in (left, *seen)] == [None] * (1 + len(seen))
    report.undo()


def test_undo_in_order() -> None:
    model, _ = holder("wrapper")
    before = {path: type(m) for path, m in model.named_modules()}
    first = dt.swap(model, only="RSTG")
    second = dt.swap(model)
    with pytest.raises(RuntimeError, match="later"):
        first.undo()
    second.undo()
    first.undo()
    first.undo()
    assert {path: type(m) for path, m in model.named_modules()} == before


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("variant", ["rsa VplusR VplusR", "wrapper"])
def test_the_example_runs_on_the_backend_that_is_set(variant: str, backend: str) -> None:
    model, x = holder(variant)
    with dt.backend(backend):
        report = dt.swap(model, example=x[:1, :, :2, :4, :3] if x.shape == CLIP else x[:1])
    assert report.whole is not None
    assert report.whole.round_off is None
    assert 0 < report.modules[0].error <= 1e-3  # type: ignore[operator]


# --- training -------------------------------------------------------------------------------------------------------


def train(model: Any, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(x + 0.1 * step) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@on_networks
def test_an_optimizer_built_before_trains_the_same(name: str, kind: str) -> None:
    """In float64: Adam makes whole steps of gradients that are but round-off, as those of biases before a norm."""
    model, x = network(name)
    model, x = model.double(), x.double()
    twin = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    optimizer, other = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](twin.parameters())
    train(model, optimizer, x, 1), train(twin, other, x, 1)  # momentum from before
    dt.swap(model)
    losses, expected = train(model, optimizer, x), train(twin, other, x)
    assert losses == pytest.approx(expected, rel=1e-5)
    moved = 0
    for key, value in twin.state_dict().items():
        assert (model.state_dict()[key] - value).abs().max() <= 1e-5, key
        moved += not value.equal(start[key])
    assert moved > len(start) / 2
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()


@on_networks
def test_three_steps_in_float32(name: str) -> None:
    model, x = network(name)
    twin = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    dt.swap(model)
    assert train(model, optimizer, x) == pytest.approx(train(twin, other, x), rel=1e-5)
    for key, value in twin.state_dict().items():
        assert (model.state_dict()[key] - value).abs().max() <= 1e-5, key


@on_few
def test_gradients_accumulate(variant: str) -> None:
    model, x = holder(variant)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one(x).square().sum().backward()
    kept = [p.grad for p in model.parameters()]
    dt.swap(model)
    for one in (model, twin):
        one(x + 1).square().sum().backward()
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    names = [name for name, _ in twin.named_parameters()]
    actual, expected = ([p.grad for p in one.parameters()] for one in (model, twin))
    assert_gradients_same(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)), 1e-3)


# --- places ---------------------------------------------------------------------------------------------------------


@on_few
def test_the_model_itself(variant: str) -> None:
    """Without a parent the object stays and becomes ours; others of its class do not."""
    make, shape = VARIANTS[variant]
    model, x = make().to(DEVICE).eval(), values(shape)  # in training, norms would note what they see
    kind, fellow = type(model), copy.deepcopy(model)
    before = snapshot(model)
    report = dt.swap(model)
    (row,) = report.modules
    assert named([row]) == [("", kind.__name__)]
    assert tuple(row.paths) == ("",)
    assert report.model is model
    assert is_ours(model)
    assert type(model) is not kind
    assert type(fellow) is kind
    assert objects(model) == {key: before[key] for key in objects(model)}
    assert_same(run(model, x), run(fellow, x))
    again = dt.swap(model)
    assert (again.modules, tuple(again.already)) == ((), ("",))
    model.zero_grad()
    report.undo()
    assert type(model) is kind
    assert_untouched(snapshot(model), before)
    assert_identical(model(x), fellow(x))


class Containers(nn.Module):
    """One module in a list, one in a dictionary, one as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ModuleList([rsa()])
        self.named = nn.ModuleDict({"a": rsa(kernel_type="R")})
        self.own = rsa(feat_type="R")

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.named["a"](self.listed[0](x)))


def test_every_kind_of_parent() -> None:
    model, x = Containers().to(DEVICE), values(CLIP)
    twin = copy.deepcopy(model)
    children = [name for name, _ in model.named_children()]
    report = dt.swap(model)
    assert [row.path for row in report.modules] == ["listed.0", "named.a", "own"]
    assert [name for name, _ in model.named_children()] == children
    assert all(is_ours(m) for m in (model.listed[0], model.named["a"], model.own))
    assert_same(run(model, x), run(twin, x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(rsa(), nn.ReLU())
        self.two = nn.Sequential(nn.Tanh(), self.one[0])
        self.three = rsa()
        self.three.H2 = self.one[0].H2  # a submodule shared by two modules
        self.three.P1 = self.one[0].P1

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))


def test_shared_modules_and_parameters() -> None:
    model, x = Shared().to(DEVICE), values(CLIP)
    twin = copy.deepcopy(model)
    before = objects(model)
    report = dt.swap(model)
    assert [(row.path, tuple(row.paths)) for row in report.modules] == [
        ("one.0", ("one.0", "two.1")),
        ("three", ("three",)),
    ]
    assert model.one[0] is model.two[1]
    assert model.three.P1 is model.one[0].P1
    assert model.three.H2 is model.one[0].H2
    assert objects(model) == before
    assert_same(run(model, x), run(twin, x))
    assert "one.0" in str(report)
    report.undo()
    assert model.one[0] is model.two[1]
    assert type(model.one[0]) is published.RSA


def test_wrappers_that_share_their_graph() -> None:
    one, two = graph(), graph()
    two.dynamic_graph = one.dynamic_graph
    parts = OrderedDict(one=one, split=published.SplitBT(nn.Identity(), MAPS[1]), two=two)
    model, x = nn.Sequential(parts).to(DEVICE), values(MAPS)
    twin = copy.deepcopy(model)
    report = dt.swap(model)
    for ours in (True, False):
        assert (model.one is one) == (model.two is two) == (not ours)
        assert model.one.dynamic_graph is model.two.dynamic_graph
        assert is_ours(model.one.dynamic_graph) == ours
        assert_same(run(model, x), run(twin, x))
        model.zero_grad()
        report.undo()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_part_that_is_held_elsewhere_too(first: bool) -> None:
    """As code for plotting holds the graph of a wrapper: there it sees what the wrapper uses."""
    wrapper, x = graph(), values(MAPS)
    parts = {"graph": wrapper.dynamic_graph, "net": nn.Sequential(wrapper)}
    model: Any = nn.ModuleDict(parts if first else dict(reversed(parts.items()))).to(DEVICE)
    report = dt.swap(model, keep_regions=True)
    assert is_ours(model["net"][0])
    assert model["graph"] is model["net"][0].dynamic_graph
    model["net"](x)
    assert model["graph"].kernel.shape == (4, 3, 3, 7, 7)
    report.undo()
    assert model["net"][0] is wrapper
    assert model["graph"] is wrapper.dynamic_graph
    assert type(model["graph"]) is published.DynamicGraph


def test_inner_first_then_all() -> None:
    """The recurrent graph alone, inside a wrapper that stays the authors'; later the wrapper around it."""
    model, x = network("tsn")
    twin = copy.deepcopy(model)
    original = snapshot(model)
    paths = [f"{path}.dynamic_graph.rstg" for path in SWAPPED["tsn"]]
    first = dt.swap(model, only="*.dynamic_graph.rstg")
    assert [row.path for row in first.modules] == paths
    for path in SWAPPED["tsn"]:
        assert type(model.get_submodule(path)) is published.DynamicGraphWrapper
        assert type(model.get_submodule(path).dynamic_graph) is published.DynamicGraph
        assert is_ours(model.get_submodule(path).dynamic_graph.rstg)
    expected = run(twin, x)
    assert_same(run(model, x), expected)
    model.zero_grad()
    second = dt.swap(model)
    assert [row.path for row in second.modules] == SWAPPED["tsn"]
    assert_same(run(model, x), expected)
    second.undo()
    assert type(model.get_submodule(SWAPPED["tsn"][0])) is published.DynamicGraphWrapper
    assert_same(run(model, x), expected)
    first.undo()
    model.zero_grad()
    assert_same(run(model, x), expected)
    for path in paths:
        assert type(model.get_submodule(path)) is published.RSTG
    assert [m[:3] for m in snapshot(model)["modules"]] == [m[:3] for m in original["modules"]]


@pytest.mark.parametrize("name", ["DynamicGraph", "RSTG"])
def test_parts_by_class(name: str) -> None:
    model, x = network("tsn")
    twin = copy.deepcopy(model)
    before = objects(model)
    report = dt.swap(model, only=name)
    assert [kind for _, kind in named(report.modules)] == [name, name]
    assert objects(model) == before
    assert_same(run(model, x), run(twin, x))


ONLY: dict[str, tuple[Any, list[str]]] = {
    "a path": ("layer2.0.conv2", ["layer2.0.conv2"]),
    "a prefix": ("layer1", ["layer1.0.conv2"]),
    "a pattern": ("layer*.conv2", ["layer1.0.conv2", "layer2.0.conv2"]),
    "a pattern of one": ("*1.0.conv?", ["layer1.0.conv2"]),
    "a class": ("RSA", ["layer1.0.conv2", "layer2.0.conv2"]),
    "a list": (["layer1", "layer2.0.conv2"], ["layer1.0.conv2", "layer2.0.conv2"]),
    "a tuple": (("layer2",), ["layer2.0.conv2"]),
}


@pytest.mark.parametrize("case", ONLY)
def test_only(case: str) -> None:
    only, paths = ONLY[case]
    model, x = network("rsa net")
    model.layer10 = published.Bottleneck(8, rsa(), 3)  # whose name starts as another's does
    twin = copy.deepcopy(model)
    expected = [*paths, *(["layer10.conv2"] if case in ("a pattern", "a class") else [])]
    report = dt.swap(model, only=only)
    assert sorted(row.path for row in report.modules) == sorted(expected)
    for path, module in model.named_modules():
        assert is_ours(module) == (path in expected), path
    assert_same(run(model, x), run(twin, x))


class Renamed(published.RSA):
    pass


def elsewhere() -> nn.Module:
    """The published code under another class that does not descend from it."""
    module = rsa()
    body = {name: vars(published.RSA)[name] for name in ("forward", "L2norm")}
    module.__class__ = type("RelationBlock", (nn.Module,), body)
    return module


class RenamedGraph(published.DynamicGraphWrapper):
    """A subclass whose constructor takes other arguments, and with a method more."""

    def __init__(self, side: int):
        super().__init__(published.dyregParams(offset_lstm_dim=4), H=side, W=side, node_dim=8, in_channels=8)
        self.side = side

    def area(self) -> int:
        return self.side**2


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: rsa(Renamed), CLIP), (elsewhere, CLIP), (lambda: awake(RenamedGraph(7)), MAPS)],
    ids=["subclass", "another class", "subclass of a wrapper"],
)
def test_other_classes_with_the_same_forward(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(make()).to(DEVICE), values(shape)
    name = type(model[0]).__name__
    twin = copy.deepcopy(model)
    report = dt.swap(model)
    assert [kind for _, kind in named(report.modules)] == [name]
    assert is_ours(model[0])
    assert_same(run(model, x), run(twin, x))


# --- bilinear transforms and non-local blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bat net", "image net"])
def test_dropout_draws_the_same(name: str) -> None:
    model, x = network(name, dropout=0.5)
    twin = copy.deepcopy(model)
    dt.swap(model)

    def drawing(one: nn.Module, seed: int) -> dict[str, Any]:
        def call(x: Tensor) -> Tensor:
            torch.manual_seed(seed)
            return one(x)

        return run(one.train(), x, call=call)

    outputs = []
    for seed in (5, 6):
        expected = drawing(twin, seed)
        assert_same(drawing(model, seed), expected)
        outputs.append(expected["out"])
    assert relative_error(*outputs) > 1e-2
    assert_same(run(model.eval(), x), run(twin.eval(), x))
    for key, value in twin.state_dict().items():
        assert_close(model.state_dict()[key], value, key, tolerance=1e-4)


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        ("transform", ("conv_p", "conv_q", "conv_t", "conv1", "conv2", "conv1.0")),
        ("transform that slides", ("conv_p", "conv_q")),
        ("block", ("batransform.conv_p", "batransform", "conv1", "conv2.1", "dropout")),
        ("block of images", ("batransform.conv_p", "batransform", "dropout")),
        ("nonlocal 3d", ("theta", "phi", "phi.0", "g", "g.1", "W", "W.1")),
        ("nonlocal of images", ("t", "p", "g", "z", "bn")),
    ],
)
def test_hooks_on_parts_see_the_same(variant: str, parts: tuple[str, ...]) -> None:
    model, x = holder(variant)
    twin = copy.deepcopy(model)
    logs = [[Log(one.inner.get_submodule(part), ("pre", "forward")) for part in parts] for one in (model, twin)]
    report = dt.swap(model)
    assert is_ours(model.inner)
    assert_same(run(model, x), run(twin, x))
    for part, actual, expected in zip(parts, *logs, strict=True):
        assert expected.seen, part
        assert_same_log(actual, expected)
    for log in logs[0]:
        log.seen.clear()
    report.undo()
    run(model, x)
    assert all(log.seen for log in logs[0])


@pytest.mark.parametrize("name", ["bat net", "image net"])
def test_transforms_alone(name: str) -> None:
    """Inside blocks that stay the authors'; later the blocks around them."""
    model, x = network(name)
    twin = copy.deepcopy(model)
    before = objects(model)
    first = dt.swap(model, only="BATransform")
    paths = [f"{path}.batransform" for path in SWAPPED[name][:-1]]
    assert named(first.modules) == [(path, "BATransform") for path in paths]
    assert not any(is_ours(model.get_submodule(path)) for path in SWAPPED[name])
    assert objects(model) == before
    assert_same(run(model, x), run(twin, x))
    second = dt.swap(model)
    assert [row.path for row in second.modules] == SWAPPED[name]
    assert_same(run(model, x), run(twin, x))
    second.undo()
    assert_same(run(model, x), run(twin, x))
    first.undo()
    assert_identical(model(x), twin(x))


@pytest.mark.parametrize("side", [15, 17, 9])
def test_sizes_that_the_published_transform_refuses(side: int) -> None:
    model, _ = holder("transform")
    x = values((1, 8, 5, side, side - 1))
    with pytest.raises((RuntimeError, AssertionError)):
        model(x)
    dt.swap(model)
    results = run(model, x)
    assert all(t is not None and t.isfinite().all() for t in results.values())


class RowsOfQ(published.BATransform):
    def weights(self, rows: Tensor, columns: Tensor, times: Tensor | None) -> list[Tensor | None]:
        p, _, t = super().weights(rows, columns, times)
        return [p, columns.softmax(-1), t]


class ColumnsOfP(published.BATransform):
    def weights(self, rows: Tensor, columns: Tensor, times: Tensor | None) -> list[Tensor | None]:
        _, q, t = super().weights(rows, columns, times)
        return [rows.softmax(-2), q, t]


class ColumnsOfT(published.BATransform):
    def weights(self, rows: Tensor, columns: Tensor, times: Tensor | None) -> list[Tensor | None]:
        p, q, _ = super().weights(rows, columns, times)
        return [p, q, None if times is None else times.softmax(-2)]


class NoWeightWhereNoWindowIs(published.BATransform):
    """The supplement's rule; it differs only where windows slide."""

    def assembled(self, windows: Tensor, cells: int) -> Tensor:
        logits = super().assembled(windows, cells)
        places = torch.arange(cells, device=windows.device)
        return logits.masked_fill((places[:, None] - places).abs() >= self.s, -torch.inf)


class RectifiedBlock(published.BATBlock):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class WithoutResidual(published.BATBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x


class SoftmaxOfImages(published_images.BATransform):
    def weights(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return rows.softmax(-1), columns.softmax(-2)


class RectifiedImageBlock(published_images.BATBlock):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Tempered(published.NONLocalBlock3D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.5 * x) + 0.5 * x


class RectifiedNonLocal(published.NONLocalBlock2D):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def with_softmax_over_queries() -> Any:
    module = block(published_images.NonLocal)
    module.softmax = nn.Softmax(dim=1)
    return module


def inside(kind: type[published.BATransform]) -> Any:
    """A block with a changed transform in it."""
    module = block()
    module.batransform.__class__ = kind
    return module


CHANGED: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "softmax of Q over rows": (lambda: block(RowsOfQ), VIDEO),
    "softmax of P over columns": (lambda: block(ColumnsOfP), VIDEO),
    "softmax of T over columns": (lambda: block(ColumnsOfT), VIDEO),
    "no weight where no window is": (lambda: block(NoWeightWhereNoWindowIs), (2, 8, 4, 8, 8)),
    "a relu more": (lambda: block(RectifiedBlock), VIDEO),
    "no residual": (lambda: block(WithoutResidual), VIDEO),
    "softmax of Q over rows, inside": (lambda: inside(RowsOfQ), VIDEO),
    "no weight where no window is, inside": (lambda: inside(NoWeightWhereNoWindowIs), (2, 8, 4, 8, 8)),
    "softmax of images": (lambda: block(SoftmaxOfImages), IMAGES),
    "a relu more on images": (lambda: block(RectifiedImageBlock), IMAGES),
    "another temperature": (lambda: block(Tempered), (2, 8, 3, 4, 5)),
    "a relu more behind attention": (lambda: block(RectifiedNonLocal), IMAGES),
    "softmax over queries": (with_softmax_over_queries, IMAGES),
}


def test_families_of_one_name_are_told_apart(monkeypatch):
    """A name is registered once, or once for each class that says which modules are its own."""
    monkeypatch.setattr(families, "_FAMILIES", {})
    first, second = (dt.compat.bat.BATBlock, dt.compat.bat.ImageBATBlock)

    def family(ours, fits=None):
        return families.Family("BATBlock", ours, (), fits=fits)

    families.register(family(first, fits=bool))
    for again in (family(first, fits=bool), family(second)):
        with pytest.raises(ValueError, match="'BATBlock' is registered already"):
            families.register(again)
    families.register(family(second, fits=bool))
    assert len(list(families.families())) == 2
    monkeypatch.setattr(families, "_FAMILIES", {})
    families.register(family(first))
    with pytest.raises(ValueError, match="registered already"):
        families.register(family(second, fits=bool))


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_block_is_left_with_a_reason(case: str) -> None:
    make, shape = CHANGED[case]
    model: Any = nn.ModuleDict({"inner": make(), "spare": block(published.NONLocalBlock3D)}).to(DEVICE)
    original = copy.deepcopy(model.inner)
    kind, x = type(model.inner), values(shape)
    report = dt.swap(model)
    inside = isinstance(getattr(original, "batransform", None), (RowsOfQ, NoWeightWhereNoWindowIs))
    sound = hasattr(original, "batransform") and not inside  # a transform that is as published, in another block
    assert [row.path for row in report.modules] == [*(["inner.batransform"] if sound else []), "spare"]
    assert type(model.inner) is kind
    (row,) = [row for row in report.left if row.path == "inner"]
    assert named([row]) == [("inner", kind.__name__)]
    assert row.reason.strip()
    assert "inner" in str(report)
    assert_same(run(model.inner, x), run(original, x))


SHARED: dict[str, tuple[Callable[[], Any], str, str, nn.Module]] = {
    "another activation": (lambda: block(published.BATransform), "conv1", "2", nn.Softplus()),
    "an activation that hardly differs": (lambda: block(published.BATransform), "conv2", "2", nn.LeakyReLU(1e-3)),
    "dropout of single values": (block, "", "dropout", nn.Dropout(0.5)),
    "a norm in groups": (lambda: block(published.NONLocalBlock3D), "W", "1", nn.GroupNorm(2, 8)),
    "an average where a maximum was": (lambda: block(published.NONLocalBlock3D), "phi", "0", nn.AvgPool3d((1, 2, 2))),
    "no norm": (lambda: block(published.BATBlock), "conv1", "1", nn.Identity()),
}


@pytest.mark.parametrize("case", SHARED)
def test_another_module_in_a_part_keeps_its_say(case: str) -> None:
    """Whether ours calls that part itself, or the block is left."""
    make, path, name, other = SHARED[case]
    inner = make()
    setattr(inner.get_submodule(path), name, other)
    model: Any = nn.ModuleDict({"inner": inner, "spare": rsa()}).to(DEVICE, torch.float64)
    twin, x = copy.deepcopy(model), values(VIDEO, dtype=torch.float64)
    dt.swap(model)

    def call(one: nn.Module) -> Callable[[Tensor], Tensor]:
        def drawing(x: Tensor) -> Tensor:
            torch.manual_seed(5)
            return one(x)

        return drawing

    for training in (True, False):
        model.train(training), twin.train(training)
        actual, expected = (run(one.inner, x, call=call(one.inner)) for one in (model, twin))
        assert_same(actual, expected, torch.float64)


# --- again, and back ------------------------------------------------------------------------------------------------


@on_networks
def test_twice_changes_nothing(name: str) -> None:
    model, _ = network(name)
    dt.swap(model, only=SWAPPED[name][0])
    second = dt.swap(model)
    assert [row.path for row in second.modules] == SWAPPED[name][1:]
    assert tuple(second.already) == tuple(SWAPPED[name][:1])
    with untouched(model):
        third = dt.swap(model)
    assert third.modules == ()
    assert tuple(third.already) == tuple(SWAPPED[name])
    assert third.model is model
    assert str(third)
    with untouched(model):
        third.undo()


@on_networks
def test_undo(name: str) -> None:
    model, x = network(name)
    twin = copy.deepcopy(model)
    before = snapshot(model)
    report = dt.swap(model)
    report.undo()
    assert_untouched(snapshot(model), before)
    assert_identical(model(x), twin(x))
    with untouched(model):
        report.undo()
    assert [row.path for row in dt.swap(model).modules] == SWAPPED[name]


@on_few
def test_undo_keeps_what_was_done_in_between(variant: str) -> None:
    model, x = holder(variant)
    original = model.inner
    twin = copy.deepcopy(model)
    old = Log(model.inner, ("forward",))
    report = dt.swap(model)
    state = {name: t + 0.01 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    for one in (model, twin):
        one.load_state_dict(state)
        one.double().eval()
        next(one.inner.parameters()).requires_grad_(False)
        one.inner.remark = "in between"
    old.handles[0].remove()
    logs = [Log(one.inner) for one in (model, twin)]
    report.undo()
    assert model.inner is original
    assert not any(m.training for m in model.modules())
    assert model.inner.remark == "in between"
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]
    actual, expected = run(model, x.double()), run(twin, x.double())
    assert_identical(actual["out"], expected["out"])
    assert_same_log(*logs, tolerance=1e-12)
    assert logs[0].modules == {original}
    assert not old.seen
    for handle in logs[0].handles:
        handle.remove()
    count = len(logs[0].seen)
    run(model, x.double())
    assert len(logs[0].seen) == count


@on_few
def test_loading_by_assignment(variant: str) -> None:
    """Other Parameter objects in the swapped module: it computes with them, and so does the original after undo."""
    model, x = holder(variant)
    twin = copy.deepcopy(model)
    report = dt.swap(model)
    state = {name: t.clone() + (0.01 if t.is_floating_point() else 0) for name, t in model.state_dict().items()}
    for one in (model, twin):
        one.load_state_dict({name: t.clone() for name, t in state.items()}, assign=True)
    assert_same(run(model, x), run(twin, x))
    report.undo()
    assert_identical(model(x), twin(x))


# --- with the rest of torch -----------------------------------------------------------------------------------------


@on_networks
def test_copies(name: str) -> None:
    """A copy from before is swapped by itself; one from after computes by itself."""
    model, x = network(name)
    early = copy.deepcopy(model)
    with untouched(model):
        dt.swap(early)
    late = copy.deepcopy(early)
    assert not {id(t) for t in late.parameters()} & {id(t) for t in early.parameters()}
    expected = run(model, x)
    assert_same(run(early, x), expected)
    assert_same(run(late, x), expected)
    with torch.no_grad():
        for p in late.parameters():
            p.zero_()
    assert_same(run(early, x), expected)


@on_networks
@pytest.mark.parametrize("how", ["pickle", "save"])
def test_saved_whole(name: str, how: str) -> None:
    model, x = network(name)
    dt.swap(model)
    model(x)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert all(is_ours(loaded.get_submodule(path)) for path in SWAPPED[name])
    assert_all_close(run(loaded.eval(), x), run(model.eval(), x))


def test_the_swapped_model_itself_is_saved_whole() -> None:
    model, x = rsa().to(DEVICE), values(CLIP)
    dt.swap(model)
    assert_all_close(run(pickle.loads(pickle.dumps(model)), x), run(model, x))


def test_compiled_after_the_swap() -> None:
    model, x = holder("rsa VplusR VplusR")
    expected = run(copy.deepcopy(model), x)
    dt.swap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(run(model, x, call=lambda x: compiled(x)), expected)


def test_another_thread_that_draws_random_numbers() -> None:
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(10)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(3):
            model, _ = holder("rsa V V")
            dt.swap(model)
            assert is_ours(model.inner)
    finally:
        stop.set()
        thread.join()


def test_two_threads_swap_two_models() -> None:
    pairs = [network("tsn"), network("rsa net")]
    expected = [run(copy.deepcopy(model), x) for model, x in pairs]

    def work(i: int) -> dict[str, Any]:
        model, x = pairs[i]
        dt.swap(model, example=x).undo()
        dt.swap(model)
        return run(model, x)

    found = in_parallel(*[lambda i=i: work(i) for i in range(len(pairs))])
    for actual, wanted in zip(found, expected, strict=True):
        assert_same(actual, wanted)


RANKS = 2


def ddp_rank(rank: int, folder: str) -> None:
    """What each process of the test below runs: train the model as it is, swapped inside DDP, and swapped before."""
    from datetime import timedelta

    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    meet = Path(folder, "meet").as_uri()
    distributed.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=timedelta(seconds=PATIENCE)
    )
    seen: dict[str, Any] = {}
    for name, how in product(SWAPPED, ("as it is", "inside", "before")):
        torch.manual_seed(0)
        model, x = network(name)
        if how == "before":
            dt.swap(model)
        parallel = DistributedDataParallel(model)
        optimizer = OPTIMIZERS["sgd"](parallel.parameters())
        if how == "inside":
            report = dt.swap(parallel)
            assert [row.path for row in report.modules] == [f"module.{path}" for path in SWAPPED[name]]
        assert is_ours(model.get_submodule(SWAPPED[name][0])) == (how != "as it is")
        losses = train(parallel, optimizer, x + rank)
        seen[f"{name}, {how}"] = {"losses": losses, "state": model.state_dict()}
    torch.save(seen, Path(folder, f"rank{rank}"))
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cpu", reason="compares processes on the CPU")
def test_data_parallel(tmp_path: Path) -> None:
    code = "import sys, test_swap; test_swap.ddp_rank(int(sys.argv[1]), sys.argv[2])"

    def start(rank: int) -> None:
        python(code, rank, tmp_path, **GLOO)

    in_parallel(*[lambda rank=rank: start(rank) for rank in range(RANKS)])
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)]
    for name in SWAPPED:
        assert ranks[0][f"{name}, as it is"]["losses"] != ranks[1][f"{name}, as it is"]["losses"]
        for seen, how in product(ranks, ("inside", "before")):
            expected, found = seen[f"{name}, as it is"], seen[f"{name}, {how}"]
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            for key, value in expected["state"].items():
                assert (found["state"][key] - value).abs().max() <= 1e-5, key
        for key, value in ranks[0][f"{name}, inside"]["state"].items():
            if "running" not in key:  # statistics are each rank's own
                assert_identical(ranks[1][f"{name}, inside"]["state"][key], value, key)
