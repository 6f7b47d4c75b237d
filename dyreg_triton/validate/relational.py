"""Argument checks of relational self-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from ..autocast import lowered_dtype
from . import FLOATS, describe, is_dense, positive_number, what

# Shapes in letters, which mean one size each; where two tensors disagree the later one is blamed.
FORMS = {
    "q": "(B, L, C, T, H, W)",
    "k": "(B, C, T, H, W)",
    "v": "(B, E, T, H, W)",
    "h2": "(D, kt, kh, kw)",
    "h1": "(C, D, kt, kh, kw)",
    "p1": "(C, D)",
    "g": "(F, kt, kh, kw)",
    "identity": "(E, F)",
}
OPTIONAL = ("k", "h1", "p1", "g", "identity")
VANILLA_FORMS = {
    "q": FORMS["q"],
    "k": FORMS["k"],
    "v": FORMS["v"],
    "h": "(C, kt, kh, kw, M)",
    "p": "(M, C)",
    "g": FORMS["g"],
    "identity": FORMS["identity"],
}
VANILLA_OPTIONAL = ("p", "g", "identity")
_WINDOW = ("kt", "kh", "kw")


class _Call:
    """The arguments of a call, and how a complaint about one reads."""

    def __init__(self, op: str, tensors: Mapping[str, Tensor | None], eps: float | None):
        self.op = op
        self.shown: dict[str, object] = {name: t for name, t in tensors.items() if t is not None}
        if eps is not None:
            self.shown["eps"] = eps

    def fail(self, name: str, has: str, accepted: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{self.op}: {name} {has}; accepted is {accepted}; call: {describe(self.shown)}")


def _tensors(call: _Call, tensors: Mapping[str, Tensor | None], forms: Mapping[str, str], optional: tuple[str, ...]):
    """Every argument is a dense tensor of its rank, or None where it may be."""
    for name, form in forms.items():
        t = tensors[name]
        if not is_dense(t) and not (t is None and name in optional):
            either = " or None" if name in optional else ""
            call.fail(name, f"is {what(t)}, a {type(t).__name__}", f"a dense torch.Tensor {form}{either}", TypeError)
    for name, form in forms.items():
        t = tensors[name]
        if t is not None and t.dim() != form.count(",") + 1:
            call.fail(name, f"has {t.dim()} dimensions", form)


def _agreement(call: _Call, tensors: Mapping[str, Tensor | None], forms: Mapping[str, str]) -> dict[str, int]:
    """The size of each letter, which all tensors agree on; then dtypes, devices and emptiness."""
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, form in forms.items():
        t = tensors[name]
        if t is None:
            continue
        for letter, size in zip(form.strip("()").split(", "), t.shape, strict=True):
            if sizes.setdefault(letter, size) == size:
                owner.setdefault(letter, name)
                continue
            if letter in _WINDOW:
                other, start = owner["kt"], form.strip("()").split(", ").index("kt")
                window = tuple(sizes[axis] for axis in _WINDOW)
                has = f"has kernel_size {tuple(t.shape[start : start + 3])}"
                call.fail(name, has, f"{other}'s kernel_size, {window}")
            has = f"has {letter} = {size}, shape {tuple(t.shape)}"
            call.fail(name, has, f"{owner[letter]}'s {letter}, {sizes[letter]}")
    first = next(iter(forms))
    q = tensors[first]
    assert q is not None
    for name in forms:
        t = tensors[name]
        if t is None:
            continue
        if t.dtype not in FLOATS:
            call.fail(name, f"is {str(t.dtype)[6:]}", "float16, bfloat16, float32 or float64", TypeError)
        if lowered_dtype(t) != lowered_dtype(q):
            call.fail(name, f"is {str(t.dtype)[6:]}", f"{first}'s dtype, {str(q.dtype)[6:]}", TypeError)
        if t.device != q.device:
            call.fail(name, f"is on {t.device}", f"{first}'s device, {q.device}")
        empty = [letter for letter, n in zip(forms[name].strip("()").split(", "), t.shape, strict=True) if n == 0]
        if empty and empty != ["B"]:
            letter = next(letter for letter in empty if letter != "B")
            call.fail(name, f"has {letter} = 0, shape {tuple(t.shape)}", "a size > 0; only the batch may be empty")
    return sizes


def relational_arguments(op: str, tensors: Mapping[str, Tensor | None], eps: float | None = None) -> None:
    """Check a call of `relational_attention`; `tensors` holds all eight by name, None for those not given.

    Raises TypeError for arguments of the wrong type or dtype and ValueError for wrong values, ranks, shapes and
    combinations.
    """
    call = _Call(op, tensors, eps)
    _tensors(call, tensors, FORMS, OPTIONAL)
    for name, other in (("h1", "k"), ("k", "h1")):
        if tensors[name] is not None and tensors[other] is None:
            call.fail(other, "is None", f"a tensor {FORMS[other]} beside {name}, or both None (the basic kernel V)")
    if tensors["identity"] is not None and tensors["g"] is None:
        call.fail("g", "is None", f"a tensor {FORMS['g']} beside identity, or both None (the basic context V)")
    sizes = _agreement(call, tensors, FORMS)
    if tensors["h1"] is None and tensors["p1"] is None and sizes["C"] != sizes["D"]:
        differ = f"(C, D), for q has C = {sizes['C']} and h2 D = {sizes['D']}, which differ"
        call.fail("p1", "is None without h1", differ)
    if eps is not None:
        positive_number(op, "eps", eps, call.shown)


def vanilla_arguments(op: str, tensors: Mapping[str, Tensor | None], eps: float | None = None) -> None:
    """Check a call of `vanilla_relational_attention`; raises as `relational_arguments`."""
    call = _Call(op, tensors, eps)
    _tensors(call, tensors, VANILLA_FORMS, VANILLA_OPTIONAL)
    if tensors["identity"] is not None and tensors["g"] is None:
        call.fail("g", "is None", f"a tensor {FORMS['g']} beside identity, or both None (the basic context V)")
    sizes = _agreement(call, tensors, VANILLA_FORMS)
    taps = math.prod(sizes[axis] for axis in _WINDOW)
    if sizes["M"] != taps:
        call.fail("h", f"has M = {sizes['M']}", f"kt * kh * kw = {taps}")
    if eps is not None:
        positive_number(op, "eps", eps, call.shown)
