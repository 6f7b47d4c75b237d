"""Multi-query relational self-attention, literally (RSA, Kim et al., equations 5-12).

The context X_n of a position n are its M = kt * kh * kw neighbours; tap i of an axis of k taps lies at i - k // 2, and
what lies outside the clip is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.autocast import full_precision
from ..validate.relational import relational_arguments, vanilla_arguments


def windows(x: Tensor, kernel_size: tuple[int, int, int]) -> Tensor:
    """X_n (B, C, T, H, W, M) of x (B, C, T, H, W), zero outside the clip."""
    margins = [m for k in reversed(kernel_size) for m in (k // 2, (k - 1) // 2)]
    x = F.pad(x, margins)
    for axis, k in enumerate(kernel_size):
        x = x.unfold(2 + axis, k, 1)
    return x.flatten(-3)


def l2_normalised(x: Tensor, dim: int, eps: float | None) -> Tensor:
    """x / sqrt(sum x^2 + eps) over `dim`; x where eps is None."""
    return x if eps is None else x / (x.square().sum(dim, keepdim=True) + eps).sqrt()


def _wide(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def relational_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    *,
    h2: Tensor,
    h1: Tensor | None = None,
    p1: Tensor | None = None,
    g: Tensor | None = None,
    identity: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """y_n = x_n^Q (P1 + X_n^K * H1) (H2^T X_n^V) (I + (X_n^V)^T G) (equation 12); as `dt.ops.relational_attention`."""
    tensors = {"q": q, "k": k, "v": v, "h1": h1, "p1": p1, "h2": h2, "g": g, "identity": identity}
    relational_arguments("relational_attention", tensors, eps)
    size = (h2.shape[1], h2.shape[2], h2.shape[3])
    with full_precision(q.device.type):
        a, keys, values, m1, m2, m3, latent, mixed = _wide(q, k, v, h1, p1, h2, g, identity)
        query = a = l2_normalised(a, 2, eps)
        context = windows(l2_normalised(values, 1, eps), size)
        if m2 is not None:
            a = torch.einsum("blcthw,cd->bldthw", query, m2)
        if keys is not None and m1 is not None:
            k_h1 = torch.einsum("bcthwm,cdm->bcdthw", windows(l2_normalised(keys, 1, eps), size), m1.flatten(-3))
            relational = torch.einsum("blcthw,bcdthw->bldthw", query, k_h1)
            a = relational if m2 is None else a + relational
        kappa = torch.einsum("bldthw,dm->blthwm", a, m3.flatten(-3))
        z = torch.einsum("blthwm,bethwm->belthw", kappa, context)
        if latent is None:
            return z.to(q.dtype).contiguous().transpose(1, 2)
        v_g = torch.einsum("bethwm,fm->befthw", context, latent.flatten(-3))
        if mixed is not None:
            v_g = v_g + mixed[..., None, None, None]
        return torch.einsum("belthw,befthw->bflthw", z, v_g).to(q.dtype).contiguous().transpose(1, 2)


def vanilla_relational_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    h: Tensor,
    p: Tensor | None = None,
    g: Tensor | None = None,
    identity: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """The transform before it is made efficient (equations 5-8): y_n = (kappa^V + kappa^R) (X_n^V I + X_n^R).

    kappa^V = x_n^Q P^T, kappa^R = vec(1 (x_n^Q)^T . X_n^K) H (equation 6) and X_n^R = X_n^V (X_n^V)^T G (equation 7).
    With H = H1 H2^T and P = H2 P1 it equals `relational_attention`. Cost and memory grow with M^2.

    Args:
        q, k, v, g, identity, eps: as `relational_attention`.
        h: (C, kt, kh, kw, M), from the correlation at each neighbour and channel to the M kernel weights.
        p: (M, C), or None for the relational kernel alone.

    Raises:
        ValueError, TypeError: as `relational_attention`.
    """
    vanilla_arguments(
        "vanilla_relational_attention", {"q": q, "k": k, "v": v, "h": h, "p": p, "g": g, "identity": identity}, eps
    )
    size = (h.shape[1], h.shape[2], h.shape[3])
    with full_precision(q.device.type):
        queries, keys, values, matrix, basic, latent, mixed = _wide(q, k, v, h, p, g, identity)
        queries = l2_normalised(queries, 2, eps)
        keys, context = windows(l2_normalised(keys, 1, eps), size), windows(l2_normalised(values, 1, eps), size)
        correlation = torch.einsum("blcthw,bcthwm->blcthwm", queries, keys)
        kappa = torch.einsum("blcthwm,cmi->blthwi", correlation, matrix.flatten(1, 3))
        if basic is not None:
            kappa = kappa + torch.einsum("blcthw,ic->blthwi", queries, basic)
        if latent is not None:
            self_correlation = torch.einsum("bethwm,bethwi->bthwmi", context, context)
            relational = torch.einsum("bthwmi,fi->bfthwm", self_correlation, latent.flatten(1))
            if mixed is not None:
                relational = torch.einsum("bethwm,ef->bfthwm", context, mixed) + relational
            context = relational
        y = torch.einsum("blthwm,bfthwm->bflthw", kappa, context)
        return y.to(q.dtype).contiguous().transpose(1, 2)
