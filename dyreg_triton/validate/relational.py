"""Argument checks of relational self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from ..autocast import lowered_dtype
from . import FLOATS, describe, is_dense, positive_number, what

FORMS = {
    "q": "(B, L, C, T, H, W)",
    "k": "(B, C, T, H, W)",
    "v": "(B, E, T, H, W)",
    "h1": "(C, D, kt, kh, kw)",
    "p1": "(C, D)",
    "h2": "(D, kt, kh, kw)",
    "g": "(F, kt, kh, kw)",
    "identity": "(E, F)",
}
_OPTIONAL = ("k", "h1", "p1", "g", "identity")


def relational_arguments(op: str, tensors: Mapping[str, Tensor | None], eps: float | None = None) -> None:
    """Check a call of `relational_attention`; `tensors` holds all eight by name, None for those not given.

    Raises TypeError for arguments of the wrong type or dtype and ValueError for wrong values, ranks, shapes and
    combinations.
    """
    call: dict[str, object] = {name: t for name, t in tensors.items() if t is not None}
    if eps is not None:
        call["eps"] = eps

    def fail(name: str, has: str, accepted: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{op}: {name} {has}; accepted is {accepted}; call: {describe(call)}")

    for name, t in tensors.items():
        if not is_dense(t) and not (t is None and name in _OPTIONAL):
            either = " or None" if name in _OPTIONAL else ""
            fail(name, f"is {what(t)}, a {type(t).__name__}", f"a dense torch.Tensor {FORMS[name]}{either}", TypeError)
    q, k, v, h1, p1, h2, g, identity = (tensors[name] for name in FORMS)
    assert q is not None  # for mypy: refused above
    assert v is not None
    assert h2 is not None

    for name, t in tensors.items():
        if t is not None and t.dim() != FORMS[name].count(",") + 1:
            fail(name, f"has {t.dim()} dimensions", FORMS[name])
    for given, name, other in ((h1, "h1", "k"), (k, "k", "h1")):
        if given is not None and tensors[other] is None:
            fail(other, "is None", f"a tensor {FORMS[other]} beside {name}, or both None (the basic kernel V)")
    if identity is not None and g is None:
        fail("g", "is None", "a tensor (F, kt, kh, kw) beside identity, or both None (the basic context V)")

    def agree(name: str, t: Tensor | None, axis: int, other: str, wanted: int, letter: str) -> None:
        if t is not None and t.shape[axis] != wanted:
            fail(name, f"has {letter} = {t.shape[axis]}, shape {tuple(t.shape)}", f"{other}'s {letter}, {wanted}")

    for name, t in (("k", k), ("v", v)):
        for axis, letter in ((0, "B"), (-3, "T"), (-2, "H"), (-1, "W")):
            agree(name, t, axis, "q", q.shape[axis], letter)
    agree("k", k, 1, "q", q.shape[2], "C")
    agree("h1", h1, 0, "q", q.shape[2], "C")
    agree("p1", p1, 0, "q", q.shape[2], "C")
    agree("h1", h1, 1, "h2", h2.shape[0], "D")
    agree("p1", p1, 1, "h2", h2.shape[0], "D")
    for name, t in (("h1", h1), ("g", g)):
        if t is not None and t.shape[-3:] != h2.shape[1:]:
            fail(name, f"has kernel_size {tuple(t.shape[-3:])}", f"h2's kernel_size, {tuple(h2.shape[1:])}")
    agree("identity", identity, 0, "v", v.shape[1], "E")
    if identity is not None and g is not None:
        agree("identity", identity, 1, "g", g.shape[0], "F")
    if h1 is None and p1 is None and q.shape[2] != h2.shape[0]:
        fail("p1", "is None without h1", f"(C, D), for q has C = {q.shape[2]} and h2 D = {h2.shape[0]}, which differ")

    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in FLOATS:
            fail(name, f"is {str(t.dtype)[6:]}", "float16, bfloat16, float32 or float64", TypeError)
        if lowered_dtype(t) != lowered_dtype(q):
            fail(name, f"is {str(t.dtype)[6:]}", f"q's dtype, {str(q.dtype)[6:]}", TypeError)
        if t.device != q.device:
            fail(name, f"is on {t.device}", f"q's device, {q.device}")
        sizes = dict(zip(FORMS[name].strip("()").split(", "), t.shape, strict=True))
        empty = [letter for letter, size in sizes.items() if size == 0 and letter != "B"]
        if empty:
            fail(name, f"has {empty[0]} = 0, shape {tuple(t.shape)}", "a size > 0; only the batch may be empty")
    if eps is not None:
        positive_number(op, "eps", eps, call)
