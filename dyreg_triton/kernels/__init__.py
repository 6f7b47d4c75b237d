"""Bridge: in a checkout the kernels live in the top-level folder `kernels/`; an installed package has them here."""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
