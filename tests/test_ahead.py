"""Candidates are compiled by other processes, and found in Triton's cache by the one that launches."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from support import PATIENCE

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton.configs.table import SPACES
from dyreg_triton.ops.recording import TunedCall, described
from dyreg_triton.tuning import Config, Key
from dyreg_triton.tuning.problems import Running, keys_of

pytestmark = pytest.mark.compiled
pytest.importorskip("triton", reason="triton is needed to compile")
standin = pytest.importorskip("bench.standin", exc_type=ImportError)
ahead = pytest.importorskip("dyreg_triton.tuning.ahead")
reason = standin.why_not()
if reason is not None:
    pytest.skip(f"no pretended driver: {reason}", allow_module_level=True)

CALL = TunedCall(
    "region_pool", {"x": described((2, 16, 4, 4), "bfloat16"), "regions": described((2, 3, 4), "float32")}, {}, True
)
KEY = keys_of(CALL, "nvidia")[0]
OTHER = Config(16, 16, 16, 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Triton's own, empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with standin.standin("sm_90"):
        yield tmp_path / "cache"


@pytest.fixture
def compilers(cache: Path) -> Iterator[ahead.Compilers]:
    made = ahead.Compilers(torch.device("cpu"), 1)
    yield made
    made.close()


def binaries(cache: Path) -> set[Path]:
    return set(cache.rglob("*.cubin"))


def launched(config: Config) -> None:
    """The call with this config, on the pretended GPU."""

    def choose(key: Key, _: object) -> Config:
        return config if key[:2] == KEY[:2] else SPACES[key.op].default(key, "nvidia")

    with tuning.override(choose), dt.backend("triton"):
        Running(CALL, torch.device("cpu"))()


def test_a_launch_finds_what_was_compiled_ahead(cache: Path, compilers: ahead.Compilers) -> None:
    compilers.begin(CALL, KEY, OTHER)
    compilers.wait(KEY, OTHER)
    before = binaries(cache)
    assert len(before) == 2  # forward and backward
    launched(OTHER)
    assert binaries(cache) == before
    launched(Config(16, 16, 16, 8))  # and another is not there
    assert len(binaries(cache)) == 3


def test_what_cannot_be_compiled_is_left_to_the_launch(cache: Path, compilers: ahead.Compilers) -> None:
    """A call that fails, and a process that dies: nothing is lost but the time."""
    strange = CALL._replace(options={"profile": "cubic"})
    compilers.begin(strange, KEY, OTHER)
    compilers.wait(KEY, OTHER)
    assert not binaries(cache)
    for process in compilers._processes:
        process.kill()
        process.wait()
    compilers.begin(CALL, KEY, Config(16, 16, 16, 4))
    compilers.wait(KEY, Config(16, 16, 16, 4))
    compilers.wait(KEY, Config(16, 16, 16, 8))  # never begun


def test_a_search_that_is_over_is_dropped(compilers: ahead.Compilers) -> None:
    """But not what has begun, nor defaults, nor candidates of the search that goes on."""
    later = KEY._replace(kind="scatter_moments")
    begun, go_on = threading.Event(), threading.Event()

    def ask(task: str) -> None:
        begun.set()
        go_on.wait(PATIENCE)

    with mock.patch.object(compilers, "_ask", side_effect=ask):
        for i, (key, default) in enumerate([(KEY, False), (KEY, False), (KEY, True), (later, False)]):
            compilers.begin(CALL, key, Config(16, 16, 16 << i), default=default)
        compilers.begin(CALL, later, Config(16, 16, 128))  # begun twice is begun once
        assert begun.wait(PATIENCE)
        compilers.drop(later)
        assert [(key.kind, config.block_p) for key, config in compilers._asked] == [
            ("gather", 16), ("gather", 64), ("scatter_moments", 128),
        ]  # fmt: skip
        go_on.set()
        compilers.wait(KEY, Config(16, 16, 32))


def test_close_ends_what_is_under_way(cache: Path) -> None:
    compilers = ahead.Compilers(torch.device("cpu"), 2)
    for warps in (2, 4, 8, 16):
        compilers.begin(CALL, KEY, Config(16, 16, 16, warps))
    while len(compilers._processes) < 2:
        time.sleep(0.01)
    compilers.close()
    assert {process.returncode for process in compilers._processes} == {-signal.SIGKILL}  # nothing was waited for


def test_a_process_answers_every_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    monkeypatch.setattr(ahead, "compile_task", asked.append)
    monkeypatch.setattr(ahead.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{json.dumps({'key': 1})}\nnonsense\n{json.dumps({'key': 2})}\n"))
    ahead.main()
    assert asked == [{"key": 1}, {"key": 2}]
    assert capsys.readouterr().out.splitlines() == ["done", "JSONDecodeError", "done"]
