"""What only the Triton path has: registration, tiles that are skipped, layouts read in place, blocks of regions."""

import itertools
import subprocess
import sys

import pytest
import torch
from support import DEVICE, INTERPRETED, TOLERANCE, Guarded, assert_close, poisoned_outputs, random_regions
from torch.library import opcheck

import dyreg_triton as dt
from dyreg_triton import tuning
from dyreg_triton.ops import launch
from dyreg_triton.ops import region_launches as launches

OPS = torch.ops.dyreg_triton

kernels = pytest.mark.kernels  # left out where Triton cannot run


def inputs(*lead, c=10, h=7, w=9, n=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, c, h, w, generator=generator)
    v = torch.randn(*lead, n, c, generator=generator)
    regions = random_regions((*lead, n), (h, w), seed=seed)
    return x.to(DEVICE, dtype), v.to(DEVICE, dtype), regions.to(DEVICE)


def gradients(function, *tensors):
    """(value, gradients) of a function of tensors, for one fixed cotangent."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    value = function(*tensors)
    cotangent = torch.arange(value.numel()) * 5 % 7 - 3  # exact in every dtype
    cotangent = cotangent.view(value.shape).to(value.device, value.dtype)
    return value, *torch.autograd.grad(value, tensors, cotangent)


def agree(function, *tensors):
    """`function` on triton equals the float64 reference, and every gradient does."""
    with dt.backend("triton"), poisoned_outputs():
        ours = gradients(function, *tensors)
    with dt.backend("reference"):
        exact = gradients(function, *[t.double() for t in tensors])
    tolerance = TOLERANCE[ours[0].dtype]  # float32 regions get a gradient as exact as bfloat16 features are
    for name, a, b in zip(("value", "first gradient", "second gradient"), ours, exact, strict=False):
        assert_close(a, b, name, tolerance=tolerance)


def registered(name):
    """Arguments of a registered op, on small tensors."""
    x, v, r = inputs(2, 3)
    if "backward" not in name:  # a backward has no formula of its own
        x, v, r = (t.requires_grad_() for t in (x, v, r))
    return {
        "region_pool": (x, r, [True], "linear", 1.0),
        "region_remap": (v, r, 7, 9, "gaussian", 1.0),
        "region_kernel": (r, 7, 9, "log-linear", 1.5),
        "region_pool_backward": (v, x, r, [True], "log-linear", 1.5, True, True),
        "region_remap_backward": (x, v, r, "linear", 1.0, True, False),
        "region_kernel_backward": (torch.randn(2, 3, 4, 7, 9, device=DEVICE), r, "gaussian", 1.0),
    }[name]


@kernels
@pytest.mark.parametrize("name", [f"region_{op}{b}" for op in ("pool", "remap", "kernel") for b in ("", "_backward")])
def test_opcheck(name):
    opcheck(getattr(OPS, name).default, registered(name))


@kernels
@pytest.mark.parametrize("profile", ["linear", "log-linear"])
def test_tiles_that_no_region_touches_are_not_read(profile):
    """NaN where no region reaches: a dense product would spread it, and so would a tile read for nothing."""
    height, width = 20, 16
    x = torch.randn(1, 3, height, width, device=DEVICE)
    x[:, :, 8:] = float("nan")  # 128 cells are left: whole tiles, whatever the tile's size up to that
    r = torch.tensor([[[4.3, 2.4, 3.0, 2.2], [10.2, 3.6, 2.0, 3.1]]], device=DEVICE)
    with dt.backend("triton"):
        nodes, by_x, by_r = gradients(lambda x, r: dt.ops.region_pool(x, r, profile=profile), x, r)
        v = torch.randn(1, 2, 3, device=DEVICE).requires_grad_()
        r = r.requires_grad_()
        y = dt.ops.region_remap(v, r, (height, width), profile=profile)
        by_v, by_r2 = torch.autograd.grad(y, (v, r), x)
    for t in (nodes, by_x, by_r, y, by_v, by_r2):
        assert t.isfinite().all()
    assert (by_x[:, :, 8:] == 0).all()
    assert (y[:, :, 8:] == 0).all()
    with dt.backend("eager"):
        assert_close(nodes, dt.ops.region_pool(x[:, :, :8], r.detach(), profile=profile))


@kernels
def test_a_region_at_the_very_edge_of_a_tile_is_not_skipped():
    """Regions that reach exactly one row, for each row: no tile with weight in it is left out."""
    height, width = 20, 16
    x = torch.randn(height, 3, height, width, device=DEVICE)
    rows = torch.arange(height, device=DEVICE)
    for shift in (0.0, 0.4, -0.4):
        center = rows + shift
        r = torch.stack([torch.full_like(center, 7.6), center, torch.full_like(center, 3.3), center * 0 + 0.45], -1)
        agree(lambda x, r: dt.ops.region_pool(x, r), x, r[:, None])


@kernels
@pytest.mark.parametrize("n", [16, 17, 32, 33, 64, 65, 130])
def test_blocks_of_regions(n):
    """One program takes up to 64 regions, 16 where it both reads and writes a map; more take several."""
    x, v, r = inputs(1, c=18, h=6, w=7, n=n)
    agree(lambda x, r: dt.ops.region_pool(x, r), x, r)
    agree(lambda v, r: dt.ops.region_remap(v, r, (6, 7), profile="gaussian"), v, r)
    agree(lambda r: dt.ops.region_kernel(r, (6, 7), profile="log-linear", temperature=0.3), r)


@kernels
@pytest.mark.parametrize("c", [1, 15, 16, 17, 33, 65])
def test_blocks_of_channels(c):
    x, v, r = inputs(3, c=c, h=5, w=13, n=3)
    agree(lambda x, r: dt.ops.region_pool(x, r), x, r)
    agree(lambda v, r: dt.ops.region_remap(v, r, (5, 13)), v, r)


@kernels
@pytest.mark.parametrize("size", [(2, 20), (20, 2), (7, 9), (8, 8), (15, 17), (16, 16), (20, 20)], ids=str)
@pytest.mark.parametrize("profile", ["linear", "gaussian"])
def test_blocks_of_cells(profile, size):
    x, v, r = inputs(2, c=5, h=size[0], w=size[1], n=3, seed=size[1])
    agree(lambda x, r: dt.ops.region_pool(x, r, profile=profile), x, r)
    agree(lambda v, r: dt.ops.region_remap(v, r, size, profile=profile), v, r)
    agree(lambda r: dt.ops.region_kernel(r, size, profile=profile), r)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("c", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("size", [(2, 2), (7, 7), (5, 3), (8, 8), (3, 21), (9, 9)], ids=str)
def test_small_maps_are_read_as_one_run(size, c, dtype):
    """Whole channels, dealt out on chip; the last ones end within a tile, and NaN follows them."""
    x, v, r = inputs(2, c=c, h=size[0], w=size[1], dtype=dtype)
    x, v = (Guarded(t, "aligned").tensor for t in (x, v))
    agree(lambda x, r: dt.ops.region_pool(x, r), x, r)
    agree(lambda v, r: dt.ops.region_remap(v, r, size), v, r)


@kernels
def test_a_program_writes_its_own_channels_only():
    """Others run at the same time on a GPU; here one runs alone."""

    def first(ready, args):
        assert ready.programs == 3
        ready.programs = 1

    for size in ((7, 7), (9, 11)):
        x, v, r = inputs(1, c=48, h=size[0], w=size[1])
        y = torch.full_like(x, 7.0)
        launch.forget()
        with launch.watched(first):
            launches.scatter(y, v, None, r, "linear", 1.0)
            launches.scatter(y, v, x, r, "linear", 1.0)
        assert not y[:, :16].eq(7).any()
        assert y[:, 16:].eq(7).all()
        launch.forget()  # these launches are not for others


@kernels
@pytest.mark.parametrize("c", [1, 2])
def test_gaps_between_cells_are_not_taken_for_cells(c):
    """One channel, of which every other cell is meant, looks flat and has no other channel beside it."""
    x, _, r = inputs(2, c=c, h=3, w=8)
    agree(lambda x, r: dt.ops.region_pool(x[..., ::2], r), x, r)


@kernels
def test_long_axes_are_summed_in_blocks():
    """Axes longer than the block in which a program sums them."""
    x, _, r = inputs(1, c=2, h=3, w=97, n=3)
    for profile in ("linear", "gaussian", "log-linear"):
        agree(lambda x, r, p=profile: dt.ops.region_pool(x, r, profile=p), x, r)
        agree(lambda r, p=profile: dt.ops.region_kernel(r.mT.mT, (97, 3), profile=p), r[..., [1, 0, 3, 2]])


LAYOUTS = {
    "frames inside channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),  # (B, C, T, H, W) memory
    "channels last": lambda t: t.movedim(-3, -1).contiguous().movedim(-1, -3),
    "columns before rows": lambda t: t.mT.contiguous().mT,
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "a window": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "one channel for all": lambda t: t[:, :, :1].expand_as(t),
    "one frame for all": lambda t: t[:1, :1].expand_as(t),
    "frames swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_are_read_in_place(layout, dtype):
    """Of any layout, as input and as incoming gradient; x's gradient has x's layout where that is dense."""
    x, v, r = inputs(2, 3, c=6, h=5, w=8, n=3, dtype=dtype)
    x = LAYOUTS[layout](x)
    before = x.clone()
    agree(lambda x, r: dt.ops.region_pool(x, r), x, r)

    def spread(v, r):  # the product's gradient is a map of the layout in question
        return (dt.ops.region_remap(v, r, (5, 8)) * x.to(v.dtype)).sum()

    with dt.backend("triton"):
        ours = gradients(spread, v, r)
        by_x = gradients(lambda x, r: dt.ops.region_pool(x, r), x, r)[1]
    with dt.backend("reference"):
        exact = gradients(spread, v.double(), r.double())
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert_close(a, b, tolerance=TOLERANCE[dtype])
    assert torch.equal(x, before)
    assert by_x.stride() == torch.empty_like(x).stride()


@kernels
def test_an_incoming_gradient_of_any_layout():
    x, v, r = inputs(2, 3, c=6, h=5, w=8, n=3)
    v, r = v.requires_grad_(), r.requires_grad_()
    for layout, change in LAYOUTS.items():
        grad = change(x)
        kept = grad.clone()
        with dt.backend("triton"):
            ours = torch.autograd.grad(dt.ops.region_remap(v, r, (5, 8)), (v, r), grad)
        with dt.backend("reference"):
            exact = torch.autograd.grad(dt.ops.region_remap(v.double(), r.double(), (5, 8)), (v, r), grad.double())
        for a, b in zip(ours, exact, strict=True):
            assert_close(a, b, layout)
        assert torch.equal(grad, kept)


@kernels
def test_more_leading_dimensions_than_a_kernel_addresses():
    x, v, r = inputs(2, 1, 2, 3, c=3, h=4, w=5, n=2)
    x = x.transpose(0, 3).transpose(1, 2)
    r, v = r.transpose(0, 3).transpose(1, 2), v.transpose(0, 3).transpose(1, 2)
    agree(lambda x, r: dt.ops.region_pool(x, r), x, r)
    agree(lambda v, r: dt.ops.region_remap(v, r, (4, 5)), v, r)


@kernels
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the product in float32")
def test_float16_weights_of_large_regions_keep_their_bits():
    """On a map of 200 x 200 a uniform weight is below float16's normal numbers."""
    x = torch.ones(1, 16, 200, 200, device=DEVICE, dtype=torch.float16)
    r = torch.tensor([[[99.5, 99.5, 1e6, 1e6], [20.3, 30.4, 0.9, 0.9]]], device=DEVICE)  # huge beside one cell
    with dt.backend("triton"):
        nodes = dt.ops.region_pool(x, r)
    assert_close(nodes, torch.ones(1, 2, 16), tolerance=1e-3)


@kernels
@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="takes virtual memory, which a GPU does not have")
@pytest.mark.parametrize("strides", [(2**31, 4, 1), (4, 2**31, 1), (8, 1, 2**31)], ids=str)
def test_strides_beyond_int32(strides):
    """In a process of its own: what goes wrong here is a segmentation fault."""
    code = f"""
import torch, dyreg_triton as dt
x = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 2, 2), {strides})
x.copy_(torch.arange(8).view(2, 2, 2))
r = torch.tensor([[0.7, 0.4, 1.7, 1.4]])
with dt.backend("triton"):
    found = dt.ops.region_pool(x, r)
with dt.backend("eager"):
    assert torch.allclose(found, dt.ops.region_pool(x, r), rtol=1e-2), found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@kernels
def test_gradient_transforms_are_refused_under_vmap_too():
    x, _, r = inputs(2)
    with dt.backend("triton"), pytest.raises(RuntimeError, match=r"region_pool: .*torch\.func's gradient transforms"):
        torch.func.grad(lambda x: torch.func.vmap(dt.ops.region_pool)(x, r).sum())(x)


def test_layout_of_leading_dimensions():
    """LEAD1, LEAD2 and strides address every frame of every map, merged where all maps allow."""
    for shape, order in itertools.product(
        [(2, 3, 5), (1, 3, 5), (2, 1, 5), (2, 3, 1)], itertools.permutations(range(3))
    ):
        t = torch.arange(30)[: shape[0] * shape[1] * shape[2]]
        t = t.view([shape[i] for i in order]).permute([order.index(i) for i in range(3)])
        maps = t[..., None, None, None], t.contiguous()[..., None, None, None]
        lead1, lead2, strides = launch.leading(*maps)
        for m, s in zip(maps, strides, strict=True):
            base = m.as_strided((m.numel(),), (1,), 0)
            found = [
                base[f // lead2 // lead1 * s[0] + f // lead2 % lead1 * s[1] + f % lead2 * s[2]].item()
                for f in range(m.numel())
            ]
            assert found == m.flatten().tolist(), (shape, order)
    assert launch.leading(torch.empty(2, 3, 4, 5, 6))[:2] == (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_layout_of_maps(dtype):
    whole = 16 // dtype.itemsize
    x = torch.empty(2, 3, 64, 14, 14, dtype=dtype)
    layout = launch.map_layout(x, launch.leading(x)[2][0])
    assert (layout.flat, layout.channels_last, layout.gapless, layout.align) == (True, False, True, whole)
    assert layout.strides == (64 * 196 // whole, 0, 0, 0, 0, 1)
    x = torch.empty(2, 3, 128, 14, 14, dtype=dtype)[:, :, ::2]
    layout = launch.map_layout(x, launch.leading(x)[2][0])
    assert (layout.flat, layout.channels_last, layout.gapless, layout.align) == (True, False, False, whole)
    assert layout.strides == (128 * 196 // whole, 0, 0, 2 * 196 // whole, 0, 1)
    x = torch.empty(2, 64, 7, 8, dtype=dtype)[..., :7]
    assert not launch.map_layout(x, launch.leading(x)[2][0]).gapless
    x = torch.empty(2, 64, 13, 17, dtype=dtype).to(memory_format=torch.channels_last)
    layout = launch.map_layout(x, launch.leading(x)[2][0])
    assert (layout.flat, layout.channels_last, layout.align) == (True, True, whole)
    assert layout.strides == (64 * 221 // whole, 0, 0, 1, 0, 64 // whole)
    x = torch.empty(2, 64, 16, 16, dtype=dtype)[..., :15, :15]
    layout = launch.map_layout(x, launch.leading(x)[2][0])
    assert (layout.flat, layout.channels_last, layout.align) == (False, False, whole)


def test_configs_are_powers_of_two_within_limits():
    for kind, frames, n, c, cells, size in itertools.product(
        ("gather", "scatter", "gather_moments", "scatter_moments", "dense", "dense_moments"),
        (1, 16, 4096), (1, 16, 17, 64, 65, 1000), (1, 16, 100, 4096), (1, 49, 196, 16384), (2, 4, 8),
    ):  # fmt: skip
        config = tuning.region(kind, frames, n, c, cells, size)
        assert config == tuning.region(kind, frames, n, c, cells, size)
        assert 16 <= config.block_n <= 64
        assert 16 <= config.block_c <= 128
        assert 16 <= config.block_p <= 256
    with pytest.raises(ValueError, match=r"block_c is 48; accepted is a power of two"):
        tuning.Config(16, 48, 64)


def test_precision_follows_torch():
    former = torch.get_float32_matmul_precision()
    try:
        for setting, wanted in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert launch.precision(torch.empty(0)) == (wanted if not torch.version.hip else "ieee")
            assert launch.precision(torch.empty(0, dtype=torch.bfloat16), "tf32x3") == "ieee"
    finally:
        torch.set_float32_matmul_precision(former)
