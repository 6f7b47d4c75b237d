"""What every op that is a custom op of torch shares: which of torch's transforms it refuses, and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_transforms(op: str, *tensors: Tensor) -> None:
    """A custom op would drop forward-mode tangents without a word, and stop torch.func.grad with an obscure one."""
    if torch.compiler.is_compiling():
        return
    dual = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    transforms = torch._C._functorch.get_interpreter_stack() or ()
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


def once_only(op: torch.library.CustomOpDef, name: str) -> None:
    """Make the derivative of `op`, the backward of the op called `name`, an error that says so."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_NO_SECOND.format(name))

    op.register_autograd(refuse)
