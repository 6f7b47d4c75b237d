"""Every kernel compiles for every supported GPU, without one: no spills, shared memory within the limit, wide loads."""

import pytest
import torch

pytestmark = pytest.mark.compiled
compiled = pytest.importorskip("bench.compiled", reason="triton is needed to compile", exc_type=ImportError)


def compile_region(target, dtype, profile="linear", **call):
    with compiled.compiling(target) as codes:
        compiled.region_calls(dtype, profile, **call)
    together = ["region_scatter"] if call.get("n", 9) <= 32 else ["region_scatter", "region_gather"]
    assert [c.kernel for c in codes] == [
        "region_gather", *together, "region_scatter", "region_gather", "region_dense", "region_dense_backward",
    ]  # fmt: skip
    for code in codes:
        assert code.spills == 0, code
        assert code.shared <= compiled.SHARED_LIMIT[target], code
    return codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("target", list(compiled.TARGETS))
def test_default_config_fits_every_target(target, dtype):
    pool, pool_backward, remap, remap_backward, _, _ = compile_region(target, dtype)
    if dtype == torch.bfloat16 or target == "gfx942":  # float32 stays float32 unless torch allows TF32
        assert all(code.tensor_core > 0 for code in (pool, pool_backward, remap, remap_backward))
    assert pool.load_bytes >= 8  # 14 x 14 cells of 2 bytes divide by 8, no more
    assert remap.store_bytes >= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("target", list(compiled.TARGETS))
def test_odd_maps_are_read_and_written_wide(target, dtype):
    """49 cells of 2 bytes divide by 2, no more; a frame of them by 16."""
    pool, pool_backward, remap, remap_backward, _, _ = compile_region(target, dtype, size=(7, 7), channels=2048)
    wide = 16 if target.startswith("sm") else 8  # a wavefront has twice the threads
    assert min(c.load_bytes for c in (pool, pool_backward, remap_backward)) >= wide
    assert min(c.store_bytes for c in (pool_backward, remap)) >= wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("profile", ["gaussian", "log-linear"])
def test_other_profiles(profile, dtype):
    compile_region("sm_90", dtype, profile)


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (13, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_other_sizes(dtype, size):
    pool, _, remap, *_ = compile_region("sm_90", dtype, size=size)
    if size != (13, 17):
        assert pool.load_bytes == 16
        assert remap.store_bytes == 16


@pytest.mark.parametrize("n", [1, 17, 64])
def test_other_numbers_of_regions(n):
    compile_region("sm_90", torch.bfloat16, n=n)


def test_tf32_uses_tensor_cores():
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        codes = compile_region("sm_90", torch.float32)
    finally:
        torch.set_float32_matmul_precision(former)
    assert all(code.tensor_core > 0 for code in codes[:4])


def test_more_regions_than_one_program_holds():
    from dyreg_triton.ops import region as ops

    x = torch.empty(8, 64, 14, 14, dtype=torch.bfloat16, device="meta")
    nodes = torch.empty(8, 100, 64, dtype=torch.bfloat16, device="meta")
    regions = torch.empty(8, 100, 4, device="meta")
    with compiled.compiling("sm_90") as codes:
        ops._scatter(torch.empty_like(x), nodes, x, regions, "linear", 1.0)
        ops._gather(x, nodes, regions, "linear", 1.0, nodes=True)
    assert [c.kernel for c in codes] == ["region_scatter", "region_gather", "region_gather"]
    assert all(c.spills == 0 and c.shared <= compiled.SHARED_LIMIT["sm_90"] for c in codes)


def test_channels_last_loads_along_channels():
    from dyreg_triton.ops import region as ops

    x = torch.empty(64, 256, 14, 14, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    regions = torch.empty(64, 9, 4, device="meta")
    with compiled.compiling("sm_90") as codes:
        ops._gather(x, None, regions, "linear", 1.0, nodes=True)
    assert codes[0].load_bytes == 16
    assert codes[0].spills == 0


def test_the_reading_of_machine_code_sees_a_spill():
    """The check above can fail: tiles far too large do spill."""
    from unittest import mock

    from dyreg_triton import tuning

    case = compiled.Case("gather_moments", 8, 9, 128, (14, 14))
    with mock.patch.object(tuning, "region", return_value=tuning.Config(32, 64, 128, 2)):
        codes = compiled.compile_case("sm_90", case)
        assert any(code.spills > 0 for code in codes)
        assert any("spills" in compiled.problems(case, code) for code in codes)
