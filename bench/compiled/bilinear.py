"""The bilinear transform's cases: the published networks' blocks, and every form of a tile that has code of its own."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from . import DTYPES, Code, torch_dtype

# (channels, frames, map) of the published networks' blocks, and of the issue's largest map
STAGES = ((256, 8, (28, 28)), (512, 8, (14, 14)), (512, 4, (28, 28)), (256, 1, (56, 56)))


class BilinearCase(NamedTuple):
    """Forward and backward of one call; `mixes` is Gt, 0 without t."""

    channels: int = 256
    frames: int = 8
    size: tuple[int, int] = (28, 28)
    dtype: str = "bfloat16"
    groups: int = 8
    mixes: int = 0
    cells: tuple[int, int] = (7, 7)
    ts: int = 4
    batch: int = 8
    layout: str = "contiguous"

    @property
    def may_spill(self) -> bool:
        """Which of its kernels may, `problems` knows."""
        return True

    def launch(self) -> None:
        """Through the op's own host code, on meta tensors."""
        from dyreg_triton.ops import bilinear_launches as ops

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch_dtype(self.dtype), device="meta")

        x = empty(self.batch, self.channels, self.frames, *self.size)
        if self.layout == "channels_last_3d":
            x = x.to(memory_format=torch.channels_last_3d)
        p, q = (empty(self.batch, self.groups, self.frames, s, s) for s in self.cells)
        t = empty(self.batch, self.mixes, self.ts, self.ts) if self.mixes else None
        problem = ops.Problem(x, p, q, t)
        y = torch.empty_like(x)
        ops.forward(problem, y)
        ops.backward(problem, y, [True, True, True, t is not None])

    def problems(self, code: Code) -> list[str]:
        """Products that do not use tensor cores, and spills that are not known, in words.

        The exact products of float32 hold every operand twice, which fills the registers of a backward that mixes
        frames; so do four bytes of 64 x 64 coarse cells. On gfx942 some scalars go to vector registers where frames are
        mixed, and on NVIDIA the odd register goes to memory.
        """
        found = ["no tensor cores"] if code.tensor_core == 0 else []
        exact = self.dtype == "float32" and code.kernel == "bilinear_backward" and self.mixes > 0
        large = torch_dtype(self.dtype).itemsize == 4 and self.cells[0] * self.cells[1] > 1024
        few = self.mixes > 0 and code.spills <= (64 if code.target == "gfx942" else 16)
        if code.spills and not (exact or large or few):
            found.append(f"spills {code.spills}")
        return found

    def about(self) -> str:
        """The case in a few columns."""
        return (
            f"C {self.channels} {self.frames}x{self.size[0]}x{self.size[1]} k {self.groups} tk {self.mixes} "
            f"s {self.cells[0]}x{self.cells[1]} ts {self.ts} {self.layout}"
        )


def cases(everything: bool) -> list[BilinearCase]:
    """The four blocks in bfloat16, with and without mixed frames; with `everything` in all dtypes, and every form of
    tile, layout and length of time."""
    if not everything:
        return [BilinearCase(c, t, size, mixes=mixes) for c, t, size in STAGES for mixes in ((0, 4) if t > 1 else (0,))]
    found = []
    for (c, t, size), dtype, mixes in itertools.product(STAGES, DTYPES, (0, 4)):
        found.append(BilinearCase(c, t, size, dtype, 4 if mixes else 8, mixes, ts=min(4, t)))
    for dtype in DTYPES:
        for cells, mixes in itertools.product(
            ((1, 1), (2, 2), (3, 5), (4, 4), (8, 8), (7, 13), (14, 14), (28, 14), (32, 32), (64, 64)),
            (0, 2),
        ):
            size = (cells[0] * (2 if cells[0] < 64 else 1), cells[1])
            found.append(BilinearCase(64, 4, size, dtype, 4, mixes, cells, batch=2))
        for ts in (1, 2, 8, 16, 32, 64):
            found.append(BilinearCase(64, 64, (14, 14), dtype, 4, 2, ts=ts, batch=1))
        for size in ((7, 7), (14, 21)):
            found.append(BilinearCase(96, 4, size, dtype, 4, 3))
        found.append(BilinearCase(256, 8, (28, 28), dtype, mixes=4, layout="channels_last_3d"))
        found.append(BilinearCase(5, 1, (7, 7), dtype, 5, batch=1))
    return list(dict.fromkeys(found))
