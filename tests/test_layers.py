"""The layers against plain formulations of the papers, and what a module must withstand in use."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import (
    PROFILES,
    TOLERANCE,
    assert_close,
    assert_identical,
    assert_results_close,
    awake,
    backends,
    in_full,
    relative_error,
    run,
)
from torch import Tensor, nn
from torch.nn import functional as F

import dyreg_triton as dt

on_backends = pytest.mark.parametrize("backend", backends())
SMALL: dict[str, Any] = {"grid": (2, 2), "region_channels": 8, "iterations": 2}


# --- RSTG -----------------------------------------------------------------------------------------------------------


def norm(x: Tensor, dims: int, affine: nn.Module) -> Tensor:
    """Joint over the last dimensions, affine per channel, written out."""
    axes = tuple(range(-dims, 0))
    centered = x - x.mean(axes, keepdim=True)
    return centered / (centered.square().mean(axes, keepdim=True) + 1e-5).sqrt() * affine.scale + affine.bias


def mlp(layers: nn.Module, x: Tensor) -> Tensor:
    """A ReLU after each linear layer."""
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            x = F.relu(x @ layer.weight.mT + layer.bias)
    return x


def through_time(rnn: nn.RNNBase, nodes: Tensor) -> Tensor:
    """Every node a sequence of its own, step by step from a zero state."""
    w_x, w_h, b_x, b_h = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0
    hidden = cell = torch.zeros_like(nodes[:, 0])
    steps = []
    for t in range(nodes.shape[1]):
        from_x, from_h = nodes[:, t] @ w_x.mT + b_x, hidden @ w_h.mT + b_h
        if isinstance(rnn, nn.LSTM):
            i, f, g, o = (from_x + from_h).chunk(4, dim=-1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        else:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
            z = (z_x + z_h).sigmoid()
            hidden = (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * hidden
        steps.append(hidden)
    return torch.stack(steps, dim=1)


def naive_rstg(layer: nn.Module, v: Tensor, *, combine: str, aggregation: str, order: str, **_: object) -> Tensor:
    """All N x N pairs are formed and normalised, as the paper writes (equations 8 and 9)."""

    def together(a: Tensor, b: Tensor) -> Tensor:
        return a + b if combine == "sum" else torch.cat([a, b], dim=-1)

    def space(v: Tensor) -> Tensor:
        nodes = v.shape[2]
        receivers = torch.stack([v] * nodes, dim=3)  # (B, T, receiver, sender, C)
        senders = torch.stack([v] * nodes, dim=2)
        messages = norm(mlp(layer.send_mlp, together(senders, receivers)), 3, layer.norm_dict["send_message_norm"])
        if aggregation == "mean":
            received = messages.mean(3)
        else:
            q, k = layer.att_q(v), layer.att_k(v)
            weights = torch.einsum("btic,btjc->btij", q, k).softmax(-1)
            received = F.relu(torch.einsum("btij,btijc->btic", weights, messages) + layer.att_bias.view(-1))
        return norm(mlp(layer.update_mlp, together(v, received)), 2, layer.norm_dict["update_norm"])

    v = norm(v, 2, layer.norm_dict["before_graph_norm"])
    for _ in range(layer.iterations):
        if order == "time-space":
            v = space(through_time(layer.internal_lstm, v))
        else:
            v = through_time(layer.internal_lstm, space(v))
    return through_time(layer.external_lstm, v) if order == "time-space" else v


OPTIONS = [
    dict(zip(("recurrence", "combine", "send_layers", "update_layers", "aggregation", "order"), chosen, strict=True))
    for chosen in itertools.product(
        ("gru", "lstm"),
        ("concatenate", "sum"),
        (1, 2),
        (0, 1, 2),
        ("dot", "mean"),
        ("space-time", "time-space"),
    )
    if not (chosen[1] == "concatenate" and chosen[3] == 0)
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_rstg_is_the_naive_one(options: dict[str, Any], device: torch.device) -> None:
    """Output and every gradient, for all combinations of options."""
    layer = awake(dt.layers.RSTG(6, **options)).double().to(device)
    nodes = torch.randn(2, 3, 5, 6, dtype=torch.float64, device=device)
    actual = run(layer, nodes)
    layer.zero_grad()
    leaf = nodes.clone().requires_grad_()
    y = naive_rstg(layer, leaf, **options)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device).view_as(y).sin())
    expected = {"out": y.detach(), "grad_x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert_results_close(actual, expected, 1e-9)


@pytest.mark.parametrize("iterations", [1, 4])
def test_rstg_iterations(iterations: int, device: torch.device) -> None:
    options = {"combine": "concatenate", "aggregation": "dot", "order": "space-time"}
    layer = dt.layers.RSTG(6, iterations=iterations, **options).double().to(device)
    nodes = torch.randn(2, 3, 5, 6, dtype=torch.float64, device=device)
    assert_close(layer(nodes), naive_rstg(layer, nodes, **options), tolerance=1e-9)


def test_rstg_defaults_are_the_papers(device: torch.device) -> None:
    plain, named = (
        dt.layers.RSTG(6, **options)
        for options in (
            {},
            {
                "iterations": 3,
                "recurrence": "gru",
                "combine": "concatenate",
                "send_layers": 2,
                "update_layers": 2,
                "aggregation": "dot",
                "order": "space-time",
            },
        )
    )
    named.load_state_dict(plain.state_dict())
    nodes = torch.randn(1, 2, 3, 6)
    assert_identical(plain(nodes), named(nodes))


@pytest.mark.parametrize("shape", [(0, 3, 4, 6), (2, 0, 4, 6), (2, 3, 0, 6), (1, 1, 1, 6), (3, 1, 7, 6)])
@pytest.mark.parametrize("recurrence", ["gru", "lstm"])
@pytest.mark.parametrize("order", ["space-time", "time-space"])
def test_rstg_sizes(order: str, recurrence: str, shape: tuple[int, ...], device: torch.device) -> None:
    layer = dt.layers.RSTG(6, recurrence=recurrence, order=order).to(device)
    nodes = torch.randn(shape, device=device, requires_grad=True)
    y = layer(nodes)
    assert y.shape == shape
    assert y.isfinite().all()
    y.sum().backward()
    assert nodes.grad is not None
    assert nodes.grad.shape == shape


# --- regions from offsets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("init", ["center", "grid"])
def test_regions_from_offsets(init: str, dtype: torch.dtype, device: torch.device) -> None:
    """The published rule, node by node: rows outside, columns inside."""
    (height, width), (rows, columns) = size, grid = (12, 20), (2, 3)
    offsets = torch.randn(2, 6, 4, dtype=dtype, device=device)
    actual = dt.layers.regions_from_offsets(offsets, grid=grid, size=size, init=init)
    assert actual.dtype == dtype
    expected = torch.empty(2, 6, 4, dtype=torch.float64)
    for b, n in itertools.product(range(2), range(6)):
        log_h, log_w, down, across = offsets[b, n].double().cpu()
        row, column = divmod(n, columns)
        anchor_y = height / 2 if init == "center" else (row + 0.5) * height / rows
        anchor_x = width / 2 if init == "center" else (column + 0.5) * width / columns
        cy = height / 2 * (1 + (down + torch.tensor(2 * anchor_y / height - 1).double().atanh()).tanh())
        cx = width / 2 * (1 + (across + torch.tensor(2 * anchor_x / width - 1).double().atanh()).tanh())
        h = log_h.exp() * (height / (2 * rows) + 1) + 1
        w = log_w.exp() * (width / (2 * columns) + 1) + 1
        expected[b, n] = torch.stack([cx.clamp(0, width - 1), cy.clamp(0, height - 1), w, h])
    assert_close(actual, expected, tolerance=max(TOLERANCE[dtype], 1e-6) if init == "grid" else None)


def test_regions_stay_on_the_map(device: torch.device) -> None:
    """However large the offsets: clamped centers have no gradient, and none is NaN."""
    offsets = torch.tensor([[0.0, 0.0, s * 50.0, -s * 50.0] for s in (1, -1)], device=device).requires_grad_()
    regions = dt.layers.regions_from_offsets(offsets, grid=(1, 2), size=(12, 20))
    assert regions[:, 0].tolist() == [0, 19]
    assert regions[:, 1].tolist() == [11, 0]
    regions.sum().backward()
    assert offsets.grad[:, 2:].eq(0).all()
    assert offsets.grad[:, :2].gt(0).all()


@pytest.mark.parametrize("init", ["center", "grid"])
def test_regions_at_rest(init: str, device: torch.device) -> None:
    """Without offsets a node is on its anchor."""
    regions = dt.layers.regions_from_offsets(torch.zeros(8, 4, device=device), grid=(2, 4), size=(12, 20), init=init)
    x = [10.0] * 8 if init == "center" else [2.5, 7.5, 12.5, 17.5] * 2
    y = [6.0] * 8 if init == "center" else [3.0] * 4 + [9.0] * 4
    expected = torch.tensor([x, y, [20 / 8 + 2] * 8, [12 / 4 + 2] * 8], dtype=torch.float64).T
    assert_close(regions, expected)


# --- DyReG ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "fc-gru": {},
    "fc-lstm": {"recurrence": "lstm"},
    "pooled-gru": {"generator": "pooled"},
    "pooled-lstm-nodes": {"generator": "pooled", "recurrence": "lstm", "weights_over": "nodes"},
    "projected": {"node_channels": 6},
    "projected-same": {"project": True},
    "published": {**dt.layers.dyreg.PUBLISHED},
    "grid-gaussian": {"init": "grid", "profile": "gaussian"},
    "log-linear": {"profile": "log-linear", "temperature": 3.0, "offset_bias": True},
    "other-size": {"train_size": (7, 8), "init": "grid"},
    "mean-sum": {"aggregation": "mean", "combine": "sum", "update_layers": 0, "send_layers": 1},
}
on_variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str = "fc-gru", size: tuple[int, int] = (9, 10), channels: int = 4, **options: Any) -> nn.Module:
    return dt.layers.DyReG(channels, size, **{**SMALL, **VARIANTS[variant], **options})


def frames(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(device)


@on_variants
@on_backends
def test_starts_as_the_identity(backend: str, variant: str, device: torch.device) -> None:
    layer = make(variant).to(device)
    x = frames(2, 3, 4, 9, 10, device=device)
    with dt.backend(backend):
        y, regions = layer(x, return_regions=True)
    assert_identical(y, x)
    assert regions.shape == (2, 3, 4, 4)
    assert regions.dtype == torch.float32


@on_variants
@on_backends
def test_backends_agree(backend: str, variant: str, device: torch.device) -> None:
    """The whole layer and every gradient, against the reference in float64."""
    layer = awake(make(variant)).to(device)
    x = frames(1, 2, 4, 9, 10, device=device)
    with dt.backend("reference"):
        expected = run(copy.deepcopy(layer).double(), x.double())
    with dt.backend(backend):
        actual = run(layer, x)
    assert_results_close(actual, expected, 1e-4)


@on_variants
def test_gradients_reach_every_parameter(variant: str, device: torch.device) -> None:
    layer = awake(make(variant)).double().to(device)
    got = run(layer, frames(2, 3, 4, 9, 10, device=device, dtype=torch.float64))
    for name, grad in got.items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.any(), name


@on_variants
def test_is_the_plain_formulation(variant: str, device: torch.device) -> None:
    """Dense kernels, their linear embedding, the graph, re-mapping and then the 1x1 convolution back."""
    size = (9, 10)
    layer = awake(make(variant, size)).double().to(device)
    options = {**SMALL, **VARIANTS[variant]}
    kernel_options = {name: options[name] for name in ("profile", "temperature") if name in options}
    x = frames(2, 3, 4, *size, device=device, dtype=torch.float64)
    with dt.backend("reference"):
        actual, regions = layer(x, return_regions=True)
    graph = layer.dynamic_graph
    features, projected = x, hasattr(graph, "project_i3d_linear")
    assert projected == ("node_channels" in options or options.get("project", False))
    if projected:
        maps = graph.project_i3d_linear(x.flatten(0, 1))
        features = norm(maps, 3, graph.norm_dict["dynamic_graph_projection"]).unflatten(0, x.shape[:2])
    kernel = dt.reference.region_kernel(regions, size, **kernel_options)
    pooled = torch.einsum("btnhw,btchw->btnc", kernel, features)
    if "train_size" in options:
        kernel = F.adaptive_avg_pool2d(kernel.flatten(0, 1), options["train_size"]).unflatten(0, x.shape[:2])
    nodes = graph.rstg(pooled + graph.kernel_projection1(kernel.flatten(-2)))
    assert_close(layer.nodes(x)[0], nodes, tolerance=1e-9)
    y = dt.reference.region_remap(nodes, regions, size, **kernel_options).flatten(0, 1)
    if projected:
        y = graph.project_back_i3d_linear(y)
    y = norm(y, 3, layer.norm_dict["residual_norm"]).unflatten(0, x.shape[:2])
    assert_close(actual, x + y, tolerance=1e-9)


@pytest.mark.parametrize("generator", ["fc", "pooled"])
@pytest.mark.parametrize("node_channels", [4, 6])
def test_projected_gradients_are_the_plain_ones(generator: str, node_channels: int, device: torch.device) -> None:
    """Of every parameter, through remap-then-convolve written out."""
    size = (9, 10)
    layer = awake(make("projected-same", size, generator=generator, node_channels=node_channels)).double().to(device)
    x = frames(2, 2, 4, *size, device=device, dtype=torch.float64)
    actual = run(layer, x)
    graph = layer.dynamic_graph

    def plain(x: Tensor) -> Tensor:
        regions = layer(x, return_regions=True)[1]
        features = graph.norm_dict["dynamic_graph_projection"](graph.project_i3d_linear(x.flatten(0, 1)))
        kernel = dt.reference.region_kernel(regions, size)
        nodes = torch.einsum("btnhw,btchw->btnc", kernel, features.unflatten(0, x.shape[:2]))
        nodes = graph.rstg(nodes + graph.kernel_projection1(kernel.flatten(-2)))
        y = graph.project_back_i3d_linear(torch.einsum("btnhw,btnc->btchw", kernel, nodes).flatten(0, 1))
        return x + layer.norm_dict["residual_norm"](y).unflatten(0, x.shape[:2])

    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    y = plain(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), device=device, dtype=y.dtype).view_as(y).sin())
    expected = {"out": y.detach(), "grad_x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert_results_close(actual, expected, 1e-9)


def sinusoids(count: int, side: int) -> Tensor:
    """(count, side): sines of even frequencies, then cosines of odd ones, of positions from 0 to 1."""
    rows = [
        [wave(p / (side - 1) / 10000 ** (i / count)) for p in range(side)]
        for wave, first in ((math.sin, 0), (math.cos, 1))
        for i in range(first, count, 2)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("rule", ["paper", "published"])
@pytest.mark.parametrize("generator", ["fc", "locations", "nodes"])
def test_regions_are_the_plain_ones(generator: str, rule: str, device: torch.device) -> None:
    """From the map to the regions (equations 1 to 4), with a latent vector per node written out."""
    height, width = size = (9, 10)
    options = {} if generator == "fc" else {"generator": "pooled", "weights_over": generator}
    layer = awake(make(size=size, region_rule=rule, offset_bias=True, **options)).double().to(device)
    graph = layer.dynamic_graph
    x = frames(2, 3, 4, *size, device=device, dtype=torch.float64)
    maps = x.flatten(0, 1)
    if generator == "fc":  # a fully connected layer of its own for every node, on the whole map
        convolution = graph.global_conv[0]
        latent = (graph.fishnet(maps).flatten(1) @ convolution.weight.flatten(1).mT + convolution.bias).view(6, 4, 8)
    else:
        weights = torch.einsum("nc,bchw->bnhw", graph.glore.mask_conv.weight[:, :, 0, 0], maps)
        weights = (weights + graph.glore.mask_conv.bias[:, None, None]).exp()
        weights = weights / weights.sum(1 if generator == "nodes" else (2, 3), keepdim=True)
        rows = sinusoids(2, height)[:, :, None].expand(2, height, width)
        columns = sinusoids(2, width)[:, None, :].expand(2, height, width)
        places = graph.glore.sin_pos_emb_proj(torch.cat([rows, columns])[None].to(device))
        pooled = torch.einsum("bnhw,bchw->bnc", weights, maps + places)
        latent = pooled @ graph.glore.update.weight[:, :, 0].mT + graph.glore.update.bias
    latent = norm(latent, 2, graph.norm_dict["offset_ln_feats_coords"]).unflatten(0, (2, 3))
    latent = norm(through_time(graph.offset_lstm, latent), 2, graph.norm_dict["offset_ln_lstm"])
    offsets = (latent @ graph.offset_pred.weight.mT + graph.offset_pred.bias) * graph.offset_alpha
    if rule == "published":
        expected = dt.layers.regions_from_offsets(offsets, grid=(2, 2), size=size)
    else:
        log_h, log_w, down, across = offsets.unbind(-1)
        center = [width / 2 * (1 + across.tanh()), height / 2 * (1 + down.tanh())]
        expected = torch.stack([*center, log_w.exp() * width / 6, log_h.exp() * height / 6], dim=-1)
    assert_close(layer(x, return_regions=True)[1], expected, tolerance=1e-7)  # the positions are kept in float32
    rest = layer.double()(torch.zeros_like(x), return_regions=True)[1]
    assert relative_error(rest, expected) > 1e-3  # the regions do depend on the map


def test_regions_at_the_start(device: torch.device) -> None:
    """The paper's rule: every node in the middle of the map, half-extents a sixth of it."""
    _, regions = make(size=(12, 20))(frames(1, 2, 4, 12, 20, device=torch.device("cpu")), return_regions=True)
    assert_close(regions, torch.tensor([10.0, 6.0, 20 / 6, 12 / 6]).expand(1, 2, 4, 4).double())
    _, regions = make("published", (12, 20))(torch.randn(1, 2, 4, 12, 20), return_regions=True)
    assert_close(regions, torch.tensor([10.0, 6.0, 20 / 4 + 2, 12 / 4 + 2]).expand(1, 2, 4, 4).double())


@pytest.mark.parametrize("generator", ["fc", "pooled"])
@pytest.mark.parametrize("grid", [(2, 4), (1, 1), (3, 1), (1, 5)])
@pytest.mark.parametrize("size", [(12, 20), (20, 12), (3, 5), (7, 7)])
def test_any_grid_and_any_map(
    size: tuple[int, int], grid: tuple[int, int], generator: str, device: torch.device
) -> None:
    layer = awake(make(size=size, grid=grid, generator=generator, init="grid")).to(device)
    x = frames(2, 2, 4, *size, device=device).requires_grad_()
    y, regions = layer(x, return_regions=True)
    assert y.shape == x.shape
    assert regions.shape == (2, 2, grid[0] * grid[1], 4)
    assert y.isfinite().all()
    y.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [(3, 3), (11, 21), (56, 56), (28, 51), (16, 13)])
def test_fc_generator_sizes(size: tuple[int, int]) -> None:
    layer = make(size=size, channels=2)
    x = torch.randn(1, 1, 2, *size)
    assert_identical(layer(x), x)


@on_variants
@pytest.mark.parametrize("lead", [(0, 3), (2, 0), (2, 1), (1, 1), (0, 0)])
def test_batch_and_time_of_any_length(lead: tuple[int, int], variant: str, device: torch.device) -> None:
    layer = awake(make(variant)).to(device)
    x = frames(*lead, 4, 9, 10, device=device).requires_grad_()
    y, regions = layer(x, return_regions=True)
    assert y.shape == x.shape
    assert regions.shape == (*lead, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape


@on_backends
def test_clips_and_times_are_apart(backend: str, device: torch.device) -> None:
    """A clip does not see another, and a frame does not see a later one."""
    layer = awake(make()).to(device)
    x = frames(2, 3, 4, 9, 10, device=device)
    with dt.backend(backend):
        whole = layer(x)
        assert_close(whole[1:2], layer(x[1:2]).double(), tolerance=1e-4)
        assert_close(whole[:, :2], layer(x[:, :2]).double(), tolerance=1e-4)
        later = layer(torch.cat([x[:, 1:], x[:, :1]], dim=1))
    assert relative_error(later[:, :2], whole[:, 1:]) > 1e-3


@on_backends
def test_layouts_of_the_input(backend: str, device: torch.device) -> None:
    """(B, C, T, H, W) transposed, channels last, and a slice of a larger map."""
    layer = awake(make()).to(device)
    x = frames(1, 2, 4, 9, 10, device=device)
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (1, 2)),
        F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    ]
    with dt.backend(backend):
        expected = run(layer, x)
        for view in views:
            assert not view.is_contiguous()
            assert view.equal(x)
            assert_results_close(run(layer, view), expected, 1e-5)


@pytest.mark.parametrize("default", [False, True])
def test_return_regions(default: bool, device: torch.device) -> None:
    layer = make(return_regions=default).to(device)
    x = frames(1, 2, 4, 9, 10, device=device)
    assert isinstance(layer(x), tuple) == default
    assert isinstance(layer(x, return_regions=True), tuple)
    assert isinstance(layer(x, return_regions=False), Tensor)


def through_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def through_torch(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state_dict(layer: nn.Module) -> nn.Module:
    """Into a layer with other weights, by strict loading."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(layer.state_dict(), strict=True)
    return other


COPIES: list[Callable[[nn.Module], nn.Module]] = [copy.deepcopy, through_pickle, through_torch, through_state_dict]


@on_variants
@pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__)
def test_copies_compute_the_same(copied: Callable[[nn.Module], nn.Module], variant: str, device: torch.device) -> None:
    """Also of a layer that has just run forward and backward."""
    layer = awake(make(variant)).to(device)
    x = frames(1, 2, 4, 9, 10, device=device)
    expected = run(layer, x)
    twin = copied(layer)
    assert_identical(run(twin, x)["out"], expected["out"])
    assert twin.state_dict().keys() == layer.state_dict().keys()
    with torch.no_grad():  # and share nothing
        for parameter in twin.parameters():
            parameter.zero_()
    assert_identical(run(layer, x)["out"], expected["out"])


def test_state_dict_of_a_new_layer_fits(device: torch.device) -> None:
    for variant in VARIANTS:
        first, second = awake(make(variant)), make(variant)
        second.load_state_dict(first.state_dict(), strict=True)
        x = torch.randn(1, 2, 4, 9, 10)
        assert_identical(second(x), first(x))


def tensors_of(value: object, depth: int = 0) -> Iterator[Tensor]:
    """Tensors held by an object's attributes, in containers too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item, depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_of(item, depth + 1)
    elif hasattr(value, "__dict__") and depth < 6 and not isinstance(value, (type, type(copy))):
        yield from tensors_of(vars(value), depth + 1)


@on_variants
def test_no_graph_stays_on_the_module(variant: str, device: torch.device) -> None:
    layer = awake(make(variant)).to(device)
    y = layer(frames(1, 2, 4, 9, 10, device=device))
    assert y.grad_fn is not None
    for module in layer.modules():
        for tensor in tensors_of(vars(module)):
            assert tensor.grad_fn is None, type(module)


def test_the_check_for_graphs_sees_one() -> None:
    layer = make()
    layer.dynamic_graph.kept = {"a": [layer.dynamic_graph.offset_alpha * 2]}
    assert any(t.grad_fn is not None for module in layer.modules() for t in tensors_of(vars(module)))


def test_compat_keeps_regions_only_when_asked(device: torch.device) -> None:
    for keep in (False, True):
        module = dt.compat.build("ops.dyreg.DynamicGraph", backbone_dim=4, node_dim=4, keep_regions=keep).to(device)
        awake(module)
        module(frames(1, 2, 4, 14, 14, device=device)).sum().backward()
        assert hasattr(module, "offsets") == hasattr(module, "kernel") == keep
        for tensor in tensors_of(vars(module)):
            assert tensor.grad_fn is None
        module.load_state_dict(module.state_dict(), strict=True)
        copy.deepcopy(module)


@on_variants
@on_backends
def test_regions_under_autocast(backend: str, variant: str, device: torch.device) -> None:
    """Regions are float32 and not rounded; the layer stays close to itself in float32."""
    layer = awake(make(variant)).to(device)
    x = frames(1, 2, 4, 9, 10, device=device)
    with dt.backend(backend):
        plain = layer(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y, regions = layer(x, return_regions=True)
        y.float().square().sum().backward()
    assert regions.dtype == torch.float32
    assert not regions.equal(regions.bfloat16().float())
    assert relative_error(y, plain) < 0.1
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_layer_in_another_dtype(dtype: torch.dtype, device: torch.device) -> None:
    layer = awake(make()).to(device)
    x = frames(2, 2, 4, 9, 10, device=device)
    expected = layer(x)
    y, regions = layer.to(dtype)(x.to(dtype), return_regions=True)
    assert y.dtype == dtype
    assert regions.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(y, expected) < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_training_lowers_a_loss(device: torch.device) -> None:
    """From the start, where the branch gives nothing."""
    layer = make().to(device)
    x = frames(2, 3, 4, 9, 10, device=device)
    with torch.no_grad():
        target = awake(copy.deepcopy(layer))(x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("variant", ["fc-gru", "pooled-lstm-nodes"])
@pytest.mark.parametrize("backend", [*backends("triton", "eager"), *in_full(backends("reference"))])
def test_compiles_without_graph_breaks(backend: str, variant: str, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = awake(make(variant, (5, 6), iterations=1)).to(device)
    x = frames(1, 2, 4, 5, 6, device=device)
    with dt.backend(backend), torch._dynamo.config.patch(allow_rnn=True):
        expected = run(layer, x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        actual = {name.removeprefix("_orig_mod."): t for name, t in run(compiled, x).items()}
    torch._dynamo.reset()
    assert_results_close(actual, expected, 1e-4)


@pytest.mark.parametrize("name", ["ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper"])
def test_compat_accepts_any_grid_and_map(name: str, device: torch.device) -> None:
    """Which upstream does not: grids other than 3 x 3, rectangular maps, non-contiguous input."""
    argument = "in_channels" if name.endswith("Wrapper") else "backbone_dim"
    module = dt.compat.build(name, {argument: 4, "node_dim": 4, "H": 12, "W": 20, "h": 2, "w": 4}).to(device)
    awake(module)
    x = frames(2, 4, 3, 12, 20, device=device).transpose(1, 2)
    y = module(x)
    assert y.shape == ((6, 4, 12, 20) if name.endswith("Wrapper") else x.shape)
    assert_close(module(x.contiguous()), y.double(), tolerance=1e-4)


def test_compat_takes_params_as_mapping_object_or_none(device: torch.device) -> None:
    class Params:
        offset_lstm_dim = 16
        init_regions = "grid"

    given = [Params(), {"offset_lstm_dim": 16, "init_regions": "grid"}]
    modules = [dt.compat.build("ops.dyreg.DynamicGraph", params=p, backbone_dim=4, node_dim=4) for p in given]
    modules[1].load_state_dict(modules[0].state_dict(), strict=True)
    x = torch.randn(1, 2, 4, 14, 14)
    assert_identical(modules[0](x), modules[1](x))
    assert dt.compat.build("ops.dyreg.DynamicGraph", backbone_dim=4, node_dim=4).offset_lstm.hidden_size == 128


@pytest.mark.parametrize("init", ["center", "grid"])
def test_compat_anchors(init: str) -> None:
    """The published code halves H on both axes for "center"; both kinds are in its state_dict."""
    module = dt.compat.build(
        "ops.dyreg.DynamicGraph", {"params": {"init_regions": init}, "backbone_dim": 4, "node_dim": 4, "H": 12, "W": 18}
    )
    state = module.state_dict()
    across = [6.0] * 9 if init == "center" else [3.0, 9.0, 15.0] * 3
    down = [6.0] * 9 if init == "center" else [2.0] * 3 + [6.0] * 3 + [10.0] * 3
    assert_close(state["pw_buf"], torch.tensor(across).view(1, 9, 1).double())
    assert_close(state["ph_buf"], torch.tensor(down).view(1, 9, 1).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_anchors_stay_where_they_are_in_16_bits(dtype: torch.dtype) -> None:
    """A third of 100 cells is no 16-bit number; regions are computed in float32 all the same."""
    layer = dt.layers.DyReG(4, (100, 100), grid=(3, 3), init="grid")
    before = layer.dynamic_graph.initial_centers(torch.device("cpu"))
    after = layer.to(dtype).dynamic_graph.initial_centers(torch.device("cpu"))
    assert after.dtype == torch.float32
    assert torch.equal(before, after)
    assert_close(after[:, 0], torch.tensor([100 / 6, 50, 500 / 6] * 3))


def test_offsets_of_any_size_give_finite_regions() -> None:
    offsets = torch.tensor([[100.0, 100.0, 1e4, -1e4], [-100.0, -100.0, 0.0, 0.0]])
    regions = dt.layers.regions_from_offsets(offsets, grid=(1, 2), size=(6, 8))
    assert regions.isfinite().all()
    assert dt.ops.region_pool(torch.ones(3, 6, 8), regions).isfinite().all()
    half = dt.layers.regions_from_offsets(offsets.half(), grid=(1, 2), size=(6, 8))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("lead", [(0, 3), (2, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batches_leave_zero_gradients(lead: tuple[int, int], variant: str, device: torch.device) -> None:
    """Not absent ones: in distributed training a rank without a clip would wait for them, or stop the others."""
    layer = awake(make(variant)).to(device)
    layer(frames(*lead, 4, 9, 10, device=device)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rule", ["paper", "published"])
@pytest.mark.parametrize("profile", PROFILES)
def test_offsets_of_any_size_give_finite_gradients(profile: str, rule: str, sign: int) -> None:
    layer = dt.layers.DyReG(4, (7, 7), profile=profile, region_rule=rule, region_channels=8)
    with torch.no_grad():
        layer.dynamic_graph.offset_alpha.fill_(1000.0 * sign)
        layer.norm_dict["residual_norm"].scale.fill_(1)
    y = layer(torch.randn(2, 3, 4, 7, 7))
    y.sum().backward()
    assert y.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
