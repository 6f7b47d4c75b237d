"""A report as one HTML page that loads nothing: styles and plots stand in it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from .document import NONE, Block, Bullets, Picture, Section, Table, Text
from .drawing import INK

STATUS = {"met": "met", "missed": "missed", "not measured yet": "open"}  # cells that are coloured, and their class

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --muted: #697180; --grid: #dde1e7; --ground: #ffffff;
  --band: #f5f7f9; --good: #1d7f4e; --bad: #b8371f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --muted: #9aa3b2; --grid: #343b47; --ground: #14171c;
  --band: #1b2027; --good: #5cc48f; --bad: #f0826b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 90rem; background: var(--ground);
  color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 0.75rem; padding-bottom: 0.35rem; border-bottom: 1px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 2rem 0 0.5rem; }
p, ul { max-width: 75ch; }
ul { padding-left: 1.2rem; }
li { margin: 0.2rem 0; }
nav { margin: 1.25rem 0; padding: 0.75rem 1rem; background: var(--band); border-radius: 6px; }
nav ul { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem;
  max-width: none; }
a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: 0.15em; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
.wide { overflow-x: auto; margin: 0.75rem 0 1.25rem; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--grid); vertical-align: bottom;
  white-space: normal; }
td.r, th.r { text-align: right; }
td.long { white-space: normal; min-width: 22rem; }
tbody tr:hover { background: var(--band); }
td.met { color: var(--good); font-weight: 600; }
td.missed { color: var(--bad); font-weight: 600; }
td.open { color: var(--muted); }
figure { margin: 1rem 0 1.5rem; }
figure svg { display: block; max-width: 100%; height: auto; }
@media print { :root { --ink: #000; --muted: #555; --grid: #ccc; --ground: #fff; --band: #fff; --good: #1d7f4e;
    --bad: #b8371f; }
  @page { size: A4 landscape; margin: 12mm; }
  body { padding: 0; font-size: 10px; max-width: none; }
  nav { display: none; }
  h2 { break-before: page; } h1 + h2, h2, h3 { break-after: avoid; }
  table { font-size: 7.5px; } th, td { padding: 0.15rem 0.35rem; white-space: normal; } td.long { min-width: 0; }
  thead { display: table-header-group; } tr, figure { break-inside: avoid; } .wide { overflow: visible; } }
""".strip()


def render(section: Section) -> str:
    """The page."""
    head = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(section.title)}</title>",
        f"<style>\n{STYLE}\n</style>",
        "</head>",
        "<body>",
        f"<h1>{_inline(section.title)}</h1>",
        *map(block, section.blocks),
    ]
    links = "".join(
        f'<li><a href="#{_anchor(below.title)}">{_inline(below.title)}</a></li>' for below in section.sections
    )
    body = [f"<nav><ul>{links}</ul></nav>", *(line for below in section.sections for line in _section(below, 2))]
    return "\n".join([*head, *body, "</body>", "</html>"]) + "\n"


def _section(section: Section, level: int) -> Iterator[str]:
    anchor = f' id="{_anchor(section.title)}"' if level == 2 else ""
    yield f"<h{level}{anchor}>{_inline(section.title)}</h{level}>"
    yield from map(block, section.blocks)
    for below in section.sections:
        yield from _section(below, level + 1)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Picture(name, alt, svg):
            return f"<figure>{inlined(name, alt, svg)}</figure>"
        case Table(header, align, rows):
            head = "".join(_cell("th", text, side) for text, side in zip(header, align, strict=True))
            body = ["".join(_cell("td", text, side) for text, side in zip(line, align, strict=True)) for line in rows]
            lines = "\n".join(f"<tr>{line}</tr>" for line in body)
            table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>"
            return f'<div class="wide">{table}</div>'
    raise TypeError(f"block is {block!r}; accepted are Text, Bullets, Picture and Table")


def _cell(tag: str, text: str, side: str) -> str:
    names = [name for name in (STATUS.get(text), "r" if side == "r" else None, _long(tag, text)) if name]
    attribute = f' class="{" ".join(names)}"' if names else ""
    return f"<{tag}{attribute}>{_inline(text or NONE)}</{tag}>"


def _long(tag: str, text: str) -> str | None:
    return "long" if tag == "td" and len(text) > 60 else None


def _inline(text: str) -> str:
    """Text with `code`."""
    pieces = html.escape(text).split("`")
    if len(pieces) % 2 == 0:  # a backquote without its twin stays one
        return html.escape(text)
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def inlined(name: str, alt: str, svg: str) -> str:
    """A plot as an element of a page: ids of its own, the page's colours, and no address of anything outside."""
    found = re.search(r"<svg\b.*</svg>", svg, re.S)
    if found is None:
        raise ValueError(f"{name} is no SVG")
    text = re.sub(r"<metadata>.*?</metadata>", "", found.group(), flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    for role, color in INK.items():
        text = text.replace(color, f"var(--{role})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
