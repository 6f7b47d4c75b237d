"""What the tests share beyond `dyreg_triton.testing`: which backends can run here, and how many examples."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
import torch

from dyreg_triton import dispatch
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
from dyreg_triton.testing.regions import REGION_OPS, RegionCase
from dyreg_triton.testing.strategies import region_cases
from dyreg_triton.validate import PROFILES

__all__ = [
    "DEVICE",
    "INTERPRETED",
    "LAYOUTS",
    "PROFILES",
    "REGION_KINDS",
    "REGION_OPS",
    "TOLERANCE",
    "Guarded",
    "RegionCase",
    "assert_all_close",
    "assert_close",
    "assert_identical",
    "backends",
    "backends_and_dtypes",
    "mismatch",
    "poisoned_outputs",
    "random_regions",
    "region_cases",
    "relative_error",
    "settings",
    "value_and_gradients",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = default_device()


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


def settings(examples: int) -> hypothesis.settings:
    """Hypothesis settings: the same examples in every run, fewer of them where kernels are interpreted."""
    return checks.settings(max(examples // 12, 5) if INTERPRETED else examples)
