"""The epochs of fine-tuning, for each pair of learning rates of a grid: scored after each, resumable."""

import copy
import logging
import math
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from caco_fast.data import Source, TrainLoader, build_eval_loader
from caco_fast.distributed import all_reduce_sum, rank, world_size
from caco_fast.engine.agreement import together
from caco_fast.engine.ranks import Interrupt
from caco_fast.errors import UserError
from caco_fast.evaluate.features import evaluation_mode
from caco_fast.evaluate.metrics import standard_error
from caco_fast.models.batch_norm import require_statistics_of_all_ranks, segment_batch_norm
from caco_fast.optim import LARS
from caco_fast.protocols.base import Context, Result
from caco_fast.protocols.images import shown_in_tests
from caco_fast.protocols.presets import TrainingRecipe
from caco_fast.protocols.resuming import Resumable
from caco_fast.settings import setting

log = logging.getLogger("caco_fast.evaluation")


@dataclass(frozen=True)
class FinetuneRecipe(TrainingRecipe):
    """The settings of fine-tuning; `lr` is that of the backbone."""

    optimizer: str = setting("sgd", "sgd or lars")
    head_lr: float = setting(0.1, "learning rate of the classifier, before lr_scaling")
    grid: list[list[float]] = setting(
        [], "pairs [lr, head_lr] to train one after the other; that of lr and head_lr comes first"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in ("sgd", "lars"):
            raise UserError(f"optimizer: found '{self.optimizer}', expected sgd or lars")
        if self.optimizer == "lars" and self.nesterov:
            raise UserError("nesterov: found true, expected false with lars; set it to false")
        if not self.head_lr > 0:
            raise UserError(f"head_lr: found {self.head_lr}, expected a number above 0")
        if any(len(pair) != 2 or min(pair) <= 0 for pair in self.grid):
            raise UserError(f"grid: found {self.grid}, expected pairs of numbers above 0, as [[0.02, 5], [0.01, 0.2]]")

    def pairs(self) -> list[tuple[float, float]]:
        """Learning rates of backbone and classifier, the headline's first, each once."""
        pairs = [(self.lr, self.head_lr), *((lr, head_lr) for lr, head_lr in self.grid)]
        return [(self.scaled(lr), self.scaled(head_lr)) for lr, head_lr in dict.fromkeys(pairs)]


class FineTuning:
    """A copy of the backbone with a classifier, trained end to end with one pair of learning rates after the other."""

    def __init__(
        self,
        name: str,
        context: Context,
        recipe: FinetuneRecipe,
        loader: TrainLoader,
        labels: Tensor,
        test: Source,
        resumable: Resumable,
    ) -> None:
        """labels: of the images that `loader` gives, [N] on the device."""
        self.name, self.context, self.recipe = name, context, recipe
        self.loader, self.labels, self.test, self.resumable = loader, labels, test, resumable
        self.schedule = recipe.schedule(loader.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=context.autocast is torch.float16)
        self.test_loader = together(
            lambda: build_eval_loader(
                shown_in_tests(context, recipe),
                "test",
                batch_size=context.batch_size,
                rank=rank(),
                world_size=world_size(),
                device=context.device,
                source=test,
            )
        )
        # For each pair that was begun: its epochs, each with loss, top1 and top5.
        self.histories: list[list[dict[str, float]]] = []
        self._begin()

    def run(self) -> None:
        """Train every pair to its last epoch (collective).

        Raises:
            Interrupted: a signal asked to stop; the state was written first.
        """
        if (state := self.resumable.load()) is not None:
            self._load(state)
        with Interrupt() as interrupt:
            pairs = self.recipe.pairs()
            while len(self.histories) < len(pairs) or not self._ended():
                if self._ended():
                    self._begin()
                self._epoch(interrupt)
                self.resumable.save(self._state())
        self.resumable.finished()

    def result(self) -> Result:
        """The last epoch of the first pair, and the best epoch of the best pair beside it."""
        rows: list[dict[str, Any]] = []
        for (lr, head_lr), history in zip(self.recipe.pairs(), self.histories, strict=True):
            best, last = max(epoch["top1"] for epoch in history), history[-1]
            loss = last["loss"] if math.isfinite(last["loss"]) else None
            rows.append({"lr": lr, "head_lr": head_lr, **last, "loss": loss, "best": best, "epochs": len(history)})
        top1 = rows[0]["top1"]
        return Result(
            {"top1": top1, "top5": rows[0]["top5"], "top1_published_rule": max(row["best"] for row in rows)},
            standard_error=standard_error(top1, len(self.test)),
            sweep=rows,
            notes=["top1_published_rule is the best epoch of the best learning rates on the test images"],
        )

    def _begin(self) -> None:
        """A fresh copy of the pre-trained backbone, a new classifier and optimiser for the next pair."""
        context, recipe = self.context, self.recipe
        backbone = copy.deepcopy(context.backbone).requires_grad_()
        if world_size() > 1:
            # The statistics are those of the whole batch, on any number of ranks.
            backbone = segment_batch_norm(backbone)
            require_statistics_of_all_ranks(backbone)
        head = nn.Linear(context.pretrained.width, len(self.test.classes))
        generator = torch.Generator().manual_seed(context.seed)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * recipe.init_std)
            head.bias.zero_()
        self.model = nn.Sequential(backbone, head.to(context.device))
        lr, head_lr = self.recipe.pairs()[len(self.histories)]
        self.optimizer, self.rates = _optimizer(recipe, backbone, head, lr, head_lr), (lr, head_lr)
        self.replicas: nn.Module = self.model
        if world_size() > 1:
            self.replicas = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.step, self.loss = 0, torch.zeros((), dtype=torch.float64, device=context.device)
        self.histories.append([])

    def _ended(self) -> bool:
        """Whether the present pair has trained to its end, or its loss is no number any more."""
        history = self.histories[-1]
        return len(history) == self.recipe.epochs or bool(history and not math.isfinite(history[-1]["loss"]))

    def _epoch(self, interrupt: Interrupt) -> None:
        history, steps = self.histories[-1], self.loader.steps_per_epoch
        epoch, first = len(history), self.step - len(history) * steps
        if first < steps:
            self.model.train()
            with closing(self.loader.batches(epoch, first)) as batches:
                for batch in batches:
                    labels = self.labels[batch.index.to(self.labels.device)]
                    self._step(batch.views[0].contiguous(memory_format=torch.channels_last), labels)
                    where = f"in epoch {epoch + 1} of pair {len(self.histories)}"
                    self.resumable.stop_if_asked(interrupt, self._state(), where)
        self.loader.exchange_bad_images()
        top1, top5 = self._accuracy()
        loss = float(all_reduce_sum(self.loss.clone())) / (steps * world_size())
        history.append({"loss": loss, "top1": top1, "top5": top5})
        self.loss.zero_()
        log.info(
            "%s epoch %d/%d: lr %.4g, %.4g top1 %.2f %% top5 %.2f %% loss %.4f",
            *(self.name, epoch + 1, self.recipe.epochs, *self.rates, top1, top5, loss),
        )
        if not math.isfinite(loss):
            log.warning("%s: lr %.4g, %.4g has a loss of %s and ends here", self.name, *self.rates, loss)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        factor = self.schedule.lr_at(self.step)
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * factor
        with self.context.precision():
            logits = self.replicas(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss += loss.detach()
        self.step += 1

    @torch.no_grad()
    def _accuracy(self) -> tuple[float, float]:
        """Per cent of the test images whose label is the first answer, or among the first five (collective)."""
        device = self.context.device

        def count() -> Tensor:
            hits = torch.zeros(3, dtype=torch.int64, device=device)
            for images, labels, _ in self.test_loader:
                images = images.to(device, memory_format=torch.channels_last)
                with self.context.precision():
                    logits = self.model(images)
                found = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.to(device).view(-1, 1)
                hits += torch.stack([found[:, 0].sum(), found.any(1).sum(), torch.tensor(len(found), device=device)])
            return hits

        with evaluation_mode(self.model):
            hits = all_reduce_sum(together(count)).tolist()
        return 100.0 * hits[0] / hits[2], 100.0 * hits[1] / hits[2]

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "histories": self.histories,
            "step": self.step,
            "loss": self.loss,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.histories = state["histories"][:-1]
        self._begin()
        self.histories[-1] = state["histories"][-1]
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        self.loss.copy_(state["loss"])


def _optimizer(recipe: FinetuneRecipe, backbone: nn.Module, head: nn.Module, lr: float, head_lr: float) -> Optimizer:
    groups = [{"params": list(backbone.parameters()), "lr": lr}, {"params": list(head.parameters()), "lr": head_lr}]
    if recipe.optimizer == "lars":
        return LARS(groups, lr, recipe.momentum, recipe.weight_decay, recipe.trust)
    return SGD(groups, lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov)
