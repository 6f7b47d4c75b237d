"""bench/gpu.sh walks its steps on the CPU; bench/sanitize.py knows every kernel and sees what is off."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bench_rows
import pytest
import torch
from support import DEVICE, PATIENCE, in_full

from bench import sanitize
from dyreg_triton import tuning
from dyreg_triton.configs.table import SPACES

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"
STEPS = ("dependencies", "environment", "suite", "sanitizer", "tune", "bench", "report")
QUIET = dict.fromkeys(STEPS[1:], "true")  # in place of the steps' own commands


def gpu_script(out: Path, *options: str, **steps: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """A run of gpu.sh that writes to `out`, and its log.

    `steps` replace the commands of the steps that they name; in capitals they are other variables of its environment.
    """
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {name if name.isupper() else f"STEP_{name.upper()}": value for name, value in steps.items()}
    command = ["bash", str(SCRIPT), "--out", str(out), *options]
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return done, (out / "gpu.log").read_text()


def statuses(output: str) -> dict[str, str]:
    """{step: status} of the table at the end."""
    table = output[output.rindex("step  ") :]
    return {name: status for name, status in re.findall(r"^(\w+) +\d+  (.*)$", table, re.M) if name != "total"}


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu.sh", "gpu-wheels.sh"])
def test_bash_accepts_it(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "bench" / name)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("sanitized", [False, *in_full([True])])
def test_dry_run(tmp_path: Path, sanitized: bool) -> None:
    """Every step passes, but for the benchmark, which tests of its own run: invented rows stand for its results.

    So does the sanitizer, which interprets every kernel for a minute, in `make full`.
    """
    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    rows = bench_rows.write(tmp_path / "rows.jsonl", bench_rows.everything(bench_rows.CPU))
    out = tmp_path / "out"
    done, log = gpu_script(
        out,
        "--dry-run",
        "--budget",
        str(PATIENCE),
        bench=f"""echo "configs of $DYREG_TRITON_TUNING"; cp '{rows}' "$JSONL" """,
        **({} if sanitized else {"sanitizer": "true"}),
    )
    assert done.returncode == 0, log
    assert statuses(log) == statuses(done.stdout) == dict.fromkeys(STEPS, "passed")
    assert re.findall(r"^=== (\w+)", log, re.M) == list(STEPS)
    assert f"torch: {torch.__version__}" in log
    assert re.search(r"\d+ passed", log)
    assert not sanitized or all(f"{name}: " in log for name in sanitize.kernels())
    assert (out / "gpu.jsonl").read_text() == rows.read_text()

    tuned = json.loads((out / "tuning.json").read_text())
    assert tuned["gpu"]["name"] == "interpreter"
    key = "region.gather float32 frames=1 nodes=2 channels=32 cells=16"
    assert list(tuned["entries"]) == [key]
    assert f"explicit: {out}/tuning.json, nearest key {key}" in log  # what was tuned is what a launch would take
    assert f"configs of {out}/tuning.json\n" in log

    assert "Sample, 1 thread" in (out / "REPORT.md").read_text()
    assert "<svg" in (out / "report.html").read_text()
    assert {path.name for path in out.iterdir()} == {
        "gpu.log", "gpu.jsonl", "tuning.json", "REPORT.md", "report.html", "plots"
    }  # fmt: skip


@pytest.mark.slow
def test_failing_steps_do_not_stop_the_others(tmp_path: Path) -> None:
    done, log = gpu_script(
        tmp_path / "out",
        "--dry-run",
        environment="echo the environment",
        suite="echo 3 failed; exit 3",
        sanitizer="echo skipped: no such tool; exit 77",
        tune="echo no GPU; exit 1",
        bench="""echo '{"op": "first"}' >"$JSONL"; kill -9 $$""",
        report="echo no row >&2; exit 1",
    )
    assert done.returncode == 1
    found = statuses(done.stdout)
    assert found == statuses(log)
    assert found["environment"] == "passed"
    assert found["suite"] == "failed: exit status 3"
    assert found["sanitizer"] == "skipped: no such tool"
    assert found["tune"] == "failed: exit status 1"
    assert found["bench"] == "failed: exit status 137"
    assert found["report"] == "failed: exit status 1"
    assert "the environment\n" in log
    assert "3 failed\n" in done.stdout  # the end of a failing step's output
    assert json.loads((tmp_path / "out" / "gpu.jsonl").read_text()) == {"op": "first"}


@pytest.mark.slow
def test_budget_is_kept(tmp_path: Path) -> None:
    """A step that hangs is stopped in its share of the time, and what it printed is in the log."""
    options = ("--dry-run", "--budget", "30")
    steps = QUIET | {"suite": "echo began; sleep 100000", "bench": "echo ran"}
    done, log = gpu_script(tmp_path / "out", *options, **steps)
    assert done.returncode == 1
    assert re.fullmatch(r"failed: stopped after \d+ s", statuses(log)["suite"])
    assert statuses(log)["bench"] == "passed"
    assert "began\n" in log
    assert "ran\n" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "status"),
    [
        ('[[ $PYTORCH_NO_CUDA_MEMORY_CACHING == 1 && "$*" == *"memcheck"*"bench.sanitize" ]]', "passed"),
        ("echo Device not supported; exit 255", "skipped: compute-sanitizer does not support this device"),
        ("echo Invalid __global__ write; exit 1", "failed: exit status 1"),
    ],
)
def test_memory_sanitizer(tmp_path: Path, tool: str, status: str) -> None:
    """With a stand-in for compute-sanitizer, which is looked for on PATH first."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(f"#!/usr/bin/env bash\n{tool}\n")
    fake.chmod(0o755)
    with environment_variable("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}"):
        steps = {name: command for name, command in QUIET.items() if name != "sanitizer"}
        done, log = gpu_script(tmp_path / "out", **steps)
    assert statuses(log)["sanitizer"] == status
    assert done.returncode == status.startswith("failed")


@pytest.mark.slow
def test_missing_wheels_are_named(tmp_path: Path) -> None:
    """Where a package and its wheel are both missing the script says so and goes on."""
    (tmp_path / "bare").mkdir()
    hidden = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'tqdm' else f(n, *a)"
    )
    (tmp_path / "bare" / "sitecustomize.py").write_text(hidden)
    with environment_variable("PYTHONPATH", str(tmp_path / "bare")):
        done, log = gpu_script(tmp_path / "out", WHEELS=str(tmp_path / "none"), **QUIET)
    assert done.returncode == 0
    assert statuses(log)["dependencies"] == "incomplete: no wheel for tqdm"


def stand_in(tmp_path: Path) -> dict[str, str]:
    """A Python that says how it was called, and no more, where a module of this project is run."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
if [[ "$1 $2" == "-m bench" || "$1 $2" == "-m dyreg_triton" ]]; then
  echo "ran with ${{DYREG_TRITON_TUNING:-nothing}}: $*"
  exit 0
fi
[[ $1 == -c && $2 == *sys.executable* ]] && {{ echo "$0"; exit 0; }}
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    return {"PYTHON": str(python)}


@pytest.mark.slow
def test_commands_on_a_gpu(tmp_path: Path) -> None:
    """Tuning and benchmark have budgets that end before the step does, and one takes what the other has found."""
    out = tmp_path / "out"
    given = tmp_path / "given.json"
    given.write_text('{"tuned": "before"}\n')
    steps = dict.fromkeys(("environment", "suite", "sanitizer", "report"), "true")
    done, log = gpu_script(out, TUNED="given.json", **steps, **stand_in(tmp_path))
    assert done.returncode == 0, log
    assert (out / "tuning.json").read_text() == given.read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"^=== (\w+) \(at most (\d+) s\)", log, re.M)}
    tune = f"-m dyreg_triton tune --ops region --dtype bfloat16 --budget {limits['tune'] - 30} --out {out}/tuning.json"
    bench = f"-m bench run all --budget {limits['bench'] - 30} --out {out}/gpu.jsonl"
    assert re.findall("^ran with .*", log, re.M) == [
        f"ran with nothing: {tune}",
        f"ran with {out}/tuning.json: {bench}",
    ]
    # what the steps before did not use is theirs
    assert limits["tune"] > 130
    assert limits["bench"] > 400


@pytest.mark.slow
def test_shares_of_the_time(tmp_path: Path) -> None:
    """The weights sum to 100, and each step's share follows from what is left; the shortest is not nothing."""
    weights = [int(weight) for weight in re.findall(r"^step \w+ (\d+) ", SCRIPT.read_text(), re.M)]
    assert len(weights) == len(STEPS)
    assert sum(weights) == 100
    _, log = gpu_script(tmp_path / "out", "--budget", "11", **QUIET | {"tune": "echo limit $STEP_LIMIT"})
    limits = dict(re.findall(r"^=== (\w+) \(at most (\d+) s\)", log, re.M))
    assert list(limits) == list(STEPS)
    assert all(int(limit) >= 1 for limit in limits.values())
    assert f"limit {limits['tune']}\n" in log


@pytest.mark.slow
def test_failing_tune_does_not_stop_the_benchmark(tmp_path: Path) -> None:
    """What it had found is used; where it had found nothing, nothing is named."""
    for found, configs in (("""echo '{}' >"$TUNING"; """, f"{tmp_path}/out/tuning.json"), ("", "none")):
        steps = QUIET | {"tune": f"{found}exit 1", "bench": 'echo "configs: ${DYREG_TRITON_TUNING:-none}"'}
        with environment_variable("DYREG_TRITON_TUNING", "/the/callers/own"):
            done, log = gpu_script(tmp_path / "out", **steps)
        assert done.returncode == 1
        assert statuses(log)["tune"] == "failed: exit status 1"
        assert statuses(log)["bench"] == "passed"
        assert f"configs: {configs}\n" in log


@pytest.mark.slow
def test_no_report_without_rows_or_matplotlib(tmp_path: Path) -> None:
    steps = {name: command for name, command in QUIET.items() if name != "report"}
    done, log = gpu_script(tmp_path / "out", **steps)
    assert statuses(log)["report"] == "skipped: nothing was measured"
    (tmp_path / "bare" / "matplotlib").mkdir(parents=True)
    (tmp_path / "bare" / "matplotlib" / "__init__.py").write_text("raise ImportError")
    with environment_variable("PYTHONPATH", str(tmp_path / "bare")):
        done, log = gpu_script(tmp_path / "out", **steps | {"bench": """echo '{"op": "first"}' >"$JSONL" """})
    assert done.returncode == 0
    assert statuses(log)["report"] == "skipped: no matplotlib"


@pytest.mark.slow
def test_results_of_a_former_run_are_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("gpu.log", "gpu.jsonl", "tuning.json", "REPORT.md", "report.html"):
        (out / name).write_text("of another run")
    (out / "kept").write_text("the user's")
    gpu_script(out, **QUIET)
    assert {path.name for path in out.iterdir()} == {"gpu.log", "kept"}
    assert "of another run" not in (out / "gpu.log").read_text()


@pytest.mark.slow
def test_no_tuning_file_to_go_on_from(tmp_path: Path) -> None:
    with environment_variable("TUNED", "none.json"):
        done = subprocess.run(["bash", str(SCRIPT), "--out", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TUNED is none.json; accepted is a tuning file" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--out",), ("--budget", "soon"), ("--fast",)])
def test_wrong_options_are_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert options[0] in done.stderr
    assert not list(tmp_path.iterdir())


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield


# --- the sanitizer's program ----------------------------------------------------------------------------------------


@pytest.mark.kernels
def test_every_kernel_is_launched_and_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.run(DEVICE) == []
    launches = re.findall(r": (\w+): (\d+) launches", capsys.readouterr().out)
    assert {name for name, count in launches if int(count)} == set(sanitize.kernels())


def test_every_kernel_is_known() -> None:
    gradients = {f"relational_{name}" for name in ("fold_keys", "fold_values", "by_h1", "by_h2", "unpack")}
    known = {
        "region.py": {"region_gather", "region_scatter", "region_dense", "region_dense_backward"},
        "relational.py": {"relational_pack", "relational_forward", "relational_backward"},
        "relational_gradients.py": gradients,
        "bilinear.py": {"bilinear_forward", "bilinear_backward", "bilinear_mix"},
    }
    for file, names in known.items():
        assert {name for name, found in sanitize.kernels().items() if found == file} == names


def test_relational_attention_is_launched_in_both_orders() -> None:
    orders = set()
    for case in sanitize.CASES:
        if isinstance(case, sanitize.Relational):
            call = case.call
            channels = (call.channels, call.latent, call.value_channels, call.mixed)
            sizes = (call.batch, call.clip, call.queries, channels, call.kernel_size, case.dtype.itemsize)
            orders |= {(kind, tuning.relational(kind, *sizes).order) for kind in ("forward", "backward")}
    assert orders == set(itertools.product(("forward", "backward"), ("first", "second")))


def test_the_bilinear_transform_is_launched_in_every_form() -> None:
    """By kron(P, Q^T) and by one matrix after the other; frames not mixed, mixed in the same pass, and in one of their
    own; contiguous and with the channels last."""
    forms = set()
    for case in sanitize.CASES:
        if not isinstance(case, sanitize.Bilinear):
            continue
        call = case.call
        (mixes, ts), sizes = call.temporal or (1, 1), call.shapes()["x"]
        odd = (*call.cells, call.channels, call.frames, *([ts] if call.temporal else []))
        assert all(n & (n - 1) for n in odd)  # none is a power of two
        for kind in ("forward", "backward"):
            name, x = kind + "_mixed" * bool(call.temporal), torch.empty(0, dtype=case.dtype)
            key = tuning.bilinear_key(name, sizes, call.groups, call.cells, mixes, ts, x)
            config = SPACES["bilinear"].default(key, "nvidia")
            form = "another pass" if not config.fused else "joint" if config.joint else "one by one"
            forms.add((kind, call.temporal is not None, form, case.channels_last))
    for kind, mixed in itertools.product(("forward", "backward"), (False, True)):
        found = {(form, last) for k, m, form, last in forms if (k, m) == (kind, mixed)}
        assert {form for form, _ in found} == {"joint", "one by one", *["another pass"] * mixed}
        assert {last for _, last in found} == {False, True}
        assert not mixed or {("another pass", False), ("another pass", True)} <= found


def test_kernels_are_told_from_device_functions(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text(
        "@triton.jit\ndef called(x):\n    return x\n\n\ndef host():\n    return uncalled\n"
    )
    (tmp_path / "one.py").write_text(
        "@triton.jit\ndef kernel(x):\n    tl.store(x, helpers.called(tl.program_id(0)))\n\n\n"
        "@triton.jit(noinline=True)\ndef uncalled(x):\n    uncalled(called(x))\n\n\n"
        "@other\n@triton.jit\ndef both(x):\n    kernel(x)\n"
    )
    (tmp_path / "share.py").write_text("@triton.jit\ndef share(n):\n    return tl.program_id(0) // n\n")
    (tmp_path / "two.py").write_text(
        "@triton.jit\ndef early(x):\n    if share(2):\n        return\n    x(tl.program_id(1))\n"
    )
    found = {"kernel": "one.py", "uncalled": "one.py", "both": "one.py", "early": "two.py"}
    assert sanitize.kernels(tmp_path) == found


def test_kernel_that_is_not_launched_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sanitize, "CASES", ())
    problems = sanitize.run(torch.device("cpu"))
    assert sorted(problems) == sorted(
        f"{name} of {file} was never launched" for name, file in sanitize.kernels().items()
    )


@pytest.mark.kernels
def test_launched_kernel_that_is_not_known_is_reported(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(sanitize, "CASES", sanitize.CASES[:1])
    monkeypatch.setattr(sanitize, "kernels", lambda: {"region_gather": "region.py"})
    problems = sanitize.run(device)
    words = "{} is no kernel of kernels/ but was launched"
    assert sorted(problems) == [words.format(f"region_{name}") for name in ("dense", "dense_backward", "scatter")]


@pytest.mark.parametrize("factor", [1.0, 1.05, float("nan")])
@pytest.mark.parametrize("entry", ["out", "last gradient"])
@pytest.mark.parametrize(("op", "case"), [(op, case) for case in sanitize.CASES for op in case.OPS], ids=str)
def test_wrong_results_are_reported(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    case: sanitize.Case | sanitize.Relational | sanitize.Bilinear,
    entry: str,
    factor: float,
) -> None:
    """The reference in place of the kernels, spoiled."""
    results = sanitize.results
    if entry == "last gradient":
        entry = f"grad_{list(case.inputs(op)[0])[-1]}"

    def spoiled(function, leaves, grad_output):
        found = results(function, leaves, grad_output)
        if grad_output.dtype != torch.float64:
            found[entry] = found[entry] * factor
        return found

    monkeypatch.setattr(sanitize, "results", spoiled)
    monkeypatch.setattr(sanitize.dt, "ops", sanitize.dt.reference)
    problems = sanitize.check(op, case, torch.device("cpu"))
    assert len(problems) == (factor != 1)
    assert all(problem.startswith(f"{op} ({case}): {entry} has relative error") for problem in problems)
