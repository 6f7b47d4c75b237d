"""The benchmark checks before it times, says what it measured, and keeps nothing that was wrong."""

import json

import pytest
import torch

import bench.__main__ as command
import dyreg_triton as dt
from bench import measure, region

SAYS = {
    "op", "mode", "shape", "nodes", "dtype", "seconds", "wall_seconds", "speedup", "floor_bytes", "floor_seconds",
    "of_floor", "extra_bytes", "errors", "device", "copy_bandwidth", "torch", "triton", "python", "dyreg_triton",
    "commit", "date",
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Shapes that take no time."""
    monkeypatch.setattr(region, "SHAPES", {"cpu": [(2, 3, 5, 6)], "cuda": [(2, 3, 5, 6)]})


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
    assert len(out.read_text().splitlines()) == 8
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
