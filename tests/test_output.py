"""Every command into every kind of standard output, and every writer of files on a disk that is full."""

from __future__ import annotations

import ast
import errno
import importlib
import io
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_rows
import numpy as np
import pytest
import torch
from support import PATIENCE
from test_demo import figures
from tqdm import tqdm

import bench.__main__
import bench.measure
import bench.region
import bench.report
import bench.rows
import bench.sanitize
import dyreg_triton as dt
import dyreg_triton.demo.__main__
from dyreg_triton import cli, pretrained, tuning, viz
from dyreg_triton._core import console, installed
from dyreg_triton._core.atomic_files import replacing
from dyreg_triton._core.gpu import Gpu
from dyreg_triton.configs import files
from dyreg_triton.demo import draw, report, run
from dyreg_triton.tuning import calls, engine, tuner

ROOT = Path(__file__).resolve().parents[1]
NAME = "\xe9\u0436"  # the first is in latin-1, neither in ASCII
MODELS = f"""
import published
import torch
from torch import nn
import dyreg_triton as dt

def attention():
    return nn.ModuleDict({{"{NAME}": published.RSA(3, 4, nh=2, dk=4, kernel_size=(3, 3, 3))}})

class Talking(nn.Sequential):
    def forward(self, x):
        print("{NAME}" * 9000)  # more than any buffer holds
        return super().forward(x)

def talking():
    return Talking(published.RSA(3, 4, nh=2, dk=4, kernel_size=(3, 3, 3)))

class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("{NAME}", dt.layers.BATransform(4, window=3, groups=1, dimensions=2))

    def forward(self, x):
        return self._modules["{NAME}"](x.repeat(1, 2, 1, 1)[:, :4])
"""


# --- commands -------------------------------------------------------------------------------------------------------


def compiled_main(*_: Any) -> int:
    return importlib.import_module("bench.compiled")._report([[(NAME, [])]])


def tuned(*_: Any, progress: Callable, **__: Any) -> Any:
    progress(engine.Progress(0, 1, SimpleNamespace(__str__=lambda: NAME), 0.0, None))  # type: ignore[arg-type]
    return engine.Summary([], [], [], [], 0)


def shown(options: Any) -> list[str]:
    for _ in tqdm(range(2), desc=NAME):
        pass
    run.show(figures(options=figures().options._replace(out=options.out)))
    return [NAME]


CLI, DEMO, BENCH = cli.main, dyreg_triton.demo.__main__.main, bench.__main__.main
COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "env": (CLI, ["env"]),
    "help": (CLI, ["swap", "--help"]),
    "swap": (CLI, ["swap", "somemodels:attention"]),
    "swap of a model that prints": (CLI, ["swap", "somemodels:talking", "--example", "1,3,3,4,4"]),
    "swap, refused": (CLI, ["swap", f"nobody.{NAME}:clips"]),
    "tune": (CLI, ["tune", "--device", "cpu", "--out", f"{NAME}.json"]),
    "tune --show": (CLI, ["tune", "--show", "--shapes", "quick", "--ops", "region", "--target", "sm_80"]),
    "viz": (CLI, ["viz", "somemodels:Images", "--clip", "clip.npy", "--out", NAME]),
    "demo": (DEMO, ["--device", "cpu", "--out", NAME]),
    "bench run": (BENCH, ["run", "region", "--device", "cpu", "--out", f"{NAME}.jsonl"]),
    "bench report": (BENCH, ["report", "--results", "rows", "--out", f"{NAME}/a.md", "--html", f"{NAME}/a.html"]),
    "bench report, refused": (BENCH, ["report", "--results", f"bad{NAME}", "--out", "a.md", "--html", "a.html"]),
    "bench compare": (BENCH, ["compare", "rows", f"bad{NAME}"]),
    "bench compiled": (BENCH, ["compiled"]),
    "bench compiled --report": (BENCH, ["compiled", "--report"]),
    "bench.sanitize": (lambda _: bench.sanitize.main(), []),
}
SILENT = ("swap, refused",)  # on standard output
ASCII = ("help", "tune --show", "swap, refused")  # with nothing to escape


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with somebody's models, where each command takes no time."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "somemodels.py").write_text(MODELS, encoding="utf-8")
    np.save(folder / "clip.npy", np.zeros((1, 4, 4, 3), dtype=np.uint8))
    for name, row in (("rows", bench_rows.timed(bench_rows.CPU, label=NAME)), (f"bad{NAME}", {"schema": NAME})):
        (folder / name).mkdir()
        bench.rows.append(folder / name / f"{NAME}.jsonl", row)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(folder), *sys.path])
        patch.setattr(cli.platform, "platform", lambda: NAME)
        patch.setattr(tuner, "usable_device", torch.device)
        patch.setattr(tuning, "tune", tuned, raising=False)
        patch.setattr(run, "run", shown)
        patch.setattr(bench.measure, "_processor", lambda: NAME)
        patch.setattr(bench.measure.Machine, "_copy", lambda _: bench.measure.Rate(1e10, 9e9, 9.5e9, 0.0))
        patch.setattr(bench.measure.Machine, "_matrix", lambda _, dtype: bench.measure.Rate(1e11, 8e10, 9e10, 1e-7))
        patch.setattr(bench.region, "checks", lambda _: [])
        patch.setattr(bench.region, "cells", lambda *_, **__: [])
        patch.setattr(bench.report, "report", lambda *_: SimpleNamespace(pictures=list))
        patch.setattr(bench.report, "markdown_text", lambda *_: NAME)
        patch.setattr(bench.report, "html_page", lambda *_: NAME)
        patch.setattr(bench.__main__, "RESULTS", folder / NAME)
        patch.setattr(bench.sanitize.dispatch, "why_not", lambda *_: None)
        patch.setattr(bench.sanitize, "run", lambda _: print(NAME) or [NAME])
        if installed.triton_fault() is None:
            patch.setattr("bench.compiled.main", compiled_main)
            patch.setattr("bench.compiled.report.rows", lambda _: [])
        yield folder


def status_of(name: str) -> int:
    """The exit status, whether returned or raised."""
    if name.startswith("bench compiled"):
        pytest.importorskip("triton")
    main, arguments = COMMANDS[name]
    try:
        return main(arguments)
    except SystemExit as end:
        return int(str(end.code))


@pytest.fixture(scope="module")
def good(here: Path) -> Callable[[str], tuple[int, list[str], str]]:
    """The status of a command into streams that take everything, the lines that it prints, and what it says."""
    found: dict[str, tuple[int, list[str], str]] = {}

    def of(name: str) -> tuple[int, list[str], str]:
        if name not in found:
            with pytest.MonkeyPatch.context() as patch:
                out, err = io.StringIO(), io.StringIO()
                patch.setattr(sys, "stdout", out)
                patch.setattr(sys, "stderr", err)
                status = status_of(name)
            found[name] = status, out.getvalue().splitlines(), err.getvalue()
        return found[name]

    return of


Good = Callable[[str], tuple[int, list[str], str]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_encoded_is_escaped(
    name: str, encoding: str, good: Good, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, lines, said = good(name)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert status_of(name) == status
    escaped = NAME.encode(encoding, "backslashreplace").decode(encoding)
    written, complained = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))  # type: ignore[attr-defined]
    assert len(written.splitlines()) == len(lines)
    assert bool(lines) == (name not in SILENT)
    if name not in ASCII:
        assert NAME in "\n".join(lines)
        assert escaped in written
    assert (NAME in said) <= (escaped in complained)


def to(descriptor: int, buffered: bool) -> io.TextIOWrapper:
    """As Python opens its standard output; unbuffered as under `python -u`."""
    if buffered:
        return open(descriptor, "w", encoding="utf-8")
    return io.TextIOWrapper(io.FileIO(descriptor, "w"), encoding="utf-8", write_through=True)


def unread(buffered: bool) -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return to(writing, buffered)


def full(buffered: bool) -> io.TextIOWrapper:
    return to(os.open("/dev/full", os.O_WRONLY), buffered)


def closed(_: bool) -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


FAILING: dict[str, tuple[Callable[[bool], io.TextIOBase], int, str]] = {
    "a closed pipe": (unread, 141, ""),
    "a full disk": (full, 74, "standard output cannot be written: [Errno 28] No space left on device\n"),
    "a closed stream": (closed, 74, "standard output cannot be written: I/O operation on closed file\n"),
}


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("sink", FAILING)
@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_fails_is_no_refusal(
    name: str, sink: str, buffered: bool, good: Good, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, status, told = FAILING[sink]
    if name in SILENT:
        status, told = good(name)[0], ""
    stream, err = made(buffered), io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", err)
    assert status_of(name) == status
    said = err.getvalue()
    assert said.endswith(told)
    assert ("standard output" in said) == bool(told)
    assert "Traceback" not in said
    assert sys.stdout is stream
    stream.close()  # as Python does at the end: what is left in it must go somewhere


@pytest.mark.parametrize("name", COMMANDS)
def test_streams_closed_from_the_start(name: str, good: Good, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is printed, and what is for one stream does not go to the other."""
    status, lines, _ = good(name)
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", err)
    assert status_of(name) == status
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    assert status_of(name) == status
    assert len(out.getvalue().splitlines()) == len(lines)
    assert "standard output" not in err.getvalue()


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("made", [unread, full, closed])
@pytest.mark.parametrize("name", ["swap, refused", "tune", "demo", "bench.sanitize"])
def test_errors_that_cannot_be_said_change_nothing(
    name: str, made: Callable[[bool], Any], buffered: bool, good: Good, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, lines, said = good(name)
    out, stream = io.StringIO(), made(buffered)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", stream)
    assert said
    assert status_of(name) == status
    assert len(out.getvalue().splitlines()) == len(lines)
    stream.close()


def test_every_entry_is_a_command() -> None:
    for main in (CLI, DEMO, BENCH, bench.sanitize.main):
        assert hasattr(main, "__wrapped__")
    started = [
        path
        for path in [*(ROOT / "dyreg_triton").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
        if path.name == "__main__.py" or '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    names = {path.relative_to(ROOT).as_posix() for path in started}
    assert names == {
        "bench/__main__.py", "bench/sanitize.py", "dyreg_triton/__main__.py", "dyreg_triton/cli.py",
        "dyreg_triton/demo/__main__.py",
    }  # fmt: skip


def test_statuses_are_documented() -> None:
    page = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for status in (console.LOST, console.CLOSED):
        assert f"\n| {status} |" in page
    assert {console.LOST, console.CLOSED}.isdisjoint({0, 1, 2, 120, 130})  # 120 is Python's own for a failed flush


@pytest.mark.slow
def test_as_processes(here: Path, tmp_path: Path) -> None:
    """Up to the end of Python itself, which flushes once more."""
    paths = os.pathsep.join([str(here), str(ROOT / "tests"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    full_disk = "standard output cannot be written: [Errno 28] No space left on device\n"
    cases = {
        "dyreg_triton swap somemodels:attention": (0, ""),  # the name is escaped
        "dyreg_triton swap nobody:x >&- 2>&-": (1, ""),
        "dyreg_triton env | true; exit ${PIPESTATUS[0]}": (141, ""),
        "bench compare rows rows >/dev/full": (74, full_disk),
    }

    for case, expected in cases.items():
        command = ["bash", "-c", f"{sys.executable} -m {case}"]
        done = subprocess.run(command, env=environment, cwd=here, capture_output=True, encoding="ascii", check=False)
        assert (done.returncode, done.stderr) == expected, case
        assert (r"\xe9\u0436" in done.stdout) == (expected[0] == 0)


# --- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file grows beyond a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


GPU = Gpu("Some GPU", "9.0", 1)
PICTURE = [draw.Image.new("RGB", (8, 8)) for _ in range(2)]
WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a tuning file": ("a.json", lambda path: files.merge(path, GPU, {})),
    "calls": ("a.json", lambda path: calls.save(path, [])),
    "what broke the device": (
        "a.json.dangerous",
        lambda path: tuner.Dangerous(path.with_name("a.json")).add(("key", tuning.Config(1, 1, 1))),
    ),
    "a picture": ("a.png", lambda path: viz.save(path, PICTURE[0])),
    "pictures": ("a.webp", lambda path: viz.save(path, PICTURE)),
    "an array": ("attention-a.npy", lambda path: drawn(path)),
    "the demo's report": ("a.md", lambda path: report.save_report(path, "written")),
    "the demo's animation": ("a.webp", lambda path: draw.save_animation(path, PICTURE)),
    "a saved layer": (
        pretrained.files.WEIGHTS, lambda path: dt.layers.RSA(4, num_queries=2).save_pretrained(path.parent)
    ),
    "a row": ("a.jsonl", lambda path: bench.rows.append(path, {"a": 1})),
    "a report": ("a.md", lambda path: bench.report._write({path.with_name("b.md"): "ab", path: "written"})),
}  # fmt: skip


def drawn(path: Path) -> None:
    from dyreg_triton.viz import command

    layer = object.__new__(command._Layer)
    layer.name, layer.groups, layer.kinds = "a", [0], {"attention": (torch.zeros(1, 1, 2, 2), "", None)}
    options: Any = SimpleNamespace(out=path.parent, scale="group")
    for _ in layer.write(torch.zeros(1, 2, 2, 3), options):
        return


@pytest.mark.parametrize("former", [None, "ab\n"], ids=["new", "in place of another"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_written_whole_or_not_at_all(writer: str, former: str | None, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    path = tmp_path / name
    if former is not None and writer != "a tuning file":  # which moves what it cannot read aside, on the same disk
        path.write_text(former, encoding="utf-8")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(), pytest.raises(OSError, match=name) as failure:
        write(path)
    assert failure.value.errno in (errno.EFBIG, errno.EIO)  # numpy does not say which
    assert str(path) in str(failure.value)
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir() if not file.name.endswith(".lock")}
    assert left == before
    write(path)
    assert path.stat().st_size > 4


def test_rows_that_cannot_be_written_leave_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiling took minutes."""
    pytest.importorskip("triton")
    compiled = importlib.import_module("bench.compiled.report")
    monkeypatch.setattr(compiled, "rows", lambda _: [{"kernel": "k"}])
    monkeypatch.setattr(compiled, "table", lambda found: f"a table of {len(found)}")
    with full_disk():
        assert compiled.main(tmp_path / "a.jsonl") == 1
    out, err = capsys.readouterr()
    assert out == "a table of 1\n"
    assert "a.jsonl" in err
    assert list(tmp_path.iterdir()) == []


def test_the_class_of_an_error_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.txt") as failure, replacing(path) as temporary:
        temporary.write_text("a", encoding="utf-8")
    assert str(path) in str(failure.value)
    assert failure.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == [path]


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    path, inside = tmp_path / "a.txt", threading.Barrier(2, timeout=PATIENCE)

    def write(text: str) -> None:
        with replacing(path) as temporary:
            inside.wait()
            temporary.write_text(text, encoding="utf-8")
            inside.wait()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, ("a" * 1000, "b" * 1000)))  # which raises what they did
    assert path.read_text(encoding="utf-8") in ("a" * 1000, "b" * 1000)
    assert list(tmp_path.iterdir()) == [path]


# --- text has one encoding ------------------------------------------------------------------------------------------

OPENS = ("open", "fdopen", "read_text", "write_text")
ELSEWHERE = ("Image", "tarfile", "gzip", "os")  # whose `open` is for bytes


def without_encoding(text: str) -> list[int]:
    """Lines that open text, or a process's, in whatever encoding the machine has."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name not in OPENS and not node.keywords:
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        function = ast.unparse(node.func)
        modes = [ast.unparse(argument) for argument in node.args] + [given.get("mode", "''")]
        binary = name in ("open", "fdopen") and any("b" in mode for mode in modes if mode.strip("'rwxab+") == "")
        opens = name in OPENS and function.partition(".")[0] not in ELSEWHERE
        process = any(given.get(flag) == "True" for flag in ("text", "universal_newlines"))
        if ((opens and not binary) or process) and "encoding" not in given:
            lines.append(node.lineno)
    return lines


def test_text_is_opened_as_utf8() -> None:
    for folder in ("dyreg_triton", "bench", "kernels", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            assert without_encoding(path.read_text(encoding="utf-8")) == [], path


def test_what_is_not_is_seen() -> None:
    for wrong in ("open(p)", "open(p, 'w')", "p.open('a')", "p.read_text()", "p.write_text(b)", "run(c, text=True)"):
        assert without_encoding(wrong) == [1], wrong
    for right in ("open(p, 'rb')", "p.open('xb')", "open(p, encoding='utf-8')", "p.write_text(b, encoding='utf-8')",
                  "Image.open(p)", "p.read_bytes()", "run(c, encoding='utf-8', text=True)"):  # fmt: skip
        assert without_encoding(right) == [], right
