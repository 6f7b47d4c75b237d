"""Every dtype under every autocast, on every layer and op: it computes, or is refused by this library's own words."""

from __future__ import annotations

import itertools

import pytest
import torch
from layer_cases import LAYERS
from support import awake
from torch import Tensor

import dyreg_triton as dt

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32, torch.float64)
OTHERS = (torch.float8_e4m3fn, torch.int64, torch.complex64)


def input_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape) if dtype in FLOATS else torch.ones(shape)
    return x.to(device, dtype)


def accepted(layer: torch.dtype, x: torch.dtype, autocast: torch.dtype | None) -> bool:
    """As torch's autocast, which casts no float64, and whose norms take one dtype beside float32."""
    if x == layer and (autocast is None or layer in (torch.float32, torch.float64, autocast)):
        return True
    return autocast is not None and layer in (torch.float32, autocast) and x in (*HALVES, torch.float32)


@pytest.mark.parametrize("autocast", [None, *HALVES], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_or_refuse(name: str, autocast: torch.dtype | None, device: torch.device) -> None:
    make, shape = LAYERS[name]
    state = awake(make()).state_dict()
    for own in FLOATS:
        layer = make()
        layer.load_state_dict(state)
        layer.to(device, own)
        for dtype in (*FLOATS, *OTHERS):
            x = input_of(shape, dtype, device)
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                if accepted(own, dtype, autocast):
                    y = layer(x)
                    assert y.dtype in {x.dtype, own, autocast, torch.float32}
                    assert y.isfinite().all()
                else:
                    with pytest.raises((TypeError, ValueError), match="accepted"):
                        layer(x)
            if accepted(own, dtype, autocast):
                y.float().square().sum().backward()


REGIONS = torch.tensor([[2.0, 2.0, 1.5, 1.5]])
OPS = {
    "region_pool": (lambda x, r: dt.ops.region_pool(x, r), ((2, 4, 5), REGIONS)),
    "region_remap": (lambda x, r: dt.ops.region_remap(x, r, (4, 5)), ((1, 2), REGIONS)),
    "bilinear_transform": (lambda x, p: dt.ops.bilinear_transform(x, p, p), ((1, 2, 2, 4, 4), (1, 1, 2, 2, 2))),
    "relational_attention": (
        lambda v, q: dt.ops.relational_attention(q, None, v, h2=v[0, :, :1].new_ones(2, 1, 3, 3)),
        ((1, 2, 2, 4, 4), (1, 2, 2, 2, 4, 4)),
    ),
}


@pytest.mark.parametrize("autocast", [None, *HALVES], ids=str)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_ops_compute_or_refuse(name: str, backend: str, autocast: torch.dtype | None, device: torch.device) -> None:
    op, (shape, other) = OPS[name]
    for own, dtype in itertools.product((*FLOATS, *OTHERS), repeat=2):
        refused = own in OTHERS or dtype in OTHERS
        x = input_of(shape, own, device)
        y = input_of(other, dtype, device) if isinstance(other, tuple) else other.to(device, dtype, copy=True)
        x, y = (t.requires_grad_(t.dtype in FLOATS) for t in (x, y))
        on = torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)
        with dt.backend(backend), on:
            problem = None
            try:
                out = op(x, y)
            except (TypeError, ValueError) as error:
                problem = str(error)
        if problem is not None:
            assert own != dtype or own in OTHERS, problem
            assert "accepted" in problem
        else:
            assert not refused
            assert out.isfinite().all()
            out.float().sum().backward()
