"""Relational self-attention in plain torch."""

from __future__ import annotations

from torch import Tensor

from ..reference import relational as reference


def relational_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    h2: Tensor,
    h1: Tensor | None,
    p1: Tensor | None,
    g: Tensor | None,
    identity: Tensor | None,
    eps: float | None,
) -> Tensor:
    """y (B, L, F or E, T, H, W), a view of (B, F, L, T, H, W) memory."""
    return reference.relational_attention(q, k, v, h2=h2, h1=h1, p1=p1, g=g, identity=identity, eps=eps)
