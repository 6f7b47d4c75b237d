"""Weights drawn over the frames that they belong to, as pictures of pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._core.atomic_files import replacing
from .._core.validation import choice, is_dense, positive_int, what
from .arrays import cell_of

if TYPE_CHECKING:
    from PIL import Image

FINE = 2  # everything is drawn this much larger, then averaged: lines and letters get soft edges
GAP, TEXT_LINE, CAPTION = 14, 20, 22  # screen pixels: around panels, a line of the head, the line above a panel
BAR = (120, 9)  # the colour bar
MOST_COLUMNS = 4  # of groups, in a picture of one frame
MOST_FRAMES = 8  # in a picture of many
ROUNDING = 1e-3  # beyond 0 and 1, by which a clip is still one of pixels: resizing does that
BACKGROUND, TEXT, QUIET, MARK = "#10131a", "#e8ebf2", "#8b93a5", "#3dff72"
# Matplotlib's "inferno" at equal steps, by S. van der Walt and N. Smith (CC0): its lightness grows evenly.
INFERNO = (
    "000004", "0d0829", "280b53", "470b6a", "65156e", "82206c", "9f2a63", "bc3754", "d44842", "e8602d", "f57d15",
    "fc9f07", "fac228", "f3e55d", "fcffa4",
)  # fmt: skip


def require_pillow() -> Any:
    """pillow's modules, which only pictures need."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as missing:
        raise ImportError(
            "dyreg_triton.viz draws pictures with the package pillow: pip install 'dyreg-triton[viz]'"
        ) from missing
    return SimpleNamespace(Image=Image, ImageDraw=ImageDraw, ImageFont=ImageFont)


# --- what is drawn --------------------------------------------------------------------------------------------------


def as_frames(clip: Tensor) -> Tensor:
    """A clip as pictures (T, h, w, 3) in uint8.

    clip: uint8 (T, h, w, C) or (h, w, C), or floating point (C, T, h, w) or (C, h, w), with 3 channels or 1. Numbers
    from 0 to 1 are shown as they are; others, such as a normalised clip's, from the least, black, to the most, white.

    Raises TypeError or ValueError for any other.
    """
    if not is_dense(clip) or not (clip.dtype == torch.uint8 or clip.is_floating_point()):
        raise TypeError(
            f"as_frames: clip is {what(clip)}; accepted is a dense torch.Tensor, uint8 (T, h, w, 3) or floating point "
            "(3, T, h, w)"
        )
    clip = clip.detach().cpu()
    last = clip.dtype == torch.uint8
    if clip.dim() == 3:
        clip = clip.unsqueeze(0 if last else 1)
    if clip.dim() != 4 or clip.shape[-1 if last else 0] not in (1, 3) or not clip.numel():
        form = "uint8 (T, h, w, C) or (h, w, C)" if last else "floating point (C, T, h, w) or (C, h, w)"
        raise ValueError(f"as_frames: clip is {what(clip)}; accepted is {form} with C 3 or 1, and no size 0")
    if not last:
        clip = clip.float().movedim(0, -1)
        if not clip.isfinite().all():
            raise ValueError("as_frames: clip has numbers that are not finite; accepted are finite ones")
        low, high = clip.min(), clip.max()
        if low < -ROUNDING or high > 1 + ROUNDING:
            clip = (clip - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        clip = (clip.clamp(0, 1) * 255).round().to(torch.uint8)
    return clip.expand(*clip.shape[:3], 3).contiguous()


def heat_colors(values: Tensor) -> Tensor:
    """Colours (*, 3) in [0, 1] for values (*,) in [0, 1]: black, violet, orange, pale yellow. Brighter is more."""
    table = torch.tensor(
        [[int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)] for color in INFERNO], dtype=torch.float32, device="cpu"
    )
    at = values.detach().cpu().float().clamp(0, 1) * (len(INFERNO) - 1)
    below = at.floor().long().clamp(max=len(INFERNO) - 2)
    share = (at - below).unsqueeze(-1)
    return table[below] * (1 - share) + table[below + 1] * share


class _Drawing:
    """The clip, the maps and the words of a picture, checked, and how each panel looks."""

    def __init__(
        self,
        op: str,
        clip: Any,
        maps: Any,
        title: str,
        note: str,
        groups: Any,
        cell: Any,
        scale: str,
        side: Any,
    ):
        self.pillow = require_pillow()
        self.side = positive_int(op, "side", side) * FINE
        self.each = choice(op, "scale", scale, ("group", "all")) == "group"
        if not is_dense(maps) or not maps.is_floating_point():
            raise TypeError(f"{op}: maps is {what(maps)}; accepted is a floating-point torch.Tensor (G, T, H, W)")
        if maps.dim() != 4 or not maps.numel():
            raise ValueError(f"{op}: maps is {what(maps)}; accepted is (G, T, H, W) without a size 0, one clip's")
        if not maps.isfinite().all():
            raise ValueError(f"{op}: maps has numbers that are not finite; accepted are finite ones")
        self.maps = maps.detach().cpu().float()
        self.count, self.frames = maps.shape[:2]
        self.groups = list(range(self.count)) if groups is None else list(groups)
        if len(self.groups) != self.count:
            raise ValueError(f"{op}: groups is {groups!r}; accepted are {self.count} names, one for each group of maps")
        self.cell = None if cell is None else cell_of(op, cell, (maps.shape[2], maps.shape[3]))
        self.title, self.note = title, note
        pictures = as_frames(clip)
        # a map of fewer frames than the clip stands for the frames in the middle of its own
        self.shown = [int((t + 0.5) * len(pictures) / self.frames) for t in range(self.frames)]
        height, width = pictures.shape[1:3]
        longest = max(height, width)
        self.panel = (max(width * self.side // longest, FINE), max(height * self.side // longest, FINE))
        resampling = self.pillow.Image.Resampling
        way = resampling.BICUBIC if longest > 48 else resampling.NEAREST
        self.pictures = {
            at: self.pillow.Image.fromarray(pictures[at].numpy()).resize(self.panel, way) for at in set(self.shown)
        }
        self.length = len(pictures)
        # by group, or one for all; a map of nothing but 0 is black
        self.top = self.maps.amax((1, 2, 3))
        if not self.each:
            self.top = self.top.max().expand(self.count)

    def font(self, size: int) -> Any:
        return self.pillow.ImageFont.load_default(size * FINE)

    def input(self, frame: int) -> Any:
        """The frame itself, with the mark."""
        return self._marked(self.pictures[self.shown[frame]].copy())

    def heat(self, group: int, frame: int) -> Any:
        """A frame in the light of one group's weights, with the mark.

        Light comes from the weights; the frame dims it, and shows, in grey, where there is none.
        """
        import numpy as np

        width, height = self.panel
        values = (self.maps[group, frame] / self.top[group].clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
        rows = torch.arange(height, dtype=torch.int64, device="cpu") * values.shape[0] // height
        columns = torch.arange(width, dtype=torch.int64, device="cpu") * values.shape[1] // width
        values = values[rows][:, columns].unsqueeze(-1)
        grey = torch.from_numpy(np.array(self.pictures[self.shown[frame]].convert("L"))).unsqueeze(-1) / 255
        color = heat_colors(values.squeeze(-1)) * (0.78 + 0.22 * grey) + 0.34 * grey * (1 - values)
        mixed = (color.clamp(0, 1) * 255).round().to(torch.uint8)
        return self._marked(self.pillow.Image.fromarray(mixed.numpy()))

    def _marked(self, panel: Any) -> Any:
        """A green circle around the cell."""
        if self.cell is not None:
            (row, column), (height, width) = self.cell, self.maps.shape[2:]
            x, y = (column + 0.5) / width * self.panel[0], (row + 0.5) / height * self.panel[1]
            radius = max(0.5 * min(self.panel[0] / width, self.panel[1] / height), 7 * FINE)
            draw = self.pillow.ImageDraw.Draw(panel)
            for extra, color, line in ((1 * FINE, "black", 4 * FINE), (0, MARK, 2 * FINE)):
                out = radius + extra
                draw.ellipse((x - out, y - out, x + out, y + out), outline=color, width=line)
        return panel

    def names(self) -> list[tuple[str, str]]:
        """What stands above, or beside, each group's panels."""
        return [(f"group {name}", f"max {top:.3g}") for name, top in zip(self.groups, self.top.tolist(), strict=True)]

    def canvas(self, width: int, height: int) -> tuple[Any, Any, int]:
        """An empty picture with its head, at least as wide as that needs; and where what is below it begins.

        Width and height are those of what is below the head, without the gaps around it.
        """
        gap = GAP * FINE
        large, small = self.font(16), self.font(12)
        words = [(self.title, large, TEXT), (self.note, small, QUIET)]
        lines = [word for word in words if word[0]]
        bar = ["0", "max of the group" if self.each else f"{self.top[0].item():.3g}"]
        measure = self.pillow.ImageDraw.Draw(self.pillow.Image.new("RGB", (1, 1)))
        right = sum(int(measure.textlength(word, font=small)) for word in bar) + (BAR[0] + 12) * FINE
        left = max((int(measure.textlength(word, font=font)) for word, font, _ in lines), default=0)
        room = max(width, left, right)
        beside = left + right + 2 * gap <= room
        head = TEXT_LINE * FINE * max(len(lines) + (not beside), 1) + gap // 2
        size = [room + 2 * gap, head + height + 2 * gap]
        picture = self.pillow.Image.new("RGB", [-(-length // FINE) * FINE for length in size], BACKGROUND)
        draw = self.pillow.ImageDraw.Draw(picture)
        y = gap
        for word, font, color in lines:
            draw.text((gap, y + TEXT_LINE * FINE // 2), word, fill=color, font=font, anchor="lm")
            y += TEXT_LINE * FINE
        x, y = (gap + room - right, gap + TEXT_LINE * FINE // 2) if beside else (gap, y + TEXT_LINE * FINE // 2)
        draw.text((x, y), bar[0], fill=QUIET, font=small, anchor="lm")
        x += int(measure.textlength(bar[0], font=small)) + 6 * FINE
        strip = (
            (heat_colors(torch.linspace(0, 1, BAR[0] * FINE, dtype=torch.float32, device="cpu")) * 255)
            .round()
            .to(torch.uint8)
        )
        strip = strip.expand(BAR[1] * FINE, -1, 3).contiguous()
        picture.paste(self.pillow.Image.fromarray(strip.numpy()), (x, y - BAR[1] * FINE // 2))
        draw.text((x + (BAR[0] + 6) * FINE, y), bar[1], fill=QUIET, font=small, anchor="lm")
        return picture, draw, gap + head


def draw_frames(
    clip: Tensor,
    maps: Tensor,
    *,
    title: str = "",
    note: str = "",
    groups: Sequence[Any] | None = None,
    cell: Sequence[int] | None = None,
    scale: str = "group",
    side: int = 192,
) -> list[Image.Image]:
    """A picture for each frame: the frame itself, and beside it one panel for each group, its weights over the frame.

    clip: the frames, as `as_frames` takes them. Where it has another number of frames than `maps`, those are taken that
        are in the middle of what each map stands for.
    maps: weights (G, T, H, W) of one clip, of any H and W: `attention_weights(...)[0]` or `contribution_maps(...)[0]`.
        What is below 0 is as dark as 0.
    title, note: the lines above. groups: the groups' names, numbers by default.
    cell: (row, column) of the maps, marked by a green circle.
    scale: what is brightest. "group": the largest weight of each group, over all frames, which is written above it.
        "all": the largest of all groups.
    side: pixels of a panel along its longer side.

    Raises ImportError without pillow, TypeError or ValueError for other arguments.
    """
    it = _Drawing("draw_frames", clip, maps, title, note, groups, cell, scale, side)
    columns = it.count if it.count <= MOST_COLUMNS else math.ceil(it.count / math.ceil(it.count / MOST_COLUMNS))
    rows = math.ceil(it.count / columns)
    gap, caption = GAP * FINE, CAPTION * FINE
    across, down = it.panel[0] + gap, it.panel[1] + caption + gap // 2
    still, draw, top = it.canvas((columns + 1) * across - gap, rows * down - gap // 2)
    small = it.font(12)
    places = [(gap + (1 + g % columns) * across, top + g // columns * down + caption) for g in range(it.count)]
    for (x, y), (name, most) in zip(places, it.names(), strict=True):
        draw.text((x, y - caption // 2), name, fill=TEXT, font=small, anchor="lm")
        draw.text((x + it.panel[0], y - caption // 2), most, fill=QUIET, font=small, anchor="rm")
    pictures = []
    for frame in range(it.frames):
        picture = still.copy()
        x, y = gap, top + caption
        words = f"frame {it.shown[frame] + 1} of {it.length}" if it.length > 1 else "input"
        it.pillow.ImageDraw.Draw(picture).text((x, y - caption // 2), words, fill=TEXT, font=small, anchor="lm")
        picture.paste(it.input(frame), (x, y))
        for group, place in enumerate(places):
            picture.paste(it.heat(group, frame), place)
        pictures.append(picture.reduce(FINE))
    return pictures


def draw_sheet(
    clip: Tensor,
    maps: Tensor,
    *,
    title: str = "",
    note: str = "",
    groups: Sequence[Any] | None = None,
    cell: Sequence[int] | None = None,
    scale: str = "group",
    side: int = 112,
) -> Image.Image:
    """One picture of a clip: the frames in a row, and below it a row of panels for each group.

    Of more than 8 frames 8 are shown, at equal distances. Arguments and errors are those of `draw_frames`.
    """
    it = _Drawing("draw_sheet", clip, maps, title, note, groups, cell, scale, side)
    count = min(it.frames, MOST_FRAMES)
    frames = [round(i * (it.frames - 1) / max(count - 1, 1)) for i in range(count)]
    gap, close, caption = GAP * FINE, 4 * FINE, CAPTION * FINE
    small, names = it.font(12), it.names()
    measure = it.pillow.ImageDraw.Draw(it.pillow.Image.new("RGB", (1, 1)))
    words = ["input", "max 0.0000", *(word for pair in names for word in pair)]  # of one width whatever the weights
    label = max(int(measure.textlength(word, font=small)) for word in words) + gap
    across, down = it.panel[0] + close, it.panel[1] + close
    picture, draw, top = it.canvas(label + count * across - close, caption + (1 + it.count) * down - close)
    for column, frame in enumerate(frames):
        x = gap + label + column * across
        name = f"frame {it.shown[frame] + 1}"
        draw.text((x + it.panel[0] // 2, top + caption // 2), name, fill=QUIET, font=small, anchor="mm")
        picture.paste(it.input(frame), (x, top + caption))
        for group in range(it.count):
            picture.paste(it.heat(group, frame), (x, top + caption + (1 + group) * down))
    for row, (name, most) in enumerate([("input", ""), *names]):
        y = top + caption + row * down + it.panel[1] // 2
        draw.text((gap, y - (8 * FINE if most else 0)), name, fill=TEXT, font=small, anchor="lm")
        draw.text((gap, y + 8 * FINE), most, fill=QUIET, font=small, anchor="lm")
    return picture.reduce(FINE)


# --- files ----------------------------------------------------------------------------------------------------------


def save(path: str | Path, pictures: Image.Image | Sequence[Image.Image], *, milliseconds: int = 160) -> Path:
    """Write one picture as a .png or a .webp, or several as an animated .webp; gives the path.

    The file appears whole or not at all, and takes the place of one that is there. milliseconds: how long a frame is
    shown; the animation plays for ever.

    Raises ImportError without pillow, ValueError for another ending or no picture, OSError where nothing can be
    written.
    """
    require_pillow()
    path = Path(path)
    several: list[Any] = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    positive_int("save", "milliseconds", milliseconds)
    if not several:
        raise ValueError("save: pictures is empty; accepted is a picture or more")
    accepted = (".png", ".webp") if len(several) == 1 else (".webp",)
    ending = path.suffix.lower()
    if ending not in accepted:
        raise ValueError(
            f"save: path is {str(path)!r} for {len(several)} pictures; accepted is a name that ends in "
            f"{' or '.join(accepted)}"
        )
    options: dict[str, Any] = {"format": "PNG", "optimize": True}
    if ending == ".webp":
        options = {"format": "WEBP", "quality": 90, "method": 4}
    if len(several) > 1:
        options |= {"save_all": True, "append_images": several[1:], "duration": milliseconds, "loop": 0}
    with replacing(path) as temporary:
        several[0].save(temporary, **options)
    return path
