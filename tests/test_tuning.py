"""Which launch config an op gets: from which file, or from the heuristic."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import DEVICE, assert_close, settings
from tuning_cases import (
    BROKEN,
    GPU,
    REGION_KINDS,
    RELATIONAL_KINDS,
    about_equal,
    collected,
    config,
    entry,
    key,
    process,
    rsa_key,
    without_files,
    written,
)  # fmt: skip

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton.gpu import Gpu, family, gpu_of
from dyreg_triton.launch import watched
from dyreg_triton.tuning import Config, Key, RelationalConfig, files
from dyreg_triton.tuning.files import user_file
from dyreg_triton.tuning.rooms import ROOMS

ITEMSIZE = {"16-bit": 2, "float32": 4, "tf32": 4, "float64": 8}
DTYPE = {"16-bit": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@pytest.fixture(autouse=True)
def _no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with without_files(tmp_path, monkeypatch):
        yield


@pytest.fixture
def gpu() -> Gpu:
    """That of the machine, or the interpreter."""
    return gpu_of(DEVICE)


# --- where files are ------------------------------------------------------------------------------------------------


def test_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = user_file(GPU)
    assert isinstance(found, Path)
    assert found.parent == tmp_path / "cache" / "dyreg_triton" / "tuning"
    assert found.name.endswith("-9.0.json")
    assert "example" in found.name.lower()
    assert set(found.name.lower()) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_")
    assert user_file(GPU._replace(capability="8.0")) != found
    assert user_file(GPU._replace(name="Example GPU 4000")) != found
    assert user_file(GPU._replace(name="a/../../b")).parent == found.parent
    assert not found.exists()

    for unset in (True, False):
        monkeypatch.delenv("XDG_CACHE_HOME") if unset else monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert user_file(GPU) == tmp_path / "home" / ".cache" / "dyreg_triton" / "tuning" / found.name


@pytest.mark.kernels
def test_gpu_of_here() -> None:
    found = gpu_of(DEVICE)
    assert isinstance(found, Gpu)
    assert found.shared >= 48 * 1024
    if DEVICE.type == "cpu":
        assert found[:2] == ("interpreter", "interpreted")
    else:
        assert found.name == torch.cuda.get_device_name(DEVICE)


# --- the lookup -----------------------------------------------------------------------------------------------------


def tensor(element: str = "16-bit") -> torch.Tensor:
    return torch.empty(0, dtype=DTYPE[element], device=DEVICE)


def looked_up(some: Key) -> tuple[Any, str]:
    """The config that an op gets, and where it comes from; both answers agree."""
    origin = tuning.origin(some, DEVICE)
    assert tuning.config(some, tensor()) == origin.config
    assert (origin.path is None) == (origin.key is None) == (origin.entry is None) == (origin.source == "heuristic")
    return origin.config, origin.source


@pytest.fixture
def sources(tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Where the three files of this GPU are, none of which is there yet."""
    monkeypatch.setattr(files, "_PACKAGED", tmp_path / "gpus")
    user = user_file(gpu)
    return {"explicit": tmp_path / "mine.json", "user": user, "packaged": tmp_path / "gpus" / user.name}


@pytest.mark.kernels
@pytest.mark.parametrize("kind", REGION_KINDS)
@pytest.mark.parametrize("element", DTYPE)
def test_heuristic_of_region(kind: str, element: str) -> None:
    some = Key("region", kind, element, (64, 16, 128, 49))
    expected = tuning.region(kind, 64, 16, 128, 49, ITEMSIZE[element], family(DEVICE))
    origin = tuning.origin(some, DEVICE)
    assert origin == (expected, "heuristic", None, None, None)
    assert tuning.config(some, tensor(element)) == expected


@pytest.mark.kernels
@pytest.mark.parametrize("kind", RELATIONAL_KINDS)
@pytest.mark.parametrize("element", DTYPE)
def test_heuristic_of_relational(kind: str, element: str) -> None:
    some = rsa_key(2, (3, 5, 4), 3, (5, 9, 12, 17), (1, 3, 3), kind)._replace(element=element)
    sizes = 2, (3, 5, 4), 3, (5, 9, 12, 17), (1, 3, 3)
    expected = tuning.relational(kind, *sizes, ITEMSIZE[element], family(DEVICE))
    assert tuning.origin(some, DEVICE) == (expected, "heuristic", None, None, None)
    assert tuning.config(some, tensor(element)) == expected


ORDER = [
    # which file holds the very key (e), or one near to it (n); which is taken
    ("e", "e", "e", "explicit", "e"),
    ("", "e", "e", "user", "e"),
    ("", "", "e", "packaged", "e"),
    ("n", "e", "e", "user", "e"),
    ("n", "n", "e", "packaged", "e"),
    ("n", "", "e", "packaged", "e"),
    ("", "n", "e", "packaged", "e"),
    ("n", "n", "n", "explicit", "n"),
    ("", "n", "n", "user", "n"),
    ("", "", "n", "packaged", "n"),
    ("n", "n", "", "explicit", "n"),
    ("e", "n", "n", "explicit", "e"),
    ("n", "e", "", "user", "e"),
    ("", "", "", "heuristic", ""),
]


@pytest.mark.kernels
@pytest.mark.parametrize(("explicit", "user", "packaged", "source", "which"), ORDER)
def test_order_of_sources(
    sources: dict[str, Path], gpu: Gpu, explicit: str, user: str, packaged: str, source: str, which: str
) -> None:
    # what is near in the first file is further away than in the others
    near = {"explicit": key(32), "user": key(64), "packaged": key(128)}
    exact = {"explicit": config(16), "user": config(32), "packaged": config(64)}
    nearby = {"explicit": config(16, 128), "user": config(32, 128), "packaged": config(64, 128)}
    for name, has in (("explicit", explicit), ("user", user), ("packaged", packaged)):
        if has:
            written(sources[name], {key(): exact[name]} if has == "e" else {near[name]: nearby[name]}, gpu)
    with tuning.use(sources["explicit"] if explicit else None):
        assert looked_up(key())[1] == source
        origin = tuning.origin(key(), DEVICE)
    if source == "heuristic":
        return
    assert Path(origin.path) == sources[source]
    assert origin.key == (key() if which == "e" else near[source])
    said = (exact if which == "e" else nearby)[source]
    assert about_equal({key(): origin.entry}, {key(): entry(said)})
    # how many nodes a program takes follows from how many there are
    assert origin.config == (said if which == "e" else dataclasses.replace(said, block_n=16))


@pytest.mark.kernels
def test_incomplete_entries_count(gpu: Gpu) -> None:
    """The best so far is better than nothing."""
    written(user_file(gpu), {key(): entry(config(), complete=False)}, gpu)
    assert looked_up(key()) == (config(), "user")


def nearest(asked: Key, held: list[Key]) -> Key | None:
    """As documented, in so many words."""

    def padded(some: Key) -> list[int]:
        """L, which decides the order of evaluation, and C, D, E, F as the kernels pad them."""
        if some.op == "region":
            return []
        return [
            max(least, 1 << (n - 1).bit_length()) for least, n in zip((1, 8, 16, 8, 16), some.sizes[4:9], strict=True)
        ]

    def alike(other: Key) -> bool:
        return other[:3] == asked[:3] and padded(other) == padded(asked)

    def distance(other: Key) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(asked.sizes, other.sizes, strict=True))

    candidates = sorted(filter(alike, held), key=str)
    return min(candidates, key=distance) if candidates else None


# fmt: off
NEAREST: dict[str, tuple[Key, list[Key], Key | None]] = {
    "closer by a factor": (key(64), [key(256), key(64, channels=256)], key(64, channels=256)),
    "the sum counts, not the largest": (key(64), [key(64 * 4), key(32, 32, 256)], key(64 * 4)),
    "nor how many differ": (key(64), [key(64 * 16), key(32, 32, 256)], key(32, 32, 256)),
    "exact sizes count": (key(160, 9), [key(256, 16), key(128, 9), key(160, 10)], key(160, 10)),
    "a ratio, not a difference": (key(64), [key(32, 16, 512, 196), key(64, 16, 2048, 196)], key(32)),
    "cells are exact": (key(cells=100), [key(cells=50), key(cells=199)], key(cells=199)),
    "cells the other way": (key(cells=100), [key(cells=51), key(cells=200)], key(cells=51)),
    "a tie goes by text": (key(64), [key(32), key(128)], key(128)),
    "a tie of four": (
        key(64, 32),
        [key(64, 16), key(64, 64), key(32, 32), key(128, 32)],
        key(128, 32),
    ),
    "any distance": (key(), [key(1, 16, 16, 1)], key(1, 16, 16, 1)),
    "another kind": (key(), [key(kind="scatter")], None),
    "another element": (key(), [key()._replace(element="float32"), key()._replace(element="tf32")], None),
    "another op": (key(), [rsa_key()], None),
    "another op for relational": (rsa_key(), [key()], None),
    "another relational kind": (rsa_key(), [rsa_key(kind="fold_values")], None),
    "a smaller map": (rsa_key(), [rsa_key(size=(8, 7, 7)), rsa_key(size=(8, 56, 56))], rsa_key(size=(8, 7, 7))),
    "queries of the same padding": (rsa_key(queries=7), [rsa_key(queries=8)], rsa_key(queries=8)),
    "queries of another padding": (rsa_key(queries=9), [rsa_key(queries=8)], None),
    "fewer queries": (rsa_key(queries=1), [rsa_key(queries=5), rsa_key(queries=9)], None),
    "queries count": (rsa_key(queries=6), [rsa_key(queries=8), rsa_key(queries=5)], rsa_key(queries=5)),
    **{
        f"channels of another padding: {'cdef'[i]}": (
            rsa_key(channels=tuple(17 if i == j else 16 for j in range(4))),
            [rsa_key()],
            None,
        )
        for i in range(4)
    },
    **{
        f"channels of the same padding: {'cdef'[i]}": (
            rsa_key(channels=tuple(20 if i == j else 32 for j in range(4))),
            [rsa_key(channels=(32,) * 4)],
            rsa_key(channels=(32,) * 4),
        )
        for i in range(4)
    },
    "clips far, window near": (
        rsa_key(8, window=(5, 7, 7)),
        [rsa_key(128, window=(5, 7, 7)), rsa_key(8, window=(3, 3, 3))],
        rsa_key(8, window=(3, 3, 3)),
    ),
    "a window far": (
        rsa_key(8, window=(5, 7, 7)),
        [rsa_key(64, window=(5, 7, 7)), rsa_key(8, window=(1, 3, 3))],
        rsa_key(64, window=(5, 7, 7)),
    ),
    "nothing at all": (key(), [], None),
}
# fmt: on


@pytest.mark.kernels
@pytest.mark.parametrize("case", NEAREST)
def test_nearest(gpu: Gpu, case: str) -> None:
    asked, held, expected = NEAREST[case]
    assert nearest(asked, held) == expected, "the table itself is wrong"
    written(user_file(gpu), {k: config() if k.op == "region" else RelationalConfig() for k in held}, gpu)
    origin = tuning.origin(asked, DEVICE)
    assert origin.key == expected
    assert origin.source == ("heuristic" if expected is None else "user")


power = st.sampled_from([16, 32, 64, 128])  # logarithms of ratios are exact
some_region = st.builds(
    Key,
    st.just("region"),
    st.sampled_from(["gather", "scatter"]),
    st.sampled_from(["16-bit", "tf32"]),
    st.tuples(power, power, power, power),
)
some_rsa = st.builds(
    Key,
    st.just("relational"),
    st.sampled_from(["forward", "by_h1"]),
    st.just("16-bit"),
    st.tuples(
        power, power, power, power, st.sampled_from([4, 8]), *[st.sampled_from([16, 32])] * 4, power, power, power
    ),
)
some_keys = st.one_of(some_region, some_rsa)


@pytest.mark.kernels
@settings(400)
@given(asked=some_keys, explicit=st.lists(some_keys, max_size=8), user=st.lists(some_keys, max_size=8))
@example(asked=key(64), explicit=[key(32), key(128)], user=[key(64, 32)])
def test_nearest_as_by_brute_force(asked: Key, explicit: list[Key], user: list[Key]) -> None:
    gpu, held = gpu_of(DEVICE), {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
        for name, keys in (("explicit", explicit), ("user", user)):
            path = Path(folder) / "mine.json" if name == "explicit" else user_file(gpu)
            chosen = {k: config() if k.op == "region" else RelationalConfig() for k in keys}
            held[name] = written(path, chosen, gpu)
        tuning.forget()
        with tuning.use(held["explicit"]):
            origin = tuning.origin(asked, DEVICE)
        expected: tuple[str, Key | None] = ("heuristic", None)
        for name, found in (
            ("user", nearest(asked, user)),
            ("explicit", nearest(asked, explicit)),
            ("user", asked if asked in user else None),
            ("explicit", asked if asked in explicit else None),
        ):  # the last that is there counts
            expected = expected if found is None else (name, found)
        assert (origin.source, origin.key) == expected
    tuning.forget()


@pytest.mark.kernels
@pytest.mark.parametrize("kind", RELATIONAL_KINDS)
@pytest.mark.parametrize(
    ("clips", "size", "block_p"), [(1, (1, 2, 3), 16), (2, (2, 4, 1), 4), (1, (1, 1, 1), 16), (8, (8, 14, 14), 16)]
)
def test_a_near_config_is_fitted(gpu: Gpu, kind: str, clips: int, size: tuple[int, int, int], block_p: int) -> None:
    held = RelationalConfig(block_p=block_p, plane=(8, 8), splits=64, clips=16)
    written(user_file(gpu), {rsa_key(16, (16, 56, 56), kind=kind): held}, gpu)
    origin = tuning.origin(rsa_key(clips, size, kind=kind), DEVICE)
    assert origin.source == "user"
    assert origin.key == rsa_key(16, (16, 56, 56), kind=kind)
    assert origin.entry.config == held  # as the file says
    found = origin.config
    assert found.clips <= clips
    assert found.splits <= clips * -(-math.prod(size) // block_p)
    for have, side in zip(found.plane, size[1:], strict=True):
        assert have <= 1 << (side - 1).bit_length()
    fields = {name: getattr(held, name) for name in ("splits", "clips", "plane")}
    assert dataclasses.replace(found, **fields) == held
    # how many clips and parts there are follows from the sizes, not from what was measured on others
    default = ROOMS["relational"].default(rsa_key(clips, size, kind=kind), family(DEVICE))
    assert (found.splits, found.clips) == (default.splits, default.clips)
    if clips == 8:
        assert found.plane == held.plane


@pytest.mark.kernels
def test_a_near_key_that_kept_its_default_says_to_keep_it(gpu: Gpu) -> None:
    """Its own config was good for its sizes; what these sizes would have by themselves is the like of it."""
    kept = config(16)
    written(user_file(gpu), {key(32): files.Entry(kept, 1e-5, kept, 1e-5, True)}, gpu)
    origin = tuning.origin(key(), DEVICE)
    assert (origin.source, origin.key) == ("user", key(32))
    assert origin.config == ROOMS["region"].default(key(), family(DEVICE))
    assert tuning.origin(key(32), DEVICE).config == kept


@pytest.mark.kernels
def test_an_exact_config_is_not_fitted(gpu: Gpu) -> None:
    held = RelationalConfig(plane=(2, 2), splits=3, clips=2)
    written(user_file(gpu), {rsa_key(): held}, gpu)
    assert looked_up(rsa_key()) == (held, "user")


@pytest.mark.kernels
def test_files_are_read_once(gpu: Gpu, tmp_path: Path) -> None:
    """After that a lookup touches no file; `forget` reads anew."""
    path = written(user_file(gpu), {key(): config()}, gpu)
    mine = written(tmp_path / "mine.json", {key(64): config(64)}, gpu)
    with tuning.use(mine):
        asked = (key(), key(64), key(1), key(kind="dense"), rsa_key())
        before = [looked_up(some) for some in asked]
        opened: list[object] = []
        functions = [(os, n) for n in ("open", "stat", "lstat", "scandir", "listdir")]
        with noted(functions + [(Path, n) for n in ("open", "stat", "exists")], opened):
            assert [tuning.config(some, tensor()) for some in asked] == [found for found, _ in before]
        assert not opened
        path.unlink()
        assert [looked_up(some) for some in asked] == before
        written(path, {key(): config(128)}, gpu)
        assert [looked_up(some) for some in asked] == before
        tuning.forget()
        assert looked_up(key()) == (config(128), "user")
        assert looked_up(key(64)) == (config(64), "explicit")


@contextmanager
def noted(functions: list[tuple[Any, str]], called: list[object]) -> Iterator[None]:
    """Inside, calls of these functions are noted."""
    with ExitStack() as stack:
        for owner, name in functions:
            real = getattr(owner, name)

            def note(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
                called.append(args)
                return _real(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, name, note))
        yield


# --- the explicit file ----------------------------------------------------------------------------------------------


@pytest.fixture
def two(gpu: Gpu, tmp_path: Path) -> tuple[Path, Path]:
    """Two files that differ in what they say."""
    return written(tmp_path / "a.json", {key(): config(16)}, gpu), written(
        tmp_path / "b.json", {key(): config(64)}, gpu
    )


@pytest.mark.kernels
def test_use_is_scoped(two: tuple[Path, Path]) -> None:
    first, second = two
    none = looked_up(key())
    assert none[1] == "heuristic"
    with tuning.use(first):
        assert looked_up(key()) == (config(16), "explicit")
        with tuning.use(str(second)):
            assert looked_up(key()) == (config(64), "explicit")
            with tuning.use(None):
                assert looked_up(key()) == none
            assert looked_up(key()) == (config(64), "explicit")
            with tuning.use(second):
                pass
            assert looked_up(key()) == (config(64), "explicit")
        assert looked_up(key()) == (config(16), "explicit")
    assert looked_up(key()) == none
    with pytest.raises(KeyError), tuning.use(first):
        raise KeyError
    assert looked_up(key()) == none


@pytest.mark.kernels
def test_use_as_a_statement(two: tuple[Path, Path]) -> None:
    none = looked_up(key())
    tuning.use(two[0])
    assert looked_up(key()) == (config(16), "explicit")
    with tuning.use(two[1]):
        assert looked_up(key()) == (config(64), "explicit")
    assert looked_up(key()) == (config(16), "explicit")
    tuning.use(None)
    assert looked_up(key()) == none


@pytest.mark.kernels
def test_the_former_is_restored_whatever_was_set_inside(two: tuple[Path, Path]) -> None:
    """As with `dt.backend`."""
    none = looked_up(key())
    with tuning.use(two[0]):
        tuning.use(two[1])
        assert looked_up(key()) == (config(64), "explicit")
    assert looked_up(key()) == none
    tuning.use(two[0])
    with tuning.use(two[1]):
        tuning.use(None)
        assert looked_up(key()) == none
    assert looked_up(key()) == (config(16), "explicit")
    former = tuning.use(two[1])  # entered later, and twice
    tuning.use(None)
    with former:
        assert looked_up(key()) == (config(64), "explicit")
    assert looked_up(key()) == none


@pytest.mark.kernels
def test_use_holds_in_every_thread(two: tuple[Path, Path]) -> None:
    """Backward runs in threads of its own."""
    found: list[object] = []
    with tuning.use(two[0]):
        thread = threading.Thread(target=lambda: found.append(looked_up(key())))
        thread.start()
        thread.join()
    assert found == [(config(16), "explicit")]
    thread = threading.Thread(target=lambda: tuning.use(two[1]))
    thread.start()
    thread.join()
    assert looked_up(key()) == (config(64), "explicit")


@pytest.mark.kernels
def test_a_relative_path_is_of_where_it_was_named(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with tuning.use("a.json"):
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert looked_up(key()) == (config(16), "explicit")


@pytest.mark.parametrize("path", [3, 1.5, b"a.json", ["a.json"], True, object()], ids=lambda p: type(p).__name__)
def test_use_of_no_path(path: Any) -> None:
    with pytest.raises(TypeError, match="path"):
        tuning.use(path)


@pytest.mark.parametrize("name", ["none.json", "no/folder/a.json", ""])
def test_use_of_no_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name if name else ""  # a folder is no file, and neither is ""
    with pytest.raises(ValueError, match="path") as refusal:
        tuning.use(path)
    assert str(path) in str(refusal.value)


@pytest.mark.kernels
def test_a_refused_use_leaves_the_former(two: tuple[Path, Path], tmp_path: Path) -> None:
    with tuning.use(two[0]):
        with pytest.raises(ValueError, match=r"none\.json"):
            tuning.use(tmp_path / "none.json")
        with pytest.raises(TypeError):
            tuning.use(7)  # type: ignore[arg-type]
        assert looked_up(key()) == (config(16), "explicit")


# --- what is reported -----------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("source", ["explicit", "user", "packaged"])
def test_what_is_not_usable_is_reported_once(sources: dict[str, Path], gpu: Gpu, source: str, case: str) -> None:
    """And ignored: the next source is asked."""
    path = written(sources[source], {key(): config(16), rsa_key(): RelationalConfig(block_c=8)}, gpu)
    BROKEN[case](path)
    if source == "explicit":
        written(sources["user"], {key(): config(64)}, gpu)
    with tuning.use(path if source == "explicit" else None), collected() as reports:
        found = [looked_up(key()) for _ in range(3)]
        origin = tuning.origin(rsa_key(), DEVICE)
        tuning.forget()
        found.append(looked_up(key()))
        looked_up(key(kind="dense"))
    if (source, case) == ("packaged", "another triton"):
        assert not reports
        assert found == [(config(16), "packaged")] * 4
        return
    assert len(reports) == 1
    assert str(path) in reports[0]
    assert len(reports[0]) > len(str(path)) + 20
    if source == "explicit":
        assert found == [(config(64), "user")] * 4
    else:
        assert {where for _, where in found} == {"heuristic"}
    assert origin.source == (source if case == "changed kernels" else "heuristic")


@pytest.mark.kernels
def test_two_files_are_two_reports(sources: dict[str, Path]) -> None:
    for name in ("explicit", "user"):
        sources[name].parent.mkdir(parents=True, exist_ok=True)
        sources[name].write_text("{")
    with tuning.use(sources["explicit"]), collected() as reports:
        assert looked_up(key())[1] == "heuristic"
    assert len(reports) == 2
    assert all(any(str(sources[name]) in report for report in reports) for name in ("explicit", "user"))


@pytest.mark.kernels
def test_no_file_is_no_report(sources: dict[str, Path]) -> None:
    with collected() as reports:
        assert looked_up(key())[1] == "heuristic"
    assert not reports
    assert not sources["user"].parent.exists()  # and a lookup writes nothing


@pytest.mark.kernels
def test_a_file_that_went_away(two: tuple[Path, Path]) -> None:
    with tuning.use(two[0]), collected() as reports:
        two[0].unlink()
        assert looked_up(key())[1] == "heuristic"
    assert len(reports) <= 1


@pytest.mark.kernels
@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(36, "File name too long")], ids=str
)
def test_a_folder_that_may_not_be_read(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """As another user's home is."""
    path, real, asked = user_file(gpu), os.stat, []

    def stat(name: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(name).startswith(str(path.parent)):
            asked.append(name)
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    with collected() as reports:
        assert looked_up(key())[1] == "heuristic"
    assert len(reports) <= 1


@pytest.mark.kernels
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, under a number that nobody has."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with collected() as reports:
        assert looked_up(key())[1] == "heuristic"
    assert len(reports) <= 1


@pytest.mark.kernels
@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema": 1}'], ids=lambda text: text[:9] or "empty")
def test_no_file_fails_an_op(gpu: Gpu, text: str) -> None:
    path = user_file(gpu)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    x, regions = torch.randn(1, 4, 3, 5), torch.tensor([[[2.0, 1.0, 1.7, 1.6]]])
    expected = dt.reference.region_pool(x.double(), regions.double())
    with collected() as reports, dt.backend("triton"):
        for _ in range(2):
            found = dt.ops.region_pool(x.to(DEVICE), regions.to(DEVICE))
    assert_close(found.cpu(), expected, tolerance=1e-5)
    assert len(reports) == 1
    assert str(path) in reports[0]


@pytest.mark.kernels
def test_an_op_asks_the_files(gpu: Gpu, tmp_path: Path) -> None:
    """The config of the file is the one that is launched, as soon as it is used and no longer."""
    x, regions = torch.randn(2, 20, 3, 5), torch.tensor([[[2.0, 1.0, 1.7, 1.6]]]).repeat(2, 1, 1)
    expected = dt.reference.region_pool(x.double(), regions.double())
    some, launches = tuning.region_key("gather", 2, 1, 20, 15, x), []

    def launched() -> tuple[int, ...]:
        with dt.backend("triton"), watched(lambda launch, _: launches.append(launch)):
            found = dt.ops.region_pool(x.to(DEVICE), regions.to(DEVICE))
        assert_close(found.cpu(), expected, tolerance=1e-5)
        assert launches[-1].key == some
        return tuple(launches[-1].constants[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_P", "num_warps"))

    plain = launched()
    first, second = (
        written(tmp_path / name, {some: chosen}, gpu)
        for name, chosen in (("a.json", Config(16, 32, 16, 2)), ("b.json", Config(32, 16, 16, 1)))
    )
    with tuning.use(first):
        assert launched() == (16, 32, 16, 2)
        with tuning.use(second):
            assert launched() == (32, 16, 16, 1)
        assert launched() == (16, 32, 16, 2)
    assert launched() == plain
    written(user_file(gpu), {some: Config(16, 16, 32, 8)}, gpu)
    assert launched() == plain
    tuning.forget()
    assert launched() == (16, 16, 32, 8)


class OutOfResources(Exception):
    """Named as Triton's, for a kernel that needs more than the GPU has."""


class Scarce:
    """A kernel on a GPU where a program can have no more than so many channels."""

    def __init__(self, kernel: Any, most: int):
        self.kernel, self.most, self.arg_names, self.refused = kernel, most, kernel.arg_names, 0

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*args: Any, **constants: Any) -> Any:
            if constants["BLOCK_C"] > self.most:
                self.refused += 1
                raise OutOfResources("shared memory")
            return self.kernel[grid](*args, **constants)

        return run


@pytest.mark.kernels
@pytest.mark.parametrize("near", [False, True], ids=["exact", "nearest"])
def test_a_config_that_does_not_fit_is_out_of_use(gpu: Gpu, near: bool) -> None:
    """A packaged one was measured with another compiler, a nearest key's on other sizes."""
    from dyreg_triton.kernels import region

    x, regions = torch.randn(2, 20, 3, 5), torch.tensor([[[2.0, 1.0, 1.7, 1.6]]]).repeat(2, 1, 1)
    expected = dt.reference.region_pool(x.double(), regions.double())
    some, other = (tuning.region_key("gather", frames, 1, 20, 15, x) for frames in (2, 400))
    path = written(user_file(gpu), {some._replace(sizes=(2, 1, 20, 16)) if near else some: Config(16, 32, 16, 2)}, gpu)
    scarce, launches = Scarce(region.region_gather, 16), []

    def pooled() -> int:
        with dt.backend("triton"), watched(lambda launch, _: launches.append(launch)):
            found = dt.ops.region_pool(x.to(DEVICE), regions.to(DEVICE))
        assert_close(found.cpu(), expected, tolerance=1e-5)
        return launches[-1].constants["BLOCK_C"]

    with mock.patch.object(region, "region_gather", scarce), collected() as reports:
        assert pooled() == 16
        assert pooled() == 16
        assert scarce.refused == 1
        assert tuning.config(some, x.to(DEVICE)) == tuning.region("gather", 2, 1, 20, 15, 4, family(DEVICE))
        assert tuning.config(other, x.to(DEVICE)).block_c == 32  # it may fit there
        tuning.forget()
        assert pooled() == 16
        assert scarce.refused == 2
    assert len(reports) == 1
    assert str(path) in reports[0]
    assert str(some) in reports[0]
    tuning.forget()
    assert pooled() == 32


@pytest.mark.kernels
@pytest.mark.parametrize("file", [False, True])
def test_a_heuristic_that_does_not_fit_is_an_error(gpu: Gpu, file: bool) -> None:
    from dyreg_triton.kernels import region

    x, regions = torch.randn(2, 20, 3, 5, device=DEVICE), torch.rand(2, 1, 4, device=DEVICE)
    if file:
        some = tuning.region_key("gather", 2, 1, 20, 15, x)
        written(user_file(gpu), {some: Config(16, 32, 16, 2)}, gpu)
    scarce = Scarce(region.region_gather, 8)
    here = mock.patch.object(region, "region_gather", scarce)
    with here, collected(), dt.backend("triton"), pytest.raises(OutOfResources):
        dt.ops.region_pool(x, regions)
    assert scarce.refused == 1 + file


# --- other processes ------------------------------------------------------------------------------------------------

LOOKUPS = """
import itertools, json, sys, warnings
import torch
from dyreg_triton import tuning
from dyreg_triton.testing import default_device

device = default_device()
tensor = torch.empty(0, dtype=torch.bfloat16, device=device)
found = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for sizes in itertools.product((1, 20, 300), (4, 17), (16, 600), (1, 49, 196, 3136)):
        for kind in ("gather", "scatter_moments"):
            key = tuning.region_key(kind, *sizes, tensor)
            origin = tuning.origin(key, device)
            found[str(key)] = [repr(tuning.config(key, tensor)), origin.source, str(origin.key), str(origin.path)]
print(json.dumps({"found": found, "reports": [str(w.message) for w in caught]}))
"""


@pytest.mark.kernels
@pytest.mark.slow
def test_every_process_finds_the_same(gpu: Gpu, tmp_path: Path) -> None:
    """With the same files, whatever the order of its sets; DYREG_TRITON_TUNING names the explicit one."""
    keys = [key(frames, nodes, 600, cells) for frames in (1, 20) for nodes in (4, 17) for cells in (49, 196)]
    written(user_file(gpu), {k: config(16 << i % 4) for i, k in enumerate(keys[::2])}, gpu)
    mine = written(tmp_path / "mine.json", {k: config(16 << i % 4, 128) for i, k in enumerate(keys[1::2])}, gpu)
    started = [
        process(LOOKUPS, DYREG_TRITON_TUNING=str(mine), PYTHONHASHSEED="1"),
        process(LOOKUPS, DYREG_TRITON_TUNING=str(mine), PYTHONHASHSEED="2"),
        process(LOOKUPS, DYREG_TRITON_TUNING=str(tmp_path / "none.json")),
    ]
    said = []
    for one in started:
        out, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    assert said[0] == said[1]
    assert not said[0]["reports"]
    assert {source for _, source, *_ in said[0]["found"].values()} == {"explicit", "user", "heuristic"}
    with tuning.use(mine):
        for text, (chosen, *_) in said[0]["found"].items():
            assert repr(tuning.config(Key.parse(text), tensor())) == chosen

    assert len(said[2]["reports"]) == 1  # the missing one
    assert str(tmp_path / "none.json") in said[2]["reports"][0]
    assert {source for _, source, *_ in said[2]["found"].values()} == {"user", "heuristic"}
