"""Launch configs, by pure lookup: the same call gets the same config on every rank, and nothing is timed at run time.

So far there is one source, the documented heuristic of each op.
"""

from .heuristics import RELATIONAL_LIMIT, Config, RelationalConfig, region, relational

__all__ = ["RELATIONAL_LIMIT", "Config", "RelationalConfig", "region", "relational"]
