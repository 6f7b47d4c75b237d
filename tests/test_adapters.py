"""PEFT and accelerate themselves on the layers: what they put in the place of submodules, and around them, counts.

`make adapters` installs them; test_leaves.py has the same in our own words, for every run.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import CLIP, LAYERS
from published import RSA as PublishedRSA
from support import assert_close, awake, relative_error
from swap_cases import VARIANTS, holder
from test_leaves import LEAVES
from torch import Tensor, nn
from torch.func import functional_call

import dyreg_triton as dt
from dyreg_triton.layers.leaves import readable

peft = pytest.importorskip("peft", reason="the extra adapters is not installed; `make full` does it")
accelerate = pytest.importorskip("accelerate", reason="the extra adapters is not installed; `make full` does it")
hooks = pytest.importorskip("accelerate.hooks")
pytestmark = pytest.mark.full

# as they are called inside of a layer
READ = ("send_mlp.0", "offset_pred", "global_conv.0", "kernel_projection1", "project_back_i3d_linear", "glore.update")
FILTERS = ("H1", "H2", "G")
UNUSED = "offset_location_emb"  # a norm that the published code has and never calls


def read_in(model: nn.Module) -> list[str]:
    """The paths of the leaves that are read instead of called."""
    return [name for name, _ in model.named_modules() if f".{name}".endswith(tuple(f".{leaf}" for leaf in READ))]


def _published(name: str) -> tuple[Callable[[], nn.Module], None, tuple[int, ...]]:
    return LAYERS[name].make, None, LAYERS[name].shape


# one leaf of a native layer, or (None) all of a published module's
CASES: dict[str, Any] = LEAVES | {
    name: _published(name) for name in ("ops.rstg.RSTG", "ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper")
}
KINDS: dict[str, Callable[[list[str]], Any]] = {
    "lora": lambda paths: peft.LoraConfig(target_modules=paths, r=2, lora_alpha=3),
    "dora": lambda paths: peft.LoraConfig(target_modules=paths, r=2, use_dora=True),
    "ia3": lambda paths: peft.IA3Config(target_modules=paths, feedforward_modules=[]),
    "ia3 of the input": lambda paths: peft.IA3Config(target_modules=paths, feedforward_modules=paths),
}
COMBINED = [
    (case, kind)
    for case in CASES
    for kind in KINDS
    # IA3 of PEFT has no Conv1d, which the small generator's update is
    if not (kind.startswith("ia3") and case in ("glore", "ops.dyreg.DynamicGraphWrapper"))
]


def trained(model: nn.Module) -> nn.Module:
    """As if trained: every parameter of an adapter is moved off its start, lora_B off zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.3 * step.to(parameter.dtype)
    return model


def lora(paths: list[str], **options: Any) -> Any:
    return peft.LoraConfig(target_modules=paths, r=2, **options)


def effective(leaf: Any) -> dict[str, Tensor]:
    """Weight and bias of a plain leaf that computes what the adapted one does, in terms of the adapter's parameters."""
    base = leaf.get_base_layer()
    weight, bias = base.weight, base.bias
    one_each = (-1, *[1] * (weight.dim() - 1))
    if isinstance(leaf, peft.tuners.ia3.IA3Layer):
        scale = leaf.ia3_l["default"]
        if leaf.is_feedforward:
            weight = weight * scale
        else:
            weight = weight * scale.reshape(one_each)
            bias = None if bias is None else bias * scale.flatten()
    else:
        up, down = leaf.lora_B["default"].weight, leaf.lora_A["default"].weight
        weight = weight + leaf.scaling["default"] * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        if leaf.use_dora["default"]:
            # its norm is a constant to the gradient, as in the paper
            norm = weight.detach().flatten(1).norm(dim=1)
            magnitude = leaf.lora_magnitude_vector["default"].weight.flatten()
            weight = weight * (magnitude / norm).view(one_each)
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype)
    return list(torch.autograd.grad(y, inputs, weights, retain_graph=True))


def fresh(case: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[str], Tensor]:
    torch.manual_seed(1)
    make, path, shape = CASES[case]
    layer = awake(make()).to(dtype).eval()
    return layer, [path] if path else read_in(layer), torch.randn(shape).to(dtype)


# --- adapters in the place of leaves that are read -------------------------------------------------------------------


@pytest.mark.parametrize(("case", "kind"), COMBINED)
@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
def test_an_adapter_counts_and_learns(case: str, kind: str) -> None:
    layer, paths, x = fresh(case)
    plain = copy.deepcopy(layer)
    before = plain(x)
    model = trained(peft.get_peft_model(layer, KINDS[kind](paths)))
    x.requires_grad_()
    tuned = [p for p in model.parameters() if p.requires_grad]
    assert tuned
    y = model(x)
    assert relative_error(y, before) > 1e-5
    folded = {}
    for path in paths:
        adapter = layer.get_submodule(path)
        assert hasattr(adapter, "base_layer")
        folded |= {f"{path}.{name}": t for name, t in effective(adapter).items()}
    with dt.backend("reference"):
        expected = functional_call(plain, folded, (x,))
    assert_close(y, expected, tolerance=1e-9)
    for actual, wanted in zip(gradients(y, x, *tuned), gradients(expected, x, *tuned), strict=True):
        assert wanted.any()
        assert_close(actual, wanted, tolerance=1e-7)
    with model.disable_adapter():
        assert_close(model(x), before, tolerance=1e-9)
    model.merge_adapter()  # in place: the adapters stay, and do nothing more
    assert_close(model(x), expected, tolerance=1e-9)
    model.unmerge_adapter()
    undone = 1e-6 if kind.startswith("ia3") else 1e-9  # IA3 divides by its scale + 1e-8
    assert_close(model(x), expected, tolerance=undone)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    assert all(type(merged.get_submodule(p)) is type(plain.get_submodule(p)) for p in paths)
    assert_close(merged(x), expected, tolerance=undone)


@pytest.mark.parametrize("case", CASES)
def test_two_adapters_switch(case: str) -> None:
    layer, paths, x = fresh(case)
    model = peft.get_peft_model(layer, lora(paths))
    model.add_adapter("other", lora(paths, lora_dropout=0.5))
    results = []
    for name in ("default", "other"):
        model.set_adapter(name)
        trained(model)
        results.append(model(x))
    assert relative_error(*results) > 1e-5
    model.set_adapter("default")
    assert_close(model(x), results[0], tolerance=1e-12)
    model.train()
    assert torch.equal(model(x), model(x))
    model.set_adapter("other")
    assert not torch.equal(model(x), model(x))  # its dropout


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_in_float32_of_a_layer_in_bfloat16(case: str) -> None:
    """PEFT keeps what it trains in float32; the result is no less precise than that of the merged layer."""
    layer, paths, x = fresh(case, torch.bfloat16)
    model = trained(peft.get_peft_model(layer, lora(paths)))
    adapter = layer.get_submodule(paths[0])
    assert adapter.lora_A["default"].weight.dtype == torch.float32
    y = model(x)
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(model).double()
    expected = wide(x.double())
    merged = model.merge_and_unload()
    assert relative_error(y, expected) < 2 * relative_error(merged(x), expected) + 2e-2


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_under_autocast(case: str) -> None:
    layer, paths, x = fresh(case, torch.float32)
    model = trained(peft.get_peft_model(layer, lora(paths)))
    expected = copy.deepcopy(model).double()(x.double())
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = model(x), merged(x)
    assert y.dtype == plain.dtype
    assert relative_error(y, expected) < 2 * relative_error(plain, expected) + 2e-2


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_saved_and_loaded(case: str, tmp_path: Path) -> None:
    layer, paths, x = fresh(case)
    plain = copy.deepcopy(layer)
    model = trained(peft.get_peft_model(layer, lora(paths)))
    y = model(x)
    with pytest.raises(ValueError, match=r"submodule '.*' is peft\.tuners.*accepted is what the constructor makes"):
        layer.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "adapter")
    assert_close(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(x), y, tolerance=1e-9)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_close(type(merged).from_pretrained(tmp_path / "merged")(x), y, tolerance=1e-9)


# --- whole modules and parameters ------------------------------------------------------------------------------------

GRAPHS = [name for name in LAYERS if "RSTG" in name or "DyReG" in name or "ops.dyreg" in name]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("what", ["norms", "recurrences"])
def test_modules_to_save(name: str, what: str) -> None:
    """A copy of a norm or of a recurrence is trained in its place."""
    make, shape = LAYERS[name]
    layer = awake(make()).eval()
    x = torch.randn(shape)
    plain = copy.deepcopy(layer)
    before = plain(x)
    wanted = nn.RNNBase if what == "recurrences" else type(layer.get_submodule(_a_norm(layer)))
    paths = [path for path, module in layer.named_modules() if isinstance(module, wanted)]
    model = peft.get_peft_model(layer, lora(read_in(layer), modules_to_save=paths))
    assert_close(model(x), before, tolerance=1e-4)
    saved = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    with torch.no_grad():
        for parameter in saved.values():
            parameter *= 1.3
        for path in paths:
            for parameter in plain.get_submodule(path).parameters():
                parameter *= 1.3
    y = model(x)
    assert_close(y, plain(x), tolerance=1e-4)
    assert relative_error(y, before) > 1e-3
    y.square().sum().backward()
    assert all(p.grad is not None for n, p in saved.items() if UNUSED not in n)
    with model.disable_adapter():
        assert_close(model(x), before, tolerance=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == plain(x).dtype
    assert model(x[:0]).shape == plain(x[:0]).shape
    assert_close(model.merge_and_unload()(x), y, tolerance=1e-4)


def _a_norm(layer: nn.Module) -> str:
    return next(path for path, _ in layer.named_modules() if path.endswith("update_norm"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("RSA", ["P1", "I"]), ("ops.rsa.RSA", ["P1", "I"]), ("DyReG static", ["dynamic_graph.region_latent"])],
)
def test_an_adapter_of_a_parameter(name: str, parameters: list[str]) -> None:
    """PEFT wraps the module that holds it, and parametrizes it for as long as a call takes."""
    make, shape = LAYERS[name]
    layer = awake(make()).eval()
    x = torch.randn(shape)
    before = layer(x)
    targets = [f"0.{parameter}" for parameter in parameters]
    model = trained(peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_parameters=targets, r=2)))
    y = model(x)
    assert relative_error(y, before) > 1e-3
    tuned = [p for p in model.parameters() if p.requires_grad]
    assert len(tuned) == 2 * len(parameters)
    assert all(g.any() for g in gradients(y, *tuned))
    assert_close(model.merge_and_unload()(x), y, tolerance=1e-4)


# --- swapped models --------------------------------------------------------------------------------------------------

SWAPPED = [name for name in VARIANTS if name.startswith(("rstg", "wrapper", "graph"))]


def adapted(variant: str, kind: str, swapped: bool) -> tuple[nn.Module, Tensor, Any]:
    torch.manual_seed(2)
    model, x = holder(variant)
    model = model.double()
    paths = read_in(model)
    report = dt.swap(model) if swapped else None
    torch.manual_seed(3)
    return trained(peft.get_peft_model(model, KINDS[kind](paths))), x.double(), report


@pytest.mark.parametrize("variant", SWAPPED)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_a_swapped_model(variant: str, kind: str) -> None:
    """As those of the published modules, which call every submodule; and `undo` keeps them."""
    (theirs, x, _), (ours, _, report) = (adapted(variant, kind, swapped) for swapped in (False, True))
    assert type(ours.base_model.model.inner).__module__.startswith("dyreg_triton.")
    tuned = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert tuned.keys() == expected.keys()
    y, wanted = ours(x), theirs(x)
    assert_close(y, wanted, tolerance=1e-9)
    got = gradients(y, *(tuned[name] for name in expected))
    for name, one, other in zip(expected, got, gradients(wanted, *expected.values()), strict=True):
        assert other.any(), name
        assert_close(one, other, tolerance=1e-7)
    report.undo()
    assert not type(ours.base_model.model.inner).__module__.startswith("dyreg_triton.")
    assert_close(ours(x), wanted, tolerance=1e-9)


@pytest.mark.parametrize("variant", [*SWAPPED, "rsa VplusR VplusR"])
def test_an_adapted_module_is_not_swapped(variant: str) -> None:
    model, x = holder(variant)
    model = trained(peft.get_peft_model(model, lora(read_in(model) or ["H2"])))
    before = model(x)
    with pytest.raises(dt.swapping.SwapError, match=r"base_layer.weight"):
        dt.swap(model)
    assert torch.equal(model(x), before)


def test_adapters_elsewhere_are_no_hindrance() -> None:
    model, x = holder("rstg")
    model.first = nn.Linear(9, 9)
    model = trained(peft.get_peft_model(model, lora(["first"])))
    before = model(x)
    assert len(dt.swap(model).modules) == 1
    assert_close(model(x), before, tolerance=1e-4)


# --- RSA -------------------------------------------------------------------------------------------------------------


def _rsas() -> dict[str, Callable[[], nn.Module]]:
    def swapped() -> nn.Module:
        settings = {"d_in": 8, "d_out": 8, "nh": 2, "dk": 0, "kernel_size": (3, 3, 3)}
        model = nn.Sequential(awake(PublishedRSA(**settings, kernel_type="VplusR", feat_type="VplusR")))
        dt.swap(model)
        return model[0]

    return {
        "native": functools.partial(dt.layers.RSA, 8, num_queries=2, kernel_size=3, correlation_groups=1),
        "native, Hadamard": functools.partial(dt.layers.RSA, 8, num_queries=2, kernel_size=3),
        "published": LAYERS["ops.rsa.RSA"].make,
        "swapped": swapped,
    }


@pytest.mark.parametrize("which", _rsas())
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_an_adapter_of_a_filter_is_refused_by_name_until_it_is_merged(which: str, name: str) -> None:
    layer = _rsas()[which]()
    x = torch.randn(CLIP)
    plain = copy.deepcopy(layer)
    model = trained(peft.get_peft_model(layer, peft.LoraConfig(target_modules=[name], r=4)))
    said = rf"RSA: {name} is a peft\.tuners\.lora\.layer\.Conv3d.*accepted is a Conv3d.*merged"
    with pytest.raises(TypeError, match=said):
        model(x)
    with model.disable_adapter(), pytest.raises(TypeError, match=said):
        model(x)
    if getattr(plain, name).groups > 1:  # which PEFT does not merge
        assert torch.equal(model.unload()(x), plain(x))
        return
    with torch.no_grad():
        getattr(plain, name).weight.copy_(effective(getattr(layer, name))["weight"])
    y = model.merge_and_unload()(x)
    assert_close(y, plain(x), tolerance=1e-4)


@pytest.mark.parametrize("which", _rsas())
def test_an_adapter_of_the_projection_counts(which: str) -> None:
    """Not merged here: PEFT 0.21 takes a 1x1x1 convolution for one of images, and fails."""
    layer = _rsas()[which]().double()
    x = torch.randn(CLIP).double().requires_grad_()
    plain = copy.deepcopy(layer)
    model = trained(peft.get_peft_model(layer, lora(["projection"])))
    tuned = [p for p in model.parameters() if p.requires_grad]
    folded = {f"projection.{name}": t for name, t in effective(layer.projection).items()}
    y, expected = model(x), functional_call(plain, folded, (x,))
    assert_close(y, expected, tolerance=1e-9)
    assert relative_error(y, plain(x)) > 1e-3
    for actual, wanted in zip(gradients(y, x, *tuned), gradients(expected, x, *tuned), strict=True):
        assert_close(actual, wanted, tolerance=1e-7)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))


# --- accelerate ------------------------------------------------------------------------------------------------------


def _spread(layer: nn.Module) -> dict[str, str]:
    """A device map: every second submodule of the layer, and of its submodules, on disk."""
    deep = [name for name, module in layer.named_modules() if name and module._parameters and not module._modules]
    places = {name: ("disk" if i % 2 else "cpu") for i, name in enumerate(deep)}
    own = [name for name, _ in layer.named_parameters() if name.rpartition(".")[0] not in places]
    buffers = [name for name, _ in layer.named_buffers() if name.rpartition(".")[0] not in places]
    return places | dict.fromkeys([*own, *buffers], "cpu")


def _cpu(layer: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(layer, execution_device="cpu")


def _disk(layer: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(layer, folder, execution_device="cpu")


def _dispatched(layer: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(layer, _spread(layer), main_device="cpu", offload_dir=folder, force_hooks=True)


def _hooked(layer: nn.Module, folder: Path) -> nn.Module:
    for module in layer.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    return layer


OFFLOADS = {"cpu": _cpu, "disk": _disk, "dispatched": _dispatched, "hooked": _hooked}
OTHERS = [name for name in LAYERS if "RSA" not in name]
RSAS = [name for name in LAYERS if "RSA" in name]
quietly = pytest.mark.filterwarnings("ignore::UserWarning:accelerate", "ignore::FutureWarning")


def still(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, an input, and the output."""
    make, shape = LAYERS[name]
    layer = awake(make()).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        return layer, x, layer(x)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("how", OFFLOADS)
@quietly
def test_an_offloaded_layer_works(name: str, how: str, tmp_path: Path) -> None:
    layer, x, expected = still(name)
    model = OFFLOADS[how](layer, tmp_path)
    assert how == "hooked" or any(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert_close(model(x), expected, tolerance=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).isfinite().all()
    if "BAT" not in name and "ocal" not in name:  # torch's batch norm accepts an empty batch in no mode
        assert model(x[:0]).shape == expected[:0].shape


@pytest.mark.parametrize("name", RSAS)
@pytest.mark.parametrize("how", OFFLOADS)
@quietly
def test_an_offloaded_filter_is_refused_by_name(name: str, how: str, tmp_path: Path) -> None:
    layer, x, _ = still(name)
    with pytest.raises(TypeError, match=r"RSA: (H1|H2) is of a forward set on the instance"):
        OFFLOADS[how](layer, tmp_path)(x)


@pytest.mark.parametrize("name", LAYERS)
@quietly
def test_a_layer_that_is_offloaded_as_a_whole_works(name: str, tmp_path: Path) -> None:
    layer, x, expected = still(name)
    model = nn.Sequential(layer)
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=[type(layer).__name__])
    assert all(p.is_meta for p in model.parameters())
    assert_close(model(x), expected, tolerance=1e-4)


@pytest.mark.parametrize("name", LAYERS)
@quietly
def test_a_layer_works_as_before_once_its_hooks_are_off(name: str) -> None:
    """accelerate leaves the class's own forward on every instance."""
    layer, x, expected = still(name)
    accelerate.cpu_offload(layer, execution_device="cpu")
    hooks.remove_hook_from_module(layer, recurse=True)
    assert any("forward" in vars(module) for module in layer.modules())
    with torch.no_grad():
        assert torch.equal(layer(x), expected)  # the same way, to the bit
        assert torch.equal(copy.deepcopy(layer)(x), expected)
    for path in read_in(layer):
        leaf = layer.get_submodule(path)
        assert readable(leaf, type(leaf)) is leaf


@pytest.mark.parametrize("name", ["RSTG", "DyReG", "RSA", "BATBlock", "NonLocalBlock"])
@quietly
def test_compiled_once_its_hooks_are_off(name: str) -> None:
    layer, x, expected = still(name)
    accelerate.cpu_offload(layer, execution_device="cpu")
    hooks.remove_hook_from_module(layer, recurse=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected, tolerance=1e-4)


@pytest.mark.parametrize("name", OTHERS)
@quietly
def test_a_layer_is_made_empty_and_loaded(name: str, tmp_path: Path) -> None:
    layer, x, expected = still(name)
    layer.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = LAYERS[name].make().eval()
    file = str(tmp_path / "model.safetensors")
    model = accelerate.load_checkpoint_and_dispatch(empty, file, device_map={"": "cpu"}, force_hooks=True)
    assert_close(model(x), expected, tolerance=1e-4)


@pytest.mark.parametrize("name", OTHERS)
@quietly
def test_weights_that_are_kept_narrow_are_widened_for_each_call(name: str) -> None:
    layer, x, expected = still(name)
    skip = ["norm", "bn"]
    cast = accelerate.big_modeling.attach_layerwise_casting_hooks
    cast(layer, storage_dtype=torch.bfloat16, compute_dtype=torch.float32, skip_modules_pattern=skip)
    assert any(p.dtype == torch.bfloat16 for p in layer.parameters())
    y = layer(x)
    assert y.dtype == torch.float32
    assert relative_error(y, expected) < 3e-2


@pytest.mark.parametrize("name", OTHERS)
@quietly
def test_a_hooked_layer_learns(name: str, tmp_path: Path) -> None:
    layer, x, _ = still(name)
    plain = copy.deepcopy(layer)
    _hooked(layer, tmp_path)
    x.requires_grad_()
    tuned, expected = ({n: p for n, p in m.named_parameters() if UNUSED not in n} for m in (layer, plain))
    got = gradients(layer(x), x, *tuned.values())
    wanted = gradients(plain(x), x, *expected.values())
    scale = max(g.norm().item() for g in wanted)
    for label, one, other in zip(["x", *tuned], got, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * max(other.norm().item(), scale), label


@pytest.mark.parametrize("case", CASES)
@quietly
def test_adapters_of_an_offloaded_layer(case: str) -> None:
    layer, paths, x = fresh(case, torch.float32)
    model = trained(peft.get_peft_model(layer, lora(paths)))
    expected = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert_close(model(x), expected, tolerance=1e-4)
