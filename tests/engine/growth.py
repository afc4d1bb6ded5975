#!/usr/bin/env python3
"""The memory, file handles and threads of a long run, over its steps.

    python tests/engine/growth.py FOLDER --steps 2000 --loader torchvision     # two workers; or memory

Trains with checkpoints and evaluations, and prints one line of JSON: `samples` of (step, MiB of this process, MiB of
its workers, open files, threads), one an epoch, taken when the last line of the epoch is logged.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images

STEPS_PER_EPOCH = 10


def mebibytes(process: str) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except FileNotFoundError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Sampler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.samples: list[tuple[int, float, float, int, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if f" step {STEPS_PER_EPOCH}/{STEPS_PER_EPOCH} " not in record.getMessage():
            return
        children = [task.read_text().split() for task in Path("/proc/self/task").glob("*/children")]
        workers = sum(mebibytes(child) for found in children for child in found)
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        at = STEPS_PER_EPOCH * (len(self.samples) + 1)
        self.samples.append((at, round(mebibytes("self"), 1), round(workers, 1), files, threads))


def measure(folder: Path, steps: int, loader: str) -> list[tuple[int, float, float, int, int]]:
    images = write_images(folder / "images", train=40, size=48)
    sampler = Sampler()
    logging.getLogger("caco_fast").addHandler(sampler)
    settings = (f"data.loader={loader}", f"data.workers={2 if loader == 'torchvision' else 0}")
    settings += (f"trainer.epochs={steps // STEPS_PER_EPOCH}", "trainer.log_every=10", "optimizer.lr=0.01")
    settings += ("evaluation.every_epochs=5", "checkpoint.every_steps=25", "run.tensorboard=true")
    assert train(config(images, *settings), folder / "run")["finished"]
    return sampler.samples


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory, file handles and threads of a run over its steps.")
    parser.add_argument("folder", type=Path, help="folder for images and run; its contents are replaced")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--loader", choices=("torchvision", "memory"), default="torchvision")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    samples = measure(arguments.folder, arguments.steps, arguments.loader)
    print(json.dumps({"steps": arguments.steps, "loader": arguments.loader, "samples": samples}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
