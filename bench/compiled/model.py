"""What a launch moves and computes, from its arguments and blocks, beside what its formula cannot do without.

One function per kernel, of the launch's arguments by name and its number of programs. Bytes are those that programs ask
for, from whatever memory: a neighbour that sixteen positions read counts sixteen times; masked lanes and what lies
outside a clip do not count. Operations are those of matrix products as they are issued, with the padding of blocks.
The floors: every input read and every output written once; the products of the formula, without padding, for the
neighbours that there are. What a kernel computes again to save memory is in its formula. Regions are taken to touch all
tiles, as those of a grid do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Given = Mapping[str, Any]


class Work(NamedTuple):
    """Of one launch; `turns` of the inner loop by one program, where known, and `rounds` of what is around it."""

    bytes_moved: int
    operations: int
    floor_bytes: int
    floor_operations: int
    turns: int | None = None
    rounds: int = 1


def _up(n: int, block: int) -> int:
    return -(-n // block)


def work(kernel: str, given: Given, programs: int) -> Work | None:
    """The work of a launch; None for a kernel that this page does not know."""
    found = MODELS.get(kernel)
    return found(given, programs) if found else None


# --- region kernels -------------------------------------------------------------------------------------------------


def _region(given: Given, frames: int, passes: int, products: int, map_bytes: int, node_bytes: int) -> Work:
    """`passes` over the regions' blocks, `products` of each tile; bytes of the maps and nodes that are moved."""
    n, c, cells = given["N"], given["C"], given["H"] * given["W"]
    c_blocks, tiles = _up(c, given["BLOCK_C"]), _up(cells, given["BLOCK_P"])
    regions = frames * n * 4 * given["regions"].element_size()
    rows = frames * n * 4 * 4 if given["MOMENTS"] else 0
    tile = given["BLOCK_N"] * given["BLOCK_C"] * given["BLOCK_P"]
    return Work(
        bytes_moved=passes * map_bytes + node_bytes + c_blocks * (regions + rows),
        operations=2 * frames * c_blocks * _up(n, given["BLOCK_N"]) * tiles * tile * products,
        floor_bytes=map_bytes + node_bytes + regions + rows,
        floor_operations=2 * frames * n * c * cells * products,
        turns=tiles,
    )


def _gather(given: Given, programs: int) -> Work:
    blocks = _up(given["N"], given["BLOCK_N"])
    frames = programs // (blocks * _up(given["C"], given["BLOCK_C"]))
    products = given["NODES"] + given["MOMENTS"]  # each with nodes of its own: written, and given
    itemsize = given["x"].element_size()
    node_bytes = products * frames * given["N"] * given["C"] * itemsize
    return _region(
        given, frames, blocks, products, frames * given["C"] * given["H"] * given["W"] * itemsize, node_bytes
    )


def _scatter(given: Given, programs: int) -> Work:
    frames = programs // _up(given["C"], given["BLOCK_C"])
    maps = 1 + given["MOMENTS"]
    itemsize = given["y"].element_size()
    a_map = frames * given["C"] * given["H"] * given["W"] * itemsize
    node_bytes = frames * given["N"] * given["C"] * itemsize
    if given["N"] > given["BLOCK_N"]:  # they do not fit a program, and are read again for every tile
        node_bytes *= _up(given["H"] * given["W"], given["BLOCK_P"])
    return _region(given, frames, 1, maps, maps * a_map, node_bytes)


# --- relational self-attention --------------------------------------------------------------------------------------


class _Sizes:
    """The names of design and kernels: features C, D, E, F, queries L, positions of all clips, and their pairs."""

    def __init__(self, given: Given, clips: int):
        self.clips, self.size, self.window = clips, given["SIZE"], given["WINDOW"]
        self.C, self.D, self.E, self.F, self.L = (given.get(name, 0) for name in "CDEFL")
        self.positions = clips * math.prod(self.size)
        self.pairs = clips * math.prod(map(_neighbours, self.size, self.window))  # of a position and a neighbour
        self.taps = math.prod(self.window)


def _neighbours(length: int, taps: int) -> int:
    """Pairs of a place on an axis and one of its neighbours inside."""
    return sum(max(0, length - abs(tap - taps // 2)) for tap in range(taps))


def _clips(given: Given, programs: int) -> tuple[int, int]:
    """How many there are, and blocks of positions of all."""
    blocks = _up(math.prod(given["SIZE"]), given["BLOCK_P"])
    return programs // blocks, programs


def _by_taps(given: Given, s: _Sizes) -> int:
    """Multiply-adds of a chain through the values in the cheaper order of evaluation."""
    f = s.F if given["HAS_G"] else 0
    first = (s.pairs + s.positions * s.L) * s.E * (s.D + f)
    second = s.L * s.pairs * (s.D + s.E + (s.E + f if given["HAS_G"] else 0))
    return min(first, second + s.positions * s.L * s.E * s.F * given["HAS_IDENTITY"])


def _values(given: Given, p: int, queries: int, turned: bool) -> int:
    """Multiply-adds of one block of positions through A2 and A3, as issued; `turned`: run backwards."""
    m, d, f = given["M_PAD"], given["D_PAD"], given["F_PAD"]
    has_g = given["HAS_G"]
    if given["ORDER"] == "second":
        e = given["E_WIDE"]
        through = [d, f] if has_g else [d]
        identity = p * queries * e * f if has_g and given["HAS_IDENTITY"] else 0
        return sum(m * p * queries * (u + e) for u in through) + identity
    e, wide = given["E_PAD"], given["E_PAD"] // given["BLOCK_E"] * max(given["BLOCK_E"], 16)
    inner, outer = (f, d) if turned else (d, f)  # of z by columns, then by rows
    chained = p * queries * ((e * inner + wide * outer) if has_g else (wide if turned else e) * d)
    return e * p * m * (d + (f if has_g else 0)) + chained


def _chain_bytes(given: Given, s: _Sizes, blocks: int, itemsize: int, keys: bool) -> int:
    """Windows and weights that a chain asks for."""
    e_steps = 1 if given["ORDER"] == "second" else given["E_PAD"] // given["BLOCK_E"]
    windows = 1 + (given["ORDER"] == "second" and given["HAS_G"])
    values = s.pairs * given["E_PAD"] * windows
    weights = e_steps * given["M_PAD"] * (given["D_PAD"] + (given["F_PAD"] if given["HAS_G"] else 0))
    if given["HAS_IDENTITY"]:
        weights += max(given["E_PAD"], 16) * given["F_PAD"]
    if keys and given["HAS_P1"]:
        weights += given["C_PAD"] * given["D_PAD"]
    if keys and given["HAS_H1"]:
        values += s.pairs * given["C_PAD"]
        weights += given["C_PAD"] * given["M_PAD"] * given["D_PAD"]
    return itemsize * (values + blocks * weights)


def _weights(given: Given, s: _Sizes) -> int:
    """Numbers in the weights that a chain reads."""
    n = s.taps * s.D
    n += s.taps * s.C * s.D if given["HAS_H1"] else 0
    n += s.C * s.D if given["HAS_P1"] else 0
    n += s.taps * s.F if given["HAS_G"] else 0
    return n + (s.E * s.F if given["HAS_IDENTITY"] else 0)


def _forward(given: Given, programs: int) -> Work:
    clips, blocks = _clips(given, programs)
    s, p, queries, itemsize = _Sizes(given, clips), given["BLOCK_P"], given["BLOCK_L"], given["q"].element_size()
    has_keys = given["HAS_H1"] or given["HAS_P1"]
    each = _values(given, p, queries, turned=False)
    if has_keys:
        each += given["C_PAD"] // given["BLOCK_C"] * max(given["BLOCK_C"], 16) * p * given["D_PAD"] * queries
    if given["HAS_H1"]:
        each += given["C_PAD"] * p * given["M_PAD"] * given["D_PAD"]
    y = s.F if given["HAS_G"] else s.E
    saved = (s.D + (s.E if given["HAS_G"] else 0)) if given["SAVE"] else 0
    own = s.positions * s.L * (s.C + y + saved)
    packed = s.positions * (s.E + (s.C if given["HAS_H1"] else 0))
    keys = s.pairs * s.C * s.D * given["HAS_H1"] + s.positions * s.L * s.C * s.D * has_keys
    return Work(
        bytes_moved=_chain_bytes(given, s, blocks, itemsize, True) + itemsize * own,
        operations=2 * blocks * each,
        floor_bytes=itemsize * (own + packed + _weights(given, s)),
        floor_operations=2 * (keys + _by_taps(given, s)),
    )


def _backward(given: Given, programs: int) -> Work:
    clips, blocks = _clips(given, programs)
    s, p, queries, itemsize = _Sizes(given, clips), given["BLOCK_P"], given["BLOCK_L"], given["q"].element_size()
    has_keys = given["NEED_Q"] and (given["HAS_H1"] or given["HAS_P1"])
    each = _values(given, p, queries, turned=True)
    if has_keys:
        each += given["C_PAD"] * p * given["D_PAD"] * (queries + (given["M_PAD"] if given["HAS_H1"] else 0))
    y = s.F if given["HAS_G"] else s.E
    reads_q, rows = given["NORMED"] * (1 + given["NEED_Q"]), s.D * given["NORMED"] * given["NEED_Q"]
    own = s.positions * s.L * (y + s.D + s.E + s.C * given["NEED_Q"] + rows)
    scales = 4 * s.positions * s.L * given["NORMED"]
    packed = s.positions * (s.E + (s.C if has_keys and given["HAS_H1"] else 0))
    keys = (s.pairs * s.C * s.D * given["HAS_H1"] + s.positions * s.L * s.C * s.D) * has_keys
    q = s.positions * s.L * s.C
    return Work(
        bytes_moved=_chain_bytes(given, s, blocks, itemsize, has_keys) + itemsize * (own + reads_q * q) + scales,
        operations=2 * blocks * each,
        floor_bytes=itemsize * (own + min(reads_q, 1) * q + packed + _weights(given, s)) + scales,
        floor_operations=2 * (keys + _by_taps(given, s)),
    )


def _pack(given: Given, programs: int) -> Work:
    clips = given["clips"]
    positions = clips * math.prod(given["SIZE"])
    k, m = given["HAS_H1"], given["M_PAD"]
    read = positions * (given["C"] * k + given["E"])
    written = positions * (given["C_PAD"] * k + given["E_PAD"])
    read += given["M"] * (given["D"] + given["F"] * given["HAS_G"] + given["C"] * given["D"] * k)
    written += m * (given["D_PAD"] + given["F_PAD"] * given["HAS_G"] + given["C_PAD"] * given["D_PAD"] * k)
    read += given["C"] * given["D"] * given["HAS_P1"] + given["E"] * given["F"] * given["HAS_IDENTITY"]
    written += max(given["C_PAD"], 16) * given["D_PAD"] * given["HAS_P1"]
    written += max(given["E_PAD"], 16) * given["F_PAD"] * given["HAS_IDENTITY"]
    moved = (read + written) * given["v"].element_size()
    return Work(moved, 0, moved, 0)


def _unpack(given: Given, programs: int) -> Work:
    clips, _ = _clips(given, programs)
    positions, itemsize = clips * math.prod(given["SIZE"]), given["v"].element_size()
    features = given["C"] * given["NEED_K"] + given["E"] * given["NEED_V"]
    moved = positions * features * (4 + itemsize * (1 + given["NORMED"]))  # float32 rows in, gradients out
    return Work(moved, 0, moved, 0)


def _walk(given: Given) -> tuple[int, int, int]:
    """Over all tiles of a clip and the frames that lead to them: tiles, blocks of sources, and sources."""
    tiles, sources = 1, [1]
    for axis, block in ((1, given["PLANE_H"]), (2, given["PLANE_W"])):
        length, taps = given["SIZE"][axis], given["WINDOW"][axis]
        starts = range(0, length, block)
        spans = [
            min(start + block - 1 + taps // 2, length - 1) - max(start - (taps - 1 - taps // 2), 0) + 1
            for start in starts
        ]
        tiles *= len(starts)
        sources = [a * b for a in sources for b in spans]
    frames = _neighbours(given["SIZE"][0], given["WINDOW"][0])
    blocks = sum(_up(n, given["BLOCK_S"]) for n in sources)
    return given["SIZE"][0] * tiles, frames * blocks, frames * sum(sources)


def _fold_keys(given: Given, programs: int) -> Work:
    c, d, queries, steps = given["BLOCK_C"], given["D_PAD"], given["BLOCK_L"], given["C_PAD"] // given["BLOCK_C"]
    tiles, blocks, sources = _walk(given)
    s, itemsize = _Sizes(given, programs // (tiles * steps)), given["q"].element_size()
    parts = _up(given["WINDOW"][1] * given["WINDOW"][2], given["TAPS"])
    each = parts * given["BLOCK_S"] * c * d * (queries + given["TAPS"])
    walked = s.clips * steps * blocks
    per_source = s.L * itemsize * (min(c, s.C) + parts * s.D) + 4 * s.L * given["NORMED"]
    scales, dk = 4 * s.positions * s.L * given["NORMED"], 4 * s.positions * s.C
    weights = walked * parts * c * given["TAPS"] * d * itemsize
    return Work(
        bytes_moved=s.clips * steps * sources * per_source + weights + dk,
        operations=2 * walked * each,
        floor_bytes=s.positions * s.L * (s.C + s.D) * itemsize + scales + dk + s.taps * s.C * s.D * itemsize,
        floor_operations=2 * (s.positions * s.L + s.pairs) * s.C * s.D,
    )


def _fold_values(given: Given, programs: int) -> Work:
    tiles, blocks, sources = _walk(given)
    s, itemsize, has_g = _Sizes(given, programs // tiles), given["a_rows"].element_size(), given["HAS_G"]
    e, through = given["E_PAD"], [given["D_PAD"]] + [given["F_PAD"]] * has_g
    tile = given["PLANE_H"] * given["PLANE_W"] * given["BLOCK_S"] * given["BLOCK_L"]
    rows = s.L * (s.D + s.E + (s.E + s.F) * has_g)
    dv = 4 * s.positions * s.E
    return Work(
        bytes_moved=(s.clips * sources * rows + s.pairs * sum(through)) * itemsize + dv,
        operations=2 * s.clips * blocks * tile * sum(u + e for u in through),
        floor_bytes=(s.positions * rows + s.taps * (s.D + s.F * has_g)) * itemsize + dv,
        floor_operations=2 * s.L * s.pairs * (s.D + s.E + (s.E + s.F) * has_g),
    )


def _by_h1(given: Given, programs: int) -> Work:
    c, d, m = given["C_PAD"], given["D_PAD"], given["M_PAD"]
    s, itemsize = _Sizes(given, given["clips"]), given["q"].element_size()
    positions = s.clips * _up(math.prod(s.size), given["BLOCK_P"]) * given["BLOCK_P"]
    times = (m // given["BLOCK_M"] if given["HAS_H1"] else 0) + given["HAS_P1"]  # that queries and gradients are read
    by_c, by_d = c // given["BLOCK_C"], d // given["BLOCK_D"]
    outer = times * positions * c * given["BLOCK_L"] * d
    queries = s.positions * s.L * (by_d * s.C + by_c * s.D) * itemsize
    queries += by_c * by_d * 4 * s.positions * s.L * given["NORMED"]
    sums = 4 * given["SPLITS"] * c * d * (m * given["HAS_H1"] + given["HAS_P1"])
    keys = s.pairs * given["C_PAD"] * itemsize * given["HAS_H1"]
    own = s.positions * ((s.C + s.D) * s.L * itemsize + 4 * s.L + s.C * itemsize * given["HAS_H1"])
    return Work(
        bytes_moved=times * queries + by_d * keys + sums,
        operations=2 * (outer + positions * c * m * d * given["HAS_H1"]),
        floor_bytes=own + 4 * s.C * s.D * (s.taps * given["HAS_H1"] + given["HAS_P1"]),
        floor_operations=2 * (s.positions * s.L + s.pairs * given["HAS_H1"]) * s.C * s.D,
    )


def _by_h2(given: Given, programs: int) -> Work:
    d, e, f, m, has_g = (given[name] for name in ("D_PAD", "E_WIDE", "F_PAD", "M_PAD", "HAS_G"))
    s, itemsize, identity = _Sizes(given, given["clips"]), given["a_rows"].element_size(), given["HAS_IDENTITY"]
    rows = s.clips * _up(math.prod(s.size), given["BLOCK_P"]) * given["BLOCK_P"] * given["BLOCK_L"]
    read = s.L * (s.D + s.E + (s.E + s.F) * has_g)
    sums = 4 * given["SPLITS"] * (m * (d + f * has_g) + e * f * identity)
    again = m // given["BLOCK_M"] * read + s.L * (s.E + s.F) * identity
    return Work(
        bytes_moved=(s.positions * again + s.pairs * given["E_PAD"]) * itemsize + sums,
        operations=2 * rows * (m * (e + d + (e + f) * has_g) + e * f * identity),
        floor_bytes=s.positions * (read + s.E) * itemsize + 4 * (s.taps * (s.D + s.F * has_g) + s.E * s.F * identity),
        floor_operations=2 * s.L * (s.pairs * (s.D + s.E + (s.E + s.F) * has_g) + s.positions * s.E * s.F * identity),
    )


# --- bilinear transform ---------------------------------------------------------------------------------------------


class _Maps:
    """Of a bilinear launch: its clips, numbers in a map of all, bytes of matrices, and what a tile costs."""

    def __init__(self, given: Given, programs: int):
        height, width, a, b = given["SHAPE"]
        self.down, self.across, rows, columns = given["CELLS"]
        self.ts, self.frames, units, n = given["TS"], given["FRAMES"], given["UNITS"], given["BLOCK_N"]
        blocks = _up(given["CU"] * a * b, n * given["STEPS"])
        self.clips = programs // (units * (self.frames // (self.ts or 1)) * blocks)
        self.numbers = self.clips * units * given["CU"] * self.frames * height * width
        self.square = self.down**2 + self.across**2
        self.turns = (self.ts or 1) * given["STEPS"]  # of the inner loop; a tile each
        self.rounds = self.ts if self.ts and given["STEPS"] > 1 else 1  # else there is one loop
        self.loaded = programs * (self.ts or 1)  # how often a P and a Q are, and a row of their gradients is written
        self.tiles = programs * self.turns
        square = self.down**2 * given["p"].element_size() + self.across**2 * given["q"].element_size()
        over_time = self.ts**2 * given["r"].element_size()
        self.matrices = self.loaded * square + programs * over_time  # that programs ask for, and that there are
        self.least_matrices = self.clips * (given["GROUPS"] * self.frames * square + given["MIXES"] * over_time)
        # multiply-adds of a tile by kron(P, Q^T), or of all of its coarse rows by Q, and of all columns by P
        self.joint = (rows * columns) ** 2 * n
        self.by_q, self.by_p = rows * n * columns**2, rows**2 * n * columns


def _bilinear_forward(given: Given, programs: int) -> Work:
    """Frames are mixed by multiply-adds outside of matrix products: these are in the floor alone."""
    m = _Maps(given, programs)
    clips = 2 * m.numbers * given["x"].element_size()
    return Work(
        bytes_moved=clips + m.matrices,
        operations=2 * m.tiles * (m.joint if given["JOINT"] else m.by_q + m.by_p),
        floor_bytes=clips + m.least_matrices,
        floor_operations=2 * m.numbers * (m.down + m.across + m.ts),
        turns=m.turns,
    )


def _bilinear_backward(given: Given, programs: int) -> Work:
    """As the forward; x Q, and for the gradient of R P x Q, are computed again."""
    m = _Maps(given, programs)
    need_x, need_pq, need_r = (bool(given[f"NEED_{name}"]) for name in ("X", "PQ", "R"))
    back, again = need_x or need_pq, need_pq or need_r  # P^T dz, and x Q: each is made once
    one = m.numbers * given["x"].element_size()
    clips = (1 + need_x + again) * one
    each = given["p_rows"].element_size()
    by_groups, by_mixes = m.clips * given["GROUPS"] * m.frames, m.clips * given["MIXES"]
    if given["JOINT"]:
        issued = m.joint * (need_x + need_pq + need_r)
    else:
        issued = m.by_p * (back + need_pq + need_r) + m.by_q * (need_x + need_pq + again)
    own = m.down * (back + need_pq + need_r) + m.across * (need_x + need_pq + again) + m.ts * (back + need_r)
    return Work(
        bytes_moved=clips
        + (max(m.ts, 1) - 1) * one  # dy in every frame
        + m.matrices
        + each * (m.loaded * m.square * need_pq + programs * m.ts**2 * need_r),
        operations=2 * m.tiles * issued,
        floor_bytes=clips + m.least_matrices + each * (by_groups * m.square * need_pq + by_mixes * m.ts**2 * need_r),
        floor_operations=2 * m.numbers * own,
        turns=m.turns,
        rounds=m.rounds,
    )


def _bilinear_mix(given: Given, programs: int) -> Work:
    height, width = given["SHAPE"]
    ts, units, need_r = given["TS"], given["UNITS"], given["BACKWARD"] and given["NEED_R"]
    phases = given["FRAMES"] // ts
    clips = programs // (units * phases * _up(given["CU"] * height * width, given["BLOCK_N"]))
    numbers = clips * units * given["CU"] * given["FRAMES"] * height * width
    maps = (2 + need_r) * numbers * given["z"].element_size()
    weights, rows = given["r"].element_size() * ts**2, given["r_rows"].element_size() * ts**2 * need_r
    return Work(
        bytes_moved=maps + programs * (weights + rows),
        operations=2 * programs * given["TS_PAD"] ** 2 * given["BLOCK_N"] * (1 + need_r),
        floor_bytes=maps + clips * given["MIXES"] * (weights + rows),
        floor_operations=2 * numbers * ts * (1 + need_r),
    )


MODELS: dict[str, Callable[[Given, int], Work]] = {
    "region_gather": _gather,
    "region_scatter": _scatter,
    "relational_pack": _pack,
    "relational_forward": _forward,
    "relational_backward": _backward,
    "relational_fold_keys": _fold_keys,
    "relational_fold_values": _fold_values,
    "relational_unpack": _unpack,
    "relational_by_h1": _by_h1,
    "relational_by_h2": _by_h2,
    "bilinear_forward": _bilinear_forward,
    "bilinear_backward": _bilinear_backward,
    "bilinear_mix": _bilinear_mix,
}
