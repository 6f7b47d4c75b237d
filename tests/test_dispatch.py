"""Choosing a backend, and what importing the package costs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from support import PATIENCE, RegionCase, assert_identical, backends, value_and_gradients

import dyreg_triton as dt
from dyreg_triton._core.dispatch import can_run, current_backend

NAMES = ("auto", "triton", "eager", "reference")


def elsewhere(function: Callable[[], object]) -> object:
    """Run in another thread; its result or exception."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def meta_pool() -> torch.Tensor:
    """A call that only the triton backend refuses: it never runs on meta tensors."""
    return dt.ops.region_pool(torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 6, 4, device="meta"))


def refused() -> bool:
    try:
        assert meta_pool().shape == (2, 6, 3)
    except RuntimeError as error:
        assert "triton" in str(error)  # noqa: PT017
        return True
    return False


def test_auto_at_first() -> None:
    assert elsewhere(current_backend) == "auto"


@pytest.mark.parametrize("name", NAMES)
def test_setter(name: str) -> None:
    dt.backend(name)
    assert current_backend() == name
    assert refused() == (name == "triton")
    dt.backend("auto")
    assert current_backend() == "auto"


def test_context_manager_restores() -> None:
    dt.backend("reference")
    with dt.backend("eager"):
        assert current_backend() == "eager"
        with dt.backend("triton"):
            assert current_backend() == "triton"
            with dt.backend("auto"):
                assert current_backend() == "auto"
            assert current_backend() == "triton"
        assert current_backend() == "eager"
    assert current_backend() == "reference"


def test_context_manager_restores_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), dt.backend("eager"):
        raise ZeroDivisionError
    assert current_backend() == "auto"


def test_setter_inside_a_context_lasts_until_its_end() -> None:
    with dt.backend("eager"):
        dt.backend("reference")
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_a_refused_name_changes_nothing() -> None:
    with dt.backend("eager"):
        with pytest.raises(ValueError, match="cuda"):
            dt.backend("cuda")
        assert current_backend() == "eager"


def test_threads_choose_for_themselves() -> None:
    """Two threads with two backends at once, and a third that keeps the default."""
    barrier = threading.Barrier(3, timeout=PATIENCE)
    seen: dict[str, list[object]] = {}

    def run(name: str) -> None:
        results: list[object] = []
        seen[name] = results
        if name != "auto":
            dt.backend(name)
        for _ in range(3):
            barrier.wait()
            results += [current_backend(), refused()]
        barrier.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("triton", "eager", "auto")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {name: [name, name == "triton"] * 3 for name in ("triton", "eager", "auto")}
    assert current_backend() == "auto"


@pytest.mark.parametrize("op", ["region_pool", "region_remap", "region_kernel"])
@pytest.mark.parametrize("backend", backends())
def test_backward_uses_the_choice_of_forward(backend: str, op: str, device: torch.device) -> None:
    """Whatever is chosen afterwards, and from whichever thread."""
    case = RegionCase(op, (2,), 3, 4, (5, 6), "log-linear", seed=1)
    values = {name: t.to(device) for name, t in case.values().items()}
    grad_output = values.pop("grad_output")

    def leaves() -> dict[str, torch.Tensor]:
        return {name: t.clone().requires_grad_() for name, t in values.items()}

    with dt.backend(backend):
        expected = value_and_gradients(case.function(dt.ops), leaves(), grad_output)
    for later in NAMES:
        inputs = leaves()
        with dt.backend(backend):
            out = case.function(dt.ops)(**inputs)
        with dt.backend(later):
            for_this = torch.autograd.grad(out, list(inputs.values()), grad_output, retain_graph=True)

        def backward(
            out: torch.Tensor = out, inputs: dict[str, torch.Tensor] = inputs, later: str = later
        ) -> tuple[torch.Tensor, ...]:
            dt.backend(later)
            return torch.autograd.grad(out, list(inputs.values()), grad_output)

        for grads in (for_this, elsewhere(backward)):
            for name, grad in zip(inputs, grads, strict=True):  # type: ignore[call-overload]
                assert_identical(grad, expected[f"grad_{name}"], name)


@pytest.mark.parametrize("name", NAMES[1:])
def test_can_run_agrees_with_a_call(name: str, device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x, regions = torch.ones(1, 3, 3, device=device, dtype=dtype), torch.ones(2, 4, device=device, dtype=dtype)
        with dt.backend(name):
            if can_run(name, device=device, dtype=dtype):
                assert dt.ops.region_pool(x, regions).dtype == dtype
                assert can_run(name, device=str(device), dtype=dtype, raise_error=True)
                continue
            with pytest.raises(RuntimeError, match=name):
                dt.ops.region_pool(x, regions)
        with pytest.raises(RuntimeError, match=name):
            can_run(name, device=device, dtype=dtype, raise_error=True)


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_torch_backends_run_anywhere(name: str) -> None:
    for device in ("cpu", "meta", "cuda"):
        assert can_run(name, device=device, dtype=torch.float64)


def test_auto_runs_what_triton_cannot() -> None:
    assert meta_pool().device.type == "meta"


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_import_needs_no_gpu_and_nothing_beyond_torch(interpret: str) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import dyreg_triton
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(added - set(sys.stdlib_module_names)))
print(torch.cuda.is_initialized(), "triton" in sys.modules and "triton" not in before)
"""
    assert run_python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET=interpret).split() == [
        "dyreg_triton",
        "False",
        "False",
    ]


@pytest.mark.slow
def test_import_leaves_the_compiler_alone() -> None:
    """torch._dynamo takes longer to import than all of torch."""
    code = "import sys, dyreg_triton; print('torch._dynamo' in sys.modules, 'triton' in sys.modules)"
    assert run_python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0").split() == ["False", "False"]


def test_a_backend_object_may_be_used_again() -> None:
    eager = dt.backend("eager")
    assert current_backend() == "eager"
    with eager:
        assert current_backend() == "eager"
    assert current_backend() == "auto"
    for _ in range(2):
        with eager, dt.backend("reference"):
            assert current_backend() == "reference"
        assert current_backend() == "auto"
    with eager, eager:
        assert current_backend() == "eager"
    assert current_backend() == "auto"


@pytest.mark.slow
def test_calls_on_the_cpu_do_not_import_triton() -> None:
    code = """
import sys, torch, dyreg_triton as dt
had = "triton" in sys.modules
dt.ops.region_pool(torch.ones(1, 3, 3, requires_grad=True), torch.ones(2, 4)).sum().backward()
print("triton" in sys.modules and not had)
"""
    assert run_python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0").split() == ["False"]
