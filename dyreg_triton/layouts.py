"""How results lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_format(x: Tensor) -> torch.memory_format:
    """Of a result like clip x (B, C, T, H, W): channels last where x has them last, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format
