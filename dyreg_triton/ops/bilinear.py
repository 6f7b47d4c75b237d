"""Bilinear attentional transform (BAT, Chi et al.): Y = P X Q in each group of channels and frame, then over time.

With a = H / Sh, b = W / Sw and d = T / Ts, and channel c in group g(c) of p and q and in group h(c) of t:

    z[c, f] = kron(P, I_a) x[c, f] kron(Q, I_b)     P = p[g(c), f] (Sh, Sh), Q = q[g(c), f] (Sw, Sw)
    y[c, :, n] = kron(R, I_d) z[c, :, n]            R = t[h(c)] (Ts, Ts), at every position n

so P acts on coarse rows and leaves the place of a row within its coarse row alone, and Q and R do alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._core.autocast import beside, lowered
from .._core.layouts import memory_format
from ..configs.bilinear import LIMIT, SPACE
from ..eager import bilinear as eager
from ..validate.bilinear import FORMS, OPTIONAL, bilinear_arguments
from . import recording
from .bilinear_launches import Problem, backward, empty_gradients, forward, keys_of
from .checked import beyond, checked, choose_within
from .custom import once_only, op, refuse_transforms
from .spec import OpSpec

_OP = "bilinear_transform"


def bilinear_transform(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None = None) -> Tensor:
    """Grouped bilinear attentional transform, y = P x Q in each frame, and then a product over time.

        z[c, f] = kron(P, I) x[c, f] kron(Q, I),    y[c, :, n] = kron(R, I) z[c, :, n]

    with P = p[g(c), f], Q = q[g(c), f] and R = t[h(c)]: groups are runs of channels, g(c) = c // (C / G) and
    h(c) = c // (C / Gt). kron(P, I) is P written out to H rows: row i a + u takes row j a + u with weight P[i, j].

    Args:
        x: (B, C, T, H, W), any strides; float16, bfloat16, float32, or float64 (not on a GPU's Triton path).
        p: (B, G, T, Sh, Sh), G a divisor of C and Sh of H; x's dtype or float32.
        q: (B, G, T, Sw, Sw), Sw a divisor of W; likewise.
        t: (B, Gt, Ts, Ts), Gt a divisor of C and Ts of T; likewise. None: y = z.

    Every argument is differentiable, and each gradient has its input's dtype. Triton takes Sh and Sw up to 64 and Ts
    up to 64; beyond, "auto" takes eager and warns.

    Returns:
        y (B, C, T, H, W) in x's dtype; channels last where x has them last, else contiguous. Sums accumulate in
        float32 (float64 for float64). Under autocast x is cast to its dtype; p, q and t are not.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype not named above.
        ValueError: a wrong rank, shape or device; sizes that do not divide.
        RuntimeError: the backend asked for cannot run here.
    """
    tensors: dict[str, Any] = {"x": x, "p": p, "q": q, "t": t}
    too_large = checked(_OP, lambda: _beyond(tensors), tensors.values())
    x = lowered(x)
    p, q, t = beside(p, x), beside(q, x), None if t is None else beside(t, x)
    name = choose_within(_OP, x, too_large, LIMIT, tensors)
    if recording.recorders:
        recording.record(_OP, {"x": x, "p": p, "q": q, "t": t}, _CHANNELS)
    if name == "reference":
        return reference.bilinear_transform(x, p, q, t)
    if name == "eager":
        return eager.bilinear_transform(x, p, q, t)
    refuse_transforms(_OP, *[a for a in (x, p, q, t) if a is not None])
    return _transform(x, p, q, t)


def _beyond(tensors: dict[str, Any]) -> list[str]:
    """Check a call; the sizes that are beyond the kernels, in words."""
    bilinear_arguments(_OP, tensors)
    sizes = {"Sh": tensors["p"].shape[-1], "Sw": tensors["q"].shape[-1]}
    if tensors["t"] is not None:
        sizes["Ts"] = tensors["t"].shape[-1]
    return beyond(sizes, LIMIT)


# --- the Triton path: an op is schema, implementation, fake, autograd, and a backward op of its own ---------


@op("bilinear_transform")
def _transform(x: Tensor, p: Tensor, q: Tensor, t: Tensor | None) -> Tensor:
    y = torch.empty_like(x, memory_format=memory_format(x))
    if x.shape[0]:
        forward(Problem(x, p, q, t), y)
    return y


@_transform.register_fake
def _(x, p, q, t):
    return torch.empty_like(x, memory_format=memory_format(x))


def products(numbers: int, down: int, width: int, time: int | None) -> tuple[int, int, int]:
    """What the products of x's numbers with P, Q and R count: eager writes Q out to W columns, P and R not."""
    return 2 * numbers * down, 2 * numbers * width, 2 * numbers * (time or 0)


def _products(x: Tensor, p: Tensor, t: Tensor | None) -> tuple[int, int, int]:
    return products(math.prod(x.shape), p.shape[-1], x.shape[-1], None if t is None else t.shape[-1])


@_transform.register_flops
def _(x, p, q, t):
    return sum(_products(x, p, t))


@op("bilinear_transform_backward")
def _transform_backward(
    dy: Tensor, x: Tensor, p: Tensor, q: Tensor, t: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    problem = Problem(x, p, q, t)
    if x.shape[0] == 0:
        return [gradient.zero_() for gradient in empty_gradients(problem, needs)]
    return backward(problem, dy, needs)


@_transform_backward.register_fake
def _(dy, x, p, q, t, needs):
    return empty_gradients(Problem(x, p, q, t), needs)


@_transform_backward.register_flops
def _(dy, x, p, q, t, needs):
    """A product counts once for each factor that wants a gradient: the matrix, and what was computed before it."""
    by_p, by_q, by_t = _products(x, p, t)
    need_x, need_p, need_q, need_t = needs
    before_q = need_x or need_p
    before_t = before_q or need_q
    return (need_x + need_p) * by_p + (before_q + need_q) * by_q + (before_t + need_t) * by_t


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad)
    gradients = _transform_backward(dy, *ctx.saved_tensors, needs)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


_transform.register_autograd(_autograd, _setup)
once_only(_transform_backward, "bilinear_transform")


# --- what it is, in the table of ops --------------------------------------------------------------------------------

_CHANNELS = {"x": -4}
_BLOCKS = ((256, 28), (512, 14))  # channels and side of the ResNet-50 with BAT


def _checked(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    bilinear_arguments(_OP, {**dict.fromkeys(FORMS), **tensors})


def _calls(clips: int, channels: int, side: int, dtype: str) -> list[recording.TunedCall]:
    """A block of BAT, of 4 frames: eight groups, 7 x 7 coarse cells; frames not mixed, and mixed by 4 groups."""
    shapes: dict[str, tuple[int, ...]] = {
        "x": (clips, channels, 4, side, side),
        "p": (clips, 8, 4, 7, 7),
        "q": (clips, 8, 4, 7, 7),
        "t": (clips, 4, 4, 4),
    }
    tensors = {name: recording.described(shape, dtype if name == "x" else "float32") for name, shape in shapes.items()}
    apart = {name: tensor for name, tensor in tensors.items() if name != "t"}
    return [recording.TunedCall(_OP, given, {}, True) for given in (apart, tensors)]


SPEC = OpSpec(
    name=_OP,
    function=bilinear_transform,
    reference=reference.bilinear_transform,
    tensors=FORMS,
    optional=OPTIONAL,
    options=(),
    channels=_CHANNELS,
    check=_checked,
    space=SPACE,
    keys=keys_of,
    papers=lambda dtype: [call for channels, side in _BLOCKS for call in _calls(8, channels, side, dtype)],
    quick=lambda dtype: _calls(1, 32, 14, dtype),
)
