"""What the tests of `dt.swap` share: variants of the published modules, what a caller may hold of a model, hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import published
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


def fewer_rounds() -> Any:
    module = graph()
    module.dynamic_graph.rstg.number_iterations = 2
    return module


KINDS = ("V", "R", "VplusR")
CLIP, MAPS, NODES = (2, 8, 3, 5, 4), (2, 2, 8, 7, 7), (2, 3, 8, 9)
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
}
FEW = ("rsa VplusR VplusR", "wrapper", "rstg")
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
    return awake(published.TSN(**settings)).to(DEVICE), values((2, 2, 3, 7, 7))


on_networks = pytest.mark.parametrize("name", ["rsa net", "tsn"])
SWAPPED = {
    "rsa net": ["layer1.0.conv2", "layer2.0.conv2"],
    "tsn": ["base_model.layer3.1.conv2.1", "base_model.layer4.0.conv2.1"],
}


def named(rows: Any) -> list[tuple[str, str]]:
    """(path, class) of a report's rows, the class without its package."""
    return [(row.path, row.before.rpartition(".")[2]) for row in rows]


def is_ours(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("dyreg_triton.") for kind in type(module).__mro__)


def assert_same(actual: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    outputs, gradients = TOLERANCES[dtype]
    assert actual["out"].dtype == expected["out"].dtype
    assert_close(actual["out"], expected["out"], tolerance=outputs)
    assert_results_close(actual, expected, gradients)


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
