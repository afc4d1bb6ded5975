"""Where a result comes from: commit, versions, machine, command line."""

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import caco_fast

PACKAGES = ("torch", "torchvision", "timm", "numpy", "omegaconf")


def commit() -> dict[str, Any]:
    """`{"commit": sha or None, "dirty": bool or None}` of the checkout this package runs from; None outside of one."""
    root = Path(caco_fast.__file__).resolve().parent.parent
    # An installed copy may lie inside somebody else's checkout (a .venv in it): that commit is not ours.
    if _git(root, "ls-files", "--error-unmatch", "caco_fast/__init__.py") is None:
        return {"commit": None, "dirty": None}
    status = _git(root, "status", "--porcelain")
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str | None]:
    """Versions of caco_fast, Python and the packages that results depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"caco_fast": caco_fast.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Host, system, processor, memory, threads, and the GPUs with the CUDA version that torch was built for."""
    gpus = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def command_line() -> str:
    return shlex.join([sys.executable, *sys.argv])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
