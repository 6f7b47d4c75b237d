"""`python -m bench report`: tables and plots of all that was measured.

As Markdown with SVG files beside it, as one HTML page that loads nothing, and in short in the README.

The same rows give the same bytes. Every file is written under a temporary name and renamed; nothing is written where no
row may enter.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dyreg_triton._core.atomic_files import replacing

from .content import report, summary
from .drawing import CREATOR
from .html import render as html_page
from .markdown import block_text
from .markdown import render as markdown_text
from .rows import Rows, read
from .targets import FILE, load

ROOT = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"  # what stands between them in the README is written here


def main(results: Path, markdown: Path, html: Path, *, targets: Path = FILE, readme: Path | None = None) -> int:
    """Write the report of the rows in `results`, a folder or a file; 0, or 1 with the reason where none is written.

    `readme` is written too, between its markers; by default the repository's own, when the report is.
    """
    if readme is None and markdown.resolve() == ROOT / "bench" / "REPORT.md":
        readme = ROOT / "README.md"
    try:
        rows, wanted = read(results), load(targets)
    except (OSError, ValueError) as error:
        return _refused(error)
    for left_out in rows.left_out:
        print(left_out)
    if not rows.rows:
        return _refused(f"no row of {results} can enter a report; `python -m bench run all` writes rows")
    plots = markdown.parent / "plots"
    try:
        section = report(rows, wanted)
        files = {plots / f"{picture.name}.svg": picture.svg for picture in section.pictures()}
        files |= {markdown: markdown_text(section, plots.name), html: html_page(section)}
        files |= with_block(readme, rows, markdown) if readme is not None else {}
        stale = _ours(plots) - set(files)
        _write(files)
    except (ImportError, OSError) as error:  # no matplotlib, no space
        return _refused(error)
    for plot in stale:
        plot.unlink()
    texts = [str(path) for path in files if path.parent != plots]
    print(f"{len(rows.rows)} rows -> {', '.join(texts)}, {len(files) - len(texts)} plots in {plots}")
    return 0


def _refused(reason: object) -> int:
    print(reason, file=sys.stderr)
    return 1


def with_block(readme: Path, rows: Rows, markdown: Path) -> dict[Path, str]:
    """The README's text with the main table in short, its plot and a link to the report `markdown` between its markers.

    Empty where the README, its markers, or cases for the table are not there.
    """
    former = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, begin, rest = former.partition(BEGIN)
    _, end, after = rest.partition(END)
    section = summary(rows)
    if not begin or not end or section is None:
        return {}
    folder = Path(os.path.relpath(markdown.parent.resolve(), readme.parent.resolve()))
    blocks = [block_text(block, (folder / "plots").as_posix()) for block in section.blocks]
    link = f"More, with every case and every machine: [{markdown.name}]({(folder / markdown.name).as_posix()})."
    text = "\n\n".join([f"**{section.title}.**", *blocks, link])
    return {readme: f"{before}{begin}\n\n{text}\n\n{end}{after}"}


def write_readme(readme: Path, results: Path, markdown: Path) -> bool:
    """Write the README's block alone; False where its markers, or cases for the table, are not there."""
    files = with_block(readme, read(results), markdown)
    _write(files)
    return bool(files)


def _ours(plots: Path) -> set[Path]:
    """Plots of former reports: those that tell nothing any more are removed."""
    return {path for path in plots.glob("*.svg") if CREATOR in path.read_text(encoding="utf-8", errors="replace")}


def _write(files: Mapping[Path, str]) -> None:
    """All under temporary names first, so that a full disk leaves the former files."""
    with contextlib.ExitStack() as stack:  # at whose end they are renamed, or removed
        for path, text in files.items():
            temporary = stack.enter_context(replacing(path))
            temporary.write_text(text, encoding="utf-8", newline="\n")
