"""Where a run stands, what the schedule sets for a step, and the sums between two log lines."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from caco_fast.distributed import all_reduce_sum, world_size
from caco_fast.methods import StepOutput
from caco_fast.ops.rates import Rate

PREPARATION, TRAINING = "preparation", "training"


@dataclass
class Position:
    """Where a run stands: `step` counts the finished steps of the phase, `total_steps` those of both phases.

    `epochs_ended` are the epochs whose kNN and checkpoint are done too: a run stopped before that
    does them when resumed.
    """

    phase: str = PREPARATION
    step: int = 0
    total_steps: int = 0
    epochs_ended: int = 0
    phase_seconds: float = 0.0
    train_seconds: float = 0.0


class Rates(NamedTuple):
    """What the schedule sets for one step: numbers, or for a captured step 0-d tensors on the device."""

    lr: Rate
    # Of the EMA at the step's end, which makes the keys of the next step.
    key_momentum: Rate
    warmup: Rate


@dataclass
class Interval:
    """Sums of what the steps since the last log line gave; they stay on the device until they are read."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    def add(self, output: StepOutput) -> None:
        """In place, for a captured step adds where it added first. The caller counts `steps`."""
        for name, value in {"loss": output.loss, **output.metrics}.items():
            if name in self.sums:
                self.sums[name] += value.detach()
            else:
                self.sums[name] = value.detach().to(torch.float64, copy=True)

    def means(self) -> dict[str, float]:
        """Means over these steps and over all ranks, each of which calls."""
        totals = all_reduce_sum(torch.stack(list(self.sums.values()))) / (self.steps * world_size())
        return dict(zip(self.sums, totals.tolist()))

    def state_dict(self) -> dict[str, Any]:
        """With the sums' means over all ranks, each of which calls: any number of ranks can go on from them."""
        sums = dict(self.sums)
        if sums:
            means = all_reduce_sum(torch.stack(list(sums.values()))) / world_size()
            sums = dict(zip(sums, means.unbind()))
        return asdict(replace(self, sums=sums))

    def clear(self) -> None:
        for value in self.sums.values():
            value.zero_()
        self.steps, self.seconds = 0, 0.0
