#!/usr/bin/env python3
"""Kill one of three ranks at random moments of a run, resume the run, and compare it with one that was never killed.

    python tests/engine/kill_ranks.py FOLDER --moments 20 [--seed 0]

Every third moment lies within the write of a checkpoint, and then the killed rank is the one that writes. After each
kill the other ranks end by themselves, in time and with one line in total. The newest checkpoint loads, and the resumed
run has the losses and the final state of the complete one, bit for bit. Prints a line of JSON for each moment.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch.utils._pytree import tree_leaves

from caco_fast.config import to_yaml
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.ranks import LOST, PATIENCE_SECONDS
from tests.engine.rank_processes import Ranks
from tests.engine.tiny_run import config, write_images

RANKS = 3
# A bank large enough that a checkpoint's write can be hit.
SETTINGS = ("caco.bank_size=40000", "caco.warm_start_steps=5", "checkpoint.every_steps=2")
SETTINGS += ("trainer.batch_size=9", "trainer.epochs=6", "evaluation.every_epochs=3", "trainer.collective_timeout=60")
STEPS = 29
LIMIT_SECONDS = 60.0


def start(folder: Path) -> Ranks:
    arguments = ("--config", str(folder.parent / "run.yaml"), "--resume", "auto", f"run.folder={folder}")
    return Ranks(RANKS, folder.parent / f"output {folder.name}", *arguments)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


def end_of(folder: Path) -> list:
    """The encoders, the bank and the optimiser at the end of a run."""
    store = CheckpointStore(folder / "checkpoints")
    state = store.load(store.latest())
    return tree_leaves([state[part] for part in ("encoders", "method", "optimizer")])


def same(left: list, right: list) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def kill_at_a_moment(ranks: Ranks, folder: Path, rank: int, step: int, seconds: float, in_write: bool) -> None:
    """Kill `rank` some seconds after a step was logged, or within the next write of a checkpoint, if it still runs."""
    while ranks.running() and not any(line["step"] >= step for line in read_metrics(folder)):
        time.sleep(0.002)
    time.sleep(seconds)
    while in_write and ranks.running() and not any((folder / "checkpoints").glob(".step_*.writing")):
        pass
    if ranks.codes[rank] is None:
        ranks.send(rank, signal.SIGKILL)


def moment(number: int, place: Path, chance: random.Random, step_seconds: float, whole: Path) -> dict:
    folder = place / f"moment {number}"
    in_write = number % 3 == 2
    rank = 0 if in_write else chance.randrange(RANKS)
    # The last checkpoints are written at steps 28 and 29.
    step, share = chance.randint(1, 25 if in_write else 28), chance.random()
    ranks = start(folder)
    kill_at_a_moment(ranks, folder, rank, step, share * step_seconds, in_write)
    took = ranks.wait(LIMIT_SECONDS)
    killed = ranks.codes[rank] == -signal.SIGKILL
    errors = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    leftovers = [path.name for path in (folder / "checkpoints").glob(".*.writing")]
    if killed:
        others = [ranks.codes[other] for other in range(RANKS) if other != rank]
        assert set(others) <= {LOST, 0}, ranks.codes
        assert "Traceback" not in ranks.output(), ranks.output()
        assert len(errors) == (LOST in others) and took < PATIENCE_SECONDS + 20, (errors, took)
        # Rank 0 hosts the ranks' store, which ends with it.
        assert rank == 0 or not errors or f"error: rank {rank} is gone" in errors[0], errors
    latest = CheckpointStore(folder / "checkpoints").latest()
    reached = CheckpointStore(folder / "checkpoints").load(latest)["position"]["total_steps"] if latest else 0
    again = start(folder)
    again.wait(3 * LIMIT_SECONDS)
    assert set(again.codes) == {0}, again.output()
    assert losses(folder) == losses(whole), "the resumed run has other losses"
    assert same(end_of(folder), end_of(whole)), "the resumed run ends in another state"
    shutil.rmtree(folder)
    place_in_time = {"moment": number, "rank": rank, "step": round(step + share, 2), "killed": killed}
    found = {"in_write": in_write, "leftovers": leftovers, "ended_s": round(took, 2), "reported": errors}
    return place_in_time | found | {"resumed_at": reached}


def moments(place: Path, count: int, seed: int = 0) -> Iterator[dict]:
    """Run a complete run in `place`, then `count` runs that are killed and resumed; yield a record of each."""
    images = write_images(place / "images")
    (place / "run.yaml").write_text(to_yaml(config(images, *SETTINGS)))
    whole = place / "whole"
    ranks = start(whole)
    while not read_metrics(whole) and ranks.running():
        time.sleep(0.002)
    seconds = ranks.wait(3 * LIMIT_SECONDS)
    assert set(ranks.codes) == {0}, ranks.output()
    chance = random.Random(seed)
    for number in range(count):
        yield moment(number, place, chance, seconds / STEPS, whole)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill ranks at random moments, and check that the run resumes.")
    parser.add_argument("folder", type=Path, help="folder for the runs; its contents are replaced")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    for found in moments(arguments.folder, arguments.moments, arguments.seed):
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
