"""Argument checks of the bilinear attentional transform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from .._core.autocast import lowered_dtype
from .forms import Call, agreed_sizes, check_kinds, check_ranks

FORMS = {
    "x": "(B, C, T, H, W)",
    "p": "(B, G, T, Sh, Sh)",
    "q": "(B, G, T, Sw, Sw)",
    "t": "(B, Gt, Ts, Ts)",
}
OPTIONAL = ("t",)


def bilinear_arguments(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Check a call of `bilinear_transform`; `tensors` holds all four by name, t None where it is not given.

    Raises TypeError for arguments of the wrong type or dtype and ValueError for wrong values, ranks and shapes.
    """
    call = Call(op, tensors)
    check_ranks(call, tensors, FORMS, OPTIONAL)
    for name in ("p", "q", "t"):
        matrices = tensors[name]
        if matrices is not None and matrices.shape[-2] != matrices.shape[-1]:
            call.fail(name, f"is not square, shape {tuple(matrices.shape)}", f"square matrices, {FORMS[name]}")
    sizes = agreed_sizes(call, tensors, FORMS)
    x = cast(Tensor, tensors["x"])
    accepted = {x.dtype, lowered_dtype(x), torch.float32}
    dtype = f"x's dtype, {str(x.dtype)[6:]}" + (", or float32" if x.dtype != torch.float32 else "")
    check_kinds(call, tensors, FORMS, lambda t: t is x or t.dtype in accepted, dtype)
    for name, letter in (("p", "G"), ("t", "Gt")):
        if letter in sizes and sizes["C"] % sizes[letter]:
            call.fail(
                "x", f"has C = {sizes['C']}", f"a multiple of {name}'s {letter}, {sizes[letter]} groups of channels"
            )
    for axis, name, letter in (("H", "p", "Sh"), ("W", "q", "Sw"), ("T", "t", "Ts")):
        if letter in sizes and sizes[axis] % sizes[letter]:
            call.fail(
                "x",
                f"has {axis} = {sizes[axis]}",
                f"a multiple of {name}'s {letter}, {sizes[letter]} (any map: layers.BATransform, remainder='repeat')",
            )
