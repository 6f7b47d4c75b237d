"""Triton's own CUDA launch path on a machine without a GPU, up to the driver: what is launched, with which parameters.

`standin.c` is built as a `libcuda.so.1` and loaded into this process, where Triton's launcher finds it. Kernels are
compiled for the target for real, and JITFunction.run, CompiledKernel and the C launcher run as on a GPU; the
pretended driver records each launch and runs nothing, so that results are whatever the memory held. Host time
measured here leaves out the real driver's part, and that of torch's CUDA device and stream.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from dyreg_triton._core import dispatch
from dyreg_triton.ops import launch

from .compiled import SHARED_LIMIT, TARGETS

NVIDIA = tuple(name for name, target in TARGETS.items() if target.backend == "cuda")


class Param(NamedTuple):
    """Where a kernel's parameter is among the bytes of a launch."""

    offset: int  # bytes
    size: int  # bytes
    pointer: bool  # to global memory


class Launch(NamedTuple):
    """One launch as the driver was asked for it. The last two parameters are Triton's scratch pointers, mostly 0."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]  # threads
    shared: int  # bytes
    params: bytes  # as in the kernel's parameter space, gaps 0
    stream: int
    function: int  # the driver's handle: each kernel compiled from one source has its own
    layout: tuple[Param, ...]

    def arguments(self) -> list[bytes]:
        """The bytes of each parameter, without the arguments that were compiled in."""
        return [self.params[p.offset : p.offset + p.size] for p in self.layout]

    def pointers(self) -> list[int]:
        """The addresses among the parameters, in order."""
        return [int.from_bytes(v, "little") for v, p in zip(self.arguments(), self.layout, strict=True) if p.pointer]

    def without_pointers(self) -> Launch:
        """The launch with every address 0: what must be the same whatever memory the outputs were given."""
        params = bytearray(self.params)
        for p in self.layout:
            if p.pointer:
                params[p.offset : p.offset + p.size] = bytes(p.size)
        return self._replace(params=bytes(params))


# --- the library ----------------------------------------------------------------------------------------------------


class _CParam(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint16), ("size", ctypes.c_uint16), ("pointer", ctypes.c_int32))


class _CFunction(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 256),
        *((field, ctypes.c_int32) for field in ("registers", "local", "threads", "dynamic", "bytes", "count")),
        ("params", _CParam * 512),
    )


class _CLaunch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.POINTER(_CFunction)),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("params", ctypes.c_ubyte * 4096),
    )


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@functools.cache
def _library() -> tuple[ctypes.CDLL, str]:
    """The pretended driver, loaded, and its folder: beside what Triton builds, so that it is built once."""
    source = Path(__file__).with_suffix(".c")
    include = nvidia.include_dirs[0]
    key = source.read_bytes() + (Path(include) / "cuda.h").read_bytes()
    cache = get_cache_manager(hashlib.sha256(key).hexdigest())
    path = cache.get_file("libcuda.so.1")
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "libcuda.so.1"
            command = [str(_compiler()), "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
            command += [str(source), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode:
                raise RuntimeError(f"standin: {' '.join(command)} failed on {source}:\n{done.stderr}")
            path = cache.put(built.read_bytes(), "libcuda.so.1", binary=True)
    library = ctypes.CDLL(path)
    # By its name Triton's launcher finds whichever was loaded first.
    if ctypes.CDLL("libcuda.so.1")._handle != library._handle:
        raise RuntimeError("standin: this process has loaded another libcuda.so.1; start a process of its own")
    for name, result, arguments in (
        ("standin_open", None, (ctypes.c_int, ctypes.c_int)),
        ("standin_clear", None, ()),
        ("standin_count", ctypes.c_uint64, ()),
        ("standin_launches", ctypes.c_int, (ctypes.POINTER(_CLaunch),)),
        ("standin_ring", ctypes.c_int, ()),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, str(Path(path).parent)


# --- Triton's side --------------------------------------------------------------------------------------------------


class _Driver(nvidia.CudaDriver):
    """Triton's driver with its own utils and launcher; what it would ask torch.cuda is said here."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.device = 2000 + NVIDIA.index(name)  # not bench.compiled's: kernels are cached by device
        self.stream = 0
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: self.stream

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]


_driver = functools.cache(_Driver)  # kernels compiled in a former `standin` keep their handles


class Standin:
    """What was launched inside a `standin`. The last 1024 launches are held."""

    def __init__(self, library: ctypes.CDLL, of: _Driver):
        self._library, self._driver = library, of
        self.target = of.name

    @property
    def stream(self) -> int:
        """The handle of the current stream, which may be set; 0 at first."""
        return self._driver.stream

    @stream.setter
    def stream(self, handle: int) -> None:
        self._driver.stream = handle

    def count(self) -> int:
        """How many launches there were since the start or `clear`."""
        return self._library.standin_count()

    def clear(self) -> None:
        """Forget every launch."""
        self._library.standin_clear()

    def launches(self) -> list[Launch]:
        """The launches, oldest first; where there were more than 1024, the last of them."""
        held = (_CLaunch * self._library.standin_ring())()
        return [_launch(record) for record in held[: self._library.standin_launches(held)]]


def _launch(record: _CLaunch) -> Launch:
    function = record.function.contents
    layout = tuple(Param(p.offset, p.size, bool(p.pointer)) for p in function.params[: function.count])
    return Launch(
        function.name.decode(), tuple(record.grid), tuple(record.block), record.shared,
        bytes(record.params[: record.bytes]), record.stream, ctypes.addressof(function), layout,
    )  # fmt: skip


def why_not() -> str | None:
    """None where `standin` can work in this process, else the reason in words."""
    if dispatch._interpreted():
        return "kernels are interpreted here (TRITON_INTERPRET)"
    if torch.cuda.is_available():
        return "there is a GPU here, whose driver does the launching"
    if _compiler() is None:
        return "there is no C compiler (gcc, clang, or one named by CC)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's C headers, which Triton's launcher is built with, are not installed (Python.h)"
    return None


@contextmanager
def _linked_against(folder: str) -> Iterator[None]:
    """Inside, Triton links what it builds against the libcuda in this folder."""

    def forget() -> None:
        for found in (nvidia.library_dirs, nvidia.libcuda_dirs):
            found.cache_clear()

    with knobs.nvidia.scope():
        knobs.nvidia.libcuda_path = folder
        forget()
        try:
            yield
        finally:
            forget()


_inside: list[Standin] = []


@contextmanager
def standin(target: str = "sm_90") -> Iterator[Standin]:
    """Inside, ops on CPU tensors take the Triton path for `target` up to the driver, and every launch is recorded.

    The former driver of Triton, and dispatch, are put back at the end; the library stays loaded, unused.

    Raises:
        ValueError: `target` is none of sm_80, sm_90, sm_100.
        RuntimeError: it cannot work here, as `why_not` says, or is used inside another.
    """
    if target not in NVIDIA:
        raise ValueError(f"standin: target is {target!r}; accepted are {', '.join(map(repr, NVIDIA))}")
    reason = why_not()
    if reason is not None or _inside:
        raise RuntimeError(f"standin: cannot be entered: {reason or 'it is already, and there is one driver'}")
    library, folder = _library()
    former = driver._active

    @functools.cache
    def takes_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cpu" and dtype in dispatch.TRITON_DTYPES:
            return None
        return dispatch.why_not_triton(device, dtype)

    with _linked_against(folder), dispatch.standing_in(takes_cpu):
        active = _driver(target)
        active.stream = 0
        library.standin_open(int(target[3:]), SHARED_LIMIT[target])
        seen = Standin(library, active)
        driver.set_active(active)
        _inside.append(seen)
        launch.forget()  # plans of another driver
        try:
            yield seen
        finally:
            _inside.remove(seen)
            driver.set_active(former)
            launch.forget()
