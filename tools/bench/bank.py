"""Time and memory of the bank operations: attend at two temperatures, select, step, and the three as one training step.

    python tools/bench/bank.py [--rows 512] [--bank-rows 65536] [--channels 256] [--threads 1]     on the CPU
    python tools/bench/bank.py --device cuda [--sizes 2048,65536,256 ...] [--seconds 100]        see bank_gpu.py
    python tools/bench/bank.py --table benchmarks/results/bench_bank_cpu.json      # the result as Markdown

The yardstick is a dense eager step with the passes of the released algorithm: normalise the bank, similarities [R, K],
softmax at both temperatures, coefficients [R, K], gradient [K, C], tangent, momentum, update.

Extra memory is the peak above what the process held before the step: every variant runs in a process of its own and the
system's high-water mark of resident memory is read, so that what libraries allocate counts too.

Legend: R query and key rows, K bank rows, C channels.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import bank_gpu
import torch
from bank_steps import BANK_TEMPERATURE, DENSE, PARTS, TEMPERATURE, Inputs, make_step

from caco_fast.benchmarking import ROOT, read_result, seconds, spread, write_result
from caco_fast.errors import UserError

RESET_PEAK = Path("/proc/self/clear_refs")


def measure_times(variants: list[str], inputs: Inputs, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each part, of the whole step, and of processor time in it, summed over threads.

    Variants take turns, so that a disturbance meets all of them; processor time hardly feels a shared machine.
    """
    samples = {variant: {part: [] for part in (*PARTS, "whole", "processor")} for variant in variants}
    for repeat in range(repeats + 1):
        for variant in variants:
            start = time.process_time()
            times = {part: 1000 * seconds(work) for part, work in make_step(variant, inputs)}
            processor = 1000 * (time.process_time() - start)
            # The first round warms up.
            if repeat > 0:
                for part, value in {**times, "whole": sum(times.values()), "processor": processor}.items():
                    samples[variant][part].append(value)
    return {variant: {part: spread(values, 3) for part, values in parts.items()} for variant, parts in samples.items()}


def extra_memory(variant: str, sizes: tuple[int, int, int]) -> int:
    """Peak bytes of one step above what was there before it, in this process."""
    for _, work in make_step(variant, Inputs(8, 64, sizes[2], "cpu")):
        work()  # Libraries load and set up here.
    steps = list(make_step(variant, Inputs(*sizes, "cpu")))
    RESET_PEAK.write_text("5")  # Sets the high-water mark back to what is resident now.
    before = resident_bytes("VmRSS")
    for _, work in steps:
        work()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure_memory(variant: str, options: argparse.Namespace) -> int:
    sizes = ["--rows", options.rows, "--bank-rows", options.bank_rows, "--channels", options.channels]
    command = [sys.executable, __file__, "--memory-of", variant, *sizes]
    command += ["--threads", torch.get_num_threads()]
    answer = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if answer.returncode != 0:
        raise RuntimeError(f"the memory run of {variant!r} failed: {answer.stderr.strip()}")
    return int(answer.stdout.split()[-1])


def table(record: dict) -> str:
    """The result as a Markdown table."""
    settings, results, machine = record["settings"], record["results"], record["machine"]
    if settings["device"] != "cpu":
        return bank_gpu.table(record)
    yardstick = results[DENSE]
    lines = [
        f"R {settings['rows']}, K {settings['bank_rows']}, C {settings['channels']}, {settings['device']}: "
        f"{machine['cpu']}, {machine['torch_threads']} threads, torch {record['versions']['torch']}",
        "",
        "| variant | attend ms | select ms | step ms | whole step, ms (p20-p80) | faster | extra MiB | of the memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for variant, result in results.items():
        whole = result["ms"]["whole"]
        cells = [f"{result['ms'][part]['median']:.3g}" for part in PARTS]
        cells.append(f"{whole['median']:.4g} ({whole['p20']:.4g}-{whole['p80']:.4g})")
        cells.append(f"{yardstick['ms']['whole']['median'] / whole['median']:.1f} x")
        cells.append(f"{result['extra_bytes'] / 2**20:.1f}")
        cells.append(f"1/{yardstick['extra_bytes'] / max(result['extra_bytes'], 1):.0f}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--sizes", nargs="+", metavar="R,K,C", help="on a GPU; by default those of bank_gpu.py")
    parser.add_argument("--seconds", type=float, default=300, help="on a GPU: begin no further size after this time")
    parser.add_argument("--rows", type=int, default=512, help="R, query rows and as many key rows")
    parser.add_argument("--bank-rows", type=int, default=65536, help="K")
    parser.add_argument("--channels", type=int, default=256, help="C")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--output", type=Path, help="JSON file, default benchmarks/results/bench_bank_DEVICE.json")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a result as Markdown and do nothing else")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("rows", "bank_rows", "channels", "repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: found {getattr(options, name)}, wanted 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        print(table(read_result(options.table)))
        return
    device = torch.device(options.device)
    output = options.output or ROOT / "benchmarks" / "results" / f"bench_bank_{device.type}.json"
    if device.type != "cpu":
        record = bank_gpu.measure(options.device, options.sizes, options.dtype, options.seconds, output)
        print(table(record))
        print(f"\nwritten to {output}")
        return
    if not RESET_PEAK.exists():
        raise UserError(f"--device cpu: peak memory is read from Linux's /proc, found no {RESET_PEAK} here")
    torch.set_num_threads(options.threads)
    sizes = (options.rows, options.bank_rows, options.channels)
    if options.memory_of:
        print(extra_memory(options.memory_of, sizes))
        return

    variants = [DENSE, *(f"tiled {dtype}" for dtype in options.dtype)]
    times = measure_times(variants, Inputs(*sizes, "cpu"), options.repeats)
    flop = 10 * options.rows * options.bank_rows * options.channels
    results = {
        variant: {
            "ms": times[variant],
            "gflop_per_s": round(flop / times[variant]["whole"]["median"] / 1e6, 1),
            "extra_bytes": measure_memory(variant, options),
        }
        for variant in variants
    }
    settings = {
        "device": options.device,
        "rows": options.rows,
        "bank_rows": options.bank_rows,
        "channels": options.channels,
        "repeats": options.repeats,
        "temperatures": [TEMPERATURE, BANK_TEMPERATURE],
        "flop": "10 R K C counted for all variants",
        "extra_bytes": "peak resident memory in a process of its own",
    }
    path = write_result(output, settings=settings, results=results)
    print(table(read_result(path)))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
