"""The papers' equations as einsum, in any floating dtype: what every other backend is tested against."""

from .bilinear import bilinear_transform
from .region import region_kernel, region_pool, region_remap
from .relational import relational_attention, vanilla_relational_attention

__all__ = [
    "bilinear_transform",
    "region_kernel",
    "region_pool",
    "region_remap",
    "relational_attention",
    "vanilla_relational_attention",
]
