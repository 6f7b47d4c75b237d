"""Tuning real kernels with a stand-in timer, recording what a model calls, and both from the shell."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import DEVICE, INTERPRETED, awake
from tuning_cases import collected, without_files, written

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton.cli import main
from dyreg_triton.gpu import Gpu, family, gpu_of
from dyreg_triton.launch import Launch, watched
from dyreg_triton.tuning import Config, Key, TunedCall, calls, files
from dyreg_triton.tuning.engine import Refused
from dyreg_triton.tuning.files import user_file
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
KINDS = {
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
        assert len({launch.key.kind for launch in launches}) == 1, "what is timed is another kernel too, or none"
        return sum(map(seconds, launches))

    return time


def wide(launch: Launch) -> float:
    """Faster the more channels a program takes."""
    return 1e-5 / launch.constants["BLOCK_C"]


@pytest.mark.kernels
@pytest.mark.parametrize("call", [POOL, REMAP, KERNEL, ATTEND], ids=lambda call: call.op)
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
@pytest.mark.parametrize("call", [POOL, REMAP, KERNEL, ATTEND], ids=lambda call: call.op)
def test_no_backward_is_not_tuned(tmp_path: Path, gpu: Gpu, call: TunedCall) -> None:
    forward = call._replace(backward=False)
    with mock.patch.object(KernelJob, "neighbours", return_value=()):
        tuning.tune([forward], path=tmp_path / "a.json", device=DEVICE, timer=timer())
    kinds = {key.kind for key in files.read(tmp_path / "a.json", gpu)}
    assert kinds == KINDS[call.op] & {"gather", "scatter", "dense", "pack", "forward"}


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
    kinds = {"gather", "scatter", "gather_moments"} if case == "many nodes" else KINDS[FORMS[case].op]
    assert {key.kind for key in found} == (kinds if FORMS[case].backward else {"pack", "forward"})


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
    for ops in (None, ["region"], ["relational"]):
        for dtypes in (("float32",), ("bfloat16", "float32")):
            summary = tuning.tune(
                shapes="quick", ops=ops, dtypes=dtypes, budget=1e-9, path=tmp_path / "a.json", device=DEVICE,
                timer=lambda run: 1e-5, again=True,
            )  # fmt: skip
            left[ops and ops[0], len(dtypes)] = sum(counts(summary))
    assert 0 < left["region", 1] < left[None, 1]
    assert left[None, 1] == left["region", 1] + left["relational", 1]
    assert left[None, 2] == 2 * left[None, 1]


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
        ({"ops": ["bilinear"]}, ValueError),
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


WANTED = [
    (POOL, ["x"]), (POOL, ["regions"]), (POOL, ["x", "regions"]), (POOL, []), (REMAP, ["nodes"]), (REMAP, ["regions"]),
    (REMAP, ["nodes", "regions"]), (KERNEL, ["regions"]), (ATTEND, ["q"]), (ATTEND, ["k"]), (ATTEND, ["v", "p1"]),
    (ATTEND, ["h1"]), (ATTEND, ["g"]), (ATTEND, list(RSA_SHAPES)),
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
    some = [POOL, REMAP, KERNEL, ATTEND, POOL._replace(backward=False)]
    calls.save(path, some)
    assert calls.load(path) == some
    assert isinstance(json.loads(path.read_text()), list)
    with tuning.recording() as recorded:
        dt.ops.region_pool(torch.randn(2, 3, 4, 5), torch.rand(2, 6, 4))
        dt.layers.RSA(8, num_queries=2, kernel_size=(1, 3, 3))(torch.randn(1, 8, 2, 3, 3))
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
    arguments = ["--ops", "region", "relational", "--shapes", "quick", "--dtype", "float16", "--out", out, "--again"]
    assert tune(*arguments, *HERE) == 0
    assert list(asked["ops"]) == ["region", "relational"]
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
        (["--ops", "bilinear"], "bilinear"),
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
        assert "heuristic" in listed[target]
    assert listed["sm_90"] != listed["gfx942"]


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
