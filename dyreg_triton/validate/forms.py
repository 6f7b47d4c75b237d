"""Argument checks by shapes in letters, for ops of many tensors: each letter means one size, on which all agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn, cast

from torch import Tensor

from .._core.validation import FLOATS, describe, is_dense, what


class Call:
    """The arguments of a call, and how a complaint about one reads."""

    def __init__(self, op: str, tensors: Mapping[str, Tensor | None], **options: object):
        self.op = op
        self.shown: dict[str, object] = {name: t for name, t in {**tensors, **options}.items() if t is not None}

    def fail(self, name: str, has: str, accepted: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{self.op}: {name} {has}; accepted is {accepted}; call: {describe(self.shown)}")


def letters(form: str) -> list[str]:
    """Of a shape such as "(B, C, T, H, W)"."""
    return form.strip("()").split(", ")


def check_ranks(
    call: Call, tensors: Mapping[str, Tensor | None], forms: Mapping[str, str], optional: tuple[str, ...]
) -> None:
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


def agreed_sizes(
    call: Call,
    tensors: Mapping[str, Tensor | None],
    forms: Mapping[str, str],
    together: tuple[str, ...] = (),
    called: str = "",
) -> dict[str, int]:
    """The size of each letter; where two tensors disagree the later one is blamed.

    The letters of `together`, neighbours in every form, are one thing, which a complaint calls `called`.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, form in forms.items():
        t = tensors[name]
        if t is None:
            continue
        for letter, size in zip(letters(form), t.shape, strict=True):
            if sizes.setdefault(letter, size) == size:
                owner.setdefault(letter, name)
                continue
            if letter in together:
                first = together[0]
                other, start = owner[first], letters(form).index(first)
                whole = tuple(sizes[axis] for axis in together)
                has = f"has {called} {tuple(t.shape[start : start + len(together)])}"
                call.fail(name, has, f"{other}'s {called}, {whole}")
            has = f"has {letter} = {size}, shape {tuple(t.shape)}"
            call.fail(name, has, f"{owner[letter]}'s {letter}, {sizes[letter]}")
    return sizes


def check_kinds(
    call: Call,
    tensors: Mapping[str, Tensor | None],
    forms: Mapping[str, str],
    fits: Callable[[Tensor], bool],
    dtype: str,
) -> None:
    """Dtypes (`fits`, which `dtype` says in words), devices, and that nothing but the batch is empty."""
    first = next(iter(forms))
    features = cast(Tensor, tensors[first])
    for name in forms:
        t = tensors[name]
        if t is None:
            continue
        if t.dtype not in FLOATS:
            call.fail(name, f"is {str(t.dtype)[6:]}", "float16, bfloat16, float32 or float64", TypeError)
        if not fits(t):
            call.fail(name, f"is {str(t.dtype)[6:]}", dtype, TypeError)
        if t.device != features.device:
            call.fail(name, f"is on {t.device}", f"{first}'s device, {features.device}")
        empty = [letter for letter, n in zip(letters(forms[name]), t.shape, strict=True) if n == 0]
        if empty and empty != ["B"]:
            letter = next(letter for letter in empty if letter != "B")
            call.fail(name, f"has {letter} = 0, shape {tuple(t.shape)}", "a size > 0; only the batch may be empty")
