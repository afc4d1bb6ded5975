"""What every benchmark records beside its figures: machine, versions, commit, and how the figures were taken."""

import functools
import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from caco_fast import __version__

ROOT = Path(__file__).resolve().parent.parent


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Processor, cores, torch's threads, load, main memory in GiB, and the GPU where the device is one."""
    record: dict[str, Any] = {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
    }
    memory = _first_value("/proc/meminfo", "MemTotal")
    if memory:
        record["memory_gib"] = round(int(memory.split()[0]) / 2**20, 1)
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = properties.name
        record["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        record["gpu_count"] = torch.cuda.device_count()
    return record


def versions() -> dict[str, str | None]:
    return {
        "caco_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }


def commit() -> dict[str, Any]:
    """The commit of the source tree, and whether files differ from it; None where this is no git checkout."""
    head = _git("rev-parse", "HEAD")
    return {"commit": head, "dirty": None if head is None else bool(_git("status", "--porcelain"))}


@functools.cache
def content_hash() -> str:
    """SHA-256 over names and bytes of the package's and the kernels' sources: what was measured, commit or not."""
    digest = hashlib.sha256()
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h"}
    for folder in ("caco_fast", "csrc", "tools"):
        for path in sorted(file for file in (ROOT / folder).rglob("*") if file.suffix in kinds):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_result(
    path: str | Path, *, settings: dict[str, Any], results: Any, device: str | torch.device = "cpu"
) -> Path:
    """Write figures and their circumstances as JSON, whole or not at all. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": path.stem,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        **commit(),
        "content_sha256": content_hash(),
        "settings": settings,
        "results": results,
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)
    return path


def synchronize(device: str | torch.device) -> None:
    """Wait for the device, so that a clock read now is the end of the work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 6) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p20", "p80"), round(values[0], digits))
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    figures = {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}
    return {name: round(value, digits) for name, value in figures.items()}


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _first_value(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
