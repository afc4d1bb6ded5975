"""The origin of a result: commit, versions, hardware and command line."""

import hashlib
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

PACKAGES = ("caco_fast", "torch", "torchvision", "timm", "numpy", "omegaconf")
# Of the checkout, if this package runs from one.
ROOT = Path(__file__).resolve().parents[1]


def commit() -> dict[str, Any]:
    """`{"commit": sha, "dirty": bool}` of the checkout that this package runs from; both are None outside of one."""
    # An installed copy may lie inside another project's checkout (in its .venv): that commit is not ours.
    if _git("ls-files", "--error-unmatch", "caco_fast/__init__.py") is None:
        return {"commit": None, "dirty": None}
    status = _git("status", "--porcelain")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str | None]:
    """Versions of Python, caco_fast and the packages that results depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def code() -> str:
    """A name for the code that runs: the version of torch, and a hash of this package's Python files."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"torch {torch.__version__}, caco_fast {digest.hexdigest()[:8]}"


def hardware() -> dict[str, Any]:
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


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
