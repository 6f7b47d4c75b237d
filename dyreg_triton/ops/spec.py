"""What an op is, in one entry: whoever does the same with every op walks over the table of these (`ops/table.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..configs.keys import Key
from ..configs.space import ConfigSpace
from .recording import TunedCall


@dataclass(frozen=True)
class OpSpec:
    """One op.

    Attributes:
        name: the op's.
        function, reference: the op, and the papers' equations of it.
        tensors: its tensors by name, in its order: their shapes in letters.
        optional: those of them that may be absent.
        options: the names of its other arguments.
        channels: of those of its tensors that may lie channels last, which dimension is their channels'.
        check: its own checks, of (tensors by name, options by name); raises TypeError and ValueError.
        space: the launch configs of its kernels.
        keys: of (call, family of GPUs) the keys of the kernels that it launches, in order.
        papers, quick: calls of the papers' networks, and one small one, in a dtype.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    tensors: Mapping[str, str]
    optional: tuple[str, ...]
    options: tuple[str, ...]
    channels: Mapping[str, int]
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], object]
    space: ConfigSpace
    keys: Callable[[TunedCall, str], list[Key]]
    papers: Callable[[str], list[TunedCall]]
    quick: Callable[[str], list[TunedCall]]
