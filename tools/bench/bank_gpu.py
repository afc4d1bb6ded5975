"""The GPU half of bench_bank.py: each primitive and the whole step over many sizes, beside what the card can do.

Times are device events around work that the host has enqueued while the GPU slept, so that launching does not count;
before every timed region the L2 cache is overwritten. A share of cuBLAS is of a bf16 product of 8192^3 random numbers,
a share of the copy is of a large copy on the device, both measured in the same run. Traffic is the least that the
formulas allow, each input read and each output written once. A variant whose velocity after one step is not that of the
dense f32 step is not timed. The result is written after every size, so that an end by force keeps the sizes before.

Legend: R query and key rows, K bank rows, C channels.
"""

import functools
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bank_steps import BANK_TEMPERATURE, DENSE, PARTS, TEMPERATURE, Inputs, dense_step, make_step

from caco_fast.benchmarking import spread, write_result
from caco_fast.errors import UserError
from caco_fast.ops.dispatch import cuda_backend

TF32, COMPILED = "dense eager TF32", "dense compiled TF32"
BASELINES = (DENSE, TF32, COMPILED, "tiled bfloat16")
# The sizes where the baselines run too, the first two with torch.compile; then those that show how the kernels scale.
COMPILED_SIZES = ((2048, 65536, 256), (512, 65536, 256))
COMPARED_SIZES = (*COMPILED_SIZES, *((rows, 65536, 256) for rows in (256, 1024, 8192)), (2048, 2**20, 256))
KERNEL_SIZES = tuple(
    (rows, bank_rows, channels)
    for channels in (256, 128)
    for bank_rows in (65536, 98304, 2**20)
    for rows in (2048, 512, 256, 1024, 8192)
    if (rows, bank_rows, channels) not in COMPARED_SIZES
)
# FLOP and least bytes of each part, in units of R K C, K C and R C.
WORK = {"attend": (4, 2, 6), "select": (2, 2, 2), "step": (4, 18, 2), "whole": (10, 22, 10)}
MOST_DIFFERENCE = 0.05
ROUNDS, SECONDS_PER_VARIANT = 20, 1.5
FLUSHED_BYTES = 2**28
SLEEP_CYCLES = 6_000_000  # some 3 ms: longer than launching a step takes the host

Size = tuple[int, int, int]
Works = list[Callable[[], None]]


class Timer:
    """Milliseconds of work on a device with cold caches; on the CPU, for tests of this file, by the host's clock."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.flushed = torch.empty(FLUSHED_BYTES if self.on_gpu else 1, dtype=torch.uint8, device=device)

    def __call__(self, works: Works) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            for work in works:
                work()
            return 1000 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        self.flushed.zero_()
        start.record()
        for work in works:
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def ceilings(timer: Timer, device: str) -> dict[str, float]:
    """What the card reaches: Tflop/s of a large bf16 product, GB/s read and written by a large copy."""
    side, count = (8192, 2**30) if timer.on_gpu else (64, 2**10)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = [timer([lambda: torch.mm(left, right)]) for _ in range(ROUNDS + 3)][3:]
    copy = [timer([lambda: target.copy_(source)]) for _ in range(ROUNDS + 3)][3:]
    return {
        "cublas_bf16_tflop_per_s": 2 * side**3 / spread(product)["median"] / 1e9,
        "copy_gb_per_s": 2 * count / spread(copy)["median"] / 1e6,
    }


def works_of(variant: str, inputs: Inputs) -> Works:
    if variant == COMPILED:
        parts = dense_step(inputs, functools.partial(torch.compile, dynamic=False))
    else:
        parts = make_step(DENSE if variant == TF32 else variant, inputs)
    return [work for _, work in parts]


def run_variant(
    variant: str, size: Size, device: str, timer: Timer, expected: torch.Tensor | None
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """(the variant's result, its velocity after the first step); running out of memory is a result, too."""
    torch.set_float32_matmul_precision("high" if variant in (TF32, COMPILED) else "highest")
    torch._dynamo.reset()
    try:
        inputs = Inputs(*size, device)
        works = works_of(variant, inputs)
        before = peak_bytes(timer, start=True)
        for work in works:
            work()
        extra = peak_bytes(timer) - before
        velocity = inputs.velocity.clone()
        difference = None
        if expected is not None:
            difference = ((velocity - expected).norm() / expected.norm()).item()
            if not difference <= MOST_DIFFERENCE:
                return {"error": f"wrong: the velocity differs by {difference:.3g} of its norm"}, None
        samples: dict[str, list[float]] = {part: [] for part in (*PARTS, "whole")}
        end = time.monotonic() + SECONDS_PER_VARIANT
        for work_round in range(ROUNDS + 2):
            times = {part: timer([work]) for part, work in zip(PARTS, works, strict=True)}
            times["whole"] = timer(works)
            if work_round >= 2:  # the first two warm up
                for part, value in times.items():
                    samples[part].append(value)
                if time.monotonic() > end and work_round >= 4:
                    break
        result = {"ms": {part: spread(values, 4) for part, values in samples.items()}, "rounds": len(samples["whole"])}
        return {**result, "extra_bytes": extra, "difference": difference}, velocity
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}, None
    finally:
        torch.set_float32_matmul_precision("highest")
        inputs = works = work = velocity = None
        gc.collect()
        if timer.on_gpu:
            torch.cuda.empty_cache()


def peak_bytes(timer: Timer, start: bool = False) -> int:
    """Peak of torch's allocator since the call with `start`, which gives what is allocated at that time."""
    if not timer.on_gpu:
        return 0
    torch.cuda.synchronize()
    if start:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() if start else torch.cuda.max_memory_allocated()


def add_rates(result: dict[str, Any], size: Size, limits: dict[str, float]) -> None:
    """Tflop/s and GB/s of every part, and their shares of the card's."""
    rows, bank_rows, channels = size
    rates: dict[str, dict[str, float]] = {}
    for part, (flop, bank_bytes, row_bytes) in WORK.items():
        seconds = result["ms"][part]["median"] / 1000
        tflop = flop * rows * bank_rows * channels / seconds / 1e12
        traffic = (bank_bytes * bank_rows + row_bytes * rows) * channels / seconds / 1e9
        rates[part] = {
            "tflop_per_s": round(tflop, 2),
            "gb_per_s": round(traffic, 1),
            "share_of_cublas": round(tflop / limits["cublas_bf16_tflop_per_s"], 4),
            "share_of_copy": round(traffic / limits["copy_gb_per_s"], 4),
        }
    result["rates"] = rates


def variants_at(size: Size, kernels: list[str]) -> list[str]:
    if size not in COMPARED_SIZES:
        return kernels
    return [name for name in BASELINES if name != COMPILED or size in COMPILED_SIZES] + kernels


def parse_sizes(texts: list[str] | None) -> list[Size]:
    if texts is None:
        return [*COMPARED_SIZES, *KERNEL_SIZES]
    sizes = []
    for text in texts:
        numbers = text.split(",")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) > 0 for number in numbers):
            raise UserError(f"--sizes: found {text!r}, wanted R,K,C, such as 2048,65536,256")
        sizes.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return sizes


def measure(device: str, sizes: list[str] | None, dtypes: list[str], seconds: float, output: Path) -> dict[str, Any]:
    """Runs all that fits into `seconds` and returns the record, which is also written to `output`."""
    wanted = parse_sizes(sizes)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch finds no CUDA GPU here, use --device cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    end = time.monotonic() + seconds
    module = cuda_backend()
    available = module is not None and module.available(torch.device(device))
    kernels = [f"cuda {dtype}" for dtype in dtypes] if available else []
    timer = Timer(device)
    results: dict[str, Any] = {"ceilings": ceilings(timer, device), "sizes": []}
    settings = {
        "device": device,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "temperatures": [TEMPERATURE, BANK_TEMPERATURE],
        "rounds": f"{ROUNDS}, fewer where they take more than {SECONDS_PER_VARIANT} s",
        "flop": "attend 4, select 2, step 4 R K C, counted for all variants",
        "bytes": "attend 2, select 2, step 18, whole 22 K C, and rows",
        "extra_bytes": "peak of torch's allocator in a variant's first step",
        "not_run": [],
    }
    for at, size in enumerate(wanted):
        if time.monotonic() > end:
            settings["not_run"] = wanted[at:]
        else:
            # Sizes named by the user are compared whatever they are.
            names = variants_at(size, kernels) if sizes is None else [*BASELINES[:2], BASELINES[3], *kernels]
            found, expected = {}, None
            for variant in names:
                found[variant], velocity = run_variant(variant, size, device, timer, expected)
                if variant == DENSE:
                    expected = velocity
                if "ms" in found[variant]:
                    add_rates(found[variant], size, results["ceilings"])
            entry = dict(zip(("rows", "bank_rows", "channels"), size))
            results["sizes"].append({**entry, "variants": found})
        write_result(output, settings=settings, results=results)
        if settings["not_run"]:
            break
    return json.loads(output.read_text())


def table(record: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    settings, results = record["settings"], record["results"]
    limits = results["ceilings"]
    lines = [
        f"{settings['gpu']}, torch {record['versions']['torch']}, CUDA {record['machine']['cuda']}: bf16 product "
        f"{limits['cublas_bf16_tflop_per_s']:.0f} Tflop/s, copy {limits['copy_gb_per_s']:.0f} GB/s",
        "",
        "| R | K | C | variant | attend ms | select ms | step ms | whole step, ms (p20-p80) | Tflop/s | of cuBLAS "
        "| GB/s | of copy | faster | extra MiB |",
        "|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for entry in results["sizes"]:
        where = f"| {entry['rows']} | {entry['bank_rows']} | {entry['channels']} "
        yardstick = entry["variants"].get(DENSE, {}).get("ms", {}).get("whole", {}).get("median")
        for variant, result in entry["variants"].items():
            if "error" in result:
                lines.append(f"{where}| {variant} | {result['error']} |" + " |" * 9)
                continue
            whole, rates = result["ms"]["whole"], result["rates"]["whole"]
            cells = [f"{result['ms'][part]['median']:.3g}" for part in PARTS]
            cells.append(f"{whole['median']:.3g} ({whole['p20']:.3g}-{whole['p80']:.3g})")
            cells += [f"{rates['tflop_per_s']:.0f}", f"{100 * rates['share_of_cublas']:.0f} %"]
            cells += [f"{rates['gb_per_s']:.0f}", f"{100 * rates['share_of_copy']:.0f} %"]
            cells.append(f"{yardstick / whole['median']:.1f} x" if yardstick else "")
            cells.append(f"{result['extra_bytes'] / 2**20:.0f}")
            lines.append(f"{where}| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
