"""Replace the published modules inside a live model by ours: `dt.swap`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._core.validation import flag
from ..compat.families import families
from .adopt import Place
from .compare import Differs, Example, catch_inputs, measure, prepare_example, said, twins
from .find import Found, Search, class_of, search, selected
from .report import Left, SwapError, Swapped, SwapReport, different, nothing

__all__ = ["Left", "SwapError", "SwapReport", "Swapped", "swap"]

# comparing uses the global generator and the global float32 settings
_ONE_AT_A_TIME = threading.RLock()


def swap(
    model: nn.Module,
    *,
    only: str | list[str] | tuple[str, ...] | None = None,
    example: Any = None,
    keep_regions: bool = False,
) -> SwapReport:
    """Replace every published module in `model` by this library's, in place.

    Published modules (RSA, DynamicGraphWrapper, DynamicGraph, RSTG, BATBlock, BATransform, NONLocalBlock1D to 3D and
    NonLocal of the authors' code, under these or other names)
    are known by their class name or parts; their settings are read from their attributes, and ours is built from them.
    It takes over the very same parameters, buffers, submodules, hooks, parametrizations, mode and plain attributes, so
    an optimizer, a DDP wrapper or a handle that was made before still works, and state_dict keys stay. Before anything
    is replaced, copies of both are run on random input with random parameters, in float64: a module that computes
    something else (another eps, one more dropout) is left, and the report says why.

    Args:
        model: any module that holds published ones, wrapped by DDP or not. One that is published itself becomes ours:
            the same object, of another class.
        only: replace only these: paths of modules, folders of paths, shell patterns of paths, published class names.
        example: inputs to compare the original and the swapped model on: a tensor, a shape (integers; random numbers of
            that shape are taken), a tuple or list of the model's inputs, or a dict of them by name. Outputs and
            gradients are compared, and forward plus backward timed, of the whole model and of each module, in the mode
            that the model is in; generators, buffers and gradients are left as they were.
        keep_regions: let dynamic graphs leave detached regions, kernels and nodes on themselves after a forward, as the
            published ones do, for code that reads them. The report names the attributes that go.

    Returns:
        a `SwapReport`; print it. Its `undo()` puts the originals back. Swapping again finds nothing to do.

    Raises:
        SwapError (a ValueError): nothing can be replaced (it lists what comes near, and why it is left), or outputs or
            gradients on the example differ beyond the tolerance (the model is as before). Tolerances, relative (L2) of
            outputs and of gradients: float64 1e-9 and 1e-7, float32 1e-4 and 1e-3, 16 bits 3e-2 and 1e-1.
        ValueError: a parameter on meta, float16 on a CPU, an `only` that matches nothing, an example that the model
            itself fails on. TypeError: an argument of another type. RuntimeError: called inside torch.compile.
    """
    if _inside_compile():
        raise RuntimeError("swap: called inside torch.compile; accepted is before: swap the model, then compile it")
    names = _check(model, only, keep_regions)
    inputs = None if example is None else prepare_example(example, model)
    with _ONE_AT_A_TIME, torch.inference_mode(False):
        result = search(model, names, keep_regions)
        _check_names(names, result)
        rows = tuple(item.row() for item in result.found)
        report = SwapReport(model, rows, tuple(result.left), tuple(result.already))
        if not rows:
            if not result.already:
                looked_for = tuple(dict.fromkeys(family.name for family in families() if family.settings))
                raise SwapError(f"swap: {nothing(report, looked_for)}", report)
            return report
        place = Place(model, result.pairs, [(item.theirs, item.ours) for item in result.found])
        if inputs is not None:
            *measured, whole = _compare(result.found, rows, place, inputs)
            report.modules, report.whole = tuple(measured), whole
            if wrong := [row for row in (*measured, whole) if row.wrong]:
                raise SwapError(f"swap: {different(wrong)}", report)
        place.put(ours=True)
        place.forget()
        report._restore = functools.cache(place.restore)  # once, of the report and its shallow copies together
        return report


def _inside_compile() -> bool:
    """Also where torch.compile gave up tracing a caller and runs it as it is, which only dynamo itself can tell."""
    dynamo: Any = getattr(torch._C, "_dynamo", None)
    running = getattr(getattr(dynamo, "eval_frame", None), "get_eval_frame_callback", lambda: None)
    return torch.compiler.is_compiling() or running() not in (None, False)


def _check(model: object, only: object, keep_regions: object) -> tuple[str, ...] | None:
    if not isinstance(model, nn.Module):
        if inspect.isclass(model) and issubclass(model, nn.Module):
            raise TypeError(
                f"swap: model is the class {model.__name__}; accepted is an instance: {model.__name__}(...)"
            )
        raise TypeError(f"swap: model is a {type(model).__name__}, {model!r:.100}; accepted is a torch.nn.Module")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"swap: model has {name} on meta; accepted are parameters with values: load them first")
    flag("swap", "keep_regions", keep_regions)
    if only is None:
        return None
    names = (only,) if isinstance(only, str) else only
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"swap: only is {only!r:.200}; accepted are names of modules or of published classes")
    if not names:
        raise ValueError(f"swap: only is {only!r}; accepted is one name or more, or None for all")
    return tuple(names)


def _check_names(only: tuple[str, ...] | None, result: Search) -> None:
    matched: set[str] = set()
    for path, name in result.met:
        matched |= selected(path, name, only)
    if missing := [name for name in only or () if name not in matched]:
        there = ", ".join(f"{path or '(the model)'} ({name})" for path, name in result.met) or "none"
        raise ValueError(f"swap: only names {missing}, which match nothing; the published modules are: {there}")


def _itself(module: nn.Module) -> nn.Module:
    return module


def _compare(found: list[Found], rows: tuple[Swapped, ...], place: Place, example: Example) -> tuple[Swapped, ...]:
    """The rows with their figures, the whole model's last. The originals are in place before and after."""
    model = place.model
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner: nn.Module = model.module if isinstance(model, parallel) else model  # ours need not wait for other processes
    caught = catch_inputs([item.theirs for item in found], inner, example)

    def figures(row: Swapped, before: Callable[[], nn.Module], after: Callable[[], nn.Module], on: Example) -> Swapped:
        try:
            return dataclasses.replace(row, **dataclasses.asdict(measure(before, after, on)))
        except Differs as how:
            return dataclasses.replace(row, error=math.inf, wrong=str(how))

    def ready(ours: bool) -> nn.Module:
        place.put(ours=ours)
        return inner

    try:
        if place.itself is not None:  # one module, and the whole model
            row = figures(rows[0], lambda: ready(False), lambda: ready(True), example)
            return row, row
        measured = []
        for item, row in zip(found, rows, strict=True):
            if (on := caught.get(id(item.theirs))) is not None:
                before, after = twins(item.theirs, item.ours)
                try:
                    row = figures(row, functools.partial(_itself, before), functools.partial(_itself, after), on)
                except Exception as failure:
                    row = dataclasses.replace(row, note=f"not compared by itself, where it fails: {said(failure)}")
            else:
                row = dataclasses.replace(row, note="not reached by the example, so not compared on it")
            measured.append(row)
        name = class_of(inner)
        whole = Swapped("", name, name, sum(p.numel() for p in inner.parameters()))
        return *measured, figures(whole, lambda: ready(False), lambda: ready(True), example)
    finally:
        place.put(ours=False)
