"""Calls of the bilinear attentional transform whose results are of order one, whatever the sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from .. import reference
from .._core.validation import choice
from .calls import Call, TensorSpec

MATRIX_KINDS = ("signed", "weights")


@dataclass(frozen=True)
class BilinearSpec(TensorSpec):
    """Square matrices (*, S, S) that keep the size of what they are multiplied with.

    kind: "signed" has normal values of standard deviation 1 / sqrt(S); "weights" positive ones, whose rows sum to 1
    and most of which are small.
    """

    kind: str = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shape) < 2 or self.shape[-1] != self.shape[-2]:
            raise ValueError(f"BilinearSpec: shape is {tuple(self.shape)}; accepted is (*, S, S)")
        choice("BilinearSpec", "kind", self.kind, MATRIX_KINDS)

    def values(self) -> Tensor:
        if not self.dtype.is_floating_point:
            return super().values()
        generator = torch.Generator().manual_seed(int(self.seed))
        values = torch.randn(self.shape, generator=generator, dtype=torch.float32, device="cpu")
        values = values / max(self.shape[-1], 1) ** 0.5 if self.kind == "signed" else (3 * values).softmax(-1)
        return values.to(self.dtype)


@dataclass(frozen=True)
class BilinearCase:
    """One call of `bilinear_transform`, small enough to print: the tensors follow from it.

    size is (H, W), cells is (Sh, Sw), temporal is (Gt, Ts), or None without a temporal matrix. matrices_dtype is that
    of p, q and t, by default `dtype`; kind is theirs too, see `BilinearSpec`.
    """

    cells: tuple[int, int] = (2, 3)
    size: tuple[int, int] = (4, 9)
    temporal: tuple[int, int] | None = (2, 2)
    frames: int = 4
    batch: int = 2
    channels: int = 4
    groups: int = 2
    kind: str = "signed"
    dtype: torch.dtype = torch.float32
    matrices_dtype: torch.dtype | None = None
    layouts: Mapping[str, str] = field(default_factory=dict)
    grad_layout: str = "contiguous"
    seed: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors, in the op's order."""
        rows, columns = self.cells
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.batch, self.channels, self.frames, *self.size),
            "p": (self.batch, self.groups, self.frames, rows, rows),
            "q": (self.batch, self.groups, self.frames, columns, columns),
        }
        if self.temporal is not None:
            groups, steps = self.temporal
            shapes["t"] = (self.batch, groups, steps, steps)
        return shapes

    def out_shape(self) -> tuple[int, ...]:
        return self.shapes()["x"]

    def call(self) -> Call:
        """The same for `check_call`."""
        tensors: dict[str, TensorSpec] = {}
        for i, (name, shape) in enumerate(self.shapes().items()):
            layout, seed = self.layouts.get(name, "contiguous"), self.seed + 2 + i  # the incoming gradient has seed + 1
            if name == "x":
                tensors[name] = TensorSpec(shape, self.dtype, layout, seed)
            else:
                tensors[name] = BilinearSpec(shape, self.matrices_dtype or self.dtype, layout, seed, self.kind)
        return Call(tensors, {}, self.grad_layout, self.seed, bilinear_floors)

    def input_names(self) -> tuple[str, ...]:
        return tuple(self.shapes())

    def values(self) -> dict[str, Tensor]:
        """Contiguous inputs and `grad_output`, on the CPU."""
        tensors = {name: spec.values() for name, spec in self.call().tensors.items()}
        generator = torch.Generator().manual_seed(self.seed + 1)
        tensors["grad_output"] = torch.randn(
            self.out_shape(), generator=generator, dtype=torch.float32, device="cpu"
        ).to(self.dtype)
        return tensors

    def function(self, module: ModuleType) -> Callable[..., Tensor]:
        """The op of `module` (dt.ops or dt.reference) as a function of its tensors, by name."""
        return lambda **tensors: module.bilinear_transform(**tensors)


def bilinear_floors(inputs: Mapping[str, Tensor], grad_output: Tensor) -> Mapping[str, float]:
    """The norm that each result would have if its terms were independent: below it they happen to cancel.

    A matrix of one cell has a gradient of one number, the sum of as many products as the map has cells. Every result
    is such a sum of products of one element of each tensor, so the squares of the tensors give the sum of squares.
    """
    if not grad_output.numel():
        return {}
    squares = {name: t.detach().double().square().requires_grad_() for name, t in inputs.items()}
    y = reference.bilinear_transform(**squares)
    grads = torch.autograd.grad(y, list(squares.values()), grad_output.detach().double().square())
    results = {"out": y.detach(), **{f"grad_{name}": grad for name, grad in zip(squares, grads, strict=True)}}
    return {name: t.sum().sqrt().item() for name, t in results.items()}
