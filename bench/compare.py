"""`python -m bench compare A B`: which cases of B are slower or faster than in A, beyond the noise.

A and B are files or folders of rows; a case is compared with itself on the same machine only, by the times of ours: on
the device, on a GPU also by the wall clock, and the host's time of a launch.

The rule. A change d is the logarithm of B's median over A's. Its noise is

    n = (1 + 12 / repeats) * sqrt(a^2 + b^2),   a, b: quartile range / median in A and in B,

repeats being the fewer of both, and d is beyond the noise where it exceeds both n and 3 %. Why so:

- One median of r independent samples strays by about 0.93 / sqrt(r) quartile ranges. At the 24 samples of a usual row
  the factor 1.5 is thus some five standard errors of the difference, and it does not shrink with more samples: what
  differs from run to run (clocks, heat, neighbours, where memory lies) does not show within one run.
- Quartiles of few samples are themselves uncertain, and two runs of 5 may each by chance look quiet. 12 / repeats was
  found by simulation for that: of pairs drawn alike, normal, skewed, with spikes or in two modes, fewer than one in a
  hundred is flagged from 7 repeats on, and fewer than one in a thousand from 24; where samples come in bursts
  (neighbours correlate by 0.7) fewer than one in fifty from 7 on (tests/test_compare.py). Of 5 it is one in 400, but
  one in 16 where times have two modes: five samples do not show the other.
- 3 % is what nobody acts upon, and what alignment and clocks do to a GPU's quiet times.

The machine itself may have been slower. The other contenders of the row ran in turns with ours, so what they changed on
average is taken for the machine's share, and the rule is applied a second time to the change beyond it, with their
noise added. A case is slower, or faster, only where both say so. Where one alone does it is "unclear": the machine
changed, or torch did under the others, or ours. It is listed and does not count.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .report.document import figure, scaled
from .report.rows import Machine, Row, Rows, case_of, kind_of, read

LEAST = 0.03
FEWEST = 5  # repeats, where a row does not say
CLOCKS = {
    "device": ("seconds", "spread"),
    "wall": ("wall_seconds", "wall_spread"),
    "host": ("host_seconds", "host_spread"),
}


@dataclass(frozen=True)
class Change:
    """Of a logarithm of times: how much, and what of it may be noise."""

    by: float
    noise: float

    @property
    def sign(self) -> int:
        """1 for slower and -1 for faster beyond the noise, else 0."""
        return 0 if abs(self.by) <= max(self.noise, math.log1p(LEAST)) else 1 if self.by > 0 else -1

    def __str__(self) -> str:
        return f"{math.expm1(self.by):+.1%} (noise {math.expm1(max(self.noise, math.log1p(LEAST))):.1%})"


@dataclass(frozen=True)
class Case:
    """One case in both; `beyond` is the change beyond that of the other contenders, None where there is no other."""

    name: str
    clock: str
    before: float
    after: float
    change: Change
    beyond: Change | None

    @property
    def verdict(self) -> str:
        signs = {self.change.sign, self.change.sign if self.beyond is None else self.beyond.sign}
        return "unclear" if len(signs) > 1 else {1: "slower", -1: "faster", 0: "same"}[signs.pop()]

    def __str__(self) -> str:
        beyond = "" if self.beyond is None else f"; beyond the others' change {self.beyond}"
        times = f"{figure(1e3 * self.before)} -> {figure(1e3 * self.after)} ms"
        return f"{self.verdict:8} {self.name} [{self.clock}]: {times}, {self.change}{beyond}"


def main(a: Path, b: Path) -> int:
    """Print what changed from A to B: 1 where a case is slower, 0 where none is, 2 where nothing can be compared."""
    try:
        before, after = read(a), read(b)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    for path, rows in ((a, before), (b, after)):
        for left_out in rows.left_out:
            print(f"{path}: {left_out}")
    found = list(cases(before, after))
    for line in (*_machines(before, after), *_unmatched(a, before, after), *_unmatched(b, after, before)):
        print(line)
    if not found:
        print(f"nothing to compare: {a} and {b} have no measured case of the same machine in common", file=sys.stderr)
        return 2
    for verdict in ("unclear", "faster", "slower"):
        for case in sorted((c for c in found if c.verdict == verdict), key=lambda c: abs(c.change.by)):
            print(case)
    counted = Counter(case.verdict for case in found)
    print(", ".join(f"{counted[verdict]} {verdict}" for verdict in ("slower", "faster", "unclear", "same")))
    return 1 if counted["slower"] else 0


def cases(before: Rows, after: Rows) -> Iterator[Case]:
    """Every case and clock that both have of the same machine."""
    later = {case_of(row): row for row in after.rows}
    for row in before.rows:
        other = later.get(case_of(row))
        for clock, (times, spread) in CLOCKS.items():
            if other is None or not row.get(times) or not other.get(times):
                continue
            if clock == "wall" and row["kind"] == "cpu":  # which has one clock
                continue
            changes = {n: change(row, other, n, times, spread) for n in row[times] if n in other[times]}
            ours = changes.pop("ours")
            yield Case(
                _name(row), clock, row[times]["ours"], other[times]["ours"], ours, _beyond(ours, changes.values())
            )


def change(before: Row, after: Row, contender: str, times: str = "seconds", spread: str = "spread") -> Change:
    """Of one contender's time from one row to the other."""
    ranges = [
        (row[spread][contender][1] - row[spread][contender][0]) / row[times][contender] for row in (before, after)
    ]
    repeats = min(row.get("repeats", FEWEST) for row in (before, after))
    by = math.log(after[times][contender] / before[times][contender])
    return Change(by, (1 + 12 / repeats) * math.hypot(*ranges))


def _beyond(ours: Change, others: Iterable[Change]) -> Change | None:
    others = list(others)
    if not others:
        return None
    machine = sum(other.by for other in others) / len(others)
    noise = math.hypot(*(other.noise for other in others)) / len(others)
    return Change(ours.by - machine, math.hypot(ours.noise, noise))


def _name(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("op", "part", "label", "mode", "dtype") if row.get(name))


def _machines(before: Rows, after: Rows) -> Iterator[str]:
    """What each machine itself did, and which machines have nobody to be compared with."""
    first, second = before.machines(), after.machines()
    for machine in first:
        if machine in second:
            yield f"{machine}: {_state(first[machine])} -> {_state(second[machine])}"
    for machine in sorted(set(first) ^ set(second)):
        where = "A" if machine in first else "B"
        yield f"{machine}: only in {where}; figures of different machines are never compared"


def _state(rows: Iterable[Row]) -> str:
    """Torch, commit and limits, as the rows say."""
    rows = list(rows)
    said = [", ".join(sorted({f"{name} {row[name]}" for row in rows})) for name in ("torch", "commit")]
    limits = [f"{row['op']} {row['label']} {scaled(row['rate'])}/s" for row in rows if kind_of(row) == "device"]
    return ", ".join([*said, *limits])


def _unmatched(path: Path, rows: Rows, others: Rows) -> Iterator[str]:
    """Cases of a machine that both have, which only these rows have."""
    there, machines = {case_of(row) for row in others.rows}, set(others.machines())
    for row in rows.rows:
        if kind_of(row) != "static" and Machine.of(row) in machines and case_of(row) not in there:
            yield f"only in {path}: {_name(row)}"
