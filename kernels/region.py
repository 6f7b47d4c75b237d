"""Region pooling and re-mapping (DyReG equations 5-7 and 10): three faces of one contraction with a kernel
K[n, p] = k_y[n, row(p)] k_x[n, column(p)] that is made on the fly and never stored:

    gather   nodes[n, c] = sum_p K[n, p] x[c, p]                    pooling; re-mapping's gradient for the nodes
    scatter  y[c, p]     = sum_n K[n, p] v[n, c]                    re-mapping; pooling's gradient for x
    moments  by_k[n, p]  = sum_c v[n, c] x[c, p],  by_region[n, i] = sum_p by_k[n, p] dK[n, p] / dregion[n, i]

Floor: bytes. gather reads a map once, scatter writes one once; the moments ride along on the map that is being read
(gather) or read it beside the one being written (scatter), so a backward is one pass. Regions, nodes and their
gradients are a few kilobytes a frame.

Tiling: a program owns BLOCK_C channels of a frame and walks the map's cells, flattened, BLOCK_P at a time: flat cells
keep 8- or 16-byte loads where rows of 14 or 28 cells would give 4 or 8. Where a channel's cells do not divide even so
(7 x 7), but fit one tile, the tile is loaded as one run of memory and dealt out on chip. The regions sit in the other
dimension of the product, at least 16 (the tensor cores' least), so the product costs as much for 16 regions as for one;
64 fit one program, 32 where it keeps moments, 16 where it reads and writes a map (beyond, pooling's backward is two
launches, which move the same bytes). Each program sums the axes for itself (H + W cells per region, a fraction of a
tile). Programs of a frame differ only in channels; parameter gradients leave one row per program and are summed
afterwards, in fixed order.
Compact profiles skip tiles that no region touches: gather then does not read them, and scatter writes zeros.
Occupancy hides the latency of the loads, since a load under a condition is not pipelined; hence small tiles and few
registers rather than stages.
"""

import triton
import triton.language as tl

from .common import dot
from .profiles import axis_sums, profile, touched


@triton.jit
def load_regions(regions, first, N: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """(cx, cy, w, h) of BLOCK_N regions; beyond N they are empty."""
    n = first + tl.arange(0, BLOCK_N)
    here = regions + n * 4
    cx = tl.load(here, mask=n < N, other=0.0).to(ACC)
    cy = tl.load(here + 1, mask=n < N, other=0.0).to(ACC)
    w = tl.load(here + 2, mask=n < N, other=-1.0).to(ACC)
    h = tl.load(here + 3, mask=n < N, other=-1.0).to(ACC)
    return cx, cy, w, h


@triton.jit
def map_offsets(c, p, C_STRIDE, H_STRIDE, W_STRIDE, H: tl.constexpr, W: tl.constexpr, FLAT: tl.constexpr,
                ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, GAPLESS: tl.constexpr):  # fmt: skip
    """Offsets of channels c and cells p in a map. Strides come divided by ALIGN, all but the one that is 1."""
    c = c.to(tl.int64)  # each product from an int64 on: a stride alone may exceed int32
    p = p.to(tl.int64)
    if GAPLESS:
        return (c * (H * W))[:, None] + p[None, :]
    else:
        by_c = c * C_STRIDE
        if FLAT:
            by_p = p * W_STRIDE
        else:
            by_p = (p % W) * W_STRIDE
        if CHANNELS_LAST:
            by_p = by_p * ALIGN
        else:
            by_c = by_c * ALIGN
        if not FLAT:
            by_p += (p // W) * H_STRIDE * ALIGN
        return by_c[:, None] + by_p[None, :]


@triton.jit
def run_offsets(c_block, C, CELLS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets of all cells of BLOCK_C channels of a gapless map, and which of them there are."""
    i = tl.arange(0, BLOCK_C * BLOCK_P)
    offsets = c_block * (BLOCK_C * CELLS) + i
    return offsets, (i < BLOCK_C * CELLS) & (offsets < tl.cast(C, tl.int64) * CELLS)


@triton.constexpr_function  # what a jit function gives back is no constant in Triton 3.6
def is_whole(dtype, CELLS, GAPLESS, BLOCK_P):
    """Whether a tile is one run of memory whose channels wide loads do not divide: all cells of gapless channels."""
    return GAPLESS and CELLS <= BLOCK_P and CELLS * dtype.primitive_bitwidth % 128 != 0


@triton.jit
def load_tile(x, c_block, c, p, C, C_STRIDE, H_STRIDE, W_STRIDE, H: tl.constexpr, W: tl.constexpr,
              FLAT: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, GAPLESS: tl.constexpr,
              BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """x at channels c and cells p, (BLOCK_C, BLOCK_P), 0 beyond them.

    A whole run (7 x 7 cells, say) is loaded 16 bytes at a time, and dealt out to rows on chip.
    """
    if is_whole(x.dtype.element_ty, H * W, GAPLESS, BLOCK_P):
        offsets, there = run_offsets(c_block, C, H * W, BLOCK_C, BLOCK_P)
        run = tl.load(x + offsets, mask=there, other=0.0)
        i = tl.arange(0, BLOCK_C * BLOCK_P)
        source = (i // BLOCK_P) * (H * W) + tl.minimum(i % BLOCK_P, H * W - 1)
        tile = tl.reshape(tl.gather(run, source, 0), (BLOCK_C, BLOCK_P))
        return tl.where((p < H * W)[None, :], tile, 0.0).to(run.dtype)
    else:
        offsets = map_offsets(c, p, C_STRIDE, H_STRIDE, W_STRIDE, H, W, FLAT, ALIGN, CHANNELS_LAST, GAPLESS)
        return tl.load(x + offsets, mask=(c < C)[:, None] & (p < H * W)[None, :], other=0.0)


@triton.jit
def store_tile(y, tile, c_block, c, p, C, C_STRIDE, H_STRIDE, W_STRIDE, H: tl.constexpr, W: tl.constexpr,
               FLAT: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, GAPLESS: tl.constexpr,
               BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """The reverse of `load_tile`."""
    if is_whole(y.dtype.element_ty, H * W, GAPLESS, BLOCK_P):
        offsets, there = run_offsets(c_block, C, H * W, BLOCK_C, BLOCK_P)
        i = tl.arange(0, BLOCK_C * BLOCK_P)
        source = tl.minimum(i // (H * W), BLOCK_C - 1) * BLOCK_P + i % (H * W)
        run = tl.gather(tl.reshape(tile, (BLOCK_C * BLOCK_P,)), source, 0)
        tl.store(y + offsets, run, mask=there)
    else:
        offsets = map_offsets(c, p, C_STRIDE, H_STRIDE, W_STRIDE, H, W, FLAT, ALIGN, CHANNELS_LAST, GAPLESS)
        tl.store(y + offsets, tile, mask=(c < C)[:, None] & (p < H * W)[None, :])


@triton.jit
def lead_offset(frame, LEAD1, LEAD2, STRIDE0, STRIDE1, STRIDE2, ALIGN: tl.constexpr):
    """Offset of a frame under up to three leading dimensions of any strides."""
    inner = frame % LEAD2
    rest = frame // LEAD2
    return ((rest // LEAD1) * STRIDE0 + (rest % LEAD1) * STRIDE1 + inner * STRIDE2) * ALIGN


@triton.jit
def largest(values):
    """The largest of the values, NaN apart; 1 where none is positive."""
    best = tl.max(tl.where(values > 0, values, 0.0), 0)
    return tl.where(best > 0, best, 1.0)


@triton.jit
def weights(center, extent, inverse, cell, LENGTH: tl.constexpr, PROFILE: tl.constexpr, temperature):
    """A normalised axis (BLOCK_P, BLOCK_N)."""
    f, _, _ = profile(center[None, :], extent[None, :], cell[:, None], LENGTH, PROFILE, temperature)
    return f * inverse[None, :]


@triton.jit
def slopes(center, extent, inverse, by_center, by_extent, cell, LENGTH: tl.constexpr, PROFILE: tl.constexpr,
           temperature):  # fmt: skip
    """A normalised axis and its derivatives by center and extent, each (BLOCK_P, BLOCK_N)."""
    f, f_c, f_s = profile(center[None, :], extent[None, :], cell[:, None], LENGTH, PROFILE, temperature)
    inverse = inverse[None, :]
    k = f * inverse
    return k, (f_c - k * by_center[None, :]) * inverse, (f_s - k * by_extent[None, :]) * inverse


@triton.jit
def store_moments(moments, n, N: tl.constexpr, by_cx, by_cy, by_w, by_h):
    """One row of (cx, cy, w, h) gradients per region."""
    here = moments + n * 4
    tl.store(here, tl.sum(by_cx, 0), mask=n < N)
    tl.store(here + 1, tl.sum(by_cy, 0), mask=n < N)
    tl.store(here + 2, tl.sum(by_w, 0), mask=n < N)
    tl.store(here + 3, tl.sum(by_h, 0), mask=n < N)


@triton.jit
def region_gather(
    x, v, regions, nodes, moments, temperature,
    C, LEAD1, LEAD2, X_STRIDE0, X_STRIDE1, X_STRIDE2, X_STRIDE_C, X_STRIDE_H, X_STRIDE_W,
    N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PROFILE: tl.constexpr,
    NODES: tl.constexpr, MOMENTS: tl.constexpr,
    FLAT: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, GAPLESS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_AXIS: tl.constexpr,
):  # fmt: skip
    """Read map x (frames, C, H, W) once; write nodes (frames, N, C) and moments (frames, C blocks, N, 4) from it."""
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    c_blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    c_block = pid // n_blocks % c_blocks
    frame = pid // n_blocks // c_blocks
    first = (pid % n_blocks).to(tl.int32) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)

    cx, cy, w, h = load_regions(regions + frame * (N * 4), first, N, BLOCK_N, ACC)
    inverse_x, cx_sum, w_sum, peak_x = axis_sums(cx, w, W, BLOCK_AXIS, PROFILE, temperature)
    inverse_y, cy_sum, h_sum, peak_y = axis_sums(cy, h, H, BLOCK_AXIS, PROFILE, temperature)

    dtype: tl.constexpr = x.dtype.element_ty
    scale = tl.full((BLOCK_N,), 1.0, ACC)
    if dtype == tl.float16:  # weights of large regions fall below float16's normal range: scale each region's to 1
        peak = peak_x * inverse_x * peak_y * inverse_y
        scale = tl.where(peak > 0, peak, 1.0)
    unscale = (1 / scale)[None, :]

    x += lead_offset(frame, LEAD1, LEAD2, X_STRIDE0, X_STRIDE1, X_STRIDE2, ALIGN)
    if NODES:
        pooled = tl.zeros((BLOCK_C, BLOCK_N), ACC)
    if MOMENTS:
        here = frame * C * N + n[None, :] * C + c[:, None]
        given = tl.load(v + here, mask=(n < N)[None, :] & (c < C)[:, None], other=0.0)
        by_cx = tl.zeros((BLOCK_P, BLOCK_N), ACC)
        by_cy = tl.zeros((BLOCK_P, BLOCK_N), ACC)
        by_w = tl.zeros((BLOCK_P, BLOCK_N), ACC)
        by_h = tl.zeros((BLOCK_P, BLOCK_N), ACC)

    for start in range(0, H * W, BLOCK_P):
        if touched(cx, cy, w, h, start, tl.minimum(start + BLOCK_P, H * W) - 1, W, PROFILE):
            p = start + tl.arange(0, BLOCK_P)
            row = (p // W).to(ACC)
            column = (p % W).to(ACC)
            tile = load_tile(x, c_block, c, p, C, X_STRIDE_C, X_STRIDE_H, X_STRIDE_W, H, W, FLAT, ALIGN, CHANNELS_LAST,
                             GAPLESS, BLOCK_C, BLOCK_P)  # fmt: skip
            k_x, k_cx, k_w = slopes(cx, w, inverse_x, cx_sum, w_sum, column, W, PROFILE, temperature)
            k_y, k_cy, k_h = slopes(cy, h, inverse_y, cy_sum, h_sum, row, H, PROFILE, temperature)
            if NODES:
                pooled = dot(tile, k_x * (k_y * unscale), pooled, dtype, PRECISION)
            if MOMENTS:
                by_k = dot(tl.trans(tile), given, tl.zeros((BLOCK_P, BLOCK_N), ACC), dtype, PRECISION)
                by_cx += by_k * k_y * k_cx
                by_cy += by_k * k_x * k_cy
                by_w += by_k * k_y * k_w
                by_h += by_k * k_x * k_h

    if NODES:
        here = frame * C * N + n[None, :] * C + c[:, None]
        tl.store(nodes + here, (pooled * scale[None, :]).to(dtype), mask=(n < N)[None, :] & (c < C)[:, None])
    if MOMENTS:
        store_moments(moments + (frame * c_blocks + c_block) * (N * 4), n, N, by_cx, by_cy, by_w, by_h)


@triton.jit
def region_scatter(
    v, x, regions, y, moments, temperature,
    C, LEAD1, LEAD2, X_STRIDE0, X_STRIDE1, X_STRIDE2, X_STRIDE_C, X_STRIDE_H, X_STRIDE_W,
    Y_STRIDE0, Y_STRIDE1, Y_STRIDE2, Y_STRIDE_C, Y_STRIDE_H, Y_STRIDE_W,
    N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PROFILE: tl.constexpr, MOMENTS: tl.constexpr,
    X_FLAT: tl.constexpr, X_ALIGN: tl.constexpr, X_CHANNELS_LAST: tl.constexpr, X_GAPLESS: tl.constexpr,
    Y_FLAT: tl.constexpr, Y_ALIGN: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr, Y_GAPLESS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_AXIS: tl.constexpr,
):  # fmt: skip
    """Write map y (frames, C, H, W) from v (frames, N, C); with MOMENTS read map x beside it (N <= BLOCK_N then)."""
    c_blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    c_block = pid % c_blocks
    frame = pid // c_blocks
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    v += frame * C * N
    regions += frame * (N * 4)
    x += lead_offset(frame, LEAD1, LEAD2, X_STRIDE0, X_STRIDE1, X_STRIDE2, X_ALIGN)
    y += lead_offset(frame, LEAD1, LEAD2, Y_STRIDE0, Y_STRIDE1, Y_STRIDE2, Y_ALIGN)
    dtype: tl.constexpr = y.dtype.element_ty
    if MOMENTS:
        by_cx = tl.zeros((BLOCK_P, BLOCK_N), ACC)
        by_cy = tl.zeros((BLOCK_P, BLOCK_N), ACC)
        by_w = tl.zeros((BLOCK_P, BLOCK_N), ACC)
        by_h = tl.zeros((BLOCK_P, BLOCK_N), ACC)
    if N <= BLOCK_N:  # everything about the regions stays in registers
        n = tl.arange(0, BLOCK_N)
        cx, cy, w, h = load_regions(regions, 0, N, BLOCK_N, ACC)
        inverse_x, cx_sum, w_sum, peak_x = axis_sums(cx, w, W, BLOCK_AXIS, PROFILE, temperature)
        inverse_y, cy_sum, h_sum, peak_y = axis_sums(cy, h, H, BLOCK_AXIS, PROFILE, temperature)
        scale = tl.full((), 1.0, ACC)
        if dtype == tl.float16:
            scale = largest(peak_x * inverse_x * peak_y * inverse_y)
        unscale = 1 / scale
        given = tl.load(v + n[None, :] * C + c[:, None], mask=(n < N)[None, :] & (c < C)[:, None], other=0.0)

    for start in range(0, H * W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row = (p // W).to(ACC)
        column = (p % W).to(ACC)
        spread = tl.zeros((BLOCK_C, BLOCK_P), ACC)
        if N <= BLOCK_N:
            if touched(cx, cy, w, h, start, tl.minimum(start + BLOCK_P, H * W) - 1, W, PROFILE):
                k_x, k_cx, k_w = slopes(cx, w, inverse_x, cx_sum, w_sum, column, W, PROFILE, temperature)
                k_y, k_cy, k_h = slopes(cy, h, inverse_y, cy_sum, h_sum, row, H, PROFILE, temperature)
                if MOMENTS:
                    tile = load_tile(x, c_block, c, p, C, X_STRIDE_C, X_STRIDE_H, X_STRIDE_W, H, W, X_FLAT, X_ALIGN,
                                     X_CHANNELS_LAST, X_GAPLESS, BLOCK_C, BLOCK_P)  # fmt: skip
                    by_k = dot(tl.trans(tile), given, tl.zeros((BLOCK_P, BLOCK_N), ACC), dtype, PRECISION)
                    by_cx += by_k * k_y * k_cx
                    by_cy += by_k * k_x * k_cy
                    by_w += by_k * k_y * k_w
                    by_h += by_k * k_x * k_h
                spread = dot(given, tl.trans(k_x * (k_y * unscale)), spread, dtype, PRECISION) * scale
        else:  # regions do not fit at once: their axes are summed again for every tile
            for first in range(0, N, BLOCK_N):
                n = first + tl.arange(0, BLOCK_N)
                cx, cy, w, h = load_regions(regions, first, N, BLOCK_N, ACC)
                if touched(cx, cy, w, h, start, tl.minimum(start + BLOCK_P, H * W) - 1, W, PROFILE):
                    inverse_x, _, _, peak_x = axis_sums(cx, w, W, BLOCK_AXIS, PROFILE, temperature)
                    inverse_y, _, _, peak_y = axis_sums(cy, h, H, BLOCK_AXIS, PROFILE, temperature)
                    scale = tl.full((), 1.0, ACC)
                    if dtype == tl.float16:
                        scale = largest(peak_x * inverse_x * peak_y * inverse_y)
                    given = tl.load(
                        v + n[None, :] * C + c[:, None], mask=(n < N)[None, :] & (c < C)[:, None], other=0.0
                    )
                    k = weights(cx, w, inverse_x, column, W, PROFILE, temperature)
                    k *= weights(cy, h, inverse_y / scale, row, H, PROFILE, temperature)
                    part = dot(given, tl.trans(k), tl.zeros((BLOCK_C, BLOCK_P), ACC), dtype, PRECISION)
                    spread += part * scale
        store_tile(y, spread.to(dtype), c_block, c, p, C, Y_STRIDE_C, Y_STRIDE_H, Y_STRIDE_W, H, W, Y_FLAT, Y_ALIGN,
                   Y_CHANNELS_LAST, Y_GAPLESS, BLOCK_C, BLOCK_P)  # fmt: skip

    if MOMENTS:
        store_moments(moments + (frame * c_blocks + c_block) * (N * 4), tl.arange(0, BLOCK_N), N,
                      by_cx, by_cy, by_w, by_h)  # fmt: skip


@triton.jit
def region_dense(
    regions, kernel, temperature,
    N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PROFILE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_AXIS: tl.constexpr,
):  # fmt: skip
    """Write K (frames, N, H, W). Floor: its bytes."""
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    p_blocks: tl.constexpr = (H * W + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0).to(tl.int64)
    frame = pid // p_blocks // n_blocks
    first = (pid // p_blocks % n_blocks).to(tl.int32) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    p = (pid % p_blocks).to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    cx, cy, w, h = load_regions(regions + frame * (N * 4), first, N, BLOCK_N, ACC)
    inverse_x, _, _, _ = axis_sums(cx, w, W, BLOCK_AXIS, PROFILE, temperature)
    inverse_y, _, _, _ = axis_sums(cy, h, H, BLOCK_AXIS, PROFILE, temperature)
    k = weights(cx, w, inverse_x, (p % W).to(ACC), W, PROFILE, temperature)
    k *= weights(cy, h, inverse_y, (p // W).to(ACC), H, PROFILE, temperature)
    here = (frame * N + n)[None, :] * (H * W) + p[:, None]
    tl.store(kernel + here, k.to(kernel.dtype.element_ty), mask=(n < N)[None, :] & (p < H * W)[:, None])


@triton.jit
def region_dense_backward(
    regions, by_kernel, moments, temperature,
    N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PROFILE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_AXIS: tl.constexpr,
):  # fmt: skip
    """Read dK (frames, N, H, W) once where regions touch it; write moments (frames, N, 4)."""
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0).to(tl.int64)
    frame = pid // n_blocks
    first = (pid % n_blocks).to(tl.int32) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    cx, cy, w, h = load_regions(regions + frame * (N * 4), first, N, BLOCK_N, ACC)
    inverse_x, cx_sum, w_sum, _ = axis_sums(cx, w, W, BLOCK_AXIS, PROFILE, temperature)
    inverse_y, cy_sum, h_sum, _ = axis_sums(cy, h, H, BLOCK_AXIS, PROFILE, temperature)
    by_cx = tl.zeros((BLOCK_P, BLOCK_N), ACC)
    by_cy = tl.zeros((BLOCK_P, BLOCK_N), ACC)
    by_w = tl.zeros((BLOCK_P, BLOCK_N), ACC)
    by_h = tl.zeros((BLOCK_P, BLOCK_N), ACC)
    for start in range(0, H * W, BLOCK_P):
        if touched(cx, cy, w, h, start, tl.minimum(start + BLOCK_P, H * W) - 1, W, PROFILE):
            p = start + tl.arange(0, BLOCK_P)
            row = (p // W).to(ACC)
            column = (p % W).to(ACC)
            here = (frame * N + n)[None, :] * (H * W) + p[:, None]
            by_k = tl.load(by_kernel + here, mask=(n < N)[None, :] & (p < H * W)[:, None], other=0.0).to(ACC)
            k_x, k_cx, k_w = slopes(cx, w, inverse_x, cx_sum, w_sum, column, W, PROFILE, temperature)
            k_y, k_cy, k_h = slopes(cy, h, inverse_y, cy_sum, h_sum, row, H, PROFILE, temperature)
            by_cx += by_k * k_y * k_cx
            by_cy += by_k * k_x * k_cy
            by_w += by_k * k_y * k_w
            by_h += by_k * k_x * k_h
    store_moments(moments + frame * (N * 4), n, N, by_cx, by_cy, by_w, by_h)
