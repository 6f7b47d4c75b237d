"""What claims that its memory grows with its input, and not with the square of it, is measured: no tensor is larger.

Every tensor that torch makes inside, forward and backward, is seen at the dispatcher, so nothing is timed or sampled.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import in_full
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dyreg_triton as dt


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that any call inside returns, and which call that is."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.call = 0, "nothing"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() > self.bytes:
                self.bytes, self.call = t.untyped_storage().nbytes(), str(func)
        return out


def largest(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[int, str]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    with Largest() as seen:
        call(*leaves).sum().backward()
    return seen.bytes, seen.call


# --- non-local blocks: never positions x positions ------------------------------------------------------------------

BLOCKS = [
    (channels, inner, heads, dimensions, dtype)
    for channels, inner, heads in ((8, 8, 8), (8, 8, 2), (8, 1, 1), (1, 4, 4), (1, 1, 1))
    for dimensions in (1, 2, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if dtype == torch.float32 or heads == 8
]
SHAPES: dict[int, list[tuple[int, ...]]] = {
    1: [(600,)],
    2: [(30, 20), (1, 600), (600, 1)],
    3: [(6, 10, 10), (1, 30, 20), (600, 1, 1), (1, 1, 600)],
}


@pytest.mark.parametrize(("channels", "inner", "heads", "dimensions", "dtype"), BLOCKS)
def test_a_non_local_block_stores_no_weights(
    channels: int, inner: int, heads: int, dimensions: int, dtype: torch.dtype, device: torch.device
) -> None:
    block = dt.layers.NonLocalBlock(channels, inner, heads=heads, dimensions=dimensions, sub_sample=False, norm="none")
    block.to(device, dtype)
    for batch, sizes, last in itertools.product((1, 2), SHAPES[dimensions], (False, True)):
        x = torch.randn(batch, channels, *sizes, device=device).to(dtype)
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        most, call = largest(block, x)
        positions = x[0, 0].numel()
        # four bytes a number, and the copies of torch's own kernels: beyond any of them is only positions squared
        assert most < 8 * batch * positions * (max(channels, inner) + 16), (call, sizes)


# --- relational attention: nothing of C D, D E or E F numbers a position for the whole clip -------------------------

RELATIONAL = {"L": (1, 4), "C": (1, 8), "T": (1, 32)}


@pytest.mark.parametrize("kernel", [*in_full(["V", "R"]), "V+R"])
@pytest.mark.parametrize(("queries", "channels", "frames"), list(itertools.product(*RELATIONAL.values())))
def test_relational_attention_walks_over_frames(
    kernel: str, queries: int, channels: int, frames: int, device: torch.device
) -> None:
    """With steps of few numbers, as many frames as there are: the work inside of one does not grow with them."""
    from dyreg_triton.eager import relational

    layer = dt.layers.RSA(
        8, num_queries=queries, value_channels=channels, kernel_size=3, kernel=kernel, context=kernel
    ).to(device)
    x = torch.randn(2, 8, frames, 24, 24, device=device)
    step = 24 * 24 * 2 * queries * 2 * channels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relational, "_NUMBERS", step)
        with dt.backend("eager"):
            most, call = largest(layer, x)
    clip = 4 * 2 * (frames + 2) * 26 * 26
    one_frame = 4 * 26 * 26 * 3 * 2 * channels * channels * 3  # of what a window's channels give, for a step
    assert most <= max(clip * ((queries + 1) * channels + channels + 8), one_frame), call


# --- bilinear transforms: matrices are never written out for channels -----------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 32, 4, 28, 28), (1, 32, 1, 28, 28), (1, 64, 4, 28, 1), (1, 64, 4, 1, 28)], ids=str
)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_bilinear_transform_expands_no_matrix(shape: tuple[int, ...], mixed: bool, device: torch.device) -> None:
    batch, _, frames, height, width = shape
    x = torch.randn(shape, device=device)
    p, q = (torch.randn(batch, 2, frames, min(n, 7), min(n, 7), device=device) for n in (height, width))
    t = torch.randn(batch, 2, frames, frames, device=device) if mixed else None
    inputs = (x, p, q) if t is None else (x, p, q, t)
    with dt.backend("eager"):
        most, call = largest(dt.ops.bilinear_transform, *inputs)
    written_out = 4 * batch * 2 * frames * width * width  # Q of each group, at full width
    assert most <= max(x.nbytes, written_out), call


# --- regions: the normaliser is never of the map's size -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 16, 40, 30), (2, 16, 1, 1200), (2, 1, 1200, 1)], ids=str)
@pytest.mark.parametrize("nodes", [1, 9])
@pytest.mark.parametrize("profile", ["linear", "gaussian", "log-linear"])
def test_regions_store_no_more_than_their_kernels(
    shape: tuple[int, ...], nodes: int, profile: str, device: torch.device
) -> None:
    x = torch.randn(shape, device=device)
    regions = torch.rand(shape[0], nodes, 4, device=device) * 10 + 5
    kernels = 4 * shape[0] * nodes * shape[2] * shape[3]
    remap = functools.partial(dt.ops.region_remap, size=shape[2:], profile=profile)
    with dt.backend("eager"):
        for call, features in ((functools.partial(dt.ops.region_pool, profile=profile), x), (remap, x[..., 0, 0])):
            features = features if call is not remap else torch.randn(shape[0], nodes, shape[1], device=device)
            most, who = largest(call, features, regions)
            assert most <= max(x.nbytes, kernels), who
