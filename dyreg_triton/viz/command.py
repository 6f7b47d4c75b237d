"""`python -m dyreg_triton viz`: its arguments, what it reads, what it writes."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

LAYOUTS = ("BCTHW", "BTCHW", "TCHW")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is a number, or three with commas: 0.485,0.456,0.406")
    return values


def _cell(text: str) -> tuple[int, int]:
    found = re.fullmatch("([0-9]{1,9}),([0-9]{1,9})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted are a row and a column from 0 on, such as 3,5")
    return int(found.group(1)), int(found.group(2))


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch("([1-9][0-9]{0,5})[,x]([1-9][0-9]{0,5})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted are a height and a width, such as 224,224")
    return int(found.group(1)), int(found.group(2))


def add_arguments(parser: argparse.ArgumentParser, factory: Any, device: Any) -> None:
    """The options of the command; `factory` and `device` are the types that other commands use too."""
    parser.add_argument("factory", type=factory, help="package.module:factory, which makes the model, or is one")
    parser.add_argument(
        "--clip", type=Path, required=True, metavar="FILE",
        help="what the model sees: .npy or .pt with uint8 (T,H,W,3) or floating point (3,T,H,W), an image, an animated "
        "GIF or WebP, or a folder of images",
    )  # fmt: skip
    parser.add_argument(
        "--layer", action="extend", nargs="+", default=[], metavar="PATH",
        help="only these: paths, folders, patterns of paths (all)",
    )  # fmt: skip
    parser.add_argument(
        "--cell", type=_cell, metavar="ROW,COL", help="cell of the map to explain (the one in the middle)"
    )
    parser.add_argument(
        "--group", action="extend", nargs="+", type=int, default=[], metavar="N", help="only these groups, from 0 (all)"
    )
    parser.add_argument("--out", type=Path, default=Path("viz"), metavar="FOLDER", help="where to write (viz)")
    parser.add_argument("--device", type=device, default="cpu", help="where to run (cpu)")
    parser.add_argument(
        "--mean", type=_numbers, default=(0.0,), metavar="R,G,B", help="taken from pixels of 0 to 1 (0)"
    )
    parser.add_argument(
        "--std", type=_numbers, default=(1.0,), metavar="R,G,B", help="what they are divided by then (1)"
    )
    parser.add_argument("--size", type=_size, metavar="H,W", help="resize the frames to this (as they are)")
    parser.add_argument(
        "--layout", choices=LAYOUTS,
        help="the model's input: TCHW has the frames as its batch (that if all its layers are for images, else BCTHW)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", choices=("group", "all"), default="group",
        help="what is brightest: the largest weight of each group, or of all (group)",
    )  # fmt: skip


def main(options: argparse.Namespace, make: Callable[[str], Any]) -> int:
    """Run the command; `make` makes what the factory names. Returns the exit status."""
    import torch

    from .pictures import as_frames, require_pillow
    from .recorder import record, transforms

    try:
        require_pillow()
    except ImportError as missing:
        raise RuntimeError(str(missing)) from missing
    clip = read_clip(options.clip)
    if options.size is not None:
        clip = torch.nn.functional.interpolate(
            clip.transpose(0, 1), size=options.size, mode="bilinear", antialias=True, align_corners=False
        ).transpose(0, 1)
    frames = as_frames(clip)
    model = _with_layers(make(options.factory), options.factory)
    try:
        model.to(options.device)
    except (RuntimeError, AssertionError) as failure:
        raise ValueError(f"device is {str(options.device)!r}; accepted is one that is here: {failure}") from failure
    layers = _chosen(transforms(model), options.layer)
    x = _input(clip, options, model, layers.values())
    try:
        found = record(model, x)
    except Exception as failure:
        raise ValueError(
            f"{options.factory} is not recorded on {options.clip}, as input {tuple(x.shape)}: "
            f"{type(failure).__name__}: {failure}"
        ) from failure
    idle = [path for path in layers if path not in found]
    if len(idle) == len(layers):
        raise ValueError(f"{options.factory} calls none of {', '.join(map(repr, layers))} on {options.clip}")
    drawn = [_Layer(path, found[path], options) for path in layers if path in found]  # all checked before any file
    for layer in drawn:
        print(layer.heading, flush=True)
        for file in layer.write(frames, options):
            print(f"  {file}", flush=True)
    for name in idle:
        print(f"{name}: not called")
    return 0


# --- input ----------------------------------------------------------------------------------------------------------


def read_clip(path: Path) -> Any:
    """A clip (C, T, h, w) in float32: pixels from 0 to 1, or the numbers of a floating-point array.

    Raises OSError where it cannot be read, ValueError where it is no clip.
    """
    import torch

    if not path.exists():
        raise FileNotFoundError(f"clip is {str(path)!r}, which is not there")
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES and p.is_file()), key=_natural)
        if not files:
            raise ValueError(f"clip is {str(path)!r}, a folder without images; accepted are {', '.join(PICTURES)}")
        clip = _stacked(path, [(file.name, picture) for file in files for picture in _pictures(file)])
    elif path.suffix.lower() in (".npy", ".pt", ".pth"):
        clip = _array(path)
    elif path.suffix.lower() in PICTURES:
        clip = _stacked(path, [(f"frame {i}", picture) for i, picture in enumerate(_pictures(path))])
    else:
        raise ValueError(
            f"clip is {str(path)!r}; accepted are .npy, .pt, an image ({', '.join(PICTURES)}) and a folder of images"
        )
    if clip.dtype == torch.uint8:
        clip = (clip.unsqueeze(0) if clip.dim() == 3 else clip).movedim(-1, 0).float() / 255
    elif clip.dim() == 3:
        clip = clip.unsqueeze(1)
    return clip.float()


def _natural(path: Path) -> list[Any]:
    """frame2 before frame10."""
    parts = re.split("([0-9]+)", path.name)  # text and digits take turns
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _pictures(path: Path) -> list[Any]:
    """The frames of an image file, (h, w, 3) each."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps, ImageSequence

    try:
        with Image.open(path) as file:
            return [
                torch.from_numpy(np.array(ImageOps.exif_transpose(frame).convert("RGB")))
                for frame in ImageSequence.Iterator(file)
            ]
    except Exception as failure:  # pillow raises whatever a broken file leads to
        raise ValueError(f"clip is {str(path)!r}, which is no image that pillow reads: {failure}") from failure


def _stacked(path: Path, frames: list[tuple[str, Any]]) -> Any:
    import torch

    name, first = frames[0]
    for other, picture in frames:
        if picture.shape != first.shape:
            raise ValueError(
                f"clip is {str(path)!r}, where {other} is {tuple(picture.shape[:2])} and {name} is "
                f"{tuple(first.shape[:2])}; accepted are images of one size"
            )
    return torch.stack([picture for _, picture in frames])


def _array(path: Path) -> Any:
    """A tensor from a file, which nothing in the file is executed for."""
    import numpy as np
    import torch

    try:
        if path.suffix.lower() == ".npy":
            clip: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            clip = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:
        told = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise ValueError(f"clip is {str(path)!r}, which holds no array: {told}") from failure
    form = "uint8 (T, H, W, C) or (H, W, C), or floating point (C, T, H, W) or (C, H, W), with C 3 or 1"
    if not isinstance(clip, torch.Tensor):
        raise ValueError(f"clip is {str(path)!r}, which holds a {type(clip).__name__}; accepted is a tensor, {form}")
    bytes_ = clip.dtype == torch.uint8
    if (
        not (bytes_ or clip.is_floating_point())
        or clip.dim() not in (3, 4)
        or clip.shape[-1 if bytes_ else 0] not in (1, 3)
        or not clip.numel()
    ):
        raise ValueError(
            f"clip is {str(path)!r}, which holds {tuple(clip.shape)} {str(clip.dtype)[6:]}; accepted is {form}"
        )
    return clip


def _input(clip: Any, options: argparse.Namespace, model: Any, layers: Any) -> Any:
    """The clip as the model takes it: normalised, in its layout, dtype and on its device."""
    import torch

    channels = clip.shape[0]
    given = {}
    for name in ("mean", "std"):
        values = getattr(options, name)
        if len(values) not in (1, channels):
            raise ValueError(f"{name} is {values}; accepted is one number, or {channels} for this clip's channels")
        given[name] = torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1, 1)
    if not given["std"].all():
        raise ValueError(f"std is {options.std}; accepted are numbers that are not 0")
    x = (clip - given["mean"]) / given["std"]
    images = all(getattr(layer, "dimensions", 3) == 2 for layer in layers)
    layout = options.layout or ("TCHW" if images else "BCTHW")
    x = {"BCTHW": x.unsqueeze(0), "BTCHW": x.transpose(0, 1).unsqueeze(0), "TCHW": x.transpose(0, 1)}[layout]
    first = next(
        (p for p in model.parameters() if p.is_floating_point()),
        torch.zeros((), device=options.device, dtype=torch.float32),
    )
    return x.contiguous().to(first)


# --- layers ---------------------------------------------------------------------------------------------------------


def _with_layers(model: Any, factory: str) -> Any:
    """The model; one of the authors' with this library's layers in it."""
    from ..swapping import SwapError, swap
    from .recorder import transforms

    if not transforms(model):
        try:
            swap(model)
        except SwapError as refusal:
            raise ValueError(f"{factory} makes a model without a BATransform to show; {refusal}") from refusal
    if not transforms(model):
        raise ValueError(f"{factory} makes a {type(model).__name__}, which has no BATransform to show")
    return model


def _chosen(layers: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    from ..swapping.find import selected

    if not names:
        return layers
    chosen = {path: selected(path, "BATransform", tuple(names)) for path in layers}
    for name in names:
        if not any(name in by for by in chosen.values()):
            raise ValueError(
                f"layer is {name!r}, which chooses none; accepted are paths, folders and patterns of "
                f"{', '.join(map(repr, layers))}"
            )
    return {path: layers[path] for path, by in chosen.items() if by}


class _Layer:
    """What is written of one layer."""

    def __init__(self, path: str, recorded: Any, options: argparse.Namespace):
        height, width = recorded.size
        self.cell = options.cell if options.cell is not None else (height // 2, width // 2)
        self.groups = options.group or list(range(recorded.matrices.p.shape[1]))
        self.name = path or "model"
        try:
            self.kinds = {
                "attention": (
                    recorded.attention_weights(group=self.groups),
                    "attention: the weight with which each cell enters the outputs",
                    None,
                ),
                "contribution": (
                    recorded.contribution_maps(self.cell, group=self.groups),
                    f"contribution of each cell to the output at row {self.cell[0]}, column {self.cell[1]}",
                    self.cell,
                ),
            }
        except ValueError as refusal:
            raise ValueError(f"{self.name}: {refusal}") from refusal
        # a batch is a batch of frames: one clip was given
        self.kinds = {
            kind: (maps.movedim(1, 0).flatten(1, 2).cpu(), note, cell)
            for kind, (maps, note, cell) in self.kinds.items()
        }
        for kind, (maps, _, _) in self.kinds.items():
            if not maps.isfinite().all():
                raise ValueError(
                    f"{self.name}: its {kind} has numbers that are not finite; accepted are finite weights"
                )
        frames = self.kinds["attention"][0].shape[1]
        self.heading = (
            f"{self.name}: {_count(len(self.groups), 'group')}, {_count(frames, 'frame')}, "
            f"a map of {height} x {width}, cell ({self.cell[0]}, {self.cell[1]})"
        )

    def write(self, frames: Any, options: argparse.Namespace) -> Iterator[Path]:
        """The arrays, and the pictures: a PNG, and of several frames a WebP that plays."""
        import numpy as np

        from .._core.atomic_files import replacing
        from .pictures import draw_frames, draw_sheet, save

        for kind, (maps, note, cell) in self.kinds.items():
            base = f"{kind}-{quote(self.name, safe='')}"
            path = options.out / f"{base}.npy"
            with replacing(path) as temporary:
                np.save(temporary, maps.numpy())
            yield path
            words: dict[str, Any] = {
                "title": self.name, "note": note, "groups": self.groups, "cell": cell, "scale": options.scale,
            }  # fmt: skip
            pictures = draw_frames(frames, maps, **words)
            still = pictures[0] if len(pictures) == 1 else draw_sheet(frames, maps, **words)
            yield save(options.out / f"{base}.png", still)
            if len(pictures) > 1:
                yield save(options.out / f"{base}.webp", pictures)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
