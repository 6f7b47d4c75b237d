"""What the run measured, as Markdown, and whether it is what the demo promises."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from .._core.atomic_files import replacing
from .._core.version import __version__
from .digits import CANVAS, DIGITS, FRAMES
from .measure import Times
from .model import CELLS, Scores

ABOVE_MAJORITY = 0.1  # per-label accuracy must be this much above the majority's,
BELOW_CONTROL = 0.1  # the distance this share below its control,
SAME = 1e-4  # and what computes the same thing this close (relative L2)


class Options(NamedTuple):
    """What a run was asked for."""

    out: Path
    seed: int
    steps: int
    test_clips: int
    timing_rounds: int
    grid: tuple[int, int]
    profile: str
    variant: str
    device: torch.device


class Figures(NamedTuple):
    """What a run measured."""

    options: Options
    date: str
    seconds: float  # all of it
    training_seconds: float
    before: Scores
    after: Scores
    agreement: dict[str, float | str]  # by backend: relative difference, or why it cannot run here
    times: dict[str, Times]  # by the maps they were measured on

    @property
    def below_control(self) -> float:
        return 1 - self.after.distance / self.after.control


def shortcomings(figures: Figures) -> list[str]:
    """What this run failed to show; empty where it showed everything. NaN fails."""
    after, found = figures.after, []
    if not after.accuracy >= after.majority + ABOVE_MAJORITY:
        found.append(
            f"accuracy is {after.accuracy:.1%}, which is not {100 * ABOVE_MAJORITY:.0f} points above the majority's "
            f"{after.majority:.1%}"
        )
    if not figures.below_control >= BELOW_CONTROL:
        found.append(
            f"digits are {after.distance:.1f} pixels from the nearest region, which is not {BELOW_CONTROL:.0%} below "
            f"the {after.control:.1f} of another clip's digits"
        )
    for name, value in figures.agreement.items():
        if isinstance(value, float) and not value <= SAME:
            found.append(f"backend {name} is {value:.1e} away from the reference in float64")
    for where, times in figures.times.items():
        if not times.difference <= SAME:
            found.append(f"on {where} the layer is {times.difference:.1e} away from the published formulation")
    return found


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    return f"torch {torch.__version__}, {name}, threads: {torch.get_num_threads()}, Python {platform.python_version()}"


def rows(figures: Figures) -> list[tuple[str, str]]:
    before, after = figures.before, figures.after
    table = [
        ("Accuracy per label", f"{after.accuracy:.1%}"),
        ("Accuracy of always giving each label its majority", f"{after.majority:.1%}"),
        ("From each digit to the nearest region's centre, before training", f"{before.distance:.1f} pixels"),
        ("… to another clip's digits", f"{before.control:.1f} pixels"),
        ("From each digit to the nearest region's centre, after training", f"{after.distance:.1f} pixels"),
        ("… to another clip's digits", f"{after.control:.1f} pixels"),
        ("Below that control, after training", f"{figures.below_control:.0%}"),
    ]
    for name, value in figures.agreement.items():
        cell = f"{value:.1e}" if isinstance(value, float) else f"cannot run here: {value}"
        table.append((f"Backend {name}, largest relative difference to the reference in float64", cell))
    for where, times in figures.times.items():
        table += [
            (f"DyReG layer, forward and backward, on {where}", f"{1e3 * times.ours:.1f} ms"),
            ("… as published, written plainly", f"{1e3 * times.published:.1f} ms"),
            ("… relative difference of the outputs", f"{times.difference:.1e}"),
        ]
    return table


def suggestions(options: Options) -> Iterable[str]:
    command = "python -m dyreg_triton.demo"
    if options.grid != (3, 3):
        yield f"`{command} --grid 3x3`: nine nodes for three digits; what do the idle ones do?"
    if options.profile != "gaussian":
        yield f"`{command} --profile gaussian`: kernels without an edge"
    if options.variant != "lite":
        yield f"`{command} --variant lite`: can the pooled generator, whose weights know no places, find three digits?"
    yield f"`{command} --seed {options.seed + 1} --steps {2 * options.steps}`: other digits, trained for longer"
    yield "`dt.layers.DyReG(channels, (H, W))` after a stage of your own network: it starts as the identity"


def markdown(figures: Figures) -> str:
    options = figures.options
    nodes = options.grid[0] * options.grid[1]
    problems = shortcomings(figures)
    lines = [
        "# DyReG on moving digits",
        "",
        f"In every clip {DIGITS} MNIST digits move over a {CANVAS} × {CANVAS} canvas for {FRAMES} frames. Which "
        f"classes are present? A small convolutional network answers from the {nodes} nodes of one DyReG layer on a "
        f"{CELLS} × {CELLS} map and from nothing else, so its regions have to find the digits; nobody tells it where "
        "they are. It is trained on clips of one, then two, then three digits, and the sizes of regions are held near "
        "a digit's.",
        "",
        "![Regions drawn over moving digits, one colour a node](regions.webp)",
        "",
        "A box is a region's centre ± extent, the more visible the surer its node is, with the class it names.",
        "",
        f"| Measured on {options.test_clips} clips of digits not trained on | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows(figures)),
        "",
        *(f"**Not met:** {problem}." for problem in problems),
        *([""] if problems else []),
        f"dyreg-triton {__version__}, {machine(options.device)}. {figures.date}, seed {options.seed}, {options.steps} "
        f"steps, grid {options.grid[0]}x{options.grid[1]}, profile {options.profile}, variant {options.variant}. "
        f"{figures.seconds:.0f} seconds, {figures.training_seconds:.0f} of them training.",
        "",
        "To try next:",
        "",
        *(f"- {suggestion}" for suggestion in suggestions(options)),
    ]
    return "\n".join(lines) + "\n"


def save_report(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
