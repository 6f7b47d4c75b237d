"""Tuning files: one JSON per kind of GPU, one line per kernel and problem, for people and `diff` to read."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._core.atomic_files import replacing
from .._core.gpu import Gpu
from .._core.installed import triton_version
from .keys import Key
from .table import SPACES, from_json, kernel_hash, to_json

SCHEMA = 1
_PACKAGED = Path(__file__).parent / "gpus"


class Entry(NamedTuple):
    """What tuning found for a key: the config and its seconds, the default's, and whether the search had ended.

    Where the default was kept, config is default and seconds is default_seconds.
    """

    config: Any
    seconds: float
    default: Any
    default_seconds: float
    complete: bool


class Unusable(Exception):
    """Why nothing of a file can be used."""


def _name(gpu: Gpu) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return f"{slug}-{gpu.capability}.json"


def user_file(gpu: Gpu) -> Path:
    """Where `tune` keeps what it finds for this GPU: $XDG_CACHE_HOME or ~/.cache, dyreg_triton/tuning/."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dyreg_triton" / "tuning" / _name(gpu)


def packaged_file(gpu: Gpu) -> Path:
    """The file that comes with the library for this GPU, where there is one."""
    return _PACKAGED / _name(gpu)


@functools.cache
def report(path: Path, reason: str, part: str = "") -> None:
    """Warn, once a process, that a file or a part of it is ignored."""
    warnings.warn(f"dyreg_triton: tuning file {path}{part} is ignored: {reason}", stacklevel=2)


def _release(version: object) -> str:
    return ".".join(str(version).split(".")[:2])


def versions() -> dict[str, str]:
    """What a file says of the software that it was measured with."""
    import torch

    from .._core.version import __version__

    return {"dyreg_triton": __version__, "torch": torch.__version__, "triton": triton_version()}


def _parse(text: str, gpu: Gpu, packaged: bool) -> tuple[dict[Key, Entry], list[str]]:
    """The usable entries, and which parts are not and why."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it is corrupt, no JSON: {error}") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise Unusable("it is corrupt: it has no schema")
    if content["schema"] != SCHEMA or isinstance(content["schema"], bool):
        raise Unusable(f"its schema is {content['schema']!r:.50}; this version reads {SCHEMA}")
    parts: dict[str, Any] = {name: content.get(name) for name in ("gpu", "versions", "kernels", "entries")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise Unusable(f"it is corrupt: {name} is {part!r:.50}, no object")
    made_for = parts["gpu"].get("name"), parts["gpu"].get("capability")
    if made_for != (gpu.name, gpu.capability):
        raise Unusable(f"it is of another GPU, {made_for[0]} ({made_for[1]}); this one is {gpu}")
    then, now = parts["versions"].get("triton"), versions()["triton"]
    if not packaged and _release(then) != _release(now):  # a packaged one is still better than no measurement
        raise Unusable(f"it is stale: measured with triton {then}, here is {now}")
    stale = {op for op in SPACES if op in parts["kernels"] and parts["kernels"][op] != kernel_hash(op)}
    entries: dict[Key, Entry] = {}
    for text_of_key, fields in parts["entries"].items():
        try:
            key = Key.parse(text_of_key)
            if key.op not in parts["kernels"]:
                raise ValueError(f"kernels has no hash of {key.op}")
            if key.op not in stale:
                entries[key] = _entry(key, fields)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise Unusable(f"it is corrupt: {text_of_key!r:.100}: {type(error).__name__}: {error}") from error
    return entries, [f"it is stale: the kernels of {op} have changed since" for op in sorted(stale)]


def _entry(key: Key, fields: Any) -> Entry:
    if not isinstance(fields, dict):
        raise TypeError(f"entry is {fields!r:.50}, no object")
    for name in ("us", "default_us"):
        if type(fields[name]) not in (int, float) or not 0 < fields[name] < 1e12:
            raise ValueError(f"{name} is {fields[name]!r}; accepted is a number > 0")
    if not isinstance(fields["complete"], bool):
        raise ValueError(f"complete is {fields['complete']!r}; accepted is true or false")
    return Entry(
        from_json(key.op, fields["config"]), fields["us"] / 1e6, from_json(key.op, fields["default"]),
        fields["default_us"] / 1e6, fields["complete"],
    )  # fmt: skip


def read(path: Path, gpu: Gpu, packaged: bool = False) -> dict[Key, Entry]:
    """The entries of a file; those of an op whose kernels have changed are left out and reported.

    Raises:
        Unusable: it cannot be read, is corrupt, of another schema, GPU, or (but for a packaged one) release of Triton.
    """
    entries, stale = _parse(_text(path), gpu, packaged)
    for reason in stale:
        report(path, reason)
    return entries


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"it cannot be read: {error}") from error


def write(path: Path, gpu: Gpu, entries: Mapping[Key, Entry]) -> None:
    """Write a file of these entries, under a temporary name first."""
    header = {
        "schema": SCHEMA,
        "gpu": {"name": gpu.name, "capability": gpu.capability},
        "versions": versions(),
        "kernels": {op: kernel_hash(op) for op in SPACES},
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(_rows(entries).items())]
    block = "{\n" + ",\n".join(rows) + "\n }" if rows else "{}"
    text = "{\n" + ",\n".join([*lines, f' "entries": {block}']) + "\n}\n"
    try:
        _parse(text, gpu, packaged=False)
    except Unusable as reason:
        raise ValueError(
            f"tuning file {path} is left as it is, for what is to be written could not be read: {reason}"
        ) from reason
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _rows(entries: Mapping[Key, Entry]) -> dict[str, dict[str, Any]]:
    return {
        str(key): {
            "config": to_json(entry.config), "us": max(round(entry.seconds * 1e6, 3), 0.001),
            "default": to_json(entry.default), "default_us": max(round(entry.default_seconds * 1e6, 3), 0.001),
            "complete": entry.complete,
        }
        for key, entry in entries.items()
    }  # fmt: skip


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process changes the file, or what lies beside it."""
    from filelock import FileLock  # torch needs it too, so it is there

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def merge(path: Path, gpu: Gpu, entries: Mapping[Key, Entry]) -> None:
    """Add entries to a file, or replace them, while no other process does.

    A file of which anything cannot be used any more is kept beside it as PATH.unusable.
    """
    path = Path(path)
    with locked(path):
        former: dict[Key, Entry] = {}
        if path.exists():
            try:
                former, lost = _parse(_text(path), gpu, packaged=False)
            except Unusable as reason:
                lost = [str(reason)]
            if lost:
                report(path, f"{lost[0]}; it is kept as {path.name}.unusable")
                with replacing(path.with_name(f"{path.name}.unusable")) as temporary:
                    shutil.copyfile(path, temporary)  # what can be used of it stays in its place meanwhile
        write(path, gpu, {**former, **entries})
