"""Imports go one way: import-linter's contracts of pyproject.toml see an import that does not, wherever it stands."""

from __future__ import annotations

import ast
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
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("ops/launch.py", "from ..tuning import tuner"),
        ("_core/gpu.py", "from ..configs import files"),
        ("layers/rsa.py", "from ..compat import build"),
        ("configs/keys.py", "from .lookup import config"),
        ("ops/flops.py", "from bench import rows"),
    ],
)
def test_an_import_the_wrong_way_is_seen(checkout: Path, place: str, line: str, late: bool) -> None:
    """Also one inside of a function."""
    path = checkout / "dyreg_triton" / place
    former = path.read_text(encoding="utf-8")
    planted = f"def late():\n    {line}" if late else line
    path.write_text(f"{former}\n\n{planted}\n", encoding="utf-8")
    try:
        done = lint(checkout)
    finally:
        path.write_text(former, encoding="utf-8")
    assert done.returncode == 1, done.stdout
    told = done.stdout.partition("Broken contracts")[2]
    assert f"dyreg_triton.{place.removesuffix('.py').replace('/', '.')}" in told or ".keys -> .lookup" in told, told


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_need_triton_and_each_other(path: Path) -> None:
    """import-linter does not see them: an installed package has them elsewhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= {"triton"}, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or node.module in ("__future__", "triton"), ast.unparse(node)


@pytest.mark.slow
def test_as_they_are(checkout: Path) -> None:
    done = lint(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
