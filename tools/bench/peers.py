"""Training steps to compare: the step of the trainer with its time split, and CaCo's step as its authors released it.

Legend: B images, K bank rows, C channels.
"""

import copy
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from caco_fast.benchmarking import synchronize
from caco_fast.build import build_trainer, settled
from caco_fast.config import Config
from caco_fast.data import Batch
from caco_fast.data.build import build_source
from caco_fast.distributed import world_size
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.step import Rates, TrainStep
from caco_fast.engine.step_graph import CapturedStep
from caco_fast.engine.trainer import Trainer
from caco_fast.models import build_backbone, build_projector
from caco_fast.models.backbone import feature_width
from caco_fast.optim import build_optimizer, peak_lr

PHASES = ("data wait", "forward", "loss + bank", "backward", "optimiser", "EMA")
RATES = dict(key_momentum=0.99, warmup=1.0)


class Phases:
    """Seconds by phase. Time in a nested phase counts for the inner one only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._switch(lambda: self._open.append(name))
        try:
            yield
        finally:
            self._switch(self._open.pop)

    def _switch(self, change: Callable[[], object]) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._mark
        change()
        self._mark = now

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return function(*arguments, **options)

        return call


class TrainerStep:
    """Steps of the trainer that a configuration builds, on the loader's batches or on one synthetic batch."""

    def __init__(self, config: Config, folder: Path, device: torch.device, synthetic: bool) -> None:
        run = RunFolder(folder)
        self.trainer: Trainer = build_trainer(
            settled(config, device), run, CheckpointStore(run.checkpoints, keep=1), device
        )
        self.trainer.encoders.train()
        self.trainer.method.train()
        self.step = self.trainer.step
        self.step.enter(self.trainer.phases[-1])
        # Steps that take longer than those to measure: the warm-up of a CUDA graph, and its capture.
        self.warmup = self.step.warmup + 1 if isinstance(self.step, CapturedStep) else 0
        self.rates = Rates(lr=self.trainer.schedule.lr, **RATES)
        self.batches = itertools.repeat(synthetic_batch(config, device)) if synthetic else self._loaded()

    def _loaded(self) -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from self.trainer.loader.batches(epoch)

    def __call__(self) -> None:
        self.step(next(self.batches).views, self.rates)
        # In a run the log lines clear it.
        self.step.interval.clear()

    def split(self, phases: Phases) -> None:
        """Time the phases of one step by waiting for the device at the end of each, which makes the step slower."""
        step, encoders = self.step, self.trainer.encoders
        unmeasured = step.span
        try:
            step.span = phases
            for name in ("queries", "keys"):
                setattr(encoders, name, phases.timed("forward", getattr(encoders, name)))
            with phases("data wait"):
                batch = next(self.batches)
            with phases("other"):
                # Launched part by part, even if steps are replayed otherwise.
                TrainStep._launch(step, batch.views, self.rates)
        finally:
            step.span = unmeasured
            for name in ("queries", "keys"):
                encoders.__dict__.pop(name, None)
        step.interval.clear()

    def close(self) -> None:
        self.trainer.close()


class ReleasedStep:
    """CaCo's step as released: f32, four separate forwards, the EMA parameter by parameter, similarities of both views
    with the whole bank kept as [B, K], the bank's gradient as [K, C], and the loss read by the host at every step.

    Convolutions may use TF32, torch's default, and cuDNN times its algorithms, as in the released code. It runs on one
    rank only, with one synthetic batch.
    """

    warmup = 0

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.trainer.seed)
        backbone = build_backbone(config.backbone, build_source(config.data, "train").channels)
        head = build_projector(config.projector, feature_width(backbone))
        self.query = nn.Sequential(backbone, head).to(device)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.settings = config.caco
        # The released code keeps the bank as [C, K]; its products are the same.
        self.bank = normalize(torch.randn(config.caco.bank_size, config.projector.dim), dim=1).to(device)  # [K, C]
        self.velocity = torch.zeros_like(self.bank)
        lr = peak_lr(config.optimizer, config.trainer.batch_size)
        self.optimizer = build_optimizer(config.optimizer, self.query.parameters(), config.trainer.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.views = [view.contiguous() for view in synthetic_batch(config, device).views[:2]]
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.split(None)

    def split(self, phases: Phases | None) -> None:
        within = phases or _untimed
        with within("other"), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            with within("forward"):
                queries = [normalize(self.query(view), dim=1) for view in self.views]  # [B, C] each
            with within("EMA"), torch.no_grad():
                for key, query in zip(self.key.parameters(), self.query.parameters()):
                    key.data = key.data * RATES["key_momentum"] + query.data * (1 - RATES["key_momentum"])
            with within("forward"), torch.no_grad():
                keys = [normalize(self.key(view), dim=1) for view in self.views]
            with within("loss + bank"):
                loss, similarities, positives = self._loss(queries, keys)
            with within("backward"):
                self.optimizer.zero_grad()
                loss.backward()
            with within("optimiser"):
                self.optimizer.step()
            with within("loss + bank"):
                self._update_bank([query.detach() for query in queries], similarities, positives)
                self.losses.append(loss.item())

    def _loss(self, queries: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        unit = normalize(self.bank, dim=1)
        with torch.no_grad():
            # The positive of a view's query is the row most similar to the other view's key.
            positives = [(key @ unit.T).argmax(dim=1) for key in reversed(keys)]  # [B] each
        similarities = [query @ unit.T for query in queries]  # [B, K] each
        temperature = self.settings.temperature
        loss = sum(cross_entropy(s / temperature, positive) for s, positive in zip(similarities, positives))
        return loss, [s.detach() for s in similarities], positives

    @torch.no_grad()
    def _update_bank(self, queries: list[Tensor], similarities: list[Tensor], positives: list[Tensor]) -> None:
        """The bank step of docs/method.md: coefficients [B, K], gradient [K, C], momentum, step."""
        length = self.bank.norm(dim=1, keepdim=True)
        unit, temperature = self.bank / length, self.settings.bank_temperature
        gradient = torch.zeros_like(self.bank)
        for query, similarity, positive in zip(queries, similarities, positives):
            pull = torch.softmax(similarity / temperature, dim=1)
            rows = torch.arange(len(query), device=query.device)
            pull[rows, positive] = 1 - pull[rows, positive]
            tangent = pull.T @ query - (pull * similarity).sum(dim=0)[:, None] * unit
            gradient -= tangent / (temperature * length * len(query))
        self.velocity.mul_(self.settings.bank_momentum).add_(gradient)
        self.bank.sub_(self.settings.bank_lr * self.velocity)

    def close(self) -> None:
        pass


@contextmanager
def _untimed(name: str) -> Iterator[None]:
    yield


def synthetic_batch(config: Config, device: torch.device) -> Batch:
    """The share of this rank in a batch of normally distributed views, of the configured sizes, on the device."""
    generator = torch.Generator().manual_seed(config.trainer.seed)
    images, channels = config.trainer.batch_size // world_size(), build_source(config.data, "train").channels
    sides = [view.size for view in config.views for _ in range(view.count)]
    views = [torch.randn(images, channels, side, side, generator=generator) for side in sides]
    views = [view.to(device, memory_format=torch.channels_last) for view in views]
    return Batch(views, torch.arange(images))
