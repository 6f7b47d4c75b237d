"""Compile kernels for GPUs that need not be present, and read the machine code: `python -m bench compiled`.

The op's own host code runs on `device="meta"` tensors under a stand-in driver, with every launch turned into a
compile; so each kernel is specialised exactly as a real launch would specialise it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes


class _Driver:
    """Answers what a launch asks of a driver; each target has a device id, hence a kernel cache, of its own."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        return 1000 + list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel says."""

    kernel: str
    target: str
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes
    tensor_core: int  # matrix instructions
    load_bytes: int  # widest load from global memory, per thread
    narrowest: int  # narrowest load
    store_bytes: int  # widest store to global memory, per thread
    num_warps: int


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Code]]:
    """Inside, launches on meta tensors compile for `target` and append their `Code` to the list."""
    codes: list[Code] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        codes.append(inspect(compiled, target))
        return compiled

    former = driver._active
    driver.set_active(_Driver(target))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield codes
    finally:
        driver._active = former


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def inspect(compiled: Any, target: str) -> Code:
    """Read registers, spills, shared memory, matrix instructions and access widths."""
    metadata = compiled.metadata
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s*(\d+)", text)
            return int(found.group(1)) if found else 0

        registers, spills = field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count")
        tensor_core = len(re.findall(r"v_mfma_", text))
        widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "b128": 16}
        pattern = r"(?:global|buffer)_{}_(\w+?)(?:_d16(?:_hi)?)?\s"
        loads = [widths.get(w, 1) for w in re.findall(pattern.format("load"), text)]
        stores = [widths.get(w, 1) for w in re.findall(pattern.format("store"), text)]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = subprocess.run(
                [_tool("cuobjdump"), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
            ).stdout
            text = subprocess.run(
                [_tool("nvdisasm"), "-c", cubin.name], capture_output=True, text=True, check=True
            ).stdout
        registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
        spills = int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1))  # type: ignore[union-attr]
        tensor_core = len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)", text))

        def access_bytes(modifiers: str) -> int:
            bits = re.search(r"\.(128|64|U?16|U?8)\b", modifiers + " ")
            return int(bits.group(1).lstrip("US")) // 8 if bits else 4

        loads = [access_bytes(m) for m in re.findall(r"\bLDG(?:STS)?((?:\.\w+)*)", text)]
        stores = [access_bytes(m) for m in re.findall(r"\bSTG((?:\.\w+)*)", text)]
    return Code(
        kernel=metadata.name,
        target=target,
        registers=registers,
        spills=spills,
        shared=metadata.shared,
        tensor_core=tensor_core,
        load_bytes=max(loads, default=0),
        narrowest=min(loads, default=0),
        store_bytes=max(stores, default=0),
        num_warps=metadata.num_warps,
    )


# What a launch config depends on: sizes on both sides of every choice that `tuning.region` makes.
FRAMES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
NODES = (9, 1, 16, 17, 32, 33, 64, 65, 100)
CHANNELS = (512, 1, 16, 17, 32, 33, 64, 256, 2048)
SIZES = ((1, 1), (4, 4), (5, 5), (7, 7), (8, 8), (9, 9), (14, 14), (13, 17), (16, 16), (28, 28), (56, 56))
COMMON = ((7, 7), (13, 17), (14, 14), (16, 16), (28, 28), (56, 56))
KINDS = ("gather", "scatter", "gather_moments", "scatter_moments", "dense", "dense_moments")
DTYPES = ("bfloat16", "float16", "float32", "tf32")  # tf32: float32 with torch's matmul precision at "high"
LAYOUTS = ("contiguous", "channels_last", "sliced")


class Case(NamedTuple):
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
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    def config(self) -> Any:
        from dyreg_triton import tuning

        channels = {"dense": 1, "dense_moments": 16}.get(self.kind, self.channels)
        cells = self.size[0] * self.size[1]
        return tuning.region(self.kind, self.frames, self.nodes, channels, cells, self.torch_dtype.itemsize)

    def wide(self, lanes: int) -> int:
        """Bytes that an access of the map can have, with `lanes` threads in a warp.

        What divides its runs of memory, and what a thread has of a tile. A contiguous map whose cells fit one tile is
        one run, so only the frame has to divide.
        """
        config, itemsize = self.config(), self.torch_dtype.itemsize
        height, width = self.size
        run = {"contiguous": height * width, "channels_last": self.channels, "sliced": 1}[self.layout]
        if self.layout == "contiguous" and (run <= config.block_p or self.channels == 1):
            run *= self.channels
        tile = config.block_c * config.block_p * itemsize // (lanes * config.num_warps)
        return min(math.gcd(16, run * itemsize), max(itemsize, tile))

    def launch(self) -> None:
        """Through the op's own host code, on meta tensors."""
        from dyreg_triton.ops import region as ops

        def a_map() -> torch.Tensor:
            shape = (self.frames, self.channels, *self.size)
            if self.layout == "sliced":
                shape = (self.frames, self.channels, self.size[0] * 2, self.size[1] * 2)
            t = torch.empty(shape, dtype=self.torch_dtype, device="meta")
            if self.layout == "channels_last":
                return t.to(memory_format=torch.channels_last)
            return t[..., ::2, ::2] if self.layout == "sliced" else t

        nodes = torch.empty(self.frames, self.nodes, self.channels, dtype=self.torch_dtype, device="meta")
        regions = torch.empty(self.frames, self.nodes, 4, device="meta")
        dense = torch.empty(self.frames, self.nodes, *self.size, dtype=self.torch_dtype, device="meta")
        if self.kind == "gather":
            ops._gather(a_map(), None, regions, self.profile, 1.0, nodes=True)
        elif self.kind == "scatter":
            ops._scatter(a_map(), nodes, None, regions, self.profile, 1.0)
        elif self.kind == "gather_moments":
            ops._gather(a_map(), nodes, regions, self.profile, 1.0, nodes=True)
            ops._gather(a_map(), nodes, regions, self.profile, 1.0, nodes=False)
        elif self.kind == "scatter_moments":
            ops._scatter(a_map(), nodes, a_map(), regions, self.profile, 1.0)
        elif self.kind == "dense":
            ops._dense(dense, regions, self.profile, 1.0)
        else:
            ops._dense_moments(dense, regions, self.profile, 1.0)


def region_cases(everything: bool) -> list[Case]:
    """One case for every config that the heuristic can choose, and for common sizes, per dtype and profile.

    Without `everything`: 14 x 14 and 56 x 56 in two dtypes.
    """
    if not everything:
        return [
            Case(kind, 160, 9, 512, size, dtype)
            for size, dtype, kind in itertools.product(((14, 14), (56, 56)), ("bfloat16", "float32"), KINDS)
        ]
    cases: dict[Any, Case] = {}
    sizes = itertools.product(NODES, FRAMES, CHANNELS, SIZES)
    for (n, frames, c, size), kind, dtype in itertools.product(sizes, KINDS, DTYPES):
        if kind != "scatter_moments" or n <= 16:
            case = Case(kind, frames, n, c, size, dtype)
            config = case.config()
            # maps of one run, and regions of several blocks, are other programs; aligned channels are the common ones
            key = (kind, dtype, config, size[0] * size[1] <= config.block_p, n > config.block_n)
            if key not in cases or (c % 16 == 0 and cases[key].channels % 16):
                cases[key] = case
    for size, kind, dtype in itertools.product(COMMON, KINDS, DTYPES):
        cases[kind, dtype, size] = Case(kind, 160, 9, 512, size, dtype)
    found = [case._replace(profile=p) for case in cases.values() for p in ("linear", "gaussian", "log-linear")]
    for kind, dtype in itertools.product(KINDS[:4], DTYPES):
        for layout, size in itertools.product(LAYOUTS[1:], ((7, 7), (14, 14))):
            found.append(Case(kind, 160, 9, 512, size, dtype, layout=layout))
        # one channel is a constant to the compiler; of an odd number, the only wide loads are those of the map
        found += [Case(kind, 160, 9, 1, (7, 7), dtype), Case(kind, 160, 9, 511, (28, 28), dtype)]
    return list(dict.fromkeys(found))


def compile_case(target: str, case: Case) -> list[Code]:
    """Compile one case, under the matmul precision that its dtype names."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    try:
        with compiling(target) as codes:
            case.launch()
    finally:
        torch.set_float32_matmul_precision(former)
    return codes


def problems(case: Case, code: Code) -> list[str]:
    """What is wrong with a kernel, in words: spills, too much shared memory, narrow access."""
    found = []
    if code.spills:
        found.append("spills")
    if code.shared > SHARED_LIMIT[code.target]:
        found.append("too much shared memory")
    wide = case.wide(TARGETS[code.target].warp_size)
    if case.kind == "scatter_moments" and case.nodes > 16:  # two passes, each with a config of its own
        return found
    if case.kind in ("gather", "gather_moments", "scatter_moments") and code.load_bytes < wide:
        found.append(f"loads {code.load_bytes} of {wide} bytes")
    # the nodes' loads are wide whatever the map's are, where a thread has more than one of them; on NVIDIA
    config = case.config()
    share = config.block_c * config.block_n * case.torch_dtype.itemsize // (32 * config.num_warps)
    nodes = case.kind in ("gather_moments", "scatter_moments") and code.target.startswith("sm")
    if nodes and case.channels % 16 == 0 and code.narrowest < min(wide, share, 4):
        found.append(f"loads {code.narrowest} of {wide} bytes")
    if case.layout == "channels_last" and code.target == "gfx942":  # its products leave a channel's cells together
        return found
    if case.kind in ("scatter", "scatter_moments") and code.store_bytes < wide:
        found.append(f"stores {code.store_bytes} of {wide} bytes")
    return found


def _row(case: Case, code: Code) -> str:
    config = case.config()
    return (
        f"{code.target:7} {case.dtype:8} {case.profile:10} {case.layout:13} {case.size[0]:2}x{case.size[1]:<2} "
        f"{case.nodes:3} {case.channels:5} {config.block_n:3} {config.block_c:3} {config.block_p:4} "
        f"{config.num_warps:2} {case.kind:15} {code.registers:4} {code.spills:5} {code.shared:6} "
        f"{code.tensor_core:4} {code.load_bytes:4} {code.store_bytes:5}"
    )


HEADER = (
    "target  dtype    profile    layout        size    N     C  bN  bC   bP  w kind            regs spill shared  mma "
    "load store"
)


def _rows(task: tuple[str, Case]) -> list[tuple[str, list[str]]]:
    target, case = task
    return [(_row(case, code), problems(case, code)) for code in compile_case(target, case)]


def _report(compiled: Iterable[list[tuple[str, list[str]]]]) -> int:
    print(HEADER, flush=True)
    total = bad = 0
    for row, wrong in itertools.chain.from_iterable(compiled):
        total, bad = total + 1, bad + bool(wrong)
        print(f"{row}{'  <- ' + ', '.join(wrong) if wrong else ''}", flush=True)
    print(f"{total} kernels, {bad} that do not fit")
    return 1 if bad else 0


def main(everything: bool = False, jobs: int | None = None) -> int:
    """Print one line per compiled kernel; 1 if any spills, exceeds its target's shared memory, or accesses narrowly.

    `everything` takes tens of minutes, on `jobs` processes (by default one per core).
    """
    tasks = list(itertools.product(TARGETS, region_cases(everything)))
    if not everything:
        return _report(map(_rows, tasks))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return _report(pool.map(_rows, tasks, chunksize=8))
