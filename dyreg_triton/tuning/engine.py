"""The search for faster configs: any jobs, any clock; `tune` gives it the kernels and the GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .._core.gpu import Gpu
from ..configs.files import Entry, Unusable, merge, read
from ..configs.keys import Key

GAIN = 0.97  # a config replaces the default if it takes less than this part of its time


class Refused(Exception):
    """Why a config cannot be used: it does not compile, needs too much shared memory, or gives wrong results."""


class Job(Protocol):
    """One kernel on one problem."""

    @property
    def key(self) -> Key: ...

    @property
    def default(self) -> Any: ...

    def neighbours(self, config: Any) -> Sequence[Any]:
        """Configs to try beside this one, the most promising first."""

    def check(self, config: Any) -> None:
        """Raise Refused for a config that cannot be used."""

    def seconds(self, config: Any) -> float:
        """How long the kernel takes with it."""


class Progress(NamedTuple):
    """How far a run is: `done` of `of` jobs, at `key`; seconds elapsed, and those left where they can be told."""

    done: int
    of: int
    key: Key
    elapsed: float
    left_seconds: float | None


class Summary(NamedTuple):
    """What became of each key: a faster config, the default kept, skipped as known, left for lack of time; and how many
    configs were refused."""

    tuned: list[Key]
    kept: list[Key]
    skipped: list[Key]
    left: list[Key]
    refused: int


def known(path: Path, gpu: Gpu) -> dict[Key, Entry]:
    """What the file at `path` holds that can be used."""
    try:
        return read(path, gpu)
    except Unusable:  # none yet, or one that `merge` will move aside
        return {}


class _Search:
    """Hill-climbing from the default of one job, until no neighbour of the best is faster or the time is over."""

    def __init__(self, job: Job, over: Callable[[], bool], step: Callable[[], None]):
        self.job, self.over, self.step = job, over, step
        self.refused = 0

    def run(self) -> Entry:
        job = self.job
        job.check(job.default)
        times = {job.default: job.seconds(job.default)}
        best, complete = job.default, True
        tried = {job.default}
        queue = list(job.neighbours(best))
        while queue:
            candidate = queue.pop(0)
            if candidate in tried:
                continue
            if self.over():
                complete = False
                break
            self.step()
            tried.add(candidate)
            try:
                job.check(candidate)
                times[candidate] = job.seconds(candidate)
            except Refused:
                self.refused += 1
                continue
            if times[candidate] < times[best]:
                best, queue = candidate, list(job.neighbours(candidate)) + queue
        return self._decided(best, times, complete)

    def _decided(self, best: Any, times: dict[Any, float], complete: bool) -> Entry:
        """The best, or the default unless the gain is there in a second comparison too."""
        job, default = self.job, self.job.default
        if best != default and times[best] < GAIN * times[default]:
            for config in (default, best):
                times[config] = min(times[config], job.seconds(config))
            if times[best] < GAIN * times[default]:
                return Entry(best, times[best], default, times[default], complete)
        return Entry(default, times[default], default, times[default], complete)


def run(
    jobs: Sequence[Job],
    path: Path,
    gpu: Gpu,
    *,
    budget: float | None = None,
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Tune each job and merge what is found into the file at `path`, at once, so that an interruption loses one job.

    Args:
        jobs: what to tune; those that the file holds are skipped unless `again`, and those that it holds incomplete
            come last.
        budget: seconds, shared evenly by the jobs that are left; no candidate is begun after it. None: no limit.
        clock: seconds now.
        progress: called as the run goes.

    Raises:
        RuntimeError: a default is refused; after all other jobs.
    """
    path = Path(path)
    former = {} if again else known(path, gpu)
    # an entry with another default was found when the heuristic was another
    known_well = {job.key for job in jobs if job.key in former and former[job.key][2::2] == (job.default, True)}
    skipped = [job.key for job in jobs if job.key in known_well]
    todo = [job for job in jobs if job.key not in former]
    todo += [job for job in jobs if job.key in former and job.key not in known_well]
    start, refused = clock(), 0
    tuned: list[Key] = []
    kept: list[Key] = []
    left: list[Key] = []
    broken: list[str] = []
    for i, job in enumerate(todo):
        now = clock()
        if budget is not None and now - start >= budget:
            left = [other.key for other in todo[i:]]
            break
        deadline = None if budget is None else now + (start + budget - now) / (len(todo) - i)

        def over(deadline: float | None = deadline) -> bool:
            return deadline is not None and clock() >= deadline

        def step(done: int = i, key: Key = job.key) -> None:
            if progress is not None:
                elapsed = clock() - start
                by_rate = elapsed / done * (len(todo) - done) if done else None
                by_budget = None if budget is None else max(budget - elapsed, 0.0)
                ends = [end for end in (by_rate, by_budget) if end is not None]
                progress(Progress(done, len(todo), key, elapsed, min(ends, default=None)))

        step()
        search = _Search(job, over, step)
        try:
            entry = search.run()
        except Refused as reason:
            broken.append(f"{job.key}: {reason}")
            continue
        finally:
            refused += search.refused
        merge(path, gpu, {job.key: entry})
        (kept if entry.config == entry.default else tuned).append(job.key)
    if broken:
        raise RuntimeError(f"the default config of {len(broken)} kernels cannot be used: {'; '.join(broken)}")
    return Summary(tuned, kept, skipped, left, refused)
