#!/usr/bin/env python3
"""Speed of the loaders on a corpus of JPEGs: images per second, and processor time for each image.

    python tools/make/jpeg_corpus.py data/corpus
    python tools/bench/data.py data/corpus [--workers 1 2 4] [--cases decode two] [--repeats 7]
    python tools/bench/data.py --table benchmarks/results/bench_data_cpu.json      # the result as Markdown

Cases: decoding alone; one view, two views and multi-crop as in the ImageNet configurations, normalised and on the
device. Loaders: torchvision (worker processes), which is the peer; DALI on the CPU, and on the GPU if there is one,
both with exact and with fast jitter. The loaders take turns. Each round gives a ratio to torchvision in that round at
the same number of workers. The result is the median over the rounds with the 20th and 80th percentile.

Processor time is that of this process and of its workers. On a shared machine it varies less than the speed. The
second ratio therefore compares images per second of processor time.

Legend: B images of a batch.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from caco_fast.benchmarking import RESULTS, ROOT, Bench, run_script, spread, synchronize, write_result
from caco_fast.config import load_config
from caco_fast.data import DataConfig, Source, ViewConfig, build_source, build_train_loader
from caco_fast.data.loaders.workers import worker_options
from caco_fast.data.sources.base import as_pil
from caco_fast.errors import UserError
from caco_fast.host import cores

CASES = {
    "decode": "decoding alone",
    "single": "one view",
    "two": "two views",
    "multi": "multi-crop",
}
PREFETCH = 2
WARM_UP = 3

# A table goes to stdout, so progress goes to stderr.
console = Console(stderr=True, highlight=False, soft_wrap=True)


class Variant(NamedTuple):
    """A loader, device and jitter to measure."""

    loader: str
    device: str
    jitter: str  # "" if it makes no difference

    @property
    def name(self) -> str:
        return self.loader if self.loader == PEER else f"{self.loader} {self.device} {self.jitter}".strip()


PEER = "torchvision"


def variants(device: str, chosen: Sequence[str] | None) -> list[Variant]:
    """The chosen loaders that are installed, the peer first. A line is printed for each kind that is left out."""
    found = [Variant(PEER, device, "")]
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        console.print('dali is left out: not installed; pip install "caco-fast[dali-cuda13]", or dali-cuda12')
    else:
        devices = ["cpu"] if device == "cpu" else [device, "cpu"]
        found += [Variant("dali", place, jitter) for place in devices for jitter in ("exact", "fast")]
    if device == "cpu":
        console.print("dali on the GPU is left out: --device cpu")
    unknown = set(chosen or ()) - {variant.name for variant in found}
    if unknown:
        known = ", ".join(variant.name for variant in found)
        raise UserError(f"--loaders: {', '.join(sorted(unknown))} is not here; there are {known}")
    return [variant for variant in found if not chosen or variant.name in chosen or variant.loader == PEER]


def case_views(case: str) -> list[ViewConfig]:
    """The views of the ImageNet configurations."""
    file = "imagenet_resnet50_multicrop_800ep_batch2048" if case == "multi" else "imagenet_resnet50_200ep_batch1024"
    views = load_config(ROOT / "caco_fast" / "configs" / f"{file}.yaml").views
    return [dataclasses.replace(views[0], count=1)] if case == "single" else views


class DecodedBatches(Dataset[int]):
    """A dataset whose items are batches that a worker decodes and does not send back."""

    def __init__(self, source: Source, batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size

    def __len__(self) -> int:
        return len(self.source) // self.batch_size

    def __getitem__(self, batch: int) -> int:
        for index in range(batch * self.batch_size, (batch + 1) * self.batch_size):
            as_pil(self.source.image(index))
        return batch


@contextmanager
def batches(case: str, variant: Variant, data: DataConfig, batch_size: int) -> Iterator[Iterator[object]]:
    """One epoch of the case; its workers end with the block."""
    if case != "decode":
        device = torch.device(variant.device)
        loader = build_train_loader(data, case_views(case), batch_size=batch_size, seed=0, device=device)
        try:
            yield loader.batches(0)
        finally:
            loader.close()
        return
    source = build_source(data, "train")
    if variant.loader == PEER:
        workers = data.worker_processes()
        decoded = DecodedBatches(source, batch_size)
        yield iter(DataLoader(decoded, batch_size=None, **worker_options(workers, PREFETCH)))
    else:
        yield decoded_by_dali(source, variant.device, data.worker_processes(), batch_size)


def decoded_by_dali(source: Source, device: str, threads: int, batch_size: int) -> Iterator[object]:
    from nvidia.dali import Pipeline, fn, types

    gpu = device != "cpu"
    number = (torch.device(device).index or 0) if gpu else None
    starts = range(0, len(source) - batch_size + 1, batch_size)
    files = (
        [np.frombuffer(source.encoded(index), np.uint8) for index in range(start, start + batch_size)]
        for start in starts
    )
    pipe = Pipeline(batch_size=batch_size, num_threads=threads, device_id=number, prefetch_queue_depth=PREFETCH)
    with pipe:
        encoded = fn.external_source(source=files, ndim=1, dtype=types.UINT8)
        options = {"output_type": types.RGB, "adjust_orientation": False}
        pipe.set_outputs(fn.decoders.image(encoded, device="mixed" if gpu else "cpu", **options))
    pipe.build()
    for _ in starts:
        yield pipe.run()


def measure(case: str, variant: Variant, data: DataConfig, batch_size: int, count: int) -> tuple[float, float]:
    """Images per second, and milliseconds of processor time for each, over `count` batches in a steady state.

    More batches follow those that are counted, so that the workers are as far ahead at the end as at the start.
    """
    with batches(case, variant, data, batch_size) as epoch:
        for _ in itertools.islice(epoch, WARM_UP):
            pass
        synchronize(variant.device)
        start, processor = time.perf_counter(), processor_seconds()
        for _ in itertools.islice(epoch, count):
            pass
        synchronize(variant.device)
        seconds, processor = time.perf_counter() - start, processor_seconds() - processor
        # DataLoader workers end with their iterator.
        del epoch
    images = count * batch_size
    return images / seconds, 1000 * processor / images


def processor_seconds() -> float:
    """Processor time of this process and of its live workers; getrusage counts workers only once they have ended."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        # The fields after the name, which may hold blanks and brackets; utime and stime are the 14th and 15th of all.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    data = DataConfig(path=str(options.corpus), prefetch=PREFETCH, bad_image_limit=0.0)
    length = len(build_source(data, "train"))
    # The batches that are counted, and as many more as the largest number of workers may prepare ahead.
    needed = options.batch_size * (WARM_UP + options.batches + PREFETCH * max(options.workers) + 2)
    if length < needed:
        raise UserError(
            f"{options.corpus} has {length} training images, {needed} are needed at this --batch-size, --batches and "
            f"--workers; make a larger corpus (tools/make/jpeg_corpus.py --images {needed * 10 // 9 + 1}) or lower them"
        )
    measured = variants(options.device, options.loaders)
    speeds: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    times: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    ratios: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    cpu_ratios: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for repeat, case, workers in itertools.product(range(options.repeats), options.cases, options.workers):
        # The kinds of jitter don't differ in decoding.
        in_turn = measured if case != "decode" else dict.fromkeys(v._replace(jitter="") for v in measured)
        for variant in in_turn:
            given = {"loader": variant.loader, "workers": workers}
            if variant.jitter:
                given["jitter"] = variant.jitter
            key = (case, workers, variant.name)
            speed, processor = measure(
                case, variant, dataclasses.replace(data, **given), options.batch_size, options.batches
            )
            speeds[key].append(speed)
            times[key].append(processor)
            ratios[key].append(speed / speeds[case, workers, PEER][-1])
            cpu_ratios[key].append(times[case, workers, PEER][-1] / processor)
            done = f"round {repeat + 1}/{options.repeats} | {CASES[case]} | {workers} workers | {variant.name}"
            console.print(f"{done} | {speed:,.0f} images/s, {processor:.1f} ms of processor time each")
    return [
        {
            "case": case,
            "workers": workers,
            "loader": name,
            "images_per_second": spread(values, 1),
            "cpu_ms": spread(times[case, workers, name], 3),
            "times_torchvision": spread(ratios[case, workers, name], 3),
            "times_torchvision_per_cpu_second": spread(cpu_ratios[case, workers, name], 3),
        }
        for (case, workers, name), values in speeds.items()
    ]


def table(record: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    settings, machine = record["settings"], record["machine"]
    corpus = settings["corpus"]
    pixels = f", {corpus['mean_width']:.0f} x {corpus['mean_height']:.0f}" if "mean_width" in corpus else ""
    gpu = f", {machine['gpus'][0]}" if settings["device"] != "cpu" else ""
    lines = [
        f"{corpus['images']:,} JPEGs of {corpus['mean_bytes'] / 1000:.0f} KB{pixels} on average; "
        f"B {settings['batch_size']}; {machine['cpu']}, {machine['cpu_cores']} cores{gpu}",
        "",
        "| views | workers | loader | images/s (p20-p80) | times torchvision (p20-p80) | CPU ms an image "
        "| times torchvision, per CPU second |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for result in sorted(record["results"], key=lambda r: (list(CASES).index(r["case"]), r["workers"])):
        speed, ratio = result["images_per_second"], result["times_torchvision"]
        per_cpu = result["times_torchvision_per_cpu_second"]
        lines.append(
            f"| {CASES[result['case']]} | {result['workers']} | {result['loader']} | "
            f"{speed['median']:,.0f} ({speed['p20']:,.0f}-{speed['p80']:,.0f}) | "
            f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f}) | {result['cpu_ms']['median']:.1f} | "
            f"{per_cpu['median']:.2f} ({per_cpu['p20']:.2f}-{per_cpu['p80']:.2f}) |"
        )
    return "\n".join(lines)


def describe_corpus(folder: Path) -> dict[str, Any]:
    """The record that tools/make/jpeg_corpus.py left there, else the number and mean size of its training files."""
    if (folder / "corpus.json").is_file():
        return json.loads((folder / "corpus.json").read_text())
    source = build_source(DataConfig(path=str(folder)), "train")
    lengths = [len(source.encoded(index)) for index in range(0, len(source), max(1, len(source) // 1000))]
    return {"images": len(source), "mean_bytes": round(float(np.mean(lengths)))}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    bench = Bench(__doc__, table, "bench_data_<device>.json")
    add, device = bench.parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    available = cores()
    add("corpus", type=Path, nargs="?", help="folder with train/<class>/*.JPEG")
    add("--device", default=device, help="device of the views: cpu, cuda, cuda:1 ...")
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    add("--loaders", nargs="+", metavar="NAME", help="loaders besides torchvision, e.g. 'dali cpu exact'")
    add("--workers", type=int, nargs="+", default=[available], help=f"processes or threads ({available})")
    add("--batch-size", type=int, default=32, help="B (32)")
    add("--batches", type=int, default=24, help="batches that are timed in each round (24)")
    add("--repeats", type=int, default=7, help="rounds (7)")
    options = bench.parse(arguments, positive=("batch_size", "batches", "repeats"))
    if min(options.workers) < 1:
        bench.parser.error(f"--workers: found {min(options.workers)}, expected 1 or more")
    if options.corpus is None:
        bench.parser.error("corpus: found none, expected a folder; tools/make/jpeg_corpus.py makes one")
    options.bench = bench
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # This process does its own part of the work with one thread.
    torch.set_num_threads(1)
    kind = torch.device(options.device).type
    output = options.output or RESULTS / f"bench_data_{kind}.json"
    settings = {
        "corpus": describe_corpus(options.corpus),
        "device": options.device,
        "batch_size": options.batch_size,
        "batches": options.batches,
        "repeats": options.repeats,
        "prefetch": PREFETCH,
        "cpu_ms": "processor time of this process and its workers, for each image",
    }
    options.bench.show(write_result(output, settings=settings, results=run(options)))


if __name__ == "__main__":
    run_script(main)
