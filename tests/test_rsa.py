"""Relational self-attention as a layer, against the paper's pseudo-code, and the published module's own ways."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_close, assert_identical, assert_results_close, backends, relative_error, run
from test_errors import NothingRuns, refused
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dyreg_triton as dt

KINDS = ("V", "R", "V+R")
COMBINATIONS = list(itertools.product(KINDS, KINDS))
PUBLISHED = {"V": "V", "R": "R", "V+R": "VplusR"}
# every size another one; C, D and E differ
SMALL: dict[str, Any] = {"num_queries": 2, "key_channels": 3, "latent_channels": 5, "kernel_size": (3, 3, 5)}
on_backends = pytest.mark.parametrize("backend", backends())
on_combinations = pytest.mark.parametrize(("kernel", "context"), COMBINATIONS)


def make(in_channels: int = 6, out_channels: int = 8, **options: Any) -> nn.Module:
    """A small layer off its start, where I is the identity."""
    layer = dt.layers.RSA(in_channels, out_channels, **{**SMALL, **options})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("I", "P1"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def tiny(device: torch.device, **options: Any) -> tuple[nn.Module, Tensor]:
    """A layer and a clip for what is slow: interpreted kernels, compilers."""
    layer = make(2, 4, **{"kernel_size": (1, 3, 3), **options})
    return layer.to(device), clips(1, 2, 2, 3, 4, device=device)


def clips(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 6, 3, 4, 5), dtype=dtype).to(device)


# --- the paper's pseudo-code ----------------------------------------------------------------------------------------


def unit(x: Tensor, dim: int) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim, keepdim=True) + 1e-6)


def filtered(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """A convolution whose tap i of k lies at i - k // 2, zeros around."""
    margins = [m for k in reversed(weight.shape[-3:]) for m in (k // 2, k - 1 - k // 2)]
    return F.conv3d(F.pad(x, margins), weight, groups=groups)


def projected(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, L, C, T, H, W), k (B, C, T, H, W) of no channels where there is none, v (B, E, T, H, W)."""
    queries, c, e = layer.num_queries, layer.key_channels, layer.value_channels
    parts = torch.einsum("oi,bithw->bothw", layer.projection.weight.flatten(1), x)
    q, k, v = parts[:, : queries * c], parts[:, queries * c : -e], parts[:, -e:]
    return unit(q.unflatten(1, (queries, c)), 2), unit(k, 1), unit(v, 1)


def pseudo_code(layer: nn.Module, x: Tensor) -> Tensor:
    """Three convolutions and three products per position, as the paper's supplement writes them; stride 1."""
    c, d, e = layer.key_channels, layer.latent_channels, layer.value_channels
    state = dict(layer.named_parameters())
    q, k, v = projected(layer, x)
    latent = torch.zeros(1, c, d, 1, 1, 1, dtype=x.dtype, device=x.device)
    if "P1" in state:
        latent = latent + state["P1"][..., None, None, None]
    elif "H1.weight" not in state:
        latent = latent + torch.eye(c, d, dtype=x.dtype, device=x.device)[..., None, None, None]
    if "H1.weight" in state:
        latent = latent + filtered(k, state["H1.weight"], groups=c).unflatten(1, (c, d))
    kernel = torch.einsum("blcthw,bcdthw->bldthw", q, latent.expand(x.shape[0], -1, -1, *x.shape[2:]))

    def of_each_value(weight: Tensor) -> Tensor:
        return filtered(v.flatten(0, 1)[:, None], weight).unflatten(0, (-1, e))

    y = torch.einsum("bldthw,bedthw->belthw", kernel, of_each_value(state["H2.weight"]))
    if "G.weight" in state:
        context = of_each_value(state["G.weight"])
        if "I" in state:
            context = context + state["I"][..., None, None, None]
        y = torch.einsum("belthw,befthw->bflthw", y, context)
    return y.flatten(1, 2)


@on_combinations
@on_backends
def test_is_the_pseudo_code(backend: str, kernel: str, context: str, device: torch.device) -> None:
    """Output and every gradient of all nine combinations, against float64."""
    layer = make(kernel=kernel, context=context).to(device)
    x = clips(1, 6, 3, 4, 5, device=device)
    double = copy.deepcopy(layer).double()
    expected = run(double, x.double(), call=lambda x: pseudo_code(double, x))
    with dt.backend(backend):
        actual = run(layer, x)
    assert_results_close(actual, expected, 1e-5)
    for name, value in actual.items():
        assert value is not None, name
        assert value.any(), name


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (2, 4, 2)},  # even: one tap more before than after
        {"kernel_size": (1, 1, 1)},
        {"kernel_size": (5, 7, 9)},  # larger than the clip
        {"kernel_size": 3},
        {"num_queries": 1, "key_channels": None},
        {"num_queries": 8, "value_channels": 1},
        {"latent_channels": None},
        {"key_channels": 7, "latent_channels": 2},
        {"kernel": "V", "basic_projection": False, "latent_channels": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(3, 4, 5), (1, 1, 1)], ids=str)
def test_options(options: dict, size: tuple[int, int, int]) -> None:
    layer = make(**options).double()
    x = clips(2, 6, *size, dtype=torch.float64)
    expected = run(layer, x, call=lambda x: pseudo_code(layer, x))
    assert_results_close(run(layer, x), expected, 1e-9)


def test_defaults_are_the_papers() -> None:
    layer = dt.layers.RSA(64)
    assert (layer.out_channels, layer.num_queries, layer.kernel_size, layer.stride) == (64, 8, (5, 7, 7), (1, 1, 1))
    assert layer.key_channels == layer.value_channels == layer.latent_channels == layer.correlation_groups == 8
    assert (layer.kernel, layer.context) == ("V+R", "V+R")
    assert layer(torch.randn(1, 64, 2, 3, 3)).shape == (1, 64, 2, 3, 3)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "P1": (1, 8, 8),
        "I": (1, 8, 8),
        "projection.weight": (80, 64, 1, 1, 1),
        "H1.weight": (64, 1, 5, 7, 7),
        "H2.weight": (8, 1, 5, 7, 7),
        "G.weight": (8, 1, 5, 7, 7),
    }
    assert_identical(layer.I[0], torch.eye(8))
    wide = dt.layers.RSA(4, 128, num_queries=2, kernel_size=(1, 3, 3))
    assert abs(wide.P1.std().item() * (9 * 64) ** 0.5 - 1) < 0.1
    assert wide.H1.weight.abs().max() <= 1 / 3  # as Conv3d starts


def test_channels_follow_from_each_other() -> None:
    layer = dt.layers.RSA(6, num_queries=4, value_channels=3, kernel_size=1)
    assert (layer.out_channels, layer.key_channels, layer.latent_channels) == (12, 3, 3)
    layer = dt.layers.RSA(6, 8, num_queries=4, key_channels=5, kernel_size=1)
    assert (layer.value_channels, layer.key_channels, layer.latent_channels) == (2, 5, 5)


@on_combinations
def test_parameters_of_each_combination(kernel: str, context: str) -> None:
    names = {name for name, _ in make(kernel=kernel, context=context).named_parameters()}
    expected = {"projection.weight", "H2.weight"}
    expected |= {"V": {"P1"}, "R": {"H1.weight"}, "V+R": {"P1", "H1.weight"}}[kernel]
    expected |= {"V": set(), "R": {"G.weight"}, "V+R": {"G.weight", "I"}}[context]
    assert names == expected


# --- correlation in groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_correlation_groups_tie_h1(groups: int) -> None:
    """A full layer with H1 repeated over the channels of a group; the gradient is the sum over them."""
    layer = make(key_channels=6, correlation_groups=groups).double()
    assert layer.H1.weight.shape == (groups * 5, 1, 3, 3, 5)
    full = make(key_channels=6).double()
    state = layer.state_dict()
    repeated = state["H1.weight"].unflatten(0, (groups, 5)).repeat_interleave(6 // groups, 0).flatten(0, 1)
    full.load_state_dict({**state, "H1.weight": repeated}, strict=True)
    x = clips(dtype=torch.float64)
    expected, actual = run(full, x), run(layer, x)
    grad = expected["H1.weight"].unflatten(0, (groups, 6 // groups, 5)).sum(1).flatten(0, 1)
    assert_results_close(actual, {**expected, "H1.weight": grad}, 1e-9)


@pytest.mark.parametrize(("groups", "copied"), [(1, False), (2, True), (6, False)])
def test_h1_is_copied_only_where_it_is_tied(groups: int, copied: bool) -> None:
    layer = make(key_channels=6, correlation_groups=groups)
    h1 = layer.weights(torch.float32)["h1"]
    assert h1.shape == (6, 5, 3, 3, 5)
    assert (h1.untyped_storage().data_ptr() != layer.H1.weight.untyped_storage().data_ptr()) == copied


def test_one_group_is_the_dot_product() -> None:
    """Equation 5: the correlation x_Q X_K^T, then H = H1 H2^T."""
    layer = make(kernel="R", context="V", correlation_groups=1).double()
    x = clips(dtype=torch.float64)
    q, k, v = projected(layer, x)
    windows, context = (dt.reference.relational.windows(t, (3, 3, 5)) for t in (k, v))
    correlation = torch.einsum("blcthw,bcthwm->blthwm", q, windows)
    h1, h2 = layer.H1.weight.flatten(1), layer.H2.weight.flatten(1)
    kappa = torch.einsum("blthwm,dm,di->blthwi", correlation, h1, h2)
    assert_close(layer(x), torch.einsum("blthwi,bethwi->belthw", kappa, context).flatten(1, 2), tolerance=1e-9)


# --- kernels to look at ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("kernel_size", [(3, 3, 5), (2, 4, 3), (5, 9, 7)], ids=str)
def test_kernels_applied_to_the_value_give_the_output(kernel: str, kernel_size: tuple[int, int, int]) -> None:
    """In every position, edges and corners too, with the basic context."""
    layer = make(kernel=kernel, context="V", kernel_size=kernel_size).double()
    x = clips(2, 6, 2, 4, 3, dtype=torch.float64)
    y = layer(x)
    context = dt.reference.relational.windows(projected(layer, x)[2], kernel_size)
    for position in itertools.product(*map(range, x.shape[2:])):
        basic, relational = layer.kernels(x, position)
        assert (basic is None, relational is None) == (kernel == "R", kernel == "V")
        both = sum(t for t in (basic, relational) if t is not None)
        assert both.shape == (2, 2, *kernel_size)
        here = torch.einsum("blm,bem->bel", both.flatten(2), context[(..., *position, slice(None))])
        assert_close(y[(..., *position)], here.flatten(1), tolerance=1e-9)


@pytest.mark.parametrize("position", [(1, 2, 3), (0, 0, 4), [2, 3, 0]], ids=str)
def test_kernels_are_the_explicit_sums(position: Any) -> None:
    """Equations 3 and 10, each kind by itself."""
    layer = make(correlation_groups=1).double()
    x = clips(dtype=torch.float64)
    q, k, _ = projected(layer, x)
    q, windows = q[(..., *position)], dt.reference.relational.windows(k, (3, 3, 5))[(..., *position, slice(None))]
    h1, h2 = layer.H1.weight.flatten(1), layer.H2.weight.flatten(1)
    basic, relational = layer.kernels(x, position)
    assert_close(basic.flatten(2), torch.einsum("blc,cd,dm->blm", q, layer.P1[0], h2), tolerance=1e-9)
    expected = torch.einsum("blc,bci,di,dm->blm", q, windows, h1, h2)
    assert_close(relational.flatten(2), expected, tolerance=1e-9)


def test_basic_kernels_see_their_position_only() -> None:
    """Figure 3: a clip played backwards has the same basic kernels, and other relational ones."""
    layer, x = make(), clips()
    basic, relational = layer.kernels(x, (1, 2, 2))
    basic_backwards, relational_backwards = layer.kernels(x.flip(2), (1, 2, 2))
    assert_close(basic_backwards, basic.double())
    assert relative_error(relational_backwards, relational) > 0.1


@pytest.mark.parametrize("position", [(3, 0, 0), (0, -1, 0), (0, 0), (0, 0, 1.0), 3, None, "abc", torch.ones(3).int()])
def test_position_of_kernels(position: Any) -> None:
    layer, x = make(), clips()
    with refused(ValueError, "RSA: position is", "three integers (t, h, w)", "(3, 4, 5)"), NothingRuns():
        layer.kernels(x, position)


def test_kernels_in_16_bits_and_under_autocast() -> None:
    layer, x = make(), clips()
    expected = layer.kernels(x, (0, 1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = layer.kernels(x, (0, 1, 2))
    for given in (lowered, layer.bfloat16().kernels(x.bfloat16(), (0, 1, 2))):
        for actual, wanted in zip(given, expected, strict=True):
            assert actual.dtype == torch.float32
            assert relative_error(actual, wanted) < 0.05


# --- stride ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 1), (2, 3, 1), 2, (4, 9, 9)], ids=str)
@pytest.mark.parametrize("size", [(3, 4, 5), (1, 1, 1)], ids=str)
def test_stride_averages(stride: Any, size: tuple[int, int, int]) -> None:
    """Over three cells where it strides, zeros around counted."""
    layer = make(stride=stride).double()
    x = clips(2, 6, *size, dtype=torch.float64)
    steps = (stride,) * 3 if isinstance(stride, int) else stride
    window = [3 if step > 1 else 1 for step in steps]
    margins = [m for k in reversed(window) for m in (k // 2, k // 2)]
    expected = run(layer, x, call=lambda x: F.avg_pool3d(F.pad(pseudo_code(layer, x), margins), window, steps))
    assert_results_close(run(layer, x), expected, 1e-9)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 1), [3, 3, 3]], ids=str)
def test_published_stride_is_one_pool(stride: Any) -> None:
    """Whatever it says."""
    module = dt.compat.build("ops.rsa.RSA", d_in=4, d_out=4, dk=0, kernel_size=(1, 3, 3), stride=stride).double()
    plain = dt.compat.build("ops.rsa.RSA", d_in=4, d_out=4, dk=0, kernel_size=(1, 3, 3)).double()
    plain.load_state_dict(module.state_dict(), strict=True)
    x = clips(2, 4, 3, 5, 6, dtype=torch.float64)
    assert_close(module(x), F.avg_pool3d(plain(x), (1, 3, 3), (1, 2, 2), (0, 1, 1)), tolerance=1e-12)


# --- the published module -------------------------------------------------------------------------------------------


@on_combinations
def test_published_state_loads_natively(kernel: str, context: str) -> None:
    kinds = {"kernel_type": PUBLISHED[kernel], "feat_type": PUBLISHED[context]}
    config = {"d_in": 6, "d_out": 8, "nh": 2, "dk": 0, "kernel_size": [3, 3, 5], **kinds}
    module = dt.compat.build("ops.rsa.RSA", config)
    options: dict[str, Any] = {"kernel": kernel, "context": context, "basic_projection": kernel != "V"}
    native = dt.layers.RSA(6, 8, num_queries=2, kernel_size=(3, 3, 5), **options)
    native.load_state_dict(module.state_dict(), strict=True)
    x = clips()
    assert_identical(native(x), module(x))


def test_published_defaults() -> None:
    module = dt.compat.build("ops.rsa.RSA", d_in=4, d_out=16)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "projection.weight": (32, 4, 1, 1, 1),
        "H2.weight": (16, 1, 3, 7, 7),
    }
    for sizes, derived in (
        ({}, (4, 4, 4)),
        ({"dk": 5}, (5, 4, 5)),
        ({"dv": 3}, (3, 3, 3)),
        ({"dk": 5, "dd": 2}, (5, 4, 2)),
    ):
        module = dt.compat.build("ops.rsa.RSA", d_in=6, d_out=8, nh=2, kernel_type="R", **{"dk": 0, **sizes})
        assert (module.key_channels, module.value_channels, module.latent_channels) == derived


def test_published_output_shrinks() -> None:
    """Where the queries do not divide d_out; a dv of its own decides alone."""
    for config, channels in (({"d_out": 10, "nh": 4}, 8), ({"d_out": 10, "nh": 4, "dv": 3}, 12)):
        module = dt.compat.build("ops.rsa.RSA", d_in=6, dk=0, kernel_size=(1, 1, 1), **config)
        assert module(clips()).shape == (2, channels, 3, 4, 5)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"d_in": 0}, ("d_in is 0", "integer > 0")),
        ({"d_out": 2.0}, ("d_out is 2.0", "integer > 0")),
        ({"nh": None}, ("nh is None", "integer > 0")),
        ({"dk": -1}, ("dk is -1", "integer >= 0")),
        ({"dv": True}, ("dv is True", "integer >= 0")),
        ({"dd": "4"}, ("dd is '4'", "integer >= 0")),
        ({"nh": 9}, ("dv is 0", "d_out 8", "nh 9")),
        ({"kernel_size": (3, 7)}, ("kernel_size is (3, 7)", "three positive integers")),
        ({"stride": (1, 0, 2)}, ("stride is (1, 0, 2)", "three positive integers")),
        ({"kernel_type": "V+R"}, ("kernel_type is 'V+R'", "'V', 'R', 'VplusR'")),
        ({"feat_type": None}, ("feat_type is None", "'V', 'R', 'VplusR'")),
        ({"kernel_type": "V", "dd": 5}, ("dd is 5", "kernel_type 'V'", "dk, 4")),
        ({"feat_type": "VplusR", "dk": 3}, ("dk is 3", "feat_type 'VplusR'", "dv, 4")),
        ({"keep_regions": 1}, ("keep_regions is 1", "True and False")),
        ({"heads": 2}, ("heads", "accepted are", "'kernel_type'")),
        ({"rnn_type": "LSTM"}, ("rnn_type", "accepted are", "'kernel_type'")),
    ],
    ids=str,
)
def test_arguments_of_the_published_module(config: dict, parts: tuple[str, ...]) -> None:
    good = {"d_in": 6, "d_out": 8, "nh": 2, "dk": 4, "kernel_type": "VplusR"}
    with refused(ValueError, "ops.rsa.RSA", *parts):
        dt.compat.build("ops.rsa.RSA", {**good, **config})


# --- in use ---------------------------------------------------------------------------------------------------------


@on_backends
def test_clips_are_apart(backend: str, device: torch.device) -> None:
    layer, _ = tiny(device)
    x = clips(2, 2, 2, 3, 4, device=device)
    with dt.backend(backend):
        assert_close(layer(x)[1:], layer(x[1:]).double(), tolerance=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batch_leaves_zero_gradients(stride: int, device: torch.device) -> None:
    """Not absent ones: in distributed training a rank without a clip would wait for them."""
    layer = make(stride=stride).to(device)
    y = layer(clips(0, 6, 3, 4, 5, device=device))
    assert y.shape == ((0, 8, 3, 4, 5) if stride == 1 else (0, 8, 2, 2, 3))
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@on_backends
def test_layouts_of_the_input(backend: str, device: torch.device) -> None:
    layer, x = tiny(device)
    views = [
        x.contiguous(memory_format=torch.channels_last_3d),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        F.pad(x, (1, 2, 3, 1, 1, 1))[..., 1:-1, 3:-1, 1:-2],
    ]
    with dt.backend(backend):
        expected = run(layer, x)
        for view in views:
            assert not view.is_contiguous()
            leaf = view.detach().requires_grad_()
            assert_close(layer(leaf), expected["out"].double(), tolerance=1e-5)
        layer.to(memory_format=torch.channels_last_3d)
        assert_results_close(run(layer, views[0]), expected, 1e-5)


@on_backends
def test_autocast(backend: str, device: torch.device) -> None:
    """The projection and the op run in its dtype; every gradient has its parameter's."""
    layer, x = tiny(device, stride=(1, 2, 2))
    x.requires_grad_()
    with dt.backend(backend):
        plain = layer(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert relative_error(y, plain) < 0.05
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.dtype == torch.float32, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    layer = make(stride=2).to(device)
    x = clips(device=device)
    expected = layer(x)
    with dt.backend("eager"):
        y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < (1e-5 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("build", [make, lambda: dt.compat.build("ops.rsa.RSA", d_in=6, d_out=8, dk=0)])
def test_copies_compute_the_same(copied: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module]) -> None:
    layer, x = build(), clips()
    expected = run(layer, x)
    twin = copied(layer)
    assert_identical(twin(x), expected["out"])
    other = build()
    assert not torch.equal(other(x), expected["out"])
    other.load_state_dict(twin.state_dict(), strict=True)
    assert_identical(other(x), expected["out"])


@on_backends
def test_compiles_without_graph_breaks(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    layer, x = tiny(device, stride=(1, 2, 2))
    with dt.backend(backend):
        expected = run(layer, x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        actual = {name.removeprefix("_orig_mod."): t for name, t in run(compiled, x).items()}
    torch._dynamo.reset()
    assert_results_close(actual, expected, 1e-5)


def test_exports_with_any_batch() -> None:
    layer = make(correlation_groups=1).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with dt.backend("eager"):
        program = torch.export.export(layer, (clips(),), dynamic_shapes={"x": {0: batch}})
        x = clips(5, 6, 3, 4, 5)
        assert_close(program.module()(x), layer(x).double(), tolerance=1e-5)


@on_backends
def test_checkpointed_gradients_are_the_same(backend: str, device: torch.device) -> None:
    layer, x = tiny(device)
    with dt.backend(backend):
        expected = run(layer, x)
        actual = run(layer, x, call=lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_results_close(actual, expected, 1e-6)


def test_training_lowers_a_loss(device: torch.device) -> None:
    x = clips(device=device)
    with torch.no_grad():
        target = make().to(device)(x)
    layer = make().to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_representation_tells_the_options() -> None:
    told = make(stride=(1, 2, 2), kernel="R").extra_repr()
    assert told.startswith("6, 8, num_queries=2, key_channels=3, value_channels=4, latent_channels=5")
    assert "kernel_size=(3, 3, 5), stride=(1, 2, 2), kernel='R', context='V+R', correlation_groups=3" in told


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"in_channels": 0}, ("in_channels is 0", "integer > 0")),
        ({"out_channels": -8}, ("out_channels is -8", "integer > 0")),
        ({"num_queries": 1.5}, ("num_queries is 1.5", "integer > 0")),
        ({"key_channels": 0}, ("key_channels is 0", "integer > 0")),
        ({"value_channels": "4"}, ("value_channels is '4'", "integer > 0")),
        ({"latent_channels": True}, ("latent_channels is True", "integer > 0")),
        ({"correlation_groups": 0}, ("correlation_groups is 0", "integer > 0")),
        ({"correlation_groups": 3}, ("correlation_groups is 3", "divisor of key_channels, 4")),
        ({"out_channels": 9}, ("out_channels is 9", "multiple of num_queries, 2")),
        ({"in_channels": 7, "out_channels": None}, ("out_channels is 7", "multiple of num_queries, 2")),
        ({"value_channels": 3}, ("value_channels is 3", "out_channels / num_queries, 8 / 2")),
        ({"kernel_size": (3, 3)}, ("kernel_size is (3, 3)", "three positive integers")),
        ({"kernel_size": (3, 0, 3)}, ("kernel_size is (3, 0, 3)", "three positive integers")),
        ({"kernel_size": None}, ("kernel_size is None", "three positive integers")),
        ({"stride": (1, 2)}, ("stride is (1, 2)", "three positive integers")),
        ({"stride": 0}, ("stride is 0", "three positive integers")),
        ({"kernel": "VplusR"}, ("kernel is 'VplusR'", "'V', 'R', 'V+R'")),
        ({"context": None}, ("context is None", "'V', 'R', 'V+R'")),
        ({"basic_projection": None}, ("basic_projection is None", "True and False")),
        ({"basic_projection": False}, ("basic_projection is False", "kernel 'V+R'", "accepted is kernel 'V'")),
        (
            {"basic_projection": False, "kernel": "V", "latent_channels": 5},
            ("basic_projection is False", "key_channels 4", "latent_channels 5"),
        ),
    ],
    ids=str,
)
def test_arguments(arguments: dict, parts: tuple[str, ...]) -> None:
    good = {"in_channels": 6, "out_channels": 8, "num_queries": 2, "kernel_size": (1, 3, 3)}
    with refused(ValueError, "RSA", *parts), NothingRuns():
        dt.layers.RSA(**{**good, **arguments})


def test_unknown_argument() -> None:
    with refused(TypeError, "heads"):
        dt.layers.RSA(8, heads=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("x", "error", "parts"),
    [
        (torch.ones(2, 6, 4, 5), ValueError, ("x is (2, 6, 4, 5)", "(B, 6, T, H, W)")),
        (torch.ones(2, 5, 3, 4, 5), ValueError, ("x is (2, 5, 3, 4, 5)", "(B, 6, T, H, W) for in_channels 6")),
        (torch.ones(2, 6, 3, 0, 5), ValueError, ("x is (2, 6, 3, 0, 5)", "H and W > 0")),
        (torch.ones(2, 6, 3, 4, 5).long(), TypeError, ("int64", "the layer's dtype, float32")),
        (torch.ones(2, 6, 3, 4, 5).half(), TypeError, ("float16", "the layer's dtype, float32")),
        (torch.ones(2, 6, 3, 4, 5, device="meta"), ValueError, ("meta", "the layer's device, cpu")),
        (None, TypeError, ("x is NoneType", "dense torch.Tensor")),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
@pytest.mark.parametrize("method", ["forward", "kernels"])
@pytest.mark.parametrize("build", [make, lambda: dt.compat.build("ops.rsa.RSA", d_in=6, d_out=8, dk=0)])
def test_input(build: Callable[[], nn.Module], method: str, x: Any, error: type[Exception], parts: tuple) -> None:
    layer = build()
    more = ((0, 0, 0),) if method == "kernels" else ()
    with refused(error, "RSA", *parts), NothingRuns():
        getattr(layer, method)(x, *more)
