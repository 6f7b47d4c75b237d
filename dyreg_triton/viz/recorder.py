"""Run a model and keep the matrices of every bilinear attentional transform in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.bat import BATransform
from .arrays import attention_weights, contribution_maps


@dataclass(frozen=True)
class Recorded:
    """What one BATransform multiplied by in a forward, and the map that it did it on.

    matrices: its Matrices (p, q, t), of which p and q may have more frames than the map, where the layer extended it.
    frames, size: T and (H, W) of the map, T = 1 for images.
    coarse: (a, b), the size of the coarse cells that P and Q act on.
    """

    matrices: Any
    frames: int
    size: tuple[int, int]
    coarse: tuple[int, int]

    def attention_weights(self, *, group: int | Sequence[int] | None = None) -> Tensor:
        """`dt.viz.attention_weights` on this map: (B, G, T, H, W)."""
        return attention_weights(self.matrices, self.size, coarse=self.coarse, group=group)[:, :, : self.frames]

    def contribution_maps(
        self, cell: Sequence[int], *, group: int | Sequence[int] | None = None, exact: bool = False
    ) -> Tensor:
        """`dt.viz.contribution_maps` on this map: (B, G, T, H, W)."""
        maps = contribution_maps(self.matrices, self.size, cell, coarse=self.coarse, group=group, exact=exact)
        return maps[:, :, : self.frames]


def transforms(model: nn.Module) -> dict[str, nn.Module]:
    """Every BATransform of this library, native or as published, by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BATransform)}


def record(model: nn.Module, *inputs: Any) -> dict[str, Recorded]:
    """Call `model(*inputs)` and give what each BATransform in it transformed by, by the module's path in the model.

    The model runs in evaluation mode and without gradients, uncompiled, and gets the modes of its modules back. A layer
    that is called several times shows its first call; one that is not called is left out. The path is "" where the
    model is a BATransform itself. Modules inside a recorded layer run twice, so do their hooks.

    Raises TypeError where `model` is no module; ValueError where it has no such layer; RuntimeError where none was
    called; and whatever the model itself raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"record: model is a {type(model).__name__}; accepted is a torch.nn.Module")
    layers = transforms(model)
    if not layers:
        raise ValueError(
            f"record: model is {_name(model)}, which has no BATransform of dyreg_triton; accepted is a model with "
            "dt.layers.BATransform or BATBlock; those of the published code become ours by dt.swap(model)"
        )
    found: dict[str, Recorded] = {}

    def hook(path: str) -> Any:
        def keep(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if path not in found:
                given = [*arguments, *options.values()]
                found[path] = _recorded(module, given[0])

        return keep

    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no hook that is new to it
        for path, layer in layers.items():
            stack.enter_context(_removing(layer.register_forward_pre_hook(hook(path), with_kwargs=True)))
        model(*inputs)
    if not found:
        raise RuntimeError(
            f"record: {_name(model)} called none of its BATransforms ({', '.join(map(repr, layers))}) on these inputs"
        )
    return {path: found[path] for path in layers if path in found}


def _recorded(layer: Any, x: Tensor) -> Recorded:
    matrices = layer.matrices(x)  # which checks x
    _, down, across = layer.axes(x)
    return Recorded(
        matrices=matrices,
        frames=x.shape[2] if x.dim() == 5 else 1,
        size=(down.length, across.length),
        coarse=(down.scale, across.scale),
    )


def _name(model: nn.Module) -> str:
    return f"a {type(model).__name__}"


@contextlib.contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode by the flags themselves: a `train` of the model's own may do more, or return nothing."""
    kept = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in kept:
            module.training = False
        yield
    finally:
        for module, training in kept:
            module.training = training
