"""The shared part of the scripts in tools/ that measure: options, results as JSON, clocks.

A result holds, besides its figures, the machine, the versions, the commit and the settings that they were taken with.
The module is in the package because scripts of two folders import it.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch

from caco_fast import provenance
from caco_fast.errors import UserError
from caco_fast.provenance import commit, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class Bench:
    """The command line of a script that measures: its own options, --output, and --table to print a result again."""

    def __init__(self, description: str | None, table: Callable[[dict[str, Any]], str], output: str) -> None:
        """table: a result as Markdown. output: the name of the default result in benchmarks/results, for the help."""
        self.table = table
        form = argparse.RawDescriptionHelpFormatter
        self.parser = argparse.ArgumentParser(description=description, formatter_class=form)
        self.parser.add_argument("--output", type=Path, help=f"JSON file, default benchmarks/results/{output}")
        self.parser.add_argument(
            "--table", type=Path, metavar="JSON", help="print a result as Markdown and do nothing else"
        )

    def parse(self, arguments: Sequence[str] | None = None, positive: Sequence[str] = ()) -> argparse.Namespace:
        """The options. With --table the result is printed and the script ends. positive: options of 1 or more."""
        options = self.parser.parse_intermixed_args(arguments)
        if options.table:
            print(self.table(read_result(options.table)))
            sys.exit(0)
        for name in positive:
            if getattr(options, name) < 1:
                self.parser.error(f"--{name.replace('_', '-')}: found {getattr(options, name)}, expected 1 or more")
        return options

    def show(self, path: Path) -> None:
        """Print the table of a written result, and where the result is."""
        print(f"{self.table(read_result(path))}\n\nwritten to {path}", flush=True)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its status, or with status 2 and one line after a UserError."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """A folder with another commit of this repository, which is removed at the end; for options `--base REF`."""

    def git(*arguments: str) -> None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise UserError(f"--base {ref}: {' '.join(done.stderr.split())}")

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "base")
        git("worktree", "add", "--detach", str(tree), ref)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def machine() -> dict[str, Any]:
    """The machine, and how busy it was: figures from a shared machine are worth less."""
    return {**provenance.hardware(), "load_average_1_min": round(os.getloadavg()[0], 2)}


@functools.cache
def content_hash() -> str:
    """SHA-256 over names and bytes of all sources: this is what was measured."""
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
    """What `write_result` wrote. A missing file is a UserError."""
    if not path.is_file():
        raise UserError(f"--table {path}: no such file; run this tool without --table to make one")
    return json.loads(path.read_text())


def _script() -> str:
    """The running script, as a path within the checkout if it is there."""
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
