"""The original and ours on an example: do they give the same numbers, and how fast is each?"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .._core.validation import is_integer, what
from .probe import cudnn_rnn_backward, error, forked_rng, gradients, normal, twin


class Bounds(NamedTuple):
    """Accepted errors, relative (L2), and how a gradient that is small beside the others is measured."""

    outputs: float
    gradients: float
    floor: float  # share of the norm of all gradients; that of a parameter below it is the others' round-off
    wider: torch.dtype | None
    most: float  # of an original's own error that passes for round-off


_SIXTEEN_BITS = Bounds(3e-2, 1e-1, 1e-1, torch.float32, 0.5)
TOLERATED = {
    torch.float64: Bounds(1e-9, 1e-7, 1e-3, None, 0.0),
    torch.float32: Bounds(1e-4, 1e-3, 1e-3, torch.float64, 0.1),
    torch.bfloat16: _SIXTEEN_BITS,
    torch.float16: _SIXTEEN_BITS,
}
# Deep networks amplify round-off (a ReLU flips): the authors' own in float32 are percents from their gradients in
# float64. So what is beyond the tolerance is compared with the original in a wider dtype, where ours may be this much
# further off than the original.
_FURTHER = 2.0
_ROUNDS, _PATIENCE = 5, 2.0  # timed runs at most, and seconds after which no further one is begun


@dataclass
class Example:
    """The inputs of a model."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    def fresh(self) -> Example:
        """Copies that can be differentiated by, where they are floating."""

        def copied(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            t = t.detach().clone()
            return t.requires_grad_() if t.is_floating_point() else t

        return Example(*tree_map(copied, (self.arguments, self.keywords)))

    def tensors(self) -> list[Tensor]:
        """Those that have a gradient."""
        leaves = tree_flatten((self.arguments, self.keywords))[0]
        return [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]

    def __str__(self) -> str:
        leaves = [(key, value) for key, value in self.keywords.items()] + [("", value) for value in self.arguments]
        return ", ".join(f"{key}={what(v)}".lstrip("=") if isinstance(v, Tensor) else repr(v) for key, v in leaves)


def prepare_example(example: Any, model: nn.Module) -> Example:
    """The inputs that an `example` of `swap` stands for; on the model's device and in its dtype where it is a shape."""
    if isinstance(example, Tensor):
        return Example((example,))
    if isinstance(example, (tuple, list)) and example:
        if all(is_integer(n) for n in example):
            if min(example) < 1:
                raise ValueError(f"swap: example is {example!r}; accepted as a shape are integers > 0")
            first = next(
                (p for p in model.parameters() if p.is_floating_point()),
                torch.zeros((), dtype=torch.float32, device="cpu"),
            )
            return Example((normal(tuple(map(int, example)), first.dtype, first.device, seed=0),))
        if any(isinstance(t, Tensor) for t in example):
            return Example(tuple(example))
    if isinstance(example, Mapping) and example and all(isinstance(key, str) for key in example):
        return Example((), dict(example))
    raise TypeError(
        f"swap: example is {what(example)[:200]}; accepted are a tensor, a shape (integers), a tuple or list of the "
        "model's inputs, or a dict of them by name"
    )


@dataclass
class Run:
    """What came out of a forward and a backward."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    differentiable: list[bool]
    seconds: float


class Differs(Exception):
    """Ours and the original differ on the example; says how."""


@dataclass
class Measured:
    """How far ours is from the original (largest relative error), and milliseconds of a forward and a backward."""

    error: float
    before_ms: float
    after_ms: float
    wrong: str | None  # what is beyond the tolerance, in words
    round_off: tuple[float, float] | None  # how far the original and ours are from the original in a wider dtype
    note: str | None  # what else there is to know


def catch_inputs(modules: list[nn.Module], model: nn.Module, example: Example) -> dict[int, Example]:
    """What each module is first called with while the model runs on an example, by id.

    Raises ValueError where the model fails, or gives nothing that could be compared.
    """
    caught: dict[int, Example] = {}

    def catch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if which[id(module._forward_pre_hooks)] not in caught:
            caught[which[id(module._forward_pre_hooks)]] = Example(arguments, keywords).fresh()

    # a model that is swapped itself is another object than its original, with the same hooks
    which = {id(module._forward_pre_hooks): id(module) for module in modules}
    handles = [module.register_forward_pre_hook(catch, with_kwargs=True) for module in modules]
    takes = f"swap: example is {example}; accepted is what {type(model).__name__} takes, and"
    try:
        outputs = run(model, example).outputs
    except Exception as failure:
        raise ValueError(f"{takes} it fails: {said(failure)}") from failure
    finally:
        for handle in handles:
            handle.remove()
    if not any(t.isfinite().any() for t in outputs):
        raise ValueError(f"{takes} it gives {'no finite number' if outputs else 'no tensor'} that could be compared")
    return caught


def measure(before: Callable[[], nn.Module], after: Callable[[], nn.Module], example: Example) -> Measured:
    """Compare and time two modules, each made ready by a call, on an example.

    Raises `Differs` where the second fails and the first does not.
    """
    with _exact_float32():
        old = run(before(), example)
        try:
            new = run(after(), example)
        except Exception as failure:
            raise Differs(f"it fails where the original does not: {said(failure)}") from failure
        kinds, wanted = ([(t.shape, t.dtype) for t in one.outputs] for one in (new, old))
        if kinds != wanted:
            raise Differs(f"it returns {_listed(new)}, the original {_listed(old)}")
        note = None
        if old.differentiable != new.differentiable:  # ours leaves detached what plotting code reads
            both = [a and b for a, b in zip(old.differentiable, new.differentiable, strict=True)]
            detached = [str(i) for i, can in enumerate(old.differentiable) if can and not both[i]]
            some = ", ".join(detached if len(detached) < 6 else [*detached[:5], "..."])
            note = f"{len(detached)} of {len(both)} outputs ({some}) have no gradient any more: they are detached"
            old, new = run(before(), example, both), run(after(), example, both)
        bounds = _bounds(after(), example, old)
        errors = _errors(new, old, bounds.floor)
        wrong, round_off = _beyond(errors, bounds), None
        if wrong is not None and bounds.wider is not None:
            wrong, round_off = _is_round_off(before(), example, old, new, bounds, bounds.wider, wrong)
    return Measured(max(errors.values()), _timed(before, example), _timed(after, example), wrong, round_off, note)


def _is_round_off(
    module: nn.Module, example: Example, old: Run, new: Run, bounds: Bounds, wider: torch.dtype, wrong: str
) -> tuple[str | None, tuple[float, float] | None]:
    """Whether the original itself is as far from its result in a wider dtype: what is wrong, or None, and how far."""
    again = _errors(run(module, example, new.differentiable), old, bounds.floor)
    if max(again.values()) > bounds.most:
        return f"two runs of the original itself differ by {max(again.values()):.1e}, so nothing can be told", None
    try:
        exact = _widened(module, example, new.differentiable, wider)
        theirs, ours = _errors(old, exact, bounds.floor), _errors(new, exact, bounds.floor)
    except Exception as failure:
        return f"{wrong}; the original in {wider}, which would tell round-off, fails: {said(failure)}", None
    return _beyond(ours, bounds, theirs), (max(theirs.values()), max(ours.values()))


def _listed(one: Run) -> str:
    return ", ".join(what(t) for t in one.outputs) or "no tensor"


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, one.name) for one in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for item in value for t in tensors_in(item)]


def said(failure: BaseException) -> str:
    """An exception in a line."""
    return f"{type(failure).__name__}: {failure}".strip()[:500]


def run(module: nn.Module, example: Example, differentiable: list[bool] | None = None) -> Run:
    """A forward, and a backward of a randomly weighted sum of those outputs that can be differentiated (or of fewer).

    Generators, buffers and gradients are left as they were.
    """
    inputs = example.fresh()
    weights: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    weights |= {f"input {i}": t for i, t in enumerate(inputs.tensors())}
    device = next((t.device for t in weights.values()), torch.device("cpu"))
    torch.clear_autocast_cache()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        forked_rng(device),
        _kept_buffers(module),
        cudnn_rnn_backward(module),
    ):
        # copies: what a model writes into may not be what is differentiated by
        arguments, keywords = tree_map(_copied, (inputs.arguments, inputs.keywords))
        start = _now()
        y = module(*arguments, **keywords)
        forward = _now() - start
        outputs = tensors_in(y)
        can = [t.requires_grad for t in outputs]
        chosen = [t for t, yes in zip(outputs, differentiable or can, strict=True) if yes]
        random = [normal(t.shape, t.dtype, t.device, seed=i) for i, t in enumerate(chosen)]
        start = _now()
        slopes = gradients(chosen, random, list(weights.values()))
        backward = _now() - start
    return Run([t.detach() for t in outputs], dict(zip(weights, slopes, strict=True)), can, forward + backward)


def _widened(module: nn.Module, example: Example, differentiable: list[bool], dtype: torch.dtype) -> Run:
    """A private copy in a wider dtype, without autocast."""

    def wide(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        value = t.detach().to(dtype)
        return nn.Parameter(value, t.requires_grad) if isinstance(t, nn.Parameter) else value

    inputs = Example(*tree_map(wide, (example.arguments, example.keywords)))
    with contextlib.ExitStack() as off:
        for kind in {p.device.type for p in module.parameters()}:
            off.enter_context(torch.autocast(kind, enabled=False))
        return run(twin(module, wide, None, {}), inputs, differentiable)


def _copied(t: Any) -> Any:
    return t.clone() if isinstance(t, Tensor) else t


def _errors(actual: Run, expected: Run, floor: float) -> dict[str, float]:
    """The relative error of each output, and of each gradient."""
    floor *= math.sqrt(sum(t.double().norm().item() ** 2 for t in expected.gradients.values()))
    outputs = zip(actual.outputs, expected.outputs, strict=True)
    slopes = expected.gradients.items()
    return {f"output {i}": error(y, expected) for i, (y, expected) in enumerate(outputs)} | {
        f"the gradient of {name}": error(actual.gradients[name], expected, floor) for name, expected in slopes
    }


def _beyond(errors: dict[str, float], bounds: Bounds, theirs: dict[str, float] | None = None) -> str | None:
    """What is beyond the bounds, in words, or None; `theirs` are the errors that the original has itself."""
    allowed: dict[str, float] = {}
    for kind, bound in (("output", bounds.outputs), ("the gradient", bounds.gradients)):
        own = max((e for name, e in (theirs or {}).items() if name.startswith(kind)), default=0.0)
        allowed |= {name: bound + _FURTHER * min(own, bounds.most) for name in errors if name.startswith(kind)}
    name = max(errors, key=lambda name: errors[name] / allowed[name])
    if errors[name] <= allowed[name]:
        return None
    return f"{name} differs by {errors[name]:.1e} (relative), accepted is {allowed[name]:.1e}"


def _bounds(module: nn.Module, example: Example, old: Run) -> Bounds:
    """Those of the coarsest dtype at work."""
    tensors = [*module.parameters(), *example.fresh().tensors(), *old.outputs]
    dtypes = {t.dtype for t in tensors}
    dtypes |= {torch.get_autocast_dtype(d) for d in {t.device.type for t in tensors} if torch.is_autocast_enabled(d)}
    return max(
        (TOLERATED[t] for t in dtypes if t in TOLERATED), key=lambda b: b.outputs, default=TOLERATED[torch.float64]
    )


def _timed(ready: Callable[[], nn.Module], example: Example) -> float:
    """Milliseconds of a forward and a backward: the median of a few."""
    module = ready()
    times: list[float] = []
    while len(times) < _ROUNDS and sum(times) < _PATIENCE:
        times.append(run(module, example).seconds)
    return statistics.median(times) * 1e3


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Running statistics and counters are afterwards what they were."""
    kept = [(m._buffers, dict(m._buffers)) for m in module.modules()]
    values = {id(b): b.detach().clone() for _, buffers in kept for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        with torch.no_grad():
            for held, buffers in kept:
                held.clear()
                held.update(buffers)
                for b in buffers.values():
                    if b is not None and not torch.equal(b, values[id(b)]):
                        b.copy_(values[id(b)])


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """TF32 off, so that round-off does not hide a difference, nor look like one."""
    if not torch.cuda.is_available():
        yield
        return
    kept = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept[0]
        torch.set_float32_matmul_precision(kept[1])


def twins(theirs: nn.Module, ours: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both without their hooks, for a comparison that nobody sees."""
    before, after = (twin(module, lambda t: t, None, {}) for module in (theirs, ours))
    return before, after
