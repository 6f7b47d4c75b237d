"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import DEVICE, FULL, INTERPRETED

import dyreg_triton as dt
from dyreg_triton._core import dispatch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA where there is a GPU and kernels are not interpreted, else the CPU."""
    return DEVICE


@pytest.fixture(scope="session", autouse=True)
def _no_tuning_of_ones_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Launches take the heuristic's configs, whatever was tuned on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("DYREG_TRITON_TUNING", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """Triton's interpreter takes a third of its time, but for `make full`."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED and not FULL:
            import interpreter

            interpreter.quicken(patch)
        yield


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from one seed, on backend "auto" and without TF32, and leaves the backend as it was."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    with dt.backend("auto"):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of kernels are deselected where no kernel can run, and what repeats others with more values but in full."""
    if not FULL:
        more = [item for item in items if item.get_closest_marker("full")]
        if more:
            config.hook.pytest_deselected(items=more)
            items[:] = [item for item in items if item not in more]
    if dispatch.can_run("triton", device=DEVICE, dtype=torch.float32):
        return
    kernels = [item for item in items if item.get_closest_marker("kernels")]
    if kernels:
        config.hook.pytest_deselected(items=kernels)
        items[:] = [item for item in items if item not in kernels]
