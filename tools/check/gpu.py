"""Proves the kernels on the GPU of this machine within ten minutes, and says which proofs are still pending.

    python tools/check/gpu.py                     all stages; writes benchmarks/results/gpu_check_<gpu>.json and, next
                                                  to it, what its benchmarks and tools/check/switches.py have found
    python tools/check/gpu.py --only primitives   some stages; results of the others stay if they are of these sources
    python tools/check/gpu.py --status            whether the present sources are proved, and where; needs no GPU

The machine needs torch with CUDA, the packages of `pip install .[dev]`, nvcc, g++ and compute-sanitizer; no network.
Every stage runs in processes of its own under its own time limit, and a stage that fails does not stop the others. The
exit status is 0 if all stages passed, 1 if not, and 2 if there is nothing to run on. On a machine without git, name the
commit by --commit SHA.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]

import sources  # noqa: E402
from sass import find_tool  # noqa: E402

from caco_fast.errors import UserError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "gpu_check"
TOTAL_SECONDS = 570
TESTS_OF_KERNELS = ("tests/gpu", "tests/ops", "tests/emulation", "tests/bank")
OUTPUT_LINES = 40
BENCHMARKS = ("bench_ops", "bench_train", "prove_switches")


@dataclass(frozen=True)
class Stage:
    """Commands run one after the other until one fails."""

    name: str
    claim: str  # what holds if it passes
    limit_s: int
    commands: tuple[tuple[str, ...], ...]
    expected: str = ""  # expression that the output must contain, besides an exit status of 0
    environment: dict[str, str] = field(default_factory=dict)
    proof: bool = True  # False: worth knowing, but not needed for the kernels to be proved


def stages(architecture: str, nvcc: str, sanitizer: str, python: str = sys.executable) -> list[Stage]:
    """The stages for a GPU of this architecture ("90"), the most important one first."""
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
    some = r"\d+ passed"
    # By file: other files in these folders may import packages that such a machine lacks.
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    of_kernels = [name for name in map(relative, marked) if name.startswith(TESTS_OF_KERNELS)]
    elsewhere = [name for name in map(relative, marked) if name not in of_kernels]

    def sanitized(tool: str, claim: str, clean: str) -> Stage:
        check = (sanitizer, "--tool", tool, "--error-exitcode", "9", kernel_filter(sanitizer), "kns=caco")
        selftest = (python, "-m", "caco_fast.selftest", "--small")
        # One allocation per tensor, or the checker cannot see where one ends.
        return Stage(tool, claim, 70, ((*check, *selftest),), clean, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    return [
        Stage("build", "the kernels compile here", 120, ((python, "setup.py", "build_ext"),)),
        Stage("selftest", "each operation agrees with its formula", 45, ((python, "-m", "caco_fast.selftest"),)),
        Stage(
            "primitives",
            "each primitive does on the device what its emulation does",
            60,
            tuple(
                command
                for path in reversed(paths_run(architecture, kernel_paths()))  # the GPU's own first
                for command in commands_of_primitives(path, architecture, nvcc)
            ),
        ),
        Stage("tests", "all tests of the operations on a device pass", 110, ((*pytest, *of_kernels),), some),
        Stage(
            "benchmark",
            "times, memory and shares of the card's ceilings are measured",
            120,
            (
                (python, "tools/bench/ops.py", "bank", "--device", "cuda", "--seconds", "80")
                + ("--output", str(WORK / "bench_ops_cuda.json")),
            ),
            proof=False,
        ),
        sanitized("memcheck", "no access out of bounds", r"ERROR SUMMARY: 0 errors"),
        sanitized("racecheck", "no race in shared memory", r"RACECHECK SUMMARY: 0 hazards"),
        Stage(
            "step benchmark",
            "pairs/s and the split of whole steps: CaCo, MoCo v2, CaCo as released",
            90,
            (
                (python, "tools/bench/step.py", "--config", "caco_fast/configs/imagenet_resnet50_200ep_batch1024.yaml")
                + ("--batch", "128", "256", "--rounds", "4", "--seconds", "30", "trainer.device=cuda")
                + ("--output", str(WORK / "bench_train_cuda.json")),
            ),
            proof=False,
        ),
        Stage(
            "CUDA graph",
            "50 steps replayed from a CUDA graph have the losses of steps launched kernel by kernel",
            60,
            (
                (python, "tools/check/switches.py", "--switches", "graph", "--precision", "bf16", "fp16")
                + ("trainer.device=cuda", "--output", str(WORK / "prove_switches_cuda.json")),
            ),
            proof=False,
        ),
        Stage("other tests", "gpu tests of other parts pass", 100, ((*pytest, *elsewhere),), some, proof=False),
    ]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands_of_primitives(path: str, architecture: str, nvcc: str) -> tuple[tuple[str, ...], ...]:
    """Build the program of the path's primitives twice; the emulated one writes its results, the device compares."""
    source = str(ROOT / "tests" / "emulation" / f"primitives_check_{path}.cu")
    emulated, device, written = (str(WORK / f"primitives_{path}_{kind}") for kind in ("emulated", "device", "results"))
    common = ("-std=c++20", "-O2", f"-I{sources.ROOT}")
    # Hopper's own instructions need the target 90a.
    target = "90a" if architecture == "90" else architecture
    return (
        ("g++", *common, f"-I{ROOT / 'tests'}", "-pthread", "-DCACO_EMULATE", "-x", "c++", source, "-o", emulated),
        (nvcc, *common, f"-gencode=arch=compute_{target},code=sm_{target}", source, "-o", device),
        (emulated, written),
        (device, written, "compare"),
    )


def kernel_filter(sanitizer: str) -> str:
    """The option that limits compute-sanitizer to some kernels: its name differs between releases."""
    try:
        text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, timeout=30).stdout
    except OSError:
        text = ""
    return "--kernel-regex" if "--kernel-regex" in text and "--kernel-name " not in text else "--kernel-name"


def run_stage(stage: Stage, seconds: float) -> dict[str, Any]:
    """Run a stage within `seconds`. A failure is a result, not an exception. The output goes to build/gpu_check."""
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / f"{stage.name.replace(' ', '_')}.log"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
    start, status = time.monotonic(), "passed"
    with log.open("w") as output:
        for command in stage.commands:
            left = seconds - (time.monotonic() - start)
            status = run_command(command, output, environment, left)
            if status != "passed":
                break
    text = log.read_text(errors="replace")
    if status == "passed" and not re.search(stage.expected, text):
        status = f"failed: the output lacks {stage.expected!r}"
    lines = text.strip().splitlines()
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "limit_s": round(seconds),
        "output": lines[-1:] if status == "passed" and stage.name != "primitives" else lines[-OUTPUT_LINES:],
    }


def run_command(command: tuple[str, ...], output: Any, environment: dict[str, str], seconds: float) -> str:
    if seconds <= 0:
        return "timed out"
    try:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
    except OSError as error:
        return f"failed: {command[0]}: {error.strerror}"
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a session of its own: this ends its children too
        process.wait()
        return "timed out"
    return "passed" if code == 0 else f"failed: {Path(command[0]).name} ended with status {code}"


def run_stages(chosen: list[Stage], total_seconds: float) -> dict[str, dict[str, Any]]:
    """Run the stages; return results by stage name. Each stage gets its limit, or the rest of the total."""
    end, results = time.monotonic() + total_seconds, {}
    for stage in chosen:
        left = end - time.monotonic()
        if left < 5:
            results[stage.name] = {"status": "not run: no time left"}
        else:
            print(f"{stage.name} ...", flush=True)
            results[stage.name] = run_stage(stage, min(stage.limit_s, left))
        result = results[stage.name]
        print(f"{result['status']}: {stage.name} ({result.get('seconds', 0)} s): {stage.claim}", flush=True)
        for line in result.get("output", ()) if result["status"] != "passed" or stage.name == "primitives" else ():
            print(f"    {line}")
    return results


def describe_gpu() -> dict[str, Any]:
    """Return GPU, driver and compilers. Raise a UserError of one line if there is no GPU or no compiler."""
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError("torch is not installed for this Python; --status works without a GPU") from None
    if not torch.cuda.is_available():
        raise UserError("no CUDA GPU on this machine: nothing can be proved here; --status works without one")
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise UserError("nvcc not found in CUDA_HOME, /usr/local/cuda or PATH: the kernels cannot be built here")
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}{minor}",
        "driver": output_of(*query).splitlines()[0] if shutil.which(query[0]) else None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))[1],
        "nvcc_path": nvcc,
    }


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def slug(gpu: str) -> str:
    return re.sub(r"\W+", "_", gpu.lower()).strip("_")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return every gpu_check_*.json of the folder."""
    records = []
    for path in sorted(folder.glob("gpu_check_*.json")):
        try:
            record = json.loads(path.read_text())
            record["settings"]["csrc_hash"], record["results"]["stages"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a result of tools/check/gpu.py; remove it or run the tool again") from None
        records.append(record)
    return records


def status(records: list[dict[str, Any]], present: str, kernel_paths: list[str]) -> tuple[list[str], bool]:
    """Return lines that name the proofs of the sources with hash `present`, and whether every path is proved."""
    needed = {stage.name: stage for stage in stages("0", "nvcc", "")}
    lines, proved_paths = [f"csrc/ has the content hash {present}"], set()
    for record in records:
        settings, results = record["settings"], record["results"]["stages"]
        where = f"{settings['gpu']}, driver {settings['driver']}, nvcc {settings['nvcc']}, {record['time'][:10]}"
        if settings["csrc_hash"] != present:
            lines.append(f"of other sources ({settings['csrc_hash']}): {where}; proves nothing about the present ones")
            continue
        pending = {name: results.get(name, {}).get("status", "not run") for name in needed}
        pending = {name: found for name, found in pending.items() if found != "passed"}
        lacking = [name for name in pending if needed[name].proof]
        lines.append(f"{'proved in part' if lacking else 'PROVED'} on {where}: {', '.join(settings['paths'])}")
        lines += [f"  pending: {name} ({found}): {needed[name].claim}" for name, found in pending.items()]
        if not lacking:
            proved_paths.update(settings["paths"])
    for path in kernel_paths:
        if path not in proved_paths:
            lines.append(f"pending: {path}: has run under emulation only, or not all of its proofs hold on a GPU")
    if not proved_paths:
        lines += [f"  {stage.name}: {stage.claim}" for stage in needed.values()]
    return lines, set(kernel_paths) <= proved_paths


def kernel_paths() -> list[str]:
    """Return the names of the kernel paths. Each has its tiles in a file of csrc/tiles/."""
    return sorted(path.stem for path in (sources.ROOT / "tiles").glob("sm*.cuh"))


def paths_run(capability: str, present: list[str]) -> list[str]:
    """Return the paths of `present` that a GPU of this compute capability runs; tests/gpu runs every one of them."""
    number = int(capability)
    runs = {"sm70": 70 <= number < 80, "sm80": number >= 80, "sm90": number == 90}
    return [path for path in present if runs.get(path)]


def check(options: argparse.Namespace) -> int:
    start = time.monotonic()
    gpu = describe_gpu()
    todo = stages(gpu["capability"], gpu.pop("nvcc_path"), find_tool("compute-sanitizer") or "compute-sanitizer")
    if unknown := set(options.only) - {stage.name for stage in todo}:
        names = ", ".join(stage.name for stage in todo)
        raise UserError(f"--only: found {sorted(unknown)[0]!r}, expected one of: {names}")
    todo = [stage for stage in todo if not options.only or stage.name in options.only]
    output = options.output or RESULTS / f"gpu_check_{slug(gpu['gpu'])}.json"
    present = sources.content_hash()
    kept: dict[str, Any] = {}
    if output.exists() and options.only:
        before = json.loads(output.read_text())
        if before["settings"]["csrc_hash"] == present:
            kept = before["results"]["stages"]

    for name in BENCHMARKS:
        (WORK / f"{name}_cuda.json").unlink(missing_ok=True)
    found = run_stages(todo, options.seconds - (time.monotonic() - start))
    results: dict[str, Any] = {"stages": {**kept, **found}, "benchmarks": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS:
        if (WORK / f"{name}_cuda.json").exists():
            results["benchmarks"].append(f"{name}_{slug(gpu['gpu'])}.json")
            shutil.copy(WORK / f"{name}_cuda.json", output.parent / results["benchmarks"][-1])
    from caco_fast.benchmarking import write_result

    settings = {**gpu, "csrc_hash": present, "paths": paths_run(gpu["capability"], kernel_paths())}
    path = write_result(output, settings={**settings, "commit_named": options.commit}, results=results)
    print(f"written to {path}")
    return 0 if all(result["status"] == "passed" for result in found.values()) else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--status", action="store_true", help="print what is proved and run nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="run these stages only")
    parser.add_argument("--output", type=Path, help="JSON file, default benchmarks/results/gpu_check_<gpu>.json")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="time limit of all stages together")
    parser.add_argument("--commit", help="commit of these sources, if git cannot tell")
    options = parser.parse_args(arguments)
    if options.status:
        lines, proved = status(read_results(RESULTS), sources.content_hash(), kernel_paths())
        print("\n".join(lines))
        return 0 if proved else 1
    return check(options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
