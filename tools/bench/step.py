#!/usr/bin/env python3
"""Speed of whole training steps and of their parts, next to other implementations.

    python tools/bench/step.py --config caco_fast/configs/quickstart.yaml       on the device that the settings name
    python tools/bench/step.py --config ... --batch 128 256 --seconds 60      a sweep of (global) batch sizes
    torchrun --nproc-per-node=4 tools/bench/step.py --config ...      on four ranks
    python tools/bench/step.py --config quickstart --methods      every method by its small configuration, next to MoCo
    python tools/bench/step.py --table benchmarks/results/bench_train_cpu_1.json      the result as Markdown

`key=value` arguments change settings for all variants, as in tools/train.py. Variants take turns, so that a disturbance
meets all of them. The split is measured in additional steps, which wait for the device after every phase. A pair is an
image with all its views. MoCo's queue is as long as CaCo's bank. The split of the CUDA graph is measured in its step
without the graph. A small configuration (small_*) is a variant with its own settings in place of those of --config, and
with the same batch. The step of small_moco is that of MoCo v2 symmetric on the quickstart, so their ratio says how much
the machine disturbs.

Some variants are left out: the one with the loader if data.path is not given, the CUDA graph on the CPU, the released
step on several ranks, and both the released step and MoCo if an image does not have two views.

The floor is the least memory traffic of a pair for a ResNet-50 in bf16, with two views of 224 px, query and key
encoder. It is 651 MB if BatchNorm and ReLU are fused with the convolutions, and 1,318 MB if each is a separate pass.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Spinning OpenMP threads starve the loader, and everything else, on a machine whose cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import timing
import torch
from peers import PHASES, Phases, ReleasedStep, TrainerStep
from PIL import Image

from caco_fast.benchmarking import RESULTS, ROOT, Bench, run_script, seconds, spread, write_result
from caco_fast.config import Config, load_config, settings_of
from caco_fast.configs import shipped
from caco_fast.distributed import barrier, rank, world_size
from caco_fast.engine.launch import launched
from caco_fast.errors import UserError
from caco_fast.training import settled

RELEASED, MOCO, LOADED = "CaCo as released", "MoCo v2 symmetric", "CaCo, with the loader"
GRAPH = "CaCo, CUDA graph"
# Variants that are configurations of their own, by their names.
SMALL = {name: path for name, path in shipped().items() if name.startswith("small_")}
# The settings of each variant; LOADED is CaCo on real data.
VARIANTS: dict[str, tuple[str, ...]] = {
    "CaCo": (),
    "CaCo, views apart": ("trainer.joint_views=off",),
    "CaCo, views together": ("trainer.joint_views=on",),
    "CaCo, compiled": ("trainer.compile=true", "trainer.joint_views=on"),
    GRAPH: ("trainer.cuda_graph=true",),
    MOCO: ("method=moco", "moco.symmetric=true"),
    LOADED: (),
    RELEASED: (),
    **dict.fromkeys(SMALL, ()),
}
METHODS = (MOCO, "CaCo", *SMALL)
DEFAULTS = ("CaCo", "CaCo, views together", GRAPH, MOCO, LOADED, RELEASED)
QUIET = ("evaluation.every_epochs=0", "evaluation.baselines=false", "evaluation.linear_probe=false")
QUIET += ("run.tensorboard=false", "run.report=false", "run.plain=true", "checkpoint.every_steps=0")
FLOOR_MB = (651, 1318)

Step = TrainerStep | ReleasedStep


def with_placeholder(overrides: list[str], batch: int, folder: Path) -> list[str]:
    """Settings for synthetic views of a configuration without data: a folder of one image under many names."""
    classes = folder / "train" / "one"
    if not classes.exists():
        classes.mkdir(parents=True)
        (folder / "val" / "one").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(classes / "0.png")
        for number in range(1, batch):
            (classes / f"{number}.png").hardlink_to(classes / "0.png")
    return [*overrides, f"data.path={folder}", "data.workers=0"]


def make(variant: str, path: Path, overrides: list[str], batch: int, device: torch.device, folder: Path) -> Step:
    """The step of a variant."""
    path = SMALL.get(variant, path)
    settings = [*QUIET, *overrides, *VARIANTS[variant], f"trainer.batch_size={batch}"]
    if lacks_data(load_config(path, overrides)):
        settings = with_placeholder(settings, batch, folder / f"rank{rank()}_batch{batch}")
    if variant == MOCO:
        settings.append(f"moco.queue_size={load_config(path, settings).caco.bank_size}")
    config = load_config(path, settings)
    if variant == RELEASED:
        return ReleasedStep(config, device)
    return TrainerStep(config, folder / "run", device, synthetic=variant != LOADED)


def lacks_data(config: Config) -> bool:
    return config.data.source != "embedded" and not config.data.path


def measure(
    variants: list[str], batch: int, device: torch.device, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measurements by variant: milliseconds per step over the rounds, pairs/s, the split, peak memory; or its error."""
    rounds: dict[str, list[float]] = {variant: [] for variant in variants}
    splits = {variant: Phases(device) for variant in variants}
    processor: dict[str, list[float]] = {variant: [] for variant in variants}
    steps: dict[str, Step] = {}
    peaks, errors = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            with guarded(variant, errors):
                before = timing.start_peak(device)
                steps[variant] = make(variant, options.config, options.settings, batch, device, Path(folder))
                for _ in range(max(options.warmup, steps[variant].warmup)):
                    steps[variant]()
                peaks[variant] = timing.peak_bytes(device) - before
        for _ in range(options.rounds):
            for variant in [variant for variant in variants if variant not in errors]:
                with guarded(variant, errors):
                    step = steps[variant]
                    barrier()
                    start = time.process_time()
                    rounds[variant].append(seconds(lambda s=step: [s() for _ in range(options.steps)], device))
                    processor[variant].append(time.process_time() - start)
                    step.split(splits[variant])
        for step in steps.values():
            step.close()
    results: dict[str, dict[str, Any]] = {}
    for variant in variants:
        if variant in errors:
            results[variant] = {"error": errors[variant]}
            continue
        times = spread([1000 * value / options.steps for value in rounds[variant]], 3)
        split = splits[variant].seconds
        names = (*PHASES, *sorted(set(split) - set(PHASES)))
        results[variant] = {
            "step_ms": times,
            "pairs_per_s": round(1000 * batch / times["median"], 1),
            "processor_ms": spread([1000 * value / options.steps for value in processor[variant]], 3),
            "split_ms": {name: round(1000 * split[name] / options.rounds, 3) for name in names},
            "peak_bytes": peaks[variant],
        }
    return results


@contextmanager
def guarded(variant: str, errors: dict[str, str]) -> Iterator[None]:
    """On one rank, an exception is the result of its variant. Several ranks would wait for each other."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if world_size() > 1:
            raise
        errors[variant] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def has_floor(config: Config) -> bool:
    """Whether FLOOR_MB is about these settings."""
    sides = [view.size for view in config.views for _ in range(view.count)]
    return config.backbone.name == "resnet50" and config.trainer.precision == "bf16" and sides == [224, 224]


def table(record: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, machine = record["settings"], record["machine"]
    host = f"{machine['cpu']}, {settings['threads']} threads"
    device = machine["gpus"][0] if settings["device"] != "cpu" else host
    precision = f"encoders in {settings['resolved']['trainer.precision']}"
    if any(RELEASED in point["variants"] for point in record["results"]):
        precision += f", but those of {RELEASED} in f32"
    lines = [
        f"{settings['config']}: {settings['ranks']} x {device}, torch {record['versions']['torch']}; {precision}",
        "",
    ]
    floor = any("share_of_copy" in point for point in record["results"])
    # Times are compared with those of the released step, or where it was not measured, with those of MoCo.
    reference = RELEASED if any(RELEASED in point["variants"] for point in record["results"]) else MOCO
    ratio_head = "x released" if reference == RELEASED else "x MoCo"
    heads = ["batch", "variant", "pairs/s", "step, ms (p20-p80)", ratio_head, *PHASES, "other", "peak MiB"]
    lines += ["| " + " | ".join(heads + ["share of the copy's rate"] * floor) + " |"]
    lines += ["|--:|---|" + "--:|" * (len(heads) - 2 + floor)]
    for point in record["results"]:
        base = point["variants"].get(reference)
        for variant, result in point["variants"].items():
            if "error" in result:
                lines.append(f"| {point['batch']} | {variant} | not measured: {result['error']} |")
                continue
            step = result["step_ms"]
            ratio = f"{base['step_ms']['median'] / step['median']:.2f}" if base and "step_ms" in base else ""
            cells = [str(point["batch"]), variant, f"{result['pairs_per_s']:,.0f}"]
            cells += [f"{step['median']:.1f} ({step['p20']:.1f}-{step['p80']:.1f})", ratio]
            cells += [f"{result['split_ms'].get(name, 0):.1f}" for name in (*PHASES, "other")]
            cells.append(f"{result['peak_bytes'] / 2**20:,.0f}")
            if floor:
                shares = point["share_of_copy"].get(variant)
                cells.append(f"{100 * shares[0]:.0f}-{100 * shares[1]:.0f} %" if shares else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    bench = Bench(__doc__, table, "bench_train_<device>_<ranks>.json")
    add = bench.parser.add_argument
    add("--config", type=Path, help="YAML file with settings; see caco_fast/configs/")
    add("--batch", type=int, nargs="+", help="global batch sizes; default: the one in the settings")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"variants to measure: {', '.join(VARIANTS)}")
    add("--methods", action="store_true", help=f"the variants {', '.join(METHODS)}")
    add("--steps", type=int, default=5, help="steps in a round")
    add("--rounds", type=int, default=7, help="rounds of every variant, after the warm-up")
    add("--warmup", type=int, default=3, help="steps before the first round")
    add("--seconds", type=float, default=math.inf, help="seconds after which no batch size begins")
    add("settings", nargs="*", metavar="key=value", help="settings that override the file")
    options = bench.parse(arguments, positive=("steps", "rounds", "warmup"))
    if not options.config:
        bench.parser.error("--config: found none, expected a file; or give --table JSON")
    if options.methods:
        options.variants = [*(options.variants or ()), *METHODS]
    options.bench = bench
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    config = load_config(options.config, options.settings)
    start, results = time.monotonic(), []
    with launched(config.trainer) as device:
        config = settled(config, device)
        left_out = {GRAPH} if device.type == "cpu" else set()
        if lacks_data(config):
            left_out.add(LOADED)
        if world_size() > 1:
            left_out.add(RELEASED)
        if sum(view.count for view in config.views) != 2:
            left_out |= {RELEASED, MOCO}
        variants = [variant for variant in options.variants or DEFAULTS if variant not in left_out]
        ceiling = None
        if device.type == "cuda" and has_floor(config):
            ceiling = timing.ceilings(timing.Timer(str(device)), str(device))["copy_gb_per_s"]
        for batch in options.batch or [config.trainer.batch_size]:
            if time.monotonic() - start > options.seconds:
                break
            found = measure(variants, batch, device, options)
            point: dict[str, Any] = {"batch": batch, "variants": found}
            if ceiling is not None:
                timed = {name: result for name, result in found.items() if "error" not in result}
                per_rank = {name: result["pairs_per_s"] / world_size() for name, result in timed.items()}
                point["copy_gb_per_s"] = ceiling
                point["share_of_copy"] = {
                    name: [round(pairs * megabytes / 1000 / ceiling, 4) for megabytes in FLOOR_MB]
                    for name, pairs in per_rank.items()
                    if name != RELEASED  # which is not in bf16
                }
            results.append(point)
            if rank() == 0:
                _write(options, config, device, results)


def _write(options: argparse.Namespace, config: Config, device: torch.device, results: list[dict[str, Any]]) -> None:
    """Write the result after every batch size, so that a killed benchmark keeps the earlier ones."""
    output = options.output or RESULTS / f"bench_train_{device.type}_{world_size()}.json"
    name = options.config.resolve()
    settings = {
        "config": str(name.relative_to(ROOT)) if name.is_relative_to(ROOT) else name.name,
        "overrides": options.settings,
        "resolved": settings_of(config),
        "device": device.type,
        "ranks": world_size(),
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "rounds": options.rounds,
        "variants": {variant: list(VARIANTS[variant]) for variant in results[0]["variants"]},
        "floor_mb_per_pair": FLOOR_MB,
    }
    options.bench.show(write_result(output, settings=settings, results=results))


if __name__ == "__main__":
    run_script(main)
