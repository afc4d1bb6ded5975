#!/usr/bin/env python3
"""Time and memory of the operations: the bank's step and its three parts, the EMA of the key encoder, the LARS step.

    python tools/bench/ops.py bank_step                                 on the CPU, next to the dense released form
    python tools/bench/ops.py all --device cuda --seconds 100          over many sizes, as shares of the card's ceilings
    python tools/bench/ops.py bank_step --base main                     next to another commit, in the same run
    python tools/bench/ops.py --table benchmarks/results/bench_bank_cpu.json      the result as Markdown

An operation is bank_attend, bank_select, bank_step, `bank` for the three as one training step, ema_update, lars_step,
or `all`. The tests of an operation (tests/ops/test_<operation>.py) run first. If one fails, no speed is printed and the
exit status is 1. A variant whose result differs from that of the peer is not timed.

The peer of the bank is a dense eager step with the passes of the released algorithm (ops_work.py). The peer of EMA and
LARS is a loop over the tensors of ResNet-50 with CaCo's projector. GPU times are device events around work that was
launched while the GPU slept, with a cold L2 cache. Extra memory is the peak above what the process held before. On the
CPU it is resident memory in a process of its own. On a GPU the kernels come first, attend at one and at two
temperatures. The result is written after every row. A variant that fails, hangs or ends its process is a row with an
error, and the next one runs.

With --base, processes of both versions alternate. `x base` is the time of this version over that of the base.

Legend: R query and key rows, K bank rows, C channels.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from ops_report import figures, table
from ops_work import BANK_OPERATIONS, LIST_OPERATIONS, OTHER_TEMPERATURE, PARTS, TEMPERATURE
from ops_worker import BROKEN, COMPARED_SIZES, CPU_SIZES, Row, Size, Task

from caco_fast.benchmarking import RESULTS, ROOT, Bench, checked_out, run_script, spread, write_result
from caco_fast.errors import UserError

OPERATIONS = (*BANK_OPERATIONS, *LIST_OPERATIONS)
WORKER = Path(__file__).with_name("ops_worker.py")
# By device, the tests of what is timed, in pytest's words. The emulated kernels and the older path of a GPU are not.
# Operations on lists of tensors are plain torch, so that their tests need no GPU.
TESTS = {"cpu": "not (sm70 or sm80 or sm90 or gpu)", "cuda": f"(gpu and not sm80) or {' or '.join(LIST_OPERATIONS)}"}
TURNS = 5
LONGEST_SECONDS = 100  # of one variant on a GPU; torch.compile takes some 40
# A step alone is not here: the allocator keeps what the parts before it took.
MEMORY_IN_A_PROCESS = ("bank", "bank_attend", "bank_select")


# The gate


def gate(operations: Iterable[str], device: str) -> str:
    """Run the tests of the operations and return pytest's summary. Raises UserError unless tests ran and passed."""
    parts = dict.fromkeys(part for name in operations for part in (PARTS if name == "bank" else (name,)))
    files = [f"tests/ops/test_{part}.py" for part in parts]
    for file in files:
        if not (ROOT / file).is_file():
            raise UserError(f"{file}: no such file, so no speed is printed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", TESTS[device], *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
    if done.returncode != 0 or " passed" not in lines[-1]:
        why = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
        raise UserError(f"{' '.join(files)}: found {why}, expected passing tests; no speed is printed")
    return lines[-1].strip("= ")


# Measuring


def run_worker(task: Task, tree: Path = ROOT) -> Iterator[Row]:
    """The rows of ops_worker.py with the package of a tree. Where its process ends early, another continues."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    groups = task.groups()
    count = len(groups)
    while groups:
        rest = replace(task, first=count - len(groups))
        command = [sys.executable, str(WORKER), json.dumps(asdict(rest))]
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as worker:
                for row in lines_in_time(worker, LONGEST_SECONDS if task.on_gpu else None):
                    yield row
                    if "ceilings" not in row:
                        groups[0].pop(0)
                        groups = groups if groups[0] else groups[1:]
            if groups and worker.returncode != BROKEN:
                errors.seek(0)
                last = (errors.read().strip() or "no output").splitlines()[-1]
                error = f"the measuring process ended with status {worker.returncode}: {last}"
                yield from ({**row, "error": error} for row in groups.pop(0))


def lines_in_time(worker: subprocess.Popen, seconds: float | None) -> Iterator[Row]:
    """What a process prints, line by line. If it prints nothing for so long, it is ended: a kernel may hang."""
    lines = iter(worker.stdout or ())
    while True:
        alarm = threading.Timer(seconds, worker.kill) if seconds else None
        if alarm:
            alarm.daemon = True
            alarm.start()
        line = next(lines, None)
        if alarm:
            alarm.cancel()
        if line is None:
            return
        yield json.loads(line)


def measure(task: Task) -> Iterator[tuple[dict[str, float], list[Row]]]:
    """(the card's ceilings, the figures of all rows so far), after every row."""
    limits: dict[str, float] = {}
    results: list[Row] = []
    for row in run_worker(task):
        if "ceilings" in row:
            limits = row["ceilings"]
            continue
        if not task.on_gpu and row["operation"] in MEMORY_IN_A_PROCESS and "error" not in row:
            variant, size = row["variant"], tuple(row["size"].values())
            alone = replace(task, operations=(row["operation"],), sizes=(size,), only=(variant,), memory_of=variant)
            row["extra_bytes"] = next(run_worker(alone)).get("extra_bytes")
        results.append(figures(row, limits))
        yield limits, results


def compare(task: Task, base: Path) -> Iterator[tuple[dict[str, float], list[Row]]]:
    """The figures of all rows so far, with those of the base, after every turn. Each turn changes the order."""
    limits: dict[str, float] = {}
    found: dict[Path, dict[str, list[Row]]] = {ROOT: {}, base: {}}
    task = replace(task, seconds=task.seconds / (2 * TURNS))
    for turn in range(TURNS):
        for tree in (ROOT, base) if turn % 2 == 0 else (base, ROOT):
            for row in run_worker(task, tree):
                if "ceilings" in row:
                    limits = row["ceilings"]
                    continue
                key = json.dumps([row["operation"], row["size"], row["variant"]])
                found[tree].setdefault(key, []).append(row)
        yield limits, [paired(rows, found[base][key], limits) for key, rows in found[ROOT].items()]


def paired(here: list[Row], base: list[Row], limits: dict[str, float]) -> Row:
    """One row of the turns of both versions."""
    result, of_base = figures(merged(here), limits), figures(merged(base), limits)
    if "error" in of_base:
        return {**result, "base_error": of_base["error"]}
    if "error" in result:
        return result
    ratios = [
        statistics.median(ours["samples"]["whole"]) / statistics.median(theirs["samples"]["whole"])
        for ours, theirs in zip(here, base)
    ]
    return {**result, "base_ms": of_base["ms"], "times_base": spread(ratios, 3)}


def merged(rows: list[Row]) -> Row:
    """The first row that has an error, or all samples together."""
    failed = [row for row in rows if "error" in row]
    if failed:
        return failed[0]
    samples = {name: [value for row in rows for value in row["samples"][name]] for name in rows[0]["samples"]}
    return {**rows[0], "samples": samples}


def build_kernels(tree: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise UserError(f"--base: the kernels of that commit do not build: {last}")


# The command line


def parse_sizes(texts: list[str]) -> tuple[Size, ...]:
    sizes = []
    for text in texts:
        numbers = text.split(",")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) > 0 for number in numbers):
            raise UserError(f"--sizes: found {text!r}, expected R,K,C, such as 2048,65536,256")
        sizes.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return tuple(sizes)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    bench = Bench(__doc__, table, "bench_<operations>_<device>.json")
    add = bench.parser.add_argument
    add("operations", nargs="*", metavar="OP", help=f"operations: all, {', '.join(OPERATIONS)}")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    add("--base", metavar="REF", help="a commit to compare with, in the same run")
    add("--sizes", nargs="+", metavar="R,K,C", help="sizes of bank operations; the default depends on the device")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    add("--variants", nargs="+", default=[], metavar="NAME", help="variants whose names begin so, such as cuda")
    add("--threads", type=int, default=torch.get_num_threads(), help="torch's threads on the CPU")
    add("--rounds", type=int, default=20, help="most timed rounds of a variant")
    add("--seconds", type=float, default=300, help="time after which no further size begins")
    add("--gate-only", action="store_true", help="only run the tests of the operations")
    add("--no-gate", action="store_true", help="do not run the tests; tools/check/gpu.py runs them apart")
    options = bench.parse(arguments, positive=("threads", "rounds"))
    unknown = [name for name in options.operations if name not in (*OPERATIONS, "all")]
    if unknown or not options.operations:
        found = ", ".join(unknown) or "none"
        bench.parser.error(f"operations: found {found}, expected some of all, {', '.join(OPERATIONS)}")
    options.bench = bench
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    everything = "all" in options.operations
    operations = OPERATIONS if everything else tuple(dict.fromkeys(options.operations))
    sizes = parse_sizes(options.sizes) if options.sizes else None
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: torch finds no CUDA GPU here; use --device cpu")
    tested = "left to the caller"
    if not options.no_gate:
        try:
            tested = gate(operations, device.type)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.gate_only:
        print(f"tests: {tested}")
        return 0
    torch.set_num_threads(options.threads)  # for the machine's record
    if options.base and sizes is None:
        sizes = (COMPARED_SIZES if device.type == "cuda" else CPU_SIZES)[0:1]
    named = "ops" if everything else "_".join(operations)
    output = options.output or RESULTS / f"bench_{named}{'_to_base' * bool(options.base)}_{device.type}.json"
    limits = {name: getattr(options, name) for name in ("rounds", "seconds", "threads")}
    only = tuple(options.variants)
    task = Task(operations, sizes, options.device, tuple(options.dtype), **limits, only=only)
    if not any(task.groups()):
        raise UserError(f"--variants: found {' '.join(only)}, expected the beginnings of some of {known(task)}")
    settings = {
        **{name: value for name, value in asdict(task).items() if name not in ("first", "memory_of")},
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "base": options.base,
        "tests": tested,
        "temperatures": {"1 t": [TEMPERATURE], "2 t": [TEMPERATURE, OTHER_TEMPERATURE]},
        "flop": "R K C times 4 (attend), 2 (select), 4 (step), counted for all variants",
        "bytes": "each input read and each output written once",
    }
    with contextlib.ExitStack() as stack:
        if options.base:
            tree = stack.enter_context(checked_out(options.base))
            if device.type == "cuda":
                build_kernels(tree)
            found = compare(task, tree)
        else:
            found = measure(task)
        for limits, rows in found:
            write_result(output, settings=settings, results={"ceilings": limits, "rows": rows})
    options.bench.show(output)
    return 0


def known(task: Task) -> str:
    """The variants of a task, whatever it is limited to."""
    return ", ".join(dict.fromkeys(row["variant"] for group in replace(task, only=()).groups() for row in group))


if __name__ == "__main__":
    run_script(main)
