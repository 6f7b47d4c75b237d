"""Argument checks of relational self-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from torch import Tensor

from .._core.autocast import lowered_dtype
from .._core.validation import positive_number
from .forms import Call, agreed_sizes, check_kinds, check_ranks

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


def _agreement(call: Call, tensors: Mapping[str, Tensor | None], forms: Mapping[str, str]) -> dict[str, int]:
    """The size of each letter, which all tensors agree on; then dtypes, devices and emptiness."""
    sizes = agreed_sizes(call, tensors, forms, _WINDOW, "kernel_size")
    first = next(iter(forms))
    q = cast(Tensor, tensors[first])
    wanted = lowered_dtype(q)
    check_kinds(call, tensors, forms, lambda t: lowered_dtype(t) == wanted, f"{first}'s dtype, {str(q.dtype)[6:]}")
    return sizes


def relational_arguments(op: str, tensors: Mapping[str, Tensor | None], eps: float | None = None) -> None:
    """Check a call of `relational_attention`; `tensors` holds all eight by name, None for those not given.

    Raises TypeError for arguments of the wrong type or dtype and ValueError for wrong values, ranks, shapes and
    combinations.
    """
    call = Call(op, tensors, eps=eps)
    check_ranks(call, tensors, FORMS, OPTIONAL)
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
    call = Call(op, tensors, eps=eps)
    check_ranks(call, tensors, VANILLA_FORMS, VANILLA_OPTIONAL)
    if tensors["identity"] is not None and tensors["g"] is None:
        call.fail("g", "is None", f"a tensor {FORMS['g']} beside identity, or both None (the basic context V)")
    sizes = _agreement(call, tensors, VANILLA_FORMS)
    taps = math.prod(sizes[axis] for axis in _WINDOW)
    if sizes["M"] != taps:
        call.fail("h", f"has M = {sizes['M']}", f"kt * kh * kw = {taps}")
    if eps is not None:
        positive_number(op, "eps", eps, call.shown)
