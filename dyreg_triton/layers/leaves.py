"""Submodules whose tensors a layer reads without calling them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_RECOMPUTED = ("weight_orig", "weight_g")  # by a hook of torch.nn.utils.prune, or of its older norms, before each call


def tensor_of(module: nn.Module) -> Tensor:
    """Some parameter, to tell dtype and device by; nothing is computed where it is parametrized."""
    found = next(module.parameters(), None)
    if found is None:  # a replica of DataParallel holds tensors as plain attributes
        return next(t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor))
    return found


def read(leaf: Any, kind: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """Weight and bias of a `kind`; raises TypeError for a leaf whose call would do more than they say."""
    changed = type(leaf).forward is not kind.forward
    if changed or any(name in leaf._parameters for name in _RECOMPUTED):
        how = f"a {type(leaf).__name__}" if changed else "pruned or normalised by a hook"
        raise TypeError(
            f"a {kind.__name__} whose weight is read, and which is not called, is {how}: that would be ignored; "
            f"accepted is a {kind.__name__}, plain or parametrized (torch.nn.utils.parametrize)"
        )
    return leaf.weight, leaf.bias
