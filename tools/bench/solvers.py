#!/usr/bin/env python3
"""Memory and time of the solver of linear classifiers on mapped features, as N grows: python tools/bench/solvers.py

Features are made up, in bf16, in a file that is mapped, as the cache of `caco-fast evaluate` has them. For each number
of images a process of its own finds the coordinates, and evaluates loss and gradient once, as a fit does some hundred
times. The memory is that which no file backs (RssAnon), at its peak, less that of the libraries.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from caco_fast.benchmarking import ROOT, Bench, run_script, write_result

CLASSES = 1000


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    settings = record["settings"]
    lines = [
        f"{settings['width']} features in bf16, {CLASSES} classes, {record['machine']['cpu']}, "
        f"{settings['threads']} threads",
        "",
        "| images | mapped file, GiB | coordinates, s | one evaluation, s | memory beside the file, GiB |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in record["results"]:
        lines.append(
            f"| {row['images']:,} | {row['file_gib']:.2f} | {row['coordinates_s']:.1f} | {row['evaluation_s']:.1f} | "
            f"{row['memory_gib']:.2f} |"
        )
    return "\n".join(lines)


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon")


def measure(file: Path, images: int, width: int, threads: int) -> dict[str, Any]:
    """One row of the table, in this process."""
    import torch

    from caco_fast.evaluate.rows import Rows, coordinates
    from caco_fast.evaluate.solvers import loss_and_gradient

    torch.set_num_threads(threads)
    features = torch.from_file(str(file), False, images * width, dtype=torch.bfloat16).view(images, width)
    labels = torch.arange(images) % CLASSES
    # Libraries allocate at their first product.
    torch.randn(512, width) @ torch.randn(width, CLASSES)
    before, most, done = own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    at = coordinates(features)
    middle = time.perf_counter()
    weight = 0.01 * torch.randn(CLASSES, at.matrix.shape[1] + 1)
    loss_and_gradient(Rows(features, labels, at).ready(), weight, 1e-4, images)
    end = time.perf_counter()
    done.set()
    watcher.join()
    return {
        "images": images,
        "file_gib": round(file.stat().st_size / 2**30, 3),
        "coordinates_s": round(middle - start, 2),
        "evaluation_s": round(end - middle, 2),
        "memory_gib": round((max(most, own_bytes()) - before) / 2**30, 3),
    }


def in_a_process(images: int, width: int, threads: int) -> dict[str, Any]:
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "features.bin")
        # Any finite bf16 values do: the upper halves of f32 numbers.
        random = np.random.default_rng(0)
        with open(file, "wb") as out:
            for start in range(0, images, 8192):
                rows = random.standard_normal((min(8192, images - start), width), dtype=np.float32)
                out.write((rows.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(file)]
        command += ["--images", str(images), "--width", str(width), "--threads", str(threads)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)


def main() -> None:
    bench = Bench(__doc__, table, "bench_solvers_cpu.json")
    bench.parser.add_argument("--images", type=int, nargs="+", default=[50_000, 100_000, 200_000, 300_000], metavar="N")
    bench.parser.add_argument("--width", type=int, default=2048, help="features of an image; 2048")
    bench.parser.add_argument("--threads", type=int, default=2, help="threads; 2")
    bench.parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = bench.parse(positive=("width", "threads"))
    if options.measure:
        print(json.dumps(measure(options.measure, options.images[0], options.width, options.threads)))
        return
    results = [in_a_process(images, options.width, options.threads) for images in options.images]
    path = options.output or ROOT / "benchmarks" / "results" / "bench_solvers_cpu.json"
    settings = {"width": options.width, "classes": CLASSES, "threads": options.threads}
    bench.show(write_result(path, settings=settings, results=results))


if __name__ == "__main__":
    run_script(main)
