"""The bilinear attentional transform on Triton: from tensors to launches of the bilinear kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import clip_format


def empty_gradients(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None, needs: list[bool]) -> list[Tensor]:
    """Where the gradients go, in the order of the arguments; empty tensors for those not needed."""
    by_x = torch.empty_like(x, memory_format=clip_format(x)) if needs[0] else x.new_empty(0)
    wanted = [m if need else None for m, need in zip((p, q, t), needs[1:], strict=True)]
    return [by_x] + [x.new_empty(0) if m is None else m.new_empty(m.shape) for m in wanted]


def forward(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None, y: Tensor) -> None:
    raise NotImplementedError


def backward(dy: Tensor, x: Tensor, p: Tensor, q: Tensor, t: Tensor | None, needs: list[bool]) -> list[Tensor]:
    raise NotImplementedError
