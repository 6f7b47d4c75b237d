"""Triton's launch path under a pretended driver: records hold what was passed, and kept launches pass the same."""

import ctypes
import struct
from unittest import mock

import pytest
import torch

import dyreg_triton as dt
from dyreg_triton._core import dispatch
from dyreg_triton.ops import launch

pytestmark = pytest.mark.compiled
triton = pytest.importorskip("triton", reason="triton is needed to launch")
bench = pytest.importorskip("bench.standin", exc_type=ImportError)
tl = triton.language
reason = bench.why_not()
if reason is not None:
    pytest.skip(f"no pretended driver: {reason}", allow_module_level=True)


@triton.jit
def probe(x, y, nothing, one, sixteen, odd, wide, scale, pair, after, BLOCK: tl.constexpr, KEEP: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i) * scale + one + sixteen + odd + wide + pair[0] + pair[1] + after
    tl.store(y + i, value, mask=KEEP)


X, Y = torch.zeros(64), torch.zeros(64, dtype=torch.float16)
ARGUMENTS = (X, Y, None, 1, 48, -7, 2**40 + 3, 0.5, (1, 21), 9, 64, True)


@pytest.fixture
def seen():
    with bench.standin() as seen:
        yield seen


def launched(seen, call):
    """What `call` launches."""
    seen.clear()
    call()
    found = seen.launches()
    assert len(found) == seen.count() > 0
    return found


def test_parameters_are_what_was_passed(seen):
    (record,) = launched(seen, lambda: probe[(3, 2)](*ARGUMENTS, num_warps=2))
    assert (record.name, record.grid, record.block, record.shared) == ("probe", (3, 2, 1), (64, 1, 1), 0)
    # None, 1, constexprs and the 1 of the tuple are compiled in; the last two are Triton's scratch memory.
    values = [struct.unpack(form, value)[0] for form, value in zip("PPiiqfiiPP", record.arguments(), strict=True)]
    assert values == [X.data_ptr(), Y.data_ptr(), 48, -7, 2**40 + 3, 0.5, 21, 9, 0, 0]
    assert record.pointers() == [X.data_ptr(), Y.data_ptr(), 0, 0]
    assert struct.unpack("@PPiiqfiiPP", record.params) == tuple(values)


def test_a_compiled_kernel_is_launched_as_triton_launches_it(seen):
    (record,) = launched(seen, lambda: probe[(3, 2)](*ARGUMENTS, num_warps=2))
    compiled = probe[(3, 2)](*ARGUMENTS, num_warps=2)
    (direct,) = launched(seen, lambda: compiled[(3, 2, 1)](*ARGUMENTS))
    assert direct == record
    other = list(ARGUMENTS)
    other[0] = X[16:]
    (moved,) = launched(seen, lambda: compiled[(3, 2, 1)](*other))
    assert moved != record
    assert moved.without_pointers() == record.without_pointers()
    assert moved.pointers()[0] == X.data_ptr() + 64
    other[5] = -8
    (changed,) = launched(seen, lambda: compiled[(3, 2, 1)](*other))
    assert changed.without_pointers() != record.without_pointers()


def test_another_specialisation_is_another_function(seen):
    other = list(ARGUMENTS)
    other[4] = 49  # no longer divisible by 16
    functions = {launched(seen, lambda a=a: probe[(1,)](*a))[0].function for a in (ARGUMENTS, other, ARGUMENTS)}
    assert len(functions) == 2


def test_stream_and_order(seen):
    compiled = probe[(1,)](*ARGUMENTS)
    seen.clear()
    for stream in (0, 7, 5):
        seen.stream = stream
        probe[(stream + 1,)](*ARGUMENTS)
        compiled[(stream + 1, 1, 1)](*ARGUMENTS)
    assert [(r.stream, r.grid[0]) for r in seen.launches()] == [(s, s + 1) for s in (0, 0, 7, 7, 5, 5)]


def test_the_last_launches_are_held(seen):
    compiled = probe[(1,)](*ARGUMENTS)
    run = compiled[(1, 1, 1)]
    seen.clear()
    for i in range(1030):
        run(*ARGUMENTS[:5], i, *ARGUMENTS[6:])
    assert seen.count() == 1030
    odd = [struct.unpack("i", r.arguments()[3])[0] for r in seen.launches()]
    assert odd == list(range(6, 1030))
    seen.clear()
    assert (seen.count(), seen.launches()) == (0, [])


def test_what_a_gpu_would_refuse_is_refused(seen):
    compiled = probe[(1,)](*ARGUMENTS, num_warps=2)
    count = seen.count()

    def run(grid=(1, 1, 1), **packed):
        names = ("num_warps", "num_ctas", "shared")
        packed = tuple({**dict(zip(names, compiled.packed_metadata, strict=True)), **packed}.values())
        compiled.run(*grid, 0, compiled.function, packed, None, None, None, *ARGUMENTS)

    for wrong, text in (
        ({"num_warps": 4}, "probe: 128 threads in a block, of 1 to 64"),
        ({"shared": 49153}, "probe: 49153 bytes of shared memory, of 49152"),
        ({"grid": (1, 65536, 1)}, "probe: a grid of 1 x 65536 x 1"),
    ):
        with pytest.raises(RuntimeError, match=text):
            run(**wrong)
    assert seen.count() == count
    run(grid=(1, 65535, 1), shared=49152)
    assert seen.count() == count + 1


# --- ops: the launches that they keep -------------------------------------------------------------------------------


def region_pool(dtype=torch.float32, offset=0, size=(14, 14)):
    """Every tensor of a call, and the call, forward and backward. x starts `offset` elements into its buffer."""
    x = torch.randn(2 * 32 * size[0] * size[1] + offset).to(dtype)[offset:].view(2, 32, *size).requires_grad_()
    regions = torch.rand(2, 9, 4, requires_grad=True)
    given = torch.randn(2, 9, 32).to(dtype)
    inputs = (x, regions)
    return (*inputs, given), lambda: torch.autograd.grad(dt.ops.region_pool(*inputs), inputs, given)


def relational_attention(dtype=torch.float32, offset=0, size=(6, 6)):
    """As `region_pool`; it is the query that starts there."""
    c, t = 8, 2
    q = torch.randn(8 * c * t * size[0] * size[1] + offset).to(dtype)[offset:].view(1, 8, c, t, *size)
    k, v = (torch.randn(1, c, t, *size).to(dtype) for _ in range(2))
    context = {"h2": (c, 3, 3, 3), "h1": (c, c, 3, 3, 3), "p1": (c, c), "g": (c, 3, 3, 3), "identity": (c, c)}
    context = {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in context.items()}
    inputs = tuple(t.requires_grad_() for t in (q, k, v, *context.values()))
    given = torch.randn(1, 8, c, t, *size).to(dtype)
    return (*inputs, given), lambda: torch.autograd.grad(
        dt.ops.relational_attention(q, k, v, **context, eps=1e-6), inputs, given
    )


def launches_of(seen, tensors, call):
    """What a call launches, each address replaced by which of its tensors lies there: null and fresh ones by name."""
    names = {0: "null", **{t.data_ptr(): i for i, t in enumerate(tensors)}}
    return [(r.without_pointers(), [names.get(p, "fresh") for p in r.pointers()]) for r in launched(seen, call)]


@pytest.mark.parametrize(("op", "number"), [(region_pool, 2), (relational_attention, 6)])
def test_kept_launches_pass_what_triton_passes(seen, op, number):
    calls = [op(), op(offset=1), op(torch.bfloat16), op(size=(4, 4)), op()]
    made = []
    for tensors, call in calls:
        launch.forget()
        made.append(launches_of(seen, tensors, call))
        assert len(made[-1]) >= number
        assert set(range(len(tensors))) & {name for _, names in made[-1] for name in names} >= {0, 1}
    assert made[0] == made[-1]
    assert all(made[0] != others for others in made[1:-1])
    launch.forget()
    bound = []
    with mock.patch.object(triton.JITFunction, "run", autospec=True, side_effect=triton.JITFunction.run) as run:
        for _ in range(3):
            run.reset_mock()
            misaligned = 0
            for (tensors, call), records in zip(calls, made, strict=True):
                assert launches_of(seen, tensors, call) == records
                misaligned += sum(any(p % 16 for p in record.pointers()) for record in seen.launches())
            bound.append(run.call_count - misaligned)
    assert misaligned > 0
    assert bound[1:] == [0, 0]  # from the second turn on, Triton binds only what the kept kernel must not take


# --- the stand-in itself --------------------------------------------------------------------------------------------


def test_everything_is_put_back():
    x, regions = torch.randn(1, 4, 5, 5), torch.rand(1, 3, 4)
    former = triton.runtime.driver._active
    assert not dispatch.can_run("triton", device="cpu", dtype=torch.float32)
    with bench.standin("sm_80") as seen:
        assert triton.runtime.driver.active.get_current_target().arch == 80
        assert dispatch.can_run("triton", device="cpu", dtype=torch.float32)
        assert not dispatch.can_run("triton", device="cpu", dtype=torch.float64)
        dt.ops.region_pool(x, regions)
        assert seen.count() == 1
        with pytest.raises(RuntimeError, match="it is already"), bench.standin():
            pass
    assert triton.runtime.driver._active is former
    assert not dispatch.can_run("triton", device="cpu", dtype=torch.float32)
    torch.testing.assert_close(dt.ops.region_pool(x, regions), dt.reference.region_pool(x, regions))
    assert seen.count() == 1
    with bench.standin() as seen:
        assert seen.count() == 0
        dt.ops.region_pool(x, regions)
        assert seen.count() == 1
        seen.stream = 3
    with mock.patch.object(launch, "forget", wraps=launch.forget) as forget:
        with bench.standin() as seen:
            assert (seen.count(), seen.stream) == (0, 0)
            assert forget.call_count == 1  # plans hold kernels of another driver
        assert forget.call_count == 2


def test_nobody_else_takes_it_for_a_gpu(seen):
    library = ctypes.CDLL("libcuda.so.1")  # by this name whoever looks for a driver finds it
    count = ctypes.c_int(-1)
    assert library.cuInit(0) == 100  # CUDA_ERROR_NO_DEVICE
    assert library.cuDeviceGetCount(ctypes.byref(count)) == 0
    assert count.value == 0
    assert not torch.cuda.is_available()


def test_what_stands_in_the_way_is_said(seen, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="target is 'gfx942'; accepted are 'sm_80', 'sm_90', 'sm_100'"):
        bench.standin("gfx942").__enter__()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv("CC", "false")
        with pytest.raises(RuntimeError, match=r"false -O2 .* failed on .*standin\.c"):
            bench._library.__wrapped__()
        patch.delenv("CC")
        patch.setenv("PATH", str(tmp_path))
        assert bench.why_not() == "there is no C compiler (gcc, clang, or one named by CC)"
    with pytest.raises(RuntimeError, match=r"has loaded another libcuda\.so\.1"):  # a second copy
        bench._library.__wrapped__()
