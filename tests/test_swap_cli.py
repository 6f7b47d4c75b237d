"""`python -m dyreg_triton swap package.module:factory --example ...`"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import PATIENCE
from swap_cases import SWAPPED

from dyreg_triton.cli import main

MODELS = """
import published
import torch
from torch import nn

def clips():
    return published.RSANet()

def attention():
    return nn.Sequential(published.RSA(3, 4, nh=2, dk=4, kernel_size=(3, 3, 3)))

def images():
    return published.TSN()

def reading():
    return published.TSN(reads=True)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = published.RSANet()

    def forward(self, x, y):
        return self.net(x) + y

def plain():
    return nn.Linear(3, 3)

def broken():
    raise OSError("no weights here")

def needy(path):
    return nn.Linear(3, 3)

def number():
    return 5

instance = published.RSANet()
count = 3
"""
# as the authors': the command line is read at import, and train() returns nothing
PARSING = """
import argparse
import published

parser = argparse.ArgumentParser()
parser.add_argument("--channels", type=int, default=4)
args = parser.parse_args()

class Net(published.RSANet):
    def __init__(self):
        super().__init__(channels=args.channels)

    def train(self, mode=True):
        super().train(mode)
"""
CLIP = "2,3,3,6,5"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with somebody's models, which is the current one and on no path."""
    package = tmp_path / "somebody"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "models.py").write_text(MODELS)
    (package / "parsing.py").write_text(PARSING)
    (package / "faulty.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for name in [name for name in sys.modules if name.split(".")[0] == "somebody"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "somebody"]:
        del sys.modules[name]


def swap(*arguments: str) -> int:
    """The exit status, whether returned or raised."""
    try:
        return main(["swap", *arguments])
    except SystemExit as end:
        return int(str(end.code))


GOOD = {
    "a factory": (["somebody.models:clips", "--example", CLIP], SWAPPED["rsa net"]),
    "a module": (["somebody.models:instance", "--example", CLIP], SWAPPED["rsa net"]),
    "a class": (
        ["somebody.models:Two", "--example", CLIP, "--example", "2,4"],
        ["net." + p for p in SWAPPED["rsa net"]],
    ),
    "images": (["somebody.models:images", "--example", "2,2,3,7,7"], SWAPPED["tsn"]),
    "in float64": (["somebody.models:clips", "--example", CLIP, "--dtype", "float64"], SWAPPED["rsa net"]),
    "in bfloat16": (["somebody.models:attention", "--example", CLIP, "--dtype", "bfloat16"], ["0"]),
    "on the cpu": (["somebody.models:clips", "--example", CLIP, "--device", "cpu"], SWAPPED["rsa net"]),
    "one of them": (["somebody.models:clips", "--example", CLIP, "--only", "layer2"], SWAPPED["rsa net"][1:]),
    "two by name": (["somebody.models:clips", "--example", CLIP, "--only", "layer1", "*2.0.conv2"], SWAPPED["rsa net"]),
    "one and one": (
        ["somebody.models:clips", "--only", "layer1", "--only", "layer2", "--example", CLIP],
        SWAPPED["rsa net"],
    ),
    "one that reads its command line": (["somebody.parsing:Net", "--example", CLIP], SWAPPED["rsa net"]),
    "one that is given some": (
        ["somebody.parsing:Net", "--example", CLIP, "--only", "layer2", "--", "--channels", "12"],
        SWAPPED["rsa net"][1:],
    ),
    "with regions": (["somebody.models:reading", "--example", "2,2,3,7,7", "--keep-regions"], SWAPPED["tsn"]),
}


@pytest.mark.parametrize("case", GOOD)
def test_prints_the_report(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, paths = GOOD[case]
    dtype = torch.get_default_dtype()
    assert swap(*arguments) == 0
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if any(word in paths for word in line.split())]
    assert len(rows) == len(paths)
    assert "ms" in out
    others = {path for found in SWAPPED.values() for path in found} - set(paths)
    assert not [line for line in out.splitlines() if others & set(line.split())]
    assert "Traceback" not in err
    assert torch.get_default_dtype() == dtype
    assert "somebody" not in sys.argv[0]


REFUSED = {
    "no such module": (["nobody.models:clips", "--example", CLIP], 1, "nobody"),
    "no such name": (["somebody.models:clip", "--example", CLIP], 1, "clip"),
    "an import that fails": (["somebody.faulty:clips", "--example", CLIP], 1, "no_such_package"),
    "a factory that fails": (["somebody.models:broken", "--example", CLIP], 1, "no weights here"),
    "a factory with arguments": (["somebody.models:needy", "--example", CLIP], 1, "needy"),
    "no model": (["somebody.models:number", "--example", CLIP], 1, "somebody.models:number"),
    "no factory": (["somebody.models:count", "--example", CLIP], 1, "somebody.models:count"),
    "an import that exits": (["somebody.parsing:Net", "--example", CLIP, "--", "--chanels", "12"], 1, "--chanels"),
    "nothing to swap": (["somebody.models:plain", "--example", "2,3"], 1, "RSA"),
    "another shape": (["somebody.models:clips", "--example", "2,4,3,6,5"], 1, "example"),
    "too few inputs": (["somebody.models:Two", "--example", CLIP], 1, "example"),
    "only what is not there": (["somebody.models:clips", "--example", CLIP, "--only", "layer7"], 1, "layer7"),
    "half on the cpu": (["somebody.models:clips", "--example", CLIP, "--dtype", "float16"], 1, "float16"),
    "reads regions": (["somebody.models:reading", "--example", "2,2,3,7,7"], 1, "keep_regions"),
    "no colon": (["somebody.models.clips", "--example", CLIP], 2, "somebody.models.clips"),
    "no name": (["somebody.models:", "--example", CLIP], 2, "somebody.models:"),
    "words for numbers": (["somebody.models:clips", "--example", "2,three"], 2, "2,three"),
    "an empty example": (["somebody.models:clips", "--example", ""], 2, "--example"),
    "a negative size": (["somebody.models:clips", "--example=2,-3,3,6,5"], 2, "-3"),
    "no such dtype": (["somebody.models:clips", "--example", CLIP, "--dtype", "float31"], 2, "float31"),
    "an integer dtype": (["somebody.models:clips", "--example", CLIP, "--dtype", "int64"], 2, "int64"),
    "no such device": (["somebody.models:clips", "--example", CLIP, "--device", "abacus"], 2, "abacus"),
    "no such option": (["somebody.models:clips", "--example", CLIP, "--onyl", "RSA"], 2, "--onyl"),
    "no model named": (["--example", CLIP], 2, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, status, part = REFUSED[case]
    assert swap(*arguments) == status
    out, err = capsys.readouterr()
    assert part in err
    assert "Traceback" not in err
    assert not out


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert swap("somebody.models:clips", "--example", CLIP, "--device", "cuda") in (1, 2)
    assert "cuda" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    """`python -m` puts the current folder on the path by itself; the installed command does not."""
    tests = Path(__file__).resolve().parent
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}

    command = [sys.executable, "-m", "dyreg_triton", "swap", "somebody.models:clips", "--example", CLIP]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert all(path in done.stdout for path in SWAPPED["rsa net"])
