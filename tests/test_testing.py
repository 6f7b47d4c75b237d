"""The testing kit itself: each planted error must be seen."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from support import (
    LAYOUTS,
    PATIENCE,
    PROFILES,
    REGION_KINDS,
    REGION_OPS,
    TOLERANCE,
    Guarded,
    RegionCase,
    assert_all_close,
    assert_close,
    assert_identical,
    mismatch,
    poisoned_outputs,
    random_regions,
    relative_error,
    value_and_gradients,
)
from torch import Tensor

import dyreg_triton as dt
from dyreg_triton.testing import Call, TensorSpec, check_call, check_op, checks, strategies


def expected_matrix() -> torch.Tensor:
    return torch.randn(6, 6, dtype=torch.float64)


PLANTED = {
    "sign flip": (lambda e: -e, "relative error 2"),
    "transposed axis": (lambda e: e.mT, "relative error"),
    "one wrong entry": (lambda e: e + torch.eye(36)[7].view(6, 6) * 1e-3, "relative error"),
    "scaled": (lambda e: e * 1.001, "relative error 0.001"),
    "shifted by a cell": (lambda e: e.roll(1, 0), "relative error"),
    "NaN": (lambda e: torch.where(torch.eye(6, dtype=torch.bool), math.nan, e), "6 of 36 values not finite"),
    "infinity": (lambda e: e / torch.arange(36).view(6, 6), "1 of 36 values not finite"),
    "all zero": (lambda e: 0 * e, "all zero"),
    "absent": (lambda e: None, "absent"),
    "broadcast shape": (lambda e: e[None], "shape"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("error", PLANTED)
def test_planted_error_is_seen(error: str, dtype: torch.dtype) -> None:
    plant, words = PLANTED[error]
    expected = expected_matrix()
    wrong = plant(expected)
    wrong = wrong if wrong is None else wrong.to(dtype)
    with pytest.raises(AssertionError, match=words):
        assert_close(wrong, expected, "grad_x")


@pytest.mark.parametrize("error", [e for e in PLANTED if e not in ("one wrong entry", "scaled")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_planted_error_is_seen_in_half_precision(error: str, dtype: torch.dtype) -> None:
    plant, words = PLANTED[error]
    expected = expected_matrix()
    wrong = plant(expected)
    with pytest.raises(AssertionError, match=words):
        assert_close(wrong if wrong is None else wrong.to(dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_passes(dtype: torch.dtype) -> None:
    expected = expected_matrix()
    assert_close(expected.to(dtype), expected)
    assert_close(torch.zeros(3, dtype=dtype), torch.zeros(3))
    assert_close(torch.zeros(0, 3, dtype=dtype), torch.zeros(0, 3))


def test_all_close_names_every_wrong_entry() -> None:
    expected = {"out": expected_matrix(), "grad_x": expected_matrix(), "grad_regions": expected_matrix()}
    wrong = {"out": expected["out"], "grad_x": None, "grad_regions": -expected["grad_regions"]}
    with pytest.raises(AssertionError, match=r"^grad_x is absent; grad_regions has relative error 2"):
        assert_all_close(wrong, expected)
    with pytest.raises(AssertionError, match="entries differ"):
        assert_all_close({"out": expected["out"]}, expected)
    assert_all_close(expected, expected)


def test_unexpected_gradient_is_seen() -> None:
    with pytest.raises(AssertionError, match="present"):
        assert_close(torch.zeros(2), None)


def test_expected_values_must_be_finite() -> None:
    with pytest.raises(AssertionError, match="cannot be compared"):
        assert_close(torch.tensor([math.nan]), torch.tensor([math.nan]))


def test_floor_excuses_cancellation_only() -> None:
    cancelled, rest = torch.full((4,), 1e-9, dtype=torch.float64), torch.full((4,), -1e-9)
    assert mismatch(rest, cancelled, floor=1.0) is None
    assert mismatch(rest, cancelled) is not None
    assert mismatch(rest * 1e6, cancelled, floor=1.0) is not None
    large = torch.ones(4, dtype=torch.float64)
    assert mismatch(large.float() * 1.001, large, floor=1.0) is not None


def test_relative_error_of_nothing_expected() -> None:
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.full((2,), 1e-30), torch.zeros(2)) > 1


def test_identical_sees_a_bit_and_takes_nan() -> None:
    a = torch.tensor([1.0, math.nan, 0.0])
    assert_identical(a, a.clone())
    for different in (torch.tensor([1.0, math.nan, -0.0]), torch.nextafter(a, torch.tensor(9.0))):
        with pytest.raises(AssertionError, match=r"[12] of 3 values differ"):
            assert_identical(different, a)
    with pytest.raises(AssertionError, match="expected"):
        assert_identical(a.half(), a)


def test_value_and_gradients() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.randn(3)
    got = value_and_gradients(lambda x, w: x * w, {"x": x, "w": w}, torch.full((3,), 2.0))
    assert got.keys() == {"out", "grad_x"}
    assert_close(got["grad_x"], 2 * w)
    no_graph = value_and_gradients(lambda x: torch.zeros(3), {"x": x})
    assert no_graph["grad_x"] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (0, 3), (2, 0, 4)])
def test_guarded_holds_its_values(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    values = torch.randn(shape).to(dtype)
    guarded = Guarded(values, layout)
    if layout == "expanded" and shape:
        values = values[:1].expand(shape)
    assert_identical(guarded.tensor, values)
    held = guarded.buffer.isfinite().sum().item()
    distinct = values.numel() // (shape[0] or 1 if layout == "expanded" and shape else 1)
    assert held == distinct
    assert guarded.buffer[: Guarded.MARGIN].isnan().all()
    assert guarded.buffer[-Guarded.MARGIN :].isnan().all()
    assert guarded.tensor.is_leaf
    guarded.check()


def test_guarded_layouts_differ() -> None:
    strides = {layout: Guarded(torch.randn(2, 3, 4, 5), layout).tensor.stride() for layout in LAYOUTS}
    assert len(set(strides.values())) == len(LAYOUTS) - 1
    assert strides["aligned"] == strides["contiguous"] == (60, 20, 5, 1)
    assert strides["expanded"][0] == 0
    assert strides["channels_last"][1] == 1
    assert strides["transposed"][-2:] == (1, 4)
    assert strides["reversed"][0] == 1
    assert strides["sliced"][-1] == 2


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_guarded_sees_writes(layout: str) -> None:
    for position in (Guarded.MARGIN, Guarded.MARGIN - 1, 0, -1):
        guarded = Guarded(torch.randn(3, 4), layout)
        guarded.buffer[position] = 7.0
        with pytest.raises(AssertionError, match="memory of grad_output"):
            guarded.check("grad_output")


def test_guarded_poisons_reads_outside() -> None:
    guarded = Guarded(torch.randn(3, 4), "sliced").tensor
    neighbour = guarded.as_strided((13,), (1,), guarded.storage_offset() - 1)
    assert neighbour.sum().isnan()


def test_poisoned_outputs() -> None:
    before = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    with poisoned_outputs():
        x = torch.ones(3)
        made = [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))]
        made += [x.new_empty_strided((3,), (2,)), torch.empty(3, dtype=torch.bfloat16, requires_grad=True)]
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
        assert torch.zeros(3).eq(0).all()
    assert all(t.isnan().all() for t in made)
    assert {name: getattr(torch, name) for name in before} == before
    assert "new_empty" not in vars(torch.Tensor)


@pytest.mark.parametrize("position", [-1, 12, -64, 75])
def test_poisoned_outputs_see_writes_outside(position: int) -> None:
    def write() -> None:
        with poisoned_outputs():
            out = torch.empty(3, 4)
            out.as_strided((), (), out.storage_offset() + position).fill_(0)

    with pytest.raises(AssertionError, match="outside of an output"):
        write()


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 0, 3)])
def test_poisoned_outputs_keep_shapes_and_strides(shape: tuple[int, ...]) -> None:
    plain = torch.empty(shape)
    strided = torch.randn(4, 3, 2).permute(2, 0, 1)
    with poisoned_outputs():
        made = torch.empty(shape)
        assert torch.empty_like(strided).stride() == torch.empty_like(strided).stride() == (1, 6, 2)
        made.fill_(1)
    assert (made.shape, made.stride(), made.is_leaf) == (plain.shape, plain.stride(), True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", REGION_KINDS)
def test_random_regions_keep_off_kinks(kind: str, dtype: torch.dtype) -> None:
    size = (17, 33)
    regions = random_regions((3, 8), size, kind=kind, dtype=dtype, seed=5)
    assert regions.shape == (3, 8, 4)
    assert regions.dtype == dtype
    for axis, side in ((0, size[1]), (1, size[0])):
        distance = (regions[..., axis, None].double() - torch.arange(side)).abs()
        extent = regions[..., axis + 2, None].double()
        kept = (distance > 1e-3) & ((distance - extent).abs() > 1e-3)
        assert (kept | (extent <= 0)).all()
    assert_identical(regions, random_regions((3, 8), size, kind=kind, dtype=dtype, seed=5))
    assert not regions.equal(random_regions((3, 8), size, kind=kind, dtype=dtype, seed=6))


@pytest.mark.parametrize("profile", PROFILES)
def test_random_regions_are_of_their_kind(profile: str) -> None:
    size = (17, 33)
    kernel = {
        kind: dt.reference.region_kernel(
            random_regions((24,), size, kind=kind, dtype=torch.float64, seed=1), size, profile=profile
        ).flatten(1)
        for kind in REGION_KINDS
    }
    assert not kernel["empty"].any()
    assert kernel["inside"].sum(1).sub(1).abs().max() < 1e-12
    assert (kernel["covering"] > 0).all()
    assert (kernel["tiny"] > 0.05).sum(1).max() <= 4
    reached = kernel["mixed"].sum(1)
    assert reached.min() == 0
    assert reached.max() > 0.9
    if profile != "gaussian":
        reached = kernel["outside"].any(1)
        assert reached.any()
        assert not reached.all()


@pytest.mark.parametrize("op", REGION_OPS)
def test_region_case(op: str) -> None:
    case = RegionCase(op, (2,), 3, 4, (5, 6), regions_dtype=torch.float32, layout="sliced", grad_layout="expanded")
    guarded = case.guarded("cpu")
    inputs = {name: guarded[name].tensor for name in case.input_names()}
    out = case.function(dt.reference)(**inputs)
    assert out.shape == case.shape_of("out") == guarded["grad_output"].tensor.shape
    assert out.dtype == case.out_dtype()
    assert inputs.keys() == dict.fromkeys(case.input_names()).keys()
    again = case.guarded("cpu")
    for name in guarded:
        assert_identical(guarded[name].buffer, again[name].buffer)


def test_region_floor_is_below_any_gradient_worth_comparing() -> None:
    """Only where one cell takes all does the floor come into play."""
    for op, profile in ((op, profile) for op in REGION_OPS for profile in PROFILES):
        case = RegionCase(op, (2,), 5, 4, (9, 8), profile, dtype=torch.float64, regions_dtype=torch.float64)
        values = case.values()
        grad_output = values.pop("grad_output")
        leaves = {name: t.requires_grad_() for name, t in values.items()}
        got = value_and_gradients(case.function(dt.reference), leaves, grad_output)
        assert case.floors(values, grad_output)["grad_regions"] < got["grad_regions"].norm()
    single = RegionCase("region_kernel", (), 1, 1, (1, 1), regions_dtype=torch.float64)
    assert single.floors({"regions": torch.tensor([[0.1, 0.1, 0.2, 0.3]])}, torch.ones(1, 1, 1))["grad_regions"] > 0.1


# --- calls and their strategies -------------------------------------------------------------------------------------


def drawn(strategy: Any, count: int = 200) -> list[Any]:
    """Examples of a strategy, the same in every run."""
    found: list[Any] = []

    @checks.settings(count)
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def test_calls_share_dimensions_and_vary_the_rest() -> None:
    calls = drawn(
        strategies.calls(
            x=strategies.tensor("*", "C", "H", "W"),
            regions=strategies.regions("*", "N", size=("H", "W")),
            index=strategies.tensor("N", 3, dtypes=[torch.int64]),
            size=strategies.size("H", "W"),
            profile=strategies.profiles(),
            steps=2,
        )
    )
    leads, layouts, kinds, dtypes, widths = set(), set(), set(), set(), set()
    for call in calls:
        x, regions = call.tensors["x"], call.tensors["regions"]
        *lead, channels, height, width = x.shape
        assert regions.shape[:-2] == tuple(lead)
        assert call.tensors["index"].shape == (regions.shape[-2], 3)
        assert call.options["size"] == (height, width) == regions.size
        assert call.options["steps"] == 2
        assert regions.dtype in (x.dtype, torch.float32)
        leads.add(tuple(lead))
        layouts |= {x.layout, call.grad_layout}
        kinds.add(regions.kind)
        dtypes.add(x.dtype)
        widths |= {width, channels}
    assert layouts == set(LAYOUTS)
    assert kinds == set(REGION_KINDS)
    assert dtypes == {torch.float32, torch.bfloat16, torch.float16}
    assert {(), (2,), (0,), (1, 2)} <= leads
    assert {0, 1, 15, 16, 17} <= widths
    inputs = calls[0].inputs("cpu")
    assert inputs["index"].dtype == torch.int64
    assert inputs["x"].tensor.shape == calls[0].tensors["x"].shape


def test_dims_are_at_block_edges() -> None:
    assert set(drawn(strategies.dims(block=32, blocks=2))) == {0, 1, 2, 3, 31, 32, 33, 63, 64, 65}
    assert 0 not in drawn(strategies.dims(empty=False))


@pytest.mark.parametrize("op", REGION_OPS)
def test_region_calls_are_the_librarys_own(op: str) -> None:
    for call in drawn(strategies.region_calls(op), 10):
        inputs = {name: g.tensor for name, g in call.inputs("cpu").items()}
        out = getattr(dt.reference, op)(**inputs, **call.options)
        assert call.cotangent(out).tensor.shape == out.shape


# --- check_op: every planted error is seen ---------------------------------------------------------------------------


def good(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("...mk,m->...m", x.to(wide(x)), w.to(wide(x))).to(x.dtype)


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


CALLS = strategies.calls(x=strategies.tensor("*", "M", "K"), w=strategies.tensor("M"))
SINGLE = strategies.calls(x=strategies.tensor("*", "M", "K"), w=strategies.tensor("M"), dtypes=[torch.float32])
NOT_EMPTY = strategies.calls(
    x=strategies.tensor("M", "K"),
    w=strategies.tensor("M"),
    dims=dict.fromkeys("MK", strategies.dims(empty=False)),
    dtypes=[torch.float32],
)


class Forgetful(torch.autograd.Function):
    """Right values, and no gradient for w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        ctx.shape = x.shape
        return good(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return (grad * w).unsqueeze(-1).expand(ctx.shape), None


def writes_its_input(x: Tensor, w: Tensor) -> Tensor:
    out = good(x, w)
    if x.numel():
        x.data.view(-1)[:1] += 1 if x.is_contiguous() else 0
    return out


def writes_outside(x: Tensor, w: Tensor) -> Tensor:
    out = torch.empty_like(good(x, w), memory_format=torch.contiguous_format)
    out.data.as_strided((out.numel() + 1,), (1,), out.storage_offset()).fill_(0)
    return good(x, w)


def writes_what_it_reads_outside(x: Tensor, w: Tensor) -> Tensor:
    """A block without a mask: NaN from beside the input goes beside the output."""
    out = torch.empty_like(good(x, w), memory_format=torch.contiguous_format)
    beyond = x.detach().as_strided((1,), (1,), x.storage_offset() - 1)
    out.data.as_strided((1,), (1,), out.storage_offset() + out.numel()).copy_(beyond * 2)
    return good(x, w)


def reads_outside(x: Tensor, w: Tensor) -> Tensor:
    beyond = x.detach().as_strided((1,), (1,), x.storage_offset() - 1)
    return good(x, w) + 0 * beyond


def leaves_unwritten(x: Tensor, w: Tensor) -> Tensor:
    return good(x, w) + 0 * torch.empty(w.shape, dtype=x.dtype, device=x.device)


def one_element(x: Tensor, w: Tensor) -> Tensor:
    out = good(x, w)
    bump = torch.zeros_like(out).view(-1)
    bump[-1:] = 1
    return out + bump.view(out.shape)


_runs = itertools.count()
WRONG = {
    "values": (lambda x, w: good(x, w) * 1.02, "out has relative error 0.02"),
    "beyond a block": (lambda x, w: good(x, w) * (1.1 if x.shape[-1] > 16 else 1), "out has relative error 0.1"),
    "one dtype only": (lambda x, w: good(x, w) * (1.1 if x.dtype == torch.bfloat16 else 1), "relative error"),
    "one layout only": (lambda x, w: good(x, w) * (1 if x.is_contiguous() else 1.1), "relative error"),
    "a gradient": (lambda x, w: good(x, w.detach() + 0.5 * (w - w.detach())), "grad_w has relative error 0.5"),
    "a sign of a gradient": (lambda x, w: good(2 * x.detach() - x, w), "grad_x has relative error 2"),
    "no gradient": (lambda x, w: good(x, w.detach()), "grad_w is absent"),
    "no gradient from a Function": (Forgetful.apply, "grad_w is absent"),
    "no graph": (lambda x, w: good(x, w).detach(), "grad_x is absent; grad_w is absent"),
    "NaN": (lambda x, w: good(x, w) + (math.nan if x.shape[-1] == 17 else 0), "not finite"),
    "a shape": (lambda x, w: good(x, w).unsqueeze(0), "op returned shapes"),
    "an output's dtype": (lambda x, w: good(x.float(), w.float()), "out is torch.float32, expected the first input's"),
    "too coarse a dtype": (lambda x, w: good(x, w).bfloat16(), "out is torch.bfloat16, expected the first input's"),
    "an integer output": (lambda x, w: good(x, w).long(), "out is torch.int64"),
    "one element": (one_element, "relative error|of the largest expected value"),
    "two outputs": (lambda x, w: (good(x, w), x), "op returned shapes"),
    "its input": (writes_its_input, "memory of x"),
    "outside of its output": (writes_outside, "outside of an output"),
    "NaN outside of its output": (writes_what_it_reads_outside, "outside of an output"),
    "from outside of its input": (reads_outside, "not finite"),
    "from unwritten memory": (leaves_unwritten, "not finite"),
    "not the same twice": (lambda x, w: good(x, w) * (1 + 4e-6 * (next(_runs) % 2)), "of a second run"),
}


def test_check_op_passes_what_is_right() -> None:
    check_op(good, good, CALLS, examples=300)
    check_op(lambda x, w: (good(x, w), x + w[:, None]), lambda x, w: [good(x, w), x + w[:, None]], SINGLE)
    check_op(lambda x, w: (x.argmax(), x * 2), lambda x, w: (x.argmax(), x * 2), NOT_EMPTY)
    check_op(lambda x, w: x.float(), lambda x, w: x, CALLS, same_dtype=False)


@pytest.mark.parametrize("wrong", WRONG)
def test_check_op_sees(wrong: str) -> None:
    op, words = WRONG[wrong]
    with pytest.raises(AssertionError, match=words):
        check_op(op, good, CALLS)


def test_check_op_shows_the_smallest_call() -> None:
    with pytest.raises(AssertionError) as caught:
        check_op(lambda x, w: good(x, w) * (1.1 if x.shape[-1] > 16 else 1), good, CALLS)
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert "shape=(1, 17)" in notes
    assert "dtype=torch.float32" in notes


def test_one_wrong_element_among_many_is_seen() -> None:
    for dtype in TOLERANCE:
        expected = torch.randn(1000, 1000, dtype=torch.float64)
        actual = expected.to(dtype, copy=True)
        assert mismatch(actual, expected) is None
        actual[3, 5] += 1
        assert "(3, 5)" in mismatch(actual, expected, tolerance=1.0, element=4 * TOLERANCE[dtype])
        if dtype in (torch.float16, torch.bfloat16):
            assert relative_error(actual, expected) < TOLERANCE[dtype]  # the norm alone would not see it
            assert mismatch(actual, expected) is not None


@pytest.mark.parametrize("wrong", ["no gradient", "no graph", "a gradient"])
def test_check_op_compares_gradients_where_none_are_wanted(wrong: str) -> None:
    op, words = WRONG[wrong]
    with torch.no_grad(), pytest.raises(AssertionError, match=words):
        check_op(op, good, CALLS)


def test_check_op_sees_what_is_wrong_with_outputs_and_inputs_of_whole_numbers() -> None:
    with pytest.raises(AssertionError, match="out differs"):
        check_op(lambda x, w: x.argmin(), lambda x, w: x.argmax(), NOT_EMPTY)

    def spoils(x: Tensor, index: Tensor) -> Tensor:
        out = x[index]
        index.data.zero_()
        return out

    calls = strategies.calls(x=strategies.tensor(8), index=strategies.tensor(5, dtypes=[torch.int64]))
    with pytest.raises(AssertionError, match="memory of index"):
        check_op(spoils, lambda x, index: x[index], calls)


def test_check_op_checks_what_torch_compiles() -> None:
    def half_too_much(graph: torch.fx.GraphModule, example: Any) -> Any:
        return lambda *inputs: [1.5 * t for t in graph(*inputs)]

    def op(x: Tensor, w: Tensor) -> Tensor:
        return good(x, w)

    torch._dynamo.reset()
    call = Call({"x": TensorSpec((3, 4)), "w": TensorSpec((3,))})
    check_call(torch.compile(op, backend="eager", fullgraph=True), good, call)
    torch._dynamo.reset()
    with pytest.raises(AssertionError, match=r"relative error 0.5"):
        check_call(torch.compile(op, backend=half_too_much, fullgraph=True), good, call)


def test_check_op_refuses_a_floor_of_nothing() -> None:
    call = Call({"x": TensorSpec((3, 4)), "w": TensorSpec((3,))}, floors=lambda inputs, grad: {"grad_y": 1.0})
    with pytest.raises(ValueError, match=r"floors names .'grad_y'.; accepted are the results"):
        check_call(good, good, call)


@torch.library.custom_op("dyreg_triton_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return (2 * x).contiguous()


@torch.library.custom_op("dyreg_triton_tests::twice_transposed", mutates_args=())
def twice_transposed(x: Tensor) -> Tensor:
    return (2 * x).mT.contiguous().mT


for _op in (twice, twice_transposed):
    _op.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
    _op.register_autograd(lambda ctx, grad: 2 * grad)


def fakes(x: Tensor) -> dict[str, Any]:
    """Wrong fakes of an op that doubles: what each promises of a result."""
    return {
        "swapped": x.new_empty(x.shape[::-1]),
        "float32": x.new_empty(x.shape, dtype=torch.float32),
        "keeps_strides": torch.empty_like(x),
    }


def with_fake(which: str) -> Callable[[Tensor], Tensor]:
    op = torch.library.custom_op(f"dyreg_triton_tests::fake_{which}", lambda x: (2 * x).contiguous(),
                                 mutates_args=(), schema="(Tensor x) -> Tensor")  # fmt: skip
    op.register_fake(lambda x: fakes(x)[which])
    op.register_autograd(lambda ctx, grad: 2 * grad)
    return op


def test_check_op_puts_custom_ops_through_opcheck() -> None:
    """On shapes, dtypes and layouts where a wrong fake shows, and not only on the first call."""
    calls = strategies.calls(x=strategies.tensor("M", "K"))
    check_op(twice, lambda x: 2 * x, calls)
    check_op(twice_transposed, lambda x: 2 * x, calls, opcheck=False)
    with pytest.raises(AssertionError, match=r"opcheck of dyreg_triton_tests.twice_transposed"):
        check_op(twice_transposed, lambda x: 2 * x, calls)
    for which in fakes(torch.ones(1)):
        with pytest.raises(AssertionError, match=f"opcheck of dyreg_triton_tests.fake_{which}"):
            check_op(with_fake(which), lambda x: 2 * x, calls)


def test_check_op_takes_custom_ops_inside_of_a_function() -> None:
    """They have no formula of their own, for the Function around them is it."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return bare(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return bare(grad)

    check_op(Twice.apply, lambda x: 2 * x, strategies.calls(x=strategies.tensor("M", "K")))


@torch.library.custom_op("dyreg_triton_tests::bare", mutates_args=())
def bare(x: Tensor) -> Tensor:
    return (2 * x).contiguous()


bare.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))


def test_check_op_puts_the_ops_of_a_backward_through_opcheck() -> None:
    """The forward is as registered; the op that its backward runs promises another shape."""
    backward = torch.library.custom_op("dyreg_triton_tests::half_backward", lambda grad: grad / 2,
                                       mutates_args=(), schema="(Tensor grad) -> Tensor")  # fmt: skip
    backward.register_fake(lambda grad: grad.new_empty(grad.shape[::-1]))

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x / 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return backward(grad)

    with pytest.raises(AssertionError, match=r"opcheck of dyreg_triton_tests.half_backward"):
        check_op(Half.apply, lambda x: x / 2, strategies.calls(x=strategies.tensor("M", "K")))


# --- dt.testing as users meet it -----------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("op", REGION_OPS)
def test_region_ops_pass_their_own_kit(op: str) -> None:
    """The public entry, opcheck of forward and backward folded in."""
    with dt.backend("triton"):
        check_op(getattr(dt.ops, op), getattr(dt.reference, op), strategies.region_calls(op), examples=4)


def test_kit_comes_without_hypothesis() -> None:
    code = """
        import sys
        sys.modules["hypothesis"] = None
        import torch, dyreg_triton as dt
        dt.testing.assert_close(torch.ones(2), torch.ones(2))
        dt.testing.Guarded(torch.ones(2)).check()
        for use in (lambda: dt.testing.strategies, lambda: dt.testing.check_op(abs, abs, None)):
            try:
                use()
            except ImportError as error:
                assert "pip install 'dyreg-triton[test]'" in str(error), error
            else:
                raise SystemExit("no error")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=PATIENCE)


def test_checks_hold_without_assert_statements() -> None:
    """As in the run of these tests under PYTHONOPTIMIZE, which says so to each process that takes part."""
    assert sys.flags.optimize >= int(os.environ.get("PYTHONOPTIMIZE") or 0)
    code = """
    import sys
    from dyreg_triton.testing import Call, TensorSpec, check_call
    if sys.flags.optimize != 1:
        sys.exit("not under -O")
    try:
        check_call(lambda x: 2.1 * x, lambda x: 2 * x, Call({"x": TensorSpec((5, 7))}))
    except AssertionError:
        sys.exit(0)
    sys.exit("a wrong op passed")
    """
    subprocess.run([sys.executable, "-O", "-c", textwrap.dedent(code)], check=True, timeout=PATIENCE)
