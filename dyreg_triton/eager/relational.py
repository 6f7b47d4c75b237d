"""Relational self-attention in plain torch.

Frames are walked a few at a time, and nothing but y and the gradients exists for more of them: the working memory is
what a core's cache holds. A correlation of one channel with M taps each of J filters is a convolution, which CPUs do
near their peak rate. Its gradient, J channels to one, is not (one lane of a vector would work), so it becomes one of J
to kt, whose frames are then added up. The matrix products of each position are sums over channels of whole frames:
batched products of 8 x 8 matrices would take nine tenths of the time. The other order of evaluation, by kernels (L, M)
of each position, has fewer operations where E > 2 L, but its windows are copies and not convolutions: it is not used.

Backward computes again what it needs, so only the inputs are kept. Sums accumulate in float32 (float64 for float64).
torch.compile, export and what transforms or differentiates gradients get the same equation over whole clips, without
loops or writes in place. Arguments are checked by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv3d_weight

from .._core.autocast import full_precision

_FEW = 100  # positions of a padded frame
_NUMBERS = 1 << 20  # that a step of the walk may hold of queries or of context: 4 MiB of float32


def _pieces(length: int, numbers: int) -> list[slice]:
    """`length` items of `numbers` each, cut into equal pieces of at most _NUMBERS or one item."""
    count = -(-length // max(1, _NUMBERS // numbers))
    step = -(-length // count)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x: Tensor, dim: int, eps: float | None) -> Tensor:
    return x if eps is None else x * (x.square().sum(dim, keepdim=True) + eps).rsqrt()


def _normalised_grad(grad: Tensor, x: Tensor, dim: int, eps: float | None) -> Tensor:
    if eps is None:
        return grad
    scale = (x.square().sum(dim, keepdim=True) + eps).rsqrt()
    unit = x * scale
    return (grad - unit * (unit * grad).sum(dim, keepdim=True)) * scale


def _at_positions(weight: Tensor) -> Tensor:
    return _wide(weight)[..., None, None, None]


def _product(x: Tensor, m: Tensor, out: Tensor | None = None) -> Tensor:
    """The matrix product of (A, I, *) and (I, J, *) at each position, (A, J, *), or that added to `out`."""
    first = 0
    if out is None:
        first, out = 1, x[:, 0].unsqueeze(1) * m[0]
    for i in range(first, m.shape[0]):
        out.addcmul_(x[:, i].unsqueeze(1), m[i])
    return out


def _padded(x: Tensor, taps: Tensor) -> Tensor:
    """x (*, T, H, W) and the frames that its windows reach; convolving pads the rest, for even sizes one too few."""
    kt, kh, kw = taps.shape[1:]
    return F.pad(x, (1 - kw % 2, 0, 1 - kh % 2, 0, kt // 2, (kt - 1) // 2))


def _margin(taps: Tensor) -> tuple[int, int, int]:
    return 0, (taps.shape[2] - 1) // 2, (taps.shape[3] - 1) // 2


def _correlated(x: Tensor, taps: Tensor) -> Tensor:
    """sum_m X_n[m] taps[:, m]: (N, J, t, H, W) of padded x (N, t + kt - 1, H, W) and taps (J, kt, kh, kw)."""
    return F.conv3d(x.unsqueeze(1), taps.unsqueeze(1), padding=_margin(taps))


def _taps_grad(grad: Tensor, x: Tensor, taps: Tensor) -> Tensor:
    shape = taps.unsqueeze(1).shape
    return conv3d_weight(x.unsqueeze(1), shape, grad, padding=_margin(taps)).squeeze(1)


def _frames_grad(grad: Tensor, taps: Tensor) -> Tensor:
    """(N, kt, t, H, W) of a gradient (N, J, t, H, W): what [:, i, t] adds to padded frame t + i."""
    kh, kw = taps.shape[2:]
    if kh % 2 == 0 or kw % 2 == 0:
        grad = F.pad(grad, (0, 1 - kw % 2, 0, 1 - kh % 2))
    return F.conv3d(grad, taps.flip(2, 3).transpose(0, 1).unsqueeze(2), padding=_margin(taps))


def _add_to_frames(dx: Tensor, grads: Tensor) -> None:
    for i, frames in enumerate(grads.unbind(1)):
        dx[:, i : i + frames.shape[1]] += frames


class _Call:
    """What forward and backward share: the arguments made ready, and the walk over them."""

    def __init__(self, args: Sequence[Any]):
        self.q, k, v, h2, self.h1, p1, g, identity, self.eps = args
        self.num_d, self.kt = h2.shape[:2]
        self.taps = _wide(h2 if g is None else torch.cat([h2, g]))
        self.p1 = None if p1 is None else _at_positions(p1)
        self.identity = None if identity is None else _at_positions(identity)
        self.values = _padded(_normalised(_wide(v), 1, self.eps), h2)
        if k is not None:
            self.keys, self.h1 = _padded(_normalised(_wide(k), 1, self.eps), h2), _wide(self.h1)

    def walk(self) -> Iterator[tuple[int, slice, slice]]:
        """A clip, some of its frames, and the padded frames that their windows see."""
        clips, num_l, num_c, length, height, width = self.q.shape
        held = 2 * num_l * (num_c + self.values.shape[1])  # q, a, z or y, and a gradient
        for clip in range(clips):
            for frames in _pieces(length, held * height * width):
                yield clip, frames, slice(frames.start, frames.stop + self.kt - 1)

    def queries(self, clip: int, frames: slice) -> Tensor:
        return _wide(self.q[clip, :, :, frames]).contiguous()

    def projection(self, clip: int, seen: slice) -> Tensor | None:
        """P1 + X^K * H1 (C, D, t, H, W), or what broadcasts to it; None for the identity."""
        if self.h1 is None:
            return self.p1
        keys = self.keys[clip, :, seen]
        if keys.shape[2] * keys.shape[3] <= _FEW:  # one call for all channels is the faster where each has little to do
            taps = self.h1.flatten(0, 1).unsqueeze(1)
            k_h1 = F.conv3d(keys.unsqueeze(0), taps, padding=_margin(self.h1[0]), groups=keys.shape[0])
            k_h1 = k_h1.view(*self.h1.shape[:2], *k_h1.shape[2:])
        else:
            k_h1 = torch.cat([_correlated(x, taps) for x, taps in zip(keys.unsqueeze(1), self.h1, strict=True)])
        return k_h1 if self.p1 is None else k_h1.add_(self.p1)

    def context(self, clip: int, seen: slice) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Some channels e of E, their H2^T X^V (e, D, t, H, W), and I + (X^V)^T G (e, F, t, H, W) or None."""
        values = self.values[clip, :, seen]
        positions = (seen.stop - seen.start - self.kt + 1) * self.q.shape[4] * self.q.shape[5]
        for channels in _pieces(values.shape[0], self.taps.shape[0] * positions):
            both = _correlated(values[channels], self.taps)
            basis, mixing = both[:, : self.num_d], both[:, self.num_d :]
            if self.identity is not None:
                mixing += self.identity[channels]
            yield channels, basis, mixing if mixing.shape[1] else None


def _forward(args: Sequence[Any]) -> Tensor:
    """y as it lies in memory, (B, F or E, L, T, H, W)."""
    call = _Call(args)
    q, v, g = args[0], args[2], args[6]
    y = q.new_empty(q.shape[0], v.shape[1] if g is None else g.shape[0], q.shape[1], *q.shape[3:])
    for clip, frames, seen in call.walk():
        a = _normalised(call.queries(clip, frames), 1, call.eps)
        projection = call.projection(clip, seen)
        if projection is not None:
            a = _product(a, projection)
        out = None
        for channels, basis, mixing in call.context(clip, seen):
            z = _product(a, basis.transpose(0, 1))
            if mixing is None:
                y[clip, channels, :, frames] = z.transpose(0, 1)
            else:
                out = _product(z, mixing, out)
        if out is not None:
            y[clip, :, :, frames] = out.transpose(0, 1)
    return y


def _backward(grad: Tensor, args: Sequence[Any], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, h2, h1, p1, g and identity; None for those not needed."""
    call = _Call(args)
    q, k, v, h2, eps = *args[:4], args[8]
    kernel_needed, context_needed = any(needed[i] for i in (0, 1, 4, 5)), any(needed[i] for i in (2, 3, 6, 7))
    inner = (..., slice(1 - h2.shape[2] % 2, None), slice(1 - h2.shape[3] % 2, None))  # of padded frames
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if needed[0] else None
    dkeys = torch.zeros_like(call.keys[inner]) if needed[1] else None
    dvalues = torch.zeros_like(call.values[inner]) if needed[2] else None
    dtaps = torch.zeros_like(call.taps) if needed[3] or needed[6] else None
    dh1 = torch.zeros_like(call.h1) if needed[4] else None
    dp1 = torch.zeros_like(call.p1) if call.p1 is not None and needed[5] else None
    didentity = torch.zeros_like(call.identity) if call.identity is not None and needed[7] else None

    for clip, frames, seen in call.walk():
        raw, dy = call.queries(clip, frames), _wide(grad[clip, :, :, frames]).transpose(0, 1).contiguous()
        unit = _normalised(raw, 1, eps)
        projection = call.projection(clip, seen)
        a = unit if projection is None else _product(unit, projection)
        da = torch.zeros_like(a) if kernel_needed else None

        for channels, basis, mixing in call.context(clip, seen):
            dz = dy[:, channels] if mixing is None else _product(dy, mixing.transpose(0, 1))
            if da is not None:
                _product(dz, basis, da)
            if not context_needed:
                continue
            dboth = basis.new_zeros(basis.shape[0], call.taps.shape[0], *basis.shape[2:])
            _product(dz.transpose(0, 1), a, dboth[:, : call.num_d])
            if mixing is not None:
                z = _product(a, basis.transpose(0, 1))
                dmixing = _product(z.transpose(0, 1), dy, dboth[:, call.num_d :])
                if didentity is not None:
                    didentity[channels] += dmixing.sum((2, 3, 4), keepdim=True)
            if dtaps is not None:
                dtaps += _taps_grad(dboth, call.values[clip, channels, seen], call.taps)
            if dvalues is not None:
                _add_to_frames(dvalues[clip, channels, seen], _frames_grad(dboth, call.taps))

        if da is not None and dq is not None:
            dunit = da if projection is None else _product(da, projection.transpose(0, 1))
            dq[clip, :, :, frames] = _normalised_grad(dunit, raw, 1, eps)
        if da is not None and any(needed[i] for i in (1, 4, 5)):
            grads = []
            for c in range(q.shape[2]):
                drow = _product(unit[:, c : c + 1].transpose(0, 1), da)
                if dp1 is not None:
                    dp1[c] += drow[0].sum((1, 2, 3), keepdim=True)
                if dh1 is not None:
                    dh1[c] += _taps_grad(drow, call.keys[clip, c : c + 1, seen], call.h1[c])
                if dkeys is not None:
                    grads.append(_frames_grad(drow, call.h1[c]))
            if dkeys is not None:
                _add_to_frames(dkeys[clip, :, seen], torch.cat(grads))

    own = slice(call.kt // 2, call.kt // 2 + q.shape[3])
    dk = None if dkeys is None else _normalised_grad(dkeys[:, :, own], _wide(k), 1, eps)
    dv = None if dvalues is None else _normalised_grad(dvalues[:, :, own], _wide(v), 1, eps)
    dh2, dg = (None, None) if dtaps is None else (dtaps[: call.num_d], dtaps[call.num_d :])
    found = (dq, dk, dv, dh2, dh1, dp1, dg, didentity)
    return tuple(
        d.view(x.shape).to(x.dtype) if d is not None and need else None
        for d, x, need in zip(found, args[:8], needed[:8], strict=True)
    )


def _product_of_clips(x: Tensor, m: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return (x.unsqueeze(3) * m.unsqueeze(1)).sum(2)  # one loop of the compiler's
    return torch.einsum("blithw,bijthw->bljthw", x, m.expand(x.shape[0], *m.shape[1:3], *x.shape[3:]))


def _whole(args: Sequence[Any]) -> Tensor:
    """The same over whole clips, of operations that torch can trace, transform and differentiate again."""
    q, k, v, h2, h1, p1, g, identity, eps = args
    a = _normalised(_wide(q), 2, eps)
    projection = None if p1 is None else _at_positions(p1).unsqueeze(0)
    if k is not None:
        keys, taps = _padded(_normalised(_wide(k), 1, eps), h2), _wide(h1).flatten(0, 1).unsqueeze(1)
        k_h1 = F.conv3d(keys, taps, padding=_margin(h2), groups=h1.shape[0]).unflatten(1, h1.shape[:2])
        projection = k_h1 if projection is None else k_h1 + projection
    if projection is not None:
        a = _product_of_clips(a, projection)
    values = _padded(_normalised(_wide(v), 1, eps), h2)
    both = _correlated(values.flatten(0, 1), _wide(h2 if g is None else torch.cat([h2, g])))
    both = both.unflatten(0, v.shape[:2])
    z = _product_of_clips(a, both[:, :, : h2.shape[0]].transpose(1, 2))
    if g is not None:
        mixing = both[:, :, h2.shape[0] :]
        z = _product_of_clips(z, mixing if identity is None else mixing + _at_positions(identity))
    return z.to(q.dtype).transpose(1, 2).contiguous()


def _whole_of(args: Sequence[Any], moving: Sequence[bool]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`_whole` as a function of some of its arguments, and those."""
    chosen = [i for i, moves in enumerate(moving) if moves]

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(chosen, tensors, strict=True))
        return _whole([given.get(i, arg) for i, arg in enumerate(args)])

    return function, [args[i] for i in chosen]


class _RelationalAttention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        with full_precision(args[0].device.type):
            return _forward(args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args, needed = (*ctx.saved_tensors, ctx.eps), ctx.needs_input_grad
        with full_precision(grad.device.type):
            if not torch.is_grad_enabled():
                return (*_backward(grad, args, needed), None)
            function, primals = _whole_of(args, needed)  # a gradient to be differentiated
            grads = iter(torch.func.vjp(function, *primals)[1](grad))
            return tuple(next(grads) if need else None for need in needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        args, moving = (*ctx.saved_tensors, ctx.eps), [t is not None for t in tangents]
        with full_precision(args[0].device.type):
            function, primals = _whole_of(args, moving)
            y, pull = torch.func.vjp(function, *primals)[:2]
            push = torch.func.vjp(pull, torch.zeros_like(y))[1]  # the transpose of the transpose: levels cannot nest
            return push(tuple(t for t in tangents if t is not None))[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        with full_precision(args[0].device.type):
            return torch.vmap(lambda *each: _whole(each), in_dims)(*args), 0


def relational_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    h2: Tensor,
    h1: Tensor | None,
    p1: Tensor | None,
    g: Tensor | None,
    identity: Tensor | None,
    eps: float | None,
) -> Tensor:
    """y (B, L, F or E, T, H, W), a view of (B, F, L, T, H, W) memory."""
    args = (q, k, v, h2, h1, p1, g, identity, eps)
    # a trace, torch.jit.trace's too, keeps no autograd.Function
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        with full_precision(q.device.type):
            return _whole(args).transpose(1, 2)
    return _RelationalAttention.apply(*args).transpose(1, 2)
