"""Layers come back from disk and from the Hub as they were; what would not is refused, and no save is ever lost."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from support import PATIENCE, assert_identical, awake
from test_errors import refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import dyreg_triton as dt
from dyreg_triton.pretrained import CONFIG, SCHEMA, WEIGHTS, Pretrained, files

DyReG, RSA, RSTG = dt.layers.DyReG, dt.layers.RSA, dt.layers.RSTG
published = dt.compat.dyreg
FILES = {CONFIG, WEIGHTS}
SMALL: dict[str, Any] = {"grid": (2, 2), "region_channels": 4, "iterations": 1}
PARAMS: dict[str, Any] = {"offset_lstm_dim": 4, "combine_by_sum": False, "update_layers": 1}
MAP: dict[str, Any] = {"H": 5, "W": 6, "h": 2, "w": 2, "iterations": 1}


class Params:
    """The published code's way to give options."""

    offset_lstm_dim = 4
    combine_by_sum = False

    def __init__(self) -> None:
        self.update_layers = 1
        self.unrelated = lambda: None


def dyreg(channels: int = 4, size: tuple[int, int] = (5, 6), **options: Any) -> DyReG:
    return DyReG(channels, size, **{**SMALL, **options})


def rsa(**options: Any) -> RSA:
    return RSA(4, **{"num_queries": 2, "kernel_size": (1, 3, 3), **options})


CLIP, MAPS, NODES, PUBLISHED_NODES = (2, 4, 2, 3, 4), (2, 3, 4, 5, 6), (2, 3, 5, 4), (2, 3, 4, 9)
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "RSTG": (lambda: RSTG(4), NODES),
    "RSTG published": (lambda: RSTG(4, recurrence="lstm", combine="sum", update_layers=0, order="time-space"), NODES),
    "RSTG mean": (lambda: RSTG(channels=4, aggregation="mean", send_layers=1), NODES),
    "RSA": (rsa, CLIP),
    "RSA one side": (lambda: RSA(4, 6, num_queries=2, kernel_size=3, stride=2), CLIP),
    "RSA V": (lambda: rsa(kernel="V", context="V", basic_projection=False), CLIP),
    "RSA R": (lambda: rsa(kernel="R", context="R", key_channels=6, correlation_groups=3, stride=[1, 2, 2]), CLIP),
    "DyReG": (dyreg, MAPS),
    **{f"DyReG {kind}": (functools.partial(dyreg, regions=kind), MAPS) for kind in dt.layers.variants.REGIONS[1:]},
    "DyReG pooled": (lambda: dyreg(generator="pooled", node_channels=6, profile="gaussian", temperature=0.3), MAPS),
    "DyReG published": (lambda: dyreg(**dt.layers.dyreg.PUBLISHED, project=True, init="grid"), MAPS),
    "DyReG resized": (lambda: dyreg(train_size=(4, 4), size_ratio=2.5, connection="serial"), MAPS),
    "ops.rstg.RSTG": (lambda: dt.compat.build("ops.rstg.RSTG", {"node_dim": 4, "params": PARAMS}), PUBLISHED_NODES),
    "ops.rstg.RSTG bare": (lambda: published.RSTG(None, 7, 4, rnn_type="GRU"), PUBLISHED_NODES),
    "ops.dyreg.DynamicGraph": (lambda: published.DynamicGraph(PARAMS, 4, node_dim=4, **MAP), MAPS),
    "ops.dyreg.DynamicGraph small": (
        lambda: published.DynamicGraph({**PARAMS, "offset_generator": "small"}, 4, node_dim=3, project_i3d=True, **MAP),
        MAPS,
    ),
    "ops.dyreg.DynamicGraphWrapper": (
        lambda: published.DynamicGraphWrapper(Params(), in_channels=4, node_dim=4, keep_regions=True, **MAP),
        MAPS,
    ),
    "ops.rsa.RSA": (lambda: dt.compat.rsa.RSA(4, 6, 2, 4, kernel_type="VplusR", feat_type="R"), CLIP),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def made(name: str) -> Any:
    return awake(LAYERS[name][0]())


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in layer.state_dict().items()}


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    states = actual.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, t in states[1].items():
        assert_identical(states[0][name], t, name)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def change(folder: Path, **keys: Any) -> None:
    """Edit the config; a key of None is removed."""
    config = {**config_of(folder), **keys}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def returned(layer: Any, folder: Path, **options: Any) -> Any:
    layer.save_pretrained(folder)
    return type(layer).from_pretrained(folder, **options)


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """The same type, tensors and outputs, bit for bit, in each dtype; also of what was loaded."""
    for dtype in DTYPES:
        layer, x = made(name).to(dtype), torch.randn(LAYERS[name][1]).to(dtype)
        expected = layer.eval()(x)  # first, for what a forward leaves on the layer must not matter
        again = returned(layer, tmp_path / str(dtype))
        assert type(again) is type(layer)
        assert not again.training
        assert_same_state(again, layer)
        assert_identical(again(x), expected)
        assert again.extra_repr() == layer.extra_repr()
        assert str(again) == str(layer)
        texts = {(tmp_path / str(dtype) / CONFIG).read_text()}
        again.save_pretrained(tmp_path / "again")
        texts.add((tmp_path / "again" / CONFIG).read_text())
        assert len(texts) == 1, "the second config is not the first"
        assert {path.name for path in tmp_path.joinpath("again").iterdir()} == FILES


def test_gradients_reach_what_came_back(tmp_path: Path) -> None:
    """Recurrences hold their weights a second time; a load has to replace both."""
    layer = made("RSTG")
    again, nodes = returned(layer, tmp_path), torch.randn(NODES)
    for each in (layer, again):
        each(nodes).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), again.parameters(), strict=True):
        assert_identical(q.grad, p.grad, name)
        assert q.requires_grad
        assert q.is_leaf
    with torch.no_grad():
        again.internal_lstm.weight_ih_l0.zero_()
    assert not torch.equal(again(nodes), layer(nodes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_narrow_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    layer = rsa().to(dtype)
    assert_same_state(returned(layer, tmp_path), layer)


def test_mixed_dtypes_and_every_bit(tmp_path: Path) -> None:
    """NaN with its payload, -0, subnormals and infinities; a dtype for each tensor; integer buffers stay so."""
    layer = made("ops.dyreg.DynamicGraph").half()
    layer.rstg.double()
    with torch.no_grad():
        bits = torch.tensor([0x7F800001, -0x80000000, 1, 0x7F800000], dtype=torch.int32)
        layer.offset_alpha = nn.Parameter(bits.view(torch.float32))
    again = returned(layer, tmp_path)
    assert_same_state(again, layer)
    assert {t.dtype for t in again.state_dict().values()} == {torch.float16, torch.float64, torch.float32, torch.int64}


def test_strides_do_not_matter(tmp_path: Path) -> None:
    layer = rsa()
    layer.projection.weight = nn.Parameter(torch.randn(4, 8, 1, 1, 1).transpose(0, 1))
    layer.P1 = nn.Parameter(torch.randn(1, 2, 1).expand(1, 2, 2))
    layer.H2.weight.data = torch.randn(4, 1, 1, 3, 3)[::2]
    again = returned(layer, tmp_path)
    assert_same_state(again, layer)
    assert all(p.is_contiguous() for p in again.parameters())
    with torch.no_grad():
        again.P1[0, 0, 0] += 1  # a tensor of its own for each value
    assert again.P1[0, 0, 0] != again.P1[0, 0, 1]


def test_shared_parameters_stay_shared(tmp_path: Path) -> None:
    layer = RSTG(4)
    layer.att_k.weight = layer.update_mlp[2].weight = layer.att_q.weight
    layer.att_k.bias.data = layer.att_q.bias.data  # the same memory, but two parameters
    again = returned(layer, tmp_path)
    assert again.att_k.weight is again.att_q.weight
    assert again.update_mlp[2].weight is again.att_q.weight
    assert again.att_k.bias is not again.att_q.bias
    assert isinstance(again.att_q.weight, nn.Parameter)
    assert_same_state(again, layer)
    assert len(list(again.parameters())) == len(list(layer.parameters()))
    assert config_of(tmp_path)["shared"] == {
        "att_k.weight": "att_q.weight",
        "update_mlp.2.weight": "att_q.weight",
    }
    assert_same_state(RSTG.from_pretrained(tmp_path, dtype=torch.float64), copy.deepcopy(layer).double())


def test_shared_submodules_and_buffers(tmp_path: Path) -> None:
    layer = RSTG(4)
    layer.att_k = layer.att_q
    again = returned(layer, tmp_path)
    assert again.att_k.weight is again.att_q.weight
    graph = made("ops.dyreg.DynamicGraph")
    graph.pw_buf = graph.ph_buf
    again = returned(graph, tmp_path)
    assert again.pw_buf is again.ph_buf
    assert "pw_buf" in dict(again.named_buffers(remove_duplicate=False))


def test_swapped_in_parameters(tmp_path: Path) -> None:
    """Other objects and other dtypes under the same names are the layer's state as any."""
    layer = rsa().requires_grad_(False)
    layer.H1.weight = nn.Parameter(torch.randn_like(layer.H1.weight).double(), requires_grad=False)
    layer.G = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1), bias=False)
    assert_same_state(returned(layer, tmp_path), layer)


def test_device_and_dtype(tmp_path: Path, device: torch.device) -> None:
    layer = made("ops.dyreg.DynamicGraph").to(device)
    assert_same_state(returned(layer, tmp_path), layer.cpu())
    again = published.DynamicGraph.from_pretrained(str(tmp_path), device=str(device), dtype=torch.bfloat16)
    assert_same_state(again, layer.bfloat16().to(device))
    assert again.arange_h_buf.dtype == torch.int64
    assert {t.device.type for t in again.state_dict().values()} == {device.type}


@pytest.mark.parametrize("kept", [lambda layer: layer.cpu(), copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_can_be_saved(kept: Callable, tmp_path: Path) -> None:
    for name in ("DyReG pooled", "ops.dyreg.DynamicGraphWrapper", "ops.rsa.RSA"):
        layer = made(name)
        again = returned(kept(layer), tmp_path)
        assert_same_state(again, layer)
        assert type(again) is type(layer)


def test_compiled_wrapped_and_used(tmp_path: Path) -> None:
    """Neither torch.compile, nor hooks, nor what a forward leaves behind, nor a backward, is in the way."""
    layer, x = made("ops.dyreg.DynamicGraphWrapper"), torch.randn(MAPS, requires_grad=True)
    layer.register_forward_hook(lambda module, args, y: None)
    layer.register_full_backward_hook(lambda module, grads, gradients: None)
    layer(x).sum().backward()
    assert hasattr(layer.dynamic_graph, "kernel")
    assert_same_state(returned(layer, tmp_path), layer)
    torch.compile(layer, backend="eager").save_pretrained(tmp_path / "compiled")
    assert config_of(tmp_path / "compiled") == config_of(tmp_path)
    layer.compile(backend="eager")
    assert_same_state(returned(layer, tmp_path), layer)
    inner = returned(layer.dynamic_graph, tmp_path / "inner")
    assert_same_state(inner, layer.dynamic_graph)


def test_loading_leaves_no_trace(tmp_path: Path) -> None:
    """Neither random numbers nor the default device enter a save or a load."""
    layer, before = rsa(), torch.get_rng_state()
    again = returned(layer, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    own = OWN["constructor"]()
    with torch.device("meta"):
        assert_same_state(returned(layer, tmp_path), again)
        assert returned(own, tmp_path / "own").mask.device.type == "cpu"
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    (tmp_path / WEIGHTS).write_bytes(bytes(len(data)))  # not a map of the file
    assert_same_state(again, layer)


# --- constructors ---------------------------------------------------------------------------------------------------


def test_signatures_and_documentation_are_those_of_the_constructor() -> None:
    assert list(inspect.signature(RSTG).parameters)[:3] == ["channels", "iterations", "recurrence"]
    assert list(inspect.signature(DyReG.__init__).parameters) == [
        *("self", "in_channels", "size", "connection", "return_regions", "options")
    ]
    assert inspect.signature(published.RSTG).parameters["rnn_type"].default == "LSTM"
    for cls in (RSA, RSTG, DyReG, published.RSTG, published.DynamicGraph, published.DynamicGraphWrapper):
        assert cls.__init__.__name__ == "__init__"
        assert cls.__init__.__qualname__ == f"{cls.__name__}.__init__"
        assert "def __init__(\n        self," in inspect.getsource(cls.__init__)
        assert cls.__doc__ != Pretrained.__doc__
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'in_channels'"):
        RSA()


def test_arguments_are_readable_and_in_order(tmp_path: Path) -> None:
    layer = RSA(4, kernel_size=torch.Size((1, 3, 3)), num_queries=torch.tensor(2).numpy()[()])
    layer.save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    config = json.loads(text)
    assert list(config) == ["arguments", "class", "format", "schema", "version", "weights"]
    assert config["arguments"] == {"in_channels": 4, "kernel_size": [1, 3, 3], "num_queries": 2}
    assert config["class"] == "dyreg_triton.layers.RSA"
    assert (config["format"], config["schema"], config["version"]) == ("dyreg_triton", 1, dt.__version__)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert text.isascii()


@pytest.mark.parametrize("params", [Params(), PARAMS, {**PARAMS, "offset_lstm_dim": torch.tensor(4).numpy()[()]}])
def test_params_are_kept_as_what_was_understood(params: object, tmp_path: Path) -> None:
    layer = published.RSTG(params, node_dim=4)
    returned(layer, tmp_path)
    assert config_of(tmp_path)["arguments"] == {
        "node_dim": 4,
        "params": {
            "aggregation_type": "dot",
            "combine_by_sum": False,
            "dynamic_regions": "dyreg",
            "full_res": False,
            "init_regions": "center",
            "offset_generator": "big",
            "offset_lstm_dim": 4,
            "rstg_combine": "plus",
            "send_layers": 1,
            "update_layers": 1,
        },
    }


class Wider(RSA):
    """A user's own layer, with a constructor of its own."""

    def __init__(self, width: int, *, names: tuple[str, ...] = (), table: dict[str, Any] | None = None):
        super().__init__(2 * width, num_queries=2, kernel_size=(1, 3, 3))
        self.names, self.table = names, table
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.ones(width, width).tril(), persistent=False)
        self.tail = nn.BatchNorm1d(width)


class Inherited(RSA):
    """Without a constructor of its own."""


class Passing(RSA):
    def __init__(self, *args: Any, extra: float = 0.5, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.extra = extra


class ByPlace(RSTG):
    def __init__(self, channels: int, steps: int, /, **kwargs: Any):
        super().__init__(channels, iterations=steps, **kwargs)


class Sized:
    """A base class beside ours, whose constructor comes first."""

    def __init__(self, size: int):
        super().__init__(size + 1, num_queries=1, kernel_size=1)  # type: ignore[call-arg]


class Beside(Sized, RSA):
    pass


class Odd(RSTG):
    """Takes what JSON cannot hold."""

    def __init__(self, channels: int = 4, odd: object = None):
        super().__init__(channels)


OWN: dict[str, Callable[[], Any]] = {
    "constructor": lambda: Wider(2, names=("a", "b"), table={"x": [1, 2.5, None, True]}),
    "inherited": lambda: Inherited(4, num_queries=2, kernel_size=1),
    "passing": lambda: Passing(4, 6, num_queries=3, kernel_size=1, extra=0.25),
    "passing by name": lambda: Passing(in_channels=4, kernel_size=1, num_queries=2),
    "by place": lambda: ByPlace(4, 2, recurrence="lstm"),
}


@pytest.mark.parametrize("name", OWN)
def test_classes_of_a_user(name: str, tmp_path: Path) -> None:
    layer = OWN[name]()
    with torch.no_grad():
        for t in layer.state_dict().values():
            t.add_(1)
    again = returned(copy.deepcopy(layer), tmp_path)
    assert type(again) is type(layer)
    assert_same_state(again, layer)
    assert config_of(tmp_path)["class"] == type(layer).__name__
    assert str(again) == str(layer)
    assert returned(again, tmp_path / "2").__dict__.get("extra") == layer.__dict__.get("extra")
    if name == "passing":
        assert config_of(tmp_path)["arguments"] == {"*": [4, 6], "extra": 0.25, "kernel_size": 1, "num_queries": 3}


def test_a_layer_made_anew_in_place(tmp_path: Path) -> None:
    """The last constructor call counts."""
    layer = RSTG(4)
    layer.__init__(6, iterations=2)
    assert returned(layer, tmp_path).channels == 6


class Counting(RSTG):
    """Writes into what it is given."""

    def __init__(self, table: dict[str, int]):
        table["made"] = table.get("made", 0) + 1
        super().__init__(4)


def test_saving_changes_nothing_of_the_arguments(tmp_path: Path) -> None:
    layer = Counting({})
    for _ in range(2):
        layer.save_pretrained(tmp_path)
        assert config_of(tmp_path)["arguments"] == {"table": {"made": 1}}


# --- what would not come back ---------------------------------------------------------------------------------------


def altered(change: Callable[[Any], Any], make: Callable[[], Any] = rsa) -> Any:
    layer = make()
    change(layer)
    return layer


def without_constructor() -> RSA:
    layer = RSA.__new__(RSA)
    nn.Module.__init__(layer)
    return layer


def tensor_subclass(layer: RSA) -> None:
    class Own(Tensor):
        pass

    layer.P1 = nn.Parameter(layer.P1.detach().as_subclass(Own))


def to_buffer(layer: RSA) -> None:
    value = layer.P1.detach()
    del layer.P1
    layer.register_buffer("P1", value)


class Extra(RSTG):
    def get_extra_state(self) -> Any:
        return {"step": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class Step(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "parametrized": (
        lambda: altered(lambda m: parametrizations.weight_norm(m.H2)),
        ("H2 is parametrized", "remove_parametrizations"),
    ),
    "parametrized itself": (
        lambda: altered(lambda m: parametrize.register_parametrization(m, "P1", Step())),
        ("the layer is parametrized",),
    ),
    "pruned": (
        lambda: altered(lambda m: prune.identity(m.H2, "weight")),
        ("missing are H2.weight;", "unexpected are H2.weight_mask, H2.weight_orig"),
    ),
    "meta": (lambda: rsa().to("meta"), ("P1 is (1, 2, 2) float32 meta", "holds data")),
    "extra parameter": (
        lambda: altered(lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1)))),
        ("unexpected are more;",),
    ),
    "lost parameter": (lambda: altered(lambda m: delattr(m, "I")), ("missing are I;",)),
    "other shape": (
        lambda: altered(lambda m: setattr(m, "P1", nn.Parameter(torch.ones(1, 3, 2)))),
        ("misfits are P1 (1, 3, 2) float32 cpu for (1, 2, 2) float32 cpu;",),
    ),
    "complex": (
        lambda: altered(lambda m: setattr(m, "I", nn.Parameter(m.I.detach().to(torch.complex64)))),
        ("misfits are I (1, 2, 2) complex64 cpu for (1, 2, 2) float32 cpu;",),
    ),
    "two faults": (
        lambda: altered(lambda m: [delattr(m, "I"), m.register_buffer("more", torch.ones(1))]),
        ("missing are I; unexpected are more;",),
    ),
    "buffer for parameter": (lambda: altered(to_buffer), ("P1 is missing, or of another kind", "'a parameter'")),
    "other submodule": (
        lambda: altered(lambda m: m.send_mlp.__setitem__(1, nn.GELU()), lambda: RSTG(4)),
        ("submodule 'send_mlp.1' is GELU;", "ReLU"),
    ),
    "more submodules": (
        lambda: altered(lambda m: m.add_module("adapter", nn.ReLU())),
        ("submodule 'adapter' is ReLU;", "nothing"),
    ),
    "fewer submodules": (
        lambda: altered(lambda m: m.send_mlp.pop(3), lambda: RSTG(4)),
        ("submodule 'send_mlp.3' is nothing;", "ReLU"),
    ),
    "other options of a submodule": (
        lambda: altered(lambda m: setattr(m, "H2", nn.Conv3d(1, 2, (1, 3, 3), bias=False))),
        ("H2.padding is [0, 0, 0]", "[0, 1, 1]"),
    ),
    "option set later": (
        lambda: altered(lambda m: setattr(m.dynamic_graph, "temperature", 2.0), dyreg),
        ("dynamic_graph.temperature is 2.0", "1.0"),
    ),
    "option of its own set later": (
        lambda: altered(lambda m: setattr(m, "return_regions", True), dyreg),
        ("return_regions is True", "False"),
    ),
    "other buffer that is not kept": (
        lambda: altered(lambda m: m.mask.fill_(2), OWN["constructor"]),
        ("mask is 'a buffer, sha256:",),
    ),
    "buffer that is not kept in another dtype": (
        lambda: OWN["constructor"]().half(),
        ("mask is 'a buffer, sha256:",),
    ),
    "extra state": (lambda: Extra(4), ("_extra_state is a dict",)),
    "function": (lambda: Odd(odd=len), ("argument 'odd' of Odd is or holds builtin_function_or_method",)),
    "function within": (lambda: Odd(odd={"a": [1, len]}), ("'odd'", "builtin_function_or_method")),
    "mapping from numbers": (lambda: Odd(odd={1: 2}), ("'odd'", "dict")),
    "infinity": (lambda: Odd(odd=float("inf")), ("'odd'", "inf", "finite")),
    "tensor": (lambda: Odd(odd=torch.ones(2)), ("'odd'", "Tensor")),
    "subclass": (lambda: altered(tensor_subclass), ("P1 is a Own", "no subclass")),
    "sparse": (
        lambda: altered(lambda m: setattr(m, "P1", nn.Parameter(m.P1.detach().to_sparse()))),
        ("P1 is (1, 2, 2) float32 cpu torch.sparse_coo", "dense"),
    ),
    "another constructor": (lambda: Beside(3), ("Beside cannot be made from its arguments", "unexpected keyword")),
    "no constructor": (without_constructor, ("without its constructor",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_come_back_is_refused(name: str, tmp_path: Path) -> None:
    """Before anything is written; an earlier save stays."""
    make, parts = REFUSED[name]
    layer = make()
    with refused((ValueError, TypeError), f"{type(layer).__name__}.save_pretrained: ", *parts):
        layer.save_pretrained(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())


class InBytes:
    def __fspath__(self) -> bytes:
        return b"x"


def test_refused_layers_still_work() -> None:
    for name in ("function", "tensor", "infinity"):
        layer = pickle.loads(pickle.dumps(copy.deepcopy(REFUSED[name][0]())))
        assert layer(torch.randn(1, 2, 3, 4)).shape == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda f: rsa().save_pretrained(3), TypeError, ("RSA.save_pretrained: directory is 3", "a path")),
        (lambda f: rsa().save_pretrained(b"x"), TypeError, ("directory is b'x'",)),
        (lambda f: rsa().save_pretrained(InBytes()), TypeError, ("directory is <", "a path")),
        (lambda f: rsa().save_pretrained(""), ValueError, ("directory is ''",)),
        (lambda f: rsa().save_pretrained(f, push_to_hub=1), ValueError, ("push_to_hub is 1", "True and False")),
        (lambda f: rsa().save_pretrained(f, repo_id="a/b"), TypeError, ("push_to_hub is False with ['repo_id']",)),
        (lambda f: rsa().save_pretrained(f, max_shard_size=1), TypeError, ("with ['max_shard_size']",)),
        (lambda f: rsa().save_pretrained(f, push_to_hub=True, repo_id="a//b"), ValueError, ("a//b",)),
        (lambda f: RSA.from_pretrained(None), TypeError, ("directory_or_repo_id is None", "a path")),
        (lambda f: RSA.from_pretrained(f, device="nowhere"), ValueError, ("device is 'nowhere'",)),
        (lambda f: RSA.from_pretrained(f, device=0.5), TypeError, ("device is 0.5",)),
        (lambda f: RSA.from_pretrained(f, device="meta"), ValueError, ("device is 'meta'", "holds data")),
        (lambda f: RSA.from_pretrained(f, dtype=torch.int8), ValueError, ("dtype is torch.int8", "torch.float16")),
        (lambda f: RSA.from_pretrained(f, dtype="half"), ValueError, ("dtype is 'half'",)),
        (lambda f: RSA.from_pretrained(f, revision="v1"), ValueError, ("revision is 'v1' with the folder", "None")),
        (lambda f: RSA.from_pretrained(f / "no"), FileNotFoundError, ("no' is no folder", "user/name")),
        (lambda f: RSA.from_pretrained("./no/such"), FileNotFoundError, ("'./no/such' is no folder",)),
        (lambda f: RSA.from_pretrained(f), FileNotFoundError, (CONFIG, "is missing", WEIGHTS)),
    ],
)
def test_bad_calls(call: Callable, error: type[Exception], parts: tuple[str, ...], tmp_path: Path) -> None:
    with refused(error, *parts):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        rsa().save_pretrained(tmp_path / "file")
    with refused(FileNotFoundError, "file' is no folder"):
        RSA.from_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- files that are not as they were written ------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rsa().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with refused(FileNotFoundError, "RSA.from_pretrained: ", str(saved / name), "is missing"):
        RSA.from_pretrained(saved)


def deep(_: bytes) -> bytes:
    return b"[" * 100_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[:-3],
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\xfe\xfa" + text,
        lambda text: text.replace(b"{", b"(", 1),
        deep,
        lambda text: b"[]",
        lambda text: b"null",
        lambda text: b'{"model_type": "bert", "hidden_size": 768}',
        lambda text: text.replace(b'"dyreg_triton",', b'"else",'),
    ],
)
def test_a_config_that_is_none(damage: Callable[[bytes], bytes], saved: Path) -> None:
    (saved / CONFIG).write_bytes(damage((saved / CONFIG).read_bytes()))
    with refused(ValueError, "RSA.from_pretrained: ", str(saved / CONFIG)):
        RSA.from_pretrained(saved)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"schema": None}, ("schema in", "is None", "from 1 to")),
        ({"schema": True}, ("schema in", "is True")),
        ({"schema": "1"}, ("schema in", "is '1'")),
        ({"schema": 0}, ("schema in", "is 0")),
        ({"version": None}, ("version in", "is missing", "a str")),
        ({"class": 3}, ("class in", "is 3", "a str")),
        ({"weights": None}, ("weights in", "is missing")),
        ({"arguments": [4]}, ("arguments in", "is [4]", "a dict")),
        ({"shared": {"P1": ["I"]}}, ("shared in", "names of tensors")),
        ({"class": "dyreg_triton.layers.RSTG"}, ("'dyreg_triton.layers.RSTG'", "here is 'dyreg_triton.layers.RSA'")),
        ({"class": "os.system"}, ("of class 'os.system'",)),
        ({"arguments": {}}, ("the arguments in", "missing 1 required positional argument: 'in_channels'")),
        ({"arguments": {"in_channels": 4, "wide": 1, "num_queries": 2}}, ("argument 'wide'", repr(dt.__version__))),
        ({"arguments": {"in_channels": 4, "num_queries": 3}}, ("RSA: out_channels is 4", "multiple of num_queries")),
        ({"arguments": {"*": 4}}, ("the arguments in",)),
        (
            {"arguments": {"in_channels": 4, "num_queries": 2, "kernel": "V", "kernel_size": 1}},
            ("does not fit", "unexpected are H1.weight", "misfits are G.weight (2, 1, 1, 3, 3)", "H2.weight", "proj"),
        ),
        (
            {
                "arguments": {
                    "in_channels": 4,
                    "num_queries": 2,
                    "kernel_size": [1, 3, 3],
                    "kernel": "V",
                    "context": "V",
                }
            },
            ("unexpected are G.weight, H1.weight, I;",),
        ),
        (
            {"arguments": {"in_channels": 6, "num_queries": 2, "kernel_size": [1, 3, 3]}},
            ("misfits are G.weight", "H1.weight", "H2.weight", "I (1, 2, 2) float32 cpu for (1, 3, 3)", "P1", "proj"),
        ),
    ],
)
def test_a_config_that_was_changed(keys: dict, parts: tuple[str, ...], saved: Path) -> None:
    change(saved, **keys)
    with refused(ValueError, "RSA.from_pretrained: ", CONFIG, *parts):
        RSA.from_pretrained(saved)


def test_missing_tensors_are_listed(saved: Path) -> None:
    rsa(kernel="V", context="V").save_pretrained(saved / "less")
    change(saved / "less", arguments=config_of(saved)["arguments"])
    with refused(ValueError, "missing are G.weight, H1.weight, I;", "misfits are projection.weight"):
        RSA.from_pretrained(saved / "less")


def test_names_that_were_shared(tmp_path: Path) -> None:
    """A tensor that is there counts more than the note that it is another; one that is nowhere is missing."""
    layer = RSTG(4)
    layer.save_pretrained(tmp_path)
    change(tmp_path, shared={"att_k.weight": "att_q.weight"})
    assert_same_state(RSTG.from_pretrained(tmp_path), layer)
    change(tmp_path, shared={"more": "att_q.weight", "others": "nowhere"})
    with refused(ValueError, "does not fit", "unexpected are more"):
        RSTG.from_pretrained(tmp_path)
    layer.att_k.weight = layer.att_q.weight
    layer.save_pretrained(tmp_path)
    change(tmp_path, shared={"att_k.weight": "nowhere"})
    with refused(ValueError, "does not fit", "missing are att_k.weight"):
        RSTG.from_pretrained(tmp_path)


def test_options_that_a_layer_does_not_know(tmp_path: Path) -> None:
    dyreg().save_pretrained(tmp_path)
    change(tmp_path, arguments={**config_of(tmp_path)["arguments"], "novel": 1})
    with refused(ValueError, "DyReG: unknown arguments ['novel']", CONFIG):
        DyReG.from_pretrained(tmp_path)


def test_an_edit_takes_effect(tmp_path: Path) -> None:
    """What does not concern the tensors may be changed by hand; keys of other tools are left alone."""
    dyreg().save_pretrained(tmp_path)
    change(tmp_path, arguments={**config_of(tmp_path)["arguments"], "return_regions": True}, _commit="abc")
    assert DyReG.from_pretrained(tmp_path).return_regions is True


@pytest.mark.parametrize(
    ("version", "install"),
    [
        ("0.4.0", "pip install 'dyreg-triton>=0.4.0'"),
        ("1.0.0rc1", "pip install 'dyreg-triton>=1.0.0rc1'"),
        ("1'; rm -rf ~; '", "pip install --upgrade dyreg-triton"),
        (None, "pip install --upgrade dyreg-triton"),
        (7, "pip install --upgrade dyreg-triton"),
    ],
)
def test_a_newer_schema(version: object, install: str, saved: Path) -> None:
    """Says what to install, whatever else the newer schema changed."""
    change(saved, schema=SCHEMA + 1, version=version, arguments=None, weights=[1])
    with refused(ValueError, f"schema in {saved / CONFIG} is {SCHEMA + 1}", f"up to {SCHEMA};", install):
        RSA.from_pretrained(saved)


def test_damaged_weights_are_never_loaded(saved: Path) -> None:
    """Cut anywhere, or with any byte changed: either refused by name, or nothing that counts has changed."""
    data, layer = (saved / WEIGHTS).read_bytes(), RSA.from_pretrained(saved)
    header = 8 + int.from_bytes(data[:8], "little")
    chance = random.Random(0)
    cuts = [0, 4, 8, header - 1, header, len(data) - 1, *(chance.randrange(len(data)) for _ in range(20))]
    flips = [*range(8), header, len(data) - 1, *(chance.randrange(len(data)) for _ in range(300))]
    flipped = (data[:i] + bytes([data[i] ^ (1 << chance.randrange(8))]) + data[i + 1 :] for i in flips)
    told = []
    for damaged in [*(data[:n] for n in cuts), data + b"x", *flipped]:
        (saved / WEIGHTS).write_bytes(damaged)
        try:
            assert_same_state(RSA.from_pretrained(saved), layer)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 100
    assert all(str(saved / WEIGHTS) in message for message in told)
    (saved / WEIGHTS).write_bytes(data)
    assert_same_state(RSA.from_pretrained(saved), layer)


def test_a_changed_value_is_noticed(saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with refused(ValueError, str(saved / WEIGHTS), "damaged", "hash differs"):
        RSA.from_pretrained(saved)


def test_tensors_of_other_tools(saved: Path) -> None:
    """Written anew without our note they load, if they are the same; others do not."""
    layer = RSA.from_pretrained(saved)
    safetensors.torch.save_file(layer.state_dict(), saved / WEIGHTS)
    assert_same_state(RSA.from_pretrained(saved), layer)
    safetensors.torch.save_file({name: t + 1 for name, t in layer.state_dict().items()}, saved / WEIGHTS)
    with refused(ValueError, WEIGHTS, "of another save"):
        RSA.from_pretrained(saved)


# --- one or the other, never half -----------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """A function that makes the n-th call of something in `os` or `open` the last."""

    def crash(name: str, number: int) -> None:
        calls = iter(range(1, 100))
        real = open if name == "open" else getattr(os, name)

        def last(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                raise Crash
            return real(*args, **kwargs)

        if name == "open":
            monkeypatch.setattr(files, "open", last, raising=False)
        else:
            monkeypatch.setattr(files.os, name, last)

    return crash


STEPS = [(name, number) for name in ("open", "fsync", "replace") for number in (1, 2)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("other", [lambda: rsa(context="R"), rsa, lambda: rsa(stride=2), lambda: RSTG(4)])
def test_a_crash_in_any_step(
    step: tuple[str, int], other: Callable, tmp_path: Path, crashing: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old save loads before the tensors are renamed, the new one after; nothing is left lying about."""
    old, new = rsa(), other()
    old.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    crashing(*step)
    with pytest.raises(Crash):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    wrote_tensors = step[1] == 2
    expected = new if wrote_tensors else old
    again = type(expected).from_pretrained(tmp_path)
    assert_same_state(again, expected)
    assert str(again) == str(expected)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}
    assert_same_state(returned(new, tmp_path), new)


def test_a_crash_between_two_saves_of_the_same_tensors(tmp_path: Path, crashing: Callable) -> None:
    """Either config is right then; it is the one on disk."""
    old = rsa()
    new = rsa(stride=2)
    new.load_state_dict(old.state_dict())
    old.save_pretrained(tmp_path)
    crashing("replace", 2)
    with pytest.raises(Crash):
        new.save_pretrained(tmp_path)
    assert RSA.from_pretrained(tmp_path).stride == (1, 1, 1)


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_of_the_first_save(step: tuple[str, int], tmp_path: Path, crashing: Callable) -> None:
    crashing(*step)
    with pytest.raises(Crash):
        rsa().save_pretrained(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == ({WEIGHTS} if step[1] == 2 else set())
    with refused(FileNotFoundError, CONFIG, "is missing"):
        RSA.from_pretrained(tmp_path / "new")


def test_any_pair_of_two_writers(tmp_path: Path) -> None:
    """Whoever's config and whoever's tensors are found together, a whole layer comes back, by its tensors."""
    layers = [rsa(), rsa(kernel="R"), rsa(stride=2), rsa(context="V"), rsa(), rsa(kernel_size=(3, 1, 3))]
    for layer in layers[-2:]:  # the same bytes in other shapes
        for p in layer.parameters():
            nn.init.zeros_(p)
    for i, layer in enumerate(layers):
        layer.save_pretrained(tmp_path / str(i))
    for i in range(len(layers)):
        for j, layer in enumerate(layers):
            both = tmp_path / f"{i}{j}"
            both.mkdir()
            shutil.copy(tmp_path / str(i) / CONFIG, both)
            shutil.copy(tmp_path / str(j) / WEIGHTS, both)
            again = RSA.from_pretrained(both)
            assert_same_state(again, layer)
            assert str(again) == str(layer)


def test_a_newer_writer_that_crashed(tmp_path: Path) -> None:
    """The config beside the tensors is checked as the other one is."""
    rsa().save_pretrained(tmp_path)
    newer = json.dumps({"format": "dyreg_triton", "schema": SCHEMA + 1, "version": "0.9"})
    tensors = {name: t + 1 for name, t in rsa().state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS, {"dyreg_triton": newer})
    with refused(ValueError, f"the config in {tmp_path / WEIGHTS} is {SCHEMA + 1}", "'dyreg-triton>=0.9'"):
        RSA.from_pretrained(tmp_path)


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    layers = [rsa(), rsa(kernel="R")]
    with torch.no_grad():
        for value, layer in enumerate(layers):
            for p in layer.parameters():
                p.fill_(value)
    layers[0].save_pretrained(tmp_path)
    failures: list[BaseException] = []
    start = threading.Barrier(3)

    def work(task: Callable[[], None]) -> None:
        try:
            start.wait()
            for _ in range(15):
                task()
        except BaseException as error:
            failures.append(error)

    def read() -> None:
        again = RSA.from_pretrained(tmp_path)
        expected = layers[int(again.H2.weight.flatten()[0])]
        assert_same_state(again, expected)

    tasks = [*(functools.partial(layer.save_pretrained, tmp_path) for layer in layers), read]
    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_files_have_the_usual_permissions(saved: Path) -> None:
    (saved / "usual").write_text("")
    assert len({(saved / name).stat().st_mode for name in (*FILES, "usual")}) == 1


# --- the Hub --------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for the network: repositories are folders, a commit is a folder in them."""

    def __init__(self, root: Path):
        self.root = root
        self.asked: list[dict[str, Any]] = []

    def create_repo(self, api: Any, repo_id: str, **options: Any) -> Any:
        self.asked.append({"token": api.token, **options})
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / full).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=full)

    def upload_folder(self, api: Any, *, repo_id: str, folder_path: Path, revision: str | None, **options: Any) -> str:
        self.asked.append(options)
        shutil.copytree(folder_path, self.root / repo_id / (revision or "main"), dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def download(self, repo_id: str, filename: str, *, revision: str | None = None, **options: Any) -> str:
        self.asked.append({"file": filename, **options})
        from huggingface_hub import errors

        response = SimpleNamespace(headers={}, request=None)
        if not (self.root / repo_id).is_dir():
            raise errors.RepositoryNotFoundError("401 Client Error", response=response)
        commit = self.root / repo_id / (revision or "main")
        if not commit.is_dir():
            raise errors.RevisionNotFoundError("404 Client Error", response=response)
        if not (commit / filename).is_file():
            raise errors.RemoteEntryNotFoundError("404 Entry Not Found", response=response)
        cached = self.root / f"cache-{filename}" / filename  # each file in a place of its own
        cached.parent.mkdir(exist_ok=True)
        shutil.copy(commit / filename, cached)
        return str(cached)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="pip install 'dyreg-triton[test]'")
    hub_mixin = importlib.import_module("huggingface_hub.hub_mixin")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, **options: hub.create_repo(api, **options))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda api, **options: hub.upload_folder(api, **options)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", hub.download)
    return hub


@pytest.mark.parametrize("name", ["RSA", "DyReG", "ops.dyreg.DynamicGraphWrapper"])
def test_push_and_pull(name: str, hub: Hub) -> None:
    layer = made(name).half()
    url = layer.push_to_hub("me/mine", private=True, token="secret", commit_message="hello", branch="v1")
    assert url == "https://hub/me/mine/commit/1"
    assert hub.asked[0] == {"token": "secret", "private": True, "exist_ok": True}
    assert hub.asked[1]["commit_message"] == "hello"
    pushed = hub.root / "me/mine/v1"
    assert {path.name for path in pushed.iterdir()} == {*FILES, "README.md"}
    assert config_of(pushed)["arguments"]
    card = (pushed / "README.md").read_text()
    assert f'{config_of(pushed)["class"]}.from_pretrained("me/mine")' in card
    assert "library_name: dyreg-triton" in card
    hub.asked.clear()
    again = type(layer).from_pretrained(
        "me/mine", revision="v1", token="secret", cache_dir="there", dtype=torch.float32
    )
    assert_same_state(again, layer.float())
    assert not again.training
    assert {asked["file"] for asked in hub.asked} == FILES
    options = {"token": "secret", "cache_dir": "there", "force_download": False, "local_files_only": False}
    assert all(asked == {"file": asked["file"], **options} for asked in hub.asked)


def test_save_and_push(hub: Hub, tmp_path: Path) -> None:
    layer = rsa()
    assert layer.save_pretrained(tmp_path / "mine") is None
    assert layer.save_pretrained(tmp_path / "mine", push_to_hub=True) == "https://hub/me/mine/commit/1"
    assert layer.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="a/b", create_pr=True).endswith(
        "/a/b/commit/1"
    )
    assert hub.asked[-1]["create_pr"] is True
    assert {path.name for path in (tmp_path / "mine").iterdir()} == FILES
    for repository in ("me/mine", "a/b"):
        assert (hub.root / repository / "main" / CONFIG).read_bytes() == (tmp_path / "mine" / CONFIG).read_bytes()
        assert_same_state(RSA.from_pretrained(repository), layer)


def test_a_folder_comes_before_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rsa().push_to_hub("me/mine")
    monkeypatch.chdir(tmp_path)
    mine = rsa(context="V")
    mine.save_pretrained("me/mine")
    assert_same_state(RSA.from_pretrained("me/mine"), mine)


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    rsa().push_to_hub("me/mine")
    with refused(FileNotFoundError, "RSA.from_pretrained: 'no/such' is no folder", "Hub", "401"):
        RSA.from_pretrained("no/such")
    with refused(FileNotFoundError, "'me/mine' is no folder", "404"):
        RSA.from_pretrained("me/mine", revision="v9")
    with refused(ValueError, "of class 'dyreg_triton.layers.RSA'", "here is 'dyreg_triton.layers.RSTG'"):
        RSTG.from_pretrained("me/mine")
    (hub.root / "me/mine/main" / WEIGHTS).unlink()
    with refused(FileNotFoundError, "'me/mine' is no folder", "404 Entry Not Found"):
        RSA.from_pretrained("me/mine")
    with refused(FileNotFoundError, "is no folder"):
        RSA.from_pretrained(Path("me/mine"))  # a path is a path


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "null", "[" * 100_000, '{"model_type": "bert"}', '{"content": 1, "self": 2}']
)
def test_a_foreign_repository(text: str, hub: Hub) -> None:
    rsa().push_to_hub("me/mine")
    (hub.root / "me/mine/main" / CONFIG).write_text(text)
    with refused(ValueError, "RSA.from_pretrained: ", CONFIG):
        RSA.from_pretrained("me/mine")


def test_a_newer_schema_on_the_hub(hub: Hub) -> None:
    rsa().push_to_hub("me/mine")
    change(hub.root / "me/mine/main", schema=SCHEMA + 1, version="0.7.1")
    with refused(ValueError, "pip install 'dyreg-triton>=0.7.1'"):
        RSA.from_pretrained("me/mine")


def test_a_layer_that_is_refused_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    layer = altered(lambda m: delattr(m, "I"))
    with refused(ValueError, "RSA.push_to_hub: missing are I;"):
        layer.push_to_hub("me/mine")
    with refused(ValueError, "RSA.save_pretrained: missing are I;"):
        layer.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert not list(hub.root.glob("*/*/*"))


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = rsa()
    layer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_same_state(RSA.from_pretrained(tmp_path), layer)
    for call in (
        lambda: layer.push_to_hub("me/mine"),
        lambda: layer.save_pretrained(tmp_path / "new", push_to_hub=True),
        lambda: RSA.from_pretrained("me/mine"),
    ):
        with refused(ImportError, "RSA.", "huggingface_hub is missing; pip install 'dyreg-triton[hub]'"):
            call()
    with refused(ImportError, "there is no folder 'me/mine'"):
        RSA.from_pretrained("me/mine")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with refused(ImportError, "safetensors is missing; pip install safetensors"):
        RSA.from_pretrained(tmp_path)
    with refused(ImportError, "safetensors is missing; pip install safetensors"):
        layer.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_packages_are_imported_at_first_use() -> None:
    code = (
        "import sys, dyreg_triton as dt; layer = dt.layers.RSA(4, num_queries=2);"
        "print([name for name in ('safetensors', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.strip() == "[]"
