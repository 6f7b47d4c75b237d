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
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, cast

import torch

from .._core.gpu import matmul_precision
from ..configs.keys import Key
from ..configs.table import SPACES, from_json, to_json
from .calls import TunedCall

_MOST = 300.0  # seconds that a candidate's compilation may take, the wait for a free process included


class Compilers:
    """Up to `jobs` processes that compile candidates for `device`."""

    def __init__(self, device: torch.device, jobs: int):
        from triton.runtime import driver

        from .._core.gpu import device_of

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


def compile_task(task: dict[str, Any]) -> None:
    """Compile what one line asks for."""
    from triton.backends.compiler import GPUTarget

    from .._core.dispatch import backend
    from .._core.gpu import family as family_of
    from ..configs.lookup import override
    from ..ops.launch import compiling
    from .problems import Running

    key = Key.parse(task["key"])
    config = from_json(key.op, task["config"])
    device = torch.device("meta")

    def choose(k: Key, _: Any) -> Any:
        return config if k[:2] == key[:2] else SPACES[k.op].default(k, family)

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
