"""What the machine code of one compiled kernel says."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from .assembly import Block, Instruction, Loop, hot_loop, lines, parse_amdgcn, parse_sass


@dataclasses.dataclass(frozen=True)
class Code:
    """One launch: the machine code of its kernel, and what it was given."""

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
    tensor_core_kind: str | None = None  # the most frequent matrix instruction
    instructions: int = 0  # that can be reached
    loop: Loop | None = None
    loop_bytes: int = 0  # of global memory that a warp asks for in one turn of the loop
    loop_operations: int | None = 0  # of a warp's matrix instructions in one turn; None where the code does not say
    programs: int = 0
    given: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)  # arguments by name


def inspect(compiled: Any, target: str) -> Code:
    """Read registers, spills, shared memory, matrix instructions, access widths and the inner loop."""
    metadata = compiled.metadata
    amd = metadata.target.backend == "hip"
    found = _amd(compiled.asm["amdgcn"]) if amd else _nvidia(compiled.asm["cubin"])
    return dataclasses.replace(
        found, kernel=metadata.name, target=target, shared=metadata.shared, num_warps=metadata.num_warps
    )


def _summary(
    blocks: Sequence[Block],
    registers: int,
    spills: int,
    lanes: int,
    width: Callable[[str], int],
    operations: Callable[[str], int | None],
) -> Code:
    """From instructions, `width` in bytes of an access and `operations` of a matrix instruction."""
    every = lines(blocks)
    loop, turn = hot_loop(blocks)
    loads = _widths(every, "load", width)
    products = [line.opcode for line in every if line.kind == "tensor core"]
    in_turn = [operations(line.opcode) for line in turn if line.kind == "tensor core"]
    return Code(
        kernel="",
        target="",
        registers=registers,
        spills=spills,
        shared=0,
        tensor_core=len(products),
        load_bytes=max(loads, default=0),
        narrowest=min(loads, default=0),
        store_bytes=max(_widths(every, "store", width), default=0),
        num_warps=0,
        tensor_core_kind=max(sorted(set(products)), key=products.count, default=None),
        instructions=len(every),
        loop=loop,
        loop_bytes=lanes * sum(_widths(turn, "load", width) + _widths(turn, "store", width)),
        loop_operations=None if None in in_turn else sum(n or 0 for n in in_turn),
    )


def _widths(some: Iterable[Instruction], kind: str, width: Callable[[str], int]) -> list[int]:
    """Bytes of the accesses of global memory of a kind; spills are no such access."""
    return [bytes_ for line in some if line.kind == kind and (bytes_ := width(line.opcode))]


# --- NVIDIA ---------------------------------------------------------------------------------------------------------


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@functools.lru_cache(maxsize=1024)
def _nvidia(cubin: bytes) -> Code:
    """A backward launches the same code for every few clips, and reading it takes longer than finding it compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([_tool(tool), option, file.name], capture_output=True, encoding="utf-8", check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return _summary(parse_sass(text), used["REG"], used["STACK"] + used["LOCAL"], 32, sass_width, sass_operations)


def sass_width(opcode: str) -> int:
    """Bytes that a thread accesses of global memory; 0 for other memory."""
    if not opcode.startswith(("LDG", "STG")):
        return 0
    bits = re.search(r"\.(256|128|64|[US]?16|[US]?8)(?=\.|$)", opcode)
    return int(bits.group(1).lstrip("US")) // 8 if bits else 4


def sass_operations(opcode: str) -> int | None:
    """Operations of a warp's share of a matrix instruction; None for Blackwell's, whose shape is in a descriptor."""
    if group := re.search(r"GMMA\.(\d+)x(\d+)x(\d+)", opcode):  # of four warps
        return 2 * math.prod(map(int, group.groups())) // 4
    if warp := re.search(r"MMA\.(?:SP\.)?168(\d+)", opcode):
        return 2 * 16 * 8 * int(warp.group(1))
    return None


# --- AMD ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _amd(text: str) -> Code:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    return _summary(parse_amdgcn(text), field("vgpr_count"), spills, 64, amdgcn_width, amdgcn_operations)


def amdgcn_width(opcode: str) -> int:
    """Bytes that a thread accesses of global memory; 0 for other memory."""
    found = re.match(r"(?:global|buffer|flat)_(?:load|store)_(\w+?)(?:_d16(?:_hi)?)?$", opcode)
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2, "b128": 16}
    return widths.get(found.group(1), 1) if found else 0


def amdgcn_operations(opcode: str) -> int | None:
    """Operations of a wavefront's matrix instruction."""
    found = re.search(r"_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", opcode)
    return 2 * math.prod(int(n) for n in found.groups() if n) if found else None
