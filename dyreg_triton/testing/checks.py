"""Check an op against a reference: values and every gradient, in poisoned memory, twice, and by torch's own opcheck.

For one call: the reference computes in float64; the op computes in the call's dtype, between NaN; outputs and the
gradient of every floating input are compared; nothing may be written that is not the op's own; a second run must give
the same bits; and each custom op that ran inside goes through `torch.library.opcheck`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..validate import as_device, flag, is_integer
from .calls import Call, default_device
from .comparators import TOLERANCE, _bound, assert_all_close, assert_identical
from .memory import Guarded, poisoned_outputs

_TORCHS_OWN = ("aten", "prim", "prims", "profiler", "inductor", "_c10d_functional", "c10d", "triton")


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the first call of each custom op that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[tuple, dict]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in _TORCHS_OWN:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if func not in self.seen and all(t.numel() for t in tensors):
                self.seen[func] = (tuple(map(_alone, args)), {k: _alone(v) for k, v in kwargs.items()})
        return func(*args, **kwargs)


def _alone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _opcheck(recorded: _Recorder, known: set, *, differentiable: bool) -> None:
    for op, (args, kwargs) in recorded.seen.items():
        if op in known:
            continue
        if differentiable:
            for t in (*args, *kwargs.values()):
                if isinstance(t, Tensor) and t.is_floating_point():
                    t.requires_grad_()
        try:
            torch.library.opcheck(op, args, kwargs)
        except Exception as error:
            raise AssertionError(f"opcheck of {op}: {error}") from error
        known.add(op)


def _outputs(result: Any, who: str) -> list[Tensor]:
    outs = list(result) if isinstance(result, (tuple, list)) else [result]
    if not outs or not all(isinstance(t, Tensor) for t in outs):
        raise TypeError(f"check_call: {who} returned {type(result).__name__}; accepted is a tensor or several")
    return outs


def _names(outs: list[Tensor]) -> list[str]:
    return ["out"] if len(outs) == 1 else [f"out[{i}]" for i in range(len(outs))]


def _gradients(outs: list[Tensor], inputs: Mapping[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor | None]:
    """By "grad_<input>"; None where the output does not depend on an input that requires one."""
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    pairs = [(out, g) for out, g in zip(outs, cotangents, strict=True) if out.requires_grad]
    if not wanted or not pairs:
        return dict.fromkeys((f"grad_{name}" for name in wanted), None)
    found = torch.autograd.grad(
        [out for out, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
    )
    return {f"grad_{name}": grad for name, grad in zip(wanted, found, strict=True)}


def check_call(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    call: Call,
    *,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
    element: float | None = None,
    repeat: bool = True,
    opcheck: bool = True,
    _known: set | None = None,
) -> None:
    """`check_op` for one call; its options."""
    for name, function in (("op", op), ("reference", reference)):
        if not callable(function):
            raise TypeError(f"check_call: {name} is {function!r}; accepted is a callable")
    if not isinstance(call, Call):
        raise TypeError(f"check_call: call is {call!r}; accepted is a dyreg_triton.testing.Call")
    flag("check_call", "repeat", repeat)
    flag("check_call", "opcheck", opcheck)
    for name, bound in (("tolerance", tolerance), ("element", element)):
        if bound is not None:
            _bound("check_call", name, bound)
    known = set() if _known is None else _known
    device = default_device() if device is None else as_device("check_call", device)
    if device.type == "meta":
        raise ValueError("check_call: device is meta; accepted is a torch.device that holds data")
    made = call.inputs(device)
    plain = {name: t.tensor if isinstance(t, Guarded) else t for name, t in made.items()}

    exact = {name: t.detach().double().requires_grad_() if t.is_floating_point() else t for name, t in plain.items()}
    expected_outs = _outputs(reference(**exact, **call.options), "reference")

    def run() -> tuple[list[Tensor], dict[str, Tensor | None], dict[str, Guarded]]:
        inputs = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in plain.items()}
        forward, backward = _Recorder(), _Recorder()
        with poisoned_outputs():
            with forward:
                outs = _outputs(op(**inputs, **call.options), "op")
            shapes, wanted = ([tuple(t.shape) for t in ts] for ts in (outs, expected_outs))
            assert shapes == wanted, f"op returned shapes {shapes}, expected {wanted}"
            guards = {f"grad_{name}": call.cotangent(out) for name, out in zip(_names(outs), outs, strict=True)}
            with backward:
                grads = _gradients(outs, inputs, [g.tensor for g in guards.values()])
        for name, guard in {**{n: g for n, g in made.items() if isinstance(g, Guarded)}, **guards}.items():
            guard.check(name)
        if opcheck:
            _opcheck(forward, known, differentiable=True)
            _opcheck(backward, known, differentiable=False)
        return outs, grads, guards

    outs, grads, guards = run()
    cotangents = [g.tensor.double() for g in guards.values()]
    expected_grads = _gradients(expected_outs, exact, cotangents)
    for name, grad in grads.items():
        want = plain[name.removeprefix("grad_")].dtype
        assert grad is None or grad.dtype == want, f"{name} is {grad.dtype}, expected its input's dtype, {want}"

    floating = [t.dtype for t in (*outs, *plain.values()) if t.is_floating_point()]
    if tolerance is None:  # features of 16 bits leave wider inputs a gradient as exact as they are themselves
        tolerance = max(TOLERANCE[dtype] for dtype in floating)
    floors = dict(call.floors(plain, guards[f"grad_{_names(outs)[0]}"].tensor)) if call.floors else {}
    actual: dict[str, Tensor | None] = {**dict(zip(_names(outs), outs, strict=True)), **grads}
    expected: dict[str, Tensor | None] = {**dict(zip(_names(outs), expected_outs, strict=True)), **expected_grads}
    assert_all_close(actual, expected, tolerance=tolerance, element=element, floors=floors)
    if repeat:
        again, grads_again, _ = run()
        for name, t in {**dict(zip(_names(outs), again, strict=True)), **grads_again}.items():
            if t is not None:
                assert_identical(t, actual[name], f"{name} of a second run")  # type: ignore[arg-type]


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    strategy: Any,
    *,
    examples: int = 100,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
    element: float | None = None,
    repeat: bool = True,
    opcheck: bool = True,
) -> None:
    """Check `op` against `reference` on `examples` calls drawn from `strategy`; fails with the smallest call found.

    Args:
        op, reference: called alike, by the names of the call; each returns a tensor or a tuple of them. The reference
            computes in float64, in whatever way is plainest, and must be differentiable.
        strategy: of `Call`, from `strategies.calls` or `strategies.region_calls`.
        examples: how many calls; the same ones in every run.
        device: where; by default CUDA where there is a GPU, unless kernels are interpreted.
        tolerance, element: see `mismatch`; by default those of the least precise dtype of the call.
        repeat: whether a second run must give the same bits, gradients included.
        opcheck: whether each custom op that runs inside, forward or backward, goes through torch.library.opcheck.

    A gradient that the reference has and the op lacks fails, and so does NaN, a write outside of what the op
    allocates, and a read outside of its inputs that reaches a result.

    Raises:
        AssertionError: the op is wrong. TypeError, ValueError: an argument is.
        ImportError: Hypothesis is not installed.
    """
    try:
        import hypothesis
    except ImportError as error:
        raise ImportError("check_op needs the package hypothesis: pip install 'dyreg-triton[test]'") from error
    for name, function in (("op", op), ("reference", reference)):
        if not callable(function):
            raise TypeError(f"check_op: {name} is {function!r}; accepted is a callable")
    if not isinstance(strategy, hypothesis.strategies.SearchStrategy):
        raise TypeError(f"check_op: strategy is {strategy!r}; accepted is a Hypothesis strategy of Call")
    if not is_integer(examples) or examples < 1:
        raise ValueError(f"check_op: examples is {examples!r}; accepted is an integer > 0")
    flag("check_op", "repeat", repeat)
    flag("check_op", "opcheck", opcheck)
    if device is not None:
        as_device("check_op", device)
    for name, bound in (("tolerance", tolerance), ("element", element)):
        if bound is not None:
            _bound("check_op", name, bound)
    examples = int(examples)
    known: set = set()

    @settings(examples)
    @hypothesis.given(call=strategy)
    def every_call(call: Call) -> None:
        check_call(
            op, reference, call, device=device, tolerance=tolerance, element=element, repeat=repeat,
            opcheck=opcheck, _known=known,
        )  # fmt: skip

    every_call()


def settings(examples: int) -> Any:
    """Hypothesis settings for tensor ops: the same examples in every run, no deadline, no slow explaining phase."""
    import hypothesis

    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        database=None,
        phases=[p for p in hypothesis.Phase if p is not hypothesis.Phase.explain],
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
