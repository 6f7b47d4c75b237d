"""Where a layer's nodes pool from: each variant against what defines it, and its equations in plain torch."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_close,
    assert_identical,
    assert_results_close,
    awake,
    backends,
    in_full,
    relative_error,
    run,
    settings,
)
from test_layers import frames, norm
from torch import Tensor, nn
from torch.nn import functional as F

import dyreg_triton as dt

VARIANTS = ("full", "position", "constant_time", "static", "grid", "semantic")
PREDICTED = ("full", "position", "constant_time")  # by a generator
FIXED_SIZE = ("position", "constant_time", "static", "grid")
PLACED = ("full", *FIXED_SIZE)  # regions that have a place and a size
SIZE = (9, 10)

on_backends = pytest.mark.parametrize("backend", backends())
on_variants = pytest.mark.parametrize("variant", VARIANTS)
on_placed = pytest.mark.parametrize("variant", PLACED)
on_predicted = pytest.mark.parametrize("variant", PREDICTED)
on_generators = pytest.mark.parametrize("generator", ["fc", "pooled"])


def make(variant: str, size: tuple[int, int] = SIZE, channels: int = 4, **options: Any) -> nn.Module:
    """A small layer of a variant, on a grid of 2 x 3 nodes."""
    small = {"grid": (2, 3), "region_channels": 8, "iterations": 1}
    return dt.layers.DyReG(channels, size, regions=variant, **{**small, **options})


def regions_of(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, return_regions=True)[1]


def relative(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Places and sizes as fractions of the map."""
    height, width = size
    return regions / torch.tensor([width, height, width, height], dtype=regions.dtype, device=regions.device)


def middles(grid: tuple[int, int], size: tuple[int, int]) -> list[list[float]]:
    """(cx, cy) of the cells of a grid, row by row."""
    (rows, columns), (height, width) = grid, size
    return [[(c + 0.5) * width / columns, (r + 0.5) * height / rows] for r in range(rows) for c in range(columns)]


def own_parameters(layer: nn.Module) -> set[str]:
    """Names of the parameters that say where nodes pool from: not those of graph, embedding, norms and projection."""
    others = r"(dynamic_graph\.)?(rstg|kernel_projection1|project_|norm_dict\.(residual_norm|dynamic_graph_projection))"
    return {name for name, _ in layer.named_parameters() if not re.match(others, name)}


# --- every variant --------------------------------------------------------------------------------------------------


@on_variants
@on_backends
def test_starts_as_the_identity(backend: str, variant: str, device: torch.device) -> None:
    """In series it starts as the branch's norm, which is another thing."""
    x = frames(2, 3, 4, *SIZE, device=device)
    serial = make(variant, connection="serial").to(device)
    with dt.backend(backend):
        y, regions = make(variant).to(device)(x, return_regions=True)
        z, branch = serial(x), serial.dynamic_graph(x)[0]
    assert_identical(y, x)
    assert regions.shape == (2, 3, 6, *(SIZE if variant == "semantic" else (4,)))
    assert regions.dtype == torch.float32
    assert serial.norm_dict["residual_norm"].scale.eq(1).all()
    assert_close(z, F.layer_norm(branch.double(), (4, *SIZE)))
    assert z.std() > 0.1


@on_variants
def test_connections(variant: str, device: torch.device) -> None:
    """x + norm(branch(x)), and norm(branch(x)) alone, with the same parameters."""
    residual = awake(make(variant)).double().to(device)
    serial = make(variant, connection="serial").double().to(device)
    serial.load_state_dict(residual.state_dict(), strict=True)
    x = frames(2, 2, 4, *SIZE, device=device, dtype=torch.float64)
    branch = norm(residual.dynamic_graph(x)[0].flatten(0, 1), 3, residual.norm_dict["residual_norm"]).view_as(x)
    assert branch.abs().amax() > 0.1
    assert_close(residual(x), x + branch)
    assert_close(serial(x), branch)


@on_variants
def test_regions_are_the_same_from_everywhere(variant: str, device: torch.device) -> None:
    layer = awake(make(variant, return_regions=True)).to(device)
    x = frames(2, 2, 4, *SIZE, device=device)
    y, regions = layer(x)
    assert_identical(layer(x, return_regions=False), y)
    assert_identical(layer.dynamic_graph(x)[1], regions)
    nodes, again = layer.nodes(x)
    assert_identical(again, regions)
    assert nodes.shape == (2, 2, 6, 4)


@on_variants
@pytest.mark.parametrize("clip", [0, 1])
def test_frames_that_regions_depend_on(clip: int, variant: str, device: torch.device) -> None:
    """Frame by frame of a clip, in its own clip and in the other."""
    layer = awake(make(variant)).double().to(device)
    x = frames(2, 3, 4, *SIZE, device=device, dtype=torch.float64).requires_grad_()
    regions = regions_of(layer, x)
    weights = torch.randn(regions.shape[2:], dtype=torch.float64).to(device)
    for t in range(3):
        grad = None
        if regions.requires_grad:
            (grad,) = torch.autograd.grad((regions[clip, t] * weights).sum(), x, retain_graph=True, allow_unused=True)
        seen = (torch.zeros_like(x) if grad is None else grad).abs().amax((2, 3, 4)) > 1e-12
        expected = torch.zeros(2, 3, dtype=torch.bool)
        expected[clip] = {
            "full": torch.arange(3) <= t,
            "position": torch.arange(3) <= t,
            "constant_time": torch.tensor(True),
            "static": torch.tensor(False),
            "grid": torch.tensor(False),
            "semantic": torch.arange(3) == t,
        }[variant]
        assert seen.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("rule", "ratio", "train_size"),
    [
        ("paper", None, None),
        ("paper", None, (6, 5)),
        ("paper", 8, None),
        ("paper", 5.5, (6, 5)),
        ("published", None, None),
        ("published", 7, None),
        ("published", 1, (15, 9)),
    ],
)
@on_placed
def test_regions_at_rest(
    variant: str, rule: str, ratio: float | None, train_size: tuple[int, int] | None, device: torch.device
) -> None:
    """A new layer: in the middle of the map, or of the cells for "grid"; of the rule's size or the one asked for."""
    layer = make(variant, (12, 20), region_rule=rule, size_ratio=ratio, train_size=train_size).to(device)
    regions = regions_of(layer, frames(2, 2, 4, 12, 20, device=device))
    width, height = (20 / 6, 12 / 6) if rule == "paper" else (20 / 6 + 2, 12 / 4 + 2)
    if ratio is not None:
        width, height = 20 / ratio, 12 / ratio
    places = middles((2, 3), (12, 20)) if variant == "grid" else [[10.0, 6.0]] * 6
    expected = torch.tensor([[*place, width, height] for place in places], dtype=torch.float64)
    assert_close(regions, expected.expand(2, 2, 6, 4), tolerance=1e-6)


@pytest.mark.parametrize("init", ["center", "grid"])
@on_placed
def test_init_is_taken(variant: str, init: str, device: torch.device) -> None:
    regions = regions_of(make(variant, init=init).to(device), frames(1, 2, 4, *SIZE, device=device))
    places = middles((2, 3), SIZE) if init == "grid" else [[5.0, 4.5]] * 6
    expected = torch.tensor(places, dtype=torch.float64).expand(1, 2, 6, 2)
    assert_close(regions[..., :2], expected, tolerance=1e-6)


@pytest.mark.parametrize("rule", ["paper", "published"])
@pytest.mark.parametrize("ratio", [None, 7])
@pytest.mark.parametrize("variant", FIXED_SIZE)
def test_sizes_never_move(variant: str, ratio: float | None, rule: str, device: torch.device) -> None:
    """Whatever the offsets; the full variant's do."""
    options: dict[str, Any] = {"region_rule": rule, "size_ratio": ratio}
    x = frames(2, 3, 4, *SIZE, device=device)
    rest = regions_of(make(variant, **options).to(device), x)[..., 2:]
    assert_identical(regions_of(awake(make(variant, **options)).to(device), x)[..., 2:], rest)
    moved = regions_of(awake(make("full", **options)).to(device), x)[..., 2:]
    assert (moved / rest - 1).abs().amin() > 1e-5
    assert relative_error(moved[:, 1:], moved[:, :-1]) > 1e-2


@pytest.mark.parametrize(
    "options",
    [{}, {"profile": "gaussian"}, {"profile": "log-linear", "temperature": 7.0}, {"train_size": (5, 6)}],
    ids=lambda options: "-".join(map(str, options.values())) or "linear",
)
@on_placed
@on_backends
def test_kernels(backend: str, variant: str, options: dict[str, Any], device: torch.device) -> None:
    layer = awake(make(variant, **options)).to(device)
    x = frames(2, 2, 4, *SIZE, device=device)
    chosen = {name: value for name, value in options.items() if name != "train_size"}
    with dt.backend(backend):
        regions = regions_of(layer, x)
        kernels = layer.kernels(x)
    assert kernels.shape == (2, 2, 6, *SIZE)
    assert_close(kernels, dt.reference.region_kernel(regions.double(), SIZE, **chosen))
    assert_close(kernels.sum((-2, -1)), torch.ones(2, 2, 6))
    if "profile" in options:
        assert relative_error(kernels, dt.reference.region_kernel(regions, SIZE)) > 1e-2


@on_variants
@on_generators
def test_gradients_reach_every_parameter(generator: str, variant: str, device: torch.device) -> None:
    """So that no parameter has to be looked for as unused; also in a layer that has just been made."""
    options: dict[str, Any] = {"generator": generator, "offset_bias": True, "node_channels": 6}
    for connection in ("residual", "serial"):
        layer = make(variant, connection=connection, **options).to(device)
        for name, grad in run(layer, frames(2, 3, 4, *SIZE, device=device)).items():
            assert grad is not None, name
            assert grad.isfinite().all(), name
    layer = awake(make(variant, **options)).double().to(device)
    for name, grad in run(layer, frames(2, 3, 4, *SIZE, device=device, dtype=torch.float64)).items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.any() or name.endswith("bias"), name  # a bias may cancel in a softmax or a norm


BACKEND_OPTIONS: list[dict[str, Any]] = [
    {},
    {"train_size": (5, 6), "node_channels": 6, "generator": "pooled", "connection": "serial", "profile": "gaussian"},
]


@pytest.mark.parametrize("options", BACKEND_OPTIONS, ids=["plain", "other"])
@on_variants
@on_backends
def test_backends_agree(backend: str, variant: str, options: dict[str, Any], device: torch.device) -> None:
    """The whole layer and every gradient, against the reference in float64."""
    layer = awake(make(variant, (6, 7), **options)).to(device)
    x = frames(1, 2, 4, 6, 7, device=device)
    with dt.backend("reference"):
        expected = run(copy.deepcopy(layer).double(), x.double())
    with dt.backend(backend):
        actual = run(layer, x)
    if variant == "semantic":  # which has a bias that adds the same to all locations: its gradient is round-off
        for name in own_parameters(layer):
            if name.endswith("bias"):
                assert actual.pop(name).norm() <= 1e-5 * expected["grad_x"].norm()
                del expected[name]
    assert_results_close(actual, expected, 1e-4)


# --- equations ------------------------------------------------------------------------------------------------------


def plainly(layer: nn.Module, x: Tensor, variant: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Nodes and output by the paper's equations 5 to 10 on dense kernels, for the layer's own regions."""
    graph, lead, size = layer.dynamic_graph, x.shape[:2], x.shape[-2:]
    regions, features = graph(x)[1], x
    if options.get("node_channels", x.shape[2]) != x.shape[2]:
        convolution = graph.project_i3d_linear
        maps = torch.einsum("dc,bchw->bdhw", convolution.weight[:, :, 0, 0], x.flatten(0, 1))
        maps = maps + convolution.bias[:, None, None]
        features = norm(maps, 3, graph.norm_dict["dynamic_graph_projection"]).unflatten(0, lead)
    kernel = regions
    if variant != "semantic":
        chosen = {name: options[name] for name in ("profile", "temperature") if name in options}
        kernel = dt.reference.region_kernel(regions, size, **chosen)
    place = F.adaptive_avg_pool2d(kernel.flatten(0, 1), options.get("train_size", size)).unflatten(0, lead).flatten(-2)
    embedding = graph.kernel_projection1
    pooled = torch.einsum("btnhw,btchw->btnc", kernel, features)
    nodes = graph.rstg(pooled + place @ embedding.weight.mT + embedding.bias)
    y = torch.einsum("btnhw,btnc->btchw", kernel, nodes).flatten(0, 1)
    if features is not x:
        y = graph.project_back_i3d_linear(y)
    y = norm(y, 3, layer.norm_dict["residual_norm"]).unflatten(0, lead)
    return nodes, y if options.get("connection") == "serial" else x + y


EQUATIONS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "plain": ((9, 10), {}),
    "projected": ((9, 10), {"node_channels": 6, "generator": "pooled"}),
    "serial": ((6, 13), {"connection": "serial", "profile": "log-linear", "temperature": 7.0}),
    "as-trained": ((8, 7), {"train_size": (8, 7), "profile": "gaussian"}),
    "smaller-trained": ((13, 8), {"train_size": (5, 6), "generator": "pooled"}),
    "larger-trained": ((6, 7), {"train_size": (11, 16), "connection": "serial"}),
    "mixed": ((5, 14), {"train_size": (9, 6), "node_channels": 3, "region_rule": "published", "recurrence": "lstm"}),
}


@pytest.mark.parametrize("chosen", EQUATIONS)
@on_variants
def test_is_the_plain_formulation(variant: str, chosen: str, device: torch.device) -> None:
    """Output and every gradient, in float64; the output in float32."""
    size, options = EQUATIONS[chosen]
    layer = awake(make(variant, size, **options)).to(device)
    x = frames(2, 3, 4, *size, device=device)
    with dt.backend("eager"):
        nodes, y = plainly(layer, x, variant, options)
        assert_close(layer.nodes(x)[0], nodes.double())
        assert_close(layer(x), y.double())

        layer, x = layer.double(), x.double()
        nodes, y = plainly(layer, x, variant, options)
        assert_close(layer.nodes(x)[0], nodes)
        actual = run(layer, x)
        assert_close(actual["out"], y)

        layer.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        y = plainly(layer, leaf, variant, options)[1]
        y.backward(torch.linspace(-1, 1, y.numel(), device=device, dtype=y.dtype).view_as(y).sin())
    expected = {"out": y.detach(), "grad_x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert_results_close(actual, expected, 1e-9)


def plain_regions(layer: nn.Module, x: Tensor, variant: str, options: dict[str, Any]) -> Tensor:
    """From latent vectors to regions by equations 4 and 11 to 13, for "constant_time" and "static"."""
    graph, (height, width) = layer.dynamic_graph, x.shape[-2:]
    if variant == "static":
        latent = graph.region_latent.expand(len(x), 6, 8)
    else:
        mean = x.sum(1) / x.shape[1]
        if options.get("generator") == "pooled":
            latent = graph.glore(mean)
        else:
            convolution = graph.global_conv[0]
            latent = graph.fishnet(mean).flatten(1) @ convolution.weight.flatten(1).mT + convolution.bias
        latent = norm(latent.view(len(x), 6, 8), 2, graph.norm_dict["offset_ln_feats_coords"])
    offsets = (latent @ graph.offset_pred.weight.mT + graph.offset_pred.bias) * graph.offset_alpha
    anchors = torch.tensor(middles((2, 3), (2, 2)) if options.get("init") == "grid" else [[1, 1]] * 6)
    across, down = (offsets[..., [3, 2]] + (anchors.to(x) - 1).atanh()).tanh().unbind(-1)
    sizes = [torch.full_like(across, width / 6), torch.full_like(down, height / 6)]
    regions = torch.stack([width / 2 * (1 + across), height / 2 * (1 + down), *sizes], dim=-1)
    return regions[:, None].expand(-1, x.shape[1], -1, -1)


@pytest.mark.parametrize("init", ["center", "grid"])
@on_generators
@pytest.mark.parametrize("variant", ["constant_time", "static"])
def test_regions_are_the_plain_ones(variant: str, generator: str, init: str, device: torch.device) -> None:
    """The others are as full, whose own equations are tested with the layers."""
    options = {"generator": generator, "init": init, "offset_bias": True}
    layer = awake(make(variant, **options)).double().to(device)
    x = frames(2, 3, 4, *SIZE, device=device, dtype=torch.float64)
    expected = plain_regions(layer, x, variant, options)
    assert_close(regions_of(layer, x), expected, tolerance=1e-7)  # the positions are kept in float32


# --- full and position ----------------------------------------------------------------------------------------------


@on_generators
def test_full_moves_and_grows_in_time(generator: str, device: torch.device) -> None:
    """Every parameter of every region, from frame to frame and from clip to clip."""
    regions = regions_of(awake(make("full", generator=generator)).to(device), frames(2, 3, 4, *SIZE, device=device))
    assert (regions[:, 1:] - regions[:, :-1]).abs().amin() > 1e-6
    assert (regions[1] - regions[0]).abs().amin() > 1e-6
    for component in regions.unbind(-1):
        assert relative_error(component[:, 1:], component[:, :-1]) > 1e-3


@pytest.mark.parametrize("ratio", [None, 8])
@on_generators
def test_position_is_full_with_its_size_fixed(generator: str, ratio: float | None, device: torch.device) -> None:
    """The parameters of each load into the other; with the same ones the places are the same."""
    options: dict[str, Any] = {"generator": generator, "node_channels": 6, "offset_bias": True}
    full = awake(make("full", **options)).to(device)
    position = make("position", size_ratio=ratio, **options).to(device)
    position.load_state_dict(full.state_dict(), strict=True)
    x = frames(2, 3, 4, *SIZE, device=device)
    expected, actual = regions_of(full, x), regions_of(position, x)
    assert_close(actual[..., :2], expected[..., :2].double(), tolerance=1e-6)
    fixed = torch.tensor([10, 9], dtype=torch.float64) / (ratio or 6)
    assert_close(actual[..., 2:], fixed.expand(2, 3, 6, 2), tolerance=1e-6)
    assert relative_error(actual[..., 2:], expected[..., 2:]) > 1e-2
    assert relative_error(actual[:, 1:, :, :2], actual[:, :-1, :, :2]) > 1e-3

    again = make("full", **options).to(device)
    again.load_state_dict(position.state_dict(), strict=True)
    assert_identical(again(x), full(x))


@on_predicted
def test_generators(variant: str) -> None:
    """The lite one has no convolutions before its pooling."""

    def named(generator: str) -> bool:
        return any("fishnet." in name for name, _ in make(variant, generator=generator).named_parameters())

    assert named("fc")
    assert not named("pooled")


@on_predicted
@on_generators
def test_generators_see_places(generator: str, variant: str, device: torch.device) -> None:
    """The same content elsewhere gives other regions: pooling alone would not see that."""
    layer = awake(make(variant, generator=generator)).to(device)
    x = frames(1, 2, 4, *SIZE, device=device)
    regions, moved = regions_of(layer, x), regions_of(layer, x.roll((3, 4), (-2, -1)))
    assert relative_error(moved[..., :2], regions[..., :2]) > 1e-4


@on_predicted
def test_generators_have_their_own_weights(variant: str, device: torch.device) -> None:
    """Regions part, though all start from one place."""
    regions = regions_of(awake(make(variant)).to(device), frames(1, 2, 4, *SIZE, device=device))
    for a, b in itertools.combinations(range(6), 2):
        assert (regions[:, :, a, :2] - regions[:, :, b, :2]).abs().amax() > 1e-5


# --- constant in time -----------------------------------------------------------------------------------------------


@on_generators
def test_constant_time_is_one_set_per_clip(generator: str, device: torch.device) -> None:
    """That of the clip's mean frame, whatever the order of the frames; clips differ."""
    layer = awake(make("constant_time", generator=generator)).double().to(device)
    x = frames(2, 4, 4, *SIZE, device=device, dtype=torch.float64)
    regions = regions_of(layer, x)
    assert_identical(regions, regions[:, :1].expand_as(regions).contiguous())
    assert relative_error(regions[1, ..., :2], regions[0, ..., :2]) > 1e-3
    assert_close(regions_of(layer, x.mean(1, keepdim=True)), regions[:, :1], tolerance=1e-9)
    assert_close(regions_of(layer, x.flip(1)), regions, tolerance=1e-9)
    assert_close(regions_of(layer, x[:1]), regions[:1], tolerance=1e-9)

    full = awake(make("full", generator=generator)).double().to(device)
    moving = regions_of(full, x)
    assert relative_error(moving[:, 1:, :, :2], moving[:, :-1, :, :2]) > 1e-3
    assert relative_error(regions_of(full, x.flip(1)), moving.flip(1)) > 1e-3


@pytest.mark.parametrize("recurrence", ["gru", "lstm"])
def test_constant_time_has_no_recurrence_of_regions(recurrence: str) -> None:
    layer, full = (make(variant, recurrence=recurrence) for variant in ("constant_time", "full"))
    assert not [name for name in layer.state_dict() if "offset_lstm." in name]
    assert [name for name in full.state_dict() if "offset_lstm." in name]
    assert isinstance(full.dynamic_graph.offset_lstm, nn.LSTM if recurrence == "lstm" else nn.GRU)
    with pytest.raises(RuntimeError, match="offset_lstm"):
        layer.load_state_dict(full.state_dict(), strict=True)


# --- static and grid ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["static", "grid"])
def test_fixed_regions_ignore_the_input(variant: str, device: torch.device) -> None:
    """One set for all times, clips and inputs; the output does depend on the input."""
    layer = awake(make(variant)).to(device)
    x = frames(2, 3, 4, *SIZE, device=device)
    regions = regions_of(layer, x)
    assert_identical(regions, regions[:1, :1].expand_as(regions).contiguous())
    assert_identical(regions_of(layer, 3 * x + 1), regions)
    assert_identical(regions_of(layer, x[:1, :1]), regions[:1, :1])
    assert relative_error(layer(x.flip(1)), layer(x).flip(1)) > 1e-3
    full = awake(make("full")).to(device)
    assert relative_error(regions_of(full, x.flip(0)), regions_of(full, x)) > 1e-3


def test_static_regions_are_learned(device: torch.device) -> None:
    """From the start, where all lie in the middle, to six places; the loss reaches all that places them."""
    layer = make("static").to(device)
    x = frames(1, 1, 4, *SIZE, device=device)
    target = relative(torch.tensor([[*place, 1.0, 1.0] for place in middles((2, 3), SIZE)]), SIZE)[:, :2].to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-2)
    losses = []
    for _ in range(100):
        loss = F.mse_loss(relative(regions_of(layer, x)[0, 0], SIZE)[:, :2], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in own_parameters(layer)), name
    assert regions_of(layer, x).unique(dim=2).shape[2] == 6


def test_grid_has_no_generator() -> None:
    """No parameter but those of the graph, the embedding and the norms; others have."""
    assert own_parameters(make("grid")) == set()
    assert own_parameters(make("grid", generator="pooled", node_channels=6, offset_bias=True)) == set()
    for variant in VARIANTS:
        assert bool(own_parameters(make(variant))) == (variant != "grid")
        has = "dynamic_graph.offset_alpha" in dict(make(variant).named_parameters())
        assert has == (variant not in ("grid", "semantic"))


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 2), (8, 8)])
@pytest.mark.parametrize("size", [(5, 128), (7, 7), (13, 31)])
def test_grid_is_the_middle_of_its_cells(size: tuple[int, int], grid: tuple[int, int], device: torch.device) -> None:
    layer = awake(make("grid", size, channels=2, grid=grid)).to(device)
    regions = regions_of(layer, frames(1, 2, 2, *size, device=device))
    sizes = [size[1] / 6, size[0] / 6]
    expected = torch.tensor([[*place, *sizes] for place in middles(grid, size)], dtype=torch.float64)
    assert_close(regions, expected.expand(1, 2, -1, 4), tolerance=1e-6)


# --- semantic -------------------------------------------------------------------------------------------------------


def test_semantic_maps_are_a_convolution(device: torch.device) -> None:
    """A map per node from each location's features alone; each sums to 1 over the locations."""
    layer = awake(make("semantic")).double().to(device)
    x = frames(2, 2, 4, *SIZE, device=device, dtype=torch.float64)
    maps = regions_of(layer, x)
    assert_close(maps.sum((-2, -1)), torch.ones(2, 2, 6, dtype=torch.float64))
    (weight,) = [p for p in layer.parameters() if p.shape == (6, 4, 1, 1)]
    scores = torch.einsum("nc,btchw->btnhw", weight[:, :, 0, 0], x)
    assert_close(maps, scores.flatten(-2).softmax(-1).view_as(scores))
    assert_identical(layer.kernels(x), maps)
    assert relative_error(maps[:, :, 1:], maps[:, :, :-1]) > 1e-2
    assert_close(regions_of(layer, 1e4 * x).sum((-2, -1)), torch.ones(2, 2, 6, dtype=torch.float64))


def test_semantic_maps_follow_their_pixels(device: torch.device) -> None:
    """However they are permuted; kernels of regions do not."""
    x = frames(1, 2, 4, *SIZE, device=device, dtype=torch.float64)
    order = torch.randperm(SIZE[0] * SIZE[1]).to(device)

    def permuted(maps: Tensor) -> Tensor:
        return maps.flatten(-2)[..., order].view_as(maps)

    for variant in VARIANTS:
        layer = awake(make(variant)).double().to(device)
        error = relative_error(layer.kernels(permuted(x)), permuted(layer.kernels(x)))
        assert (error < 1e-10) == (variant == "semantic")


# --- another size than in training ----------------------------------------------------------------------------------

SIZES_AND_TRAINED = [((12, 20), (6, 10)), ((6, 7), (9, 15)), ((16, 5), (7, 9)), ((56, 56), (14, 14))]


@pytest.mark.parametrize(("size", "train_size"), SIZES_AND_TRAINED, ids=str)
@pytest.mark.parametrize("init", ["center", "grid"])
@on_generators
@on_placed
def test_regions_at_another_size(
    variant: str, generator: str, init: str, size: tuple[int, int], train_size: tuple[int, int], device: torch.device
) -> None:
    """The trained layer's on the pooled map, in cells of the new one: the same fractions of the map."""
    options: dict[str, Any] = {"generator": generator, "init": init}
    trained = awake(make(variant, train_size, channels=2, **options)).double()
    layer = make(variant, size, channels=2, train_size=train_size, **options).double()
    layer.load_state_dict(trained.state_dict(), strict=True)
    layer, trained = layer.to(device), trained.to(device)
    x = frames(1, 2, 2, *size, device=device, dtype=torch.float64)
    pooled = F.adaptive_avg_pool2d(x.flatten(0, 1), train_size).unflatten(0, x.shape[:2])
    y, regions = layer(x, return_regions=True)
    assert y.shape == x.shape
    assert layer.kernels(x).shape == (1, 2, 6, *size)
    assert_close(relative(regions, size), relative(regions_of(trained, pooled), train_size), tolerance=1e-6)


@pytest.mark.parametrize(("size", "train_size"), [*SIZES_AND_TRAINED, ((9, 10), (9, 10))], ids=str)
@on_variants
def test_parameters_are_those_of_training(
    variant: str, size: tuple[int, int], train_size: tuple[int, int], device: torch.device
) -> None:
    """They load strictly, and do what they did where the size is that of training."""
    trained = awake(make(variant, train_size, channels=2, node_channels=3)).to(device)
    layer = make(variant, size, channels=2, node_channels=3, train_size=train_size).to(device)
    shapes = {name: value.shape for name, value in trained.state_dict().items()}
    assert {name: value.shape for name, value in layer.state_dict().items()} == shapes
    layer.load_state_dict(trained.state_dict(), strict=True)
    x = frames(1, 2, 2, *size, device=device)
    y, regions = layer(x, return_regions=True)
    assert y.isfinite().all()
    if variant == "semantic":
        assert regions.shape == (1, 2, 6, *size)
        assert_close(regions.sum((-2, -1)), torch.ones(1, 2, 6))
    if size == train_size:
        assert_identical(y, trained(x))
        assert_identical(regions, regions_of(trained, x))


# --- any size -------------------------------------------------------------------------------------------------------


def check(layer: nn.Module, x: Tensor, variant: str, nodes: int) -> None:
    """Shapes, finite values and gradients, and regions that lie on the map."""
    lead, (height, width) = x.shape[:2], x.shape[-2:]
    x = x.requires_grad_()
    y, regions = layer(x, return_regions=True)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert regions.isfinite().all()
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None or not x.numel(), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    if variant == "semantic":
        assert regions.shape == (*lead, nodes, height, width)
        assert regions.ge(0).all()
        return
    assert regions.shape == (*lead, nodes, 4)
    slack = 1 + 1e-6
    assert regions[..., :2].ge(0).all()
    assert regions[..., 0].le(width * slack).all()
    assert regions[..., 1].le(height * slack).all()
    assert regions[..., 2:].gt(0).all()
    if variant in FIXED_SIZE and regions.numel():
        assert regions[..., 2:].unique(dim=0).flatten(0, -2).unique(dim=0).shape[0] == 1
    if variant in ("constant_time", "static", "grid") and regions.numel():
        assert_identical(regions, regions[:, :1].expand_as(regions).contiguous())


@pytest.mark.parametrize("size", [(5, 5), (5, 128), (128, 5), (7, 7), (56, 56), (13, 31), (128, 128)], ids=str)
@on_generators
@on_variants
def test_any_map(variant: str, generator: str, size: tuple[int, int], device: torch.device) -> None:
    layer = awake(make(variant, size, channels=2, generator=generator)).to(device)
    check(layer, frames(1, 1, 2, *size, device=device), variant, nodes=6)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a layer, with the lengths of batch and time."""
    side = st.one_of(st.integers(5, 20), st.integers(5, 20), st.integers(5, 128))
    combine = draw(st.sampled_from(("sum", "concatenate")))
    return {
        "variant": draw(st.sampled_from(VARIANTS)),
        "size": (draw(side), draw(side)),
        "train_size": draw(st.none() | st.tuples(st.integers(5, 20), st.integers(5, 20))),
        "channels": draw(st.integers(2, 4)),
        "node_channels": draw(st.sampled_from((None, 2, 3))),
        "lead": draw(st.sampled_from(((1, 1), (1, 2), (2, 1), (2, 2), (0, 2), (2, 0)))),
        "grid": draw(st.sampled_from(((1, 1), (1, 5), (4, 2), (8, 8), (2, 2), (3, 3)))),
        "init": draw(st.sampled_from((None, "center", "grid"))),
        "size_ratio": draw(st.sampled_from((None, 1, 6, 16.5))),
        "region_rule": draw(st.sampled_from(("paper", "published"))),
        "generator": draw(st.sampled_from(("fc", "pooled"))),
        "connection": draw(st.sampled_from(("residual", "serial"))),
        "profile": draw(st.sampled_from(("linear", "gaussian", "log-linear"))),
        "offset_bias": draw(st.booleans()),
        "recurrence": draw(st.sampled_from(("gru", "lstm"))),
        "combine": combine,
        "send_layers": draw(st.sampled_from((1, 2))),
        "update_layers": draw(st.sampled_from((0, 1, 2) if combine == "sum" else (1, 2))),
        "aggregation": draw(st.sampled_from(("dot", "mean"))),
        "order": draw(st.sampled_from(("space-time", "time-space"))),
    }


@settings(500)
@given(cases())
def test_any_layer(case: dict[str, Any]) -> None:
    lead, nodes = case.pop("lead"), case["grid"][0] * case["grid"][1]
    layer = awake(make(**case))
    check(layer, torch.randn(*lead, case["channels"], *case["size"]), case["variant"], nodes)


# --- in use ---------------------------------------------------------------------------------------------------------


@on_variants
def test_copies_compute_the_same(variant: str, device: torch.device) -> None:
    """Of a layer that has just run: copied, pickled, and its parameters in another; and they share nothing."""
    layer = awake(make(variant)).to(device)
    x = frames(1, 2, 4, *SIZE, device=device)
    expected = run(layer, x)["out"]
    loaded = make(variant).to(device)
    loaded.load_state_dict(layer.state_dict(), strict=True)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded]
    for twin in twins:
        assert_identical(run(twin, x)["out"], expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert_identical(layer(x), expected)


@on_variants
def test_layouts_of_the_input(variant: str, device: torch.device) -> None:
    """(B, C, T, H, W) transposed, channels last, and a slice of a larger map."""
    layer = awake(make(variant, train_size=(6, 7))).to(device)
    x = frames(2, 3, 4, *SIZE, device=device)
    expected = run(layer, x)
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3)),
        F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    ]
    for view in views:
        assert not view.is_contiguous()
        assert_results_close(run(layer, view), expected, 1e-4)


@on_placed
def test_regions_of_a_layer_in_bfloat16(variant: str, device: torch.device) -> None:
    """They stay float32; what is not computed from features is not rounded at all."""
    layer = awake(make(variant, (7, 50), train_size=(7, 9))).to(device)
    x = frames(1, 2, 4, 7, 50, device=device)
    expected = regions_of(layer, x)
    y, regions = layer.bfloat16()(x.bfloat16(), return_regions=True)
    assert y.dtype == torch.bfloat16
    assert regions.dtype == torch.float32
    assert not regions.equal(regions.bfloat16().float())
    assert relative_error(regions, expected) < 5e-2
    kept = {"full": slice(0), "grid": slice(None)}.get(variant, slice(2, None))
    assert_identical(regions[..., kept], expected[..., kept])


@pytest.mark.parametrize("variant", [*in_full(FIXED_SIZE), "full", "semantic"])
def test_compiles_without_graph_breaks(variant: str, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = awake(make(variant, (5, 6), grid=(1, 2))).to(device)
    x = frames(1, 2, 4, 5, 6, device=device)
    with torch._dynamo.config.patch(allow_rnn=True):
        expected = run(layer, x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        actual = {name.removeprefix("_orig_mod."): t for name, t in run(compiled, x).items()}
    torch._dynamo.reset()
    assert_results_close(actual, expected, 1e-4)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@on_variants
@on_backends
def test_regions_under_autocast(backend: str, variant: str, low: torch.dtype, device: torch.device) -> None:
    """They stay float32 and are not rounded; the layer stays close to itself in float32."""
    layer = awake(make(variant, (7, 7))).to(device)
    x = frames(1, 2, 4, 7, 7, device=device)
    with dt.backend(backend):
        plain, expected = layer(x, return_regions=True)
        with torch.autocast(device.type, dtype=low):
            y, regions = layer(x, return_regions=True)
            kernels = layer.kernels(x)
        y.float().square().sum().backward()
    assert regions.dtype == torch.float32
    assert kernels.dtype == torch.float32
    assert not regions.equal(regions.to(low).float())
    assert relative_error(regions, expected) < 2e-2
    assert relative_error(y, plain) < 0.1
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_the_mean_over_many_frames_fits_16_bits(device: torch.device) -> None:
    """Their sum does not."""
    layer = awake(make("constant_time", (7, 7))).to(device)
    x = 2000 + 10 * frames(1, 64, 4, 7, 7, device=device)
    regions = layer.double()(x.double(), return_regions=True)[1]
    halved = layer.half()(x.half(), return_regions=True)[1]
    assert halved.isfinite().all()
    assert relative_error(halved, regions) < 0.1


@pytest.mark.parametrize("variant", [pytest.param("full", marks=pytest.mark.full), "semantic"])
def test_compiles_for_clips_of_any_length(variant: str, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = awake(make(variant, (5, 6), iterations=1)).to(device)
    with torch._dynamo.config.patch(allow_rnn=True), dt.backend("eager"):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        for lead in ((2, 3), (1, 5)):
            x = frames(*lead, 4, 5, 6, device=device)
            assert_close(compiled(x), layer(x).double(), tolerance=1e-4)
    torch._dynamo.reset()


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "accepted"),
    [
        ("regions", "other", tuple(map(repr, VARIANTS))),
        ("regions", None, tuple(map(repr, VARIANTS))),
        ("connection", "parallel", ("'residual'", "'serial'")),
        ("init", "corner", ("'center'", "'grid'")),
        *(("size_ratio", value, ("accepted",)) for value in (0, -1, float("nan"), float("inf"), True, "6")),
    ],
    ids=str,
)
def test_arguments(argument: str, value: object, accepted: tuple[str, ...]) -> None:
    """Refused at construction, in words that name the argument, its value and what is accepted."""
    with pytest.raises((ValueError, TypeError)) as error:
        dt.layers.DyReG(4, (6, 7), **{argument: value})
    assert isinstance(error.value, ValueError) or argument == "size_ratio"
    for part in ("DyReG", argument, repr(value), *accepted):
        assert part in str(error.value)
