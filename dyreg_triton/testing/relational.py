"""Calls of relational self-attention whose results are of order one, whatever the sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._core.validation import positive_number
from .calls import Call, TensorSpec

RELATIONAL_KERNELS = ("V", "V published", "R", "V+R")  # published: without p1
RELATIONAL_CONTEXTS = ("V", "R", "V+R")


@dataclass(frozen=True)
class RelationalSpec(TensorSpec):
    """Normal values of standard deviation `scale`; with `zeros`, all channels are 0 at a quarter of the positions.

    zeros: (*, C, T, H, W) is then the shape.
    """

    scale: float = 1.0
    zeros: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_number("RelationalSpec", "scale", self.scale)
        if not isinstance(self.zeros, bool) or (self.zeros and len(self.shape) < 4):
            raise ValueError(
                f"RelationalSpec: zeros is {self.zeros!r}; accepted are False, and True where the shape "
                f"{tuple(self.shape)} is (*, C, T, H, W)"
            )

    def values(self) -> Tensor:
        if not self.dtype.is_floating_point:
            return super().values()
        generator = torch.Generator().manual_seed(int(self.seed))
        values = torch.randn(self.shape, generator=generator, dtype=torch.float32, device="cpu") * self.scale
        if self.zeros:
            positions = values.narrow(-4, 0, 1).shape if values.shape[-4] else values.shape
            values = values * (torch.rand(positions, generator=generator, dtype=torch.float32, device="cpu") >= 0.25)
        return values.to(self.dtype)


@dataclass(frozen=True)
class RelationalCase:
    """One call of `relational_attention`, small enough to print: the tensors follow from it.

    channels, latent, value_channels and mixed are C, D, E and F. Weights are scaled by one over the square root of how
    many terms are summed, so that outputs are of order one. `scale` is that of q, k and v, for use with `eps`.
    """

    kernel: str = "V+R"
    context: str = "V+R"
    kernel_size: tuple[int, int, int] = (1, 3, 3)
    clip: tuple[int, int, int] = (2, 3, 4)
    batch: int = 1
    queries: int = 2
    channels: int = 4
    latent: int = 5
    value_channels: int = 4
    mixed: int = 5
    eps: float | None = None
    scale: float = 1.0
    zeros: bool = False
    dtype: torch.dtype = torch.float32
    layouts: Mapping[str, str] = field(default_factory=dict)
    grad_layout: str = "contiguous"
    seed: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of this kernel and context, in the op's order."""
        c, e = self.channels, self.value_channels
        d = c if self.kernel == "V published" else self.latent
        shapes: dict[str, tuple[int, ...]] = {"q": (self.batch, self.queries, c, *self.clip)}
        if "R" in self.kernel:
            shapes["k"] = (self.batch, c, *self.clip)
        shapes["v"] = (self.batch, e, *self.clip)
        shapes["h2"] = (d, *self.kernel_size)
        if "R" in self.kernel:
            shapes["h1"] = (c, d, *self.kernel_size)
        if self.kernel in ("V", "V+R"):
            shapes["p1"] = (c, d)
        if "R" in self.context:
            shapes["g"] = (self.mixed, *self.kernel_size)
        if self.context == "V+R":
            shapes["identity"] = (e, self.mixed)
        return shapes

    def out_shape(self) -> tuple[int, ...]:
        mixed = self.value_channels if self.context == "V" else self.mixed
        return (self.batch, self.queries, mixed, *self.clip)

    def call(self) -> Call:
        """The same for `check_call`."""
        c, e, m = self.channels, self.value_channels, self.kernel_size[0] * self.kernel_size[1] * self.kernel_size[2]
        d = c if self.kernel == "V published" else self.latent
        # normalised vectors have norm 1: elements are smaller by the square root of their number
        unit_c, unit_e = (1.0, 1.0) if self.eps is None else (c**0.5, e**0.5)
        scales = {
            "p1": unit_c / c**0.5,
            "h1": unit_c**2 / (c * m) ** 0.5,
            "h2": (unit_c if self.kernel == "V published" else 1.0) * unit_e / (d * m) ** 0.5,
            "g": unit_e / (e * m) ** 0.5,
            "identity": 1 / e**0.5,
        }
        tensors: dict[str, TensorSpec] = {}
        for i, (name, shape) in enumerate(self.shapes().items()):
            features = name in ("q", "k", "v")
            tensors[name] = RelationalSpec(
                shape,
                self.dtype,
                self.layouts.get(name, "contiguous"),
                self.seed + 2 + i,  # the incoming gradient has seed + 1
                self.scale if features else scales[name],
                self.zeros and features,
            )
        options: dict[str, Any] = {"eps": self.eps}
        if "k" not in tensors:
            options["k"] = None
        return Call(tensors, options, self.grad_layout, self.seed, self.floors if self.eps is not None else None)

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
        options = self.call().options
        return lambda **tensors: module.relational_attention(**tensors, **options)

    def floors(self, inputs: Mapping[str, Tensor], grad_output: Tensor) -> Mapping[str, float]:
        """The norm below which the gradient of a normalised tensor is mere cancellation.

        It is the gradient of x / |x| divided by |x|, less its part along x. A result that depends on the length of a
        value only, as one tap of context R does, has no other part: its exact gradient is next to zero.
        """
        if self.eps is None or not grad_output.numel():
            return {}
        wide = {name: t.detach().double() for name, t in inputs.items()}
        norms = {name: (wide[name].square().sum(-4, keepdim=True) + self.eps).sqrt() for name in "qkv" if name in wide}
        units = {name: (wide[name] / norm).requires_grad_() for name, norm in norms.items()}
        arguments: dict[str, Any] = {"k": None, **wide, **units}
        y = reference.relational_attention(**arguments)
        grads = torch.autograd.grad(y, list(units.values()), grad_output.double())
        return {f"grad_{name}": (grad / norms[name]).norm().item() for name, grad in zip(units, grads, strict=True)}
