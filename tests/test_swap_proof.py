"""`dt.swap(..., example=...)`: what is compared and refused, what the report says, and what a forward leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import published
import pytest
import torch
from support import DEVICE, assert_close, assert_identical, awake, run
from swap_cases import (
    CLIP,
    SWAPPED,
    Log,
    assert_same,
    graph,
    holder,
    is_ours,
    named,
    network,
    on_networks,
    rsa,
    snapshot,
    untouched,
    values,
)
from test_errors import refused
from torch import Tensor, nn

import dyreg_triton as dt

# --- examples -------------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda x: x,
    "a tuple": lambda x: (x,),
    "a list": lambda x: [x],
    "a dictionary": lambda x: {"x": x},
    "a shape": lambda x: tuple(x.shape),
    "an input that wants a gradient": lambda x: x.clone().requires_grad_(),
}


ON = [*(("rsa net", form) for form in FORMS), ("tsn", "a tensor")]


@pytest.mark.parametrize(("name", "form"), ON)
def test_forms_of_examples(name: str, form: str) -> None:
    model, x = network(name)
    twin = copy.deepcopy(model)
    report = dt.swap(model, example=FORMS[form](x))
    assert [row.path for row in report.modules] == SWAPPED[name]
    for row in (*report.modules, report.whole):
        assert 0 <= row.error < 1e-3
        assert row.before_ms > 0
        assert row.after_ms > 0
    assert any(row.error > 0 for row in report.modules)  # the two are not one and the same
    assert_same(run(model, x), run(twin, x))


@on_networks
def test_the_errors_are_those_of_its_dtype(name: str) -> None:
    """Of a shape: random numbers in the model's dtype."""
    model, x = network(name)
    report = dt.swap(model.double(), example=tuple(x.shape))
    assert all(row.error < 1e-8 for row in (*report.modules, report.whole))


@pytest.mark.parametrize("training", [True, False])
def test_an_example_leaves_nothing_behind(training: bool) -> None:
    """Batch norms count, dropout draws: both runs see the same, and afterwards nothing has happened."""
    model, x = network("rsa net", dropout=0.5)
    model.train(training)
    run(model, x)
    leaf = x.clone().requires_grad_()
    given, random = leaf.detach().clone(), torch.get_rng_state()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    assert gradients
    report = dt.swap(model, example=leaf)
    assert report.whole.error < 1e-3
    assert torch.get_rng_state().equal(random)
    assert leaf.grad is None
    assert_identical(leaf.detach(), given)
    for name, t in model.state_dict().items():
        assert_identical(t, before[name], name)
    kept = [p.grad for p in model.parameters() if p.grad is not None]
    for grad, (one, value) in zip(kept, gradients, strict=True):
        assert grad is one
        assert_identical(grad, value)
    assert {m.training for m in model.modules()} == {training}


class Inputs(nn.Module):
    """Several inputs of several kinds, and an output of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Embedding(5, 8)
        self.attention = rsa()

    def forward(self, which: Tensor, x: Tensor | None = None, *, factor: float = 1.0) -> dict[str, Any]:
        y = self.names(which)[..., None, None, None].expand(CLIP) * factor
        y = self.attention(y.contiguous() if x is None else y + x)
        return {"all": (y, y.mean()), "count": 3, "nothing": None}


@pytest.mark.parametrize("case", ["integers alone", "positional", "by name"])
def test_examples_of_several_inputs(case: str) -> None:
    model = Inputs().to(DEVICE)
    which, x = torch.tensor([1, 4], device=DEVICE), values(CLIP)
    examples = {
        "integers alone": which,
        "positional": (which, x),
        "by name": {"which": which, "x": x, "factor": 2.0},
    }
    report = dt.swap(model, example=examples[case])
    assert [row.path for row in report.modules] == ["attention"]
    assert report.whole.error < 1e-3
    assert is_ours(model.attention)


def test_an_example_is_not_written_to() -> None:
    """The model's first step works in place: both runs get the same values, and the caller's stay."""
    model, x = nn.Sequential(nn.ReLU(inplace=True), rsa()).to(DEVICE), values(CLIP)
    given = x.clone()
    report = dt.swap(model, example=x)
    assert_identical(x, given)
    assert is_ours(model[1])
    assert report.whole.error < 1e-3


def test_an_example_of_a_model_in_parallel() -> None:
    model, x = network("rsa net")
    report = dt.swap(nn.DataParallel(model), example=x)
    assert [row.path for row in report.modules] == [f"module.{path}" for path in SWAPPED["rsa net"]]
    assert report.whole.error < 1e-3
    assert is_ours(model.get_submodule(SWAPPED["rsa net"][0]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_example_where_no_gradients_are_made(mode: Callable[[], Any]) -> None:
    """They are compared all the same, and what was swapped there can be trained."""
    model, x = holder("wrapper")
    twin = copy.deepcopy(model)
    with mode():
        report = dt.swap(model, example=x)
        assert not torch.is_grad_enabled()
    assert 0 < report.modules[0].error < 1e-3
    assert_same(run(model, x), run(twin, x))


def test_a_wrong_gradient_shows_where_no_gradients_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = holder("rsa VplusR VplusR")
    op, spoil = dt.ops.relational_attention, wrong("gradients")
    monkeypatch.setattr(dt.ops, "relational_attention", lambda *a, **k: spoil(op(*a, **k)))
    with untouched(model), torch.no_grad(), pytest.raises(dt.SwapError, match="gradient"):
        dt.swap(model, example=x)


@on_networks
def test_an_example_under_autocast(name: str) -> None:
    model, x = network(name)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        report = dt.swap(model, example=x)
    assert all(is_ours(model.get_submodule(path)) for path in SWAPPED[name])
    assert 1e-6 < report.whole.error < 1  # what 16 bits leave


def test_an_example_for_the_model_itself() -> None:
    model, x = rsa().to(DEVICE), values(CLIP)
    report = dt.swap(model, example=x)
    assert report.modules[0].error < 1e-3
    assert is_ours(model)


# --- refusals by example --------------------------------------------------------------------------------------------


def wrong(fault: str) -> Callable[[Tensor], Tensor]:
    """A backend's mistake that only float32 shows: the probe, in float64, passes."""

    def spoil(y: Tensor) -> Tensor:
        if y.dtype != torch.float32:
            return y
        if fault == "raises":
            raise RuntimeError("no such kernel")
        if fault == "one value":
            return torch.cat([y.flatten()[:-1], y.flatten()[-1:] + y.abs().max()]).view(y.shape)
        factors = {"outputs": 1.01, "nan": math.nan, "large": math.inf}
        return y + 0.05 * (y - y.detach()) if fault == "gradients" else y * factors[fault]

    return spoil


FAULTS = ("outputs", "gradients", "nan", "large", "one value")
OPS = {"rsa net": "relational_attention", "tsn": "region_remap"}


@pytest.mark.parametrize(("name", "fault"), [*(("rsa net", fault) for fault in FAULTS), ("tsn", "one value")])
def test_an_example_that_differs(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(name)
    Log(model.get_submodule(SWAPPED[name][0]))
    model(x)  # the authors' leave their regions on themselves, as they do in the example's run
    op, spoil = getattr(dt.ops, OPS[name]), wrong(fault)
    monkeypatch.setattr(dt.ops, OPS[name], lambda *a, **k: spoil(op(*a, **k)))
    with untouched(model), pytest.raises(dt.SwapError) as caught:
        dt.swap(model, example=x)
    assert isinstance(caught.value, ValueError)
    message, report = str(caught.value), caught.value.report
    assert SWAPPED[name][0] in message
    assert [row.path for row in report.modules] == SWAPPED[name]
    assert not max(row.error for row in report.modules) < 3e-4  # written so that NaN passes
    assert re.search(r"\d(\.\d+)?e[-+]\d|0\.\d+|nan|inf", message)
    assert str(report)
    monkeypatch.undo()
    assert [row.path for row in dt.swap(model, example=x).modules] == SWAPPED[name]


@pytest.mark.parametrize("name", ["rsa net", "rsa VplusR VplusR"])
def test_a_mistake_is_not_taken_for_round_off_of_16_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(name) if name == "rsa net" else holder(name)
    op = dt.ops.relational_attention

    def attention(*arguments: Any, **settings: Any) -> Tensor:
        y = op(*arguments, **settings)
        return y if y.dtype == torch.float64 else y * torch.linspace(0.5, 1.5, y.shape[2]).to(y)[:, None, None, None]

    monkeypatch.setattr(dt.ops, "relational_attention", attention)
    with untouched(model), torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(dt.SwapError):
        dt.swap(model, example=x)


@pytest.mark.parametrize("itself", [True, False], ids=["itself", "inside"])
def test_a_refused_model_is_the_one_before(itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = rsa().to(DEVICE), values(CLIP)
    if not itself:
        model = nn.Sequential(model)
    run(model, x)
    expected = model(x).detach()
    op, spoil = dt.ops.relational_attention, wrong("outputs")
    monkeypatch.setattr(dt.ops, "relational_attention", lambda *a, **k: spoil(op(*a, **k)))
    with untouched(model), pytest.raises(dt.SwapError):
        dt.swap(model, example=x)
    assert_identical(model(x).detach(), expected)


def test_a_swapped_model_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("rsa net")
    op, spoil = dt.ops.relational_attention, wrong("raises")
    monkeypatch.setattr(dt.ops, "relational_attention", lambda *a, **k: spoil(op(*a, **k)))
    with untouched(model), refused(dt.SwapError, "no such kernel"):
        dt.swap(model, example=x)


BAD_EXAMPLES: dict[str, tuple[Any, str]] = {
    "other channels": ((2, 4, 3, 6, 5), "4"),
    "other rank": ((2, 3, 6, 5), ""),
    "no such name": ({"clip": torch.zeros(2, 3, 3, 6, 5)}, "clip"),
    "too many": ((torch.zeros(2, 3, 3, 6, 5), torch.zeros(1)), "argument"),
    "integers": (torch.zeros(2, 3, 3, 6, 5, dtype=torch.int64), ""),
}


@pytest.mark.parametrize("case", BAD_EXAMPLES)
def test_an_example_that_the_model_fails_on(case: str) -> None:
    example, quoted = BAD_EXAMPLES[case]
    model, _ = network("rsa net")
    model.cpu()
    with untouched(model), refused(ValueError, "example", quoted) as caught:
        dt.swap(model, example=example)
    assert not isinstance(caught.value, dt.SwapError)


# --- the report -----------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """A module whose result is made into something."""

    def __init__(self, inner: nn.Module, make: Callable[[Any], Any]):
        super().__init__()
        self.inner, self.make, self.calls = inner, make, 0
        self.unused = rsa()
        self.register_buffer("state", None)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.state = x.mean()
        return self.make(self.inner(x))


@dataclasses.dataclass
class Scores:
    logits: Tensor
    name: str = "scores"


def test_an_output_in_a_dataclass_and_a_module_that_is_not_reached() -> None:
    model = Held(rsa(), lambda y: {"scores": [Scores(y)]}).to(DEVICE)
    report = dt.swap(model, example=values(CLIP))
    assert 0 < report.whole.error < 1e-3
    reached, unused = report.modules
    assert reached.note is None
    assert unused.error is None
    assert "not reached" in unused.note
    assert unused.note in str(report)
    assert model.state is None  # a buffer that a forward sets is unset again


@pytest.mark.parametrize("make", [lambda y: None, lambda y: y.mean().item(), lambda y: [], lambda y: y * torch.nan])
def test_an_output_that_shows_nothing(make: Callable[[Tensor], Any]) -> None:
    model = Held(rsa(), make).to(DEVICE)
    with untouched(model), refused(ValueError, "example", "Held", "compared"):
        dt.swap(model, example=values(CLIP))


@pytest.mark.parametrize("spoil", [lambda x: x * torch.nan, lambda x: x[:0]])
def test_an_example_that_shows_nothing(spoil: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(rsa()).to(DEVICE)
    with untouched(model), refused(ValueError, "example", "compared"):
        dt.swap(model, example=spoil(values(CLIP)))


def test_a_model_that_does_not_repeat_itself_is_refused() -> None:
    model = Held(rsa(), lambda y: y * model.calls).to(DEVICE)
    with refused(dt.SwapError, "two runs of the original") as caught:
        dt.swap(model, example=values(CLIP))
    assert str(caught.value.report).startswith("2 modules compared, none swapped")
    assert type(model.inner) is published.RSA


def test_a_lost_gradient_is_told() -> None:
    model, x = published.TSN(reads=True).to(DEVICE), values((2, 2, 3, 7, 7))
    awake(model)
    report = dt.swap(model, example=x, keep_regions=True)
    assert report.whole.note is not None
    assert "no gradient any more" in report.whole.note
    assert report.whole.note in str(report)


def test_another_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = holder("rsa V V")
    monkeypatch.setattr(type(dt.compat.build("ops.rsa.RSA", d_in=8, d_out=8)), "average", lambda self, y: y.double())
    monkeypatch.setattr("dyreg_triton.swapping.find.probe", lambda *_: None)
    with refused(dt.SwapError, "float64", "float32"):
        dt.swap(model, example=x)


@pytest.mark.parametrize("stride", [1, 2])
def test_outputs_under_autocast_have_the_originals_dtype(stride: int) -> None:
    model = nn.Sequential(rsa(stride=(1, stride, stride))).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = model(values(CLIP)).dtype
        report = dt.swap(model, example=values(CLIP))
        assert model(values(CLIP)).dtype == expected
    assert report.whole is not None


def test_where_no_wider_dtype_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the difference stands, and why nothing more is known."""
    model = nn.Sequential(Casting(), rsa(), nn.Conv3d(8, 8, 1)).to(DEVICE)
    compare = sys.modules["dyreg_triton.swapping.compare"]
    tight = {t: bounds._replace(outputs=1e-12, gradients=1e-12) for t, bounds in compare.TOLERATED.items()}
    monkeypatch.setattr(compare, "TOLERATED", tight)
    with refused(dt.SwapError, "float64", "round-off", "fails"):
        dt.swap(model, example=values(CLIP))
    assert type(model[1]) is published.RSA


class Casting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_only_the_generators_of_its_device_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    states = random.getstate(), np.random.get_state()[1].tolist()
    dt.swap(nn.Sequential(rsa()).to(DEVICE), example=values(CLIP))
    assert not seeds
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_report_without_an_example() -> None:
    model, _ = network("rsa net")
    look_alike = type("RSA", (nn.Module,), {"forward": lambda self, x: x})()
    model.extra = look_alike
    report = dt.swap(model)
    assert isinstance(report, dt.SwapReport)
    assert isinstance(report.modules, tuple)
    assert isinstance(report.left, tuple)
    assert report.whole is None
    assert report.model is model
    assert tuple(report.already) == ()
    for row, path in zip(report.modules, SWAPPED["rsa net"], strict=True):
        ours = model.get_submodule(path)
        assert (row.path, tuple(row.paths)) == (path, (path,))
        assert named([row]) == [(path, "RSA")]
        assert isinstance(row.after, str)
        assert row.after.rpartition(".")[2] == type(ours).__name__
        assert row.parameters == sum(p.numel() for p in ours.parameters()) > 0
        assert (row.error, row.before_ms, row.after_ms) == (None, None, None)
        assert not row.vanishing
    assert named(report.left) == [("extra", "RSA")]
    assert report.left[0].reason


@pytest.mark.parametrize(("name", "example"), [("rsa net", True), ("tsn", True), ("tsn", False)])
def test_report_as_a_table(name: str, example: bool) -> None:
    model, x = network(name)
    model.extra = type("RSA", (nn.Module,), {"forward": lambda self, x: x})()
    report = dt.swap(model, example=x if example else None)
    lines = str(report).splitlines()
    for row in report.modules:
        (line,) = [line for line in lines if row.path in line.split()]
        assert row.before in line
        assert row.after in line
        assert f"{row.parameters:,}" in line or str(row.parameters) in line
        if example:
            assert any(f"{row.error:.{n}e}" in line or f"{row.error:.{n + 1}g}" in line for n in range(4)), line
    assert ("ms" in str(report)) == example
    assert any("extra" in line and "RSA" in line for line in lines)
    assert " ".join(report.left[0].reason.split()) in " ".join(str(report).split())
    if name == "tsn":
        assert "kernel_background" in str(report)
    assert not any(line != line.rstrip() for line in lines)


# --- what a forward leaves ------------------------------------------------------------------------------------------

KEPT = {
    *("kernel", "offsets", "kernel_h", "kernel_w", "kernel_center_h", "kernel_center_w"),
    *("nodes", "nodes_wo_position", "aux_feats"),
}
AUX = {"global_mean_features", "nodes_background", "nodes_foreground", "kernel_foreground"}


def gone(report: dt.SwapReport) -> set[str]:
    """The names that vanish, without the path inside the module that was replaced."""
    return {name.rpartition(".")[2] for name in report.modules[0].vanishing}


@pytest.mark.parametrize("case", ["plain", "projected", "small", "full size"])
def test_regions_are_kept_where_asked(case: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "projected": {"node_dim": 4, "project_i3d": True},
        "small": {"params": {"offset_generator": "small"}},
        "full size": {"side": 8, "iH": 7, "iW": 7, "params": {"full_res": True}},
    }
    side = settings[case].get("side", 7)
    model, x = nn.Sequential(graph(**settings[case])).to(DEVICE), values((2, 2, 8, side, side))
    twin = copy.deepcopy(model)
    report = dt.swap(model, keep_regions=True)
    assert not KEPT & gone(report)
    assert_same(run(model, x), run(twin, x))
    ours, theirs = model[0].dynamic_graph, twin[0].dynamic_graph
    assert set(ours.aux_feats) == set(theirs.aux_feats) == AUX
    found = {name: getattr(ours, name) for name in KEPT - {"aux_feats"}} | ours.aux_feats
    wanted = {name: getattr(theirs, name) for name in KEPT - {"aux_feats"}} | theirs.aux_feats
    for name, value in wanted.items():
        assert not found[name].requires_grad, name
        assert_close(found[name], value.detach(), name, tolerance=1e-4)
    copy.deepcopy(model)  # what is kept has no graph


def test_regions_kept_for_a_model_that_reads_them() -> None:
    model, x = network("tsn", reads=True)
    twin = copy.deepcopy(model)
    dt.swap(model, keep_regions=True)
    (scores, seen), (wanted, expected) = model(x), twin(x)
    assert_close(scores, wanted, tolerance=1e-4)
    assert seen.keys() == expected.keys()
    assert len(seen) == 14
    for name, value in expected.items():
        assert_close(seen[name], value.detach(), name, tolerance=1e-4)
    kernels = [one(x + 1)[1]["layer3_1_kernel"].detach() for one in (model, twin)]  # of the last forward
    assert_close(*kernels, tolerance=1e-4)
    assert not kernels[0].equal(seen["layer3_1_kernel"])


@pytest.mark.parametrize("ran", [True, False], ids=["after a forward", "before"])
def test_regions_that_are_not_kept(ran: bool) -> None:
    """Nor are stale ones from before the swap."""
    model, x = holder("wrapper")
    if ran:
        model(x)
    report = dt.swap(model)
    for _ in range(2):
        for name in KEPT:
            assert not hasattr(model.inner.dynamic_graph, name), name
            with pytest.raises(AttributeError, match=rf"(?s)\b{name}\b.*keep_regions=True"):
                getattr(model.inner.dynamic_graph, name)
        model(x)
    assert gone(report) >= KEPT
    with pytest.raises(AttributeError) as caught:
        model.inner.dynamic_graph.no_such_name  # noqa: B018
    assert "keep_regions" not in str(caught.value)


def test_what_vanishes_in_any_case() -> None:
    model, _ = holder("wrapper")
    report = dt.swap(model, keep_regions=True)
    assert {"kernel_background", "kernel_foreground", "nodes_background"} <= gone(report)
    assert "kernel_background" in str(report)


def test_the_original_has_its_regions_after_undo() -> None:
    model, x = holder("wrapper")
    twin = copy.deepcopy(model)
    report = dt.swap(model)
    model(x)
    report.undo()
    for one in (model, twin):
        one(x)
    assert_identical(model.inner.dynamic_graph.kernel.detach(), twin.inner.dynamic_graph.kernel.detach())


def test_a_model_that_reads_regions_is_refused_without_them() -> None:
    """An example shows it at once, and the message says what to pass."""
    model, x = network("tsn", reads=True)
    model(x)
    with untouched(model), refused(ValueError, "keep_regions=True"):
        dt.swap(model, example=x)
    dt.swap(model)
    with refused(AttributeError, "keep_regions=True"):
        model(x)


def test_an_example_of_a_model_that_returns_kept_regions() -> None:
    """They are compared as values; no gradient flows through what is kept."""
    model, x = network("tsn", reads=True)
    report = dt.swap(model, example=x, keep_regions=True)
    assert report.whole.error < 1e-3
    assert all(is_ours(model.get_submodule(path)) for path in SWAPPED["tsn"])


def test_kept_regions_do_not_outlive_undo() -> None:
    model, x = published.TSN().to(DEVICE), values((2, 2, 3, 7, 7))
    before = snapshot(model)
    report = dt.swap(model, keep_regions=True)
    model(x)
    report.undo()
    after = snapshot(model)
    assert after["modules"] == before["modules"]
