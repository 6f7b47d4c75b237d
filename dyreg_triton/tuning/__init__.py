"""Launch configs, by pure lookup: the same call gets the same config on every rank, and nothing is timed at run time.

`python -m dyreg_triton tune` measures, on the GPU at hand, which configs are fastest, and writes a file. A launch takes
its config from the explicit file (`dt.tuning.use`, or the one that DYREG_TRITON_TUNING names), the user's, the one that
comes with the library for the GPU, or the heuristic, in this order.
"""

from typing import TYPE_CHECKING, Any

from ..configs.bilinear import LIMIT as BILINEAR_LIMIT
from ..configs.bilinear import BilinearConfig
from ..configs.bilinear import heuristic as bilinear
from ..configs.bilinear import key_of as bilinear_key
from ..configs.keys import Key
from ..configs.lookup import Origin, config, forget, origin, override, use
from ..configs.region import Config
from ..configs.region import heuristic as region
from ..configs.region import key_of as region_key
from ..configs.relational import LIMIT as RELATIONAL_LIMIT
from ..configs.relational import RelationalConfig
from ..configs.relational import heuristic as relational
from ..configs.relational import key_of as relational_key
from ..ops.recording import TunedCall, recording

if TYPE_CHECKING:
    from .tuner import tune

__all__ = [
    "BILINEAR_LIMIT",
    "RELATIONAL_LIMIT",
    "BilinearConfig",
    "Config",
    "Key",
    "Origin",
    "RelationalConfig",
    "TunedCall",
    "bilinear",
    "bilinear_key",
    "config",
    "forget",
    "origin",
    "override",
    "recording",
    "region",
    "region_key",
    "relational",
    "relational_key",
    "tune",
    "use",
]


def __getattr__(name: str) -> Any:
    """`tune`, which needs the ops, which need this package."""
    if name != "tune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module(f"{__name__}.tuner").tune
