"""Published modules in a model, and ours made ready to take their places."""

from __future__ import annotations

import fnmatch
import inspect
import itertools
import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..compat.families import Family, families, family_of, is_ours, part_of
from .adopt import Pairs, adopt, plain_class, stand_in
from .probe import Unlike, probe, twin
from .report import Left, Swapped


@dataclass
class Found:
    """A published module, all its places, and ours, which holds what it holds."""

    paths: list[str]
    theirs: nn.Module
    ours: nn.Module

    def row(self) -> Swapped:
        """What a report says of it before anything is measured."""
        gone = []
        for path, module in self.theirs.named_modules():
            family = family_of(module)
            if family is not None and not is_ours(module):
                kept = family.keeps if getattr(self.ours.get_submodule(path), "keep_regions", False) else ()
                gone += [f"{path}.{name}".lstrip(".") for name in family.leaves if name not in kept]
        return Swapped(
            path=self.paths[0],
            before=class_of(self.theirs),
            after=class_of(self.ours),
            parameters=sum(p.numel() for p in self.theirs.parameters()),
            paths=tuple(self.paths),
            vanishing=tuple(gone),
        )


@dataclass
class Search:
    """What a walk through a model met."""

    found: list[Found] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    met: list[tuple[str, str]] = field(default_factory=list)  # path and published name of all that looks like one
    pairs: Pairs = field(default_factory=dict)


def class_of(module: nn.Module) -> str:
    """The class's name with the module that it is from."""
    cls = plain_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def selected(path: str, family: str, only: tuple[str, ...] | None) -> set[str]:
    """Which of `only` choose a module: by its path, a folder of it, a pattern, or its published class."""
    return {
        name
        for name in only or ()
        if name in (path, family) or path.startswith(f"{name}.") or fnmatch.fnmatchcase(path, name)
    }


def search(model: nn.Module, only: tuple[str, ...] | None, keep_regions: bool) -> Search:
    """Walk through a model, outermost modules first, and make ours for each published one chosen by `only`."""
    result = Search()
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
        if name := _published(module):
            result.met.append((path, name))

    seen: set[int] = set()

    def walk(module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        places, name = paths[id(module)], _published(module)
        if name and is_ours(module):
            result.already += places
            return
        if name and (only is None or any(selected(path, name, only) for path in places)):
            family = cast(Family, family_of(module))
            try:
                ours = prepare(module, family, keep_regions, result.pairs)
            except Unlike as why:
                result.left.append(Left(places[0], class_of(module), str(why)))
            else:
                result.found.append(Found(places, module, ours))
                return
        for child in module.children():
            walk(child)

    walk(model)
    if result.found and result.found[0].theirs is model:  # which will be ours
        item = result.found[0]
        item.theirs = stand_in(model)
        result.pairs[id(item.theirs)] = result.pairs.pop(id(model))._replace(theirs=item.theirs)
    return result


def _published(module: nn.Module) -> str | None:
    """The published name of a module, be it theirs or ours; of a native layer of ours its own, of a norm in it none."""
    if is_ours(module):
        of_ours = (f.name for f in families() if isinstance(module, f.ours) or issubclass(f.ours, type(module)))
        return next(of_ours, type(module).__name__ if module._modules else None)
    family = family_of(module)
    return None if family is None else family.name


def prepare(theirs: nn.Module, family: Family, keep_regions: bool, pairs: Pairs) -> nn.Module:
    """Ours for one published module, compared with it; raises `Unlike` where it cannot take its place."""
    for name, parameter in theirs.named_parameters():
        if parameter.dtype == torch.float16 and parameter.device.type == "cpu":
            raise ValueError(
                f"swap: model has {name} of {class_of(theirs)} in float16 on a CPU; accepted there are float32, "
                "float64 and bfloat16: swap before .half(), or after moving to a GPU"
            )
    if isinstance(theirs, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise Unlike("it is compiled by TorchScript; accepted is the module that it was made from")
    _plain_classes(theirs)
    if any(module._compiled_call_impl is not None for module in theirs.modules()):
        raise Unlike("it is compiled by .compile(); accepted is before: swap, then compile")
    if any(nn.parameter.is_lazy(t) for t in (*theirs.parameters(), *theirs.buffers())):
        raise Unlike("it has lazy parameters without values; accepted is after the first forward")
    if "forward" in theirs.__dict__:
        raise Unlike("its forward is set on the instance; accepted is that of its class")
    try:
        settings = cast(Any, family.settings)(theirs)
        with torch.device("meta"):
            ours = family.ours(**settings, keep_regions=keep_regions)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as why:
        raise Unlike(f"its settings are not covered: {why}") from why
    _same_arguments(ours, theirs)
    _same_tensors(ours, theirs)
    adopted: Pairs = dict(pairs)
    leaves = frozenset(name for member in families() for name in member.leaves)
    ours = adopt(ours, theirs, leaves, adopted)
    probe(family, ours, theirs, adopted)
    pairs.update(adopted)
    return ours


def _plain_classes(theirs: nn.Module) -> None:
    """Raise `Unlike` where more than the forward of a module was changed, which ours would lose."""
    machinery = {name for name, value in vars(nn.Module).items() if callable(value) or isinstance(value, property)}
    machinery -= {"__init__", "forward", "extra_repr", "_get_name", "__repr__"}
    for path, module in theirs.named_modules():
        if module is not theirs and family_of(module) is None and part_of(module) is None:
            continue
        classes = list(itertools.takewhile(lambda cls: cls is not nn.Module, plain_class(module).__mro__))
        changed = {name for cls in classes for name in vars(cls)} | set(vars(module))
        if lost := sorted(changed & machinery):
            raise Unlike(f"{path or 'it'} has {', '.join(lost)} of its own, which ours would not have")
        if any(getattr(cls, "__slots__", ()) for cls in classes):
            raise Unlike(f"{path or 'it'} has __slots__, which ours would not have")


def _same_arguments(ours: nn.Module, theirs: nn.Module) -> None:
    """Raise `Unlike` unless both forwards take as many inputs."""
    given, accepted = (inspect.signature(module.forward) for module in (theirs, ours))
    if [p.kind for p in given.parameters.values()] != [p.kind for p in accepted.parameters.values()]:
        raise Unlike(f"its forward takes {given}; accepted is {accepted}")


def _same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    """Raise `Unlike` unless both have parameters and buffers of the same names and shapes."""
    parametrized = any(map(parametrize.is_parametrized, theirs.modules()))
    # a parametrized tensor is computed when it is read, which may change what the parametrization keeps
    readable = twin(theirs, lambda t: t.detach().clone(), False, {}) if parametrized else theirs
    for kind in ("parameters", "buffers"):
        accepted = dict(getattr(ours, f"named_{kind}")(remove_duplicate=False))
        names = {_plain_name(name) for name, _ in getattr(theirs, f"named_{kind}")(remove_duplicate=False)}
        names = {name for name in names if "parametrizations." not in name}  # what a parametrization itself holds
        more, fewer = sorted(names - set(accepted)), sorted(set(accepted) - names)
        if more or fewer:
            differences = [f"{verb} {', '.join(some)}" for verb, some in (("has", more), ("lacks", fewer)) if some]
            raise Unlike(f"its {kind} are others than its settings say: it {' and '.join(differences)}")
        for name, t in accepted.items():
            path, _, last = name.rpartition(".")
            shape = tuple(getattr(readable.get_submodule(path), last).shape)
            if shape != tuple(t.shape):
                raise Unlike(f"its {name} is {shape}; accepted with its settings is {tuple(t.shape)}")


def _plain_name(name: str) -> str:
    """The name under which a parametrized tensor is read."""
    return re.sub(r"\bparametrizations\.([^.]+)\.original\d*$", r"\1", name)
