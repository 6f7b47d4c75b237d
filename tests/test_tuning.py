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
from support import DEVICE, PATIENCE, assert_close, settings
from tuning_cases import (
    BILINEAR_KINDS,
    BROKEN,
    GPU,
    REGION_KINDS,
    RELATIONAL_KINDS,
    about_equal,
    bat_key,
    collected,
    config,
    config_of,
    entry,
    key,
    process,
    rsa_key,
    without_files,
    written,
)  # fmt: skip

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton._core.gpu import Gpu, family, gpu_of
from dyreg_triton.configs import files
from dyreg_triton.configs.files import user_file
from dyreg_triton.configs.keys import FORMS
from dyreg_triton.configs.table import SPACES
from dyreg_triton.ops.launch import watched
from dyreg_triton.tuning import BilinearConfig, Config, Key, RelationalConfig

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


@pytest.mark.kernels
@pytest.mark.parametrize("kind", BILINEAR_KINDS)
@pytest.mark.parametrize("element", DTYPE)
def test_heuristic_of_bilinear(kind: str, element: str) -> None:
    sizes = (2, 24, 6, 15, 28), 4, (5, 7), 3, 2
    some = bat_key(2, 24, 6, (15, 28), 4, (5, 7), 3, 2, kind)._replace(element=element)
    expected = tuning.bilinear(kind, *sizes, ITEMSIZE[element], family(DEVICE))
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
        if some.op == "bilinear":  # Sh, Sw and Ts
            return [1 << (some.sizes[i] - 1).bit_length() for i in (6, 7, 9)]
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
    "another op for bilinear": (bat_key(), [key(), rsa_key()], None),
    "another op than bilinear": (rsa_key(kind="forward"), [bat_key(kind="forward")], None),
    "another bilinear kind": (bat_key(), [bat_key(kind="forward"), bat_key(kind="backward_mixed")], None),
    "another bilinear element": (bat_key(), [bat_key()._replace(element="float32")], None),
    "a map of half the side": (bat_key(), [bat_key(size=(56, 56)), bat_key(size=(14, 28))], bat_key(size=(14, 28))),
    "cells of the same padding": (bat_key(cells=(7, 7)), [bat_key(cells=(8, 5))], bat_key(cells=(8, 5))),
    "rows of another padding": (bat_key(cells=(8, 8)), [bat_key(cells=(4, 8)), bat_key(cells=(9, 8))], None),
    "columns of another padding": (bat_key(cells=(8, 8)), [bat_key(cells=(8, 4)), bat_key(cells=(8, 16))], None),
    "rows are not columns": (bat_key(cells=(4, 8)), [bat_key(cells=(8, 4))], None),
    "frames mixed, of the same padding": (bat_key(ts=3), [bat_key(ts=4), bat_key(ts=2)], bat_key(ts=4)),
    "frames mixed, of another padding": (bat_key(ts=4), [bat_key(ts=5), bat_key(ts=2)], None),
    "any groups": (bat_key(groups=8), [bat_key(groups=1), bat_key(groups=32)], bat_key(groups=32)),
    "any mixes": (bat_key(mixes=2), [bat_key(mixes=16), bat_key(mixes=1)], bat_key(mixes=1)),
    "frames are not what is mixed": (bat_key(frames=8), [bat_key(frames=64)], bat_key(frames=64)),
    "nothing at all": (key(), [], None),
}
# fmt: on


@pytest.mark.kernels
@pytest.mark.parametrize("case", NEAREST)
def test_nearest(gpu: Gpu, case: str) -> None:
    asked, held, expected = NEAREST[case]
    assert nearest(asked, held) == expected, "the table itself is wrong"
    written(user_file(gpu), {k: config_of(k.op) for k in held}, gpu)
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
some_bat = st.builds(
    Key,
    st.just("bilinear"),
    st.sampled_from(["backward_mixed", "mix"]),
    st.just("16-bit"),
    st.tuples(*[power] * 5, st.sampled_from([1, 8]), *[st.sampled_from([4, 8])] * 2, power, st.sampled_from([2, 4])),
)
some_keys = st.one_of(some_region, some_rsa, some_bat)


@pytest.mark.kernels
@settings(400)
@given(asked=some_keys, explicit=st.lists(some_keys, max_size=8), user=st.lists(some_keys, max_size=8))
@example(asked=key(64), explicit=[key(32), key(128)], user=[key(64, 32)])
def test_nearest_as_by_brute_force(asked: Key, explicit: list[Key], user: list[Key]) -> None:
    gpu, held = gpu_of(DEVICE), {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
        for name, keys in (("explicit", explicit), ("user", user)):
            path = Path(folder) / "mine.json" if name == "explicit" else user_file(gpu)
            held[name] = written(path, {k: config_of(k.op) for k in keys}, gpu)
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
    default = SPACES["relational"].default(rsa_key(clips, size, kind=kind), family(DEVICE))
    assert (found.splits, found.clips) == (default.splits, default.clips)
    if clips == 8:
        assert found.plane == held.plane


NEAR = [
    # clips, channels, frames and size of the problem, groups of p and q, and of t; columns of a tile that the file has
    (8, 256, 4, (28, 28), 8, 4, 64), (1, 8, 4, (7, 7), 8, 4, 64), (1, 12, 8, (7, 14), 4, 6, 16),
    (2, 64, 4, (14, 14), 1, 1, 1), (1, 1, 4, (7, 7), 1, 1, 4096),
]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("kind", BILINEAR_KINDS)
@pytest.mark.parametrize("problem", NEAR, ids=str)
@pytest.mark.parametrize("joint", [True, False])
def test_a_near_config_of_a_transform_is_fitted(gpu: Gpu, kind: str, problem: tuple, joint: bool) -> None:
    clips, channels, frames, size, groups, mixes, block_n = problem
    if joint or kind.startswith("mix"):
        block_n = max(block_n, 16)
    cells, ts = ((1, 1), 4) if kind.startswith("mix") else ((7, 7), 4 if kind.endswith("mixed") else 1)
    groups, mixes = {"mix": (mixes, mixes), "mix_backward": (mixes, mixes)}.get(kind, (groups, mixes if ts > 1 else 1))
    held = BilinearConfig(block_n, 64, joint, fused=not joint, num_warps=2, num_stages=3)
    far = bat_key(16, 512, 16, (112, 112), 4, cells, 1, ts, kind)
    written(user_file(gpu), {far: held}, gpu)
    asked = bat_key(clips, channels, frames, size, groups, cells, mixes, ts, kind)
    origin = tuning.origin(asked, DEVICE)
    assert (origin.source, origin.key) == ("user", far)
    assert origin.entry.config == held  # as the file says
    found = origin.config
    unit = math.gcd(channels // groups, channels // mixes)
    columns = unit * math.prod(side // n for side, n in zip(size, cells, strict=True))
    least = 16 if joint or kind.startswith("mix") else 1
    assert found.block_n == min(block_n, max(least, 1 << (columns - 1).bit_length()))
    # how many tiles a program takes follows from the sizes, not from what was measured on others
    default = SPACES["bilinear"].default(asked, family(DEVICE))
    assert found.steps == min(default.steps, -(-columns // found.block_n))
    assert dataclasses.replace(found, block_n=block_n, steps=64) == held


@pytest.mark.kernels
def test_a_near_key_that_kept_its_default_says_to_keep_it(gpu: Gpu) -> None:
    """Its own config was good for its sizes; what these sizes would have by themselves is the like of it."""
    kept = config(16)
    written(user_file(gpu), {key(32): files.Entry(kept, 1e-5, kept, 1e-5, True)}, gpu)
    origin = tuning.origin(key(), DEVICE)
    assert (origin.source, origin.key) == ("user", key(32))
    assert origin.config == SPACES["region"].default(key(), family(DEVICE))
    assert tuning.origin(key(32), DEVICE).config == kept


@pytest.mark.kernels
def test_an_exact_config_is_not_fitted(gpu: Gpu) -> None:
    held = RelationalConfig(plane=(2, 2), splits=3, clips=2)
    written(user_file(gpu), {rsa_key(): held}, gpu)
    assert looked_up(rsa_key()) == (held, "user")
    other = BilinearConfig(2048, 1000, joint=False, fused=False)
    written(user_file(gpu), {bat_key(): other}, gpu)
    tuning.forget()
    assert looked_up(bat_key()) == (other, "user")


@pytest.mark.kernels
def test_files_are_read_once(gpu: Gpu, tmp_path: Path) -> None:
    """After that a lookup touches no file; `forget` reads anew."""
    path = written(user_file(gpu), {key(): config()}, gpu)
    mine = written(tmp_path / "mine.json", {key(64): config(64)}, gpu)
    with tuning.use(mine):
        asked = (key(), key(64), key(1), key(kind="dense"), rsa_key(), bat_key())
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
    others = {rsa_key(): RelationalConfig(block_c=8), bat_key(): BilinearConfig(fused=False)}
    path = written(sources[source], {key(): config(16), **others}, gpu)
    BROKEN[case](path)
    if source == "explicit":
        written(sources["user"], {key(): config(64)}, gpu)
    with tuning.use(path if source == "explicit" else None), collected() as reports:
        found = [looked_up(key()) for _ in range(3)]
        origins = [tuning.origin(other, DEVICE).source for other in others]
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
    assert origins == [source if case == "changed kernels" else "heuristic"] * 2


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


def transformed(launches: list[Any]) -> list[Any]:
    """Launches of a transform of a clip of two frames of 2 x 2 cells, forward and backward, whose results are right."""
    shapes = {"x": (1, 4, 2, 2, 4), "p": (1, 2, 2, 2, 2), "q": (1, 2, 2, 2, 2), "t": (1, 1, 2, 2)}
    leaves = {name: torch.randn(shape).to(DEVICE).requires_grad_() for name, shape in shapes.items()}
    del launches[:]
    with dt.backend("triton"), watched(lambda launch, _: launches.append(launch)):
        y = dt.ops.bilinear_transform(**leaves)
        y.square().sum().backward()
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    expected = dt.reference.bilinear_transform(**wide)
    expected.square().sum().backward()
    assert_close(y.detach(), expected.detach(), tolerance=1e-5)
    for name, t in leaves.items():
        assert_close(t.grad, wide[name].grad, name, tolerance=1e-5)
    return launches


def transform_keys() -> dict[str, Key]:
    """Of the above, by kind, in one pass and in passes."""
    shape, x = (1, 4, 2, 2, 4), torch.empty(0)
    sizes = {
        "forward": (2, (2, 2), 1, 1), "backward": (2, (2, 2), 1, 1), "forward_mixed": (2, (2, 2), 1, 2),
        "backward_mixed": (2, (2, 2), 1, 2), "mix": (1, (1, 1), 1, 2), "mix_backward": (1, (1, 1), 1, 2),
    }  # fmt: skip
    return {kind: tuning.bilinear_key(kind, shape, *rest, x) for kind, rest in sizes.items()}


@pytest.mark.kernels
@pytest.mark.parametrize("forward", [True, False], ids=["forward in one", "forward in passes"])
@pytest.mark.parametrize("backward", [True, False], ids=["backward in one", "backward in passes"])
def test_a_transform_asks_the_files(gpu: Gpu, tmp_path: Path, forward: bool, backward: bool) -> None:
    """Whether frames are mixed in the same pass, and how large the tiles of each pass are."""
    keys, launches = transform_keys(), []
    chosen = {
        "forward_mixed": BilinearConfig(32, 1, joint=True, fused=forward, num_warps=8),
        "backward_mixed": BilinearConfig(2, 1, joint=False, fused=backward, num_warps=2),
        "forward": BilinearConfig(1, 3, joint=False), "backward": BilinearConfig(16, 2), "mix": BilinearConfig(64),
        "mix_backward": BilinearConfig(16, num_stages=1),
    }  # fmt: skip
    first = written(tmp_path / "a.json", {keys[kind]: said for kind, said in chosen.items()}, gpu)
    kinds = ["forward_mixed"] if forward else ["forward", "mix"]
    kinds += ["backward_mixed"] if backward else ["forward", "mix_backward", "backward"]
    for _ in range(2):
        with tuning.use(first):
            found = transformed(launches)
            assert [launch.key for launch in found] == [keys[kind] for kind in kinds]
            for launch in found:
                said, constants = chosen[launch.key.kind], launch.constants
                assert (constants["BLOCK_N"], constants["num_warps"], constants["num_stages"]) == (
                    said.block_n, said.num_warps, said.num_stages,
                )  # fmt: skip
                if not launch.key.kind.startswith("mix"):
                    assert constants["JOINT"] == said.joint
        for launch in transformed(launches):
            config = SPACES["bilinear"].default(launch.key, family(DEVICE))
            assert launch.constants["BLOCK_N"] == config.block_n


class OutOfResources(Exception):
    """Named as Triton's, for a kernel that needs more than the GPU has."""


class Scarce:
    """A kernel on a GPU where a program can have no more than so many channels, or of another block."""

    def __init__(self, kernel: Any, most: int, block: str = "BLOCK_C"):
        self.kernel, self.most, self.arg_names, self.refused = kernel, most, kernel.arg_names, 0
        self.block = block

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*args: Any, **constants: Any) -> Any:
            if constants[self.block] > self.most:
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
@pytest.mark.parametrize("near", [False, True], ids=["exact", "nearest"])
@pytest.mark.parametrize("kind", BILINEAR_KINDS)
def test_a_pass_that_does_not_fit_is_out_of_use(gpu: Gpu, kind: str, near: bool) -> None:
    """Of a transform: that kernel has the heuristic's config from then on, and the results are right all along."""
    from dyreg_triton.kernels import bilinear

    keys, launches = transform_keys(), []
    some = keys[kind]
    held = some._replace(sizes=(1, 600, *some.sizes[2:])) if near else some
    entries = {held: BilinearConfig(num_warps=32)}
    if not kind.endswith("mixed"):
        entries |= dict.fromkeys((keys["forward_mixed"], keys["backward_mixed"]), BilinearConfig(fused=False))
    path = written(user_file(gpu), entries, gpu)
    name = "bilinear_mix" if kind.startswith("mix") else f"bilinear_{kind.removesuffix('_mixed')}"
    default = SPACES["bilinear"].default(some, family(DEVICE))
    scarce = Scarce(getattr(bilinear, name), 16, "num_warps")
    with mock.patch.object(bilinear, name, scarce), collected() as reports:
        for _ in range(2):
            found = [launch for launch in transformed(launches) if launch.key == some]
            assert found[-1].constants["num_warps"] == default.num_warps
            assert found[-1].constants["BLOCK_N"] == default.block_n
        assert scarce.refused == 1
        assert tuning.config(some, torch.empty(0, device=DEVICE)) == default
        tuning.forget()
        transformed(launches)
        assert scarce.refused == 2
    assert len(reports) == 1
    assert str(path) in reports[0]
    assert str(some) in reports[0]


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


# --- search spaces: what is tried next, and what is taken over -------------------------------------------------------

FAMILIES = ("nvidia", "blackwell", "amd", "interpreted")
few = st.integers(1, 6)


@st.composite
def transforms(draw: st.DrawFn) -> Key:
    """Keys that calls of the bilinear transform have."""
    kind = draw(st.sampled_from(BILINEAR_KINDS))
    groups, mixes, ts = draw(few), draw(few), draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 33, 64]))
    cells = draw(
        st.sampled_from([(1, 1), (2, 2), (3, 5), (7, 7), (8, 8), (8, 9), (5, 31), (16, 16), (33, 40), (64, 64)])
    )
    if kind in ("forward", "backward"):
        mixes = ts = 1
    if kind.startswith("mix"):
        groups, cells = mixes, (1, 1)
    size = [n * draw(st.integers(1, 9)) for n in cells]
    channels = math.lcm(groups, mixes) * draw(st.sampled_from([1, 2, 3, 16, 64]))
    element = draw(st.sampled_from(["16-bit", "float32", "tf32"]))
    clips, frames = draw(st.sampled_from([1, 2, 8, 64])), ts * draw(st.integers(1, 4))
    return Key("bilinear", kind, element, (clips, channels, frames, *size, groups, *cells, mixes, ts))


regions = st.builds(
    Key, st.just("region"), st.sampled_from(REGION_KINDS), st.sampled_from(["16-bit", "float32"]),
    st.tuples(st.integers(1, 500), st.integers(1, 100), st.integers(1, 3000), st.integers(1, 4000)),
)  # fmt: skip
attentions = st.builds(
    Key, st.just("relational"), st.sampled_from(RELATIONAL_KINDS), st.sampled_from(["16-bit", "float32"]),
    st.tuples(
        few, few, *[st.integers(1, 60)] * 2, st.integers(1, 16), *[st.integers(1, 128)] * 4, few, few, few
    ),
)  # fmt: skip
problems = st.one_of(transforms(), regions, attentions)


def columns_of(key: Key) -> int:
    """How many columns a unit of channels has, of a key of the bilinear transform."""
    _, channels, _, h, w, groups, sh, sw, mixes, _ = key.sizes
    unit = math.gcd(channels // groups, channels // mixes)
    return unit * (h * w if key.kind.startswith("mix") else (h // sh) * (w // sw))


def assert_launchable(config: BilinearConfig, key: Key) -> None:
    """Products of tensor cores have sixteen columns or more, and nothing is larger than what there is."""
    least = 16 if config.joint or key.kind.startswith("mix") else 1
    columns = columns_of(key)
    assert least <= config.block_n <= max(least, 1 << (columns - 1).bit_length())
    assert config.steps <= -(-columns // config.block_n)
    if not key.kind.endswith("mixed"):
        assert config.fused


@settings(300)
@given(key=transforms(), family=st.sampled_from(FAMILIES))
@example(key=bat_key(), family="nvidia")
@example(key=bat_key(cells=(64, 64), size=(64, 64), ts=1, kind="backward"), family="amd")
def test_default_of_every_transform(key: Key, family: str) -> None:
    """It is the heuristic's, of a config that can be launched, and fits itself."""
    space = SPACES["bilinear"]
    clips, channels, t, h, w, groups, sh, sw, mixes, ts = key.sizes
    found = space.default(key, family)
    itemsize = ITEMSIZE[key.element]
    assert found == tuning.bilinear(key.kind, (clips, channels, t, h, w), groups, (sh, sw), mixes, ts, itemsize, family)
    assert type(found) is BilinearConfig
    assert_launchable(found, key)


@settings(300)
@given(key=problems, family=st.sampled_from(FAMILIES))
def test_a_default_is_within_its_sizes(key: Key, family: str) -> None:
    """So that it is what is launched, and steps begin at a config that they could lead to."""
    space = SPACES[key.op]
    found = space.default(key, family)
    if key.kind != "pack":  # which has no use for a plane, and lets it be
        assert space.within(found, key) == found
        assert space.fitted(found, key, family) == found
    assert space.launches(key, found)


def changes(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """By field, what two configs have where they differ."""
    return {name: (a, b) for (name, a), b in zip(vars(one).items(), vars(other).values(), strict=True) if a != b}


def is_step(name: str, a: Any, b: Any) -> bool:
    """Whether a field that was a and is b has gone one step."""
    if name in ("order", "registers") or isinstance(a, bool):
        return type(a) is type(b) or name == "registers"
    if name == "num_stages":
        return abs(a - b) == 1
    if name == "plane":
        return {a[0] / b[0], a[1] / b[1]} in ({1, 2}, {1, 0.5})
    return max(a, b) // 2 == min(a, b)  # twice, or half and rounded down


@settings(200)
@given(key=problems, family=st.sampled_from(FAMILIES), data=st.data())
def test_steps_are_one_step_away_and_legal(key: Key, family: str, data: st.DataObject) -> None:
    """From the default, and from there on."""
    space = SPACES[key.op]
    config = space.default(key, family)
    for _ in range(3):
        steps = list(space.steps(config, key))
        assert len(set(steps)) == len(steps)
        for step in steps:
            assert type(step) is space.config
            assert space.within(step, key) == step
            changed = changes(config, step)
            assert all(is_step(name, *pair) for name, pair in changed.items()), changed
            assert len(changed) == 1 or set(changed) == {"block_c", "block_p"}, changed
            if key.op == "bilinear":
                assert_launchable(step, key)
        if not steps:
            return
        config = data.draw(st.sampled_from(steps))


@pytest.mark.parametrize("element", ["16-bit", "float32"])
@pytest.mark.parametrize("kind", BILINEAR_KINDS)
def test_what_a_transform_is_tried_with(kind: str, element: str) -> None:
    """Each field of which the kernel has a use, and no other."""
    cells = (1, 1) if kind.startswith("mix") else (7, 7)
    mixes, ts = (1, 1) if kind in ("forward", "backward") else (4, 4)
    key = bat_key(8, 256, 4, (28, 28), 4, cells, mixes, ts, kind)._replace(element=element)
    start = BilinearConfig(32, 2 if ts == 1 else 1)
    steps = list(SPACES["bilinear"].steps(start, key))
    tried = {name for step in steps for name in changes(start, step)}
    expected = {"block_n", "num_warps", "num_stages"}
    if not kind.startswith("mix"):
        expected |= {"joint", "steps"}
    if kind.endswith("mixed"):
        expected.add("fused")
    assert tried == expected
    assert {step.block_n for step in steps} == {16, 32, 64}


def test_small_tiles_are_tried_of_two_products_only() -> None:
    """One product needs sixteen columns; the other way a tile of fewer has as many rows besides."""
    key, space = bat_key(kind="forward", mixes=1, ts=1), SPACES["bilinear"]
    assert 8 not in {step.block_n for step in space.steps(BilinearConfig(16, joint=True), key)}
    assert 8 in {step.block_n for step in space.steps(BilinearConfig(16, joint=False), key)}
    assert False in {step.joint for step in space.steps(BilinearConfig(16, joint=True), key)}
    assert True in {step.joint for step in space.steps(BilinearConfig(16, joint=False), key)}
    assert True not in {step.joint for step in space.steps(BilinearConfig(8, joint=False), key)}


@pytest.mark.parametrize("fused", [True, False])
def test_both_ways_of_mixing_are_tried(fused: bool) -> None:
    for kind in ("forward_mixed", "backward_mixed"):
        steps = SPACES["bilinear"].steps(BilinearConfig(16, fused=fused), bat_key(kind=kind))
        assert (not fused) in {step.fused for step in steps}


@settings(200)
@given(key=transforms(), family=st.sampled_from(FAMILIES), data=st.data())
def test_whatever_is_taken_over_can_be_launched(key: Key, family: str, data: st.DataObject) -> None:
    """A config measured on more clips, channels, frames and places is cut to the sizes at hand, and cut once."""
    space, joint = SPACES["bilinear"], data.draw(st.booleans())
    most = data.draw(st.integers(4 if joint else 0, 12))
    config = data.draw(
        st.builds(
            BilinearConfig, st.just(1 << most), st.integers(1, 5000), st.just(joint),
            st.booleans() if key.kind.endswith("mixed") else st.just(True), st.sampled_from([1, 16]), st.integers(1, 4),
        )
    )  # fmt: skip
    for found in (space.within(config, key), space.fitted(config, key, family)):
        assert_launchable(found, key)
        assert space.within(found, key) == found
        assert set(changes(config, found)) <= {"block_n", "steps"}
    assert space.fitted(config, key, family).steps <= space.default(key, family).steps


LAUNCHES = {
    "forward_mixed": (("forward_mixed",), ("forward", "mix")),
    "backward_mixed": (("backward_mixed",), ("mix_backward", "forward", "backward")),
}


@pytest.mark.parametrize("kind", BILINEAR_KINDS)
def test_which_kernels_stand_for_a_key(kind: str) -> None:
    """Its own; where frames are mixed in a pass of their own, those of the passes."""
    in_one, in_passes = LAUNCHES.get(kind, ((kind,), (kind,)))
    space = SPACES["bilinear"]
    assert sorted(space.launches(bat_key(kind=kind), BilinearConfig())) == sorted(in_one)
    assert sorted(space.launches(bat_key(kind=kind), BilinearConfig(fused=False))) == sorted(in_passes)
    assert {*in_one, *in_passes} <= set(FORMS["bilinear"].kinds)


@settings(60)
@given(key=st.one_of(regions, attentions))
def test_other_keys_stand_for_themselves(key: Key) -> None:
    space = SPACES[key.op]
    assert space.launches(key, space.default(key, "nvidia")) == (key.kind,)


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
    for clips, cells, kind in itertools.product((1, 8), (2, 7), ("forward_mixed", "backward_mixed", "mix")):
        key = tuning.bilinear_key(kind, (clips, 96, 4, 28, 28), 4, (cells, cells), 2, 2, tensor)
        origin = tuning.origin(key, device)
        found[str(key)] = [repr(tuning.config(key, tensor)), origin.source, str(origin.key), str(origin.path)]
print(json.dumps({"found": found, "reports": [str(w.message) for w in caught]}))
"""


@pytest.mark.kernels
@pytest.mark.slow
def test_every_process_finds_the_same(gpu: Gpu, tmp_path: Path) -> None:
    """With the same files, whatever the order of its sets; DYREG_TRITON_TUNING names the explicit one."""
    keys = [key(frames, nodes, 600, cells) for frames in (1, 20) for nodes in (4, 17) for cells in (49, 196)]
    others = {bat_key(2, 96, kind=kind): BilinearConfig(32, fused=False) for kind in ("forward_mixed", "mix")}
    written(user_file(gpu), {k: config(16 << i % 4) for i, k in enumerate(keys[::2])} | others, gpu)
    mine = written(tmp_path / "mine.json", {k: config(16 << i % 4, 128) for i, k in enumerate(keys[1::2])}, gpu)
    started = [
        process(LOOKUPS, DYREG_TRITON_TUNING=str(mine), PYTHONHASHSEED="1"),
        process(LOOKUPS, DYREG_TRITON_TUNING=str(mine), PYTHONHASHSEED="2"),
        process(LOOKUPS, DYREG_TRITON_TUNING=str(tmp_path / "none.json")),
    ]
    said = []
    for one in started:
        out, err = one.communicate(timeout=PATIENCE)
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
