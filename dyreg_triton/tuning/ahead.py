"""Compiling ahead: other processes fill Triton's cache with the candidates, since compiling is what tuning waits for.

Each runs the op's own host code on tensors without data, with every launch turned into a compilation for the GPU's
target; what a launch on the GPU compiles is then found in Triton's cache. A process reads a task a line, as JSON, and
answers each with a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, cast
from unittest import mock

import torch

from ..gpu import matmul_precision
from .calls import TunedCall
from .keys import Key
from .rooms import ROOMS, from_json, to_json

_MOST = 300.0  # seconds that a candidate's compilation may take, the wait for a free process included


class Compilers:
    """Up to `jobs` processes that compile candidates for `device`."""

    def __init__(self, device: torch.device, jobs: int):
        from triton.runtime import driver

        from ..gpu import device_of

        with device_of(device):
            target = driver.active.get_current_target()
        self._target = [target.backend, target.arch, target.warp_size]
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="compile")
        self._own = threading.local()
        self._processes: list[subprocess.Popen[str]] = []
        self._asked: dict[tuple[Key, Any], Future[None]] = {}
        self._defaults: set[tuple[Key, Any]] = set()

    def begin(self, call: TunedCall, key: Key, config: Any, *, default: bool = False) -> None:
        """Begin to compile the kernels of a call, with this config for the one that `key` names."""
        if default:
            self._defaults.add((key, config))
        if (key, config) in self._asked:
            return
        task = {
            "call": call._asdict(), "key": str(key), "config": to_json(config), "target": self._target,
            "precision": matmul_precision(),
        }  # fmt: skip
        self._asked[key, config] = self._threads.submit(self._ask, json.dumps(task))

    def wait(self, key: Key, config: Any) -> None:
        """Until what was begun is in the cache; TimeoutError if that takes longer than any kernel should."""
        if (key, config) in self._asked:
            self._asked[key, config].result(timeout=_MOST)

    def drop(self, key: Key) -> None:
        """Of the candidates begun for other keys, those that no process has taken on: their search is over."""
        for asked, future in list(self._asked.items()):
            if asked[0] != key and asked not in self._defaults and future.cancel():
                del self._asked[asked]

    def _ask(self, task: str) -> None:
        process: subprocess.Popen[str] | None = getattr(self._own, "process", None)
        if process is None:
            command = [sys.executable, "-c", "from dyreg_triton.tuning.ahead import main; main()"]
            path = os.pathsep.join(p or os.getcwd() for p in sys.path)
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            self._own.process = process
            self._processes.append(process)
        given, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
        with contextlib.suppress(OSError):  # a process that died compiles nothing ahead; the launch will, and say why
            given.write(task + "\n")
            given.flush()
            answers.readline()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.communicate()


class _Driver:
    """Answers what a launch asks of Triton's driver, for a target that this process does not touch."""

    def __init__(self, target: Any, device: int):
        self.target, self.device = target, device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


Seen = Callable[[Any, Any, dict[str, Any], tuple[int, ...]], None]


@contextlib.contextmanager
def compiling(target: Any, device: int = 0, seen: Seen | None = None) -> Iterator[None]:
    """Inside, launches on tensors without data compile for a `GPUTarget`, and no more.

    Triton keeps the kernels of each `device`, a number, apart. `seen` gets each kernel, what it was compiled to, its
    arguments by name, and its grid.
    """
    from triton.runtime import JITFunction, driver

    from .. import dispatch, launch

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        if seen is not None:
            seen(self, compiled, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, grid)
        return compiled

    former = driver._active
    driver.set_active(_Driver(target, device))
    launch.forget()  # what was planned for another target
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(dispatch, "_why_not_triton", return_value=None),
        ):
            yield
    finally:
        driver._active = former
        launch.forget()


def compile_task(task: dict[str, Any]) -> None:
    """Compile what one line asks for."""
    from triton.backends.compiler import GPUTarget

    from ..dispatch import backend
    from ..gpu import family as family_of
    from .lookup import override
    from .problems import Running

    key = Key.parse(task["key"])
    config = from_json(key.op, task["config"])
    device = torch.device("meta")

    def choose(k: Key, _: Any) -> Any:
        return config if k[:2] == key[:2] else ROOMS[k.op].default(k, family)

    torch.set_float32_matmul_precision(task["precision"])
    with compiling(GPUTarget(*task["target"])):
        family = family_of(device)
        with override(choose), backend("triton"), torch.enable_grad():
            Running(TunedCall(**task["call"]), device)()


def main() -> None:
    """Compile a task a line until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked ends this process
    for line in sys.stdin:
        try:
            compile_task(json.loads(line))
        except Exception as error:
            print(f"{type(error).__name__}", flush=True)
        else:
            print("done", flush=True)
