"""What the report says: sections, in the order in which a reader wants to know."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence

from . import plots, tables
from .document import Block, Bullets, Picture, Section, Table, Text, count, scaled
from .rows import Machine, Row, Rows, kind_of
from .targets import Target, judge

INTRODUCTION = [
    "Written by `python -m bench report` from the rows of `python -m bench run` and `python -m bench compiled "
    "--report`. A row enters only if its outputs, and for a backward its gradients, were within its tolerance of a "
    "float64 reference in the same run. Figures of different machines never share a table or a plot.",
]
READING = [
    "`ours, ms`: median milliseconds on the device, in brackets the quartiles. All contenders of a row were timed in "
    "turns in one run.",
    "`published`, `compiled`: how many times as long as ours the published formulation takes in eager mode, and under "
    "`torch.compile`.",
    "`of the floor`: the time below which nobody gets, over ours: bytes that must be moved over the measured copy "
    "bandwidth, or operations that must be done over the measured rate of a matrix product, whichever is longer.",
    "`MiB`: the peak of memory beyond what was held before the call. `error`: relative L2 against float64, the worst "
    "of outputs and gradients.",
    "`ratio` of a target: 1 is just met, 0.5 is half as good as wanted. The worst case decides.",
]
SHORT = (
    "The published formulation, in eager mode and under `torch.compile`, takes so many times as long as ours; of the "
    "floor is the share of the speed that memory or matrix units allow. Median of the cases, in brackets the least and "
    "the most."
)


def report(rows: Rows, targets: Sequence[Target]) -> Section:
    """The whole report."""
    sections = [_machine(machine, found, targets, slug) for (machine, found), slug in _named(rows)]
    sections += [_static(target, found, targets) for target, found in rows.static().items()]
    sections += [*_unmeasured(rows, targets), *_left_out(rows)]
    return Section("Benchmarks", [*map(Text, INTRODUCTION), Bullets(READING)], sections)


def summary(rows: Rows) -> Section | None:
    """For the README: the first machine's main table in short, and its plot."""
    for (machine, found), slug in _named(rows):
        if tables.main_rows(found):
            blocks = [
                Text(f"{_measured_on(found)} {SHORT}"),
                tables.glance_table(tables.stage_rows(found)),
                *_overview(machine, found, slug),
            ]
            return Section(str(machine), blocks)
    return None


def _named(rows: Rows) -> list[tuple[tuple[Machine, list[Row]], str]]:
    """Every machine with its rows and a name for its files, each name once."""
    named: list[tuple[tuple[Machine, list[Row]], str]] = []
    slugs: list[str] = []
    for machine, found in rows.machines().items():
        slug = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-") or "machine"
        slugs.append(slug)
        named.append(((machine, found), slug + (f"-{slugs.count(slug)}" if slugs.count(slug) > 1 else "")))
    return named


def _overview(machine: Machine, rows: Sequence[Row], slug: str) -> list[Block]:
    alt = f"{machine}: how many times as long as ours the others take, every case a point"
    return _picture(f"{slug}-speedup", alt, plots.overview(f"{slug}-speedup", rows))


def _picture(name: str, alt: str, svg: str | None) -> list[Block]:
    return [] if svg is None else [Picture(name, alt, svg)]


def _measured_on(rows: Iterable[Row]) -> str:
    """Versions, commits and days of these rows."""
    rows = list(rows)

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(row.get(name) or "none") for row in rows}))

    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    versions = ", ".join(f"{name} {all_of(name)}" for name in ("torch", "triton", "python", "dyreg_triton"))
    commits = sorted({row["commit"] for row in rows})
    return f"Measured {when} with {versions}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}."


def _machine(machine: Machine, rows: Sequence[Row], targets: Sequence[Target], slug: str) -> Section:
    overview = _overview(machine, rows, slug)
    sections = [
        _section("At a glance", tables.glance_table(tables.main_rows(rows)), overview, [Text(SHORT)]),
        _section("Targets", tables.target_table(judge(targets, rows))),
        _section("Every case", tables.main_table(rows), _speedups(machine, rows, slug)),
        _section("Against the roofs", None, _roofline(machine, rows, slug)),
        *(_section(f"Part {part}", tables.contenders_table(r)) for part, r in tables.other_rows(rows).items()),
        *_scaling(machine, rows, slug),
        _section("Replayed as CUDA graphs", tables.graph_table(rows)),
        _overhead(machine, rows, slug),
    ]
    blocks: list[Block] = [Text(_measured_on(rows))]
    limits = tables.limits_table(rows)
    bandwidth = _bandwidth(rows)
    if limits.rows or bandwidth:
        blocks.append(limits if limits.rows else Text(f"Copies {scaled(bandwidth or 0)}B/s."))
    return Section(str(machine), blocks, [section for section in sections if section])


def _section(
    title: str, table: Table | None, more: Sequence[Block] = (), before: Sequence[Block] = ()
) -> Section | None:
    """None where there is nothing to show."""
    blocks = [*before, *([table] if table and table.rows else []), *more]
    return Section(title, blocks) if len(blocks) > len(before) else None


def _speedups(machine: Machine, rows: Sequence[Row], slug: str) -> list[Block]:
    found: list[Block] = []
    for op in dict.fromkeys(row["op"] for row in tables.main_rows(rows)):
        name = f"{slug}-speedup-{_dashed(op)}"
        alt = f"{machine}, {op}: how many times as long as ours the others take, case by case"
        found += _picture(name, alt, plots.speedup(name, op, rows))
    return found


def _bandwidth(rows: Iterable[Row]) -> float | None:
    """Of a copy: as the row of the device says, else as the rows of ops say, which may come from several runs."""
    rows = list(rows)
    copies = [row["rate"] for row in rows if kind_of(row) == "device" and row["op"] == "copy"]
    said = copies or [row["copy_bandwidth"] for row in tables.timed(rows)]
    return statistics.median(said) if said else None


def _roofline(machine: Machine, rows: Sequence[Row], slug: str) -> list[Block]:
    bandwidth = _bandwidth(rows)
    if bandwidth is None:
        return []
    rates = {row["dtype"]: row["rate"] for row in rows if kind_of(row) == "device" and row["op"] == "matmul"}
    for dtype in {row["dtype"] for row in tables.timed(rows)} - set(rates):
        said = [row["matrix_rate"] for row in tables.timed(rows) if row["dtype"] == dtype and row.get("matrix_rate")]
        rates.update({dtype: statistics.median(said)} if said else {})
    name = f"{slug}-roofline"
    alt = f"{machine}: operations a second of every case against operations per byte, below the measured roofs"
    return _picture(name, alt, plots.roofline(name, rows, bandwidth, rates))


def _scaling(machine: Machine, rows: Sequence[Row], slug: str) -> list[Section]:
    found = []
    for op, parts in tables.sweeps(rows).items():
        name = f"{slug}-scaling-{_dashed(op)}"
        alt = f"{machine}, {op}: time and memory against {', '.join(parts)}"
        blocks = _picture(name, alt, plots.scaling(name, op, parts))
        blocks += [tables.scaling_table(quantity, swept) for quantity, swept in parts.items()]
        found.append(Section(f"Scaling of {op}", blocks))
    return found


def _overhead(machine: Machine, rows: Sequence[Row], slug: str) -> Section | None:
    overheads = [row for row in rows if kind_of(row) == "overhead"]
    notes = ["Host time from call to return, on problems so small that the device is never waited for."]
    if any(row["stand_in"] for row in overheads):
        notes.append(
            "There was no GPU: a stand-in took the driver's place, and what a driver needs for a launch is not in it."
        )
    name = f"{slug}-overhead"
    alt = f"{machine}: host microseconds of a call, by what they are spent on"
    picture = _picture(name, alt, plots.overhead(name, overheads))
    return _section("Launch overhead", tables.overhead_table(rows), picture, [Text(" ".join(notes))])


def _dashed(op: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", op.lower()).strip("-")


def _static(target: str, rows: Sequence[Row], targets: Sequence[Target]) -> Section:
    ops: dict[str, list[Row]] = {}
    for row in rows:
        ops.setdefault(row["op"], []).append(row)
    sections = [_section("Targets", tables.target_table(judge(targets, rows)))]
    sections += [_section(op, tables.static_table(found)) for op, found in sorted(ops.items())]
    note = (
        f"Read from the machine code of {len(rows)} kernels and from what they read, write and compute by their "
        "source; no such GPU need be present, and nothing here was timed."
    )
    return Section(f"Compiled for {target}", [Text(note)], [section for section in sections if section])


def _unmeasured(rows: Rows, targets: Sequence[Target]) -> list[Section]:
    """Targets that no row decides."""
    lines = []
    for target in targets:
        if all(target.measured(row) is None for row in rows.rows):
            ops = target.op if isinstance(target.op, str) else ", ".join(target.op)
            lines.append(
                [
                    target.id,
                    "any" if ops == "*" else ops,
                    target.machine,
                    f"`{target.quantity}`",
                    target.wanted,
                    target.origin,
                ]
            )
    table = Table(["target", "op", "machine", "quantity", "wanted", "requirement"], "llllrl", lines)
    section = _section("Targets that are not measured yet", table)
    return [section] if section else []


def _left_out(rows: Rows) -> list[Section]:
    items = [str(left_out) for left_out in rows.left_out]
    if rows.older:
        items.append(f"older measurements of cases that stand here: {count(rows.older)}")
    return [Section("Left out", [Bullets(items)])] if items else []
