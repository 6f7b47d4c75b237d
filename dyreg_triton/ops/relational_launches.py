"""Relational self-attention on Triton: from tensors to launches of the relational kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs import lookup
from ..configs.keys import Key
from ..configs.relational import RelationalConfig, key_of
from .launch import Launch, accumulator, clip_layout, planned, precision, wider
from .recording import TunedCall


def _pad(n: int, least: int = 16) -> int:
    """The least power of two that holds n; products contract over sixteen or more."""
    return max(least, 1 << (n - 1).bit_length())


class Problem(NamedTuple):
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

    def key(self, kind: str) -> Key:
        """Of one of its kernels."""
        clips, queries = self.q.shape[:2]
        return key_of(kind, clips, self.size, queries, self.channels, self.window, self.q)

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

    def rows(self, features: int) -> tuple[int, int, int, int]:
        """The shape (B, T*H*W, L, features)."""
        return self.q.shape[0], math.prod(self.size), self.q.shape[1], features

    def signature(self) -> tuple[Tensor | None, ...]:
        """The tensors, by which what follows from their shapes is kept."""
        return self[:8]


def _problem(*given: Any) -> Problem:
    """The problem of eight tensors, and of whether it is normed: a plan does not depend on eps itself."""
    *tensors, normed = given
    return Problem._make([*tensors, 1.0 if normed else None])


_GAP = 64  # elements after each packed tensor, which nothing writes: reading beyond one shows where memory is poisoned


class _Packed(NamedTuple):
    """What `relational_pack` makes, flat; a tensor that is not there stands for one that is not read."""

    kn: Tensor
    vn: Tensor
    h1: Tensor
    p1: Tensor
    h2: Tensor
    g: Tensor
    identity: Tensor


def _programs(problem: Problem, block: int) -> int:
    return problem.q.shape[0] * -(-math.prod(problem.size) // block)


def _pack(problem: Problem, plan: tuple[Launch, list[int], bool] | None = None) -> _Packed:
    launch, sizes, scattered = plan or planned(_plan_pack, problem.signature(), problem.eps is not None)
    q, k, v, h2, h1, p1, g, identity, eps = problem
    weights = [h1, p1, h2, g, identity]
    if scattered:
        weights = [t if t is None or t.dim() == 2 else t.flatten(-3) for t in weights]
    packed = _Packed._make(q.new_empty(sum(sizes)).split_with_sizes(sizes))  # one allocation: a third of the time
    launch(v if k is None else k, v, *[v if t is None else t for t in weights], *packed, eps or 0.0)
    return packed


def _plan_pack(*tensors: Any) -> tuple[Launch, list[int], bool]:
    """The launch, the sizes of what it makes, and whether the taps of a weight lie at no single stride."""
    from ..kernels.relational import relational_pack

    problem = _problem(*tensors)
    q, k, v, h2, h1, p1, g, identity, _ = problem
    constants = problem.constants(
        "M", "C", "D", "E", "F", "C_PAD", "D_PAD", "E_PAD", "F_PAD", "M_PAD", "HAS_H1", "HAS_P1", "HAS_G",
        "HAS_IDENTITY", "NORMED",
    )  # fmt: skip
    c, d, e, f, m = (constants[name] for name in ("C_PAD", "D_PAD", "E_PAD", "F_PAD", "M_PAD"))
    positions = q.shape[0] * math.prod(problem.size)
    shapes = ((positions, c), (positions, e), (c, m, d), (max(c, 16), d), (m, d), (m, f), (max(e, 16), f))
    flat = [None if t is None else t.flatten(-3) for t in (h1, h2, g)]

    def transposed(t: Tensor | None) -> tuple[int, ...]:
        """Strides, the tap's before the last dimension's."""
        return (0, 0) if t is None else (*t.stride()[:-2], t.stride(-1), t.stride(-2))

    key = problem.key("pack")
    config = lookup.config(key, q)
    k_layout, v_layout = clip_layout(v if k is None else k), clip_layout(v)
    launch = Launch(
        relational_pack, _programs(problem, config.block_p) + 1 + (0 if h1 is None else c), key,
        q.shape[0], problem.size, k_layout.strides, v_layout.strides,
        (0, 0, 0) if h1 is None else transposed(flat[0]), (0, 0) if p1 is None else p1.stride(), transposed(flat[1]),
        transposed(flat[2]), (0, 0) if identity is None else identity.stride(),
        given=7, K_FORM=k_layout.form, V_FORM=v_layout.form, BLOCK_P=config.block_p, BLOCK_M=config.block_m,
        num_warps=config.num_warps, **constants,
    )  # fmt: skip
    there = (k, v, h1, p1, h2, g, identity)
    scattered = any(t is not None and t._base is None for t in flat)
    sizes = [0 if t is None else math.prod(shape) + _GAP for t, shape in zip(there, shapes, strict=True)]
    return launch, sizes, scattered


_EVERY = (
    "L", "C", "D", "E", "F", "C_PAD", "D_PAD", "E_PAD", "F_PAD", "M_PAD", "E_WIDE", "HAS_H1", "HAS_P1", "HAS_G",
    "HAS_IDENTITY", "NORMED", "WINDOW",
)  # fmt: skip


def _block(config: RelationalConfig, problem: Problem, name: str) -> int:
    """A block size; of channels no more than there are."""
    c, d, e, _ = problem.channels
    if name in ("BLOCK_P", "BLOCK_M"):
        return getattr(config, name.lower())
    if name == "BLOCK_D":
        return min(config.block_d, _pad(d))
    return min(config.block_c, _pad(c if name == "BLOCK_C" else e, 8))


def _blocks(config: RelationalConfig, problem: Problem, queries: int, *names: str) -> dict[str, Any]:
    """Launch options and blocks; `queries` is the fewest that the kernel's products take."""
    block_l = max(queries, 1 << (problem.q.shape[1] - 1).bit_length())
    return {
        **{name: _block(config, problem, name) for name in names},
        "BLOCK_L": block_l, "PRECISION": precision(problem.q, "tf32x3"),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def forward(problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, F, L, T, H, W), and with `save` the rows of a and, with g, of z."""
    pack, launch, *shapes = planned(_plan_forward, problem.signature(), problem.eps is not None, save)
    q, packed = problem.q, _pack(problem, pack)
    y, a_rows, z_rows = (q.new_empty(shape) for shape in shapes)
    launch(q, *packed, a_rows, z_rows, y, problem.eps or 0.0)
    return y, a_rows, z_rows


def output_shapes(problem: Problem, save: bool) -> tuple[tuple[int, ...], ...]:
    """Of y, the rows of a and the rows of z."""
    q = problem.q
    _, d, e, f = problem.channels
    return (
        (q.shape[0], f, q.shape[1], *problem.size),
        problem.rows(d) if save else (0,),
        problem.rows(e) if save and problem.g is not None else (0,),
    )


def _plan_forward(*tensors: Any) -> tuple[Any, ...]:
    """The plan of packing, the launch, and the shapes of its outputs."""
    from ..kernels.relational import relational_forward

    *given, save = tensors
    problem = _problem(*given)
    q, key = problem.q, problem.key("forward")
    config = lookup.config(key, q)
    shapes = output_shapes(problem, save)
    q_layout, y_layout = clip_layout(q), clip_layout(q.new_empty(shapes[0], device="meta").transpose(1, 2))
    launch = Launch(
        relational_forward, _programs(problem, config.block_p), key,
        problem.size, q_layout.strides, y_layout.strides,
        given=1, Q_FORM=q_layout.form, Y_FORM=y_layout.form, SAVE=save, ORDER=config.order,
        **problem.constants(*_EVERY), **_blocks(config, problem, 8, "BLOCK_P", "BLOCK_M", "BLOCK_C", "BLOCK_E"),
    )  # fmt: skip
    return _plan_pack(*given), launch, *shapes


# --- the gradients --------------------------------------------------------------------------------------------------


def empty_gradients(problem: Problem, needs: list[bool]) -> list[Tensor]:
    """Where the gradients go, in the order of the arguments; empty tensors for those not needed."""
    empty = problem.q.new_empty
    wanted = [t if need else None for t, need in zip(problem[:8], needs, strict=True)]
    clips = [empty(0) if t is None else torch.empty_like(t) for t in wanted[:3]]
    return clips + [empty(0 if t is None else t.shape) for t in wanted[3:]]


class _Part(NamedTuple):
    """A few clips of a backward: their inputs, what was saved, and where the chain leaves its results."""

    problem: Problem
    packed: _Packed
    dy: Tensor
    a_rows: Tensor
    z_rows: Tensor
    dz_rows: Tensor
    da_rows: Tensor
    scales: Tensor


def _rows(packed: Tensor, cells: slice, width: int) -> Tensor:
    """The rows of some positions; none where nothing was packed."""
    return packed[cells.start * width : cells.stop * width]


def _parts(problem: Problem, dy: Tensor, a_rows: Tensor, z_rows: Tensor) -> Iterator[tuple[slice, _Part]]:
    """A few clips at a time, for which intermediate gradients exist."""
    packed = _pack(problem)
    clips, positions = problem.q.shape[0], math.prod(problem.size)
    step = lookup.config(problem.key("backward"), problem.q).clips
    c_pad, e_pad = (_pad(n, 8) for n in (problem.channels[0], problem.channels[2]))
    for start in range(0, clips, step):
        some = slice(start, min(start + step, clips))
        part = problem
        if step < clips:
            cells = slice(some.start * positions, some.stop * positions)
            k = None if problem.k is None else problem.k[some]
            part = problem._replace(q=problem.q[some], k=k, v=problem.v[some])
            packed_part = packed._replace(kn=_rows(packed.kn, cells, c_pad), vn=_rows(packed.vn, cells, e_pad))
            saved = dy[some], a_rows[some], z_rows[some] if problem.g is not None else z_rows
        else:
            packed_part, saved = packed, (dy, a_rows, z_rows)
        _, d, e, _ = part.channels
        empty = part.q.new_empty
        yield some, _Part(
            part, packed_part, *saved, empty(part.rows(e)), empty(part.rows(d)),
            empty(part.rows(1 if problem.eps is not None else 0), dtype=wider(part.q.dtype)),
        )  # fmt: skip


def backward(problem: Problem, dy: Tensor, a_rows: Tensor, z_rows: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of q, k, v, h2, h1, p1, g, identity, where they are needed."""
    gradients = empty_gradients(problem, needs)
    totals: dict[int, Tensor] = {}  # of the weights, by their place, in float32
    for some, part in _parts(problem, dy, a_rows, z_rows):
        dq, dk, dv = (t[some] if need else None for t, need in zip(gradients[:3], needs[:3], strict=True))
        _chain(part, dq)
        if dk is not None or dv is not None:
            _keys_and_values(part, dk, dv)
        sums: dict[int, Tensor] = {}
        if needs[4] or needs[5]:
            sums |= _by_h1(part, needs[4], needs[5])
        if needs[3] or needs[6] or needs[7]:
            sums |= _by_h2(part)
        totals = {i: total + totals[i] if i in totals else total for i, total in sums.items()}
    for i, total in totals.items():
        if needs[i]:
            gradients[i].copy_(total.reshape(gradients[i].shape))
    return gradients


def _chain(part: _Part, dq: Tensor | None) -> None:
    """Write dz, da and the scales of q, and dq."""
    problem, q = part.problem, part.problem.q
    launch = planned(_plan_chain, (part.dy, dq, *problem.signature()), problem.eps is not None)
    launch(
        part.dy, q, part.a_rows, *part.packed, part.dz_rows, part.da_rows, part.scales, q if dq is None else dq,
        problem.eps or 0.0,
    )  # fmt: skip


def _plan_chain(dy: Tensor, dq: Tensor | None, *tensors: Any) -> Launch:
    from ..kernels.relational import relational_backward

    problem = _problem(*tensors)
    q, key = problem.q, problem.key("backward")
    config = lookup.config(key, q)
    dy_layout, q_layout, dq_layout = clip_layout(dy), clip_layout(q), clip_layout(q if dq is None else dq)
    return Launch(
        relational_backward, _programs(problem, config.block_p), key,
        problem.size, dy_layout.strides, q_layout.strides, dq_layout.strides,
        DY_FORM=dy_layout.form, Q_FORM=q_layout.form, DQ_FORM=dq_layout.form, NEED_Q=dq is not None,
        ORDER=config.order, **problem.constants(*_EVERY),
        **_blocks(config, problem, 8, "BLOCK_P", "BLOCK_M", "BLOCK_C", "BLOCK_E"),
    )  # fmt: skip


def _keys_and_values(part: _Part, dk: Tensor | None, dv: Tensor | None) -> None:
    """Write the gradients of k and v: first of what was packed, then through the normalisation."""
    problem, packed = part.problem, part.packed
    q, k, v = problem[:3]
    fold_keys, fold_values, unpack, dk_shape, dv_shape = planned(
        _plan_keys_and_values, (part.dy, dk, dv, *problem.signature()), problem.eps is not None
    )
    dk_rows, dv_rows = (q.new_empty(shape, dtype=wider(q.dtype)) for shape in (dk_shape, dv_shape))
    if fold_keys is not None:
        fold_keys(q, part.da_rows, part.scales, packed.h1, dk_rows)
    if fold_values is not None:
        fold_values(part.a_rows, part.dz_rows, part.z_rows, part.dy, packed.h2, packed.g, dv_rows)
    clips = [v if t is None else t for t in (k, v, dk, dv)]
    unpack(*clips[:2], dk_rows, dv_rows, *clips[2:], problem.eps or 0.0)


def _plan_keys_and_values(dy: Tensor, dk: Tensor | None, dv: Tensor | None, *tensors: Any) -> tuple[Any, ...]:
    """The launches that are needed, and the shapes of the gradients of what was packed."""
    from ..kernels.relational_gradients import relational_unpack

    problem = _problem(*tensors)
    q, k, v = problem[:3]
    c, _, e, _ = problem.channels
    positions = q.shape[0] * math.prod(problem.size)
    key = problem.key("pack")
    config = lookup.config(key, q)
    layouts = [clip_layout(v if t is None else t) for t in (k, v, dk, dv)]
    names = ("K_FORM", "V_FORM", "DK_FORM", "DV_FORM")
    forms: dict[str, Any] = {name: layout.form for name, layout in zip(names, layouts, strict=True)}
    unpack = Launch(
        relational_unpack, _programs(problem, config.block_p), key,
        problem.size, *(layout.strides for layout in layouts),
        **forms, **problem.constants("C", "E", "C_PAD", "E_PAD", "NORMED"),
        NEED_K=dk is not None, NEED_V=dv is not None, BLOCK_P=config.block_p, num_warps=config.num_warps,
    )  # fmt: skip
    folds = None if dk is None else _plan_fold_keys(problem), None if dv is None else _plan_fold_values(problem, dy)
    return *folds, unpack, (0,) if dk is None else (positions, c), (0,) if dv is None else (positions, e)


def _plane(problem: Problem, config: RelationalConfig) -> tuple[int, dict[str, int]]:
    """How many tiles of positions there are, and their blocks."""
    down, across = (-(-n // tile) for n, tile in zip(problem.size[1:], config.plane, strict=True))
    tiles = problem.q.shape[0] * problem.size[0] * down * across
    return tiles, {"PLANE_H": config.plane[0], "PLANE_W": config.plane[1], "BLOCK_S": config.block_p}


def _plan_fold_keys(problem: Problem) -> Launch:
    from ..kernels.relational_gradients import relational_fold_keys

    key, q_layout = problem.key("fold_keys"), clip_layout(problem.q)
    config = lookup.config(key, problem.q)
    tiles, tile = _plane(problem, config)
    sizes = problem.constants("L", "C", "D", "C_PAD", "D_PAD", "M_PAD", "NORMED", "WINDOW")
    blocks = _blocks(config, problem, 16, "BLOCK_C", "BLOCK_D")
    return Launch(
        relational_fold_keys, tiles * (sizes["C_PAD"] // blocks["BLOCK_C"]), key,
        problem.size, q_layout.strides, Q_FORM=q_layout.form,
        TAPS=min(64, _pad(math.prod(problem.window[1:]), 8)), **sizes, **tile, **blocks,
    )  # fmt: skip


def _plan_fold_values(problem: Problem, dy: Tensor) -> Launch:
    from ..kernels.relational_gradients import relational_fold_values

    key, dy_layout = problem.key("fold_values"), clip_layout(dy)
    config = lookup.config(key, problem.q)
    tiles, tile = _plane(problem, config)
    sizes = problem.constants("L", "D", "E", "F", "D_PAD", "E_PAD", "F_PAD", "HAS_G", "WINDOW")
    blocks = _blocks(config, problem, 8, "BLOCK_D")
    blocks["BLOCK_D"] = min(blocks["BLOCK_D"], sizes["F_PAD"])
    return Launch(
        relational_fold_values, tiles, key,
        problem.size, dy_layout.strides, DY_FORM=dy_layout.form, **sizes, **tile, **blocks,
    )  # fmt: skip


def _sums(splits: int, wanted: bool, *shape: int) -> tuple[int, ...]:
    """The shape of the sums that `splits` programs leave, each its own; they are added in fixed order."""
    return (splits, *shape) if wanted else (0,)


def _by_h1(part: _Part, need_h1: bool, need_p1: bool) -> dict[int, Tensor]:
    """The gradients of h1 (4) and p1 (5)."""
    problem, q = part.problem, part.problem.q
    launch, *shapes = planned(_plan_by_h1, problem.signature(), problem.eps is not None, need_h1, need_p1)
    by_h1, by_p1 = (q.new_empty(shape, dtype=wider(q.dtype)) for shape in shapes)
    launch(q, part.da_rows, part.scales, part.packed.kn, by_h1, by_p1)
    channels, latent, _, _ = problem.channels
    found = {}
    if need_h1:
        found[4] = by_h1[:, :channels, : problem.taps, :latent].sum(0).mT
    if need_p1:
        found[5] = by_p1[:, :channels, :latent].sum(0)
    return found


def _plan_by_h1(*given: Any) -> tuple[Any, ...]:
    """The launch, and the shapes of its sums."""
    from ..kernels.relational_gradients import relational_by_h1

    *tensors, need_h1, need_p1 = given
    problem = _problem(*tensors)
    q, key = problem.q, problem.key("by_h1")
    config = lookup.config(key, q)
    constants = problem.constants("L", "C", "D", "C_PAD", "D_PAD", "M_PAD", "WINDOW", "NORMED")
    c, d, m = (constants[name] for name in ("C_PAD", "D_PAD", "M_PAD"))
    q_layout = clip_layout(q)
    blocks = _blocks(config, problem, 16, "BLOCK_P", "BLOCK_M", "BLOCK_C", "BLOCK_D")
    by_taps = (m // config.block_m if need_h1 else 0) + need_p1
    launch = Launch(
        relational_by_h1, config.splits * (c // blocks["BLOCK_C"]) * (d // blocks["BLOCK_D"]) * by_taps, key,
        q.shape[0], problem.size, q_layout.strides,
        Q_FORM=q_layout.form, HAS_H1=need_h1, HAS_P1=need_p1, SPLITS=config.splits, **constants, **blocks,
    )  # fmt: skip
    return launch, _sums(config.splits, need_h1, c, m, d), _sums(config.splits, need_p1, c, d)


def _by_h2(part: _Part) -> dict[int, Tensor]:
    """The gradients of h2 (3), g (6) and identity (7), of those that there are."""
    problem, q = part.problem, part.problem.q
    launch, *shapes = planned(_plan_by_h2, (part.dy, *problem.signature()), problem.eps is not None)
    by_h2, by_g, by_identity = (q.new_empty(shape, dtype=wider(q.dtype)) for shape in shapes)
    launch(part.a_rows, part.dz_rows, part.z_rows, part.dy, part.packed.vn, by_h2, by_g, by_identity)
    _, latent, values, context = problem.channels
    found = {3: by_h2[:, : problem.taps, :latent].sum(0).mT}
    if problem.g is not None:
        found[6] = by_g[:, : problem.taps, :context].sum(0).mT
    if problem.identity is not None:
        found[7] = by_identity[:, :values, :context].sum(0)
    return found


def _plan_by_h2(dy: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """The launch, and the shapes of its sums."""
    from ..kernels.relational_gradients import relational_by_h2

    problem = _problem(*tensors)
    q, key = problem.q, problem.key("by_h2")
    config = lookup.config(key, q)
    constants = problem.constants(
        "L", "D", "E", "F", "D_PAD", "E_PAD", "E_WIDE", "F_PAD", "M_PAD", "WINDOW", "HAS_G", "HAS_IDENTITY"
    )
    d, e, f, m = (constants[name] for name in ("D_PAD", "E_WIDE", "F_PAD", "M_PAD"))
    has_g, has_identity = problem.g is not None, problem.identity is not None
    dy_layout = clip_layout(dy)
    launch = Launch(
        relational_by_h2, config.splits * (m // config.block_m + has_identity), key,
        q.shape[0], problem.size, dy_layout.strides, DY_FORM=dy_layout.form, SPLITS=config.splits, **constants,
        **_blocks(config, problem, 8, "BLOCK_P", "BLOCK_M"),
    )  # fmt: skip
    shapes = (
        _sums(config.splits, True, m, d),
        _sums(config.splits, has_g, m, f),
        _sums(config.splits, has_identity, e, f),
    )
    return launch, *shapes


# --- for tuning -----------------------------------------------------------------------------------------------------


def keys_of(call: TunedCall, _: str) -> list[Key]:
    """The keys of the kernels that a call launches, in order."""
    feature = torch.empty(0, dtype=call.dtype(), device="cpu")
    clips, queries, c, *size = call.shape("q")
    d, *window = call.shape("h2")
    e = call.shape("v")[1]
    f = call.shape("g")[0] if "g" in call.tensors else e
    kinds = ["pack", "forward"]
    if call.backward:
        needed = {
            "backward": True, "fold_keys": call.wants("k"), "fold_values": call.wants("v"),
            "by_h1": call.wants("h1", "p1"), "by_h2": call.wants("h2", "g", "identity"),
        }  # fmt: skip
        kinds += [kind for kind, wanted in needed.items() if wanted]
    sizes = (size[0], size[1], size[2]), queries, (c, d, e, f), (window[0], window[1], window[2])
    return [key_of(kind, clips, *sizes, feature) for kind in kinds]
