"""What a launch config is looked up by."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.gpu import matmul_precision

ELEMENTS = ("16-bit", "float32", "tf32", "float64")
BYTES = dict(zip(ELEMENTS, (2, 4, 4, 8), strict=True))


class Key(NamedTuple):
    """One kernel on one problem: `region.gather 16-bit frames=160 nodes=9 channels=512 cells=196`.

    Attributes:
        op, kind: the op, and which of its kinds.
        element: one of ELEMENTS: bytes of an element, and how float32 is multiplied.
        sizes: those of the op's `KeyForm`, in that order.
    """

    op: str
    kind: str
    element: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        sizes = zip(FORMS[self.op].sizes, self.sizes, strict=True)
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
                op in FORMS
                and kind in FORMS[op].kinds
                and element in ELEMENTS
                and tuple(name for name, _, _ in pairs) == FORMS[op].sizes
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


@dataclass(frozen=True)
class KeyForm:
    """What the keys of an op look like; the names in it are those of `str(key)`.

    Attributes:
        op: the op.
        kinds: its kernels, or what one of them is asked for.
        sizes: the names of what they depend on.
    """

    op: str
    kinds: tuple[str, ...]
    sizes: tuple[str, ...]

    def __post_init__(self) -> None:
        FORMS[self.op] = self

    def key(self, kind: str, tensor: Tensor, *sizes: int) -> Key:
        """The key of a kernel on `tensor`."""
        return Key(self.op, kind, element_of(tensor), sizes)


FORMS: dict[str, KeyForm] = {}  # by op
