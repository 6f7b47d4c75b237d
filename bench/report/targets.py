"""What speed was promised, and whether the rows show it: bench/targets.json.

The file is one object: `schema` (1); `about`, what it is; `machines`, conditions by name; `targets`, a list of

    id        a short name of its own
    op        the op, a list of ops, or "*" for any
    machine   one of the names in `machines`: rows of other machines neither meet nor miss the target
    where     conditions on the row's fields; {} for every row of the op
    quantity  a field of the row, as `speedup.published`, or the quotient of two, as `extra_bytes.ours / output_bytes`
    relation  ">=" or "<="
    value     the number
    from      the requirement in words, and whose it is

A field is a path of names joined by dots; `shape.2` is the third entry of a list. A condition is a value, a list of
accepted values, or {"min": number, "max": number} with one of the two or both. A row without the quantity (a contender
that was not run) does not decide. The worst row of those that do decides the target.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .document import NONE, microseconds, percent, times
from .rows import Row, is_number

FILE = Path(__file__).parent.parent / "targets.json"
Conditions = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A number that was promised; `machine_where` are the conditions behind the machine's name."""

    id: str
    op: str | list[str]
    machine: str
    where: Conditions
    quantity: str
    relation: str
    value: float
    origin: str
    machine_where: Conditions

    def concerns(self, row: Row) -> bool:
        """Whether a row of this machine could decide such a target."""
        return fits(row, self.machine_where)

    def measured(self, row: Row) -> float | None:
        """What the row says of it; None where it says nothing."""
        ops = [self.op] if isinstance(self.op, str) else self.op
        if not ("*" in ops or row["op"] in ops) or not self.concerns(row) or not fits(row, self.where):
            return None
        values = [value_at(row, path) for path in self.quantity.split(" / ")]
        if not all(map(is_number, values)) or 0 in values[1:]:
            return None
        return values[0] / values[1] if len(values) == 2 else values[0]

    def met_by(self, measured: float) -> bool:
        return measured >= self.value if self.relation == ">=" else measured <= self.value

    def ratio(self, measured: float) -> float:
        """How far it is met: 1 is just met, 0.5 half as good as promised."""
        better, worse = (measured, self.value) if self.relation == ">=" else (self.value, measured)
        if worse > 0:
            return better / worse
        return math.inf if better > 0 else float(self.met_by(measured))

    @property
    def wanted(self) -> str:
        """The promise in few characters."""
        sign, number = "≥" if self.relation == ">=" else "≤", self.value
        if self._unit == "x":
            return f"{sign} {number:g}x"
        return f"{sign} {number:g}" if self._unit == "" else f"{sign} {self.written(number)}"

    def written(self, value: float) -> str:
        """A measured value in the quantity's unit."""
        written = {"%": percent, "µs": lambda v: f"{microseconds(v)} µs", "x": times, "": "{:.3g}".format}
        return written[self._unit](value)

    @property
    def _unit(self) -> str:
        if " / " in self.quantity:
            return ""
        if self.quantity.startswith("of_"):
            return "%"
        return "µs" if "seconds" in self.quantity else "x" if "speedup" in self.quantity else ""


@dataclass(frozen=True)
class Verdict:
    """On a target, by rows of one machine: the worst of them and how many of them meet it; no row, not measured."""

    target: Target
    worst: Row | None = None
    measured: float = math.nan
    met: int = 0
    rows: int = 0

    @property
    def ratio(self) -> float:
        return self.target.ratio(self.measured)

    @property
    def status(self) -> str:
        return "not measured yet" if self.worst is None else "met" if self.met == self.rows else "missed"


def judge(targets: Iterable[Target], rows: Sequence[Row]) -> list[Verdict]:
    """On every target that the machine of these rows can decide, the worst first, those not measured last."""
    found = []
    for target in targets:
        if not any(target.concerns(row) for row in rows):
            continue
        measured = [(value, row) for row in rows if (value := target.measured(row)) is not None]
        if not measured:
            found.append(Verdict(target))
            continue
        value, worst = min(measured, key=lambda pair: target.ratio(pair[0]))
        met = sum(target.met_by(v) for v, _ in measured)
        found.append(Verdict(target, worst, value, met, len(measured)))
    return sorted(found, key=lambda v: (v.worst is None, v.ratio if v.worst else 0.0, v.target.id))


def value_at(row: Row, path: str) -> Any:
    """What stands at a path of the row; None where nothing does."""
    value: Any = row
    for name in path.split("."):
        if isinstance(value, list):
            value = value[int(name)] if name.isdecimal() and int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def fits(row: Row, conditions: Conditions) -> bool:
    """Whether the row fulfils every condition."""
    return all(_fits(value_at(row, path), condition) for path, condition in conditions.items())


def _fits(value: Any, condition: Any) -> bool:
    if isinstance(condition, list):
        return value in condition
    if not isinstance(condition, dict):
        return value == condition
    return is_number(value) and condition.get("min", -math.inf) <= value <= condition.get("max", math.inf)


# --- reading the file -----------------------------------------------------------------------------------------------


def load(path: Path = FILE) -> list[Target]:
    """The targets of a file.

    Raises:
        ValueError: it is not as described above; the message names the target, the field, and what is accepted.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    names = {"schema", "about", "machines", "targets"}
    _must(isinstance(content, dict) and set(content) == names, f"{path.name} must have the fields {_listed(names)}")
    _must(content["schema"] == 1, f"{path.name}: schema is {content['schema']!r}; accepted is 1")
    machines, entries = content["machines"], content["targets"]
    _must(isinstance(machines, dict), f"{path.name}: machines is {machines!r}; accepted are conditions by name")
    for name, conditions in machines.items():
        _conditions(conditions, f"{path.name}: machine {name!r}")
    _must(isinstance(entries, list), f"{path.name}: targets is {entries!r}; accepted is a list")
    targets = [_target(entry, machines, f"{path.name}: target {number}") for number, entry in enumerate(entries, 1)]
    ids = [target.id for target in targets]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    _must(not twice, f"{path.name}: id {_listed(twice)} stands there more than once")
    return targets


def _target(entry: Any, machines: dict[str, Conditions], what: str) -> Target:
    names = {f.name for f in fields(Target)} - {"machine_where", "origin"} | {"from"}
    _must(isinstance(entry, dict), f"{what} is {entry!r}; accepted is an object")
    what = f"{what} ({entry.get('id')})"
    for name in sorted(names - set(entry)):
        raise ValueError(f"{what} lacks {name!r}; a target has {_listed(names)}")
    for name in sorted(set(entry) - names):
        raise ValueError(f"{what} has {name!r}, which is unknown; a target has {_listed(names)}")
    for name in ("id", "machine", "quantity", "relation", "from"):
        _must(isinstance(entry[name], str) and bool(entry[name]), f"{what}: {name} is {entry[name]!r}, not a text")
    ops = [entry["op"]] if isinstance(entry["op"], str) else entry["op"]
    _must(
        isinstance(ops, list) and bool(ops) and all(isinstance(op, str) for op in ops),
        f"{what}: op is {entry['op']!r}; accepted are an op, a list of them, and '*'",
    )
    _must(entry["machine"] in machines, f"{what}: machine is {entry['machine']!r}; accepted are {_listed(machines)}")
    _must(entry["relation"] in (">=", "<="), f"{what}: relation is {entry['relation']!r}; accepted are >= and <=")
    _must(is_number(entry["value"]), f"{what}: value is {entry['value']!r}; accepted is a number")
    paths = entry["quantity"].split(" / ")
    _must(
        len(paths) <= 2 and all(path and " " not in path for path in paths),
        f"{what}: quantity is {entry['quantity']!r}; accepted are FIELD and FIELD / FIELD",
    )
    _conditions(entry["where"], f"{what}: where")
    given = {name: value for name, value in entry.items() if name != "from"}
    return Target(**given, origin=entry["from"], machine_where=machines[entry["machine"]])


def _conditions(conditions: Any, what: str) -> None:
    _must(isinstance(conditions, dict), f"{what} is {conditions!r}; accepted are conditions by field")
    for path, condition in conditions.items():
        if isinstance(condition, dict):
            known = bool(condition) and set(condition) <= {"min", "max"} and all(map(is_number, condition.values()))
            _must(known, f"{what}: {path} is {condition!r}; accepted are numbers min and max")


def _must(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or NONE
