"""The demo from beginning to end."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone

import torch
from PIL import Image
from safetensors.torch import save

from .._core.atomic_files import replacing
from .._core.dispatch import backend
from .._core.version import __version__
from ..layers import DyReG
from .digits import Clips, make_clips, read_mnist
from .draw import COLUMNS, draw_frames, save_animation
from .measure import Times, agreement, compare_times
from .model import GRAPH, Answers, Network, answer, score, train
from .report import Figures, Options, markdown, rows, save_report, shortcomings, suggestions

WRITTEN = ("regions.webp", "report.md", "weights.safetensors")
GENERATORS = {"full": "fc", "lite": "pooled"}
MEASURED = 16  # clips for agreement and times


def run(options: Options) -> list[str]:
    """Train, measure, write the three files, and return what the run failed to show."""
    start = time.perf_counter()
    device = options.device
    # A team of threads that waits for a core which something else holds is far slower than one thread.
    torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 2) // 2)))
    training, held_out = read_mnist()
    torch.manual_seed(options.seed)
    net = Network(options.grid, profile=options.profile, generator=GENERATORS[options.variant]).to(device)
    # another seed than the training clips': other paths, as the images are others
    clips = make_clips(held_out, options.test_clips, torch.Generator().manual_seed(options.seed + 1))

    # Triton's interpreter, where it is on, shows that kernels are right and is no way to train.
    with backend("auto" if device.type == "cuda" else "eager"):
        before = score(answer(net, clips, device), clips)
        since = time.perf_counter()
        train(net, training, steps=options.steps, seed=options.seed, device=device)
        training_seconds = time.perf_counter() - since
        answers = answer(net, clips, device)
        with torch.no_grad():
            maps = net.maps(clips.video[:MEASURED].to(device))
            regions = net.layer.nodes(maps)[1]
        times = measure_times(net.layer, maps, options)

    figures = Figures(
        options=options,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        before=before,
        after=score(answers, clips),
        agreement=agreement(maps[:2], regions[:2], options.profile),
        times=times,
        training_seconds=training_seconds,
        seconds=time.perf_counter() - start,
    )
    shown = slice(2 * COLUMNS)
    frames = draw_frames(Clips(*(t[shown] for t in clips)), Answers(*(t[shown] for t in answers)))
    write(figures, net, frames)
    show(figures)
    return shortcomings(figures)


def measure_times(layer: DyReG, maps: torch.Tensor, options: Options) -> dict[str, Times]:
    """Of the trained layer on its own maps, and of an untrained one as wide as those it is made for."""
    large, device = (256, 14, 14), options.device
    generator = GENERATORS[options.variant]
    wide = DyReG(large[0], large[1:], init="grid", generator=generator, profile=options.profile, **GRAPH)
    random = torch.randn(
        2, 10, *large, generator=torch.Generator().manual_seed(options.seed), dtype=torch.float32, device="cpu"
    )
    cases = [(layer, maps), (wide.to(device), random.to(device))]
    return {
        "{} clips of {} frames, {} × {} × {}".format(*x.shape)
        + f", {case.dynamic_graph.num_nodes} nodes": compare_times(case.dynamic_graph, x, rounds=options.timing_rounds)
        for case, x in cases
    }


def write(figures: Figures, net: Network, frames: list[Image.Image]) -> None:
    """The animation, the report and the weights."""
    options = figures.options
    animation, report, weights = (options.out / name for name in WRITTEN)
    save_animation(animation, frames)
    save_report(report, markdown(figures))
    made_of = {
        "dyreg_triton": __version__,
        "grid": "{}x{}".format(*options.grid),
        "profile": options.profile,
        "variant": options.variant,
        "seed": str(options.seed),
        "steps": str(options.steps),
    }
    with replacing(weights) as temporary:
        tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
        temporary.write_bytes(save(tensors, made_of))  # save_file would make it readable to its owner only


def show(figures: Figures) -> None:
    """The same figures on the terminal, where the files are, and what to try next."""
    table = rows(figures)
    width = max(len(name) for name, _ in table)
    print()
    for name, value in table:
        print(f"{name:<{width}}  {value}")
    print(f"\nMeasured in {figures.seconds:.0f} seconds, and written to")
    for name in WRITTEN:
        print(f"  {figures.options.out / name}")
    print("\nTo try next:")
    for suggestion in suggestions(figures.options):
        print("  " + suggestion.replace("`", ""))
