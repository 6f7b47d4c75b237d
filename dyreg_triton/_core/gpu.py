"""Which GPU a tensor is on, as launch configs tell GPUs apart."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch

from .installed import triton_fault


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes:
        name: what its maker calls it; "interpreter" where Triton's interpreter stands for one.
        capability: "9.0" on NVIDIA, "gfx942" on AMD, "interpreted".
        shared: bytes of shared memory that a program may have.
    """

    name: str
    capability: str
    shared: int

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


def device_of(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Under it, Triton's driver speaks of `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that launches on tensors of `device` run on, or are compiled for."""
    fault = triton_fault()
    if fault is not None:
        raise RuntimeError(f"no kernel runs on {device} here: the package triton is {fault}")
    from triton.runtime import driver

    from ..kernels.common import interpreted

    if interpreted():
        return Gpu("interpreter", "interpreted", 227 * 1024)
    try:
        active = driver.active
    except RuntimeError as error:
        raise RuntimeError(f"no kernel runs on {device} here: {error}") from error
    with device_of(device):
        target = active.get_current_target()
        if device.type == "cuda":
            shared = active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
            name = torch.cuda.get_device_name(device)
        else:  # a stand-in of the driver: nothing runs
            shared, name = 0, f"no GPU, compiled for {target.backend} {target.arch}"
    arch = target.arch
    return Gpu(name, f"{arch // 10}.{arch % 10}" if target.backend == "cuda" else str(arch).partition(":")[0], shared)


@functools.cache
def family(device: torch.device) -> str:
    """What launches compile for, as the heuristics tell GPUs apart: nvidia, blackwell, amd; or interpreted."""
    capability = gpu_of(device).capability
    if capability == "interpreted":
        return capability
    if capability.startswith("gfx"):
        return "amd"
    return "blackwell" if int(capability.partition(".")[0]) >= 10 else "nvidia"


def matmul_precision() -> str:
    """torch.get_float32_matmul_precision(), also where torch's newer settings were used, with which it raises."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def forget() -> None:
    """Ask again: for whoever exchanges Triton's driver."""
    gpu_of.cache_clear()
    family.cache_clear()
