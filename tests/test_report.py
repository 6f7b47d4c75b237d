"""The report says what the rows say, of one machine at a time, and nothing of rows that were not checked."""

import json
import math
import re
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest
from bench_rows import CPU, GPU, device, everything, overhead, static, timed, write

from bench import report
from bench.report import document, html, markdown, plots, rows

NAN = math.nan


@pytest.fixture
def written(tmp_path):
    """Writes rows, one file for each list, and their report: exit status, Markdown, HTML."""
    pytest.importorskip("matplotlib")

    def main(*files, **options):
        for number, found in enumerate(files):
            write(tmp_path / "results" / f"rows{number}.jsonl", found)
        out = tmp_path / "bench" / "REPORT.md", tmp_path / "bench" / "report.html"
        status = report.main(tmp_path / "results", *out, **options)
        return status, *(path.read_text() if path.exists() else "" for path in out)

    return main


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a report of two machines, every suite and compiled code."""
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("whole")
    write(path / "results" / "both.jsonl", [*everything(GPU), *everything(CPU)])
    write(path / "results" / "compiled.jsonl", [static("sm_80"), static("sm_90"), static("gfx942", spills=12)])
    assert report.main(path / "results", path / "bench" / "REPORT.md", path / "bench" / "report.html") == 0
    return path / "bench"


def section(text, title, level=2):
    """Of a Markdown text: what stands below a heading."""
    (found,) = re.findall(rf"^{'#' * level} {re.escape(title)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.M | re.S)
    return found


def lines_of(text):
    """The lines of the tables in a Markdown text, as lists of cells."""
    found = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found]


# --- which rows may enter -------------------------------------------------------------------------------------------

SECONDS = timed(CPU)["seconds"]


def spoilt(**changed):
    """A row of which only that is changed."""
    return {**timed(CPU), **changed}


MALFORMED = {
    "not of schema 2": [spoilt(schema=1), spoilt(schema=None), {"op": "region_pool"}],
    "not a JSON object": [[1], "row", 3, None],
    "without a check": [spoilt(errors=None), spoilt(tolerance=None), spoilt(tolerance=NAN)],
    "its check was not passed": [
        spoilt(errors={**dict.fromkeys(SECONDS, 0.0), "ours": 2e-5}),
        spoilt(errors={**dict.fromkeys(SECONDS, 0.0), "ours": NAN}),
        spoilt(errors={**dict.fromkeys(SECONDS, 0.0), "ours": -1.0}),
        spoilt(errors={**dict.fromkeys(SECONDS, 0.0), "published": 1.0}),
        spoilt(errors={"published": 0.0, "compiled": 0.0}),
        spoilt(errors={**dict.fromkeys(SECONDS, 0.0), "ours": "0"}),
        spoilt(errors={**dict.fromkeys(SECONDS, 0.0), "ours": True}),
        device(CPU, errors={"ours": 1.0}),
        overhead(CPU, errors={"ours": 1.0}),
    ],
    "contradicts itself": [
        spoilt(speedup={"published": 3.0}),
        spoilt(of_floor=0.9),
        spoilt(of_floor=None),
        spoilt(speedup={"vanilla": 3.0}),
    ],
    "malformed": [
        spoilt(seconds={**SECONDS, "ours": 0.0}),
        spoilt(seconds={"published": 1.0}),
        spoilt(seconds={**SECONDS, "ours": NAN}),
        spoilt(spread={"ours": [1, 2]}),
        spoilt(spread={name: [2, 1] for name in SECONDS}),
        spoilt(shape="16x64"),
        spoilt(repeats=0),
        spoilt(floor_bytes=None),
        spoilt(extra_bytes=[1]),
        spoilt(label=""),
        spoilt(mode=None),
        spoilt(date="yesterday"),
        spoilt(date="2026-11-20"),
        spoilt(kind="tpu"),
        spoilt(capability=9.0),
        spoilt(op=["region_pool"]),
        spoilt(suite={}),
        spoilt(device=None),
        spoilt(part="taps", taps=-1),
        spoilt(wall_seconds={"ours": "1"}, wall_spread={}),
        device(CPU, rate=NAN),
        device(CPU, spread=[1]),
        overhead(CPU, spent={"launch": "all"}),
        overhead(CPU, goal_seconds=0),
        overhead(CPU, stand_in=None),
        overhead(CPU, host_seconds={}),
        static(registers=None),
        static(target=90),
        static(loop=[1]),
        static(loop={"instructions": 1, "mix": {"load": "half"}}),
        static(occupancy="full"),
    ],
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, found in MALFORMED.items() for row in found])
def test_a_row_that_may_not_enter_is_counted_and_named(tmp_path, reason, row):
    found = rows.read(write(tmp_path / "some.jsonl", [timed(CPU), row, row]))
    (left,) = found.left_out
    assert str(left) == f"left out: 2 rows of some.jsonl: {reason} ({left.first})"
    assert left.first.startswith("line 2: ")
    assert found.rows == [timed(CPU)]


def test_every_sample_may_enter(tmp_path):
    samples = [*everything(CPU), *everything(GPU), static()]
    found = rows.read(write(tmp_path / "some.jsonl", samples))
    assert found.left_out == []
    assert found.older == 0
    assert len(found.rows) == len(samples)


def test_what_is_no_json_is_named(tmp_path):
    path = tmp_path / "broken.jsonl"
    good = json.dumps(timed(CPU)).encode()
    path.write_bytes(b"\xff\xfe\x00" + b"\n" + good[:40] + b"\n\n" + good + b"\n" + b"[" * 100_000 + b"\n")
    found = rows.read(path)
    assert len(found.rows) == 1
    assert [(left.file, left.count, left.reason) for left in found.left_out] == [("broken.jsonl", 3, "not JSON")]


@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_cases_the_newest_stays(tmp_path, order):
    dates = ["2026-11-20T10:00:00+00:00", "2026-11-20T12:30:00+02:00", "2026-11-20T10:00:00-01:00"]
    found = [timed(CPU, date=date, commit=str(i)) for i, date in enumerate(dates)]
    read = rows.read(write(tmp_path / "some.jsonl", found[::order]))
    assert [row["commit"] for row in read.rows] == ["2"]
    assert read.older == 2
    others = [timed(CPU, label="another"), timed(CPU, mode="forward"), timed(GPU), timed(CPU, part="small")]
    assert len(rows.read(write(tmp_path / "some.jsonl", [*found, *others])).rows) == 5


def test_modes_and_sizes_come_in_their_order(tmp_path):
    labels = ["160x512x14x14", "16x512x14x14", "8x256x28x28"]
    samples = [timed(CPU, label=label, mode=mode) for label in labels for mode in ("forward+backward", "forward")]
    found = rows.read(write(tmp_path / "some.jsonl", samples)).rows
    assert [row["label"] for row in found[::2]] == labels[::-1]
    assert [row["mode"] for row in found[:2]] == ["forward", "forward+backward"]


def test_where_there_are_no_rows_it_says_so(tmp_path):
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(FileNotFoundError, match="neither a file of rows nor a folder"):
            rows.read(path)


def test_rows_that_the_bench_writes_may_enter(tmp_path, monkeypatch):
    from bench import __main__, bilinear, measure, region, relational
    from bench import rows as made

    monkeypatch.setattr(region, "SMALL", region.Problem(2, 3, 5, 6))
    monkeypatch.setattr(relational, "SMALL", relational.Problem(1, 3, (2, 3, 4), queries=2, window=(3, 3, 3)))
    monkeypatch.setattr(bilinear, "SMALL", bilinear.Problem(1, 2, 4, 6, 6, k=2, tk=1, cells=3))
    monkeypatch.setattr(made, "ROW_SECONDS", {"cpu": 0.02, "cuda": 0.02})
    monkeypatch.setattr(measure.Machine, "_copy", lambda self: measure.Rate(1e10, 9e9, 9.5e9, 0.0))
    monkeypatch.setattr(measure.Machine, "_matrix", lambda self, dtype: measure.Rate(1e11, 8e10, 9e10, 1e-7))
    out = tmp_path / "rows.jsonl"
    for suite in ("device", "region", "relational", "bilinear"):
        assert __main__.main(["run", suite, "--quick", "--device", "cpu", "--out", str(out)]) == 0
    found = rows.read(out)
    assert found.left_out == []
    assert [row["op"] for row in found.rows if row["suite"] == "device"] == ["copy", "matmul"]
    assert len(found.rows) == 2 + 4 + 2 + 2


# --- what is written ------------------------------------------------------------------------------------------------


def test_figures_of_different_machines_never_meet(written):
    machines = {
        "CPU Sample, 1 thread": (CPU, 1.11e-3),
        "Sample H200, capability 9.0": (GPU, 2.22e-3),
        "Sample H200, capability 8.0": ({**GPU, "capability": "8.0"}, 3.33e-3),
    }
    status, text, page = written([timed(m, seconds={"ours": t, "published": 2 * t}) for m, t in machines.values()])
    assert status == 0
    for name, (_, seconds) in machines.items():
        own = section(text, name)
        for _, other in machines.values():
            assert (f"| {1e3 * other:.2f} (" in own) == (other == seconds)
        pictures = re.findall(r"\((plots/[^)]*\.svg)\)", own)
        assert pictures
        assert all(text.count(f"({picture})") == 1 for picture in pictures)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings[:3] == ["Sample H200, capability 8.0", "Sample H200, capability 9.0", "CPU Sample, 1 thread"]


@pytest.mark.parametrize(("machine", "title"), [(GPU, "Sample H200, capability 9.0"), (CPU, "CPU Sample, 1 thread")])
def test_every_suite_has_its_place(whole, machine, title):
    own, cuda = section((whole / "REPORT.md").read_text(), title), machine is GPU
    assert "torch 2.13.0, triton 3.7.1, python 3.11.7, dyreg_triton 0.1.0, commit abc1234" in own
    rate = "4 TB/s (3.96 T to 4.04 T)" if cuda else "30 GB/s (29.7 G to 30.3 G)"
    assert ["copy", "large uint8", rate] in lines_of(own)
    assert re.findall(r"^### (.*)$", own, re.M) == [
        "At a glance", "Targets", "Every case", "Against the roofs", "Part table1", "Scaling of bilinear_transform",
        "Scaling of region_pool", "Scaling of relational_attention", *["Replayed as CUDA graphs"] * cuda,
        "Launch overhead",
    ]  # fmt: skip
    header, _, *cases = lines_of(section(own, "Every case", 3))
    assert len(cases) == (9 + 4 + 5) * 2 * (1 + cuda)  # region's, relational's and bilinear's cases, modes, dtypes
    assert len([case for case in cases if case[1].startswith("BATBlock, ")]) == 2 * (1 + cuda)
    assert ("wall, ms" in header) == cuda
    swept = {line[0] for line in lines_of(section(own, "Scaling of relational_attention", 3))}
    assert swept >= {"taps", "27", "405", "batch", "8", "channels", "64"}
    swept = {line[0] for line in lines_of(section(own, "Scaling of bilinear_transform", 3))}
    assert swept == {"cells", "---:", "4", "7", "8", "14"}
    assert ("stand-in took the driver's place" in own) == (not cuda)


def test_compiled_code_has_a_section_for_every_target(whole):
    text = (whole / "REPORT.md").read_text()
    for target in ("sm_80", "sm_90", "gfx942"):
        own = section(text, f"Compiled for {target}")
        assert "| gather | forward | 160x512x14x14, N 9 | bfloat16 | 4 | 96 |" in own
    worst = lines_of(section(text, "Compiled for gfx942"))[2]
    assert worst[:8] == ["spills", "any", "`spills`", "≤ 0", "12", "0", "missed", "0 of 1"]


def test_a_line_says_what_was_measured(written):
    errors = {"ours": 3e-7, "published": 0.0, "compiled": 0.0}
    row = timed(CPU, seconds={"ours": 2e-3, "published": 3e-3, "compiled": 1.5e-3}, errors=errors)
    _, text, _ = written([row])
    header, _, cells = lines_of(section(text, "Every case", 3))
    assert dict(zip(header, cells, strict=True)) == {
        "op": "region_pool", "case": "16x64x28x28, N 9, center", "dtype": "float32", "mode": "forward+backward",
        "ours, ms": "2.00 (1.98 to 2.04)", "published": "1.50x", "compiled": "0.75x", "of the floor": "20 %",
        "MiB": "1.00", "published, MiB": "3.00", "error": "3e-07",
    }  # fmt: skip


def test_at_a_glance_are_the_median_and_both_ends(written):
    ours = {"seconds": {"ours": 1e-3, "published": 3e-3}}
    cases = [timed(CPU, label=str(t), seconds={"ours": 1e-3, "published": t}) for t in (9e-4, 2e-3, 4e-3)]
    _, text, _ = written([*cases, timed(CPU, part="small", label="small", **ours)])
    stages, small = sorted(lines_of(section(text, "At a glance", 3))[2:], key=lambda line: line[1] != "stage")
    assert stages[:6] == ["region_pool", "stage", "float32", "forward+backward", "3", "2.00x (0.90x to 4.00x)"]
    assert small[4:6] == ["1", "3.00x"]


def test_the_launch_overhead_is_beside_its_goal(written):
    _, text, _ = written([overhead(CPU), overhead(CPU, seconds=2.5e-5, op="region_remap"), overhead(CPU, "backward")])
    found = {(line[0], line[3]): line for line in lines_of(section(text, "Launch overhead", 3))[2:]}
    missed, met = found["region_pool", "forward with gradient"], found["region_remap", "forward with gradient"]
    assert missed[4:] == ["30.0 (29.4 to 30.9)", "25.0, missed", "1", "autograd 15.0, rest 9.00, validation 6.00"]
    assert met[5] == "25.0, met"
    assert found["region_pool", "backward"][5] == "–"


def test_unchecked_rows_do_not_show(written, capsys):
    wrong = timed(CPU, label="planted", seconds={"ours": 7.77e-3}, errors={"ours": 1e-4})
    older = timed(CPU, date="2026-11-19T10:00:00+00:00", commit="planted")
    status, text, page = written([timed(CPU)], [wrong, {"op": "planted"}, older])
    assert status == 0
    first, second, third = section(text, "Left out").strip().splitlines()
    reason = "its check was not passed (line 1: errors.ours is 0.0001, tolerance 1e-05)"
    assert first == f"- left out: 1 row of rows1.jsonl: {reason}"
    assert second == "- left out: 1 row of rows1.jsonl: not of schema 2 (line 2: schema is None)"
    assert third == "- older measurements of cases that stand here: 1"
    assert "planted" not in text + page
    assert "7.77" not in text + page
    assert reason in capsys.readouterr().out


def test_without_a_row_that_may_enter_nothing_is_written(written, tmp_path, capsys):
    assert written([timed(CPU, schema=1), timed(CPU, errors={})]) == (1, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    said = capsys.readouterr()
    assert "can enter a report; `python -m bench run all` writes rows" in said.err
    assert "not of schema 2" in said.out


def test_without_matplotlib_it_names_the_extra(tmp_path, monkeypatch, capsys):
    write(tmp_path / "rows.jsonl", [timed(CPU)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(tmp_path / "rows.jsonl", tmp_path / "REPORT.md", tmp_path / "report.html") == 1
    assert 'pip install "dyreg-triton[viz]"' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_same_rows_give_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    samples = [timed(GPU), device(GPU), overhead(GPU), timed(GPU, part="taps", taps=27), static()]
    samples += [timed(GPU, part="taps", label="75", taps=75), timed(GPU, op="region_remap", dtype="bfloat16")]

    def files(name, order):
        path = tmp_path / name
        write(path / "rows.jsonl", samples[::order])
        assert report.main(path, path / "REPORT.md", path / "report.html") == 0
        found = [*path.rglob("*.svg"), path / "REPORT.md", path / "report.html"]
        return {path.name: path.read_bytes() for path in found}

    first = files("first", 1)
    assert len([name for name in first if name.endswith(".svg")]) == 6
    assert files("second", -1) == first


def test_files_are_replaced_all_or_none(written, tmp_path, capsys):
    write(tmp_path / "bench" / "plots" / "own.svg", [])  # not of a report
    assert written([timed(CPU)], [timed(GPU)])[0] == 0

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "bench").rglob("*") if path.is_file()}

    first = files()
    assert any("sample-h200" in path.name for path in first)
    blocked = write(tmp_path / "file", [])
    changed = write(tmp_path / "changed.jsonl", [timed(CPU, label="another")])
    assert report.main(changed, tmp_path / "bench" / "REPORT.md", blocked / "report.html") == 1
    assert str(blocked) in capsys.readouterr().err
    assert files() == first

    assert report.main(changed, tmp_path / "bench" / "REPORT.md", tmp_path / "bench" / "report.html") == 0
    assert "another" in (tmp_path / "bench" / "REPORT.md").read_text()
    left = {path.name for path in files()}
    assert not any("sample-h200" in name or name.startswith(".") for name in left)  # plots that tell nothing are gone
    assert "own.svg" in left


# --- Markdown, HTML, SVG --------------------------------------------------------------------------------------------


def test_plots_are_well_formed_and_keep_their_text(whole):
    found = {path.name: path.read_text() for path in (whole / "plots").iterdir()}
    kinds = ("speedup", "roofline", "overhead", "speedup-region-pool", "scaling-relational-attention")
    kinds += ("speedup-bilinear-transform", "scaling-bilinear-transform")
    assert {f"sample-h200-{kind}.svg" for kind in kinds} <= set(found)
    assert {f"cpu-sample-1-thread-{kind}.svg" for kind in kinds} <= set(found)
    for text in found.values():
        assert xml.etree.ElementTree.fromstring(text).tag.endswith("svg")
        assert "<dc:date>" not in text
    for text in ("region_pool", "time of published / time of ours", "time of compiled / time of ours"):
        assert f">{text}<" in found["sample-h200-speedup.svg"]
    for text in ("matrix product 700 Top/s", "copy 4 TB/s", "operations per byte that must be moved", "bfloat16"):
        assert f">{text}<" in found["sample-h200-roofline.svg"]
    for text in ("neighbours M", "channels C", "batch", "milliseconds", "peak extra memory, MiB", "forward+backward"):
        assert f">{text}<" in found["cpu-sample-1-thread-scaling-relational-attention.svg"]
    assert ">nodes N<" in found["cpu-sample-1-thread-scaling-region-pool.svg"]
    assert ">coarse cells of a side<" in found["cpu-sample-1-thread-scaling-bilinear-transform.svg"]
    assert ">autograd<" in found["cpu-sample-1-thread-overhead.svg"]


@pytest.fixture
def drawn(monkeypatch):
    """What a plot's axes show, as sets of curves by axes: their abscissas and ordinates."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "svg", lambda figure: figure)

    def curves(figure):
        lines = [[tuple(map(tuple, line.get_data())) for line in ax.lines] for ax in figure.axes]
        return [{tuple(tuple(round(float(v), 6) for v in axis) for axis in line) for line in ax} for ax in lines]

    return curves


def test_plots_show_the_figures_of_the_rows(drawn):
    times = {2: 1e-3, 8: 3e-3}
    swept = [
        timed(CPU, part="batch", batch=n, seconds={"ours": t, "published": 2 * t}, extra_bytes={"ours": 2**20 * n})
        for n, t in times.items()
    ]
    above, below = drawn(plots.scaling("name", "region_pool", {"batch": swept}))
    assert above == {((2, 8), (1, 3)), ((2, 8), (2, 6))}
    assert below == {((2, 8), (2, 8))}

    rows = [
        timed(CPU),
        timed(CPU, label="small", part="small"),
        timed(CPU, label="b", seconds={"ours": 1, "published": 3}),
    ]
    (points,) = drawn(plots.overview("name", rows))
    assert {((2, 3), (-0.14, -0.14)), ((1.5,), (0.14,))} <= points  # of stages alone
    (points,) = drawn(plots.speedup("name", "region_pool", rows))
    assert {((2,), (-0.13,)), ((1.5,), (0.13,)), ((1, 2), (-0.13, -0.13)), ((3,), (1.87,))} <= points

    (points,) = drawn(plots.roofline("name", rows[:1], 1e10, {"float32": 1e11, "bfloat16": 1}))
    assert ((4,), (40_000_000 / 2e-3,)) in points
    ((at, roof),) = (line for line in points if len(line[0]) == 3)
    assert at[1] == 10  # where bytes and operations take equally long
    assert roof == pytest.approx((1e10 * at[0], 1e11, 1e11))

    figure = plots.overhead("name", [overhead(CPU)])
    assert drawn(figure) == [{((30,), (0,)), ((25, 25), (-0.42, 0.42))}]
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert bars == [pytest.approx(bar) for bar in ((0, 6), (6, 15), (21, 9))]


def test_what_has_nothing_to_show_is_not_drawn():
    alone = [timed(CPU, seconds={"ours": 1.0}), device(CPU)]
    assert plots.overview("name", alone) is None
    assert plots.speedup("name", "region_pool", alone) is None
    assert plots.roofline("name", alone, 1e10, {"bfloat16": 1e12}) is None
    assert plots.scaling("name", "region_pool", {}) is None
    assert plots.overhead("name", []) is None


class Page(HTMLParser):
    """What a page would load, its ids, and what it refers to; elements closed in order."""

    EMPTY = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.tags, self.open, self.balanced = [], [], [], [], True
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [] if tag in self.EMPTY else [tag]
        for name, value in attributes:
            self.ids += [value] if name == "id" else []
            self.links += [value] if name in ("href", "src", "xlink:href", "data", "action", "srcset") else []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        self.balanced &= self.open != [] and self.open.pop() == tag


def test_the_page_loads_nothing(whole):
    text = (whole / "report.html").read_text()
    page = Page(text)
    assert page.balanced
    assert page.open == []
    assert not {"link", "script", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert re.findall(r"https?:|//|@import|url\((?!#)", text.replace("</", "")) == []
    referred = {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert referred <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == len(list((whole / "plots").iterdir()))


def test_the_page_follows_light_and_dark_and_prints(whole):
    text = (whole / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    for role in ("ink", "muted", "grid", "ground"):
        assert f"var(--{role})" in drawings
    assert not re.findall(r"#(?:000000|ffffff|1f2430|dde1e7)", drawings)
    assert '<td class="missed">missed</td>' in text


def test_tables_are_rectangular(whole):
    for block in re.findall(r"(?:^\|.*\n)+", (whole / "REPORT.md").read_text(), re.M):
        assert len({len(line) for line in lines_of(block)}) == 1


def test_what_rows_say_is_no_markup(written):
    label = "<b>a|b</b> & *c* [d](e) \\ `f"
    _, text, page = written([timed(CPU, label=label), timed(CPU, op="<i>`<b>`")])
    header, _, other, cells = lines_of(section(text, "Every case", 3))
    assert len(cells) == len(other) == len(header)
    assert cells[1] == r"&lt;b\>a\|b&lt;/b\> & \*c\* \[d\](e) \\ `f"
    assert "&lt;b&gt;a|b&lt;/b&gt; &amp; *c* [d](e) \\ `f" in page
    assert other[0] == r"&lt;i\>`<b>`"
    assert "&lt;i&gt;<code>&lt;b&gt;</code>" in page
    assert "<b>" not in page


@pytest.mark.parametrize("render", [lambda b: markdown.block_text(b, "plots"), html.block])
def test_an_unknown_block_is_an_error(render):
    with pytest.raises(TypeError, match="accepted are Text, Bullets, Picture and Table"):
        render("text")


def test_how_numbers_are_written():
    figures = {4.1234e-4: "0.000412", 4.1: "4.10", 41234: "41200", 0.09999: "0.100", 0: "0", None: "–", math.inf: "∞"}
    assert {value: document.figure(value) for value in figures} == figures
    assert [document.times(v) for v in (0.8712, 1.5, 15.26, None)] == ["0.87x", "1.50x", "15.3x", "–"]
    assert [document.percent(v) for v in (0.8512, 0.031, 1.2, 0, None)] == ["85 %", "3.1 %", "120 %", "0 %", "–"]
    assert document.milliseconds(2e-3, [1.9e-3, 2.15e-3]) == "2.00 (1.90 to 2.15)"
    assert document.microseconds(2.5e-5) == "25.0"
    assert document.mebibytes(3 * 2**19) == "1.50"
    assert [document.scaled(v) for v in (0.5, 50, 999.6, 1.2e11, 7e14, 9e17)] == [
        "0.5",
        "50",
        "1 k",
        "120 G",
        "700 T",
        "900 P",
    ]


# --- the README -----------------------------------------------------------------------------------------------------


def test_the_block_of_the_readme(written, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nbelow\n")
    samples = [
        timed(GPU),
        timed(CPU, seconds={"ours": 9.87e-3, "published": 1e-2}),
        timed(GPU, part="small", op="other"),
    ]
    assert written(samples, readme=readme)[0] == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{report.BEGIN}\n\n**Sample H200, capability 9.0.**\n\nMeasured 2026-11-20 with")
    assert text.endswith(f"{report.END}\n\nbelow\n")
    assert [line[:2] for line in lines_of(text)[2:]] == [
        ["region_pool", "stage"]
    ]  # a GPU before a CPU, and networks' cases
    (plot,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (tmp_path / plot).is_file()
    assert "[REPORT.md](bench/REPORT.md)" in text
    assert "old" not in text
    assert report.write_readme(readme, tmp_path / "results", tmp_path / "bench" / "REPORT.md")
    assert readme.read_text() == text


@pytest.mark.parametrize("text", ["# Title\n", f"{report.BEGIN}\n", f"{report.END}\n{report.BEGIN}\n", None])
def test_a_readme_without_markers_stays(tmp_path, text):
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    path = write(tmp_path / "rows.jsonl", [timed(CPU)])
    assert not report.write_readme(readme, path, tmp_path / "REPORT.md")
    assert (readme.read_text() if readme.exists() else None) == text


def test_only_the_repositorys_report_writes_its_readme(written, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert written([timed(CPU)])[0] == 0
    assert readme.read_text() == f"{report.BEGIN}\n{report.END}\n"
