"""The authors' own numbers: outputs, intermediates and every gradient, from stored float64 runs of their code."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import INTERPRETED, assert_close, backends, backends_and_dtypes, mismatch
from torch import Tensor, nn
from torch.nn import functional as F

import dyreg_triton as dt

FOLDER = Path(__file__).parent / "golden"
# largest error of a value, and relative error of a gradient; the stored numbers are float64 results in float32
TOLERANCES = {torch.float32: (2e-5, 2e-4), torch.float64: (1e-6, 1e-6)}
on_backends = pytest.mark.parametrize("backend", backends())
on_backends_and_dtypes = pytest.mark.parametrize(
    ("backend", "dtype"),
    [*backends_and_dtypes(torch.float32), pytest.param("eager", torch.float64, id="eager-float64")],
)


def files() -> dict[str, list[Path]]:
    """Files by case: one case may be in several parts."""
    cases: dict[str, list[Path]] = {}
    for path in sorted(FOLDER.glob("*.safetensors")):
        cases.setdefault(path.name.split(".")[0], []).append(path)
    return cases


CASES = files()


class Golden:
    """A stored case: metadata and tensors by their prefix."""

    def __init__(self, case: str, device: torch.device):
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        for path in CASES[case]:
            with safe_open(path, "pt") as f:
                self.metadata |= f.metadata()
                self.tensors |= {name: f.get_tensor(name).to(device) for name in f.keys()}  # noqa: SIM118

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix.<name>`, by <name>; floating ones in float32."""
        return {
            name.removeprefix(f"{prefix}."): t.float() if t.is_floating_point() else t
            for name, t in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    def json(self, name: str, default: object = None) -> object:
        return json.loads(self.metadata[name]) if name in self.metadata else default


def assert_largest_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """The largest difference over the largest value."""
    tolerance = TOLERANCES[actual.dtype][0]
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert expected.any()
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance, f"{name} has largest error {error:.3g} > {tolerance}"


def assert_gradients(golden: Golden, module: nn.Module, stored: Iterable[str], *, floor: float = 0.0) -> None:
    """Every stored gradient; parameters without one, or with an exact or a mathematical zero, are told apart.

    floor: of the norm of a gradient, as a fraction of the largest gradient's.
    """
    expected = golden.under("grad.w")
    absent, exact, mathematical = (
        set(golden.json(f"params_{name}_grad", []))  # type: ignore[call-overload]
        for name in ("without", "with_exactly_zero", "with_mathematically_zero")
    )
    parameters = dict(module.named_parameters())
    assert set(stored) <= expected.keys() | absent | exact | mathematical
    scale = max(g.norm().item() for g in expected.values())
    problems = {}
    for name in stored:
        grad = parameters[name].grad
        if name in absent:
            problems[name] = None if grad is None or not grad.any() else "has a gradient"
        elif name in exact:
            problems[name] = None if grad is not None and not grad.any() else "is not exactly zero"
        elif name in mathematical:
            assert name not in expected or not expected[name].any()
            problems[name] = None if grad is not None and grad.norm() < 1e-5 * scale else f"is not zero: {grad}"
        else:
            assert expected[name].any(), name
            problems[name] = mismatch(grad, expected[name], tolerance=TOLERANCES[grad.dtype][1], floor=floor * scale)
    wrong = [f"grad of {name} {problem}" for name, problem in problems.items() if problem]
    assert not wrong, "; ".join(wrong)


def watch(module: nn.Module, kept: dict[str, Tensor]) -> None:
    """Keep the intermediates that the files hold, under their names there."""

    def keep(name: str, after: bool = True) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            kept[name] = (output if after else inputs[0]).detach()

        return hook

    for path, child in module.named_modules():
        last = path.rpartition(".")[2]
        if last in ("fishnet", "glore"):
            child.register_forward_hook(keep(f"mid.{last}"))
        elif last == "rstg":
            child.register_forward_hook(keep("mid.nodes", after=False))
            child.register_forward_hook(keep("mid.graph_nodes"))
        elif last == "dynamic_graph_projection":
            child.register_forward_hook(keep("mid.projected"))
        elif path == "norm_dict.before_graph_norm":
            child.register_forward_hook(keep("mid.before_graph_norm"))
        elif path == "projection":
            child.register_forward_hook(keep("mid.projection"))
        elif last in ("conv_p", "conv_q", "conv_t"):
            child.register_forward_hook(keep(f"mid.logits_{last[-1]}"))
        elif last == "conv2" and hasattr(module.get_submodule(path.rpartition(".")[0]), "conv_p"):
            child.register_forward_hook(keep("mid.bilinear", after=False))
        elif path in ("conv1", "batransform", "theta", "phi", "g", "t", "p"):
            child.register_forward_hook(keep(f"mid.{path}"))


def check_intermediates(golden: Golden, module: nn.Module, kept: dict[str, Tensor]) -> set[str]:
    """Compare what `watch` kept and what the module left, and return the names compared."""
    graph = getattr(module, "dynamic_graph", module)
    if hasattr(graph, "offsets"):
        kept |= {"mid.regions": graph.offsets, "mid.kernel": graph.kernel}
        for i, name in enumerate(("kernel_h", "kernel_w", "kernel_center_h", "kernel_center_w")):
            assert_close(getattr(graph, name), graph.offsets[..., i].double())
    for name in ("mid.nodes", "mid.graph_nodes", "mid.glore"):  # stored with nodes last
        if name in kept:
            kept[name] = kept[name].mT
    names = kept.keys() & golden.tensors.keys()
    for name in names:
        assert_largest_close(kept[name], golden.tensors[name].float(), name)
    return set(names)


MODULES = [
    case
    for case in CASES
    if case.startswith(("dyreg_", "rstg_")) and not case.startswith(("dyreg_pool_", "dyreg_convnet_"))
]


RSA = [case for case in CASES if case.startswith("rsa_")]
# interpreted, the others take too long
RSA_INTERPRETED = {"rsa_V_V", "rsa_R_V", "rsa_R_VplusR", "rsa_VplusR_R", "rsa_din_ne_dout", "rsa_eps"}
BAT = [case for case in CASES if case.startswith(("bat_", "bat2d_"))]
NONLOCAL = [case for case in CASES if case.startswith(("nl2d_", "nl3d_"))]


def test_all_cases_are_there() -> None:
    """Every file is compared by one of the tests below."""
    assert len(CASES) == 42
    assert len(MODULES) == 10
    assert len(RSA) == 13
    assert len(BAT) == 12
    assert len(NONLOCAL) == 3
    assert set(RSA) > RSA_INTERPRETED
    assert len(CASES["dyreg_center_default"]) == 2


@pytest.mark.parametrize("case", MODULES)
@on_backends_and_dtypes
def test_module(backend: str, dtype: torch.dtype, case: str, device: torch.device) -> None:
    golden = Golden(case, device)
    ctor, name = golden.json("ctor"), golden.metadata["upstream_class"]
    ours = {} if name.endswith("RSTG") else {"keep_regions": True}
    module = dt.compat.build(name, ctor, **ours).to(device)
    module.load_state_dict(golden.under("state"), strict=True)
    for key, value in module.state_dict().items():
        assert value.dtype == golden.tensors[f"state.{key}"].dtype, key
    module.eval().to(dtype)
    kept: dict[str, Tensor] = {}
    watch(module, kept)
    x = golden.under("input")["x"].to(dtype).requires_grad_()
    with dt.backend(backend):
        y = module(x)
        y.backward(golden.under("input")["g"].to(dtype))
    assert_largest_close(y.detach(), golden.under("output")["y"], "output.y")
    assert_close(x.grad, golden.under("grad")["x"], "grad.x", tolerance=TOLERANCES[dtype][1])
    assert_gradients(golden, module, dict(module.named_parameters()))
    compared = check_intermediates(golden, module, kept)
    if name.endswith("RSTG"):
        assert compared == {"mid.before_graph_norm"}
    else:
        assert {"mid.regions", "mid.kernel", "mid.nodes", "mid.graph_nodes"} < compared
        assert compared & {"mid.fishnet", "mid.glore"}


@pytest.mark.parametrize("case", RSA)
@on_backends_and_dtypes
def test_rsa(backend: str, dtype: torch.dtype, case: str, device: torch.device) -> None:
    if backend == "triton" and INTERPRETED and case not in RSA_INTERPRETED:
        pytest.skip("takes too long where kernels are interpreted")
    golden = Golden(case, device)
    module = dt.compat.build(golden.metadata["upstream_class"], golden.json("ctor")).to(device)
    module.load_state_dict(golden.under("state"), strict=True)
    module.eval().to(dtype)
    kept: dict[str, Tensor] = {}
    watch(module, kept)
    x = golden.under("input")["x"].to(dtype).requires_grad_()
    with dt.backend(backend):
        y = module(x)
        y.backward(golden.under("input")["g"].to(dtype))
    assert_largest_close(y.detach(), golden.under("output")["y"], "output.y")
    assert_close(x.grad, golden.under("grad")["x"], "grad.x", tolerance=TOLERANCES[dtype][1])
    assert_gradients(golden, module, dict(module.named_parameters()))
    assert check_intermediates(golden, module, kept) or case in ("rsa_R_R", "rsa_R_VplusR")  # which store none


@pytest.mark.parametrize("case", BAT + NONLOCAL)
@on_backends_and_dtypes
def test_bilinear_and_nonlocal(backend: str, dtype: torch.dtype, case: str, device: torch.device) -> None:
    golden = Golden(case, device)
    module = dt.compat.build(golden.metadata["upstream_class"], golden.json("ctor")).to(device)
    module.load_state_dict(golden.under("state"), strict=True)
    for key, value in module.state_dict().items():
        assert value.dtype == golden.tensors[f"state.{key}"].dtype, key
    module.eval().to(dtype)
    kept: dict[str, Tensor] = {}
    watch(module, kept)
    x = golden.under("input")["x"].to(dtype).requires_grad_()
    with dt.backend(backend):
        y = module(x)
        y.backward(golden.under("input")["g"].to(dtype))
    assert_largest_close(y.detach(), golden.under("output")["y"], "output.y")
    assert_close(x.grad, golden.under("grad")["x"], "grad.x", tolerance=TOLERANCES[dtype][1])
    assert_gradients(golden, module, dict(module.named_parameters()))
    assert check_intermediates(golden, module, kept) == {name for name in golden.tensors if name.startswith("mid.")}


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("dyreg_pool_")])
@on_backends
def test_pool(backend: str, case: str, device: torch.device) -> None:
    """Offsets to regions, pooling and re-mapping alone."""
    golden = Golden(case, device)
    ctor, given = golden.json("ctor"), golden.under("input")
    size, grid = (ctor["H"], ctor["W"]), (ctor["h"], ctor["w"])  # type: ignore[index]
    x, nodes, offsets = (given[name].requires_grad_() for name in ("x", "nodes", "offsets"))
    with dt.backend(backend):
        regions = dt.layers.regions_from_offsets(offsets, grid=grid, size=size, init=ctor["init_regions"])  # type: ignore[index]
        kernel = dt.ops.region_kernel(regions, size)
        pooled = dt.ops.region_pool(x, regions).mT
        mapped = dt.ops.region_remap(nodes.flatten(2).mT, regions, size)
        y = torch.cat([pooled.flatten(1), mapped.flatten(1)], dim=1)
        y.backward(given["g"])
    cx, cy, w, h = regions.detach().unsqueeze(2).unbind(-1)
    mid = golden.under("mid")
    assert_largest_close(torch.stack([h, w, cy, cx], dim=-1), mid["regions"], "mid.regions")
    assert_largest_close(kernel.detach().unflatten(1, grid), mid["kernel"], "mid.kernel")
    assert_largest_close(y.detach(), golden.under("output")["y"], "output.y")
    for name, t in (("x", x), ("nodes", nodes), ("offsets", offsets)):
        assert_close(t.grad, golden.under("grad")[name], f"grad.{name}", tolerance=TOLERANCES[torch.float32][1])
    if "clamp" in case:
        clamped = (mid["regions"][..., 0, 2:] == size[0] - 1) | (mid["regions"][..., 0, 2:] == 0)
        assert clamped.any()
        assert offsets.grad[..., 2:][clamped].eq(0).all()
        assert golden.under("grad")["offsets"][..., 2:][clamped].eq(0).all()


class ConvNet(nn.Module):
    """The small network around the published wrapper, as the file's metadata describe it."""

    def __init__(self, ctor: dict):
        super().__init__()
        widths = (3, ctor["c1"], ctor["c2"], ctor["c3"])
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
        self.graph = dt.compat.build(
            "ops.dyreg.DynamicGraphWrapper",
            ctor["wrapper"],
            params=ctor["params"],
            rnn_type=ctor["rnn_type"],
            keep_regions=True,
        )
        self.fc = nn.Linear(ctor["c3"], ctor["classes"])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x.flatten(0, 1))))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.graph(y.unflatten(0, x.shape[:2]))
        y = F.relu(self.bn3(self.conv3(y)))
        return self.fc(y.mean((-2, -1)).unflatten(0, x.shape[:2]).mean(1))


def fill(module: nn.Module, entries: list, salt: str) -> None:
    """Fill every entry of a state_dict by the file's rule."""
    state = module.state_dict()
    assert [[name, list(t.shape)] for name, t in sorted(state.items())] == [entry[:2] for entry in entries]
    for name, shape, kind in entries:
        if kind == "keep":
            continue
        generator = torch.Generator("cpu").manual_seed(zlib.crc32((salt + name).encode("utf-8")))
        n = torch.randn(shape, generator=generator, dtype=torch.float32)
        fan_in = 1
        for side in shape[1:] or shape:
            fan_in *= side
        filled = {
            "weight": lambda n=n, fan_in=fan_in: min(0.05, fan_in**-0.5) * n,
            "norm_weight": lambda n=n: 1 + 0.1 * n,
            "bias": lambda n=n: 0.1 * n,
            "running_mean": lambda n=n: 0.1 * n,
            "running_var": lambda n=n: (1 + 0.1 * n).abs(),
        }[kind]()
        state[name].copy_(filled)


@on_backends_and_dtypes
def test_convnet(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    golden = Golden("dyreg_convnet_16", device)
    module = ConvNet(golden.json("ctor")).to(device).eval()  # type: ignore[arg-type]
    assert sum(p.numel() for p in module.parameters()) == golden.json("n_params")
    fill(module, golden.json("entries"), golden.metadata["salt"])  # type: ignore[arg-type]
    module.to(dtype)
    kept: dict[str, Tensor] = {}
    watch(module, kept)
    module.graph.register_forward_hook(lambda m, i, output: kept.update({"mid.graph_every8th_channel": output[:, ::8]}))
    x = golden.under("input")["x"].to(dtype).requires_grad_()
    with dt.backend(backend):
        y = module(x)
        y.backward(golden.under("input")["g"].to(dtype))
    assert_largest_close(y.detach(), golden.under("output")["y"], "output.y")
    assert_close(x.grad, golden.under("grad")["x"], "grad.x", tolerance=TOLERANCES[dtype][1])
    stored = golden.under("grad.w")
    assert len(stored) > 50
    # the nodes are so alike here that the attention's gradients are a millionth of the others
    assert_gradients(golden, module, stored, floor=1e-5 if dtype == torch.float32 else 0.0)
    compared = {name: t for name, t in kept.items() if name in golden.tensors}
    compared["mid.regions"] = module.graph.dynamic_graph.offsets
    compared |= {name: compared[name].mT for name in ("mid.nodes", "mid.graph_nodes")}
    assert len(compared) == 4
    for name, t in compared.items():
        assert_largest_close(t.detach(), golden.tensors[name].float(), name)
