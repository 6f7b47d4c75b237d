"""The tables of a report, from rows of one machine or of one target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from .document import NONE, Table, count, figure, mebibytes, microseconds, milliseconds, percent, scaled, times
from .rows import Row, is_number, is_sweep, kind_of
from .targets import Verdict, value_at

Column = tuple[str, str, Callable[[Row], str]]  # header, "l" or "r", the cell of a row
CONTENDERS = {"ours", "published", "compiled"}  # of the main table; rows with others have tables of their own


def timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if kind_of(row) == "timed"]


def main_rows(rows: Iterable[Row]) -> list[Row]:
    """Cases that are no point of a sweep, against the published formulation and its compiled form."""
    return [row for row in timed(rows) if not is_sweep(row) and set(row["seconds"]) <= CONTENDERS]


def stage_rows(rows: Iterable[Row]) -> list[Row]:
    """Of the main table those that a network has; all of it where there is none."""
    found = main_rows(rows)
    return [row for row in found if row["part"] == "stage"] or found


def other_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By part: cases with contenders that the main table does not have."""
    return _grouped((r for r in timed(rows) if not is_sweep(r) and not set(r["seconds"]) <= CONTENDERS), "part")


def sweeps(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """By op and by the quantity that varies, in its order."""
    swept = sorted((row for row in timed(rows) if is_sweep(row)), key=lambda row: row[row["part"]])
    return {op: _grouped(found, "part") for op, found in sorted(_grouped(swept, "op").items())}


def _grouped(rows: Iterable[Row], name: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def table(columns: Sequence[Column], rows: Iterable[Row]) -> Table:
    """A line for every row; columns that nobody fills are left out."""
    lines = [[cell(row) for _, _, cell in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] != NONE for line in lines)]
    cells = [[line[i] for i in kept] for line in lines]
    return Table([columns[i][0] for i in kept], "".join(columns[i][1] for i in kept), cells)


def ratio(row: Row, name: str, clock: str = "seconds") -> float | None:
    """How many times as long as ours a contender takes."""
    of = row.get(clock) or {}
    return of[name] / of["ours"] if name in of and "ours" in of else None


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name, NONE))


def _duration(name: str, contender: str, spread: str | None = "spread") -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        ranges = row.get(spread) if spread else None
        return milliseconds((row.get(name) or {}).get(contender), (ranges or {}).get(contender))

    return cell


def _bytes(contender: str) -> Callable[[Row], str]:
    return lambda row: mebibytes(row["extra_bytes"].get(contender))


CASE: list[Column] = [("op", "l", _text("op")), ("case", "l", _text("label")), ("dtype", "l", _text("dtype"))]
MODE: Column = ("mode", "l", _text("mode"))


def main_table(rows: Iterable[Row]) -> Table:
    """Device times; on a GPU what a user waits as well, which is longer than the device works where it waits for us."""

    def waits(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: NONE if row["kind"] == "cpu" else cell(row)  # the CPU has one clock

    return table(
        [
            *CASE,
            MODE,
            ("ours, ms", "r", _duration("seconds", "ours")),
            ("published", "r", lambda row: times(ratio(row, "published"))),
            ("compiled", "r", lambda row: times(ratio(row, "compiled"))),
            ("of the floor", "r", lambda row: percent(row["of_floor"])),
            ("wall, ms", "r", waits(_duration("wall_seconds", "ours", None))),
            ("published, wall", "r", waits(lambda row: times(ratio(row, "published", "wall_seconds")))),
            ("MiB", "r", _bytes("ours")),
            ("published, MiB", "r", _bytes("published")),
            ("error", "r", lambda row: f"{row['errors']['ours']:.0e}"),
        ],
        main_rows(rows),
    )


def glance_table(rows: Iterable[Row]) -> Table:
    """A line for every op, part, dtype and mode: its cases as their median, the least and the most."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["part"], row["dtype"], row["mode"]), []).append(row)

    def spread(found: list[Row], value: Callable[[Row], float | None], written: Callable[[float], str]) -> str:
        values = sorted(v for row in found if (v := value(row)) is not None)
        if len(values) < 2:
            return written(values[0]) if values else NONE
        return f"{written(statistics.median(values))} ({written(values[0])} to {written(values[-1])})"

    def less_memory(row: Row) -> float | None:
        ours, published = (row["extra_bytes"].get(name) for name in ("ours", "published"))
        return ours / published if is_number(ours) and published else None

    header = ["op", "part", "dtype", "mode", "cases", "published", "compiled", "of the floor", "memory, of published"]
    lines = [
        [
            *key,
            str(len(found)),
            spread(found, lambda row: ratio(row, "published"), times),
            spread(found, lambda row: ratio(row, "compiled"), times),
            spread(found, lambda row: row["of_floor"], percent),
            spread(found, less_memory, percent),
        ]
        for key, found in groups.items()
    ]
    return Table(header, "llllrrrrr", lines)


def contenders_table(rows: Sequence[Row]) -> Table:
    """Every contender's time and memory side by side, for parts that have contenders of their own."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    columns: list[Column] = [*CASE, MODE]
    for name in names:
        columns.append((f"{name}, ms", "r", _duration("seconds", name, None)))
        columns.append((f"{name}, MiB", "r", _bytes(name)))
    return table(columns, rows)


def graph_table(rows: Iterable[Row]) -> Table:
    """Replayed as CUDA graphs, so that launches cost nothing: what the kernels alone take."""
    return table(
        [
            *CASE,
            MODE,
            ("replayed, ms", "r", _duration("graph_seconds", "ours", None)),
            ("published", "r", lambda row: times(ratio(row, "published", "graph_seconds"))),
            ("compiled", "r", lambda row: times(ratio(row, "compiled", "graph_seconds"))),
            ("launched, ms", "r", _duration("seconds", "ours", None)),
            ("wall, ms", "r", _duration("wall_seconds", "ours", None)),
        ],
        [row for row in timed(rows) if row.get("graph_seconds")],
    )


def scaling_table(quantity: str, rows: Iterable[Row]) -> Table:
    return table(
        [
            (quantity, "r", lambda row: f"{row[quantity]:g}"),
            *CASE[1:],
            MODE,
            ("ours, ms", "r", _duration("seconds", "ours")),
            ("published", "r", lambda row: times(ratio(row, "published"))),
            ("compiled", "r", lambda row: times(ratio(row, "compiled"))),
            ("of the floor", "r", lambda row: percent(row["of_floor"])),
            ("MiB", "r", _bytes("ours")),
            ("published, MiB", "r", _bytes("published")),
        ],
        rows,
    )


def overhead_table(rows: Iterable[Row]) -> Table:
    """Host time from call to return, what it is spent on, and the goal."""

    def goal(row: Row) -> str:
        if row["goal_seconds"] is None:
            return NONE
        met = row["host_seconds"]["ours"] <= row["goal_seconds"]
        return f"{microseconds(row['goal_seconds'])}, {'met' if met else 'missed'}"

    def spent(row: Row) -> str:
        parts = sorted(row["spent"].items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {microseconds(seconds)}" for name, seconds in parts) or NONE

    def published(row: Row) -> str:
        return times(ratio(row, "published", "host_seconds"))

    return table(
        [
            *CASE,
            MODE,
            ("host, µs", "r", lambda r: microseconds(r["host_seconds"]["ours"], r["host_spread"]["ours"])),
            ("published", "r", published),
            ("goal, µs", "r", goal),
            ("launches", "r", lambda row: str(row["launches"])),
            ("spent on, µs", "l", spent),
        ],
        [row for row in rows if kind_of(row) == "overhead"],
    )


def target_table(verdicts: Iterable[Verdict]) -> Table:
    """The worst first, those that nobody measured last."""
    lines = []
    for verdict in verdicts:
        target, row = verdict.target, verdict.worst
        ops = target.op if isinstance(target.op, str) else ", ".join(target.op)
        line = [target.id, "any" if ops == "*" else ops, f"`{target.quantity}`", target.wanted]
        if row is None:
            line += [NONE, NONE, verdict.status, NONE, NONE]
        else:
            case = [row.get("label") or row.get("case"), row["dtype"], row.get("mode"), row.get("kernel")]
            if target.op == "*" or not isinstance(target.op, str):
                case.insert(0, row["op"])
            met = f"{verdict.met} of {verdict.rows}"
            worst = ", ".join(str(part) for part in case if part)
            line += [target.written(verdict.measured), figure(verdict.ratio, 2), verdict.status, met, worst]
        lines.append(line)
    header = ["target", "op", "quantity", "wanted", "worst", "ratio", "status", "met by", "worst case"]
    return Table(header, "lllrrrlrl", lines)


def limits_table(rows: Iterable[Row]) -> Table:
    """What the device can do, measured: the fractions of the other tables are fractions of it."""

    def rate(row: Row) -> str:
        low, high = map(scaled, row["spread"])
        unit = "B/s" if row["op"] == "copy" else "op/s"
        return f"{scaled(row['rate'])}{unit} ({low} to {high})"

    columns: list[Column] = [
        ("limit", "l", _text("op")),
        ("case", "l", _text("label")),
        ("rate (quartiles of what was seen)", "r", rate),
    ]
    return table(columns, [row for row in rows if kind_of(row) == "device"])


# --- of compiled code -----------------------------------------------------------------------------------------------


def static_table(rows: Iterable[Row]) -> Table:
    """What the machine code of a kernel says, and what it would move and compute against what must be; worst first."""

    def over(a: str, b: str) -> Callable[[Row], str]:
        return lambda row: figure(row[a] / row[b]) if is_number(row.get(a)) and row.get(b) else NONE

    def occupancy(row: Row) -> str:
        if not is_number(row.get("occupancy")):
            return NONE
        return percent(row["occupancy"]) + (f", {row['limited_by']}" if row.get("limited_by") else "")

    def tensor(row: Row) -> str:
        found = row.get("tensor_core")
        return NONE if found is None else f"{found} {row.get('tensor_core_kind') or ''}".strip() if found else "0"

    def widths(row: Row) -> str:
        return "/".join(str(row.get(name, NONE)) for name in ("load_bytes", "narrowest", "store_bytes"))

    def loop(row: Row) -> str:
        mix = value_at(row, "loop.mix")
        if not isinstance(mix, dict) or not mix:
            return NONE
        parts = sorted(mix.items(), key=lambda part: -part[1])
        return f"{value_at(row, 'loop.instructions')}: " + ", ".join(f"{k} {percent(v)}" for k, v in parts[:4] if v)

    def whole(name: str) -> Callable[[Row], str]:
        return lambda row: count(row[name]) if is_number(row.get(name)) else NONE

    return table(
        [
            ("kernel", "l", _text("kernel")),
            ("kind", "l", _text("kind")),
            ("case", "l", _text("case")),
            ("dtype", "l", _text("dtype")),
            ("warps", "r", whole("num_warps")),
            ("registers", "r", whole("registers")),
            ("spills", "r", whole("spills")),
            ("shared, KiB", "r", lambda row: figure(row["shared"] / 1024)),
            ("occupancy, limited by", "l", occupancy),
            ("programs", "r", whole("programs")),
            ("waves", "r", lambda row: figure(row["waves"]) if is_number(row.get("waves")) else NONE),
            ("load/narrowest/store, bytes", "r", widths),
            ("tensor cores", "l", tensor),
            ("bytes, of the floor", "r", over("bytes_moved", "floor_bytes")),
            ("operations, of the floor", "r", over("operations", "floor_operations")),
            ("issue limit", "r", lambda row: percent(row.get("issue_limit"))),
            ("inner loop", "l", loop),
        ],
        sorted(rows, key=lambda row: row["issue_limit"] if is_number(row.get("issue_limit")) else math.inf),
    )
