"""`dt.swap` and hooks and parametrizations: they survive, or the module is left alone and the reason names them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_close, assert_identical, run
from swap_cases import Log, assert_same, assert_same_log, holder, is_ours, objects, on_few, rsa, untouched
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import dyreg_triton as dt


@on_few
def test_hooks_of_a_module_fire_with_the_same_values(variant: str) -> None:
    model, x = holder(variant)
    twin = copy.deepcopy(model)
    logs = [Log(one.inner) for one in (model, twin)]
    doubling = [one.inner.register_forward_hook(lambda module, inputs, y: 2 * y) for one in (model, twin)]
    dt.swap(model)
    assert not logs[0].seen  # the probe passes them by
    assert_same(run(model, x), run(twin, x))
    assert len(logs[1].seen) == 5
    assert_same_log(*logs)
    assert logs[0].modules == {model.inner}
    for handle in [*doubling, *(h for log in logs for h in log.handles)]:
        handle.remove()
    assert_same(run(model, x), run(twin, x))
    assert len(logs[0].seen) == len(logs[1].seen) == 5
    assert not model.inner._forward_hooks


class LowRank(nn.Module):
    """In the style of adapters: a leaf that has the weight of another and does more when it is called."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_a_leaf_that_is_replaced_after_the_swap_is_called() -> None:
    model, x = holder("rstg")
    twin = copy.deepcopy(model)
    dt.swap(model)
    model.inner.att_q = LowRank(model.inner.att_q).to(x.device)
    model.inner.send_mlp[0] = LowRank(model.inner.send_mlp[0]).to(x.device)
    twin.inner.att_q, twin.inner.send_mlp[0] = copy.deepcopy((model.inner.att_q, model.inner.send_mlp[0]))
    assert_same(run(model, x), run(twin, x))
    assert model.inner.send_mlp[0].up.weight.grad.any()


def test_a_filter_that_is_replaced_after_the_swap_is_refused() -> None:
    model, x = holder("rsa VplusR VplusR")
    dt.swap(model)
    model.inner.H2 = LowRankFilter(model.inner.H2)
    with pytest.raises(TypeError, match="H2 is a LowRankFilter"):
        model(x)


class LowRankFilter(nn.Module):
    def __init__(self, base: nn.Conv3d):
        super().__init__()
        self.base = base

    weight = property(lambda self: self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * 2


@pytest.mark.parametrize("name", ["H1", "H2", "G"])
def test_a_leaf_that_is_pruned_after_the_swap_is_refused(name: str) -> None:
    model, x = holder("rsa VplusR VplusR")
    dt.swap(model)
    prune.random_unstructured(getattr(model.inner, name), "weight", 0.5)
    with pytest.raises(TypeError, match=r"pruned.*parametriz"):
        model(x)
    prune.remove(getattr(model.inner, name), "weight")
    model(x)


@on_few
def test_parametrized_after_the_swap(variant: str) -> None:
    """What is parametrized in between stays so in the original, and what no longer is does not."""

    class Twice(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * t

    model, x = holder(variant)
    twin = copy.deepcopy(model)
    original = model.inner
    norms = ("P1", "conv1.1.weight", "W.1.weight")
    own = next(path for path, p in model.inner.named_parameters() if "norm" in path or path in norms)
    owner, _, name = own.rpartition(".")
    report = dt.swap(model)
    for one in (model, twin):
        parametrize.register_parametrization(one.inner.get_submodule(owner), name, Twice())
    assert_same(run(model, x), run(twin, x))
    report.undo()
    assert model.inner is original
    assert_same(run(model, x), run(twin, x))
    report = dt.swap(model)
    parametrize.remove_parametrizations(model.inner.get_submodule(owner), name)
    report.undo()
    parametrize.remove_parametrizations(twin.inner.get_submodule(owner), name)
    assert_same(run(model, x), run(twin, x))
    assert type(model.inner) is type(twin.inner)


@on_few
def test_hooks_on_the_state_fire(variant: str) -> None:
    model, _ = holder(variant)
    seen: list[tuple[str, nn.Module]] = []
    inner = model.inner

    def post(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        seen.append(("post", module))
        state[f"{prefix}note"] = torch.ones(2)

    def pre_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        seen.append(("pre_load", module))
        state.pop(f"{prefix}note")

    handles = [
        inner.register_state_dict_pre_hook(lambda module, *_: seen.append(("pre", module))),
        inner.register_state_dict_post_hook(post),
        inner.register_load_state_dict_pre_hook(pre_load),
        inner.register_load_state_dict_post_hook(lambda module, _: seen.append(("post_load", module))),
    ]
    expected = {name: t + 1 for name, t in model.state_dict().items()}
    seen.clear()
    dt.swap(model)
    seen.clear()
    assert list(model.state_dict()) == list(expected)
    assert seen == [("pre", model.inner), ("post", model.inner)]
    seen.clear()
    assert model.load_state_dict(dict(expected), strict=True).missing_keys == []
    assert seen == [("pre_load", model.inner), ("post_load", model.inner)]
    seen.clear()
    for handle in handles:
        handle.remove()
    state = model.state_dict()
    assert "inner.note" not in state
    for name, t in state.items():
        assert_identical(t, expected[name], name)
    assert not seen


@pytest.mark.parametrize("kind", ["pre", "forward", "backward"])
@pytest.mark.parametrize("path", ["H1", "H2", "G"])
def test_a_hook_that_would_be_silent_is_refused_by_name(path: str, kind: str) -> None:
    model, x = holder("rsa VplusR VplusR")
    log = Log(getattr(model.inner, path), (kind,))
    with untouched(model), pytest.raises(dt.SwapError, match=rf"inner\b.*\b{path}\b"):
        dt.swap(model)
    assert not log.seen
    run(model, x)
    assert log.seen
    for handle in log.handles:
        handle.remove()
    dt.swap(model)
    assert is_ours(model.inner)


def test_a_hook_on_the_projection_fires() -> None:
    model, x = holder("rsa VplusR VplusR")
    twin = copy.deepcopy(model)
    logs = [Log(one.inner.projection) for one in (model, twin)]
    dt.swap(model)
    assert is_ours(model.inner)
    assert not logs[0].seen
    assert_same(run(model, x), run(twin, x))
    assert_same_log(*logs)


INSIDE = {
    "wrapper": [
        *("dynamic_graph", "norm_dict.residual_norm", "norm_dict.residual_norm.norm", "dynamic_graph.rstg"),
        *(f"dynamic_graph.rstg.{path}" for path in ("send_mlp", "send_mlp.0", "att_q", "update_mlp", "internal_lstm")),
        *(f"dynamic_graph.rstg.norm_dict.{path}" for path in ("update_norm", "send_message_norm.norm")),
        *(f"dynamic_graph.{path}" for path in ("fishnet", "fishnet.conv1", "fishnet.norm_dict.norm1", "global_conv")),
        *(f"dynamic_graph.{path}" for path in ("global_conv.0", "offset_lstm", "offset_pred", "kernel_projection1")),
    ],
    "wrapper projected": [f"dynamic_graph.project_{path}" for path in ("i3d_linear", "back_i3d_linear")],
    "wrapper small generator": [f"dynamic_graph.{path}" for path in ("glore", "glore.update", "glore.mask_conv")],
}


@pytest.mark.parametrize(("variant", "path"), [(variant, path) for variant, paths in INSIDE.items() for path in paths])
def test_a_hook_inside_fires_with_the_same_values_or_is_named(variant: str, path: str) -> None:
    model, x = holder(variant)
    twin = copy.deepcopy(model)
    logs = [Log(one.inner.get_submodule(path)) for one in (model, twin)]
    spare = nn.ModuleList([model, rsa()])  # something that is taken in any case
    report = dt.swap(spare)
    assert not logs[0].seen
    if not is_ours(model.inner):
        reasons = {row.path: row.reason for row in report.left}
        assert path.rpartition("norm_dict.")[2].rpartition("dynamic_graph.")[2] in reasons["0.inner"]
    assert_same(run(model, x), run(twin, x))
    assert_same_log(*logs)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 1.5


def scaled(path: str, name: str) -> Callable[[Any], Any]:
    return lambda inner: parametrize.register_parametrization(inner.get_submodule(path), name, Scaled())


def normed(path: str) -> Callable[[Any], Any]:
    return lambda inner: parametrizations.weight_norm(inner.get_submodule(path))


PARAMETRIZED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "P1": ("rsa VplusR VplusR", scaled("", "P1"), "P1"),
    "I": ("rsa VplusR VplusR", scaled("", "I"), "I"),
    "H2": ("rsa VplusR VplusR", scaled("H2", "weight"), "H2.weight"),
    "weight norm": ("rsa VplusR VplusR", normed("projection"), "projection.weight"),
    "weight norm of filters": ("rsa VplusR VplusR", normed("G"), "G.weight"),
    "offset_alpha": ("wrapper", scaled("dynamic_graph", "offset_alpha"), "dynamic_graph.offset_alpha"),
    "offset_pred": ("wrapper", normed("dynamic_graph.offset_pred"), "dynamic_graph.offset_pred.weight"),
    "att_q": ("wrapper", normed("dynamic_graph.rstg.att_q"), "dynamic_graph.rstg.att_q.weight"),
}


def parametrized(variant: str, change: Callable[[Any], Any]) -> tuple[Any, Tensor]:
    """The same each time: what the old weight norm changes cannot be copied."""
    torch.manual_seed(1)
    model, x = holder(variant)
    change(model.inner)
    return model, x


@pytest.mark.parametrize("case", PARAMETRIZED)
def test_parametrizations_survive(case: str) -> None:
    variant, change, name = PARAMETRIZED[case]
    (model, x), (twin, _) = parametrized(variant, change), parametrized(variant, change)
    before = objects(model)
    dt.swap(model)
    assert is_ours(model.inner)
    assert objects(model) == before
    owner, _, last = name.rpartition(".")
    assert parametrize.is_parametrized(model.inner.get_submodule(owner), last)
    assert_same(run(model, x), run(twin, x))
    with torch.no_grad():
        for one in (model, twin):
            for p in one.parameters():
                p.mul_(1.1)
    assert_same(run(model, x), run(twin, x))  # and are computed anew
    if case in ("P1", "H2", "offset_alpha"):
        for one in (model, twin):
            parametrize.remove_parametrizations(one.inner.get_submodule(owner), last)
        assert_same(run(model, x), run(twin, x))


RENORMED: dict[str, Callable[[Any], Any]] = {
    "spectral norm": lambda inner: parametrizations.spectral_norm(inner.projection),
    "old spectral norm": lambda inner: nn.utils.spectral_norm(inner.projection),
    "old weight norm": lambda inner: nn.utils.weight_norm(inner.projection),
    "old weight norm of filters": lambda inner: nn.utils.weight_norm(inner.H2),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", RENORMED)
def test_what_changes_its_module_is_kept_exactly_or_left_alone(case: str) -> None:
    """A spectral norm moves its buffers whenever its weight is looked at in training; the old norms are hooks."""
    (model, x), (twin, _) = (parametrized("rsa VplusR VplusR", RENORMED[case]) for _ in range(2))
    spare = nn.ModuleList([model, rsa()])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = dt.swap(spare)
    for name, t in model.state_dict().items():
        assert_identical(t, before[name], name)
    assert is_ours(model.inner) or [row.path for row in report.left] == ["0.inner"]
    for training in (True, False):
        assert_same(run(model.train(training), x), run(twin.train(training), x))
    for name, t in twin.state_dict().items():
        assert_close(model.state_dict()[name], t, name)
