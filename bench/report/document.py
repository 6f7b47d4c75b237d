"""What a report consists of, before it is Markdown or HTML, and how its numbers are written.

In every text `backquotes` mark code; nothing else is markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

NONE = "–"  # where there is no figure


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells are texts; `align` has "l" or "r" for every column."""

    header: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """`svg` as text, to be kept in a file called `name`.svg or inlined."""

    name: str
    alt: str
    svg: str = field(repr=False)


Block = Text | Bullets | Table | Picture


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]
    sections: Sequence[Section] = ()

    def pictures(self) -> list[Picture]:
        """Of the section and of all below it."""
        return [b for b in self.blocks if isinstance(b, Picture)] + [p for s in self.sections for p in s.pictures()]


def figure(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, never with an exponent: 0.000412, 4.12, 41200."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    return f"{rounded:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def times(value: float | None) -> str:
    """A ratio: 0.87x, 15.3x."""
    return NONE if value is None else f"{figure(value, 3)}x" if value >= 1 else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.1f} %"


def milliseconds(value: float | None, quartiles: Sequence[float] | None = None) -> str:
    """Seconds as milliseconds, with their quartiles: 4.12 (4.08 to 4.2)."""
    return _with_range(value, quartiles, 1e3)


def microseconds(value: float | None, quartiles: Sequence[float] | None = None) -> str:
    return _with_range(value, quartiles, 1e6)


def mebibytes(value: float | None) -> str:
    return NONE if value is None else figure(value / 2**20)


def scaled(value: float) -> str:
    """With the letter of its power of a thousand: 120 G, 3.4 T, 50."""
    power = 0
    while power < 5 and abs(value) >= 999.5:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}".strip()


def count(value: float | None) -> str:
    """A whole number, in groups of three."""
    return NONE if value is None else f"{value:,.0f}"


def _with_range(value: float | None, quartiles: Sequence[float] | None, scale: float) -> str:
    if value is None:
        return NONE
    low_high = "" if quartiles is None else " ({} to {})".format(*(figure(q * scale) for q in quartiles))
    return figure(value * scale) + low_high
