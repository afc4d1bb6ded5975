"""A clock, the memory and the ceilings of a device, for the benchmarks in this folder.

This module needs torch alone, so that a benchmark can load it next to any version of the package.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

READ_BYTES = 2**28
SLEEP_CYCLES = 6_000_000  # about 3 ms: the host needs less to launch a step
CEILING_ROUNDS, CEILING_WARMUP = 20, 3
RESET_PEAK = Path("/proc/self/clear_refs")


class Timer:
    """Milliseconds of work. `host_ms` is the time that the host needed to launch the last work.

    On a GPU, device events enclose work that the host launches while the GPU sleeps, so that launching does not
    count. Before, the L2 cache is filled by reading: what it holds need not be written back within the timed region.
    On the CPU the host's clock is read.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.other = torch.zeros(READ_BYTES // 4 if self.on_gpu else 1, dtype=torch.int32, device=device)
        self.host_ms = 0.0

    def __call__(self, works: Sequence[Callable[[], object]]) -> float:
        if not self.on_gpu:
            self._launch(works)
            return self.host_ms
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        self.other.amax()
        start.record()
        self._launch(works)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _launch(self, works: Sequence[Callable[[], object]]) -> None:
        start = time.perf_counter()
        for work in works:
            work()
        self.host_ms = 1000 * (time.perf_counter() - start)


def ceilings(timer: Timer, device: str) -> dict[str, float]:
    """What the device reaches: Tflop/s of a large bf16 product, GB/s read and written by a large copy."""
    side, count = (8192, 2**30) if timer.on_gpu else (64, 2**10)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median_ms(work: Callable[[], object]) -> float:
        times = [timer([work]) for _ in range(CEILING_WARMUP + CEILING_ROUNDS)]
        return statistics.median(times[CEILING_WARMUP:])

    return {
        "cublas_bf16_tflop_per_s": 2 * side**3 / median_ms(lambda: torch.mm(left, right)) / 1e9,
        "copy_gb_per_s": 2 * count / median_ms(lambda: target.copy_(source)) / 1e6,
    }


def start_peak(device: torch.device) -> int:
    """The bytes that are held now. The next peak counts from here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if RESET_PEAK.exists():
        RESET_PEAK.write_text("5")  # Sets the high-water mark back to what is resident now.
    return _resident("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most bytes since `start_peak`: of the GPU's allocations, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    """A field of Linux's /proc in bytes. It is 0 on another system."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
