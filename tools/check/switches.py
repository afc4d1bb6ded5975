#!/usr/bin/env python3
"""Proof that the switches of a step change its losses no more than rounding does: 50 steps at one seed, with each.

    python tools/check/switches.py [--switches views compile] [--precision f32 bf16] [key=value ...]
    python tools/check/switches.py trainer.device=cuda                                     on a GPU, the CUDA graph too
    python tools/check/switches.py --table benchmarks/results/prove_switches_cpu.json     the result as Markdown

The effect of rounding is measured by two more runs, which start from weights that are moved by one unit in the last
place of f32. Training makes such a difference grow. A switch is equal if at every step the losses differ by at most
FACTOR times the largest difference that the moved runs have shown so far. The settings are those of the quickstart at a
small batch, and `key=value` changes them. The exit status is 1 if a switch is not equal.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from caco_fast.benchmarking import RESULTS, ROOT, Bench, run_script, write_result
from caco_fast.build import build_trainer, settled
from caco_fast.config import Config, load_config
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.launch import launched
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.run_folder import RunFolder

STEPS, FACTOR, MOVED_RUNS = 50, 4.0, 2
# Below this a relative difference of losses is rounding of the loss itself.
LEAST = 2.0**-21
SETTINGS = (
    "trainer.batch_size=64",
    "caco.warm_start_steps=8",
    "trainer.joint_views=off",
    "trainer.log_every=1",
    "evaluation.every_epochs=0",
    "evaluation.baselines=false",
    "evaluation.linear_probe=false",
    "run.tensorboard=false",
    "run.report=false",
    "run.plain=true",
)
SWITCHES = {
    "views": ("trainer.joint_views=on",),
    "compile": ("trainer.compile=true",),
    "both": ("trainer.joint_views=on", "trainer.compile=true"),
    "graph": ("trainer.cuda_graph=true",),
}
ON_A_GPU = ("graph",)


def losses(config: Config, moved: int = 0) -> list[float]:
    """The loss of every step.

    moved: seed of the directions in which the weights are moved by one unit; 0: they are not moved.
    """
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder, launched(config.trainer) as device:
        run = RunFolder(Path(folder))
        trainer = build_trainer(settled(config, device), run, CheckpointStore(run.checkpoints, keep=1), device)
        if moved:
            move(trainer.encoders.query.parameters(), moved)
            trainer.encoders.copy_query_to_key()
        try:
            trainer.run()
        finally:
            trainer.close()
        return [line["loss"] for line in read_metrics(run.path)]


@torch.no_grad()
def move(parameters: Any, seed: int) -> None:
    """Move every weight by one unit in the last place, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        up = torch.randint(2, parameter.shape, generator=generator).to(parameter.device)
        ends = [torch.full_like(parameter, end) for end in (-torch.inf, torch.inf)]
        parameter.copy_(torch.where(up == 1, *[torch.nextafter(parameter, end) for end in ends]))


def differences(found: Sequence[float], reference: Sequence[float]) -> list[float]:
    """The relative difference of the losses at each step."""
    if len(found) != len(reference):
        raise ValueError(f"{len(found)} losses, expected {len(reference)}")
    return [abs(a - b) / abs(b) for a, b in zip(found, reference)]


def judge(found: Sequence[float], reference: Sequence[float], moved: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Whether `found` differs from `reference` by at most FACTOR times what the moved runs do up to the same step."""
    by_switch = differences(found, reference)
    by_rounding = [differences(losses, reference) for losses in moved]
    allowed, largest = [], LEAST
    for step in range(len(reference)):
        largest = max(largest, *(run[step] for run in by_rounding))
        allowed.append(FACTOR * largest)
    return {
        "equal": all(difference <= bound for difference, bound in zip(by_switch, allowed)),
        "largest_difference": max(by_switch),
        "largest_by_rounding": max(max(run) for run in by_rounding),
        "closest_to_bound": max(difference / bound for difference, bound in zip(by_switch, allowed)),
        "losses": list(found),
    }


def table(record: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| precision | switch | equal | largest difference | by rounding alone |", "|---|---|---|--:|--:|"]
    for precision, found in record["results"].items():
        for switch, result in found["switches"].items():
            cells = [precision, switch, "yes" if result["equal"] else "NO"]
            cells += [f"{result['largest_difference']:.1e}", f"{result['largest_by_rounding']:.1e}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    bench = Bench(__doc__, table, "prove_switches_<device>.json")
    add, quickstart = bench.parser.add_argument, ROOT / "caco_fast" / "configs" / "quickstart.yaml"
    add("--config", type=Path, default=quickstart, help="YAML file")
    add("--switches", nargs="+", choices=SWITCHES, help="switches to prove; default: all of the device")
    add("--precision", nargs="+", default=["f32", "bf16"], help="precisions; default: f32 bf16")
    add("--steps", type=int, default=STEPS, help=f"steps of each run; default: {STEPS}")
    add("settings", nargs="*", metavar="key=value", help="settings that override the file")
    options = bench.parse(arguments)
    common = [*SETTINGS, f"trainer.max_steps={options.steps}", *options.settings]
    device = load_config(options.config, common).trainer.device
    device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    switches = options.switches or [switch for switch in SWITCHES if device == "cuda" or switch not in ON_A_GPU]
    results: dict[str, Any] = {}
    for precision in options.precision:
        of_precision = [*common, f"trainer.precision={precision}"]
        plain = load_config(options.config, of_precision)
        reference = losses(plain)
        moved = [losses(plain, seed + 1) for seed in range(MOVED_RUNS)]
        results[precision] = {"losses": reference, "moved_losses": moved, "switches": {}}
        for switch in switches:
            found = losses(load_config(options.config, [*of_precision, *SWITCHES[switch]]))
            results[precision]["switches"][switch] = judged = judge(found, reference, moved)
            print(precision, switch, "is equal" if judged["equal"] else "is NOT equal", flush=True)
    output = options.output or RESULTS / f"prove_switches_{device}.json"
    settings = {"config": options.config.name, "settings": common, "factor": FACTOR, "device": device}
    settings["switches"] = {switch: list(SWITCHES[switch]) for switch in switches}
    bench.show(write_result(output, settings=settings, results=results))
    return 0 if all(s["equal"] for found in results.values() for s in found["switches"].values()) else 1


if __name__ == "__main__":
    run_script(main)
