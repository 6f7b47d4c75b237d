"""Ops and layers inside the rest of torch: checkpoints, torch.func, DDP, export, graphs, threads, huge tensors."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import itertools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    DEVICE,
    PATIENCE,
    PROFILES,
    REGION_OPS,
    RegionCase,
    RelationalCase,
    assert_all_close,
    assert_close,
    assert_identical,
    assert_results_close,
    awake,
    backends,
    in_full,
    random_regions,
    relative_error,
    run,
    value_and_gradients,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dyreg_triton as dt
from dyreg_triton._core.dispatch import current_backend

# cuBLAS promises the same bits only with this set before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

on_backends = pytest.mark.parametrize("backend", backends())
OPS = (*REGION_OPS, "relational_attention")
on_ops = pytest.mark.parametrize("op", OPS)
on_profiles = pytest.mark.parametrize("profile", PROFILES)
pytestmark = [  # torch's own
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in ("TF32 acceleration", "`torch.jit", "The tensor attributes self.dynamic_graph")
]
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU, and kernels that are not interpreted")

SIZE = (5, 6)
SMALL: dict[str, Any] = {"grid": (2, 2), "region_channels": 8, "iterations": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": {**dt.layers.dyreg.PUBLISHED},
    "pooled": {"generator": "pooled", "node_channels": 6},
    "pooled-lstm": {"generator": "pooled", "recurrence": "lstm", "weights_over": "nodes", "profile": "gaussian"},
    "constant": {"regions": "constant_time", "init": "grid", "size_ratio": 3.0},
    "static": {"regions": "static", "profile": "log-linear"},
    "grid": {"regions": "grid", "connection": "serial", "aggregation": "mean"},
    "semantic": {"regions": "semantic", "node_channels": 6},
}
on_variants = pytest.mark.parametrize("variant", ["default", "published", "pooled"])
APART = ("default", "pooled", "semantic")  # by the ops that they are made of
REST = tuple(variant for variant in VARIANTS if variant not in APART)
on_all_variants = pytest.mark.parametrize("variant", VARIANTS)
Results = dict[str, "Tensor | None"]


@pytest.fixture(autouse=True)
def _one_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions may otherwise differ from run to run, and so would a comparison of bits."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def make(variant: str = "default", **options: Any) -> nn.Module:
    return awake(dt.layers.DyReG(4, SIZE, **{**SMALL, **VARIANTS[variant], **options}))


def frames(*lead: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Frames (*lead, 4, *SIZE) on the device of the tests."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 4, *SIZE, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def cotangent(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).sin().to(y.device, y.dtype)


def assert_all_identical(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            assert_identical(got, want, name)


def op_case(op: str, profile: str = "linear", seed: int = 5, **options: Any) -> RegionCase | RelationalCase:
    """A small call; relational self-attention normalises its input unless the profile is linear."""
    if op == "relational_attention":
        eps = None if profile == "linear" else 1e-2
        dtype = options.get("dtype", torch.float32)
        return RelationalCase(kernel_size=(2, 3, 3), clip=(1, 2, 3), batch=2, eps=eps, dtype=dtype, seed=seed)
    return RegionCase(op, (2,), 3, 4, SIZE, profile, 0.7, seed=seed, **options)


def op_inputs(case: RegionCase | RelationalCase) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs that want gradients, by name, and the output's cotangent."""
    values = {name: t.to(DEVICE) for name, t in case.values().items()}
    grad_output = values.pop("grad_output")
    return {name: t.requires_grad_() for name, t in values.items()}, grad_output


def run_op(case: RegionCase | RelationalCase, function: Callable[..., Tensor] | None = None) -> Results:
    values, grad_output = op_inputs(case)
    return value_and_gradients(function or case.function(dt.ops), values, grad_output)


# for processes that talk to each other, on the CPU of this machine
GLOO = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
if sys.platform == "linux":
    GLOO["GLOO_SOCKET_IFNAME"] = "lo"


def python(code: str, *arguments: object, timeout: float = PATIENCE, **environment: str) -> str:
    """Run `code` in a process of its own, which can import this file, and return what it prints."""
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


# --- activation checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@on_variants
@on_backends
def test_checkpointed_layer(backend: str, variant: str, reentrant: bool) -> None:
    """The same bits as without; oneDNN is off because its LSTM rounds otherwise where no graph is recorded."""
    layer, x = make(variant).to(DEVICE), frames(1, 2)
    calls = []

    def under(x: Tensor) -> Tensor:
        calls.append(1)
        with dt.backend(backend):
            return layer(x)

    with torch.backends.mkldnn.flags(enabled=False):
        expected = run(layer, x, call=under)
        calls.clear()
        actual = run(layer, x, call=lambda x: checkpoint(under, x, use_reentrant=reentrant))
    assert len(calls) == 2
    assert_all_identical(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@on_ops
@on_backends
def test_checkpointed_op(backend: str, op: str, reentrant: bool) -> None:
    case = op_case(op, "log-linear")
    function, names, calls = case.function(dt.ops), case.input_names(), []

    def under(*tensors: Tensor) -> Tensor:
        calls.append(1)
        with dt.backend(backend):
            return function(**dict(zip(names, tensors, strict=True)))

    def backward(call: Callable[..., Tensor]) -> Results:  # the reentrant kind takes .backward() only
        values, grad_output = op_inputs(case)
        out = call(*values.values())
        out.backward(grad_output)
        return {"out": out.detach(), **{name: t.grad for name, t in values.items()}}

    expected = backward(under)
    calls.clear()
    actual = backward(lambda *tensors: checkpoint(under, *tensors, use_reentrant=reentrant))
    assert len(calls) == 2
    assert_all_identical(actual, expected)


@on_backends
def test_checkpoint_recomputes_under_the_backend_it_is_given(backend: str) -> None:
    """By a backend object made in one block and entered in another; nothing is left set afterwards."""
    layer, x = make().to(DEVICE), frames(1, 2)
    seen = []

    def noting(x: Tensor) -> Tensor:
        seen.append(current_backend())
        return layer(x)

    def call(x: Tensor) -> Tensor:
        with dt.backend(backend):
            return checkpoint(noting, x, use_reentrant=False, context_fn=lambda: (nullcontext(), dt.backend(backend)))

    with dt.backend(backend):
        expected = run(layer, x)
    actual = run(layer, x, call=call)
    assert seen == [backend, backend]
    assert current_backend() == "auto"
    assert_all_identical(actual, expected)


class Packed:
    """Keeps what autograd saves on the CPU, and counts it."""

    def __init__(self) -> None:
        self.count = 0

    def pack(self, t: Tensor) -> tuple[torch.device, Tensor]:
        self.count += 1
        return t.device, t.detach().cpu().clone()

    def __call__(self, function: Callable[..., Tensor], *args: Tensor, **kwargs: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept[1].to(kept[0])):
            return function(*args, **kwargs)


@on_backends
def test_activations_kept_elsewhere(backend: str) -> None:
    """Saved tensors that are packed to the CPU and unpacked for backward give the same bits."""
    layer, x, packed = make().to(DEVICE), frames(1, 2), Packed()
    with dt.backend(backend):
        expected = run(layer, x)
        actual = run(layer, x, call=lambda x: packed(layer, x))
    assert packed.count > 20
    assert_all_identical(actual, expected)


@on_ops
@on_backends
def test_ops_save_tensors_where_hooks_see_them(backend: str, op: str) -> None:
    case, packed = op_case(op, "gaussian"), Packed()
    with dt.backend(backend):
        expected = run_op(case)
        actual = run_op(case, lambda **tensors: packed(case.function(dt.ops), **tensors))
    assert packed.count >= len(case.input_names())
    assert_all_identical(actual, expected)


# --- torch.func -----------------------------------------------------------------------------------------------------


def wide_layer(variant: str) -> tuple[nn.Module, Tensor]:
    return make(variant).double().to(DEVICE), frames(1, 2, dtype=torch.float64)


@on_all_variants
def test_grad_over_a_dictionary_of_parameters(variant: str) -> None:
    """torch.func.grad of functional_call, against autograd; the module's own parameters are not used."""
    layer, x = wide_layer(variant)
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}

    def scalar(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = functional_call(layer, parameters, (x,))
        return (y * cotangent(y)).sum(), y

    with dt.backend("eager"):
        expected = run(layer, x)
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(float("nan"))
        (by_parameters, by_x), y = torch.func.grad(scalar, (0, 1), has_aux=True)(parameters, x)
    assert_results_close({"out": y, "grad_x": by_x, **by_parameters}, expected, 1e-9)


@on_backends
def test_functional_call_on_every_backend(backend: str) -> None:
    """Another layer's parameters, differentiated by autograd."""
    layer, other, x = make().to(DEVICE), awake(make(), seed=8).to(DEVICE), frames(1, 2)
    parameters = dict(other.named_parameters())
    with dt.backend(backend):
        expected = run(other, x)
        y = functional_call(layer, parameters, (x,))
        assert_identical(y, expected["out"])
        gradients = torch.autograd.grad(y, list(parameters.values()), cotangent(y))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert_identical(gradient, expected[name], name)
    assert all(p.grad is None for p in layer.parameters())


@on_all_variants
def test_forward_mode_and_jacobian_of_the_layer(variant: str) -> None:
    """vjp is autograd's gradient, jacrev its rows, jvp their product, and jvp of grad a difference of gradients."""
    layer, x = wide_layer(variant)
    v = frames(1, 2, seed=4, dtype=torch.float64)

    def few(x: Tensor) -> Tensor:
        return layer(x)[0, :, 1, 2, ::3]

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    with dt.backend("eager"):
        y, pull = torch.func.vjp(layer, x)
        expected = run(layer, x)
        assert_close(y, expected["out"])
        assert_close(pull(cotangent(y))[0], expected["grad_x"])
        leaf = x.clone().requires_grad_()
        rows = few(leaf)
        expected_rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in rows.flatten()]
        jacobian = torch.func.jacrev(few)(x)
        assert_close(jacobian, torch.stack(expected_rows).view(*rows.shape, *x.shape))
        value, tangent = torch.func.jvp(few, (x,), (v,))
        assert_close(value, rows)
        assert_close(tangent, torch.tensordot(jacobian, v, dims=v.dim()))
        step = 1e-5
        difference = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
        assert_close(torch.func.jvp(gradient, (x,), (v,))[1], difference, tolerance=1e-6)


@on_ops
def test_jacobians_of_ops(op: str) -> None:
    """jacrev and jacfwd agree, and with vjp."""
    case = op_case(op, "log-linear", dtype=torch.float64, regions_dtype=torch.float64)
    values, grad_output = op_inputs(case)
    primals, every = tuple(t.detach() for t in values.values()), tuple(range(len(values)))
    function = case.function(dt.ops)

    def call(*tensors: Tensor) -> Tensor:
        return function(**dict(zip(values, tensors, strict=True)))

    with dt.backend("eager"):
        back, ahead = torch.func.jacrev(call, every)(*primals), torch.func.jacfwd(call, every)(*primals)
        pulled = torch.func.vjp(call, *primals)[1](grad_output)
    for name, b, f, p in zip(values, back, ahead, pulled, strict=True):
        assert_close(b, f, name)
        assert_close(p, torch.tensordot(grad_output, b, dims=grad_output.dim()), name)


@pytest.mark.parametrize("dims", [(1, None), (None, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("op", ["region_pool", "region_remap"])
def test_vmap_of_grad_where_one_argument_is_shared(op: str, dims: tuple[int | None, int | None]) -> None:
    """One argument for all of a batch, or batched along another dimension than the first."""
    case = op_case(op, dtype=torch.float64, regions_dtype=torch.float64)
    function, names = case.function(dt.ops), case.input_names()
    single = [t.detach() for t in op_inputs(case)[0].values()]
    variants = [[t, t + 0.25, t * 1.5] for t in single]
    inputs = [
        t if dim is None else torch.stack(three, dim) for t, three, dim in zip(single, variants, dims, strict=True)
    ]

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        def scalar(*tensors: Tensor) -> Tensor:
            return function(**dict(zip(names, tensors, strict=True))).square().sum()

        return torch.func.grad(scalar, (0, 1))(*tensors)

    with dt.backend("eager"):
        actual = torch.func.vmap(gradient, in_dims=dims)(*inputs)
        for i in range(3):
            own = [t if dim is None else v[i] for t, v, dim in zip(single, variants, dims, strict=True)]
            for name, got, want in zip(names, actual, gradient(*own), strict=True):
                assert_close(got[i], want, f"{name} {i}")


# --- data-parallel training -----------------------------------------------------------------------------------------

RANKS = 2
TRAINED = (*VARIANTS, "rsa")


class FramesFirst(dt.layers.RSA):
    """RSA on clips (B, T, C, H, W), as DyReG takes them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def trainee(variant: str) -> nn.Module:
    if variant == "rsa":
        return FramesFirst(frames(1, 1).shape[2], num_queries=2, kernel_size=3).to(DEVICE)
    return make(variant)


def ddp_loss(layer: nn.Module, rank: int, step: int) -> Tensor:
    return (layer(frames(1, 2, seed=10 * step + rank)) - 1).square().mean()


def ddp_rank(rank: int, folder: str) -> None:
    """What each process of the test below runs: train, and save what was seen."""
    from datetime import timedelta

    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    meet = Path(folder, "meet").as_uri()  # a file: no port that another process may take first
    distributed.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=timedelta(seconds=PATIENCE)
    )
    seen: dict[str, Any] = {}
    for variant in TRAINED:
        torch.manual_seed(rank)
        layer = awake(trainee(variant), seed=rank)  # DDP starts every rank from the parameters of the first
        parallel = DistributedDataParallel(layer, find_unused_parameters=False)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        start = copy.deepcopy(layer.state_dict())
        gradients = []
        for step in range(3):
            optimizer.zero_grad()
            ddp_loss(parallel, rank, step).backward()
            gradients.append({name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None})
            optimizer.step()
        seen[variant] = {"start": start, "gradients": gradients, "end": layer.state_dict()}
    torch.save(seen, Path(folder, f"rank{rank}"))
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cpu", reason="compares with processes on the CPU")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Every parameter gets a gradient, the mean over ranks, and the ranks stay the same bit for bit."""
    code = "import sys, test_ecosystem; test_ecosystem.ddp_rank(int(sys.argv[1]), sys.argv[2])"
    failures: list[BaseException] = []

    def start(rank: int) -> None:
        try:
            python(code, rank, tmp_path, **GLOO)
        except BaseException as error:
            failures.append(error)

    in_parallel(*[lambda rank=rank: start(rank) for rank in range(RANKS)])
    assert not failures, failures
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)]
    for variant in TRAINED:
        first, second = (rank[variant] for rank in ranks)
        for moment in ("start", "end"):
            assert_all_identical(second[moment], first[moment])
        layer = trainee(variant)
        layer.load_state_dict(first["start"])
        alone = []
        for rank in range(RANKS):
            layer.zero_grad()
            with dt.backend("eager"):
                ddp_loss(layer, rank, 0).backward()
            alone.append({name: p.grad.clone() for name, p in layer.named_parameters()})
        expected = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
        for found in (first, second):
            assert_results_close(found["gradients"][0], expected, 1e-4)  # another number of threads sums otherwise
            for gradients in found["gradients"][1:]:
                assert gradients.keys() == expected.keys()
        for name, _ in layer.named_parameters():
            assert not first["start"][name].equal(first["end"][name]), name


# --- export ---------------------------------------------------------------------------------------------------------


class Ops(nn.Module):
    """The three ops in one module."""

    def __init__(self, profile: str):
        super().__init__()
        self.options: dict[str, Any] = {"profile": profile, "temperature": 0.7}

    def forward(self, x: Tensor, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = (x.shape[-2], x.shape[-1])
        nodes = dt.ops.region_pool(x, regions, **self.options)
        y = dt.ops.region_remap(nodes, regions, size, **self.options)
        return nodes, y, dt.ops.region_kernel(regions, size, **self.options)


def op_arguments(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return frames(batch, seed=seed), random_regions((batch, 3), SIZE, seed=seed, kind="mixed").to(DEVICE)


def assert_same_outputs(actual: Any, expected: Any, tolerance: float) -> None:
    actual, expected = (list(t) if isinstance(t, (tuple, list)) else [t] for t in (actual, expected))
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, f"output {i}", tolerance=tolerance)


@pytest.mark.parametrize(
    ("variant", "strict"),
    [
        ("default", True),
        *((variant, False) for variant in APART),
        *in_full([("published", True), *((variant, False) for variant in REST)]),
    ],
)
def test_export_of_the_layer(variant: str, strict: bool) -> None:
    """With regions, for any batch, through a file; it holds eager whatever is chosen when it runs."""
    layer = make(variant, return_regions=True).to(DEVICE)
    batch = torch.export.Dim("batch", min=1, max=64)
    with dt.backend("eager"):
        program = torch.export.export(layer, (frames(2, 3),), dynamic_shapes={"x": {0: batch}}, strict=strict)
        expected = {count: layer(frames(count, 3, seed=count)) for count in (1, 2, 5)}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for count, want in expected.items():
        assert_same_outputs(exported(frames(count, 3, seed=count)), want, 1e-5)


@pytest.mark.parametrize(("strict", "profile"), [(True, PROFILES[0]), *((False, name) for name in PROFILES)])
def test_export_of_ops(strict: bool, profile: str) -> None:
    module = Ops(profile)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"x": {0: batch}, "regions": {0: batch}}
    with dt.backend("eager"):
        program = torch.export.export(module, op_arguments(2), dynamic_shapes=shapes, strict=strict).module()
        for count in (1, 2, 5):
            arguments = op_arguments(count, seed=count)
            assert_same_outputs(program(*arguments), module(*arguments), 1e-5)


class Relational(nn.Module):
    """Relational self-attention with its weights."""

    def __init__(self, seed: int = 5):
        super().__init__()
        values, _ = op_inputs(op_case("relational_attention", "gaussian", seed))
        self.weights = nn.ParameterDict({name: t for name, t in values.items() if name not in "qkv"})

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dt.ops.relational_attention(q, k, v, **self.weights, eps=1e-2)


def relational_features(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    case = dataclasses.replace(op_case("relational_attention", seed=seed), batch=batch)
    values = {name: t.detach() for name, t in op_inputs(case)[0].items()}
    return values["q"], values["k"], values["v"]


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_relational_attention(strict: bool) -> None:
    """For any batch, through a file."""
    module = Relational().to(DEVICE)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch} for name in "qkv"}
    with dt.backend("eager"):
        program = torch.export.export(module, relational_features(2), dynamic_shapes=shapes, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        exported = torch.export.load(file).module()
        for count in (1, 2, 5):
            features = relational_features(count, seed=count)
            assert_same_outputs(exported(*features), module(*features), 1e-5)


@pytest.mark.kernels
def test_export_keeps_the_relational_kernel() -> None:
    module, features = Relational().to(DEVICE), relational_features(2)
    with dt.backend("triton"):
        program = torch.export.export(module, features)
        assert any(str(node.target).startswith("dyreg_triton.relational") for node in program.graph.nodes)
        assert_same_outputs(program.module()(*features), module(*features), 1e-6)


@pytest.mark.kernels
def test_export_keeps_the_kernels() -> None:
    """Exported under triton, the program holds the ops themselves and runs them."""
    with dt.backend("triton"):
        program = torch.export.export(Ops("linear"), op_arguments(2))
        names = {str(node.target) for node in program.graph.nodes}
        assert {f"dyreg_triton.{op}.default" for op in REGION_OPS} <= names
        arguments = op_arguments(2, seed=1)
        expected = Ops("linear")(*arguments)
    assert_same_outputs(program.module()(*arguments), expected, 1e-6)


def onnx_session(
    module: nn.Module, arguments: tuple[Tensor, ...], names: tuple[str, ...]
) -> Callable[..., list[Tensor]]:
    """The module in ONNX Runtime, exported under eager; the inputs of these names with a batch of any size."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    with dt.backend("eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.cpu().eval(),
            tuple(t.cpu() for t in arguments),
            dynamo=True,
            verbose=False,
            dynamic_shapes={name: {0: torch.export.Dim("batch", min=1, max=64)} for name in names} or None,
        )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])

    def call(*tensors: Tensor) -> list[Tensor]:
        inputs = {i.name: t.cpu().numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        return [torch.from_numpy(t) for t in session.run(None, inputs)]

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "any_batch"),
    [
        *((variant, variant == "default") for variant in APART),
        *in_full((variant, variant == "published") for variant in REST),
    ],
)
def test_onnx_of_the_layer(variant: str, any_batch: bool) -> None:
    layer = make(variant, return_regions=True)
    session = onnx_session(layer, (frames(2, 3),), ("x",) * any_batch)
    for count in (1, 2, 5) if any_batch else (2,):
        x = frames(count, 3, seed=count).cpu()
        with dt.backend("eager"):
            assert_same_outputs(session(x), layer(x), 1e-4)


@pytest.mark.slow
@on_profiles
def test_onnx_of_ops(profile: str) -> None:
    """Regions of every kind: empty ones, and ones that reach no cell, divide by nothing there either."""
    module = Ops(profile)
    session = onnx_session(module, op_arguments(2), ("x", "regions"))
    for count in (1, 2, 5):
        arguments = tuple(t.cpu() for t in op_arguments(count, seed=count))
        with dt.backend("eager"):
            assert_same_outputs(session(*arguments), module(*arguments), 1e-5)


@pytest.mark.slow
def test_onnx_of_relational_attention() -> None:
    module = Relational()
    session = onnx_session(module, relational_features(2), ("q", "k", "v"))
    for count in (1, 2, 5):
        features = tuple(t.cpu() for t in relational_features(count, seed=count))
        with dt.backend("eager"):
            assert_same_outputs(session(*features), module(*features), 1e-5)


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


class HostTraffic(TorchDispatchMode):
    """Notes what a CUDA graph cannot hold: tensors made of Python numbers, and numbers read back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("lift_fresh", "_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_check_for_host_traffic_sees_it() -> None:
    with HostTraffic() as traffic:
        torch.ones(()).add(torch.tensor([2.0])).item()
    assert traffic.seen == ["lift_fresh", "_local_scalar_dense"]


@on_profiles
@pytest.mark.parametrize("backend", backends("eager", "reference"))
def test_ops_wait_for_nothing(backend: str, profile: str) -> None:
    """On a GPU each would stop the queue, and a capture."""
    x, regions = (t.requires_grad_() for t in op_arguments(2))
    with HostTraffic() as traffic, dt.backend(backend):
        sum(t.sum() for t in Ops(profile)(x, regions)).backward()
    assert traffic.seen == []


@pytest.mark.parametrize("backend", backends("eager", "reference"))
def test_relational_attention_waits_for_nothing(backend: str) -> None:
    values, grad_output = op_inputs(op_case("relational_attention", "gaussian"))
    function = op_case("relational_attention", "gaussian").function(dt.ops)
    with HostTraffic() as traffic, dt.backend(backend):
        function(**values).backward(grad_output)
    assert traffic.seen == []


@on_variants
def test_the_layer_waits_for_nothing(variant: str) -> None:
    layer, x = make(variant).to(DEVICE), frames(1, 2)
    with HostTraffic() as traffic, dt.backend("eager"):
        layer(x).sum().backward()
    assert traffic.seen == []


def replayed(function: Callable[..., tuple[Tensor, ...]], *first: Tensor) -> Callable[..., list[Tensor]]:
    """`function` captured in a CUDA graph; a call copies new inputs into the captured ones and replays."""
    static = [t.detach().clone().requires_grad_(t.requires_grad) for t in first]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*static)

    def call(*tensors: Tensor) -> list[Tensor]:
        with torch.no_grad():
            for kept, new in zip(static, tensors, strict=True):
                kept.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        return [t.detach().clone() for t in out]

    return call


@needs_gpu
@on_profiles
@on_ops
@on_backends
def test_ops_in_a_cuda_graph(backend: str, op: str, profile: str) -> None:
    """Forward and backward, replayed on inputs that the capture has not seen."""
    function = op_case(op, profile).function(dt.ops)
    names = op_case(op, profile).input_names()
    grad_output = op_inputs(op_case(op, profile))[1]

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        with dt.backend(backend):
            out = function(**dict(zip(names, tensors, strict=True)))
        return (out, *torch.autograd.grad(out, tensors, grad_output))

    call = replayed(both, *op_inputs(op_case(op, profile))[0].values())
    for seed in (6, 7):
        tensors = tuple(op_inputs(op_case(op, profile, seed))[0].values())
        for i, (actual, expected) in enumerate(zip(call(*tensors), both(*tensors), strict=True)):
            assert_close(actual, expected, f"result {i}")


@needs_gpu
@on_variants
@on_backends
def test_the_layer_in_a_cuda_graph(backend: str, variant: str) -> None:
    layer = make(variant).to(DEVICE)

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        with dt.backend(backend), torch.no_grad():
            return layer(x, return_regions=True)

    call = replayed(forward, frames(2, 3))
    for seed in (6, 7):
        x = frames(2, 3, seed=seed)
        for actual, expected in zip(call(x), forward(x), strict=True):
            assert_close(actual, expected, tolerance=1e-4)


# --- the same bits, always ------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic() -> Iterator[Callable[[], None]]:
    """Turn torch's deterministic algorithms on by a call; off again after the test."""
    former = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield lambda: torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(former[0], warn_only=former[1])


@on_ops
@on_backends
def test_ops_under_deterministic_algorithms(backend: str, op: str, deterministic: Callable[[], None]) -> None:
    """Accepted, and without effect: torch fills uninitialised memory with NaN there."""
    case = op_case(op, "log-linear", kind="mixed")
    with dt.backend(backend):
        expected = run_op(case)
        deterministic()
        assert_all_identical(run_op(case), expected)


@on_variants
@on_backends
def test_layer_under_deterministic_algorithms(backend: str, variant: str, deterministic: Callable[[], None]) -> None:
    """Forward and backward of the whole layer are the same bits from run to run."""
    layer, x = make(variant).to(DEVICE), frames(1, 2)
    with dt.backend(backend):
        before = run(layer, x)
        deterministic()
        first, second = run(layer, x), run(copy.deepcopy(layer), x)
    assert_all_identical(second, first)
    if DEVICE.type == "cpu":
        assert_all_identical(first, before)
    else:  # where other algorithms may be chosen
        assert_results_close(first, before, 1e-4)


def digest(backend: str) -> str:
    """Of every bit that a layer and the ops give, forward and backward."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.manual_seed(11)
    summary = hashlib.sha256()
    with dt.backend(backend):
        results = [run(make(variant).to(DEVICE), frames(1, 2)) for variant in ("default", "pooled")]
        results += [run_op(op_case(op, "gaussian")) for op in OPS]
    for result in results:
        for name, t in result.items():
            assert t is not None, name
            summary.update(name.encode() + t.cpu().contiguous().numpy().tobytes())
    return summary.hexdigest()


@pytest.mark.slow
@on_backends
def test_same_bits_in_another_process(backend: str, deterministic: Callable[[], None]) -> None:
    code = "import sys, test_ecosystem; print(test_ecosystem.digest(sys.argv[1]))"
    threads = torch.get_num_threads()
    try:
        assert digest(backend) == python(code, backend).split()[-1]
    finally:
        torch.set_num_threads(threads)


# --- threads --------------------------------------------------------------------------------------------------------


def in_parallel(*functions: Callable[[], Any]) -> list[Any]:
    """The results of functions that run at once, each in a thread; an exception is raised here."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


PAIRS = [
    pytest.param(a.values[0], b.values[0], marks=[*a.marks, *b.marks]) for a, b in itertools.combinations(backends(), 2)
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_backends_in_two_threads(one: str, other: str) -> None:
    """Ops and one layer, forward and backward at the same time: each thread gets the bits that it gets alone."""
    layer, x = make().to(DEVICE), frames(1, 2)
    parameters = list(layer.parameters())

    def everything() -> list[Tensor]:
        results = [t for op in OPS for t in run_op(op_case(op)).values() if t is not None]
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        return [*results, y.detach(), *torch.autograd.grad(y, [leaf, *parameters], cotangent(y))]

    def work(backend: str, barrier: threading.Barrier, repeats: int) -> list[list[Tensor]]:
        with dt.backend(backend):
            barrier.wait(PATIENCE)  # both backends are set before either is used
            found = [everything() for _ in range(repeats)]
            barrier.wait(PATIENCE)
        return found

    alone = [in_parallel(lambda b=b: work(b, threading.Barrier(1), 1))[0][0] for b in (one, other)]
    assert not all(a.equal(b) for a, b in zip(*alone, strict=True))  # or nothing could be told apart
    both = threading.Barrier(2)
    together = in_parallel(*[lambda b=b: work(b, both, 4) for b in (one, other)])
    for backend, found, expected in zip((one, other), together, alone, strict=True):
        for results in found:
            for i, (a, b) in enumerate(zip(results, expected, strict=True)):
                assert_identical(a, b, f"{backend}: result {i}")


# --- in use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["default", "pooled"])
def test_made_on_meta_and_loaded(variant: str) -> None:
    """As large models are: no memory until the weights come."""
    layer, x = make(variant), frames(1, 2).cpu()
    with torch.device("meta"):
        empty = dt.layers.DyReG(4, SIZE, **{**SMALL, **VARIANTS[variant]})
    twin = empty.to_empty(device="cpu")
    for buffer in twin.buffers():  # what uninitialised memory may well hold
        buffer.fill_(-(2**20))
    twin.load_state_dict(layer.state_dict())
    assert_close(twin(x), layer(x), tolerance=1e-6)


@on_all_variants
def test_shapes_on_meta(variant: str) -> None:
    """Shapes and dtypes without arithmetic, backward too."""
    layer = make(variant, return_regions=True).to("meta")
    x = torch.empty(2, 3, 4, *SIZE, device="meta", requires_grad=True)
    y, regions = layer(x)
    assert y.shape == x.shape
    assert regions.shape == (2, 3, 4, *(SIZE if variant == "semantic" else (4,)))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in [x, *layer.parameters()])


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_shapes_of_relational_attention_on_meta(backend: str) -> None:
    case = op_case("relational_attention", "gaussian")
    values = {name: t.detach().to("meta").requires_grad_() for name, t in op_inputs(case)[0].items()}
    with dt.backend(backend):
        y = case.function(dt.ops)(**values)
    assert y.shape == case.out_shape()
    y.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in values.values())


@on_backends
def test_state_travels_between_backends(backend: str) -> None:
    """Trained on one backend, saved, loaded as plain tensors, run on another."""
    layer, x = make().to(DEVICE), frames(1, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    with dt.backend(backend):
        for _ in range(2):
            optimizer.zero_grad()
            (layer(x) - 1).square().mean().backward()
            optimizer.step()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = dt.layers.DyReG(4, SIZE, **SMALL).to(DEVICE)
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with dt.backend(backend):
        expected = layer(x)
        assert_identical(twin(x), expected)
    with dt.backend("reference"):
        assert_close(twin(x), expected, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@on_variants
@on_backends
def test_whole_module_in_16_bits(backend: str, variant: str, dtype: torch.dtype) -> None:
    """layer.half() and layer.bfloat16(), forward and backward."""
    layer, x = make(variant).to(DEVICE), frames(1, 2)
    with dt.backend(backend):
        expected = run(layer, x)
        actual = run(copy.deepcopy(layer).to(dtype), x.to(dtype))
    for name, t in actual.items():
        assert t is not None, name
        assert t.dtype == dtype, name
        assert t.isfinite().all(), name
    assert relative_error(actual["out"], expected["out"]) < (0.01 if dtype == torch.float16 else 0.05)
    assert relative_error(actual["grad_x"], expected["grad_x"]) < (0.1 if dtype == torch.float16 else 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@on_backends
def test_mixed_precision_training(backend: str, dtype: torch.dtype) -> None:
    """Forward under autocast, backward outside of it, gradients scaled: close to float32's; overflow is skipped."""
    layer, x = make().to(DEVICE), frames(1, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)

    def scaled_backward() -> None:
        optimizer.zero_grad()
        with dt.backend(backend):
            with torch.autocast(DEVICE.type, dtype=dtype):
                loss = (layer(x) - 1).square().mean()
            scaler.scale(loss).backward()

    with dt.backend(backend):
        (layer(x) - 1).square().mean().backward()
    expected = torch.cat([p.grad.flatten() for p in layer.parameters()])
    scaled_backward()
    scaler.unscale_(optimizer)
    actual = torch.cat([p.grad.flatten() for p in layer.parameters()])
    assert relative_error(actual, expected) < (0.1 if dtype == torch.float16 else 0.3)
    before = copy.deepcopy(layer.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert any(not t.equal(before[name]) for name, t in layer.state_dict().items())
    scaler.update(float("inf"))
    before = copy.deepcopy(layer.state_dict())
    scaled_backward()
    scaler.step(optimizer)
    assert_all_identical(layer.state_dict(), before)


@on_variants
@on_backends
def test_inference_mode(backend: str, variant: str) -> None:
    """The bits of no_grad, those of a layer made in inference mode to rounding, and no graph."""
    layer, x = make(variant).to(DEVICE), frames(1, 2)
    with dt.backend(backend):
        with torch.no_grad():
            expected = layer(x)
        with torch.inference_mode():
            y = layer(x)
            assert y.is_inference()
            made = make(variant).to(DEVICE)
            made.load_state_dict(layer.state_dict())
            assert_close(made(x), expected, tolerance=1e-5)
        assert_identical(y.clone(), expected)
        run(layer, x)  # and training goes on


@on_variants
@on_backends
def test_weights_in_channels_last(backend: str, variant: str) -> None:
    layer, x = make(variant).to(DEVICE), frames(1, 2)
    with dt.backend(backend):
        expected = run(layer, x)
        twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        actual = run(twin, x)
    assert any(not p.is_contiguous() for p in twin.parameters()) or variant == "pooled"  # it has 1 x 1 kernels only
    assert_results_close(actual, expected, 1e-5)


@on_variants
@on_backends
def test_gradient_accumulation(backend: str, variant: str) -> None:
    """Two backward passes add up, bit for bit, and leave their inputs' gradients apart."""
    layer, parts = make(variant).to(DEVICE), [frames(1, 2, seed=seed) for seed in (1, 2)]
    with dt.backend(backend):
        alone = [run(layer, x) for x in parts]
        layer.zero_grad()
        for x in parts:
            y = layer(x)
            y.backward(cotangent(y))
    for name, p in layer.named_parameters():
        assert_identical(p.grad, alone[0][name] + alone[1][name], name)


FROZEN: dict[str, tuple[str, ...]] = {  # beginnings of parameters' names
    "input": ("dynamic_graph.kernel_projection1.",),  # which is added to the map: pooling's gradient for it is not made
    "layer": ("",),
    "regions": ("dynamic_graph.offset_", "dynamic_graph.glore.", "dynamic_graph.norm_dict.offset_"),
    "graph": ("dynamic_graph.rstg.",),
}


@pytest.mark.parametrize("frozen", FROZEN)
@on_backends
def test_partly_frozen(backend: str, frozen: str) -> None:
    """What is not frozen gets the gradient that it always gets; what is frozen gets none."""
    layer, x = make("pooled", node_channels=4).to(DEVICE), frames(1, 2)
    with dt.backend(backend):
        expected = run(layer, x)
        layer.zero_grad(set_to_none=True)
        for name, p in layer.named_parameters():
            p.requires_grad_(not name.startswith(FROZEN[frozen]))
        x = x.clone().requires_grad_(frozen != "input")
        y = layer(x)
        y.backward(cotangent(y))
    actual = {"out": y.detach(), "grad_x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    absent = {name for name, p in layer.named_parameters() if not p.requires_grad}
    if frozen == "input":
        absent.add("grad_x")
    assert absent
    for name in absent:
        assert actual.pop(name) is None, name
    assert_results_close(actual, {name: expected[name] for name in actual}, 1e-5)


@pytest.mark.parametrize("variant", [*APART, *in_full(REST)])
def test_traced(variant: str) -> None:
    """torch.jit.trace of eager, saved and loaded, on batches and lengths that it has not seen, with gradients."""
    layer = make(variant).to(DEVICE)
    with dt.backend("eager"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(layer, (frames(2, 3),))
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            traced = torch.jit.load(file)
        for lead in ((2, 3), (1, 3), (5, 2)):
            x = frames(*lead, seed=8)
            assert_results_close(run(traced, x), run(layer, x), 1e-4)


@pytest.mark.parametrize(
    ("backend", "variant"),
    [
        ("eager", "default"),
        *in_full([("eager", "published")]),
        *[pytest.param(*p.values, "default", marks=p.marks) for p in backends("triton")],
    ],
)
def test_compiled_training_step(backend: str, variant: str) -> None:
    """Forward, backward and the optimiser's step in one compiled function: the parameters of the plain loop."""
    torch._dynamo.reset()
    layer = make(variant).to(DEVICE)
    twin = copy.deepcopy(layer)

    def trainer(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = (layer(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        return step

    with dt.backend(backend), torch._dynamo.config.patch(allow_rnn=True):
        plain, compiled = trainer(layer), torch.compile(trainer(twin), backend="aot_eager")
        losses = [[step(frames(1, 2, seed=i)).item() for i in range(3)] for step in (plain, compiled)]
    torch._dynamo.reset()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_all_close(twin.state_dict(), layer.state_dict(), tolerance=1e-4)


# --- more than 2**31 elements ---------------------------------------------------------------------------------------

STEP = 2**30  # fits int32, and twice it does not


def far_map(dimension: int) -> Tensor:
    """(3, 3, 3, 3), with `STEP` elements from one frame, channel, row or column to the next."""
    strides = [27, 9, 3, 1]
    strides[dimension] = STEP
    return torch.empty(2 * STEP + 128, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 3, 3, 3), strides)


def far_offsets() -> None:
    """Maps read, and written, at offsets that no int32 holds, though every stride does."""
    from dyreg_triton.ops.region_launches import scatter

    generator = torch.Generator().manual_seed(0)
    values, v = (torch.randn(s, generator=generator).bfloat16().to(DEVICE) for s in ((3, 3, 3, 3), (3, 2, 3)))
    regions = random_regions((3, 2), (3, 3), seed=1).to(DEVICE)

    def results(backend: str, x: Tensor) -> list[Tensor]:
        """Both passes over a map: pooling it with its gradients, and re-mapping with it as incoming gradient."""
        x, nodes, r = (t.detach().requires_grad_() for t in (x, v, regions))
        with dt.backend(backend):
            pooled, y = dt.ops.region_pool(x, r), dt.ops.region_remap(nodes, r, (3, 3))
        only_regions = torch.autograd.grad(pooled, r, v, retain_graph=True)
        return [pooled, *only_regions, *torch.autograd.grad(pooled, (x, r), v), *torch.autograd.grad(y, (nodes, r), x)]

    expected = results("eager", values)
    with dt.backend("eager"):
        expected_map = dt.ops.region_remap(v, regions, (3, 3))
    for dimension in range(4):
        far = far_map(dimension)
        far.copy_(values)
        for i, (a, b) in enumerate(zip(results("triton", far), expected, strict=True)):
            assert_close(a, b, f"dimension {dimension}, result {i}", tolerance=1e-2)
        far.fill_(float("nan"))
        scatter(far, v, None, regions, "linear", 1.0)
        assert_close(far.clone(), expected_map, f"dimension {dimension}, map", tolerance=1e-2)
        del far


def large_map_triton() -> None:
    """A contiguous map, in larger tiles than usual because the interpreter takes about a millisecond for each."""
    from dyreg_triton import tuning

    height, width = 2**10, 2**10 + 1
    x = torch.empty(9, 256, height, width, dtype=torch.bfloat16, device=DEVICE)
    assert x.is_contiguous()
    assert 8 * x.stride(0) > 2**31
    corner = x[-1, :, -4:, -5:]
    corner.copy_(torch.arange(5120).view(256, 4, 5) % 31)
    regions = torch.tensor([[width - 1.4, height - 1.3, 1.7, 1.4]], device=DEVICE).expand(9, 1, 4)
    with dt.backend("triton"), tuning.override(lambda *_: tuning.Config(16, 256, 2**12)):
        found = dt.ops.region_pool(x, regions)[-1]
    own = regions[-1] - torch.tensor([width - 5.0, height - 4.0, 0.0, 0.0], device=DEVICE)
    with dt.backend("eager"):
        assert_close(found, dt.ops.region_pool(corner, own), tolerance=1e-2)


MANY = {"frames": (33, 2**14, 64, 64), "small maps": (45, 2**20, 7, 7)}


def large_batch(shape: tuple[int, int, int, int], backend: str, dtype: torch.dtype, write: bool) -> None:
    """More than 2**31 elements in all; the last frame gets what it gets alone.

    write: whether maps of that size are made too (re-mapping, and the map's gradient).
    """
    count, channels, *size = shape
    x = torch.empty(shape, dtype=dtype, device=DEVICE)
    assert x[:-1].numel() >= 2**31
    generator = torch.Generator().manual_seed(0)
    for i in (0, -2, -1):
        x[i] = torch.randn(channels, 1, 1, generator=generator).to(DEVICE, dtype)
        x[i] += torch.randn(size, generator=generator).to(DEVICE, dtype)
    regions = random_regions((count, 2), (size[0], size[1]), seed=1).to(DEVICE)
    v = torch.randn(count, 2, channels, generator=generator).to(DEVICE, dtype)

    def results(x: Tensor, v: Tensor, regions: Tensor) -> Iterator[tuple[str, Tensor]]:
        x, v, r = x.detach().requires_grad_(write), v.detach().requires_grad_(), regions.detach().requires_grad_()
        pooled = dt.ops.region_pool(x, r)
        yield "pooled", pooled[-1]
        gradients = torch.autograd.grad(pooled, (r, x) if write else (r,), v.detach())
        for i, t in enumerate(gradients):
            yield f"gradient {i}", t[-1]
        del gradients, pooled
        if write:
            y = dt.ops.region_remap(v, r, (size[0], size[1]))
            yield "map", y[-1]
            for i, t in enumerate(torch.autograd.grad(y, (v, r), x.detach())):
                yield f"re-mapping's gradient {i}", t[-1]

    with dt.backend(backend):
        found = {name: t.detach().clone() for name, t in results(x, v, regions)}
        expected = {name: t.detach().clone() for name, t in results(x[-1:], v[-1:], regions[-1:])}
    assert_all_close(found, expected, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5)


def on_its_own(call: str, gigabytes: int) -> None:
    """Run a function of this file in a process of its own: what goes wrong there is a segmentation fault.

    gigabytes: of memory that there must be, although on the CPU most of it is never touched.
    """
    if DEVICE.type == "cuda":
        memory = torch.cuda.mem_get_info()[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of memory")
    python(f"import torch, test_ecosystem; test_ecosystem.{call}")


@pytest.mark.kernels
@pytest.mark.slow
def test_offsets_beyond_int32_of_strides_within() -> None:
    on_its_own("far_offsets()", 6)


@pytest.mark.kernels
@pytest.mark.slow
def test_contiguous_map_of_more_than_int32_elements() -> None:
    on_its_own("large_map_triton()", 6)


@pytest.mark.slow
def test_batch_of_more_than_int32_elements_on_eager() -> None:
    """Pages that nobody wrote cost no memory: on the CPU the map is read, and only small results are made."""
    on_its_own(f"large_batch({MANY['frames']}, 'eager', torch.float32, False)", 12)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("backend", backends("triton", "eager"))
def test_batch_of_more_than_int32_elements_on_a_gpu(backend: str, many: str) -> None:
    on_its_own(f"large_batch({MANY[many]}, {backend!r}, torch.bfloat16, True)", 60)
