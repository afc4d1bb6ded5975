"""The process that versions.py measures in: it reads a case a line and answers with a line of JSON.

It uses only names that older commits have too, since PYTHONPATH chooses the tree.
"""

import hashlib
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import caco_fast
from caco_fast.config import load_config
from caco_fast.data import DataConfig, build_train_loader
from caco_fast.engine.metrics import read_metrics
from caco_fast.training import train

PACKAGE = Path(caco_fast.__file__).parent
CONFIGS = next(place for place in (PACKAGE / "configs", PACKAGE.parent / "configs") if place.is_dir())
SETTINGS = (
    "evaluation.every_epochs=0",
    "evaluation.linear_probe=false",
    "evaluation.baselines=false",
    "checkpoint.every_epochs=0",
    "run.plain=true",
    "run.tensorboard=false",
    "trainer.cpu_threads=1",
    "trainer.log_every=5",
    "trainer.max_steps=45",
    "caco.warm_start_steps=15",
)
BATCHES = 20


def steps() -> dict[str, Any]:
    """Images a second in both phases of a short run of the quickstart, and its losses."""
    # A version without the page does not know the setting.
    spared = ("run.report=false",) if (PACKAGE / "report").is_dir() else ()
    with tempfile.TemporaryDirectory() as folder:
        train(load_config(CONFIGS / "quickstart.yaml", (*SETTINGS, *spared)), Path(folder) / "run")
        lines = [line for line in read_metrics(Path(folder) / "run") if "loss" in line]
    phases = {
        "initialisation": [line["pairs_per_second"] for line in lines if line["epoch"] < 0],
        "training": [line["pairs_per_second"] for line in lines if line["epoch"] >= 0],
    }
    # The first line of a phase includes what is loaded and made at its first step.
    rates = {phase: sum(values[1:]) / len(values[1:]) for phase, values in phases.items()}
    return {"rate": rates, "same": [line["loss"] for line in lines]}


class Loader:
    """A training loader: each call takes the first batches of its next epoch."""

    def __init__(self, name: str, files: str) -> None:
        self.name, self.epoch = name, 0
        if name == "memory":
            config, self.batch = load_config(CONFIGS / "quickstart.yaml"), 256
            data = config.data
        else:
            config, self.batch = load_config(CONFIGS / "imagenet_resnet50_200ep_batch1024.yaml"), 16
            data = DataConfig(source="folder", path=files, loader=name, workers=1)
        self.loader = build_train_loader(data, config.views, batch_size=self.batch, seed=0)

    def __call__(self) -> dict[str, Any]:
        start = time.perf_counter()
        views = [batch.views for batch in islice(self.loader.batches(self.epoch), BATCHES)]
        seconds = time.perf_counter() - start
        self.epoch += 1
        digest = hashlib.sha256()
        for view in (view for group in views for view in group):
            digest.update(view.contiguous().numpy().tobytes())
        return {"rate": {self.name: len(views) * self.batch / seconds}, "same": digest.hexdigest()}


def main() -> None:
    # What is logged must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    loaders: dict[str, Loader] = {}
    print("ready", file=answers, flush=True)
    for case in map(str.strip, sys.stdin):
        if case != "steps" and case not in loaders:
            loaders[case] = Loader(case, sys.argv[1])
        print(json.dumps(steps() if case == "steps" else loaders[case]()), file=answers, flush=True)


if __name__ == "__main__":
    main()
