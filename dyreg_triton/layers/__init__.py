"""nn.Modules: parameters and reshapes; the arithmetic is in `dyreg_triton.ops`."""

from .bat import BATBlock, BATransform
from .dyreg import DyReG
from .nonlocal_block import NonLocalBlock
from .regions import regions_from_offsets
from .rsa import RSA
from .rstg import RSTG

__all__ = ["RSA", "RSTG", "BATBlock", "BATransform", "DyReG", "NonLocalBlock", "regions_from_offsets"]
