"""Gradients of relational self-attention for keys, values and weights, all of them gathers over windows:

    dK[p, c] = sum_m sum_d H1[m, c, d] dA1[p - m, c, d]                             dA1[n, c, d] = sum_l q[n, l, c] da[n, l, d]
    dV[p, e] = sum_m sum_d H2[m, d] dA2[p - m, e, d] + sum_f G[m, f] dA3[p - m, e, f]    dA2 = dz (x) a,  dA3 = z (x) dy
    dH1[m, c, d] = sum_n K[n + m, c] dA1[n, c, d]                                   dP1[c, d] = sum_n dA1[n, c, d]
    dH2[m, d] = sum_n sum_l (dz[n, l] . V[n + m]) a[n, l, d]                        dI[e, f] = sum_n sum_l z[n, l, e] dy[n, l, f]
    dG[m, f] = sum_n sum_l (z[n, l] . V[n + m]) dy[n, l, f]

Floor: operations, M C D per position for each of dK and dH1, and so on as in the forward; bytes are few.

Tiling of dK and dV ("fold"): a program owns BLOCK_S - kw + 1 consecutive positions of a clip, p, and a block of
channels. For each row (dt, dh) of the window their neighbours p - m are BLOCK_S consecutive positions n too. For these
it forms dA on chip, multiplies it with the row's kw taps to u[n, tap], and sums u along its diagonals, u[p - m, m]: an
indexed read of a tile. So nobody writes to a neighbour, and no atomics are needed.
Tiling of the weights: a program owns BLOCK_M taps (and BLOCK_C channels of H1) and walks every SPLITS-th block of
positions; its sum is one of SPLITS, which are added afterwards in fixed order.
"""

import triton
import triton.language as tl

from .common import dot
from .relational import clip_at, load_clip, load_rows, window


@triton.jit
def diagonals(u, p, row, SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
              TAPS: tl.constexpr):  # fmt: skip
    """sum_tap u[c, p - m, tap] (BLOCK_C, BLOCK_S) over the taps of the window's row, where p - m is in the clip.

    u (BLOCK_C, BLOCK_S, TAPS) holds consecutive positions, the first of them that of p[0] and the row's last tap.
    """
    tap = tl.arange(0, TAPS)
    source = tl.arange(0, BLOCK_S)[:, None] + (WINDOW[2] - 1 - tap)[None, :]
    source = tl.minimum(tl.maximum(source, 0), BLOCK_S - 1)
    picked = tl.gather(u, tl.broadcast_to(source[None, :, :], (BLOCK_C, BLOCK_S, TAPS)), 1)
    t = p // (SIZE[1] * SIZE[2]) - (row // WINDOW[1] - WINDOW[0] // 2)
    h = p // SIZE[2] % SIZE[1] - (row % WINDOW[1] - WINDOW[1] // 2)
    w = (p % SIZE[2])[:, None] - (tap - WINDOW[2] // 2)[None, :]
    there = ((t >= 0) & (t < SIZE[0]) & (h >= 0) & (h < SIZE[1]))[:, None] & (w >= 0) & (w < SIZE[2])
    there = there & (tap < WINDOW[2])[None, :]
    return tl.sum(tl.where(there[None, :, :], picked, 0.0), 2)


@triton.jit
def neighbours(p, row, SIZE: tl.constexpr, WINDOW: tl.constexpr):
    """The positions that the row's taps reach positions p from, in order."""
    dt = row // WINDOW[1] - WINDOW[0] // 2
    dh = row % WINDOW[1] - WINDOW[1] // 2
    return p - (dt * SIZE[1] + dh) * SIZE[2] - (WINDOW[2] - 1 - WINDOW[2] // 2)


@triton.jit
def outer(x, y, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """sum_l x[n, i, l] y[n, j, l] for x (positions, i, queries) and y (positions, j, queries)."""
    zero = tl.zeros((x.shape[0], x.shape[1], y.shape[1]), ACC)
    return dot(x.to(OPERAND), tl.permute(y.to(OPERAND), (0, 2, 1)), zero, OPERAND, PRECISION)


@triton.jit
def relational_fold_keys(
    q, da_rows, scales, h1, dk_rows,
    SIZE: tl.constexpr, Q_STRIDES, Q_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, C_PAD: tl.constexpr, D_PAD: tl.constexpr, M_PAD: tl.constexpr,
    NORMED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The rows of the normalised keys' gradient."""
    OPERAND: tl.constexpr = q.dtype.element_ty
    blocks = tl.cdiv(SIZE[0] * SIZE[1] * SIZE[2], BLOCK_S - WINDOW[2] + 1)
    channels: tl.constexpr = C_PAD // BLOCK_C
    program = tl.program_id(0)
    clip = program // channels // blocks
    lane = tl.arange(0, BLOCK_S)
    p = program // channels % blocks * (BLOCK_S - WINDOW[2] + 1) + lane
    c = program % channels * BLOCK_C + tl.arange(0, BLOCK_C)
    query = tl.arange(0, BLOCK_L)
    tap = tl.arange(0, TAPS)
    dk = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    for row in range(WINDOW[0] * WINDOW[1]):
        n = neighbours(p, row, SIZE, WINDOW)
        part = load_clip(q, clip, n, c, query, SIZE, Q_STRIDES, Q_FORM, C, L)
        if NORMED:
            part = part.to(ACC) * load_rows(scales, clip, n, tl.arange(0, 1), query, SIZE, 1, L)
        m = tl.minimum(row * WINDOW[2] + tap, M_PAD - 1)
        u = tl.zeros((BLOCK_C, BLOCK_S, TAPS), ACC)
        for first in range(0, D_PAD, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            da1 = outer(part, load_rows(da_rows, clip, n, d, query, SIZE, D, L), ACC, OPERAND, PRECISION)
            weights = tl.load(h1 + (c[:, None, None] * M_PAD + m[None, None, :]) * D_PAD + d[None, :, None])
            u = dot(tl.permute(da1.to(OPERAND), (1, 0, 2)), weights, u, OPERAND, PRECISION)
        dk += diagonals(u, p, row, SIZE, WINDOW, BLOCK_C, BLOCK_S, TAPS)
    mine = (p < SIZE[0] * SIZE[1] * SIZE[2]) & (lane < BLOCK_S - WINDOW[2] + 1)
    cells = clip.to(tl.int64) * (SIZE[0] * SIZE[1] * SIZE[2]) + p
    tl.store(dk_rows + (cells * C)[None, :] + c[:, None], dk, mask=mine[None, :] & (c < C)[:, None])


@triton.jit
def relational_fold_values(
    a_rows, dz_rows, z_rows, dy, h2, g, dv_rows,
    SIZE: tl.constexpr, DY_STRIDES, DY_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, F_PAD: tl.constexpr, M_PAD: tl.constexpr,
    HAS_G: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The rows of the normalised values' gradient."""
    OPERAND: tl.constexpr = a_rows.dtype.element_ty
    blocks = tl.cdiv(SIZE[0] * SIZE[1] * SIZE[2], BLOCK_S - WINDOW[2] + 1)
    channels: tl.constexpr = E_PAD // BLOCK_C
    program = tl.program_id(0)
    clip = program // channels // blocks
    lane = tl.arange(0, BLOCK_S)
    p = program // channels % blocks * (BLOCK_S - WINDOW[2] + 1) + lane
    e = program % channels * BLOCK_C + tl.arange(0, BLOCK_C)
    query = tl.arange(0, BLOCK_L)
    tap = tl.arange(0, TAPS)
    dv = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    for row in range(WINDOW[0] * WINDOW[1]):
        n = neighbours(p, row, SIZE, WINDOW)
        m = tl.minimum(row * WINDOW[2] + tap, M_PAD - 1)
        u = tl.zeros((BLOCK_C * BLOCK_S, TAPS), ACC)
        dz = load_rows(dz_rows, clip, n, e, query, SIZE, E, L)
        for first in range(0, D_PAD, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            da2 = outer(dz, load_rows(a_rows, clip, n, d, query, SIZE, D, L), ACC, OPERAND, PRECISION)
            da2 = tl.reshape(tl.permute(da2.to(OPERAND), (1, 0, 2)), (BLOCK_C * BLOCK_S, BLOCK_D))
            u = dot(da2, tl.load(h2 + m[None, :] * D_PAD + d[:, None]), u, OPERAND, PRECISION)
        if HAS_G:
            z = load_rows(z_rows, clip, n, e, query, SIZE, E, L)
            for first in range(0, F_PAD, BLOCK_D):
                f = first + tl.arange(0, BLOCK_D)
                by_y = load_clip(dy, clip, n, f, query, SIZE, DY_STRIDES, DY_FORM, F, L)
                da3 = outer(z, by_y, ACC, OPERAND, PRECISION)
                da3 = tl.reshape(tl.permute(da3.to(OPERAND), (1, 0, 2)), (BLOCK_C * BLOCK_S, BLOCK_D))
                u = dot(da3, tl.load(g + m[None, :] * F_PAD + f[:, None]), u, OPERAND, PRECISION)
        dv += diagonals(tl.reshape(u, (BLOCK_C, BLOCK_S, TAPS)), p, row, SIZE, WINDOW, BLOCK_C, BLOCK_S, TAPS)
    mine = (p < SIZE[0] * SIZE[1] * SIZE[2]) & (lane < BLOCK_S - WINDOW[2] + 1)
    cells = clip.to(tl.int64) * (SIZE[0] * SIZE[1] * SIZE[2]) + p
    tl.store(dv_rows + (cells * E)[None, :] + e[:, None], dv, mask=mine[None, :] & (e < E)[:, None])


@triton.jit
def relational_by_h1(
    q, da_rows, scales, kn, by_h1, by_p1, clips,
    SIZE: tl.constexpr, Q_STRIDES, Q_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, C_PAD: tl.constexpr, D_PAD: tl.constexpr, M_PAD: tl.constexpr,
    HAS_H1: tl.constexpr, HAS_P1: tl.constexpr, NORMED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums by_h1 (SPLITS, C_PAD, M_PAD, D_PAD) and by_p1 (SPLITS, C_PAD, D_PAD)."""
    OPERAND: tl.constexpr = q.dtype.element_ty
    blocks = tl.cdiv(SIZE[0] * SIZE[1] * SIZE[2], BLOCK_P)
    channels: tl.constexpr = C_PAD // BLOCK_C
    split = tl.program_id(0) % SPLITS
    rest = tl.program_id(0) // SPLITS
    first = rest // channels * BLOCK_M
    c = rest % channels * BLOCK_C + tl.arange(0, BLOCK_C)
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    query = tl.arange(0, BLOCK_L)
    sum_h1 = tl.zeros((BLOCK_C, BLOCK_M, D_PAD), ACC)
    sum_p1 = tl.zeros((BLOCK_C, D_PAD), ACC)
    for block in range(split, clips * blocks, SPLITS):
        clip = block // blocks
        n = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        part = load_clip(q, clip, n, c, query, SIZE, Q_STRIDES, Q_FORM, C, L)
        if NORMED:
            part = part.to(ACC) * load_rows(scales, clip, n, tl.arange(0, 1), query, SIZE, 1, L)
        da1 = outer(part, load_rows(da_rows, clip, n, d, query, SIZE, D, L), ACC, OPERAND, PRECISION)
        if HAS_P1:
            sum_p1 += tl.sum(da1, 0)
        if HAS_H1:
            keys = tl.permute(window(kn, clip, n, m, c, SIZE, WINDOW, C_PAD), (2, 1, 0))
            sum_h1 = dot(keys, tl.permute(da1.to(OPERAND), (1, 0, 2)), sum_h1, OPERAND, PRECISION)
    if HAS_H1:
        rows = (split * C_PAD + c)[:, None] * M_PAD + m[None, :]
        tl.store(by_h1 + rows[:, :, None].to(tl.int64) * D_PAD + d[None, None, :], sum_h1)
    if HAS_P1 and first == 0:
        tl.store(by_p1 + (split * C_PAD + c)[:, None] * D_PAD + d[None, :], sum_p1)


@triton.jit
def by_tap(values, x, y, columns, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """sum + sum_n sum_l (values[n, m] . x[n, l]) y[n, l]: (taps, features)."""
    BLOCK_P: tl.constexpr = values.shape[0]
    BLOCK_M: tl.constexpr = values.shape[1]
    BLOCK_L: tl.constexpr = x.shape[2]
    s = dot(values, x.to(OPERAND), tl.zeros((BLOCK_P, BLOCK_M, BLOCK_L), ACC), OPERAND, PRECISION)
    s = tl.reshape(tl.permute(s.to(OPERAND), (1, 0, 2)), (BLOCK_M, BLOCK_P * BLOCK_L))
    y = tl.reshape(tl.permute(y.to(OPERAND), (0, 2, 1)), (BLOCK_P * BLOCK_L, y.shape[1]))
    return dot(s, y, columns, OPERAND, PRECISION)


@triton.jit
def relational_by_h2(
    a_rows, dz_rows, z_rows, dy, vn, by_h2, by_g, by_identity, clips,
    SIZE: tl.constexpr, DY_STRIDES, DY_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, F_PAD: tl.constexpr, M_PAD: tl.constexpr,
    HAS_G: tl.constexpr, HAS_IDENTITY: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums by_h2 (SPLITS, M_PAD, D_PAD), by_g (SPLITS, M_PAD, F_PAD) and by_identity (SPLITS, E_PAD, F_PAD).

    The programs of one split beyond M_PAD / BLOCK_M sum the identity's gradient.
    """
    OPERAND: tl.constexpr = a_rows.dtype.element_ty
    blocks = tl.cdiv(SIZE[0] * SIZE[1] * SIZE[2], BLOCK_P)
    split = tl.program_id(0) % SPLITS
    first = tl.program_id(0) // SPLITS * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_PAD)
    f = tl.arange(0, F_PAD)
    query = tl.arange(0, BLOCK_L)
    if first < M_PAD:
        sum_h2 = tl.zeros((BLOCK_M, D_PAD), ACC)
        sum_g = tl.zeros((BLOCK_M, F_PAD), ACC)
        for block in range(split, clips * blocks, SPLITS):
            clip = block // blocks
            n = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
            values = window(vn, clip, n, m, e, SIZE, WINDOW, E_PAD)
            dz = load_rows(dz_rows, clip, n, e, query, SIZE, E, L)
            a = load_rows(a_rows, clip, n, d, query, SIZE, D, L)
            sum_h2 = by_tap(values, dz, a, sum_h2, ACC, OPERAND, PRECISION)
            if HAS_G:
                z = load_rows(z_rows, clip, n, e, query, SIZE, E, L)
                by_y = load_clip(dy, clip, n, f, query, SIZE, DY_STRIDES, DY_FORM, F, L)
                sum_g = by_tap(values, z, by_y, sum_g, ACC, OPERAND, PRECISION)
        tl.store(by_h2 + (split * M_PAD + m)[:, None] * D_PAD + d[None, :], sum_h2)
        if HAS_G:
            tl.store(by_g + (split * M_PAD + m)[:, None] * F_PAD + f[None, :], sum_g)
    elif HAS_IDENTITY:
        sum_i = tl.zeros((E_PAD, F_PAD), ACC)
        for block in range(split, clips * blocks, SPLITS):
            clip = block // blocks
            n = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
            z = load_rows(z_rows, clip, n, e, query, SIZE, E, L)
            by_y = load_clip(dy, clip, n, f, query, SIZE, DY_STRIDES, DY_FORM, F, L)
            z = tl.reshape(tl.permute(z, (1, 0, 2)), (E_PAD, BLOCK_P * BLOCK_L))
            by_y = tl.reshape(tl.permute(by_y, (0, 2, 1)), (BLOCK_P * BLOCK_L, F_PAD))
            sum_i = dot(z, by_y, sum_i, OPERAND, PRECISION)
        tl.store(by_identity + (split * E_PAD + e)[:, None] * F_PAD + f[None, :], sum_i)


@triton.jit
def unpack_clip(x, rows, by_x, clip, n, eps, SIZE: tl.constexpr, STRIDES, BY_STRIDES, FORM: tl.constexpr, BY_FORM: tl.constexpr,
                C: tl.constexpr, C_PAD: tl.constexpr, NORMED: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """From the gradient of the normalised x (rows) that of x: (g - x^ (x^ . g)) / sqrt(sum x^2 + eps)."""
    c = tl.arange(0, C_PAD)
    one = tl.arange(0, 1)
    grad = load_rows(rows, clip, n, c, one, SIZE, C, 1)
    if NORMED:
        wide = load_clip(x, clip, n, c, one, SIZE, STRIDES, FORM, C, 1).to(ACC)
        scale = 1 / tl.sqrt(tl.sum(wide * wide, 1) + eps)[:, None, :]
        wide *= scale
        grad = (grad - wide * tl.sum(wide * grad, 1)[:, None, :]) * scale
    there = (n < SIZE[0] * SIZE[1] * SIZE[2])[:, None, None] & (c < C)[None, :, None]
    tl.store(clip_at(by_x, clip, n, c, one, SIZE, BY_STRIDES, BY_FORM), grad.to(by_x.dtype.element_ty), mask=there)


@triton.jit
def relational_unpack(
    k, v, dk_rows, dv_rows, dk, dv, eps,
    SIZE: tl.constexpr, K_STRIDES, V_STRIDES, DK_STRIDES, DV_STRIDES,
    K_FORM: tl.constexpr, V_FORM: tl.constexpr, DK_FORM: tl.constexpr, DV_FORM: tl.constexpr,
    C: tl.constexpr, E: tl.constexpr, C_PAD: tl.constexpr, E_PAD: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NORMED: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values from those of what `relational_pack` made of them."""
    blocks = tl.cdiv(SIZE[0] * SIZE[1] * SIZE[2], BLOCK_P)
    clip = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    if NEED_K:
        unpack_clip(k, dk_rows, dk, clip, n, eps, SIZE, K_STRIDES, DK_STRIDES, K_FORM, DK_FORM, C, C_PAD, NORMED, ACC)
    if NEED_V:
        unpack_clip(v, dv_rows, dv, clip, n, eps, SIZE, V_STRIDES, DV_STRIDES, V_FORM, DV_FORM, E, E_PAD, NORMED, ACC)
