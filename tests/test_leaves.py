"""Submodules that a layer reads rather than calls are taken for what they are: whatever a call of them does counts."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from layer_cases import LAYERS
from published import LayerNormAffineXC
from support import assert_results_close, awake, backends, run
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import dyreg_triton as dt
from dyreg_triton.layers.leaves import readable
from dyreg_triton.layers.norms import ChannelAffineNorm

# every leaf that is read: the layer that holds it, its path, the shape of an input
RSTG = functools.partial(dt.layers.RSTG, 8)
DYREG = functools.partial(dt.layers.DyReG, 8, grid=(2, 2), region_channels=6)
LEAVES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "send_mlp, concatenated": (RSTG, "send_mlp.0", (2, 3, 4, 8)),
    "send_mlp, summed": (
        functools.partial(RSTG, combine="sum", send_layers=1, update_layers=0, aggregation="mean", order="time-space"),
        "send_mlp.0", (2, 3, 4, 8),
    ),
    "offset_pred": (functools.partial(DYREG, (6, 7)), "dynamic_graph.offset_pred", (2, 3, 8, 6, 7)),
    "offset_pred, static, biased": (
        functools.partial(DYREG, (6, 7), regions="static", offset_bias=True), "dynamic_graph.offset_pred",
        (2, 3, 8, 6, 7),
    ),
    "global_conv": (functools.partial(DYREG, (6, 7)), "dynamic_graph.global_conv.0", (2, 3, 8, 6, 7)),
    "kernel_projection1": (functools.partial(DYREG, (6, 7)), "dynamic_graph.kernel_projection1", (2, 3, 8, 6, 7)),
    "kernel_projection1, another size": (
        functools.partial(DYREG, (6, 7), train_size=(4, 5)), "dynamic_graph.kernel_projection1", (2, 3, 8, 6, 7),
    ),
    "kernel_projection1, semantic": (
        functools.partial(DYREG, (6, 7), regions="semantic"), "dynamic_graph.kernel_projection1", (2, 3, 8, 6, 7),
    ),
    "project_back": (
        functools.partial(DYREG, (6, 7), node_channels=6), "dynamic_graph.project_back_i3d_linear", (2, 3, 8, 6, 7),
    ),
    "glore": (
        functools.partial(DYREG, (6, 7), generator="pooled"), "dynamic_graph.glore.update", (2, 3, 8, 6, 7),
    ),
}  # fmt: skip
NORMS = {
    "dot": (RSTG, "norm_dict.send_message_norm", (2, 3, 4, 8)),
    "mean": (functools.partial(RSTG, aggregation="mean"), "norm_dict.send_message_norm", (2, 3, 4, 8)),
}
RSA = ("H1", "H2", "G")

every_leaf = pytest.mark.parametrize("case", LEAVES)


def made(case: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, str, Tensor]:
    torch.manual_seed(1)
    make, path, shape = (LEAVES | NORMS)[case]
    return awake(make()).to(dtype), path, torch.randn(shape).to(dtype)


def put(layer: nn.Module, path: str, leaf: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    parent = layer.get_submodule(owner)
    parent._modules[name] = leaf


class LowRank(nn.Module):
    """In the style of adapters: it offers the weight and bias of the layer inside, and does more when it is called."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        shape = base.weight.shape
        self.down = nn.Parameter(torch.randn(2, math.prod(shape[1:])) * 0.3)
        self.up = nn.Parameter(torch.randn(shape[0], 2) * 0.3)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def delta(self) -> Tensor:
        return (self.up @ self.down).view_as(self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        whole = {"weight": self.base.weight + self.delta()}
        return torch.func.functional_call(self.base, whole, (x,))


@every_leaf
def test_an_adapter_in_the_place_of_a_leaf_counts(case: str) -> None:
    layer, path, x = made(case)
    merged = copy.deepcopy(layer)
    adapter = LowRank(layer.get_submodule(path))
    with torch.no_grad():
        merged.get_submodule(path).weight += adapter.delta()
    put(layer, path, adapter)
    assert_close_runs(layer, merged, x, path, f"{path}.base")
    down = adapter.down.grad
    assert down is not None
    assert down.any()


def assert_close_runs(layer: nn.Module, plain: nn.Module, x: Tensor, path: str = "", instead: str = "") -> None:
    actual, expected = run(layer, x), run(plain, x)
    names = {name: name.replace(path, instead, 1) if name.startswith(path) else name for name in expected}
    assert_results_close({name: actual[names[name]] for name in expected}, expected, 2e-4)


@every_leaf
def test_a_forward_set_on_an_instance_counts(case: str) -> None:
    """As tools for adapters and for offloading do it."""
    layer, path, x = made(case)
    more = nn.Parameter(torch.tensor(0.3))
    leaf = layer.get_submodule(path)
    old = leaf.forward
    leaf.forward = lambda x: old(x) * (1 + more)
    plain = copy.deepcopy(layer)
    del plain.get_submodule(path).forward
    with torch.no_grad():
        for parameter in plain.get_submodule(path).parameters():
            parameter *= 1.3
    actual, expected = layer(x), plain(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.square().sum().backward()
    assert more.grad is not None
    assert more.grad.abs() > 0


@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_that_was_put_back_is_none_at_all(name: str) -> None:
    """As accelerate does: once its hooks are off, the class's own forward is set on every instance."""
    make, shape = LAYERS[name]
    layer = quiet(make())
    x = torch.randn(shape)
    expected = layer(x)
    for part in layer.modules():
        part.forward = part.forward
    assert torch.equal(layer(x), expected)  # the same way, to the bit
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    for part in layer.modules():
        if part._parameters and not part._modules:
            assert readable(part, type(part)) is part
            replica = part._replicate_for_data_parallel()  # its forward is that of the original
            assert readable(replica, type(part)) is None


@every_leaf
@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "full backward hook", "hook of the container"])
def test_hooks_of_a_leaf_fire_and_what_they_return_counts(case: str, kind: str) -> None:
    layer, path, x = made(case)
    plain = copy.deepcopy(layer)
    leaf = layer.get_submodule(path)
    if kind == "hook of the container":
        path = path.removesuffix(".0")
        leaf = layer.get_submodule(path)
    seen = []
    if kind == "forward pre-hook":
        handle = leaf.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    elif kind == "full backward hook":
        handle = leaf.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append(grad_output[0].shape))
    else:
        handle = leaf.register_forward_hook(lambda _, args, y: seen.append(y.shape))
    assert_close_runs(layer, plain, x)
    assert seen
    handle.remove()
    if kind == "forward hook":
        leaf.register_forward_hook(lambda _, args, y: y * 0.5)
        with torch.no_grad():
            for parameter in plain.get_submodule(path).parameters():
                parameter *= 0.5
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


@every_leaf
def test_a_pruned_leaf_counts(case: str) -> None:
    layer, path, x = made(case)
    plain = copy.deepcopy(layer)
    leaf, weight = layer.get_submodule(path), plain.get_submodule(path).weight
    prune.random_unstructured(leaf, "weight", 0.5)
    for _ in range(2):
        with torch.no_grad():
            weight.copy_(leaf.weight_orig * leaf.weight_mask)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            leaf.weight_orig *= 2  # the hook computes the weight again before a call


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("how", ["replaced", "patched", "hooked"])
def test_a_norm_that_is_read_is_taken_for_what_it_is(case: str, how: str, published: bool) -> None:
    layer, path, x = made(case)
    norm = layer.get_submodule(path)
    if published:  # as after a swap, which leaves the authors' norms in place
        theirs = LayerNormAffineXC(8, (4, 4, 8))
        theirs.load_state_dict(norm.state_dict())
        put(layer, path, norm := theirs)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in plain.get_submodule(path).parameters():
            parameter *= 1.5
    assert not torch.allclose(layer(x), plain(x), rtol=1e-3, atol=1e-3)
    if how == "replaced":
        put(layer, path, nn.Sequential(norm, Times(1.5)))
    elif how == "patched":
        old = norm.forward
        norm.forward = lambda x: old(x) * 1.5
    else:
        norm.register_forward_hook(lambda _, args, y: y * 1.5)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("inner", ["hooked", "patched"])
def test_what_is_done_to_the_norm_inside_of_a_published_one_counts(inner: str) -> None:
    layer, path, x = made("dot")
    theirs = LayerNormAffineXC(8, (4, 4, 8))
    put(layer, path, theirs)
    before = layer(x)
    if inner == "hooked":
        theirs.norm.register_forward_hook(lambda _, args, y: y + 1)
    else:
        old = theirs.norm.forward
        theirs.norm.forward = lambda x: old(x) + 1
    after = layer(x)
    with torch.no_grad():
        theirs.bias += theirs.scale
    theirs.norm.__dict__.pop("forward", None)
    theirs.norm._forward_hooks.clear()
    torch.testing.assert_close(after, layer(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_offsets_of_an_adapter_are_as_precise_as_its_own_dtype(dtype: torch.dtype, autocast: bool) -> None:
    """Under autocast a lowered region would move its nodes by percents."""
    layer, path, x = made("offset_pred", dtype)
    graph = layer.dynamic_graph
    features = graph.project_in(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = graph.raw_offsets(features)
        put(layer, path, nn.Sequential(layer.get_submodule(path)))
        actual = graph.raw_offsets(features)
    assert actual.dtype == torch.float32
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


# --- RSA's filters, which its op takes -------------------------------------------------------------------------------


def attend() -> tuple[nn.Module, Tensor]:
    return dt.layers.RSA(8, num_queries=2, kernel_size=3), torch.randn(1, 8, 3, 4, 4)


@pytest.mark.parametrize("name", RSA)
@pytest.mark.parametrize("how", ["adapter", "instance", "pruned", "a weight of another kind"])
def test_a_filter_that_does_more_when_called_is_refused(name: str, how: str) -> None:
    layer, x = attend()
    leaf = getattr(layer, name)
    if how == "adapter":
        setattr(layer, name, LowRank(leaf))
        said = rf"RSA: {name} is a LowRank.*accepted is a Conv3d"
    elif how == "instance":
        old = leaf.forward
        leaf.forward = lambda x: 2 * old(x)
        said = rf"RSA: {name} is of a forward set on the instance"
    elif how == "pruned":
        prune.random_unstructured(leaf, "weight", 0.5)
        said = rf"RSA: {name} is pruned.*parametriz"
    else:
        leaf.weight = nn.Parameter(TwoTensors(leaf.weight.detach(), leaf.weight.detach()))
        said = rf"RSA: {name} is of a weight that stands for another tensor"
    for call in (layer, lambda x: layer.kernels(x, (1, 1, 1)), lambda x: layer.weights(x.dtype)):
        if name == "G" and call is not layer and how != "pruned":
            continue
        with pytest.raises(TypeError, match=said):
            call(x)


def TwoTensors(a: Tensor, b: Tensor) -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(a, b)


def test_a_filter_of_the_same_name_is_refused_with_its_package() -> None:
    """PEFT's adapter of a Conv3d is a Conv3d by name."""
    layer, x = attend()
    layer.H2 = type("Conv3d", (LowRank,), {"__module__": "peft.tuners"})(layer.H2)
    with pytest.raises(TypeError, match=r"H2 is a peft\.tuners\.Conv3d.*accepted is a Conv3d"):
        layer(x)


@pytest.mark.parametrize("name", RSA)
def test_a_parametrized_filter_counts(name: str) -> None:
    layer, x = attend()
    plain = copy.deepcopy(layer)
    parametrize.register_parametrization(getattr(layer, name), "weight", Times(2.0))
    with torch.no_grad():
        getattr(plain, name).weight *= 2
    torch.testing.assert_close(layer(x), plain(x))


# --- parts without parameters of their own ---------------------------------------------------------------------------


def quiet(layer: nn.Module) -> nn.Module:
    return awake(layer).eval()


@pytest.mark.parametrize("name", [name for name in LAYERS if "RSTG" in name or "DyReG" in name or "dyreg" in name])
@pytest.mark.parametrize("kinds", [(nn.GRU, nn.LSTM), (nn.Linear,), (nn.GRU, nn.LSTM, nn.Linear)], ids=len)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_parts_work(name: str, kinds: tuple[type[nn.Module], ...]) -> None:
    make, shape = LAYERS[name]
    layer = quiet(make())
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {*kinds})
    inputs = [torch.randn(shape) for _ in range(3)]
    got = list(map(quantised, inputs))  # a StopIteration would end the loop without a word
    assert len(got) == 3
    for y, x in zip(got, inputs, strict=True):
        torch.testing.assert_close(y, layer(x), rtol=0.2, atol=0.2)
    with pytest.raises((TypeError, ValueError), match="accepted is"):
        quantised(torch.zeros(shape).double())


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_layers_give_the_input_its_gradient(name: str) -> None:
    make, shape = LAYERS[name]
    layer = quiet(make())
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    layer.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], expected, rtol=1e-4, atol=1e-4)


class Inside(nn.Module):
    """Calls another module, which holds all the parameters."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.held = [module]  # not a submodule

    def forward(self, *args: Tensor) -> Tensor:
        return self.held[0](*args)


def calls_of(layer: nn.Module) -> list[str]:
    """The leaves of a layer that have parameters."""
    return [path for path, part in layer.named_modules() if path and part._parameters and not part._modules]


@pytest.mark.parametrize("name", LAYERS)
def test_parts_without_parameters_work_or_are_refused_by_name(name: str) -> None:
    make, shape = LAYERS[name]
    layer = quiet(make())
    x = torch.randn(shape)
    expected = layer(x)
    for path in calls_of(layer):
        changed = copy.deepcopy(layer)
        put(changed, path, Inside(changed.get_submodule(path)))
        leaf = path.rpartition(".")[2]
        if leaf in RSA:
            with pytest.raises(TypeError, match=f"{leaf} is a Inside"):
                changed(x)
        else:
            torch.testing.assert_close(changed(x), expected, rtol=1e-4, atol=1e-5, msg=path)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_all_of_whose_parts_are_patched_works_as_before(name: str) -> None:
    """As accelerate does: each part's tensors are on meta until its own forward brings them."""
    make, shape = LAYERS[name]
    layer = quiet(make())
    if isinstance(layer, dt.layers.RSA):
        return  # refused, see above
    x = torch.randn(shape)
    expected = layer(x)

    def bring(part: nn.Module, own: dict[str, Tensor], old: Callable, *args: Tensor) -> Tensor:
        away = dict(part._parameters)
        part._parameters.update(own)
        try:
            return old(*args)
        finally:
            part._parameters.update(away)

    for part in layer.modules():
        own = {n: p for n, p in part._parameters.items() if p is not None}
        if own:
            part.forward = functools.partial(bring, part, own, part.forward)
            part._parameters.update({n: nn.Parameter(p.to("meta")) for n, p in own.items()})
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    if any(isinstance(part, nn.RNNBase) for part in layer.modules()):
        assert layer(x[:0]).shape == expected[:0].shape


class Wrapped(nn.Module):
    """In the style of adapters that train a copy of a whole module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.inside = module

    def forward(self, *args: Tensor) -> Tensor:
        return self.inside(*args)


@pytest.mark.parametrize("name", LAYERS)
def test_wrapped_recurrences_work_under_autocast(name: str) -> None:
    make, shape = LAYERS[name]
    layer = quiet(make())
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        for path in [path for path, part in layer.named_modules() if isinstance(part, nn.RNNBase)]:
            put(layer, path, Wrapped(layer.get_submodule(path)))
        y = layer(x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", backends())
def test_the_norm_of_this_library_is_read(backend: str) -> None:
    """What stands for a leaf is bypassed only while it says all: the fast way is taken where nothing was changed."""
    layer, _, x = made("dot")
    called = []
    ChannelAffineNorm.forward, old = (lambda self, x: called.append(self) or old(self, x)), ChannelAffineNorm.forward
    try:
        with dt.backend(backend):
            layer(x)
    finally:
        ChannelAffineNorm.forward = old
    assert layer.norm_dict["send_message_norm"] not in called


# --- what else a replacement may do ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["send_mlp, concatenated", "offset_pred, static, biased", "kernel_projection1",
                                  "project_back", "glore", "global_conv"])  # fmt: skip
def test_a_leaf_without_a_bias_works(case: str) -> None:
    layer, path, x = made(case)
    plain = copy.deepcopy(layer)
    layer.get_submodule(path).bias = None
    with torch.no_grad():
        plain.get_submodule(path).bias.zero_()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


def test_what_stands_behind_a_leaf_in_its_container_counts() -> None:
    layer, _, x = made("global_conv")
    before = layer.dynamic_graph.latent(x)
    layer.dynamic_graph.global_conv.append(nn.AdaptiveAvgPool2d((1, 1)))  # as published: of one cell
    torch.testing.assert_close(layer.dynamic_graph.latent(x), before)
    layer.dynamic_graph.global_conv.append(nn.Tanh())
    assert not torch.allclose(layer.dynamic_graph.latent(x), before, atol=1e-3)


@pytest.mark.parametrize("name", RSA)
@pytest.mark.parametrize(
    ("change", "said"), [({"bias": True}, "bias"), ({"stride": 2}, "stride"), ({"dilation": 2}, "dilation")]
)
def test_a_filter_of_another_convolution_is_refused(name: str, change: dict, said: str) -> None:
    layer, x = attend()
    old = getattr(layer, name)
    options = {"padding": old.padding, "groups": old.groups, "bias": False} | change
    setattr(layer, name, nn.Conv3d(old.in_channels, old.out_channels, old.kernel_size, **options))
    with pytest.raises(TypeError, match=rf"RSA: {name} is of a .*{said}"):
        layer(x)


def test_what_is_no_recurrence_is_refused_by_name() -> None:
    layer, _, x = made("dot")
    layer.internal_lstm = nn.Linear(8, 8)
    with pytest.raises(TypeError, match="RSTG: internal_lstm is a Linear, which returned a Tensor"):
        layer(x)
