"""What a launch config is looked up by."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from ..gpu import matmul_precision

SIZES = {
    "bilinear": ("clips", "channels", "t", "h", "w", "groups", "sh", "sw", "mixes", "ts"),
    "region": ("frames", "nodes", "channels", "cells"),
    "relational": ("clips", "t", "h", "w", "queries", "c", "d", "e", "f", "kt", "kh", "kw"),
}
KINDS = {
    "bilinear": ("forward", "backward", "forward_mixed", "backward_mixed", "mix", "mix_backward"),
    "region": ("gather", "scatter", "gather_moments", "scatter_moments", "dense", "dense_moments"),
    "relational": ("pack", "forward", "backward", "fold_keys", "fold_values", "by_h1", "by_h2"),
}
ELEMENTS = ("16-bit", "float32", "tf32", "float64")
BYTES = dict(zip(ELEMENTS, (2, 4, 4, 8), strict=True))


class Key(NamedTuple):
    """One kernel on one problem: `region.gather 16-bit frames=160 nodes=9 channels=512 cells=196`.

    Attributes:
        op, kind: the op, and which of KINDS[op].
        element: one of ELEMENTS: bytes of an element, and how float32 is multiplied.
        sizes: those of SIZES[op], in that order.
    """

    op: str
    kind: str
    element: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        sizes = zip(SIZES[self.op], self.sizes, strict=True)
        return f"{self.op}.{self.kind} {self.element} " + " ".join(f"{name}={size}" for name, size in sizes)

    @classmethod
    def parse(cls, text: str) -> Key:
        """What str(key) wrote; ValueError for anything else."""
        found = (
            re.fullmatch(r"(\w+)\.(\w+) (\S+)((?: \w+=[1-9]\d{0,11})+)", text, re.ASCII)
            if isinstance(text, str)
            else None
        )
        if found is not None:
            op, kind, element, sizes = found.groups()
            pairs = [pair.partition("=") for pair in sizes.split()]
            if (
                kind in KINDS.get(op, ())
                and element in ELEMENTS
                and tuple(name for name, _, _ in pairs) == SIZES.get(op)
            ):
                return cls(op, kind, element, tuple(int(size) for _, _, size in pairs))
        raise ValueError(
            f"key is {text!r}; accepted is such as 'region.gather 16-bit frames=160 nodes=9 channels=512 cells=196'"
        )

    def distance(self, other: Key) -> float:
        """How far apart the sizes are: the sum of |log2| of their ratios."""
        return sum(abs(math.log2(a / b)) for a, b in zip(self.sizes, other.sizes, strict=True))


def element_of(tensor: Tensor) -> str:
    """The element class of `tensor`, under torch's present matmul precision."""
    if tensor.dtype == torch.float32:
        return "float32" if matmul_precision() == "highest" else "tf32"
    return "float64" if tensor.dtype == torch.float64 else "16-bit"


def bilinear_key(
    kind: str, shape: tuple[int, ...], groups: int, cells: tuple[int, int], mixes: int, ts: int, tensor: Tensor
) -> Key:
    """A kernel of the bilinear transform of a clip of `shape`; arguments as `heuristics.bilinear`'s."""
    return Key("bilinear", kind, element_of(tensor), (*shape, groups, *cells, mixes, ts))


def region_key(kind: str, frames: int, nodes: int, channels: int, cells: int, tensor: Tensor) -> Key:
    """A kernel of kernels/region.py, which `kind` names."""
    return Key("region", kind, element_of(tensor), (frames, nodes, channels, cells))


def relational_key(
    kind: str,
    clips: int,
    size: tuple[int, int, int],
    queries: int,
    channels: tuple[int, int, int, int],
    window: tuple[int, int, int],
    tensor: Tensor,
) -> Key:
    """A kernel of relational self-attention; arguments as `heuristics.relational`'s."""
    return Key("relational", kind, element_of(tensor), (clips, *size, queries, *channels, *window))
