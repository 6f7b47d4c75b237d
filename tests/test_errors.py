"""Every refusal: before anything is computed, and in words that name what is wrong and what would be right."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DEVICE, REGION_OPS
from torch.utils._python_dispatch import TorchDispatchMode

import dyreg_triton as dt
from dyreg_triton.dispatch import can_run


def saying(*parts: object) -> str:
    """A pattern for messages that contain every part, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(str(part))})" for part in parts)


class NothingRuns(TorchDispatchMode):
    """Inside, any operation on a tensor fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran before the arguments were refused")


def refused(error: type[Exception], *parts: object):
    return pytest.raises(error, match=saying(*parts))


def call(op: str, **changed: Any) -> Any:
    """A good call of `op` with some arguments replaced, in which nothing may run."""
    shapes = {"x": (2, 3, 5, 6), "nodes": (2, 4, 3), "regions": (2, 4, 4)}
    tensors = {name: changed.pop(name, None) for name in shapes}
    tensors = {name: torch.ones(shapes[name], device=DEVICE) if t is None else t for name, t in tensors.items()}
    size = changed.pop("size", (5, 6))
    with NothingRuns():
        if op == "region_pool":
            return dt.ops.region_pool(tensors["x"], tensors["regions"], **changed)
        if op == "region_remap":
            return dt.ops.region_remap(tensors["nodes"], tensors["regions"], size, **changed)
        return dt.ops.region_kernel(tensors["regions"], size, **changed)


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, **{"device": DEVICE, **options})


@pytest.mark.parametrize("op", REGION_OPS)
def test_nothing_runs_notices(op: str) -> None:
    """A good call does run something."""
    with pytest.raises(AssertionError, match="before the arguments were refused"):
        call(op)


# --- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("shape", [(4,), (2, 4, 3), (2, 4, 5), (2, 4, 0), ()])
def test_shape_of_regions(op: str, shape: tuple[int, ...]) -> None:
    with refused(ValueError, op, "regions", shape, "(*, N, 4)", "float32"):
        call(op, regions=ones(*shape))


@pytest.mark.parametrize("shape", [(5, 6), (6,), ()])
def test_rank_of_x(shape: tuple[int, ...]) -> None:
    with refused(ValueError, "region_pool", "x", shape, "(*, C, H, W)", "regions (2, 4, 4)"):
        call("region_pool", x=ones(*shape))


@pytest.mark.parametrize("shape", [(4,), ()])
def test_rank_of_nodes(shape: tuple[int, ...]) -> None:
    with refused(ValueError, "region_remap", "nodes", shape, "(*, N, C)", "regions (2, 4, 4)"):
        call("region_remap", nodes=ones(*shape))


@pytest.mark.parametrize("shape", [(3, 3, 5, 6), (1, 3, 5, 6), (3, 5, 6), (1, 2, 3, 5, 6)])
def test_leading_dimensions_of_x(shape: tuple[int, ...]) -> None:
    with refused(ValueError, "region_pool", "x", shape[:-3], "(2,)", f"x {shape}", "regions (2, 4, 4)"):
        call("region_pool", x=ones(*shape))


@pytest.mark.parametrize("shape", [(3, 4, 3), (1, 4, 3), (4, 3), (1, 2, 4, 3)])
def test_leading_dimensions_of_nodes(shape: tuple[int, ...]) -> None:
    with refused(ValueError, "region_remap", "nodes", shape[:-2], "(2,)", f"nodes {shape}", "regions (2, 4, 4)"):
        call("region_remap", nodes=ones(*shape))


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_number_of_nodes(count: int) -> None:
    with refused(ValueError, "region_remap", "nodes", count, 4, f"nodes (2, {count}, 3)", "regions (2, 4, 4)"):
        call("region_remap", nodes=ones(2, count, 3))


@pytest.mark.parametrize(("op", "name"), [("region_pool", "x"), ("region_remap", "nodes")])
def test_mixed_devices(op: str, name: str) -> None:
    with refused(ValueError, op, name, "regions", "meta", str(DEVICE), "(2, 4, 4)"):
        call(op, regions=ones(2, 4, 4, device="meta"))
    shape = (2, 3, 5, 6) if name == "x" else (2, 4, 3)
    with refused(ValueError, op, name, "regions", "meta", str(DEVICE), shape):
        call(op, **{name: ones(*shape, device="meta")})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize(
    ("op", "name"), [("region_pool", "x"), ("region_remap", "nodes"), ("region_kernel", "regions")]
)
def test_dtype_of_features(op: str, name: str, dtype: torch.dtype) -> None:
    shape = {"x": (2, 3, 5, 6), "nodes": (2, 4, 3), "regions": (2, 4, 4)}[name]
    with refused(TypeError, op, name, str(dtype)[6:], "float16, bfloat16, float32 or float64", f"{name} {shape}"):
        call(op, **{name: ones(*shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("features", "regions"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float16),
        (torch.float32, torch.int64),
        (torch.float32, torch.complex64),
    ],
)
@pytest.mark.parametrize(("op", "name"), [("region_pool", "x"), ("region_remap", "nodes")])
def test_mismatched_dtypes(op: str, name: str, features: torch.dtype, regions: torch.dtype) -> None:
    shape = {"x": (2, 3, 5, 6), "nodes": (2, 4, 3)}[name]
    with refused(TypeError, op, "regions", str(regions)[6:], f"{name}'s dtype or float32", f"{name} {shape}"):
        call(op, **{name: ones(*shape, dtype=features), "regions": ones(2, 4, 4, dtype=regions)})


@pytest.mark.parametrize(
    ("op", "name"), [(op, "regions") for op in REGION_OPS] + [("region_pool", "x"), ("region_remap", "nodes")]
)
@pytest.mark.parametrize("value", [[[1.0, 2.0, 3.0, 4.0]], 3.0, "map"])
def test_no_tensor(op: str, name: str, value: object) -> None:
    with refused(TypeError, op, name, type(value).__name__, "Tensor"):
        call(op, **{name: value})


# --- options --------------------------------------------------------------------------------------------------------

CALLS = {
    "region_pool": ("x (2, 3, 5, 6)", "regions (2, 4, 4)"),
    "region_remap": ("nodes (2, 4, 3)", "regions (2, 4, 4)"),
    "region_kernel": ("regions (2, 4, 4)",),
}


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("profile", ["box", "Linear", "", None, 3, ["linear"]])
def test_unknown_profile(op: str, profile: object) -> None:
    with refused(ValueError, op, "profile", repr(profile), "'linear'", "'gaussian'", "'log-linear'", *CALLS[op]):
        call(op, profile=profile)


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_temperature_out_of_range(op: str, temperature: float) -> None:
    with refused(ValueError, op, "temperature", repr(temperature), "> 0", *CALLS[op]):
        call(op, temperature=temperature)


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("temperature", ["1", None, True, [1.0], 1j])
def test_temperature_of_another_type(op: str, temperature: object) -> None:
    with refused(TypeError, op, "temperature", repr(temperature), "> 0", *CALLS[op]):
        call(op, temperature=temperature)


@pytest.mark.parametrize("op", ["region_remap", "region_kernel"])
@pytest.mark.parametrize("size", [(0, 6), (5, 0), (-1, 6), (5.0, 6), (5,), (5, 6, 7), 5, "56", None, (True, 6), ()])
def test_size(op: str, size: object) -> None:
    with refused(ValueError, op, "size", repr(size), "two positive integers", *CALLS[op]):
        call(op, size=size)


# --- backends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", REGION_OPS)
def test_no_kernel_runs_on_meta_tensors(op: str) -> None:
    """A backend asked for by name never falls back: here on a device that no kernel runs on."""
    tensors = {"x": ones(2, 3, 5, 6), "nodes": ones(2, 4, 3), "regions": ones(2, 4, 4)}
    tensors = {name: t.to("meta") for name, t in tensors.items()}
    with dt.backend("triton"), refused(RuntimeError, op, "'triton' cannot run here", "meta", "TRITON_INTERPRET=1"):
        call(op, **tensors)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (op, dtype)
        for op in REGION_OPS
        for dtype in (torch.float32, torch.float64)
        if not can_run("triton", device=DEVICE, dtype=dtype)
    ],
)
def test_backend_that_cannot_run(op: str, dtype: torch.dtype) -> None:
    tensors = {"x": ones(2, 3, 5, 6), "nodes": ones(2, 4, 3), "regions": ones(2, 4, 4)}
    with dt.backend("triton"), refused(RuntimeError, op, "'triton' cannot run here"):
        call(op, **{name: t.to(dtype) for name, t in tensors.items()})


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None, 3])
def test_unknown_backend(name: object) -> None:
    with refused(ValueError, "backend", repr(name), "'auto'", "'triton'", "'eager'", "'reference'"):
        dt.backend(name)  # type: ignore[arg-type]
    with refused(ValueError, "can_run", repr(name), "'triton'", "'eager'", "'reference'"):
        can_run(name, device="cpu", dtype=torch.float32)  # type: ignore[arg-type]


# --- layers ---------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"grid": (2, 2), "region_channels": 8}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"in_channels": 0}, ("in_channels", "0", "integer > 0")),
        ({"in_channels": -4}, ("in_channels", "-4", "integer > 0")),
        ({"in_channels": 4.0}, ("in_channels", "4.0", "integer > 0")),
        ({"size": (0, 6)}, ("size", "(0, 6)", "two positive integers")),
        ({"size": (6, -1)}, ("size", "(6, -1)", "two positive integers")),
        ({"size": 6}, ("size", "6", "two positive integers")),
        ({"size": (2, 9)}, ("size", "(2, 9)", "at least 3")),
        ({"grid": (0, 3)}, ("grid", "(0, 3)", "two positive integers")),
        ({"grid": 3}, ("grid", "3", "two positive integers")),
        ({"train_size": (7, 0)}, ("train_size", "(7, 0)", "two positive integers")),
        ({"node_channels": 0}, ("node_channels", "0", "integer > 0")),
        ({"region_channels": 0}, ("region_channels", "0", "integer > 0")),
        ({"generator": "conv"}, ("generator", "'conv'", "'fc'", "'pooled'")),
        ({"weights_over": "time"}, ("weights_over", "'time'", "'locations'", "'nodes'")),
        ({"init": "corner"}, ("init", "'corner'", "'center'", "'grid'")),
        ({"region_rule": "other"}, ("rule", "'other'", "'paper'", "'published'")),
        ({"recurrence": "rnn"}, ("recurrence", "'rnn'", "'gru'", "'lstm'")),
        ({"profile": "box"}, ("profile", "'box'", "'linear'", "'gaussian'", "'log-linear'")),
        ({"node_channels": 8, "project": False}, ("project", "False", "8", "4")),
    ],
    ids=str,
)
def test_arguments_of_dyreg(arguments: dict, parts: tuple[str, ...]) -> None:
    good = {"in_channels": 4, "size": (6, 7), **SMALL}
    with refused(ValueError, "DyReG", *parts):
        dt.layers.DyReG(**(good | arguments))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), "warm"])
def test_temperature_of_dyreg(temperature: object) -> None:
    """At construction, not at the first call."""
    with pytest.raises((ValueError, TypeError), match=saying("temperature", repr(temperature), "> 0")):
        dt.layers.DyReG(4, (6, 7), temperature=temperature, **SMALL)


def test_unknown_argument_of_layers() -> None:
    with refused(TypeError, "nodes"):
        dt.layers.DyReG(4, (6, 7), nodes=3)
    with refused(TypeError, "heads"):
        dt.layers.RSTG(4, heads=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"channels": 0}, ("channels", "0", "integer > 0")),
        ({"channels": 2.5}, ("channels", "2.5", "integer > 0")),
        ({"iterations": 0}, ("iterations", "0", "integer > 0")),
        ({"iterations": True}, ("iterations", "True", "integer > 0")),
        ({"recurrence": "rnn"}, ("recurrence", "'rnn'", "'gru'", "'lstm'")),
        ({"combine": "add"}, ("combine", "'add'", "'concatenate'", "'sum'")),
        ({"aggregation": "max"}, ("aggregation", "'max'", "'dot'", "'mean'")),
        ({"order": "space"}, ("order", "'space'", "'space-time'", "'time-space'")),
        ({"send_layers": 0}, ("send_layers", "0", "1", "2")),
        ({"send_layers": 3}, ("send_layers", "3", "1", "2")),
        ({"update_layers": 3}, ("update_layers", "3", "0", "1", "2")),
        ({"update_layers": -1}, ("update_layers", "-1", "0", "1", "2")),
        ({"update_layers": 0}, ("update_layers", "0", "concatenate")),
    ],
    ids=str,
)
def test_arguments_of_rstg(arguments: dict, parts: tuple[str, ...]) -> None:
    with refused(ValueError, "RSTG", *parts):
        dt.layers.RSTG(**({"channels": 4} | arguments))


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 5, 6, 7), (2, 3, 4, 7, 6), (2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 7)])
def test_input_shape_of_dyreg(shape: tuple[int, ...]) -> None:
    layer = dt.layers.DyReG(4, (6, 7), **SMALL)
    given = torch.ones(shape)
    with refused(ValueError, "DyReG", f"x is {shape}", "(B, T, 4, 6, 7)"), NothingRuns():
        layer(given)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 4)])
def test_input_shape_of_rstg(shape: tuple[int, ...]) -> None:
    layer = dt.layers.RSTG(4)
    given = torch.ones(shape)
    with refused(ValueError, "RSTG", f"nodes is {shape}", "(B, T, N, 4)"), NothingRuns():
        layer(given)


@pytest.mark.parametrize("value", [None, [[1.0]], 3])
def test_input_of_layers_is_no_tensor(value: object) -> None:
    for layer in (dt.layers.DyReG(4, (6, 7), **SMALL), dt.layers.RSTG(4)):
        with pytest.raises((TypeError, ValueError), match=saying(type(layer).__name__, "accepted")):
            layer(value)


@pytest.mark.parametrize(
    ("offsets", "arguments", "error", "parts"),
    [
        (torch.zeros(3, 4), {}, ValueError, ("offsets", "(3, 4)", "4, 4)")),
        (torch.zeros(4, 3), {}, ValueError, ("offsets", "(4, 3)", "4, 4)")),
        (torch.zeros(4), {}, ValueError, ("offsets", "(4,)", "4, 4)")),
        (torch.zeros(4, 4, dtype=torch.int64), {}, TypeError, ("offsets", "int64", "floating")),
        ([[0.0] * 4] * 4, {}, TypeError, ("offsets", "floating")),
        (torch.zeros(4, 4), {"grid": (0, 4)}, ValueError, ("grid", "(0, 4)", "two positive integers")),
        (torch.zeros(4, 4), {"size": (5, 0)}, ValueError, ("size", "(5, 0)", "two positive integers")),
        (torch.zeros(4, 4), {"init": "corner"}, ValueError, ("init", "'corner'", "'center'", "'grid'")),
        (torch.zeros(4, 4), {"rule": "other"}, ValueError, ("rule", "'other'", "'published'", "'paper'")),
    ],
    ids=str,
)
def test_regions_from_offsets(offsets: Any, arguments: dict, error: type[Exception], parts: tuple[str, ...]) -> None:
    with refused(error, "regions_from_offsets", *parts), NothingRuns():
        dt.layers.regions_from_offsets(offsets, **({"grid": (2, 2), "size": (5, 6)} | arguments))


@pytest.mark.parametrize(
    "build",
    [
        lambda: dt.layers.DyReG(4, (6, 7), **SMALL),
        lambda: dt.layers.RSTG(4),
        lambda: dt.compat.build("ops.dyreg.DynamicGraph", backbone_dim=4, node_dim=4, H=14, W=14),
    ],
    ids=["DyReG", "RSTG", "compat"],
)
def test_state_dict_keys(build: Callable[[], torch.nn.Module]) -> None:
    """All missing and all unexpected keys are listed, and nothing is dropped without a word."""
    module = build()
    state = copy.deepcopy(module.state_dict())
    module.load_state_dict(state, strict=True)
    missing = sorted(state)[::3]
    for name in missing:
        del state[name]
    state |= {"first.unexpected": torch.ones(1), "second.unexpected": torch.ones(1)}
    with refused(RuntimeError, "Missing", "Unexpected", *missing, "first.unexpected", "second.unexpected"):
        module.load_state_dict(state, strict=True)


# --- compat ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ops.dyreg.Graph", "DynamicGraph", "", None, 3])
def test_compat_name(name: object) -> None:
    accepted = ("ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG")
    with refused(ValueError, "compat.build", repr(name), *map(repr, accepted)):
        dt.compat.build(name, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG"])
def test_compat_unknown_key(name: str) -> None:
    with refused(ValueError, name, "channels_in", "depth", "accepted", "node_dim", "params"):
        dt.compat.build(name, {"channels_in": 4, "node_dim": 4}, depth=3)


@pytest.mark.parametrize("name", ["ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG"])
@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"send_layer": 1, "extra": 2}, ("params", "send_layer", "extra", "send_layers", "offset_lstm_dim")),
        ({"aggregation_type": "max"}, ("aggregation_type", "'max'", "'dot'", "'sum'")),
        ({"send_layers": 3}, ("send_layers", "3", "1", "2")),
        ({"update_layers": 5}, ("update_layers", "5", "0", "1", "2")),
        ({"init_regions": "corner"}, ("init_regions", "'corner'", "'center'", "'grid'")),
        ({"offset_generator": "huge"}, ("offset_generator", "'huge'", "'big'", "'small'")),
        ({"dynamic_regions": "serial"}, ("dynamic_regions", "'serial'", "'dyreg'")),
        ({"rstg_combine": "serial"}, ("rstg_combine", "'serial'", "'plus'")),
    ],
    ids=str,
)
def test_compat_params(name: str, params: dict, parts: tuple[str, ...]) -> None:
    arguments = {"ops.dyreg.DynamicGraph": {"backbone_dim": 4}, "ops.dyreg.DynamicGraphWrapper": {"in_channels": 4}}
    with refused(ValueError, *parts):
        dt.compat.build(name, {"params": params, "node_dim": 4, **arguments.get(name, {})})


def test_compat_config_is_a_mapping() -> None:
    with refused(TypeError, "compat.build", "config", "list", "mapping"):
        dt.compat.build("ops.rstg.RSTG", [("node_dim", 4)])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG"])
@pytest.mark.parametrize("rnn_type", ["lstm", "RNN", None, 3])
def test_compat_rnn_type(name: str, rnn_type: object) -> None:
    with refused(ValueError, "rnn_type", repr(rnn_type), "'LSTM'", "'GRU'"):
        dt.compat.build(name, {"node_dim": 4, "rnn_type": rnn_type})


@pytest.mark.parametrize("key", ["H", "W", "h", "w", "node_dim"])
@pytest.mark.parametrize("value", [0, -2, 1.5, None])
def test_compat_sizes(key: str, value: object) -> None:
    """Named as the authors name them."""
    with pytest.raises((ValueError, TypeError), match=saying("ops.dyreg.DynamicGraph", key, repr(value), "accepted")):
        dt.compat.build("ops.dyreg.DynamicGraph", {"backbone_dim": 4, "node_dim": 4, key: value})


def test_compat_full_res_needs_the_training_size() -> None:
    with refused(ValueError, "iH", "iW", "None", "full_res"):
        dt.compat.build("ops.dyreg.DynamicGraph", {"params": {"full_res": True}, "backbone_dim": 4, "node_dim": 4})


@pytest.mark.parametrize("shape", [(2, 3, 9, 4), (2, 3, 4, 8), (2, 4, 9), (2, 3, 4, 9, 1)])
def test_compat_input_shape_of_rstg(shape: tuple[int, ...]) -> None:
    module = dt.compat.build("ops.rstg.RSTG", node_dim=4)
    given = torch.ones(shape)
    with refused(ValueError, "RSTG", shape, "(B, T, 4, 9)"), NothingRuns():
        module(given)


@pytest.mark.parametrize("shape", [(2, 3, 4, 14, 13), (2, 3, 5, 14, 14), (3, 4, 14, 14)])
def test_compat_input_shape_of_dyreg(shape: tuple[int, ...]) -> None:
    for name, argument in (
        ("ops.dyreg.DynamicGraph", "backbone_dim"),
        ("ops.dyreg.DynamicGraphWrapper", "in_channels"),
    ):
        module = dt.compat.build(name, {argument: 4, "node_dim": 4})
        given = torch.ones(shape)
        with refused(ValueError, shape, "(B, T, 4, 14, 14)"), NothingRuns():
            module(given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_input_dtype_of_layers(dtype: torch.dtype) -> None:
    with refused(TypeError, "DyReG", "x is (1, 2, 4, 6, 7)", str(dtype)[6:], "float32", "autocast"):
        dt.layers.DyReG(4, (6, 7))(torch.ones(1, 2, 4, 6, 7, dtype=dtype))
    with refused(TypeError, "RSTG", "nodes is (1, 2, 3, 4)", str(dtype)[6:], "float32"):
        dt.layers.RSTG(4)(torch.ones(1, 2, 3, 4, dtype=dtype))


def test_sparse_features() -> None:
    with refused(TypeError, "region_pool", "x", "sparse", "dense", "regions (2, 4)"):
        dt.ops.region_pool(torch.ones(3, 5, 6).to_sparse(), torch.ones(2, 4))


@pytest.mark.parametrize("params", ["dyreg", [1, 2], 3])
def test_compat_params_of_no_use(params: object) -> None:
    with refused(TypeError, "ops.rstg.RSTG", "params", repr(params), "mapping"):
        dt.compat.build("ops.rstg.RSTG", params=params)


@pytest.mark.parametrize("key", ["combine_by_sum", "full_res"])
def test_compat_flags_are_bools(key: str) -> None:
    with refused(ValueError, f"params.{key}", "'False'", "True and False"):
        dt.compat.build("ops.dyreg.DynamicGraph", params={key: "False"})


@pytest.mark.parametrize("layers", [True, 1.0, "2", 3])
def test_layers_of_mlps(layers: object) -> None:
    with refused(ValueError, "send_layers", repr(layers), "1 and 2"):
        dt.layers.RSTG(4, send_layers=layers)


def test_unknown_option_of_dyreg() -> None:
    with refused(TypeError, "DyReG", "foo"):
        dt.layers.DyReG(4, (6, 7), foo=1)


def test_compat_name_that_is_no_name() -> None:
    with refused(ValueError, "compat.build", "['a']", "'ops.rstg.RSTG'"):
        dt.compat.build(["a"])


def test_wrapper_names_its_own_argument() -> None:
    with refused(ValueError, "DynamicGraphWrapper", "in_channels", "0"):
        dt.compat.build("ops.dyreg.DynamicGraphWrapper", in_channels=0)


def test_can_run_takes_a_dtype() -> None:
    with refused(TypeError, "can_run", "dtype", "'float32'"):
        can_run("eager", device="cpu", dtype="float32")


def test_compat_dimensions_without_projection() -> None:
    with refused(ValueError, "ops.dyreg.DynamicGraph", "node_dim is 8", "backbone_dim 16", "project_i3d False"):
        dt.compat.build("ops.dyreg.DynamicGraph", H=8, W=8, node_dim=8, backbone_dim=16)
