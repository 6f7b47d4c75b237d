"""What a bilinear attentional transform attends to: the arrays, the recorder, the pictures and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import published
import pytest
import torch
from support import PATIENCE
from torch import Tensor, nn

import dyreg_triton as dt
from dyreg_triton.cli import main
from dyreg_triton.viz.command import read_clip

ROOT = Path(__file__).resolve().parents[1]
viz = dt.viz


class Matrices(NamedTuple):
    p: Tensor
    q: Tensor
    t: Tensor | None = None


def random_matrices(rows: int, columns: int, *, batch: int = 2, groups: int = 3, frames: int = 2) -> Matrices:
    """Rows of P and columns of Q sum to 1, and neither is symmetric."""
    p = torch.randn(batch, groups, frames, rows, rows, dtype=torch.float64).softmax(-1)
    q = torch.randn(batch, groups, frames, columns, columns, dtype=torch.float64).softmax(-2)
    return Matrices(p, q)


# --- arrays ---------------------------------------------------------------------------------------------------------

# P's and Q's size, the map's, the coarse cell's: whole, cut, single cells, one coarse cell
SHAPES = [
    ((3, 4), (6, 12), (2, 3)),
    ((3, 5), (8, 13), (3, 3)),
    ((4, 2), (4, 2), (1, 1)),
    ((1, 3), (5, 7), (5, 3)),
]


@pytest.mark.parametrize(("sides", "size", "coarse"), SHAPES)
def test_contributions_are_those_of_the_equation(sides: Any, size: Any, coarse: Any) -> None:
    matrices = random_matrices(*sides)
    (height, width), (a, b) = size, coarse
    row, column = height - 1, width // 2
    maps = viz.contribution_maps(matrices, size, (row, column))
    exact = viz.contribution_maps(matrices, size, (row, column), exact=True)
    assert maps.shape == exact.shape == (2, 3, 2, *size)
    for batch, group, frame in np.ndindex(2, 3, 2):
        p, q = matrices.p[batch, group, frame], matrices.q[batch, group, frame]
        expected, at = torch.zeros(size).double(), torch.zeros(size).double()
        for m, n in np.ndindex(*sides):
            weight = p[row // a, m] * q[n, column // b]
            for y, x in np.ndindex(a, b):
                if m * a + y < height and n * b + x < width:
                    expected[m * a + y, n * b + x] = weight
            at[min(m * a + row % a, height - 1), min(n * b + column % b, width - 1)] += weight
        torch.testing.assert_close(maps[batch, group, frame], expected)
        torch.testing.assert_close(exact[batch, group, frame], at)


@pytest.mark.parametrize(("sides", "size", "coarse"), SHAPES)
def test_attention_is_the_sum_of_all_contributions(sides: Any, size: Any, coarse: Any) -> None:
    matrices = random_matrices(*sides)
    weights = viz.attention_weights(matrices, size)
    outputs = [(i * coarse[0], j * coarse[1]) for i, j in np.ndindex(*sides)]
    torch.testing.assert_close(weights, sum(viz.contribution_maps(matrices, size, cell) for cell in outputs))
    if size == (sides[0] * coarse[0], sides[1] * coarse[1]):
        torch.testing.assert_close(weights.mean((-2, -1)), torch.ones(2, 3, 2).double())


def test_an_exact_map_sums_to_one() -> None:
    """A row of P and a column of Q: P transposed, or rows taken for columns, would not."""
    matrices = random_matrices(3, 5)
    for cell in ((0, 0), (7, 12), (3, 8)):
        maps = viz.contribution_maps(matrices, (8, 13), cell, exact=True)
        torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 3, 2).double())


@pytest.mark.parametrize(("sides", "size", "coarse"), SHAPES)
def test_an_exact_map_gives_the_output_of_the_op(sides: Any, size: Any, coarse: Any) -> None:
    """Also of a map that is extended by its last row and column before the op, and cut after it."""
    matrices = random_matrices(*sides)
    (height, width), (a, b) = size, coarse
    x = torch.randn(2, 6, 2, height, width, dtype=torch.float64)  # three groups of two channels
    rows = torch.arange(sides[0] * a).clamp(max=height - 1)
    columns = torch.arange(sides[1] * b).clamp(max=width - 1)
    y = dt.ops.bilinear_transform(x[..., rows, :][..., columns], matrices.p, matrices.q)
    for row, column in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
        maps = viz.contribution_maps(matrices, size, (row, column), exact=True).repeat_interleave(2, 1)
        torch.testing.assert_close((maps * x).sum((-2, -1)), y[..., row, column])


def test_the_coarse_cell_can_be_told() -> None:
    """A map of 17 and a window of 2: coarse cells of 8, three of them, though 6 would cover it."""
    matrices = random_matrices(3, 3)
    assert not viz.attention_weights(matrices, (17, 17))[..., 6, 0].equal(
        viz.attention_weights(matrices, (17, 17), coarse=(8, 8))[..., 6, 0]
    )
    exact = viz.contribution_maps(matrices, (17, 17), (9, 16), coarse=(8, 8), exact=True)
    assert (exact[0, 0, 0] != 0).nonzero().tolist() == [[r, c] for r in (1, 9, 16) for c in (0, 8, 16)]


def test_groups_are_chosen() -> None:
    matrices = random_matrices(3, 4)
    weights, maps = viz.attention_weights(matrices, (3, 4)), viz.contribution_maps(matrices, (3, 4), (1, 2))
    assert viz.attention_weights(matrices, (3, 4), group=2).equal(weights[:, 2:])
    assert viz.contribution_maps(matrices, (3, 4), (1, 2), group=[2, 0]).equal(maps[:, [2, 0]])
    assert viz.contribution_maps(matrices, (3, 4), (1, 2), group=range(2)).equal(maps[:, :2])


def test_dtypes_and_an_empty_batch() -> None:
    matrices = random_matrices(3, 4)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        lowered = Matrices(matrices.p.to(dtype), matrices.q.to(dtype))
        weights = viz.attention_weights(lowered, (3, 4))
        assert weights.dtype == wide
        assert weights.equal(viz.attention_weights(Matrices(lowered.p.float(), lowered.q.float()), (3, 4)))
    empty = Matrices(matrices.p[:0], matrices.q[:0])
    assert viz.attention_weights(empty, (6, 8)).shape == (0, 3, 2, 6, 8)
    assert viz.contribution_maps(empty, (6, 8), (5, 7), exact=True).shape == (0, 3, 2, 6, 8)


P, Q = torch.rand(2, 3, 2, 4, 4), torch.rand(2, 3, 2, 5, 5)
GOOD: dict[str, Any] = {"matrices": Matrices(P, Q), "size": (8, 10), "cell": (3, 9)}
MALFORMED = {
    "no matrices": ({"matrices": (P, Q)}, TypeError, "p of matrices is None"),
    "integers": ({"matrices": Matrices(P.long(), Q)}, TypeError, "p of matrices is .*int64"),
    "p of another rank": ({"matrices": Matrices(P[0], Q)}, ValueError, r"p is \(3, 2, 4, 4\)"),
    "q not square": ({"matrices": Matrices(P, Q[..., :4])}, ValueError, r"q is \(2, 3, 2, 5, 4\)"),
    "no groups": ({"matrices": Matrices(P[:, :0], Q)}, ValueError, "only B may be 0"),
    "other groups": ({"matrices": Matrices(P, Q[:, :2])}, ValueError, r"q is \(2, 2, 2, 5, 5\).*p's B, G, T"),
    "a size of three": ({"size": (2, 8, 10)}, ValueError, r"size is \(2, 8, 10\)"),
    "a size of zero": ({"size": (0, 10)}, ValueError, "size is"),
    "a smaller map": ({"size": (3, 10)}, ValueError, "rows are not 4 coarse cells of 1; accepted are 4 to 4 rows"),
    "a map that is not covered so": ({"size": (8, 11)}, ValueError, "columns are not 5 coarse cells of 3"),
    "other coarse cells": ({"coarse": (3, 2)}, ValueError, "4 coarse cells of 3; accepted are 10 to 12 rows"),
    "a coarse cell of nothing": ({"coarse": (2, 0)}, ValueError, "coarse is"),
    "a cell outside": ({"cell": (8, 0)}, ValueError, r"cell is \(8, 0\).*below the map's \(8, 10\)"),
    "a negative cell": ({"cell": (-1, 0)}, ValueError, r"cell is \(-1, 0\)"),
    "a cell of floats": ({"cell": (1.0, 0)}, ValueError, "cell is"),
    "one number for a cell": ({"cell": 3}, ValueError, "cell is 3"),
    "a group that is not there": ({"group": 3}, ValueError, "group is 3; accepted is None, an integer from 0 to 2"),
    "no group": ({"group": []}, ValueError, r"group is \[\]"),
    "a group by name": ({"group": "1"}, ValueError, "group is '1'"),
    "exact by number": ({"exact": 1}, ValueError, "exact is 1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arguments_are_named(case: str) -> None:
    changed, error, message = MALFORMED[case]
    call = GOOD | changed
    with pytest.raises(error, match=message):
        viz.contribution_maps(**call)
    for name in ("cell", "exact"):
        call.pop(name, None)
    if not {"cell", "exact"} & changed.keys():
        with pytest.raises(error, match="attention_weights: .*" + message):
            viz.attention_weights(**call)


# --- recording ------------------------------------------------------------------------------------------------------


def transform(channels: int = 8, **options: Any) -> nn.Module:
    return dt.layers.BATransform(channels, **{"window": 3, "temporal_window": 2, "groups": 2} | options)


class Net(nn.Module):
    """Layers alone and in a block, one called twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 1)
        self.stage = nn.Sequential(dt.layers.BATBlock(8, window=3, temporal_window=2, groups=2), nn.BatchNorm3d(8))
        self.pool = nn.AvgPool3d((1, 2, 2))
        self.twice = transform()
        self.unused = transform()

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(2 * self.twice(self.pool(self.stage(self.stem(x)))))


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_layer_that_is_called_is_recorded() -> None:
    model = Net()
    x = torch.randn(2, 3, 4, 12, 13)
    found = viz.record(model, x)
    assert list(found) == ["stage.0.batransform", "twice"]
    model.eval()
    with torch.no_grad():
        block = model.stage[0]
        inner = block.conv1(model.stem(x))
        outer = model.pool(model.stage(model.stem(x)))
    for path, given, frames in (("stage.0.batransform", inner, 4), ("twice", outer, 4)):
        one = found[path]
        assert isinstance(one, viz.Recorded)
        expected = model.get_submodule(path).matrices(given)
        for ours, theirs in zip(one.matrices, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
            assert not ours.requires_grad
        assert one.frames == frames
        assert one.size == tuple(given.shape[-2:])
        weights = one.attention_weights()
        assert weights.shape == (2, 2, 4, *one.size)
        assert one.contribution_maps((3, 2)).shape == weights.shape


def test_a_layer_alone_and_one_for_images() -> None:
    found = viz.record(transform(dimensions=2), torch.randn(2, 8, 7, 9))
    assert list(found) == [""]
    assert (found[""].frames, found[""].size, found[""].coarse) == (1, (7, 9), (2, 3))
    assert found[""].attention_weights().shape == (2, 2, 1, 7, 9)


@pytest.mark.parametrize("size", [(6, 6, 9), (3, 7, 11), (5, 8, 5), (4, 7, 12)])
@pytest.mark.parametrize("rule", ["weight", "logit"])
def test_exact_contributions_are_those_of_the_layer(size: tuple[int, int, int], rule: str) -> None:
    """Its last convolution out of the way and no temporal mix, a layer's output is what the recorded maps say."""
    frames, height, width = size
    layer = transform(temporal_groups=0, window_rule=rule)
    layer = layer.double().eval()
    layer.conv2 = nn.Conv3d(8, 8, 1, bias=False).double()
    layer.conv2.weight.data = torch.eye(8).double().view(8, 8, 1, 1, 1)
    x = torch.randn(2, 8, frames, height, width, dtype=torch.float64)
    one = viz.record(layer, x)[""]
    with torch.no_grad():
        y = layer(x)
    for row, column in ((0, 0), (height - 1, width - 1), (height // 2, 1)):
        maps = one.contribution_maps((row, column), exact=True).repeat_interleave(4, 1)
        torch.testing.assert_close((maps * x).sum((-2, -1)), y[..., row, column])
        assert one.contribution_maps((row, column), exact=True, group=1).equal(maps[:, 4:5])


def test_a_map_is_cut_where_it_was_extended() -> None:
    """17 is two windows of 2 with coarse cells of 8: three of them, 24. Five frames: three of 2, 6."""
    one = viz.record(transform(window=2, temporal_window=2), torch.randn(1, 8, 5, 17, 5))[""]
    assert one.coarse == (8, 2)
    assert one.matrices.p.shape == (1, 2, 6, 3, 3)
    weights = one.attention_weights()
    assert weights.shape == one.contribution_maps((16, 4)).shape == (1, 2, 5, 17, 5)
    assert (weights[..., :8, :] == weights[..., :1, :]).all()
    assert (weights[..., 8:16, :] == weights[..., 8:9, :]).all()
    assert not (weights[..., 7, :] == weights[..., 8, :]).all()


def test_modes_and_hooks_are_as_they_were() -> None:
    model = Net().train()
    model.stage[1].eval()
    kept = torch.get_rng_state()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    viz.record(model, torch.randn(1, 3, 2, 6, 6))
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == 0
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    torch.set_rng_state(kept)


def test_modes_and_hooks_are_as_they_were_after_an_error() -> None:
    model = Net().train()
    model.twice.conv1.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="channels"):
        viz.record(model, torch.randn(1, 4, 2, 6, 6))
    with pytest.raises(ValueError, match="window"):
        viz.record(model, torch.randn(1, 3, 2, 2, 2))
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == 0


def test_a_train_of_the_models_own_is_not_called() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("called")

    assert list(viz.record(Frozen(), torch.randn(1, 3, 2, 6, 6))) == ["stage.0.batransform", "twice"]


def test_a_compiled_model_is_recorded_as_it_was_written() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Net().eval()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(1, 3, 2, 6, 6)
    with torch.no_grad():
        compiled(x)  # before it is hooked
    count = len(graphs)
    assert count
    assert list(viz.record(compiled, x)) == ["_orig_mod.stage.0.batransform", "_orig_mod.twice"]
    assert len(graphs) == count


def test_an_input_by_name_is_seen() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = transform()

        def forward(self, clip: Tensor, scale: float) -> Tensor:
            return self.layer(x=clip * scale)

    x = torch.randn(1, 8, 2, 6, 6)
    model = Named()
    one = viz.record(model, x, 2.0)["layer"]
    torch.testing.assert_close(one.matrices.p, model.eval().layer.matrices(2 * x).p)
    assert not torch.allclose(one.matrices.p, model.layer.matrices(x).p)


def test_the_published_classes_are_recorded() -> None:
    layer = dt.compat.build("models.non_local.BATBlock", in_channels=16, r=2, s=3, ts=2, k=2, tk=1)
    found = viz.record(layer, torch.randn(1, 16, 4, 6, 6))
    assert [one.size for one in found.values()] == [(6, 6)]
    assert all(path.endswith("batransform") for path in found)


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(TypeError, match="model is a Tensor"):
        viz.record(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a Linear, which has no BATransform.*dt\.swap"):
        viz.record(nn.Linear(2, 2), torch.ones(2))

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = transform()

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(RuntimeError, match=r"Idle called none of its BATransforms \('layer'\)"):
        viz.record(Idle(), torch.ones(2))


def test_it_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, dyreg_triton as dt\n"
        "assert not [name for name in sys.modules if name.startswith(('dyreg_triton.viz', 'PIL'))]\n"
        "dt.viz.attention_weights\n"
        "assert not [name for name in sys.modules if name.startswith(('PIL', 'matplotlib'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# --- pictures -------------------------------------------------------------------------------------------------------

Image = pytest.importorskip("PIL.Image", reason="pictures need pillow; pip install 'dyreg-triton[viz]'")


def moving(frames: int = 3, height: int = 24, width: int = 32) -> Tensor:
    """A grey clip in uint8 with a bright column that moves."""
    clip = torch.full((frames, height, width, 3), 60, dtype=torch.uint8)
    for t in range(frames):
        clip[t, :, 4 * t : 4 * t + 4] = 200
    return clip


def weights_of(groups: int = 2, frames: int = 3) -> Tensor:
    """Weights (G, T, 4, 4), each group's in another corner."""
    maps = torch.full((groups, frames, 4, 4), 0.1)
    for g in range(groups):
        maps[g, :, g % 4, 0] = 1.0 + g
    return maps


def pixels(picture: Any) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def marked(picture: Any) -> np.ndarray:
    """Where it is green: (n, 2) rows and columns. No colour of the weights is; a lossy file keeps it less well."""
    red, green, blue = np.moveaxis(pixels(picture), -1, 0)
    return np.argwhere((green > red + 60) & (green > blue + 60))


def test_brighter_is_more() -> None:
    colors = viz.heat_colors(torch.linspace(0, 1, 256))
    lightness = colors @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() > 0).all()
    assert colors.min() >= 0
    assert colors.max() <= 1
    assert viz.heat_colors(torch.tensor([[-1.0, 0.0, 1.0, 7.0]])).shape == (1, 4, 3)


def test_more_is_brighter_over_any_frame() -> None:
    ramp = torch.linspace(0, 1, 16).view(1, 1, 1, 16).expand(1, 1, 2, 16)
    for grey in (0, 128, 255):
        clip = torch.full((1, 32, 256, 3), grey, dtype=torch.uint8)
        (picture,) = viz.draw_frames(clip, ramp, side=256)
        row = pixels(picture)[-20, -14 - 256 : -14] @ np.array([0.2126, 0.7152, 0.0722])
        assert (np.diff(row[8::16]) > 0).all(), grey


def test_frames_have_a_panel_for_each_group_and_the_input() -> None:
    clip = moving()
    pictures = viz.draw_frames(clip, weights_of(), side=128)
    assert len(pictures) == 3
    assert len({picture.size for picture in pictures}) == 1
    assert len({picture.tobytes() for picture in pictures}) == 3
    three = viz.draw_frames(clip, weights_of(groups=3), side=128)[0]
    assert three.width == pictures[0].width + 128 + 14
    eight, nine = (viz.draw_frames(clip, weights_of(groups=g), side=64)[0] for g in (8, 9))
    assert eight.height < nine.height


def test_the_cell_is_marked_in_each_panel() -> None:
    clip, maps = moving(), weights_of()
    assert len(marked(viz.draw_frames(clip, maps)[0])) == 0
    for cell in ((0, 0), (3, 3), (2, 1)):
        (picture,) = viz.draw_frames(clip[:1], maps[:, :1], cell=cell, side=128)
        where = marked(picture)
        for panel in range(3):  # of 128 x 96, from the left and from below, with a gap of 14 around them
            left, top = 14 + panel * (128 + 14), picture.height - 14 - 96
            inside = where[(where[:, 1] >= left) & (where[:, 1] < left + 128)]
            low, high = inside.min(0), inside.max(0) + 1
            middle = top + (cell[0] + 0.5) * 24, left + (cell[1] + 0.5) * 32
            assert ((low + high) / 2).tolist() == pytest.approx(middle, abs=2)
            assert (high - low).tolist() == pytest.approx([24, 24], abs=3)
    sheet = viz.draw_sheet(clip, maps, cell=(2, 1))
    assert len(marked(sheet)) > len(marked(viz.draw_sheet(clip[:1], maps[:, :1], cell=(2, 1))))


def test_each_panel_shows_its_own_group_and_frame() -> None:
    """One bright cell of a 3 x 5 map in each, elsewhere each time."""
    groups, frames = 3, 2
    maps = torch.zeros(groups, frames, 3, 5)
    cells = {(g, t): (g, 2 * t + g % 2) for g in range(groups) for t in range(frames)}
    for (g, t), (row, column) in cells.items():
        maps[g, t, row, column] = 1
    clip = torch.zeros(frames, 60, 100, 3, dtype=torch.uint8)

    def brightest(picture: Any, left: int, top: int) -> tuple[int, int]:
        """The middle of what is bright in a panel of 100 x 60, in cells."""
        panel = pixels(picture)[top : top + 60, left : left + 100].sum(-1)
        row, column = np.argwhere(panel > 400).mean(0)
        return int(row / 20), int(column / 20)

    pictures = viz.draw_frames(clip, maps, side=100)
    sheet = viz.draw_sheet(clip, maps, side=100)
    for (g, t), cell in cells.items():
        across = 14 + (1 + g) * (100 + 14)
        assert brightest(pictures[t], across, pictures[t].height - 14 - 60) == cell
        left = sheet.width - 14 - 100 - (frames - 1 - t) * (100 + 4)
        assert brightest(sheet, left, sheet.height - 14 - 60 - (groups - 1 - g) * (60 + 4)) == cell


def test_pictures_differ_by_group_cell_scale_and_words() -> None:
    clip = moving(1)
    matrices = Matrices(*(m.float()[:1, :, :1] for m in random_matrices(4, 4)[:2]))
    drawn = set()
    for group in range(3):
        for cell in ((0, 0), (3, 1)):
            maps = viz.contribution_maps(matrices, (4, 4), cell, group=group)[0]
            drawn.add(viz.draw_frames(clip, maps)[0].tobytes())  # without the mark
    assert len(drawn) == 6
    maps = viz.attention_weights(matrices, (4, 4))[0]
    options: list[dict[str, Any]] = [{}, {"title": "a"}, {"note": "a"}, {"groups": "abc"}, {"scale": "all"}]
    assert len({viz.draw_frames(clip, maps, **option)[0].tobytes() for option in options}) == 5
    assert len({viz.draw_sheet(clip, maps, **option).tobytes() for option in options}) == 5


def test_the_brightest_is_of_the_group_or_of_all() -> None:
    clip = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    maps = torch.ones(2, 1, 2, 2) * torch.tensor([0.1, 1.0]).view(2, 1, 1, 1)
    for scale, dark in (("group", False), ("all", True)):
        panel = pixels(viz.draw_frames(clip, maps, scale=scale, side=128)[0])[-30, 14 + 128 + 14 + 30]
        assert (panel.sum() < 200) == dark
    still = pixels(viz.draw_frames(clip, torch.zeros(1, 1, 2, 2), side=128)[0])[-30, 14 + 128 + 14 + 30]
    assert still.sum() < 20


def test_a_sheet_has_frames_in_a_row_and_at_most_eight() -> None:
    sizes = [viz.draw_sheet(moving(7), weights_of(frames=n), side=64).width for n in (6, 7)]
    assert sizes[1] - sizes[0] == 64 + 4
    many = viz.draw_sheet(moving(20, width=96), weights_of(frames=20), side=64)
    assert many.width == viz.draw_sheet(moving(8, width=96), weights_of(frames=8), side=64).width
    assert viz.draw_sheet(moving(), weights_of(3), side=64).height - viz.draw_sheet(
        moving(), weights_of(2), side=64
    ).height == (48 + 4)


def test_a_long_title_fits() -> None:
    title = "a.path.that.is.longer.than.the.picture" * 3
    wide = viz.draw_frames(moving(1), weights_of(1, 1), title=title, side=64)[0]
    assert (pixels(wide)[:, -12:] == pixels(wide)[0, 0]).all()
    assert wide.width > viz.draw_frames(moving(1), weights_of(1, 1), side=64)[0].width


def test_clips_in_either_form_show_the_same() -> None:
    clip = moving()
    assert viz.as_frames(clip).equal(clip)
    assert viz.as_frames(clip[0]).equal(clip[:1])
    assert viz.as_frames(clip[..., :1]).equal(clip)
    floating = clip.movedim(-1, 0) / 255
    assert viz.as_frames(floating).equal(clip)
    assert viz.as_frames(floating.half()[:, 1]).equal(clip[1:2])
    normalised = viz.as_frames((floating - 0.45) / 0.225)
    assert normalised.min() == 0
    assert normalised.max() == 255
    assert viz.as_frames(floating - 0.5).equal(normalised)
    assert viz.as_frames(floating * 3).equal(viz.as_frames(floating * 3 - 0.1))
    white = floating / floating.max()
    resized = viz.as_frames(white * 1.0001).float()  # a little above 1, which is no other scale
    torch.testing.assert_close(resized, viz.as_frames(white).float(), atol=1, rtol=0)
    assert viz.as_frames(torch.full((3, 1, 2, 2), 5.0)).equal(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))


def test_maps_of_fewer_frames_take_those_in_the_middle_of_theirs() -> None:
    clip = moving(6)
    few = viz.draw_frames(clip, weights_of(frames=2), side=64)
    all_ = viz.draw_frames(clip, weights_of(frames=6), side=64)
    assert [picture.tobytes() for picture in few] == [all_[t].tobytes() for t in (1, 4)]


DRAWN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"clip": [1]}, TypeError, "clip is"),
    "a clip of integers": ({"clip": moving().long()}, TypeError, "clip is .*int64"),
    "four channels": ({"clip": torch.zeros(2, 4, 4, 4, dtype=torch.uint8)}, ValueError, "clip is .*with C 3 or 1"),
    "a batch of clips": ({"clip": torch.zeros(1, 3, 2, 4, 4)}, ValueError, "clip is"),
    "no frames": ({"clip": moving()[:0]}, ValueError, "no size 0"),
    "a clip of NaN": ({"clip": torch.full((3, 1, 2, 2), float("nan"))}, ValueError, "clip has numbers that are not"),
    "no maps": ({"maps": None}, TypeError, "maps is None"),
    "a batch of maps": ({"maps": weights_of()[None]}, ValueError, r"maps is \(1, 2, 3, 4, 4\)"),
    "empty maps": ({"maps": weights_of()[:0]}, ValueError, "without a size 0"),
    "infinite maps": ({"maps": weights_of() / 0}, ValueError, "maps has numbers that are not finite"),
    "other groups": ({"groups": [1]}, ValueError, r"groups is \[1\]; accepted are 2 names"),
    "a cell outside": ({"cell": (4, 0)}, ValueError, r"cell is \(4, 0\)"),
    "another scale": ({"scale": "row"}, ValueError, "scale is 'row'; accepted are 'group', 'all'"),
    "no side": ({"side": 0}, ValueError, "side is 0"),
}


@pytest.mark.parametrize("case", DRAWN)
@pytest.mark.parametrize("draw", ["draw_frames", "draw_sheet"])
def test_what_cannot_be_drawn(draw: str, case: str) -> None:
    changed, error, message = DRAWN[case]
    with pytest.raises(error, match=message):
        getattr(viz, draw)(**({"clip": moving(), "maps": weights_of()} | changed))


def test_pictures_need_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (picture,) = viz.draw_frames(moving(1), weights_of(1, 1))
    monkeypatch.setitem(sys.modules, "PIL", None)
    for call in (
        lambda: viz.draw_frames(moving(1), weights_of(1, 1)),
        lambda: viz.draw_sheet(moving(1), weights_of(1, 1)),
        lambda: viz.save(tmp_path / "a.png", picture),
    ):
        with pytest.raises(ImportError, match=r"pillow: pip install 'dyreg-triton\[viz\]'"):
            call()


def test_files_are_what_was_drawn(tmp_path: Path) -> None:
    pictures = viz.draw_frames(moving(), weights_of(), side=64)
    assert viz.save(tmp_path / "new" / "one.png", pictures[0]) == tmp_path / "new" / "one.png"
    with Image.open(tmp_path / "new" / "one.png") as read:
        assert (read.format, read.convert("RGB").tobytes()) == ("PNG", pictures[0].tobytes())
    viz.save(str(tmp_path / "clip.webp"), pictures, milliseconds=50)
    with Image.open(tmp_path / "clip.webp") as read:
        assert (read.format, read.n_frames, read.size) == ("WEBP", 3, pictures[0].size)
        read.seek(2)
        assert np.abs(pixels(read) - pixels(pictures[2])).mean() < 6
    viz.save(tmp_path / "one.WEBP", pictures[:1])
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["clip.webp", "one.WEBP", "one.png"]


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = viz.draw_frames(moving(), weights_of(), side=64)
    path = viz.save(tmp_path / "kept.png", pictures[0])
    before = path.read_bytes()

    def breaks(self: Any, to: Any, **options: Any) -> None:
        Path(to).write_bytes(b"half")
        assert Path(to) != path
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", breaks)
    with pytest.raises(OSError, match="no space"):
        viz.save(path, pictures[1])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["kept.png"]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    pictures = viz.draw_frames(moving(), weights_of(), side=64)
    for path, given, message in (
        ("a.png", pictures, "for 3 pictures; accepted is a name that ends in .webp"),
        ("a.jpg", pictures[:1], "ends in .png or .webp"),
        ("a", pictures[0], "ends in .png or .webp"),
        ("a.webp", [], "pictures is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            viz.save(tmp_path / path, given)
    with pytest.raises(ValueError, match="milliseconds is 0"):
        viz.save(tmp_path / "a.webp", pictures, milliseconds=0)
    assert not list(tmp_path.iterdir())


# --- the command ----------------------------------------------------------------------------------------------------

MODELS = """
import dyreg_triton as dt
import torch
from torch import nn

OPTIONS = {"window": 3, "groups": 2}

def clips():
    torch.manual_seed(0)
    first = dt.layers.BATBlock(8, temporal_window=2, **OPTIONS)
    pool = nn.AvgPool3d((2, 2, 2))
    return nn.Sequential(nn.Conv3d(3, 8, 1), first, pool, dt.layers.BATransform(8, temporal_window=1, **OPTIONS))

def images():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), dt.layers.BATransform(8, dimensions=2, **OPTIONS))

class FramesFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = images()

    def forward(self, x):
        return self.net(x.flatten(0, 1))

def plain():
    return nn.Linear(3, 3)

def broken():
    model = clips()
    model[0].bias.data.fill_(float("nan"))
    return model

def lazy():
    model = clips()
    model.forward = lambda x: x
    return model
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with somebody's models and clips, which is the current one."""
    (tmp_path / "vizmodels.py").write_text(MODELS)
    clip = moving(4, 12, 18)
    np.save(tmp_path / "clip.npy", clip.numpy())
    torch.save(clip.movedim(-1, 0) / 255, tmp_path / "clip.pt")
    frames = [Image.fromarray(frame.numpy()) for frame in clip]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    (tmp_path / "folder").mkdir()
    for number, frame in zip((1, 2, 9, 10), frames, strict=True):
        frame.save(tmp_path / "folder" / f"frame{number}.png")
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    frames[0].save(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "vizmodels", raising=False)
    yield tmp_path
    sys.modules.pop("vizmodels", None)


def run(*arguments: str) -> int:
    """The exit status, whether returned or raised."""
    try:
        return main(["viz", *arguments])
    except SystemExit as end:
        return int(str(end.code))


def test_arrays_and_pictures_of_each_layer_are_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("vizmodels:clips", "--clip", "clip.npy", "--out", "out") == 0
    out = capsys.readouterr().out
    assert "1.batransform: 2 groups, 4 frames, a map of 12 x 18, cell (6, 9)" in out
    assert "3: 2 groups, 2 frames, a map of 6 x 9, cell (3, 4)" in out
    names = {f"{kind}-{layer}{end}" for kind in ("attention", "contribution") for layer in ("1.batransform", "3")
             for end in (".npy", ".png", ".webp")}  # fmt: skip
    assert {file.name for file in (here / "out").iterdir()} == names
    assert all(name in out for name in names)

    import vizmodels

    clip = torch.from_numpy(np.load("clip.npy")).movedim(-1, 0)[None] / 255
    found = viz.record(vizmodels.clips(), clip)
    for path, cell in (("1.batransform", (6, 9)), ("3", (3, 4))):
        attention, contribution = (np.load(f"out/{kind}-{path}.npy") for kind in ("attention", "contribution"))
        assert np.array_equal(attention, found[path].attention_weights()[0].numpy())
        assert np.array_equal(contribution, found[path].contribution_maps(cell)[0].numpy())
        with Image.open(f"out/contribution-{path}.webp") as moves, Image.open(f"out/attention-{path}.png") as still:
            assert moves.n_frames == attention.shape[1]
            assert len(marked(moves)) > 0
            assert len(marked(still)) == 0


@pytest.mark.parametrize("clip", ["clip.pt", "clip.gif", "clip.webp", "folder"])
def test_every_kind_of_file_shows_the_same(clip: str, here: Path) -> None:
    assert run("vizmodels:clips", "--clip", "clip.npy", "--out", "expected", "--layer", "3") == 0
    assert run("vizmodels:clips", "--clip", clip, "--out", "out", "--layer", "3") == 0
    expected, out = (np.load(f"{folder}/attention-3.npy") for folder in ("expected", "out"))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert (here / "out" / "attention-3.png").stat().st_size == pytest.approx(
        (here / "expected" / "attention-3.png").stat().st_size, rel=0.2
    )


@pytest.mark.parametrize("clip", ["clip.pt", "clip.webp", "folder"])
def test_every_frame_is_read_in_its_order(clip: str, here: Path) -> None:
    expected = torch.from_numpy(np.load("clip.npy")).movedim(-1, 0) / 255
    torch.testing.assert_close(read_clip(Path(clip)), expected)


def test_images_are_a_batch_or_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("vizmodels:images", "--clip", "clip.npy", "--out", "batch") == 0
    assert run("vizmodels:images", "--clip", "one.png", "--out", "one") == 0
    assert run("vizmodels:FramesFirst", "--clip", "clip.npy", "--out", "first", "--layout", "BTCHW") == 0
    batch, one = np.load("batch/attention-1.npy"), np.load("one/attention-1.npy")
    assert batch.shape == (2, 4, 12, 18)
    np.testing.assert_allclose(batch[:, :1], one, atol=1e-6)
    np.testing.assert_allclose(batch, np.load("first/attention-net.1.npy"), atol=1e-6)
    assert sorted(p.name for p in Path("one").iterdir()) == [
        f"{kind}-1{end}" for kind in ("attention", "contribution") for end in (".npy", ".png")
    ]
    assert "1: 2 groups, 1 frame," in capsys.readouterr().out


def test_options_are_taken(here: Path) -> None:
    assert run("vizmodels:clips", "--clip", "clip.npy", "--out", "all") == 0
    chosen = ["--layer", "1", "--cell", "0,17", "--group", "1"]
    assert run("vizmodels:clips", "--clip", "clip.npy", "--out", "some", *chosen) == 0
    assert {file.suffix: file.name.split("-")[1] for file in (here / "some").iterdir()} == {
        ".npy": "1.batransform.npy", ".png": "1.batransform.png", ".webp": "1.batransform.webp",
    }  # fmt: skip
    every, some = (np.load(f"{folder}/attention-1.batransform.npy") for folder in ("all", "some"))
    assert np.array_equal(some, every[1:])
    assert not np.array_equal(
        np.load("some/contribution-1.batransform.npy"), np.load("all/contribution-1.batransform.npy")[1:]
    )
    normalised = ["--mean", "0.5,0.4,0.3", "--std", "0.2", "--size", "9,10", "--layer", "1", "--scale", "all"]
    assert run("vizmodels:clips", "--clip", "clip.npy", "--out", "sized", *normalised) == 0
    import vizmodels

    clip = torch.from_numpy(np.load("clip.npy")).movedim(-1, 1) / 255
    clip = nn.functional.interpolate(clip, size=(9, 10), mode="bilinear", antialias=True).movedim(1, 0)
    clip = (clip - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1, 1)) / 0.2
    expected = viz.record(vizmodels.clips(), clip[None])["1.batransform"].attention_weights()[0]
    np.testing.assert_allclose(np.load("sized/attention-1.batransform.npy"), expected, atol=1e-6)


def test_published_layers_are_swapped_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    assert run("published:BATNet", "--clip", "clip.npy", "--size", "6,6") == 0
    out = capsys.readouterr().out
    assert "layer2.nl0.batransform: 2 groups, 4 frames, a map of 6 x 6, cell (3, 3)" in out
    assert "layer3.nl0.batransform: 2 groups" in out
    torch.manual_seed(0)
    model = published.BATNet().eval()
    seen = []
    model.layer2.nl0.batransform.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    clip = torch.from_numpy(np.load("clip.npy")).movedim(-1, 1) / 255
    clip = nn.functional.interpolate(clip, size=(6, 6), mode="bilinear", antialias=True).movedim(1, 0)[None]
    with torch.no_grad():
        model(clip)
        theirs, x = model.layer2.nl0.batransform, seen[0]
        pooled = nn.functional.adaptive_max_pool3d(theirs.conv1(x), (4, 3, 1))
        rows = theirs.weights(theirs.assembled(theirs.conv_p(pooled)[..., 0], 3), torch.zeros(1, 1), None)[0]
    attention = np.load("viz/attention-layer2.nl0.batransform.npy")
    assert rows is not None
    np.testing.assert_allclose(attention[..., ::2, :].mean(-1), rows[0].sum(-2), rtol=1e-4)


CLIP = ["--clip", "clip.npy"]
REFUSED = {
    "no clip": (["vizmodels:clips"], 2, "--clip"),
    "no such file": (["vizmodels:clips", "--clip", "none.npy"], 1, "none.npy"),
    "no such image": (["vizmodels:clips", "--clip", "none.png"], 1, "none.png"),
    "no such folder": (["vizmodels:clips", "--clip", "none"], 1, "which is not there"),
    "another kind of file": (["vizmodels:clips", "--clip", "vizmodels.py"], 1, "accepted are .npy, .pt"),
    "no image": (["vizmodels:clips", "--clip", "false.png"], 1, "which is no image"),
    "no array": (["vizmodels:clips", "--clip", "false.npy"], 1, "which holds no array"),
    "no tensor": (["vizmodels:clips", "--clip", "dict.pt"], 1, "which holds a dict"),
    "an array of another form": (["vizmodels:clips", "--clip", "ints.npy"], 1, "(2, 2, 2) int64"),
    "a folder without images": (["vizmodels:clips", "--clip", "empty"], 1, "a folder without images"),
    "images of two sizes": (["vizmodels:clips", "--clip", "mixed"], 1, "images of one size"),
    "no factory": (["vizmodels:none", *CLIP], 1, "vizmodels:none"),
    "no layer in it": (["vizmodels:plain", *CLIP], 1, "without a BATransform"),
    "none is called": (["vizmodels:lazy", *CLIP], 1, "called none of its BATransforms"),
    "a layer that is not there": (["vizmodels:clips", *CLIP, "--layer", "5"], 1, "accepted are paths"),
    "a cell outside": (["vizmodels:clips", *CLIP, "--cell", "8,1"], 1, "3: contribution_maps: cell is (8, 1)"),
    "a group that is not there": (["vizmodels:clips", *CLIP, "--group", "2"], 1, "group is [2]"),
    "a clip that does not fit": (["vizmodels:clips", *CLIP, "--size", "2,2"], 1, "is not recorded on clip.npy"),
    "another layout": (["vizmodels:clips", *CLIP, "--layout", "BTCHW"], 1, "is not recorded on clip.npy"),
    "a mean of two": (["vizmodels:clips", *CLIP, "--mean", "0,1"], 2, "0,1"),
    "a clip of NaN": (["vizmodels:clips", "--clip", "nan.npy"], 1, "not finite"),
    "a model of NaN": (["vizmodels:broken", *CLIP], 1, "1.batransform: its attention has numbers that are not finite"),
    "a std of zero": (["vizmodels:clips", *CLIP, "--std", "0"], 1, "std is"),
    "a cell of words": (["vizmodels:clips", *CLIP, "--cell", "a,b"], 2, "a,b"),
    "a size of one": (["vizmodels:clips", *CLIP, "--size", "4"], 2, "4"),
    "no such device": (["vizmodels:clips", *CLIP, "--device", "abacus"], 2, "abacus"),
    "a file for a folder": (["vizmodels:clips", *CLIP, "--out", "one.png"], 1, "one.png"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "false.png").write_text("no picture")
    (here / "false.npy").write_text("no array")
    torch.save({"clip": 1}, here / "dict.pt")
    np.save(here / "ints.npy", np.zeros((2, 2, 2), np.int64))
    np.save(here / "nan.npy", np.full((3, 2, 9, 9), np.nan, np.float32))
    (here / "empty").mkdir()
    (here / "mixed").mkdir()
    Image.new("RGB", (4, 4)).save(here / "mixed" / "a.png")
    Image.new("RGB", (5, 4)).save(here / "mixed" / "b.png")
    before = sorted(here.rglob("*"))
    arguments, status, part = REFUSED[case]
    assert run(*arguments) == status
    err = capsys.readouterr().err
    assert part in err
    assert "Traceback" not in err
    assert [p for p in sorted(here.rglob("*")) if "__pycache__" not in p.parts] == before  # nothing was written


def test_without_pillow_the_command_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert run("vizmodels:clips", *CLIP) == 1
    assert "pip install 'dyreg-triton[viz]'" in capsys.readouterr().err


def test_nothing_in_a_file_is_executed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (here / "executed",)

    torch.save(Harmful(), here / "bad.pt")
    np.save(here / "bad.npy", np.array([Harmful()], dtype=object), allow_pickle=True)
    for name in ("bad.pt", "bad.npy"):
        assert run("vizmodels:clips", "--clip", name) == 1
        assert "which holds no array" in capsys.readouterr().err
    assert not (here / "executed").exists()


@pytest.mark.slow
def test_as_a_process(here: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "dyreg_triton", "viz", "vizmodels:images", "--clip", "one.png", "--out", "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "  " + os.path.join("out", f"{kind}-1{end}")
        for kind in ("attention", "contribution")
        for end in (".npy", ".png")
    ]
