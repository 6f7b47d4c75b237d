"""Which config a launch gets, by pure lookup: of each op its configs, heuristic and search space, and the files."""
