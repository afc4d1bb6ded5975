"""The epochs of the linear heads, whatever gives their features: scored after each, resumable, the result at the end.

Legend: H heads, B rows of this rank in a step, N rows of a set, D feature size, C classes.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caco_fast.engine.ranks import Interrupt
from caco_fast.errors import UserError
from caco_fast.evaluate.metrics import standard_error
from caco_fast.protocols.base import FeatureSet, Result
from caco_fast.protocols.heads import Heads
from caco_fast.protocols.presets import TrainingRecipe
from caco_fast.protocols.resuming import Resumable
from caco_fast.settings import setting

log = logging.getLogger("caco_fast.evaluation")

# Eight learning rates around that of the preset: those of the publications lie a factor of 1,500 apart.
FACTORS = (1 / 100, 1 / 30, 1 / 10, 1 / 3, 1.0, 3.0, 10.0, 30.0)
# A head whose loss is so near to log(C) has learnt nothing.
OF_GUESSING = 0.005

Batches = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class LinearRecipe(TrainingRecipe):
    """The settings of linear classifiers on frozen features."""

    optimizer: str = setting("sgd", "sgd, or larc: SGD whose gradients are scaled by the trust ratio of each tensor")
    trust_bias: bool = setting(False, "larc: the bias is scaled too, as in LARC of Apex; its first step is not")
    norm: bool = setting(False, "BatchNorm without weights before the classifier")
    lrs: list[float] = setting(
        [], "learning rates to train at once, before lr_scaling; that of lr is added; empty: 8 around it"
    )
    held_out: int = setting(
        -1, "training images on which the learning rate is chosen; 0: none; -1: 10,009, and 5 % of a small set"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in ("sgd", "larc"):
            raise UserError(f"optimizer: found '{self.optimizer}', expected sgd or larc")
        if self.lrs and min(self.lrs) <= 0:
            raise UserError(f"lrs: found {list(self.lrs)}, expected numbers above 0")
        if self.held_out < -1:
            raise UserError(f"held_out: found {self.held_out}, expected a number of images, or -1")

    def all_lrs(self) -> list[float]:
        """The learning rate of each head, ascending; that of the headline is among them."""
        lrs = set(self.lrs) or {factor * self.lr for factor in FACTORS}
        return [self.scaled(lr) for lr in sorted(lrs | {self.lr})]

    @property
    def headline(self) -> int:
        return self.all_lrs().index(self.scaled(self.lr))


class HeadTraining:
    """Heads, their position in the training, and the scores after every epoch."""

    def __init__(
        self,
        name: str,
        heads: Heads,
        recipe: LinearRecipe,
        steps_per_epoch: int,
        *,
        test: FeatureSet,
        held: FeatureSet | None,
        resumable: Resumable,
    ) -> None:
        """test, held: this rank's shards of the test and the held-out images."""
        self.name, self.heads, self.recipe = name, heads, recipe
        self.schedule, self.steps_per_epoch = recipe.schedule(steps_per_epoch), steps_per_epoch
        self.test, self.held, self.resumable = test, held, resumable
        self.step = 0
        self.losses = torch.zeros(len(heads.lrs), dtype=torch.float64, device=heads.weight.device)
        # One entry for each epoch: the loss of each head, and its scores in per cent.
        self.history: list[dict[str, list[float]]] = []
        self._warned: set[int] = set()

    def run(self, batches: Batches) -> None:
        """Train to the last epoch (collective). `batches(epoch, first_step)` gives features [B, D] and labels [B].

        Raises:
            Interrupted: a signal asked to stop; the state was written first.
        """
        if (state := self.resumable.load()) is not None:
            self._load(state)
        with Interrupt() as interrupt:
            while len(self.history) < self.recipe.epochs:
                epoch, first = len(self.history), self.step - len(self.history) * self.steps_per_epoch
                if first < self.steps_per_epoch:
                    for features, labels in batches(epoch, first):
                        factor = self.schedule.lr_at(self.step)
                        self.losses += self.heads.step(features, labels, factor, self.recipe.batch_size)
                        self.step += 1
                        self.resumable.stop_if_asked(interrupt, self._state(), f"in epoch {epoch + 1}")
                self._end_epoch(epoch)
                self.resumable.save(self._state())
        self.resumable.finished()

    def result(self) -> Result:
        """The headline and the figures beside it."""
        last, at, lrs = self.history[-1], self.recipe.headline, self.heads.lrs
        of_headline = [epoch["top1"][at] for epoch in self.history]
        best = max(range(len(of_headline)), key=of_headline.__getitem__)
        metrics = {"top1": last["top1"][at], "top5": last["top5"][at]}
        sweep = [self._of_head(head) for head in range(len(lrs))]
        notes = [f"top1_published_rule: the best epoch on the test images, here {best + 1} of {len(of_headline)}"]
        if self.held is not None:
            chosen = max(range(len(lrs)), key=lambda head: (math.isfinite(last["loss"][head]), last["held_out"][head]))
            metrics["top1_lr_chosen_on_held_out"] = last["top1"][chosen]
            notes.append(f"top1_lr_chosen_on_held_out: lr {lrs[chosen]:.4g}, the best one on the held-out images")
        metrics["top1_published_rule"] = of_headline[best]
        error = standard_error(metrics["top1"], len(self.test.source))
        return Result(metrics, standard_error=error, sweep=sweep, notes=notes)

    def _of_head(self, head: int) -> dict[str, Any]:
        last = self.history[-1]
        loss = last["loss"][head]
        row = {"lr": self.heads.lrs[head], "loss": loss if math.isfinite(loss) else None}
        row |= {key: last[key][head] for key in ("top1", "top5", "held_out") if key in last}
        return row | {"best": max(epoch["top1"][head] for epoch in self.history)}

    def _end_epoch(self, epoch: int) -> None:
        scores = self.heads.accuracy(self.test.features, self.test.labels).tolist()
        found = {"loss": (self.losses / self.steps_per_epoch).tolist(), "top1": scores[0], "top5": scores[1]}
        if self.held is not None:
            found["held_out"] = self.heads.accuracy(self.held.features, self.held.labels)[0].tolist()
        self.history.append(found)
        self.losses.zero_()
        self._warn(found["loss"], epoch)
        at = self.recipe.headline
        best = max(range(len(scores[0])), key=scores[0].__getitem__)
        log.info(
            "%s epoch %d/%d: lr %.4g top1 %.2f %% top5 %.2f %% loss %.4f; best of %d heads: lr %.4g top1 %.2f %%",
            *(self.name, epoch + 1, self.recipe.epochs, self.heads.lrs[at], scores[0][at], scores[1][at]),
            *(found["loss"][at], len(self.heads.lrs), self.heads.lrs[best], scores[0][best]),
        )

    def _warn(self, losses: list[float], epoch: int) -> None:
        guessing = math.log(self.heads.classes)
        # A small learning rate needs some epochs to leave it.
        late = epoch + 1 == self.recipe.epochs
        stays = [f"{lr:.4g}" for lr, loss in zip(self.heads.lrs, losses) if abs(loss / guessing - 1) < OF_GUESSING]
        if late and stays:
            log.warning(
                "%s: the loss is still that of guessing, %.3f, for lr %s; it is too small, or the features say nothing",
                *(self.name, guessing, ", ".join(stays)),
            )
        for head, loss in enumerate(losses):
            if not math.isfinite(loss) and head not in self._warned:
                self._warned.add(head)
                lr = self.heads.lrs[head]
                log.warning(
                    "%s: the head of lr %.4g has a loss of %s; the other heads train further", self.name, lr, loss
                )

    def _state(self) -> dict[str, Any]:
        return {"step": self.step, "losses": self.losses, "history": self.history, "heads": self.heads.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.history = state["step"], state["history"]
        self.losses.copy_(state["losses"])
        self.heads.load_state_dict(state["heads"])
