"""Compile kernels for GPUs that need not be present, and read the machine code: `python -m bench compiled`.

The op's own host code runs on `device="meta"` tensors under a stand-in driver, with every launch turned into a
compile; so each kernel is specialised exactly as a real launch would specialise it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
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
        store_bytes=max(stores, default=0),
        num_warps=metadata.num_warps,
    )


def region_calls(
    dtype: torch.dtype,
    profile: str,
    size: tuple[int, int] = (14, 14),
    frames: int = 160,
    channels: int = 512,
    n: int = 9,
) -> None:
    """Launch every kernel of the region ops, forward and backward, on meta tensors."""
    from dyreg_triton.ops import region as ops

    x = torch.empty(frames, channels, *size, dtype=dtype, device="meta")
    nodes = torch.empty(frames, n, channels, dtype=dtype, device="meta")
    regions = torch.empty(frames, n, 4, device="meta")
    ops._gather(x, None, regions, profile, 1.0, nodes=True)  # pool
    ops._scatter(torch.empty_like(x), nodes, x, regions, profile, 1.0)  # pool's backward
    ops._scatter(x, nodes, None, regions, profile, 1.0)  # remap
    ops._gather(x, nodes, regions, profile, 1.0, nodes=True)  # remap's backward
    k = torch.empty(frames, n, *size, device="meta")
    ops._dense(k, regions, profile, 1.0)
    ops._dense_moments(k, regions, profile, 1.0)


def main(everything: bool = False) -> int:
    """Print one line per compiled kernel; 1 if any spills or exceeds its target's shared memory."""
    profiles = ("linear", "gaussian", "log-linear") if everything else ("linear",)
    dtypes = (torch.bfloat16, torch.float32, torch.float16) if everything else (torch.bfloat16, torch.float32)
    bad = 0
    print("target   dtype     profile     size     kernel                  regs spills shared  mma  load store")
    for target, dtype, profile, size in itertools.product(TARGETS, dtypes, profiles, ((14, 14), (56, 56))):
        with compiling(target) as codes:
            region_calls(dtype, profile, size)
        for c in codes:
            wrong = c.spills > 0 or c.shared > SHARED_LIMIT[target]
            bad += wrong
            print(
                f"{target:8} {str(dtype)[6:]:9} {profile:11} {size[0]}x{size[1]:<5} {c.kernel:23} {c.registers:4} "
                f"{c.spills:6} {c.shared:6} {c.tensor_core:4} {c.load_bytes:5} {c.store_bytes:5}"
                f"{'  <- does not fit' if wrong else ''}"
            )
    return 1 if bad else 0


if __name__ == "__main__":
    import sys

    sys.exit(main("--all" in sys.argv))
