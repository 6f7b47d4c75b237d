"""What `swap` did, as data and as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Swapped:
    """One module that was replaced, or the whole model.

    Attributes:
        path: its place in the model, "" for the model itself; `paths`: all its places, if it is shared.
        before, after: the class it was and the class it is.
        parameters: number of their elements.
        error: largest relative error (L2) of outputs and gradients on the example, None without one.
        before_ms, after_ms: milliseconds of a forward and a backward on the example, None without one.
        vanishing: attributes that the original's forward left on it, and that are no longer there.
        wrong: what differs beyond the tolerance on the example, in words; None where nothing does.
        round_off: where the error is beyond the tolerance, how far the original and ours are from the original in a
            wider dtype.
        note: what else there is to know of it on the example.
    """

    path: str
    before: str
    after: str
    parameters: int
    paths: tuple[str, ...] = ()
    vanishing: tuple[str, ...] = ()
    error: float | None = None
    before_ms: float | None = None
    after_ms: float | None = None
    wrong: str | None = None
    round_off: tuple[float, float] | None = None
    note: str | None = None


@dataclass(frozen=True)
class Left:
    """A module that looks like a published one and was left as it is; `reason` says why."""

    path: str
    before: str
    reason: str


@dataclass
class SwapReport:
    """What `swap` did to a model; prints as a table.

    Attributes:
        model: the model, swapped in place.
        modules: those replaced, one `Swapped` each.
        left: those that look like published ones and were left as they are, one `Left` each.
        already: paths of modules that were this library's before.
        whole: the whole model on the example, None without one.
    """

    model: nn.Module
    modules: tuple[Swapped, ...]
    left: tuple[Left, ...]
    already: tuple[str, ...]
    whole: Swapped | None = None
    _restore: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def __copy__(self) -> SwapReport:
        return replace(self)  # the same model, and the same way back

    def __getstate__(self) -> dict[str, Any]:
        """For deep copies and pickles, which have another model: all but the way back, which is that of this one."""
        return {**self.__dict__, "_restore": None if self._restore is None else _not_from_a_copy}

    def undo(self) -> None:
        """Put the original modules back, with what was changed since: values, modes, hooks. Once is enough.

        Raises RuntimeError where none of ours is in the model, as after a later swap of what holds it: undo that first;
        and of a deep copy or pickle of a report, which tells what was done, of a model that was never swapped itself.
        """
        if self._restore is not None:
            self._restore()
        self._restore = None

    def __str__(self) -> str:
        many = f"{len(self.modules)} module{'' if len(self.modules) == 1 else 's'}"
        refused = any(row.wrong for row in (*self.modules, *([self.whole] if self.whole else [])))
        lines = [f"{many} compared, none swapped" if refused else f"{many} swapped"]
        if self.modules:
            rows = [*self.modules, *([self.whole] if self.whole and self.whole not in self.modules else [])]
            lines += _table(rows)
            for row in rows:
                if row.note:
                    lines += [f"{row.path or 'the model'}: {row.note}"]
                if row.round_off:
                    before, after = row.round_off
                    lines += [
                        f"{row.path or 'the model'}: that error is round-off: from the result in a wider dtype the "
                        f"original is {before:.1e} away, ours {after:.1e}"
                    ]
        if self.already:
            lines += ["ours already: " + ", ".join(path or "the model itself" for path in self.already)]
        if self.left:
            lines += ["left as they are:", *_reasons(self.left)]
        if self.modules and not refused:
            classes = ", ".join(dict.fromkeys(row.before for row in self.modules))
            lines += [
                f"no longer an instance of {classes}: code that collects parameters by class, as the authors' "
                "get_optim_policies does for RSA's P1 and I, would miss them now; run it before the swap"
            ]
        where: dict[tuple[str, ...], list[str]] = {}
        for row in self.modules:
            where.setdefault(row.vanishing, []).append(row.path or "the model")
        for names, paths in where.items():
            if names and not refused:
                lines += [f"no longer left by a forward of {', '.join(paths)}: {', '.join(names)}"]
        return "\n".join(lines)


class SwapError(ValueError):
    """`swap` refused, and the model is as it was; `report` holds what was found."""

    def __init__(self, message: str, report: SwapReport):
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.report), self.__dict__  # an exception's own would give `args` alone


def _not_from_a_copy() -> None:
    raise RuntimeError(
        "undo: this report is a deep copy or came from a pickle; accepted is the one that swap returned, whose model "
        "was swapped"
    )


def _reasons(left: tuple[Left, ...]) -> list[str]:
    return [f"  {row.path or 'the model itself'} ({row.before}): {row.reason}" for row in left]


def nothing(report: SwapReport, looked_for: tuple[str, ...]) -> str:
    """Why nothing in a model is replaced."""
    model = report.model
    found = f"nothing in {type(model).__name__} is replaced; accepted are {', '.join(looked_for)}"
    if not report.left:
        return f"{found}, and none of its {sum(1 for _ in model.modules())} modules looks like one"
    return "\n".join([f"{found}; those that look like one are left:", *_reasons(report.left)])


def different(wrong: list[Swapped]) -> str:
    """How ours differs from the originals on an example."""
    lines = [f"  {row.path or 'the model'} ({row.before}): {row.wrong}" for row in wrong]
    return "\n".join(["on the example ours differs from the original, which stays in place:", *lines])


def _table(rows: list[Swapped]) -> list[str]:
    head = ["module", "class", "parameters", "largest error", "before", "after", "times"]
    cells = [head]
    for row in rows:
        times = row.before_ms is not None and row.after_ms is not None
        cells.append(
            [
                ", ".join(row.paths) or "(the model)",
                f"{row.before} -> {row.after}" if row.after != row.before else row.before,
                f"{row.parameters:,}",
                "" if row.error is None else f"{row.error:.1e}",
                f"{row.before_ms:.2f} ms" if times else "",
                f"{row.after_ms:.2f} ms" if times else "",
                f"{row.before_ms / row.after_ms:.2f}" if row.before_ms and row.after_ms else "",
            ]
        )
    cells = [[row[i] for i in range(len(head)) if any(other[i] for other in cells[1:])] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
