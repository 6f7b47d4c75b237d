"""Submodules whose tensors a layer reads where that says all that a call of them does, and which it calls elsewhere."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._core.autocast import autocast_is_on, full_precision

M = TypeVar("M", bound=nn.Module)

_RECOMPUTED = ("weight_orig", "weight_g")  # by a hook of torch.nn.utils.prune, or of its older norms, before each call
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _patched(module: nn.Module) -> bool:
    """Whether a forward other than its class's own is set on the instance.

    Its class's own is what tools leave there when they take theirs off, as accelerate does.
    """
    if "forward" not in vars(module):
        return False
    forward = vars(module)["forward"]
    own = getattr(forward, "__func__", None) is type(module).forward
    return not (own and getattr(forward, "__self__", None) is module)


def tensor_of(*modules: nn.Module) -> Tensor | None:
    """Some floating parameter of the first module that has one, to tell dtype and device by; None where none has.

    Nothing is computed where it is parametrized. A module whose forward is set on the instance is passed over: whoever
    did that may move its tensors about before each call, as accelerate does.
    """
    for module in modules:
        for part in module.modules():
            if not _patched(part):
                # a replica of DataParallel holds tensors as plain attributes
                for t in (*part._parameters.values(), *vars(part).values()):
                    if isinstance(t, Tensor) and t.is_floating_point():
                        return t
    return None


def _more(leaf: nn.Module, kind: type[nn.Module]) -> str | None:
    """What of a leaf's call the weight and bias of a `kind` do not say, in words; None where they say all."""
    own = ("forward", "_conv_forward")
    if any(getattr(type(leaf), name, None) is not getattr(kind, name, None) for name in own):
        # an adapter may offer a weight, that of the layer inside
        name = type(leaf).__name__  # PEFT's adapter of a Conv3d is a Conv3d by name
        return f"a {type(leaf).__module__}.{name}" if name == kind.__name__ else f"a {name}"
    if _patched(leaf):
        return "of a forward set on the instance"
    if any(step != 1 for name in ("stride", "dilation") for step in getattr(leaf, name, ())):
        return "of a stride or dilation"
    if any(name in leaf._parameters for name in _RECOMPUTED):
        return "pruned or normalised by a hook"
    if any(t is not None and is_traceable_wrapper_subclass(t) for t in leaf._parameters.values()):
        return "of a weight that stands for another tensor"  # sharded or quantised: who calls it knows what to do
    return None


def readable(leaf: nn.Module, kind: type[M]) -> M | None:
    """`leaf` where its tensors, those of a `kind`, may be read instead of calling it: no forward or hook does more."""
    hooked = any(getattr(leaf, hooks) for hooks in _HOOKS)
    return None if hooked or _more(leaf, kind) else cast(M, leaf)


def first_readable(leaves: nn.Module, kind: type[M]) -> M | None:
    """The first of an nn.Sequential where it may be read instead of calling the whole."""
    sequence = readable(leaves, nn.Sequential)
    return readable(sequence[0], kind) if sequence else None


def weight_of(layer: nn.Module, name: str, kind: type[nn.Module]) -> Tensor:
    """The weight of a `kind` that an op takes, and that is never called.

    Raises TypeError for a leaf whose call would do more than it says.
    """
    leaf: nn.Module = getattr(layer, name)
    more = _more(leaf, kind)
    if more is None and leaf.bias is not None:
        more = "of a bias"
    if more is not None:
        raise TypeError(
            f"{type(layer).__name__}: {name} is {more}, which would be ignored: its weight is read, and it is not "
            f"called; accepted is a {kind.__name__}, plain or parametrized (torch.nn.utils.parametrize), into which "
            "adapters are merged"
        )
    return leaf.weight


def in_full_precision(leaf: nn.Module, x: Tensor) -> Tensor:
    """leaf(x) without autocast, in the dtype of the leaf."""
    like = tensor_of(leaf)
    if like is not None:
        x = x.to(like.dtype)
    elif autocast_is_on(x.device.type):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    with full_precision(x.device.type):
        return leaf(x)
