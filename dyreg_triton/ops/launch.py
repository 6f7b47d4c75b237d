"""From tensors to kernel arguments: strides, precision, the launch itself, and what of it is kept for the next call."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._core import dispatch, gpu
from .._core.gpu import family, matmul_precision
from ..configs import lookup


class MapLayout(NamedTuple):
    """How a kernel addresses a map (*, C, H, W) with up to three leading dimensions, without copying it.

    Strides of the leading dimensions, of C, H and W, all but the one that is 1 divided by `align`, their common
    divisor up to 16 bytes: the compiler learns it and keeps wide loads where H*W is no multiple of 16.
    `flat`: cell p is at p times the W stride. `channels_last`: C has stride 1 and W has not.
    `gapless`: channels follow each other as their cells do, so that only the leading strides are used.
    """

    strides: tuple[int, ...]
    flat: bool
    align: int
    channels_last: bool
    gapless: bool

    def constants(self, prefix: str = "") -> dict[str, Any]:
        """The compile-time side of the layout."""
        return {
            prefix + "FLAT": self.flat, prefix + "ALIGN": self.align, prefix + "CHANNELS_LAST": self.channels_last,
            prefix + "GAPLESS": self.gapless,
        }  # fmt: skip


def leading(*maps: Tensor) -> tuple[int, int, list[tuple[int, int, int]]]:
    """(LEAD1, LEAD2, strides of each map): frame f is at [f // LEAD2 // LEAD1, f // LEAD2 % LEAD1, f % LEAD2].

    One leading dimension where all maps allow it (LEAD1 = LEAD2 = 1), else as they are.
    """
    sizes = maps[0].shape[:-3]
    strides = [t.stride()[:-3] for t in maps]
    kept = [i for i, size in enumerate(sizes) if size != 1]
    if not kept:
        return 1, 1, [(0, 0, 0)] * len(maps)
    if all(s[a] == s[b] * sizes[b] for s in strides for a, b in itertools.pairwise(kept)):
        return 1, 1, [(s[kept[-1]], 0, 0) for s in strides]
    if len(kept) == 2:
        return 1, sizes[kept[1]], [(s[kept[0]], 0, s[kept[1]]) for s in strides]
    return sizes[1], sizes[2], [(s[0], s[1], s[2]) for s in strides]


def map_layout(t: Tensor, lead: tuple[int, int, int]) -> MapLayout:
    """The layout of map `t` whose leading strides are `lead`."""
    channels, height, width = t.shape[-3:]
    s_c, s_h, s_w = t.stride()[-3:]
    if width == 1:
        s_w = s_h
    if height == 1:
        s_h = s_w * width
    if channels == 1:
        s_c = 0
    channels_last = s_c == 1 and s_w != 1
    flat = s_h == s_w * width
    gapless = flat and s_w == 1 and (s_c == height * width or channels == 1)
    if flat:  # not used, so it may not spoil the divisor
        s_h = 0
    if gapless:
        s_c = 0
    others = (*lead, s_h, s_w) if channels_last else (*lead, s_c, s_h)
    align = math.gcd(16 // t.element_size(), *others) if channels_last or s_w == 1 else 1
    strides = [s // align for s in (*lead, s_c, s_h, s_w)]
    strides[3 if channels_last else 5] = s_c if channels_last else s_w
    return MapLayout(tuple(strides), flat, align, channels_last, gapless)


class ClipLayout(NamedTuple):
    """How a kernel addresses a clip (B, L, C, T, H, W) without copying it.

    `strides`: in that order, all but the one that is 1 divided by `align` as a `MapLayout`'s are. `form` is the
    compile-time side: whether positions are at multiples of the W stride, `align`, and whether channels have stride 1.
    """

    strides: tuple[int, ...]
    form: tuple[bool, int, bool]


def clip_layout(t: Tensor) -> ClipLayout:
    """The layout of clip `t`, (B, L, C, T, H, W) or without L."""
    if t.dim() == 5:
        t = t.unsqueeze(1)
    strides = [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    kept = [i for i in (3, 4, 5) if t.shape[i] != 1]
    flat = all(strides[a] == strides[b] * t.shape[b] for a, b in itertools.pairwise(kept))
    if flat:
        strides[3:] = [0, 0, strides[kept[-1]] if kept else 0]
    channels_last = strides[2] == 1 and strides[5] != 1
    unit = 2 if channels_last else 5
    others = [s for i, s in enumerate(strides) if i != unit]
    align = math.gcd(16 // t.element_size(), *others) if strides[unit] == 1 else 1
    return ClipLayout(
        tuple(s if i == unit else s // align for i, s in enumerate(strides)), (flat, align, channels_last)
    )


def wider(dtype: torch.dtype) -> torch.dtype:
    """What sums over `dtype` accumulate in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def accumulator(dtype: torch.dtype) -> Any:
    """`wider(dtype)` in Triton's terms."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(tensor: Tensor, highest: str = "ieee") -> str:
    """How float32 operands are multiplied: as torch.get_float32_matmul_precision() says for torch's own products.

    `highest` is what that setting means on NVIDIA: "ieee", or "tf32x3" for float32's accuracy from tensor cores, by
    three products of operands split in two.
    """
    if tensor.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    if matmul_precision() == "highest":
        return highest if highest == "ieee" or family(tensor.device) in ("nvidia", "blackwell") else "ieee"
    return "tf32"


def register_limit(registers: int | None, tensor: Tensor) -> dict[str, int]:
    """A limit of registers per thread as a launch option, which only NVIDIA's compiler takes."""
    return {"maxnreg": registers} if registers is not None and family(tensor.device) in ("nvidia", "blackwell") else {}


# --- what is kept: everything that follows from a call's shapes, strides, dtypes, devices and options ---------------

T = TypeVar("T")
_plans: dict[tuple, Any] = {}
_generation = 0  # of lookups, that the plans belong to
_MOST = 4096  # plans; a few of each size that a program uses


def planned(make: Callable[..., T], tensors: tuple[Tensor | None, ...], *options: Any) -> T:
    """`make(*tensors, *options)`, made once for all tensors of these shapes, strides, dtypes and devices.

    `make` may look at nothing else of them, nor keep them. Plans also depend on torch's matmul precision and on the
    tuning in use.
    """
    global _generation
    if _generation != lookup.generation:  # other configs may be meant now
        _generation = lookup.generation
        _plans.clear()
    key = (
        make, options, matmul_precision(),
        *[t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        asked = lookup.generation
        plan = make(*tensors, *options)
        if len(_plans) >= _MOST:
            _plans.clear()
        if asked == lookup.generation:  # else another thread has changed what is in use meanwhile
            _plans[key] = plan
    return plan


def forget() -> None:
    """Drop every plan, and with them the compiled kernels that they hold: for whoever exchanges Triton's driver."""
    _plans.clear()
    gpu.forget()
    lookup.forget()


class Launch:
    """A launch of a Triton kernel that lacks only its tensors.

    Triton's own way from arguments to a compiled kernel binds and hashes them all, which takes several times as long
    as the launch. Here they follow from the plan, so the compiled kernel of the first launch is launched directly from
    then on. Only the alignment of the tensors, which Triton's choice depends on too, is looked at each time.

    Args:
        kernel: a `triton.jit` function of tensors, then floats, then `static`, then the names of `constants`.
        programs: how many run.
        key: what its config was looked up by.
        static: its arguments after tensors and floats.
        given: how many of its first arguments may be tensors of a user's; None: all. Those made for it are aligned.
        constants: its compile-time arguments by name, and launch options.
    """

    __slots__ = ("_direct", "_tail", "constants", "generation", "given", "kernel", "key", "programs", "static")

    def __init__(self, kernel: Any, programs: int, key: Any, *static: Any, given: int | None = None, **constants: Any):
        self.given, self.generation = given, lookup.generation
        self.kernel, self.programs, self.key, self.static = kernel, programs, key, static
        # said out loud, because a later Triton turns fused multiply-add off by default
        self.constants = {**constants, "enable_fp_fusion": True}
        self._direct: Callable[..., None] | None = None
        self._tail: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> None:
        """Launch it on these tensors and floats, under the device of the first."""
        for watch in _watchers:
            watch(self, args)
        launch, device = _sink or Launch._launch, args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                launch(self, args)
        else:
            launch(self, args)

    def _launch(self, args: tuple[Any, ...]) -> None:
        for arg in args[: self.given]:
            if type(arg) is not float and arg.data_ptr() & 15:
                self.by_triton(args)
                return
        if self._direct is not None:
            self._direct(*args, *self._tail)
            return
        compiled = self.by_triton(args)
        if getattr(compiled, "module", None) is not None:  # it has run: neither interpreted nor compiled only
            named = self.kernel.arg_names[len(args) + len(self.static) :]
            self._tail = (*self.static, *(self.constants[name] for name in named))
            self._direct = compiled[(self.programs, 1, 1)]

    def by_triton(self, args: tuple[Any, ...]) -> Any:
        """Launch it by Triton's own way from arguments to a compiled kernel, which is returned."""
        return self._attempted(self.kernel[(self.programs,)], args)

    def given_by_name(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """What the kernel and its compiler are given for these arguments."""
        return {**dict(zip(self.kernel.arg_names, (*args, *self.static), strict=False)), **self.constants}

    def compile(self, args: tuple[Any, ...]) -> Any:
        """The kernel that a launch on these would run: compiled, and not run."""
        compiled = self._attempted(partial(self.kernel.warmup, grid=(self.programs,)), args)
        return compiled.result() if hasattr(compiled, "result") else compiled

    def _attempted(self, action: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return action(*args, *self.static, **self.constants)
        except Exception as error:
            # nothing has run: it does not compile, or needs more than there is
            if lookup.reject(self.key, args[0].device, error, self.generation):
                raise lookup.Unfit(str(error)) from error
            raise


# --- whoever wants to know of launches, or to have them -------------------------------------------------------------

_watchers: list[Callable[[Launch, tuple[Any, ...]], None]] = []
_sink: Callable[[Launch, tuple[Any, ...]], Any] | None = None


@contextlib.contextmanager
def watched(watch: Callable[[Launch, tuple[Any, ...]], None]) -> Iterator[None]:
    """Inside, `watch(launch, args)` is called before every launch of any thread."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


@contextlib.contextmanager
def redirected(sink: Callable[[Launch, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Inside, `sink(launch, args)` is called in the place of every launch of any thread, under the device of the first
    tensor: nothing runs but by it."""
    global _sink
    former, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = former


class _Driver:
    """Answers what a compilation asks of Triton's driver, for a target that this process does not touch."""

    def __init__(self, target: Any, device: int):
        self.target, self.device = target, device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(
    target: Any, device: int = 0, seen: Callable[[Launch, tuple[Any, ...], Any], None] | None = None
) -> Iterator[None]:
    """Inside, ops on tensors without data (device "meta") compile for a triton `GPUTarget`, and launch nothing.

    Triton keeps the kernels of each `device`, a number, apart. `seen` gets each launch, its arguments, and the kernel
    that was compiled for it. GPU and Triton's own driver are left alone, and need not be there.
    """
    from triton.runtime import driver

    def sink(launch: Launch, args: tuple[Any, ...]) -> None:
        compiled = launch.compile(args)
        if seen is not None:
            seen(launch, args, compiled)

    former = driver._active
    driver.set_active(_Driver(target, device))
    forget()  # what was planned for another target
    try:
        with redirected(sink), dispatch.standing_in(lambda device, dtype: None):
            yield
    finally:
        driver.set_active(former)
        forget()
