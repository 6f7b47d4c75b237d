"""Relational self-attention's cases: RSANet's stages, and every width and combination that has code of its own."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from . import DTYPES, Code, torch_dtype

STAGES = ((8, (56, 56)), (16, (28, 28)), (32, (14, 14)), (64, (7, 7)))  # C_Q and the map of RSANet-R50's layers
PRODUCTS = ("forward", "backward", "fold_keys", "fold_values", "by_h1", "by_h2")  # kernels that multiply matrices


class RelationalCase(NamedTuple):
    """Forward and backward of one call."""

    channels: int = 8  # C and D
    size: tuple[int, int] = (56, 56)
    dtype: str = "bfloat16"
    frames: int = 8
    kernel: str = "V+R"
    context: str = "V+R"
    queries: int = 8
    values: int | None = None  # E and F, C_Q by default
    window: tuple[int, int, int] = (5, 7, 7)
    batch: int = 8
    eps: float | None = 1e-6
    layout: str = "contiguous"

    @property
    def may_spill(self) -> bool:
        """Four-byte operands of 128 channels fill the registers, whatever the blocks."""
        width = max(self.channels, self.values or 0) * (2 if self.queries > 8 else 1)
        return torch_dtype(self.dtype).itemsize == 4 and width > 64

    def launch(self) -> None:
        """Through the op's own host code, on meta tensors: q, k and v are parts of one projection."""
        from dyreg_triton.ops import relational_launches as ops

        c, queries = self.channels, self.queries
        e = self.values or c

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch_dtype(self.dtype), device="meta")

        x = empty(self.batch, queries * c + c + e, self.frames, *self.size)
        if self.layout == "channels_last_3d":
            x = x.to(memory_format=torch.channels_last_3d)
        q, k, v = x.split([queries * c, c, e], 1)
        relational = self.kernel != "V"
        problem = ops.Problem(
            q.unflatten(1, (queries, c)), k if relational else None, v,
            empty(c, *self.window),
            empty(c, c, *self.window) if relational else None,
            empty(c, c) if self.kernel != "R" else None,
            empty(e, *self.window) if self.context != "V" else None,
            empty(e, e) if self.context == "V+R" else None,
            self.eps,
        )  # fmt: skip
        y, a_rows, z_rows = ops.forward(problem, save=True)
        needs = [t is not None for t in problem[:8]]
        ops.backward(problem, y.transpose(1, 2), a_rows, z_rows, needs)

    def problems(self, code: Code) -> list[str]:
        """Products that do not use tensor cores, and narrow access, in words."""
        found = []
        e = self.values or self.channels
        products = code.kernel.removeprefix("relational_") in PRODUCTS
        # gfx942 has no matrix instruction for eight columns of four bytes
        small = code.target == "gfx942" and torch_dtype(self.dtype).itemsize == 4 and min(self.channels, e) <= 8
        if products and code.tensor_core == 0 and not small:
            found.append("no tensor cores")
        if products and code.load_bytes < 16:  # neighbours are runs of channels
            found.append(f"loads {code.load_bytes} of 16 bytes")
        return found

    def about(self) -> str:
        return (
            f"{self.kernel}/{self.context} C {self.channels} E {self.values or self.channels} L {self.queries} "
            f"{self.frames}x{self.size[0]}x{self.size[1]} {'x'.join(map(str, self.window))} {self.layout}"
        )


def cases(everything: bool) -> list[RelationalCase]:
    """The four stages in bfloat16; with `everything` in all dtypes and two lengths, and every combination, number of
    queries, width, window and layout at one of them."""
    if not everything:
        return [RelationalCase(c, size) for c, size in STAGES]
    found = []
    for (c, size), dtype, frames in itertools.product(STAGES, DTYPES, (8, 16)):
        found.append(RelationalCase(c, size, dtype, frames))
    for dtype in DTYPES:
        for kernel, context, c in itertools.product(("V", "R", "V+R"), ("V", "R", "V+R"), (16, 32)):
            found.append(RelationalCase(c, (14, 14), dtype, kernel=kernel, context=context))
        for queries, c in itertools.product((1, 2, 4, 16), (4, 8, 16, 24, 64, 128)):
            found.append(RelationalCase(c, (14, 14), dtype, queries=queries))
        for c, e in ((128, 128), (8, 128), (128, 8), (24, 40), (5, 7)):
            found.append(RelationalCase(c, (9, 11), dtype, values=e))
        for window in ((1, 1, 1), (3, 3, 3), (5, 9, 9), (2, 4, 4), (1, 13, 13)):
            found.append(RelationalCase(16, (14, 14), dtype, window=window))
        found.append(RelationalCase(16, (14, 14), dtype, layout="channels_last_3d"))
        found.append(RelationalCase(16, (14, 14), dtype, eps=None))
        found.append(RelationalCase(16, (1, 1), dtype, frames=1, batch=1))
    return list(dict.fromkeys(found))
