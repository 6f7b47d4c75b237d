"""One compiled layer for maps of thirty sizes: one or two graphs, with fullgraph=True, and eager mode's numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_results_close, awake, backends, in_full, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dyreg_triton as dt
from dyreg_triton.layers import symbols

Shape = Callable[[int, int], tuple[int, ...]]


def sizes(count: int = 30) -> list[tuple[int, int]]:
    """Rows and columns, as of one protocol that tests at many scales; no two of a size."""
    chosen = random.Random(5).sample([(h, w) for h in range(7, 30) for w in range(7, 30) if h != w], count)
    return [*chosen[:5], (14, 14), (8, 8), *chosen[7:]]


def clip(h: int, w: int) -> tuple[int, ...]:
    return (1, 8, 4, h, w)


def image(h: int, w: int) -> tuple[int, ...]:
    return (1, 8, h, w)


def longer(h: int, w: int) -> tuple[int, ...]:
    return (1, 8, h // 2 + 2, h, w)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "BATransform": (lambda: dt.layers.BATransform(8, window=7, groups=2), clip),
    "BATransform of all lengths": (lambda: dt.layers.BATransform(8, window=7, groups=2, temporal_groups=2), longer),
    "BATransform, logit": (
        lambda: dt.layers.BATransform(
            8,
            window=7,
            groups=2,
            window_rule="logit",
            normalisation="sigmoid",
            softmax_axis="output",
            temporal_groups=0,
        ),
        clip,
    ),
    "BATransform of images": (lambda: dt.layers.BATransform(8, window=7, dimensions=2), image),
    "BATBlock": (lambda: dt.layers.BATBlock(8, window=7, groups=2, dropout=0.0), clip),
    "BATBlock as published": (lambda: dt.compat.build("models.non_local.BATBlock", in_channels=8, dropout=0.0), clip),
    "BATBlock of images": (lambda: dt.layers.BATBlock(8, window=7, dimensions=2, dropout=0.0), image),
    "NonLocalBlock": (lambda: dt.layers.NonLocalBlock(8), clip),
    "NonLocalBlock of images": (lambda: dt.layers.NonLocalBlock(8, dimensions=2, heads=4, norm="group"), image),
    "RSA": (lambda: dt.layers.RSA(8, num_queries=2, kernel_size=3), clip),
    "RSA strided": (lambda: dt.layers.RSA(8, num_queries=2, kernel_size=(3, 5, 5), stride=(1, 2, 2)), longer),
}
ALWAYS = {
    ("BATransform of all lengths", True),
    ("BATBlock", None),
    ("BATBlock of images", True),
    ("NonLocalBlock", True),
}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param(name, dynamic, marks=() if (name, dynamic) in ALWAYS else pytest.mark.full)
        for name in LAYERS
        for dynamic in (True, None)
    ],
)
def test_thirty_sizes_are_one_graph_or_two(name: str, dynamic: bool | None, device: torch.device) -> None:
    """Of equal sides torch makes one more, which it takes for one symbol."""
    torch._dynamo.reset()
    make, shape = LAYERS[name]
    layer = awake(make()).to(device).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic)
    with dt.backend("eager"):
        for i, (h, w) in enumerate(sizes(30 if "BAT" in name else 12)):
            x = torch.randn(shape(h, w), device=device)
            if i % 6 == 0:
                assert_results_close(run(layer, x, call=lambda x: compiled(x)), run(layer, x), 1e-4)
            else:
                torch.testing.assert_close(compiled(x.requires_grad_()), layer(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= (2 if dynamic else 3)
    torch._dynamo.reset()


class Enlarged(nn.Module):
    """Before a transform: its sizes are then derived from symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = dt.layers.BATransform(8, window=3, dimensions=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_sizes_derived_from_symbols_are_symbols(device: torch.device) -> None:
    torch._dynamo.reset()
    layer = awake(Enlarged()).to(device).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for h, w in ((4, 5), (7, 9), (6, 11), (10, 8)):
        x = torch.randn(1, 8, h, w, device=device)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize("recurrence", ["gru", "lstm"])
def test_clips_of_any_length_of_dynamic_regions(recurrence: str, device: torch.device) -> None:
    """With torch's own setting; torch's recurrences take a length as it is, so each length is a graph."""
    torch._dynamo.reset()
    layer = awake(dt.layers.DyReG(8, (6, 7), grid=(2, 2), region_channels=6, recurrence=recurrence)).to(device)
    counter = CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(allow_rnn=True), dt.backend("eager"):
        compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
        for length in (3, 4, 9):
            x = torch.randn(1, length, 8, 6, 7, device=device)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3
    torch._dynamo.reset()


class Doubled(nn.Module):
    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def test_a_predictor_that_does_more_when_called_is_called(device: torch.device) -> None:
    torch._dynamo.reset()
    layer = awake(dt.layers.BATransform(8, window=3, dimensions=2)).to(device).eval()
    layer.conv_p = Doubled(layer.conv_p)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    x = torch.randn(1, 8, 6, 6, device=device)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_what_is_refused_is_so_when_it_runs(device: torch.device) -> None:
    torch._dynamo.reset()
    layer = dt.layers.BATBlock(8, window=7, dimensions=2, remainder="refuse").to(device).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    compiled(torch.randn(1, 8, 14, 21, device=device))
    with pytest.raises(ValueError, match="of W = 15, which 8 coarse cells of 2 exceed"):
        compiled(torch.randn(1, 8, 14, 15, device=device))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mixed", "autocast", "last"),
    [
        *((0, False, False), (2, False, True), (2, True, False)),
        *in_full([(0, False, True), (0, True, False), (0, True, True), (2, False, False), (2, True, True)]),
    ],
)
@pytest.mark.parametrize("backend", backends())
def test_the_op_is_an_op_of_torch(backend: str, mixed: int, autocast: bool, last: bool, device: torch.device) -> None:
    """opcheck, and its gradients are those of the layer; also where frames, rows and columns are extended."""
    layer = awake(dt.layers.BATransform(4, window=2, temporal_window=2, groups=2, temporal_groups=mixed)).to(device)
    x = torch.randn(1, 4, 3, 5, 7, device=device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    filters = symbols.read_filters(layer._predictors(), nn.Conv3d)
    assert filters is not None

    def at_once(x: Tensor) -> Tensor:
        return layer.conv2(symbols.transformed_at_once(x, layer.conv1(x), filters, layer))

    layer.eval()
    lowered: Any = torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast)
    with dt.backend(backend), lowered:
        actual, expected = run(layer, x, call=at_once), run(layer, x)
        assert_results_close(actual, expected, 1e-1 if autocast else 1e-5)
        assert actual["out"].dtype == expected["out"].dtype
    out = layer.conv1(x).detach()
    arguments = (
        x.requires_grad_(),
        out.requires_grad_(),
        *filters,
        [2, 2, 2, mixed],
        f"softmax input weight repeat {backend}",
    )
    torch.library.opcheck(torch.ops.dyreg_triton.bilinear_attention.default, arguments)
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(torch.ops.dyreg_triton.bilinear_attention_backward.default, (torch.randn_like(x), *arguments))


@pytest.mark.parametrize("backend", backends())
def test_what_auto_leaves_to_eager_it_leaves_inside_too(backend: str, device: torch.device) -> None:
    """Cells beyond the kernels: a call by name is refused, as without symbols."""
    layer = dt.layers.BATransform(2, window=65, groups=1, dimensions=2).to(device).eval()
    x = torch.randn(1, 2, 65, 65, device=device)
    filters = symbols.read_filters(layer._predictors(), nn.Conv2d)
    if backend == "triton":
        with dt.backend("triton"), pytest.raises(ValueError, match="Sh <= 64"):
            symbols.transformed_at_once(x, layer.conv1(x), filters, layer)
        with pytest.warns(UserWarning, match="the eager backend computes"):
            symbols.transformed_at_once(x, layer.conv1(x), filters, layer)
    with dt.backend("eager"):
        symbols.transformed_at_once(x, layer.conv1(x), filters, layer)


def test_its_flops_are_those_of_the_layer(device: torch.device) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for options in ({}, {"temporal_groups": 0}, {"dimensions": 2}):
        layer = dt.layers.BATransform(4, window=2, temporal_window=2, groups=2, **options).to(device).eval()
        x = torch.randn((1, 4, 5, 7) if "dimensions" in options else (1, 4, 3, 5, 7), device=device)
        counts = []
        for at_once in (False, True):
            with FlopCounterMode(display=False) as counter, dt.backend("eager"):
                if at_once:
                    filters = symbols.read_filters(layer._predictors(), type(layer.conv_p))
                    y = layer.conv2(symbols.transformed_at_once(x.requires_grad_(), layer.conv1(x), filters, layer))
                else:
                    y = layer(x.requires_grad_())
                y.sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1]
