"""FLOP counts: what an op of the triton backend counts as under `torch.utils.flop_counter.FlopCounterMode`.

The convention is that counter's: two operations for each multiply-add of a matrix product or convolution, none for what
is elementwise. A call counts what the eager backend's call counts there, forward and backward, so that a layer has one
number on both backends:

- Products that eager computes again in its backward count again, and so do zeros that it multiplies with. Products
  over channels that eager writes as elementwise multiply-adds count 0 (`relational_attention`).
- The backward counts the gradients that the op computes: those of inputs that require one.
- A compiled call counts the same; the eager backend's graph is another there, and may count otherwise.

Each op has its formula beside it. Formulas take the op's arguments and look at shapes and options only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_MODULE = "torch.utils.flop_counter"
_formulas: dict[OpOverloadPacket, Callable[..., int]] = {}


def register(op: OpOverload, formula: Callable[..., int]) -> None:
    """Let `op`, called with some arguments, count as `formula` of them."""

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    _formulas[op.overloadpacket] = flops
    # Torch's registry is in a module that imports triton, which only a launch may do; and a counter reads a copy of it,
    # as it was when the counter was made. But a counter first asks every op to decompose: ours tell it their formulas.
    op.decompose = _tell  # type: ignore[method-assign]


def _tell(*_: Any, **__: Any) -> Any:
    """In place of `decompose`: the op does not, but the registry and each counter that is on know all formulas then."""
    module = sys.modules.get(_MODULE)
    if module is not None:  # else nobody counts
        counters = [m.counter for m in _get_current_dispatch_mode_stack() if isinstance(m, module._FlopCounterMode)]
        for registry in (module.flop_registry, *(counter.flop_registry for counter in counters)):
            for packet, flops in _formulas.items():
                registry.setdefault(packet, flops)  # a user's own formula stays
    return NotImplemented
