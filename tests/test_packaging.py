"""What a user installs: the wheel, alone, in another folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution, so that both hold everything."""
    folder = tmp_path_factory.mktemp("dist")
    tracked = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split("\n")
    source = tmp_path_factory.mktemp("source")  # building in place would leave build/ and egg-info behind
    for name in tracked:
        if (ROOT / name).is_file() and not name.startswith("tests/golden/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    assert list(folder.glob("*.tar.gz"))
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {f for f in folders if not f.endswith(".dist-info")} == {"dyreg_triton"}  # no top-level `kernels`
    for module in sorted((ROOT / "kernels").glob("*.py")):
        assert f"dyreg_triton/kernels/{module.name}" in names
    for module in sorted((ROOT / "dyreg_triton").rglob("*.py")):
        name = module.relative_to(ROOT).as_posix()
        if name != "dyreg_triton/kernels/__init__.py":  # the bridge is for checkouts
            assert name in names
    assert "dyreg_triton/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_op_runs_from_the_installed_wheel_alone(wheel, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    code = (
        "import torch, dyreg_triton as dt\n"
        "from dyreg_triton.kernels import region\n"
        "with dt.backend('triton'):\n"
        "    x = torch.ones(2, 3, 5, 6)\n"
        "    y = dt.ops.region_pool(x, torch.tensor([2.0, 2.0, 2.0, 2.0]).expand(2, 4, 4))\n"
        "assert torch.allclose(y, torch.ones(2, 4, 3)), y\n"
        "print(dt.__file__, region.__file__, dt.__version__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target), "TRITON_INTERPRET": "1"}
    told = run(sys.executable, "-c", code, cwd=tmp_path, env=environment).split()
    assert told[0] == str(target / "dyreg_triton" / "__init__.py")
    assert told[1] == str(target / "dyreg_triton" / "kernels" / "region.py")
    told = run(sys.executable, "-m", "dyreg_triton", "env", cwd=tmp_path, env=environment)
    assert "auto on cpu: triton" in told
