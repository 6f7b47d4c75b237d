"""Launch configs, by pure lookup: the same call gets the same config on every rank, and nothing is timed at run time.

So far there is one source, the documented heuristic of each op.
"""

from .heuristics import Config, region

__all__ = ["Config", "region"]
