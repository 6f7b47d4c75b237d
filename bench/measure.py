"""Where it runs, and how long a call takes there.

All contenders of a row are timed in one run, interleaved, so that what else the machine does hits them alike.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import itertools
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dyreg_triton
from dyreg_triton._core import numerics
from dyreg_triton._core.gpu import gpu_of
from dyreg_triton._core.installed import triton_version
from dyreg_triton.configs.lookup import tuned_by

BEYOND_CACHES = {"cuda": 1 << 28, "cpu": 0}  # bytes of inputs that calls take in turns; a CPU's are found as they are


class Times(NamedTuple):
    """Seconds of one call, repeated: the median, the quartiles around it, and the least."""

    median: float
    lower: float
    upper: float
    least: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        several = seconds if len(seconds) > 1 else [*seconds, *seconds]
        lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
        return cls(median, lower, upper, min(seconds))


class Rate(NamedTuple):
    """What a device can do in a second: the most seen, so that no fraction of it flatters.

    The quartiles of what was seen tell how busy it was with other things; `error` is how far the result was off.
    """

    best: float
    lower: float
    upper: float
    error: float

    @classmethod
    def of(cls, work: float, times: Times, error: float) -> Rate:
        return cls(work / times.least, work / times.upper, work / times.lower, error)


class Machine:
    """The device of a run, its clocks, and its measured limits: rows give their speeds as fractions of these."""

    def __init__(self, device: torch.device, name: str):
        self.device, self.name = device, name
        self.copy = functools.cache(self._copy)  # each limit is measured at the first question
        self.matrix = functools.cache(self._matrix)

    @classmethod
    def here(cls, device: str | None = None) -> Machine:
        """The device called "cpu" or "cuda"; by default CUDA where there is one."""
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda":
            return cls(chosen, torch.cuda.get_device_name(chosen))
        _keep_freed_memory()
        threads = torch.get_num_threads()
        return cls(chosen, f"CPU {_processor()}, {threads} thread{'s' if threads != 1 else ''}")

    def __str__(self) -> str:
        return f"{self.name}: copies {self.bandwidth / 1e9:.0f} GB/s"

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    # --- limits -----------------------------------------------------------------------------------------------------

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a copy beyond any cache; read and written bytes both count."""
        return self.copy().best

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of a large square matrix product."""
        return self.matrix(dtype).best

    def _copy(self) -> Rate:
        size = (1 << 30) if self.cuda else (1 << 27)
        source = torch.randint(256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        (times,) = self.interleaved([lambda: target.copy_(source)])
        return Rate.of(2 * size, times, 0.0 if torch.equal(source, target) else 1.0)

    def _matrix(self, dtype: torch.dtype) -> Rate:
        # on the CPU short enough that other processes do not interrupt them all
        size, repeats, rows = (8192, 24, 64) if self.cuda else (512, 200, 512)
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.float32).to(dtype) for _ in range(2))
        target = torch.empty_like(a)
        (times,) = self.interleaved([lambda: torch.matmul(a, b, out=target)], repeats)
        return Rate.of(2 * size**3, times, relative_error([target[:rows]], [a[:rows].double() @ b.double()]))

    # --- clocks -----------------------------------------------------------------------------------------------------

    def interleaved(self, calls: Sequence[Callable[[], object]], repeats: int = 24) -> list[Times]:
        """Seconds of each call by the device's clock."""
        timed = _Queued if self.cuda else _Watched
        return _interleaved([timed(call) for call in calls], repeats)

    def wall(self, calls: Sequence[Callable[[], object]], repeats: int = 24) -> list[Times]:
        """Seconds of each call by the host's clock until its work is done: what a user waits."""
        return _interleaved([_Watched(call, self.synchronize) for call in calls], repeats)

    def repeats(self, calls: Sequence[Callable[[], object]], seconds: float, most: int = 60) -> int:
        """How often each call can be taken within `seconds` for all together; at least 5 times."""
        once = _interleaved([_Watched(call, self.synchronize) for call in calls], repeats=1)
        return max(5, min(most, int(seconds / sum(times.median for times in once))))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def captured(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A replay of `call` as a CUDA graph, and the results that a replay fills.

        Raises whatever the call raises where it cannot be captured.
        """
        side = torch.cuda.Stream(self.device)  # a capture wants its warm-up on a stream of its own
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return graph.replay, results

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """Peak memory of one call beyond what was held before it, as torch's allocator counts it."""
        if not self.cuda:
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
        capability = ".".join(map(str, torch.cuda.get_device_capability(self.device))) if self.cuda else None
        return {
            "device": self.name,
            "kind": self.device.type,
            "capability": capability,
            "copy_bandwidth": self.bandwidth,
            "tuning": tuned_by(gpu_of(self.device)) if self.cuda else [],
            "torch": torch.__version__,
            "triton": triton_version(),
            "python": platform.python_version(),
            "dyreg_triton": dyreg_triton.__version__,
            "commit": _commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


class _Watched:
    """Times a call by the host's clock, until `wait` returns."""

    def __init__(self, call: Callable[[], object], wait: Callable[[], None] = lambda: None):
        self._call, self._wait = call, wait

    def __call__(self) -> float:
        start = time.perf_counter()
        self._call()
        self._wait()
        return time.perf_counter() - start


class _Queued:
    """Times a call by the device's clock, on a device that has all of the call's work queued when it begins.

    Else a short call's time would be the host's, which takes longer to launch it than the device to do it. So the
    device is held back until the host is done; for how long is found by trying, up to some 30 ms.
    """

    MOST = 1 << 26  # cycles

    def __init__(self, call: Callable[[], object]):
        self._call, self._hold = call, 1 << 16

    def __call__(self) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self._hold)
            start.record()
            self._call()
            end.record()
            held = not start.query()
            end.synchronize()
            if held or self._hold >= self.MOST:
                return start.elapsed_time(end) / 1e3
            self._hold *= 2


def _interleaved(timed: Sequence[Callable[[], float]], repeats: int) -> list[Times]:
    """Times of calls taken in turns, after two rounds that do not count.

    Every round has an order of its own: who follows whom decides who finds memory freed and caches full.
    """
    times: list[list[float]] = [[] for _ in timed]
    shuffled = random.Random(0)
    for i in range(repeats + 2):
        for turn in shuffled.sample(range(len(timed)), len(timed)):
            seconds = timed[turn]()
            if i >= 2:
                times[turn].append(seconds)
    return [Times.of(kept) for kept in times]


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: else chance decides which contender pays for fresh pages, up to half its time."""
    trim_threshold, mmap_threshold = -1, -3  # of mallopt
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the most that glibc takes


def _peak_of_allocations(call: Callable[[], object]) -> int:
    """The most bytes that a call holds on the CPU, from every allocation and release that torch's profiler sees.

    Exact for tensors; what a library allocates for itself, as a convolution's scratch, does not pass torch's allocator.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    held: dict[int, int] = {}  # bytes by address
    total = peak = 0
    events = _allocations(profile.profiler.kineto_results.experimental_event_tree())
    for _, address, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            held[address] = size
        # The profiler also reports some releases of what was allocated before: where it had seen the address in use.
        total += size if size > 0 else -held.pop(address, 0)
        peak = max(peak, total)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(nanoseconds, address, bytes), the bytes below 0 for a release, of a tree of the profiler's events."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def _processor() -> str:
    """The processor's own name where Linux tells it: machines of one architecture are not one machine."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", told, re.M)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()


@functools.cache
def _commit() -> str:
    root = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, encoding="utf-8", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def rotated(inputs: Sequence[Tensor], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Copies of `inputs` in turns, on CUDA as many as together exceed any cache: no call finds its own in it."""
    size = sum(t.numel() * t.element_size() for t in inputs)
    others = min(1024, BEYOND_CACHES[device.type] // max(size, 1))
    copies = [tuple(t.clone() for t in inputs) for _ in range(1 + others)]
    turns = itertools.cycle(copies)
    return lambda: next(turns)


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest ||found - wanted|| / ||wanted|| over all pairs, in float64; inf for another shape or no number."""
    return max((numerics.relative_error(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
