"""Every refusal: before anything is computed, and in words that name what is wrong and what would be right."""

from __future__ import annotations

import copy
import itertools
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from support import DEVICE, REGION_OPS
from torch.utils._python_dispatch import TorchDispatchMode

import dyreg_triton as dt
from dyreg_triton import testing
from dyreg_triton._core.dispatch import can_run, current_backend
from dyreg_triton.testing import strategies


def saying(*parts: object) -> str:
    """A pattern for messages that contain every part, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(str(part))})" for part in parts)


class NothingRuns(TorchDispatchMode):
    """Inside, any operation on a tensor fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran before the arguments were refused")


def refused(error: type[Exception] | tuple[type[Exception], ...], *parts: object):
    return pytest.raises(error, match=saying(*parts))


def call(op: str, **changed: Any) -> Any:
    """A good call of `op` with some arguments replaced, in which nothing may run."""
    shapes = {"x": (2, 3, 5, 6), "nodes": (2, 4, 3), "regions": (2, 4, 4)}
    tensors = {name: changed.pop(name, None) for name in shapes}
    tensors = {name: torch.ones(shapes[name], device=DEVICE) if t is None else t for name, t in tensors.items()}
    size = changed.pop("size", (5, 6))
    with NothingRuns():
        if op == "region_pool":
            return dt.ops.region_pool(tensors["x"], tensors["regions"], **changed)
        if op == "region_remap":
            return dt.ops.region_remap(tensors["nodes"], tensors["regions"], size, **changed)
        return dt.ops.region_kernel(tensors["regions"], size, **changed)


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, **{"device": DEVICE, **options})


@pytest.mark.parametrize("op", REGION_OPS)
def test_nothing_runs_notices(op: str) -> None:
    """A good call does run something."""
    with pytest.raises(AssertionError, match="before the arguments were refused"):
        call(op)


# --- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("shape", [(4,), (2, 4, 3), (2, 4, 5), (2, 4, 0), ()])
def test_shape_of_regions(op: str, shape: tuple[int, ...]) -> None:
    with refused(ValueError, op, "regions", shape, "(*, N, 4)", "float32"):
        call(op, regions=ones(*shape))


@pytest.mark.parametrize("shape", [(5, 6), (6,), ()])
def test_rank_of_x(shape: tuple[int, ...]) -> None:
    with refused(ValueError, "region_pool", "x", shape, "(*, C, H, W)", "regions (2, 4, 4)"):
        call("region_pool", x=ones(*shape))


@pytest.mark.parametrize("shape", [(4,), ()])
def test_rank_of_nodes(shape: tuple[int, ...]) -> None:
    with refused(ValueError, "region_remap", "nodes", shape, "(*, N, C)", "regions (2, 4, 4)"):
        call("region_remap", nodes=ones(*shape))


@pytest.mark.parametrize("shape", [(3, 3, 5, 6), (1, 3, 5, 6), (3, 5, 6), (1, 2, 3, 5, 6)])
def test_leading_dimensions_of_x(shape: tuple[int, ...]) -> None:
    with refused(ValueError, "region_pool", "x", shape[:-3], "(2,)", f"x {shape}", "regions (2, 4, 4)"):
        call("region_pool", x=ones(*shape))


@pytest.mark.parametrize("shape", [(3, 4, 3), (1, 4, 3), (4, 3), (1, 2, 4, 3)])
def test_leading_dimensions_of_nodes(shape: tuple[int, ...]) -> None:
    with refused(ValueError, "region_remap", "nodes", shape[:-2], "(2,)", f"nodes {shape}", "regions (2, 4, 4)"):
        call("region_remap", nodes=ones(*shape))


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_number_of_nodes(count: int) -> None:
    with refused(ValueError, "region_remap", "nodes", count, 4, f"nodes (2, {count}, 3)", "regions (2, 4, 4)"):
        call("region_remap", nodes=ones(2, count, 3))


@pytest.mark.parametrize(("op", "name"), [("region_pool", "x"), ("region_remap", "nodes")])
def test_mixed_devices(op: str, name: str) -> None:
    with refused(ValueError, op, name, "regions", "meta", str(DEVICE), "(2, 4, 4)"):
        call(op, regions=ones(2, 4, 4, device="meta"))
    shape = (2, 3, 5, 6) if name == "x" else (2, 4, 3)
    with refused(ValueError, op, name, "regions", "meta", str(DEVICE), shape):
        call(op, **{name: ones(*shape, device="meta")})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize(
    ("op", "name"), [("region_pool", "x"), ("region_remap", "nodes"), ("region_kernel", "regions")]
)
def test_dtype_of_features(op: str, name: str, dtype: torch.dtype) -> None:
    shape = {"x": (2, 3, 5, 6), "nodes": (2, 4, 3), "regions": (2, 4, 4)}[name]
    with refused(TypeError, op, name, str(dtype)[6:], "float16, bfloat16, float32 or float64", f"{name} {shape}"):
        call(op, **{name: ones(*shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("features", "regions"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float16),
        (torch.float32, torch.int64),
        (torch.float32, torch.complex64),
    ],
)
@pytest.mark.parametrize(("op", "name"), [("region_pool", "x"), ("region_remap", "nodes")])
def test_mismatched_dtypes(op: str, name: str, features: torch.dtype, regions: torch.dtype) -> None:
    shape = {"x": (2, 3, 5, 6), "nodes": (2, 4, 3)}[name]
    with refused(TypeError, op, "regions", str(regions)[6:], f"{name}'s dtype or float32", f"{name} {shape}"):
        call(op, **{name: ones(*shape, dtype=features), "regions": ones(2, 4, 4, dtype=regions)})


@pytest.mark.parametrize(
    ("op", "name"), [(op, "regions") for op in REGION_OPS] + [("region_pool", "x"), ("region_remap", "nodes")]
)
@pytest.mark.parametrize("value", [[[1.0, 2.0, 3.0, 4.0]], 3.0, "map"])
def test_no_tensor(op: str, name: str, value: object) -> None:
    with refused(TypeError, op, name, type(value).__name__, "Tensor"):
        call(op, **{name: value})


# --- options --------------------------------------------------------------------------------------------------------

CALLS = {
    "region_pool": ("x (2, 3, 5, 6)", "regions (2, 4, 4)"),
    "region_remap": ("nodes (2, 4, 3)", "regions (2, 4, 4)"),
    "region_kernel": ("regions (2, 4, 4)",),
}


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("profile", ["box", "Linear", "", None, 3, ["linear"]])
def test_unknown_profile(op: str, profile: object) -> None:
    with refused(ValueError, op, "profile", repr(profile), "'linear'", "'gaussian'", "'log-linear'", *CALLS[op]):
        call(op, profile=profile)


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_temperature_out_of_range(op: str, temperature: float) -> None:
    with refused(ValueError, op, "temperature", repr(temperature), "> 0", *CALLS[op]):
        call(op, temperature=temperature)


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("temperature", ["1", None, True, [1.0], 1j])
def test_temperature_of_another_type(op: str, temperature: object) -> None:
    with refused(TypeError, op, "temperature", repr(temperature), "> 0", *CALLS[op]):
        call(op, temperature=temperature)


@pytest.mark.parametrize("op", ["region_remap", "region_kernel"])
@pytest.mark.parametrize("size", [(0, 6), (5, 0), (-1, 6), (5.0, 6), (5,), (5, 6, 7), 5, "56", None, (True, 6), ()])
def test_size(op: str, size: object) -> None:
    with refused(ValueError, op, "size", repr(size), "two positive integers", *CALLS[op]):
        call(op, size=size)


# --- backends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", REGION_OPS)
def test_no_kernel_runs_on_meta_tensors(op: str) -> None:
    """A backend asked for by name never falls back: here on a device that no kernel runs on."""
    tensors = {"x": ones(2, 3, 5, 6), "nodes": ones(2, 4, 3), "regions": ones(2, 4, 4)}
    tensors = {name: t.to("meta") for name, t in tensors.items()}
    with dt.backend("triton"), refused(RuntimeError, op, "'triton' cannot run here", "meta", "TRITON_INTERPRET=1"):
        call(op, **tensors)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (op, dtype)
        for op in REGION_OPS
        for dtype in (torch.float32, torch.float64)
        if not can_run("triton", device=DEVICE, dtype=dtype)
    ],
)
def test_backend_that_cannot_run(op: str, dtype: torch.dtype) -> None:
    tensors = {"x": ones(2, 3, 5, 6), "nodes": ones(2, 4, 3), "regions": ones(2, 4, 4)}
    with dt.backend("triton"), refused(RuntimeError, op, "'triton' cannot run here"):
        call(op, **{name: t.to(dtype) for name, t in tensors.items()})


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None, 3])
def test_unknown_backend(name: object) -> None:
    with refused(ValueError, "backend", repr(name), "'auto'", "'triton'", "'eager'", "'reference'"):
        dt.backend(name)  # type: ignore[arg-type]
    with refused(ValueError, "can_run", repr(name), "'triton'", "'eager'", "'reference'"):
        can_run(name, device="cpu", dtype=torch.float32)  # type: ignore[arg-type]


# --- relational self-attention --------------------------------------------------------------------------------------

# B 2, L 3, C 4, D 7, E 5, F 6
RELATIONAL: dict[str, tuple[int, ...]] = {
    "q": (2, 3, 4, 2, 5, 6), "k": (2, 4, 2, 5, 6), "v": (2, 5, 2, 5, 6), "h1": (4, 7, 1, 3, 3), "p1": (4, 7),
    "h2": (7, 1, 3, 3), "g": (6, 1, 3, 3), "identity": (5, 6),
}  # fmt: skip
OPTIONAL = ("k", "h1", "p1", "g", "identity")
on_modules = pytest.mark.parametrize("module", [dt.ops, dt.reference], ids=["ops", "reference"])
on_tensors = pytest.mark.parametrize("name", RELATIONAL)


def relational(module: Any = dt.ops, **changed: Any) -> Any:
    """A good call of relational_attention with some arguments replaced, in which nothing may run."""
    given = {name: ones(*shape) for name, shape in RELATIONAL.items()} | changed
    with NothingRuns():
        return module.relational_attention(**given)


def shapes_of_call(*changed: str) -> list[str]:
    """How a message ends: the call, with the shapes of all tensors but those that were changed."""
    return [
        "relational_attention",
        "accepted",
        "call: q (",
        *(f"{n} {RELATIONAL[n]}" for n in RELATIONAL if n not in changed),
    ]


def with_size(name: str, axis: int, size: int) -> tuple[int, ...]:
    shape = list(RELATIONAL[name])
    shape[axis] = size
    return tuple(shape)


@on_modules
def test_nothing_runs_notices_in_relational(module: Any) -> None:
    with pytest.raises(AssertionError, match="before the arguments were refused"):
        relational(module)


@on_modules
@pytest.mark.parametrize("value", [None, [[1.0]], 3.0, "map", torch.float32])
@on_tensors
def test_no_tensor_in_relational(name: str, value: object, module: Any) -> None:
    if value is None and name in OPTIONAL:
        return  # left out: below
    with refused(
        TypeError, f"{name} is", repr(value), type(value).__name__, "Tensor", *shapes_of_call(*RELATIONAL)[:2]
    ):
        relational(module, **{name: value})


@on_tensors
@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_no_dense_tensor_in_relational(name: str, kind: str) -> None:
    value = ones(*RELATIONAL[name])
    value = value.to_sparse() if kind == "sparse" else torch.nested.nested_tensor([value[0]])
    with refused(TypeError, f"{name} is", kind, "dense", "Tensor", "relational_attention"):
        relational(**{name: value})


FORMS = {
    "q": "(B, L, C, T, H, W)", "k": "(B, C, T, H, W)", "v": "(B, E, T, H, W)", "h1": "(C, D, kt, kh, kw)",
    "p1": "(C, D)", "h2": "(D, kt, kh, kw)", "g": "(F, kt, kh, kw)", "identity": "(E, F)",
}  # fmt: skip


@on_modules
@pytest.mark.parametrize("change", [-1, 1])
@on_tensors
def test_rank_in_relational(name: str, change: int, module: Any) -> None:
    shape = (1, *RELATIONAL[name]) if change > 0 else RELATIONAL[name][1:]
    said = (f"{name} has {len(shape)} dimensions", FORMS[name], f"{name} {shape}")
    with refused(ValueError, *said, *shapes_of_call(name)[: 3 if name != "q" else 2]):
        relational(module, **{name: ones(*shape)})


@pytest.mark.parametrize("name", [*RELATIONAL])
def test_scalar_in_relational(name: str) -> None:
    with refused(ValueError, f"{name} has 0 dimensions", FORMS[name]):
        relational(**{name: ones()})


# who disagrees, along which axis, with whom, about what, and what would be right
DISAGREE = [
    ("k", 0, "q", "B", 2), ("k", 1, "q", "C", 4), ("k", 2, "q", "T", 2), ("k", 3, "q", "H", 5), ("k", 4, "q", "W", 6),
    ("v", 0, "q", "B", 2), ("v", 2, "q", "T", 2), ("v", 3, "q", "H", 5), ("v", 4, "q", "W", 6),
    ("h1", 0, "q", "C", 4), ("p1", 0, "q", "C", 4), ("h1", 1, "h2", "D", 7), ("p1", 1, "h2", "D", 7),
    ("identity", 0, "v", "E", 5), ("identity", 1, "g", "F", 6),
]  # fmt: skip


@on_modules
@pytest.mark.parametrize(("name", "axis", "other", "letter", "wanted"), DISAGREE)
@pytest.mark.parametrize("size", [1, 9])
def test_shapes_that_disagree_in_relational(
    name: str, axis: int, other: str, letter: str, wanted: int, size: int, module: Any
) -> None:
    """Both arguments are named, and both sizes; a size of 1 does not broadcast."""
    shape = with_size(name, axis, size)
    said = (f"{name} has {letter} = {size}", shape, f"{other}'s {letter}, {wanted}", f"{name} {shape}")
    with refused(ValueError, *said, *shapes_of_call(name)):
        relational(module, **{name: ones(*shape)})


@pytest.mark.parametrize(("name", "axis", "size"), [("q", 0, 3), ("q", 2, 5), ("q", 3, 3), ("q", 5, 7), ("v", 1, 6)])
def test_features_that_fit_nothing_in_relational(name: str, axis: int, size: int) -> None:
    """Where it is this one that is wrong, the message still gives both sizes."""
    shape = with_size(name, axis, size)
    with refused(ValueError, size, RELATIONAL[name][axis], f"{name} {shape}", *shapes_of_call(name)):
        relational(**{name: ones(*shape)})


@on_modules
@pytest.mark.parametrize("kernel_size", [(3, 3, 1), (1, 3, 2), (2, 3, 3), (1, 1, 1), (9, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["h1", "g", "h2"])
def test_kernel_sizes_that_disagree(name: str, kernel_size: tuple[int, int, int], module: Any) -> None:
    shape = (*RELATIONAL[name][:-3], *kernel_size)
    with refused(ValueError, "kernel_size", kernel_size, (1, 3, 3), "h2", f"{name} {shape}", *shapes_of_call(name)):
        relational(module, **{name: ones(*shape)})


@pytest.mark.parametrize("name", ["h1", "g", "h2"])
@pytest.mark.parametrize("axes", [(3, 3), (1, 1, 3, 3)], ids=str)
def test_kernel_size_of_the_wrong_length(name: str, axes: tuple[int, ...]) -> None:
    shape = (*RELATIONAL[name][:-3], *axes)
    with refused(ValueError, name, FORMS[name], shape, "relational_attention"):
        relational(**{name: ones(*shape)})


def given_without(*absent: str) -> dict[str, Any]:
    return dict.fromkeys(absent)


IMPOSSIBLE = {
    "h1 without k": (("k",), ("k", "None", "h1")),
    "k without h1": (("h1",), ("h1", "None", "k")),
    "k alone": (("h1", "p1"), ("h1", "None", "k")),
    "h1 alone": (("k", "p1"), ("k", "None", "h1")),
    "identity without g": (("g",), ("g", "None", "identity")),
    "no p1 where C is not D": (("k", "h1", "p1"), ("p1", "None", "C = 4", "D = 7")),
}


@on_modules
@pytest.mark.parametrize("combination", IMPOSSIBLE)
def test_impossible_combinations(combination: str, module: Any) -> None:
    absent, parts = IMPOSSIBLE[combination]
    with refused(ValueError, *parts, *shapes_of_call(*absent)):
        relational(module, **given_without(*absent))


POSSIBLE = [
    *itertools.product([(), ("p1",), ("k", "h1")], [(), ("identity",), ("g", "identity")]),
    *(((("k", "h1", "p1"), context)) for context in [(), ("identity",), ("g", "identity")]),
]


def test_every_combination_is_possible_or_refused() -> None:
    """Of the 32 choices of what is given, these run; the others say why not."""
    possible = {frozenset((*kernel, *context)) for kernel, context in POSSIBLE}
    for number in range(len(OPTIONAL) + 1):
        for absent in itertools.combinations(OPTIONAL, number):
            given = {name: ones(*shape) for name, shape in RELATIONAL.items()} | given_without(*absent)
            if set(absent) >= {"k", "h1", "p1"}:
                given["h2"] = ones(4, 1, 3, 3)  # C == D
            if frozenset(absent) in possible:
                y = dt.ops.relational_attention(**given)
                assert y.shape == (2, 3, 5 if "g" in absent else 6, 2, 5, 6)
            else:
                with refused(ValueError, "relational_attention", "None", "accepted", "call: q (2, 3, 4, 2, 5, 6)"):
                    dt.ops.relational_attention(**given)


@on_modules
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
@on_tensors
def test_dtype_in_relational(name: str, dtype: torch.dtype, module: Any) -> None:
    """Alone, and where all have it."""
    kind = str(dtype)[6:]
    with refused(TypeError, name, kind, f"{name} {RELATIONAL[name]} {kind}", *shapes_of_call(name)):
        relational(module, **{name: ones(*RELATIONAL[name], dtype=dtype)})
    given = {n: ones(*shape, dtype=dtype) for n, shape in RELATIONAL.items()}
    with refused(TypeError, kind, "float16, bfloat16, float32 or float64", *shapes_of_call()):
        relational(module, **given)


@on_modules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@on_tensors
def test_mixed_dtypes_in_relational(name: str, dtype: torch.dtype, module: Any) -> None:
    kind = str(dtype)[6:]
    with refused(TypeError, kind, "q's dtype", "float32", f"{name} {RELATIONAL[name]} {kind}", *shapes_of_call(name)):
        relational(module, **{name: ones(*RELATIONAL[name], dtype=dtype)})


@on_modules
@on_tensors
def test_mixed_devices_in_relational(name: str, module: Any) -> None:
    with refused(ValueError, "meta", "q's device", str(DEVICE), f"{name} {RELATIONAL[name]}", *shapes_of_call(name)):
        relational(module, **{name: ones(*RELATIONAL[name], device="meta")})


SIZED = [(letter, name, axis) for name in RELATIONAL for axis, letter in enumerate(FORMS[name].strip("()").split(", "))]


@on_modules
@pytest.mark.parametrize("letter", sorted({letter for letter, *_ in SIZED} - {"B"}))
def test_empty_sizes_in_relational(letter: str, module: Any) -> None:
    """Only the batch may be empty."""
    shapes = {name: list(shape) for name, shape in RELATIONAL.items()}
    for own, name, axis in SIZED:
        if own == letter:
            shapes[name][axis] = 0
    given = {name: ones(*shape) for name, shape in shapes.items()}
    with refused(ValueError, "relational_attention", f"{letter} = 0", "only the batch may be empty", "call: q ("):
        relational(module, **given)


@on_modules
@pytest.mark.parametrize("eps", [0, 0.0, -1e-6, -1, float("nan"), float("inf"), float("-inf"), 1e-50, 10**400])
def test_eps_out_of_range(eps: float, module: Any) -> None:
    with refused(ValueError, "eps is", repr(eps), "> 0", "eps " + repr(eps)[:90], *shapes_of_call()):
        relational(module, eps=eps)


@on_modules
@pytest.mark.parametrize("eps", ["1e-6", True, False, [1e-6], 1j, torch.tensor(1e-6), np.float32(1e-6)], ids=repr)
def test_eps_of_another_type(eps: object, module: Any) -> None:
    with refused(TypeError, "eps is", "> 0", *shapes_of_call()):
        relational(module, eps=eps)


@on_modules
def test_keywords_of_relational(module: Any) -> None:
    with refused(TypeError, "relational_attention", "h2"):
        module.relational_attention(ones(2, 3, 4, 2, 5, 6), None, ones(2, 5, 2, 5, 6))
    with refused(TypeError, "relational_attention", "h3"):
        relational(module, h3=ones(2))


def test_no_kernel_of_relational_runs_on_meta_tensors() -> None:
    given = {name: ones(*shape, device="meta") for name, shape in RELATIONAL.items()}
    said = ("relational_attention", "'triton' cannot run here", "meta", "TRITON_INTERPRET=1", "q (2, 3, 4, 2, 5, 6)")
    with dt.backend("triton"), refused(RuntimeError, *said):
        relational(**given)


@pytest.mark.parametrize(
    "dtype", [d for d in (torch.float32, torch.float64) if not can_run("triton", device=DEVICE, dtype=d)], ids=str
)
def test_backend_of_relational_that_cannot_run(dtype: torch.dtype) -> None:
    given = {name: ones(*shape, dtype=dtype) for name, shape in RELATIONAL.items()}
    with dt.backend("triton"), refused(RuntimeError, "relational_attention", "'triton' cannot run here"):
        relational(**given)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"scale": 0}, ValueError, ("scale", "0", "number > 0")),
        ({"scale": "1"}, TypeError, ("scale", "'1'", "number > 0")),
        ({"zeros": 1}, ValueError, ("zeros", "1", "False", "True", "(*, C, T, H, W)")),
        ({"zeros": True, "shape": (2, 3)}, ValueError, ("zeros", "True", "(2, 3)", "(*, C, T, H, W)")),
        ({"layout": "rows"}, ValueError, ("layout", "'rows'", "'channels_last_3d'")),
    ],
    ids=str,
)
def test_relational_spec(arguments: dict, error: type[Exception], parts: tuple[object, ...]) -> None:
    with refused(error, *parts), NothingRuns():
        testing.RelationalSpec(**({"shape": (1, 4, 1, 2, 3)} | arguments))


def test_dtypes_of_relational_calls() -> None:
    with refused(TypeError, "relational_calls", "dtypes", "3", "dtype"):
        strategies.relational_calls(dtypes=3)
    with refused(ValueError, "relational_calls", "dtypes", "()", "dtype"):
        strategies.relational_calls(dtypes=())


# --- bilinear transform ---------------------------------------------------------------------------------------------

# B 2, C 12, T 6, a 2, b 3, d 3
BILINEAR: dict[str, tuple[int, ...]] = {
    "x": (2, 12, 6, 10, 21), "p": (2, 3, 6, 5, 5), "q": (2, 3, 6, 7, 7), "t": (2, 4, 2, 2),
}  # fmt: skip
BILINEAR_FORMS = {
    "x": "(B, C, T, H, W)", "p": "(B, G, T, Sh, Sh)", "q": "(B, G, T, Sw, Sw)", "t": "(B, Gt, Ts, Ts)",
}  # fmt: skip
on_bilinear_tensors = pytest.mark.parametrize("name", BILINEAR)
on_matrices = pytest.mark.parametrize("name", ["p", "q", "t"])


def bilinear(module: Any = dt.ops, **changed: Any) -> Any:
    """A good call of bilinear_transform with some arguments replaced, in which nothing may run."""
    given = {name: ones(*shape) for name, shape in BILINEAR.items()} | changed
    with NothingRuns():
        return module.bilinear_transform(**given)


def bilinear_shapes(*changed: str) -> list[str]:
    """How a message ends: the call, with the shapes of all tensors but those that were changed."""
    shown = [f"{name} {shape}" for name, shape in BILINEAR.items() if name not in changed]
    return ["bilinear_transform", "accepted", "call: x ", *shown]


def bilinear_with(name: str, *sizes: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a tensor with some (axis, size) replaced."""
    shape = list(BILINEAR[name])
    for axis, size in sizes:
        shape[axis] = size
    return tuple(shape)


@on_modules
@pytest.mark.parametrize("absent", [(), ("t",)], ids=["with t", "without t"])
def test_nothing_runs_notices_in_bilinear(absent: tuple[str, ...], module: Any) -> None:
    with pytest.raises(AssertionError, match="before the arguments were refused"):
        bilinear(module, **given_without(*absent))


@on_modules
@pytest.mark.parametrize("value", [None, [[1.0]], 3.0, "map", torch.float32])
@on_bilinear_tensors
def test_no_tensor_in_bilinear(name: str, value: object, module: Any) -> None:
    if value is None and name == "t":
        return  # left out
    with refused(TypeError, "bilinear_transform", f"{name} is", repr(value), type(value).__name__, "Tensor"):
        bilinear(module, **{name: value})


@on_modules
@pytest.mark.parametrize("kind", ["sparse", "nested"])
@on_bilinear_tensors
def test_no_dense_tensor_in_bilinear(name: str, kind: str, module: Any) -> None:
    value = ones(*BILINEAR[name])
    value = value.to_sparse() if kind == "sparse" else torch.nested.nested_tensor([value[0]])
    with refused(TypeError, f"{name} is", kind, "dense", "Tensor", "bilinear_transform"):
        bilinear(module, **{name: value})


@on_modules
@pytest.mark.parametrize("change", [-1, 1])
@on_bilinear_tensors
def test_rank_in_bilinear(name: str, change: int, module: Any) -> None:
    shape = (1, *BILINEAR[name]) if change > 0 else BILINEAR[name][1:]
    said = (f"{name} has {len(shape)} dimensions", BILINEAR_FORMS[name], f"{name} {shape}")
    with refused(ValueError, *said, *bilinear_shapes(name)):
        bilinear(module, **{name: ones(*shape)})


@on_modules
@on_bilinear_tensors
def test_scalar_in_bilinear(name: str, module: Any) -> None:
    with refused(ValueError, f"{name} has 0 dimensions", BILINEAR_FORMS[name], *bilinear_shapes(name)):
        bilinear(module, **{name: ones()})


@on_modules
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("size", [1, 4, 9])
@on_matrices
def test_matrices_that_are_not_square(name: str, size: int, axis: int, module: Any) -> None:
    shape = bilinear_with(name, (axis, size))
    with refused(ValueError, name, "square", shape[-2], shape[-1], f"{name} {shape}", *bilinear_shapes(name)):
        bilinear(module, **{name: ones(*shape)})


BILINEAR_DISAGREE = [
    ("p", 0, "x", "B", 2), ("q", 0, "x", "B", 2), ("t", 0, "x", "B", 2), ("p", 2, "x", "T", 6), ("q", 2, "x", "T", 6),
    ("q", 1, "p", "G", 3),
]  # fmt: skip


@on_modules
@pytest.mark.parametrize(("name", "axis", "other", "letter", "wanted"), BILINEAR_DISAGREE)
@pytest.mark.parametrize("size", [1, 4])
def test_shapes_that_disagree_in_bilinear(
    name: str, axis: int, other: str, letter: str, wanted: int, size: int, module: Any
) -> None:
    """Both arguments are named, and both sizes; a size of 1 does not broadcast."""
    shape = bilinear_with(name, (axis, size))
    said = (f"{name} has {letter} = {size}", f"{other}'s {letter}, {wanted}", f"{name} {shape}")
    with refused(ValueError, *said, *bilinear_shapes(name)):
        bilinear(module, **{name: ones(*shape)})


@on_modules
@pytest.mark.parametrize(("axis", "size"), [(0, 1), (0, 3), (2, 1), (2, 12)])
def test_x_that_fits_nothing_in_bilinear(axis: int, size: int, module: Any) -> None:
    """Where it is this one that is wrong, the message still gives both sizes."""
    shape = bilinear_with("x", (axis, size))
    with refused(ValueError, size, BILINEAR["x"][axis], f"x {shape}", *bilinear_shapes("x")):
        bilinear(module, x=ones(*shape))


@on_modules
@pytest.mark.parametrize(("letter", "size"), [("G", 5), ("G", 8), ("G", 24), ("Gt", 5), ("Gt", 24), ("Gt", 13)])
def test_groups_that_do_not_divide_the_channels(letter: str, size: int, module: Any) -> None:
    names = ("p", "q") if letter == "G" else ("t",)
    given = {name: ones(*bilinear_with(name, (1, size))) for name in names}
    with refused(ValueError, "x has C = 12", f"{names[0]}'s {letter}, {size}", *bilinear_shapes(*names)):
        bilinear(module, **given)


SAYS_HOW = ("multiple", "BATransform", "remainder='repeat'")  # what takes any side


@on_modules
@pytest.mark.parametrize(
    ("axis", "size", "side", "cells"),
    [(3, 11, "H", "p's Sh, 5"), (3, 4, "H", "p's Sh, 5"), (4, 20, "W", "q's Sw, 7"), (4, 1, "W", "q's Sw, 7")],
)
def test_sides_that_are_no_multiple(axis: int, size: int, side: str, cells: str, module: Any) -> None:
    """Both numbers, and what lifts it: the layer's option."""
    shape = bilinear_with("x", (axis, size))
    with refused(ValueError, f"x has {side} = {size}", cells, *SAYS_HOW, f"x {shape}", *bilinear_shapes("x")):
        bilinear(module, x=ones(*shape))


@on_modules
@pytest.mark.parametrize(
    ("name", "size", "side", "letter"),
    [
        ("p", 4, "H = 10", "Sh"), ("p", 20, "H = 10", "Sh"), ("q", 6, "W = 21", "Sw"), ("q", 42, "W = 21", "Sw"),
        ("t", 4, "T = 6", "Ts"), ("t", 12, "T = 6", "Ts"),
    ],
)  # fmt: skip
def test_matrices_that_do_not_divide_a_side(name: str, size: int, side: str, letter: str, module: Any) -> None:
    """Larger ones neither."""
    shape = bilinear_with(name, (-1, size), (-2, size))
    said = (f"x has {side}", f"{name}'s {letter}, {size}", *SAYS_HOW, f"{name} {shape}")
    with refused(ValueError, *said, *bilinear_shapes(name)):
        bilinear(module, **{name: ones(*shape)})


@on_modules
def test_frames_that_are_no_multiple(module: Any) -> None:
    changed = {name: ones(*bilinear_with(name, (2, 7))) for name in ("x", "p", "q")}
    with refused(ValueError, "x has T = 7", "t's Ts, 2", *SAYS_HOW, *bilinear_shapes("x", "p", "q")):
        bilinear(module, **changed)


@on_modules
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
@on_bilinear_tensors
def test_dtype_in_bilinear(name: str, dtype: torch.dtype, module: Any) -> None:
    """Alone, and where all have it."""
    kind = str(dtype)[6:]
    with refused(TypeError, name, kind, f"{name} {BILINEAR[name]} {kind}", *bilinear_shapes(name)):
        bilinear(module, **{name: ones(*BILINEAR[name], dtype=dtype)})
    given = {n: ones(*shape, dtype=dtype) for n, shape in BILINEAR.items()}
    with refused(TypeError, kind, "float16, bfloat16, float32 or float64", *bilinear_shapes()):
        bilinear(module, **given)


@on_modules
@pytest.mark.parametrize(
    ("features", "own"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float16),
    ],
    ids=lambda dtype: str(dtype)[6:],
)
@on_matrices
def test_mixed_dtypes_in_bilinear(name: str, features: torch.dtype, own: torch.dtype, module: Any) -> None:
    """Neither x's nor float32."""
    given = {n: ones(*shape, dtype=own if n == name else features) for n, shape in BILINEAR.items()}
    kind = str(own)[6:]
    said = (f"{name} is {kind}", "x's dtype", str(features)[6:], "float32", f"{name} {BILINEAR[name]} {kind}")
    with refused(TypeError, *said, *bilinear_shapes()):
        bilinear(module, **given)


@on_modules
@on_bilinear_tensors
def test_mixed_devices_in_bilinear(name: str, module: Any) -> None:
    said = ("meta", "x's device", str(DEVICE), f"{name} {BILINEAR[name]}")
    with refused(ValueError, *said, *bilinear_shapes(name)):
        bilinear(module, **{name: ones(*BILINEAR[name], device="meta")})


BILINEAR_SIZED = [
    (letter, name, axis)
    for name in BILINEAR
    for axis, letter in enumerate(BILINEAR_FORMS[name].strip("()").split(", "))
]


@on_modules
@pytest.mark.parametrize("letter", sorted({letter for letter, *_ in BILINEAR_SIZED} - {"B"}))
@pytest.mark.parametrize("batch", [2, 0])
def test_empty_sizes_in_bilinear(letter: str, batch: int, module: Any) -> None:
    """Only the batch may be empty; where it is, nothing else may be."""
    shapes = {name: [batch, *shape[1:]] for name, shape in BILINEAR.items()}
    for own, name, axis in BILINEAR_SIZED:
        if own == letter:
            shapes[name][axis] = 0
    given = {name: ones(*shape) for name, shape in shapes.items()}
    with refused(ValueError, "bilinear_transform", f"{letter} = 0", "only the batch may be empty", "call: x ("):
        bilinear(module, **given)


@on_modules
def test_arguments_of_bilinear(module: Any) -> None:
    x, p = ones(*BILINEAR["x"]), ones(*BILINEAR["p"])
    with refused(TypeError, "bilinear_transform", "'q'"):
        module.bilinear_transform(x, p)
    with refused(TypeError, "bilinear_transform", "h1"):
        bilinear(module, h1=p)


def test_no_kernel_of_bilinear_runs_on_meta_tensors() -> None:
    given = {name: ones(*shape, device="meta") for name, shape in BILINEAR.items()}
    said = ("bilinear_transform", "'triton' cannot run here", "meta", "TRITON_INTERPRET=1", f"x {BILINEAR['x']}")
    with dt.backend("triton"), refused(RuntimeError, *said):
        bilinear(**given)


@pytest.mark.parametrize(
    "dtype", [d for d in (torch.float32, torch.float64) if not can_run("triton", device=DEVICE, dtype=d)], ids=str
)
def test_backend_of_bilinear_that_cannot_run(dtype: torch.dtype) -> None:
    given = {name: ones(*shape, dtype=dtype) for name, shape in BILINEAR.items()}
    with dt.backend("triton"), refused(RuntimeError, "bilinear_transform", "'triton' cannot run here"):
        bilinear(**given)


@on_modules
def test_autocast_excuses_no_dtype_in_bilinear(module: Any) -> None:
    """It lowers x; what is neither x's dtype then nor float32 is refused as ever."""
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        for name in ("p", "q", "t"):
            with refused(TypeError, "bilinear_transform", name, "float16", "float32", "call: x ("):
                bilinear(module, **{name: ones(*BILINEAR[name], dtype=torch.float16)})


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"shape": (2, 3)}, ValueError, ("shape", "(2, 3)", "(*, S, S)")),
        ({"shape": (3,)}, ValueError, ("shape", "(3,)", "(*, S, S)")),
        ({"shape": ()}, ValueError, ("shape", "()", "(*, S, S)")),
        ({"kind": "softmax"}, ValueError, ("kind", "'softmax'", "'signed'", "'weights'")),
        ({"kind": None}, ValueError, ("kind", "None", "'signed'", "'weights'")),
        ({"layout": "rows"}, ValueError, ("layout", "'rows'", "'channels_last_3d'")),
    ],
    ids=str,
)
def test_bilinear_spec(arguments: dict, error: type[Exception], parts: tuple[object, ...]) -> None:
    with refused(error, *parts), NothingRuns():
        testing.BilinearSpec(**({"shape": (1, 2, 3, 3)} | arguments))


def test_dtypes_of_bilinear_calls() -> None:
    with refused(TypeError, "bilinear_calls", "dtypes", "3", "dtype"):
        strategies.bilinear_calls(dtypes=3)
    with refused(ValueError, "bilinear_calls", "dtypes", "()", "dtype"):
        strategies.bilinear_calls(dtypes=())


# --- layers ---------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"grid": (2, 2), "region_channels": 8}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"in_channels": 0}, ("in_channels", "0", "integer > 0")),
        ({"in_channels": -4}, ("in_channels", "-4", "integer > 0")),
        ({"in_channels": 4.0}, ("in_channels", "4.0", "integer > 0")),
        ({"size": (0, 6)}, ("size", "(0, 6)", "two positive integers")),
        ({"size": (6, -1)}, ("size", "(6, -1)", "two positive integers")),
        ({"size": 6}, ("size", "6", "two positive integers")),
        ({"size": (2, 9)}, ("size", "(2, 9)", "at least 3")),
        ({"train_size": (2, 9)}, ("train_size", "(2, 9)", "at least 3")),
        ({"grid": (0, 3)}, ("grid", "(0, 3)", "two positive integers")),
        ({"grid": 3}, ("grid", "3", "two positive integers")),
        ({"train_size": (7, 0)}, ("train_size", "(7, 0)", "two positive integers")),
        ({"node_channels": 0}, ("node_channels", "0", "integer > 0")),
        ({"region_channels": 0}, ("region_channels", "0", "integer > 0")),
        ({"generator": "conv"}, ("generator", "'conv'", "'fc'", "'pooled'")),
        ({"weights_over": "time"}, ("weights_over", "'time'", "'locations'", "'nodes'")),
        ({"init": "corner"}, ("init", "'corner'", "'center'", "'grid'")),
        ({"region_rule": "other"}, ("rule", "'other'", "'paper'", "'published'")),
        ({"recurrence": "rnn"}, ("recurrence", "'rnn'", "'gru'", "'lstm'")),
        ({"profile": "box"}, ("profile", "'box'", "'linear'", "'gaussian'", "'log-linear'")),
        ({"node_channels": 8, "project": False}, ("project", "False", "8", "4")),
    ],
    ids=str,
)
def test_arguments_of_dyreg(arguments: dict, parts: tuple[str, ...]) -> None:
    good = {"in_channels": 4, "size": (6, 7), **SMALL}
    with refused(ValueError, "DyReG", *parts):
        dt.layers.DyReG(**(good | arguments))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), "warm"])
def test_temperature_of_dyreg(temperature: object) -> None:
    """At construction, not at the first call."""
    with pytest.raises((ValueError, TypeError), match=saying("temperature", repr(temperature), "> 0")):
        dt.layers.DyReG(4, (6, 7), temperature=temperature, **SMALL)


def test_unknown_argument_of_layers() -> None:
    with refused(TypeError, "nodes"):
        dt.layers.DyReG(4, (6, 7), nodes=3)
    with refused(TypeError, "heads"):
        dt.layers.RSTG(4, heads=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"channels": 0}, ("channels", "0", "integer > 0")),
        ({"channels": 2.5}, ("channels", "2.5", "integer > 0")),
        ({"iterations": 0}, ("iterations", "0", "integer > 0")),
        ({"iterations": True}, ("iterations", "True", "integer > 0")),
        ({"recurrence": "rnn"}, ("recurrence", "'rnn'", "'gru'", "'lstm'")),
        ({"combine": "add"}, ("combine", "'add'", "'concatenate'", "'sum'")),
        ({"aggregation": "max"}, ("aggregation", "'max'", "'dot'", "'mean'")),
        ({"order": "space"}, ("order", "'space'", "'space-time'", "'time-space'")),
        ({"send_layers": 0}, ("send_layers", "0", "1", "2")),
        ({"send_layers": 3}, ("send_layers", "3", "1", "2")),
        ({"update_layers": 3}, ("update_layers", "3", "0", "1", "2")),
        ({"update_layers": -1}, ("update_layers", "-1", "0", "1", "2")),
        ({"update_layers": 0}, ("update_layers", "0", "concatenate")),
    ],
    ids=str,
)
def test_arguments_of_rstg(arguments: dict, parts: tuple[str, ...]) -> None:
    with refused(ValueError, "RSTG", *parts):
        dt.layers.RSTG(**({"channels": 4} | arguments))


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 5, 6, 7), (2, 3, 4, 7, 6), (2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 7)])
def test_input_shape_of_dyreg(shape: tuple[int, ...]) -> None:
    layer = dt.layers.DyReG(4, (6, 7), **SMALL)
    given = torch.ones(shape)
    with refused(ValueError, "DyReG", f"x is {shape}", "(B, T, 4, 6, 7)"), NothingRuns():
        layer(given)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 4)])
def test_input_shape_of_rstg(shape: tuple[int, ...]) -> None:
    layer = dt.layers.RSTG(4)
    given = torch.ones(shape)
    with refused(ValueError, "RSTG", f"nodes is {shape}", "(B, T, N, 4)"), NothingRuns():
        layer(given)


@pytest.mark.parametrize("value", [None, [[1.0]], 3])
def test_input_of_layers_is_no_tensor(value: object) -> None:
    for layer in (dt.layers.DyReG(4, (6, 7), **SMALL), dt.layers.RSTG(4)):
        with pytest.raises((TypeError, ValueError), match=saying(type(layer).__name__, "accepted")):
            layer(value)


@pytest.mark.parametrize(
    ("offsets", "arguments", "error", "parts"),
    [
        (torch.zeros(3, 4), {}, ValueError, ("offsets", "(3, 4)", "4, 4)")),
        (torch.zeros(4, 3), {}, ValueError, ("offsets", "(4, 3)", "4, 4)")),
        (torch.zeros(4), {}, ValueError, ("offsets", "(4,)", "4, 4)")),
        (torch.zeros(4, 4, dtype=torch.int64), {}, TypeError, ("offsets", "int64", "floating")),
        ([[0.0] * 4] * 4, {}, TypeError, ("offsets", "floating")),
        (torch.zeros(4, 4), {"grid": (0, 4)}, ValueError, ("grid", "(0, 4)", "two positive integers")),
        (torch.zeros(4, 4), {"size": (5, 0)}, ValueError, ("size", "(5, 0)", "two positive integers")),
        (torch.zeros(4, 4), {"init": "corner"}, ValueError, ("init", "'corner'", "'center'", "'grid'")),
        (torch.zeros(4, 4), {"rule": "other"}, ValueError, ("rule", "'other'", "'published'", "'paper'")),
    ],
    ids=str,
)
def test_regions_from_offsets(offsets: Any, arguments: dict, error: type[Exception], parts: tuple[str, ...]) -> None:
    with refused(error, "regions_from_offsets", *parts), NothingRuns():
        dt.layers.regions_from_offsets(offsets, **({"grid": (2, 2), "size": (5, 6)} | arguments))


@pytest.mark.parametrize(
    "build",
    [
        lambda: dt.layers.DyReG(4, (6, 7), **SMALL),
        lambda: dt.layers.RSTG(4),
        lambda: dt.compat.build("ops.dyreg.DynamicGraph", backbone_dim=4, node_dim=4, H=14, W=14),
    ],
    ids=["DyReG", "RSTG", "compat"],
)
def test_state_dict_keys(build: Callable[[], torch.nn.Module]) -> None:
    """All missing and all unexpected keys are listed, and nothing is dropped without a word."""
    module = build()
    state = copy.deepcopy(module.state_dict())
    module.load_state_dict(state, strict=True)
    missing = sorted(state)[::3]
    for name in missing:
        del state[name]
    state |= {"first.unexpected": torch.ones(1), "second.unexpected": torch.ones(1)}
    with refused(RuntimeError, "Missing", "Unexpected", *missing, "first.unexpected", "second.unexpected"):
        module.load_state_dict(state, strict=True)


# --- compat ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ops.dyreg.Graph", "DynamicGraph", "", None, 3])
def test_compat_name(name: object) -> None:
    accepted = ("ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG", "ops.rsa.RSA")
    with refused(ValueError, "compat.build", repr(name), *map(repr, accepted)):
        dt.compat.build(name, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG"])
def test_compat_unknown_key(name: str) -> None:
    with refused(ValueError, name, "channels_in", "depth", "accepted", "node_dim", "params"):
        dt.compat.build(name, {"channels_in": 4, "node_dim": 4}, depth=3)


@pytest.mark.parametrize("name", ["ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG"])
@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"send_layer": 1, "extra": 2}, ("params", "send_layer", "extra", "send_layers", "offset_lstm_dim")),
        ({"aggregation_type": "max"}, ("aggregation_type", "'max'", "'dot'", "'sum'")),
        ({"send_layers": 3}, ("send_layers", "3", "1", "2")),
        ({"update_layers": 5}, ("update_layers", "5", "0", "1", "2")),
        ({"init_regions": "corner"}, ("init_regions", "'corner'", "'center'", "'grid'")),
        ({"offset_generator": "huge"}, ("offset_generator", "'huge'", "'big'", "'small'")),
        ({"dynamic_regions": "serial"}, ("dynamic_regions", "'serial'", "'dyreg'")),
        ({"rstg_combine": "serial"}, ("rstg_combine", "'serial'", "'plus'")),
    ],
    ids=str,
)
def test_compat_params(name: str, params: dict, parts: tuple[str, ...]) -> None:
    arguments = {"ops.dyreg.DynamicGraph": {"backbone_dim": 4}, "ops.dyreg.DynamicGraphWrapper": {"in_channels": 4}}
    with refused(ValueError, *parts):
        dt.compat.build(name, {"params": params, "node_dim": 4, **arguments.get(name, {})})


def test_compat_config_is_a_mapping() -> None:
    with refused(TypeError, "compat.build", "config", "list", "mapping"):
        dt.compat.build("ops.rstg.RSTG", [("node_dim", 4)])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG"])
@pytest.mark.parametrize("rnn_type", ["lstm", "RNN", None, 3])
def test_compat_rnn_type(name: str, rnn_type: object) -> None:
    with refused(ValueError, "rnn_type", repr(rnn_type), "'LSTM'", "'GRU'"):
        dt.compat.build(name, {"node_dim": 4, "rnn_type": rnn_type})


@pytest.mark.parametrize("key", ["H", "W", "h", "w", "node_dim"])
@pytest.mark.parametrize("value", [0, -2, 1.5, None])
def test_compat_sizes(key: str, value: object) -> None:
    """Named as the authors name them."""
    with pytest.raises((ValueError, TypeError), match=saying("ops.dyreg.DynamicGraph", key, repr(value), "accepted")):
        dt.compat.build("ops.dyreg.DynamicGraph", {"backbone_dim": 4, "node_dim": 4, key: value})


def test_compat_full_res_needs_the_training_size() -> None:
    with refused(ValueError, "iH", "iW", "None", "full_res"):
        dt.compat.build("ops.dyreg.DynamicGraph", {"params": {"full_res": True}, "backbone_dim": 4, "node_dim": 4})


@pytest.mark.parametrize("shape", [(2, 3, 9, 4), (2, 3, 4, 8), (2, 4, 9), (2, 3, 4, 9, 1)])
def test_compat_input_shape_of_rstg(shape: tuple[int, ...]) -> None:
    module = dt.compat.build("ops.rstg.RSTG", node_dim=4)
    given = torch.ones(shape)
    with refused(ValueError, "RSTG", shape, "(B, T, 4, 9)"), NothingRuns():
        module(given)


@pytest.mark.parametrize("shape", [(2, 3, 4, 14, 13), (2, 3, 5, 14, 14), (3, 4, 14, 14)])
def test_compat_input_shape_of_dyreg(shape: tuple[int, ...]) -> None:
    for name, argument in (
        ("ops.dyreg.DynamicGraph", "backbone_dim"),
        ("ops.dyreg.DynamicGraphWrapper", "in_channels"),
    ):
        module = dt.compat.build(name, {argument: 4, "node_dim": 4})
        given = torch.ones(shape)
        with refused(ValueError, shape, "(B, T, 4, 14, 14)"), NothingRuns():
            module(given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_input_dtype_of_layers(dtype: torch.dtype) -> None:
    with refused(TypeError, "DyReG", "x is (1, 2, 4, 6, 7)", str(dtype)[6:], "float32", "autocast"):
        dt.layers.DyReG(4, (6, 7))(torch.ones(1, 2, 4, 6, 7, dtype=dtype))
    with refused(TypeError, "RSTG", "nodes is (1, 2, 3, 4)", str(dtype)[6:], "float32"):
        dt.layers.RSTG(4)(torch.ones(1, 2, 3, 4, dtype=dtype))


def test_sparse_features() -> None:
    with refused(TypeError, "region_pool", "x", "sparse", "dense", "regions (2, 4)"):
        dt.ops.region_pool(torch.ones(3, 5, 6).to_sparse(), torch.ones(2, 4))


@pytest.mark.parametrize("params", ["dyreg", [1, 2], 3])
def test_compat_params_of_no_use(params: object) -> None:
    with refused(TypeError, "ops.rstg.RSTG", "params", repr(params), "mapping"):
        dt.compat.build("ops.rstg.RSTG", params=params)


@pytest.mark.parametrize("key", ["combine_by_sum", "full_res"])
def test_compat_flags_are_bools(key: str) -> None:
    with refused(ValueError, f"params.{key}", "'False'", "True and False"):
        dt.compat.build("ops.dyreg.DynamicGraph", params={key: "False"})


@pytest.mark.parametrize("layers", [True, 1.0, "2", 3])
def test_layers_of_mlps(layers: object) -> None:
    with refused(ValueError, "send_layers", repr(layers), "1 and 2"):
        dt.layers.RSTG(4, send_layers=layers)


def test_unknown_option_of_dyreg() -> None:
    with refused(TypeError, "DyReG", "foo"):
        dt.layers.DyReG(4, (6, 7), foo=1)


def test_compat_name_that_is_no_name() -> None:
    with refused(ValueError, "compat.build", "['a']", "'ops.rstg.RSTG'"):
        dt.compat.build(["a"])


def test_wrapper_names_its_own_argument() -> None:
    with refused(ValueError, "DynamicGraphWrapper", "in_channels", "0"):
        dt.compat.build("ops.dyreg.DynamicGraphWrapper", in_channels=0)


def test_can_run_takes_a_dtype() -> None:
    with refused(TypeError, "can_run", "dtype", "'float32'"):
        can_run("eager", device="cpu", dtype="float32")


def test_compat_dimensions_without_projection() -> None:
    with refused(ValueError, "ops.dyreg.DynamicGraph", "node_dim is 8", "backbone_dim 16", "project_i3d False"):
        dt.compat.build("ops.dyreg.DynamicGraph", H=8, W=8, node_dim=8, backbone_dim=16)


# --- what a fuzzer found --------------------------------------------------------------------------------------------

HUGE = 2**63


@pytest.mark.parametrize("module", [dt.ops, dt.reference], ids=["ops", "reference"])
def test_none_for_a_tensor(module: Any) -> None:
    """None is an argument like any other, and not one left out."""
    regions = ones(2, 4, 4)
    with refused(TypeError, "region_pool", "x is", "None", "Tensor", "regions (2, 4, 4)"), NothingRuns():
        module.region_pool(None, regions)
    with refused(TypeError, "region_remap", "nodes is", "None", "Tensor", "regions (2, 4, 4)"), NothingRuns():
        module.region_remap(None, regions, (5, 6))
    with refused(TypeError, "region_kernel", "regions is", "None", "Tensor"), NothingRuns():
        module.region_kernel(None, (5, 6))
    with refused(TypeError, "region_pool", "regions is", "None", "Tensor", "x (2, 3, 5, 6)"):
        module.region_pool(ones(2, 3, 5, 6), None)


def test_nested_tensors() -> None:
    """They are strided, and have no shape that could be told."""
    given = torch.nested.nested_tensor([torch.ones(4, 4), torch.ones(3, 4)])
    for function in (
        lambda: dt.ops.region_kernel(given, (5, 6)),
        lambda: dt.ops.region_pool(given, torch.ones(2, 4)),
        lambda: dt.ops.region_remap(given, torch.ones(2, 4), (5, 6)),
        lambda: dt.layers.RSTG(4)(given),
        lambda: dt.layers.regions_from_offsets(given, grid=(2, 2), size=(5, 6)),
        lambda: testing.Guarded(given),
        lambda: testing.assert_close(given, given),
    ):
        with pytest.raises(TypeError, match=saying("nested", "accepted")):
            function()


@pytest.mark.parametrize("op", ["region_remap", "region_kernel"])
@pytest.mark.parametrize("size", [torch.Size([5, 0]), {5, 6}, b"56", [[5], 6], (HUGE, 6), (10**30, 1), (10**9, 10**9)])
def test_size_of_another_kind(op: str, size: object) -> None:
    """One that no memory holds is as wrong as none: asked for it, torch would fill all memory with an axis of it."""
    with refused(ValueError, op, "size", repr(size), "two positive integers", *CALLS[op]):
        call(op, size=size)


@pytest.mark.parametrize("op", ["region_remap", "region_kernel"])
@pytest.mark.parametrize("size", [torch.ones(2), torch.tensor([5, 6]), np.array([5, 6]), np.array([[5, 6]])])
def test_size_is_no_array(op: str, size: object) -> None:
    with refused(ValueError, op, "size", "two positive integers", *CALLS[op]):
        call(op, size=size)


@pytest.mark.parametrize("op", REGION_OPS)
@pytest.mark.parametrize("temperature", [1e39, 1e-50, 10**60, 10**400], ids=["1e39", "1e-50", "1e60", "1e400"])
def test_temperature_beyond_float32(op: str, temperature: float) -> None:
    with refused(ValueError, op, "temperature", repr(temperature), "accepted", *CALLS[op]):
        call(op, temperature=temperature)


@pytest.mark.parametrize("op", REGION_OPS)
def test_temperature_is_no_tensor(op: str) -> None:
    temperature = torch.tensor(2.0)
    with refused(TypeError, op, "temperature", "tensor(2.)", "number > 0", *CALLS[op]):
        call(op, temperature=temperature)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"regions": "moving"}, ("regions", "'moving'", "'full'", "'constant_time'", "'semantic'")),
        ({"regions": None}, ("regions", "None", "'full'")),
        ({"regions": ["full"]}, ("regions", "['full']", "'full'")),
        ({"size_ratio": 0}, ("size_ratio", "0", "number > 0")),
        ({"size_ratio": -6.0}, ("size_ratio", "-6.0", "number > 0")),
        ({"size_ratio": float("nan")}, ("size_ratio", "nan", "number > 0")),
        ({"size_ratio": float("inf")}, ("size_ratio", "inf", "number > 0")),
        ({"size_ratio": "6"}, ("size_ratio", "'6'", "number > 0")),
        ({"size_ratio": (5, 6)}, ("size_ratio", "(5, 6)", "number > 0")),
        ({"size_ratio": True}, ("size_ratio", "True", "number > 0")),
        ({"connection": "parallel"}, ("connection", "'parallel'", "'residual'", "'serial'")),
        ({"connection": None}, ("connection", "None", "'residual'", "'serial'")),
        ({"return_regions": "no"}, ("return_regions", "'no'", "True and False")),
        ({"init": 3}, ("init", "3", "'center'", "'grid'")),
        ({"project": 1}, ("project", "1", "True and False")),
        ({"region_channels": HUGE}, ("region_channels", HUGE, "integer > 0")),
        ({"in_channels": 10**30}, ("in_channels", 10**30, "integer > 0")),
        ({"size": (6, HUGE)}, ("size", (6, HUGE), "two positive integers")),
        ({"grid": (HUGE, 1)}, ("grid", (HUGE, 1), "two positive integers")),
    ],
    ids=str,
)
def test_variants_of_dyreg(arguments: dict, parts: tuple[object, ...]) -> None:
    with pytest.raises((TypeError, ValueError), match=saying("DyReG", *parts)):
        dt.layers.DyReG(**({"in_channels": 4, "size": (6, 7), **SMALL} | arguments))


@pytest.mark.parametrize("kind", [np.int64, np.uint8], ids=lambda kind: kind.__name__)
def test_integers_of_numpy_count(kind: Callable[[int], Any]) -> None:
    four = kind(4)
    layer = dt.layers.DyReG(four, (kind(6), four), grid=(kind(1), 2), node_channels=four, region_channels=kind(2))
    assert layer(torch.ones(1, 2, 4, 6, 4)).shape == (1, 2, 4, 6, 4)
    assert dt.layers.RSTG(four, iterations=kind(1), send_layers=kind(1))(torch.ones(1, 2, 3, 4)).shape == (1, 2, 3, 4)


@pytest.mark.parametrize("value", ["no", 1, torch.tensor([True, False]), ...])
def test_return_regions_of_a_call(value: object) -> None:
    layer, x = dt.layers.DyReG(4, (6, 7), **SMALL), torch.ones(1, 2, 4, 6, 7)
    with refused(ValueError, "DyReG", "return_regions", repr(value), "True and False"), NothingRuns():
        layer(x, return_regions=value)


@pytest.mark.parametrize("regions", ["full", "grid", "semantic"])
def test_device_of_layers(regions: str) -> None:
    layer, x = dt.layers.DyReG(4, (6, 7), regions=regions, **SMALL), torch.ones(1, 2, 4, 6, 7, device="meta")
    with refused((TypeError, ValueError), "DyReG", "x is (1, 2, 4, 6, 7)", "meta", "accepted", "cpu"), NothingRuns():
        layer(x)
    rstg, nodes = dt.layers.RSTG(4), torch.ones(1, 2, 3, 4, device="meta")
    with refused((TypeError, ValueError), "RSTG", "nodes is (1, 2, 3, 4)", "meta", "accepted", "cpu"), NothingRuns():
        rstg(nodes)


@pytest.mark.parametrize(
    ("offsets", "arguments", "error", "parts"),
    [
        (torch.zeros(4, 4).to_sparse(), {}, TypeError, ("offsets", "sparse", "floating")),
        (torch.zeros(4, 4).to(torch.float8_e5m2), {}, TypeError, ("offsets", "float8_e5m2", "float32")),
        (torch.zeros(4, 4), {"size_ratio": 0}, ValueError, ("size_ratio", "0", "number > 0", "offsets (4, 4)")),
        (torch.zeros(4, 4), {"size_ratio": "6"}, TypeError, ("size_ratio", "'6'", "number > 0", "offsets (4, 4)")),
        (torch.zeros(4, 4), {"size_ratio": 10**400}, ValueError, ("size_ratio", "number > 0", "offsets (4, 4)")),
        (torch.zeros(4, 4), {"size": (HUGE, 6)}, ValueError, ("size", (HUGE, 6), "two positive integers")),
        (torch.zeros(4, 4), {"grid": torch.ones(2)}, ValueError, ("grid", "two positive integers", "offsets (4, 4)")),
    ],
    ids=["sparse", "float8", "zero", "text", "endless", "huge", "tensor"],
)
def test_offsets_and_ratio(offsets: Any, arguments: dict, error: type[Exception], parts: tuple[object, ...]) -> None:
    with refused(error, "regions_from_offsets", *parts), NothingRuns():
        dt.layers.regions_from_offsets(offsets, **({"grid": (2, 2), "size": (5, 6)} | arguments))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"project_i3d": np.array([1, 0])}, ("project_i3d", "True and False")),
        ({"project_i3d": torch.ones(2)}, ("project_i3d", "True and False")),
        ({"project_i3d": "no"}, ("project_i3d", "'no'", "True and False")),
        ({"num_nodes": torch.ones(2)}, ("num_nodes", "h * w")),
        ({"num_nodes": np.array([1, 9])}, ("num_nodes", "h * w")),
        ({"num_nodes": "9"}, ("num_nodes", "'9'", "h * w")),
        ({"H": 10**30}, ("H", 10**30, "integer > 0")),
        ({"params": {None: 1}}, ("params", "None", "offset_lstm_dim")),
        ({"params": types.SimpleNamespace(offset_lstm_dim=2.5)}, ("params.offset_lstm_dim", "2.5", "integer > 0")),
        ({None: 1}, ("DynamicGraph", "None", "backbone_dim")),
    ],
    ids=str,
)
def test_compat_arguments_that_are_hard_to_compare(arguments: dict, parts: tuple[object, ...]) -> None:
    with pytest.raises((TypeError, ValueError), match=saying(*parts)):
        dt.compat.build("ops.dyreg.DynamicGraph", {"backbone_dim": 4, "node_dim": 4, **arguments})


def test_wrapper_names_its_own_dimension() -> None:
    with refused(ValueError, "ops.dyreg.DynamicGraphWrapper", "node_dim is 8", "in_channels 16", "project_i3d False"):
        dt.compat.build("ops.dyreg.DynamicGraphWrapper", node_dim=8, in_channels=16)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"name": np.array(["eager", "triton"])}, ValueError, ("name", "'triton'", "'reference'")),
        ({"device": None}, TypeError, ("device", "None", "torch.device")),
        ({"device": torch.ones(2)}, TypeError, ("device", "torch.device")),
        ({"device": "gpu"}, ValueError, ("device", "'gpu'", "torch.device")),
        ({"device": ""}, ValueError, ("device", "''", "torch.device")),
        ({"device": "cpu:-1"}, ValueError, ("device", "'cpu:-1'", "torch.device")),
        ({"dtype": None}, TypeError, ("dtype", "None", "torch.dtype")),
        ({"raise_error": "no"}, ValueError, ("raise_error", "'no'", "True and False")),
    ],
    ids=str,
)
def test_arguments_of_can_run(arguments: dict, error: type[Exception], parts: tuple[object, ...]) -> None:
    with refused(error, "can_run", *parts):
        can_run(**({"name": "triton", "device": "cpu", "dtype": torch.float32} | arguments))


@pytest.mark.parametrize("name", ["eager", "reference"])
@pytest.mark.parametrize("device", ["cuda", "cuda:77"])
def test_can_run_of_a_device_that_is_not_there(name: str, device: str) -> None:
    """A question has an answer on any machine."""
    assert can_run(name, device=device, dtype=torch.float32) in (True, False)
    answer = can_run("triton", device=device, dtype=torch.float32)
    assert answer is (device == "cuda" and torch.cuda.is_available() and answer)
    if not answer:
        with refused(RuntimeError, "'triton' cannot run here"):
            can_run("triton", device=device, dtype=torch.float32, raise_error=True)


def test_backend_refused_changes_nothing() -> None:
    with dt.backend("eager"):
        with refused(ValueError, "backend", "'fast'"):
            dt.backend("fast")
        assert current_backend() == "eager"
    assert current_backend() == "auto"


# --- the testing kit ------------------------------------------------------------------------------------------------

A = torch.ones(2, 3)
SPEC = testing.TensorSpec((2, 3))
NAMED = strategies.tensor("N")


@pytest.mark.parametrize(
    ("function", "arguments", "error", "parts"),
    [
        ("relative_error", {"actual": None}, TypeError, ("actual", "None", "Tensor")),
        ("relative_error", {"expected": [1.0]}, TypeError, ("expected", "[1.0]", "Tensor")),
        ("relative_error", {"expected": torch.ones(())}, ValueError, ("expected", "()", "(2, 3)")),
        ("relative_error", {"floor": -1.0}, ValueError, ("floor", "-1.0", "number >= 0")),
        ("relative_error", {"floor": "0"}, ValueError, ("floor", "'0'", "number >= 0")),
        ("mismatch", {"tolerance": "1"}, ValueError, ("tolerance", "'1'", "number >= 0")),
        ("mismatch", {"tolerance": float("nan")}, ValueError, ("tolerance", "nan", "number >= 0")),
        ("mismatch", {"tolerance": {}}, ValueError, ("tolerance", "{}", "number >= 0")),
        ("mismatch", {"element": -1}, ValueError, ("element", "-1", "number >= 0")),
        ("mismatch", {"floor": None}, ValueError, ("floor", "None", "number >= 0")),
        ("mismatch", {"actual": A.long()}, TypeError, ("actual", "int64", "float32")),
        ("mismatch", {"actual": A.to_sparse()}, TypeError, ("actual", "sparse", "dense")),
        ("mismatch", {"expected": A.to_sparse()}, TypeError, ("expected", "sparse", "dense")),
        ("mismatch", {"expected": A.to("meta")}, TypeError, ("expected", "meta")),
        ("mismatch", {"actual": 1j * A, "expected": 2j * A, "tolerance": 0.1}, TypeError, ("actual", "complex64")),
        ("relative_error", {"expected": 1j * A}, TypeError, ("expected", "complex64")),
        ("assert_close", {"actual": 1.0}, TypeError, ("actual", "1.0", "Tensor")),
        ("assert_close", {"expected": "a"}, TypeError, ("expected", "'a'", "Tensor")),
        ("assert_identical", {"actual": None}, TypeError, ("actual", "None", "Tensor")),
        ("assert_identical", {"expected": A.to_sparse()}, TypeError, ("expected", "sparse", "dense")),
        ("assert_identical", {"expected": A.to("meta")}, TypeError, ("expected", "meta")),
        ("assert_all_close", {"actual": [A]}, TypeError, ("actual", "list", "mapping")),
        ("assert_all_close", {"expected": None}, TypeError, ("expected", "None", "mapping")),
        ("assert_all_close", {"floors": 3}, TypeError, ("floors", "3", "mapping")),
        ("assert_all_close", {"tolerance": -1}, ValueError, ("tolerance", "-1", "number >= 0")),
        ("value_and_gradients", {"function": None}, TypeError, ("function", "None", "callable")),
        ("value_and_gradients", {"function": lambda x: (x, x)}, TypeError, ("function", "tuple", "Tensor")),
        ("value_and_gradients", {"inputs": [A]}, TypeError, ("inputs", "list", "mapping")),
        ("value_and_gradients", {"inputs": {"x": 3}}, TypeError, ("inputs", "x", "3", "Tensor")),
        ("value_and_gradients", {"inputs": {"x": A}, "grad_output": "1"}, TypeError, ("grad_output", "'1'", "Tensor")),
        ("Guarded", {"values": A.long()}, TypeError, ("values", "int64", "floating")),
        ("Guarded", {"values": [1.0]}, TypeError, ("values", "[1.0]", "floating")),
        ("Guarded", {"values": A.to_sparse()}, TypeError, ("values", "sparse", "dense")),
        ("Guarded", {"layout": "rows"}, ValueError, ("layout", "'rows'", "'sliced'", "values (2, 3)")),
        ("Guarded", {"layout": None}, ValueError, ("layout", "None", "'sliced'", "values (2, 3)")),
        ("random_regions", {"shape": 3}, ValueError, ("shape", "3", "integers >= 0")),
        ("random_regions", {"shape": (2, -1)}, ValueError, ("shape", "(2, -1)", "integers >= 0")),
        ("random_regions", {"size": (0, 3)}, ValueError, ("size", "(0, 3)", "two positive integers")),
        ("random_regions", {"kind": "round"}, ValueError, ("kind", "'round'", "'covering'")),
        ("random_regions", {"dtype": torch.int64}, ValueError, ("dtype", "int64", "float32")),
        ("random_regions", {"dtype": np.array([1, 2])}, ValueError, ("dtype", "float32")),
        ("random_regions", {"seed": "1"}, ValueError, ("seed", "'1'", "integer")),
        ("random_regions", {"margin": 0.5}, ValueError, ("margin", "0.5", "accepted")),
        ("random_regions", {"margin": "0"}, ValueError, ("margin", "'0'", "accepted")),
        ("TensorSpec", {"shape": 3}, ValueError, ("shape", "3", "integers >= 0")),
        ("TensorSpec", {"shape": (2, -1)}, ValueError, ("shape", "(2, -1)", "integers >= 0")),
        ("TensorSpec", {"dtype": "float32"}, TypeError, ("dtype", "'float32'", "torch.dtype")),
        ("TensorSpec", {"layout": "rows"}, ValueError, ("layout", "'rows'", "'sliced'")),
        ("TensorSpec", {"seed": 1.5}, ValueError, ("seed", "1.5", "integer")),
        ("Call", {"tensors": [SPEC]}, TypeError, ("tensors", "list", "mapping")),
        ("Call", {"tensors": {"x": A}}, TypeError, ("tensors", "x", "TensorSpec")),
        ("Call", {"options": None}, TypeError, ("options", "None", "mapping")),
        ("Call", {"grad_layout": 3}, ValueError, ("grad_layout", "3", "'sliced'")),
        ("Call", {"seed": "1"}, ValueError, ("seed", "'1'", "integer")),
        ("Call", {"floors": 3}, TypeError, ("floors", "3", "callable")),
        ("check_call", {"op": "relu"}, TypeError, ("op", "'relu'", "callable")),
        ("check_call", {"reference": None}, TypeError, ("reference", "None", "callable")),
        ("check_call", {"call": {"x": A}}, TypeError, ("call", "Call")),
        ("check_call", {"device": torch.tensor(2)}, TypeError, ("device", "torch.device")),
        ("check_call", {"device": "gpu"}, ValueError, ("device", "'gpu'", "torch.device")),
        ("check_call", {"tolerance": "1"}, ValueError, ("tolerance", "'1'", "number >= 0")),
        ("check_call", {"repeat": 1}, ValueError, ("repeat", "1", "True and False")),
        ("check_call", {"opcheck": None}, ValueError, ("opcheck", "None", "True and False")),
        ("check_op", {"op": None}, TypeError, ("op", "None", "callable")),
        ("check_op", {"strategy": [1]}, TypeError, ("strategy", "[1]", "strategy")),
        ("check_op", {"examples": 0}, ValueError, ("examples", "0", "integer > 0")),
        ("check_op", {"examples": 2.0}, ValueError, ("examples", "2.0", "integer > 0")),
        ("check_op", {"device": "gpu"}, ValueError, ("device", "'gpu'", "torch.device")),
        ("check_op", {"repeat": "no"}, ValueError, ("repeat", "'no'", "True and False")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_arguments_of_the_kit(
    function: str, arguments: dict, error: type[Exception], parts: tuple[object, ...]
) -> None:
    good: dict[str, dict[str, Any]] = {
        "value_and_gradients": {"function": lambda x: x, "inputs": {"x": A}},
        "Guarded": {"values": A},
        "random_regions": {"shape": (2,), "size": (3, 4)},
        "TensorSpec": {"shape": (2, 3)},
        "Call": {"tensors": {"x": SPEC}},
        "check_call": {"op": abs, "reference": abs, "call": testing.Call({"x": SPEC})},
        "check_op": {"op": abs, "reference": abs, "strategy": strategies.calls(x=strategies.tensor("A"))},
        "assert_all_close": {"actual": {"a": A}, "expected": {"a": A}},
    }
    with refused(error, *parts), NothingRuns():
        getattr(testing, function)(**({**good.get(function, {"actual": A, "expected": A}), **arguments}))


def test_quantised_tensors_have_no_bits_to_compare() -> None:
    """torch crashes when it is asked for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)
    with refused(TypeError, "assert_identical", "actual", "quint8"), NothingRuns():
        testing.assert_identical(given, given)


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: strategies.dims(block=0), ValueError, ("dims", "block", "0", "integer > 0")),
        (lambda: strategies.dims(blocks="4"), ValueError, ("dims", "blocks", "'4'", "integer > 0")),
        (lambda: strategies.dims(empty="no"), ValueError, ("dims", "empty", "'no'", "True and False")),
        (lambda: strategies.dtypes("float32"), TypeError, ("dtypes", "'float32'", "torch.dtype")),
        (lambda: strategies.tensor("N", "*"), ValueError, ("tensor", "dimension 1", "'*'", "a name")),
        (lambda: strategies.tensor(-1), ValueError, ("tensor", "dimension 0", "-1", "integer >= 0")),
        (lambda: strategies.tensor("N", dtypes=torch.half), TypeError, ("tensor", "dtypes", "float16", "torch.dtype")),
        (lambda: strategies.tensor("N", dtypes=["half"]), TypeError, ("tensor", "dtypes", "'half'", "torch.dtype")),
        (lambda: strategies.tensor("N", dtypes=()), ValueError, ("tensor", "dtypes", "()", "torch.dtype")),
        (lambda: strategies.regions("N", size=("H",)), ValueError, ("regions", "size", "('H',)", "two")),
        (lambda: strategies.regions("N", size=None), ValueError, ("regions", "size", "None", "two")),
        (lambda: strategies.regions("N", size=("*", "H")), ValueError, ("regions", "size", "'*'", "a name")),
        (lambda: strategies.size("2H"), ValueError, ("size", "dimension 0", "'2H'", "a name")),
        (lambda: strategies.calls(x=3), ValueError, ("calls", "x", "strategies.tensor")),
        (lambda: strategies.calls(x=NAMED, dims={"Q": st.just(2)}), ValueError, ("calls", "dims", "'Q'", "'N'")),
        (lambda: strategies.calls(x=NAMED, dims={"N": 2}), TypeError, ("calls", "dims", "2", "strategy")),
        (lambda: strategies.calls(x=NAMED, dims=["N"]), TypeError, ("calls", "dims", "['N']", "mapping")),
        (lambda: strategies.calls(x=NAMED, dtypes=None), TypeError, ("calls", "dtypes", "None", "torch.dtype")),
        (lambda: strategies.calls(x=NAMED, dtypes=()), ValueError, ("calls", "dtypes", "()", "torch.dtype")),
        (lambda: strategies.calls(x=NAMED, floors=3), TypeError, ("calls", "floors", "3", "callable")),
        (lambda: strategies.region_calls("region"), ValueError, ("region_calls", "op", "'region'", "'region_pool'")),
        (lambda: strategies.region_calls("region_pool", dtypes=3), TypeError, ("region_calls", "dtypes", "3", "dtype")),
    ],
)
def test_arguments_of_strategies(make: Callable[[], Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    """When the strategy is made, and not when something is drawn from it."""
    with refused(error, *parts):
        make()
