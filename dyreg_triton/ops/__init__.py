"""The ops. Each validates its arguments, chooses a backend (see `dt.backend`) and computes."""

from .bilinear import bilinear_transform
from .region import region_kernel, region_pool, region_remap
from .relational import relational_attention

__all__ = ["bilinear_transform", "region_kernel", "region_pool", "region_remap", "relational_attention"]
