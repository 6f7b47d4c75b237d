"""Grouped bilinear attentional transform (BAT): in each frame f and unit of channels that share P, Q and R,

    z[c, f] = kron(P, I_a) x[c, f] kron(Q, I_b),    y[c, f'] = sum_f R[f', f] z[c, f]   over frames of one phase f mod d

and backwards, by the same tiles, dz = R^T dy, dx = kron(P, I)^T dz kron(Q, I)^T and the sums dP, dQ, dR.

Floor: bytes. The forward reads x once and writes y once, the backward reads x and dy once and writes dx once; P, Q and
R are read once per program, and their gradients leave as one row per program, to be summed in fixed order.

Tiling: kron(., I) leaves the place (u, v) of a cell within its coarse cell (j, l) alone. So a tile has coarse cells
down, all of them, padded to powers of two, and across BLOCK_N columns n = (channel, u, v): every column is transformed
by the same matrix. Up to some 64 coarse cells (7 x 7, 8 x 8) that matrix is kron(P, Q^T) itself, made on chip (JOINT):
one product of full tensor-core tiles, and one more for each gradient, whose sum over columns is folded to dP and dQ at
the end. For more coarse cells Q and P are applied one after the other, two products of Sw + Sh terms in place of
Sw * Sh. Columns run along the innermost axis of memory, so that what a warp loads is whole sectors. Where R mixes
frames (TS > 0), a program has its columns in all frames of a phase: the forward sums them as it goes; the backward
takes the sum of each frame's dz from dy of all of them, which it finds in the first-level cache from the second frame
on, and loops over tiles inside a frame, so that making and folding the matrix costs once for several. Where the frames
of a tile do not fit on chip, `bilinear_mix` is a pass of its own, in place.
"""

import triton
import triton.language as tl

from .common import dot

# How a clip is addressed: STRIDES (B, none, T, C, H, W) and FORM = (FLAT, ALIGN, CHANNELS_LAST, GAPLESS, WIDE), see
# `MapLayout`; SHAPE = (H, W, a, b) of a map, where a coarse cell is a rows of b columns. CELLS = (Sh, Sw, ROWS, COLS):
# how many coarse rows and columns, and padded to powers of two.


@triton.jit
def places(c, h, w, SHAPE: tl.constexpr, STRIDES, FORM: tl.constexpr):
    """Offsets of channels c, rows h and columns w within a frame."""
    FLAT: tl.constexpr = FORM[0]
    ALIGN: tl.constexpr = FORM[1]
    CHANNELS_LAST: tl.constexpr = FORM[2]
    GAPLESS: tl.constexpr = FORM[3]
    if FORM[4]:  # a stride alone may exceed int32
        c = c.to(tl.int64)
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    if GAPLESS:
        return c * (SHAPE[0] * SHAPE[1]) + (h * SHAPE[1] + w)
    else:
        by_c = c * STRIDES[3]
        if FLAT:
            by_p = (h * SHAPE[1] + w) * STRIDES[5]
        else:
            by_p = w * STRIDES[5]
        if CHANNELS_LAST:
            by_p = by_p * ALIGN
        else:
            by_c = by_c * ALIGN
        if not FLAT:
            by_p += h * STRIDES[4] * ALIGN
        return by_c + by_p


@triton.jit
def column(n, SHAPE: tl.constexpr, CU: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(channel within the unit, row and column within a coarse cell) of columns n of a tile."""
    if CHANNELS_LAST:
        return n % CU, n // (CU * SHAPE[3]), n // CU % SHAPE[3]
    else:
        return n // (SHAPE[2] * SHAPE[3]), n // SHAPE[3] % SHAPE[2], n % SHAPE[3]


@triton.jit
def tile_places(n, SHAPE: tl.constexpr, CELLS: tl.constexpr, CU: tl.constexpr, CHANNELS_LAST: tl.constexpr, STRIDES,
                FORM: tl.constexpr):  # fmt: skip
    """Offsets (coarse cells, columns n) within a unit's frame."""
    i = tl.arange(0, CELLS[2] * CELLS[3])
    c, u, v = column(n, SHAPE, CU, CHANNELS_LAST)
    down = places(i * 0, i // CELLS[3] * SHAPE[2], i % CELLS[3] * SHAPE[3], SHAPE, STRIDES, FORM)
    return down[:, None] + places(c, u, v, SHAPE, STRIDES, FORM)[None, :]


@triton.jit
def tile_there(n, SHAPE: tl.constexpr, CELLS: tl.constexpr, CU: tl.constexpr):
    """Which of the coarse cells and columns of a tile there are."""
    i = tl.arange(0, CELLS[2] * CELLS[3])
    down = (i // CELLS[3] < CELLS[0]) & (i % CELLS[3] < CELLS[1])
    return down[:, None] & (n < CU * SHAPE[2] * SHAPE[3])[None, :]


@triton.jit
def unit_start(b, c, frame, SHAPE: tl.constexpr, STRIDES, FORM: tl.constexpr):
    """Offset of channel c of a frame of clip b."""
    start = b * STRIDES[0] + frame * STRIDES[2]
    if FORM[3]:
        return start * FORM[1] + c * (SHAPE[0] * SHAPE[1])
    elif FORM[2]:
        return start * FORM[1] + c * STRIDES[3]
    else:
        return (start + c * STRIDES[3]) * FORM[1]


@triton.jit
def load_square(m, ROW, COLUMN, SIZE: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr):
    """A matrix (PAD, PAD) of strides ROW and COLUMN, 0 beyond SIZE."""
    i = tl.arange(0, PAD)
    here = i[:, None].to(tl.int64) * ROW + i[None, :].to(tl.int64) * COLUMN
    return tl.load(m + here, mask=(i < SIZE)[:, None] & (i < SIZE)[None, :], other=0.0).to(ACC)


@triton.jit
def store_square(m, tile, SIZE: tl.constexpr, PAD: tl.constexpr):
    """The reverse of `load_square`, row by row."""
    i = tl.arange(0, PAD)
    tl.store(m + i[:, None] * SIZE + i[None, :], tile, mask=(i < SIZE)[:, None] & (i < SIZE)[None, :])


@triton.jit
def load_weights(r, s, t, R_STRIDES, TS: tl.constexpr, ACC: tl.constexpr):
    """R[s, t], what frame t gives to frames s."""
    here = s.to(tl.int64) * R_STRIDES[2] + tl.cast(t, tl.int64) * R_STRIDES[3]
    return tl.load(r + here, mask=s < TS, other=0.0).to(ACC)


@triton.jit
def peak_of(m):
    """The largest absolute value of a matrix, or 1: float16 holds what is scaled by it, be it small or large."""
    best = tl.max(tl.max(tl.abs(m), 1), 0)
    return tl.where(best > 0, best, 1.0)


@triton.jit
def load_matrices(p, q, b, g, frame, P_STRIDES, Q_STRIDES, CELLS: tl.constexpr, ACC: tl.constexpr):
    """P (ROWS, ROWS) and Q (COLS, COLS) of a group in a frame."""
    p += b * P_STRIDES[0] + g * P_STRIDES[1] + frame * P_STRIDES[2]
    q += b * Q_STRIDES[0] + g * Q_STRIDES[1] + frame * Q_STRIDES[2]
    by_row = load_square(p, P_STRIDES[3], P_STRIDES[4], CELLS[0], CELLS[2], ACC)
    return by_row, load_square(q, Q_STRIDES[3], Q_STRIDES[4], CELLS[1], CELLS[3], ACC)


@triton.jit
def kron(by_row, by_column, CELLS: tl.constexpr):
    """kron(P, Q^T) over coarse cells: [(i, k), (j, l)] = P[i, j] Q[l, k]."""
    both = by_row[:, None, :, None] * tl.trans(by_column)[None, :, None, :]
    return tl.reshape(both, (CELLS[2] * CELLS[3], CELLS[2] * CELLS[3]))


@triton.jit
def fold(by_kron, by_row, by_column, CELLS: tl.constexpr):
    """dP and dQ of the gradient of kron(P, Q^T)."""
    by_kron = tl.reshape(by_kron, (CELLS[2], CELLS[3], CELLS[2], CELLS[3]))
    by_p = tl.sum(tl.sum(by_kron * tl.trans(by_column)[None, :, None, :], 3), 1)
    by_q = tl.sum(tl.sum(by_kron * by_row[:, None, :, None], 2), 0)
    return by_p, tl.trans(by_q)


@triton.jit
def rows_first(tile, CELLS: tl.constexpr, N: tl.constexpr):
    """(coarse cells, columns) -> (ROWS, columns * COLS)."""
    tile = tl.permute(tl.reshape(tile, (CELLS[2], CELLS[3], N)), (0, 2, 1))
    return tl.reshape(tile, (CELLS[2], N * CELLS[3]))


@triton.jit
def cells_first(tile, CELLS: tl.constexpr, N: tl.constexpr):
    """The reverse of `rows_first`."""
    tile = tl.permute(tl.reshape(tile, (CELLS[2], N, CELLS[3])), (0, 2, 1))
    return tl.reshape(tile, (CELLS[2] * CELLS[3], N))


@triton.jit
def across(tile, by_column, CELLS: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Each row of (ROWS, columns * COLS) times Q."""
    ROWS: tl.constexpr = CELLS[2]
    COLS: tl.constexpr = CELLS[3]
    flat = tl.reshape(tile, (ROWS * N, COLS))
    flat = dot(flat, by_column, tl.zeros((ROWS * N, COLS), ACC), OPERAND, PRECISION)
    return tl.reshape(flat, (ROWS, N * COLS))


@triton.jit
def transform(tile, first, second, scale, CELLS: tl.constexpr, N: tl.constexpr, JOINT: tl.constexpr, ACC: tl.constexpr,
              PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """z of a tile: by kron(P, Q^T), `first`, or by Q, `second`, and P, `first`."""
    ROWS: tl.constexpr = CELLS[2]
    COLS: tl.constexpr = CELLS[3]
    if JOINT:
        z = dot(first, tile, tl.zeros((ROWS * COLS, N), ACC), OPERAND, PRECISION)
    else:
        rows = across(rows_first(tile, CELLS, N), second, CELLS, N, ACC, OPERAND, PRECISION)
        rows = dot(first, rows, tl.zeros((ROWS, N * COLS), ACC), OPERAND, PRECISION)
        z = cells_first(rows, CELLS, N)
    if OPERAND == tl.float16:
        z = z * scale
    return z


@triton.jit
def operands(by_row, by_column, CELLS: tl.constexpr, JOINT: tl.constexpr, OPERAND: tl.constexpr):
    """What `transform` multiplies by, and the scales that float16 took from each."""
    p_scale = 1.0
    q_scale = 1.0
    if OPERAND == tl.float16:
        p_scale = peak_of(by_row)
        q_scale = peak_of(by_column)
        if not JOINT:  # a sum of so many terms is no larger than its features
            p_scale = p_scale * CELLS[2]
            q_scale = q_scale * CELLS[3]
        by_row = by_row / p_scale
        by_column = by_column / q_scale
    if JOINT:
        by_row = kron(by_row, by_column, CELLS)
    return by_row, by_column, p_scale, q_scale


@triton.jit
def share(BLOCKS: tl.constexpr, PHASES: tl.constexpr, UNITS: tl.constexpr):
    """What a program works on: (block of columns, phase or frame, unit, clip), all but the block as int64."""
    pid = tl.program_id(0)
    rest = pid // BLOCKS
    unit = rest // PHASES
    return pid % BLOCKS, (rest % PHASES).to(tl.int64), (unit % UNITS).to(tl.int64), (unit // UNITS).to(tl.int64)


@triton.jit
def bilinear_forward(
    x, p, q, r, y,
    X_STRIDES, P_STRIDES, Q_STRIDES, R_STRIDES, Y_STRIDES,
    SHAPE: tl.constexpr, CELLS: tl.constexpr, FRAMES: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr,
    MIXES: tl.constexpr, CU: tl.constexpr, TS: tl.constexpr, TS_PAD: tl.constexpr,
    X_FORM: tl.constexpr, Y_FORM: tl.constexpr, JOINT: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write y from x; with TS > 0 mix frames too. GROUPS and MIXES are how many P and R a clip has."""
    OPERAND: tl.constexpr = x.dtype.element_ty
    COLUMNS: tl.constexpr = CU * SHAPE[2] * SHAPE[3]
    PHASES: tl.constexpr = FRAMES // TS if TS > 0 else FRAMES
    blocks: tl.constexpr = (COLUMNS + BLOCK_N * STEPS - 1) // (BLOCK_N * STEPS)
    block, phase, unit, b = share(blocks, PHASES, UNITS)
    group = unit // (UNITS // GROUPS)

    if TS > 0:
        r += b * R_STRIDES[0] + unit // (UNITS // MIXES) * R_STRIDES[1]
        s = tl.arange(0, TS_PAD)
        y += unit_start(b, unit * CU, s.to(tl.int64) * PHASES + phase, SHAPE, Y_STRIDES, Y_FORM)[:, None, None]
        for step in range(0, STEPS):
            n = (block * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
            here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], X_STRIDES, X_FORM)
            there = tile_there(n, SHAPE, CELLS, CU)
            mixed = tl.zeros((TS_PAD, CELLS[2] * CELLS[3], BLOCK_N), ACC)
            for t in range(0, TS):
                frame = t * PHASES + phase
                by_row, by_column = load_matrices(p, q, b, group, frame, P_STRIDES, Q_STRIDES, CELLS, ACC)
                first, second, p_scale, q_scale = operands(by_row, by_column, CELLS, JOINT, OPERAND)
                from_x = x + unit_start(b, unit * CU, frame, SHAPE, X_STRIDES, X_FORM)
                tile = tl.load(from_x + here, mask=there, other=0.0)
                z = transform(tile, first, second, p_scale * q_scale, CELLS, BLOCK_N, JOINT, ACC, PRECISION, OPERAND)
                mixed += load_weights(r, s, t, R_STRIDES, TS, ACC)[:, None, None] * z[None, :, :]
            here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], Y_STRIDES, Y_FORM)
            all_there = (s < TS)[:, None, None] & there[None, :, :]
            tl.store(y + here[None, :, :], mixed.to(OPERAND), mask=all_there)
    else:
        by_row, by_column = load_matrices(p, q, b, group, phase, P_STRIDES, Q_STRIDES, CELLS, ACC)
        first, second, p_scale, q_scale = operands(by_row, by_column, CELLS, JOINT, OPERAND)
        x += unit_start(b, unit * CU, phase, SHAPE, X_STRIDES, X_FORM)
        y += unit_start(b, unit * CU, phase, SHAPE, Y_STRIDES, Y_FORM)
        for step in range(0, STEPS):
            n = (block * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
            there = tile_there(n, SHAPE, CELLS, CU)
            here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], X_STRIDES, X_FORM)
            tile = tl.load(x + here, mask=there, other=0.0)
            z = transform(tile, first, second, p_scale * q_scale, CELLS, BLOCK_N, JOINT, ACC, PRECISION, OPERAND)
            here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], Y_STRIDES, Y_FORM)
            tl.store(y + here, z.to(OPERAND), mask=there)


@triton.jit
def gradients(tile, grad, first, second, p_scale, q_scale, by_first, by_second, CELLS: tl.constexpr, N: tl.constexpr,
              JOINT: tl.constexpr, NEED_X: tl.constexpr, NEED_PQ: tl.constexpr, ACC: tl.constexpr,
              PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """dx of a tile from the gradient of its z, and the sums for `first` and `second` with this tile's share."""
    ROWS: tl.constexpr = CELLS[2]
    COLS: tl.constexpr = CELLS[3]
    by_tile = grad
    if JOINT:
        if NEED_X:
            by_tile = dot(tl.trans(first), grad, tl.zeros((ROWS * COLS, N), ACC), OPERAND, PRECISION)
        if NEED_PQ:
            by_first = dot(grad, tl.trans(tile), by_first, OPERAND, PRECISION)
    else:
        grad = rows_first(grad, CELLS, N)
        back = dot(tl.trans(first), grad, tl.zeros((ROWS, N * COLS), ACC), OPERAND, PRECISION)
        if NEED_X:
            by_tile = cells_first(across(back, tl.trans(second), CELLS, N, ACC, OPERAND, PRECISION), CELLS, N)
        if NEED_PQ:
            rows = rows_first(tile, CELLS, N)
            moved = across(rows, second, CELLS, N, ACC, OPERAND, PRECISION)
            rows = tl.reshape(rows, (ROWS * N, COLS))
            back = tl.reshape(back, (ROWS * N, COLS))
            if OPERAND == tl.float16:
                by_first += dot(grad, tl.trans(moved), tl.zeros_like(by_first), OPERAND, PRECISION) * q_scale
                by_second += dot(tl.trans(rows), back, tl.zeros_like(by_second), OPERAND, PRECISION) * p_scale
            else:
                by_first = dot(grad, tl.trans(moved), by_first, OPERAND, PRECISION)
                by_second = dot(tl.trans(rows), back, by_second, OPERAND, PRECISION)
    if OPERAND == tl.float16 and NEED_X:
        by_tile = by_tile * (p_scale * q_scale)
    return by_tile, by_first, by_second


@triton.jit
def zero_sums(CELLS: tl.constexpr, JOINT: tl.constexpr, ACC: tl.constexpr):
    """Of what `gradients` adds to."""
    ROWS: tl.constexpr = CELLS[2]
    COLS: tl.constexpr = CELLS[3]
    if JOINT:
        return tl.zeros((ROWS * COLS, ROWS * COLS), ACC), tl.zeros((COLS, COLS), ACC)
    else:
        return tl.zeros((ROWS, ROWS), ACC), tl.zeros((COLS, COLS), ACC)


@triton.jit
def store_sums(p_rows, q_rows, row, by_first, by_second, by_row, by_column, CELLS: tl.constexpr, JOINT: tl.constexpr):
    """One row of each gradient."""
    if JOINT:
        by_first, by_second = fold(by_first, by_row, by_column, CELLS)
    store_square(p_rows + row * (CELLS[0] * CELLS[0]), by_first, CELLS[0], CELLS[2])
    store_square(q_rows + row * (CELLS[1] * CELLS[1]), by_second, CELLS[1], CELLS[3])


@triton.jit
def bilinear_backward(
    dy, x, p, q, r, dx, p_rows, q_rows, r_rows,
    DY_STRIDES, X_STRIDES, P_STRIDES, Q_STRIDES, R_STRIDES, DX_STRIDES,
    SHAPE: tl.constexpr, CELLS: tl.constexpr, FRAMES: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr,
    MIXES: tl.constexpr, CU: tl.constexpr, TS: tl.constexpr, TS_PAD: tl.constexpr,
    DY_FORM: tl.constexpr, X_FORM: tl.constexpr, DX_FORM: tl.constexpr, JOINT: tl.constexpr, STEPS: tl.constexpr,
    NEED_X: tl.constexpr, NEED_PQ: tl.constexpr, NEED_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dx, and a row of dP, dQ (B, UNITS, blocks, FRAMES, S, S) and dR (B, UNITS, blocks, PHASES, TS, TS)."""
    OPERAND: tl.constexpr = x.dtype.element_ty
    COLUMNS: tl.constexpr = CU * SHAPE[2] * SHAPE[3]
    PHASES: tl.constexpr = FRAMES // TS if TS > 0 else FRAMES
    blocks: tl.constexpr = (COLUMNS + BLOCK_N * STEPS - 1) // (BLOCK_N * STEPS)
    block, phase, unit, b = share(blocks, PHASES, UNITS)
    group = unit // (UNITS // GROUPS)
    part = (b * UNITS + unit) * blocks + block

    if TS > 0:
        r += b * R_STRIDES[0] + unit // (UNITS // MIXES) * R_STRIDES[1]
        s = tl.arange(0, TS_PAD)
        dy += unit_start(b, unit * CU, s.to(tl.int64) * PHASES + phase, SHAPE, DY_STRIDES, DY_FORM)[:, None, None]
        for t in range(0, TS):
            frame = t * PHASES + phase
            by_row, by_column = load_matrices(p, q, b, group, frame, P_STRIDES, Q_STRIDES, CELLS, ACC)
            first, second, p_scale, q_scale = operands(by_row, by_column, CELLS, JOINT, OPERAND)
            weights = load_weights(r, s, t, R_STRIDES, TS, ACC)
            from_x = x + unit_start(b, unit * CU, frame, SHAPE, X_STRIDES, X_FORM)
            to_dx = dx + unit_start(b, unit * CU, frame, SHAPE, DX_STRIDES, DX_FORM)
            by_first, by_second = zero_sums(CELLS, JOINT, ACC)
            by_r = tl.zeros((TS_PAD,), ACC)
            for step in range(0, STEPS):
                n = (block * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
                there = tile_there(n, SHAPE, CELLS, CU)
                here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], DY_STRIDES, DY_FORM)
                all_there = (s < TS)[:, None, None] & there[None, :, :]
                given = tl.load(dy + here[None, :, :], mask=all_there, other=0.0).to(ACC)
                grad = tl.sum(given * weights[:, None, None], 0)
                tile = grad.to(OPERAND)
                if NEED_PQ or NEED_R:
                    here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], X_STRIDES, X_FORM)
                    tile = tl.load(from_x + here, mask=there, other=0.0)
                if NEED_R:
                    z = transform(
                        tile, first, second, p_scale * q_scale, CELLS, BLOCK_N, JOINT, ACC, PRECISION, OPERAND
                    )
                    both = tl.reshape(given * z[None, :, :], (TS_PAD, CELLS[2] * CELLS[3] * BLOCK_N))
                    by_r += tl.sum(both, 1)
                if NEED_X or NEED_PQ:
                    by_tile, by_first, by_second = gradients(
                        tile, grad, first, second, p_scale, q_scale, by_first, by_second, CELLS, BLOCK_N, JOINT,
                        NEED_X, NEED_PQ, ACC, PRECISION, OPERAND,
                    )  # fmt: skip
                    if NEED_X:
                        here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], DX_STRIDES, DX_FORM)
                        tl.store(to_dx + here, by_tile.to(OPERAND), mask=there)
            if NEED_PQ:
                row = part * FRAMES + frame
                store_sums(p_rows, q_rows, row, by_first, by_second, by_row, by_column, CELLS, JOINT)
            if NEED_R:
                row = (part * PHASES + phase) * (TS * TS)
                tl.store(r_rows + row + s * TS + t, by_r, mask=s < TS)
    else:
        by_row, by_column = load_matrices(p, q, b, group, phase, P_STRIDES, Q_STRIDES, CELLS, ACC)
        first, second, p_scale, q_scale = operands(by_row, by_column, CELLS, JOINT, OPERAND)
        dy += unit_start(b, unit * CU, phase, SHAPE, DY_STRIDES, DY_FORM)
        x += unit_start(b, unit * CU, phase, SHAPE, X_STRIDES, X_FORM)
        dx += unit_start(b, unit * CU, phase, SHAPE, DX_STRIDES, DX_FORM)
        by_first, by_second = zero_sums(CELLS, JOINT, ACC)
        for step in range(0, STEPS):
            n = (block * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
            there = tile_there(n, SHAPE, CELLS, CU)
            here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], DY_STRIDES, DY_FORM)
            grad = tl.load(dy + here, mask=there, other=0.0)
            tile = grad
            if NEED_PQ:
                here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], X_STRIDES, X_FORM)
                tile = tl.load(x + here, mask=there, other=0.0)
            by_tile, by_first, by_second = gradients(
                tile, grad, first, second, p_scale, q_scale, by_first, by_second, CELLS, BLOCK_N, JOINT, NEED_X,
                NEED_PQ, ACC, PRECISION, OPERAND,
            )  # fmt: skip
            if NEED_X:
                here = tile_places(n, SHAPE, CELLS, CU, X_FORM[2], DX_STRIDES, DX_FORM)
                tl.store(dx + here, by_tile.to(OPERAND), mask=there)
        if NEED_PQ:
            row = part * FRAMES + phase
            store_sums(p_rows, q_rows, row, by_first, by_second, by_row, by_column, CELLS, JOINT)


@triton.jit
def bilinear_mix(
    z, given, r, out, r_rows,
    Z_STRIDES, GIVEN_STRIDES, R_STRIDES,
    SHAPE: tl.constexpr, FRAMES: tl.constexpr, UNITS: tl.constexpr, MIXES: tl.constexpr, CU: tl.constexpr,
    TS: tl.constexpr, TS_PAD: tl.constexpr, Z_FORM: tl.constexpr, GIVEN_FORM: tl.constexpr,
    BACKWARD: tl.constexpr, NEED_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = R z over frames; or BACKWARD out = R^T dy, dy given, and a row of dR (B, UNITS, blocks, PHASES, TS, TS).

    out is addressed as z is, and may be z: a program has read its columns in every frame before it writes them.
    """
    OPERAND: tl.constexpr = z.dtype.element_ty
    COLUMNS: tl.constexpr = CU * SHAPE[0] * SHAPE[1]
    PHASES: tl.constexpr = FRAMES // TS
    blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    block, phase, unit, b = share(blocks, PHASES, UNITS)

    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if Z_FORM[2]:
        c = n % CU
        cell = n // CU
    else:
        c = n // (SHAPE[0] * SHAPE[1])
        cell = n % (SHAPE[0] * SHAPE[1])
    s = tl.arange(0, TS_PAD)
    there = (s < TS)[:, None] & (n < COLUMNS)[None, :]
    frame = s.to(tl.int64) * PHASES + phase
    start = unit_start(b, unit * CU, frame, SHAPE, Z_STRIDES, Z_FORM)
    here = start[:, None] + places(c, cell // SHAPE[1], cell % SHAPE[1], SHAPE, Z_STRIDES, Z_FORM)[None, :]
    r += b * R_STRIDES[0] + unit // (UNITS // MIXES) * R_STRIDES[1]
    by_frame = load_square(r, R_STRIDES[2], R_STRIDES[3], TS, TS_PAD, ACC)
    scale = 1.0
    if OPERAND == tl.float16:
        scale = peak_of(by_frame)
        by_frame = by_frame / scale
    if BACKWARD:
        start = unit_start(b, unit * CU, frame, SHAPE, GIVEN_STRIDES, GIVEN_FORM)
        rest = places(c, cell // SHAPE[1], cell % SHAPE[1], SHAPE, GIVEN_STRIDES, GIVEN_FORM)
        tile = tl.load(given + (start[:, None] + rest[None, :]), mask=there, other=0.0)
        if NEED_R:
            kept = tl.load(z + here, mask=there, other=0.0)
            by_r = dot(tile, tl.trans(kept), tl.zeros((TS_PAD, TS_PAD), ACC), OPERAND, PRECISION)
            row = ((b * UNITS + unit) * blocks + block) * PHASES + phase
            store_square(r_rows + row * (TS * TS), by_r, TS, TS_PAD)
        by_frame = tl.trans(by_frame)
    else:
        tile = tl.load(z + here, mask=there, other=0.0)
    mixed = dot(by_frame, tile, tl.zeros((TS_PAD, BLOCK_N), ACC), OPERAND, PRECISION)
    if OPERAND == tl.float16:
        mixed = mixed * scale
    tl.store(out + here, mixed.to(OPERAND), mask=there)
