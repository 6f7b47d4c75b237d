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

from .._core.validation import as_device, flag, is_integer
from .calls import Call, default_device
from .comparators import TOLERANCE, _bound, assert_all_close, assert_identical, require
from .memory import Guarded, poisoned_outputs

_TORCHS_OWN = (
    "aten", "prim", "prims", "profiler", "inductor", "_c10d_functional", "c10d", "triton", "rngprims", "higher_order",
    "mkldnn", "onednn", "mkl", "quantized", "_quantized", "quantized_decomposed", "prepacked", "xnnpack", "torchvision",
)  # fmt: skip


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of a custom op inside, but for calls on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in _TORCHS_OWN and all(t.numel() for t in _tensors(args, kwargs)):
            self.calls.append((func, tuple(map(_alone, args)), {k: _alone(v) for k, v in kwargs.items()}))
        return func(*args, **kwargs)


def _tensors(args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]


def _alone(value: Any) -> Any:
    """A tensor without its history, in the same layout unless it shares memory with itself."""
    if not isinstance(value, Tensor):
        return value
    if 0 in value.stride():
        return value.detach().clone()
    alone = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return alone.copy_(value.detach())


def _has_formula(custom: Any) -> bool:
    """Whether autograd knows this op; one that runs inside of an autograd.Function need not."""
    definition = torch._library.custom_ops.OPDEFS.get(custom._schema.name)
    if definition is not None:
        return definition._backward_fn is not None
    keys = ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(custom.name(), key) for key in keys)


class _Opcheck:
    """torch.library.opcheck for the custom ops that an op runs, each on a few calls that differ in kind.

    It needs a dispatch mode, under which torch.compile does not compile, hence a run of its own.
    """

    CALLS = 8  # of each custom op: it takes a good part of a second
    RUNS = 40  # after so many that passed, whatever they held, no more are made

    def __init__(self) -> None:
        self.passed: dict[Any, set] = {}
        self.runs = 0
        self.failed = False  # then every call is looked at, so that the smallest failing one is found

    def __call__(self, op: Callable[..., Any], call: Call, inputs: Mapping[str, Tensor]) -> None:
        if self.runs >= self.RUNS and not self.failed:
            return
        forward, backward = _Recorder(), _Recorder()
        with forward:
            outs = _outputs(getattr(op, "_torchdynamo_orig_callable", op)(**inputs, **call.options), "op")
        with backward:
            _gradients(outs, inputs, [call.cotangent(out).tensor for out in outs if out.is_floating_point()])
        for recorder in (forward, backward):
            for custom, args, kwargs in recorder.calls:
                self._check(custom, args, kwargs, differentiable=recorder is forward)
        self.runs += 1

    def _check(self, custom: Any, args: tuple, kwargs: dict, *, differentiable: bool) -> None:
        tensors = _tensors(args, kwargs)
        kind = tuple((t.dtype, t.is_contiguous(), min(t.shape, default=1), len(set(t.shape))) for t in tensors)
        passed = self.passed.setdefault(custom, set())
        if kind in passed or (len(passed) >= self.CALLS and not self.failed):
            return
        for t in tensors:
            t.requires_grad_(differentiable and t.is_floating_point() and _has_formula(custom))
        try:
            torch.library.opcheck(custom, args, kwargs)
        except Exception as error:
            self.failed = True
            raise AssertionError(f"opcheck of {custom}: {error}") from error
        passed.add(kind)


def _outputs(result: Any, who: str) -> list[Tensor]:
    outs = list(result) if isinstance(result, (tuple, list)) else [result]
    if not outs or not all(isinstance(t, Tensor) for t in outs):
        raise TypeError(f"check_call: {who} returned {type(result).__name__}; accepted is a tensor or several")
    return outs


def _names(outs: list[Tensor]) -> list[str]:
    return ["out"] if len(outs) == 1 else [f"out[{i}]" for i in range(len(outs))]


def _leaves(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same values, of which the floating ones want gradients; with `dtype` they are copies of that dtype."""
    return {
        name: (t.detach() if dtype is None else t.detach().to(dtype, copy=True)).requires_grad_()
        if t.is_floating_point()
        else t
        for name, t in tensors.items()
    }


def _gradients(outs: list[Tensor], inputs: Mapping[str, Tensor], cotangents: list[Tensor]) -> dict[str, Tensor | None]:
    """By "grad_<input>"; None where no floating output depends on an input that wants one."""
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    floating = [out for out in outs if out.is_floating_point()]
    pairs = [(out, g) for out, g in zip(floating, cotangents, strict=True) if out.requires_grad]
    if not wanted or not pairs:
        return dict.fromkeys((f"grad_{name}" for name in wanted), None)
    found = torch.autograd.grad(
        [out for out, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
    )
    return {f"grad_{name}": grad for name, grad in zip(wanted, found, strict=True)}


def _options(
    who: str,
    op: Any,
    reference: Any,
    device: Any,
    tolerance: Any,
    element: Any,
    **flags: Any,
) -> torch.device:
    """Check what `check_call` and `check_op` share; the device."""
    for name, function in (("op", op), ("reference", reference)):
        if not callable(function):
            raise TypeError(f"{who}: {name} is {function!r}; accepted is a callable")
    for name, value in flags.items():
        flag(who, name, value)
    for name, bound in (("tolerance", tolerance), ("element", element)):
        if bound is not None:
            _bound(who, name, bound)
    device = default_device() if device is None else as_device(who, device)
    if device.type == "meta":
        raise ValueError(f"{who}: device is meta; accepted is a torch.device that holds data")
    return device


def check_call(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    call: Call,
    *,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
    element: float | None = None,
    same_dtype: bool = True,
    repeat: bool = True,
    opcheck: bool = True,
    _opchecks: _Opcheck | None = None,
) -> None:
    """`check_op` for one call; its options."""
    device = _options(
        "check_call", op, reference, device, tolerance, element, same_dtype=same_dtype, repeat=repeat, opcheck=opcheck
    )
    if not isinstance(call, Call):
        raise TypeError(f"check_call: call is {call!r}; accepted is a dyreg_triton.testing.Call")
    with torch.enable_grad():
        _check_call(op, reference, call, device, tolerance, element, same_dtype, repeat)
        if opcheck:
            inputs = {n: t.tensor if isinstance(t, Guarded) else t for n, t in call.inputs(device).items()}
            (_Opcheck() if _opchecks is None else _opchecks)(op, call, _leaves(inputs))


def _check_call(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    call: Call,
    device: torch.device,
    tolerance: float | None,
    element: float | None,
    same_dtype: bool,
    repeat: bool,
) -> None:
    made = call.inputs(device)
    plain = {name: t.tensor if isinstance(t, Guarded) else t for name, t in made.items()}
    whole = {name: t.clone() for name, t in made.items() if isinstance(t, Tensor)}
    exact = _leaves(plain, torch.float64)
    expected_outs = _outputs(reference(**exact, **call.options), "reference")
    names = _names(expected_outs)

    def run() -> tuple[list[Tensor], dict[str, Tensor | None], list[Guarded]]:
        inputs = _leaves(plain)
        with poisoned_outputs():
            outs = _outputs(op(**inputs, **call.options), "op")
            shapes, wanted = ([tuple(t.shape) for t in ts] for ts in (outs, expected_outs))
            require(shapes == wanted, f"op returned shapes {shapes}, expected {wanted}")
            guards = [call.cotangent(out) for out in outs if out.is_floating_point()]
            grads = _gradients(outs, inputs, [g.tensor for g in guards])
        for name, t in made.items():
            if isinstance(t, Guarded):
                t.check(name)
            else:
                assert_identical(t, whole[name], f"memory of {name}")
        for guard in guards:
            guard.check("the incoming gradient")
        return outs, grads, guards

    outs, grads, guards = run()
    floating = [t.dtype for t in plain.values() if t.is_floating_point()]
    for name, out, want in zip(names, outs, expected_outs, strict=True):
        kinds = out.is_floating_point(), want.is_floating_point()
        require(kinds[0] == kinds[1], f"{name} is {out.dtype}, expected {want.dtype}")
        if same_dtype and out.is_floating_point() and floating:
            first = floating[0]
            require(out.dtype == first, f"{name} is {out.dtype}, expected the first input's dtype, {first}")
    expected_grads = _gradients(expected_outs, exact, [g.tensor.double() for g in guards])
    for name, grad in grads.items():
        own = plain[name.removeprefix("grad_")].dtype
        if grad is not None:
            require(grad.dtype == own, f"{name} is {grad.dtype}, expected its input's dtype, {own}")

    if tolerance is None and floating:  # features of 16 bits leave wider inputs a gradient as exact as they are
        tolerance = max(TOLERANCE[dtype] for dtype in floating)
    floors = dict(call.floors(plain, guards[0].tensor)) if call.floors and guards else {}
    actual: dict[str, Tensor | None] = {**dict(zip(names, outs, strict=True)), **grads}
    expected: dict[str, Tensor | None] = {**dict(zip(names, expected_outs, strict=True)), **expected_grads}
    unknown = sorted(set(floors) - set(expected))
    if unknown:
        raise ValueError(f"check_call: floors names {unknown}; accepted are the results, {sorted(expected)}")
    for name, out, want in zip(names, outs, expected_outs, strict=True):
        if not out.is_floating_point():
            require(out.to(want.dtype).equal(want), f"{name} differs, of {out.dtype} values")
            del actual[name], expected[name]
    assert_all_close(actual, expected, tolerance=tolerance, element=element, floors=floors)
    if repeat:
        again, grads_again, _ = run()
        for name, t in {**dict(zip(names, again, strict=True)), **grads_again}.items():
            former = {**dict(zip(names, outs, strict=True)), **grads}[name]
            if t is not None and former is not None:
                assert_identical(t, former, f"{name} of a second run")


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    strategy: Any,
    *,
    examples: int = 100,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
    element: float | None = None,
    same_dtype: bool = True,
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
        tolerance, element: see `mismatch`; by default those of the least precise dtype among the inputs.
        same_dtype: whether floating outputs must have the dtype of the first floating input.
        repeat: whether a second run must give the same bits, gradients included.
        opcheck: whether each custom op that runs inside, forward or backward, goes through torch.library.opcheck, on
            up to 8 calls of different dtypes, layouts and shapes.

    A gradient that the reference has and the op lacks fails, and so does NaN, a write to the inputs or outside of what
    the op allocates through torch, and a read outside of the inputs that reaches a result. Outputs that are not
    floating must equal the reference's.

    Raises:
        AssertionError: the op is wrong. TypeError, ValueError: an argument is.
        ImportError: Hypothesis is not installed.
    """
    try:
        import hypothesis
    except ImportError as error:
        raise ImportError("check_op needs the package hypothesis: pip install 'dyreg-triton[test]'") from error
    device = _options(
        "check_op", op, reference, device, tolerance, element, same_dtype=same_dtype, repeat=repeat, opcheck=opcheck
    )
    if not isinstance(strategy, hypothesis.strategies.SearchStrategy):
        raise TypeError(f"check_op: strategy is {strategy!r}; accepted is a Hypothesis strategy of Call")
    if not is_integer(examples) or examples < 1:
        raise ValueError(f"check_op: examples is {examples!r}; accepted is an integer > 0")
    opchecks = _Opcheck()

    @settings(int(examples))
    @hypothesis.given(call=strategy)
    def every_call(call: Call) -> None:
        check_call(
            op, reference, call, device=device, tolerance=tolerance, element=element, same_dtype=same_dtype,
            repeat=repeat, opcheck=opcheck, _opchecks=opchecks,
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
