"""Torch's default dtype and device change what new parameters are, as in torch.nn, and nothing else."""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import LAYERS
from published import RSA, DynamicGraph, dyregParams
from support import RegionCase, awake, backends, run
from torch import Tensor, nn

import dyreg_triton as dt
from dyreg_triton.testing import Call, TensorSpec, check_op, random_regions, strategies

DEFAULTS = ("bfloat16", "float64", "meta")
ROOT = Path(__file__).parent.parent
FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip


@contextlib.contextmanager
def default(name: str) -> Iterator[None]:
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    former = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(former)


every_default = pytest.mark.parametrize("name", DEFAULTS)


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        if isinstance(want, Tensor):
            assert (got.dtype, got.device) == (want.dtype, want.device), name
            assert torch.equal(got, want), name
        else:
            assert got == want, name


def test_no_factory_leaves_its_dtype_or_device_to_torchs_defaults() -> None:
    """Parameters apart, which follow them; device=None says that something else follows them too."""
    found = []
    files = [*(ROOT / "dyreg_triton").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert len(files) > 100
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        parameters = {id(inner) for node in calls if node.func.attr == "Parameter" for inner in ast.walk(node)}
        for node in calls:
            torchs = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = {keyword.arg for keyword in node.keywords}
            if torchs and node.func.attr in FACTORIES and id(node) not in parameters and None not in named:
                lacks = {"dtype", "device"} - named
                found += [f"{file.relative_to(ROOT)}:{node.lineno} {node.func.attr} lacks {lacks}"] if lacks else []
    assert not found


@every_default
@pytest.mark.parametrize("layer_name", LAYERS)
def test_layers_compute_the_same(layer_name: str, name: str, device: torch.device) -> None:
    make, shape = LAYERS[layer_name]
    layer = awake(make()).to(device).eval()
    x = torch.randn(shape, device=device)
    expected = run(layer, x)
    grad = torch.randn_like(expected["out"])
    expected = run(layer, x, grad)
    with default(name):
        assert_same(run(layer, x, grad), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("layer_name", LAYERS)
def test_layers_are_made_in_the_default_dtype(layer_name: str, dtype: str) -> None:
    make, shape = LAYERS[layer_name]
    with default(dtype):
        layer = awake_in_default(make)
        y = layer(torch.randn(shape))
        assert {p.dtype for p in layer.parameters()} == {getattr(torch, dtype)}
        assert y.dtype == getattr(torch, dtype)
    plain = copy.deepcopy(layer).double()
    assert y.isfinite().all()
    for buffer, name in ((b, n) for n, b in layer.named_buffers() if n.endswith("pos_emb_buf")):
        assert buffer.dtype == (torch.float64 if dtype == "float64" else torch.float32), name
    if dtype == "float64":
        with default("float64"):
            x = torch.randn(shape)
            assert torch.equal(plain.eval()(x), layer.eval()(x))


def awake_in_default(make: Any) -> nn.Module:
    torch.manual_seed(3)
    return make()


@pytest.mark.parametrize("layer_name", LAYERS)
def test_layers_are_made_on_the_default_device(layer_name: str) -> None:
    with default("meta"):
        layer = LAYERS[layer_name].make()
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    assert {name for name, t in tensors if not t.is_meta} == set()


@every_default
@pytest.mark.parametrize("init", ["center", "grid"])
@pytest.mark.parametrize("rule", ["paper", "published"])
def test_regions_are_where_they_were(name: str, init: str, rule: str) -> None:
    options: dict[str, Any] = {"grid": (3, 3), "size": (224, 224), "init": init, "rule": rule}
    offsets = torch.zeros(9, 4)
    expected = dt.layers.regions_from_offsets(offsets, **options)
    if init == "grid":
        assert expected[0, 0].item() == pytest.approx(224 / 6, rel=1e-6)
    with default(name):
        actual = dt.layers.regions_from_offsets(offsets, **options)
    assert_same({"regions": actual}, {"regions": expected})


@every_default
@pytest.mark.parametrize("backend", backends())
def test_ops_compute_the_same(name: str, backend: str, device: torch.device) -> None:
    x = torch.randn(2, 4, 8, 8, device=device)
    regions = random_regions((2, 3), (8, 8)).to(device)
    q, v = torch.randn(1, 2, 4, 2, 4, 4, device=device), torch.randn(1, 4, 2, 4, 4, device=device)
    h2 = torch.randn(4, 3, 3, 3, device=device)
    p = torch.randn(1, 2, 2, 2, 2, device=device)

    def compute() -> dict[str, Tensor]:
        with dt.backend(backend):
            nodes = dt.ops.region_pool(x, regions, profile="gaussian")
            return {
                "pool": nodes,
                "remap": dt.ops.region_remap(nodes, regions, (8, 8), profile="log-linear"),
                "kernel": dt.ops.region_kernel(regions, (8, 8)),
                "relational": dt.ops.relational_attention(q, None, v, h2=h2, eps=1e-6),
                "bilinear": dt.ops.bilinear_transform(v, p, p, p[:, :, 0]),
            }

    expected = compute()
    with default(name):
        assert_same(compute(), expected)


@every_default
def test_the_testing_kit_draws_the_same(name: str) -> None:
    case = RegionCase("region_pool", lead=(2,), nodes=2, channels=3, size=(5, 6))
    call = Call({"x": TensorSpec((3, 4), seed=5)})

    def draw() -> dict[str, Tensor]:
        inputs = {key: t.tensor if hasattr(t, "tensor") else t for key, t in call.inputs(torch.device("cpu")).items()}
        return {**case.values(), **inputs, "regions of the kit": random_regions((4,), (6, 7), kind="mixed")}

    expected = draw()
    with default(name):
        assert_same(draw(), expected)
        calls = strategies.calls(x=strategies.tensor("M", "K"))
        check_op(lambda x: 2 * x, lambda x: x + x, calls, examples=3, device="cpu")
        with pytest.raises(AssertionError):
            check_op(lambda x: 2.1 * x, lambda x: x + x, calls, examples=3, device="cpu")


@every_default
def test_swap_and_files_are_the_same(name: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(RSA(8, 8, 2, 4, 4, 4, (3, 3, 3), kernel_type="VplusR", feat_type="VplusR"))

    graph = DynamicGraph(dyregParams(offset_lstm_dim=128), 8, 14, 14, node_dim=8)
    x = torch.randn(1, 8, 3, 5, 5)
    swapped, again = model(), model()
    dt.swap(swapped)
    expected = run(swapped, x)
    native = dt.layers.DyReG(8, (6, 7), generator="pooled")
    native.save_pretrained(tmp_path)
    with default(name):
        report = dt.swap(again, example=x)
        assert len(report.modules) == 1
        assert_same(
            run(again, x, None if name != "meta" else torch.ones_like(x)),
            expected if name != "meta" else {**run(swapped, x, torch.ones_like(x))},
        )
        dt.swap(graph)
        read = dt.layers.DyReG.from_pretrained(tmp_path)
    assert_same(dict(read.state_dict()), dict(native.state_dict()))


@every_default
def test_what_is_recorded_is_the_same(name: str) -> None:
    block = dt.layers.BATBlock(8, window=2, temporal_window=2, groups=2).eval()
    clip = torch.randn(1, 8, 4, 4, 5)

    def look() -> dict[str, Tensor]:
        recorded = dt.viz.record(block, clip)["batransform"]
        return {"weights": recorded.attention_weights(), "maps": recorded.contribution_maps((1, 2))}

    expected = look()
    with default(name):
        assert_same(look(), expected)
