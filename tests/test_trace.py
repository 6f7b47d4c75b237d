"""torch.jit.trace of every layer on the eager backend: it is saved and loaded, and computes the same."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from layer_cases import LAYERS
from published import RSA
from support import awake
from torch import Tensor, nn

import dyreg_triton as dt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def traced_and_loaded(layer: nn.Module, x: Tensor) -> nn.Module:
    with dt.backend("eager"):
        traced = torch.jit.trace(layer, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize(
    ("name", "training"), [*((name, False) for name in LAYERS), ("BATBlock", True), ("NonLocalBlock", True)]
)
def test_a_traced_layer_is_saved_and_loaded(name: str, training: bool, device: torch.device) -> None:
    make, shape = LAYERS[name]
    layer = awake(make()).to(device).train(training)
    for part in layer.modules():
        if isinstance(part, (nn.Dropout2d, nn.Dropout3d)):
            part.p = 0.0
    twin = copy.deepcopy(layer)
    loaded = traced_and_loaded(layer, torch.randn(shape, device=device))
    x = torch.randn(shape, device=device)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with dt.backend("eager"):
        expected = twin(ours)
    actual = loaded(theirs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for y, leaf in ((expected, ours), (actual, theirs)):
        y.square().sum().backward()
        assert leaf.grad is not None
    torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-3 * float(ours.grad.abs().max()))


def test_a_swapped_model_is_traced_as_the_published_one_was(device: torch.device) -> None:
    rsa = RSA(8, 8, 2, 4, 4, 4, (3, 3, 3), kernel_type="VplusR", feat_type="VplusR")
    model = nn.Sequential(nn.Conv3d(3, 8, 1), rsa, nn.BatchNorm3d(8)).to(device)
    x = torch.randn(2, 3, 4, 5, 6, device=device)
    model(x)
    model.eval()
    before = traced_and_loaded(model, x)
    dt.swap(model)
    after = traced_and_loaded(model, x)
    again = torch.randn_like(x)
    torch.testing.assert_close(after(again), before(again), rtol=1e-4, atol=1e-5)
