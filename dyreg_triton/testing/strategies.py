"""Hypothesis strategies for calls of tensor ops: shapes at block edges, layouts, dtypes, degenerate regions, seeds.

What is drawn is a `Call`: a few small numbers that print in one line and shrink fast. Tensor elements follow from a
seed and are never drawn.

    calls = strategies.calls(
        x=strategies.tensor("*", "C", "H", "W"),
        regions=strategies.regions("*", "N", size=("H", "W")),
        profile=strategies.profiles(),
    )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from .._core.validation import PROFILES, choice, dtypes_of, flag, function, is_integer, mapping, what
from .bilinear import MATRIX_KINDS, BilinearCase
from .calls import Call, Floors, TensorSpec
from .memory import LAYOUTS
from .regions import REGION_KINDS, REGION_OPS, RegionCase, RegionSpec
from .relational import RELATIONAL_CONTEXTS, RELATIONAL_KERNELS, RelationalCase

__all__ = [
    "bilinear_calls", "calls", "dims", "dtypes", "layouts", "leads", "profiles", "region_calls", "regions",
    "relational_calls", "size", "tensor",
]  # fmt: skip

Dim = str | int


def _few() -> bool:
    """Whether kernels are interpreted: a program takes milliseconds there, so sizes are kept small."""
    from .._core.dispatch import can_run

    return can_run("triton", device="cpu", dtype=torch.float32)


def dims(*, block: int = 16, blocks: int = 4, empty: bool = True) -> SearchStrategy[int]:
    """Sizes of a dimension where tiled code goes wrong: 1, 2, and each power of two from `block` on, and its
    neighbours, up to `block` * `blocks`; 0 too with `empty`."""
    for name, value in (("block", block), ("blocks", blocks)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"strategies.dims: {name} is {value!r}; accepted is an integer > 0")
    flag("strategies.dims", "empty", empty)
    sizes = {1, 2, 3}
    edge = block
    while edge <= block * blocks:
        sizes |= {edge - 1, edge, edge + 1}
        edge *= 2
    return st.sampled_from(sorted(sizes - {0}) + [0] * empty)


def leads() -> SearchStrategy[tuple[int, ...]]:
    """Leading dimensions `*`: none, one, several, empty."""
    few: list[tuple[int, ...]] = [(), (1,), (2,), (1, 2), (2, 1, 1), (0,)]
    return st.sampled_from(few if _few() else [*few, (3,), (2, 2), (2, 1, 3), (2, 0, 1)])


def layouts() -> SearchStrategy[str]:
    """Layouts of `Guarded`: contiguous, aligned, transposed, channels_last(_3d), reversed, sliced, expanded."""
    return st.sampled_from(LAYOUTS)


def dtypes(*accepted: torch.dtype) -> SearchStrategy[torch.dtype]:
    """One of the dtypes given; by default float32, bfloat16 and float16."""
    if accepted:
        dtypes_of("strategies.dtypes", accepted)
    return st.sampled_from(accepted or (torch.float32, torch.bfloat16, torch.float16))


def profiles() -> SearchStrategy[str]:
    """A region's profile: linear, gaussian, log-linear."""
    return st.sampled_from(PROFILES)


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[Dim, ...]
    dtypes: tuple[torch.dtype, ...] | None


@dataclass(frozen=True)
class _Regions(_Tensor):
    size: tuple[Dim, Dim]


@dataclass(frozen=True)
class _Size:
    shape: tuple[Dim, ...]


def _dims_named(op: str, shape: Sequence[Any]) -> tuple[Dim, ...]:
    for i, dim in enumerate(shape):
        named = isinstance(dim, str) and (dim.isidentifier() or (dim == "*" and i == 0))
        if not named and not (is_integer(dim) and 0 <= dim < 2**31):
            raise ValueError(
                f"strategies.{op}: dimension {i} is {what(dim)}; accepted are a name, an integer >= 0, and '*' in front"
            )
    return tuple(shape)


def tensor(*shape: Dim, dtypes: Sequence[torch.dtype] | None = None) -> Any:
    """A tensor argument for `calls`: dimensions by name (drawn once per call) or number, "*" for leading ones.

    dtypes: those it may have, where it need not have the call's.
    """
    return _Tensor(_dims_named("tensor", shape), None if dtypes is None else dtypes_of("strategies.tensor", dtypes))


def regions(*shape: Dim, size: tuple[Dim, Dim], dtypes: Sequence[torch.dtype] | None = None) -> Any:
    """Regions (*shape, 4) = (cx, cy, w, h) on a map of `size` = ("H", "W"), for `calls`: inside, outside, empty,
    tiny, covering, and mixed, off the kinks of their profile. By default of the call's dtype or float32."""
    if not isinstance(size, (tuple, list)) or len(size) != 2 or "*" in size:
        raise ValueError(
            f"strategies.regions: size is {what(size)}; accepted are two dimensions, each a name or number"
        )
    height, width = _dims_named("regions", size)
    own = None if dtypes is None else dtypes_of("strategies.regions", dtypes)
    return _Regions(_dims_named("regions", shape), own, (height, width))


def size(*names: Dim) -> Any:
    """A tuple of dimensions as a plain argument for `calls`, as in size=strategies.size("H", "W")."""
    return _Size(_dims_named("size", names))


@st.composite
def _calls(
    draw: st.DrawFn,
    arguments: Mapping[str, Any],
    named: Mapping[str, SearchStrategy[int]],
    accepted: tuple[torch.dtype, ...],
    floors: Floors | None,
) -> Call:
    default = dims(blocks=1) if _few() else dims()
    drawn: dict[str, int] = {}
    lead: tuple[int, ...] = ()
    shapes = [a.shape for a in arguments.values() if isinstance(a, (_Tensor, _Size))]
    if any("*" in shape for shape in shapes):
        lead = draw(leads())

    def resolved(shape: Sequence[Dim]) -> tuple[int, ...]:
        sizes: list[int] = []
        for dim in shape:
            if dim == "*":
                sizes += lead
            elif isinstance(dim, str):
                if dim not in drawn:
                    drawn[dim] = draw(named.get(dim, default))
                sizes.append(drawn[dim])
            else:
                sizes.append(dim)
        return tuple(sizes)

    dtype = draw(st.sampled_from(accepted))
    seed = draw(st.integers(0, 2**16))
    tensors: dict[str, TensorSpec] = {}
    options: dict[str, Any] = {}
    for i, (name, argument) in enumerate(arguments.items()):
        if isinstance(argument, _Size):
            options[name] = resolved(argument.shape)
        elif isinstance(argument, _Regions):
            own = argument.dtypes or ((dtype,) if dtype == torch.float64 else (dtype, torch.float32))
            height, width = resolved(argument.size)
            tensors[name] = RegionSpec(
                (*resolved(argument.shape), 4),
                draw(st.sampled_from(own)),
                draw(layouts()),
                seed + 2 + i,  # the incoming gradient has seed + 1
                (height, width),
                draw(st.sampled_from(REGION_KINDS)),
            )
        elif isinstance(argument, _Tensor):
            own = argument.dtypes or (dtype,)
            tensors[name] = TensorSpec(
                resolved(argument.shape), draw(st.sampled_from(own)), draw(layouts()), seed + 2 + i
            )
        elif isinstance(argument, SearchStrategy):
            options[name] = draw(argument)
        else:
            options[name] = argument
    return Call(tensors, options, draw(layouts()), seed, floors)


def calls(
    *,
    dims: Mapping[str, SearchStrategy[int]] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    floors: Floors | None = None,
    **arguments: Any,
) -> SearchStrategy[Call]:
    """Calls of an op with these arguments.

    Args:
        dims: strategies for the sizes of named dimensions; by default `strategies.dims()`.
        dtypes: the dtypes a call may have.
        floors: see `Call`.
        arguments: by the op's names, in its order: `tensor(...)` or `regions(...)` for a tensor, `size(...)` for a
            tuple of dimensions, a Hypothesis strategy for anything drawn, or the value itself.

    Raises:
        ValueError: no argument is a tensor, or `dims` names a dimension that no argument has.
        TypeError: `dims` holds something other than strategies.
    """
    if not any(isinstance(a, _Tensor) for a in arguments.values()):
        raise ValueError(
            f"strategies.calls: arguments are {sorted(arguments)}; accepted are some with at least one "
            "strategies.tensor(...) or strategies.regions(...)"
        )
    accepted = dtypes_of("strategies.calls", dtypes)
    if floors is not None:
        function("strategies.calls", "floors", floors)
    dims = {} if dims is None else mapping("strategies.calls", "dims", dims)
    used: set[Dim] = set()
    for a in arguments.values():
        used |= set(a.shape) if isinstance(a, (_Tensor, _Size)) else set()
        used |= set(a.size) if isinstance(a, _Regions) else set()
    for name, strategy in dims.items():
        if not isinstance(strategy, SearchStrategy):
            raise TypeError(f"strategies.calls: dims[{name!r}] is {strategy!r}; accepted is a Hypothesis strategy")
        if name not in used:
            raise ValueError(f"strategies.calls: dims names {name!r}; accepted are the arguments' dimensions, {used}")
    return _calls(arguments, dims, accepted, floors)


@st.composite
def region_cases(draw: st.DrawFn, op: str, *, dtypes: Sequence[torch.dtype]) -> RegionCase:
    """Cases of one region op: sizes at the edges of blocks, degenerate regions, every layout and profile."""
    small = _few()
    side = st.sampled_from((1, 2, 5, 15, 16, 17, 20) if small else (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65))
    dtype = draw(st.sampled_from(list(dtypes)))
    wide = [dtype, torch.float32] if op != "region_kernel" and dtype != torch.float32 else [dtype]
    height, width = draw(side), draw(side)
    channels = st.sampled_from((1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 70, 0))
    if op == "region_pool" and draw(st.integers(0, 15)) == 15:
        height = 0
    return RegionCase(
        op=op,
        lead=draw(leads()),
        nodes=draw(st.sampled_from((1, 2, 9, 0, 12) if small else (1, 2, 9, 15, 16, 17, 33, 64, 65, 0))),
        channels=1 if op == "region_kernel" else draw(channels),
        size=(height, width),
        profile=draw(profiles()),
        temperature=draw(st.sampled_from((1.0, 0.3, 4.0))),
        kind=draw(st.sampled_from(REGION_KINDS)),
        dtype=dtype,
        regions_dtype=draw(st.sampled_from(wide)),
        layout=draw(layouts()),
        regions_layout=draw(layouts()),
        grad_layout=draw(layouts()),
        seed=draw(st.integers(0, 2**16)),
    )


def region_calls(
    op: str, *, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
) -> SearchStrategy[Call]:
    """Calls of "region_pool", "region_remap" or "region_kernel" as this library is tested with; for your variant.

    Raises ValueError for another op.
    """
    choice("strategies.region_calls", "op", op, REGION_OPS)
    return region_cases(op, dtypes=dtypes_of("strategies.region_calls", dtypes)).map(RegionCase.call)


@st.composite
def relational_cases(draw: st.DrawFn, *, dtypes: Sequence[torch.dtype]) -> RelationalCase:
    """Cases of relational self-attention: every kernel and context, channels at the edges of blocks, odd and even
    windows, some larger than the clip, every layout, tiny features beside `eps`."""
    small = _few()
    kernel_size: tuple[int, int, int]
    if small:
        kernel_size = draw(st.sampled_from([(1, 1, 1), (1, 3, 3), (2, 3, 3), (1, 2, 4), (3, 1, 1)]))
        channels, sides = st.sampled_from((4, 5, 8, 16, 17)), st.sampled_from((1, 2, 3))
        clip = (draw(st.sampled_from((1, 2))), draw(sides), draw(sides))
        queries = st.sampled_from((1, 2, 3, 8))
    else:
        taps = st.sampled_from((1, 2, 3, 4, 5, 7))
        kernel_size = (draw(taps), draw(taps), draw(taps))
        # now and then wide, and then, as with many taps, on few positions: the reference makes all windows
        wide = draw(st.integers(0, 9)) == 9
        channels = st.sampled_from((4, 63, 64, 65, 127, 128) if wide else (4, 5, 8, 15, 16, 17, 31, 32, 33))
        many = wide or kernel_size[0] * kernel_size[1] * kernel_size[2] > 50
        sides = st.sampled_from((1, 2, 3) if many else (1, 2, 3, 4, 6))
        clip = (draw(sides), draw(sides), draw(sides))
        queries = st.integers(1, 16)
    dtype = draw(st.sampled_from(list(dtypes)))
    half = dtype == torch.float16  # gradients grow by 1 / sqrt(eps), and small numbers lose their bits
    case = RelationalCase(
        kernel=draw(st.sampled_from(RELATIONAL_KERNELS)),
        context=draw(st.sampled_from(RELATIONAL_CONTEXTS)),
        kernel_size=kernel_size,
        clip=clip,
        batch=draw(st.sampled_from((1, 1, 2, 1, 2, 0) if small else (1, 2, 3, 1, 2, 1, 2, 0))),
        queries=draw(queries),
        channels=draw(channels),
        latent=draw(channels),
        value_channels=draw(channels),
        mixed=draw(channels),
        eps=draw(st.sampled_from((None, 1e-2, 1.0) if half else (None, 1e-6, 1e-2, 1.0))),
        scale=draw(st.sampled_from((1.0, 0.1) if half else (1.0, 1e-3))),
        zeros=draw(st.booleans()),
        dtype=dtype,
        grad_layout=draw(layouts()),
        seed=draw(st.integers(0, 2**16)),
    )
    plain = case.eps is None  # then the scale of q, k and v is that of the results, to the fourth power
    drawn = {name: draw(layouts()) for name in case.shapes()}
    return replace(case, layouts=drawn, scale=1.0 if plain else case.scale)


def relational_calls(
    *, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
) -> SearchStrategy[Call]:
    """Calls of `relational_attention` as this library is tested with; for your variant.

    Tensors by the op's names, those that a kernel or context lacks left out (k is then the option None), and `eps`.
    """
    return relational_cases(dtypes=dtypes_of("strategies.relational_calls", dtypes)).map(RelationalCase.call)


def _divisors(number: int) -> SearchStrategy[int]:
    return st.sampled_from([n for n in range(1, number + 1) if number % n == 0])


@st.composite
def bilinear_cases(draw: st.DrawFn, *, dtypes: Sequence[torch.dtype]) -> BilinearCase:
    """Cases of the bilinear transform: cells at the edges of blocks, maps that are one or several times as large and
    not square, any groups, with and without a temporal matrix of its own groups, every layout."""
    small = _few()
    cells = st.sampled_from((1, 2, 3, 4, 5, 8, 9) if small else (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17))
    times = st.sampled_from((1, 2, 3) if small else (1, 2, 3, 4))
    rows, columns = draw(cells), draw(cells)
    height, width = rows * draw(times), columns * draw(times)
    large = height * width > (60 if small else 600)  # then on few channels and frames
    if small:
        channels, frames = draw(st.sampled_from((1, 2) if large else (1, 2, 3, 4, 6))), draw(st.sampled_from((1, 2, 4)))
    else:
        channels = draw(st.sampled_from((1, 2, 3, 4, 6) if large else (1, 2, 3, 4, 6, 8, 12, 15, 16, 17, 32)))
        frames = draw(st.sampled_from((1, 2, 3, 4, 6) if large else (1, 2, 3, 4, 6, 8, 9, 16)))
    dtype = draw(st.sampled_from(list(dtypes)))
    temporal = (draw(_divisors(channels)), draw(_divisors(frames))) if draw(st.integers(0, 2)) else None
    case = BilinearCase(
        cells=(rows, columns),
        size=(height, width),
        temporal=temporal,
        frames=frames,
        batch=draw(st.sampled_from((1, 1, 2, 1, 2, 0) if small else (1, 2, 3, 1, 2, 1, 2, 0))),
        channels=channels,
        groups=draw(_divisors(channels)),
        kind=draw(st.sampled_from(MATRIX_KINDS)),
        dtype=dtype,
        matrices_dtype=draw(st.sampled_from((dtype, torch.float32))),
        grad_layout=draw(layouts()),
        seed=draw(st.integers(0, 2**16)),
    )
    return replace(case, layouts={name: draw(layouts()) for name in case.shapes()})


def bilinear_calls(
    *, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
) -> SearchStrategy[Call]:
    """Calls of `bilinear_transform` as this library is tested with; for your variant.

    Tensors by the op's names; t is left out where there is no temporal matrix.
    """
    return bilinear_cases(dtypes=dtypes_of("strategies.bilinear_calls", dtypes)).map(BilinearCase.call)
