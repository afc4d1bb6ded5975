"""Run folders that no run has made: whatever a test needs, in a moment."""

import json
from pathlib import Path
from typing import Any

from caco_fast.config import load_config, to_yaml

START = {
    "started": "2026-01-02T03:04:05+00:00",
    "command": "python -m caco_fast train --config quickstart caco.bank_lr=0.5",
    "resumed_from": None,
    "commit": "0123456789abcdef",
    "dirty": False,
    "versions": {"python": "3.11", "torch": "2.11"},
    "machine": {"host": "made-up", "cpu": "a processor", "cpu_cores": 2, "memory_gib": 8.0, "gpus": []},
    "run": {"model": "resnet18", "parameters": 1_000_000, "images": 10_000, "data": "embedded", "ranks": 1}
    | {"steps_per_epoch": 39, "device": "the CPU"},
    "banks": [{"backend": "tiled", "reason": "device is cpu", "products": "f32"}],
}
SUMMARY = {
    "finished": True,
    "steps": 100,
    "train_seconds": 7200.0,
    "initialisation_steps": 30,
    "pairs_per_second": 1234.0,
    "knn_raw": 61.25,
    "knn_random": 52.5,
    "knn_trained": 73.75,
    "knn_trained_k20": 78.5,
    "linear_trained": 82.25,
    "evaluated": {"evaluation.k": [200, 20]},
}


def line(step: int, **more: Any) -> dict[str, Any]:
    """A line of the log of CaCo."""
    values = {
        "loss": 8 - step / 100,
        "positive_probability": 0.001 * step,
        "lr": 0.3,
        "pairs_per_second": 1000.0 + step,
    }
    values |= {"positive_perplexity": 2.0 * step, "data_wait": 0.02, "peak_memory_gib": 1.5, "bad_images": 0}
    return {"step": step, "epoch": -1 if step <= 30 else 0, "time": 1.7e9 + step, **values, **more}


LINES = [line(step) for step in range(10, 101, 10)] + [
    {"step": step, "epoch": 0, "knn_200": 70.0 + step / 100, "knn_20": 75.0} for step in (50, 100)
]


def run_folder(
    folder: Path,
    *overrides: str,
    lines: list[dict[str, Any]] | None = LINES,
    summary: Any = SUMMARY,
    starts: Any = (START,),
    config: str = "quickstart",
    log: str = "",
) -> Path:
    """Write a run folder without checkpoints; None leaves a file out."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(config, overrides)))
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if starts is not None:
        (folder / "environment.json").write_text(json.dumps(list(starts)))
    if log:
        (folder / "log.txt").write_text(log)
    return folder
