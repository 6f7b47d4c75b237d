"""How many programs fit a multiprocessor at once, and what limits them."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What a multiprocessor (a compute unit of AMD's) has, and in which portions it is given out."""

    multiprocessors: int  # of the largest GPU of the kind
    schedulers: int  # each with its own share of registers and warps
    warps: int
    programs: int
    registers: int  # 32-bit registers of a scheduler, for one lane
    register_portion: int  # of a lane
    most_registers: int  # of a lane
    shared: int  # bytes
    shared_portion: int
    shared_reserved: int  # bytes that each program costs beyond its own
    lanes: int  # of a warp
    bytes_per_slot: float  # of memory, in the time in which a scheduler issues an instruction
    operations_per_slot: float  # of 16-bit matrix products, likewise


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (8.0, 9.0, 10.0), and the
# occupancy calculator's allocation units; multiprocessors of A100, H100/H200 SXM and B200 by their data sheets.
# Registers are given to a warp by 256, which is 8 for each of 32 lanes. AMD: LLVM's AMDGPUUsage and AMDGPUBaseInfo
# (gfx90a and later: 512 vector registers by 8, 8 wavefronts a SIMD, 16 work-groups with a barrier), MI300X.
# The last two are the data sheets' bandwidth and dense bf16 rate over multiprocessors, schedulers and boost clock: A100
# 2.04 TB/s, 312 T/s, 1.41 GHz; H200 4.8, 989, 1.83; B200 8, 2250, 1.85; MI300X 5.3, 1307, 2.1, where a wavefront's
# instruction takes four clocks. They order and bound; what is quoted is measured.
LIMITS = {
    "sm_80": Limits(108, 4, 64, 32, 512, 8, 255, 164 * 1024, 128, 1024, 32, 3.35, 512),
    "sm_90": Limits(132, 4, 64, 32, 512, 8, 255, 228 * 1024, 128, 1024, 32, 4.97, 1024),
    "sm_100": Limits(148, 4, 64, 32, 512, 8, 255, 228 * 1024, 128, 1024, 32, 7.3, 2048),
    "gfx942": Limits(304, 4, 32, 16, 512, 8, 512, 64 * 1024, 512, 0, 64, 8.3, 2048),
}


class Occupancy(NamedTuple):
    """Programs that a multiprocessor holds at once; its share of the warps that it could hold; what there is least of:
    "registers", "shared memory", "warps" or "programs"."""

    resident: int
    occupancy: float
    limited_by: str

    def waves(self, programs: int, target: str) -> float:
        """How often the GPU is filled by so many programs; below 1 a part of it idles."""
        return programs / (self.resident * LIMITS[target].multiprocessors) if self.resident else float("inf")


def _rounded(n: int, portion: int) -> int:
    return -(-n // portion) * portion


def occupancy(target: str, num_warps: int, registers: int, shared: int) -> Occupancy:
    """Of programs of `num_warps` warps with so many registers a thread and so many bytes of shared memory."""
    limits = LIMITS[target]
    # a warp lives in one scheduler, with all its registers
    by_scheduler = limits.registers // _rounded(max(registers, 1), limits.register_portion)
    shared = _rounded(shared + limits.shared_reserved, limits.shared_portion)
    fits = {
        "warps": limits.warps // num_warps,
        "programs": limits.programs,
        "registers": by_scheduler * limits.schedulers // num_warps if registers <= limits.most_registers else 0,
        "shared memory": limits.shared // shared if shared else limits.programs,
    }
    limited_by = min(fits, key=lambda name: fits[name])  # the first of equals: what is full is not short of others
    return Occupancy(fits[limited_by], fits[limited_by] * num_warps / limits.warps, limited_by)
