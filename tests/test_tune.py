"""Tuning real kernels with a stand-in timer, recording what a model calls, and both from the shell."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import DEVICE, INTERPRETED, awake
from tuning_cases import BILINEAR_KINDS, collected, without_files, written

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton._core.gpu import Gpu, family, gpu_of
from dyreg_triton.cli import main
from dyreg_triton.configs import files
from dyreg_triton.configs.files import user_file
from dyreg_triton.configs.table import SPACES
from dyreg_triton.ops.launch import Launch, watched
from dyreg_triton.tuning import BilinearConfig, Config, Key, TunedCall, calls
from dyreg_triton.tuning.engine import Refused
from dyreg_triton.tuning.problems import Running, case_of, keys_of
from dyreg_triton.tuning.tuner import KernelJob


@pytest.fixture(autouse=True)
def _no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with without_files(tmp_path, monkeypatch):
        yield


@pytest.fixture
def gpu() -> Gpu:
    return gpu_of(DEVICE)


def number(of: Any) -> int:
    return of if isinstance(of, int) else len(of)


def counts(summary: Any) -> tuple[int, int, int, int]:
    return tuple(number(getattr(summary, name)) for name in ("tuned", "kept", "skipped", "left"))  # type: ignore


# --- real jobs, with a stand-in timer -------------------------------------------------------------------------------


def spec(*shape: int, dtype: str = "float32", layout: str = "contiguous") -> dict[str, Any]:
    return {"shape": list(shape), "dtype": dtype, "layout": layout}


POOL = TunedCall("region_pool", {"x": spec(1, 20, 3, 4), "regions": spec(1, 2, 4)}, {"profile": "linear"}, True)
REMAP = TunedCall(
    "region_remap", {"nodes": spec(1, 2, 20), "regions": spec(1, 2, 4)}, {"size": [3, 4], "profile": "linear"}, True
)
KERNEL = TunedCall("region_kernel", {"regions": spec(1, 2, 4)}, {"size": [3, 4], "profile": "gaussian"}, True)
RSA_SHAPES = {
    "q": (1, 2, 4, 1, 2, 3), "k": (1, 4, 1, 2, 3), "v": (1, 4, 1, 2, 3), "h2": (5, 1, 3, 3), "h1": (4, 5, 1, 3, 3),
    "p1": (4, 5), "g": (4, 1, 3, 3), "identity": (4, 4),
}  # fmt: skip
ATTEND = TunedCall("relational_attention", {n: spec(*s) for n, s in RSA_SHAPES.items()}, {"eps": 1e-6}, True)
TRANSFORM = TunedCall(
    "bilinear_transform",
    {"x": spec(1, 4, 2, 2, 4), "p": spec(1, 2, 2, 2, 2), "q": spec(1, 2, 2, 2, 2), "t": spec(1, 1, 2, 2)}, {}, True,
)  # fmt: skip
SPACE = TRANSFORM._replace(tensors={name: TRANSFORM.tensors[name] for name in "xpq"})
# too many frames and cells to be held at once
LARGE = TRANSFORM._replace(
    tensors={"x": spec(1, 1, 64, 9, 8), "p": spec(1, 1, 64, 9, 9), "q": spec(1, 1, 64, 8, 8), "t": spec(1, 1, 64, 64)}
)
PASSES = {"forward_mixed": {"forward", "mix"}, "backward_mixed": {"mix_backward", "forward", "backward"}}
KINDS = {
    "bilinear_transform": {"forward_mixed", "backward_mixed"},
    "region_pool": {"gather", "scatter_moments"},
    "region_remap": {"scatter", "gather_moments"},
    "region_kernel": {"dense", "dense_moments"},
    "relational_attention": {"pack", "forward", "backward", "fold_keys", "fold_values", "by_h1", "by_h2"},
}


def timer(seconds: Callable[[Launch], float] = lambda launch: 1e-5) -> Callable[[Callable[[], None]], float]:
    """A stand-in that runs the candidate once and says what `seconds` says of its launches."""

    def time(run: Callable[[], None]) -> float:
        launches: list[Launch] = []
        with watched(lambda launch, _: launches.append(launch)):
            run()
        kinds = {launch.key.kind for launch in launches}
        assert len(kinds) == 1 or kinds in PASSES.values(), "what is timed is another kernel too, or none"
        return sum(map(seconds, launches))

    return time


def wide(launch: Launch) -> float:
    """Faster the more channels a program takes."""
    return 1e-5 / launch.constants["BLOCK_C"]


@pytest.mark.kernels
@pytest.mark.parametrize("call", [POOL, REMAP, KERNEL, ATTEND, TRANSFORM], ids=lambda call: call.op)
def test_defaults_are_kept(tmp_path: Path, gpu: Gpu, call: TunedCall) -> None:
    """Where nothing is faster: an entry for every kernel of the call, forward and backward."""
    path, seen = tmp_path / "a.json", []
    # all but the smallest call only with its defaults
    few = mock.patch.object(KernelJob, "neighbours", return_value=()) if call != POOL else nullcontext()
    with few:
        summary = tuning.tune([call], path=path, device=DEVICE, timer=timer(), progress=seen.append)
    found = files.read(path, gpu)
    assert {key.kind for key in found} == KINDS[call.op]
    assert counts(summary) == (0, len(found), 0, 0)
    assert {p.key for p in seen if p.key is not None} == set(found)
    for key, said in found.items():
        origin = tuning.origin(key, DEVICE)
        assert origin.source == "heuristic"
        assert said.config == said.default == origin.config
        assert said.complete
    assert counts(tuning.tune([call], path=path, device=DEVICE, timer=timer())) == (0, 0, len(found), 0)


@pytest.mark.kernels
@pytest.mark.parametrize("call", [POOL, REMAP, KERNEL, ATTEND, TRANSFORM], ids=lambda call: call.op)
def test_no_backward_is_not_tuned(tmp_path: Path, gpu: Gpu, call: TunedCall) -> None:
    forward = call._replace(backward=False)
    with mock.patch.object(KernelJob, "neighbours", return_value=()):
        tuning.tune([forward], path=tmp_path / "a.json", device=DEVICE, timer=timer())
    kinds = {key.kind for key in files.read(tmp_path / "a.json", gpu)}
    assert kinds == KINDS[call.op] & FORWARD


FORWARD = {"gather", "scatter", "dense", "pack", "forward", "forward_mixed"}


def of_dtype(call: TunedCall, dtype: str) -> TunedCall:
    """A call of which all tensors but the regions are of a dtype."""
    same = {name: said if name == "regions" else {**said, "dtype": dtype} for name, said in call.tensors.items()}
    return call._replace(tensors=same)


FORMS = {
    "bfloat16": of_dtype(POOL, "bfloat16"),
    "float16": of_dtype(POOL, "float16"),
    "attention in bfloat16": of_dtype(ATTEND, "bfloat16")._replace(backward=False),
    "channels last": POOL._replace(tensors={**POOL.tensors, "x": spec(1, 20, 3, 4, layout="channels_last")}),
    "clips of frames": POOL._replace(tensors={"x": spec(2, 1, 5, 3, 4), "regions": spec(2, 1, 2, 4)}),
    "log-linear": REMAP._replace(options={"size": [3, 4], "profile": "log-linear", "temperature": 2.0}),
    "no options": POOL._replace(options={}),
    "a kernel": KERNEL,
    "many nodes": POOL._replace(tensors={"x": spec(1, 5, 3, 4), "regions": spec(1, 40, 4)}),
    "a transform": TRANSFORM,
    "a transform in bfloat16": of_dtype(TRANSFORM, "bfloat16"),
    "a transform in float16 by float32": TRANSFORM._replace(
        tensors={**TRANSFORM.tensors, "x": spec(1, 4, 2, 2, 4, dtype="float16")}
    ),
    "a transform in channels last": TRANSFORM._replace(
        tensors={**TRANSFORM.tensors, "x": spec(1, 4, 2, 2, 4, layout="channels_last")}
    ),
    "a transform in space": SPACE,
    "a transform of many frames": LARGE._replace(backward=False),
    "attention by values": ATTEND._replace(
        tensors={name: ATTEND.tensors[name] for name in ("q", "v", "p1", "h2")}, options={}, backward=False
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize("case", FORMS)
def test_calls_of_every_form(tmp_path: Path, gpu: Gpu, case: str) -> None:
    """The default is right for each, and timed under the keys that a launch asks for."""
    launches: list[Launch] = []

    def time(run: Callable[[], None]) -> float:
        with watched(lambda launch, _: launches.append(launch)):
            run()
        return 1e-5

    with mock.patch.object(KernelJob, "neighbours", return_value=()):
        tuning.tune([FORMS[case]], path=tmp_path / "a.json", device=DEVICE, timer=time)
    found = set(files.read(tmp_path / "a.json", gpu))
    assert found == {launch.key for launch in launches}
    kinds = KINDS[FORMS[case].op]
    if case == "many nodes":
        kinds = {"gather", "scatter", "gather_moments"}
    elif case == "a transform in space":
        kinds = {"forward", "backward"}
    elif case == "a transform of many frames":
        kinds = {"forward", "mix"}
    assert {key.kind for key in found} == (kinds if FORMS[case].backward else kinds & {*FORWARD, "mix"})


@pytest.mark.kernels
def test_other_kernels_of_a_call_have_their_defaults(tmp_path: Path, gpu: Gpu) -> None:
    """Whatever the user's file says of them: it may be what does not work."""
    some = tuning.region_key("scatter_moments", 1, 2, 20, 12, torch.empty(0))
    unlike = Config(16, 16, 16, 1)
    assert tuning.origin(some, DEVICE).config.num_warps != 1
    written(user_file(gpu), {some: unlike}, gpu)
    tuning.forget()
    assert tuning.origin(some, DEVICE).config == unlike
    others: list[tuple[str, int, int]] = []
    check, at_work = KernelJob.check, [""]

    def checked(job: KernelJob, config: Config) -> None:
        at_work[0] = job.key.kind
        check(job, config)

    def watch(launch: Launch, _: tuple) -> None:
        if launch.key.kind != at_work[0]:
            others.append((launch.key.kind, launch.constants["BLOCK_C"], launch.constants["num_warps"]))

    candidate = mock.patch.object(KernelJob, "neighbours", return_value=[Config(16, 32, 16, 2)])
    with mock.patch.object(KernelJob, "check", checked), candidate, watched(watch):
        tuning.tune([POOL], path=tmp_path / "a.json", device=DEVICE, timer=timer())
    assert set(others) == {
        (key.kind, said.default.block_c, said.default.num_warps)
        for key, said in files.read(tmp_path / "a.json", gpu).items()
    }


@pytest.mark.kernels
def test_other_kernels_of_a_transform_have_their_defaults(tmp_path: Path, gpu: Gpu) -> None:
    """Whatever the user's file says of the forward, the backward is checked and timed beside the default one."""
    some = keys_of(TRANSFORM, family(DEVICE))[0]
    written(user_file(gpu), {some: BilinearConfig(fused=False)}, gpu)
    tuning.forget()
    assert not tuning.origin(some, DEVICE).config.fused
    launches: list[Launch] = []
    none = mock.patch.object(KernelJob, "neighbours", return_value=())
    with none, watched(lambda launch, _: launches.append(launch)):
        tuning.tune([TRANSFORM], path=tmp_path / "a.json", device=DEVICE, timer=timer())
    assert {launch.key.kind for launch in launches} == {"forward_mixed", "backward_mixed"}


@pytest.mark.kernels
def test_begins_with_what_similar_problems_gained_by(tmp_path: Path) -> None:
    first, second = (
        POOL._replace(tensors={"x": spec(n, 20, 3, 4), "regions": spec(n, 2, 4)}, backward=False) for n in (1, 2)
    )
    checked: list[tuple[int, Config]] = []

    def noted(job: KernelJob, config: Config) -> None:
        checked.append((job.key.sizes[0], config))

    def time(run: Callable[[], None]) -> float:  # eight warps are the best, and two steps away
        launches: list[Launch] = []
        with watched(lambda launch, _: launches.append(launch)):
            run()
        constants = launches[-1].constants
        return 1e-5 / constants["BLOCK_C"] + 1e-7 * abs(constants["num_warps"] - 8)

    with mock.patch.object(KernelJob, "check", noted):
        tuning.tune([first, second], path=tmp_path / "a.json", device=DEVICE, timer=time)
    found = {key.sizes[0]: said for key, said in files.read(tmp_path / "a.json", gpu_of(DEVICE)).items()}
    assert found[1].config != found[1].default
    assert [config for n, config in checked if n == 2][:2] == [found[2].default, found[1].config]
    assert found[2].config == found[1].config


@pytest.mark.kernels
def test_what_is_faster_is_written(tmp_path: Path, gpu: Gpu) -> None:
    path = tmp_path / "a.json"
    summary = tuning.tune([POOL], path=path, device=DEVICE, timer=timer(wide))
    found = files.read(path, gpu)
    assert number(summary.tuned) + number(summary.kept) == 2
    for said in found.values():
        assert said.config.block_c == 32  # twenty channels
        assert said.seconds <= said.default_seconds
    x, regions = torch.randn(1, 20, 3, 4, device=DEVICE), torch.rand(1, 2, 4, device=DEVICE) + 1
    launches: list[Launch] = []
    with tuning.use(path), dt.backend("triton"), watched(lambda launch, _: launches.append(launch)):
        dt.ops.region_pool(x, regions)
    assert launches[-1].constants["BLOCK_C"] == 32


# --- a key that several launches may stand for ----------------------------------------------------------------------


class Clock:
    """A stand-in timer that notes what it runs, and says what `seconds` says of each kind of kernel."""

    def __init__(self, **seconds: float):
        self.seconds, self.runs = seconds, []  # the runs: kinds of the launches, in order

    def __call__(self, run: Callable[[], None]) -> float:
        launches: list[Launch] = []
        with watched(lambda launch, _: launches.append(launch)):
            run()
        self.runs.append([launch.key.kind for launch in launches])
        return sum(self.seconds.get(kind, 1e-5) for kind in self.runs[-1])


def in_passes(job: KernelJob, config: Any) -> list[Any]:
    """The other way of mixing frames, where there is one, as the only candidate."""
    return [dataclasses.replace(config, fused=False)] if job.key.kind.endswith("mixed") and config.fused else []


# milliseconds of each pass, and whether they are faster than ten in one pass
PACES = {
    "all fast": ({"forward": 2, "mix": 2, "mix_backward": 2, "backward": 2}, True, True),
    "a slow mix": ({"forward": 2, "mix": 9, "mix_backward": 2, "backward": 2}, False, True),
    "a slow mix of the backward": ({"forward": 2, "mix": 2, "mix_backward": 9, "backward": 2}, True, False),
    "a slow backward": ({"forward": 2, "mix": 2, "mix_backward": 2, "backward": 9}, True, False),
    "a slow forward": ({"forward": 9, "mix": 2, "mix_backward": 2, "backward": 2}, False, False),
    "slow in all": ({"forward": 6, "mix": 6, "mix_backward": 4, "backward": 4}, False, False),
}


@pytest.mark.kernels
@pytest.mark.parametrize("case", PACES)
def test_passes_are_timed_together(tmp_path: Path, gpu: Gpu, case: str) -> None:
    """All launches that stand for a candidate that mixes frames in passes, and no others; then it is what runs."""
    pace, forward, backward = PACES[case]
    clock = Clock(**{kind: n * 1e-3 for kind, n in pace.items()}, forward_mixed=1e-2, backward_mixed=1e-2)
    path = tmp_path / "a.json"
    with mock.patch.object(KernelJob, "neighbours", in_passes):
        summary = tuning.tune([TRANSFORM], path=path, device=DEVICE, timer=clock)
    assert number(summary.refused) == 0
    orders = {tuple(sorted(run)) for run in clock.runs}
    assert orders == {
        ("forward_mixed",), ("backward_mixed",), ("forward", "mix"), ("backward", "forward", "mix_backward"),
    }  # fmt: skip
    found = {key.kind: said for key, said in files.read(path, gpu).items()}
    assert {kind: not said.config.fused for kind, said in found.items()} == {
        "forward_mixed": forward, "backward_mixed": backward,
    }  # fmt: skip
    for kind, said in found.items():
        passes = sum(pace[name] for name in PASSES[kind]) * 1e-3
        assert said.seconds == pytest.approx(passes if not said.config.fused else 1e-2, rel=1e-3)
        assert said.default.fused
        assert said.default_seconds == pytest.approx(1e-2)
    launches: list[Launch] = []
    with tuning.use(path), dt.backend("triton"), watched(lambda launch, _: launches.append(launch)):
        Running(TRANSFORM, DEVICE)()
    kinds = (PASSES["forward_mixed"] if forward else {"forward_mixed"}) | (
        PASSES["backward_mixed"] if backward else {"backward_mixed"}
    )
    assert {launch.key.kind for launch in launches} == kinds


@pytest.mark.kernels
@pytest.mark.parametrize("wanted", [["t"], ["x"], ["p", "q"], ["x", "t"]], ids="+".join)
def test_only_passes_that_run_are_timed(tmp_path: Path, gpu: Gpu, wanted: list[str]) -> None:
    """Of a call of which not all gradients are wanted."""
    clock, path = Clock(backward_mixed=1.0), tmp_path / "a.json"
    with mock.patch.object(KernelJob, "neighbours", in_passes):
        tuning.tune([TRANSFORM._replace(backward=wanted)], path=path, device=DEVICE, timer=clock)
    passes = ["backward"] * (wanted != ["t"]) + ["forward"] * ("t" in wanted) + ["mix_backward"]
    assert {tuple(sorted(run)) for run in clock.runs if "mix_backward" in run} == {tuple(passes)}
    found = {key.kind: said for key, said in files.read(path, gpu).items()}
    assert not found["backward_mixed"].config.fused


@contextmanager
def passes_by_default(*kinds: str) -> Iterator[None]:
    """As where the heuristic mixes frames in passes for these kinds, and in the same pass for others."""
    space = SPACES["bilinear"]

    def default(key: Key, family: str) -> Any:
        return dataclasses.replace(space.default(key, family), fused=key.kind not in kinds)

    with mock.patch.dict(SPACES, bilinear=dataclasses.replace(space, default=default)):
        tuning.forget()
        yield
    tuning.forget()


@pytest.mark.kernels
def test_the_backward_in_passes_is_not_timed_as_the_forward(tmp_path: Path) -> None:
    """It runs the forward's kernel once more, which is none of the forward's launches."""
    clock = Clock()
    with passes_by_default("backward_mixed"), mock.patch.object(KernelJob, "neighbours", in_passes):
        tuning.tune([TRANSFORM], path=tmp_path / "a.json", device=DEVICE, timer=clock)
    of_the_forward = {tuple(sorted(run)) for run in clock.runs if "mix" in run}
    assert of_the_forward == {("forward", "mix")}


@pytest.mark.kernels
def test_the_forward_in_passes_is_not_timed_as_the_backward(tmp_path: Path) -> None:
    """The other way round."""
    clock = Clock()
    with passes_by_default("forward_mixed"), mock.patch.object(KernelJob, "neighbours", in_passes):
        tuning.tune([TRANSFORM], path=tmp_path / "a.json", device=DEVICE, timer=clock)
    of_the_backward = {tuple(sorted(run)) for run in clock.runs if "mix_backward" in run}
    assert of_the_backward == {("backward", "forward", "mix_backward")}


@pytest.mark.kernels
@pytest.mark.parametrize("backward", [True, False])
def test_a_call_in_passes_is_tuned_pass_by_pass(tmp_path: Path, gpu: Gpu, backward: bool) -> None:
    """Where the heuristic says so: each pass has a config of its own."""
    path = tmp_path / "a.json"
    with (
        passes_by_default("forward_mixed", "backward_mixed"),
        mock.patch.object(KernelJob, "neighbours", return_value=()),
    ):
        tuning.tune([TRANSFORM._replace(backward=backward)], path=path, device=DEVICE, timer=timer())
        found = {key.kind for key in files.read(path, gpu)}
    assert found == (set(BILINEAR_KINDS) - set(PASSES) if backward else PASSES["forward_mixed"])


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["forward", "mix", "mix_backward", "backward"])
def test_a_wrong_pass_is_refused(tmp_path: Path, gpu: Gpu, kind: str) -> None:
    """Whichever of those that stand for a candidate it is."""
    place = {"forward": 4, "mix": 3, "mix_backward": 3, "backward": 5}[kind]  # what the kernel writes
    clock, path = Clock(forward_mixed=1.0, backward_mixed=1.0), tmp_path / "a.json"
    spoil = spoilt(lambda args: args[place].mul_(1.01), lambda launch: launch.key.kind == kind)
    with spoil, mock.patch.object(KernelJob, "neighbours", in_passes):
        summary = tuning.tune([TRANSFORM], path=path, device=DEVICE, timer=clock)
    kept = {mixed for mixed, passes in PASSES.items() if kind in passes}
    assert number(summary.refused) == len(kept)
    found = {key.kind: said.config.fused for key, said in files.read(path, gpu).items()}
    assert found == {mixed: mixed in kept for mixed in PASSES}


@pytest.mark.kernels
def test_a_transform_is_searched(tmp_path: Path, gpu: Gpu) -> None:
    """Step by step from the default, by real neighbours: here to tiles of one column, by two products."""
    seen: set[tuple[bool, int]] = set()

    def time(run: Callable[[], None]) -> float:
        launches: list[Launch] = []
        with watched(lambda launch, _: launches.append(launch)):
            run()
        constants = launches[-1].constants
        seen.add((constants["JOINT"], constants["BLOCK_N"]))
        return 1e-5 * (constants["BLOCK_N"] + 5 * constants["JOINT"]) * 2 ** abs(constants["STEPS"] - 1)

    sizes = {"x": spec(1, 16, 1, 2, 4), "p": spec(1, 2, 1, 2, 2), "q": spec(1, 2, 1, 2, 2)}
    call = SPACE._replace(tensors=sizes, backward=False)  # sixteen columns
    summary = tuning.tune([call], path=tmp_path / "a.json", device=DEVICE, timer=time)
    (said,) = files.read(tmp_path / "a.json", gpu).values()
    assert number(summary.refused) == 0
    assert (said.config.block_n, said.config.joint) == (1, False)
    assert {(True, 16), (False, 16), (False, 8), (False, 1)} <= seen
    assert said.complete


# --- what is wrong is not taken -------------------------------------------------------------------------------------


def spoilt(how: Callable[[tuple], object], only: Callable[[Launch], bool]) -> Any:
    """Launches of which `only` says so do something besides."""
    real = Launch._launch

    def launch(self: Launch, args: tuple[Any, ...]) -> None:
        real(self, args)
        if only(self):
            how(args)

    return mock.patch.object(Launch, "_launch", launch)


def is_wide(launch: Launch) -> bool:
    return launch.key.kind == "gather" and launch.constants["BLOCK_C"] >= 32


def fail(_: tuple) -> None:
    raise RuntimeError("PassManager::run failed")


# arguments of the gather kernel: the map, node features, regions, pooled nodes, rows of moments, temperature
WRONG: dict[str, Callable[[tuple], object]] = {
    "does not compile": fail,
    "wrong numbers": lambda args: args[3].mul_(1.01),
    "one wrong number": lambda args: args[3].view(-1)[-1].add_(1),
    "not written": lambda args: args[3].fill_(math.nan),
    "an input is written": lambda args: args[0].view(-1)[0].add_(1),
    "memory before the output": lambda args: outside(args[3], -1),
    "memory behind the output": lambda args: outside(args[3], args[3].numel()),
    "memory before the input": lambda args: outside(args[0], -1),
}


def outside(tensor: torch.Tensor, place: int) -> None:
    """Write beside a tensor."""
    tensor.as_strided((1,), (1,), tensor.storage_offset() + place).fill_(0.5)


@pytest.mark.kernels
@pytest.mark.parametrize("case", [*WRONG, "nothing"])
def test_what_is_wrong_is_refused(tmp_path: Path, gpu: Gpu, case: str) -> None:
    """However fast it is said to be."""
    path, candidate = tmp_path / "a.json", [Config(16, 32, 16)]
    with spoilt(WRONG.get(case, len), is_wide), mock.patch.object(KernelJob, "neighbours", return_value=candidate):
        summary = tuning.tune([POOL._replace(backward=False)], path=path, device=DEVICE, timer=timer(wide))
    (said,) = files.read(path, gpu).values()
    assert said.complete
    if case == "nothing":
        assert (number(summary.refused), said.config) == (0, candidate[0])
    else:
        assert (number(summary.refused), said.config) == (1, said.default)


@pytest.mark.kernels
def test_a_wrong_default_is_an_error(tmp_path: Path, gpu: Gpu) -> None:
    """It names the kernel; other calls are tuned."""
    path, other = tmp_path / "a.json", KERNEL._replace(backward=False)
    with (
        spoilt(lambda args: args[3].mul_(1.01), lambda launch: launch.key.kind == "gather"),
        pytest.raises(RuntimeError, match=r"region\.gather"),
    ):
        tuning.tune([POOL, other], path=path, device=DEVICE, timer=timer())
    assert {key.kind for key in files.read(path, gpu)} == {"dense"}


@pytest.mark.kernels
def test_tune_writes_the_users_file(gpu: Gpu) -> None:
    """Which the next call reads, in this process too."""
    some = tuning.region_key("gather", 1, 2, 20, 12, torch.empty(0, device=DEVICE))
    before = tuning.config(some, torch.empty(0, device=DEVICE))
    with mock.patch.object(KernelJob, "neighbours", return_value=[Config(16, 32, 16)]):
        tuning.tune([POOL._replace(backward=False)], device=DEVICE, timer=timer(wide))
    assert set(files.read(user_file(gpu), gpu)) == {some}
    assert tuning.config(some, torch.empty(0, device=DEVICE)) == Config(16, 32, 16) != before
    assert tuning.origin(some, DEVICE).source == "user"


@pytest.mark.kernels
def test_ops_and_dtypes_of_a_preset(tmp_path: Path, gpu: Gpu) -> None:
    """No time for any: it is counted how many there are."""
    left = {}
    for ops in (None, *([op] for op in SPACES), ["bilinear", "region"]):
        for dtypes in (("float32",), ("bfloat16",), ("bfloat16", "float32")):
            summary = tuning.tune(
                shapes="quick", ops=ops, dtypes=dtypes, budget=1e-9, path=tmp_path / "a.json", device=DEVICE,
                timer=lambda run: 1e-5, again=True,
            )  # fmt: skip
            left[ops and "+".join(ops), dtypes] = sum(counts(summary))
    for dtypes in (("float32",), ("bfloat16",), ("bfloat16", "float32")):
        assert all(left[op, dtypes] > 0 for op in SPACES)
        assert left[None, dtypes] == sum(left[op, dtypes] for op in ("region", "relational", "bilinear"))
        assert left["bilinear+region", dtypes] == left["bilinear", dtypes] + left["region", dtypes]
    for ops in (None, *SPACES):
        assert left[ops, ("bfloat16", "float32")] == left[ops, ("bfloat16",)] + left[ops, ("float32",)]


def test_only_features_lie_channels_last() -> None:
    fields = TRANSFORM._asdict()
    fields["tensors"] = {**fields["tensors"], "p": {**fields["tensors"]["p"], "layout": "channels_last"}}
    with pytest.raises(ValueError, match="accepted is the layout contiguous of p"):
        calls.checked(fields)


@pytest.mark.parametrize("name", calls.PRESETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_transforms_of_a_preset(name: str, dtype: str) -> None:
    """With frames mixed and not, backward too, by float32 matrices; each is a call that the op takes."""
    found = [call for call in calls.preset(name, [dtype]) if call.op == "bilinear_transform"]
    assert {"t" in call.tensors for call in found} == {True, False}
    assert all(call.backward is True and call.options == {} for call in found)
    for call in found:
        assert calls.checked(json.loads(json.dumps(call._asdict()))) == call
        dtypes = {tensor: said["dtype"] for tensor, said in call.tensors.items()}
        assert dtypes == {tensor: dtype if tensor == "x" else "float32" for tensor in call.tensors}
        assert keys_of(call, "nvidia")
    sides = {shapes(call)["x"][-1] for call in found}
    assert sides == ({28, 14} if name == "papers" else {14})
    assert calls.preset(name, [dtype, "float64"])[: len(calls.preset(name, [dtype]))] == calls.preset(name, [dtype])


# --- what tune refuses ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="asks for what is not here")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_no_device_to_tune_on(tmp_path: Path, device: str) -> None:
    with pytest.raises(RuntimeError) as refusal:
        tuning.tune([POOL], path=tmp_path / "a.json", device=device, timer=lambda run: 1.0)
    assert len(str(refusal.value)) > 20
    assert not list(tmp_path.iterdir())


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"ops": ["trilinear"]}, ValueError),
        ({"ops": ["bilinear", "bilinear_transform"]}, ValueError),
        ({"ops": []}, ValueError),
        ({"dtypes": ("int64",)}, ValueError),
        ({"dtypes": ()}, ValueError),
        ({"shapes": "papyrus"}, ValueError),
        ({"budget": -1}, ValueError),
        ({"budget": "5m"}, (TypeError, ValueError)),
        ({"budget": math.nan}, ValueError),
        ({"calls": [3]}, (TypeError, ValueError)),
    ],
    ids=str,
)
def test_arguments_that_are_refused(tmp_path: Path, arguments: dict[str, Any], error: Any) -> None:
    with pytest.raises(error) as refusal:
        tuning.tune(**{"path": tmp_path / "a.json", "device": DEVICE, "timer": lambda run: 1.0, **arguments})
    (name,) = arguments
    assert name in str(refusal.value)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.kernels
@pytest.mark.parametrize("place", ["a folder", "in a file", "/proc/none.json"])
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    path = {"a folder": tmp_path, "in a file": tmp_path / "file" / "a.json"}.get(place, Path(place))
    with pytest.raises(ValueError, match="path") as refusal:
        tuning.tune([POOL], path=path, device=DEVICE, timer=lambda run: pytest.fail("it is measured"))
    assert str(path) in str(refusal.value)


def test_a_config_that_breaks_the_device_ends_the_run(tmp_path: Path) -> None:
    """What is tried after it in this process would fail too; the next run passes it over."""
    from dyreg_triton.tuning import tuner

    key, config = keys_of(POOL, "nvidia")[0], Config(16, 32, 64)
    job = object.__new__(tuner.KernelJob)
    job.key, job.device, job.compilers = key, torch.device("cuda", 0), None
    job.dangerous = tuner.Dangerous(tmp_path / "a.json")
    job._compare = mock.Mock(side_effect=RuntimeError("an illegal memory access was encountered"))
    with mock.patch("torch.cuda.synchronize"), pytest.raises(Refused, match="illegal"):
        job.check(config)  # the device is well
    assert not list(tmp_path.iterdir())
    broken = mock.patch("torch.cuda.synchronize", side_effect=RuntimeError("an illegal memory access"))
    with broken, pytest.raises(tuner.BrokenDevice, match=re.escape(str(key))):
        job.check(config)
    again = object.__new__(tuner.KernelJob)
    again.key, again.dangerous = key, tuner.Dangerous(tmp_path / "a.json")
    with pytest.raises(Refused, match="broke"):
        again.check(config)
    again._compare, again.compilers = mock.Mock(), None
    again.check(Config(16, 16, 64))
    assert again._compare.called


# --- recording ------------------------------------------------------------------------------------------------------


def shapes(call: TunedCall) -> dict[str, tuple[int, ...]]:
    return {name: tuple(said["shape"]) for name, said in call.tensors.items()}


def test_what_is_recorded() -> None:
    x, regions = torch.randn(2, 3, 4, 5), torch.rand(2, 6, 4) + 1
    with tuning.recording() as recorded:
        assert recorded == []
        nodes = dt.ops.region_pool(x.to(memory_format=torch.channels_last), regions, profile="gaussian")
        dt.ops.region_remap(nodes.requires_grad_(), regions, (4, 5))
        dt.ops.region_kernel(regions.double(), (7, 8))
        for _ in range(2):  # twice the same is once
            dt.ops.region_pool(x.bfloat16(), regions.requires_grad_(), profile="linear")
    dt.ops.region_pool(x[..., :2], regions)
    assert [call.op for call in recorded] == ["region_pool", "region_remap", "region_kernel", "region_pool"]
    pool, remap, kernel, again = recorded
    assert shapes(pool) == {"x": (2, 3, 4, 5), "regions": (2, 6, 4)}
    assert pool.tensors["x"] == spec(2, 3, 4, 5, layout="channels_last")
    assert pool.tensors["regions"] == spec(2, 6, 4)
    assert pool.options["profile"] == "gaussian"
    assert shapes(remap) == {"nodes": (2, 6, 3), "regions": (2, 6, 4)}
    assert tuple(remap.options["size"]) == (4, 5)
    assert tuple(kernel.options["size"]) == (7, 8)
    assert kernel.tensors["regions"]["dtype"] == "float64"
    assert again.tensors["x"] == spec(2, 3, 4, 5, dtype="bfloat16")
    assert again.options["profile"] == "linear"
    assert [call.backward for call in recorded] == [False, ["nodes"], False, ["regions"]]


@pytest.mark.parametrize("backend", ["eager", "reference", pytest.param("triton", marks=pytest.mark.kernels)])
def test_every_backend_is_recorded(backend: str) -> None:
    x, regions = torch.randn(1, 3, 4, 5, device=DEVICE), torch.rand(1, 2, 4, device=DEVICE) + 1
    with tuning.recording() as recorded, dt.backend(backend):
        dt.ops.region_pool(x, regions)
    assert [call.op for call in recorded] == ["region_pool"]
    assert shapes(recorded[0]) == {"x": (1, 3, 4, 5), "regions": (1, 2, 4)}


def test_no_gradient_is_no_backward() -> None:
    x, regions = torch.randn(1, 3, 4, 5, requires_grad=True), torch.rand(1, 2, 4) + 1
    with tuning.recording() as recorded:
        with torch.no_grad():
            dt.ops.region_pool(x, regions)
        dt.ops.region_pool(x, regions)
    assert [call.backward for call in recorded] == [False, ["x"]]


def test_what_is_empty_is_not_recorded() -> None:
    """It launches nothing."""
    regions = torch.rand(2, 3, 4)
    with tuning.recording() as recorded:
        dt.ops.region_pool(torch.randn(0, 3, 4, 5), regions[:0])
        dt.ops.region_kernel(regions[:, :0], (4, 5))
    assert recorded == []


def test_recording_through_layers() -> None:
    graph = awake(dt.layers.DyReG(8, (6, 7), grid=(2, 2)))
    attention = dt.layers.RSA(16, num_queries=2, kernel_size=(3, 3, 3))
    with tuning.recording() as recorded:
        graph(torch.randn(2, 3, 8, 6, 7)).sum().backward()
        attention(torch.randn(1, 16, 2, 4, 5)).sum().backward()
    by_op = {call.op: call for call in recorded}
    assert set(by_op) == {"region_pool", "region_remap", "relational_attention"}
    assert shapes(by_op["region_pool"]) == {"x": (2, 3, 8, 6, 7), "regions": (2, 3, 4, 4)}
    assert shapes(by_op["region_remap"]) == {"nodes": (2, 3, 4, 8), "regions": (2, 3, 4, 4)}
    attended = shapes(by_op["relational_attention"])
    assert attended["q"] == (1, 2, 8, 2, 4, 5)
    assert attended["h2"] == (8, 3, 3, 3)
    assert by_op["relational_attention"].options["eps"] == pytest.approx(1e-6)
    assert all(call.backward for call in recorded)


@pytest.mark.parametrize("dimensions", [3, 2])
@pytest.mark.parametrize("train", [True, False])
def test_recording_a_block_of_transforms(dimensions: int, train: bool) -> None:
    """Its one call: of fewer channels, of maps that are multiples of their cells."""
    options: dict[str, Any] = {"window": 3, "groups": 2, "dimensions": dimensions}
    block = dt.layers.BATBlock(8, **options, **({"temporal_window": 2} if dimensions == 3 else {})).train(train)
    x = torch.randn(2, 8, 4, 6, 9) if dimensions == 3 else torch.randn(2, 8, 6, 9)
    with tuning.recording() as recorded:
        y = block(x)
        if train:
            y.sum().backward()
        with torch.no_grad():
            block(x)
    frames = 4 if dimensions == 3 else 1
    expected = {"x": (2, 4, frames, 6, 9), "p": (2, 2, frames, 3, 3), "q": (2, 2, frames, 3, 3)}
    if dimensions == 3:
        expected["t"] = (2, 1, 2, 2)
    assert [call.op for call in recorded] == ["bilinear_transform"] * 2
    assert [shapes(call) for call in recorded] == [expected] * 2
    assert [call.backward for call in recorded] == [True, False]
    assert all(call.options == {} for call in recorded)
    assert all(calls.checked(json.loads(json.dumps(call._asdict()))) == call for call in recorded)
    assert {key.op for call in recorded for key in keys_of(call, "nvidia")} == {"bilinear"}


def test_what_a_transform_is_recorded_as() -> None:
    """With x as it is computed with, and the layout that it has."""
    x, p, q = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 2, 2, 2, 2), torch.randn(1, 1, 2, 3, 3)
    t = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="q"), tuning.recording() as failed:
        dt.ops.bilinear_transform(x, p, q, t)  # refused, hence no call
    q = torch.randn(1, 2, 2, 3, 3)
    with tuning.recording() as recorded:
        dt.ops.bilinear_transform(x.to(memory_format=torch.channels_last_3d), p, q, t.requires_grad_())
        dt.ops.bilinear_transform(x, p.bfloat16().float(), q)
        dt.ops.bilinear_transform(x, p, q, None)  # twice the same is once
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dt.ops.bilinear_transform(x, p.requires_grad_(), q.requires_grad_(), t)
        dt.ops.bilinear_transform(x[:0], p[:0], q[:0])
    assert failed == []
    last, plain, low = recorded
    assert last.tensors["x"] == spec(1, 4, 2, 4, 6, layout="channels_last")
    assert [last.tensors[name] for name in "pqt"] == [spec(1, 2, 2, 2, 2), spec(1, 2, 2, 3, 3), spec(1, 1, 2, 2)]
    assert plain.tensors == {"x": spec(1, 4, 2, 4, 6), "p": spec(1, 2, 2, 2, 2), "q": spec(1, 2, 2, 3, 3)}
    assert low.tensors["x"] == spec(1, 4, 2, 4, 6, dtype="bfloat16")
    assert low.tensors["p"]["dtype"] == "float32"
    assert [call.backward for call in recorded] == [["t"], False, ["p", "q", "t"]]


@pytest.mark.parametrize("most", [None, 1, 2, 8])
@pytest.mark.parametrize("call", [TRANSFORM, SPACE, LARGE, *calls.preset("papers", ["bfloat16"])[-4:]], ids=str)
def test_case_of_a_transform(call: TunedCall, most: int | None) -> None:
    """The same tensors, of at most so many clips."""
    last = call._replace(tensors={**call.tensors, "x": {**call.tensors["x"], "layout": "channels_last"}})
    for some in (call, last):
        case = case_of(some, most)
        given = case.call().tensors
        assert list(given) == list(some.tensors)
        for name, tensor in given.items():
            said = some.tensors[name]
            clips = said["shape"][0] if most is None else min(said["shape"][0], most)
            assert tuple(tensor.shape) == (clips, *said["shape"][1:]), name
            assert str(tensor.dtype) == f"torch.{said['dtype']}"
        assert given["x"].layout == ("channels_last_3d" if some is last else "aligned")


def test_recordings_nest_and_end() -> None:
    x, regions = torch.randn(1, 3, 4, 5), torch.rand(1, 2, 4) + 1
    with tuning.recording() as outer:
        dt.ops.region_pool(x, regions)
        with tuning.recording() as inner:
            dt.ops.region_kernel(regions, (3, 3))
        with pytest.raises(ValueError, match="regions"), tuning.recording() as failed:
            dt.ops.region_pool(x, regions[..., :3])  # refused, hence no call
    dt.ops.region_kernel(regions, (4, 4))
    assert [call.op for call in inner] == ["region_kernel"]
    assert [call.op for call in outer] == ["region_pool", "region_kernel"]
    assert failed == []


@pytest.mark.kernels
def test_what_was_recorded_can_be_tuned(tmp_path: Path, gpu: Gpu) -> None:
    """Exactly the kernels that the model launches, under exactly their keys."""
    x = torch.randn(1, 2, 3, 4, device=DEVICE, requires_grad=True)
    regions = (torch.rand(1, 2, 4, device=DEVICE) + 1).requires_grad_()
    launches: list[Launch] = []
    with tuning.recording() as recorded, watched(lambda launch, _: launches.append(launch)), dt.backend("triton"):
        dt.ops.region_pool(x, regions).sum().backward()
    tuning.tune(recorded, path=tmp_path / "a.json", device=DEVICE, timer=timer())
    assert set(files.read(tmp_path / "a.json", gpu)) == {launch.key for launch in launches}


@pytest.mark.kernels
def test_a_recorded_block_can_be_tuned(tmp_path: Path, gpu: Gpu) -> None:
    """Exactly the kernels that it launches, under exactly their keys."""
    block = dt.layers.BATBlock(4, window=2, temporal_window=2, groups=1).to(DEVICE)
    launches: list[Launch] = []
    with tuning.recording() as recorded, watched(lambda launch, _: launches.append(launch)), dt.backend("triton"):
        block(torch.randn(1, 4, 2, 2, 4, device=DEVICE)).sum().backward()
    with mock.patch.object(KernelJob, "neighbours", return_value=()):
        tuning.tune(recorded, path=tmp_path / "a.json", device=DEVICE, timer=timer())
    assert set(files.read(tmp_path / "a.json", gpu)) == {launch.key for launch in launches}


WANTED = [
    (POOL, ["x"]), (POOL, ["regions"]), (POOL, ["x", "regions"]), (POOL, []), (REMAP, ["nodes"]), (REMAP, ["regions"]),
    (REMAP, ["nodes", "regions"]), (KERNEL, ["regions"]), (ATTEND, ["q"]), (ATTEND, ["k"]), (ATTEND, ["v", "p1"]),
    (ATTEND, ["h1"]), (ATTEND, ["g"]), (ATTEND, list(RSA_SHAPES)),
    *[(TRANSFORM, list(names)) for n in range(5) for names in itertools.combinations("xpqt", n)],
    *[(SPACE, list(names)) for n in range(4) for names in itertools.combinations("xpq", n)],
    *[(LARGE, names) for names in ([], ["t"], ["p"], ["x", "t"], ["x", "p", "q", "t"])],
]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("call", "wanted"), WANTED, ids=lambda value: value.op if isinstance(value, TunedCall) else "+".join(value)
)
@pytest.mark.parametrize("nodes", [2, 20])
def test_the_keys_of_a_call_are_what_it_launches(call: TunedCall, wanted: list[str], nodes: int) -> None:
    """Other kernels run where some inputs want no gradient, and where one program cannot hold all regions."""
    if nodes == 20:
        if "regions" not in call.tensors:
            return
        changed = {n: {**t, "shape": list(t["shape"])} for n, t in call.tensors.items()}
        for name in ("regions", "nodes"):
            if name in changed:
                changed[name]["shape"][1] = nodes
        call = call._replace(tensors=changed)
    inputs = Running(call, DEVICE).inputs
    launches: list[Launch] = []
    with tuning.recording() as recorded, watched(lambda launch, _: launches.append(launch)), dt.backend("triton"):
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        y = getattr(dt.ops, call.op)(**leaves, **case_of(call).call().options)
        if wanted:
            y.sum().backward()
    (found,) = recorded
    assert [name for name in call.tensors if found.wants(name)] == [name for name in call.tensors if name in wanted]
    assert set(keys_of(found, family(DEVICE))) == {launch.key for launch in launches}


@pytest.mark.kernels
@pytest.mark.parametrize("wanted", [list(w) for n in range(5) for w in itertools.combinations("xpqt", n)], ids="+".join)
@pytest.mark.parametrize("kinds", [("forward_mixed",), ("backward_mixed",), ("forward_mixed", "backward_mixed")])
def test_the_keys_of_a_transform_in_passes(kinds: tuple[str, ...], wanted: list[str]) -> None:
    """Where the heuristic mixes frames in passes, in the forward, in the backward or in both."""
    launches: list[Launch] = []
    with passes_by_default(*kinds):
        call = TRANSFORM._replace(backward=wanted or False)
        with watched(lambda launch, _: launches.append(launch)), dt.backend("triton"):
            Running(call, DEVICE)()
        assert set(keys_of(call, family(DEVICE))) == {launch.key for launch in launches}
    assert len(keys_of(call, family(DEVICE))) == 1 + bool(wanted)
    seen = {launch.key.kind for launch in launches}
    assert ("mix" in seen) == ("forward_mixed" in kinds)
    assert ("mix_backward" in seen) == ("backward_mixed" in kinds and bool(wanted))


@pytest.mark.kernels
@pytest.mark.parametrize("wanted", [["x"], ["regions"]], ids="+".join)
def test_what_runs_without_a_gradient_is_checked_too(tmp_path: Path, gpu: Gpu, wanted: list[str]) -> None:
    kind = "scatter" if wanted == ["x"] else "gather_moments"
    place = 3 if wanted == ["x"] else 4  # where the kernel writes
    call = POOL._replace(backward=wanted)
    wide = lambda launch: 1e-5 / launch.constants["BLOCK_C"]  # noqa: E731
    path = tmp_path / "a.json"
    with spoilt(
        lambda args: args[place].mul_(1.01), lambda run: run.key.kind == kind and run.constants["BLOCK_C"] > 16
    ):
        summary = tuning.tune([call], path=path, device=DEVICE, timer=timer(wide))
    assert number(summary.refused) >= 1
    found = {key.kind: entry for key, entry in files.read(path, gpu).items()}
    assert set(found) == {"gather", kind}
    assert found[kind].config.block_c == 16
    assert found["gather"].config.block_c == 32


# --- files of calls -------------------------------------------------------------------------------------------------


def test_calls_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    some = [POOL, REMAP, KERNEL, ATTEND, TRANSFORM, SPACE._replace(backward=["q"]), POOL._replace(backward=False)]
    calls.save(path, some)
    assert calls.load(path) == some
    assert isinstance(json.loads(path.read_text()), list)
    with tuning.recording() as recorded:
        dt.ops.region_pool(torch.randn(2, 3, 4, 5), torch.rand(2, 6, 4))
        dt.layers.RSA(8, num_queries=2, kernel_size=(1, 3, 3))(torch.randn(1, 8, 2, 3, 3))
        dt.layers.BATBlock(8, window=3, temporal_window=2, groups=2)(torch.randn(2, 8, 3, 7, 4))
    assert [call.op for call in recorded] == ["region_pool", "relational_attention", "bilinear_transform"]
    calls.save(path, recorded)
    assert calls.load(path) == recorded


def said(**changes: Any) -> dict[str, Any]:
    """An entry of a file of calls."""
    good = {"op": "region_pool", "tensors": dict(POOL.tensors), "options": {"profile": "linear"}, "backward": True}
    return {**good, **changes}


BAD_CALLS: dict[str, Any] = {
    "an object": {"op": "region_pool"},
    "a number": 3,
    "a list in it": [said(), []],
    "no op": [{k: v for k, v in said().items() if k != "op"}],
    "another op": [said(), said(op="region_pull")],
    "no tensors": [said(tensors={})],
    "a tensor missing": [said(tensors={"x": spec(1, 2, 3, 4)})],
    "a tensor too many": [said(tensors={**POOL.tensors, "z": spec(1)})],
    "tensors in a list": [said(tensors=[spec(1, 2, 3, 4)])],
    "no shape": [said(tensors={**POOL.tensors, "x": {"dtype": "float32", "layout": "contiguous"}})],
    "a shape of words": [said(tensors={**POOL.tensors, "x": {**spec(), "shape": ["a", 2]}})],
    "a negative size": [said(tensors={**POOL.tensors, "x": spec(1, -20, 3, 4)})],
    "a fraction of a size": [said(tensors={**POOL.tensors, "x": spec(1, 20.5, 3, 4)})],  # type: ignore
    "another dtype": [said(tensors={**POOL.tensors, "x": spec(1, 20, 3, 4, dtype="float31")})],
    "an integer dtype": [said(tensors={**POOL.tensors, "x": spec(1, 20, 3, 4, dtype="int64")})],
    "a name of torch": [said(tensors={**POOL.tensors, "x": spec(1, 20, 3, 4, dtype="nn")})],
    "another layout": [said(tensors={**POOL.tensors, "x": spec(1, 20, 3, 4, layout="diagonal")})],
    "options in a list": [said(options=["linear"])],
    "another option": [said(options={"profil": "linear"})],
    "a word for backward": [said(backward="yes")],
    "regions of three numbers": [said(tensors={**POOL.tensors, "regions": spec(1, 2, 3)})],
    "other frames": [said(tensors={**POOL.tensors, "regions": spec(3, 2, 4)})],
    "no map": [said(tensors={**POOL.tensors, "x": spec(20, 3)})],
    "another profile": [said(options={"profile": "square"})],
    "a negative temperature": [said(options={"profile": "log-linear", "temperature": -1})],
    "no size to map to": [{**REMAP._asdict(), "options": {"profile": "linear"}}],
    "a key without weights": [
        {**ATTEND._asdict(), "tensors": {name: t for name, t in ATTEND.tensors.items() if name != "h1"}}
    ],
    "a transform without q": [
        {**TRANSFORM._asdict(), "tensors": {name: t for name, t in TRANSFORM.tensors.items() if name != "q"}}
    ],
    "a transform with an option": [{**TRANSFORM._asdict(), "options": {"eps": 1e-6}}],
    "a transform with regions": [{**TRANSFORM._asdict(), "tensors": {**TRANSFORM.tensors, "regions": spec(1, 2, 4)}}],
    "a transform by no squares": [{**TRANSFORM._asdict(), "tensors": {**TRANSFORM.tensors, "p": spec(1, 2, 2, 2, 1)}}],
    "a transform of a part of a cell": [
        {**TRANSFORM._asdict(), "tensors": {**TRANSFORM.tensors, "q": spec(1, 2, 2, 3, 3)}}
    ],
    "a transform of other frames": [
        {**TRANSFORM._asdict(), "tensors": {**TRANSFORM.tensors, "p": spec(1, 2, 1, 2, 2)}}
    ],
    "a transform of groups that do not divide": [
        {**TRANSFORM._asdict(), "tensors": {**TRANSFORM.tensors, "t": spec(1, 3, 2, 2)}}
    ],
    "a transform by another dtype": [
        {**TRANSFORM._asdict(), "tensors": {**TRANSFORM.tensors, "t": spec(1, 1, 2, 2, dtype="bfloat16")}}
    ],
    "a gradient of what is not there": [{**SPACE._asdict(), "backward": ["t"]}],
    "a negative eps": [{**ATTEND._asdict(), "options": {"eps": -1.0}}],
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(tmp_path: Path, case: str) -> None:
    """The file, the entry, what is accepted."""
    path = tmp_path / "calls.json"
    path.write_text(json.dumps(BAD_CALLS[case]))
    with pytest.raises(ValueError, match="accepted") as refusal:
        calls.load(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("text", [b"", b"[", b"\xff\xfe", b"[" * 100_000], ids=["empty", "half", "binary", "deep"])
def test_files_that_hold_no_calls(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "calls.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        calls.load(path)
    with pytest.raises(ValueError, match=r"none\.json"):
        calls.load(tmp_path / "none.json")


# --- from the shell -------------------------------------------------------------------------------------------------

MODELS = """
import torch
from torch import nn
import dyreg_triton as dt

def graph():
    return dt.layers.DyReG(8, (5, 6), grid=(1, 2))

def plain():
    return nn.Conv2d(3, 4, 3)

def broken():
    raise OSError("no weights here")

def transform():
    return dt.layers.BATBlock(8, window=3, temporal_window=2, groups=2)

instance = dt.layers.RSA(8, num_queries=2, kernel_size=(1, 3, 3))
"""


def tune(*arguments: str) -> int:
    """The exit status, whether returned or raised."""
    try:
        return main(["tune", *arguments])
    except SystemExit as end:
        return int(str(end.code))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "our_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield
    sys.modules.pop("our_models", None)


class Asked(dict):
    """What `tune` was called with."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """`dt.tuning.tune` only notes its arguments; a file with one key in it is there."""
    noted = Asked()

    def stand_in(calls: Any = None, **options: Any) -> Any:
        noted.update(calls=calls, **options)
        if "error" in noted:
            raise noted["error"]
        return mock.DEFAULT

    monkeypatch.setattr(tuning, "tune", mock.Mock(side_effect=stand_in, return_value=SUMMARY()))
    return noted


def SUMMARY() -> Any:
    from dyreg_triton.tuning.engine import Summary

    return Summary(*[0] * len(Summary._fields))


HERE = ["--device", DEVICE.type]
BUDGETS = {"90": 90, "90s": 90, "5m": 300, "1h": 3600, "1.5m": 90}


@pytest.mark.kernels
@pytest.mark.parametrize("text", BUDGETS)
def test_budget(asked: Asked, text: str) -> None:
    assert tune("--budget", text, *HERE) == 0
    assert asked["budget"] == BUDGETS[text]


@pytest.mark.kernels
def test_options_are_passed_on(asked: Asked, tmp_path: Path) -> None:
    assert tune(*HERE) == 0
    assert not asked["calls"]
    assert asked.get("budget") is None
    assert not asked.get("again")
    assert asked.get("shapes", "papers") == "papers"
    out = str(tmp_path / "b.json")
    arguments = ["--ops", "region", "bilinear", "--shapes", "quick", "--dtype", "float16", "--out", out, "--again"]
    assert tune(*arguments, *HERE) == 0
    assert list(asked["ops"]) == ["region", "bilinear"]
    assert asked["shapes"] == "quick"
    assert list(asked["dtypes"]) == ["float16"]
    assert str(asked["path"]) == out
    assert asked["again"] is True
    assert torch.device(asked["device"]).type == DEVICE.type


@pytest.mark.kernels
@pytest.mark.usefixtures("models")
def test_from_a_factory(asked: Asked) -> None:
    assert tune("--from", "our_models:graph", "--example", "2,3,8,5,6", *HERE) == 0
    assert {call.op for call in asked["calls"]} == {"region_pool", "region_remap"}
    pool = next(call for call in asked["calls"] if call.op == "region_pool")
    assert shapes(pool) == {"x": (2, 3, 8, 5, 6), "regions": (2, 3, 2, 4)}
    assert all(call.backward for call in asked["calls"])


@pytest.mark.kernels
@pytest.mark.parametrize("op", SPACES)
def test_each_op_by_its_name(asked: Asked, op: str) -> None:
    assert tune("--ops", op, *HERE) == 0
    assert list(asked["ops"]) == [op]


@pytest.mark.kernels
@pytest.mark.usefixtures("models")
def test_from_a_factory_of_transforms(asked: Asked) -> None:
    """In each dtype; what it makes of the map is what is tuned for."""
    arguments = ["--from", "our_models:transform", "--example", "2,8,4,7,6", "--dtype", "bfloat16", "float32"]
    assert tune(*arguments, *HERE) == 0
    assert [call.op for call in asked["calls"]] == ["bilinear_transform"] * 2
    assert {call.tensors["x"]["dtype"] for call in asked["calls"]} == {"bfloat16", "float32"}
    for call in asked["calls"]:
        assert shapes(call) == {
            "x": (2, 4, 4, 8, 6), "p": (2, 2, 4, 4, 4), "q": (2, 2, 4, 3, 3), "t": (2, 1, 2, 2),
        }  # fmt: skip
        assert call.backward is True


@pytest.mark.kernels
@pytest.mark.usefixtures("models")
def test_from_a_module_in_a_dtype(asked: Asked) -> None:
    arguments = ["--from", "our_models:instance", "--example", "1,8,2,4,4", "--dtype", "bfloat16", "float32"]
    assert tune(*arguments, *HERE) == 0
    assert {call.op for call in asked["calls"]} == {"relational_attention"}
    assert {call.tensors["q"]["dtype"] for call in asked["calls"]} == {"bfloat16", "float32"}


@pytest.mark.kernels
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["our_models:plain", "--example", "1,3,4,5"], "swap"),
        (["our_models:broken", "--example", "1,3,4,5"], "no weights here"),
        (["our_models:nothing", "--example", "1,3,4,5"], "nothing"),
        (["our_models:graph", "--example", "1,3,4,5"], "our_models:graph"),
        (["our_models:graph"], "example"),
    ],
)
def test_from_what_cannot_be_tuned(
    asked: Asked, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert tune("--from", *arguments, *HERE) in (1, 2)
    err = capsys.readouterr().err
    assert part in err
    assert "Traceback" not in err
    assert not asked


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--budget", "5x"], "5x"),
        (["--budget", "-3"], "-3"),
        (["--budget", "soon"], "soon"),
        (["--budget", "nan"], "nan"),
        (["--budget", ""], "--budget"),
        (["--ops", "trilinear"], "trilinear"),
        (["--ops", "bilinear", "trilinear"], "trilinear"),
        (["--dtype", "int64"], "int64"),
        (["--device", "abacus"], "abacus"),
        (["--show", "--target", "sm_12"], "sm_12"),
        (["--from", "no.colon"], "no.colon"),
        (["--fast"], "--fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_at_once(capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    assert tune(*arguments) == 2
    out, err = capsys.readouterr()
    assert part in err
    assert not out


@pytest.mark.parametrize("shapes", ["papyrus", "none.json"])
def test_no_such_shapes(capsys: pytest.CaptureFixture[str], shapes: str) -> None:
    assert tune("--shapes", shapes, "--show") in (1, 2)
    err = capsys.readouterr().err
    assert shapes in err
    assert "Traceback" not in err


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="asks for what is not here")
@pytest.mark.parametrize("device", [[], ["--device", "cuda"], ["--device", "cpu"]])
def test_no_device(capsys: pytest.CaptureFixture[str], device: list[str]) -> None:
    assert tune(*device) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search("GPU|CUDA|cuda", err)


@pytest.mark.kernels
def test_ctrl_c(asked: Asked, gpu: Gpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in the file, and that the same command goes on."""
    keys = [Key("region", "gather", "16-bit", (256, 16, 512, cells)) for cells in (1, 2, 3)]
    path = written(tmp_path / "a.json", {key: Config(16, 16, 16) for key in keys}, gpu)
    asked["error"] = KeyboardInterrupt()
    assert tune("--out", str(path), *HERE) == 130
    out, err = capsys.readouterr()
    assert "3" in (out + err).replace(str(path), "")
    assert str(path) in out + err
    assert "same command" in out + err
    assert "Traceback" not in out + err


def test_show_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a GPU that need not be here."""
    listed = {}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert tune("--show", "--shapes", "quick", "--target", target) == 0
        listed[target] = re.sub("(?m)^#.*$", "", capsys.readouterr().out)
        assert "region.gather" in listed[target]
        assert "relational.forward" in listed[target]
        assert "bilinear.forward" in listed[target]
        assert "heuristic" in listed[target]
    assert listed["sm_90"] != listed["gfx942"]


@pytest.mark.parametrize("op", SPACES)
def test_show_one_op(capsys: pytest.CaptureFixture[str], op: str) -> None:
    """Nothing but its kernels, each with every field of its config."""
    assert tune("--show", "--shapes", "quick", "--target", "sm_90", "--ops", op) == 0
    out = capsys.readouterr().out
    keys = [Key.parse(line) for line in out.splitlines() if re.match(r"\w+\.\w+ ", line)]
    assert keys
    assert {key.op for key in keys} == {op}
    assert len(set(keys)) == len(keys)
    if op == "bilinear":
        assert {"forward", "backward"} <= {key.kind for key in keys}
        assert out.count("joint=") == out.count("fused=") == out.count("steps=") == len(keys)


@pytest.mark.kernels
def test_show_what_is_used(gpu: Gpu, capsys: pytest.CaptureFixture[str]) -> None:
    """Key by key: the config, its source, its file."""
    assert tune("--show", "--shapes", "quick", *HERE) == 0
    before = capsys.readouterr().out
    texts = re.findall(r"region\.gather \S+ frames=\d+ nodes=\d+ channels=\d+ cells=\d+", before)
    assert texts
    some = Key.parse(texts[0])
    path = written(user_file(gpu), {some: Config(16, 32, 16, 2)}, gpu)
    tuning.forget()
    with collected() as reports:
        assert tune("--show", "--shapes", "quick", *HERE) == 0
    after = capsys.readouterr().out
    assert not reports
    assert str(path) in after
    assert "user" in after
    assert str(path) not in before
