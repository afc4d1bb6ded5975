"""What every benchmark records beside its figures: machine, versions, commit, and how the figures were taken."""

import functools
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from caco_fast import provenance
from caco_fast.errors import UserError
from caco_fast.provenance import commit, versions

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """The machine, and how busy it was: figures from a shared machine are worth less."""
    return {**provenance.hardware(), "load_average_1_min": round(os.getloadavg()[0], 2)}


@functools.cache
def content_hash() -> str:
    """SHA-256 over names and bytes of the package's and the kernels' sources: what was measured, commit or not."""
    digest = hashlib.sha256()
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h"}
    for folder in ("caco_fast", "csrc", "tools"):
        for path in sorted(file for file in (ROOT / folder).rglob("*") if file.suffix in kinds):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_result(path: str | Path, *, settings: dict[str, Any], results: Any) -> Path:
    """Write figures and their circumstances as JSON, whole or not at all. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": path.stem,
        "script": _script(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
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


def read_result(path: Path) -> dict[str, Any]:
    """What `write_result` wrote. UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"--table {path}: no such file, run this tool without --table to make one")
    return json.loads(path.read_text())


def _script() -> str:
    """The running script, as a path within the checkout where it lies in it."""
    script = Path(sys.argv[0]).resolve()
    return str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name


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
