"""The published modules under their authors' names, arguments, layouts and state_dict keys.

`build("ops.dyreg.DynamicGraphWrapper", {...})` returns a module that loads the authors' state_dict with strict=True
and computes what their module computes, on this library's ops. `load_checkpoint(path)` reads their files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .checkpoint import Checkpoint, load_checkpoint
from .containers import CheckpointError
from .dyreg import RSTG, DynamicGraph, DynamicGraphWrapper
from .rsa import RSA

__all__ = ["Checkpoint", "CheckpointError", "build", "load_checkpoint"]

_OURS = ("rnn_type", "iterations", "num_nodes", "keep_regions")
_NAMES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "ops.rstg.RSTG": (RSTG, _OURS),
    "ops.dyreg.DynamicGraph": (DynamicGraph, _OURS),
    "ops.dyreg.DynamicGraphWrapper": (DynamicGraphWrapper, _OURS),
    "ops.rsa.RSA": (RSA, ("keep_regions",)),
}


def build(name: str, config: Mapping[str, Any] | None = None, /, **arguments: Any) -> nn.Module:
    """The published module `name`, built from the authors' own constructor arguments.

    Args:
        name: "ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG" or "ops.rsa.RSA".
        config, arguments: the authors' arguments, as a mapping or as keywords, which win; lists serve as tuples.
            For DyReG and RSTG, `params` is a mapping or an object; keys it lacks take dyregParams' defaults. Beyond the
            authors': `rnn_type` ("LSTM" or "GRU", a global there), `iterations`, `num_nodes`. For every module:
            `keep_regions` (leave detached regions and kernels on the module after a forward, for old plotting code; a
            module without regions takes no notice). `input` is ignored; oH, oW, out_num_ch and name, and RSTG's
            backbone_dim and project_i3d, are accepted and unused, as upstream.

    Returns:
        A module with the authors' parameters, buffers, tensor layouts and numbers.

    Raises:
        ValueError: an unknown name, key or value; TypeError: config is no mapping.
    """
    import inspect

    if not isinstance(name, str) or name not in _NAMES:
        raise ValueError(f"compat.build: name is {name!r}; accepted are {', '.join(map(repr, _NAMES))}")
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"compat.build: config is a {type(config).__name__}; accepted is a mapping")
    module, ours = _NAMES[name]
    merged = {**(config or {}), **arguments}
    merged.pop("input", None)
    signature = inspect.signature(module).parameters.values()
    accepted = [p.name for p in signature if p.kind is not p.VAR_KEYWORD]
    accepted += [key for key in ours if key not in accepted]
    unknown = sorted(map(str, set(merged) - set(accepted)))
    if unknown:
        raise ValueError(f"compat.build: {name} got unknown arguments {unknown}; accepted are {sorted(accepted)}")
    return module(**merged)
