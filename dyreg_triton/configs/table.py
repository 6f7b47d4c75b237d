"""The launch configs of every op, by name; how they are written to files, and which kernels they were measured with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from . import bilinear, region, relational

SPACES = {module.SPACE.keys.op: module.SPACE for module in (bilinear, region, relational)}


@functools.cache
def kernel_hash(op: str) -> str:
    """Of the text of the op's kernels: a config that was measured with other kernels says nothing of these."""
    digest = hashlib.sha256()
    for name in SPACES[op].sources:
        spec = importlib.util.find_spec(f"dyreg_triton.kernels.{name}")
        if spec is None or spec.origin is None:
            raise ImportError(f"the file of the kernels {name!r} is not installed")
        digest.update(Path(spec.origin).read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:16]


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a config."""
    return dataclasses.asdict(config)


def from_json(op: str, fields: Any) -> Any:
    """The config of these fields; ValueError where they are not one's."""
    kind = SPACES[op].config
    if not isinstance(fields, dict) or set(fields) != {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"config is {fields!r}; accepted are the fields of {kind.__name__}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    defaults = {field.name: field.type for field in dataclasses.fields(kind)}
    for name, value in values.items():
        accepted = {
            "int": type(value) is int, "bool": type(value) is bool, "int | None": value is None or type(value) is int,
            "str": isinstance(value, str),
            "tuple[int, int]": isinstance(value, tuple) and len(value) == 2 and all(type(n) is int for n in value),
        }  # fmt: skip
        if not accepted[str(defaults[name])]:
            raise ValueError(f"config's {name} is {value!r}; accepted is {defaults[name]}")
    return kind(**values)
