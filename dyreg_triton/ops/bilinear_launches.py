"""The bilinear attentional transform on Triton: from tensors to launches of the bilinear kernels."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._core.gpu import family
from .._core.layouts import memory_format, units
from ..configs import lookup
from ..configs.bilinear import BilinearConfig, key_of, padded_cells
from ..configs.keys import Key
from ..configs.table import SPACES
from .launch import Launch, MapLayout, accumulator, map_layout, planned, precision, register_limit, wider
from .recording import TunedCall


class Problem(NamedTuple):
    """The tensors of a call, and its sizes in the kernels' terms."""

    x: Tensor
    p: Tensor
    q: Tensor
    t: Tensor | None

    @property
    def cells(self) -> tuple[int, int]:
        """Sh and Sw."""
        return self.p.shape[-1], self.q.shape[-1]

    @property
    def units(self) -> int:
        """Runs of channels that share p, q and t."""
        return units(self.p.shape[1], *(() if self.t is None else (self.t.shape[1],)))

    def key(self, kind: str) -> Key:
        """Of one of its kernels."""
        mixes, ts = (1, 1) if self.t is None else (self.t.shape[1], self.t.shape[-1])
        return key_of(kind, tuple(self.x.shape), self.p.shape[1], self.cells, mixes, ts, self.x)

    def unmixed(self) -> Problem:
        """The same without t."""
        return self._replace(t=None)


def empty_gradients(problem: Problem, needs: list[bool]) -> list[Tensor]:
    """Where the gradients go, in the order of the arguments; empty tensors for those not needed."""
    x = problem.x
    by_x = torch.empty_like(x, memory_format=memory_format(x)) if needs[0] else x.new_empty(0)
    wanted = [m if need else None for m, need in zip(problem[1:], needs[1:], strict=True)]
    return [by_x] + [x.new_empty(0) if m is None else m.new_empty(m.shape) for m in wanted]


def _layout(clip: Tensor) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """(strides, form) of a clip (B, C, T, H, W), see kernels/bilinear.py."""
    batch, channel, frame, row, column = (
        0 if size == 1 else stride for size, stride in zip(clip.shape, clip.stride(), strict=True)
    )
    layout: MapLayout = map_layout(clip.transpose(1, 2), (batch, 0, frame))
    steps = zip(clip.shape[1:], (channel, 0, row, column), strict=True)
    wide = sum((size - 1) * stride for size, stride in steps) >= 2**31 - 2**20
    return layout.strides, (layout.flat, layout.align, layout.channels_last, layout.gapless, wide)


def _shared(problem: Problem, config: BilinearConfig, mixed: bool) -> dict[str, Any]:
    """Compile-time arguments of the forward and the backward."""
    _, channels, frames, height, width = problem.x.shape
    down, across = problem.cells
    ts = problem.t.shape[-1] if mixed and problem.t is not None else 0
    return {
        "SHAPE": (height, width, height // down, width // across),
        "CELLS": (down, across, *padded_cells(problem.cells, config.joint)),
        "FRAMES": frames, "UNITS": problem.units, "GROUPS": problem.p.shape[1],
        "MIXES": problem.t.shape[1] if ts else 1, "CU": channels // problem.units,  # type: ignore[union-attr]
        "TS": ts, "TS_PAD": 1 << max(ts - 1, 0).bit_length(), "JOINT": config.joint, "STEPS": config.steps,
        "ACC": accumulator(problem.x.dtype), "PRECISION": precision(problem.x, "tf32x3"), "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
        # the compiler would spill a register to run more programs at once
        **register_limit(255 if mixed or family(problem.x.device) == "blackwell" else None, problem.x),
    }  # fmt: skip


def _blocks(problem: Problem, config: BilinearConfig) -> int:
    """How many programs share the columns of a unit's frame."""
    _, channels, _, height, width = problem.x.shape
    down, across = problem.cells
    columns = channels // problem.units * (height // down) * (width // across)
    return -(-columns // (config.block_n * config.steps))


def _matrix_strides(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of p, q and t."""
    return tuple((0,) * 4 if m is None else m.stride() for m in problem[1:])


def forward(problem: Problem, y: Tensor) -> None:
    """Write y, in one launch or with frames mixed in a second."""
    x, p, q, t = problem
    launch, mix = planned(_plan_forward, (y, *problem))
    launch(x, p, q, x if t is None else t, y)
    if mix is not None and t is not None:
        mix(y, y, t, y, y)


def _plan_forward(y: Tensor, *tensors: Any) -> tuple[Launch, Launch | None]:
    from ..kernels.bilinear import bilinear_forward

    problem = Problem._make(tensors)
    if problem.t is not None:
        key = problem.key("forward_mixed")
        config = lookup.config(key, problem.x)
        if not config.fused:
            return _plan_forward(y, *problem.unmixed())[0], _plan_mix(y, y, problem.t, False, False)[0]
    else:
        key = problem.key("forward")
        config = lookup.config(key, problem.x)
    shared = _shared(problem, config, problem.t is not None)
    phases = shared["FRAMES"] // (shared["TS"] or 1)
    x_strides, x_form = _layout(problem.x)
    y_strides, y_form = _layout(y)
    launch = Launch(
        bilinear_forward, problem.x.shape[0] * problem.units * phases * _blocks(problem, config), key,
        x_strides, *_matrix_strides(problem), y_strides,
        X_FORM=x_form, Y_FORM=y_form, **shared,
    )  # fmt: skip
    return launch, None


def _plan_mix(z: Tensor, given: Tensor, t: Tensor, back: bool, need_t: bool) -> tuple[Launch, tuple[int, ...]]:
    """The launch that mixes frames in a pass of its own, and the shape of the rows of t's gradient."""
    from ..kernels.bilinear import bilinear_mix

    clips, channels, frames, height, width = z.shape
    mixes, ts = t.shape[1], t.shape[-1]
    kind = "mix_backward" if back else "mix"
    key = key_of(kind, tuple(z.shape), mixes, (1, 1), mixes, ts, z)
    config = lookup.config(key, z)
    blocks = -(-(channels // mixes * height * width) // config.block_n)
    z_strides, z_form = _layout(z)
    given_strides, given_form = _layout(given)
    launch = Launch(
        bilinear_mix, clips * mixes * (frames // ts) * blocks, key,
        z_strides, given_strides, t.stride(),
        SHAPE=(height, width), FRAMES=frames, UNITS=mixes, MIXES=mixes, CU=channels // mixes, TS=ts,
        TS_PAD=max(16, 1 << (ts - 1).bit_length()), Z_FORM=z_form, GIVEN_FORM=given_form, BACKWARD=back,
        NEED_R=need_t, ACC=accumulator(z.dtype), PRECISION=precision(z, "tf32x3"), BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **register_limit(255, z),
    )  # fmt: skip
    return launch, (clips, mixes, blocks * (frames // ts), ts, ts)


# --- the gradients --------------------------------------------------------------------------------------------------


def backward(problem: Problem, dy: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of x, p, q and t, where they are needed."""
    x, p, q, t = problem
    plan = planned(_plan_backward, (dy, *problem), *needs)
    if plan is None:
        return _backward_in_passes(problem, dy, needs)
    launch, shapes = plan
    wide = wider(x.dtype)
    by_x = torch.empty_like(x, memory_format=memory_format(x)) if needs[0] else x.new_empty(0)
    rows = [x.new_empty(shape, dtype=wide) for shape in shapes]
    launch(dy, x, p, q, x if t is None else t, by_x if needs[0] else x, *rows)
    sums = [
        _summed(r, cast(Tensor, m)) if need else x.new_empty(0)
        for r, m, need in zip(rows, problem[1:], needs[1:], strict=True)
    ]
    return [by_x, *sums]


def _plan_backward(dy: Tensor, *given: Any) -> tuple[Launch, list[tuple[int, ...]]] | None:
    """The launch, and the shapes of the rows of the gradients of p, q and t; None where passes are needed."""
    from ..kernels.bilinear import bilinear_backward

    *tensors, need_x, need_p, need_q, need_t = given
    problem = Problem._make(tensors)
    x, p, q, t = problem
    key = problem.key("backward" if t is None else "backward_mixed")
    config = lookup.config(key, x)
    if t is not None and not config.fused:
        return None
    shared = _shared(problem, config, t is not None)
    clips, frames, ts, count = x.shape[0], shared["FRAMES"], shared["TS"], problem.units
    phases, blocks = frames // (ts or 1), _blocks(problem, config)
    need_pq = need_p or need_q
    dy_strides, dy_form = _layout(dy)
    x_strides, x_form = _layout(x)
    dx_strides, dx_form = _layout(torch.empty_like(x, memory_format=memory_format(x), device="meta")) if need_x else (
        x_strides, x_form
    )  # fmt: skip
    launch = Launch(
        bilinear_backward, clips * count * phases * blocks, key,
        dy_strides, x_strides, *_matrix_strides(problem), dx_strides,
        DY_FORM=dy_form, X_FORM=x_form, DX_FORM=dx_form, NEED_X=need_x, NEED_PQ=need_pq, NEED_R=need_t, **shared,
    )  # fmt: skip
    # a group's rows lie together: those of its units, blocks and, of t, phases
    by_p = [(clips, m.shape[1], count // m.shape[1] * blocks, *m.shape[2:]) if need_pq else (0,) for m in (p, q)]
    by_t = (0,) if not need_t or t is None else (clips, t.shape[1], count // t.shape[1] * blocks * phases, ts, ts)
    return launch, [*by_p, by_t]


def _backward_in_passes(problem: Problem, dy: Tensor, needs: list[bool]) -> list[Tensor]:
    """The same where the frames of a phase do not fit on chip: frames are unmixed first, into a clip of their own."""
    x, t = problem.x, cast(Tensor, problem.t)
    back = torch.empty_like(x, memory_format=memory_format(x))
    if needs[3]:
        forward(problem.unmixed(), back)
    mix, shape = planned(_plan_mix, (back, dy, t), True, needs[3])
    rows = x.new_empty(shape if needs[3] else 0, dtype=wider(x.dtype))
    mix(back, dy, t, back, rows)
    by_t = _summed(rows, t) if needs[3] else x.new_empty(0)
    if not any(needs[:3]):
        return [x.new_empty(0)] * 3 + [by_t]
    return [*backward(problem.unmixed(), back, [*needs[:3], False])[:3], by_t]


def _summed(rows: Tensor, like: Tensor) -> Tensor:
    """The gradient of `like` from rows (B, G, parts, ...), summed in fixed order: bit-identical from run to run."""
    total = rows.squeeze(2) if rows.shape[2] == 1 else rows.sum(2)
    return total.to(like.dtype)


# --- for tuning -----------------------------------------------------------------------------------------------------


def keys_of(call: TunedCall, family: str) -> list[Key]:
    """The keys of the kernels that a call launches, in order."""
    feature = torch.empty(0, dtype=call.dtype(), device="cpu")
    shape, groups = call.shape("x"), call.shape("p")[1]
    cells = call.shape("p")[-1], call.shape("q")[-1]
    mixes, ts = (call.shape("t")[1], call.shape("t")[-1]) if "t" in call.tensors else (1, 1)

    def key(kind: str) -> Key:
        if kind.startswith("mix"):
            return key_of(kind, shape, mixes, (1, 1), mixes, ts, feature)
        if kind.endswith("mixed"):
            return key_of(kind, shape, groups, cells, mixes, ts, feature)
        return key_of(kind, shape, groups, cells, 1, 1, feature)

    if "t" not in call.tensors:
        return [key("forward")] + [key("backward")] * bool(call.backward)

    def fused(kind: str) -> bool:
        return SPACES["bilinear"].default(key(kind), family).fused

    kinds = ["forward_mixed"] if fused("forward_mixed") else ["forward", "mix"]
    if call.backward:
        passes = ["mix_backward"] + ["forward"] * call.wants("t") + ["backward"] * call.wants("x", "p", "q")
        kinds += ["backward_mixed"] if fused("backward_mixed") else passes
    return list(dict.fromkeys(key(kind) for kind in kinds))
