"""The published modules under their authors' names, arguments, layouts and state_dict keys.

`build("ops.dyreg.DynamicGraphWrapper", {...})` returns a module that loads the authors' state_dict with strict=True
and computes what their module computes, on this library's ops. `load_checkpoint(path)` reads their files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .bat import (
    BATBlock,
    BATransform,
    ImageBATBlock,
    ImageBATransform,
    NonLocal,
    NONLocalBlock1D,
    NONLocalBlock2D,
    NONLocalBlock3D,
)
from .checkpoint import Checkpoint, load_checkpoint
from .containers import CheckpointError
from .dyreg import RSTG, DynamicGraph, DynamicGraphWrapper
from .rsa import RSA

__all__ = ["Checkpoint", "CheckpointError", "build", "load_checkpoint"]

_OURS = ("rnn_type", "iterations", "num_nodes", "keep_regions")
# what the authors' networks give to each of their blocks, of whatever kind
_BLOCKS = ("s", "k", "tk", "ts", "dropout", "transpose", "keep_regions")
_NAMES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "ops.rstg.RSTG": (RSTG, _OURS),
    "ops.dyreg.DynamicGraph": (DynamicGraph, _OURS),
    "ops.dyreg.DynamicGraphWrapper": (DynamicGraphWrapper, _OURS),
    "ops.rsa.RSA": (RSA, ("keep_regions",)),
    "models.non_local.BATransform": (BATransform, ("keep_regions",)),
    "models.non_local.BATBlock": (BATBlock, _BLOCKS),
    "models.non_local.NONLocalBlock1D": (NONLocalBlock1D, _BLOCKS),
    "models.non_local.NONLocalBlock2D": (NONLocalBlock2D, _BLOCKS),
    "models.non_local.NONLocalBlock3D": (NONLocalBlock3D, _BLOCKS),
    "model_zoo.non_local.BATransform": (ImageBATransform, ("keep_regions",)),
    "model_zoo.non_local.BATBlock": (ImageBATBlock, _BLOCKS),
    "model_zoo.non_local.NonLocal": (NonLocal, _BLOCKS),
}


def build(name: str, config: Mapping[str, Any] | None = None, /, **arguments: Any) -> nn.Module:
    """The published module `name`, built from the authors' own constructor arguments.

    Args:
        name: "ops.dyreg.DynamicGraph", "ops.dyreg.DynamicGraphWrapper", "ops.rstg.RSTG", "ops.rsa.RSA"; of BAT for
            clips "models.non_local." with BATransform, BATBlock, NONLocalBlock1D, NONLocalBlock2D or NONLocalBlock3D,
            and for images "model_zoo.non_local." with BATransform, BATBlock or NonLocal.
        config, arguments: the authors' arguments, as a mapping or as keywords, which win; lists serve as tuples.
            For DyReG and RSTG, `params` is a mapping or an object; keys it lacks take dyregParams' defaults. Beyond the
            authors': `rnn_type` ("LSTM" or "GRU", a global there), `iterations`, `num_nodes`. For every module:
            `keep_regions` (leave detached regions and kernels on the module after a forward, for old plotting code; a
            module without regions takes no notice). `input` is ignored; oH, oW, out_num_ch and name, RSTG's
            backbone_dim and project_i3d, and for each block of BAT what its network gives to another kind (s, k, tk,
            ts, dropout, transpose) are accepted and unused, as upstream.

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
    unused = [key for key in ours if ours is _BLOCKS and key not in accepted]
    accepted += [key for key in ours if key not in accepted]
    unknown = sorted(map(str, set(merged) - set(accepted)))
    if unknown:
        raise ValueError(f"compat.build: {name} got unknown arguments {unknown}; accepted are {sorted(accepted)}")
    return module(**{key: value for key, value in merged.items() if key not in unused})
