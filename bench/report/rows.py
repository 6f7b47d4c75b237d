"""Read rows of measurements and keep those that may enter a report.

A row enters if it is of this schema, says all that its tables need, and passed its check: the error of every contender
that was timed is finite and within the row's tolerance. Whatever is left out is counted and named. Of rows of the same
case on the same machine the newest stays.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SCHEMA = 2
CASE = ("suite", "op", "part", "label", "dtype", "mode")  # what names a measured case on its machine
MODES = ("forward", "forward with gradient", "backward", "forward+backward")  # in the order of tables
STATIC_CASE = ("target", "op", "kernel", "kind", "case", "dtype")  # what names a compiled one
MACHINE = ("device", "torch", "python", "dyreg_triton", "commit", "date")  # texts that every measured row has
STATIC_NUMBERS = (  # which a compiled row may lack
    "occupancy", "programs", "waves", "load_bytes", "narrowest", "store_bytes", "tensor_core", "bytes_moved",
    "floor_bytes", "operations", "floor_operations", "issue_limit",
)  # fmt: skip
Row = dict[str, Any]


class Unfit(ValueError):
    """A row that cannot enter: `reason`, the same for all such rows, and the detail of this one."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class LeftOut:
    """Rows of one file that cannot enter for one reason; `first` says where the first of them is, and what it holds."""

    file: str
    reason: str
    first: str
    count: int = 1

    def __str__(self) -> str:
        rows = "1 row" if self.count == 1 else f"{self.count} rows"
        return f"left out: {rows} of {self.file}: {self.reason} ({self.first})"


@dataclass(frozen=True, order=True)
class Machine:
    """What figures may share a table: `kind` is "cuda" or "cpu", `capability` None on a CPU."""

    kind: str
    device: str
    capability: str | None

    @classmethod
    def of(cls, row: Row) -> Machine:
        return cls(row["kind"], row["device"], row.get("capability"))

    def __str__(self) -> str:
        return self.device + (f", capability {self.capability}" if self.capability else "")


@dataclass(frozen=True)
class Rows:
    """Rows that may enter, in the order of their cases; what was left out; how many had a newer twin."""

    rows: list[Row]
    left_out: list[LeftOut]
    older: int = 0

    def machines(self) -> dict[Machine, list[Row]]:
        """Measured rows by machine, GPUs first."""
        measured = [row for row in self.rows if kind_of(row) != "static"]
        keys = sorted({Machine.of(row) for row in measured}, key=lambda m: (m.kind != "cuda", m.device, str(m)))
        return {key: [row for row in measured if Machine.of(row) == key] for key in keys}

    def static(self) -> dict[str, list[Row]]:
        """Rows of compiled code by target."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if kind_of(row) == "static":
                found.setdefault(row["target"], []).append(row)
        return found


def kind_of(row: Row) -> str:
    """One of "static", "device" and "overhead", or "timed" for a row of any op's suite."""
    return {"compiled": "static", "device": "device", "overhead": "overhead"}.get(row["suite"], "timed")


def is_sweep(row: Row) -> bool:
    """Whether the row belongs to a part that varies a quantity: the part is named by it and the row holds it."""
    return is_number(row.get(row["part"]))


def read(path: Path) -> Rows:
    """Rows of a JSON lines file, or of all *.jsonl of a folder.

    Raises:
        FileNotFoundError: there is no such file, or no *.jsonl in the folder.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{path} is neither a file of rows nor a folder with *.jsonl in it")
    newest: dict[tuple[Any, ...], Row] = {}
    left_out: dict[tuple[str, str], LeftOut] = {}
    older = 0
    for file in files:
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = check(_parsed(line))
            except Unfit as unfit:
                entry = left_out.get((file.name, unfit.reason))
                first = f"line {number}: {unfit.detail}"
                found = replace(entry, count=entry.count + 1) if entry else LeftOut(file.name, unfit.reason, first)
                left_out[file.name, unfit.reason] = found
                continue
            former = newest.get(key := case_of(row))
            older += former is not None
            if former is None or _when(row) >= _when(former):
                newest[key] = row
    rows = [newest[key] for key in sorted(newest, key=lambda key: [_order(part) for part in key])]
    return Rows(rows, list(left_out.values()), older)


def case_of(row: Row) -> tuple[Any, ...]:
    """What names the case of a row; rows with the same are measurements of the same."""
    if kind_of(row) == "static":
        return ("compiled", *(row.get(name) for name in STATIC_CASE))
    machine = Machine.of(row)
    return (machine.kind, machine.device, machine.capability, *(row.get(name) for name in CASE))


def _order(part: Any) -> tuple[Any, ...]:
    """Sorts texts with the numbers in them as numbers, so that 8x28x28 comes before 16x14x14, and modes as MODES."""
    part = MODES.index(part) if part in MODES else part
    words = "".join(c if c.isdigit() else f" {c} " for c in str(part)).split()
    return tuple((0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unfit("not JSON", str(error)) from None


def _when(row: Row) -> datetime.datetime:
    if kind_of(row) == "static":  # says nothing of time: the last line counts
        return datetime.datetime.min
    return datetime.datetime.fromisoformat(row["date"])


# --- what a row must say --------------------------------------------------------------------------------------------


def check(row: Any) -> Row:
    """The row itself, if it may enter a report.

    Raises:
        Unfit: it may not.
    """
    if not isinstance(row, dict):
        raise Unfit("not a JSON object", repr(row)[:60])
    if row.get("schema") != SCHEMA:
        raise Unfit(f"not of schema {SCHEMA}", f"schema is {row.get('schema')!r}")
    _texts(row, ("suite", "op"))
    if kind_of(row) == "static":
        _texts(row, ("kernel", "case", "dtype", "target"))
        for name in ("num_warps", "registers", "spills", "shared"):
            _must(type(row.get(name)) is int and row[name] >= 0, row, name, "a whole number from 0")
        for name in STATIC_NUMBERS:
            _must(row.get(name) is None or is_number(row[name]), row, name, "a number or null")
        mix = (row.get("loop") or {}).get("mix", {}) if isinstance(row.get("loop"), dict | None) else None
        _must(_are_numbers(mix), row, "loop", "null, or an object with a mix of numbers by name")
        return row
    _texts(row, (*(name for name in CASE if name != "mode" or kind_of(row) != "device"), *MACHINE))
    _must(row.get("kind") in ("cpu", "cuda"), row, "kind", '"cpu" or "cuda"')
    _must(isinstance(row.get("capability"), str | None), row, "capability", "a text or null")
    _must(_is_date(row["date"]), row, "date", "a date and time with its offset from UTC")
    {"device": _device, "overhead": _overhead, "timed": _timed}[kind_of(row)](row)
    return row


def _device(row: Row) -> None:
    _must(is_number(row.get("rate")) and row["rate"] > 0, row, "rate", "a number above 0")
    _must(_is_range(row.get("spread")), row, "spread", "two numbers in order")
    _passed(row, ["ours"])


def _overhead(row: Row) -> None:
    _times(row, "host_seconds", "host_spread")
    _must(type(row.get("launches")) is int, row, "launches", "a whole number")
    goal = row.get("goal_seconds")
    _must(goal is None or (is_number(goal) and goal > 0), row, "goal_seconds", "a number above 0, or null")
    _must(_are_numbers(row.get("spent")), row, "spent", "numbers of seconds by name")
    _must(isinstance(row.get("stand_in"), bool), row, "stand_in", "true or false")
    _passed(row, ["ours"])


def _timed(row: Row) -> None:
    _times(row, "seconds", "spread")
    if row.get("wall_seconds") is not None:
        _times(row, "wall_seconds", "wall_spread")
    shape = row.get("shape")
    _must(isinstance(shape, list) and all(type(n) is int for n in shape), row, "shape", "a list of whole numbers")
    _must(type(row.get("repeats")) is int and row["repeats"] > 0, row, "repeats", "a whole number above 0")
    for name in ("copy_bandwidth", "floor_bytes", "floor_seconds"):
        _must(is_number(row.get(name)) and row[name] > 0, row, name, "a number above 0")
    for name in ("operations", "matrix_rate"):
        _must(row.get(name) is None or (is_number(row[name]) and row[name] > 0), row, name, "a number above 0, or null")
    extra = row.get("extra_bytes")
    known = {name: n for name, n in extra.items() if n is not None} if isinstance(extra, dict) else None
    _must(_are_numbers(known), row, "extra_bytes", "bytes, or null, by contender")
    _must(_are_numbers(row.get("graph_seconds", {})), row, "graph_seconds", "numbers by contender")
    _passed(row, row["seconds"])
    seconds = row["seconds"]
    _must(not is_sweep(row) or row[row["part"]] > 0, row, row["part"], "a number above 0")
    _must(isinstance(row.get("speedup"), dict), row, "speedup", "ratios by contender")
    for name, said in row["speedup"].items():
        _same(row, f"speedup.{name}", said, seconds.get(name, 0) / seconds["ours"])
    _same(row, "of_floor", row.get("of_floor"), row["floor_seconds"] / seconds["ours"])


def _passed(row: Row, contenders: Iterable[str]) -> None:
    """Without it the row's figures are those of something else than the op."""
    errors, tolerance = row.get("errors"), row.get("tolerance")
    if not isinstance(errors, dict) or not is_number(tolerance):
        raise Unfit("without a check", f"errors {errors!r}, tolerance {tolerance!r}")
    for name in contenders:
        if not is_number(errors.get(name)) or not 0 <= errors[name] <= tolerance:
            raise Unfit("its check was not passed", f"errors.{name} is {errors.get(name)!r}, tolerance {tolerance!r}")


def _times(row: Row, name: str, spread: str) -> None:
    times, ranges = row.get(name), row.get(spread)
    positive = isinstance(times, dict) and "ours" in times and all(is_number(t) and t > 0 for t in times.values())
    _must(positive, row, name, "numbers above 0 by contender, ours among them")
    both = isinstance(ranges, dict) and all(_is_range(ranges.get(contender)) for contender in row[name])
    _must(both, row, spread, "the quartiles of each contender, two numbers in order")


def _texts(row: Row, names: Iterable[str]) -> None:
    for name in names:
        _must(isinstance(row.get(name), str) and bool(row[name]), row, name, "a text")


def _must(condition: bool, row: Row, name: str, accepted: str) -> None:
    if not condition:
        raise Unfit("malformed", f"{name} is {row.get(name)!r}; accepted is {accepted}"[:200])


def _same(row: Row, name: str, said: Any, is_: float) -> None:
    if not is_number(said) or abs(said - is_) > 1e-6 * abs(is_):
        raise Unfit("contradicts itself", f"{name} is {said!r}, but its times say {is_:.6g}")


def is_number(value: Any) -> bool:
    """Neither NaN nor infinite, nor true or false."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def _are_numbers(value: Any) -> bool:
    """Whether it is an object of numbers; of none as well."""
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1]


def _is_date(text: str) -> bool:
    try:
        return datetime.datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
