"""Does ours compute what a published module computes? Asked of private copies, on random input and parameters."""

from __future__ import annotations

import contextlib
import math
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._core.dispatch import backend
from .._core.numerics import relative_error
from .._core.validation import what
from ..compat.families import Family
from .adopt import Pairs

# relative, L2: of outputs, of gradients; two ways to sum the same in float64 differ by 1e-13
BOUNDS = {torch.float64: (1e-8, 1e-8), torch.float32: (1e-5, 1e-3)}
# in training or not, and the input's size: small ones show what is added to a norm, large ones what is cut off
RUNS = ((False, 1.0), (True, 1e-3), (False, 30.0))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
error = partial(relative_error, equal_nan=True)  # what is infinite in the original is so in ours


class Unlike(Exception):
    """Ours does not do what the published module does; says why."""


def twin(
    module: nn.Module, value: Callable[[Tensor], Tensor], training: bool | None, made: dict[int, nn.Module]
) -> Any:
    """A copy of a module's tree without its hooks, with other tensors and its own state; `made` has its submodules."""
    if id(module) in made:
        return made[id(module)]
    made[id(module)] = other = object.__new__(type(module))
    state: dict[str, Any] = {k: copy(v) if isinstance(v, (dict, list, set)) else v for k, v in module.__dict__.items()}
    state |= {k: OrderedDict() for k in state if k.endswith("_hooks")}
    for tensors in ("_parameters", "_buffers"):
        state[tensors] = {k: None if t is None else value(t) for k, t in state[tensors].items()}
    state["_modules"] = {
        k: None if child is None else twin(child, value, training, made) for k, child in module._modules.items()
    }
    if training is not None:
        state["training"] = training
    if isinstance(module, nn.RNNBase):  # which holds its weights once more, for cuDNN
        state["_flat_weights"] = [state["_parameters"].get(name) for name in module._flat_weights_names]
        state["_flat_weight_refs"] = [w if w is None else weakref.ref(w) for w in state["_flat_weights"]]
    other.__dict__ = state
    return other


class _Draws(TorchDispatchMode):
    """Which operations draw from torch's generators in this thread; states would show what other threads draw, too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _dropout(func, args, kwargs) != 0:
            self.names.append(str(func))
        return func(*args, **kwargs)


def _dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The dropout_p of fused attention, which draws nothing where it is 0; None of anything else."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value)
    return None


@contextlib.contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """What draws random numbers draws the same each time, and leaves the generators as they were."""
    cuda = device.type == "cuda"
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every device
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


@contextlib.contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Arithmetic as written, whatever the caller is in."""
    autocast = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast, forked_rng(device):
        yield


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Random numbers that are the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)


def gradients(outputs: list[Tensor], weights: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of the weighted sum of those outputs that have a gradient; zero where nothing depends on an input."""
    pairs = [(y, g) for y, g in zip(outputs, weights, strict=True) if y.requires_grad]
    if not pairs or not inputs:
        return [torch.zeros_like(t) for t in inputs]
    ys, gs = zip(*pairs, strict=True)
    found = torch.autograd.grad(ys, inputs, gs, allow_unused=True)
    return [torch.zeros_like(t) if d is None else d for t, d in zip(inputs, found, strict=True)]


class _Calls:
    """What some submodules are called with and return, in order."""

    def __init__(self, modules: list[nn.Module]):
        self.seen: list[list[Any]] = [[] for _ in modules]
        for module, seen in zip(modules, self.seen, strict=True):
            module.register_forward_hook(
                lambda _, args, kwargs, y, seen=seen: seen.append(
                    [t.detach() for t in tree_leaves((args, kwargs, y)) if isinstance(t, Tensor)]
                ),
                with_kwargs=True,
            )


def probe(family: Family, ours: nn.Module, theirs: nn.Module, pairs: Pairs) -> None:
    """Raise `Unlike` unless both give the same outputs and gradients, in evaluation and in training.

    The parameters are random, so that a scale that starts at 0 hides nothing. In float64, so that round-off hides
    nothing either; only what does not run in it (a device, a forward that casts) is compared in float32.
    """
    shape = cast(Any, family.shape)(ours)
    try:
        try:
            _compare(ours, theirs, shape, pairs, torch.float64)
            _same_dtypes(ours, theirs, shape)
        except _Fails:
            _compare(ours, theirs, shape, pairs, torch.float32)
    except _Fails as failure:
        raise Unlike(str(failure)) from failure.__cause__
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as failure:  # tensors of a kind of their own
        raise Unlike(f"it cannot be copied for a comparison: {type(failure).__name__}: {failure}") from failure


class _Fails(Exception):
    """The published module does not run in this dtype."""


def _first(module: nn.Module) -> Tensor:
    found = next(module.parameters(), None)
    if found is None:
        raise Unlike("it has no parameters")
    return found


def _compare(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], pairs: Pairs, dtype: torch.dtype) -> None:
    device = _first(theirs).device
    drawn: dict[int, Tensor] = {}

    def made_up(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.detach().clone()
        if id(t) not in drawn:
            value = t.detach().to("cpu", torch.float64)
            if isinstance(t, nn.Parameter):
                fan = value[0].numel() if value.dim() > 1 and len(value) else 4
                noise = normal(value.shape, torch.float64, value.device, seed=len(drawn)) * fan**-0.5
                value = value.where(value.isfinite() & (value.abs() < 1e3), 0) + noise
            drawn[id(t)] = value.to(device, dtype)
        value = drawn[id(t)].clone()
        return nn.Parameter(value) if isinstance(t, nn.Parameter) else value

    hooked = [
        (path, module)
        for path, module in theirs.named_modules()
        if module is not theirs and any(getattr(module, hooks) for hooks in HOOKS)
    ]
    for seed, (training, size) in enumerate(RUNS):
        x = normal(shape, dtype, device, seed) * size
        results = []
        for root in (theirs, ours):
            made: dict[int, nn.Module] = {}
            module = twin(root, made_up, training, made)
            counterparts = [
                made.get(id(pairs[id(m)].ours if root is ours and id(m) in pairs else m)) for _, m in hooked
            ]
            calls = _Calls([nn.Identity() if m is None else m for m in counterparts])
            results.append(_run(module, x, root is theirs))
            results[-1]["calls"] = calls.seen
        before, after = results
        _agree(before, after, *BOUNDS[dtype])
        for (path, _), expected, actual in zip(hooked, before["calls"], after["calls"], strict=True):
            _same_calls(path, expected, actual, BOUNDS[dtype][0])


def _same_dtypes(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise `Unlike` where the published module returns float64 of float32."""
    first = _first(theirs)
    if first.dtype == torch.float64:
        return

    def single(t: Tensor) -> Tensor:
        value = t.detach().float() if t.is_floating_point() else t.detach().clone()
        return nn.Parameter(value, value.is_floating_point()) if isinstance(t, nn.Parameter) else value

    x = normal(shape, torch.float32, first.device, seed=0)
    expected, given = (_run(twin(root, single, False, {}), x, False)["y"].dtype for root in (theirs, ours))
    if expected != given:
        raise Unlike(f"its forward gives {expected} of float32, ours {given}")


def _run(module: nn.Module, x: Tensor, published: bool) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    parameters = dict(module.named_parameters())
    try:
        with _plain(x.device), cudnn_rnn_backward(module), backend("eager"):
            states = random.getstate(), repr(np.random.get_state())
            with _Draws() as draws:
                y = module(x.clone())  # a module may write into its input
            elsewhere = (random.getstate(), repr(np.random.get_state())) != states
            if not isinstance(y, Tensor):
                raise Unlike(f"its forward returns a {type(y).__name__}; accepted is a tensor")
            if published and y.dtype != x.dtype:  # a cast: float64 shows less than it seems
                raise TypeError(f"its output is in {y.dtype}")
            slopes = gradients([y], [normal(y.shape, y.dtype, y.device, seed=1)], [x, *parameters.values()])
    except Unlike:
        raise
    except Exception as failure:
        said = f"{type(failure).__name__}: {failure}".strip()[:300]
        if published:
            raise _Fails(f"its own forward fails on a random input {tuple(x.shape)}: {said}") from failure
        raise Unlike(f"its forward takes a random input {tuple(x.shape)} and ours does not: {said}") from failure
    return {
        "y": y,
        "gradients": dict(zip(["the input", *parameters], slopes, strict=True)),
        "drawn": (draws.names, elsewhere),
    }


def _agree(before: dict[str, Any], after: dict[str, Any], bound: float, slope_bound: float) -> None:
    if before["drawn"] != after["drawn"]:
        raise Unlike("its forward draws random numbers that ours does not")
    y, expected = after["y"], before["y"]
    wrong = error(y, expected)
    if not wrong <= bound:
        raise Unlike(
            f"its forward computes something else: on a random input the outputs, {what(expected)} and {what(y)}, "
            f"differ by {wrong:.1e} (relative), accepted is {bound:.0e}"
        )
    slopes = before["gradients"]
    floor = 1e-3 * math.sqrt(sum(t.double().norm().item() ** 2 for t in slopes.values()))
    for name, expected in slopes.items():
        wrong = error(after["gradients"][name], expected, floor)
        if not wrong <= slope_bound:
            raise Unlike(
                f"its forward gives {name} another gradient: on a random input they differ by {wrong:.1e} (relative), "
                f"accepted is {slope_bound:.0e}"
            )


def _same_calls(path: str, expected: list[Any], actual: list[Any], bound: float) -> None:
    if expected and not actual:
        raise Unlike(f"its submodule {path} has hooks, and ours reads the parameters there without calling it")
    alike = len(expected) == len(actual) and all(
        len(a) == len(b) and all(error(s, t) <= bound for s, t in zip(a, b, strict=True))
        for a, b in zip(actual, expected, strict=True)
    )
    if not alike:
        raise Unlike(
            f"its submodule {path} has hooks, and ours calls it otherwise (other shapes, or another number of times)"
        )


@contextlib.contextmanager
def cudnn_rnn_backward(module: nn.Module) -> Iterator[None]:
    """cuDNN differentiates a recurrence only in training mode, which without dropout computes the same."""
    rnns = [m for m in module.modules() if isinstance(m, nn.RNNBase) and not m.training and not m.dropout]
    for rnn in rnns:
        rnn.training = True
    try:
        yield
    finally:
        for rnn in rnns:
            rnn.training = False
