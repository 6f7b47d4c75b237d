"""Gradients of relational self-attention for keys, values and weights, all of them gathers over windows:

    dK[p, c] = sum_m sum_d H1[m, c, d] dA1[p - m, c, d]                    dA1[n, c, d] = sum_l q[n, l, c] da[n, l, d]
    dV[p, e] = sum_m sum_l (a[p - m, l] . H2[m]) dz[p - m, l, e] + (dy[p - m, l] . G[m]) z[p - m, l, e]
    dH1[m, c, d] = sum_n K[n + m, c] dA1[n, c, d]                          dP1[c, d] = sum_n dA1[n, c, d]
    dH2[m, d] = sum_n sum_l (dz[n, l] . V[n + m]) a[n, l, d]               dI[e, f] = sum_n sum_l z[n, l, e] dy[n, l, f]
    dG[m, f] = sum_n sum_l (z[n, l] . V[n + m]) dy[n, l, f]

Floor: operations. Per position M C D for each of dK and dH1, L M (D + 2 E + F) for dV and for dH2 and dG together.

Tiling of dK and dV ("fold"): a program owns a tile of PLANE_H x PLANE_W positions p of a frame (and BLOCK_C channels of
K). For each frame that a tap leads back to it walks the positions n from which the tile can be reached, BLOCK_S at a
time, and each pair (n, p) takes the tap that leads from one to the other. Nobody writes to a neighbour, and no atomics
are needed. dV takes the weights of that tap: H2's row times a is the kernel of the pair, L numbers that weigh dz. dK,
whose weights differ by channel, forms dA1 on chip, multiplies it with all taps of the frame, and picks the products:
what they cost is shared by the positions they lead to.
Tiling of the weights: a program owns BLOCK_M taps (and BLOCK_C channels and BLOCK_D latent channels of H1) and walks
every SPLITS-th block of positions; its sum is one of SPLITS, which are added afterwards in fixed order. Programs beyond
the taps do the same for P1 and I.
"""

import triton
import triton.language as tl

from .common import dot, operand
from .relational import clip_at, load_clip, load_rows, window


@triton.jit
def outer(x, y, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """sum_l x[n, i, l] y[n, j, l] for x (positions, i, queries) and y (positions, j, queries)."""
    zero = tl.zeros((x.shape[0], x.shape[1], y.shape[1]), ACC)
    return dot(operand(x, OPERAND), tl.permute(operand(y, OPERAND), (0, 2, 1)), zero, OPERAND, PRECISION)


@triton.jit
def products(x, y, total, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + sum_n sum_l x[n, i, l] y[n, j, l]: (i, j)."""
    ROWS: tl.constexpr = x.shape[0] * x.shape[2]
    x = tl.reshape(tl.permute(operand(x, OPERAND), (1, 0, 2)), (x.shape[1], ROWS))
    y = tl.reshape(tl.permute(operand(y, OPERAND), (0, 2, 1)), (ROWS, y.shape[1]))
    return dot(x, y, total, OPERAND, PRECISION)


@triton.jit
def across(weights, x, total, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + sum_n sum_l weights[n, p, l] x[n, e, l]: (p, e)."""
    ROWS: tl.constexpr = x.shape[0] * x.shape[2]
    weights = tl.reshape(tl.permute(operand(weights, OPERAND), (1, 0, 2)), (weights.shape[1], ROWS))
    x = tl.reshape(tl.permute(x, (0, 2, 1)), (ROWS, x.shape[1]))
    return dot(weights, x, total, OPERAND, PRECISION)


@triton.jit
def tile_of(tile, SIZE: tl.constexpr, PLANE_H: tl.constexpr, PLANE_W: tl.constexpr):
    """Frame, rows and columns of the positions of a tile, and the first row and column."""
    down: tl.constexpr = (SIZE[1] + PLANE_H - 1) // PLANE_H
    across: tl.constexpr = (SIZE[2] + PLANE_W - 1) // PLANE_W
    top = tile // across % down * PLANE_H
    left = tile % across * PLANE_W
    lane = tl.arange(0, PLANE_H * PLANE_W)
    return tile // (across * down), top + lane // PLANE_W, left + lane % PLANE_W, top, left


@triton.jit
def span(first, LENGTH: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr):
    """First and number of the places on an axis from which one of its K taps leads into the tile at `first`."""
    low = tl.maximum(first - (K - 1 - K // 2), 0)
    high = tl.minimum(first + TILE - 1 + K // 2, LENGTH - 1)
    return low, high - low + 1


@triton.jit
def leading(h, w, from_h, from_w, WINDOW: tl.constexpr):
    """The tap within a frame that leads from n = (from_h, from_w) to p = (h, w), and whether there is one: (n, p)."""
    by_h = h[None, :] - from_h[:, None] + WINDOW[1] // 2
    by_w = w[None, :] - from_w[:, None] + WINDOW[2] // 2
    reach = (by_h.to(tl.uint32) < WINDOW[1]) & (by_w.to(tl.uint32) < WINDOW[2])  # a negative one is large
    return by_h * WINDOW[2] + by_w, reach


@triton.jit
def relational_fold_keys(
    q, da_rows, scales, h1, dk_rows,
    SIZE: tl.constexpr, Q_STRIDES, Q_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, C_PAD: tl.constexpr, D_PAD: tl.constexpr, M_PAD: tl.constexpr,
    NORMED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PLANE_H: tl.constexpr, PLANE_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The rows of the normalised keys' gradient."""
    OPERAND: tl.constexpr = q.dtype.element_ty
    tiles: tl.constexpr = (SIZE[0] * ((SIZE[1] + PLANE_H - 1) // PLANE_H)) * ((SIZE[2] + PLANE_W - 1) // PLANE_W)
    channels: tl.constexpr = C_PAD // BLOCK_C
    plane: tl.constexpr = WINDOW[1] * WINDOW[2]
    program = tl.program_id(0)
    clip = program // channels // tiles
    c = program % channels * BLOCK_C + tl.arange(0, BLOCK_C)
    t, h, w, top, left = tile_of(program // channels % tiles, SIZE, PLANE_H, PLANE_W)
    from_top, rows = span(top, SIZE[1], PLANE_H, WINDOW[1])
    from_left, columns = span(left, SIZE[2], PLANE_W, WINDOW[2])
    query = tl.arange(0, BLOCK_L)
    pairs = tl.zeros((BLOCK_C, BLOCK_S, PLANE_H * PLANE_W), ACC)
    first_frame = tl.maximum(t + WINDOW[0] // 2 - SIZE[0] + 1, 0)
    for frame in range(first_frame, tl.minimum(t + WINDOW[0] // 2 + 1, WINDOW[0])):
        for block in range(0, rows * columns, BLOCK_S):
            source = block + tl.arange(0, BLOCK_S)
            from_h = from_top + source // columns
            from_w = from_left + source % columns
            n = ((t - frame + WINDOW[0] // 2) * SIZE[1] + from_h) * SIZE[2] + from_w
            n = tl.where(source < rows * columns, n, -1)  # loads are 0 there
            tap, reach = leading(h, w, from_h, from_w, WINDOW)
            part = load_clip(q, clip, n, c, query, SIZE, Q_STRIDES, Q_FORM, C, L)
            if NORMED:
                part = part.to(ACC) * load_rows(scales, clip, n, tl.arange(0, 1), query, SIZE, 1, L)
            for first in range(0, plane, TAPS):
                m = tl.minimum(frame * plane + first + tl.arange(0, TAPS), M_PAD - 1)
                u = tl.zeros((BLOCK_C, BLOCK_S, TAPS), ACC)
                for first_d in range(0, D_PAD, BLOCK_D):
                    d = first_d + tl.arange(0, BLOCK_D)
                    da1 = outer(part, load_rows(da_rows, clip, n, d, query, SIZE, D, L), ACC, OPERAND, PRECISION)
                    weights = tl.load(h1 + (c[:, None, None] * M_PAD + m[None, :, None]) * D_PAD + d[None, None, :])
                    u = dot(tl.permute(operand(da1, OPERAND), (1, 0, 2)), tl.permute(weights, (0, 2, 1)), u, OPERAND,
                            PRECISION)  # fmt: skip
                here = reach & ((tap - first).to(tl.uint32) < TAPS)
                place = tl.broadcast_to(tl.where(here, tap - first, 0)[None, :, :], pairs.shape)
                pairs += tl.where(here[None, :, :], tl.gather(u, place, 2), 0.0)
    mine = (h < SIZE[1]) & (w < SIZE[2])
    cells = clip.to(tl.int64) * (SIZE[0] * SIZE[1] * SIZE[2]) + (t * SIZE[1] + h) * SIZE[2] + w
    tl.store(dk_rows + (cells * C)[None, :] + c[:, None], tl.sum(pairs, 1), mask=mine[None, :] & (c < C)[:, None])


@triton.jit
def relational_fold_values(
    a_rows, dz_rows, z_rows, dy, h2, g, dv_rows,
    SIZE: tl.constexpr, DY_STRIDES, DY_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, F_PAD: tl.constexpr,
    HAS_G: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PLANE_H: tl.constexpr, PLANE_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The rows of the normalised values' gradient."""
    OPERAND: tl.constexpr = a_rows.dtype.element_ty
    BLOCK_P: tl.constexpr = PLANE_H * PLANE_W
    tiles: tl.constexpr = (SIZE[0] * ((SIZE[1] + PLANE_H - 1) // PLANE_H)) * ((SIZE[2] + PLANE_W - 1) // PLANE_W)
    clip = tl.program_id(0) // tiles
    e = tl.arange(0, E_PAD)
    t, h, w, top, left = tile_of(tl.program_id(0) % tiles, SIZE, PLANE_H, PLANE_W)
    from_top, rows = span(top, SIZE[1], PLANE_H, WINDOW[1])
    from_left, columns = span(left, SIZE[2], PLANE_W, WINDOW[2])
    query = tl.arange(0, BLOCK_L)
    dv = tl.zeros((BLOCK_P, E_PAD), ACC)
    first_frame = tl.maximum(t + WINDOW[0] // 2 - SIZE[0] + 1, 0)
    for frame in range(first_frame, tl.minimum(t + WINDOW[0] // 2 + 1, WINDOW[0])):
        for block in range(0, rows * columns, BLOCK_S):
            source = block + tl.arange(0, BLOCK_S)
            from_h = from_top + source // columns
            from_w = from_left + source % columns
            n = ((t - frame + WINDOW[0] // 2) * SIZE[1] + from_h) * SIZE[2] + from_w
            n = tl.where(source < rows * columns, n, -1)  # loads are 0 there
            tap, reach = leading(h, w, from_h, from_w, WINDOW)
            tap += frame * (WINDOW[1] * WINDOW[2])
            kernels = tl.zeros((BLOCK_S, BLOCK_P, BLOCK_L), ACC)
            for first in range(0, D_PAD, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                row = tl.load(h2 + (tap * D_PAD)[:, :, None] + d[None, None, :], mask=reach[:, :, None], other=0.0)
                kernels = dot(row, load_rows(a_rows, clip, n, d, query, SIZE, D, L), kernels, OPERAND, PRECISION)
            dv = across(kernels, load_rows(dz_rows, clip, n, e, query, SIZE, E, L), dv, OPERAND, PRECISION)
            if HAS_G:
                s = tl.zeros((BLOCK_S, BLOCK_P, BLOCK_L), ACC)
                for first in range(0, F_PAD, BLOCK_D):
                    f = first + tl.arange(0, BLOCK_D)
                    row = tl.load(g + (tap * F_PAD)[:, :, None] + f[None, None, :], mask=reach[:, :, None], other=0.0)
                    by_y = load_clip(dy, clip, n, f, query, SIZE, DY_STRIDES, DY_FORM, F, L)
                    s = dot(row, by_y, s, OPERAND, PRECISION)
                dv = across(s, load_rows(z_rows, clip, n, e, query, SIZE, E, L), dv, OPERAND, PRECISION)
    mine = (h < SIZE[1]) & (w < SIZE[2])
    cells = clip.to(tl.int64) * (SIZE[0] * SIZE[1] * SIZE[2]) + (t * SIZE[1] + h) * SIZE[2] + w
    tl.store(dv_rows + (cells * E)[:, None] + e[None, :], dv, mask=mine[:, None] & (e < E)[None, :])


@triton.jit
def relational_by_h1(
    q, da_rows, scales, kn, by_h1, by_p1, clips,
    SIZE: tl.constexpr, Q_STRIDES, Q_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, C_PAD: tl.constexpr, D_PAD: tl.constexpr, M_PAD: tl.constexpr,
    HAS_H1: tl.constexpr, HAS_P1: tl.constexpr, NORMED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums by_h1 (SPLITS, C_PAD, M_PAD, D_PAD) and by_p1 (SPLITS, C_PAD, D_PAD)."""
    OPERAND: tl.constexpr = q.dtype.element_ty
    blocks: tl.constexpr = (SIZE[0] * SIZE[1] * SIZE[2] + BLOCK_P - 1) // BLOCK_P
    channels: tl.constexpr = C_PAD // BLOCK_C
    latents: tl.constexpr = D_PAD // BLOCK_D
    split = tl.program_id(0) % SPLITS
    rest = tl.program_id(0) // SPLITS
    c = rest % channels * BLOCK_C + tl.arange(0, BLOCK_C)
    d = rest // channels % latents * BLOCK_D + tl.arange(0, BLOCK_D)
    first = rest // (channels * latents) * BLOCK_M
    query = tl.arange(0, BLOCK_L)
    M_END: tl.constexpr = M_PAD if HAS_H1 else 0
    if first < M_END:
        m = first + tl.arange(0, BLOCK_M)
        sum_h1 = tl.zeros((BLOCK_C, BLOCK_M, BLOCK_D), ACC)
        for block in range(split, clips * blocks, SPLITS):
            clip = block // blocks
            n = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
            part = load_clip(q, clip, n, c, query, SIZE, Q_STRIDES, Q_FORM, C, L)
            if NORMED:
                part = part.to(ACC) * load_rows(scales, clip, n, tl.arange(0, 1), query, SIZE, 1, L)
            da1 = outer(part, load_rows(da_rows, clip, n, d, query, SIZE, D, L), ACC, OPERAND, PRECISION)
            keys = tl.permute(window(kn, clip, n, m, c, SIZE, WINDOW, C_PAD), (2, 1, 0))
            sum_h1 = dot(keys, tl.permute(operand(da1, OPERAND), (1, 0, 2)), sum_h1, OPERAND, PRECISION)
        rows = (split * C_PAD + c)[:, None] * M_PAD + m[None, :]
        tl.store(by_h1 + rows[:, :, None].to(tl.int64) * D_PAD + d[None, None, :], sum_h1)
    elif HAS_P1:
        sum_p1 = tl.zeros((BLOCK_P, BLOCK_C, BLOCK_D), ACC)
        for block in range(split, clips * blocks, SPLITS):
            clip = block // blocks
            n = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
            part = load_clip(q, clip, n, c, query, SIZE, Q_STRIDES, Q_FORM, C, L)
            if NORMED:
                part = part.to(ACC) * load_rows(scales, clip, n, tl.arange(0, 1), query, SIZE, 1, L)
            sum_p1 += outer(part, load_rows(da_rows, clip, n, d, query, SIZE, D, L), ACC, OPERAND, PRECISION)
        tl.store(by_p1 + (split * C_PAD + c)[:, None] * D_PAD + d[None, :], tl.sum(sum_p1, 0))


@triton.jit
def relational_by_h2(
    a_rows, dz_rows, z_rows, dy, vn, by_h2, by_g, by_identity, clips,
    SIZE: tl.constexpr, DY_STRIDES, DY_FORM: tl.constexpr, WINDOW: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr, E_WIDE: tl.constexpr, F_PAD: tl.constexpr, M_PAD: tl.constexpr,
    HAS_G: tl.constexpr, HAS_IDENTITY: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums by_h2 (SPLITS, M_PAD, D_PAD), by_g (SPLITS, M_PAD, F_PAD) and by_identity (SPLITS, E_WIDE, F_PAD)."""
    OPERAND: tl.constexpr = a_rows.dtype.element_ty
    blocks: tl.constexpr = (SIZE[0] * SIZE[1] * SIZE[2] + BLOCK_P - 1) // BLOCK_P
    split = tl.program_id(0) % SPLITS
    first = tl.program_id(0) // SPLITS * BLOCK_M
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, E_WIDE)
    f = tl.arange(0, F_PAD)
    query = tl.arange(0, BLOCK_L)
    if first < M_PAD:
        m = first + tl.arange(0, BLOCK_M)
        sum_h2 = tl.zeros((BLOCK_M, D_PAD), ACC)
        sum_g = tl.zeros((BLOCK_M, F_PAD), ACC)
        zero = tl.zeros((BLOCK_P, BLOCK_M, BLOCK_L), ACC)
        for block in range(split, clips * blocks, SPLITS):
            clip = block // blocks
            n = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
            values = window(vn, clip, n, m, e, SIZE, WINDOW, E_PAD)
            by_kernel = dot(values, load_rows(dz_rows, clip, n, e, query, SIZE, E, L), zero, OPERAND, PRECISION)
            sum_h2 = products(by_kernel, load_rows(a_rows, clip, n, d, query, SIZE, D, L), sum_h2, OPERAND, PRECISION)
            if HAS_G:
                s = dot(values, load_rows(z_rows, clip, n, e, query, SIZE, E, L), zero, OPERAND, PRECISION)
                by_y = load_clip(dy, clip, n, f, query, SIZE, DY_STRIDES, DY_FORM, F, L)
                sum_g = products(s, by_y, sum_g, OPERAND, PRECISION)
        tl.store(by_h2 + (split * M_PAD + m)[:, None] * D_PAD + d[None, :], sum_h2)
        if HAS_G:
            tl.store(by_g + (split * M_PAD + m)[:, None] * F_PAD + f[None, :], sum_g)
    elif HAS_IDENTITY:
        sum_i = tl.zeros((E_WIDE, F_PAD), ACC)
        for block in range(split, clips * blocks, SPLITS):
            clip = block // blocks
            n = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
            by_y = load_clip(dy, clip, n, f, query, SIZE, DY_STRIDES, DY_FORM, F, L)
            z = load_rows(z_rows, clip, n, e, query, SIZE, E, L)
            sum_i = products(z, by_y, sum_i, OPERAND, PRECISION)
        tl.store(by_identity + (split * E_WIDE + e)[:, None] * F_PAD + f[None, :], sum_i)


@triton.jit
def unpack_clip(x, rows, by_x, clip, n, eps, SIZE: tl.constexpr, STRIDES, BY_STRIDES, FORM: tl.constexpr,
                BY_FORM: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, NORMED: tl.constexpr,
                ACC: tl.constexpr):  # fmt: skip
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
