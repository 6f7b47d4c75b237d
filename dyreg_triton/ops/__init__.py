"""The ops. Each validates its arguments, chooses a backend (see `dt.backend`) and computes."""

from .region import region_kernel, region_pool, region_remap
from .relational import relational_attention

__all__ = ["region_kernel", "region_pool", "region_remap", "relational_attention"]
