"""How plots look, and how they become SVG text: the same bytes for the same figure.

Text stays text. What is not data is drawn in the colours of `INK`, which a page may replace by its own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

INK = {"ink": "#1f2430", "muted": "#697180", "grid": "#dde1e7", "ground": "#ffffff"}
COLOR = {"ours": "#2f7fd1", "published": "#dc6a2a", "compiled": "#8a63c7"}
PALETTE = ("#2f7fd1", "#dc6a2a", "#2e9e6b", "#8a63c7", "#c94f7c", "#a8862b", "#3fa7b5", "#7d828c")
CREATOR = "python -m bench report"  # in the metadata of every plot
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK["ink"],
    "axes.edgecolor": INK["grid"],
    "axes.facecolor": "none",
    "axes.labelcolor": INK["muted"],
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": INK["ground"],
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "text.color": INK["ink"],
    "xtick.color": INK["muted"],
    "ytick.color": INK["muted"],
    "ytick.labelcolor": INK["ink"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": INK["grid"],
    "legend.frameon": False,
}


@contextlib.contextmanager
def drawing(
    name: str, size: tuple[float, float], rows: int = 1, columns: int = 1, **subplots: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure of `size` in inches and its axes, an array of (rows, columns), in the report's style.

    `name` keeps the figure's ids apart from those of others on the same page.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is missing; pip install "dyreg-triton[viz]" has it') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def svg(figure: Any) -> str:
    """To be called while the figure is being drawn."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": CREATOR})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def legend(figure: Any, entries: Sequence[dict[str, Any]], columns: int = 6) -> None:
    """Below the axes; an entry is what describes a line: label, color, marker, ls, ..."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **entry) for entry in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(columns, len(handles))))


def logarithmic(axis: Any, written: Any = "{:g}".format, subs: Sequence[float] = (1,)) -> None:
    """Ticks at `subs` times the powers of ten, and nowhere else."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(10, subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_locator(NullLocator())
