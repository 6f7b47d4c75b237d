"""bench/targets.json says what speed was promised; rows decide it."""

import json
import math
import re

import pytest
from bench_rows import CPU, GPU, everything, overhead, static, timed

from bench.report import main, targets
from bench.report.tables import target_table

OLD = {**GPU, "capability": "8.0"}


def target(**changed):
    found = {
        "id": "fast", "op": "region_pool", "machine": "cpu", "where": {}, "quantity": "speedup.published",
        "relation": ">=", "value": 2, "from": "somebody",
    }  # fmt: skip
    return {**found, **changed}


def file(path, *entries, **changed):
    machines = {
        "cpu": {"kind": "cpu"},
        "h200-class": {"kind": "cuda", "capability": ["9.0"]},
        "code": {"suite": "compiled"},
    }
    path.write_text(json.dumps({"schema": 1, "about": "", "machines": machines, "targets": list(entries), **changed}))
    return path


@pytest.fixture
def loaded(tmp_path):
    """The one target with these fields."""
    return lambda **changed: targets.load(file(tmp_path / "targets.json", target(**changed)))[0]


def row(speedup, **changed):
    return timed(CPU, seconds={"ours": 1e-3, "published": speedup * 1e-3}, label=f"{speedup:g}", **changed)


# --- the file of the repository -------------------------------------------------------------------------------------


def test_every_target_of_an_op_that_is_here_can_be_decided():
    compiled = [static(kind=kind) for kind in ("gather", "scatter")]
    compiled += [static(op="relational_attention", kind="by_h1"), static(op="bilinear_transform", kind="mix")]
    rows = [*everything(GPU), *everything(CPU), *compiled]
    found = targets.load()
    assert [t.id for t in found if all(t.measured(row) is None for row in rows)] == []
    assert {t.id for t in found if any(t.concerns(row) for row in [timed(OLD)])} == {"launch-overhead"}


def test_what_the_ops_were_asked_for():
    asked = {t.id: (t.relation, t.value) for t in targets.load()}
    assert asked["region-bandwidth"] == (">=", 0.85)
    assert asked["relational-eager"] == (">=", 15)
    assert asked["relational-compiled"] == (">=", 8)
    assert asked["relational-matrix-rate-64"] == (">=", 0.3)
    assert asked["bilinear-bandwidth"] == (">=", 0.8)
    assert asked["bilinear-eager"] == (">=", 4)
    assert asked["bilinear-compiled"] == (">=", 2)
    assert asked["bilinear-eager-temporal"] == (">=", 10)
    assert asked["bilinear-memory"] == ("<=", 1.05)
    assert asked["bilinear-cpu-block"] == (">=", 2)
    assert asked["launch-overhead"] == ("<=", 25e-6)


def test_targets_take_the_rows_that_they_are_about():
    found = {t.id: t for t in targets.load()}
    stage = {
        "op": "relational_attention",
        "shape": [8, 8, 64, 8, 7, 7],
        "channels": 64,
        "dtype": "bfloat16",
        "tolerance": 1e-2,
    }
    assert found["relational-matrix-rate-64"].measured(timed(GPU, **stage)) is not None
    for other in ({"dtype": "float32"}, {"channels": 32}, {"mode": "forward"}, {"part": "batch", "batch": 8}):
        assert found["relational-matrix-rate-64"].measured(timed(GPU, **{**stage, **other})) is None
    assert found["relational-matrix-rate-64"].measured(timed(CPU, **{**stage, "dtype": "float32"})) is None
    beyond, within = (timed(GPU, floor_bytes=size) for size in (200_000_000, 100_000_000))
    assert found["region-bandwidth"].measured(beyond) == beyond["of_floor"]
    assert found["region-bandwidth"].measured(within) is None
    assert (
        found["region-eager-in-cache"].measured(within)
        == within["wall_seconds"]["published"] / within["wall_seconds"]["ours"]
    )
    assert found["region-memory"].measured(timed(GPU, output_bytes=2**21)) == 0.5
    assert found["region-memory"].measured(timed(GPU)) is None
    assert found["launch-overhead"].measured(overhead(GPU)) == 3e-5
    assert found["launch-overhead"].measured(overhead(CPU)) is None  # without a driver it says too little
    assert found["launch-overhead"].measured(overhead(GPU, "backward")) is None


def test_targets_take_the_bilinear_rows_that_they_are_about():
    found = {t.id: t for t in targets.load() if t.op == "bilinear_transform"}
    stage = {"op": "bilinear_transform", "shape": [8, 256, 8, 28, 28], "k": 8, "tk": 4, "ts": 4}

    def decided(machine, **changed):
        row = timed(machine, **{**stage, "output_bytes": 2**20, **changed})
        return {t.id for t in found.values() if t.measured(row) is not None}

    mixed, plain = {"bilinear-eager-temporal", "bilinear-memory"}, {"bilinear-eager", "bilinear-compiled"}
    assert decided(GPU) == mixed
    assert decided(GPU, mode="forward") == mixed
    assert decided(GPU, tk=0, ts=0) == plain | {"bilinear-memory"}
    assert decided(GPU, floor_bytes=200_000_000) == mixed | {"bilinear-bandwidth"}
    assert decided(GPU, part="block") == decided(GPU, part="cells", cells=7) == decided(OLD) == set()
    assert decided(GPU, op="region_pool") == set()
    assert decided(CPU) == decided(CPU, part="small") == {"bilinear-cpu"}
    assert decided(CPU, mode="forward") == set()
    assert decided(CPU, part="block") == {"bilinear-cpu", "bilinear-cpu-block"}
    for other in ({"k": 4}, {"tk": 0}, {"shape": [1, 512, 8, 14, 14]}, {"shape": [1, 256, 4, 28, 28]}):
        assert decided(CPU, part="block", **other) == {"bilinear-cpu"}
    slower = timed(CPU, **stage, seconds={"ours": 1.2, "published": 1.0})
    assert not found["bilinear-cpu"].met_by(found["bilinear-cpu"].measured(slower))
    code = found["bilinear-tensor-cores"]
    for kind in ("forward", "backward", "mix", "mix_backward"):
        row = static(op="bilinear_transform", kind=kind, dtype="bfloat16", tensor_core=0)
        assert code.measured(row) == 0
        assert not code.met_by(0)
        assert code.measured({**row, "dtype": "float32"}) is None


# --- what decides ---------------------------------------------------------------------------------------------------


def test_the_worst_case_decides(loaded):
    (verdict,) = targets.judge([loaded()], [row(3), row(1.5), row(8)])
    assert (verdict.status, verdict.measured, verdict.ratio, verdict.met, verdict.rows) == ("missed", 1.5, 0.75, 2, 3)
    assert verdict.worst["label"] == "1.5"
    (verdict,) = targets.judge([loaded()], [row(3), row(2)])
    assert (verdict.status, verdict.measured, verdict.ratio) == ("met", 2, 1)
    (verdict,) = targets.judge([loaded(relation="<=", value=4)], [row(3), row(8)])
    assert (verdict.status, verdict.measured, verdict.ratio, verdict.met) == ("missed", 8, 0.5, 1)


def test_what_no_row_decides_is_not_measured(loaded):
    for found in ([timed(CPU, op="region_remap")], [timed(CPU, seconds={"ours": 1.0})]):
        (verdict,) = targets.judge([loaded()], found)
        assert (verdict.status, verdict.worst) == ("not measured yet", None)
    assert targets.judge([loaded()], [timed(GPU)]) == []  # which this machine cannot decide


def test_the_worst_comes_first_and_the_unmeasured_last(loaded):
    entries = [
        loaded(id="unmeasured", op="none"),
        loaded(id="met"),
        loaded(id="missed", value=30),
        loaded(id="near", value=4),
    ]
    verdicts = targets.judge(entries, [row(3)])
    assert [v.target.id for v in verdicts] == ["missed", "near", "met", "unmeasured"]
    lines = target_table(verdicts).rows
    assert [line[6] for line in lines] == ["missed", "missed", "met", "not measured yet"]
    assert list(lines[0]) == [
        "missed", "region_pool", "`speedup.published`", "≥ 30x", "3.00x", "0.10", "missed", "0 of 1",
        "3, float32, forward+backward",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("quantity", "wanted"),
    [
        ("speedup.published", 2.0),
        ("extra_bytes.ours / extra_bytes.published", 1 / 3),
        ("shape.1", 64),
        ("shape.4", None),
        ("speedup.vanilla", None),
        ("shape.first", None),
        ("shape", None),
        ("label", None),
        ("extra_bytes.ours / zero", None),
        ("missing.deep.down", None),
    ],
)
def test_quantities(loaded, quantity, wanted):
    assert loaded(quantity=quantity).measured(timed(CPU, zero=0)) == wanted


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ({}, True),
        ({"part": "stage"}, True),
        ({"part": ["small", "stage"]}, True),
        ({"part": ["small"]}, False),
        ({"part": "stage", "shape.1": 64}, True),
        ({"part": "stage", "shape.1": 65}, False),
        ({"floor_bytes": {"min": 10_000_000, "max": 10_000_000}}, True),
        ({"floor_bytes": {"min": 10_000_001}}, False),
        ({"floor_bytes": {"max": 9_999_999}}, False),
        ({"missing": {"min": 0}}, False),
        ({"missing": "value"}, False),
    ],
)
def test_conditions(loaded, where, fits):
    assert (loaded(where=where).measured(timed(CPU)) is not None) == fits


def test_an_op_a_list_of_ops_or_any(loaded):
    for op, fits in (
        ("region_pool", True),
        (["a", "region_pool"], True),
        ("*", True),
        ("region", False),
        (["a"], False),
    ):
        assert (loaded(op=op).measured(timed(CPU)) is not None) == fits


def test_a_promise_of_nothing_is_met_by_nothing(loaded):
    spills = loaded(op="*", machine="code", quantity="spills", relation="<=", value=0)
    assert [(spills.met_by(n), spills.ratio(n)) for n in (0, 8)] == [(True, 1), (False, 0)]
    assert loaded(relation="<=").ratio(0) == math.inf


def test_values_are_written_in_their_unit(loaded):
    def written(quantity, value, relation=">="):
        found = loaded(quantity=quantity, value=value, relation=relation)
        return found.wanted, found.written(value)

    assert written("of_floor", 0.85) == ("≥ 85 %", "85 %")
    assert written("speedup.compiled", 8) == ("≥ 8x", "8.00x")
    assert written("seconds.ours / seconds.published", 1.1, "<=") == ("≤ 1.1", "1.1")
    assert written("host_seconds.ours", 25e-6, "<=") == ("≤ 25.0 µs", "25.0 µs")
    assert written("spills", 0, "<=") == ("≤ 0", "0")


# --- a file that is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"note": "x"}, "target 1 (fast) has 'note', which is unknown; a target has from, id, "),
        ({"id": ""}, "id is '', not a text"),
        ({"op": []}, "op is []; accepted are an op, a list of them"),
        ({"op": 3}, "op is 3;"),
        ({"machine": "tpu"}, "machine is 'tpu'; accepted are code, cpu, h200-class"),
        ({"relation": ">"}, "relation is '>'; accepted are >= and <="),
        ({"value": "2"}, "value is '2'; accepted is a number"),
        ({"value": float("nan")}, "value is nan; accepted is a number"),
        ({"quantity": "a / b / c"}, "quantity is 'a / b / c'; accepted are FIELD and FIELD / FIELD"),
        ({"quantity": "a/ b"}, "quantity is 'a/ b'"),
        ({"where": []}, "where is []; accepted are conditions by field"),
        ({"where": {"n": {"least": 1}}}, "where: n is {'least': 1}; accepted are numbers min and max"),
        ({"where": {"n": {"min": "1"}}}, "where: n is {'min': '1'}; accepted are numbers min and max"),
    ],
)
def test_a_wrong_target_is_an_error(tmp_path, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        targets.load(file(tmp_path / "targets.json", target(**changed)))


def test_a_wrong_file_is_an_error(tmp_path):
    path = tmp_path / "targets.json"
    lacking = target()
    del lacking["from"]
    for entries, changed, message in (
        ([lacking], {}, "lacks 'from'"),
        ([target(), target()], {}, "id fast stands there more than once"),
        (["fast"], {}, "target 1 is 'fast'; accepted is an object"),
        ([], {"schema": 2}, "schema is 2; accepted is 1"),
        ([], {"extra": 1}, "must have the fields about, machines, schema, targets"),
        ([], {"machines": []}, "machines is"),
        ([], {"targets": {}}, "targets is {}; accepted is a list"),
        ([], {"machines": {"cpu": 1}}, "machine 'cpu' is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            targets.load(file(path, *entries, **changed))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"targets\.json is not JSON"):
        targets.load(path)


def test_a_report_with_a_wrong_file_is_refused(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(timed(CPU)))
    wrong = file(tmp_path / "targets.json", target(value=None))
    assert main(tmp_path, tmp_path / "R.md", tmp_path / "r.html", targets=wrong) == 1
    assert "value is None; accepted is a number" in capsys.readouterr().err
    assert not (tmp_path / "R.md").exists()


def test_the_report_judges_each_machine_by_its_own_rows(tmp_path):
    pytest.importorskip("matplotlib")
    entries = [target(), target(id="gpu", machine="h200-class", value=9), target(id="nobody", op="none")]
    rows = [row(3), timed(GPU), timed(OLD)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "R.md"
    assert main(tmp_path, out, tmp_path / "r.html", targets=file(tmp_path / "targets.json", *entries)) == 0
    text = out.read_text()
    assert "| fast | region_pool | `speedup.published` | ≥ 2x | 3.00x | 1.5 | met | 1 of 1 |" in text
    assert "| gpu | region_pool | `speedup.published` | ≥ 9x | 2.00x | 0.22 | missed | 0 of 1 |" in text
    assert text.count("### Targets") == 2  # capability 8.0 is no machine of a target
    unmeasured = text.split("## Targets that are not measured yet")[1]
    assert "| nobody | none | cpu | `speedup.published` | ≥ 2x | somebody |" in unmeasured
    assert "| gpu |" not in unmeasured
