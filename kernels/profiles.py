"""Device functions: the profile of a region along one axis, and its derivatives.

With d = |center - cell| and s the half-extent,
    linear       f = max(0, s - d)
    gaussian     f = exp(-(d^2 - m^2) / (2 s^2)), m the least d on the axis, so that f never vanishes as a whole
    log-linear   f = log(1 + temperature * max(0, s - d))
and f = 0 for s <= 0. A normalised axis is k = f / sum(f), its derivative (f' - k sum(f')) / sum(f). The factor that
the gaussian leaves out depends on the parameters but not on the cell, so k and its derivative do not see it.

Comparisons are written so that NaN fails them: a NaN region gives NaN weights, never zeros.
"""

import triton
import triton.language as tl

from .common import log1p

MARGIN = tl.constexpr(1 / 64)  # cells by which a region is taken larger when tiles are skipped: covers rounding
NARROW = tl.constexpr(1e-9)  # a gaussian narrower than this weighs one cell, and its square stays representable
VANISHING = tl.constexpr(1e-37)  # an axis whose weights sum to less is empty


@triton.jit
def profile(center, extent, cell, LENGTH: tl.constexpr, PROFILE: tl.constexpr, temperature):
    """(f, df / dcenter, df / dextent) at `cell`; sub-gradients at d = 0 and d = s are 0."""
    offset = cell - center
    d = tl.abs(offset)
    if PROFILE == "gaussian":
        inverse = 1 / tl.where(extent <= 0, 1.0, tl.where(extent < NARROW, NARROW, extent))
        nearest = tl.minimum(tl.maximum(tl.floor(center + 0.5), 0.0), LENGTH - 1.0)
        least = tl.abs(nearest - center)
        e = (d - least) * inverse * ((d + least) * inverse)  # in this order: no 0 * inf
        e = tl.where(e < 0, 0.0, e)
        f = tl.exp(e * -0.5)
        f = tl.where(extent <= 0, 0.0, f)
        reached = f > 0
        by_center = tl.where(reached, f * ((cell - nearest) * inverse * inverse), 0.0)
        by_extent = tl.where(reached, f * (e * inverse), 0.0)
    else:
        r = extent - d
        reached = r > 0
        f = tl.where(r <= 0, 0.0, r)
        slope = tl.where(reached, 1.0, 0.0).to(f.dtype)
        if PROFILE == "log-linear":
            scaled = f * temperature
            slope = slope * temperature / (1 + scaled)
            f = log1p(scaled)
        by_extent = slope
        by_center = tl.where(offset > 0, slope, tl.where(offset < 0, -slope, 0.0))
    return f, by_center, by_extent


@triton.jit
def axis_sums(center, extent, LENGTH: tl.constexpr, BLOCK: tl.constexpr, PROFILE: tl.constexpr, temperature):
    """Per region: 1 / sum f (0 for an empty axis), sum df / dcenter, sum df / dextent, max f, over the axis."""
    total = tl.zeros_like(center)
    by_center = tl.zeros_like(center)
    by_extent = tl.zeros_like(center)
    peak = tl.zeros_like(center)
    for start in range(0, LENGTH, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        inside = (cell < LENGTH)[:, None]
        f, f_c, f_s = profile(
            center[None, :], extent[None, :], cell[:, None].to(center.dtype), LENGTH, PROFILE, temperature
        )
        f = tl.where(inside, f, 0.0)
        total += tl.sum(f, 0)
        by_center += tl.sum(tl.where(inside, f_c, 0.0), 0)
        by_extent += tl.sum(tl.where(inside, f_s, 0.0), 0)
        peak = tl.maximum(peak, tl.max(tl.where(f > 0, f, 0.0), 0))
    empty = total < VANISHING
    return tl.where(empty, 0.0, 1 / tl.where(empty, 1.0, total)), by_center, by_extent, peak


@triton.jit
def touched(cx, cy, w, h, first, last, W: tl.constexpr, PROFILE: tl.constexpr):
    """Whether any region may weigh a cell of first..last (row-major): exact by rows, by columns within one row."""
    if PROFILE == "gaussian":
        return True
    else:
        top = first // W
        bottom = last // W
        left = tl.where(top == bottom, first % W, 0)
        right = tl.where(top == bottom, last % W, W - 1)
        apart = (bottom <= cy - h - MARGIN) | (top >= cy + h + MARGIN)
        apart = apart | (right <= cx - w - MARGIN) | (left >= cx + w + MARGIN)
        return tl.max(tl.where(apart, 0, 1), 0) > 0
