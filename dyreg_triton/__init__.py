"""Fast, exact PyTorch layers for video understanding, with Triton kernels: `import dyreg_triton as dt`."""

from . import compat, layers, ops, reference
from .dispatch import backend

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "compat", "layers", "ops", "reference"]
