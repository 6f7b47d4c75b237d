"""Every kernel compiles for every supported GPU, without one: no spills, shared memory that fits, wide access."""

import dataclasses
import itertools

import pytest
import torch
from support import in_full

pytestmark = pytest.mark.compiled
compiled = pytest.importorskip("bench.compiled", reason="triton is needed to compile", exc_type=ImportError)
region = pytest.importorskip("bench.compiled.region", exc_type=ImportError)
Case = region.RegionCase
relational = pytest.importorskip("bench.compiled.relational", exc_type=ImportError)
RelationalCase = relational.RelationalCase
bilinear = pytest.importorskip("bench.compiled.bilinear", exc_type=ImportError)
BilinearCase = bilinear.BilinearCase


def with_more(names, some, more):
    """Parametrized by `some`, and in `make full` by `more` of the same kind: each compiles kernels for seconds."""
    more = [(value,) for value in more] if isinstance(names, str) else more
    return pytest.mark.parametrize(names, [*some, *in_full(more)], ids=str)


MAPS = region.KINDS[:4]  # the kinds that read or write a map


def fit(
    target, dtype, size=(14, 14), n=9, profile="linear", frames=160, channels=512, layout="contiguous",
    kinds=region.KINDS,
):  # fmt: skip
    """Compile every kind of kernel; nothing may be wrong with any. The code of each, by kind."""
    codes = {}
    for kind in kinds:
        case = Case(kind, frames, n, channels, size, dtype, profile, layout)
        codes[kind] = compiled.compile_case(target, case)
        for code in codes[kind]:
            assert not compiled.problems(case, code), code
    return codes


@with_more(
    ("target", "dtype"),
    [*((target, "bfloat16") for target in compiled.TARGETS), ("sm_80", "float32")],
    [("sm_90", "float32"), ("sm_100", "float32"), ("gfx942", "float32")],
)
def test_default_config_fits_every_target(target, dtype):
    codes = fit(target, dtype)
    if dtype == "bfloat16" or target == "gfx942":  # float32 stays float32 unless torch allows TF32
        for kind in MAPS:
            assert all(code.tensor_core > 0 for code in codes[kind]), kind
    assert min(code.load_bytes for code in codes["gather"]) >= 8  # 14 x 14 cells of 2 bytes divide by 8, no more
    assert min(code.store_bytes for code in codes["scatter"]) >= 8


@with_more(
    ("target", "dtype"),
    [("sm_90", "bfloat16"), ("gfx942", "bfloat16")],
    [*itertools.product(("sm_80", "sm_100"), ("bfloat16", "float32")), ("sm_90", "float32"), ("gfx942", "float32")],
)
def test_odd_maps_are_read_and_written_wide(target, dtype):
    """49 cells of 2 bytes divide by 2, no more; a frame of them by 16."""
    codes = fit(target, dtype, size=(7, 7), channels=2048, kinds=MAPS)
    wide = 16 if target.startswith("sm") else 8  # a wavefront has twice the threads
    assert min(c.load_bytes for kind in ("gather", "gather_moments", "scatter_moments") for c in codes[kind]) >= wide
    assert min(c.store_bytes for kind in ("scatter", "scatter_moments") for c in codes[kind]) >= wide


@with_more(
    ("profile", "dtype"),
    [("gaussian", "bfloat16"), ("log-linear", "bfloat16")],
    [("gaussian", "float16"), ("gaussian", "float32"), ("log-linear", "float16"), ("log-linear", "float32")],
)
def test_other_profiles(profile, dtype):
    fit("sm_90", dtype, profile=profile)


@with_more(
    ("dtype", "size"),
    [("bfloat16", (28, 28))],
    [("bfloat16", (56, 56)), ("bfloat16", (13, 17)), *(("float32", size) for size in ((13, 17), (28, 28), (56, 56)))],
)
def test_other_sizes(dtype, size):
    codes = fit("sm_90", dtype, size, kinds=MAPS)
    if size != (13, 17):
        assert codes["gather"][0].load_bytes == 16
        assert codes["scatter"][0].store_bytes == 16


@with_more("n", [64], [1, 17])
def test_other_numbers_of_regions(n):
    fit("sm_90", "bfloat16", n=n)


@with_more("size", [(7, 7)], [(14, 14)])
def test_one_channel(size):
    """A constant to the compiler, unlike to the interpreter."""
    fit("sm_90", "bfloat16", size=size, channels=1)


def test_tf32_uses_tensor_cores():
    codes = fit("sm_90", "tf32", kinds=MAPS)
    assert all(code.tensor_core > 0 for kind in MAPS for code in codes[kind])


def test_more_regions_than_one_program_holds():
    codes = fit("sm_90", "bfloat16", n=100, channels=64, frames=8)
    assert [c.kernel for c in codes["scatter_moments"]] == ["region_scatter", "region_gather"]  # two passes then


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_other_layouts(layout):
    codes = fit("sm_90", "bfloat16", layout=layout, channels=256, kinds=MAPS)
    if layout == "channels_last":
        assert codes["gather"][0].load_bytes == codes["scatter"][0].store_bytes == 16


def test_the_table_covers_what_a_launch_may_choose():
    """Every config of the heuristic, in every dtype and profile, is compiled by `bench compiled --all`."""
    from dyreg_triton import tuning

    cases = region.cases(everything=True)
    for profile in ("linear", "gaussian", "log-linear"):
        for dtype in compiled.DTYPES:
            mine = {(c.kind, c.config()) for c in cases if c.profile == profile and c.dtype == dtype}
            assert {kind for kind, _ in mine} == set(region.KINDS)
            itemsize = Case("gather", 1, 1, 1, (1, 1), dtype).torch_dtype.itemsize
            generator = torch.Generator().manual_seed(0)
            for _ in range(500):
                frames, n, c, h, w = (
                    int(2 ** (torch.rand((), generator=generator).item() * top)) for top in (12, 6, 11, 6, 6)
                )
                for kind in region.KINDS:
                    if kind != "scatter_moments" or n <= 16:
                        channels = {"dense": 1, "dense_moments": 16}.get(kind, c)
                        assert (kind, tuning.region(kind, frames, n, channels, h * w, itemsize)) in mine


def test_the_reading_of_machine_code_sees_a_spill():
    """The check above can fail: tiles far too large do spill."""
    from dyreg_triton import tuning

    case = Case("gather_moments", 8, 9, 128, (14, 14))
    with tuning.override(lambda *_: tuning.Config(32, 64, 128, 2)):
        codes = compiled.compile_case("sm_90", case)
        assert any(code.spills > 0 for code in codes)
        assert any("spills" in compiled.problems(case, code) for code in codes)


# --- relational self-attention --------------------------------------------------------------------------------------


def fit_relational(target, case):
    """Compile forward and backward; nothing may be wrong with any kernel, and there is every one of them."""
    codes = compiled.compile_case(target, case)
    for code in codes:
        assert not compiled.problems(case, code), code
    assert {f"relational_{name}" for name in ("pack", *relational.PRODUCTS, "unpack")} == {
        code.kernel for code in codes
    }
    return codes


@with_more(("channels", "size"), relational.STAGES[:1], relational.STAGES[1:])
def test_stages_of_rsanet(channels, size):
    fit_relational("sm_90", RelationalCase(channels, size))


@with_more("target", ["gfx942"], ["sm_80", "sm_100"])
def test_last_stage_on_every_target(target):
    """The one with the largest tiles."""
    fit_relational(target, RelationalCase(64, (7, 7)))


def test_relational_float32():
    """On tensor cores, by three products."""
    fit_relational("sm_90", RelationalCase(16, (28, 28), "float32"))


@pytest.mark.parametrize(("target", "highest"), [("sm_80", "tf32x3"), ("sm_100", "tf32x3"), ("gfx942", "ieee")])
def test_highest_precision_of_a_family(target, highest):
    from dyreg_triton.ops import launch

    with compiled.compiling(target):
        assert launch.precision(torch.empty(0), "tf32x3") == highest
        assert launch.precision(torch.empty(0)) == "ieee"


def test_relational_of_ones():
    """Constants to the compiler, unlike to the interpreter."""
    case = RelationalCase(1, (1, 1), frames=1, queries=1, window=(1, 1, 1), batch=1, eps=None)
    codes = compiled.compile_case("sm_90", case)
    assert not any(code.spills or code.shared > compiled.SHARED_LIMIT["sm_90"] for code in codes)


def test_the_relational_table_covers_what_a_launch_may_choose():
    """Every config of the heuristic at the paper's window is compiled by `bench compiled --all`."""
    from dyreg_triton import tuning
    from dyreg_triton.ops.launch import redirected

    choose, chosen = tuning.relational, set()

    def note(key, config):
        chosen.add((key.kind, config))
        return config

    with compiled.compiling("sm_90"), tuning.override(note), redirected(lambda *_: None):
        for case in relational.cases(everything=True):
            case.launch()
    tiles = {(kind, dataclasses.replace(config, splits=1, clips=1)) for kind, config in chosen}
    for itemsize, family in ((2, "nvidia"), (4, "nvidia")):
        for width, queries in itertools.product((5, 8, 16, 24, 32, 64, 96, 128), (1, 8, 16)):
            for kind in relational.PRODUCTS:
                config = choose(kind, 8, (8, 14, 14), queries, (width,) * 4, (5, 7, 7), itemsize, family)
                assert (kind, dataclasses.replace(config, splits=1, clips=1)) in tiles


# --- bilinear transform ---------------------------------------------------------------------------------------------


def fit_bilinear(target, case, *kernels):
    """Compile forward and backward; nothing may be wrong with any kernel, and there is every one of them."""
    codes = compiled.compile_case(target, case)
    for code in codes:
        assert not compiled.problems(case, code), code
    assert {f"bilinear_{name}" for name in kernels or ("forward", "backward")} == {code.kernel for code in codes}
    return codes


@pytest.mark.parametrize("mixes", [0, 4])
@with_more(("channels", "frames", "size"), bilinear.STAGES[:1], bilinear.STAGES[1:])
def test_stages_of_bat(channels, frames, size, mixes):
    """Of the published networks, whose frames are mixed in the same pass."""
    codes = fit_bilinear("sm_90", BilinearCase(channels, frames, size, mixes=mixes, ts=min(4, frames)))
    assert len(codes) == 2
    run = min(16, size[1] // 7 * 2)  # bytes of a coarse cell's row, which lie together
    assert {(code.load_bytes, code.store_bytes) for code in codes} == {(run, run)}


@with_more("mixes", [4], [0])
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_a_block_of_bat_on_every_target(target, mixes):
    fit_bilinear(target, BilinearCase(mixes=mixes))


@with_more("mixes", [4], [0])
@with_more("dtype", ["float32", "tf32"], ["float16"])
def test_bilinear_dtypes(dtype, mixes):
    """On tensor cores; float32 by three products."""
    fit_bilinear("sm_90", BilinearCase(dtype=dtype, mixes=mixes))


@with_more("target", ["sm_90", "gfx942"], ["sm_80", "sm_100"])
def test_bilinear_channels_last(target):
    for code in fit_bilinear(target, BilinearCase(mixes=4, layout="channels_last_3d")):
        assert code.load_bytes == 16, code
        assert code.store_bytes >= (16 if target.startswith("sm") else 8), code


@with_more("cells", [(3, 5), (14, 14)], [(8, 8), (28, 14)])
def test_other_coarse_cells(cells):
    """Up to 64 of them by kron(P, Q^T), more by Q and by P."""
    fit_bilinear("sm_90", BilinearCase(64, 4, (cells[0] * 2, cells[1] * 2), mixes=2, cells=cells, batch=2))


@with_more("target", ["sm_90", "gfx942"], ["sm_80", "sm_100"])
def test_many_frames_are_mixed_in_a_pass_of_their_own(target):
    case = BilinearCase(64, 64, (14, 14), mixes=2, ts=64, batch=1)
    codes = fit_bilinear(target, case, "forward", "backward", "mix")
    assert [code.given["BACKWARD"] for code in codes if code.kernel == "bilinear_mix"] == [False, True]


def test_bilinear_of_ones():
    """Constants to the compiler, unlike to the interpreter."""
    case = BilinearCase(1, 1, (1, 1), groups=1, mixes=1, cells=(1, 1), ts=1, batch=1)
    codes = compiled.compile_case("sm_90", case)
    assert not any(code.spills or code.shared > compiled.SHARED_LIMIT["sm_90"] for code in codes)


def test_the_bilinear_table_has_every_form_of_a_tile():
    """In every dtype: by kron(P, Q^T) and one after the other, frames not mixed, mixed in the same pass and not."""
    from dyreg_triton import tuning
    from dyreg_triton.ops.launch import redirected

    kinds = {"forward", "backward", "forward_mixed", "backward_mixed", "mix", "mix_backward"}
    for dtype in compiled.DTYPES:
        chosen = set()

        def note(key, config, chosen=chosen):
            chosen.add((key.kind, config.joint, config.fused))
            return config

        with compiled.compiling("sm_90"), tuning.override(note), redirected(lambda *_: None):
            for case in bilinear.cases(everything=True):
                if case.dtype == dtype:
                    case.launch()
        assert {kind for kind, _, _ in chosen} == kinds
        tiles = {(kind, joint) for kind, joint, _ in chosen if not kind.startswith("mix")}
        assert tiles == set(itertools.product(sorted(kinds - {"mix", "mix_backward"}), (False, True)))
        mixed = {(kind, fused) for kind, _, fused in chosen if kind.endswith("_mixed")}
        assert mixed == set(itertools.product(("forward_mixed", "backward_mixed"), (False, True)))


def test_few_bilinear_cases_without_everything():
    few = bilinear.cases(everything=False)
    assert {(case.channels, case.frames, case.size) for case in few} == set(bilinear.STAGES)
    assert {case.mixes for case in few} == {0, 4}
