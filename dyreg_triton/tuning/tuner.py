"""Tuning of real kernels: how a config is checked, how it is timed, and the command that does it for many."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from .._core.atomic_files import replacing
from .._core.gpu import family, gpu_of
from .._core.numerics import TOLERANCE
from .._core.validation import what
from ..configs.files import Entry, locked, user_file
from ..configs.keys import Key
from ..configs.lookup import by_distance, forget, override
from ..configs.table import SPACES, to_json
from ..ops.recording import TunedCall
from ..ops.table import OPS
from .ahead import Compilers
from .calls import DTYPES, PRESETS, checked, load, preset
from .engine import Progress, Refused, Summary, known, run
from .problems import Running, case_of, keys_of

Timer = Callable[[Callable[[], None]], float]
_TOLERANCE = {
    "16-bit": TOLERANCE[torch.bfloat16], "float32": TOLERANCE[torch.float32], "tf32": 2e-3,
    "float64": TOLERANCE[torch.float64],
}  # fmt: skip
_INTERPRETED = 3e-2  # of 16 bits: the interpreter stores towards zero
# Frames or clips of a check, whose reference takes memory: it differs from what is timed in how many programs run.
_MOST = {"region": 32, "relational": 2, "bilinear": 2}


class BrokenDevice(RuntimeError):
    """A candidate left the device in a state in which nothing runs any more."""


class Dangerous:
    """Configs that broke the device, one a line in a file beside the tuning file, for the next run to pass over."""

    def __init__(self, path: Path):
        self.tuned, self.path = path, path.with_name(f"{path.name}.dangerous")

    def _text(self) -> str:
        return self.path.read_text(encoding="utf-8") if self.path.is_file() else ""

    def _line(self, item: tuple[str, Any]) -> str:
        return json.dumps([item[0], to_json(item[1])])

    def __contains__(self, item: tuple[str, Any]) -> bool:
        return self._line(item) in self._text().splitlines()

    def add(self, item: tuple[str, Any]) -> None:
        """For good, until the file is removed."""
        with locked(self.tuned), replacing(self.path) as temporary:
            temporary.write_text(f"{self._text()}{self._line(item)}\n", encoding="utf-8")


class KernelJob:
    """One kernel of a call: tries configs of it in the op itself, whose other kernels have their defaults.

    `running` gives the call at full size on the device, `known` what was found so far, `dangerous` what broke it.
    """

    def __init__(
        self,
        call: TunedCall,
        key: Key,
        device: torch.device,
        timer: Timer,
        running: Callable[[], Running],
        known: Callable[[], Mapping[Key, Entry]],
        compilers: Compilers | None,
        dangerous: Dangerous,
    ):
        self.call, self.key, self.device, self.timer = call, key, device, timer
        self.running, self.known, self.compilers, self.dangerous = running, known, compilers, dangerous
        self.space = SPACES[key.op]
        self.default = self.space.default(key, family(device))

    def neighbours(self, config: Any) -> Sequence[Any]:
        """One step away; from the default first what two similar problems gained by."""
        steps = list(self.space.steps(config, self.key))
        if config == self.default:
            gained = {key: entry.config for key, entry in self.known().items() if entry.config != entry.default}
            near = by_distance(self.key, gained)[:2]
            others = [self.space.fitted(gained[key], self.key, family(self.device)) for key in near]
            steps = [*(other for other in others if other != config), *steps]
        if self.compilers is not None:
            self.compilers.drop(self.key)
            for step in steps:
                self.compilers.begin(self.call, self.key, step)
        return steps

    def _with(self, config: Any) -> AbstractContextManager[None]:
        def choose(key: Key, _: Any) -> Any:
            if key[:2] != self.key[:2]:
                return SPACES[key.op].default(key, family(self.device))
            return config if key == self.key else self.space.within(config, key)

        return override(choose)

    def _tolerance(self) -> float:
        rounded = self.key.element == "16-bit" and family(self.device) == "interpreted"
        return _INTERPRETED if rounded else _TOLERANCE[self.key.element]

    def check(self, config: Any) -> None:
        """Outputs and gradients against the float64 reference, in poisoned memory that may not be written to."""
        if (str(self.key), config) in self.dangerous:
            raise Refused("it broke the device in an earlier run")
        try:
            if self.compilers is not None:
                self.compilers.wait(self.key, config)
            self._compare(config)
        except Exception as error:  # whatever stops a compiler or a launch (too much shared memory), or a comparison
            self._survived(config, error)
            raise Refused(f"{type(error).__name__}: {error}"[:500]) from error

    def _survived(self, config: Any, error: Exception) -> None:
        """End the run if the device answers no more: whatever else is tried in this process would fail too."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except Exception as broken:
            self.dangerous.add((str(self.key), config))
            raise BrokenDevice(
                f"{self.key} with {config} broke the device ({error}); what was found before is in the file, and the "
                "same command goes on without this config"
            ) from broken

    def _used(self, op: Callable[..., Any]) -> Callable[..., Any]:
        """The op as this call uses it: what wants no gradient has none, for other kernels run then."""
        call = self.call

        def run(**arguments: Any) -> Any:
            fixed = [] if call.backward in (True, False) else [name for name in call.tensors if not call.wants(name)]
            return op(**{name: a.detach() if name in fixed else a for name, a in arguments.items()})

        return run

    def _compare(self, config: Any) -> None:
        from .._core.dispatch import backend
        from ..testing import check_call

        with self._with(config), backend("triton"):
            spec = OPS[self.call.op]
            check_call(
                self._used(spec.function), self._used(spec.reference), case_of(self.call, _MOST[self.key.op]).call(),
                device=self.device, tolerance=self._tolerance(), opcheck=False, repeat=False,
            )  # fmt: skip

    def seconds(self, config: Any) -> float:
        """Of all launches of this kernel in one forward and backward."""
        from .._core.dispatch import backend
        from ..ops.launch import Launch, watched

        launches: list[tuple[Launch, tuple[Any, ...]]] = []
        backward: list[int] = []  # where the backward's begin
        kinds = self.space.launches(self.key, config)

        def keep(launch: Launch, args: tuple[Any, ...]) -> None:
            if launch.key.op == self.key.op and launch.key.kind in kinds:
                launches.append((launch, args))

        def again() -> None:
            for launch, args in launches:
                launch(*args)

        try:
            with self._with(config), backend("triton"), torch.enable_grad(), watched(keep):
                self.running()(lambda: backward.append(len(launches)))
            if kinds != (self.key.kind,):  # others stand for it, and may stand for something in the other half, too
                of_backward = self.key.kind.startswith("backward")
                launches = launches[backward[0] :] if of_backward else launches[: backward[0]]
            if not launches:
                raise ValueError("nothing is launched")
            found = self.timer(again)
            if not 0 < found < math.inf:
                raise ValueError(f"the timer says {found!r} seconds")
            return found
        except Exception as error:
            self._survived(config, error)
            raise Refused(f"{type(error).__name__}: {error}"[:500]) from error


def device_timer(device: torch.device) -> Timer:
    """Median seconds by the device's clock, of runs that find none of their data in the cache.

    The cache is flushed by writing four times as much, which also keeps the device busy until the host has queued what
    is timed.
    """
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    flushes = 1

    def once(work: Callable[[], None]) -> float:
        nonlocal flushes
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                flush.zero_()
            start.record()
            work()
            late = start.query()  # the device was there before the host had queued the work: that would be timed too
            end.record()
            end.synchronize()
            if not late or flushes >= 64:
                return start.elapsed_time(end) / 1e3
            flushes *= 2

    def timer(work: Callable[[], None]) -> float:
        with torch.cuda.device(device):
            once(work)
            rough = once(work)
            return statistics.median(once(work) for _ in range(max(5, min(25, int(0.05 / max(rough, 1e-9))))))

    return timer


def tune(
    calls: Sequence[TunedCall] | None = None,
    *,
    shapes: str | os.PathLike[str] = "papers",
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    budget: float | None = None,
    path: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    again: bool = False,
    jobs: int | None = None,
    timer: Timer | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Measure which launch configs are fastest, kernel by kernel, and write them to a tuning file.

    Every config is first checked: outputs and gradients against the float64 reference, in poisoned memory. One that
    does not compile, needs more shared memory than the device has, or is wrong, is passed over. The default stays
    unless another is more than 3 % faster. What is found is in the file at once, so an interruption at any moment
    loses one kernel at most; the same call goes on.

    Args:
        calls: what to tune for, as `recording` gives it; None: those of `shapes`.
        shapes: "papers", "quick", or a JSON file of calls (`tuning.calls.save`).
        ops: "region", "relational", "bilinear"; None: all.
        dtypes: of the presets.
        budget: seconds; None: no limit.
        path: the file; None: the user's, which lookups read.
        device: CUDA, or the CPU under Triton's interpreter; None: "cuda".
        again: also what the file already holds.
        jobs: processes that compile ahead, which is what tuning waits for; 0: none; None: one for each core but one, up
            to 16, where the device's clock is the timer.
        timer: from a function that launches the kernel to seconds; None: the device's clock.
        progress: called as it goes.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
        RuntimeError: kernels cannot run on the device, or a default config is wrong there.
    """
    wanted = _calls(calls, shapes, ops, dtypes)
    if budget is not None and (type(budget) not in (int, float) or not 0 < budget < math.inf):
        raise ValueError(f"tune: budget is {what(budget)}; accepted is a number of seconds > 0, or None")
    if jobs is not None and (type(jobs) is not int or not 0 <= jobs <= 256):
        raise ValueError(f"tune: jobs is {what(jobs)}; accepted is a number of processes from 0 to 256, or None")
    chosen = usable_device(device)
    if timer is None and chosen.type != "cuda":
        raise RuntimeError(
            f"tune: device is {str(chosen)!r}, where kernels are interpreted, not timed; accepted is a GPU"
        )
    gpu = gpu_of(chosen)
    target = _writable(path if path is not None else user_file(gpu))
    if chosen.type != "cuda":
        jobs = 0  # nothing is compiled
    elif jobs is None:
        jobs = min(16, max((os.cpu_count() or 1) - 1, 0)) if timer is None else 0
    compilers = Compilers(chosen, jobs) if jobs else None
    try:
        found = Dangerous(target)
        searches = _jobs(wanted, chosen, timer or device_timer(chosen), lambda: known(target, gpu), compilers, found)
        return run(searches, target, gpu, budget=budget, again=again, progress=progress)
    finally:
        if compilers is not None:
            compilers.close()
        forget()


def _writable(path: str | os.PathLike[str]) -> Path:
    """The path of a file, once it is clear that it can be written: before hours of measuring."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"tune: path is {what(path)}; accepted is the path of a file, or None")
    target = Path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"tune: path is {str(path)!r}; accepted is a file that can be written: {error}") from error
    return target


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device to tune on; RuntimeError with the reason where kernels cannot run there."""
    from .._core.dispatch import can_run
    from .._core.validation import as_device

    chosen = as_device("tune", "cuda" if device is None else device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"tune: device is {str(chosen)!r}, but torch sees no GPU here; tuning measures on the GPU")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    can_run("triton", device=chosen, dtype=torch.float32, raise_error=True)
    return chosen


def _calls(
    calls: Sequence[TunedCall] | None, shapes: str | os.PathLike[str], ops: Sequence[str] | None, dtypes: Sequence[str]
) -> list[TunedCall]:
    if calls is not None:
        if not isinstance(calls, (list, tuple)) or not all(isinstance(call, TunedCall) for call in calls):
            raise TypeError(f"tune: calls is {what(calls)}; accepted is a list of TunedCall")
        for i, call in enumerate(calls):
            try:
                checked(call._asdict())
            except ValueError as error:
                raise ValueError(f"tune: calls[{i}] is {call}: {error}") from error
    if not isinstance(shapes, (str, os.PathLike)):
        raise TypeError(f"tune: shapes is {what(shapes)}; accepted are {', '.join(PRESETS)}, and a path")
    for name, values, accepted in (("ops", ops, tuple(SPACES)), ("dtypes", dtypes, DTYPES[:3])):
        if values is not None and (
            not isinstance(values, (list, tuple, set)) or not values or any(v not in accepted for v in values)
        ):
            raise ValueError(f"tune: {name} is {values!r}; accepted are some of {', '.join(accepted)}")
    if calls is None:
        calls = preset(str(shapes), dtypes) if shapes in PRESETS else load(shapes)
    chosen = [call for call in calls if ops is None or OPS[call.op].space.keys.op in ops]
    if not chosen:
        raise ValueError(f"tune: calls has none of {ops or 'any op'}: there is nothing to tune")
    return chosen


def _jobs(
    calls: Sequence[TunedCall],
    device: torch.device,
    timer: Timer,
    known: Callable[[], Mapping[Key, Entry]],
    compilers: Compilers | None,
    dangerous: Dangerous,
) -> list[KernelJob]:
    """A job for every key, of the first call that has it; the tensors of one call at a time are there."""
    jobs: dict[Key, KernelJob] = {}
    held: dict[int, Running] = {}
    for i, call in enumerate(calls):

        def running(i: int = i, call: TunedCall = call) -> Running:
            if i not in held:
                held.clear()
                held[i] = Running(call, device)
            return held[i]

        for key in keys_of(call, family(device)):
            jobs.setdefault(key, KernelJob(call, key, device, timer, running, known, compilers, dangerous))
            if compilers is not None:  # the first begins to compile the call's other kernels too
                compilers.begin(call, key, jobs[key].default, default=True)
    return list(jobs.values())
