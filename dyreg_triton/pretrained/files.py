"""The files of a saved layer, config.json and model.safetensors: written whole or not at all, read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._core.atomic_files import replacing
from .._core.validation import is_integer

FORMAT = "dyreg_triton"
# Raised when the files change, or what their arguments mean: a default that changes too, for only what a constructor
# was given is written down.
SCHEMA = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        total.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        total.update(t.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"


def parsed(op: str, source: str, text: str | bytes) -> dict[str, Any]:
    """A config of a schema that is known."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {source} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{op}: {source} is not of this library; accepted is a JSON object with format {FORMAT!r}")
    schema: Any = config.get("schema")
    version = config.get("version")
    if not is_integer(schema) or schema < 1:
        raise ValueError(f"{op}: schema in {source} is {schema!r}; accepted is an integer from 1 to {SCHEMA}")
    if schema > SCHEMA:
        known = isinstance(version, str) and re.fullmatch(r"\d[\w.]*", version)
        newer = f"'dyreg-triton>={version}'" if known else "--upgrade dyreg-triton"
        raise ValueError(f"{op}: schema in {source} is {schema}; accepted is up to {SCHEMA}; pip install {newer}")
    config.setdefault("shared", {})
    kinds = {"version": str, "class": str, "weights": str, "arguments": dict, "shared": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            told = repr(config[key]) if key in config else "missing"
            raise ValueError(f"{op}: {key} in {source} is {told:.200}; accepted is a {kind.__name__}")
    if not all(isinstance(name, str) for name in config["shared"].values()):
        raise ValueError(f"{op}: shared in {source} is {config['shared']!r:.200}; accepted are names of tensors")
    return config


def folder_of(op: str, value: Any, name: str = "directory") -> Path:
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{op}: {name} is {value!r}; accepted is a path")
    if not os.fspath(value):
        raise ValueError(f"{op}: {name} is ''; accepted is a path")
    return Path(value)


def content(op: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{op}: {path} is missing; a saved layer is {CONFIG} and {WEIGHTS}") from error


def unpacked(op: str, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file, each in memory of its own, and the config beside them if there is one."""
    safetensors, data = safetensors_torch(op), content(op, path)
    try:
        tensors = safetensors.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # safetensors raises what it likes
        raise ValueError(f"{op}: {path} is no safetensors file, or damaged: {error}") from error
    return tensors, (header.get("__metadata__") or {}).get(FORMAT)


def replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it


def safetensors_torch(op: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{op}: the package safetensors is missing; pip install safetensors") from error
    return safetensors.torch
