"""Multi-query relational self-attention (RSA, Kim et al., equations 5-12).

For each position n of a clip, with X_n its M = kt * kh * kw neighbours (0 outside the clip):

    a_n = q_n (P1 + X_n^K * H1)           (L, D)    (X^K * H1)[c, d] = sum_m X_n^K[m, c] H1[c, d, m]
    z_n = a_n (H2^T X_n^V)                (L, E)    kernels kappa_n = a_n H2^T (L, M), applied to the values
    y_n = z_n (I + (X_n^V)^T G)           (L, F)

Tap i of an axis of k taps lies at i - k // 2: centred where k is odd; where it is even, one more tap before than after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._core.autocast import autocast_is_on, lowered
from ..configs.relational import LIMIT, SPACE
from ..eager import relational as eager
from ..validate.relational import FORMS, OPTIONAL, relational_arguments
from . import recording
from .checked import beyond, checked, choose_within
from .custom import once_only, op, refuse_transforms
from .relational_launches import Problem, backward, empty_gradients, forward, keys_of, output_shapes
from .spec import OpSpec

_OP = "relational_attention"


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

    All tensors have one dtype and device. Every argument is differentiable. Triton takes L up to 16, C, D, E, F
    up to 128 and windows up to 65,536 taps; beyond, "auto" takes eager and warns.

    Returns:
        y (B, L, F or E, T, H, W) in their dtype, a view of (B, F, L, T, H, W) memory: `y.transpose(1, 2).flatten(1, 2)`
        is the published channel order and copies nothing. Sums accumulate in float32 (float64 for float64); norms are
        taken in that precision. Under autocast all tensors are cast to its dtype.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype not named above.
        ValueError: a wrong rank, shape, device, combination or eps.
        RuntimeError: the backend asked for cannot run here.
    """
    tensors = {"q": q, "k": k, "v": v, "h2": h2, "h1": h1, "p1": p1, "g": g, "identity": identity}
    too_large = checked(_OP, lambda: _beyond(tensors, eps), tensors.values(), eps)
    given: list[Any] = [q, k, v, h2, h1, p1, g, identity]
    if autocast_is_on(q.device.type):
        given = [None if t is None else lowered(t) for t in given]
    problem = Problem._make([*given, None if eps is None else float(eps)])
    name = choose_within(_OP, problem.q, too_large, LIMIT, tensors)
    if recording.recorders:
        recording.record(_OP, dict(zip(tensors, problem.signature(), strict=True)), _CHANNELS, eps=problem.eps)
    if name == "reference":
        options: dict[str, Any] = dict(zip(Problem._fields[3:], problem[3:], strict=True))
        return reference.relational_attention(*problem[:3], **options)
    if name == "eager":
        return eager.relational_attention(*problem)
    there = [t for t in problem[:8] if t is not None]
    refuse_transforms(_OP, *there)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in there)
    return _attend(*problem, save)[0].transpose(1, 2)


def _beyond(tensors: dict[str, Any], eps: Any) -> list[str]:
    """Check a call; the sizes that are beyond the kernels, in words."""
    relational_arguments(_OP, tensors, eps)
    given = Problem(**tensors, eps=eps)
    sizes = dict(zip("LCDEFM", (given.q.shape[1], *given.channels, given.taps), strict=True))
    return beyond(sizes, LIMIT)


# --- the Triton path: an op is schema, implementation, fake, autograd, and a backward op of its own ---------


@op("relational_attention")
def _attend(
    q: Tensor, k: Tensor | None, v: Tensor, h2: Tensor, h1: Tensor | None, p1: Tensor | None, g: Tensor | None,
    identity: Tensor | None, eps: float | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y as (B, F, L, T, H, W), and with `save` what the backward needs beside the inputs."""
    problem = Problem(q, k, v, h2, h1, p1, g, identity, eps)
    if q.shape[0] == 0:
        return _outputs(problem, save)
    return forward(problem, save)


def _outputs(problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, a_rows, z_rows = (problem.q.new_empty(shape) for shape in output_shapes(problem, save))
    return y, a_rows, z_rows


@_attend.register_fake
def _(q, k, v, h2, h1, p1, g, identity, eps, save):
    return _outputs(Problem(q, k, v, h2, h1, p1, g, identity, eps), save)


def _correlations(problem: Problem) -> tuple[int, int]:
    """What X^K * H1 counts, and what X^V with H2 and G beside it: eager's convolutions. Its other products are
    elementwise."""
    c, d, e, f = problem.channels
    each = 2 * problem.q.shape[0] * math.prod(problem.size) * problem.taps
    return 0 if problem.h1 is None else each * c * d, each * e * (d if problem.g is None else d + f)


@_attend.register_flops
def _(q, k, v, h2, h1, p1, g, identity, eps, save):
    return sum(_correlations(Problem(q, k, v, h2, h1, p1, g, identity, eps)))


@op("relational_attention_backward")
def _attend_backward(
    dy: Tensor, a_rows: Tensor, z_rows: Tensor, q: Tensor, k: Tensor | None, v: Tensor, h2: Tensor, h1: Tensor | None,
    p1: Tensor | None, g: Tensor | None, identity: Tensor | None, eps: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    problem = Problem(q, k, v, h2, h1, p1, g, identity, eps)
    if q.shape[0] == 0:
        return [t.zero_() for t in empty_gradients(problem, needs)]
    return backward(problem, dy.transpose(1, 2), a_rows, z_rows, needs)


@_attend_backward.register_fake
def _(dy, a_rows, z_rows, q, k, v, h2, h1, p1, g, identity, eps, needs):
    return empty_gradients(Problem(q, k, v, h2, h1, p1, g, identity, eps), needs)


@_attend_backward.register_flops
def _(dy, a_rows, z_rows, q, k, v, h2, h1, p1, g, identity, eps, needs):
    """Both correlations are computed again, and count once more for the gradient of each side: H2 and G are one."""
    by_keys, by_values = _correlations(Problem(q, k, v, h2, h1, p1, g, identity, eps))
    _, need_k, need_v, need_h2, need_h1, _, need_g, _ = needs
    return (1 + need_k + need_h1) * by_keys + (1 + need_v + (need_h2 or need_g)) * by_values


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors)


def _autograd(ctx: Any, dy: Tensor | None, *_: None) -> tuple:
    if dy is None:  # whatever came after y has no gradient
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:8])
    gradients = _attend_backward(dy, *ctx.saved_tensors, ctx.eps, needs)
    return *(t if need else None for t, need in zip(gradients, needs, strict=True)), None, None


_attend.register_autograd(_autograd, _setup)
once_only(_attend_backward, "relational_attention")


# --- what it is, in the table of ops --------------------------------------------------------------------------------

_CHANNELS = {"q": -4, "k": -4, "v": -4}
_STAGES = ((8, 56), (16, 28), (32, 14), (64, 7))  # channels and side of RSANet-R50's four, over 8 frames


def _checked(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    relational_arguments(_OP, {**dict.fromkeys(FORMS), **tensors}, options.get("eps"))


def _call(clips: int, channels: int, side: int, dtype: str) -> recording.TunedCall:
    """RSANet's layer: eight queries, C = D = E = F, a window of 5x7x7, kernel and context both."""
    c, size, window = channels, (8, side, side), (5, 7, 7)
    shapes = {
        "q": (clips, 8, c, *size), "k": (clips, c, *size), "v": (clips, c, *size), "h2": (c, *window),
        "h1": (c, c, *window), "p1": (c, c), "g": (c, *window), "identity": (c, c),
    }  # fmt: skip
    tensors = {name: recording.described(shape, dtype) for name, shape in shapes.items()}
    return recording.TunedCall(_OP, tensors, {"eps": 1e-6}, True)


SPEC = OpSpec(
    name=_OP,
    function=relational_attention,
    reference=reference.relational_attention,
    tensors=FORMS,
    optional=OPTIONAL,
    options=("eps",),
    channels=_CHANNELS,
    check=_checked,
    space=SPACE,
    keys=keys_of,
    papers=lambda dtype: [_call(8, channels, side, dtype) for channels, side in _STAGES],
    quick=lambda dtype: [_call(1, 8, 14, dtype)],
)
