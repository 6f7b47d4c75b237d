"""Fast, exact PyTorch layers for video understanding, with Triton kernels: `import dyreg_triton as dt`."""

from typing import TYPE_CHECKING, Any

from . import compat, layers, ops, reference, tuning
from ._core.dispatch import backend
from ._core.version import __version__
from .swapping import SwapError, SwapReport, swap

if TYPE_CHECKING:
    from . import testing, viz

__all__ = [
    "SwapError",
    "SwapReport",
    "__version__",
    "backend",
    "compat",
    "layers",
    "ops",
    "reference",
    "swap",
    "testing",
    "tuning",
    "viz",
]


def __getattr__(name: str) -> Any:
    if name in ("testing", "viz"):  # at first use: who only computes need not wait for it
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
