"""Multi-query relational self-attention (RSA, Kim et al., equations 5-12).

For each position n of a clip, with X_n its M = kt * kh * kw neighbours (0 outside the clip):

    a_n = q_n (P1 + X_n^K * H1)           (L, D)    (X^K * H1)[c, d] = sum_m X_n^K[m, c] H1[c, d, m]
    z_n = a_n (H2^T X_n^V)                (L, E)    kernels kappa_n = a_n H2^T (L, M), applied to the values
    y_n = z_n (I + (X_n^V)^T G)           (L, F)

Tap i of an axis of k taps lies at i - k // 2: centred where k is odd; where it is even, one more tap before than after.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, tuning
from ..autocast import lowered
from ..dispatch import choose, current_backend
from ..eager import relational as eager
from ..launch import accumulator, clip_layout, launch, precision, wider
from ..validate import describe
from ..validate.relational import relational_arguments
from .custom import once_only, refuse_transforms


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

    All tensors have one dtype and device. Every argument is differentiable. Triton takes L up to 16 and C, D, E, F
    up to 128; beyond, "auto" takes eager and warns.

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
    given = (q, k, v, h2, h1, p1, g, identity)
    lower: list[Any] = [None if t is None else lowered(t) for t in given]
    problem = _Problem(*lower, None if eps is None else float(eps))
    name = _backend(problem, {name: t for name, t in tensors.items() if t is not None})
    if name == "reference":
        options: dict[str, Any] = dict(zip(_Problem._fields[3:], problem[3:], strict=True))
        return reference.relational_attention(*problem[:3], **options)
    if name == "eager":
        return eager.relational_attention(*problem)
    there = [t for t in problem[:8] if t is not None]
    refuse_transforms("relational_attention", *there)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in there)
    return _attend(*problem, save)[0].transpose(1, 2)


def _backend(problem: _Problem, call: dict[str, Tensor]) -> str:
    """The backend of a call; for sizes beyond the kernels' "auto" takes eager, and says so."""
    name = choose("relational_attention", problem.q, call)
    if name != "triton":
        return name
    sizes = dict(zip("LCDEF", (problem.q.shape[1], *problem.channels), strict=True))
    beyond = [f"{letter} = {size}" for letter, size in sizes.items() if size > tuning.RELATIONAL_LIMIT[letter]]
    if not beyond:
        return name
    limits = ", ".join(f"{letter} <= {size}" for letter, size in tuning.RELATIONAL_LIMIT.items())
    message = f"relational_attention: {', '.join(beyond)}; accepted on the triton backend is {limits}"
    if current_backend() == "triton":
        raise ValueError(f'{message}; dyreg_triton.backend("eager") takes any; call: {describe(call)}')
    if not torch.compiler.is_compiling():
        warnings.warn(f"{message}; the eager backend computes this call", stacklevel=3)
    return "eager"


# --- the Triton path: launches ------------------------------------------------------------------------------


def _pad(n: int, least: int = 16) -> int:
    """The least power of two that holds n; products contract over sixteen or more."""
    return max(least, 1 << (n - 1).bit_length())


class _Problem(NamedTuple):
    """The tensors of a call, and its sizes in the kernels' terms."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    h2: Tensor
    h1: Tensor | None
    p1: Tensor | None
    g: Tensor | None
    identity: Tensor | None
    eps: float | None

    @property
    def size(self) -> tuple[int, int, int]:
        return self.q.shape[-3], self.q.shape[-2], self.q.shape[-1]

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """C, D, E, F; F is E in the basic context."""
        values = self.v.shape[1]
        return self.q.shape[2], self.h2.shape[0], values, values if self.g is None else self.g.shape[0]

    @property
    def window(self) -> tuple[int, int, int]:
        return self.h2.shape[1], self.h2.shape[2], self.h2.shape[3]

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    def config(self, kind: str) -> tuning.RelationalConfig:
        clips, queries = self.q.shape[:2]
        return tuning.relational(kind, clips, self.size, queries, self.channels, self.window, self.q.element_size())

    def constants(self, *names: str) -> dict[str, Any]:
        """Compile-time arguments by name."""
        c, d, e, f = self.channels
        every = {
            "M": self.taps, "L": self.q.shape[1], "C": c, "D": d, "E": e, "F": f,
            "C_PAD": _pad(c, 8), "D_PAD": _pad(d), "E_PAD": _pad(e, 8), "E_WIDE": _pad(e), "F_PAD": _pad(f),
            "M_PAD": -(-self.taps // 32) * 32,
            "HAS_H1": self.h1 is not None, "HAS_P1": self.p1 is not None, "HAS_G": self.g is not None,
            "HAS_IDENTITY": self.identity is not None, "NORMED": self.eps is not None,
            "WINDOW": self.window,
        }  # fmt: skip
        chosen = {name: every[name] for name in names}
        return {**chosen, "ACC": accumulator(self.q.dtype)}

    def rows(self, features: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty (B, T*H*W, L, features)."""
        return self.q.new_empty(self.q.shape[0], math.prod(self.size), self.q.shape[1], features, dtype=dtype)


class _Packed(NamedTuple):
    """What `relational_pack` makes; a tensor that is not there stands for one that is not read."""

    kn: Tensor
    vn: Tensor
    h1: Tensor
    p1: Tensor
    h2: Tensor
    g: Tensor
    identity: Tensor


def _programs(problem: _Problem, block: int) -> int:
    return problem.q.shape[0] * -(-math.prod(problem.size) // block)


def _pack(problem: _Problem) -> _Packed:
    from ..kernels.relational import relational_pack

    q, k, v, h2, h1, p1, g, identity, eps = problem
    constants = problem.constants(
        "M", "C", "D", "E", "F", "C_PAD", "D_PAD", "E_PAD", "F_PAD", "M_PAD", "HAS_H1", "HAS_P1", "HAS_G",
        "HAS_IDENTITY", "NORMED",
    )  # fmt: skip
    c, d, e, f, m = (constants[name] for name in ("C_PAD", "D_PAD", "E_PAD", "F_PAD", "M_PAD"))
    positions = q.shape[0] * math.prod(problem.size)

    def empty(given: object, *shape: int) -> Tensor:
        return q.new_empty(shape if given is not None else 0)

    packed = _Packed(
        empty(k, positions, c), empty(v, positions, e), empty(h1, c, m, d), empty(p1, max(c, 16), d), empty(h2, m, d),
        empty(g, m, f), empty(identity, max(e, 16), f),
    )  # fmt: skip
    flat = [None if t is None else t.flatten(-3) for t in (h1, h2, g)]

    def transposed(t: Tensor | None) -> tuple[int, ...]:
        """Strides, the tap's before the last dimension's."""
        return (0, 0) if t is None else (*t.stride()[:-2], t.stride(-1), t.stride(-2))

    config = problem.config("pack")
    k_layout, v_layout = clip_layout(v if k is None else k), clip_layout(v)
    launch(
        relational_pack, _programs(problem, config.block_p) + 1 + (0 if h1 is None else c), q,
        v if k is None else k, v, *(v if t is None else t for t in (flat[0], p1, flat[1], flat[2], identity)),
        *packed, eps or 0.0, q.shape[0], problem.size, k_layout.strides, v_layout.strides,
        (0, 0, 0) if h1 is None else transposed(flat[0]), (0, 0) if p1 is None else p1.stride(), transposed(flat[1]),
        transposed(flat[2]), (0, 0) if identity is None else identity.stride(),
        K_FORM=k_layout.form, V_FORM=v_layout.form, BLOCK_P=config.block_p, BLOCK_M=config.block_m,
        num_warps=config.num_warps, **constants,
    )  # fmt: skip
    return packed


_EVERY = (
    "L", "C", "D", "E", "F", "C_PAD", "D_PAD", "E_PAD", "F_PAD", "M_PAD", "E_WIDE", "HAS_H1", "HAS_P1", "HAS_G",
    "HAS_IDENTITY", "NORMED", "WINDOW",
)  # fmt: skip


def _block(config: tuning.RelationalConfig, problem: _Problem, name: str) -> Any:
    """A block size; of channels no more than there are."""
    c, d, e, _ = problem.channels
    most = {"BLOCK_C": _pad(c, 8), "BLOCK_D": _pad(d), "BLOCK_E": _pad(e, 8)}
    field = "block_c" if name == "BLOCK_E" else name.lower()
    return min(getattr(config, field), most.get(name, 128))


def _blocks(config: tuning.RelationalConfig, problem: _Problem, queries: int, *names: str) -> dict[str, Any]:
    """Launch options and blocks; `queries` is the fewest that the kernel's products take."""
    block_l = max(queries, 1 << (problem.q.shape[1] - 1).bit_length())
    return {
        **{name: _block(config, problem, name) for name in names},
        "BLOCK_L": block_l, "PRECISION": precision(problem.q.dtype, "tf32x3"),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def _forward(problem: _Problem, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, F, L, T, H, W), and with `save` the rows of a and, with g, of z."""
    from ..kernels.relational import relational_forward

    q, eps = problem.q, problem.eps
    packed = _pack(problem)
    _, d, e, f = problem.channels
    y = q.new_empty(q.shape[0], f, q.shape[1], *problem.size)
    a_rows = problem.rows(d) if save else q.new_empty(0)
    z_rows = problem.rows(e) if save and problem.g is not None else q.new_empty(0)
    config = problem.config("forward")
    q_layout, y_layout = clip_layout(q), clip_layout(y.transpose(1, 2))
    launch(
        relational_forward, _programs(problem, config.block_p), q,
        q, *packed, a_rows, z_rows, y, eps or 0.0, problem.size, q_layout.strides, y_layout.strides,
        Q_FORM=q_layout.form, Y_FORM=y_layout.form, SAVE=save, ORDER=config.order,
        **problem.constants(*_EVERY), **_blocks(config, problem, 8, "BLOCK_P", "BLOCK_M", "BLOCK_C", "BLOCK_E"),
    )  # fmt: skip
    return y, a_rows, z_rows


def _empty_gradients(problem: _Problem, needs: list[bool]) -> list[Tensor]:
    """Where the gradients go, in the order of the arguments; empty tensors for those not needed."""
    empty = problem.q.new_empty
    wanted = [t if need else None for t, need in zip(problem[:8], needs, strict=True)]
    clips = [empty(0) if t is None else torch.empty_like(t) for t in wanted[:3]]
    return clips + [empty(0 if t is None else t.shape) for t in wanted[3:]]


def _backward(problem: _Problem, dy: Tensor, a_rows: Tensor, z_rows: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of q, k, v, h2, h1, p1, g, identity, where they are needed."""
    from ..kernels.relational import relational_backward

    q = problem.q
    packed = _pack(problem)
    gradients = _empty_gradients(problem, needs)
    _, d, e, _ = problem.channels
    da_rows, dz_rows = problem.rows(d), problem.rows(e)
    scales = problem.rows(1, wider(q.dtype)) if problem.eps is not None else q.new_empty(0, dtype=wider(q.dtype))
    config = problem.config("backward")
    dq = gradients[0] if needs[0] else q
    dy_layout, q_layout, dq_layout = clip_layout(dy), clip_layout(q), clip_layout(dq)
    launch(
        relational_backward, _programs(problem, config.block_p), q,
        dy, q, a_rows, *packed, dz_rows, da_rows, scales, dq, problem.eps or 0.0, problem.size,
        dy_layout.strides, q_layout.strides, dq_layout.strides,
        DY_FORM=dy_layout.form, Q_FORM=q_layout.form, DQ_FORM=dq_layout.form, NEED_Q=needs[0], ORDER=config.order,
        **problem.constants(*_EVERY), **_blocks(config, problem, 8, "BLOCK_P", "BLOCK_M", "BLOCK_C", "BLOCK_E"),
    )  # fmt: skip
    _keys_and_values(problem, packed, dy, a_rows, z_rows, da_rows, dz_rows, scales, gradients, needs)
    if needs[4] or needs[5]:
        gradients[4], gradients[5] = _by_h1(problem, packed, da_rows, scales, gradients[4], gradients[5])
    if needs[3] or needs[6] or needs[7]:
        sums = _by_h2(problem, packed, dy, a_rows, z_rows, dz_rows)
        for i, total in zip((3, 6, 7), sums, strict=True):
            if needs[i]:
                gradients[i] = total
    return gradients


def _keys_and_values(
    problem: _Problem,
    packed: _Packed,
    dy: Tensor,
    a_rows: Tensor,
    z_rows: Tensor,
    da_rows: Tensor,
    dz_rows: Tensor,
    scales: Tensor,
    gradients: list[Tensor],
    needs: list[bool],
) -> None:
    """Write the gradients of k and v, `gradients[1]` and `gradients[2]`."""
    from ..kernels.relational_gradients import relational_fold_keys, relational_fold_values, relational_unpack

    q, k, v = problem[:3]
    _, need_k, need_v = needs[:3]
    if not (need_k or need_v):
        return
    c, _, e, _ = problem.channels
    sizes = problem.constants("L", "C", "D", "E", "F", "C_PAD", "D_PAD", "E_PAD", "F_PAD", "M_PAD", "WINDOW", "NORMED")
    positions = q.shape[0] * math.prod(problem.size)
    q_layout, dy_layout = clip_layout(q), clip_layout(dy)
    dk_rows = q.new_empty((positions, c) if need_k else 0, dtype=wider(q.dtype))
    dv_rows = q.new_empty((positions, e) if need_v else 0, dtype=wider(q.dtype))

    def tiles(config: tuning.RelationalConfig) -> int:
        across, down = (-(-n // tile) for n, tile in zip(problem.size[1:], config.plane, strict=True))
        return q.shape[0] * problem.size[0] * across * down

    if need_k:
        config = problem.config("fold_keys")
        blocks = _blocks(config, problem, 16, "BLOCK_C", "BLOCK_D")
        launch(
            relational_fold_keys, tiles(config) * (sizes["C_PAD"] // blocks["BLOCK_C"]), q,
            q, da_rows, scales, packed.h1, dk_rows, problem.size, q_layout.strides, Q_FORM=q_layout.form,
            **{name: sizes[name] for name in ("L", "C", "D", "C_PAD", "D_PAD", "M_PAD", "NORMED", "WINDOW", "ACC")},
            PLANE_H=config.plane[0], PLANE_W=config.plane[1], BLOCK_S=config.block_p,
            TAPS=min(64, _pad(math.prod(problem.window[1:]), 8)), **blocks,
        )  # fmt: skip
    if need_v:
        config = problem.config("fold_values")
        launch(
            relational_fold_values, tiles(config), q,
            a_rows, dz_rows, z_rows, dy, packed.h2, packed.g, dv_rows, problem.size, dy_layout.strides,
            DY_FORM=dy_layout.form, HAS_G=problem.g is not None,
            **{name: sizes[name] for name in ("L", "D", "E", "F", "D_PAD", "E_PAD", "F_PAD", "WINDOW", "ACC")},
            PLANE_H=config.plane[0], PLANE_W=config.plane[1], BLOCK_S=config.block_p,
            BLOCK_D=min(config.block_d, sizes["D_PAD"], sizes["F_PAD"]),
            **_blocks(config, problem, 8),
        )  # fmt: skip
    config = problem.config("pack")
    dk, dv = gradients[1] if need_k else v, gradients[2] if need_v else v
    k = v if k is None else k
    layouts = [clip_layout(t) for t in (k, v, dk, dv)]
    launch(
        relational_unpack, _programs(problem, config.block_p), q,
        k, v, dk_rows, dv_rows, dk, dv, problem.eps or 0.0, problem.size, *(layout.strides for layout in layouts),
        **{f"{name}_FORM": layout.form for name, layout in zip(("K", "V", "DK", "DV"), layouts, strict=True)},
        **{name: sizes[name] for name in ("C", "E", "C_PAD", "E_PAD", "NORMED", "ACC")},
        NEED_K=need_k, NEED_V=need_v, BLOCK_P=config.block_p, num_warps=config.num_warps,
    )  # fmt: skip


def _by_h1(
    problem: _Problem, packed: _Packed, da_rows: Tensor, scales: Tensor, by_h1: Tensor, by_p1: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of h1 and p1, each where its tensor is not empty: partial sums, then their sum in fixed order."""
    from ..kernels.relational_gradients import relational_by_h1

    q = problem.q
    has_h1, has_p1 = by_h1.numel() > 0, by_p1.numel() > 0
    config = problem.config("by_h1")
    constants = problem.constants("L", "C", "D", "C_PAD", "D_PAD", "M_PAD", "WINDOW", "NORMED")
    c, d, m = (constants[name] for name in ("C_PAD", "D_PAD", "M_PAD"))
    sums_h1 = q.new_empty((config.splits, c, m, d) if has_h1 else 0, dtype=wider(q.dtype))
    sums_p1 = q.new_empty((config.splits, c, d) if has_p1 else 0, dtype=wider(q.dtype))
    q_layout = clip_layout(q)
    blocks = _blocks(config, problem, 16, "BLOCK_P", "BLOCK_M", "BLOCK_C", "BLOCK_D")
    by_taps = (m // config.block_m if has_h1 else 0) + has_p1
    programs = config.splits * (c // blocks["BLOCK_C"]) * (d // blocks["BLOCK_D"]) * by_taps
    launch(
        relational_by_h1, programs, q,
        q, da_rows, scales, packed.kn, sums_h1, sums_p1, q.shape[0], problem.size, q_layout.strides,
        Q_FORM=q_layout.form, HAS_H1=has_h1, HAS_P1=has_p1, SPLITS=config.splits, **constants, **blocks,
    )  # fmt: skip
    channels, latent, _, _ = problem.channels
    if has_h1:
        by_h1 = sums_h1[:, :channels, : problem.taps, :latent].sum(0).mT.to(q.dtype).reshape(by_h1.shape).contiguous()
    if has_p1:
        by_p1 = sums_p1[:, :channels, :latent].sum(0).to(q.dtype)
    return by_h1, by_p1


def _by_h2(
    problem: _Problem, packed: _Packed, dy: Tensor, a_rows: Tensor, z_rows: Tensor, dz_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h2, g and identity, empty where there is no such tensor."""
    from ..kernels.relational_gradients import relational_by_h2

    q, g, identity = problem.q, problem.g, problem.identity
    config = problem.config("by_h2")
    constants = problem.constants("L", "D", "E", "F", "D_PAD", "E_PAD", "E_WIDE", "F_PAD", "M_PAD", "WINDOW", "HAS_G",
                                  "HAS_IDENTITY")  # fmt: skip
    d, e, f, m = (constants[name] for name in ("D_PAD", "E_WIDE", "F_PAD", "M_PAD"))

    def sums(given: object, *shape: int) -> Tensor:
        return q.new_empty((config.splits, *shape) if given is not None else 0, dtype=wider(q.dtype))

    by_h2, by_g, by_identity = sums(q, m, d), sums(g, m, f), sums(identity, e, f)
    dy_layout = clip_layout(dy)
    launch(
        relational_by_h2, config.splits * (m // config.block_m + (identity is not None)), q,
        a_rows, dz_rows, z_rows, dy, packed.vn, by_h2, by_g, by_identity, q.shape[0], problem.size, dy_layout.strides,
        DY_FORM=dy_layout.form, SPLITS=config.splits, **constants,
        **_blocks(config, problem, 8, "BLOCK_P", "BLOCK_M"),
    )  # fmt: skip

    def total(sums: Tensor, like: Tensor | None, features: int) -> Tensor:
        if like is None:
            return sums
        summed = sums[:, : problem.taps, :features].sum(0)
        return summed.mT.to(q.dtype).reshape(like.shape).contiguous()

    _, latent, values, context = problem.channels
    if identity is not None:
        by_identity = by_identity[:, :values, :context].sum(0).to(q.dtype)
    return total(by_h2, problem.h2, latent), total(by_g, g, context), by_identity


# --- the Triton path: an op is schema, implementation, fake, autograd, and a backward op of its own ---------


@torch.library.custom_op("dyreg_triton::relational_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor | None, v: Tensor, h2: Tensor, h1: Tensor | None, p1: Tensor | None, g: Tensor | None,
    identity: Tensor | None, eps: float | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y as (B, F, L, T, H, W), and with `save` what the backward needs beside the inputs."""
    problem = _Problem(q, k, v, h2, h1, p1, g, identity, eps)
    if q.shape[0] == 0:
        return _outputs(problem, save)
    return _forward(problem, save)


def _outputs(problem: _Problem, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    q = problem.q
    _, d, e, f = problem.channels
    return (
        q.new_empty(q.shape[0], f, q.shape[1], *problem.size),
        problem.rows(d) if save else q.new_empty(0),
        problem.rows(e) if save and problem.g is not None else q.new_empty(0),
    )


@_attend.register_fake
def _(q, k, v, h2, h1, p1, g, identity, eps, save):
    return _outputs(_Problem(q, k, v, h2, h1, p1, g, identity, eps), save)


@torch.library.custom_op("dyreg_triton::relational_attention_backward", mutates_args=())
def _attend_backward(
    dy: Tensor, a_rows: Tensor, z_rows: Tensor, q: Tensor, k: Tensor | None, v: Tensor, h2: Tensor, h1: Tensor | None,
    p1: Tensor | None, g: Tensor | None, identity: Tensor | None, eps: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    problem = _Problem(q, k, v, h2, h1, p1, g, identity, eps)
    if q.shape[0] == 0:
        return [t.zero_() for t in _empty_gradients(problem, needs)]
    return _backward(problem, dy.transpose(1, 2), a_rows, z_rows, needs)


@_attend_backward.register_fake
def _(dy, a_rows, z_rows, q, k, v, h2, h1, p1, g, identity, eps, needs):
    return _empty_gradients(_Problem(q, k, v, h2, h1, p1, g, identity, eps), needs)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors)


def _autograd(ctx: Any, dy: Tensor, *_: None) -> tuple:
    needs = list(ctx.needs_input_grad[:8])
    gradients = _attend_backward(dy, *ctx.saved_tensors, ctx.eps, needs)
    return *(t if need else None for t, need in zip(gradients, needs, strict=True)), None, None


_attend.register_autograd(_autograd, setup_context=_setup)
once_only(_attend_backward, "relational_attention")
