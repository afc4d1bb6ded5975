"""Proves the kernels on the GPU of this machine, within ten minutes, and says which proofs the sources still lack.

    python tools/check/gpu.py                        all stages; writes benchmarks/results/gpu_check_<gpu>.json and,
                                                     beside it, what its benchmarks and prove_switches found
    python tools/check/gpu.py --only primitives      some stages; the others' results stay, if they are of these sources
    python tools/check/gpu.py --status               are the present sources proved, and where; needs no GPU
    python tools/check/gpu.py --collect-wheels DIR   fetch the Python packages that a bare machine lacks
    python tools/check/gpu.py --wheels DIR           use those that this Python lacks

The machine needs torch with CUDA, numpy, nvcc, g++ and compute-sanitizer; torchvision and pillow for what is no part of
the proof; no network. Every stage runs in processes of its own under its own time limit, and one that fails does not
stop the others. The status is 0 if all stages passed, 1 if not, 2 if there is nothing to run on. On a machine without
git name the commit: --commit SHA.
"""

import argparse
import importlib.metadata
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
SITE = WORK / "site"
TOTAL_SECONDS = 570
TESTS_OF_KERNELS = ("tests/gpu", "tests/ops", "tests/csrc", "tests/bank")
OUTPUT_LINES = 40
BENCHMARKS = ("bench_bank", "bench_optim", "bench_train", "prove_switches")
# What the build, the tests and caco_fast.data import beside torch, torchvision and numpy.
PACKAGES = ("setuptools", "pybind11", "ninja", "pytest", "iniconfig", "pluggy", "packaging", "pygments", "pyyaml")
PACKAGES += ("omegaconf", "timm", "rich", "markdown-it-py", "mdurl")
WHEEL_TARGET = "--only-binary=:all: --python-version 3.12 --implementation cp".split()
WHEEL_TARGET += [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_17", "2014")]


@dataclass(frozen=True)
class Stage:
    """Commands run one after the other until one fails."""

    name: str
    claim: str  # what holds if it passes
    limit_s: int
    commands: tuple[tuple[str, ...], ...]
    wanted: str = ""  # expression that the output must contain besides a status of 0
    environment: dict[str, str] = field(default_factory=dict)
    proof: bool = True  # else worth knowing, but no part of what makes the kernels proved


def stages(architecture: str, nvcc: str, sanitizer: str, python: str = sys.executable) -> list[Stage]:
    """The stages for a GPU of this architecture ("90"), what matters most first."""
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
    some = r"\d+ passed"
    # By file: others in the same folders may import what a bare machine lacks.
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
                + ("--output", str(WORK / "bench_bank_cuda.json")),
            ),
            proof=False,
        ),
        sanitized("memcheck", "no access out of bounds", r"ERROR SUMMARY: 0 errors"),
        sanitized("racecheck", "no race in shared memory", r"RACECHECK SUMMARY: 0 hazards"),
        Stage(
            "optimiser benchmark",
            "times of EMA and LARS: torch's foreach, a loop over tensors, torch.compile",
            100,
            (
                (python, "tools/bench/ops.py", "ema_update", "lars_step", "--device", "cuda")
                + ("--output", str(WORK / "bench_optim_cuda.json")),
            ),
            proof=False,
        ),
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
    """Build the path's program of primitives for both, let the emulated one write its results, the device compare."""
    source = str(ROOT / "tests" / "csrc" / f"primitives_check_{path}.cu")
    emulated, device, written = (str(WORK / f"primitives_{path}_{kind}") for kind in ("emulated", "device", "results"))
    common = ("-std=c++20", "-O2", f"-I{sources.ROOT}")
    # Hopper's own instructions need the target 90a.
    target = "90a" if architecture == "90" else architecture
    return (
        ("g++", *common, "-pthread", "-DCACO_EMULATE", "-x", "c++", source, "-o", emulated),
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
    """Run a stage within `seconds`; never raises for what the stage does. Its whole output goes to build/gpu_check."""
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / f"{stage.name.replace(' ', '_')}.log"
    path = os.pathsep.join(str(folder) for folder in (ROOT, SITE, os.environ.get("PYTHONPATH", "")) if str(folder))
    programs = os.pathsep.join((str(SITE / "bin"), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": programs, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
    start, status = time.monotonic(), "passed"
    with log.open("w") as output:
        for command in stage.commands:
            left = seconds - (time.monotonic() - start)
            status = run_command(command, output, environment, left)
            if status != "passed":
                break
    text = log.read_text(errors="replace")
    if status == "passed" and not re.search(stage.wanted, text):
        status = f"failed: the output lacks {stage.wanted!r}"
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
        os.killpg(process.pid, signal.SIGKILL)  # its own session: with all that it started
        process.wait()
        return "timed out"
    return "passed" if code == 0 else f"failed: {Path(command[0]).name} ended with status {code}"


def run_stages(chosen: list[Stage], total_seconds: float) -> dict[str, dict[str, Any]]:
    """Results by stage name; each stage gets its limit, or what is left of the total."""
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
    """GPU, driver and compilers; UserError in one line where there is no GPU or no compiler."""
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


def install_wheels(folder: Path) -> None:
    """Those whose package this Python lacks into build/gpu_check/site: a second version of one that it has would not
    suit its other packages, such as pytest's plugins."""
    if not folder.is_dir():
        raise UserError(f"--wheels {folder}: no such folder; make one with --collect-wheels where there is a network")
    for wheel in sorted(folder.glob("*.whl")):
        try:
            importlib.metadata.distribution(wheel.name.split("-")[0])
            continue
        except importlib.metadata.PackageNotFoundError:
            pass
        options = ("-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE))
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, str(wheel)], capture_output=True, text=True
        )
        if done.returncode:
            print(f"warning: {wheel.name} is not installed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)


def collect_wheels(folder: Path) -> None:
    """Wheels of PACKAGES for Python 3.12 on Linux x86-64."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, *WHEEL_TARGET, "-d", str(folder), *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--collect-wheels {folder}: pip download failed: {done.stderr.strip().splitlines()[-1]}")
    wheels = list(folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) / 2**20:.1f} MiB, in {folder}")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every gpu_check_*.json of the folder."""
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
    """Lines on what the sources with hash `present` are proved by, and whether every kernel path is proved."""
    wanted = {stage.name: stage for stage in stages("0", "nvcc", "")}
    lines, proved_paths = [f"csrc/ has the content hash {present}"], set()
    for record in records:
        settings, results = record["settings"], record["results"]["stages"]
        where = f"{settings['gpu']}, driver {settings['driver']}, nvcc {settings['nvcc']}, {record['time'][:10]}"
        if settings["csrc_hash"] != present:
            lines.append(f"of other sources ({settings['csrc_hash']}): {where}; proves nothing about the present ones")
            continue
        pending = {name: results.get(name, {}).get("status", "not run") for name in wanted}
        pending = {name: found for name, found in pending.items() if found != "passed"}
        lacking = [name for name in pending if wanted[name].proof]
        lines.append(f"{'proved in part' if lacking else 'PROVED'} on {where}: {', '.join(settings['paths'])}")
        lines += [f"  pending: {name} ({found}): {wanted[name].claim}" for name, found in pending.items()]
        if not lacking:
            proved_paths.update(settings["paths"])
    for path in kernel_paths:
        if path not in proved_paths:
            lines.append(f"pending: {path}: has run under emulation only, or not all of its proofs hold on a GPU")
    if not proved_paths:
        lines += [f"  {stage.name}: {stage.claim}" for stage in wanted.values()]
    return lines, set(kernel_paths) <= proved_paths


def kernel_paths() -> list[str]:
    """Names of the kernel paths, one folder of csrc/ each."""
    return sorted(folder.name for folder in sources.ROOT.glob("sm*") if folder.is_dir())


def paths_run(capability: str, present: list[str]) -> list[str]:
    """Those that a check on a GPU of this compute capability runs; tests/gpu runs every one."""
    number = int(capability)
    runs = {"sm70": 70 <= number < 80, "sm80": number >= 80, "sm90": number == 90}
    return [path for path in present if runs.get(path)]


def check(options: argparse.Namespace) -> int:
    start = time.monotonic()
    if options.wheels:
        install_wheels(options.wheels)
    gpu = describe_gpu()
    todo = stages(gpu["capability"], gpu.pop("nvcc_path"), find_tool("compute-sanitizer") or "compute-sanitizer")
    if unknown := set(options.only) - {stage.name for stage in todo}:
        names = ", ".join(stage.name for stage in todo)
        raise UserError(f"--only: found {sorted(unknown)[0]!r}, wanted one of: {names}")
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
    parser.add_argument("--status", action="store_true", help="say what is proved, run nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="run these stages only")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="use wheels of what is not installed")
    parser.add_argument("--collect-wheels", type=Path, metavar="DIR", help="download those wheels, run nothing")
    parser.add_argument("--output", type=Path, help="JSON file, default benchmarks/results/gpu_check_<gpu>.json")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for wheels and all stages together")
    parser.add_argument("--commit", help="of these sources, where git cannot tell")
    options = parser.parse_args(arguments)
    if options.collect_wheels:
        collect_wheels(options.collect_wheels)
        return 0
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
