"""Every layer starts so that it can learn: within two steps every parameter has had a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import LAYERS
from support import awake
from torch import Tensor, nn

import dyreg_triton as dt

NATIVE = [name for name in LAYERS if "." not in name]


def without_effect(layer: nn.Module, x: Tensor, name: str) -> bool:
    """Whether the function does not depend on a bias at all, as on one before a norm or a softmax over its places."""
    layer = awake(copy.deepcopy(layer))
    if not name.endswith("bias"):
        return False
    before = layer(x)
    with torch.no_grad():
        layer.get_parameter(name).add_(0.5)
    return torch.allclose(before, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_after_two_steps_every_parameter_has_had_a_gradient(name: str, device: torch.device) -> None:
    make, shape = LAYERS[name]
    layer = make().to(device, torch.float64)  # in which the smallest gradient is none of round-off
    for part in layer.modules():
        if isinstance(part, (nn.Dropout2d, nn.Dropout3d)):
            part.p = 0.0
    x = torch.randn(shape, device=device, dtype=torch.float64)
    target = torch.randn_like(layer(x))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    learned: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - target).square().sum().sqrt().backward()
        grads = {n: p.grad for n, p in layer.named_parameters()}
        learned |= {n for n, g in grads.items() if g is not None and g.abs().max() > 1e-13}
        assert all(g is None or g.isfinite().all() for g in grads.values())
        optimizer.step()
    idle = [n for n, _ in layer.named_parameters() if n not in learned and not without_effect(layer, x, n)]
    assert not idle


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("zero_init", [False, True])
def test_a_non_local_block_starts_as_the_identity(norm: str, zero_init: bool) -> None:
    block = dt.layers.NonLocalBlock(8, norm=norm, zero_init=zero_init)
    x = torch.randn(2, 8, 4, 4, 5)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)
    last = block.W[0] if norm != "none" else block.W
    assert last.weight.any() == (not zero_init and norm != "none")


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_published_zero_init_starts_both_at_0_as_published(dimensions: int) -> None:
    block = dt.compat.build(f"models.non_local.NONLocalBlock{dimensions}D", in_channels=8, zero_init=True)
    block.init_modules()
    assert not block.W[0].weight.any()
    assert not block.W[1].weight.any()
    block = dt.compat.build(f"models.non_local.NONLocalBlock{dimensions}D", in_channels=8, bn_layer=False)
    block.init_modules()
    assert not block.W.weight.any()
