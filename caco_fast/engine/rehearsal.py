"""The first steps of every phase of a run, to see that they work, how long they take and what memory they need."""

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

from caco_fast.engine.state import Interval
from caco_fast.engine.step import Rates
from caco_fast.engine.trainer import Trainer


class Rehearsed(NamedTuple):
    phase: str
    step: int
    loss: float
    seconds: float


def rehearse(trainer: Trainer, steps: int) -> Iterator[Rehearsed]:
    """Do the first steps of each phase, and yield the last of them, timed without the wait for its images."""
    trainer.encoders.train()
    trainer.method.train()
    schedule = trainer.schedule
    rates = Rates(schedule.lr_at(0), schedule.key_momentum_at(1), schedule.warmup_at(0))
    for phase in trainer.phases:
        trainer.step.enter(phase)
        batches = trainer.loader.batches(0)
        for number, batch in enumerate(itertools.islice(batches, steps), 1):
            trainer.step.interval = Interval()
            begun = time.perf_counter()
            trainer.step(batch.views, rates)
            # Reading the loss waits for the device.
            loss = trainer.step.interval.means()["loss"]
            last = Rehearsed(phase.name, number, loss, time.perf_counter() - begun)
        batches.close()
        yield last
