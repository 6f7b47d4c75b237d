"""Rows as `python -m bench run` writes them, invented: two machines, every suite. No figure here was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CPU = {"device": "CPU Sample, 1 thread", "kind": "cpu", "capability": None}
GPU = {"device": "Sample H200", "kind": "cuda", "capability": "9.0"}
LIMITS = {"cpu": (3e10, {"float32": 1e11}), "cuda": (4e12, {"bfloat16": 7e14, "float32": 5e13})}


def about(machine: Row, date: str = "2026-11-20T10:00:00+00:00") -> Row:
    """The machine's part of a row."""
    versions = {"torch": "2.13.0", "triton": "3.7.1", "python": "3.11.7", "dyreg_triton": "0.1.0", "commit": "abc1234"}
    return {**machine, "copy_bandwidth": LIMITS[machine["kind"]][0], **versions, "date": date}


def timed(machine: Row, **changed: Any) -> Row:
    """A row of an op's suite; what follows from other fields follows from the changed ones."""
    row: Row = {
        "schema": 2,
        "suite": "region",
        "op": "region_pool",
        "part": "stage",
        "label": "16x64x28x28, N 9, center",
        "mode": "forward+backward",
        "shape": [16, 64, 28, 28],
        "dtype": "float32",
        "repeats": 24,
        "seconds": {"ours": 2e-3, "published": 4e-3, "compiled": 3e-3},
        "floor_bytes": 10_000_000,
        "operations": 40_000_000,
        "extra_bytes": {"ours": 2**20, "published": 3 * 2**20, "compiled": 2 * 2**20},
        "tolerance": 1e-5,
        **about(machine),
        **changed,
    }
    bandwidth, rates = LIMITS[row["kind"]]
    row.setdefault("matrix_rate", rates[row["dtype"]])
    floor = max(row["floor_bytes"] / bandwidth, row["operations"] / row["matrix_rate"])
    seconds = row["seconds"]
    made = {
        "spread": {name: [0.99 * t, 1.02 * t] for name, t in seconds.items()},
        "speedup": {name: t / seconds["ours"] for name, t in seconds.items() if name != "ours"},
        "wall_seconds": {name: t + 2e-5 for name, t in seconds.items()},
        "floor_seconds": floor,
        "of_floor": floor / seconds["ours"],
        "of_matrix_rate": row["operations"] / seconds["ours"] / row["matrix_rate"],
        "errors": dict.fromkeys(seconds, row["tolerance"] / 50),
    }
    row = {**made, **row}
    wall = row["wall_seconds"]
    row.setdefault("wall_speedup", {name: t / wall["ours"] for name, t in wall.items() if name != "ours"})
    row.setdefault("wall_spread", {name: [0.99 * t, 1.02 * t] for name, t in wall.items()})
    return row


def device(machine: Row, op: str = "copy", dtype: str = "uint8", **changed: Any) -> Row:
    bandwidth, rates = LIMITS[machine["kind"]]
    rate = bandwidth if op == "copy" else rates[dtype]
    case = {"schema": 2, "suite": "device", "op": op, "part": "device", "label": f"large {dtype}", "dtype": dtype}
    measured = {"rate": rate, "spread": [0.99 * rate, 1.01 * rate], "errors": {"ours": 0.0}, "tolerance": 1e-5}
    return {**case, **measured, **about(machine), **changed}


def overhead(machine: Row, mode: str = "forward with gradient", seconds: float = 3e-5, **changed: Any) -> Row:
    case = {"schema": 2, "suite": "overhead", "op": "region_pool", "part": "overhead", "label": "tiny", "mode": mode}
    measured = {
        "dtype": "float32",
        "host_seconds": {"ours": seconds},
        "host_spread": {"ours": [0.98 * seconds, 1.03 * seconds]},
        "launches": 1,
        "goal_seconds": 25e-6 if mode == "forward with gradient" else None,
        "spent": {"validation": 0.2 * seconds, "autograd": 0.5 * seconds, "rest": 0.3 * seconds},
        "stand_in": machine["kind"] == "cpu",
        "repeats": 50,
        "errors": {"ours": 0.0},
        "tolerance": 0.0,
    }
    return {**case, **measured, **about(machine), **changed}


def static(target: str = "sm_90", **changed: Any) -> Row:
    return {
        "schema": 2, "suite": "compiled", "op": "region_pool", "kernel": "gather", "kind": "forward",
        "case": "160x512x14x14, N 9", "dtype": "bfloat16", "target": target, "num_warps": 4, "registers": 96,
        "spills": 0, "shared": 8192, "occupancy": 0.3125, "limited_by": "registers", "programs": 1280, "waves": 1.94,
        "load_bytes": 8, "narrowest": 4, "store_bytes": 8, "tensor_core": 16, "tensor_core_kind": "HMMA",
        "loop": {"instructions": 210, "mix": {"integer": 0.4, "load": 0.3, "tensor core": 0.2, "control": 0.1}},
        "bytes_moved": 33_000_000, "floor_bytes": 32_000_000, "operations": 6e8, "floor_operations": 2.9e8,
        "shared_limit": 232448, **changed,
    }  # fmt: skip


def everything(machine: Row) -> list[Row]:
    """Rows of all suites and parts, as of one run on one machine."""
    cuda = machine["kind"] == "cuda"
    speed = 200 if cuda else 1
    dtypes = ("bfloat16", "float32") if cuda else ("float32",)
    rows = [device(machine), *(device(machine, "matmul", dtype) for dtype in dtypes)]
    for n, (mode, seconds) in enumerate((("forward", 1.8e-5), ("forward with gradient", 3e-5), ("backward", 2.6e-5))):
        ops = ("region_pool", "relational_attention", "bilinear_transform")
        rows += [overhead(machine, mode, seconds + n * 1e-6, op=op) for op in ops]

    def add(
        suite: str, op: str, part: str, label: str, shape: list[int], size: float, work: float, **more: Any
    ) -> None:
        for dtype in dtypes:
            for mode, factor in (("forward", 1), ("forward+backward", 3)):
                ours = factor * (size / 2e10 + work / 4e10) / speed + (4e-6 if cuda else 2e-4)
                wave = 1 + 0.4 * math.sin(len(rows))
                seconds = {"ours": ours, "published": ours * (2 + wave), "compiled": ours * (1 + 0.5 * wave)}
                if part == "table1":
                    seconds = {"ours": ours, "vanilla": 26 * ours, "efficient": 30 * ours, "multi-query": 2.9 * ours}
                case = {"suite": suite, "op": op, "part": part, "label": label, "shape": shape, "mode": mode}
                bytes_ = {name: int(size * (i + 1)) for i, name in enumerate(seconds)}
                graphs = {"graph_seconds": {n: 0.8 * t for n, t in seconds.items()}} if cuda and part == "small" else {}
                rows.append(
                    timed(
                        machine, **case, dtype=dtype, seconds=seconds, floor_bytes=int(factor * size),
                        operations=int(factor * work), extra_bytes=bytes_, **graphs, **more,
                    )
                )  # fmt: skip

    of = {"nodes": 9, "channels": 64, "batch": 16, "output_bytes": 3_000_000}  # as every row says its quantities
    for frames, c, side in ((160, 512, 14), (160, 256, 28), (512, 512, 28), (64, 256, 56)):
        size = frames * c * side**2 * 4 / (1 if cuda else 64)
        for init in ("center", "grid"):
            label = f"{frames}x{c}x{side}x{side}, N 9, {init}"
            add("region", "region_pool", "stage", label, [frames, c, side, side], size, size * 4.5, **of)
    add("region", "region_pool", "small", "16x64x16x16, N 9, center", [16, 64, 16, 16], 2**20, 2**22, **of)
    for n in (1, 4, 9, 16, 32, 64):
        swept = {**of, "nodes": n}
        add("region", "region_pool", "nodes", f"16x64x28x28, N {n}", [16, 64, 28, 28], 3e6, 1.5e6 * n, **swept)
    for c in (64, 256, 1024):
        swept = {**of, "channels": c}
        add("region", "region_pool", "channels", f"16x{c}x28x28, N 9", [16, c, 28, 28], 5e4 * c, 2e5 * c, **swept)
    for c, side in ((8, 56), (16, 28), (32, 14), (64, 7)):
        positions = 8 * 8 * side**2
        label = f"8x8x{c}x8x{side}x{side}, 5x7x7"
        add("relational", "relational_attention", "stage", label, [8, 8, c, 8, side, side],
            40.0 * positions * c, 500.0 * positions * c * c, taps=245, channels=c, batch=8)  # fmt: skip
    for name, values in (("taps", (27, 75, 147, 245, 405)), ("batch", (1, 2, 4, 8)), ("channels", (8, 16, 32, 64))):
        for value in values:
            work = 1e8 * value / values[0]
            label = f"1x8x32x8x14x14, {name} {value}"
            size = 1e7 if name == "taps" else 1e6 * value
            add("relational", "relational_attention", name, label, [1, 8, 32, 8, 14, 14], size, work,
                **{"taps": 245, "channels": 32, "batch": 1, name: value})  # fmt: skip
    add("relational", "relational_attention", "table1", "T 4, 14x14, 3x5x5", [1, 8, 8, 4, 14, 14], 1e6, 1e8)

    def bilinear(part: str, b: int, c: int, t: int, side: int, tk: int = 4, **swept: Any) -> None:
        shape, ts = [b, c, t, side, side], min(4, t) if tk else 0
        size = 8.0 * math.prod(shape)
        label = f"{'BATBlock, ' * (part == 'block')}B {b}, C {c}, {t}x{side}x{side}, k 8, tk {tk}"
        about = {"batch": b, "channels": c, "cells": 7, "k": 8, "tk": tk, "ts": ts, "output_bytes": int(2 * size)}
        label += "".join(f", {name} {value}" for name, value in swept.items())
        add("bilinear", "bilinear_transform", part, label, shape, size, size * 4, **{**about, **swept})

    for tk in (0, 4):
        bilinear("stage", 64, 256, 1, 56, tk)
        bilinear("stage", 8, 512, 8, 14, tk)
    bilinear("block", 1, 256, 8, 28)
    for n in (4, 7, 8, 14):
        bilinear("cells", 1, 64, 4, 56, cells=n)
    return rows


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
