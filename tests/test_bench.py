"""The benchmark checks before it times, says what it measured, and keeps nothing that was wrong."""

import importlib.util
import json
import sys
import xml.etree.ElementTree
from dataclasses import replace

import pytest
import torch

import bench.__main__ as command
import dyreg_triton as dt
from bench import measure, region, relational

SAYS = {
    "op", "mode", "shape", "nodes", "dtype", "seconds", "wall_seconds", "speedup", "floor_bytes", "floor_seconds",
    "of_floor", "extra_bytes", "errors", "device", "copy_bandwidth", "torch", "triton", "python", "dyreg_triton",
    "commit", "date",
}  # fmt: skip
RELATIONAL_SAYS = SAYS - {"nodes"} | {
    "part", "batch", "queries", "channels", "window", "taps", "operations", "matrix_rate", "of_matrix_rate",
    "less_memory",
}  # fmt: skip
TINY = relational.Problem(2, 3, (2, 3, 4), queries=2, window=(3, 3, 3))


@pytest.fixture
def small(monkeypatch):
    """Shapes that take no time."""
    monkeypatch.setattr(region, "SHAPES", {"cpu": [(2, 3, 5, 6)], "cuda": [(2, 3, 5, 6)]})
    monkeypatch.setattr(relational, "QUICK", TINY)
    monkeypatch.setattr(measure.Machine, "matrix_rate", lambda self, dtype: 1e11)


def test_a_row_describes_itself(small, tmp_path, capsys):
    out = tmp_path / "rows" / "region.jsonl"
    assert command.main(["run", "region", "--quick", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["op"], row["mode"]) for row in rows] == [
        ("region_pool", "forward"),
        ("region_pool", "forward+backward"),
        ("region_remap", "forward"),
        ("region_remap", "forward+backward"),
    ]
    for row in rows:
        assert set(row) >= SAYS
        assert set(row["seconds"]) == {"ours", "published"}
        assert row["speedup"]["published"] == row["seconds"]["published"] / row["seconds"]["ours"]
        assert max(row["errors"].values()) < 1e-5
    assert command.main(["run", "all", "--quick", "--out", str(out)]) == 0  # rows are added
    assert len(out.read_text().splitlines()) == 10
    assert [p.name for p in out.parent.iterdir()] == ["region.jsonl"]
    assert "published" in capsys.readouterr().out


def test_wrong_results_are_not_kept(small, tmp_path, monkeypatch, capsys):
    right = dt.ops.region_pool
    monkeypatch.setattr(
        dt.ops, "region_pool", lambda x, r: right(x, r) * (1 if dt.dispatch.current_backend() == "reference" else 1.001)
    )
    out = tmp_path / "region.jsonl"
    assert command.main(["run", "region", "--quick", "--out", str(out)]) == 1
    assert {json.loads(line)["op"] for line in out.read_text().splitlines()} == {"region_remap"}
    assert "WRONG, not kept: region_pool" in capsys.readouterr().out


def test_the_floor_counts_each_map_once_per_use():
    x, nodes, regions = torch.empty(2, 3, 5, 7), torch.empty(2, 9, 3), torch.empty(2, 9, 4)
    a, v, r = 4 * 210, 4 * 54, 4 * 72
    assert region._floor_bytes("region_pool", False, x, nodes, regions) == a + v + r
    assert region._floor_bytes("region_pool", True, x, nodes, regions) == 3 * a + 2 * v + 3 * r
    assert region._floor_bytes("region_remap", True, x, nodes, regions) == 2 * a + 3 * v + 3 * r


def test_contenders_are_timed_in_turns():
    machine = measure.Machine(torch.device("cpu"), "test", 1.0)
    order = []
    machine.interleaved([lambda: order.append("a"), lambda: order.append("b")], repeats=20)
    rounds = list(zip(order[::2], order[1::2], strict=True))
    assert len(rounds) == 22
    assert set(rounds) == {("a", "b"), ("b", "a")}  # each once a round, in either order


def test_an_error_that_is_nan_is_infinite():
    assert measure.relative_error([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")
    assert measure.relative_error([torch.tensor([1.5])], [torch.ones(1)]) == 0.5


def test_a_large_product_tells_the_matrix_rate(monkeypatch):
    machine = measure.Machine(torch.device("cpu"), "test", 1.0)
    times = iter([0.5] * 6 + [0.25] + [0.5] * 393)

    def seconds(self, call):
        return next(times)

    monkeypatch.setattr(measure.Machine, "seconds", seconds)
    assert machine.matrix_rate(torch.float32) == 8 * 512**3
    assert machine.matrix_rate(torch.float32) == 8 * 512**3  # asked once
    assert next(times, None) is None


def test_peak_memory_is_the_most_that_is_held_at_once():
    machine, held = measure.Machine(torch.device("cpu"), "test", 1.0), [torch.empty(1000)]

    def call():
        held.clear()  # of before the call
        first = torch.empty(3000)
        del first
        second, third = torch.empty(2000), torch.empty(500)
        del second
        return third

    assert machine.extra_bytes(call) == 4 * 3000
    x = torch.randn(64, 64, requires_grad=True)
    assert machine.extra_bytes(lambda: torch.autograd.grad(x.exp().sum(), x)) >= 2 * 4 * 64 * 64


# --- relational attention -------------------------------------------------------------------------------------------


def relational_rows(tmp_path, *arguments):
    out = tmp_path / "relational.jsonl"
    status = command.main(["run", "relational", "--device", "cpu", "--out", str(out), *arguments])
    return status, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_a_relational_row_describes_itself(small, tmp_path):
    status, rows = relational_rows(tmp_path, "--quick")
    assert status == 0
    assert [(row["part"], row["mode"]) for row in rows] == [("stage", "forward"), ("stage", "forward+backward")]
    for row in rows:
        assert set(row) >= RELATIONAL_SAYS
        assert row["shape"] == [2, 2, 3, 2, 3, 4]
        assert set(row["seconds"]) == set(row["extra_bytes"]) == {"ours", "published"}
        assert row["speedup"]["published"] == row["seconds"]["published"] / row["seconds"]["ours"]
        assert max(row["errors"].values()) < 1e-5
        assert min(row["extra_bytes"].values()) >= 4 * TINY.positions * TINY.queries * TINY.channels


def test_every_part_is_measured(monkeypatch, tmp_path):
    machine = measure.Machine(torch.device("cpu"), "test", 1e9)
    monkeypatch.setattr(measure.Machine, "matrix_rate", lambda self, dtype: 1e11)
    monkeypatch.setattr(relational, "parts", lambda kind: [("taps", TINY), ("table1", replace(TINY, batch=1))])
    taps, both_taps, table, both_table = relational.run(machine, quick=False)
    assert (taps["part"], taps["taps"], set(taps["seconds"])) == ("taps", 27, {"ours", "published"})
    assert both_taps["operations"] == 3 * taps["operations"]
    for row in (table, both_table):
        assert set(row["seconds"]) == {"ours", "multi-query", "efficient", "vanilla"}
        assert row["queries"] == {"ours": 2, "vanilla": 1, "efficient": 1, "multi-query": 2}
        assert row["channels"] == {"ours": 3, "vanilla": 6, "efficient": 6, "multi-query": 3}
        assert max(row["errors"].values()) < 1e-5


def test_the_parts_of_a_full_run():
    stages = [(problem.channels, problem.size) for part, problem in relational.parts("cuda") if part == "stage"]
    assert stages == [(c, (t, s, s)) for t in (8, 16) for c, s in ((8, 56), (16, 28), (32, 14), (64, 7))]
    cpu = list(relational.parts("cpu"))
    assert [problem.taps for part, problem in cpu if part == "taps"] == [27, 75, 147, 245, 405]
    assert [problem.batch for part, problem in cpu if part == "batch"] == [1, 2, 4, 8]
    assert [problem.size[0] for part, problem in cpu if part == "stage"] == [8] * 4


def test_wrong_relational_results_are_not_kept(small, tmp_path, monkeypatch, capsys):
    right = relational.ours
    monkeypatch.setattr(
        relational,
        "ours",
        lambda *tensors: right(*tensors) * (1 if dt.dispatch.current_backend() == "reference" else 1.001),
    )
    assert relational_rows(tmp_path, "--quick") == (1, [])
    assert "WRONG, not kept: relational_attention stage" in capsys.readouterr().out


@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_a_wrong_contender_is_not_timed(small, tmp_path, monkeypatch, failure):
    right = relational.published

    def published(*tensors):
        if failure == "raises":
            raise RuntimeError("out of memory")
        return right(*tensors) * 1.001

    monkeypatch.setattr(relational, "published", published)
    status, rows = relational_rows(tmp_path, "--quick")
    assert (status, len(rows)) == (0, 2)
    for row in rows:
        assert set(row["seconds"]) == {"ours"}
        assert row["speedup"] == {}
        assert ("published" in row["errors"]) == (failure == "wrong")


def test_useful_operations_are_those_of_the_cheaper_order():
    first = relational.Problem(1, 4, (1, 1, 2), queries=8, window=(1, 1, 3))
    assert first.neighbours() == 4  # of two positions with three neighbours each, one of them outside
    assert first.multiply_adds() == 4 * 16 + 16 * 16 + 4 * 32 + 16 * 32  # M C D + L C D + M E (D + F) + L E (D + F)
    assert first.operations(False) == 2 * first.multiply_adds()
    assert first.operations(True) == 3 * first.operations(False)
    second = replace(first, queries=1, channels=8)
    assert second.multiply_adds() == 4 * 64 + 2 * 64 + 4 * 32 + 2 * 64  # M C D + L C D + L M (D + 2 E + F) + L E F
    assert replace(second, batch=3).multiply_adds() == 3 * second.multiply_adds()


@pytest.mark.parametrize("window", [(3, 3, 3), (1, 2, 4), (5, 7, 9)])
def test_neighbours_are_those_inside_the_clip(window):
    problem = relational.Problem(2, 1, (2, 3, 5), window=window)
    inside = dt.reference.relational.windows(torch.ones(2, 1, 2, 3, 5), window)
    assert problem.neighbours() == inside.sum()


def test_the_relational_floor_counts_every_tensor_once_per_use():
    tensors = relational.Contender(relational.ours, TINY).inputs(torch.float32, torch.device("cpu"))
    projected, gradient, *weights = (4 * t.numel() for t in tensors)
    assert TINY.floor_bytes(4, False) == projected + sum(weights) + gradient
    assert TINY.floor_bytes(4, True) == 3 * (projected + sum(weights)) + 2 * gradient
    assert TINY.floor_bytes(2, True) == TINY.floor_bytes(4, True) // 2


def sample_rows(device):
    for mode, factor in (("forward", 1), ("forward+backward", 3)):
        for part, values in (("taps", (27, 75)), ("batch", (1, 2))):
            for value in values:
                row = {"part": part, "mode": mode, "dtype": "float32", "device": device, "shape": [1, 8, 32, 8, 14, 14]}
                numbers = {"ours": factor * value, "published": 2 * factor * value}
                yield {**row, "taps": 245, "batch": 1, part: value, "seconds": numbers, "extra_bytes": numbers}
    yield {"op": "another", "part": "stage", "device": device}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Rows of two devices."""
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    for device in ("one", "two"):
        lines = [json.dumps(row) + "\n" for row in sample_rows(device)]
        (tmp_path / f"relational-{device}.jsonl").write_text("".join(lines))
    return tmp_path


def test_plot(results, capsys):
    pytest.importorskip("matplotlib")
    assert command.main(["plot", "relational"]) == 0
    assert {path.name for path in results.glob("*.svg")} == {"relational-one.svg", "relational-two.svg"}
    one = (results / "relational-one.svg").read_text()
    assert xml.etree.ElementTree.fromstring(one).tag.endswith("svg")
    for text in ("ours, forward+backward", "published, forward", "milliseconds", "MiB", "one, float32", "M 245"):
        assert text in one
    assert command.main(["plot", "relational"]) == 0
    assert (results / "relational-one.svg").read_text() == one  # the same rows give the same file
    assert command.main(["plot", "relational", "--out", str(results / "new" / "both.svg")]) == 0
    both = (results / "new" / "both.svg").read_text()
    assert "one, float32" in both
    assert "two, float32" in both
    assert "both.svg" in capsys.readouterr().out


def test_plot_says_what_it_lacks(results, monkeypatch, capsys):
    def refused():
        with pytest.raises(SystemExit) as stopped:
            command.main(["plot", "relational"])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert 'pip install "dyreg-triton[viz]"' in refused()
    for path in results.glob("*.jsonl"):
        path.write_text('{"op": "region_pool"}\n')
    if importlib.util.find_spec("matplotlib") is not None:
        assert "no rows of the parts taps and batch" in refused()
    for path in results.glob("*.jsonl"):
        path.unlink()
    assert "python -m bench run relational" in refused()
