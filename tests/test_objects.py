"""What the public functions return is copied, pickled and saved, and does then what it did before, or says why not.

One row for each public name, several where it returns several kinds. Rows are named as the name is below `dt`.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import hypothesis
import pytest
import safetensors.torch
import torch
from support import assert_identical, awake
from swap_cases import rsa as published_rsa
from torch import Tensor, nn
from tuning_cases import GPU, key

import dyreg_triton as dt
from dyreg_triton._core import dispatch
from dyreg_triton.configs import lookup
from dyreg_triton.testing import strategies
from dyreg_triton.tuning import engine

# --- the public names -----------------------------------------------------------------------------------------------


def public() -> dict[str, Any]:
    """Every name in the `__all__` of `dt` and of the modules named there, but for these modules."""
    found: dict[str, Any] = {}
    queue: list[tuple[str, Any]] = [("", dt)]
    while queue:
        prefix, module = queue.pop()
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                queue.append((f"{prefix}{name}.", value))
            else:
                found[prefix + name] = value
    return found


PUBLIC = public()


# --- what is done to an object --------------------------------------------------------------------------------------


def saved(thing: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def through_torch(thing: Any) -> Any:
    """Tensors by themselves as torch.load reads by default, other classes as it reads from those one trusts."""
    return torch.load(saved(thing), weights_only=isinstance(thing, Tensor))


def through_pickle(protocol: int) -> Callable[[Any], Any]:
    return lambda thing: pickle.loads(pickle.dumps(thing, protocol))


DEEP: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    **{f"pickle {protocol}": through_pickle(protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)},
    "torch.save": through_torch,
}
on_deep_copies = pytest.mark.parametrize("copied", DEEP.values(), ids=DEEP)
on_copies = pytest.mark.parametrize("copied", [copy.copy, *DEEP.values()], ids=["copy", *DEEP])


def assert_alike(actual: Any, expected: Any) -> None:
    """Of one type, and alike in all that they hold."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert_identical(actual, expected)
        assert (actual.requires_grad, actual.stride()) == (expected.requires_grad, expected.stride())
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected)
        assert_alike([*actual.values()], [*expected.values()])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, weakref.ref):  # of a recurrence to its weights
        assert_alike(actual(), expected())
    elif isinstance(expected, MethodType):
        assert actual.__func__ is expected.__func__
        assert_alike(actual.__self__, expected.__self__)
    elif isinstance(expected, (nn.Module, dt.testing.Guarded, BaseException)) or is_dataclass(expected):
        held = [{name: vars(x)[name] for name in sorted(vars(x)) if name != "_restore"} for x in (actual, expected)]
        assert_alike(*held)
        if not isinstance(expected, dt.testing.Guarded):  # whose repr is its address
            assert repr(actual) == repr(expected)
    elif type(expected).__eq__ is object.__eq__:
        assert repr(actual) == repr(expected)
    else:
        assert actual == expected


def memory(thing: Any, seen: set[int] | None = None) -> Iterator[int]:
    """Where the tensors lie that an object holds."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.numel():
            yield thing.untyped_storage().data_ptr()
        return
    inner = [*thing.values()] if isinstance(thing, Mapping) else [*thing] if isinstance(thing, (list, tuple)) else []
    for item in [*inner, *(vars(thing).values() if hasattr(thing, "__dict__") else ())]:
        yield from memory(item, seen)


# --- the objects ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """How to come by an object, and what it does; that is compared too."""

    make: Callable[[], Any]
    acts: Callable[[Any], Any] = lambda thing: None


CLIP, VIDEO, MAPS, NODES = (2, 4, 2, 3, 4), (2, 8, 4, 6, 6), (2, 3, 4, 5, 6), (2, 3, 5, 4)
IMAGES = (2, 8, 6, 6)
PARAMS = {"offset_lstm_dim": 4}
GRAPH: dict[str, Any] = {"params": PARAMS, "node_dim": 4, "H": 5, "W": 6, "h": 2, "w": 2, "iterations": 1}
BAT = {"in_channels": 8, "s": 3, "ts": 2, "k": 2, "tk": 2}
IMAGE_BAT = {"in_channels": 8, "s": 3, "k": 2}
OURS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "RSA": (lambda: dt.layers.RSA(4, num_queries=2, kernel_size=(1, 3, 3)), CLIP),
    "RSTG": (lambda: dt.layers.RSTG(4), NODES),
    "DyReG": (
        lambda: dt.layers.DyReG(4, (5, 6), grid=(2, 2), region_channels=4, iterations=1, return_regions=True),
        MAPS,
    ),
    "BATransform": (lambda: dt.layers.BATransform(8, window=3, groups=2, temporal_window=2), VIDEO),
    "BATBlock": (lambda: dt.layers.BATBlock(8, window=3, groups=2, temporal_window=2), VIDEO),
    "NonLocalBlock": (lambda: dt.layers.NonLocalBlock(8), VIDEO),
}
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ops.rstg.RSTG": ({"params": PARAMS, "node_dim": 4}, (2, 3, 4, 9)),
    "ops.dyreg.DynamicGraph": ({**GRAPH, "backbone_dim": 4}, MAPS),
    "ops.dyreg.DynamicGraphWrapper": ({**GRAPH, "in_channels": 4}, MAPS),
    "ops.rsa.RSA": ({"d_in": 4, "d_out": 6, "nh": 2, "dk": 4, "kernel_type": "VplusR", "feat_type": "R"}, CLIP),
    "models.non_local.BATransform": (BAT, VIDEO),
    "models.non_local.BATBlock": (BAT, VIDEO),
    "models.non_local.NONLocalBlock1D": ({"in_channels": 8}, (2, 8, 9)),
    "models.non_local.NONLocalBlock2D": ({"in_channels": 8}, IMAGES),
    "models.non_local.NONLocalBlock3D": ({"in_channels": 8}, VIDEO),
    "model_zoo.non_local.BATransform": (IMAGE_BAT, IMAGES),
    "model_zoo.non_local.BATBlock": (IMAGE_BAT, IMAGES),
    "model_zoo.non_local.NonLocal": ({"inplanes": 8}, IMAGES),
}


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def forward(module: nn.Module, shape: tuple[int, ...]) -> Any:
    torch.manual_seed(3)  # of a dropout
    return module(x_of(*shape))


def module_row(make: Callable[[], nn.Module], shape: tuple[int, ...], used: bool) -> Row:
    def made() -> nn.Module:
        module = awake(make())
        if used:
            out = forward(module, shape)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
        return module

    @torch.no_grad()
    def acts(module: nn.Module) -> Any:
        return forward(module, shape)

    return Row(made, acts)


MODULES = {
    f"{name}{' used' if used else ''}": module_row(make, shape, used)
    for used in (False, True)
    for name, (make, shape) in {
        **{f"layers.{name}": row for name, row in OURS.items()},
        **{
            f"compat.build {name}": (
                lambda name=name, config=config: dt.compat.build(name, config, keep_regions=True),
                shape,
            )
            for name, (config, shape) in PUBLISHED.items()
        },
    }.items()
}


def loaded(model: nn.Module, strict: bool) -> Any:
    """A checkpoint into a model that it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"weight": torch.ones(2, 3), "more": torch.ones(1)}, Path(folder) / "x.pth")
        return dt.compat.load_checkpoint(Path(folder) / "x.pth").load_into(model, strict=strict)


def failure(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("did not fail")


def swapped() -> dt.SwapReport:
    model = nn.Sequential(nn.Conv3d(8, 8, 1), published_rsa())
    return dt.swap(model, example=x_of(1, 8, 2, 4, 4))


def recorded() -> dict[str, dt.viz.Recorded]:
    return dt.viz.record(nn.Sequential(awake(OURS["BATransform"][0]())), x_of(*VIDEO))


def maps_of(found: dict[str, dt.viz.Recorded]) -> list[Tensor]:
    return [map_ for one in found.values() for map_ in (one.attention_weights(), one.contribution_maps((1, 2)))]


def drawn_sheet() -> Any:
    return dt.viz.draw_sheet(torch.rand(3, 4, 6, 6), maps_of(recorded())[0][0])


def saved_sheet() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        return dt.viz.save(Path(folder) / "x.png", drawn_sheet())


def call_values(call: dt.testing.Call) -> list[Tensor]:
    return [spec.values() for spec in call.tensors.values()]


def drawn(strategy: Any) -> dt.testing.Call:
    """A call that a strategy draws."""
    calls: list[dt.testing.Call] = []

    @hypothesis.settings(max_examples=1, database=None, derandomize=True, phases=[hypothesis.Phase.generate])
    @hypothesis.given(strategy)
    def keep(call: dt.testing.Call) -> None:
        calls.append(call)

    keep()
    return calls[0]


def recording() -> list[dt.tuning.TunedCall]:
    with dt.tuning.recording() as calls:
        dt.ops.region_pool(x_of(1, 2, 5, 5), torch.full((1, 3, 4), 2.0))
    assert len(calls) == 1
    return calls


def tuned() -> list[Any]:
    """What a run gives and tells on its way, of a kernel that nothing is faster for."""
    config = dt.tuning.Config(16, 16, 16)
    told: list[Any] = []
    job = SimpleNamespace(
        key=key(), default=config, neighbours=lambda c: [], check=lambda c: None, seconds=lambda c: 1.0
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.json"
        told.append(engine.run([job], path, GPU, progress=told.append))
        assert [type(item).__name__ for item in told] == ["Progress", "Summary"]
        return [*told, engine.known(path, GPU)]


REGIONS = torch.tensor([[[2.0, 2.0, 1.5, 1.5], [1.0, 3.0, 2.5, 0.7]]])
BILINEAR = (x_of(1, 4, 2, 3, 3), x_of(1, 2, 2, 3, 3), x_of(1, 2, 2, 3, 3))
RELATIONAL: dict[str, Any] = {"q": x_of(1, 2, 3, 2, 3, 4), "k": None, "v": x_of(1, 3, 2, 3, 4), "h2": x_of(3, 1, 3, 3)}

VANILLA: dict[str, Any] = {
    "q": x_of(1, 2, 3, 2, 3, 4), "k": x_of(1, 3, 2, 3, 4), "v": x_of(1, 3, 2, 3, 4), "h": x_of(3, 1, 3, 3, 9)
}  # fmt: skip


def ops_rows(module: Any, prefix: str) -> dict[str, Row]:
    return {
        f"{prefix}.region_pool": Row(lambda: module.region_pool(x_of(1, 2, 5, 6), REGIONS)),
        f"{prefix}.region_remap": Row(lambda: module.region_remap(x_of(1, 2, 3), REGIONS, (5, 6))),
        f"{prefix}.region_kernel": Row(lambda: module.region_kernel(REGIONS, (5, 6))),
        f"{prefix}.bilinear_transform": Row(lambda: module.bilinear_transform(*BILINEAR)),
        f"{prefix}.relational_attention": Row(lambda: module.relational_attention(**RELATIONAL)),
    }


SPECS: dict[str, Any] = {
    "TensorSpec": lambda: dt.testing.TensorSpec((2, 3), torch.float16, "transposed", 4),
    "RegionSpec": lambda: dt.testing.RegionSpec((2, 4), size=(5, 6), kind="mixed"),
    "RelationalSpec": lambda: dt.testing.RelationalSpec((2, 3, 4)),
    "BilinearSpec": lambda: dt.testing.BilinearSpec((2, 3, 3)),
}
OBJECTS: dict[str, Row] = {
    **MODULES,
    "layers.regions_from_offsets": Row(
        lambda: dt.layers.regions_from_offsets(x_of(2, 3, 4, 4), grid=(2, 2), size=(5, 6))
    ),
    "layers.BATransform matrices": Row(lambda: recorded()["0"].matrices),
    "compat.load_checkpoint report": Row(lambda: loaded(nn.Linear(3, 2), strict=False), str),
    "compat.CheckpointError": Row(lambda: failure(lambda: loaded(nn.Linear(3, 2), strict=True))),
    "swap": Row(swapped, lambda report: (str(report), report.model(x_of(1, 8, 2, 4, 4)).detach())),
    "swap of the model itself": Row(
        lambda: dt.swap(published_rsa()), lambda report: report.model(x_of(1, 8, 2, 4, 4)).detach()
    ),
    "swap rows": Row(lambda: [*swapped().modules, swapped().whole]),
    "SwapReport": Row(lambda: failure(lambda: dt.swap(nn.Sequential(nn.Linear(2, 2)))).report, str),  # type: ignore[attr-defined]
    "SwapError": Row(lambda: failure(lambda: dt.swap(nn.Sequential(nn.Linear(2, 2))))),
    "__version__": Row(lambda: dt.__version__),
    **ops_rows(dt.ops, "ops"),
    **ops_rows(dt.reference, "reference"),
    "reference.vanilla_relational_attention": Row(lambda: dt.reference.vanilla_relational_attention(**VANILLA)),
    "viz.record": Row(recorded, maps_of),
    "viz.Recorded": Row(lambda: recorded()["0"], lambda one: maps_of({"": one})),
    "viz.attention_weights": Row(lambda: maps_of(recorded())[0]),
    "viz.contribution_maps": Row(lambda: maps_of(recorded())[1]),
    "viz.as_frames": Row(lambda: dt.viz.as_frames(x_of(3, 2, 4, 4))),
    "viz.heat_colors": Row(lambda: dt.viz.heat_colors(torch.rand(3, 4))),
    "viz.draw_frames": Row(lambda: dt.viz.draw_frames(torch.rand(3, 4, 6, 6), maps_of(recorded())[0][0])),
    "viz.save": Row(saved_sheet),
    "viz.draw_sheet": Row(drawn_sheet),
    **{f"testing.{name}": Row(make, lambda spec: spec.values()) for name, make in SPECS.items()},
    "testing.Call": Row(
        lambda: dt.testing.Call({name: make() for name, make in SPECS.items() if name in ("TensorSpec", "RegionSpec")}),
        call_values,
    ),
    "testing.Guarded": Row(lambda: dt.testing.Guarded(x_of(3, 4), "transposed"), lambda guard: guard.tensor + 1),
    "testing.LAYOUTS": Row(lambda: dt.testing.LAYOUTS),
    "testing.REGION_KINDS": Row(lambda: dt.testing.REGION_KINDS),
    "testing.TOLERANCE": Row(lambda: dt.testing.TOLERANCE),
    "testing.default_device": Row(dt.testing.default_device),
    "testing.mismatch": Row(lambda: dt.testing.mismatch(torch.ones(2), torch.zeros(2))),
    "testing.relative_error": Row(lambda: dt.testing.relative_error(torch.ones(2), torch.zeros(2))),
    "testing.random_regions": Row(lambda: dt.testing.random_regions((2, 3), (5, 6))),
    "testing.value_and_gradients": Row(
        lambda: dt.testing.value_and_gradients(torch.square, {"input": x_of(3).requires_grad_()})
    ),
    **{f"testing.strategies.{name}": Row(getattr(strategies, name)) for name in ("dims", "dtypes", "layouts", "leads")},
    "testing.strategies.profiles": Row(strategies.profiles),
    "testing.strategies.tensor": Row(lambda: strategies.tensor("*", "M")),
    "testing.strategies.regions": Row(lambda: strategies.regions("*", "N", size=("H", "W"))),
    "testing.strategies.size": Row(lambda: strategies.size("H", "W")),
    **{
        f"testing.strategies.{name} drawn": Row(lambda make=make: drawn(make()), call_values)
        for name, make in {
            "calls": lambda: strategies.calls(x=strategies.tensor("*", "M")),
            "region_calls": lambda: strategies.region_calls("region_pool"),  # whose floors are a method of a case
            "relational_calls": strategies.relational_calls,
            "bilinear_calls": strategies.bilinear_calls,
        }.items()
    },
    "tuning.Config": Row(lambda: dt.tuning.Config(16, 16, 16)),
    "tuning.RelationalConfig": Row(lambda: dt.tuning.RelationalConfig()),
    "tuning.BilinearConfig": Row(lambda: dt.tuning.BilinearConfig()),
    "tuning.BILINEAR_LIMIT": Row(lambda: dt.tuning.BILINEAR_LIMIT),
    "tuning.RELATIONAL_LIMIT": Row(lambda: dt.tuning.RELATIONAL_LIMIT),
    "tuning.Key": Row(key, str),
    "tuning.region_key": Row(lambda: dt.tuning.region_key("gather", 160, 9, 512, 196, x_of(1)), str),
    "tuning.relational_key": Row(
        lambda: dt.tuning.relational_key("forward", 2, (4, 7, 7), 2, (4, 4, 4, 4), (3, 3, 3), x_of(1)), str
    ),
    "tuning.bilinear_key": Row(
        lambda: dt.tuning.bilinear_key("forward", (2, 8, 4, 6, 6), 2, (3, 3), 1, 1, x_of(1)), str
    ),
    "tuning.region": Row(lambda: dt.tuning.region("gather", 160, 9, 512, 196, 2)),
    "tuning.relational": Row(lambda: dt.tuning.relational("forward", 2, (4, 7, 7), 2, (4, 4, 4, 4), (3, 3, 3), 2)),
    "tuning.bilinear": Row(lambda: dt.tuning.bilinear("forward", (2, 8, 4, 6, 6), 2, (3, 3), 1, 1, 2)),
    "tuning.TunedCall": Row(lambda: recording()[0], lambda call: call.shape("x")),
    "tuning.recording": Row(recording),
    "tuning.Origin": Row(lambda: lookup.origin_on(key(), GPU, "nvidia")),
    "tuning.tune": Row(tuned),
}
NOTHING = (  # returned
    "testing.assert_all_close", "testing.assert_close", "testing.assert_identical", "testing.check_call",
    "testing.check_op", "tuning.forget",
)  # fmt: skip
ELSEWHERE = {
    "compat.Checkpoint": "test_checkpoint.py, which has the files",
    "compat.load_checkpoint": "the same",
    "tuning.config": "the config of an Origin, on a device that runs kernels",
    "tuning.origin": "an Origin, of a device that runs kernels",
}


# what cannot be copied or pickled, how it fails and what that says
SETTING = "cannot be copied or pickled; accepted is dt"
GENERATOR = "cannot pickle 'generator' object"
LOCAL = "local object"  # of Hypothesis
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "backend": (lambda: dt.backend("auto"), SETTING),
    "tuning.use": (lambda: dt.tuning.use(None), SETTING),
    "tuning.recording itself": (dt.tuning.recording, GENERATOR),
    "tuning.override": (lambda: dt.tuning.override(lambda key, config: config), GENERATOR),
    "testing.poisoned_outputs": (dt.testing.poisoned_outputs, GENERATOR),
    "testing.strategies.calls": (lambda: strategies.calls(x=strategies.tensor("*", "M")), LOCAL),
    "testing.strategies.region_calls": (lambda: strategies.region_calls("region_pool"), LOCAL),
    "testing.strategies.relational_calls": (strategies.relational_calls, LOCAL),
    "testing.strategies.bilinear_calls": (strategies.bilinear_calls, LOCAL),
}
on_objects = pytest.mark.parametrize("name", OBJECTS)
on_modules = pytest.mark.parametrize("name", MODULES)


def test_every_public_name_has_a_row() -> None:
    rows = {row.partition(" ")[0] for row in (*OBJECTS, *REFUSED, *NOTHING, *ELSEWHERE)}
    assert rows == set(PUBLIC)
    assert {f"layers.{name}" for name, value in vars(dt.layers).items() if isinstance(value, type)} <= set(MODULES)
    assert {f"compat.build {name}" for name in dt.compat._NAMES} <= set(MODULES)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_is_pickled_by_its_name(name: str) -> None:
    """What a process is to call, or a Call's floors name."""
    thing = PUBLIC[name]
    if callable(thing):
        assert all(copied(thing) is thing for copied in (copy.copy, copy.deepcopy, through_pickle(2)))


# --- copies ---------------------------------------------------------------------------------------------------------


@contextmanager
def telling(way: str) -> Iterator[None]:
    """Which copy it is that fails."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{way}: {error}") from error


@on_objects
def test_copies_are_and_do_the_same(name: str) -> None:
    row = OBJECTS[name]
    if name.startswith("viz.draw") or name == "viz.save":
        pytest.importorskip("PIL", reason="pip install 'dyreg-triton[viz]'")
    thing = row.make()
    twins = {way: copied(thing) for way, copied in {"copy": copy.copy, **DEEP}.items()}  # before it acts
    for way, twin in twins.items():
        with telling(way):
            assert_alike(twin, thing)
            shared = set(memory(twin)) & set(memory(thing))
            assert shared == (set(memory(thing)) if way == "copy" else set()), "memory"
    for way, twin in twins.items():
        with telling(way):
            assert_alike(row.acts(twin), row.acts(thing))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_copied_says_so(name: str) -> None:
    make, said = REFUSED[name]
    thing = make()
    copies = [through_pickle(2), through_pickle(pickle.HIGHEST_PROTOCOL), saved]
    if said != LOCAL:  # those Hypothesis copies
        copies += [copy.deepcopy]
    if said == SETTING:  # of generators Python copies the frame that holds one
        copies += [copy.copy]
    for copied in copies:
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError), match=said) as caught:
            copied(thing)
        assert said == LOCAL or caught.type is TypeError


@pytest.mark.parametrize("kind", [dt.backend, dt.tuning.use])
def test_a_setting_that_is_not_copied_still_ends(kind: Any) -> None:
    state: Callable[[], Any] = lambda: (dispatch.current_backend(), lookup._explicit)  # noqa: E731
    before = state()
    with kind("eager" if kind is dt.backend else None) as setting:
        inside = state()
        with pytest.raises(TypeError, match=re.escape(repr("eager" if kind is dt.backend else None))):
            copy.deepcopy(setting)
        assert state() == inside
    assert state() == before


# --- reports, failures, guards --------------------------------------------------------------------------------------


@on_deep_copies
@pytest.mark.parametrize("itself", [False, True])
def test_a_copied_report_undoes_nothing(copied: Callable[[Any], Any], itself: bool) -> None:
    """It says so, however often it is asked; the report itself is as good as before."""
    model = published_rsa() if itself else nn.Sequential(published_rsa())
    report = dt.swap(model)
    twin = copied(report)
    kinds = [type(module) for module in model.modules()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="undo: this report is a deep copy or came from a pickle"):
            twin.undo()
    assert [type(module) for module in twin.model.modules()] == kinds == [type(module) for module in model.modules()]
    report.undo()
    assert type(model if itself else model[0]) is type(published_rsa())
    copied(report).undo()  # there is nothing to undo any more


def test_a_shallow_copy_of_a_report_undoes_the_same_swap() -> None:
    model = nn.Sequential(published_rsa())
    report = dt.swap(model)
    twin = copy.copy(report)
    assert twin == report
    twin.undo()
    assert type(model[0]) is type(published_rsa())
    again = dt.swap(model)
    report.undo()  # once was enough
    assert type(model[0]) is not type(published_rsa())
    again.undo()
    assert type(model[0]) is type(published_rsa())


@on_copies
def test_a_swap_error_keeps_its_report_and_notes(copied: Callable[[Any], Any]) -> None:
    error = failure(lambda: dt.swap(nn.Sequential(nn.Linear(2, 2))))
    assert isinstance(error, dt.SwapError)
    error.where = "rank 3"  # type: ignore[attr-defined]
    twin = copied(error)
    assert type(twin) is dt.SwapError
    assert (str(twin), twin.where) == (str(error), "rank 3")
    assert str(twin.report) == str(error.report)
    assert twin.report.model[0].weight.equal(error.report.model[0].weight)


@on_copies
@pytest.mark.parametrize("layout", dt.testing.LAYOUTS)
def test_a_copied_guard_still_guards(copied: Callable[[Any], Any], layout: str) -> None:
    guard = dt.testing.Guarded(x_of(3, 4, 5, 6), layout)
    guard.tensor.requires_grad_()
    twin = copied(guard)
    assert_alike(twin.tensor, guard.tensor)
    twin.check()
    with torch.no_grad():
        twin.tensor[0, 0, 0, 0] = 7.0
    with pytest.raises(AssertionError, match="memory of input"):
        twin.check()
    if copied is not copy.copy:
        guard.check()


# --- files of tensors -----------------------------------------------------------------------------------------------


@on_modules
def test_state_dicts_are_saved(name: str, tmp_path: Path) -> None:
    """By torch and by safetensors, and opened by the readers that run nothing."""
    row = MODULES[name]
    module = row.make()
    state = module.state_dict()
    assert_alike({**torch.load(saved(state), weights_only=True)}, {**state})
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    again = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert_alike({key: again[key] for key in state}, {**state})
    twin = awake(copy.deepcopy(module), seed=8)
    safetensors.torch.save_model(module, tmp_path / "model.safetensors")
    safetensors.torch.load_model(twin, tmp_path / "model.safetensors")
    assert_alike({**twin.state_dict()}, {**state})
    read = dt.compat.load_checkpoint(tmp_path / "model.safetensors")
    assert_alike({key: read[key] for key in state}, {**state})


@pytest.mark.parametrize("name", ["layers.RSA", "compat.build ops.rsa.RSA"])
def test_tied_parameters_are_saved(name: str, tmp_path: Path) -> None:
    """Two layers with one weight: safetensors wants them once, torch keeps them one."""
    make = MODULES[name].make
    model = nn.ModuleList([make(), make()])
    model[1].H2.weight = model[0].H2.weight
    state = torch.load(saved(model.state_dict()), weights_only=True)
    assert state["0.H2.weight"].data_ptr() == state["1.H2.weight"].data_ptr()
    for copied in DEEP.values():
        twin = copied(model)
        assert twin[0].H2.weight is twin[1].H2.weight
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors")
    safetensors.torch.save_model(model, tmp_path / "x.safetensors")
    other = nn.ModuleList([make(), make()])
    other[1].H2.weight = other[0].H2.weight
    with torch.no_grad():
        other[0].H2.weight.zero_()
    assert dt.compat.load_checkpoint(tmp_path / "x.safetensors").load_into(other).complete
    assert_alike({**other.state_dict()}, {**model.state_dict()})


def test_what_was_recorded_is_opened_by_those_who_know_it() -> None:
    found = recorded()
    with pytest.raises(pickle.UnpicklingError, match="Recorded"):
        torch.load(saved(found), weights_only=True)
    with torch.serialization.safe_globals([dt.viz.Recorded, type(found["0"].matrices)]):
        assert_alike(torch.load(saved(found), weights_only=True), found)
