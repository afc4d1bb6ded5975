#!/usr/bin/env python3
"""Proves the kernels on the GPU of this machine, and says which proofs are still pending.

    python tools/check/gpu.py --quick --output FOLDER   four minutes: are the kernels right, and how fast are they?
    python tools/check/gpu.py --rest --output FOLDER    seven minutes more: everything else
    python tools/check/gpu.py                           both, as far as ten minutes reach
    python tools/check/gpu.py --only headline profile   some stages
    python tools/check/gpu.py --status [--output FOLDER]   what is proved of the present sources; needs no GPU
    python tools/check/gpu.py --collect-wheels          packages that such a machine may lack, into build/wheels

The folder receives, after every stage, gpu_check_<gpu>*.json, and as it is printed log*.txt; also what the benchmarks
write, the profile, and clocks and power of the GPU. Without --output results go to benchmarks/results, and logs to
build/gpu_check. Proofs of the same sources add up over calls and files.

Every stage runs in processes of its own under its own time limit, and a stage that fails does not stop the others. A
stage that runs out of time has not failed: its proof stays pending. The exit status is 0 if all stages passed, 1 if one
failed, 3 if none failed but some are pending, and 2 if there is nothing to run on.

The machine needs torch with CUDA, pytest, ninja, pybind11, nvcc, g++, ncu and compute-sanitizer; no network. On a
machine without git, name the commit by --commit SHA. docs/gpu_check.md says how to use a GPU that is there for minutes.
"""

import argparse
import importlib
import importlib.metadata
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]

import sources  # noqa: E402
from gpu_run import Result, Runner, counts, merged  # noqa: E402
from gpu_stages import (  # noqa: E402
    ALL_SECONDS,
    QUICK_SECONDS,
    REST_SECONDS,
    WORK,
    Machine,
    Stage,
    kernel_paths,
    quick,
    rest,
    stages,
    where_it_waits,
)
from gpu_status import read_results, status  # noqa: E402
from sass import find_tool  # noqa: E402

from caco_fast.errors import UserError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CALLS = {
    "": (stages, ALL_SECONDS),
    "quick": (quick, QUICK_SECONDS),
    "rest": (rest, REST_SECONDS),
}


def describe_gpu() -> dict[str, Any]:
    """GPU, driver and compilers, without loading torch: the build is to start at once.

    Raises:
        UserError: no GPU or no compiler.
    """
    query = ("nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader")
    found = output_of(*query) if shutil.which(query[0]) else ""
    if not found:
        raise UserError("no CUDA GPU on this machine: nothing can be proved here; --status works without one")
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("torch is not installed for this Python; --status works without a GPU") from None
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise UserError("nvcc not found in CUDA_HOME, /usr/local/cuda or PATH: the kernels cannot be built here")
    gpu, capability, driver, memory = found.splitlines()[0].split(", ")
    release = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))
    return {
        "gpu": gpu,
        "capability": capability.replace(".", ""),
        "driver": driver,
        "memory": memory,
        "torch": torch,
        "nvcc": release and release[1],
    }


def output_of(*command: str) -> str:
    """What a program prints; nothing if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def slug(gpu: str) -> str:
    return re.sub(r"\W+", "_", gpu.lower()).strip("_")


def describe_machine(gpu: dict[str, Any], output: Path) -> Machine:
    sanitizer = find_tool("compute-sanitizer") or "compute-sanitizer"
    # The option that limits it to some kernels has another name in some releases.
    text = output_of(sanitizer, "--help") if shutil.which(sanitizer) else ""
    regex = "--kernel-regex" in text and "--kernel-name " not in text
    return Machine(
        gpu["capability"],
        slug(gpu["gpu"]),
        output,
        find_tool("nvcc") or "nvcc",
        sanitizer,
        "--kernel-regex" if regex else "--kernel-name",
        find_tool("ncu") or "ncu",
    )


def check(options: argparse.Namespace) -> int:
    start = time.monotonic()
    gpu = describe_gpu()
    call = next((name for name in ("quick", "rest") if getattr(options, name)), "")
    of_call, seconds = CALLS[call]
    machine = describe_machine(gpu, options.output or RESULTS)
    machine.output.mkdir(parents=True, exist_ok=True)
    todo = chosen(of_call(machine), options.only)
    suffix = f"_{call}" if call else ""
    record = machine.output / f"gpu_check_{machine.gpu}{suffix}.json"
    present = sources.content_hash()
    settings = {**gpu, "csrc_hash": present, "paths": machine.paths, "call": call or "all"}
    settings["commit_named"] = options.commit
    before = {}
    for earlier in read_results(machine.output) if record.exists() else []:
        if earlier["benchmark"] == record.stem and earlier["settings"]["csrc_hash"] == present:
            before = earlier["results"]["stages"]

    # It loads torch, which takes seconds: beside the build.
    loading = threading.Thread(target=importlib.import_module, args=("caco_fast.benchmarking",), daemon=True)
    loading.start()

    def keep(found: dict[str, Result]) -> None:
        loading.join()
        from caco_fast.benchmarking import write_result

        together = merged(before, found)
        written = sorted(path.name for path in machine.output.glob(f"*_{machine.gpu}*.json"))
        files = [name for name in written if not name.startswith("gpu_check")]
        results = {"stages": together, "counts": counts(together), "files": files}
        write_result(record, settings=settings, results=results)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runner = Runner(options.output or WORK, (options.seconds or seconds) - (time.monotonic() - start), suffix)
    found = runner.run(todo, keep, where_it_waits(machine) if machine.target == "90a" else None)
    ended = counts(found)
    print(", ".join(f"{number} {name}" for name, number in ended.items()) + f"; written to {record}", flush=True)
    return 1 if ended["failed"] else 0 if ended["passed"] == len(found) else 3


def chosen(todo: list[Stage], names: list[str]) -> list[Stage]:
    if unknown := set(names) - {stage.name for stage in todo}:
        known = ", ".join(stage.name for stage in todo)
        raise UserError(f"--only: found {sorted(unknown)[0]!r}, expected one of: {known}")
    return [stage for stage in todo if not names or stage.name in names]


def collect_wheels() -> int:
    """Bring omegaconf, which whole steps need, as a wheel: it is of pure Python, so its wheel works on any machine."""
    folder = ROOT / "build" / "wheels"
    version = importlib.metadata.version("omegaconf")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder)]
    if subprocess.run([*command, f"omegaconf=={version}"]).returncode:
        raise UserError(f"--collect-wheels: pip could not bring omegaconf {version}; its message is above")
    print("\n".join(sorted(path.name for path in folder.glob("*.whl"))) + f"\nin {folder.relative_to(ROOT)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    call = parser.add_mutually_exclusive_group()
    call.add_argument("--quick", action="store_true", help=f"correctness and first figures, {QUICK_SECONDS} s")
    call.add_argument("--rest", action="store_true", help=f"what --quick leaves, {REST_SECONDS} s")
    call.add_argument("--status", action="store_true", help="print what is proved and run nothing")
    call.add_argument("--collect-wheels", action="store_true", help="bring what such a machine may lack")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="run these stages only")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for results and logs")
    parser.add_argument("--seconds", type=float, help="time limit of all stages together")
    parser.add_argument("--commit", help="commit of these sources, if git cannot tell")
    options = parser.parse_args(arguments)
    if options.output and options.output.suffix == ".json":
        parser.error(f"--output: found {options.output}, expected a folder")
    if options.status:
        folders = [RESULTS, *([options.output] if options.output else [])]
        lines, proved = status(read_results(*folders), sources.content_hash(), kernel_paths())
        print("\n".join(lines))
        return 0 if proved else 1
    return collect_wheels() if options.collect_wheels else check(options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
