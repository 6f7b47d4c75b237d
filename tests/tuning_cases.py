"""Keys, configs and files of tuning for its tests, and ways to spoil and to interrupt."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dyreg_triton import tuning
from dyreg_triton._core.gpu import Gpu
from dyreg_triton.configs import files
from dyreg_triton.configs.files import Entry
from dyreg_triton.tuning import BilinearConfig, Config, Key, RelationalConfig

GPU = Gpu("Example GPU 3000 (SXM)", "9.0", 232448)
REGION_KINDS = ("gather", "scatter", "gather_moments", "scatter_moments", "dense", "dense_moments")
RELATIONAL_KINDS = ("pack", "forward", "backward", "fold_keys", "fold_values", "by_h1", "by_h2")
BILINEAR_KINDS = ("forward", "backward", "forward_mixed", "backward_mixed", "mix", "mix_backward")


def key(frames: int = 256, nodes: int = 16, channels: int = 512, cells: int = 196, kind: str = "gather") -> Key:
    return Key("region", kind, "16-bit", (frames, nodes, channels, cells))


def rsa_key(
    clips: int = 8,
    size: tuple[int, int, int] = (8, 14, 14),
    queries: int = 8,
    channels: tuple[int, int, int, int] = (16, 16, 16, 16),
    window: tuple[int, int, int] = (5, 7, 7),
    kind: str = "fold_keys",
) -> Key:
    return Key("relational", kind, "16-bit", (clips, *size, queries, *channels, *window))


def bat_key(
    clips: int = 8,
    channels: int = 256,
    frames: int = 4,
    size: tuple[int, int] = (28, 28),
    groups: int = 8,
    cells: tuple[int, int] = (7, 7),
    mixes: int = 4,
    ts: int = 4,
    kind: str = "forward_mixed",
) -> Key:
    return Key("bilinear", kind, "16-bit", (clips, channels, frames, *size, groups, *cells, mixes, ts))


def config(block_c: int = 32, block_p: int = 64, **fields: Any) -> Config:
    """One that no heuristic chooses: of eight nodes."""
    return Config(8, block_c, block_p, **fields)


def config_of(op: str) -> Any:
    """One of each op."""
    return {"region": config(), "relational": RelationalConfig(), "bilinear": BilinearConfig()}[op]


def entry(chosen: Any, seconds: float = 1e-5, *, complete: bool = True, **changes: Any) -> Entry:
    default = dataclasses.replace(chosen, num_warps=4 if chosen.num_warps == 2 else 2, **changes)
    return Entry(chosen, seconds, default, 1.25 * seconds, complete)


def written(path: Path, entries: Mapping[Key, Any], gpu: Gpu = GPU) -> Path:
    """A file that says so; values are configs or whole entries."""
    files.merge(path, gpu, {k: e if isinstance(e, Entry) else entry(e) for k, e in entries.items()})
    return path


def edited(path: Path, edit: Callable[[dict], object]) -> Path:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


@contextmanager
def collected() -> Iterator[list[str]]:
    """What is reported inside."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught]


def about_equal(found: Mapping[Key, Entry], expected: Mapping[Key, Entry]) -> bool:
    """The same but for the rounding of times."""
    if set(found) != set(expected):
        return False
    return all(
        (f.config, f.default, f.complete) == (e.config, e.default, e.complete)
        and math.isclose(f.seconds, e.seconds, rel_tol=1e-2)
        and math.isclose(f.default_seconds, e.default_seconds, rel_tol=1e-2)
        for f, e in ((found[k], expected[k]) for k in expected)
    )


@contextmanager
def without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user without tuning files, and nothing kept of what other tests read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DYREG_TRITON_TUNING", raising=False)
    tuning.forget()
    with tuning.use(None):
        yield
    tuning.forget()


# --- spoiling and interrupting --------------------------------------------------------------------------------------


def set_in(*where: Any) -> Callable[[Any], Callable[[dict], None]]:
    """An edit that puts a value there."""

    def to(value: Any) -> Callable[[dict], None]:
        def edit(document: Any) -> None:
            for name in where[:-1]:
                document = document[name]
            document[where[-1]] = value

        return edit

    return to


def without(*where: Any) -> Callable[[dict], None]:
    def edit(document: Any) -> None:
        for name in where[:-1]:
            document = document[name]
        del document[where[-1]]

    return edit


def triton_version(path: Path) -> str:
    return json.loads(path.read_text())["versions"]["triton"]


def other_release(version: str) -> str:
    major, minor, *_ = version.split(".")
    return f"{major}.{int(minor) + 1}.0"


BROKEN: dict[str, Callable[[Path], object]] = {
    "corrupt": lambda path: path.write_text("{"),
    "foreign": lambda path: edited(path, set_in("gpu", "name")("Another")),
    "schema": lambda path: edited(path, set_in("schema")(99)),
    "another triton": lambda path: edited(path, set_in("versions", "triton")(other_release(triton_version(path)))),
    "changed kernels": lambda path: edited(path, set_in("kernels", "region")("0123456789abcdef")),
}


@contextmanager
def interrupted_at(line: int, folder: Path) -> Iterator[list[int]]:
    """KeyboardInterrupt before the n-th line that runs of the code in a folder; gives how many ran."""
    ran = [0]

    def trace(frame: Any, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(str(folder)):
            return None
        if event == "line":
            ran[0] += 1
            if ran[0] == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        yield ran
    finally:
        sys.settrace(former)


def process(script: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
