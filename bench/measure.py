"""Where it runs, how long it takes, how a row is kept.

All contenders of a row are timed in one run, interleaved, so that what else the machine does hits them alike. Only
contenders whose outputs and gradients were right in that run are timed, and without ours there is no row.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dyreg_triton
from dyreg_triton.cli import version_of


@dataclass(frozen=True)
class Machine:
    """The device of a run, and its measured copy bandwidth in bytes a second (read and written bytes both count)."""

    device: torch.device
    name: str
    bandwidth: float
    _rates: dict[torch.dtype, float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def here(cls, device: str | None = None) -> Machine:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        cuda = chosen.type == "cuda"
        if not cuda:
            _keep_freed_memory()
        name = (
            torch.cuda.get_device_name(chosen)
            if cuda
            else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
        )
        size = (1 << 30) if cuda else (1 << 27)
        source = torch.ones(size, dtype=torch.uint8, device=chosen)
        target = torch.empty_like(source)
        machine = cls(chosen, name, 0.0)
        (seconds,) = machine.interleaved([lambda: target.copy_(source)], repeats=10)
        return cls(chosen, name, 2 * size / seconds)

    def __str__(self) -> str:
        return f"{self.name}: copies {self.bandwidth / 1e9:.0f} GB/s"

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of a large square matrix product, measured at the first question.

        The best of several, which on the CPU are short enough that other processes do not interrupt them all.
        """
        if dtype not in self._rates:
            size, repeats = (8192, 20) if self.device.type == "cuda" else (512, 400)
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            target = torch.empty_like(a)
            seconds = min(self.seconds(lambda: torch.matmul(a, b, out=target)) for _ in range(repeats))
            self._rates[dtype] = 2 * size**3 / seconds
        return self._rates[dtype]

    def seconds(self, call: Callable[[], object]) -> float:
        """One call, by the device's clock on CUDA."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3

    def interleaved(self, calls: Sequence[Callable[[], object]], repeats: int = 24) -> list[float]:
        """Median device seconds of each call."""
        return _interleaved(self.seconds, calls, repeats)

    def wall(self, calls: Sequence[Callable[[], object]], repeats: int = 24) -> list[float]:
        """Median host seconds of each call until its work is done: what a user waits."""

        def timed(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter() - start

        return _interleaved(timed, calls, repeats)

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Peak memory of one call beyond what was held before it, as torch's allocator counts it."""
        if self.device.type != "cuda":
            return _peak_of_allocations(call)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del result
        return peak

    def about(self) -> dict[str, Any]:
        """What every row says of its run."""
        return {
            "device": self.name,
            "copy_bandwidth": self.bandwidth,
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "python": platform.python_version(),
            "dyreg_triton": dyreg_triton.__version__,
            "commit": _commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """Add a row to a JSONL file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        former = path.read_text() if path.exists() else ""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(former + json.dumps({**row, **self.about()}) + "\n")
        os.replace(partial, path)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: else chance decides which contender pays for fresh pages, up to half its time."""
    trim_threshold, mmap_threshold = -1, -3  # of mallopt
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the most that glibc takes


def _interleaved(
    timed: Callable[[Callable[[], object]], float], calls: Sequence[Callable[[], object]], repeats: int
) -> list[float]:
    """Medians of calls taken in turns, after two rounds that do not count.

    Every round has an order of its own: who follows whom decides who finds memory freed and caches full.
    """
    times: list[list[float]] = [[] for _ in calls]
    shuffled = random.Random(0)
    for i in range(repeats + 2):
        for turn in shuffled.sample(range(len(calls)), len(calls)):
            seconds = timed(calls[turn])
            if i >= 2:
                times[turn].append(seconds)
    return [statistics.median(kept) for kept in times]


def _peak_of_allocations(call: Callable[[], object]) -> int:
    """The most bytes that a call holds on the CPU, from every allocation and release that torch's profiler sees.

    Exact for tensors; what a library allocates for itself, as a convolution's scratch, does not pass torch's allocator.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes), default=0)


@functools.cache
def _commit() -> str:
    root = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def rotated(make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs in turns from several copies that together exceed any cache, so that no call finds its own in it."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    target = (1 << 28) if device.type == "cuda" else 0
    copies = [first, *(make() for _ in range(min(64, target // max(size, 1))))]
    turns = itertools.cycle(copies)
    return lambda: next(turns)


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest ||found - wanted|| / ||wanted|| over all pairs, in float64; inf where one is not finite."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        error = ((a - b).norm() / b.norm().clamp_min(1e-300)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst
