"""Ours in the place of a published module, holding what it held: the same tensors, leaves, hooks, flags."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..compat.families import families, family_of

# where nn.Module keeps what it holds; these very objects are shared, so a handle removes its hook as before, and what
# is done to one of the two modules (loading, casting, hooking) is done to both
_HELD = frozenset(nn.Module().__dict__) - {"training", "_modules", "_is_full_backward_hook"}
_FLAGS = ("training", "_is_full_backward_hook")


class Pair(NamedTuple):
    """Ours in the place of theirs, and the names that are ours alone."""

    ours: nn.Module
    theirs: nn.Module
    own: frozenset[str]


Pairs = dict[int, Pair]  # by the id of theirs


def replaced(mine: nn.Module | None) -> bool:
    """Whether a submodule of ours computes by itself; of any other the published one stays."""
    return mine is not None and any(issubclass(family.ours, type(mine)) for family in families())


def adopt(ours: nn.Module, theirs: nn.Module, leaves: frozenset[str], pairs: Pairs) -> nn.Module:
    """Let `ours`, built on meta, hold what `theirs` holds, which it leaves as it is; `pairs` remembers both."""
    if id(theirs) in pairs:
        return pairs[id(theirs)].ours
    pairs[id(theirs)] = Pair(ours, theirs, frozenset(ours.__dict__) | leaves)
    for name, value in theirs.__dict__.items():
        known = name in ours.__dict__ or hasattr(type(ours), name) or name in leaves
        if name in _HELD or name in _FLAGS or not known:
            ours.__dict__[name] = value
    children: dict[str, Any] = {}
    for name, child in theirs._modules.items():
        mine = ours._modules.get(name)
        adopts = replaced(mine) and child is not None
        children[name] = adopt(mine, child, leaves, pairs) if adopts else child  # type: ignore[arg-type]
    changed = any(children[name] is not child for name, child in theirs._modules.items())
    ours.__dict__["_modules"] = children if changed else theirs._modules
    if parametrize.is_parametrized(theirs):
        _parametrize(ours, theirs)
    return ours


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, without the one that torch makes for an instance with parametrizations."""
    cls = type(module)
    base = cls.__bases__[0]
    return base if cls.__name__ == f"Parametrized{base.__name__}" else cls


def _served(module: nn.Module) -> set[str]:
    """The tensors that a module serves by parametrizations."""
    cls = type(module)
    return {k for k, v in vars(cls).items() if isinstance(v, property)} if cls is not plain_class(module) else set()


def _parametrize(module: nn.Module, like: nn.Module) -> None:
    """Let a module serve the parametrized tensors of another, which torch does by a class made for the one instance."""
    made = vars(type(like))
    names = [*like.parametrizations, "__getstate__", "__deepcopy__"]  # type: ignore[misc]
    members = {name: made[name] for name in names if name in made}
    cls = type(module)
    module.__class__ = type(f"Parametrized{cls.__name__}", (cls,), members)


def point_hooks(module: nn.Module) -> None:
    """Hooks of load_state_dict know the module that they are given by a weak reference: let it be `module`."""
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False):
            hooks[key] = type(hook)(hook.hook, module)


def stand_in(module: nn.Module) -> nn.Module:
    """Another object that is all that `module` is: it stays so where `module` becomes something else."""
    other = object.__new__(type(module))
    other.__dict__ = module.__dict__
    return other


class Place:
    """The places in a model where either the published modules stand or ours."""

    def __init__(self, model: nn.Module, pairs: Pairs, couples: list[tuple[nn.Module, nn.Module]]):
        self.model, self.pairs = model, pairs
        self.theirs = {id(ours): theirs for theirs, ours in couples}
        self.ours = {id(theirs): ours for theirs, ours in couples}
        self.left: dict[int, dict[str, Any]] = {}  # what a forward left on the published modules, while ours stand
        # the model itself has no parent in which it could be replaced
        self.itself = next((couple for couple in couples if couple[0].__dict__ is model.__dict__), None)

    def put(self, *, ours: bool) -> None:
        """Let ours stand in the model, or the published modules."""
        if self.itself is not None:
            now = self.itself[ours]
            self.model.__class__ = type(now)
            self.model.__dict__ = now.__dict__
        chosen = self.ours if ours else self.theirs
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                if id(child) in chosen:
                    parent._modules[name] = chosen[id(child)]
        for key, (mine, original, _) in self.pairs.items():
            now = mine if ours else original
            point_hooks(self.model if now.__dict__ is self.model.__dict__ else now)
            if not ours:
                original.__dict__.update(self.left.pop(key, {}))
            elif family := family_of(original):  # or who holds the original would read what is no longer true
                names = [name for name in family.leaves if name in original.__dict__]
                self.left.setdefault(key, {}).update({name: original.__dict__.pop(name) for name in names})

    def forget(self) -> None:
        """Free the tensors that the last forward left on the published modules; a dict for them stays, empty."""
        for left in self.left.values():
            kept = {name: {} if isinstance(value, dict) else value for name, value in left.items()}
            left.clear()
            left.update({name: value for name, value in kept.items() if not isinstance(value, Tensor)})

    def restore(self) -> None:
        """Let the published modules stand in the model, with what was changed on ours that the two do not share."""
        standing = {id(module) for module in self.model.modules()}
        if self.itself is None and not standing & {id(ours) for ours in self.ours.values()}:
            raise RuntimeError("undo: none of the modules that were put in is there; undo a later swap of theirs first")
        if self.itself is not None and self.model.__dict__ is not self.itself[1].__dict__:
            raise RuntimeError("undo: the model is no longer what the swap made it; undo a later swap first")
        originals = {id(mine): original for mine, original, _ in self.pairs.values()}
        for mine, original, own in self.pairs.values():
            if _served(mine) != _served(original):
                original.__class__ = plain_class(original)
                if _served(mine):
                    _parametrize(original, mine)
            original.__dict__.update({k: v for k, v in mine.__dict__.items() if k in _FLAGS or k not in own})
            if mine._modules is not original._modules:
                children = {name: originals.get(id(child), child) for name, child in mine._modules.items()}
                original._modules.clear()
                original._modules.update(children)
        self.put(ours=False)
