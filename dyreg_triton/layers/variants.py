"""What decides a node's region: the variants of the paper (DyReG, Duta et al., section 4.1 and appendix B.2)."""

from __future__ import annotations

from typing import NamedTuple


class Variant(NamedTuple):
    """The columns of the paper's table 1."""

    moves: bool  # places are learned
    sees: bool  # from the input
    in_time: bool  # anew in every frame
    grows: bool  # and sizes too


VARIANTS = {
    "full": Variant(moves=True, sees=True, in_time=True, grows=True),
    "position": Variant(moves=True, sees=True, in_time=True, grows=False),
    "constant_time": Variant(moves=True, sees=True, in_time=False, grows=False),
    "static": Variant(moves=True, sees=False, in_time=False, grows=False),
    "grid": Variant(moves=False, sees=False, in_time=False, grows=False),
}
SEMANTIC = "semantic"  # has maps instead of regions
REGIONS = (*VARIANTS, SEMANTIC)
