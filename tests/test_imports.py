"""Imports go one way: import-linter's contracts of pyproject.toml see an import that does not, wherever it stands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is needed to check imports")
ROOT = Path(__file__).resolve().parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    return subprocess.run([*command, "--no-cache", "--no-logo"], cwd=folder, capture_output=True, encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("dyreg_triton", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "line", "told"),
    [
        ("ops/launch.py", "from ..tuning import tuner", "dyreg_triton.ops -> dyreg_triton.tuning"),
        ("_core/gpu.py", "from ..configs import files", "dyreg_triton._core -> dyreg_triton.configs"),
        ("layers/rsa.py", "from ..compat import build", "dyreg_triton.layers -> dyreg_triton.compat"),
        ("configs/keys.py", "from .lookup import config", "configs"),
        ("ops/flops.py", "from bench import rows", "bench"),
    ],
)
def test_an_import_the_wrong_way_is_seen(checkout: Path, place: str, line: str, told: str) -> None:
    """Also one inside of a function."""
    path = checkout / "dyreg_triton" / place
    former = path.read_text(encoding="utf-8")
    path.write_text(f"{former}\n\ndef late():\n    {line}\n", encoding="utf-8")
    try:
        done = lint(checkout)
    finally:
        path.write_text(former, encoding="utf-8")
    assert done.returncode == 1, done.stdout
    assert "1 broken" in done.stdout or "2 broken" in done.stdout, done.stdout
    source = f"dyreg_triton.{place.removesuffix('.py').replace('/', '.')}"
    assert source in done.stdout or told in done.stdout, done.stdout


@pytest.mark.slow
def test_as_they_are(checkout: Path) -> None:
    done = lint(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
