"""Random regions whose profiles are smooth where they are sampled, and calls of the region ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._core.validation import FLOATS, choice, pair, seed_of, shape_of, what
from .calls import Call, TensorSpec, default_device
from .memory import Guarded

REGION_OPS = ("region_pool", "region_remap", "region_kernel")
REGION_KINDS = ("inside", "outside", "empty", "tiny", "covering", "mixed")


def _axis(kind: str, side: int, uniform: Callable[[float, float], float]) -> tuple[float, float]:
    """A center and half-extent along an axis of `side` cells."""
    if kind == "outside":
        beyond = uniform(0.1, 4.0)
        return (-beyond if uniform(0, 1) < 0.5 else side - 1 + beyond), uniform(0.3, 8.0)
    center = uniform(-0.4, side - 0.6)
    if kind == "empty":
        return center, (0.0 if uniform(0, 1) < 0.5 else -uniform(0.1, 3.0))
    if kind == "tiny":
        return center, uniform(0.1, 0.45)
    if kind == "covering":
        return center, uniform(2.0, 10.0) * side
    return center, uniform(0.7, max(1.5, side / 2))


def _off_kinks(center: float, extent: float, side: int, margin: float) -> bool:
    """Whether the profile is smooth within `margin` at every cell: neither d = 0 nor d = s is near."""
    for place in (center, center - extent, center + extent):
        if abs(place - min(max(round(place), 0), side - 1)) < margin:
            return False
    return True


def random_regions(
    shape: tuple[int, ...],
    size: tuple[int, int],
    *,
    kind: str = "inside",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    margin: float = 1e-3,
) -> Tensor:
    """Regions (*shape, 4) on the CPU whose profile has no kink within `margin` of a cell, as held in `dtype`.

    Args:
        shape: (*, N).
        size: (H, W) of the map.
        kind: one of REGION_KINDS; "empty" is so along one axis or both, "mixed" draws a kind for each region.
        dtype: float16, bfloat16, float32 or float64.
        seed: of the generator.
        margin: cells; gradients differ on the two sides of a kink, so comparisons stay away from them.

    Raises ValueError for another kind, size or dtype.
    """
    size = pair("random_regions", "size", size)
    choice("random_regions", "kind", kind, REGION_KINDS)
    shape = shape_of("random_regions", "shape", shape)
    if math.prod(shape) > 2**24:
        raise ValueError(f"random_regions: shape is {shape}; accepted are at most 2**24 regions")
    seed_of("random_regions", seed)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin <= 0.1:
        raise ValueError(f"random_regions: margin is {what(margin)}; accepted is a number from 0 to 0.1")
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise ValueError(
            f"random_regions: dtype is {what(dtype)}; accepted are {', '.join(str(t)[6:] for t in FLOATS)}"
        )
    generator = torch.Generator().manual_seed(int(seed))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float32, device="cpu").item()

    def held(value: float) -> float:
        return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).item()

    def draw(kind: str, side: int) -> tuple[float, float]:
        while True:
            center, extent = map(held, _axis(kind, side, uniform))
            if extent <= 0 or _off_kinks(center, extent, side, margin):
                return center, extent

    rows = []
    for _ in range(math.prod(shape)):
        own = REGION_KINDS[int(uniform(0, len(REGION_KINDS) - 1))] if kind == "mixed" else kind
        (cx, w), (cy, h) = draw(own, size[1]), draw(own, size[0])
        if own == "empty" and uniform(0, 1) < 0.5:
            cy, h = draw("inside", size[0])
        rows.append([cx, cy, w, h])
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(*shape, 4).to(dtype)


@dataclass(frozen=True)
class RegionSpec(TensorSpec):
    """`random_regions` of one kind on a map of `size`."""

    size: tuple[int, int] = (1, 1)
    kind: str = "inside"

    def values(self) -> Tensor:
        size = (max(self.size[0], 1), max(self.size[1], 1))  # an empty map has regions too
        return random_regions(self.shape[:-1], size, kind=self.kind, dtype=self.dtype, seed=self.seed)


@dataclass(frozen=True)
class RegionCase:
    """One call of a region op, small enough to print: the tensors follow from it."""

    op: str
    lead: tuple[int, ...]
    nodes: int
    channels: int
    size: tuple[int, int]
    profile: str = "linear"
    temperature: float = 1.0
    kind: str = "inside"
    dtype: torch.dtype = torch.float32
    regions_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    regions_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"profile": self.profile, "temperature": self.temperature}

    def input_names(self) -> tuple[str, ...]:
        return {"region_pool": ("x", "regions"), "region_remap": ("nodes", "regions"), "region_kernel": ("regions",)}[
            self.op
        ]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of x, nodes, regions or out."""
        if name == "out":
            name = {"region_pool": "nodes", "region_remap": "x", "region_kernel": "kernel"}[self.op]
        tail = {
            "x": (self.channels, *self.size),
            "nodes": (self.nodes, self.channels),
            "regions": (self.nodes, 4),
            "kernel": (self.nodes, *self.size),
        }[name]
        return (*self.lead, *tail)

    def out_dtype(self) -> torch.dtype:
        return self.regions_dtype if self.op == "region_kernel" else self.dtype

    def values(self) -> dict[str, Tensor]:
        """Contiguous inputs and `grad_output`, on the CPU."""
        tensors = {name: spec.values() for name, spec in self.call().tensors.items()}
        generator = torch.Generator().manual_seed(self.seed + 1)
        tensors["grad_output"] = torch.randn(
            self.shape_of("out"), generator=generator, dtype=torch.float32, device="cpu"
        ).to(self.out_dtype())
        return tensors

    def guarded(self, device: torch.device | str | None = None) -> dict[str, Guarded]:
        """The same, each in a poisoned buffer in this case's layouts."""
        layouts = {"regions": self.regions_layout, "grad_output": self.grad_layout}
        device = default_device() if device is None else device
        return {name: Guarded(t.to(device), layouts.get(name, self.layout)) for name, t in self.values().items()}

    def call(self) -> Call:
        """The same for `check_call`."""
        tensors: dict[str, TensorSpec] = {}
        for name in self.input_names():
            shape = self.shape_of(name)
            if name == "regions":
                tensors[name] = RegionSpec(
                    shape, self.regions_dtype, self.regions_layout, self.seed, self.size, self.kind
                )
            else:
                tensors[name] = TensorSpec(shape, self.dtype, self.layout, self.seed)
        options = self.options if self.op == "region_pool" else {"size": self.size, **self.options}
        return Call(tensors, options, self.grad_layout, self.seed, self.floors)

    def function(self, module: ModuleType) -> Callable[..., Tensor]:
        """The op of `module` (dt.ops or dt.reference) as a function of its tensors, by name."""
        op = getattr(module, self.op)
        if self.op == "region_pool":
            return lambda x, regions: op(x, regions, **self.options)
        if self.op == "region_remap":
            return lambda nodes, regions: op(nodes, regions, self.size, **self.options)
        return lambda regions: op(regions, self.size, **self.options)

    def floors(self, inputs: Mapping[str, Tensor], grad_output: Tensor) -> Mapping[str, float]:
        """The norm below which a gradient is mere cancellation: 2 % of the terms that cancel.

        A region that reaches a single cell weights it 1 wherever it is: its gradient is zero, the difference of terms
        that are as large as 1 / (extent - distance).
        """
        regions, grad = inputs["regions"].detach().double().abs(), grad_output.double().abs()
        if not regions.numel() or not grad.numel():
            return {}
        cotangent = grad
        if self.op == "region_pool":
            cotangent = torch.einsum("...nc,...chw->...nhw", grad, inputs["x"].detach().double().abs())
        elif self.op == "region_remap":
            cotangent = torch.einsum("...chw,...nc->...nhw", grad, inputs["nodes"].detach().double().abs())
        cx, cy, w, h = inputs["regions"].detach().double().unbind(-1)
        across, down = self._axis_terms(cx, w, self.size[1]), self._axis_terms(cy, h, self.size[0])
        terms = [
            torch.einsum("...nhw,...nh,...nw->...n", cotangent, ky, kx)
            for ky, kx in ((down[0], across[1]), (down[1], across[0]))
        ]
        return {"grad_regions": 0.02 * torch.stack(terms).norm().item()}

    def _axis_terms(self, center: Tensor, extent: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """A normalised axis, and the sum of the sizes of the terms of its derivative."""
        distance = (center.unsqueeze(-1) - torch.arange(side, device=center.device, dtype=torch.int64)).abs()
        extent = extent.unsqueeze(-1)
        if self.profile == "gaussian":
            extent = extent.clamp(min=1e-3)
            weight = torch.softmax(-(distance**2) / (2 * extent**2), dim=-1)
            slope = weight * (distance / extent**2 + distance**2 / extent**3)
            return weight, slope + weight * slope.sum(-1, keepdim=True)
        inside = (extent - distance).clamp(min=0)
        weight, slope = inside, (inside > 0).double()
        if self.profile == "log-linear":
            weight, slope = (
                (inside * self.temperature).log1p(),
                slope * self.temperature / (1 + self.temperature * inside),
            )
        total = weight.sum(-1, keepdim=True).clamp(min=1e-300)
        weight, slope = weight / total, slope / total
        return weight, slope + weight * slope.sum(-1, keepdim=True)
