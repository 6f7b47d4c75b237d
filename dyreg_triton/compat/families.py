"""How a published module is known when it is met in a model, and what of ours takes its place.

A transform that `dt.swap` shall cover registers a `Family` beside the module that computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """One published class.

    Attributes:
        name: the published class's name.
        ours: the class that takes its place; it has the same parameters and buffers under the same names.
        parts: parameters and submodules that together tell one under any class name.
        settings: reads from an instance the arguments with which `ours` is built; an attribute that is not there
            (AttributeError) or a value that `ours` refuses (ValueError, TypeError) means that this one is not covered.
            None where the class is replaced only as a part of another.
        shape: from a built one of ours, the shape of a small input.
        leaves: attributes that a forward of the published class leaves on the module, and ours does not.
        keeps: those of them that ours leaves, detached, where it is built with `keep_regions=True`.
        fits: whether a module is this one, where several published classes have the name.
    """

    name: str
    ours: type[nn.Module]
    parts: tuple[str, ...]
    settings: Callable[[nn.Module], dict[str, Any]] | None = None
    shape: Callable[[Any], tuple[int, ...]] | None = None
    leaves: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    fits: Callable[[nn.Module], bool] | None = None


_FAMILIES: dict[tuple[str, type[nn.Module]], Family] = {}


def register(family: Family) -> None:
    """Let `dt.swap` cover one more published class; a name is registered once, or once for each that `fits`."""
    others = [other for (name, _), other in _FAMILIES.items() if name == family.name]
    told_apart = all(one.fits is not None and one.ours is not family.ours for one in others) and family.fits is not None
    if others and not told_apart:
        raise ValueError(f"families.register: {family.name!r} is registered already")
    _FAMILIES[family.name, family.ours] = family


def families() -> Iterator[Family]:
    """Those registered, wrappers before what they hold."""
    return iter(_FAMILIES.values())


def is_ours(module: nn.Module) -> bool:
    """Whether a module computes by this library already."""
    return any(cls.__module__.partition(".")[0] == __package__.partition(".")[0] for cls in type(module).__mro__)


def family_of(module: nn.Module) -> Family | None:
    """The family whose name one of the module's classes bears, or else whose parts it has."""
    return _met(module, alone=True)


def part_of(module: nn.Module) -> Family | None:
    """The same of the families that are replaced only as a part of another."""
    return _met(module, alone=False)


def _met(module: nn.Module, *, alone: bool) -> Family | None:
    names = {cls.__name__ for cls in type(module).__mro__}
    parts = {*module._modules, *module._parameters, *getattr(module, "parametrizations", ())}
    some = [family for family in families() if (family.settings is not None) is alone]
    some = [family for family in some if family.fits is None or family.fits(module)]
    named = (family for family in some if family.name in names)
    return next(named, None) or next((family for family in some if parts.issuperset(family.parts)), None)
