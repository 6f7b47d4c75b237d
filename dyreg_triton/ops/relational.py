"""Multi-query relational self-attention (RSA, Kim et al., equations 5-12).

For each position n of a clip, with X_n its M = kt * kh * kw neighbours (0 outside the clip):

    a_n = q_n (P1 + X_n^K * H1)           (L, D)    (X^K * H1)[c, d] = sum_m X_n^K[m, c] H1[c, d, m]
    z_n = a_n (H2^T X_n^V)                (L, E)    kernels kappa_n = a_n H2^T (L, M), applied to the values
    y_n = z_n (I + (X_n^V)^T G)           (L, F)

Tap i of an axis of k taps lies at i - k // 2: centred where k is odd; where it is even, one more tap before than after.
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..autocast import lowered
from ..dispatch import choose
from ..eager import relational as eager
from ..validate.relational import relational_arguments


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
    """Relational self-attention of L queries over a space-time window (equation 12).

        y_n = q_n (P1 + X_n^K * H1) (H2^T X_n^V) (I + (X_n^V)^T G)

    The kernel is basic (V: no h1, no k), relational (R: h1 and k) or both (V+R: h1, k and p1); the context basic (V: no
    g), relational (R: g) or both (V+R: g and identity). The basic kernel takes p1 as in the paper, or none as in the
    published code, where C == D. Group-wise correlation is h1 tied, `expand`ed, within groups of channels.

    Args:
        q: (B, L, C, T, H, W), any strides; float16, bfloat16, float32, or float64 (not on a GPU's Triton path).
        k: (B, C, T, H, W), or None for the basic kernel.
        v: (B, E, T, H, W).
        h2: (D, kt, kh, kw), the kernel projection; any odd or even size, also larger than the clip.
        h1: (C, D, kt, kh, kw), or None for the basic kernel.
        p1: (C, D), or None.
        g: (F, kt, kh, kw), the context projection, or None for the basic context.
        identity: (E, F), the basic context beside g, or None.
        eps: None, or the number with which q and k (over C) and v (over E) are L2-normalised, x / sqrt(sum x^2 + eps).

    All tensors have one dtype and device. Every argument is differentiable.

    Returns:
        y (B, L, F or E, T, H, W) in their dtype, a view of (B, F, L, T, H, W) memory: `y.transpose(1, 2).flatten(1, 2)`
        is the published channel order and copies nothing. Sums accumulate in float32 (float64 for float64); norms are
        taken in that precision. Under autocast all tensors are cast to its dtype.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype not named above.
        ValueError: a wrong rank, shape, device, combination or eps.
        RuntimeError: the backend asked for cannot run here.
    """
    tensors = {"q": q, "k": k, "v": v, "h1": h1, "p1": p1, "h2": h2, "g": g, "identity": identity}
    relational_arguments("relational_attention", tensors, eps)
    q, k, v, h1, p1, h2, g, identity = (None if t is None else lowered(t) for t in tensors.values())
    call = {name: t for name, t in tensors.items() if t is not None}
    name = choose("relational_attention", q, call)
    if name == "reference":
        return reference.relational_attention(q, k, v, h2=h2, h1=h1, p1=p1, g=g, identity=identity, eps=eps)
    return eager.relational_attention(q, k, v, h2, h1, p1, g, identity, eps)
