"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from .document import Block, Bullets, Picture, Section, Table, Text


def render(section: Section, pictures: str = "plots", level: int = 1) -> str:
    """The section and all below it; pictures are linked in the folder `pictures`, which stands beside the file."""
    return "\n\n".join(_blocks(section, pictures, level)) + "\n"


def _blocks(section: Section, pictures: str, level: int) -> Iterator[str]:
    yield f"{'#' * level} {_escaped(section.title)}"
    for block in section.blocks:
        yield block_text(block, pictures)
    for below in section.sections:
        yield from _blocks(below, pictures, level + 1)


def block_text(block: Block, pictures: str) -> str:
    """One block."""
    match block:
        case Text(text):
            return _escaped(text)
        case Bullets(items):
            return "\n".join(f"- {_escaped(item)}" for item in items)
        case Picture(name, alt, _):
            return f"![{_escaped(alt)}]({pictures}/{name}.svg)"
        case Table(header, align, rows):
            rule = ["---:" if side == "r" else "---" for side in align]
            lines = [[_escaped(cell) for cell in line] for line in (header, *rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
    raise TypeError(f"block is {block!r}; accepted are Text, Bullets, Picture and Table")


def _escaped(text: str) -> str:
    """One line in which nothing but `code` is markup."""
    code = False
    found = []
    for character in " ".join(text.split()):
        code ^= character == "`"
        special = character == "|" or (not code and character in "\\*<>[]")
        found.append("&lt;" if special and character == "<" else "\\" * special + character)
    return "".join(found)
