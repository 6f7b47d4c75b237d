"""The command line: `python -m dyreg_triton`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence


def version_of(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _triton_version() -> str:
    # asked of the module: builds for other GPUs come under other package names
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def environment() -> str:
    """What a bug report needs, one `name: value` a line, and which backend `auto` would choose and why."""
    import torch

    from . import __version__
    from .dispatch import BACKENDS, current_backend, why_not

    lines = {
        "dyreg_triton": __version__,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "numpy": version_of("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "cuda": str(torch.version.cuda or torch.version.hip or "none in this build"),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "unset"),
    }
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines[f"gpu {i}"] = (
                f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
                f"{p.total_memory / 2**30:.0f} GiB"
            )
            devices.append(torch.device("cuda", i))
    lines["backend set"] = current_backend()
    for device in devices:
        refusal = why_not("triton", device, torch.float32)
        if refusal is None:
            lines[f"auto on {device}"] = "triton, because it can run"
        else:
            lines[f"auto on {device}"] = f"eager, because triton cannot run: {refusal}"
    lines["backends"] = ", ".join(BACKENDS)
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dyreg-triton", description="Fast, exact layers for video understanding.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("env", help="print what a bug report needs, and which backend would run here and why")
    parser.parse_args(argv)
    print(environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
