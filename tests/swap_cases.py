"""What the tests of `dt.swap` share: variants of the published modules, what a caller may hold of a model, hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import published
import published_images
import pytest
import torch
from support import DEVICE, assert_close, assert_identical, assert_results_close, awake
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# of outputs and of gradients
TOLERANCES = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-4, 1e-3), torch.bfloat16: (3e-2, 1e-1)}


# --- models ---------------------------------------------------------------------------------------------------------


def rsa(kind: type[published.RSA] = published.RSA, **settings: Any) -> published.RSA:
    return awake(
        kind(
            **{
                "d_in": 8,
                "d_out": 8,
                "nh": 2,
                "dk": 0,
                "kernel_size": (3, 3, 3),
                "kernel_type": "VplusR",
                "feat_type": "VplusR",
                **settings,
            }
        )
    )


def graph(
    name: str = "DynamicGraphWrapper",
    *,
    rnn_type: str = "LSTM",
    side: int = 7,
    params: dict[str, Any] | None = None,
    asleep: bool = False,
    **settings: Any,
) -> Any:
    """A published module of dynamic regions; `asleep`: as it starts, with a branch that adds nothing."""
    chosen = published.dyregParams(**{"offset_lstm_dim": 4, **(params or {})})
    sizes: dict[str, Any] = {"H": side, "W": side, "node_dim": 8}
    if name == "RSTG":
        sizes = {"node_dim": 8}
    else:
        sizes["in_channels" if name == "DynamicGraphWrapper" else "backbone_dim"] = 8
    with mock.patch.multiple(published.ARGS, rnn_type=rnn_type, offset_lstm_dim=chosen.offset_lstm_dim):
        module = getattr(published, name)(chosen, **{**sizes, **settings})
    return module if asleep else awake(module)


TRANSFORM: dict[str, Any] = {"in_channels": 8, "s": 3, "ts": 2, "k": 2, "tk": 2}
BLOCK: dict[str, Any] = {**TRANSFORM, "dropout": 0.0}
IMAGE_TRANSFORM: dict[str, Any] = {"in_channels": 8, "s": 3, "k": 2}
IMAGE_BLOCK: dict[str, Any] = {**IMAGE_TRANSFORM, "dropout": 0.0}


def block(kind: type[nn.Module] = published.BATBlock, **settings: Any) -> Any:
    """A published bilinear transform or non-local block; its matrices are far from uniform."""
    one = published
    sizes: dict[str, Any] = {"in_channels": 8}
    for base, small in (
        (one.BATransform, TRANSFORM),
        (one.BATBlock, BLOCK),
        (published_images.BATransform, IMAGE_TRANSFORM),
        (published_images.BATBlock, IMAGE_BLOCK),
        (published_images.NonLocal, {"inplanes": 8}),
    ):
        sizes = small if issubclass(kind, base) else sizes
    module = awake(kind(**{**sizes, **settings}))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[0].endswith(("conv_p", "conv_q", "conv_t")):
                parameter.mul_(3)
    return module


def fewer_rounds() -> Any:
    module = graph()
    module.dynamic_graph.rstg.number_iterations = 2
    return module


KINDS = ("V", "R", "VplusR")
CLIP, MAPS, NODES = (2, 8, 3, 5, 4), (2, 2, 8, 7, 7), (2, 3, 8, 9)
VIDEO, IMAGES = (2, 8, 4, 6, 6), (2, 8, 6, 6)
Made = tuple[Callable[[], nn.Module], tuple[int, ...]]
VARIANTS: dict[str, Made] = {
    **{
        f"rsa {k} {f}": (lambda k=k, f=f: rsa(kernel_type=k, feat_type=f), CLIP)  # type: ignore[misc]
        for k, f in product(KINDS, KINDS)
    },
    "rsa stride": (lambda: rsa(stride=(1, 2, 2)), CLIP),
    "rsa stride of time alone": (lambda: rsa(stride=(2, 1, 1)), CLIP),  # pools height and width all the same
    "rsa sizes": (lambda: rsa(nh=4, dk=4, dv=6, dd=5, kernel_type="R", feat_type="R", kernel_size=(1, 3, 5)), CLIP),
    "rsa one query": (lambda: rsa(nh=1, d_in=6, d_out=4), (2, 6, 3, 5, 4)),
    "rsa fewer outputs": (lambda: rsa(nh=3, dk=2, dv=2), CLIP),
    "graph": (lambda: graph("DynamicGraph"), MAPS),
    "wrapper": (graph, MAPS),
    "wrapper projected": (lambda: graph(node_dim=4, project_i3d=True), MAPS),
    "wrapper small generator": (lambda: graph(params={"offset_generator": "small"}), MAPS),
    "wrapper on a grid": (lambda: graph(params={"init_regions": "grid"}), MAPS),
    "wrapper at full size": (lambda: graph(side=8, iH=7, iW=7, params={"full_res": True}), (1, 2, 8, 8, 8)),
    "wrapper gru": (lambda: graph(rnn_type="GRU"), MAPS),
    "wrapper side 14": (lambda: graph(side=14), (1, 2, 8, 14, 14)),
    "wrapper fewer rounds": (fewer_rounds, MAPS),
    "rstg": (lambda: graph("RSTG"), NODES),
    "rstg mean": (lambda: graph("RSTG", params={"aggregation_type": "sum"}), NODES),
    "rstg deep": (lambda: graph("RSTG", params={"send_layers": 2, "update_layers": 2}), NODES),
    "rstg update 1 gru": (lambda: graph("RSTG", rnn_type="GRU", params={"update_layers": 1}), NODES),
    "rstg concatenating": (
        lambda: graph("RSTG", params={"combine_by_sum": False, "send_layers": 2, "update_layers": 2}),
        NODES,
    ),
    "transform": (lambda: block(published.BATransform), VIDEO),
    "transform without time": (lambda: block(published.BATransform, tk=0), (2, 8, 3, 6, 6)),
    "transform that slides": (lambda: block(published.BATransform, tk=1, k=4), (2, 8, 4, 4, 8)),
    "transform with one scale": (lambda: block(published.BATransform, s=2), (2, 8, 2, 3, 6)),  # H's, for W too
    "transform of one cell": (lambda: block(published.BATransform, s=1, ts=1, k=1, tk=1), (2, 8, 3, 4, 5)),
    "transform of images": (lambda: block(published_images.BATransform), IMAGES),
    "block": (block, VIDEO),
    "block that slides": (lambda: block(r=1, k=4, tk=4), (2, 8, 4, 8, 8)),
    "block without time": (lambda: block(tk=0), (2, 8, 3, 6, 6)),
    "block of images": (lambda: block(published_images.BATBlock), IMAGES),
    "nonlocal 1d": (lambda: block(published.NONLocalBlock1D), (2, 8, 9)),
    "nonlocal 2d": (lambda: block(published.NONLocalBlock2D, head=2), (2, 8, 6, 5)),
    "nonlocal 3d": (lambda: block(published.NONLocalBlock3D), (2, 8, 3, 4, 5)),
    "nonlocal of all positions": (lambda: block(published.NONLocalBlock3D, sub_sample=False), (2, 8, 3, 4, 5)),
    "nonlocal without a scale": (lambda: block(published.NONLocalBlock3D, use_scale=False), (2, 8, 3, 4, 5)),
    "nonlocal without a norm": (
        lambda: block(published.NONLocalBlock2D, bn_layer=False, inter_channels=6, head=3),
        IMAGES,
    ),
    "nonlocal of images": (lambda: block(published_images.NonLocal), IMAGES),
    "nonlocal of images without a scale": (lambda: block(published_images.NonLocal, use_scale=False), IMAGES),
}
FEW = ("rsa VplusR VplusR", "wrapper", "rstg", "block", "nonlocal 3d")
on_variants = pytest.mark.parametrize("variant", VARIANTS)
on_few = pytest.mark.parametrize("variant", FEW)


def values(shape: tuple[int, ...], seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def holder(variant: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """A model with the variant as `inner`, and an input."""
    make, shape = VARIANTS[variant]
    model = nn.Sequential(OrderedDict(first=nn.Identity(), inner=make()))
    return model.to(DEVICE, dtype), values(shape, dtype=dtype)


def network(name: str, **settings: Any) -> tuple[Any, Tensor]:
    """A whole network of the published kind, and an input."""
    if name == "rsa net":
        return published.RSANet(**settings).to(DEVICE), values((2, 3, 3, 6, 5))
    if name == "bat net":
        return published.BATNet(**settings).to(DEVICE), values((2, 3, 4, 6, 6))
    if name == "image net":
        return published_images.ImageNet(**settings).to(DEVICE), values((2, 3, 6, 6))
    return awake(published.TSN(**settings)).to(DEVICE), values((2, 2, 3, 7, 7))


SWAPPED = {
    "rsa net": ["layer1.0.conv2", "layer2.0.conv2"],
    "tsn": ["base_model.layer3.1.conv2.1", "base_model.layer4.0.conv2.1"],
    "bat net": ["layer2.nl0", "layer3.nl0", "layer3.nl1"],
    "image net": ["layer2.nl0", "layer3.nl0"],
}
on_networks = pytest.mark.parametrize("name", SWAPPED)


def named(rows: Any) -> list[tuple[str, str]]:
    """(path, class) of a report's rows, the class without its package."""
    return [(row.path, row.before.rpartition(".")[2]) for row in rows]


def is_ours(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("dyreg_triton.") for kind in type(module).__mro__)


# biases whose gradient is round-off: of keys, which softmax takes away, and in training of what a batch norm takes away
ROUND_OFF = ("phi.bias", "phi.1.bias", ".p.bias", "g.bias", "g.1.bias", "W.0.bias", "z.bias", ".0.bias")


def assert_same(actual: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    outputs, gradients = TOLERANCES[dtype]
    assert actual["out"].dtype == expected["out"].dtype
    assert_close(actual["out"], expected["out"], tolerance=outputs)
    assert_gradients_same(actual, expected, gradients)


def assert_gradients_same(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """In 64 bits no gradient is but round-off beside what `assert_results_close` lets pass."""
    wide = all(t is None or t.dtype == torch.float64 for t in expected.values())
    small = {} if wide else {name: t for name, t in expected.items() if name.endswith(ROUND_OFF)}
    rest = {name: t for name, t in expected.items() if name not in small}
    assert_results_close({name: actual[name] for name in rest}, rest, tolerance)
    assert actual.keys() == expected.keys()
    scale = max(t.norm().item() for t in rest.values() if t is not None)
    for name, t in small.items():
        assert_close(actual[name], t, name, tolerance=tolerance, floor=scale)


def objects(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a caller may hold in his hands, and its order."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": [(name, id(t), t.dtype, t.device, t.requires_grad, t.is_leaf) for name, t in tensors],
        "gradients": [(name, None if p.grad is None else (id(p.grad), p.grad._version)) for name, p in tensors],
        "parameters": [(name, p._version) for name, p in model.named_parameters()],
        "keys": list(model.state_dict()),
    }


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refusal, or a swap that is undone, leaves alone."""
    modules = list(model.named_modules(remove_duplicate=False))
    return {
        **objects(model),
        "modules": [(path, id(m), type(m), m.training, sorted(vars(m))) for path, m in modules],
        "values": {name: t.clone() for name, t in model.state_dict().items()},
        "random": torch.get_rng_state(),
    }


def assert_untouched(after: dict[str, Any], before: dict[str, Any]) -> None:
    before, after = dict(before), dict(after)
    assert after.pop("random").equal(before.pop("random"))
    now, then = after.pop("values"), before.pop("values")
    for name, value in then.items():
        assert_identical(now[name], value, name)
    for part, value in before.items():
        assert after[part] == value, part


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert_untouched(snapshot(model), before)


# --- hooks ---------------------------------------------------------------------------------------------------------


class Log:
    """Hooks of every kind on a module, what they saw, and their handles."""

    def __init__(self, module: nn.Module, kinds: tuple[str, ...] = ("pre", "kwargs", "forward", "backward")):
        self.seen: list[tuple[str, list[Tensor]]] = []
        self.modules: set[nn.Module] = set()
        make: dict[str, Callable[..., Any]] = {
            "pre": lambda hook: [module.register_forward_pre_hook(hook)],
            "kwargs": lambda hook: [module.register_forward_hook(hook, with_kwargs=True, prepend=True)],
            "forward": lambda hook: [module.register_forward_hook(hook, always_call=True)],
            "backward": lambda hook: [
                module.register_full_backward_pre_hook(hook),
                module.register_full_backward_hook(hook),
            ],
        }
        self.handles = [handle for kind in kinds for handle in make[kind](self.hook(kind))]

    def hook(self, kind: str) -> Callable[..., None]:
        def note(module: nn.Module, *given: Any) -> None:
            self.modules.add(module)
            self.seen.append((kind, [t.detach().clone() for t in tree_leaves(given) if isinstance(t, Tensor)]))

        return note


def assert_same_log(actual: Log, expected: Log, tolerance: float = 1e-3) -> None:
    assert expected.seen
    assert [kind for kind, _ in actual.seen] == [kind for kind, _ in expected.seen]
    scale = max(t.norm().item() for kind, tensors in expected.seen for t in tensors)
    for (kind, found), (_, wanted) in zip(actual.seen, expected.seen, strict=True):
        assert len(found) == len(wanted), kind
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, kind, tolerance=tolerance, floor=1e-4 * scale)
