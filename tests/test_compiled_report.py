"""What is read from machine code, what is predicted from a launch, and the report of both."""

import itertools
import json
import math
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dyreg_triton.ops.launch import redirected

pytest.importorskip("triton", reason="triton is needed to compile")

pytestmark = pytest.mark.compiled
compiled = pytest.importorskip("bench.compiled", reason="triton is needed to compile", exc_type=ImportError)
assembly = pytest.importorskip("bench.compiled.assembly")
machine_code = pytest.importorskip("bench.compiled.machine_code", exc_type=ImportError)
model = pytest.importorskip("bench.compiled.model")
report = pytest.importorskip("bench.compiled.report", exc_type=ImportError)
occupancy = pytest.importorskip("bench.compiled.occupancy").occupancy
RegionCase = pytest.importorskip("bench.compiled.region", exc_type=ImportError).RegionCase
RelationalCase = pytest.importorskip("bench.compiled.relational", exc_type=ImportError).RelationalCase
BilinearCase = pytest.importorskip("bench.compiled.bilinear", exc_type=ImportError).BilinearCase

# --- machine code ---------------------------------------------------------------------------------------------------


def sass(*code):
    """As nvdisasm prints it, from labels and instructions."""
    lines = (
        line if line.startswith(".") else f"        /*{16 * i:04x}*/  {line.rjust(40)} ;" for i, line in enumerate(code)
    )
    return ".text.kernel:\n" + "\n".join(lines) + "\n"


# Two nested loops; in the inner one a path that is sometimes skipped, a wait, and a way out; a loop that only moves
# registers; the slow path of a warp that diverged, which jumps back; the endless jump that pads a kernel.
NESTED = sass(
    "S2R R0, SR_TID.X",
    ".L_x_0:",
    "IADD3 R1, R1, 0x1, RZ",
    ".L_x_1:",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "BRA.DIV UR4, `(.L_x_7)",
    ".L_x_2:",
    "@!P0 BRA `(.L_x_3)",
    "HMMA.16816.F32.BF16 R8, R4, R6, R8",
    ".L_x_3:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R5], R6",
    "@!P1 BRA `(.L_x_3)",
    "@P3 EXIT",
    "IMAD.MOV.U32 R9, RZ, RZ, R8",
    "LDS R10, [R9]",
    "ISETP.NE.AND P2, PT, R9, RZ, PT",
    "@P2 BRA `(.L_x_1)",
    "BRA.U UP0, `(.L_x_0)",
    ".L_x_4:",
    *["FADD R1, R1, R2"] * 40,
    "@P0 BRA `(.L_x_4)",
    "STG.E.U16 desc[UR4][R2.64], R8",
    "EXIT",
    ".L_x_7:",
    "WARPSYNC.COLLECTIVE R45, `(.L_x_8)",
    ".L_x_8:",
    "BRA `(.L_x_2)",
    ".L_x_9:",
    "BRA `(.L_x_9)",
)


def test_loops_of_sass():
    blocks = assembly.parse_sass(NESTED)
    sizes = sorted(len(assembly.lines(blocks, body)) for body in assembly.loops(blocks))
    # the wait, the inner loop, both (the outer one's own are its first line and its jump), the one without access
    assert sizes == [2, 11, 13, 41]
    loop, turn = assembly.hot_loop(blocks)
    assert not loop.whole
    assert loop.instructions == len(turn) == 11
    assert loop.counts == {
        "tensor core": 1, "integer": 1, "load": 1, "shared": 1, "move": 1, "control": 5, "barrier": 1,
    }  # fmt: skip
    assert loop.mix()["control"] == round(5 / 11, 3)
    assert len(assembly.lines(blocks)) == 57  # what no way leads to does not count


def test_a_jump_that_is_always_taken_ends_its_block():
    """Else what stands behind it would belong to the loop."""
    code = (".L_x_0:", "FADD R1, R1, R2", "{}BRA `(.L_x_1)", "FMUL R1, R1, R2", ".L_x_1:", "@P0 BRA `(.L_x_0)", "EXIT")
    always, sometimes = (assembly.parse_sass(sass(*(line.format(p) for line in code))) for p in ("", "@P1 "))
    assert assembly.hot_loop(always)[0].counts == {"fp": 1, "control": 2}
    assert assembly.hot_loop(sometimes)[0].counts == {"fp": 2, "control": 2}


def test_a_call_of_a_place_within_is_a_jump():
    """The compiler leaves loops by it; a function returns."""
    function, place = "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s16)", "@P3 CALL.REL.NOINC `(.L_x_1)"
    code = (".L_x_0:", "LDG.E R1, desc[UR4][R2.64]", function, place, "BRA `(.L_x_0)", ".L_x_1:", "STG.E R1", "EXIT")
    blocks = assembly.parse_sass(sass(*code))
    assert assembly.hot_loop(blocks)[0].counts == {"load": 1, "control": 3}
    assert [line.opcode for line in assembly.lines(blocks)][-2:] == ["STG.E", "EXIT"]


def test_without_a_loop_the_program_counts_as_one():
    loop, turn = assembly.hot_loop(assembly.parse_sass(sass("LDG.E R1, desc[UR4][R2.64]", "EXIT", "FADD R1, R1, R2")))
    assert loop.whole
    assert [line.opcode for line in turn] == ["LDG.E", "EXIT"]


AMDGCN = """\
kernel:
\ts_load_dwordx2 s[0:1], s[0:1], 0x0
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\ts_add_i32 s4, s4, 1
\ts_cbranch_scc1 .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\ts_waitcnt vmcnt(0)
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
\tds_read_b128 v[8:11], v12
\tv_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
\ts_and_saveexec_b64 s[4:5], vcc
\ts_cbranch_execz .LBB0_1
\tv_cndmask_b32_e32 v3, v2, v1, vcc
\ts_branch .LBB0_1
.LBB0_4:
\tbuffer_store_short v0, v1, s[0:3], 0 offen
\ts_endpgm
.Lfunc_end0:
\tv_add_f32_e32 v1, v1, v2
"""


def test_loop_of_amdgcn():
    blocks = assembly.parse_amdgcn(AMDGCN)
    loop, _ = assembly.hot_loop(blocks)
    assert loop.counts == {
        "tensor core": 1, "fp": 1, "integer": 2, "load": 1, "shared": 1, "move": 1, "control": 3, "barrier": 1,
    }  # fmt: skip
    assert len(assembly.lines(blocks)) == 15


@pytest.mark.parametrize(
    ("kind", "opcodes"),
    {
        "tensor core": "HMMA.16816.F32.BF16 HGMMA.64x64x16.F32.BF16 UTCHMMA UTCQMMA IMMA.16832.S8.S8 DMMA.8x8x4",
        "fp": "FADD FADD2 FFMA FFMA2 FMUL2 FHFMA FHADD MUFU.RCP F2FP.BF16.F32.PACK_AB I2FP.F32.S32 HFMA2 FSETP.GT",
        "integer": "IADD3 IMAD.WIDE IMAD.IADD UIMAD LOP3.LUT ULOP3.LUT SHF.R.S32.HI LEA UISETP VIADD IABS SGXT PLOP3",
        "load": "LDG.E.128 LDGSTS.E.BYPASS.LTC128B.128 LDL LD.E",
        "store": "STG.E.64 STL RED.E.ADD ATOMG.E.ADD",
        "shared": "LDS.128 LDSM.16.M88.4 STS STSM.16.M88 SHFL.BFLY ATOMS.ADD LDTM.x32 STTM.x16",
        "move": "MOV UMOV IMAD.MOV.U32 SEL FSEL PRMT LDC.64 LDCU ULDC.64 S2R S2UR CS2R R2UR P2R",
        "control": "BRA EXIT BSSY BSYNC NOP WARPSYNC.ALL CALL.REL.NOINC RET.REL.NODEC VOTEU.ANY ELECT",
        "barrier": "BAR.SYNC.DEFER_BLOCKING LDGDEPBAR DEPBAR.LE MEMBAR.ALL.CTA FENCE.VIEW.ASYNC SYNCS WARPGROUP",
    }.items(),
)  # fmt: skip
def test_what_an_instruction_does(kind, opcodes):
    found = assembly.parse_sass(sass(*(f"{opcode} R0, R1" for opcode in opcodes.split())))
    assert {line.kind for block in found for line in block.lines} == {kind}


def test_no_instruction_of_a_kernel_is_unknown():
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for code in compiled.compile_case(target, RegionCase("gather_moments", 160, 9, 512, (14, 14))):
            assert sum(code.loop.mix().values()) == pytest.approx(1, abs=0.01)
            assert "other" not in code.loop.counts
            assert code.loop_bytes > 0


@pytest.mark.parametrize(
    ("opcode", "width"),
    {
        "LDG.E": 4, "LDG.E.U16": 2, "LDG.E.U8.CONSTANT": 1, "LDG.E.64": 8, "LDG.E.ENL2.256": 32, "STG.E.128": 16,
        "LDGSTS.E.BYPASS.LTC128B.128": 16, "LDGSTS.E.LTC128B": 4, "LDS.128": 0, "STL.64": 0,
    }.items(),
)  # fmt: skip
def test_width_of_nvidia(opcode, width):
    assert machine_code.sass_width(opcode) == width


@pytest.mark.parametrize(
    ("opcode", "width"),
    {
        "buffer_load_dwordx4": 16, "global_load_dword": 4, "buffer_load_ushort": 2, "buffer_store_byte": 1,
        "buffer_load_short_d16_hi": 2, "global_store_dwordx2": 8, "ds_read_b128": 0, "s_load_dwordx4": 0,
    }.items(),
)  # fmt: skip
def test_width_of_amd(opcode, width):
    assert machine_code.amdgcn_width(opcode) == width


@pytest.mark.parametrize(
    ("opcode", "operations"),
    {
        "HMMA.16816.F32.BF16": 4096, "HMMA.1688.F32.TF32": 2048, "HGMMA.64x64x16.F32.BF16": 2 * 64 * 64 * 16 // 4,
        "UTCHMMA": None,
    }.items(),
)  # fmt: skip
def test_operations_of_nvidia(opcode, operations):
    assert machine_code.sass_operations(opcode) == operations


@pytest.mark.parametrize(
    ("opcode", "operations"),
    {"v_mfma_f32_16x16x16_bf16": 8192, "v_mfma_f32_32x32x8_bf16": 16384, "v_mfma_f32_4x4x4_16b_bf16": 2048}.items(),
)
def test_operations_of_amd(opcode, operations):
    assert machine_code.amdgcn_operations(opcode) == operations


# --- occupancy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared", "resident", "share", "limited_by"),
    [  # as NVIDIA's calculator has it: registers by 256 a warp, a kilobyte of shared memory beside a program's own
        ("sm_90", 8, 32, 0, 8, 1.0, "warps"),
        ("sm_90", 8, 37, 0, 6, 0.75, "registers"),
        ("sm_90", 4, 41, 0, 10, 0.625, "registers"),
        ("sm_90", 8, 128, 0, 2, 0.25, "registers"),
        ("sm_90", 32, 64, 0, 1, 0.5, "registers"),
        ("sm_90", 4, 255, 0, 2, 0.125, "registers"),
        ("sm_90", 4, 168, 0, 3, 0.1875, "registers"),
        ("sm_90", 1, 16, 0, 32, 0.5, "programs"),
        ("sm_90", 4, 32, 56 * 1024, 4, 0.25, "shared memory"),
        ("sm_90", 4, 32, 227 * 1024, 1, 0.0625, "shared memory"),
        ("sm_80", 4, 32, 48 * 1024, 3, 0.1875, "shared memory"),
        ("sm_80", 4, 32, 164 * 1024, 0, 0.0, "shared memory"),
        ("gfx942", 4, 128, 0, 4, 0.5, "registers"),
        ("gfx942", 4, 300, 0, 1, 0.125, "registers"),
        ("gfx942", 4, 32, 32 * 1024, 2, 0.25, "shared memory"),
    ],
)
def test_occupancy(target, num_warps, registers, shared, resident, share, limited_by):
    assert occupancy(target, num_warps, registers, shared) == (resident, share, limited_by)


def test_waves():
    assert occupancy("sm_90", 8, 32, 0).waves(2112, "sm_90") == 2  # 8 on each of 132
    assert occupancy("sm_90", 4, 32, 300 * 1024).waves(1, "sm_90") == math.inf


# --- what a launch does ---------------------------------------------------------------------------------------------


def products(ttir):
    """Operations of a program's matrix products: of loops whose bounds are constants, as they are issued."""
    constants = {name: int(value) for name, value in re.findall(r"(%\S+) = arith\.constant (\d+) : i(?:32|64)", ttir)}
    total, turns = 0, [1]
    for line in ttir.splitlines():
        if loop := re.search(r"scf\.for \S+ = (\S+) to (\S+) step (\S+)", line):
            first, last, step = (constants[name] for name in loop.groups())
            turns.append(turns[-1] * -(-(last - first) // step))
        elif line.rstrip().endswith("{"):
            turns.append(turns[-1])
        if found := re.search(r"tt\.dot .*: tensor<([\dx]+)x\w+> \* tensor<([\dx]+)x\w+>", line):
            a, b = ([int(n) for n in shape.split("x")] for shape in found.groups())
            total += 2 * math.prod(a) * b[-1] * turns[-1]
        if line.lstrip().startswith("}"):
            turns.pop()
            if line.rstrip().endswith("{"):
                turns.append(turns[-1])
    return total


def launches(case, compiling=()):
    """Each launch's kernel, arguments and programs, and the intermediate code of those that are to be compiled."""
    found = []

    def note(launch, args):
        name = launch.kernel.fn.__name__
        code = launch.compile(args).asm["ttir"] if name in compiling else None
        found.append((name, launch.given_by_name(args), launch.programs, code))

    with compiled.compiling("sm_90"), redirected(note):
        case.launch()
    return found


# kernels whose loops have constant bounds
CONSTANT = (
    "region_gather", "region_scatter", "relational_forward", "relational_backward", "bilinear_forward",
    "bilinear_backward", "bilinear_mix",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        RegionCase("gather", 160, 9, 512, (14, 14)),
        RegionCase("scatter_moments", 160, 9, 512, (14, 14)),
        RegionCase("gather", 4, 100, 64, (7, 7)),
        RelationalCase(64, (7, 7)),
        RelationalCase(8, (9, 11), kernel="V", context="V", queries=4, values=24),
        RelationalCase(8, (9, 11), batch=1),
        BilinearCase(),
        BilinearCase(mixes=4, layout="channels_last_3d"),
        BilinearCase(96, 4, (14, 21), mixes=3),
        BilinearCase(64, 4, (28, 28), mixes=2, groups=4, cells=(14, 14), batch=2),
        BilinearCase(64, 4, (28, 28), "float32", groups=4, cells=(14, 14), batch=2),
        BilinearCase(24, 64, (14, 14), "float16", mixes=2, ts=64, batch=2),
        BilinearCase(256, 1, (56, 56), mixes=4, ts=1, batch=2),
    ],
    ids=lambda case: case.about().replace(" ", ""),
)
def test_operations_are_those_of_the_compiled_code(case):
    checked = 0
    for kernel, given, programs, ttir in launches(case, CONSTANT):
        if ttir is not None:
            done = model.work(kernel, given, programs)
            assert done.operations == products(ttir) * programs, kernel
            assert done.floor_operations <= done.operations
            assert done.floor_bytes <= done.bytes_moved
            checked += 1
    assert checked


@pytest.mark.parametrize(("channels", "size"), [(8, (56, 56)), (16, (28, 28)), (32, (14, 14)), (64, (7, 7))], ids=str)
def test_floor_is_that_of_what_is_measured(channels, size):
    """The op's own count of useful operations, forward; and each gradient costs what its product does."""
    from bench.relational import Problem

    problem = Problem(8, channels, (8, *size))
    forward = backward = 0
    for kernel, given, programs, _ in launches(RelationalCase(channels, size)):
        done = model.work(kernel, given, programs)
        forward += done.floor_operations * (kernel == "relational_forward")
        backward += done.floor_operations * (kernel not in ("relational_forward", "relational_pack"))
        assert done.operations >= done.floor_operations
        assert done.bytes_moved >= done.floor_bytes
    assert forward == problem.operations(False)
    assert backward >= 2 * forward  # and what is computed again


@pytest.mark.parametrize(("frames", "mixes", "ts"), [(8, 0, 4), (8, 4, 4), (1, 4, 1), (64, 4, 64)])
def test_the_bilinear_floor_is_that_of_what_is_measured(frames, mixes, ts):
    """Forward; and each gradient costs what its product does, and what is computed again. A pass over frames of its own
    reads and writes the maps once more."""
    from bench.bilinear import Problem

    problem = Problem(2, 32, frames, 28, 28, tk=mixes)
    wanted, both = (problem.floor(backward, 2) for backward in (False, True))
    numbers, long = 2 * 32 * frames * 784, ts == 64
    more = 2 * numbers * 60 if long else 0  # the op's own rows have four frames at most
    forward = backward = moved = moved_back = 0
    case = BilinearCase(32, frames, (28, 28), mixes=mixes, ts=ts, batch=2)
    launched = launches(case)
    assert [kernel for kernel, *_ in launched] == [
        f"bilinear_{name}"
        for name in (("forward", "mix", "forward", "mix", "backward") if long else ("forward", "backward"))
    ]
    for i, (kernel, given, programs, _) in enumerate(launched):
        done = model.work(kernel, given, programs)
        assert done.operations >= done.floor_operations
        assert done.bytes_moved >= done.floor_bytes
        if i < len(launched) // 2:
            forward, moved = forward + done.floor_operations, moved + done.floor_bytes
        else:
            backward, moved_back = backward + done.floor_operations, moved_back + done.floor_bytes
    assert forward == wanted.operations + more
    assert backward >= 2 * forward
    if not long:
        assert moved == wanted.bytes
        # rows of p's, q's and t's gradients are of four bytes
        assert moved_back == both.bytes - wanted.bytes + 2 * problem.matrices()
    else:
        assert moved > wanted.bytes + 2 * 2 * numbers


def test_bytes_of_a_bilinear_transform():
    """Counted by hand: 2 clips of 24 channels in 8 groups and 2 mixes, 8 frames in 2 phases, and a unit in one tile."""
    from dyreg_triton import tuning

    case = BilinearCase(24, 8, (14, 14), "float32", mixes=2, ts=4, batch=2)
    with tuning.override(lambda key, config: tuning.BilinearConfig(16, 1, True, True)):
        (_, given, programs, _), (_, back, back_programs, _) = launches(case)
    assert programs == back_programs == 2 * 8 * 2
    clip, square, over_time = 2 * 24 * 8 * 196 * 4, 2 * 49 * 4, 16 * 4
    done = model.work("bilinear_forward", given, programs)
    assert done.floor_bytes == 2 * clip + 2 * 8 * 8 * square + 2 * 2 * over_time
    assert done.bytes_moved == 2 * clip + programs * (4 * square + over_time)
    done = model.work("bilinear_backward", back, back_programs)
    assert done.floor_bytes == 3 * clip + 2 * (2 * 8 * 8 * square + 2 * 2 * over_time)
    assert done.bytes_moved == (3 + 4 - 1) * clip + 2 * programs * (4 * square + over_time)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4))[1:], ids=str)
@pytest.mark.parametrize(("cells", "ts"), [((7, 7), 2), ((14, 14), 2), ((7, 7), 64)], ids=str)
def test_work_for_the_gradients_that_are_needed(cells, ts, needs):
    from dyreg_triton.ops import bilinear_launches as ops

    def launch():
        x = torch.empty(1, 16, 64, 14, 14, device="meta", dtype=torch.bfloat16)
        p, q = (torch.empty(1, 4, 64, n, n, device="meta") for n in cells)
        problem = ops.Problem(x, p, q, torch.empty(1, 2, ts, ts, device="meta"))
        ops.backward(problem, torch.empty_like(x), list(needs))

    a_map, square = 2 * 16 * 64 * 196, 4 * 4 * 64 * sum(n * n for n in cells)
    for kernel, given, programs, ttir in launches(SimpleNamespace(launch=launch), CONSTANT):
        done = model.work(kernel, given, programs)
        assert done.operations == products(ttir) * programs, kernel
        assert done.bytes_moved >= done.floor_bytes
        if kernel == "bilinear_backward":
            need_x, need_pq, need_r = given["NEED_X"], given["NEED_PQ"], given["NEED_R"]
            over_time = 4 * 2 * given["TS"] ** 2
            wanted = (1 + need_x + (need_pq or need_r)) * a_map + (1 + need_pq) * square + (1 + need_r) * over_time
            assert done.floor_bytes == wanted


def test_bytes_of_a_pool():
    """Counted by hand: 160 frames of 512 channels, 196 cells, 9 regions; 8 programs a frame."""
    ((kernel, given, programs, _),) = launches(RegionCase("gather", 160, 9, 512, (14, 14)))
    done = model.work(kernel, given, programs)
    per_frame = 512 * 196 * 2 + 9 * 512 * 2
    assert done.floor_bytes == 160 * (per_frame + 9 * 16)
    assert done.bytes_moved == 160 * (per_frame + 9 * 16 * -(-512 // given["BLOCK_C"]))


@pytest.mark.parametrize(("size", "window", "plane", "block"), [
    ((3, 5, 6), (3, 3, 3), (2, 4), 8), ((2, 9, 7), (2, 4, 5), (4, 4), 4), ((1, 4, 4), (5, 7, 7), (4, 4), 16),
])  # fmt: skip
def test_sources_of_a_fold(size, window, plane, block):
    """Against one position and tap after the other: from where a tap leads into a tile, beyond the map as well."""
    tiles = blocks = sources = 0
    for t, top, left in itertools.product(range(size[0]), range(0, size[1], plane[0]), range(0, size[2], plane[1])):
        tiles += 1
        for dt in range(window[0]):
            frame = t - dt + window[0] // 2
            reached = {
                (h + down - dh + window[1] // 2, w + right - dw + window[2] // 2)
                for h, w in [(top, left)]
                for down, right in itertools.product(range(plane[0]), range(plane[1]))
                for dh, dw in itertools.product(range(window[1]), range(window[2]))
            }
            inside = sum(0 <= h < size[1] and 0 <= w < size[2] for h, w in reached)
            if 0 <= frame < size[0]:
                blocks, sources = blocks - (-inside // block), sources + inside
    given = {"SIZE": size, "WINDOW": window, "PLANE_H": plane[0], "PLANE_W": plane[1], "BLOCK_S": block}
    assert model._walk(given) == (tiles, blocks, sources)


def test_neighbours():
    for length, taps in itertools.product((1, 2, 7, 8), (1, 2, 3, 4, 7, 9)):
        pairs = sum(0 <= n + m - taps // 2 < length for n in range(length) for m in range(taps))
        assert model._neighbours(length, taps) == pairs


# --- rows and table -------------------------------------------------------------------------------------------------

FEW = [
    ("4x64x7x7, N 9", "region_pool", RegionCase("gather", 4, 9, 64, (7, 7))),
    ("B 1, C 8", "relational_attention", RelationalCase(8, (8, 8), frames=2, batch=1, kernel="V", context="V")),
    ("C 8, ts 64", "bilinear_transform", BilinearCase(8, 64, (7, 7), groups=4, mixes=2, ts=64, batch=1)),
]


def few(*targets):
    """A report of few cases."""
    return mock.patch.multiple(report, cases=lambda: FEW, TARGETS=dict.fromkeys(targets))


def test_the_report_is_the_same_bytes_from_the_same_code(tmp_path, capsys):
    texts = []
    for name in ("a", "b"):
        with few("sm_90"):
            assert report.main(tmp_path / name / "compiled.jsonl") == 0
        texts.append((tmp_path / name / "compiled.jsonl").read_text())
    assert texts[0] == texts[1]
    rows = [json.loads(line) for line in texts[0].splitlines()]
    assert len(rows) == 1 + 7 + 4
    bilinear = [row for row in rows if row["op"] == "bilinear_transform"]
    assert {row["kind"]: row["launches"] for row in bilinear} == {
        "forward": 2,
        "mix": 1,
        "mix_backward": 1,
        "backward": 1,
    }
    assert {row["kernel"] for row in bilinear} == {"bilinear_forward", "bilinear_mix", "bilinear_backward"}
    assert len({(row["target"], row["kernel"], row["kind"], row["case"], row["dtype"]) for row in rows}) == len(rows)
    for row in rows:
        assert (row["schema"], row["suite"]) == (2, "compiled")
        assert 0 < row["occupancy"] <= 1
        assert row["shared"] <= row["shared_limit"]
        assert row["bytes_moved"] >= row["floor_bytes"] > 0
        assert row["loop"]["instructions"] > 0
    assert not [name for row in rows for name in row if name in ("date", "commit", "device")]
    launched = {row["kernel"]: row["launches"] for row in rows if row["op"] != "bilinear_transform"}
    assert launched.pop("relational_pack") == 2  # forward and backward
    assert set(launched.values()) == {1}
    assert "12 rows" in capsys.readouterr().out


def test_the_report_has_the_stages_that_are_measured():
    from bench import bilinear

    found = {(label, case.dtype) for label, op, case in report.cases() if op == "bilinear_transform"}
    assert len(found) == 4 * 2 * 2  # stages, with and without mixed frames, dtypes
    assert {label for label, _ in found} > {problem.label for problem in bilinear.STAGES["cuda"]}
    for _, op, case in report.cases():
        if op == "bilinear_transform":
            assert (case.cells, case.groups, case.mixes) in (((7, 7), 8, 0), ((7, 7), 8, 4))
            assert case.ts == (min(4, case.frames) if case.mixes else 0)


def test_the_report_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "compiled.jsonl"
    out.write_text("former\n")
    with mock.patch.object(report, "rows", return_value=[{"kernel": object()}]), pytest.raises(TypeError):
        report.main(out)
    assert out.read_text() == "former\n"
    assert list(tmp_path.iterdir()) == [out]


def made_up(**known):
    """A row."""
    row = {
        "op": "an_op", "kernel": "k", "kind": "k", "case": "c", "dtype": "float32", "target": "sm_90", "launches": 1,
        "num_warps": 4, "registers": 32, "spills": 0, "shared": 0, "shared_limit": 1024, "occupancy": 1.0,
        "limited_by": "warps", "programs": 1, "waves": 1.0, "load_bytes": 16, "narrowest": 4, "store_bytes": 4,
        "tensor_core": 0, "tensor_core_kind": None, "loop": None, "bytes_moved": 3, "floor_bytes": 2, "operations": 0,
        "floor_operations": 0, "instructions": 1, "issue_limit": 1.0,
    }  # fmt: skip
    return {**row, **known}


@pytest.mark.parametrize("wrong", [{"spills": 8}, {"shared": 1025}], ids=str)
def test_a_kernel_that_does_not_fit_fails_the_report(tmp_path, wrong):
    for found, status in ((made_up(), 0), (made_up(**wrong), 1)):
        with mock.patch.object(report, "rows", return_value=[found]):
            assert report.main(tmp_path / "compiled.jsonl") == status


def test_the_worst_come_first_and_the_unknown_last():
    rows = [made_up(kind=f"limit {limit}", issue_limit=limit) for limit in (0.5, None, 2.0, 0.1)]
    rows += [made_up(kind="other", target="gfx942", bytes_moved=None, floor_bytes=None)]
    text = report.table(rows)
    kinds = re.findall(r"^(limit \S+|other|sm_90|gfx942)", text, re.MULTILINE)
    assert kinds == ["sm_90", "limit 0.1", "limit 0.5", "limit 2.0", "limit None", "gfx942", "other"]
    assert " 1.50 " in text  # bytes, of the floor


def test_instructions_of_a_launch():
    """By turns of the one loop where they are known, by products where they are not."""
    loop = assembly.Loop({"integer": 90, "tensor core": 10})
    code = SimpleNamespace(
        loop=loop, instructions=150, programs=3, num_warps=4, loop_operations=1000, target="sm_90"
    )  # fmt: skip
    known, unknown = (model.Work(1, 50_000, floor_bytes=0, floor_operations=10_240, turns=turns) for turns in (7, None))
    assert report.instructions(code, known) == 3 * 4 * (50 + 7 * 100)
    assert report.instructions(code, unknown) == 100 * 50_000 // 1000
    assert report.issue_limit(code, unknown, "bfloat16", 5000) == 10 / 5000  # 1024 operations a slot
    assert report.issue_limit(code, unknown, "float32", 5000) == 160 / 5000  # 64
    assert report.instructions(code, None) is None
    code.loop = assembly.Loop(loop.counts, whole=True)
    assert report.instructions(code, known) == 3 * 4 * 150


def test_a_kernel_without_a_model_has_a_row_still():
    code = machine_code.Code("new", "sm_90", 32, 0, 0, 0, 16, 4, 16, 4, loop=assembly.Loop({"fp": 1}), programs=132)
    row = report.row(code, "float32")
    assert row["registers"] == 32
    assert row["operations"] is row["issue_limit"] is None
    assert model.work("new", {"x": torch.empty(0)}, 1) is None
