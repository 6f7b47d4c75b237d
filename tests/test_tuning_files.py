"""What launch configs are looked up by, and the files that they are kept in."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PATIENCE, settings
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
    edited,
    entry,
    interrupted_at,
    key,
    other_release,
    process,
    rsa_key,
    set_in,
    triton_version,
    without,
    without_files,
    written,
)  # fmt: skip

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton._core.gpu import Gpu
from dyreg_triton.configs import files
from dyreg_triton.configs.files import Entry
from dyreg_triton.configs.table import SPACES, from_json, kernel_hash, to_json
from dyreg_triton.tuning import BilinearConfig, Config, Key, RelationalConfig


@pytest.fixture(autouse=True)
def _no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with without_files(tmp_path, monkeypatch):
        yield


# --- keys -----------------------------------------------------------------------------------------------------------


def test_text_of_a_key() -> None:
    assert str(key()) == "region.gather 16-bit frames=256 nodes=16 channels=512 cells=196"
    assert str(rsa_key()) == (
        "relational.fold_keys 16-bit clips=8 t=8 h=14 w=14 queries=8 c=16 d=16 e=16 f=16 kt=5 kh=7 kw=7"
    )
    assert str(bat_key()) == (
        "bilinear.forward_mixed 16-bit clips=8 channels=256 t=4 h=28 w=28 groups=8 sh=7 sw=7 mixes=4 ts=4"
    )


elements = st.sampled_from(["16-bit", "float32", "tf32", "float64"])
sizes = st.integers(1, 2**39)
region_keys = st.builds(Key, st.just("region"), st.sampled_from(REGION_KINDS), elements, st.tuples(*[sizes] * 4))
rsa_keys = st.builds(Key, st.just("relational"), st.sampled_from(RELATIONAL_KINDS), elements, st.tuples(*[sizes] * 12))

bat_keys = st.builds(Key, st.just("bilinear"), st.sampled_from(BILINEAR_KINDS), elements, st.tuples(*[sizes] * 10))


@settings(100)
@given(st.one_of(region_keys, rsa_keys, bat_keys))
def test_a_key_is_its_text(some: Key) -> None:
    parsed = Key.parse(str(some))
    assert parsed == some
    assert isinstance(parsed, Key)


NONSENSE = {
    "nothing": "",
    "a word": "region",
    "no element": "region.gather",
    "no sizes": "region.gather 16-bit",
    "no kind": "region 16-bit frames=256 nodes=16 channels=512 cells=196",
    "an empty kind": "region. 16-bit frames=256 nodes=16 channels=512 cells=196",
    "another op": "regions.gather 16-bit frames=256 nodes=16 channels=512 cells=196",
    "another element": "region.gather 8-bit frames=256 nodes=16 channels=512 cells=196",
    "a size missing": "region.gather 16-bit frames=256 nodes=16 channels=512",
    "a size too many": "region.gather 16-bit frames=256 nodes=16 channels=512 cells=196 clips=3",
    "a size twice": "region.gather 16-bit frames=256 nodes=16 channels=512 cells=196 cells=196",
    "another order": "region.gather 16-bit nodes=16 frames=256 channels=512 cells=196",
    "another name": "region.gather 16-bit frames=256 nodes=16 channels=512 cell=196",
    "another op's sizes": "relational.forward 16-bit frames=256 nodes=16 channels=512 cells=196",
    "another op's kind": "bilinear.gather 16-bit clips=8 channels=256 t=4 h=28 w=28 groups=8 sh=7 sw=7 mixes=4 ts=4",
    "the kind of another op": "region.forward_mixed 16-bit frames=256 nodes=16 channels=512 cells=196",
    "two words": "bilinear.mix mixed 16-bit clips=8 channels=256 t=4 h=28 w=28 groups=8 sh=7 sw=7 mixes=4 ts=4",
    "no mixes": "bilinear.forward 16-bit clips=8 channels=256 t=4 h=28 w=28 groups=8 sh=7 sw=7 ts=4",
    "mixes of zero": "bilinear.forward 16-bit clips=8 channels=256 t=4 h=28 w=28 groups=8 sh=7 sw=7 mixes=0 ts=1",
    "zero": "region.gather 16-bit frames=0 nodes=16 channels=512 cells=196",
    "negative": "region.gather 16-bit frames=-4 nodes=16 channels=512 cells=196",
    "a fraction": "region.gather 16-bit frames=256.0 nodes=16 channels=512 cells=196",
    "an exponent": "region.gather 16-bit frames=1e2 nodes=16 channels=512 cells=196",
    "a word for a size": "region.gather 16-bit frames=many nodes=16 channels=512 cells=196",
    "no size": "region.gather 16-bit frames= nodes=16 channels=512 cells=196",
    "two spaces": "region.gather  16-bit frames=256 nodes=16 channels=512 cells=196",
    "a space before": " region.gather 16-bit frames=256 nodes=16 channels=512 cells=196",
    "a line end": "region.gather 16-bit frames=256 nodes=16 channels=512 cells=196\n",
    "a leading zero": "region.gather 16-bit frames=0256 nodes=16 channels=512 cells=196",
    "an underscore": "region.gather 16-bit frames=2_56 nodes=16 channels=512 cells=196",
    "other digits": "region.gather 16-bit frames=٢٥٦ nodes=16 channels=512 cells=196",
    "one of other digits": "region.gather 16-bit frames=2٥6 nodes=16 channels=512 cells=196",
    "an accent": "region.gather 16-bit frames=256 nodes=16 channels=512 cells=²",
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_no_key(case: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Key.parse(NONSENSE[case])
    assert NONSENSE[case].strip() in str(refusal.value) or repr(NONSENSE[case]) in str(refusal.value)


@settings(200)
@given(st.integers(0, 70), st.sampled_from(" .=-_0123456789abcfgnort\n\t٣"), st.booleans())
def test_one_text_a_key(place: int, letter: str, instead: bool) -> None:
    """Whatever is taken for a key is written as it was read."""
    text = str(key())
    place = min(place, len(text))
    changed = text[:place] + letter + text[place + instead :]
    try:
        found = Key.parse(changed)
    except ValueError:
        return
    assert str(found) == changed


@pytest.mark.parametrize("kind", REGION_KINDS)
def test_region_key(kind: str) -> None:
    found = tuning.region_key(kind, 160, 9, 513, 197, torch.empty(0, dtype=torch.bfloat16))
    assert found == Key("region", kind, "16-bit", (160, 9, 513, 197))


@pytest.mark.parametrize("kind", RELATIONAL_KINDS)
def test_relational_key(kind: str) -> None:
    tensor = torch.empty(0, dtype=torch.float16)
    found = tuning.relational_key(kind, 3, (6, 13, 17), 2, (5, 24, 18, 9), (1, 4, 7), tensor)
    assert found == Key("relational", kind, "16-bit", (3, 6, 13, 17, 2, 5, 24, 18, 9, 1, 4, 7))


@pytest.mark.parametrize("kind", BILINEAR_KINDS)
def test_bilinear_key(kind: str) -> None:
    found = tuning.bilinear_key(kind, (3, 24, 6, 35, 18), 8, (5, 9), 4, 2, torch.empty(0, dtype=torch.float16))
    assert found == Key("bilinear", kind, "16-bit", (3, 24, 6, 35, 18, 8, 5, 9, 4, 2))
    assert found == tuning.bilinear_key(
        kind, torch.empty(3, 24, 6, 35, 18, device="meta").shape, 8, (5, 9), 4, 2, torch.empty(0, dtype=torch.bfloat16)
    )
    assert Key.parse(str(found)) == found
    assert all(type(n) is int for n in found.sizes)


@pytest.fixture
def _precision() -> Iterator[None]:
    former = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(former)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize(
    ("dtype", "setting", "element"),
    [
        (torch.float16, "high", "16-bit"),
        (torch.bfloat16, "highest", "16-bit"),
        (torch.float32, "highest", "float32"),
        (torch.float32, "high", "tf32"),
        (torch.float32, "medium", "tf32"),
        (torch.float64, "high", "float64"),
        (torch.float64, "highest", "float64"),
    ],
)
def test_element_of_a_key(dtype: torch.dtype, setting: str, element: str) -> None:
    torch.set_float32_matmul_precision(setting)
    tensor = torch.empty(0, dtype=dtype)
    assert tuning.region_key("gather", 1, 1, 1, 1, tensor).element == element
    found = tuning.relational_key("forward", 1, (1, 1, 1), 1, (1, 1, 1, 1), (1, 1, 1), tensor)
    assert found.element == element
    assert tuning.bilinear_key("mix", (1, 1, 1, 1, 1), 1, (1, 1), 1, 1, tensor).element == element


# --- files: what they say -------------------------------------------------------------------------------------------

SEVERAL = {
    key(): entry(config(64, registers=200), 12.3e-6),
    key(64): entry(config(32), 3.2e-6, complete=False),
    key(kind="scatter"): Entry(config(), 7e-6, config(), 7e-6, True),
    rsa_key(): entry(RelationalConfig(plane=(4, 8), splits=12, clips=4, order="second"), 123.4e-6),
    rsa_key(kind="by_h1"): entry(RelationalConfig(block_m=32, splits=256), 2e-3),
    bat_key(): entry(BilinearConfig(64, 1, joint=False, fused=False, num_warps=8), 45.6e-6),
    bat_key(kind="mix"): entry(BilinearConfig(512, num_stages=3), 1e-6, complete=False),
}


def test_what_a_file_says(tmp_path: Path) -> None:
    """Readable and diffable: sorted keys, one entry a line."""
    path = written(tmp_path / "a.json", SEVERAL)
    text = path.read_text()
    document = json.loads(text)
    assert set(document) == {"schema", "gpu", "versions", "kernels", "entries"}
    assert document["schema"] == 1
    assert document["gpu"] == {"name": GPU.name, "capability": "9.0"}
    assert set(document["versions"]) == {"dyreg_triton", "torch", "triton"}
    assert document["versions"]["dyreg_triton"] == dt.__version__
    assert document["versions"]["torch"] == torch.__version__
    assert document["kernels"] == {op: kernel_hash(op) for op in ("bilinear", "region", "relational")}
    assert set(document["entries"]) == {str(k) for k in SEVERAL}
    said = document["entries"][str(key())]
    assert set(said) == {"config", "us", "default", "default_us", "complete"}
    assert said["config"] == {"block_n": 8, "block_c": 64, "block_p": 64, "num_warps": 4, "registers": 200}
    assert said["default"] == {**said["config"], "num_warps": 2}
    assert said["us"] == pytest.approx(12.3, rel=1e-2)
    assert said["default_us"] == pytest.approx(15.375, rel=1e-2)
    assert said["complete"] is True
    assert document["entries"][str(key(64))]["complete"] is False
    assert document["entries"][str(rsa_key())]["config"]["plane"] == [4, 8]
    said = document["entries"][str(bat_key())]
    assert said["config"] == {
        "block_n": 64, "steps": 1, "joint": False, "fused": False, "num_warps": 8, "num_stages": 2,
    }  # fmt: skip
    assert said["default"] == {**said["config"], "num_warps": 2}
    kept = document["entries"][str(key(kind="scatter"))]
    assert (kept["config"], kept["us"]) == (kept["default"], kept["default_us"])

    assert list(document["entries"]) == sorted(document["entries"])
    lines = [
        line.strip().rstrip(",") for line in text.splitlines() if line.strip().startswith(('"bil', '"reg', '"rel'))
    ]
    entries = [line for line in lines if "config" in line]
    assert len(entries) == len(SEVERAL)
    assert [json.loads("{" + line + "}") for line in entries] == [{k: v} for k, v in document["entries"].items()]
    assert text.endswith("\n")


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", SEVERAL)
    found = files.read(path, GPU)
    assert about_equal(found, SEVERAL)
    assert all(isinstance(k, Key) and isinstance(e, Entry) for k, e in found.items())
    again = written(tmp_path / "b.json", dict(reversed(found.items())))
    assert again.read_bytes() == path.read_bytes()


def test_merge_adds_and_replaces(tmp_path: Path) -> None:
    path = written(tmp_path / "deep" / "er" / "a.json", {key(): config(), key(64): config(64)})
    written(path, {key(64): config(128), key(32): config(16)})
    found = files.read(path, GPU)
    assert {k: e.config for k, e in found.items()} == {key(): config(), key(64): config(128), key(32): config(16)}
    assert sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")) == ["a.json"]


def test_merge_of_nothing_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", SEVERAL)
    before = path.read_bytes()
    files.merge(path, GPU, {})
    assert path.read_bytes() == before


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, seconds: float) -> None:
    path = written(tmp_path / "a.json", {key(): config()})
    before = path.read_bytes()
    for wrong in ({key(0): config()}, {key(2): entry(config())._replace(seconds=seconds)}):
        with pytest.raises(ValueError, match=r"a\.json"):
            files.merge(path, GPU, {k: e if isinstance(e, files.Entry) else entry(e) for k, e in wrong.items()})
        assert path.read_bytes() == before


def test_kernel_hash_is_of_the_text() -> None:
    hashes = [kernel_hash(op) for op in ("region", "relational", "bilinear")]
    assert len(set(hashes)) == 3
    assert all(isinstance(h, str) and len(h) >= 8 for h in hashes)
    assert hashes == [kernel_hash(op) for op in ("region", "relational", "bilinear")]


CHANGES = [
    ("common", {"bilinear", "region", "relational"}), ("bilinear", {"bilinear"}), ("region", {"region"}),
    ("profiles", {"region"}), ("relational", {"relational"}), ("relational_gradients", {"relational"}),
]  # fmt: skip


@pytest.mark.parametrize(("file", "ops"), CHANGES)
def test_kernel_hash_is_of_every_source_of_the_op(file: str, ops: set[str]) -> None:
    """A letter more in one file, and the configs of the ops that it belongs to say nothing any more."""
    before, read = {op: kernel_hash(op) for op in SPACES}, Path.read_text

    def changed(path: Path, *args: Any, **options: Any) -> str:
        return read(path, *args, **options) + " " * (path.name == f"{file}.py")

    with mock.patch.object(Path, "read_text", changed):
        after = {op: kernel_hash.__wrapped__(op) for op in SPACES}
    assert {op for op in SPACES if after[op] != before[op]} == ops


# --- configs as JSON ------------------------------------------------------------------------------------------------

widths = st.one_of(  # of a tile, and whether one product takes it
    st.tuples(st.sampled_from([16, 64, 4096]), st.just(True)),
    st.tuples(st.sampled_from([1, 2, 16, 64, 4096]), st.just(False)),
)
bilinear_configs = st.builds(
    lambda width, steps, *others: BilinearConfig(width[0], steps, width[1], *others),
    widths, st.integers(1, 2**31 - 1), st.booleans(), st.sampled_from([1, 4, 32]), st.integers(1, 9),
)  # fmt: skip


@settings(60)
@given(bilinear_configs)
def test_a_config_is_its_json(some: BilinearConfig) -> None:
    fields = json.loads(json.dumps(to_json(some)))
    assert fields == dataclasses.asdict(some)
    found = from_json("bilinear", fields)
    assert type(found) is BilinearConfig
    assert found == some
    assert all(type(getattr(found, name)) is type(value) for name, value in vars(some).items())


@pytest.mark.parametrize("field", ["joint", "fused"])
@pytest.mark.parametrize("value", [0, 1, 1.0, None, "true", "", [], [True], {}], ids=repr)
def test_what_is_no_bool_is_no_config(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is .*accepted is bool"):
        from_json("bilinear", {**to_json(BilinearConfig()), field: value})


@pytest.mark.parametrize("field", ["block_n", "steps", "num_warps", "num_stages"])
@pytest.mark.parametrize("value", [True, False, None, 2.0, "16", [16], 0, -1], ids=repr)
def test_what_is_no_number_is_no_config(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is "):
        from_json("bilinear", {**to_json(BilinearConfig()), field: value})


def test_fields_of_another_config() -> None:
    for fields in (to_json(RelationalConfig()), to_json(config()), {}, [], None, {**to_json(BilinearConfig()), "x": 1}):
        with pytest.raises(ValueError, match="BilinearConfig"):
            from_json("bilinear", fields)
    for missing in to_json(BilinearConfig()):
        fields = {name: value for name, value in to_json(BilinearConfig()).items() if name != missing}
        with pytest.raises(ValueError, match="BilinearConfig"):
            from_json("bilinear", fields)


# --- files: what is not used ----------------------------------------------------------------------------------------


def unusable(path: Path, gpu: Gpu = GPU, **options: Any) -> str:
    """Why the file is not used."""
    with pytest.raises(files.Unusable) as refusal:
        files.read(path, gpu, **options)
    assert str(refusal.value)
    return str(refusal.value)


KEY, RSA_KEY, BAT_KEY = str(key()), str(rsa_key()), str(bat_key())
CORRUPT = {
    **{f"{name} missing": without(name) for name in ("schema", "gpu", "versions", "kernels", "entries")},
    **{f"{name} is a list": set_in(name)([]) for name in ("gpu", "versions", "kernels", "entries")},
    **{f"{name} is null": set_in(name)(None) for name in ("schema", "gpu", "versions", "kernels", "entries")},
    "schema is a text": set_in("schema")("1"),
    "schema of the future": set_in("schema")(2),
    "schema zero": set_in("schema")(0),
    "schema true": set_in("schema")(True),
    "a number for the name": set_in("gpu", "name")(3000),
    "no name": without("gpu", "name"),
    "no capability": without("gpu", "capability"),
    "no triton": without("versions", "triton"),
    "an entry is a list": set_in("entries", KEY)([]),
    "an entry is null": set_in("entries", KEY)(None),
    "a key that is none": set_in("entries", "region.gather 16-bit frames=256")({}),
    **{f"no {name}": without("entries", KEY, name) for name in ("config", "us", "default", "default_us", "complete")},
    **{
        f"{name} is {value!r}": set_in("entries", KEY, name)(value)
        for name, values in {
            "config": ([], None, {}, "default", [8, 32, 64]),
            "default": ([], None, {}, 3),
            "us": ("12.3", None, [], True, -1.0, 0, math.nan, math.inf),
            "default_us": ("12.3", None, {}, True, -0.5, math.nan),
            "complete": (None, 1, "true", []),
        }.items()
        for value in values
    },
    **{
        f"{name} is {value!r}": set_in("entries", KEY, "config", name)(value)
        for name, values in {
            "block_c": ("64", 64.0, None, True, 48, 0, -16, [64], 2**70),
            "num_warps": (3, "4", None, 4.5),
            "registers": ("255", 1.5, [], -1, True),
        }.items()
        for value in values
    },
    "a block missing": without("entries", KEY, "config", "block_p"),
    "a field too many": set_in("entries", KEY, "config", "block_z")(16),
    "another op's config": set_in("entries", KEY, "config")(dataclasses.asdict(RelationalConfig())),
    "the default is wrong": set_in("entries", KEY, "default", "block_n")(-8),
    **{
        f"relational: {name} is {value!r}": set_in("entries", RSA_KEY, "config", name)(value)
        for name, values in {
            "plane": (8, "88", [8], [8, 8, 8], [8, "8"], [3, 5], [8.0, 8.0], None, [-8, -8], [True, 8], {}),
            "order": ("third", None, 1, []),
            "block_m": (64, "16", 16.0),
            "splits": (0, 1.5, "3", None, True),
            "clips": (-1, [], 2.0),
            "num_stages": (0, "2"),
        }.items()
        for value in values
    },
    **{
        f"bilinear: {name} is {value!r}": set_in("entries", BAT_KEY, "config", name)(value)
        for name, values in {
            "block_n": (0, 48, "64", 64.0, True, None, 8192),
            "steps": (0, -1, 1.0, True, None, "1"),
            "joint": (0, 1, None, "true", []),
            "fused": (0, 1, None, "false", {}),
            "num_warps": (0, 6, 64, False),
            "num_stages": (0, "2", True),
        }.items()
        for value in values
    },
    "bilinear: a field missing": without("entries", BAT_KEY, "config", "fused"),
    "bilinear: the default is wrong": set_in("entries", BAT_KEY, "default", "joint")(3),
    "bilinear: another op's config": set_in("entries", BAT_KEY, "config")(dataclasses.asdict(config())),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt(tmp_path: Path, case: str) -> None:
    path = edited(written(tmp_path / "a.json", SEVERAL), CORRUPT[case])
    unusable(path)
    unusable(path, packaged=True) if "triton" not in case else None


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n \n",
    "null": b"null",
    "a number": b"1",
    "a text": b'"schema"',
    "a list": b"[]",
    "an empty object": b"{}",
    "no text": b"\xff\xfe\x00\x01",
    "half a letter": b'{"schema": 1, "gpu": {"name": "\xc3"}}',
    "zeros": b"\0" * 4096,
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "a long number": b'{"schema": ' + b"1" * 10_000 + b"}",
    "no quotes": b"{schema: 1}",
    "a page": b"<!DOCTYPE html>",
}


@pytest.mark.parametrize("case", TEXTS)
def test_other_texts(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(TEXTS[case])
    unusable(path)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    unusable(tmp_path / "a.json")


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", {key(): config(), rsa_key(): RelationalConfig(), bat_key(): BilinearConfig()})
    whole = path.read_bytes()
    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        with pytest.raises(files.Unusable):
            files.read(path, GPU)


def test_a_byte_changed_anywhere(tmp_path: Path) -> None:
    """What is still a file is read; nothing else happens but `Unusable`."""
    path = written(tmp_path / "a.json", {key(): config(), rsa_key(): RelationalConfig(), bat_key(): BilinearConfig()})
    whole, generator, refused = path.read_bytes(), random.Random(3), 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] = generator.choice(b'\x00\xff {}[]",:-.0123456789eEtfnN\\x')
        path.write_bytes(bytes(changed))
        refused += not readable(path)
    assert refused > len(whole) // 4


def readable(path: Path) -> bool:
    """Whether a file is used; then all that it says is in order."""
    try:
        with collected():
            found = files.read(path, GPU)
    except files.Unusable:
        return False
    for some, said in found.items():
        assert Key.parse(str(some)) == some
        kind = {"region": Config, "relational": RelationalConfig, "bilinear": BilinearConfig}[some.op]
        assert type(said.config) is type(said.default) is kind
        assert kind(**vars(said.config)) == said.config
        assert isinstance(said.complete, bool)
        assert said.seconds > 0
        assert said.default_seconds > 0
        others = ("plane", "order", "registers", "joint", "fused")
        assert all(type(v) is int for name, v in vars(said.config).items() if name not in others)
        assert all(type(v) is bool for name, v in vars(said.config).items() if name in ("joint", "fused"))
    return True


def test_wrong_types_everywhere(tmp_path: Path) -> None:
    """Each value of a file, replaced by each kind of JSON value."""
    path = written(
        tmp_path / "a.json", {key(): config(registers=128), rsa_key(): RelationalConfig(), bat_key(): BilinearConfig()}
    )
    whole = json.loads(path.read_text())

    def places(value: Any, where: tuple = ()) -> Iterator[tuple]:
        if where:
            yield where
        if isinstance(value, (dict, list)):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from places(inner, (*where, name))

    refused = done = 0
    for where in places(whole):
        for value in (None, True, -1, 0, 7, 1.5, 1e400, "", "x", [], [1, 2], {}, {"a": 1}):
            document = json.loads(path.read_text()) if done == 0 else json.loads(json.dumps(whole))
            set_in(*where)(value)(document)
            changed = tmp_path / "b.json"
            changed.write_text(json.dumps(document))
            refused += not readable(changed)
            done += 1
    assert refused > 0.8 * done


@pytest.mark.parametrize(
    "other",
    [
        Gpu("Example GPU 4000", "9.0", GPU.shared),
        Gpu(GPU.name, "8.0", GPU.shared),
        Gpu(GPU.name, "9.0a", GPU.shared),
        Gpu(GPU.name.lower(), "9.0", GPU.shared),
    ],
    ids=str,
)
def test_foreign(tmp_path: Path, other: Gpu) -> None:
    path = written(tmp_path / "a.json", SEVERAL, other)
    reason = unusable(path)
    assert other.name in reason or other.capability in reason
    assert unusable(path, packaged=True)
    assert about_equal(files.read(path, other), SEVERAL)


def test_another_release_of_triton(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", SEVERAL)
    version = triton_version(path)
    for other in (other_release(version), "1" + version, version.replace(".", "", 1) + ".0", "not installed", ""):
        edited(path, set_in("versions", "triton")(other))
        reason = unusable(path)
        assert "triton" in reason
        assert about_equal(files.read(path, GPU, packaged=True), SEVERAL)


def test_versions_that_do_not_matter(tmp_path: Path) -> None:
    """A patch of triton; any torch, any of this library: the kernels' text is what counts."""
    path = written(tmp_path / "a.json", SEVERAL)
    major, minor, *_ = triton_version(path).split(".")
    for name, other in (("triton", f"{major}.{minor}.99"), ("torch", "1.0"), ("dyreg_triton", "99.0")):
        edited(path, set_in("versions", name)(other))
    with collected() as reports:
        assert about_equal(files.read(path, GPU), SEVERAL)
    assert not reports


@pytest.mark.parametrize("packaged", [False, True])
@pytest.mark.parametrize("op", ["region", "relational", "bilinear"])
def test_an_op_whose_kernels_changed(tmp_path: Path, op: str, packaged: bool) -> None:
    path = edited(written(tmp_path / "a.json", SEVERAL), set_in("kernels", op)("0123456789abcdef"))
    with collected():
        found = files.read(path, GPU, packaged=packaged)
    assert about_equal(found, {k: e for k, e in SEVERAL.items() if k.op != op})


@pytest.mark.parametrize("op", ["region", "relational", "bilinear"])
def test_an_op_that_the_file_does_not_know(tmp_path: Path, op: str) -> None:
    """As a file of an earlier release: entries of the others stand."""
    path = written(tmp_path / "a.json", SEVERAL)
    edited(path, without("kernels", op))
    with collected():
        try:
            found = files.read(path, GPU)
        except files.Unusable:
            return
    assert about_equal(found, {k: e for k, e in SEVERAL.items() if k.op != op})


def test_a_file_of_before_an_op(tmp_path: Path) -> None:
    """As a file of an earlier release, without entries of it: used as it is, and added to."""
    before = {k: e for k, e in SEVERAL.items() if k.op != "bilinear"}
    path = edited(written(tmp_path / "a.json", before), without("kernels", "bilinear"))
    with collected() as reports:
        assert about_equal(files.read(path, GPU), before)
        files.merge(path, GPU, {k: e for k, e in SEVERAL.items() if k.op == "bilinear"})
        assert about_equal(files.read(path, GPU), SEVERAL)
    assert not reports
    assert not (tmp_path / "a.json.unusable").exists()


@pytest.mark.parametrize("case", BROKEN)
def test_merge_moves_aside_what_is_not_usable(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "a.json", SEVERAL)
    BROKEN[case](path)
    before = path.read_bytes()
    with collected():
        written(path, {key(1): config()})
        found = files.read(path, GPU)
    kept = {k: e for k, e in SEVERAL.items() if k.op != "region"} if case == "changed kernels" else {}
    assert about_equal(found, {**kept, key(1): entry(config())})
    assert (tmp_path / "a.json.unusable").read_bytes() == before
    assert json.loads(path.read_text())["kernels"]["region"] == kernel_hash("region")


# --- files: several writers, and interruptions ----------------------------------------------------------------------


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """The former file stands, and nothing lies around."""
    path = written(tmp_path / "a.json", SEVERAL)
    before, names = path.read_bytes(), {p.name for p in tmp_path.iterdir()}
    full = OSError(28, "No space left on device")
    with mock.patch.object(os, "replace", side_effect=full), pytest.raises(OSError, match="No space left"):
        written(path, {key(1): config()})
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} <= names | {"a.json.lock"}
    written(path, {key(1): config()})
    assert set(files.read(path, GPU)) == {*SEVERAL, key(1)}


def test_merge_interrupted_anywhere(tmp_path: Path) -> None:
    """At every line of it: the file is the former one or the new one, and the lock is free."""
    folder, path = Path(files.__file__).parent, tmp_path / "a.json"
    former, new = {key(): entry(config())}, {key(64): entry(config(64))}
    written(path, former)
    before = path.read_bytes()
    with interrupted_at(-1, folder) as lines:
        written(path, new)
    after = path.read_bytes()
    assert lines[0] > 20
    outcomes = set()
    for line in range(1, lines[0] + 1):
        path.write_bytes(before)
        with pytest.raises(KeyboardInterrupt), interrupted_at(line, folder):
            written(path, new)
        assert path.read_bytes() in (before, after), line
        outcomes.add(path.read_bytes() == after)
        assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["a.json"]
    assert outcomes == {False, True}
    written(path, new)
    assert path.read_bytes() == after


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_moving_aside_interrupted_anywhere(tmp_path: Path) -> None:
    """What can still be used is in its place at every moment, and the rest is not lost."""
    folder, path = Path(files.__file__).parent, tmp_path / "a.json"
    edited(written(path, {key(): config(), rsa_key(): RelationalConfig()}), set_in("kernels", "region")("0123456789ab"))
    before = path.read_bytes()
    for _ in range(2):  # what is reported, and read of the kernels, comes once
        path.write_bytes(before)
        with interrupted_at(-1, folder) as lines:
            written(path, {key(64): config(64)})
    after = path.read_bytes()
    for line in range(1, lines[0] + 1):
        (tmp_path / "a.json.unusable").unlink(missing_ok=True)
        path.write_bytes(before)
        with pytest.raises(KeyboardInterrupt), interrupted_at(line, folder):
            written(path, {key(64): config(64)})
        assert rsa_key() in files.read(path, GPU), line
        kept = tmp_path / "a.json.unusable"
        assert path.read_bytes() == before or (path.read_bytes(), kept.read_bytes()) == (after, before)


def test_threads_that_merge_at_once(tmp_path: Path) -> None:
    path, failures = tmp_path / "a.json", []

    def work(first: int) -> None:
        try:
            for i in range(8):
                written(path, {key(cells=first + i): config()})
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert {k.sizes[-1] for k in files.read(path, GPU)} == {100 * n + i for n in range(1, 5) for i in range(8)}


WRITER = """
import sys
from pathlib import Path
from dyreg_triton._core.gpu import Gpu
from dyreg_triton.configs import files
from dyreg_triton.tuning import Config, Key
from dyreg_triton.configs.files import Entry

path, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
gpu = Gpu("Example GPU 3000 (SXM)", "9.0", 232448)
print("ready", flush=True)
sys.stdin.readline()
for cells in range(first, first + count):
    entry = Entry(Config(8, 32, 64), 1e-5, Config(8, 32, 64), 1e-5, True)
    files.merge(path, gpu, {Key("region", "gather", "16-bit", (256, 16, 512, cells)): entry})
"""


@pytest.mark.slow
def test_processes_that_merge_at_once(tmp_path: Path) -> None:
    """Two lose nothing, whatever becomes of a third, and the file can be read at every moment."""
    path = tmp_path / "a.json"
    writers = [process(WRITER, path, first, count) for first, count in ((1000, 60), (2000, 60), (3000, 10**6))]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n", writer.stderr and writer.stderr.read()
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        reads, end, known = 0, time.monotonic() + PATIENCE, set()
        while any(writer.poll() is None for writer in writers[:2]):
            assert time.monotonic() < end
            if not path.exists():
                continue
            now = set(files.read(path, GPU))
            assert known <= now  # nothing that was there is lost
            known, reads = now, reads + 1
            if sum(k.sizes[-1] >= 3000 for k in known) >= 10:
                writers[2].kill()  # at whatever it does
        assert reads
        writers[2].kill()
        for writer in writers[:2]:
            assert writer.wait(PATIENCE) == 0, writer.stderr and writer.stderr.read()
        writers[2].wait(PATIENCE)
        found = {k.sizes[-1] for k in files.read(path, GPU)}
        assert found >= {*range(1000, 1060), *range(2000, 2060)}
        written(path, {key(1): config()})
        assert not (tmp_path / "a.json.unusable").exists()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
