"""The ops' rule under autocast: features are lowered to its dtype, sums and regions are not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for devices of this type."""
    # asked of a device type that has no autocast (meta), torch raises; to ask whether it has takes a while
    return (kind in ("cuda", "cpu") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def lowered_dtype(features: Tensor) -> torch.dtype:
    """The dtype of `features`, or autocast's where it is on for their device, as a matrix product takes them."""
    kind = features.device.type
    if autocast_is_on(kind) and features.is_floating_point() and features.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return features.dtype


def lowered(features: Tensor) -> Tensor:
    """`features` in their `lowered_dtype`."""
    return features.to(lowered_dtype(features)) if autocast_is_on(features.device.type) else features


def beside(t: Tensor, features: Tensor) -> Tensor:
    """What stays as it is beside lowered features; in float32 where it is in the 16 bits that they had before."""
    return t if t.dtype in (features.dtype, torch.float32) else t.to(torch.float32)


def full_precision(kind: str) -> AbstractContextManager:
    """Autocast off for devices of this type, so that what is computed inside stays in its dtype."""
    return torch.autocast(kind, enabled=False) if autocast_is_on(kind) else nullcontext()
