"""What the tests share beyond `dyreg_triton.testing`: which backends can run here, and how many examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from dyreg_triton._core import dispatch
from dyreg_triton._core.validation import PROFILES
from dyreg_triton.testing import (
    LAYOUTS,
    REGION_KINDS,
    TOLERANCE,
    Guarded,
    assert_all_close,
    assert_close,
    assert_identical,
    checks,
    default_device,
    mismatch,
    poisoned_outputs,
    random_regions,
    relative_error,
    value_and_gradients,
)
from dyreg_triton.testing.bilinear import MATRIX_KINDS, BilinearCase
from dyreg_triton.testing.regions import REGION_OPS, RegionCase
from dyreg_triton.testing.relational import RELATIONAL_CONTEXTS, RELATIONAL_KERNELS, RelationalCase
from dyreg_triton.testing.strategies import bilinear_cases, region_cases, relational_cases

__all__ = [
    "DEVICE",
    "FULL",
    "INTERPRETED",
    "LAYOUTS",
    "MATRIX_KINDS",
    "PATIENCE",
    "PROFILES",
    "REGION_KINDS",
    "REGION_OPS",
    "RELATIONAL_CONTEXTS",
    "RELATIONAL_KERNELS",
    "TOLERANCE",
    "BilinearCase",
    "Guarded",
    "RegionCase",
    "RelationalCase",
    "assert_all_close",
    "assert_close",
    "assert_identical",
    "assert_results_close",
    "awake",
    "backends",
    "backends_and_dtypes",
    "bilinear_cases",
    "in_full",
    "mismatch",
    "poisoned_outputs",
    "random_regions",
    "region_cases",
    "relational_cases",
    "relative_error",
    "run",
    "settings",
    "value_and_gradients",
]

FULL = os.environ.get("FULL", "0") == "1"  # make full: what repeats other tests, and more examples
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = default_device()
PATIENCE = 3600  # seconds for what takes a few: only a hang is ended by it, on a machine however busy


def backends(*names: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Parameters for `backend`: those of `names` (default: all) that can run here; Triton's carries its mark."""
    return [
        pytest.param(name, marks=pytest.mark.kernels if name == "triton" else ())
        for name in names or dispatch.BACKENDS[1:]
        if dispatch.can_run(name, device=DEVICE, dtype=dtype)
    ]


def backends_and_dtypes(*dtypes: torch.dtype) -> list[Any]:
    """Parameters for `backend, dtype`: the pairs that can run here."""
    return [
        pytest.param(*p.values, dtype, marks=p.marks, id=f"{p.values[0]}-{str(dtype)[6:]}")
        for dtype in dtypes or TOLERANCE
        for p in backends(dtype=dtype)
    ]


def in_full(values: Iterable[Any]) -> list[Any]:
    """Those values of a parameter that repeat others, which are for `make full`."""
    found = []
    for v in values:
        p = v if hasattr(v, "marks") else pytest.param(*(v if isinstance(v, tuple) else (v,)))
        found.append(pytest.param(*p.values, marks=[*p.marks, pytest.mark.full], id=p.id))
    return found


def settings(examples: int) -> hypothesis.settings:
    """Hypothesis settings: the same examples in every run; all on a GPU and with FULL=1, else a share of them."""
    if not FULL and DEVICE.type != "cuda":
        examples = max(examples // (12 if INTERPRETED else 2), 5)
    return checks.settings(examples)


# --- layers ---------------------------------------------------------------------------------------------------------


def awake(layer: nn.Module, seed: int = 7) -> nn.Module:
    """Take a layer off its start, where the residual branch, the offsets and the biases are 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            last = name.rpartition(".")[2]
            if last in ("offset_alpha", "scale", "bias", "att_bias"):
                start = 0.7 if last in ("offset_alpha", "scale") else 0.0
                parameter.copy_(start + 0.2 * torch.randn(parameter.shape, generator=generator))
    return layer


def run(
    layer: nn.Module,
    x: Tensor,
    grad_output: Tensor | None = None,
    *,
    call: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor | None]:
    """Output and the gradients of the input and of every parameter; `call` in place of the layer itself."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = (call or layer)(x)
    if grad_output is None:
        steps = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        grad_output = steps.sin().to(y.device, y.dtype)
    y.backward(grad_output)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in layer.named_parameters()}
    return {"out": y.detach(), "grad_x": x.grad, **gradients}


def assert_results_close(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: float
) -> None:
    """A key's bias adds the same to all scores of a query: its gradient is round-off."""
    scale = max(t.norm().item() for t in expected.values() if t is not None)
    floors = {name: (scale if name.endswith("att_k.bias") else 1e-4 * scale) for name in expected}
    assert_all_close(actual, expected, tolerance=tolerance, floors=floors)
