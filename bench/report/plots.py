"""The plots of a report, each of the rows of one machine; None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .document import scaled
from .drawing import COLOR, INK, PALETTE, drawing, legend, logarithmic, svg
from .rows import Row, is_number
from .tables import main_rows, ratio, stage_rows, timed

OTHERS = {"published": "o", "compiled": "D"}  # contenders that ours is compared with, and their markers
MODES = {"forward": (0, (4, 2)), "forward+backward": "-"}  # and their lines
QUANTITIES = {
    "taps": "neighbours M", "nodes": "nodes N", "channels": "channels C", "batch": "batch",
    "cells": "coarse cells of a side",
}  # fmt: skip


# --- speed-up -------------------------------------------------------------------------------------------------------


def overview(name: str, rows: Iterable[Row]) -> str | None:
    """Every case that a network has as a point: how many times as long the others take, by op, mode and dtype."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in stage_rows(rows):
        if set(row["seconds"]) & set(OTHERS):
            groups.setdefault((row["op"], row["mode"], row["dtype"]), []).append(row)
    if not groups:
        return None
    with drawing(name, (9, 1.3 + 0.42 * len(groups))) as (figure, axes):
        for y, found in enumerate(groups.values()):
            for offset, (contender, marker) in zip((-0.14, 0.14), OTHERS.items(), strict=True):
                points = [value for row in found if (value := ratio(row, contender)) is not None]
                at = [y + offset] * len(points)
                axes[0, 0].plot(points, at, marker, color=COLOR[contender], ms=5.5, alpha=0.7, mew=0)
        _speedup_axis(axes[0, 0], [f"{op}\n{mode}, {dtype}" for op, mode, dtype in groups])
        _speedup_legend(figure, [row for found in groups.values() for row in found])
        return svg(figure)


def speedup(name: str, op: str, rows: Iterable[Row]) -> str | None:
    """Of one op: a line for every case, a panel for every mode."""
    rows = [row for row in main_rows(rows) if row["op"] == op and set(row["seconds"]) & set(OTHERS)]
    cases = list(dict.fromkeys((row["label"], row["dtype"]) for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    if not rows:
        return None
    size = (10, 1.2 + 0.3 * len(cases))
    with drawing(name, size, 1, len(modes), sharex=True, sharey=True) as (figure, axes):
        for ax, mode in zip(axes[0], modes, strict=True):
            for row in (row for row in rows if row["mode"] == mode):
                y = cases.index((row["label"], row["dtype"]))
                for offset, (contender, marker) in zip((-0.13, 0.13), OTHERS.items(), strict=True):
                    if (value := ratio(row, contender)) is not None:
                        ax.plot([1, value], [y + offset] * 2, color=COLOR[contender], lw=1.6, alpha=0.45)
                        ax.plot([value], [y + offset], marker, color=COLOR[contender], ms=5.5, mew=0)
            ax.set_title(f"{op}, {mode}")
        for ax in axes[0]:
            _speedup_axis(ax, [f"{label}, {dtype}" for label, dtype in cases])
        _speedup_legend(figure, rows)
        return svg(figure)


def _speedup_axis(ax: Any, labels: Sequence[str]) -> None:
    """Logarithmic, so that twice as fast is as far from 1 as half as fast; where ours is slower is shaded."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    low, high = min(low, 0.8), max(high, 1.6)
    ax.set_xlim(low, high)
    ax.axvspan(low, 1, color=INK["grid"], alpha=0.4, lw=0)
    ax.axvline(1, color=INK["muted"], lw=1)
    steps = (1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 5, 7)
    logarithmic(ax.xaxis, "{:g}x".format, steps)
    ax.grid(axis="x")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def _speedup_legend(figure: Any, rows: Iterable[Row]) -> None:
    timed_names = {name for row in rows for name in row["seconds"]}
    legend(
        figure,
        [
            {"ls": "", "marker": marker, "color": COLOR[name], "mew": 0, "label": f"time of {name} / time of ours"}
            for name, marker in OTHERS.items()
            if name in timed_names
        ],
    )


# --- roofline -------------------------------------------------------------------------------------------------------


def roofline(name: str, rows: Iterable[Row], bandwidth: float, rates: dict[str, float]) -> str | None:
    """Operations a second against operations per byte of the floor, below the roofs that were measured.

    Args:
        bandwidth: of a copy, bytes a second.
        rates: of a matrix product by dtype, operations a second.
    """
    points = [row for row in timed(rows) if is_number(row.get("operations")) and row["operations"] > 0]
    dtypes = sorted({row["dtype"] for row in points} & set(rates))
    if not dtypes:
        return None
    ops = sorted({row["op"] for row in points})
    with drawing(name, (max(7.0, 4.8 * len(dtypes)), 4.6), 1, len(dtypes)) as (figure, axes):
        for ax, dtype in zip(axes[0], dtypes, strict=True):
            _roofs(ax, [row for row in points if row["dtype"] == dtype], bandwidth, rates[dtype])
            for color, op in zip(PALETTE * len(ops), ops, strict=False):
                for row in (row for row in points if (row["op"], row["dtype"]) == (op, dtype)):
                    face = INK["ground"] if row["mode"] == "forward" else color
                    ax.plot(*_intensity_and_rate(row), "o", color=color, mfc=face, mew=1.3, ms=5.5, alpha=0.85)
            ax.set_title(dtype)
            ax.set_xlabel("operations per byte that must be moved")
        axes[0, 0].set_ylabel("operations a second")
        entries = [
            {"ls": "", "marker": "o", "color": color, "label": op, "ms": 5.5}
            for color, op in zip(PALETTE * len(ops), ops, strict=False)
        ]
        for mode, face in (("forward", INK["ground"]), ("forward+backward", INK["muted"])):
            entries.append({"ls": "", "marker": "o", "color": INK["muted"], "mfc": face, "label": mode, "ms": 5.5})
        legend(figure, entries, 3)
        return svg(figure)


def _intensity_and_rate(row: Row) -> tuple[float, float]:
    return row["operations"] / row["floor_bytes"], row["operations"] / row["seconds"]["ours"]


def _roofs(ax: Any, rows: Sequence[Row], bandwidth: float, rate: float) -> None:
    x, y = zip(*map(_intensity_and_rate, rows), strict=True)
    ridge = rate / bandwidth
    low, high = min(*x, ridge / 6) / 2.5, max(*x, ridge) * 4
    ax.plot([low, ridge, high], [low * bandwidth, rate, rate], color=INK["ink"], lw=1.4)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(*y, low * bandwidth) / 1.5, rate * 2.5))
    logarithmic(ax.xaxis)
    logarithmic(ax.yaxis, scaled)
    ax.grid()
    note = {"textcoords": "offset points", "color": INK["muted"]}
    ax.annotate(f"matrix product {scaled(rate)}op/s", (high, rate), (-3, 5), ha="right", **note)
    ax.annotate(f"copy {scaled(bandwidth)}B/s", (ridge, rate), (-14, -3), ha="right", va="top", **note)


# --- scaling --------------------------------------------------------------------------------------------------------


def scaling(name: str, op: str, parts: dict[str, list[Row]]) -> str | None:
    """Of one op: time above and memory below, a column for every quantity that was varied, all axes logarithmic."""
    columns = [
        (part, dtype, [row for row in rows if row["dtype"] == dtype])
        for part, rows in parts.items()
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    ]
    if not columns:
        return None
    with drawing(name, (max(6.0, 3.4 * len(columns)), 5.4), 2, len(columns), sharex="col") as (figure, axes):
        for (above, below), (part, dtype, rows) in zip(axes.T, columns, strict=True):
            for ax, quantity, unit in ((above, "seconds", 1e3), (below, "extra_bytes", 2**-20)):
                for mode, line in MODES.items():
                    _curves(ax, [row for row in rows if row["mode"] == mode], quantity, unit, line)
                _scaling_axis(ax, sorted({row[part] for row in rows}))
            above.set_title(f"{op}\n{dtype}" if len(columns) > 1 else f"{op}, {dtype}")
            below.set_xlabel(QUANTITIES.get(part, part))
        axes[0, 0].set_ylabel("milliseconds")
        axes[1, 0].set_ylabel("peak extra memory, MiB")
        found = {name for _, _, rows in columns for row in rows for name in (*row["seconds"], row["mode"])}
        entries = [{"color": COLOR[n], "marker": "o", "ms": 4, "label": n} for n in COLOR if n in found]
        entries += [{"color": INK["muted"], "ls": line, "label": mode} for mode, line in MODES.items() if mode in found]
        legend(figure, entries)
        return svg(figure)


def _curves(ax: Any, rows: Sequence[Row], quantity: str, unit: float, line: Any) -> None:
    """A curve for every contender, over the quantity that the rows' part is named by."""
    for contender, color in COLOR.items():
        points = [(row[row["part"]], row[quantity][contender] * unit) for row in rows if row[quantity].get(contender)]
        if points:
            ax.plot(*zip(*points, strict=True), ls=line, color=color, marker="o", ms=4, lw=1.6)


def _scaling_axis(ax: Any, values: Sequence[float]) -> None:
    ax.set(xscale="log", yscale="log")
    logarithmic(ax.xaxis)
    ax.set_xticks(values, [f"{value:g}" for value in values])
    low, high = ax.get_ylim()
    if high < 4 * low:  # a curve that hardly rises shall look like one
        middle = (low * high) ** 0.5
        low, high = middle / 2, middle * 2
        ax.set_ylim(low, high)
    logarithmic(ax.yaxis, subs=(1, 2, 5) if high < 200 * low else (1,))
    ax.grid()


# --- launch overhead ------------------------------------------------------------------------------------------------


def overhead(name: str, rows: Sequence[Row]) -> str | None:
    """What the host spends until a call returns, piled up, and the goal."""
    if not rows:
        return None
    parts = list(dict.fromkeys(part for row in rows for part in row["spent"]))
    labels = [f"{row['op']}, {row['mode']}" for row in rows]
    labels = [f"{a}\n{row['label']}" if labels.count(a) > 1 else a for a, row in zip(labels, rows, strict=True)]
    with drawing(name, (9, 1.3 + 0.34 * len(rows))) as (figure, axes):
        ax = axes[0, 0]
        for y, row in enumerate(rows):
            left = 0.0
            for color, part in zip(PALETTE * len(parts), parts, strict=False):
                width = 1e6 * row["spent"].get(part, 0)
                ax.barh([y], [width], 0.5, left, color=color)
                left += width
            ax.plot([1e6 * row["host_seconds"]["ours"]], [y], "|", color=INK["ink"], ms=14, mew=2)
            if row["goal_seconds"]:
                ax.plot([1e6 * row["goal_seconds"]] * 2, [y - 0.42, y + 0.42], color=INK["muted"], ls=(0, (2, 1)), lw=2)
        ax.set_yticks(range(len(rows)), labels)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(0, None)
        ax.set_xlabel("host microseconds from call to return; stroke: median of whole calls; dashes: the goal")
        ax.grid(axis="x")
        entries = [
            {"ls": "", "marker": "s", "ms": 7, "color": color, "label": part}
            for color, part in zip(PALETTE * len(parts), parts, strict=False)
        ]
        legend(figure, entries)
        return svg(figure)
