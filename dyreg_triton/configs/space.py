"""What is known of one op's launch configs: its keys, its heuristic, what to try next, what may be taken over."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .keys import Key, KeyForm


@dataclass(frozen=True)
class ConfigSpace:
    """The launch configs of one op.

    Attributes:
        keys: what its keys look like.
        config: the type of its configs.
        sources: its kernel files, without .py.
        default: the heuristic, from (key, family of GPUs).
        similar: what of a key decides whether a config fits at all; nearest keys agree in it.
        within: a config with nothing larger than the sizes of a key.
        fitted: a config of a similar key, made to fit this one's sizes; what depends on them alone is the heuristic's.
        steps: configs one step away from a config.
        launches: the kinds of the kernels that are launched for a key with a config; by default its own.
    """

    keys: KeyForm
    config: type
    sources: tuple[str, ...]
    default: Callable[[Key, str], Any]
    similar: Callable[[Key], Hashable]
    within: Callable[[Any, Key], Any]
    fitted: Callable[[Any, Key, str], Any]
    steps: Callable[[Any, Key], Iterator[Any]]
    launches: Callable[[Key, Any], tuple[str, ...]] = lambda key, config: (key.kind,)


def power_of_two(n: int, least: int = 1) -> int:
    """The next one."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def varied(config: Any, **choices: Any) -> Iterator[Any]:
    """`config` with one field at a time set to one of its choices, those that a config may have."""
    for name, values in choices.items():
        for value in values:
            if value != getattr(config, name):
                try:
                    yield replace(config, **{name: value})
                except ValueError:  # not a config: beyond a limit
                    continue
