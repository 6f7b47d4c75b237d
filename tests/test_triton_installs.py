"""What stands in triton's place on somebody's machine: each is as none, and its reason is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dyreg_triton._core.installed import MIN_TRITON, triton_fault, triton_version

ROOT = Path(__file__).resolve().parents[1]
COMPLETE = """
import sys, types
jit = knobs = 1
for name, parts in (("language", "constexpr dot load store"), ("runtime", "JITFunction driver")):
    module = sys.modules[f"triton.{name}"] = types.ModuleType(f"triton.{name}")
    for part in parts.split():
        setattr(module, part, 1)
"""
# What `triton/__init__.py` holds, or what is done to sys.modules, and what is said of it.
FILES = {
    "the import raises ImportError": ("raise ImportError('no libtriton')", "broken", "ImportError: no libtriton"),
    "a dependency is missing": ("import no_such_package", "broken", "ModuleNotFoundError: No module named 'no_such_"),
    "a shared library does not load": ("raise OSError('undefined\\nmore')", "broken", "raises OSError: undefined$"),
    "the import raises RuntimeError": ("raise RuntimeError('no driver')", "broken", "RuntimeError: no driver"),
    "the import raises AttributeError": ("import sys; sys.nothing", "broken", "AttributeError: module 'sys' has no"),
    "a syntax of another Python": ("def f(:", "broken", "SyntaxError"),
    "without language": ("__version__, jit, knobs = '3.7.0', 1, 1", "broken", "No module named 'triton.language'"),
    "without jit": (f"{COMPLETE}\ndel jit; __version__ = '3.7.0'", "incomplete", "triton has no jit"),
    "without dot": (
        f"{COMPLETE}\ndel sys.modules['triton.language'].dot; __version__ = '3.7.0'", "incomplete", "guage has no dot"
    ),
    "without a version": (COMPLETE, "incomplete", "its __version__ is None"),
    "a version that is none": (f"{COMPLETE}\n__version__ = 'main'", "incomplete", "its __version__ is 'main'"),
    "too old": (f"{COMPLETE}\n__version__ = '3.5.1'", "too old", r"it is 3\.5\.1, and the kernels need 3\.6 or later"),
    "far too old": ("__version__ = '2.10.0+cpu'", "too old", r"it is 2\.10\.0\+cpu"),
}  # fmt: skip
MODULES = {
    "a stub": ("stub('triton')", "a stub", "<module 'triton'"),
    "a stub with a spec": (
        "stub('triton', __spec__=importlib.machinery.ModuleSpec('triton', None))", "a stub", "<module 'triton'"
    ),
    "a stub without __spec__": ("m = stub('triton'); del m.__spec__", "a stub", "<module 'triton'"),
    "a stub that is a package": ("stub('triton', __path__=[])", "a stub", "<module 'triton'"),
    "a stub of all that is asked": (
        "stub('triton', __version__='3.7.1', jit=1, knobs=1, language=1, runtime=1)", "a stub", "<module 'triton'"
    ),
    "a mock": ("from unittest import mock; sys.modules['triton'] = mock.MagicMock()", "a stub", "<MagicMock"),
    "a name that forbids the import": ("sys.modules['triton'] = None", "not installed", "sys.modules forbids"),
}  # fmt: skip
FOLDERS = {
    "nothing": ("", "not installed", "not installed$"),
    "a folder left over": ("leftover", "not installed", r"there is only the folder .*triton, without its code"),
}
CASES = {**FILES, **MODULES, **FOLDERS}
# Those that are there when the library is imported, also where the interpreter is wanted, and for `python -m bench`.
CLOSELY = ("a stub", "a shared library does not load", "too old")
REST = tuple(case for case in CASES if case not in CLOSELY)
PAIRS = [(case, wanted) for case in CLOSELY for wanted in "01"] + [(case, "0") for case in REST]  # TRITON_INTERPRET

# Torch is imported once, and after those that are looked at closely the library; each install gets a copy of that
# process.
SCRIPT = """
import contextlib, importlib.machinery, io, json, os, sys, traceback, types
import torch

assert "triton" not in sys.modules and "dyreg_triton" not in sys.modules


class Only:
    def __init__(self, folder):
        self.folder = folder

    def find_spec(self, name, path=None, target=None):
        if name != "triton":
            return None
        found = importlib.machinery.PathFinder.find_spec(name, [self.folder])
        if found is None:
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return found


def stub(name, **parts):
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(parts)
    return module


def calls():
    import dyreg_triton as dt

    x, regions = torch.rand(1, 2, 4, 5), torch.rand(1, 3, 4) * 2 + 1
    nodes, p, q = torch.rand(1, 3, 2), torch.rand(1, 1, 4, 4), torch.rand(1, 1, 5, 5)
    clip = torch.rand(1, 4, 2, 3, 3)
    return {
        "region_pool": lambda ops: ops.region_pool(x, regions),
        "region_remap": lambda ops: ops.region_remap(nodes, regions, (4, 5)),
        "region_kernel": lambda ops: ops.region_kernel(regions, (4, 5)),
        "DyReG": layer(dt.layers.DyReG(4, (4, 5)), torch.rand(1, 2, 4, 4, 5)),
        "relational_attention": layer(dt.layers.RSA(4, num_queries=2, kernel_size=(1, 3, 3)), clip),
        "bilinear_transform": layer(dt.layers.BATransform(4, window=3, temporal_window=2, groups=2), clip),
    }


def layer(module, x):
    return lambda ops: module.eval()(x)


def called(main, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    return [status, out.getvalue(), err.getvalue()]


def told(interpret, closely):
    import dyreg_triton as dt
    from dyreg_triton import cli
    from dyreg_triton._core import dispatch, gpu, installed

    result = {"refused": {}, "wrong": []}
    if interpret == "0":
        calls()["region_pool"](dt.ops)
        assert dispatch.can_run("triton", device="cpu", dtype=torch.float32) is False
        result["asked"] = installed.triton_fault.cache_info().misses
    for name, call in calls().items():
        expected = None
        for backend in ("reference", "eager", "auto"):
            with dt.backend(backend):
                y = call(dt.ops)
            expected = y if expected is None else expected
            if not torch.allclose(y, expected, atol=1e-5):
                result["wrong"].append((name, backend))
        with dt.backend("triton"):
            try:
                call(dt.ops)
            except RuntimeError as refusal:
                result["refused"][name] = str(refusal)
    device = torch.device("cpu")
    for raising in (
        lambda: dispatch.can_run("triton", device=device, dtype=torch.float32, raise_error=True),
        lambda: dt.tuning.tune(device=device),
        lambda: gpu.gpu_of(device),
    ):
        try:
            raising()
        except RuntimeError as refusal:
            result["refused"][len(result["refused"])] = str(refusal)
    result["env"] = called(cli.main, "env")
    result["tune"] = called(cli.main, "tune", "--device", "cpu")
    result["show"] = called(cli.main, "tune", "--show", "--shapes", "quick", "--dtype", "float32")
    if closely:
        from bench import __main__ as bench, overhead

        result["compiled"] = called(bench.main, "compiled")
        result["overhead"] = overhead._no_standin()
    return result


for case in json.load(sys.stdin):
    if not case["closely"]:
        import dyreg_triton.cli
    if os.fork():
        os.wait()
        continue
    try:
        sys.meta_path.insert(0, Only(case["folder"]))
        os.environ["TRITON_INTERPRET"] = case["interpret"]
        exec(case["code"])
        answer = told(case["interpret"], case["closely"])
    except BaseException:
        answer = {"failed": traceback.format_exc()}
    print(json.dumps([case["name"], case["interpret"], answer]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """By case and TRITON_INTERPRET: what the library makes of it."""
    cases = []
    for name, interpret in PAIRS:
        folder, code = tmp_path_factory.mktemp("site"), CASES[name][0]
        if name in FILES or code == "leftover":
            (folder / "triton" / "backends").mkdir(parents=True)
        if name in FILES:
            (folder / "triton" / "__init__.py").write_text(code, encoding="utf-8")
        code = code if name in MODULES else ""
        case = {"name": name, "interpret": interpret, "closely": name in CLOSELY}
        cases.append({**case, "folder": str(folder), "code": code})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(cases), capture_output=True, encoding="utf-8", check=False,
        env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, wanted): answer for name, wanted, answer in lines}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "interpret"), PAIRS)
def test_is_as_none_and_says_why(case: str, interpret: str, answers: dict[tuple[str, str], Any]) -> None:
    answer = answers[case, interpret]
    assert "failed" not in answer, answer["failed"]
    _, kind, reason = CASES[case]
    assert answer["wrong"] == []
    assert answer.get("asked", 0) == 0  # without a wish for it, triton is not even looked at
    assert len(answer["refused"]) == 9, answer["refused"]
    for op, refusal in answer["refused"].items():
        said = re.search(r"the package triton is ([^;]*)", refusal)
        assert said is not None, f"{op}: {refusal}"
        assert said.group(1).startswith(kind), refusal
        assert re.search(reason, said.group(1)), refusal

    status, out, err = answer["env"]
    assert (status, err) == (0, "")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert re.search(reason, lines["triton"]), lines["triton"]
    assert lines["triton"].startswith(kind)
    assert lines["auto on cpu"] == f"eager, because triton cannot run: the package triton is {lines['triton']}"

    status, out, err = answer["tune"]
    assert (status, out) == (1, "")
    assert f"the package triton is {lines['triton']}" in err
    status, out, err = answer["show"]
    assert (status, err) == (0, "")
    assert "heuristic" in out
    if case in CLOSELY:
        status, out, err = answer["compiled"]
        assert (status, out) == (1, "")
        assert f"the package triton is {lines['triton']}" in err
        assert answer["overhead"] == f"the package triton is {lines['triton']}"


def test_a_good_one_has_no_fault() -> None:
    """Else the tests of kernels would be passed over, all of them and without a word."""
    triton = pytest.importorskip("triton")
    assert triton_fault() is None
    assert triton_version() == triton.__version__


def test_the_oldest_triton_is_the_one_that_is_asked_for() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"triton>={".".join(map(str, MIN_TRITON))}"' in project
