"""The values that change over a run: the learning rate, the EMA momentum, and the warm-up that the bank shares."""

import logging
import math
from dataclasses import dataclass
from itertools import pairwise

from caco_fast.errors import UserError
from caco_fast.settings import setting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_epochs: float = setting(10.0, "epochs of linear warm-up, of the lr and of the bank lr")
    final_ratio: float = setting(0.01, "the cosine ends at this share of the lr")
    milestones: list[int] = setting([], "epochs after which the lr is multiplied by milestone_factor; empty: a cosine")
    milestone_factor: float = setting(0.1, "factor of the lr at each milestone (0 to 1)")
    key_momentum: float = setting(0.99, "EMA momentum m0 of the key encoder at the start")
    key_momentum_rises: bool = setting(True, "m rises from m0 to 1 by a cosine; false: it stays m0 (MoCo v2)")
    per: str = setting("step", "step: values change every step; epoch: every epoch, as in the released code")

    def __post_init__(self) -> None:
        if self.per not in ("step", "epoch"):
            raise UserError(f"schedule.per: found '{self.per}', expected step or epoch")
        if not self.warmup_epochs >= 0:
            raise UserError(f"schedule.warmup_epochs: found {self.warmup_epochs}, expected 0 or more")
        for name in ("final_ratio", "key_momentum", "milestone_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name}: found {getattr(self, name)}, expected a number in [0, 1]")
        ascending = all(before < after for before, after in pairwise([0, *self.milestones]))
        if not ascending or (self.milestones and self.milestones[0] < self.warmup_epochs):
            raise UserError(
                f"schedule.milestones: found {list(self.milestones)}, expected ascending epochs after the warm-up of "
                f"{self.warmup_epochs:g}; change them or schedule.warmup_epochs"
            )


@dataclass(frozen=True)
class Schedule:
    """Values of a run of `epochs` epochs of `steps_per_epoch` steps.

    At step s of the run, e = s / steps_per_epoch (docs/method.md, schedule):

        warmup(s)       = min(1, (s + 1) / warm-up steps)
        lr(s)           = lr * warmup(s) during the warm-up, then a cosine from lr to final_ratio lr,
                          or with milestones lr * milestone_factor ^ (milestones that are no later than e)
        key_momentum(s) = 1 - (1 - m0) (1 + cos(pi e / E)) / 2
    """

    config: ScheduleConfig
    lr: float
    epochs: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        if self.config.warmup_epochs >= self.epochs:
            log.warning(
                "schedule.warmup_epochs %g is no less than trainer.epochs %d: the learning rate only rises",
                self.config.warmup_epochs,
                self.epochs,
            )

    def _position(self, step: int) -> tuple[float, float, float]:
        """The place in the run, the length of its warm-up and its whole length, in units of `per`."""
        if self.config.per == "epoch":
            return float(step // self.steps_per_epoch), self.config.warmup_epochs, float(self.epochs)
        return float(step), self.config.warmup_epochs * self.steps_per_epoch, float(self.epochs * self.steps_per_epoch)

    def warmup_at(self, step: int) -> float:
        """The share of the full lr, and of the full bank lr, that the warm-up allows; 1 after it."""
        at, warm, _ = self._position(step)
        return min(1.0, (at + 1) / warm) if warm > 0 else 1.0

    def lr_at(self, step: int) -> float:
        at, warm, end = self._position(step)
        if at < warm:
            return self.lr * self.warmup_at(step)
        if self.config.milestones:
            passed = sum(step >= epoch * self.steps_per_epoch for epoch in self.config.milestones)
            return self.lr * self.config.milestone_factor**passed
        through = (at - warm) / max(end - warm, 1.0)
        floor = self.config.final_ratio * self.lr
        return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))

    def key_momentum_at(self, step: int) -> float:
        m0 = self.config.key_momentum
        if not self.config.key_momentum_rises:
            return m0
        at, _, end = self._position(step)
        return 1 - (1 - m0) * (1 + math.cos(math.pi * at / end)) / 2
