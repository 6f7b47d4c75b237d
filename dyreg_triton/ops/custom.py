"""What every op that is a custom op of torch shares: the short way past torch's dispatcher, and which of torch's
transforms it refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

from ..configs.lookup import Unfit
from . import flops, torch_symbols

_PLAIN = (Tensor, Parameter)
_torch = torch_symbols.found()
_short_way = None not in _torch


def _observed(symbols: Any) -> bool:
    """Whether somebody sees calls at torch's dispatcher: a compiler, tracer, mode, transform or profiler."""
    return (
        torch.compiler.is_compiling()
        or symbols.dispatch_modes() > 0
        or symbols.function_modes() > 0
        or symbols.innermost_transform() is not None
        or symbols.trace() is not None
        or symbols.is_profiled()
    )


def _lazy(t: Tensor, symbols: Any) -> bool:
    """Whether the dispatcher does something to a tensor before an op sees its data: a sign, a zero, a batch."""
    return t.is_neg() or symbols.is_zero(t) or symbols.is_batched(t)


def signature(tensors: Iterable[Tensor | None], *options: Any) -> tuple | None:
    """What the checks of a call look at, by which one that was good is known; None where it has to be looked at again:
    while compiling, and for what is no common tensor."""
    if torch.compiler.is_compiling():
        return None
    found: list[Any] = [options]
    for t in tensors:
        if t is None:
            found.append(t)
        elif type(t) not in _PLAIN or t.is_nested:
            return None
        else:
            found.append((t.shape, t.dtype, t.device, t.layout))
    return tuple(found)


def _launched(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation`, begun again where a config turned out not to fit: what it makes is its own."""

    @functools.wraps(implementation)
    def run(*args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return implementation(*args, **kwargs)
            except Unfit:  # once for each config
                continue

    return run


class Op:
    """A custom op of torch, which goes past torch's dispatcher where it can: that takes a third of the host's time.

    Both ways run the same implementation, and the same functions make and take what the backward needs.
    """

    def __init__(self, name: str, implementation: Callable[..., Any]):
        self.name = name
        self.implementation = implementation = _launched(implementation)
        self.custom = torch.library.custom_op(f"dyreg_triton::{name}", implementation, mutates_args=())
        self.function: type[Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's."""
        return self.custom.register_fake(fake)

    def register_flops(self, formula: Callable[..., int]) -> Callable[..., int]:
        """What a call of the op counts as under torch's FLOP counter, of its arguments: see `flops`."""
        flops.register(getattr(torch.ops.dyreg_triton, self.name).default, formula)
        return formula

    def register_autograd(
        self, backward: Callable[..., tuple | None], setup: Callable[[Any, tuple, Any], None] | None = None
    ) -> None:
        """As torch's."""
        self.custom.register_autograd(backward, setup_context=setup)
        implementation = self.implementation

        def forward(ctx: Any, *args: Any) -> Any:
            output = implementation(*args)
            if setup is not None:
                setup(ctx, args, output)
            return tuple(output) if isinstance(output, list) else output  # a list's tensors would not be seen

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.function = type(f"{implementation.__name__.strip('_')}_direct", (Function,), members)

    def __call__(self, *args: Any) -> Any:
        if not _short_way or _observed(_torch):
            return self.custom(*args)
        wanted = False
        for a in args:
            if isinstance(a, Tensor):
                if type(a) not in _PLAIN or _lazy(a, _torch):
                    return self.custom(*args)
                wanted = wanted or a.requires_grad
        if wanted and self.function is not None and torch.is_grad_enabled():
            return self.function.apply(*args)
        return self.implementation(*args)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Make a function the custom op `dyreg_triton::name`."""
    return lambda implementation: Op(name, implementation)


def refuse_transforms(op: str, *tensors: Tensor) -> None:
    """A custom op would drop forward-mode tangents without a word, and stop torch.func.grad with an obscure one."""
    if torch.compiler.is_compiling():
        return
    level = 0 if _torch.forward_level is None else _torch.forward_level()  # below 0 there are no tangents
    dual = level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    transforms = () if _torch.transforms is None else _torch.transforms() or ()
    if dual or any(t.key().name in ("Grad", "Jvp") for t in transforms):
        raise RuntimeError(
            f"{op}: forward-mode differentiation and torch.func's gradient transforms are not implemented on the "
            "triton backend; accepted there is reverse mode (backward, torch.autograd.grad); for the others compute "
            'under dyreg_triton.backend("eager")'
        )


_NO_SECOND = (
    "{}: second derivatives are not implemented on the triton backend; "
    'compute the forward under dyreg_triton.backend("eager") to differentiate twice'
)


def once_only(op: Op, name: str) -> None:
    """Make the derivative of `op`, the backward of the op called `name`, an error that says so."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_NO_SECOND.format(name))

    op.register_autograd(refuse)
