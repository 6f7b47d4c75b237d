"""What `dt.swap` does not take, and why; bad input; nothing changes where something is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import published
import pytest
import torch
from support import DEVICE, assert_identical, run
from swap_cases import CLIP, MAPS, NODES, assert_same, graph, is_ours, named, network, rsa, untouched, values
from test_errors import refused
from torch import Tensor, nn
from torch.nn import functional as F

import dyreg_triton as dt

# --- near misses ----------------------------------------------------------------------------------------------------


class OtherEps(published.RSA):
    def L2norm(self, x: Tensor, d: int = 1) -> Tensor:
        return x / (x.square().sum(d, keepdim=True) + 1e-5).sqrt()


class Rectified(published.RSA):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Dropping(published.RSA):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class OtherInEvaluation(published.RSA):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.training else 2)


class SlightlyOtherEps(published.RSA):
    """What many channels of usual size drown."""

    def L2norm(self, x: Tensor, d: int = 1) -> Tensor:
        return x / (x.square().sum(d, keepdim=True) + 2e-6).sqrt()


class CastingOtherEps(OtherEps):
    """Does not run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Clamping(published.RSA):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-8, 8))


class Drawing(published.RSA):
    """Stochastic depth that hardly ever strikes."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0 * y if self.training and torch.rand(()).item() < 1e-9 else y


class DrawingByPython(published.RSA):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0 * y if random.random() < 1e-9 else y


class KeepingItsProjection(published.RSA):
    """Its train() is its own."""

    def train(self, mode: bool = True) -> KeepingItsProjection:
        super().train(mode)
        self.projection.eval()
        return self


class LastFrames(published.RSTG):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input[:, -8:])


class MoreArguments(published.RSA):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


class MoreResults(published.RSA):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.projection(x)


class Cut(published.RSA):
    """The same values, another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Counting(published.RSA):
    """Keeps a count in a buffer, which ours would not."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class MoreParameters(published.RSA):
    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class FartherOffsets(published.DynamicGraph):
    def get_offsets(self, x: Tensor) -> Tensor:
        return 2 * super().get_offsets(x)


class HardlyFartherOffsets(published.DynamicGraph):
    """Float32 would not tell."""

    def get_offsets(self, x: Tensor) -> Tensor:
        return (1 + 1e-5) * super().get_offsets(x)


class LinearFishnet(published.Fishnet):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm_dict
        x = norm["norm1"](self.conv1(x))  # no ReLU here
        kept = norm["tail_norm_0"](F.relu(self.tail_conv[0](x)))
        x = norm["tail_norm_1"](F.relu(self.tail_conv[1](kept)))
        x = norm["body_trans_norm_0"](F.relu(self.body_trans_conv[0](x))) + kept
        return norm["head_norm_0"](F.relu(self.head_conv[0](x)))


class BorderlessGloRe(published.GloRe):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (self.H * self.W)


Change = Callable[[Any], None]


def become(path: str, kind: type[nn.Module]) -> Change:
    def change(module: Any) -> None:
        module.get_submodule(path).__class__ = kind

    return change


def put(path: str, name: str, value: Any) -> Change:
    def change(module: Any) -> None:
        owner = module.get_submodule(path)
        made = value(owner) if callable(value) and not isinstance(value, nn.Module) else value
        if isinstance(owner, (nn.Sequential, nn.ModuleDict, nn.ModuleList)):
            owner._modules[name] = made
        else:
            setattr(owner, name, made)

    return change


def conv(owner: Any, **settings: Any) -> nn.Conv3d:
    return nn.Conv3d(1, owner.dd, 3, **{"padding": 1, "bias": False, **settings})


def nothing(_: Any) -> None:
    pass


def own_forward(module: Any) -> None:
    former = module.forward
    module.forward = lambda x: 2 * former(x)


def same_forward(module: Any) -> None:
    """Set on the instance, as monkey patches are; that it computes the same nobody can tell from outside."""
    former = module.forward
    module.forward = lambda x: former(x) + 0


def quiet(**params: Any) -> Any:
    return graph(asleep=True, params=params)


G, R = "dynamic_graph", "dynamic_graph.rstg"
# what is made, how it is changed, and the path of the part that then computes something else than ours of it would;
# None where ours calls the changed part itself, so that it may be taken
NEAR: dict[str, tuple[Callable[[], Any], Change, str | None]] = {
    "another eps": (lambda: rsa(OtherEps), nothing, ""),
    "a relu": (lambda: rsa(Rectified), nothing, ""),
    "a dropout": (lambda: rsa(Dropping), nothing, ""),
    "another in evaluation": (lambda: rsa(OtherInEvaluation), nothing, ""),
    "an argument more": (lambda: rsa(MoreArguments), nothing, ""),
    "a slightly other eps": (
        lambda: rsa(SlightlyOtherEps, d_out=256, kernel_type="V", feat_type="V", kernel_size=(1, 1, 3)),
        nothing,
        "",
    ),
    "a clamp": (lambda: rsa(Clamping), nothing, ""),
    "random numbers": (lambda: rsa(Drawing), nothing, ""),
    "random numbers of python": (lambda: rsa(DrawingByPython), nothing, ""),
    "a train of its own": (lambda: rsa(KeepingItsProjection), nothing, ""),
    "a result more": (lambda: rsa(MoreResults), nothing, ""),
    "another gradient": (lambda: rsa(Cut), nothing, ""),
    "a buffer that counts": (lambda: rsa(Counting), nothing, ""),
    "a parameter more": (lambda: rsa(MoreParameters), nothing, ""),
    "a forward of its own": (rsa, own_forward, ""),
    "a forward of its own, same values": (rsa, same_forward, ""),
    "a bias": (rsa, put("", "H2", lambda m: conv(m, bias=True)), ""),
    "circular padding": (rsa, put("", "H2", lambda m: conv(m, padding_mode="circular")), ""),
    "dilation": (rsa, put("", "H2", lambda m: conv(m, padding=2, dilation=2)), ""),
    "a projection of parts": (rsa, put("", "projection", lambda m: nn.Sequential(m.projection, nn.ReLU())), ""),
    "another pooling": (
        lambda: rsa(stride=(1, 2, 2)),
        put("", "avgpool", nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))),
        "",
    ),
    "pooling that counts no padding": (
        lambda: rsa(stride=(1, 2, 2)),
        put("", "avgpool", nn.AvgPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1), count_include_pad=False)),
        "",
    ),
    "offsets twice as far": (quiet, become(G, FartherOffsets), G),
    "offsets hardly farther": (quiet, become(G, HardlyFartherOffsets), G),
    "a linear generator": (quiet, become(f"{G}.fishnet", LinearFishnet), G),
    "averaging small generator": (lambda: quiet(offset_generator="small"), become(f"{G}.glore", BorderlessGloRe), G),
    "a residual norm's eps": (graph, put("norm_dict.residual_norm.norm", "eps", 1e-3), None),
    "a residual norm's eps, asleep": (quiet, put("norm_dict.residual_norm.norm", "eps", 1e-3), None),
    "a message norm's eps": (graph, put(f"{R}.norm_dict.send_message_norm.norm", "eps", 1e-3), None),
    "a norm's eps": (graph, put(f"{R}.norm_dict.update_norm.norm", "eps", 1e-3), None),
    "a norm of fewer dimensions": (graph, put(f"{R}.norm_dict.update_norm", "norm", nn.LayerNorm(8)), None),
    "another message norm": (graph, put(f"{R}.norm_dict", "send_message_norm", nn.LayerNorm(8)), R),
    "another activation": (graph, put(f"{R}.send_mlp", "1", nn.GELU()), None),
    "a slightly other activation": (graph, put(f"{R}.send_mlp", "1", nn.LeakyReLU(1e-3)), None),
    "four rounds, three with recurrences": (graph, put(R, "number_iterations", 4), R),
    "two kinds of recurrence": (graph, put(G, "offset_lstm", nn.GRU(4, 4, batch_first=True)), G),
    "two kinds of recurrence in the graph": (graph, put(R, "external_lstm", nn.GRU(8, 8, batch_first=True)), R),
    "a recurrence without biases": (graph, put(R, "external_lstm", nn.LSTM(8, 8, bias=False, batch_first=True)), R),
    "two layers of recurrence": (graph, put(R, "internal_lstm", nn.LSTM(8, 8, 2, batch_first=True)), R),
    "an update with a dropout": (graph, put(R, "update_mlp", nn.Dropout(0.2)), None),
    "pooling of the last convolution": (graph, put(f"{G}.global_conv", "1", nn.AdaptiveMaxPool2d(1)), None),
}


def results(inner: nn.Module, x: Tensor) -> list[dict[str, Tensor | None]]:
    """In evaluation and in training, with the same draws."""

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        y = inner(x)
        return y[0] if isinstance(y, tuple) else y

    return [run(inner.train(training), x, call=call) for training in (False, True)]


@pytest.mark.parametrize("case", NEAR)
def test_what_computes_something_else_keeps_computing_it(case: str) -> None:
    make, change, where = NEAR[case]
    inners = []
    for _ in range(2):
        torch.manual_seed(2)
        inner = make()
        change(inner)
        inners.append(inner.to(DEVICE, torch.float64))
    kinds = {path: type(m) for path, m in inners[0].named_modules()}
    model = nn.ModuleDict({"inner": inners[0], "spare": rsa()}).to(DEVICE)
    report = dt.swap(model)
    taken = [row.path for row in report.modules]
    assert "spare" in taken
    x = values(CLIP if isinstance(inners[1], published.RSA) else MAPS, dtype=torch.float64)
    for actual, expected in zip(results(model["inner"], x), results(inners[1], x), strict=True):
        if taken == ["spare"]:
            assert_identical(actual["out"], expected["out"])
        assert_same(actual, expected, torch.float64)
    if where is None:
        return
    parts = where.split(".") if where else []
    for n in range(len(parts) + 1):
        path = ".".join(parts[:n])
        assert type(model["inner"].get_submodule(path)) is kinds[path], path
    left = {row.path: row for row in report.left}
    assert left["inner"].reason.strip()
    assert named([left["inner"]]) == [("inner", type(inners[1]).__name__)]
    assert "inner" in str(report)


def test_a_model_in_float32_is_probed_in_float64() -> None:
    make, change, where = NEAR["offsets hardly farther"]
    inner = make()
    change(inner)
    model = nn.ModuleDict({"inner": inner, "spare": rsa()}).to(DEVICE, torch.float32)
    assert where in [row.path.removeprefix("inner.") for row in dt.swap(model).left]


def test_a_module_that_runs_in_float32_only_is_told_apart_there() -> None:
    model = nn.ModuleDict({"inner": rsa(CastingOtherEps), "spare": rsa()}).to(DEVICE)
    assert [row.path for row in dt.swap(model).left] == ["inner"]


class CastingLouder(published.RSA):
    def forward(self, x: Tensor) -> Tensor:
        return 1.0001 * super().forward(x.float())


class Widening(published.RSA):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


@pytest.mark.parametrize(("kind", "reason"), [(CastingLouder, "differ by"), (Widening, "float64")])
def test_casts_inside(kind: type[published.RSA], reason: str) -> None:
    model = nn.ModuleDict({"inner": rsa(kind), "spare": rsa()}).to(DEVICE)
    left = dt.swap(model).left
    assert [row.path for row in left] == ["inner"]
    assert reason in left[0].reason


def test_compiled_and_lazy_parts_are_left() -> None:
    compiled, lazy = rsa(), rsa()
    compiled.projection.compile(backend="eager")
    lazy.projection = nn.LazyConv3d(24, 1, bias=False)
    left = dt.swap(nn.ModuleList([compiled, lazy, rsa()]).to(DEVICE)).left
    assert [row.path for row in left] == ["0", "1"]
    assert "compile" in left[0].reason
    assert "lazy" in left[1].reason


def test_a_clip_longer_than_the_probe_expects() -> None:
    model = nn.ModuleDict({"inner": graph("RSTG"), "spare": rsa()}).to(DEVICE)
    model["inner"].__class__ = LastFrames
    assert [row.path for row in dt.swap(model).left] == ["inner"]


@pytest.mark.parametrize("name", ["train", "state_dict", "get_extra_state"])
def test_methods_set_on_the_instance(name: str) -> None:
    model = nn.ModuleDict({"inner": rsa(), "spare": rsa()}).to(DEVICE)
    setattr(model["inner"], name, lambda *given, **named: None)
    left = dt.swap(model).left
    assert [row.path for row in left] == ["inner"]
    assert name in left[0].reason


def test_random_numbers_are_named() -> None:
    for kind in (Drawing, DrawingByPython):
        left = dt.swap(nn.ModuleList([rsa(kind), rsa()]).to(DEVICE)).left
        assert "random" in left[0].reason


def test_twice_with_one_that_is_left() -> None:
    model = nn.ModuleDict({"inner": rsa(OtherEps), "spare": rsa()}).to(DEVICE)
    dt.swap(model)
    again = dt.swap(model)
    assert (again.modules, list(again.already), [row.path for row in again.left]) == ((), ["spare"], ["inner"])


@pytest.mark.parametrize("case", ["another eps", "a dropout", "a forward of its own", "circular padding", "a bias"])
def test_alone_it_is_an_error_that_says_why(case: str) -> None:
    make, change, _ = NEAR[case]
    inner = make()
    change(inner)
    model = nn.Sequential(nn.Identity(), inner).to(DEVICE).eval()
    x = values(CLIP)
    before = model(x)
    with untouched(model), refused(dt.SwapError, "1", type(inner).__name__) as caught:
        dt.swap(model)
    assert_identical(model(x), before)
    assert isinstance(caught.value, ValueError)
    if case == "a forward of its own":
        assert "forward" in str(caught.value)
    if case == "a bias":
        assert "H2.bias" in str(caught.value)


SETTINGS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "serial": (lambda: graph(params={"rstg_combine": "serial"}), "rstg_combine", "serial"),
    "none": (lambda: graph("DynamicGraph", params={"dynamic_regions": "none"}), "dynamic_regions", "none"),
    "semantic": (lambda: graph("DynamicGraph", params={"dynamic_regions": "semantic"}), "dynamic_regions", "semantic"),
    "another kernel": (rsa, "kernel_type", "X"),
    "another feature": (rsa, "feat_type", "X"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_unsupported_variant_is_named_with_its_setting(case: str) -> None:
    make, setting, value = SETTINGS[case]
    inner = make()
    if isinstance(inner, published.RSA):
        setattr(inner, setting, value)  # its constructor would refuse it
    model = nn.ModuleDict({"inner": inner, "spare": rsa()}).to(DEVICE)
    report = dt.swap(model)
    (reason,) = [row.reason for row in report.left if row.path == "inner"]
    assert setting in reason
    assert value in reason


def look_alike(name: str) -> nn.Module:
    """The name, and nothing of it."""
    module = type(name, (nn.Module,), {"forward": lambda self, x: self.fc(x)})()
    module.fc = nn.Linear(3, 3)
    return module


@pytest.mark.parametrize("name", ["RSA", "DynamicGraph", "DynamicGraphWrapper", "RSTG"])
def test_a_name_alone_is_a_near_miss(name: str) -> None:
    model = nn.ModuleDict({"odd": look_alike(name), "true": rsa()}).to(DEVICE)
    odd, x = model["odd"], values((2, 3))
    before = odd(x)
    report = dt.swap(model)
    assert [row.path for row in report.modules] == ["true"]
    assert named(report.left) == [("odd", name)]
    assert model["odd"] is odd
    assert_identical(odd(x), before)
    alone = nn.Sequential(look_alike(name))
    with untouched(alone), refused(dt.SwapError, "0", name):
        dt.swap(alone)


@pytest.mark.parametrize("part", ["fishnet", "glore"])
def test_generators_are_parts_only(part: str) -> None:
    inner = graph(params={"offset_generator": "big" if part == "fishnet" else "small"}).dynamic_graph
    model = nn.Sequential(getattr(inner, part))
    with untouched(model), pytest.raises(dt.SwapError):
        dt.swap(model)


def test_nothing_that_matches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.LSTM(3, 3))
    with untouched(model), refused(dt.SwapError, "RSA", "DynamicGraph"):
        dt.swap(model)


def test_no_class_is_changed() -> None:
    """Per instance: another model of the same classes, and the classes themselves, stay the authors'."""
    forwards = {kind: kind.forward for kind in (published.RSA, published.DynamicGraphWrapper, published.RSTG)}
    one, other = network("tsn")[0], network("tsn")[0]
    with untouched(other):
        dt.swap(one)
    assert all(kind.forward is forward for kind, forward in forwards.items())
    assert not any(is_ours(module) for module in other.modules())


# --- bad input ------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "a number": (5, {}, TypeError, ("model", "5")),
    "nothing": (None, {}, TypeError, ("model", "None")),
    "a function": (torch.relu, {}, TypeError, ("model", "relu")),
    "a class": (published.RSA, {}, TypeError, ("model", "RSA", "class")),
    "a list of modules": ([nn.ReLU()], {}, TypeError, ("model",)),
    "only, a number": (None, {"only": 3}, TypeError, ("only", "3")),
    "only, numbers": (None, {"only": ["layer1", 3]}, TypeError, ("only", "3")),
    "only, bytes": (None, {"only": b"RSA"}, TypeError, ("only", "RSA")),
    "only, a class": (None, {"only": published.RSA}, TypeError, ("only", "RSA")),
    "only, nothing": (None, {"only": []}, ValueError, ("only", "[]")),
    "only, no such path": (
        None,
        {"only": "layer3"},
        ValueError,
        ("only", "layer3", "layer1.0.conv2", "layer2.0.conv2"),
    ),
    "only, part of a path": (None, {"only": "layer"}, ValueError, ("only", "layer", "layer1.0.conv2")),
    "only, no such class": (None, {"only": "RSTG"}, ValueError, ("only", "RSTG", "layer1.0.conv2")),
    "only, one of two": (None, {"only": ["layer1", "layer9.*"]}, ValueError, ("only", "layer9.*", "layer1.0.conv2")),
    "only, nothing inside": (None, {"only": "fc"}, ValueError, ("only", "fc", "layer1.0.conv2")),
    "example, a number": (None, {"example": 3.5}, TypeError, ("example", "3.5")),
    "example, a name": (None, {"example": "clip"}, TypeError, ("example", "clip")),
    "example, a negative size": (None, {"example": (2, 3, -3, 6, 5)}, ValueError, ("example", "-3")),
    "keep_regions, a number": (None, {"keep_regions": 1}, ValueError, ("keep_regions", "1")),
    "keep_regions, a word": (None, {"keep_regions": "yes"}, ValueError, ("keep_regions", "yes")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    given, arguments, error, parts = BAD[case]
    if not arguments:
        with refused(error, *parts):
            dt.swap(given)
        return
    model, _ = network("rsa net")
    with untouched(model), refused(error, *parts):
        dt.swap(model, **arguments)


def test_all_but_the_model_go_by_name() -> None:
    model, _ = network("rsa net")
    with untouched(model), pytest.raises(TypeError):
        dt.swap(model, "RSA")  # type: ignore[misc]


@pytest.mark.parametrize("path", ["layer1.0.conv2", "fc"])
def test_a_model_on_meta(path: str) -> None:
    model = published.RSANet()
    model.get_submodule(path).to("meta")
    kinds = [type(m) for m in model.modules()]
    with refused(ValueError, "meta", path) as caught:
        dt.swap(model)
    assert not isinstance(caught.value, dt.SwapError)
    assert [type(m) for m in model.modules()] == kinds


def test_half_precision_on_the_cpu() -> None:
    model = published.RSANet().half()
    with untouched(model), refused(ValueError, "float16"):
        dt.swap(model)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_inside_a_compiled_function(fullgraph: bool) -> None:
    model, x = network("rsa net")

    def step(x: Tensor) -> Tensor:
        dt.swap(model)
        return model(x)

    torch.compiler.reset()
    with untouched(model), refused(RuntimeError, "torch.compile"):
        torch.compile(step, backend="eager", fullgraph=fullgraph)(x)


def test_only_a_near_miss() -> None:
    model = nn.ModuleDict({"odd": rsa(OtherEps), "true": rsa()}).to(DEVICE)
    with untouched(model), refused(dt.SwapError, "odd"):
        dt.swap(model, only="odd")
    report = dt.swap(model, only="true")
    assert [row.path for row in report.modules] == ["true"]


def test_errors_leave_a_swapped_model_alone() -> None:
    model = nn.ModuleDict({"one": rsa(), "two": rsa(feat_type="V"), "graph": graph("RSTG")}).to(DEVICE)
    first = dt.swap(model, only=["one", "graph"])
    twin = copy.deepcopy(model)
    with untouched(model), pytest.raises(ValueError, match="three"):
        dt.swap(model, only="three")
    x = values(NODES)
    assert_identical(model["graph"](x), twin["graph"](x))
    first.undo()
    assert not any(is_ours(m) for m in model.modules())
