"""The demo's network, its training, and what is measured of it."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..layers import DyReG
from .digits import CLASSES, DIGITS, Clips, make_clips

CELLS = 16  # the layer's map is 16 x 16
STRIDE = 4  # pixels a cell
# Cells that a region's extent is held near: where it starts (DyReG, Duta et al., equation 11), which is a digit's size.
# A gaussian has no edge; 1 / sqrt(6) of that makes its standard deviation the linear kernel's.
SIZES = {"linear": CELLS / 6, "log-linear": CELLS / 6, "gaussian": CELLS / 6 / math.sqrt(6)}
SIZE_PENALTY = 0.1
# Nodes add what they receive, as in the published code: the paper's deeper graph learns too slowly for a demo.
GRAPH: dict[str, Any] = {"combine": "sum", "send_layers": 1, "update_layers": 0}
LEARNING_RATE = 3e-3
BATCH = 16


def to_pixels(regions: Tensor) -> Tensor:
    """Regions (*, 4) = (cx, cy, w, h) from cells to pixels of the canvas.

    Cell i of `Network`'s map is computed from pixels around 4 i + 1.5: each of its two 4-wide convolutions of stride 2
    and padding 1 puts output j at input 2 j + 0.5, and its 3-wide ones move nothing.
    """
    center, extent = regions.split(2, dim=-1)
    return torch.cat([center * STRIDE + (STRIDE - 1) / 2, extent * STRIDE], dim=-1)


class Network(nn.Module):
    """Convolutions that see 26 pixels, one DyReG layer, and a linear reading of each node: nothing else sees the map.

    video (B, T, 1, 64, 64) -> what each node says of each class, as logits (B, T, N, 10), and regions (B, T, N, 4).
    """

    def __init__(self, grid: tuple[int, int] = (2, 2), *, profile: str = "linear", generator: str = "fc"):
        super().__init__()
        channels = [1, 12, 24, 24, 48]
        blocks: list[nn.Module] = []
        for i, kernel in enumerate((4, 4, 3, 3)):
            convolution = nn.Conv2d(channels[i], channels[i + 1], kernel, 2 if kernel == 4 else 1, 1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
        self.features = nn.Sequential(*blocks)
        self.layer = DyReG(
            channels[-1],
            (CELLS, CELLS),
            grid=grid,
            generator=generator,
            profile=profile,
            iterations=1,
            **GRAPH,
        )
        self.norm = nn.LayerNorm(channels[-1])
        self.head = nn.Linear(channels[-1], CLASSES)
        nn.init.constant_(self.head.bias, -2 - math.log(grid[0] * grid[1]))  # at first no node says anything

    def maps(self, video: Tensor) -> Tensor:
        """What the layer is given: (B, T, 48, 16, 16)."""
        return self.features(video.flatten(0, 1)).unflatten(0, video.shape[:2])

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        nodes, regions = self.layer.nodes(self.maps(video))
        return self.head(self.norm(nodes)), regions


def per_frame(said: Tensor) -> Tensor:
    """Logits of a frame (B, T, 10): a class is present where any node says so."""
    return said.logsumexp(dim=2)


def digits_at(step: int, steps: int) -> int:
    """How many digits a training clip shows: one and two at first, for the classes are then learnt sooner."""
    return min(DIGITS, 1 + 5 * step // steps)


def train(net: Network, images: Tensor, *, steps: int, seed: int, device: torch.device) -> None:
    """Train on `steps` batches of fresh clips of `images`.

    Every frame must name all classes by itself, so that regions have to be right at all times. The sizes of regions
    are held near a digit's: regions as large as the map tell the classes as well, and find nothing.
    """
    net.train()
    size = SIZES[net.layer.dynamic_graph.profile]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    # a fifth of the steps to warm up, and not 0.2: torch divides by pct_start * steps - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.21)
    # a log file wants a line now and then, a terminal a moving bar
    bar = tqdm(range(steps), desc="training", mininterval=0.2 if sys.stderr.isatty() else 20, unit="step")
    for step in bar:
        clips = make_clips(images, BATCH, generator, digits=digits_at(step, steps)).to(device)
        said, regions = net(clips.video)
        logits, labels = per_frame(said), clips.labels.unsqueeze(1)
        loss = F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits))
        growth = (regions[..., 2:] / size).log().square().mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + SIZE_PENALTY * growth).backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            accuracy = ((logits.detach() > 0) == labels.bool()).float().mean().item()
            bar.set_postfix(
                digits=digits_at(step, steps), loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}", refresh=False
            )


class Answers(NamedTuple):
    """What the network makes of clips, on the CPU."""

    said: Tensor  # (B, T, N, 10)
    regions: Tensor  # (B, T, N, 4), in pixels

    @property
    def present(self) -> Tensor:
        """(B, 10): the classes answered; a clip's logits are its frames' average."""
        return per_frame(self.said).mean(dim=1) > 0


@torch.no_grad()
def answer(net: Network, clips: Clips, device: torch.device) -> Answers:
    net.eval()
    parts = [net(video.to(device)) for video in clips.video.split(32)]
    said, regions = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Answers(said, to_pixels(regions))


class Scores(NamedTuple):
    accuracy: float  # per label
    majority: float  # of always giving each label its more frequent value
    distance: float  # pixels from each digit to the nearest region's centre
    control: float  # the same, to the digits of another clip


def distance(regions: Tensor, centers: Tensor) -> float:
    """Mean over digits, frames and clips of the way from a digit to the nearest region's centre.

    From digits to regions, not the other way: a region without a digit has nowhere to be.
    """
    return torch.cdist(centers, regions[..., :2]).amin(dim=-1).mean().item()


def score(answers: Answers, clips: Clips) -> Scores:
    """Every clip is its neighbour's control: the same network's regions, the same way digits move, another clip."""
    share = clips.labels.mean(dim=0)
    return Scores(
        accuracy=(answers.present == clips.labels.bool()).float().mean().item(),
        majority=torch.maximum(share, 1 - share).mean().item(),
        distance=distance(answers.regions, clips.centers),
        control=distance(answers.regions, clips.centers.roll(1, dims=0)),
    )
