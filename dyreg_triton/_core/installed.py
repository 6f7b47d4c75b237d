"""Whether the package triton that is here can be used: one predicate, which says why where it cannot.

Stubs, leftovers and half installations are found where other software puts them in its place; each counts as none.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from types import ModuleType

MIN_TRITON = (3, 6)
# Some of what kernels and launches take from it, by module: whoever has these has the rest.
NEEDED = {
    "triton": ("jit", "knobs"),
    "triton.language": ("constexpr", "dot", "load", "store"),
    "triton.runtime": ("JITFunction", "driver"),
}


@functools.cache
def triton_fault() -> str | None:
    """None where the package triton can be used, else what it is instead, to be read after "the package triton is".

    It is imported for that, which takes a while: only those ask who would use it, or have refused to already.
    """
    try:
        return _fault(importlib.import_module("triton"))
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "not installed" + (": sys.modules forbids its import" if "triton" in sys.modules else "")
        return _broken(error)
    except Exception as error:  # a shared library that does not load raises what it likes
        return _broken(error)


def triton_version() -> str:
    """Its version where it can be used, else what it is instead."""
    # asked of the module: builds for other GPUs come under other package names
    return triton_fault() or importlib.import_module("triton").__version__


def _broken(error: Exception) -> str:
    told = (str(error).splitlines() or [""])[0]
    return f"broken: its import raises {type(error).__name__}: {told}"


def _fault(triton: ModuleType) -> str | None:
    folders = list(getattr(triton, "__path__", ()))
    if not folders:
        return f"a stub: {triton!r:.200} has no submodules"
    if getattr(triton, "__file__", None) is None:
        return f"not installed: of that name there is only the folder {folders[0]}, without its code"
    version = getattr(triton, "__version__", None)
    release = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if release is None:
        return f"incomplete: its __version__ is {version!r:.200}"
    if tuple(map(int, release.groups())) < MIN_TRITON:
        return f"too old: it is {version}, and the kernels need {'.'.join(map(str, MIN_TRITON))} or later"
    for name, parts in NEEDED.items():
        module = importlib.import_module(name)
        for part in parts:
            if not hasattr(module, part):
                return f"incomplete: {name} has no {part}"
    return None
