"""A call of an op as a few numbers: small enough to print, and its tensors follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._core.dispatch import can_run
from .._core.validation import as_device, choice, function, mapping, seed_of, shape_of, what
from .memory import LAYOUTS, Guarded

Floors = Callable[[Mapping[str, Tensor], Tensor], Mapping[str, float]]


def default_device() -> torch.device:
    """CUDA where there is a GPU, and the CPU where there is none or kernels are interpreted."""
    interpreted = can_run("triton", device="cpu", dtype=torch.float32)
    return torch.device("cuda" if torch.cuda.is_available() and not interpreted else "cpu")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of standard normal values (whole numbers below 8 for an integer dtype), in a layout of `Guarded`."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    def __post_init__(self) -> None:
        shape_of("TensorSpec", "shape", self.shape)
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"TensorSpec: dtype is {what(self.dtype)}; accepted is a torch.dtype")
        choice("TensorSpec", "layout", self.layout, LAYOUTS)
        seed_of("TensorSpec", self.seed)

    def values(self) -> Tensor:
        """The values, contiguous, on the CPU."""
        generator = torch.Generator().manual_seed(int(self.seed))
        if not self.dtype.is_floating_point:
            return torch.randint(8, self.shape, generator=generator, dtype=torch.int64, device="cpu").to(self.dtype)
        return torch.randn(self.shape, generator=generator, dtype=torch.float32, device="cpu").to(self.dtype)


@dataclass(frozen=True)
class Call:
    """Arguments of one call of an op.

    Args:
        tensors: the op's tensor arguments, by name.
        options: its other arguments, by name.
        grad_layout: layout of the incoming gradient.
        seed: of the incoming gradient.
        floors: from (inputs by name, incoming gradient) the norm, by result ("out", "grad_<input>"), below which
            that result is a difference of larger terms; errors are then relative to it.
    """

    tensors: Mapping[str, TensorSpec]
    options: Mapping[str, Any] = field(default_factory=dict)
    grad_layout: str = "contiguous"
    seed: int = 0
    floors: Floors | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, spec in mapping("Call", "tensors", self.tensors).items():
            if not isinstance(spec, TensorSpec):
                raise TypeError(f"Call: tensors[{name!r}] is {what(spec)}; accepted is a TensorSpec")
        mapping("Call", "options", self.options)
        choice("Call", "grad_layout", self.grad_layout, LAYOUTS)
        seed_of("Call", self.seed)
        if self.floors is not None:
            function("Call", "floors", self.floors)

    def inputs(self, device: torch.device | str) -> dict[str, Guarded | Tensor]:
        """The tensors on `device`; the floating ones in poisoned memory."""
        device = as_device("Call.inputs", device)
        made: dict[str, Guarded | Tensor] = {}
        for name, spec in self.tensors.items():
            values = spec.values().to(device)
            made[name] = Guarded(values, spec.layout) if values.is_floating_point() else values
        return made

    def cotangent(self, out: Tensor) -> Guarded:
        """A random incoming gradient for the output `out`, in poisoned memory."""
        generator = torch.Generator().manual_seed(int(self.seed) + 1)
        values = (
            torch.randn(out.shape, generator=generator, dtype=torch.float32, device="cpu").to(out.dtype).to(out.device)
        )
        return Guarded(values, self.grad_layout)
