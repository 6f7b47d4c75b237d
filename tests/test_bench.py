"""The benchmark checks before it times, says what it measured, and keeps nothing that was wrong."""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as command
import dyreg_triton as dt
from bench import bilinear, measure, region, relational, rows
from dyreg_triton._core import dispatch
from dyreg_triton.ops import launch

MACHINE = {
    "device", "kind", "capability", "copy_bandwidth", "torch", "triton", "python", "dyreg_triton", "commit", "date",
}  # fmt: skip
COMPARED = {
    "schema", "suite", "op", "part", "label", "mode", "shape", "dtype", "repeats", "seconds", "spread", "speedup",
    "wall_seconds", "wall_spread", "wall_speedup", "floor_bytes", "operations", "matrix_rate", "floor_seconds",
    "of_floor", "of_matrix_rate", "extra_bytes", "output_bytes", "tuning", "less_memory", "errors", "tolerance",
}  # fmt: skip
REGIONS = region.Problem(2, 3, 5, 6)
CLIPS = relational.Problem(2, 3, (2, 3, 4), queries=2, window=(3, 3, 3))
MAPS = bilinear.Problem(2, 6, 8, 6, 9, k=2, tk=3, cells=3)
CPU = torch.device("cpu")


def a_machine() -> measure.Machine:
    return measure.Machine(torch.device("cpu"), "test")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems and limits that take no time."""
    pytest.importorskip("triton")
    from bench import overhead

    monkeypatch.setattr(region, "SMALL", REGIONS)
    monkeypatch.setattr(relational, "SMALL", CLIPS)
    monkeypatch.setattr(bilinear, "SMALL", MAPS)
    monkeypatch.setattr(overhead, "OPS", ("region_kernel",))
    monkeypatch.setattr(overhead, "SECONDS", 0.02)
    monkeypatch.setattr(overhead, "BATCH", 2)
    monkeypatch.setattr(rows, "ROW_SECONDS", {"cpu": 0.02, "cuda": 0.02})
    monkeypatch.setattr(measure.Machine, "_copy", lambda self: measure.Rate(1e10, 9e9, 9.5e9, 0.0))
    monkeypatch.setattr(measure.Machine, "_matrix", lambda self, dtype: measure.Rate(1e11, 8e10, 9e10, 1e-7))


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    """The status of `run ARGUMENTS` on the CPU, and all rows in the file that it adds to."""
    out = tmp_path / "rows" / "bench.jsonl"
    status = command.main(["run", *arguments, "--device", "cpu", "--out", str(out)])
    return status, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def doubtful(right: Callable) -> Callable:
    """A call whose results are off by a thousandth, but for the reference's."""
    return lambda *args, **options: (
        right(*args, **options) * (1 if dispatch.current_backend() == "reference" else 1.001)
    )


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_describes_itself(small, tmp_path, capsys):
    status, found = run(tmp_path, "region", "--quick")
    assert status == 0
    assert [(row["op"], row["mode"]) for row in found] == [
        ("region_pool", "forward"),
        ("region_pool", "forward+backward"),
        ("region_remap", "forward"),
        ("region_remap", "forward+backward"),
    ]
    for row in found:
        assert set(row) == COMPARED | MACHINE | {"nodes", "channels", "batch", "init"}
        assert (row["schema"], row["suite"], row["part"], row["label"]) == (
            2,
            "region",
            "small",
            "2x3x5x6, N 9, center",
        )
        assert set(row["seconds"]) == set(row["spread"]) == set(row["extra_bytes"]) == {"ours", "published"}
        for clock in ("", "wall_"):
            seconds, spread = row[f"{clock}seconds"], row[f"{clock}spread"]
            assert row[f"{clock}speedup"] == {"published": seconds["published"] / seconds["ours"]}
            assert all(spread[name][0] <= seconds[name] <= spread[name][1] for name in seconds)
        assert row["floor_seconds"] == max(row["floor_bytes"] / 1e10, row["operations"] / 1e11)
        assert row["of_floor"] == row["floor_seconds"] / row["seconds"]["ours"]
        assert max(row["errors"].values()) <= row["tolerance"] == 1e-5
        assert (row["kind"], row["capability"]) == ("cpu", None)
    assert len(run(tmp_path, "region", "--quick")[1]) == 8  # rows are added
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["bench.jsonl"]
    assert "x published" in capsys.readouterr().out


def test_everything_in_one_command(small, tmp_path, capsys):
    from bench import overhead
    from bench.report.rows import check

    status, found = run(tmp_path, "all", "--quick")
    assert status == 0
    suites = ["device", "region", "relational", "bilinear"] + ["overhead"] * (overhead._no_standin() is None)
    assert [suite for suite, _ in itertools.groupby(row["suite"] for row in found)] == suites
    assert all(check(row) == row for row in found)  # may enter a report
    assert all(set(row) > MACHINE for row in found)
    said = capsys.readouterr().out
    for op in ("relational_attention", "bilinear_transform"):
        assert said.index(f"right: {op}") < said.index("copy ")  # correctness first
    assert (overhead._no_standin() or "stand-in driver") in said


def test_rows_without_out_go_to_a_file_of_suite_and_machine(small, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "_processor", lambda: "Some CPU (R) @ 3 GHz")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert command.main(["run", "device", "--device", "cpu"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["device-cpu-some-cpu-r-3-ghz-1-thread.jsonl"]


def test_a_file_that_cannot_be_written_ends_the_run(clock, tmp_path, monkeypatch, capsys):
    def full(path: Path, row: dict) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(rows, "append", full)
    assert run(tmp_path, "all")[0] == 1
    assert "no space left on device" in capsys.readouterr().err
    assert clock == [10.0]


def test_rows_are_added_whole_and_in_numbers_that_json_has(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows.append(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        rows.append(path, {"a": float("nan")})
    rows.append(path, {"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    assert list(path.parent.iterdir()) == [path]


# --- what is wrong --------------------------------------------------------------------------------------------------


def test_a_wrong_op_gives_no_rows(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dt.ops, "region_pool", doubtful(dt.ops.region_pool))
    status, found = run(tmp_path, "all", "--quick")
    assert status == 1
    assert {"copy", "region_remap", "relational_attention", "bilinear_transform"} <= {row["op"] for row in found}
    assert "region_pool" not in {row["op"] for row in found}
    assert "WRONG, no row of it is kept: region_pool 2x3x5x6" in capsys.readouterr().out


def test_an_op_that_fails_gives_no_rows(small, tmp_path, monkeypatch, capsys):
    def fails(*args, **options):
        if dispatch.current_backend() != "reference":
            raise RuntimeError("no such kernel")
        return right(*args, **options)

    right = dt.ops.region_remap
    monkeypatch.setattr(dt.ops, "region_remap", fails)
    status, found = run(tmp_path, "region", "--quick")
    assert (status, {row["op"] for row in found}) == (1, {"region_pool"})
    assert "FAILED: region_remap" in capsys.readouterr().out
    monkeypatch.setattr(region, "checks", lambda machine: ())
    status, found = run(tmp_path, "region", "--quick")
    assert (status, {row["op"] for row in found}) == (1, {"region_pool"})
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize("suite", [region, relational, bilinear])
def test_a_row_that_is_wrong_is_not_kept(small, tmp_path, monkeypatch, capsys, suite):
    monkeypatch.setattr(suite, "checks", lambda machine: ())  # as where only other problems than theirs are wrong
    monkeypatch.setattr(dt.ops, "region_pool", doubtful(dt.ops.region_pool))
    monkeypatch.setattr(relational, "ours", doubtful(relational.ours))
    monkeypatch.setattr(bilinear, "ours", doubtful(bilinear.ours))
    status, found = run(tmp_path, suite.__name__.removeprefix("bench."), "--quick")
    assert (status, {row["op"] for row in found}) == (1, {"region_remap"} if suite is region else set())
    assert f"WRONG, not kept: {'region_pool' if suite is region else suite.OP} small" in capsys.readouterr().out


@pytest.mark.parametrize("suite", [relational, bilinear])
@pytest.mark.parametrize("failure", ["wrong", "raises", "not a number"])
def test_a_wrong_contender_is_not_timed(small, tmp_path, monkeypatch, failure, suite):
    right = suite.published

    def published(*tensors):
        if failure == "raises":
            raise RuntimeError("out of memory")
        return right(*tensors) * (1.001 if failure == "wrong" else float("nan"))

    monkeypatch.setattr(suite, "published", published)
    status, found = run(tmp_path, suite.__name__.removeprefix("bench."), "--quick")
    assert (status, len(found)) == (0, 2)
    for row in found:
        assert set(row["seconds"]) == {"ours"}
        assert row["speedup"] == {}
        assert ("published" in row["errors"]) == (failure != "raises")
        assert failure != "not a number" or row["errors"]["published"] is None


@pytest.mark.parametrize("error", [0.0, 1e-4, float("nan"), None])
def test_an_op_that_fails_one_check_gives_no_rows_at_all(clock, tmp_path, monkeypatch, error):
    def measured() -> float:
        return error + 0.0  # None fails

    check = rows.Check("op", "a case of which there are no rows", measured, 1e-5)
    monkeypatch.setattr(sys.modules["bench.other"], "checks", lambda machine: [check])
    status, found = run(tmp_path, "all")
    assert (status, len(found)) == ((0, 3) if error == 0.0 else (1, 0))


def test_the_floor_is_the_longer_of_bytes_and_operations(small):
    x = torch.ones(1)
    contenders = {"ours": rows.Contender(lambda t: (t,), (x,), (x,))}
    about = {"op": "none", "part": "small", "mode": "forward", "label": "none"}

    def seconds(floor: rows.Floor) -> float:
        row = rows.compared(a_machine(), contenders, about, torch.float32, floor)
        assert row["of_matrix_rate"] == pytest.approx(floor.operations / 1e11 / row["seconds"]["ours"])
        return row["floor_seconds"]

    assert seconds(rows.Floor(10**10, 10**10)) == 1.0
    assert seconds(rows.Floor(10**10, 10**12)) == 10.0


def test_an_error_that_is_no_number_is_infinite():
    assert measure.relative_error([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")
    assert measure.relative_error([torch.ones(1)], [torch.ones(2)]) == float("inf")
    assert measure.relative_error([torch.tensor([1.5])], [torch.ones(1)]) == 0.5


# --- the time that there is -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the command's clock shows, and a suite of two cells whose rows take ten each."""
    shown = [0.0]

    def measured(machine: measure.Machine, names: str) -> rows.Rows:
        for name in names:
            shown[0] += 10
            yield {"name": name}

    cells = [
        rows.Cell(rows.Rank.SWEEP, "op", "sweep", "later", 1, lambda machine: measured(machine, "c")),
        rows.Cell(rows.Rank.STAGE, "op", "stage", "first", 2, lambda machine: measured(machine, "ab")),
    ]
    suite = types.SimpleNamespace(checks=lambda machine: (), cells=lambda kind, quick: cells)
    monkeypatch.setitem(sys.modules, "bench.other", suite)
    monkeypatch.setattr(command, "SUITES", ("other",))
    monkeypatch.setattr(command, "time", types.SimpleNamespace(monotonic=lambda: shown[0]))
    monkeypatch.setattr(measure.Machine, "_copy", lambda self: measure.Rate(1e10, 9e9, 9.5e9, 0.0))
    return shown


@pytest.mark.parametrize(
    ("suite", "options", "kept", "left"),
    [
        ("all", [], "abc", []),
        ("all", ["--budget", "21"], "abc", []),
        ("all", ["--budget", "20"], "ab", ["op sweep later: 1 of 1 rows"]),
        ("all", ["--budget", "5"], "a", ["op stage first: 1 of 2 rows", "op sweep later: 1 of 1 rows"]),
        ("other", [], "abc", []),
    ],
)
def test_budget(clock, tmp_path, capsys, suite, options, kept, left):
    """A row that is in progress is finished, the most telling come first, and what is left out is named."""
    status, found = run(tmp_path, suite, *options)
    assert (status, "".join(row["name"] for row in found)) == (0, kept)
    said = capsys.readouterr().out
    assert [line.strip() for line in said.splitlines() if line.startswith("  ")] == left
    assert ("left out, for the time was over" in said) == bool(left)


def test_all_has_a_budget_of_its_own(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "BUDGET", 5.0)
    assert len(run(tmp_path, "all")[1]) == 1
    assert len(run(tmp_path, "other")[1]) == 1 + 3
    assert command.BUDGET < 600


@pytest.mark.parametrize(
    "options", [["--budget", "0"], ["--budget", "nan"], ["--device", "tpu"], ["--out", f"{__file__}/rows.jsonl"]]
)
def test_options_that_mean_nothing_are_refused(clock, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["run", "all", *options])
    assert stopped.value.code == 2
    assert f"{options[0]} is" in capsys.readouterr().err


def test_the_other_commands(monkeypatch):
    called = []

    def stand_in(name: str) -> None:
        module = types.SimpleNamespace(main=lambda *args: called.append((name, *args)) or 3)
        monkeypatch.setitem(sys.modules, name, module)

    for name in ("bench.report", "bench.compare", "bench.compiled", "bench.compiled.report"):
        stand_in(name)
    bench = Path(command.__file__).parent
    assert command.main(["report"]) == 3
    assert command.main(["report", "--results", "a", "--out", "b", "--html", "c"]) == 3
    assert command.main(["compare", "a", "b"]) == 3
    assert command.main(["compiled", "--all", "--jobs", "2"]) == 3
    assert command.main(["compiled", "--report"]) == 3
    assert called == [
        ("bench.report", bench / "results", bench / "REPORT.md", bench / "report.html"),
        ("bench.report", Path("a"), Path("b"), Path("c")),
        ("bench.compare", Path("a"), Path("b")),
        ("bench.compiled", True, 2),
        ("bench.compiled.report", bench / "results" / "compiled.jsonl"),
    ]


# --- clocks and limits ----------------------------------------------------------------------------------------------


def test_contenders_are_timed_in_turns():
    order = []
    times = a_machine().interleaved([lambda: order.append("a"), lambda: order.append("b")], repeats=20)
    rounds = list(zip(order[::2], order[1::2], strict=True))
    assert len(times) == 2
    assert len(rounds) == 22
    assert set(rounds) == {("a", "b"), ("b", "a")}  # each once a round, in either order


def test_times_are_medians_with_quartiles():
    seconds = [1.0, 2.0, 3.0, 4.0, 100.0]
    random.Random(0).shuffle(seconds)
    assert measure.Times.of(seconds) == (3.0, 2.0, 4.0, 1.0)
    assert measure.Times.of([2.0]) == (2.0, 2.0, 2.0, 2.0)
    assert measure.Rate.of(12.0, measure.Times.of(seconds), 0.0) == (12.0, 3.0, 6.0, 0.0)


def test_repeats_fit_the_time(monkeypatch):
    now = itertools.count()  # each call takes a second
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: next(now)))
    calls = [lambda: None, lambda: None]
    assert a_machine().repeats(calls, seconds=40.0) == 20
    assert a_machine().repeats(calls, seconds=1.0) == 5
    assert a_machine().repeats(calls, seconds=1e6) == 60


def test_the_device_is_held_until_its_work_is_queued(monkeypatch):
    """A short call's device time must not be the host's time to launch it."""
    device = types.SimpleNamespace(until=0, host=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.until

        def query(self):
            return self.at <= device.host

        def synchronize(self):
            device.host = max(device.host, self.at)

        def elapsed_time(self, end):
            return float(end.at - self.at)

    def sleep(cycles):
        device.until = max(device.until, device.host) + cycles

    def call():
        device.host += 5 << 16  # queues for that long what takes 7 cycles
        device.until = max(device.until, device.host if device.until <= device.host else 0) + 7

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    timed = measure._Queued(call)
    assert timed() == timed() == 7e-3
    assert timed._hold == 8 << 16
    endless = measure._Queued(lambda: setattr(device, "host", device.until + 1))  # waits for the device itself
    endless()
    assert endless._hold == measure._Queued.MOST


def test_inputs_are_rotated_beyond_the_caches(monkeypatch):
    monkeypatch.setattr(measure, "BEYOND_CACHES", {"cuda": 1 << 14, "cpu": 0})
    given = (torch.arange(1024.0).view(32, 32).t(), torch.ones(1))
    turn = measure.rotated(given, torch.device("cuda"))
    taken = [turn() for _ in range(5)]
    assert len({x.data_ptr() for x, _ in taken[:4]}) == 4  # 4 KB each
    assert taken[4][0].data_ptr() == taken[0][0].data_ptr()
    assert all(torch.equal(x, given[0]) and x.stride() == given[0].stride() for x, _ in taken)
    assert given[0].data_ptr() not in {x.data_ptr() for x, _ in taken}
    turn = measure.rotated(given, torch.device("cpu"))
    assert turn()[0].data_ptr() == turn()[0].data_ptr()


def test_the_limits_are_the_most_seen(monkeypatch):
    machine = a_machine()
    work = []

    def interleaved(self, calls, repeats=24):
        work.extend(calls)
        calls[0]()
        return [measure.Times(0.5, 0.4, 1.0, 0.25)]

    monkeypatch.setattr(measure.Machine, "interleaved", interleaved)
    rate = machine.matrix(torch.float32)
    assert rate[:3] == (8 * 512**3, 2 * 512**3, 5 * 512**3)
    assert 0 < rate.error < 1e-5
    assert machine.matrix_rate(torch.float32) == rate.best
    assert machine.copy() == (2 * 2**29, 2 * 2**27, 5 * 2**27, 0.0)
    assert machine.bandwidth == machine.about()["copy_bandwidth"] == 2**30
    assert len(work) == 2  # each asked once


def test_device_rows_check_their_results(small, tmp_path, monkeypatch, capsys):
    status, found = run(tmp_path, "device")
    assert status == 0
    assert [(row["op"], row["rate"], row["spread"]) for row in found] == [
        ("copy", 1e10, [9e9, 9.5e9]),
        ("matmul", 1e11, [8e10, 9e10]),
    ]
    assert all(row["errors"]["ours"] <= row["tolerance"] for row in found)
    monkeypatch.setattr(measure.Machine, "_matrix", lambda self, dtype: measure.Rate(1e11, 8e10, 9e10, 1e-4))
    monkeypatch.setattr(measure.Machine, "_copy", lambda self: measure.Rate(1e11, 8e10, 9e10, 1.0))
    (tmp_path / "rows" / "bench.jsonl").unlink()
    assert run(tmp_path, "device") == (1, [])
    assert "WRONG, not kept: matmul float32" in capsys.readouterr().out


def test_peak_memory_is_the_most_that_is_held_at_once():
    machine, held = a_machine(), [torch.empty(1000)]

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


def test_what_was_held_before_does_not_count():
    """Where an earlier profile saw the same address in use, the profiler reports the release of what is there now."""
    machine, held, seen = a_machine(), [], []
    for _ in range(40):
        machine.extra_bytes(lambda: seen.append(torch.empty(4000)))
        seen.clear()
        held.append(torch.empty(4000))
        assert machine.extra_bytes(lambda: (held.clear(), torch.empty(2000))) == 4 * 2000


def test_only_replays_that_are_right_are_timed(capsys):
    """Of CUDA graphs; a stand-in captures."""

    class Graphs(measure.Machine):
        def captured(self, call):
            if call.func is refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
            results = tuple(torch.full_like(t, float("nan")) for t in call())
            return lambda: [into.copy_(t) for into, t in zip(results, call(), strict=True)], results

    def right(x):
        return (2 * x,)

    def wrong(x):  # in a graph
        return (2 * x if torch.is_grad_enabled() else x,)

    def refuses(x):
        return (2 * x,)

    x = torch.ones(3)
    contenders = {f.__name__: rows.Contender(f, (x,), (2 * x,)) for f in (right, wrong, refuses)}
    with torch.no_grad():
        times = rows._replayed(Graphs(torch.device("cpu"), "test"), contenders, 1e-5, repeats=5)
    assert set(times) == {"right"}
    said = capsys.readouterr().out
    assert "wrong has error 0.5 > 1e-05 in a graph" in said
    assert "refuses cannot be captured: RuntimeError: operation not permitted when stream is capturing\n" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="replays CUDA graphs")
def test_small_problems_are_replayed_as_graphs(small, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert command.main(["run", "all", "--quick", "--device", "cuda", "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    replayed = [row for row in found if row["part"] == "small"]
    assert {row["op"] for row in replayed} == {*region.OPS, relational.OP, bilinear.OP}
    assert all("ours" in row["graph_seconds"] for row in replayed)
    assert {row["stand_in"] for row in found if row["suite"] == "overhead"} == {False}
    assert {row["capability"] for row in found} == {".".join(map(str, torch.cuda.get_device_capability()))}


# --- regions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("suite", "own", "other"),
    [(region, "nodes", set()), (relational, "taps", {"table1"}), (bilinear, "cells", {"block"})],
)
def test_parts_of_a_full_run(suite, own, other, kind):
    cells = list(suite.cells(kind, quick=False))
    sweeps = {own, "channels", "batch"}
    assert {cell.part for cell in cells} == {"stage", "small"} | sweeps | other
    names = Counter(map(str, cells))
    assert max(names.values()) == 1
    for part, op in itertools.product(sweeps, {cell.op for cell in cells}):
        assert len([cell for cell in cells if (cell.part, cell.op) == (part, op)]) >= 3
    assert [cell.part for cell in suite.cells(kind, quick=True)] == ["small"] * len({cell.op for cell in cells})
    in_turn = sorted(cells, key=lambda cell: cell.rank)
    assert [part for part, _ in itertools.groupby(cell.part for cell in in_turn)][:2] == ["small", "stage"]


@pytest.mark.parametrize(("part", "value"), [("nodes", 4), ("channels", 3), ("batch", 2)])
def test_a_sweep_carries_its_quantity(small, part, value):
    forward, both = region._rows("region_pool", part, [replace(REGIONS, nodes=4)], torch.float32, a_machine())
    assert forward["part"] == both["part"] == part
    assert forward[part] == both[part] == value
    assert "graph_seconds" not in forward


def test_a_stage_has_every_contender(small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)
    problems = [replace(REGIONS, init=init) for init in region.INITS]
    found = list(region._rows("region_remap", "stage", problems, torch.float32, a_machine()))
    assert [(row["init"], row["mode"]) for row in found] == list(
        itertools.product(("center", "grid"), ("forward", "forward+backward"))
    )
    assert all(set(row["seconds"]) == {"ours", "published", "compiled"} for row in found)
    (cell, *_) = (cell for cell in region.cells("cpu", quick=False) if cell.part == "stage")
    assert cell.number == len(found)


def test_the_region_floor_counts_each_map_once_per_use():
    problem = region.Problem(2, 3, 5, 7)
    x, nodes, regions = problem.inputs(torch.float32, torch.device("cpu"))
    a, v, r = 4 * x.numel(), 4 * nodes.numel(), 4 * regions.numel()
    assert (a, v, r) == (4 * 210, 4 * 54, 4 * 72)
    pool, remap = (
        [problem.floor(op, backward, torch.float32, regions) for backward in (False, True)] for op in region.OPS
    )
    assert [floor.bytes for floor in pool] == [a + v + r, 3 * a + 2 * v + 3 * r]
    assert [floor.bytes for floor in remap] == [a + v + r, 2 * a + 3 * v + 3 * r]
    assert problem.floor("region_pool", False, torch.bfloat16, regions).bytes == (a + v) // 2 + r
    cells = int((region.published_kernel(regions, 5, 7) > 0).sum())
    assert 0 < cells < 2 * 9 * 35  # where a region does not reach nothing needs to be computed
    assert [floor.operations for floor in pool + remap] == [2 * 3 * cells, 6 * 3 * cells] * 2


# --- relational attention -------------------------------------------------------------------------------------------


def test_a_relational_row_describes_itself(small, tmp_path):
    status, found = run(tmp_path, "relational", "--quick")
    assert status == 0
    assert [(row["part"], row["mode"]) for row in found] == [("small", "forward"), ("small", "forward+backward")]
    for row in found:
        assert set(row) == COMPARED | MACHINE | {"batch", "queries", "channels", "window", "taps"}
        assert row["label"] == "B 2, L 2, C 3, 2x3x4, window 3x3x3"
        assert row["shape"] == [2, 2, 3, 2, 3, 4]
        assert (row["batch"], row["queries"], row["channels"], row["taps"]) == (2, 2, 3, 27)
        assert set(row["seconds"]) == set(row["extra_bytes"]) == {"ours", "published"}
        assert max(row["errors"].values()) < 1e-5
        assert min(row["extra_bytes"].values()) >= 4 * CLIPS.positions * CLIPS.queries * CLIPS.channels


def test_every_relational_part_is_measured(small):
    taps, both_taps = relational._rows("taps", CLIPS, torch.float32, a_machine())
    assert (taps["part"], taps["taps"], set(taps["seconds"])) == ("taps", 27, {"ours", "published"})
    assert both_taps["operations"] == 3 * taps["operations"]
    for row in relational._rows("table1", replace(CLIPS, batch=1), torch.float32, a_machine()):
        assert set(row["seconds"]) == {"ours", "multi-query", "efficient", "vanilla"}
        assert row["queries_of"] == {"ours": 2, "vanilla": 1, "efficient": 1, "multi-query": 2}
        assert row["channels_of"] == {"ours": 3, "vanilla": 6, "efficient": 6, "multi-query": 3}
        assert max(row["errors"].values()) < 1e-5


def test_the_problems_of_a_full_relational_run():
    def problems(kind: str, part: str) -> list[relational.Problem]:
        cells = sorted(relational.cells(kind, quick=False), key=lambda cell: cell.rank)
        return [cell.rows.args[1] for cell in cells if cell.part == part]

    stages = [(problem.channels, problem.size) for problem in problems("cuda", "stage")]
    once = [(c, (8, s, s)) for c, s in ((8, 56), (16, 28), (32, 14), (64, 7))]
    assert stages == [*once, *once, *((c, (16, s, s)) for c, (_, s, _) in once)]  # bfloat16, float32, longer
    assert [problem.taps for problem in problems("cpu", "taps")] == [27, 75, 147, 245, 405]
    assert [problem.channels for problem in problems("cpu", "channels")] == [8, 16, 32, 64]
    assert [problem.batch for problem in problems("cpu", "batch")] == [1, 2, 4]
    assert [problem.size[0] for problem in problems("cpu", "stage")] == [8] * 4


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
    tensors = relational.Transform(relational.ours, CLIPS).inputs(torch.float32, torch.device("cpu"))
    projected, gradient, *weights = (4 * t.numel() for t in tensors)
    assert CLIPS.floor_bytes(4, False) == projected + sum(weights) + gradient
    assert CLIPS.floor_bytes(4, True) == 3 * (projected + sum(weights)) + 2 * gradient
    assert CLIPS.floor_bytes(2, True) == CLIPS.floor_bytes(4, True) // 2


# --- bilinear transform ---------------------------------------------------------------------------------------------


def test_a_bilinear_row_describes_itself(small, tmp_path):
    status, found = run(tmp_path, "bilinear", "--quick")
    assert status == 0
    assert [(row["part"], row["mode"]) for row in found] == [("small", "forward"), ("small", "forward+backward")]
    for row in found:
        assert set(row) == COMPARED | MACHINE | {"batch", "channels", "cells", "k", "tk", "ts"}
        assert (row["suite"], row["op"], row["dtype"]) == ("bilinear", "bilinear_transform", "float32")
        assert row["label"] == "B 2, C 6, 8x6x9, k 2, tk 3, ts 4, window 3"
        assert row["shape"] == [2, 6, 8, 6, 9]
        assert (row["batch"], row["channels"], row["cells"]) == (2, 6, 3)
        assert (row["k"], row["tk"], row["ts"]) == (2, 3, 4)
        assert set(row["seconds"]) == set(row["extra_bytes"]) == {"ours", "published"}
        assert max(row["errors"].values()) < 1e-5
        assert min(row["extra_bytes"].values()) >= 4 * 2 * 6 * 8 * 6 * 9
    clip, matrices = 4 * 2 * 6 * 8 * 6 * 9, 4 * (2 * 2 * 2 * 8 * 9 + 2 * 3 * 16)
    assert [row["output_bytes"] for row in found] == [clip, 2 * clip + matrices]


def test_every_bilinear_part_is_measured(small, monkeypatch):
    for part, value in (("cells", 3), ("channels", 6), ("batch", 2)):
        forward, both = bilinear._rows(part, MAPS, torch.float32, a_machine())
        assert forward["part"] == both["part"] == part
        assert forward[part] == both[part] == value
        assert set(both["seconds"]) == {"ours", "published"}
        assert both["operations"] == 3 * forward["operations"]
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)
    for problem in (MAPS, replace(MAPS, tk=0), replace(MAPS, frames=1)):
        forward, both = bilinear._rows("stage", problem, torch.float32, a_machine())
        assert set(forward["seconds"]) == set(both["seconds"]) == {"ours", "published", "compiled"}
        assert (both["tk"], both["ts"]) == ((3, min(4, problem.frames)) if problem.tk else (0, 0))
        assert ("tk 0, window" in both["label"]) == (problem.tk == 0)


def test_the_problems_of_a_full_bilinear_run():
    def problems(kind: str, part: str) -> list[bilinear.Problem]:
        cells = sorted(bilinear.cells(kind, quick=False), key=lambda cell: cell.rank)
        return [cell.rows.args[1] for cell in cells if cell.part == part]

    sizes = [(8, 256, 8, 28, 28), (8, 512, 8, 14, 14), (8, 512, 4, 28, 28), (64, 256, 1, 56, 56)]
    wanted = [(size, k, tk) for k in (8, 4) for size in sizes for tk in (4, 0)]
    stages = problems("cuda", "stage")
    assert [(problem.shape, problem.k, problem.tk) for problem in stages] == wanted * 2  # bfloat16, float32
    assert {(problem.frames, problem.ts) for problem in stages if problem.tk} == {(8, 4), (4, 4), (1, 1)}
    assert {problem.cells for problem in stages} == {7}
    assert (1, 128, 8, 28, 28) in {problem.shape for problem in problems("cpu", "stage")}
    for kind in ("cuda", "cpu"):
        assert [problem.cells for problem in problems(kind, "cells")] == [4, 7, 8, 14]
        for problem in problems(kind, "cells"):
            assert problem.height % problem.cells == problem.width % problem.cells == 0
    assert [problem.channels for problem in problems("cpu", "channels")] == [32, 64, 128]
    assert [problem.batch for problem in problems("cpu", "batch")] == [1, 2, 4]


def test_a_stage_beyond_the_cache_has_maps_that_are():
    """By the bound of bench/targets.json, which is that of a region op's three maps."""
    for problem, tk, itemsize in itertools.product(bilinear.STAGES["cuda"], bilinear.MIXES, (2, 4)):
        a_map = itemsize * torch.Size(problem.shape).numel()
        forward, both = (replace(problem, tk=tk).floor(backward, itemsize).bytes for backward in (False, True))
        assert (both >= 150e6) == (a_map >= 50e6)
        assert forward < 150e6 or a_map >= 50e6


def test_the_bilinear_floor_counts_every_tensor_once_per_use():
    x, gradient, p, q, t = (4 * tensor.numel() for tensor in MAPS.inputs(torch.float32, CPU))
    assert x == gradient
    forward, both = (MAPS.floor(backward, 4) for backward in (False, True))
    assert forward.bytes == 2 * x + p + q + t
    assert both.bytes == 5 * x + 3 * (p + q + t)
    assert MAPS.floor(True, 2).bytes == both.bytes // 2
    assert both.operations == 3 * forward.operations == 3 * 2 * (x // 4) * (3 + 3 + 4)
    unmixed = replace(MAPS, tk=0).floor(True, 4)
    assert (unmixed.bytes, unmixed.operations) == (both.bytes - 3 * t, 3 * 2 * (x // 4) * (3 + 3))


def test_the_inputs_are_as_a_layer_predicts_them():
    x, gradient, p, q, t = MAPS.inputs(torch.float32, CPU)
    assert (x.shape, p.shape, q.shape, t.shape) == ((2, 6, 8, 6, 9), (2, 2, 8, 3, 3), (2, 2, 8, 3, 3), (2, 3, 4, 4))
    for weights, dim in ((p, -1), (q, -2), (t, -1)):
        torch.testing.assert_close(weights.sum(dim), torch.ones_like(weights.sum(dim)))
    assert not torch.equal(x, gradient)
    assert len(replace(MAPS, tk=0).inputs(torch.float32, CPU)) == 4


PROBLEMS = [MAPS, replace(MAPS, tk=0), replace(MAPS, frames=1), replace(MAPS, height=3, k=3, tk=1), bilinear.SMALL]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.label)
def test_the_published_bilinear_formulation_is_right(problem):
    """Output and every gradient, in float64."""
    given = tuple(tensor.double() for tensor in problem.inputs(torch.float32, CPU))
    with dt.backend("reference"):
        wanted = bilinear._step(bilinear.ours, True, *given)
    found = bilinear._step(bilinear.published, True, *given)
    assert len(found) == len(wanted) == (5 if problem.tk else 4)
    assert measure.relative_error(found, wanted) < 1e-12
    assert found[0].is_contiguous()


def kron_the_other_way(x, p, q, t):
    """kron(I, P): a coarse row is every third."""
    down = x.unflatten(3, (3, -1)).transpose(3, 4).flatten(3, 4)
    y = dt.ops.bilinear_transform(down, p, q, t)
    return y.unflatten(3, (-1, 3)).transpose(3, 4).flatten(3, 4)


MUTATIONS = {
    "P transposed": lambda x, p, q, t: dt.ops.bilinear_transform(x, p.mT, q, t),
    "Q transposed": lambda x, p, q, t: dt.ops.bilinear_transform(x, p, q.mT, t),
    "T transposed": lambda x, p, q, t: dt.ops.bilinear_transform(x, p, q, t.mT),
    "P and Q changed": lambda x, p, q, t: dt.ops.bilinear_transform(x, q, p, t),
    "kron the other way": kron_the_other_way,
    "groups in turns": lambda x, p, q, t: dt.ops.bilinear_transform(x, p.flip(1), q, t),
    "frames in turns": lambda x, p, q, t: dt.ops.bilinear_transform(x, p.flip(2), q, t),
    "no T": lambda x, p, q, t: dt.ops.bilinear_transform(x, p, q) + 0 * t.sum(),
    "no gradient of T": lambda x, p, q, t: dt.ops.bilinear_transform(x, p, q, t.detach()) + 0 * t.sum(),
    "no gradient of Q": lambda x, p, q, t: dt.ops.bilinear_transform(x, p, q.detach(), t) + 0 * q.sum(),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_published_bilinear_formulation_tells_a_wrong_op(small, monkeypatch, mutation):
    given = MAPS.inputs(torch.float32, CPU)
    published = bilinear._step(bilinear.published, True, *given)
    assert measure.relative_error(bilinear._step(bilinear.ours, True, *given), published) < 1e-5
    wrong = bilinear._step(MUTATIONS[mutation], True, *given)
    assert measure.relative_error(wrong, published) > 1e-2
    right = bilinear.ours
    chosen = MUTATIONS[mutation]
    monkeypatch.setattr(
        bilinear, "ours",
        lambda *args: (right if dispatch.current_backend() == "reference" else chosen)(*args),
    )  # fmt: skip
    (check, _) = bilinear.checks(a_machine())
    assert not check.error() <= check.tolerance


def test_matrices_are_written_out_in_blocks():
    m = torch.randn(2, 3, 3)
    for times in (1, 2, 5):
        wanted = torch.stack([torch.kron(one, torch.eye(times)) for one in m])
        assert torch.equal(bilinear.written_out(m, times), wanted)


# A block whose maps are one window of coarse cells, as the measured ones are.
BLOCKS = [bilinear.Block(replace(MAPS, tk=2, channels=8)), bilinear.Block(replace(MAPS, tk=0))]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.label)
def test_the_block_is_the_published_one(block):
    """By every parameter's gradient, in float64."""
    module, given = block.module(CPU).double(), [tensor.double() for tensor in block.inputs(CPU)]
    with dt.backend("reference"):
        wanted = bilinear._block_step(bilinear.our_block, module, True, *given)
    found = bilinear._block_step(bilinear.published_block, module, True, *given)
    assert len(found) == 2 + len(list(module.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert bilinear._block_error(wanted, found) < 1e-9
    scale = wanted[0].norm()
    for i, tensor in enumerate(wanted):  # an error of any result shows
        if tensor.norm() > 1e-9 * scale:
            spoilt = [*found]
            spoilt[i] = tensor * 1.02
            assert bilinear._block_error(wanted, tuple(spoilt)) > 1e-5, i


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.label)
def test_rows_of_the_block(small, block):
    forward, both = bilinear._block_rows(block, a_machine())
    n = block.inner
    for row in (forward, both):
        assert (row["suite"], row["op"], row["part"]) == ("bilinear", "bilinear_transform", "block")
        assert row["shape"] == [2, 2 * n.channels, 8, 6, 9]
        assert (row["channels"], row["k"], row["tk"]) == (2 * n.channels, n.k, n.tk)
        assert row["label"].startswith(f"BATBlock, B 2, C {2 * n.channels}, 8x6x9, ")
        assert set(row["seconds"]) == {"ours", "published"}
    assert both["operations"] == 3 * forward["operations"]
    x, parameters = 4 * 2 * 2 * n.channels * 8 * 54, 4 * sum(p.numel() for p in block.module(CPU).parameters())
    assert (forward["floor_bytes"], both["floor_bytes"]) == (2 * x + parameters, 5 * x + 3 * parameters)
    assert both["output_bytes"] == 2 * x + parameters


def test_the_operations_of_the_block_are_those_of_its_products():
    """Of convolutions as torch counts them, and of the transform the floor's."""
    from torch.utils.flop_counter import FlopCounterMode

    for block in BLOCKS:
        module, (x, _) = block.module(CPU), block.inputs(CPU)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            module(x)
        counts = counted.get_flop_counts()["Global"]
        convolutions = sum(n for op, n in counts.items() if "conv" in str(op))
        assert convolutions == block.floor(False, module).operations - block.inner.floor(False, 4).operations


def test_a_wrong_block_is_not_kept(small, monkeypatch, capsys):
    """By another matrix: what scales the op's result alone is undone by the norm behind it."""

    def transposed(call: Callable) -> Callable:
        def wrong(x, p, q, t):
            return call(x, p if dispatch.current_backend() == "reference" else p.mT, q, t)

        return wrong

    (block, _) = BLOCKS
    right = dt.ops.bilinear_transform
    monkeypatch.setattr(dt.ops, "bilinear_transform", transposed(right))
    assert list(bilinear._block_rows(block, a_machine())) == [None, None]
    assert "WRONG, not kept: bilinear_transform block forward BATBlock" in capsys.readouterr().out
    monkeypatch.setattr(dt.ops, "bilinear_transform", right)
    monkeypatch.setattr(bilinear, "published", transposed(bilinear.published))
    for row in bilinear._block_rows(block, a_machine()):
        assert set(row["seconds"]) == {"ours"}
        assert row["errors"]["published"] > row["tolerance"]


def test_the_block_of_the_target_is_measured():
    first = bilinear.BLOCKS["cpu"][0].about()
    assert {"k": 8, "tk": 4, "ts": 4, "shape": [1, 256, 8, 28, 28]}.items() <= first.items()
    for kind in ("cpu", "cuda"):
        blocks = [cell.rows.args[0] for cell in bilinear.cells(kind, quick=False) if cell.part == "block"]
        assert blocks == bilinear.BLOCKS[kind]
        for block in blocks:  # of one window of coarse cells: that is all that the published formulation here has
            assert block.inner.height == block.inner.width
            assert block.inner.height % block.inner.cells == 0


def test_a_block_starts_the_same_every_time():
    (block, _) = BLOCKS
    state = torch.random.get_rng_state()
    first, second = block.module(CPU).state_dict(), block.module(CPU).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- launch overhead ------------------------------------------------------------------------------------------------


@pytest.fixture
def overhead(small) -> types.ModuleType:
    from bench import overhead

    return overhead


@pytest.fixture
def standin(overhead) -> None:
    reason = overhead._no_standin()
    if reason is not None:
        pytest.skip(reason)


def test_launch_overhead_with_a_stand_in(overhead, standin, tmp_path):
    status, found = run(tmp_path, "overhead")
    assert status == 0
    assert [row["mode"] for row in found] == list(overhead.MODES)
    for row in found:
        assert (row["op"], row["suite"], row["stand_in"], row["launches"]) == ("region_kernel", "overhead", True, 1)
        assert row["goal_seconds"] == (25e-6 if row["mode"] == "forward with gradient" else None)
        assert (row["errors"], row["tolerance"]) == ({"ours": 0}, 0)
        low, high = row["host_spread"]["ours"]
        assert low <= row["host_seconds"]["ours"] <= high
        assert sum(row["spent"].values()) == pytest.approx(row["host_seconds"]["ours"])
        assert all(seconds > 0 for seconds in row["spent"].values())
    assert not dispatch.can_run("triton", device="cpu", dtype=torch.float32)  # the stand-in is gone


def test_a_launch_unlike_tritons_own_is_not_kept(overhead, standin, tmp_path, monkeypatch, capsys):
    direct = launch.Launch._launch

    def careless(self, args):
        direct(self, tuple(arg + 1 if isinstance(arg, float) else arg for arg in args))

    monkeypatch.setattr(launch.Launch, "_launch", careless)
    status, found = run(tmp_path, "overhead")
    assert (status, found) == (1, [])
    assert "WRONG, not kept: region_kernel launch forward has error 1 > 0" in capsys.readouterr().out


def test_a_stand_in_that_sees_no_launch_proves_nothing(overhead, standin, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, *args: None)
    assert run(tmp_path, "overhead") == (1, [])


class PretendedGpu(measure.Machine):
    cuda = True

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize(
    "op", ["region_kernel", "region_pool", "region_remap", "relational_attention", "bilinear_transform"]
)
def test_launch_overhead_on_a_gpu(overhead, op):
    """The same code on the CPU: results are checked, and the published formulation takes part."""
    found = list(overhead._rows(op, PretendedGpu(torch.device("cpu"), "test")))
    assert [row["mode"] for row in found] == list(overhead.MODES)
    for row in found:
        assert set(row["host_seconds"]) == set(row["host_spread"]) == {"ours", "published"}
        assert 0 < row["errors"]["ours"] < row["tolerance"] == 1e-5
        assert row["stand_in"] is False


def test_launch_overhead_of_a_wrong_op_is_not_kept(overhead, monkeypatch):
    monkeypatch.setattr(dt.ops, "region_kernel", doubtful(dt.ops.region_kernel))
    machine = PretendedGpu(torch.device("cpu"), "test")
    assert list(overhead._rows("region_kernel", machine)) == [None] * 3


def test_no_launch_overhead_without_a_stand_in(overhead, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "_no_standin", lambda: "there is no C compiler")
    assert list(overhead.cells("cpu", quick=True)) == []
    assert "no launch overhead is measured: there is no C compiler" in capsys.readouterr().out
    assert len(list(overhead.cells("cuda", quick=True))) == 1


def test_the_host_does_not_wait_between_batches(overhead):
    events = []
    overhead.host_times(lambda: events.append("call"), lambda: events.append("drain"), seconds=0)
    batches = [(what, len(list(run))) for what, run in itertools.groupby(events)]
    assert set(batches) == {("call", overhead.BATCH), ("drain", 1)}
    assert len(batches) == 2 * (3 + 10)


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_samples_tell_what_time_is_spent_on(overhead, monkeypatch):
    def one() -> None:
        busy(1e-4)

    def other() -> None:
        busy(5e-4)

    here = ("one", __file__, ("one",)), ("other", __file__, ("other",))
    monkeypatch.setattr(overhead, "_PLACES", here)

    def call() -> None:
        one()
        other()
        busy(1e-4)

    counts = overhead.samples(call, lambda: busy(2e-3), seconds=0.4)
    assert set(counts) == {"one", "other", "rest"}
    assert counts["other"] > 2 * counts["one"]
    assert counts["other"] > 2 * counts["rest"]  # what is between the batches does not count
    assert counts.total() > 100
