"""How clips lie in memory, and their channels in groups."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Of a result like x, an image (B, C, H, W) or a clip: channels last where x has them last, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    # asked of a view, because vmap knows no is_contiguous of another format
    if last is None or x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return torch.contiguous_format
    return last


def units(*groups: int) -> int:
    """Into how many runs of one length the boundaries of several groupings cut channels: their least common multiple.

    By hand, because math.lcm takes no symbolic sizes.
    """
    count = groups[0]
    for other in groups[1:]:
        a, b = count, other
        while b:
            a, b = b, a % b
        count = count // a * other
    return count
