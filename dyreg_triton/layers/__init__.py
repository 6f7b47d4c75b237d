"""nn.Modules: parameters and reshapes; the arithmetic is in `dyreg_triton.ops`."""

from .dyreg import DyReG
from .regions import regions_from_offsets
from .rsa import RSA
from .rstg import RSTG

__all__ = ["RSA", "RSTG", "DyReG", "regions_from_offsets"]
