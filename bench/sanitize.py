"""Launch every kernel on small, awkward cases and compare with the float64 reference: `python -m bench.sanitize`.

Made to run under `compute-sanitizer` on a GPU: sizes are no multiples of any block, so every mask matters. On a CPU it
runs under Triton's interpreter (TRITON_INTERPRET=1). Exit status 1 when a result is off or a kernel was not launched.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

import dyreg_triton as dt
from dyreg_triton._core import dispatch
from dyreg_triton._core.console import command
from dyreg_triton._core.numerics import TOLERANCE, relative_error
from dyreg_triton.ops.launch import watched
from dyreg_triton.testing.bilinear import BilinearCase
from dyreg_triton.testing.relational import RelationalCase

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
FRAMES, CHANNELS, SIZE = 2, 19, (7, 9)


@dataclass(frozen=True)
class Case:
    """What the three region ops are called with; 70 regions are more than one program holds."""

    # each op's inputs, and what its output's gradient is shaped like
    OPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "region_pool": ("x", "regions", "nodes"),
        "region_remap": ("nodes", "regions", "x"),
        "region_kernel": ("regions", "kernel"),
    }

    dtype: torch.dtype
    nodes: int
    channels_last: bool
    profile: str

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{str(self.dtype)[6:]}, {layout}, {self.nodes} regions, {self.profile}"

    def inputs(self, op: str) -> tuple[dict[str, Tensor], Tensor]:
        """An op's inputs by name and the gradient of its output."""
        given = inputs(self)
        if op == "region_kernel":
            given["regions"] = given["regions"].to(self.dtype)
        *names, grad_output = self.OPS[op]
        return {name: given[name] for name in names}, given[grad_output]

    def tolerance(self, device: torch.device) -> float:
        return TOLERANCE[self.dtype]

    def function(self, op: str, module: ModuleType) -> Callable[..., Tensor]:
        size = () if op == "region_pool" else (SIZE,)
        return lambda **tensors: getattr(module, op)(*tensors.values(), *size, profile=self.profile)


@dataclass(frozen=True)
class Called:
    """A case of the testing kit, in one of two layouts."""

    call: RelationalCase | BilinearCase
    channels_last: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.call.dtype

    def tolerance(self, device: torch.device) -> float:
        return stored(self.dtype, device)

    def function(self, op: str, module: ModuleType) -> Callable[..., Tensor]:
        return self.call.function(module)


@dataclass(frozen=True)
class Relational(Called):
    """What relational attention is called with, q, k and v contiguous or with their channels last."""

    OPS: ClassVar[tuple[str, ...]] = ("relational_attention",)

    call: RelationalCase

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        sizes = f"{self.call.queries} queries, {self.call.value_channels} values"
        return f"{str(self.dtype)[6:]}, {layout}, {sizes}, kernel {self.call.kernel}, context {self.call.context}"

    def inputs(self, op: str) -> tuple[dict[str, Tensor], Tensor]:
        leaves = self.call.values()
        grad_output = leaves.pop("grad_output")
        if self.channels_last:
            features = {name: leaves[name] for name in "qkv" if name in leaves}
            leaves |= {name: t.movedim(-4, -1).contiguous().movedim(-1, -4) for name, t in features.items()}
        return leaves, grad_output


@dataclass(frozen=True)
class Bilinear(Called):
    """What the bilinear transform is called with, x and the gradient of y contiguous or with their channels last."""

    OPS: ClassVar[tuple[str, ...]] = ("bilinear_transform",)

    call: BilinearCase

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        (rows, columns), temporal = self.call.cells, self.call.temporal
        mixed = f"{temporal[1]} frames mixed" if temporal else "no frames mixed"
        return f"{str(self.dtype)[6:]}, {layout}, {rows}x{columns} coarse cells, {mixed}"

    def inputs(self, op: str) -> tuple[dict[str, Tensor], Tensor]:
        leaves = self.call.values()
        grad_output = leaves.pop("grad_output")
        if self.channels_last:
            leaves["x"], grad_output = (
                clip.contiguous(memory_format=torch.channels_last_3d) for clip in (leaves["x"], grad_output)
            )
        return leaves, grad_output


def stored(dtype: torch.dtype, device: torch.device) -> float:
    """The tolerance; on the CPU twice as much for bfloat16: the interpreter stores it by rounding towards zero."""
    return TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 and device.type == "cpu" else 1)


# sizes divide no block, and windows reach over every border
_RELATIONAL = RelationalCase(
    kernel_size=(3, 3, 3), clip=(2, 3, 5), batch=2, queries=3, channels=5, latent=6, value_channels=5, mixed=7, eps=1e-6
)
_BILINEAR = BilinearCase(
    cells=(3, 5), size=(6, 15), temporal=(3, 3), frames=6, batch=2, channels=18, groups=2, matrices_dtype=torch.float32
)
_MANY: dict[str, Any] = {"cells": (9, 11), "size": (18, 11)}
_LONG: dict[str, Any] = {"cells": (7, 7), "size": (7, 7), "temporal": (1, 50), "frames": 50, "channels": 6, "batch": 1}
CASES = (
    # every pair of (dtype, number of regions, layout) comes up
    Case(torch.float32, 5, False, "linear"),
    Case(torch.float32, 70, True, "gaussian"),
    Case(torch.bfloat16, 5, True, "log-linear"),
    Case(torch.bfloat16, 70, False, "linear"),
    # either order of evaluation, which the number of queries decides; a window that is even and longer than the clip
    Relational(_RELATIONAL, False),
    Relational(replace(_RELATIONAL, queries=1, kernel_size=(2, 3, 8), dtype=torch.bfloat16), True),
    # by kron(P, Q^T) and by one after the other, frames not mixed, mixed in the same pass, and in one of their own,
    # each contiguous and with the channels last
    Bilinear(replace(_BILINEAR, temporal=None), False),
    Bilinear(replace(_BILINEAR, temporal=None, **_MANY, dtype=torch.bfloat16), True),
    Bilinear(replace(_BILINEAR, dtype=torch.bfloat16), False),
    Bilinear(replace(_BILINEAR, **_MANY), True),
    Bilinear(replace(_BILINEAR, **_LONG), False),
    Bilinear(replace(_BILINEAR, **_LONG, dtype=torch.bfloat16), True),
)


def kernels(folder: Path = KERNELS) -> dict[str, str]:
    """{kernel: its file}: the @triton.jit functions that no other one calls, or that ask for their program id and
    return nothing."""
    functions: dict[str, tuple[str, set[str], bool]] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                gives = any(isinstance(n, ast.Return) and n.value is not None for n in ast.walk(node))
                functions[node.name] = path.name, names - {node.name}, "program_id" in names and not gives
    called = set(itertools.chain.from_iterable(names for _, names, _ in functions.values()))
    return {name: file for name, (file, _, asks) in functions.items() if asks or name not in called}


@contextlib.contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts launches by kernel name."""
    counts: Counter[str] = Counter()
    with watched(lambda launch, _: counts.update([launch.kernel.fn.__name__])):
        yield counts


def inputs(case: Case) -> dict[str, Tensor]:
    """A map, nodes, a dense kernel and regions: the first is empty, the second off the map, the others overlap it."""
    generator = torch.Generator().manual_seed(0)
    height, width = SIZE
    regions = torch.rand(FRAMES, case.nodes, 4, generator=generator, dtype=torch.float32, device="cpu")
    regions = regions * torch.tensor(
        [width - 1.0, height - 1.0, 2.5, 2.5], dtype=torch.float32, device="cpu"
    ) + torch.tensor([0.0, 0.0, 1.5, 1.5], dtype=torch.float32, device="cpu")
    regions[:, 0, 2] = -1.0
    regions[:, 1, :2] = 40.0
    features = {
        "x": torch.randn(FRAMES, CHANNELS, *SIZE, generator=generator, dtype=torch.float32, device="cpu"),
        "nodes": torch.randn(FRAMES, case.nodes, CHANNELS, generator=generator, dtype=torch.float32, device="cpu"),
        "kernel": torch.randn(FRAMES, case.nodes, *SIZE, generator=generator, dtype=torch.float32, device="cpu"),
    }
    if case.channels_last:
        features["x"] = features["x"].to(memory_format=torch.channels_last)
    return {"regions": regions, **{name: t.to(case.dtype) for name, t in features.items()}}


def results(function: Callable[..., Tensor], leaves: dict[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    out = function(**{name: t.requires_grad_() for name, t in leaves.items()})
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_output)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def check(op: str, case: Case | Relational | Bilinear, device: torch.device) -> list[str]:
    """What is off about one op on one case, in words."""
    leaves, grad_output = case.inputs(op)

    def computed(module: Any, *target: Any) -> dict[str, Tensor]:
        moved = {name: t.detach().to(*target) for name, t in leaves.items()}
        return results(case.function(op, module), moved, grad_output.to(*target))

    with dt.backend("triton"):
        actual = computed(dt.ops, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a fault shows here, at the op that caused it
    # on the CPU: a sanitizer is slow enough without torch's own kernels
    expected = computed(dt.reference, torch.float64)
    problems = []
    for name, wanted in expected.items():
        error = relative_error(actual[name], wanted)
        if not error <= case.tolerance(device):
            problems.append(f"{op} ({case}): {name} has relative error {error:.3g} > {case.tolerance(device):g}")
    return problems


def run(device: torch.device) -> list[str]:
    """Every op on every case; returns what is off, in words."""
    problems = []
    with launches() as counts:
        for case, op in [(c, op) for c in CASES for op in c.OPS]:
            found = check(op, case, device)
            print(f"{op} ({case}): {'off' if found else 'right'}", flush=True)
            problems += found
    known = kernels()
    for name, file in known.items():
        print(f"{file}: {name}: {counts[name]} launches")
    problems += [f"{name} of {file} was never launched" for name, file in known.items() if not counts[name]]
    return problems + [
        f"{name} is no kernel of {KERNELS.name}/ but was launched" for name in counts.keys() - known.keys()
    ]


@command
def main() -> int:
    """Run all checks; returns the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = dispatch.why_not("triton", device, torch.float32)
    if reason is not None:
        print(f"no kernel can be launched: {reason}", file=sys.stderr)
        return 1
    problems = run(device)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
