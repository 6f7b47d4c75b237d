"""Relational self-attention (RSA equations 5-12), per position n of a clip with its M neighbours n + m:

    a_n = q_n A1,  z_n = a_n A2^T,  y_n = z_n A3       A1 = P1 + K*H1 (C, D), A2 = V^T H2 (E, D), A3 = I + V^T G (E, F)

and backwards dz = dy A3^T, da = dz A2, dq = da A1^T: the same two steps, run the other way. So the forward and the
chain of the backward share their parts, and nothing of positions x C x D is ever written.

Floor: operations. Per position M C D for A1, then in the first order of evaluation M E (D + F) for A2 and A3, and in
the second, by kernels kappa = a H2^T and correlations s = z V^T per neighbour and query, L M (D + 2 E + F): the first
is the cheaper one where E <= 2 L. Bytes are few: q and y once, keys and values L times smaller.

Tiling: a program owns BLOCK_P positions of a clip. `pack` has normalised keys and values and laid them out channels
last, so that a neighbour is a run of 16-byte loads, and has padded the weights, so that the loops need no masks but
that of the clip's border. Neighbours (BLOCK_P, BLOCK_M, channels) are gathered straight into the product's operand and
the products contract over taps, BLOCK_M at a time: batched over channels for A1, whose weights differ by channel, over
channels and positions at once for A2 and A3, and over positions in the second order. Queries sit in the last dimension
of every product, where tensor cores take eight. Weights are read once per program, from the second-level cache.
"""

import triton
import triton.language as tl

from .common import dot, operand

# A clip's strides are a tuple (B, query, channel, T, H, W). FORM is how they are to be read, see `clip_layout`.


@triton.jit
def cells_at(n, SIZE: tl.constexpr, STRIDES, FORM: tl.constexpr):
    """Offsets of positions n within a clip of SIZE = (T, H, W)."""
    FLAT: tl.constexpr = FORM[0]
    ALIGN: tl.constexpr = FORM[1]
    CHANNELS_LAST: tl.constexpr = FORM[2]
    wide = n.to(tl.int64)  # each product from an int64 on: a stride alone may exceed int32
    if FLAT:
        offsets = wide * STRIDES[5]
    else:
        offsets = (wide % SIZE[2]) * STRIDES[5]
    if CHANNELS_LAST:
        offsets = offsets * ALIGN
    if not FLAT:
        rows = wide // SIZE[2]
        offsets += ((rows % SIZE[1]) * STRIDES[4] + (rows // SIZE[1]) * STRIDES[3]) * ALIGN
    return offsets


@triton.jit
def clip_at(x, clip, n, c, query, SIZE: tl.constexpr, STRIDES, FORM: tl.constexpr):
    """Pointers (positions, channels, queries) into a clip."""
    ALIGN: tl.constexpr = FORM[1]
    CHANNELS_LAST: tl.constexpr = FORM[2]
    by_c = c.to(tl.int64) * STRIDES[2]
    if not CHANNELS_LAST:
        by_c = by_c * ALIGN
    by_query = query.to(tl.int64) * STRIDES[1] * ALIGN
    x += clip.to(tl.int64) * STRIDES[0] * ALIGN
    return x + cells_at(n, SIZE, STRIDES, FORM)[:, None, None] + by_c[None, :, None] + by_query[None, None, :]


@triton.jit
def load_clip(x, clip, n, c, query, SIZE: tl.constexpr, STRIDES, FORM: tl.constexpr, C: tl.constexpr, L: tl.constexpr):
    """x (positions, channels, queries), 0 beyond them and outside the clip."""
    there = ((n >= 0) & (n < SIZE[0] * SIZE[1] * SIZE[2]))[:, None, None]
    there = there & (c < C)[None, :, None] & (query < L)[None, None, :]
    return tl.load(clip_at(x, clip, n, c, query, SIZE, STRIDES, FORM), mask=there, other=0.0)


@triton.jit
def rows_at(clip, n, c, query, SIZE: tl.constexpr, C: tl.constexpr, L: tl.constexpr):
    """Offsets (positions, channels, queries) into rows (B, T*H*W, L, C), the form of what the kernels keep."""
    cells = clip.to(tl.int64) * (SIZE[0] * SIZE[1] * SIZE[2]) + n
    return (cells * (L * C))[:, None, None] + (query * C)[None, None, :] + c[None, :, None]


@triton.jit
def load_rows(x, clip, n, c, query, SIZE: tl.constexpr, C: tl.constexpr, L: tl.constexpr):
    """x (positions, channels, queries) of rows, 0 beyond them and outside the clip."""
    there = ((n >= 0) & (n < SIZE[0] * SIZE[1] * SIZE[2]))[:, None, None]
    there = there & (c < C)[None, :, None] & (query < L)[None, None, :]
    return tl.load(x + rows_at(clip, n, c, query, SIZE, C, L), mask=there, other=0.0)


@triton.jit
def store_rows(x, tile, clip, n, c, query, SIZE: tl.constexpr, C: tl.constexpr, L: tl.constexpr):
    """The reverse of `load_rows`."""
    there = (n < SIZE[0] * SIZE[1] * SIZE[2])[:, None, None] & (c < C)[None, :, None] & (query < L)[None, None, :]
    tl.store(x + rows_at(clip, n, c, query, SIZE, C, L), tile.to(x.dtype.element_ty), mask=there)


@triton.jit
def window(x, clip, n, m, c, SIZE: tl.constexpr, WINDOW: tl.constexpr, C_PAD: tl.constexpr):
    """Channels c of the neighbours m of positions n, (positions, taps, channels), 0 outside the clip.

    x is packed: (B, T*H*W, C_PAD).
    """
    dt = m // (WINDOW[1] * WINDOW[2]) - WINDOW[0] // 2
    dh = m // WINDOW[2] % WINDOW[1] - WINDOW[1] // 2
    dw = m % WINDOW[2] - WINDOW[2] // 2
    t = (n // (SIZE[1] * SIZE[2]))[:, None] + dt[None, :]
    h = (n // SIZE[2] % SIZE[1])[:, None] + dh[None, :]
    w = (n % SIZE[2])[:, None] + dw[None, :]
    # unsigned: a negative one is large
    there = (t.to(tl.uint32) < SIZE[0]) & (h.to(tl.uint32) < SIZE[1]) & (w.to(tl.uint32) < SIZE[2])
    there = there & (m < WINDOW[0] * WINDOW[1] * WINDOW[2])[None, :]  # a weight of 0 would not stop a NaN
    cells = clip.to(tl.int64) * (SIZE[0] * SIZE[1] * SIZE[2]) + ((t * SIZE[1] + h) * SIZE[2] + w)
    there = there[:, :, None]
    if c.shape[0] > C_PAD:  # eight channels, where a product takes sixteen
        there = there & (c < C_PAD)[None, None, :]
    return tl.load(x + (cells * C_PAD)[:, :, None] + c[None, None, :], mask=there, other=0.0)


@triton.jit
def taps(weights, m, d, D_PAD: tl.constexpr):
    """Packed weights (taps, features): every row and column is there."""
    return tl.load(weights + m[:, None] * D_PAD + d[None, :])


@triton.jit
def pack_clip(x, packed, clip, n, eps, SIZE: tl.constexpr, STRIDES, FORM: tl.constexpr, C: tl.constexpr,
              C_PAD: tl.constexpr, NORMED: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """x, normalised over its channels, as (B, T*H*W, C_PAD)."""
    c = tl.arange(0, C_PAD)
    one = tl.arange(0, 1)
    tile = load_clip(x, clip, n, c, one, SIZE, STRIDES, FORM, C, 1)
    if NORMED:
        wide = tile.to(ACC)
        tile = wide / tl.sqrt(tl.sum(wide * wide, 1) + eps)[:, None, :]
    store_rows(packed, tile, clip, n, c, one, SIZE, C_PAD, 1)


@triton.jit
def pack_matrix(x, packed, i, ROWS: tl.constexpr, COLUMNS: tl.constexpr, C_PAD: tl.constexpr, STRIDES):
    """Rows i of the matrix x (ROWS, COLUMNS), of any strides, with zeros beyond both."""
    j = tl.arange(0, C_PAD)
    x += i.to(tl.int64)[:, None] * STRIDES[0] + j.to(tl.int64)[None, :] * STRIDES[1]
    tile = tl.load(x, mask=(i < ROWS)[:, None] & (j < COLUMNS)[None, :], other=0.0)
    tl.store(packed + i[:, None] * C_PAD + j[None, :], tile)


@triton.jit
def relational_pack(
    k, v, h1, p1, h2, g, identity, kn, vn, h1_packed, p1_packed, h2_packed, g_packed, identity_packed, eps, clips,
    SIZE: tl.constexpr, K_STRIDES, V_STRIDES, H1_STRIDES, P1_STRIDES, H2_STRIDES, G_STRIDES, I_STRIDES,
    K_FORM: tl.constexpr, V_FORM: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    C_PAD: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, F_PAD: tl.constexpr, M_PAD: tl.constexpr,
    HAS_H1: tl.constexpr, HAS_P1: tl.constexpr, HAS_G: tl.constexpr, HAS_IDENTITY: tl.constexpr,
    NORMED: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Everything in the form the other kernels read: keys and values, then H1 by channel, then the other weights."""
    blocks = tl.cdiv(SIZE[0] * SIZE[1] * SIZE[2], BLOCK_P)
    program = tl.program_id(0)
    weights = program - clips * blocks
    rows = tl.arange(0, BLOCK_M)
    if weights < 0:
        n = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        if HAS_H1:
            pack_clip(k, kn, program // blocks, n, eps, SIZE, K_STRIDES, K_FORM, C, C_PAD, NORMED, ACC)
        pack_clip(v, vn, program // blocks, n, eps, SIZE, V_STRIDES, V_FORM, E, E_PAD, NORMED, ACC)
    elif weights == 0:
        for first in range(0, M_PAD, BLOCK_M):
            pack_matrix(h2, h2_packed, first + rows, M, D, D_PAD, H2_STRIDES)
            if HAS_G:
                pack_matrix(g, g_packed, first + rows, M, F, F_PAD, G_STRIDES)
        if HAS_P1:
            for first in range(0, tl.maximum(C_PAD, 16), 16):
                pack_matrix(p1, p1_packed, first + tl.arange(0, 16), C, D, D_PAD, P1_STRIDES)
        if HAS_IDENTITY:
            for first in range(0, tl.maximum(E_PAD, 16), 16):
                pack_matrix(identity, identity_packed, first + tl.arange(0, 16), E, F, F_PAD, I_STRIDES)
    elif HAS_H1:
        c = weights - 1
        own = tl.where(c < C, M, 0)
        h1 += tl.minimum(c, C - 1).to(tl.int64) * H1_STRIDES[0]
        for first in range(0, M_PAD, BLOCK_M):
            i = first + rows
            j = tl.arange(0, D_PAD)
            at = h1 + i.to(tl.int64)[:, None] * H1_STRIDES[1] + j.to(tl.int64)[None, :] * H1_STRIDES[2]
            tile = tl.load(at, mask=(i < own)[:, None] & (j < D)[None, :], other=0.0)
            tl.store(h1_packed + (c * M_PAD + i)[:, None] * D_PAD + j[None, :], tile)


@triton.jit
def keys_by_h1(kn, h1, p1, clip, n, c, SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_H1: tl.constexpr,
               HAS_P1: tl.constexpr, M_PAD: tl.constexpr, C_PAD: tl.constexpr, D_PAD: tl.constexpr,
               BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """A1 = P1 + K*H1 for channels c: (BLOCK_C, BLOCK_P, D_PAD)."""
    d = tl.arange(0, D_PAD)
    a1 = tl.zeros((BLOCK_C, BLOCK_P, D_PAD), ACC)
    if HAS_P1:
        a1 += taps(p1, c, d, D_PAD).to(ACC)[:, None, :]
    if HAS_H1:
        for first in range(0, M_PAD, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            keys = tl.permute(window(kn, clip, n, m, c, SIZE, WINDOW, C_PAD), (2, 0, 1))
            weights = tl.load(h1 + (c[:, None, None] * M_PAD + m[None, :, None]) * D_PAD + d[None, None, :])
            a1 = dot(keys, weights, a1, kn.dtype.element_ty, PRECISION)
    return a1


@triton.jit
def contract(x, y, total, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + x y for x (positions, i, j) and y (positions, j, queries)."""
    x = operand(x, OPERAND)
    y = operand(y, OPERAND)
    J: tl.constexpr = x.shape[2]
    if J < 16:  # a product takes sixteen: zeros between
        x = tl.reshape(tl.join(x, tl.zeros_like(x)), (x.shape[0], x.shape[1], 2 * J))
        y = tl.permute(tl.join(y, tl.zeros_like(y)), (0, 1, 3, 2))
        y = tl.reshape(y, (y.shape[0], 2 * J, y.shape[3]))
    return dot(x, y, total, OPERAND, PRECISION)


@triton.jit
def collect(u, weights, vn, clip, n, SIZE: tl.constexpr, WINDOW: tl.constexpr, M_PAD: tl.constexpr,
            E_PAD: tl.constexpr, E_WIDE: tl.constexpr, U_PAD: tl.constexpr, BLOCK_P: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Values under the kernels u W^T: sum_m (u . W_m) V[n + m], (BLOCK_P, E_WIDE, BLOCK_L).

    u is (BLOCK_P, U_PAD, BLOCK_L).
    """
    OPERAND: tl.constexpr = vn.dtype.element_ty
    e = tl.arange(0, E_WIDE)
    columns = tl.reshape(tl.permute(operand(u, OPERAND), (1, 0, 2)), (U_PAD, BLOCK_P * BLOCK_L))
    z = tl.zeros((BLOCK_P, E_WIDE, BLOCK_L), ACC)
    for first in range(0, M_PAD, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        kernels = dot(taps(weights, m, tl.arange(0, U_PAD), U_PAD), columns,
                      tl.zeros((BLOCK_M, BLOCK_P * BLOCK_L), ACC), OPERAND, PRECISION)  # fmt: skip
        kernels = tl.permute(tl.reshape(operand(kernels, OPERAND), (BLOCK_M, BLOCK_P, BLOCK_L)), (1, 0, 2))
        values = window(vn, clip, n, m, e, SIZE, WINDOW, E_PAD)
        z = dot(tl.permute(values, (0, 2, 1)), kernels, z, OPERAND, PRECISION)
    return z


@triton.jit
def correlate(z, weights, vn, clip, n, SIZE: tl.constexpr, WINDOW: tl.constexpr, M_PAD: tl.constexpr,
              E_PAD: tl.constexpr, E_WIDE: tl.constexpr, U_PAD: tl.constexpr, BLOCK_P: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Correlations with the values, projected: sum_m (z . V[n + m]) W_m, (BLOCK_P, U_PAD, BLOCK_L)."""
    OPERAND: tl.constexpr = vn.dtype.element_ty
    e = tl.arange(0, E_WIDE)
    z = operand(z, OPERAND)
    y = tl.zeros((U_PAD, BLOCK_P * BLOCK_L), ACC)
    for first in range(0, M_PAD, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        values = window(vn, clip, n, m, e, SIZE, WINDOW, E_PAD)
        s = dot(values, z, tl.zeros((BLOCK_P, BLOCK_M, BLOCK_L), ACC), OPERAND, PRECISION)
        s = tl.reshape(tl.permute(operand(s, OPERAND), (1, 0, 2)), (BLOCK_M, BLOCK_P * BLOCK_L))
        y = dot(tl.trans(taps(weights, m, tl.arange(0, U_PAD), U_PAD)), s, y, OPERAND, PRECISION)
    return tl.permute(tl.reshape(y, (U_PAD, BLOCK_P, BLOCK_L)), (1, 0, 2))


@triton.jit
def mixed(z, identity, BACK: tl.constexpr, E_WIDE: tl.constexpr, F_PAD: tl.constexpr, BLOCK_P: tl.constexpr,
          BLOCK_L: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """z I (or I^T z with BACK) for z (BLOCK_P, ., BLOCK_L)."""
    OPERAND: tl.constexpr = identity.dtype.element_ty
    FROM: tl.constexpr = F_PAD if BACK else E_WIDE
    TO: tl.constexpr = E_WIDE if BACK else F_PAD
    matrix = taps(identity, tl.arange(0, E_WIDE), tl.arange(0, F_PAD), F_PAD)
    if not BACK:
        matrix = tl.trans(matrix)
    columns = tl.reshape(tl.permute(operand(z, OPERAND), (1, 0, 2)), (FROM, BLOCK_P * BLOCK_L))
    y = dot(matrix, columns, tl.zeros((TO, BLOCK_P * BLOCK_L), ACC), OPERAND, PRECISION)
    return tl.permute(tl.reshape(y, (TO, BLOCK_P, BLOCK_L)), (1, 0, 2))


@triton.jit
def values_by(h2, g, identity, vn, clip, n, e, SIZE: tl.constexpr, WINDOW: tl.constexpr, HAS_G: tl.constexpr,
              HAS_IDENTITY: tl.constexpr, M_PAD: tl.constexpr, E_PAD: tl.constexpr, D_PAD: tl.constexpr,
              F_PAD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
              ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A2 = V^T H2 and A3 = I + V^T G for channels e: (BLOCK_C, BLOCK_P, D_PAD) and (BLOCK_C, BLOCK_P, F_PAD)."""
    OPERAND: tl.constexpr = vn.dtype.element_ty
    d = tl.arange(0, D_PAD)
    f = tl.arange(0, F_PAD)
    a2 = tl.zeros((BLOCK_C * BLOCK_P, D_PAD), ACC)
    a3 = tl.zeros((BLOCK_C * BLOCK_P, F_PAD), ACC)
    for first in range(0, M_PAD, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        values = tl.permute(window(vn, clip, n, m, e, SIZE, WINDOW, E_PAD), (2, 0, 1))
        values = tl.reshape(values, (BLOCK_C * BLOCK_P, BLOCK_M))
        a2 = dot(values, taps(h2, m, d, D_PAD), a2, OPERAND, PRECISION)
        if HAS_G:
            a3 = dot(values, taps(g, m, f, F_PAD), a3, OPERAND, PRECISION)
    a3 = tl.reshape(a3, (BLOCK_C, BLOCK_P, F_PAD))
    if HAS_IDENTITY:
        a3 += taps(identity, e, f, F_PAD).to(ACC)[:, None, :]
    return tl.reshape(a2, (BLOCK_C, BLOCK_P, D_PAD)), a3


@triton.jit
def relational_forward(
    q, kn, vn, h1, p1, h2, g, identity, a_rows, z_rows, y, eps,
    SIZE: tl.constexpr, Q_STRIDES, Y_STRIDES, Q_FORM: tl.constexpr, Y_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    C_PAD: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, E_WIDE: tl.constexpr, F_PAD: tl.constexpr,
    M_PAD: tl.constexpr,
    HAS_H1: tl.constexpr, HAS_P1: tl.constexpr, HAS_G: tl.constexpr, HAS_IDENTITY: tl.constexpr,
    NORMED: tl.constexpr, SAVE: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """y, and with SAVE the rows of a, and of z where it is not y."""
    OPERAND: tl.constexpr = q.dtype.element_ty
    blocks = tl.cdiv(SIZE[0] * SIZE[1] * SIZE[2], BLOCK_P)
    clip = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    query = tl.arange(0, BLOCK_L)
    d = tl.arange(0, D_PAD)
    f = tl.arange(0, F_PAD)

    squares = tl.zeros((BLOCK_P, BLOCK_L), ACC)
    if HAS_H1 or HAS_P1:
        a = tl.zeros((BLOCK_P, D_PAD, BLOCK_L), ACC)
        for first in range(0, C_PAD, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            a1 = keys_by_h1(kn, h1, p1, clip, n, c, SIZE, WINDOW, HAS_H1, HAS_P1, M_PAD, C_PAD, D_PAD, BLOCK_P,
                            BLOCK_M, BLOCK_C, ACC, PRECISION)  # fmt: skip
            part = load_clip(q, clip, n, c, query, SIZE, Q_STRIDES, Q_FORM, C, L)
            if NORMED:
                squares += tl.sum(part.to(ACC) * part.to(ACC), 1)
            a = contract(tl.permute(operand(a1, OPERAND), (1, 2, 0)), part, a, OPERAND, PRECISION)
    else:
        a = load_clip(q, clip, n, d, query, SIZE, Q_STRIDES, Q_FORM, C, L).to(ACC)
        squares = tl.sum(a * a, 1)
    if NORMED:
        a = a / tl.sqrt(squares + eps)[:, None, :]
    if SAVE:
        store_rows(a_rows, a, clip, n, d, query, SIZE, D, L)

    there = (n < SIZE[0] * SIZE[1] * SIZE[2])[:, None, None] & (query < L)[None, None, :]
    if ORDER == "second":
        e = tl.arange(0, E_WIDE)
        z = collect(
            a, h2, vn, clip, n, SIZE, WINDOW, M_PAD, E_PAD, E_WIDE, D_PAD, BLOCK_P, BLOCK_M, BLOCK_L, ACC, PRECISION
        )
        if HAS_G:
            if SAVE:
                store_rows(z_rows, z, clip, n, e, query, SIZE, E, L)
            by_g = correlate(z, g, vn, clip, n, SIZE, WINDOW, M_PAD, E_PAD, E_WIDE, F_PAD, BLOCK_P, BLOCK_M, BLOCK_L,
                             ACC, PRECISION)  # fmt: skip
            if HAS_IDENTITY:
                by_g += mixed(z, identity, False, E_WIDE, F_PAD, BLOCK_P, BLOCK_L, ACC, PRECISION)
            tl.store(clip_at(y, clip, n, f, query, SIZE, Y_STRIDES, Y_FORM), by_g.to(y.dtype.element_ty),
                     mask=there & (f < F)[None, :, None])  # fmt: skip
        else:
            tl.store(clip_at(y, clip, n, e, query, SIZE, Y_STRIDES, Y_FORM), z.to(y.dtype.element_ty),
                     mask=there & (e < E)[None, :, None])  # fmt: skip
    else:
        a = operand(a, OPERAND)
        result = tl.zeros((BLOCK_P, F_PAD, BLOCK_L), ACC)
        for first in range(0, E_PAD, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            a2, a3 = values_by(h2, g, identity, vn, clip, n, e, SIZE, WINDOW, HAS_G, HAS_IDENTITY, M_PAD, E_PAD,
                               D_PAD, F_PAD, BLOCK_P, BLOCK_M, BLOCK_E, ACC, PRECISION)  # fmt: skip
            z = dot(tl.permute(operand(a2, OPERAND), (1, 0, 2)), a, tl.zeros((BLOCK_P, BLOCK_E, BLOCK_L), ACC), OPERAND,
                    PRECISION)  # fmt: skip
            if HAS_G:
                if SAVE:
                    store_rows(z_rows, z, clip, n, e, query, SIZE, E, L)
                result = contract(tl.permute(operand(a3, OPERAND), (1, 2, 0)), z, result, OPERAND, PRECISION)
            else:
                tl.store(clip_at(y, clip, n, e, query, SIZE, Y_STRIDES, Y_FORM), z.to(y.dtype.element_ty),
                         mask=there & (e < E)[None, :, None])  # fmt: skip
        if HAS_G:
            tl.store(clip_at(y, clip, n, f, query, SIZE, Y_STRIDES, Y_FORM), result.to(y.dtype.element_ty),
                     mask=there & (f < F)[None, :, None])  # fmt: skip


@triton.jit
def relational_backward(
    dy, q, a_rows, kn, vn, h1, p1, h2, g, identity, dz_rows, da_rows, scales, dq, eps,
    SIZE: tl.constexpr, DY_STRIDES, Q_STRIDES, DQ_STRIDES, DY_FORM: tl.constexpr, Q_FORM: tl.constexpr,
    DQ_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    C_PAD: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, E_WIDE: tl.constexpr, F_PAD: tl.constexpr,
    M_PAD: tl.constexpr,
    HAS_H1: tl.constexpr, HAS_P1: tl.constexpr, HAS_G: tl.constexpr, HAS_IDENTITY: tl.constexpr,
    NORMED: tl.constexpr, NEED_Q: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The rows of dz and da, q's scales 1 / sqrt(sum q^2 + eps), and with NEED_Q dq."""
    OPERAND: tl.constexpr = q.dtype.element_ty
    blocks = tl.cdiv(SIZE[0] * SIZE[1] * SIZE[2], BLOCK_P)
    clip = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    query = tl.arange(0, BLOCK_L)
    d = tl.arange(0, D_PAD)
    f = tl.arange(0, F_PAD)

    if ORDER == "second":
        e = tl.arange(0, E_WIDE)
        if HAS_G:
            by_y = load_clip(dy, clip, n, f, query, SIZE, DY_STRIDES, DY_FORM, F, L)
            dz = collect(by_y, g, vn, clip, n, SIZE, WINDOW, M_PAD, E_PAD, E_WIDE, F_PAD, BLOCK_P, BLOCK_M, BLOCK_L,
                         ACC, PRECISION)  # fmt: skip
            if HAS_IDENTITY:
                dz += mixed(by_y, identity, True, E_WIDE, F_PAD, BLOCK_P, BLOCK_L, ACC, PRECISION)
        else:
            dz = load_clip(dy, clip, n, e, query, SIZE, DY_STRIDES, DY_FORM, E, L).to(ACC)
        store_rows(dz_rows, dz, clip, n, e, query, SIZE, E, L)
        da = correlate(dz, h2, vn, clip, n, SIZE, WINDOW, M_PAD, E_PAD, E_WIDE, D_PAD, BLOCK_P, BLOCK_M, BLOCK_L, ACC,
                       PRECISION)  # fmt: skip
    else:
        da = tl.zeros((BLOCK_P, D_PAD, BLOCK_L), ACC)
        if HAS_G:
            by_y = load_clip(dy, clip, n, f, query, SIZE, DY_STRIDES, DY_FORM, F, L)
        for first in range(0, E_PAD, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            a2, a3 = values_by(h2, g, identity, vn, clip, n, e, SIZE, WINDOW, HAS_G, HAS_IDENTITY, M_PAD, E_PAD,
                               D_PAD, F_PAD, BLOCK_P, BLOCK_M, BLOCK_E, ACC, PRECISION)  # fmt: skip
            if HAS_G:
                dz = dot(tl.permute(operand(a3, OPERAND), (1, 0, 2)), by_y, tl.zeros((BLOCK_P, BLOCK_E, BLOCK_L), ACC),
                         OPERAND, PRECISION)  # fmt: skip
            else:
                dz = load_clip(dy, clip, n, e, query, SIZE, DY_STRIDES, DY_FORM, E, L)
            store_rows(dz_rows, dz, clip, n, e, query, SIZE, E, L)
            da = contract(tl.permute(operand(a2, OPERAND), (1, 2, 0)), dz, da, OPERAND, PRECISION)
    store_rows(da_rows, da, clip, n, d, query, SIZE, D, L)

    there = (n < SIZE[0] * SIZE[1] * SIZE[2])[:, None, None] & (query < L)[None, None, :]
    scale = tl.full((BLOCK_P, BLOCK_L), 1.0, ACC)
    along = tl.zeros((BLOCK_P, BLOCK_L), ACC)  # q^ . dq^, which is a . da
    if NORMED:
        squares = tl.zeros((BLOCK_P, BLOCK_L), ACC)
        for first in range(0, C_PAD, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            part = load_clip(q, clip, n, c, query, SIZE, Q_STRIDES, Q_FORM, C, L).to(ACC)
            squares += tl.sum(part * part, 1)
        scale = 1 / tl.sqrt(squares + eps)
        cells = clip.to(tl.int64) * (SIZE[0] * SIZE[1] * SIZE[2]) + n
        tl.store(scales + (cells * L)[:, None] + query[None, :], scale, mask=tl.reshape(there, (BLOCK_P, BLOCK_L)))
        if NEED_Q:
            along = tl.sum(load_rows(a_rows, clip, n, d, query, SIZE, D, L).to(ACC) * da, 1)
    if NEED_Q and (HAS_H1 or HAS_P1):
        by_a = operand(da, OPERAND)
        for first in range(0, C_PAD, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            a1 = keys_by_h1(kn, h1, p1, clip, n, c, SIZE, WINDOW, HAS_H1, HAS_P1, M_PAD, C_PAD, D_PAD, BLOCK_P,
                            BLOCK_M, BLOCK_C, ACC, PRECISION)  # fmt: skip
            by_q = dot(tl.permute(operand(a1, OPERAND), (1, 0, 2)), by_a, tl.zeros((BLOCK_P, BLOCK_C, BLOCK_L), ACC),
                       OPERAND, PRECISION)  # fmt: skip
            if NORMED:
                part = load_clip(q, clip, n, c, query, SIZE, Q_STRIDES, Q_FORM, C, L).to(ACC) * scale[:, None, :]
                by_q = (by_q - part * along[:, None, :]) * scale[:, None, :]
            tl.store(clip_at(dq, clip, n, c, query, SIZE, DQ_STRIDES, DQ_FORM), by_q.to(dq.dtype.element_ty),
                     mask=there & (c < C)[None, :, None])  # fmt: skip
    elif NEED_Q:  # a is q
        by_q = da
        if NORMED:
            part = load_clip(q, clip, n, d, query, SIZE, Q_STRIDES, Q_FORM, C, L).to(ACC) * scale[:, None, :]
            by_q = (da - part * along[:, None, :]) * scale[:, None, :]
        tl.store(clip_at(dq, clip, n, d, query, SIZE, DQ_STRIDES, DQ_FORM), by_q.to(dq.dtype.element_ty),
                 mask=there & (d < D)[None, :, None])  # fmt: skip
