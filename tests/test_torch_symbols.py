"""A torch that lacks one of the private names that the ops' short way goes by: every op takes the public one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import DEVICE, BilinearCase, RegionCase, RelationalCase, assert_identical
from torch import Tensor

import dyreg_triton as dt
from dyreg_triton.ops import custom, torch_symbols

CASES = {
    **{op: RegionCase(op, (1,), 3, 4, (3, 4), kind="mixed") for op in ("region_pool", "region_remap", "region_kernel")},
    "relational_attention": RelationalCase(clip=(1, 2, 2), channels=4, latent=4, mixed=4, eps=1e-2),
    "bilinear_transform": BilinearCase((2, 2), (2, 4), (2, 2), 2, 1, 4, 2),
}


def results(name: str) -> dict[str, Tensor]:
    case = CASES[name]
    values = {key: t.to(DEVICE) for key, t in case.values().items()}
    grad_output = values.pop("grad_output")
    leaves = {key: t.requires_grad_() for key, t in values.items()}
    with dt.backend("triton"):
        y = case.function(dt.ops)(**leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), grad_output)
    return {"out": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.fixture(params=torch_symbols._PATHS)
def lacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on this torch lacks a name."""

    def remove() -> None:
        monkeypatch.setitem(torch_symbols._PATHS, request.param, "_C._of_another_torch")
        found = torch_symbols.found()
        assert found.count(None) == 1
        monkeypatch.setattr(custom, "_torch", found)
        monkeypatch.setattr(custom, "_short_way", None not in found)

    return remove


def test_all_are_here() -> None:
    assert len(torch_symbols.found()) == 9
    assert None not in torch_symbols.found()
    assert custom._short_way


def test_the_ops_have_nothing_else_of_torchs_private_modules() -> None:
    for path in Path(custom.__file__).parent.glob("*.py"):
        named = re.findall(r"\btorch\._C\b", path.read_text(encoding="utf-8"))
        assert not named or path.name == "torch_symbols.py", path


@pytest.mark.kernels
def test_results_are_the_same(lacking: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: results(name) for name in CASES}
    lacking()
    monkeypatch.setattr(custom, "_observed", None)  # the short way would ask
    for name in CASES:
        for key, t in results(name).items():
            assert_identical(t, expected[name][key], f"{name}: {key}")


@pytest.mark.kernels
def test_what_is_refused_is_refused(lacking: Callable[[], None]) -> None:
    """Of torch.func's transforms only where they can be asked for."""
    lacking()
    x, regions = torch.randn(4, 3, 3, device=DEVICE), torch.rand(2, 4, device=DEVICE) + 1
    with dt.backend("triton"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            dt.ops.region_pool(dual, regions)
    if custom._torch.transforms is not None:
        with dt.backend("triton"), pytest.raises(RuntimeError, match=r"torch\.func's gradient transforms"):
            torch.func.grad(lambda x: dt.ops.region_pool(x, regions).sum())(x)
