"""The kit that this library is tested with: check your own op in ten lines.

    from dyreg_triton.testing import check_op, strategies

    def scaled_sum(x, w):  # the op to check
        return (x * w[:, None]).sum(-1)

    def reference(x, w):  # as plainly as possible; it gets float64
        return torch.einsum("...mk,m->...m", x, w)

    calls = strategies.calls(x=strategies.tensor("*", "M", "K"), w=strategies.tensor("M"))
    check_op(scaled_sum, reference, calls, examples=300)

`strategies` and `check_op` need Hypothesis (`pip install 'dyreg-triton[test]'`); the rest does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bilinear import BilinearSpec
from .calls import Call, TensorSpec, default_device
from .checks import check_call, check_op
from .comparators import (
    TOLERANCE,
    assert_all_close,
    assert_close,
    assert_identical,
    mismatch,
    relative_error,
    value_and_gradients,
)
from .memory import LAYOUTS, Guarded, poisoned_outputs
from .regions import REGION_KINDS, RegionSpec, random_regions
from .relational import RelationalSpec

if TYPE_CHECKING:
    from . import strategies

__all__ = [
    "LAYOUTS",
    "REGION_KINDS",
    "TOLERANCE",
    "BilinearSpec",
    "Call",
    "Guarded",
    "RegionSpec",
    "RelationalSpec",
    "TensorSpec",
    "assert_all_close",
    "assert_close",
    "assert_identical",
    "check_call",
    "check_op",
    "default_device",
    "mismatch",
    "poisoned_outputs",
    "random_regions",
    "relative_error",
    "strategies",
    "value_and_gradients",
]


def __getattr__(name: str) -> Any:
    if name != "strategies":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return importlib.import_module(f"{__name__}.strategies")
    except ImportError as error:
        raise ImportError(
            "dyreg_triton.testing.strategies needs the package hypothesis: pip install 'dyreg-triton[test]'"
        ) from error
