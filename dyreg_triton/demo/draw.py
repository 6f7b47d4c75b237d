"""The animation: clips in grey, each node's region in its own colour, and what the network says of them."""

from __future__ import annotations

import colorsys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .._core.atomic_files import replacing
from .digits import CANVAS, Clips
from .model import Answers

SCALE = 4  # screen pixels for one of the canvas
FINE = 2  # everything is drawn this much larger, then averaged: lines get soft edges and move smoothly
COLUMNS, GAP, STRIP = 3, 16, 34  # clips in a row; screen pixels between clips, and above each for its caption
MILLISECONDS = 140
BACKGROUND, TEXT, QUIET, RIGHT, WRONG = "#10131a", "#e8ebf2", "#8b93a5", "#6fd08c", "#ff7a70"
PALETTE = ("#ffb000", "#4cc9f0", "#ff5d8f", "#8ce563", "#b392f0", "#ff7f3f", "#2ee6c5", "#f3f36b", "#5b8cff")


def color(node: int) -> tuple[int, int, int]:
    """One colour a node; beyond the palette, hues that keep a golden distance."""
    if node < len(PALETTE):
        red, green, blue = bytes.fromhex(PALETTE[node][1:])
        return red, green, blue
    red, green, blue = (int(255 * v) for v in colorsys.hsv_to_rgb(node * 0.618 % 1, 0.6, 1.0))
    return red, green, blue


def confidence(said: Tensor) -> tuple[Tensor, Tensor]:
    """How sure each node is of the class it favours, and that class: (*, N, 10) -> (*, N) twice."""
    best, which = said.max(dim=-1)
    return best.sigmoid(), which


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * FINE)


def _regions(draw: ImageDraw.ImageDraw, regions: Tensor, said: Tensor) -> None:
    """Boxes centre ± extent, as visible as the node is sure of a class; then, over all boxes, the classes.

    Regions are in pixels with their middles at whole numbers; a drawing has their corners there.
    """
    unit = SCALE * FINE
    sure, classes = confidence(said)
    font = _font(17)
    names = []
    for node in sure.argsort().tolist():  # the surest on top
        certain = sure[node].item()
        cx, cy, w, h = (
            (regions[node] + torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float32, device="cpu")) * unit
        ).tolist()
        box, dot = (cx - w, cy - h, cx + w, cy + h), (0.35 + 0.45 * certain) * unit
        tint, ink = (*color(node), int(26 * certain)), (*color(node), int(255 * (0.22 + 0.78 * certain)))
        draw.rounded_rectangle(box, radius=2 * unit, fill=tint, outline=ink, width=2 * FINE)
        draw.ellipse((cx - dot, cy - dot, cx + dot, cy + dot), fill=ink)
        if certain > 0.5:
            names.append(((box[0] + 0.9 * unit, box[1] + 0.4 * unit), str(classes[node].item()), ink))
    for corner, name, ink in names:
        draw.text(corner, name, fill=ink, font=font, stroke_width=2 * FINE, stroke_fill="black")


def panel(frame: Tensor, regions: Tensor, said: Tensor) -> Image.Image:
    """One frame (64, 64) with its regions (N, 4) in pixels, at FINE times the final size."""
    side = CANVAS * SCALE * FINE
    grey = Image.fromarray((frame * 190).byte().numpy()).resize((side, side), Image.Resampling.BICUBIC)
    picture = Image.merge("RGB", (grey, grey, grey))
    _regions(ImageDraw.Draw(picture, "RGBA"), regions, said)  # RGBA on RGB: colours blend
    return picture


def _caption(draw: ImageDraw.ImageDraw, x: int, y: int, labels: Tensor, present: Tensor) -> None:
    """shown 1 4 7  said 1 4 9  missed 7: green where right, red where wrong."""
    right = (labels.bool() & present).nonzero().flatten().tolist()
    added = (~labels.bool() & present).nonzero().flatten().tolist()
    missed = (labels.bool() & ~present).nonzero().flatten().tolist()
    words = [("shown", QUIET), *((str(d), TEXT) for d in labels.nonzero().flatten().tolist()), ("  said", QUIET)]
    words += sorted([(str(d), RIGHT) for d in right] + [(str(d), WRONG) for d in added])
    if missed:
        words += [("  missed", QUIET), *((str(d), WRONG) for d in missed)]
    font = _font(16)
    for word, ink in words:
        draw.text((x, y), word, fill=ink, font=font)
        x += int(draw.textlength(word + " ", font=font))


def draw_frames(clips: Clips, answers: Answers) -> list[Image.Image]:
    """One picture a frame, with all clips."""
    count = len(clips.video)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    side, gap, strip = (v * FINE for v in (CANVAS * SCALE, GAP, STRIP))
    size = (columns * (side + gap) + gap, rows * (side + strip + gap) + gap // 2)
    still = Image.new("RGB", size, BACKGROUND)
    corners = [
        (gap + (i % columns) * (side + gap), strip + gap // 2 + (i // columns) * (side + strip + gap))
        for i in range(count)
    ]
    present = answers.present
    for i, (x, y) in enumerate(corners):
        _caption(ImageDraw.Draw(still), x, y - strip + 2 * FINE, clips.labels[i], present[i])
    frames = []
    for t in range(clips.video.shape[1]):
        picture = still.copy()
        for i, corner in enumerate(corners):
            picture.paste(panel(clips.video[i, t, 0], answers.regions[i, t], answers.said[i, t]), corner)
        frames.append(picture.reduce(FINE))
    return frames


def save_animation(path: Path, frames: list[Image.Image]) -> None:
    """Write `frames` as a WebP that plays forth and back, forever."""
    back_and_forth = frames + frames[-2:0:-1]
    with replacing(path) as temporary:
        back_and_forth[0].save(
            temporary, format="WEBP", save_all=True, append_images=back_and_forth[1:], duration=MILLISECONDS, loop=0,
            lossless=False, quality=90, method=4,
        )  # fmt: skip
