"""The region kernels' cases: every config that the heuristic can choose."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch

from . import DTYPES, TARGETS, Code, torch_dtype

# What a launch config depends on: sizes on both sides of every choice that `tuning.region` makes.
FRAMES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
NODES = (9, 1, 16, 17, 32, 33, 64, 65, 100)
CHANNELS = (512, 1, 16, 17, 32, 33, 64, 256, 2048)
SIZES = ((1, 1), (4, 4), (5, 5), (7, 7), (8, 8), (9, 9), (14, 14), (13, 17), (16, 16), (28, 28), (56, 56))
COMMON = ((7, 7), (13, 17), (14, 14), (16, 16), (28, 28), (56, 56))
KINDS = ("gather", "scatter", "gather_moments", "scatter_moments", "dense", "dense_moments")
LAYOUTS = ("contiguous", "channels_last", "sliced")
FAMILY = {"sm_80": "nvidia", "sm_90": "nvidia", "sm_100": "blackwell", "gfx942": "amd"}  # as tuning tells GPUs apart


class RegionCase(NamedTuple):
    """One launch: what it does and on what."""

    kind: str
    frames: int
    nodes: int
    channels: int
    size: tuple[int, int]
    dtype: str = "bfloat16"
    profile: str = "linear"
    layout: str = "contiguous"

    @property
    def may_spill(self) -> bool:
        """An address for every cell, and moments beside them, fill the registers of sm_80."""
        return self.layout == "sliced" and self.kind == "gather_moments"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    def config(self, family: str = "nvidia") -> Any:
        from dyreg_triton import tuning

        channels = {"dense": 1, "dense_moments": 16}.get(self.kind, self.channels)
        cells = self.size[0] * self.size[1]
        return tuning.region(self.kind, self.frames, self.nodes, channels, cells, self.torch_dtype.itemsize, family)

    def wide(self, target: str) -> int:
        """Bytes that an access of the map can have.

        What divides its runs of memory, and what a thread has of a tile. A contiguous map whose cells fit one tile is
        one run, so only the frame has to divide.
        """
        config, itemsize = self.config(FAMILY[target]), self.torch_dtype.itemsize
        height, width = self.size
        run = {"contiguous": height * width, "channels_last": self.channels, "sliced": 1}[self.layout]
        if self.layout == "contiguous" and (run <= config.block_p or self.channels == 1):
            run *= self.channels
        threads = TARGETS[target].warp_size * config.num_warps
        share = config.block_c * min(config.block_p, height * width) * itemsize // threads
        return min(math.gcd(16, run * itemsize), max(itemsize, 1 << max(share.bit_length() - 1, 0)))

    def launch(self) -> None:
        """Through the op's own host code, on meta tensors."""
        from dyreg_triton.ops import region_launches as launches

        def a_map() -> torch.Tensor:
            shape = (self.frames, self.channels, *self.size)
            if self.layout == "sliced":
                shape = (self.frames, self.channels, self.size[0] * 2, self.size[1] * 2)
            t = torch.empty(shape, dtype=self.torch_dtype, device="meta")
            if self.layout == "channels_last":
                return t.to(memory_format=torch.channels_last)
            return t[..., ::2, ::2] if self.layout == "sliced" else t

        nodes = torch.empty(self.frames, self.nodes, self.channels, dtype=self.torch_dtype, device="meta")
        regions = torch.empty(self.frames, self.nodes, 4, device="meta", dtype=torch.float32)
        dense = torch.empty(self.frames, self.nodes, *self.size, dtype=self.torch_dtype, device="meta")
        if self.kind == "gather":
            launches.gather(a_map(), None, regions, self.profile, 1.0, nodes=True)
        elif self.kind == "scatter":
            launches.scatter(a_map(), nodes, None, regions, self.profile, 1.0)
        elif self.kind == "gather_moments":
            launches.gather(a_map(), nodes, regions, self.profile, 1.0, nodes=True)
            launches.gather(a_map(), nodes, regions, self.profile, 1.0, nodes=False)
        elif self.kind == "scatter_moments":
            launches.scatter(a_map(), nodes, a_map(), regions, self.profile, 1.0)
        elif self.kind == "dense":
            launches.dense(dense, regions, self.profile, 1.0)
        else:
            launches.dense_moments(dense, regions, self.profile, 1.0)

    def problems(self, code: Code) -> list[str]:
        """Narrow access, in words."""
        found: list[str] = []
        wide = self.wide(code.target)
        if self.kind == "scatter_moments" and self.nodes > 16:  # two passes, each with a config of its own
            return found
        if self.kind in ("gather", "gather_moments", "scatter_moments") and code.load_bytes < wide:
            found.append(f"loads {code.load_bytes} of {wide} bytes")
        # the nodes' loads are wide whatever the map's are, where a thread has more than one of them; on NVIDIA
        config = self.config(FAMILY[code.target])
        share = config.block_c * config.block_n * self.torch_dtype.itemsize // (32 * config.num_warps)
        nodes = self.kind in ("gather_moments", "scatter_moments") and code.target.startswith("sm")
        if nodes and self.channels % 16 == 0 and code.narrowest < min(wide, share, 4):
            found.append(f"loads {code.narrowest} of {wide} bytes")
        if self.layout == "channels_last" and code.target == "gfx942":  # its products leave a channel's cells together
            return found
        if code.target == "gfx942":  # its products leave four cells of a channel to a thread
            wide = min(wide, 4 * self.torch_dtype.itemsize)
        if self.kind in ("scatter", "scatter_moments") and code.store_bytes < wide:
            found.append(f"stores {code.store_bytes} of {wide} bytes")
        return found

    def about(self) -> str:
        config = self.config()
        return (
            f"{self.kind:15} {self.profile:10} {self.layout:13} {self.size[0]:2}x{self.size[1]:<2} N {self.nodes:<3} "
            f"C {self.channels:<4} blocks {config.block_n} {config.block_c} {config.block_p}"
        )


def cases(everything: bool) -> list[RegionCase]:
    """One case for every config that the heuristic can choose, and for common sizes, per dtype and profile.

    Without `everything`: 14 x 14 and 56 x 56 in two dtypes.
    """
    if not everything:
        return [
            RegionCase(kind, 160, 9, 512, size, dtype)
            for size, dtype, kind in itertools.product(((14, 14), (56, 56)), ("bfloat16", "float32"), KINDS)
        ]
    chosen: dict[Any, RegionCase] = {}
    sizes = itertools.product(NODES, FRAMES, CHANNELS, SIZES)
    for (n, frames, c, size), kind, dtype in itertools.product(sizes, KINDS, DTYPES):
        if kind != "scatter_moments" or n <= 16:
            case = RegionCase(kind, frames, n, c, size, dtype)
            config = case.config()
            # maps of one run, and regions of several blocks, are other programs; aligned channels are the common ones
            key = (kind, dtype, config, size[0] * size[1] <= config.block_p, n > config.block_n)
            if key not in chosen or (c % 16 == 0 and chosen[key].channels % 16):
                chosen[key] = case
    for size, kind, dtype in itertools.product(COMMON, KINDS, DTYPES):
        chosen[kind, dtype, size] = RegionCase(kind, 160, 9, 512, size, dtype)
    found = [case._replace(profile=p) for case in chosen.values() for p in ("linear", "gaussian", "log-linear")]
    for kind, dtype in itertools.product(KINDS[:4], DTYPES):
        for layout, size in itertools.product(LAYOUTS[1:], ((7, 7), (14, 14))):
            found.append(RegionCase(kind, 160, 9, 512, size, dtype, layout=layout))
        # one channel is a constant to the compiler; of an odd number, the only wide loads are those of the map
        found += [RegionCase(kind, 160, 9, 1, (7, 7), dtype), RegionCase(kind, 160, 9, 511, (28, 28), dtype)]
    return list(dict.fromkeys(found))
