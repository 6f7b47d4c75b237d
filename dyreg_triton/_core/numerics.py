"""How far apart two tensors are, and how far apart rounding explains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# relative L2 error that rounding in this dtype explains, with sums accumulated in float32
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-10}


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0, *, equal_nan: bool = False) -> float:
    """||actual - expected|| / max(||expected||, floor), in float64 or complex128; 0 / 0 is 0.

    Infinite for tensors of two shapes, and where a value is not finite; with `equal_nan` only where it is in but one of
    the two, or another one there.
    """
    if actual.shape != expected.shape:
        return math.inf
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = actual.detach().to(wide), expected.detach().to(wide)
    if a.device != b.device:
        a, b = a.cpu(), b.cpu()
    finite = a.isfinite() & b.isfinite()
    if not finite.all():
        same = (a == b) | (a.isnan() & b.isnan())
        if not equal_nan or not (finite | same).all():
            return math.inf
        a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
    difference = (a - b).norm().item()
    return difference and difference / max(b.norm().item(), float(floor), 1e-300)
