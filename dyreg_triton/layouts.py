"""How clips lie in memory, and their channels in groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clip_format(x: Tensor) -> torch.memory_format:
    """Of a result like clip x (B, C, T, H, W): channels last where x has them last, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format


def units(channels: int, *groups: int) -> int:
    """Into how many runs of channels of one length the boundaries of all groupings cut them."""
    return channels // math.gcd(*(channels // n for n in groups))
