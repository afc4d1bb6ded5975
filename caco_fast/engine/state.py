"""The position of a run, and the sums of its steps between two log lines."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from caco_fast.distributed import all_reduce_sum, world_size


class LossNotFinite(Exception):
    """The loss of a step is NaN or infinite."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"the loss is {loss}")
        self.loss = loss


@dataclass
class Position:
    """The position of a run: `step` counts the finished steps of the phase, `total_steps` those of all phases.

    `epochs_ended` counts the epochs whose kNN and checkpoint are done too. A run that was stopped before does them when
    it is resumed. `imported_steps` of them are those of another code, whose checkpoint the run began from: no time was
    measured for them.
    """

    phase: str = ""
    step: int = 0
    total_steps: int = 0
    epochs_ended: int = 0
    phase_seconds: float = 0.0
    train_seconds: float = 0.0
    imported_steps: int = 0


@dataclass
class Interval:
    """Sums of the values of the steps since the last log line; they stay on the device until they are read."""

    sums: dict[str, Tensor] = field(default_factory=dict)  # each []
    steps: int = 0
    seconds: float = 0.0
    # Seconds of these in which the trainer waited for the loader.
    waited: float = 0.0

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:  # each []
        """Accumulate in place: the replay of a CUDA graph writes to the same tensors. The caller counts `steps`.

        share: of the step that the values belong to.
        """
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            self.sums[name].add_(value.detach(), alpha=share)

    def require_finite(self) -> None:
        """Read this rank's sum of the losses, for which the host waits.

        Raises:
            LossNotFinite: one of them was not finite.
        """
        loss = self.sums.get("loss")
        if loss is not None and not math.isfinite(loss.item()):
            raise LossNotFinite(loss.item())

    def means(self) -> dict[str, float]:
        """Means over these steps and over all ranks (collective)."""
        totals = all_reduce_sum(torch.stack(list(self.sums.values()))) / (self.steps * world_size())
        return dict(zip(self.sums, totals.tolist()))

    def state_dict(self) -> dict[str, Any]:
        """The state with its sums replaced by their means over all ranks (collective).

        So a run can be resumed on any number of ranks.
        """
        sums = dict(self.sums)
        if sums:
            means = all_reduce_sum(torch.stack(list(sums.values()))) / world_size()
            sums = dict(zip(sums, means.unbind()))
        return asdict(replace(self, sums=sums))

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.waited = state.get("waited", 0.0)

    def clear(self) -> None:
        for value in self.sums.values():
            value.zero_()
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
