"""The training loop: the bank's initialisation, then epochs of steps, with logs, kNN and checkpoints between them.

Legend: a step is one optimiser step on `batch_size` images over all ranks.
"""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.optim import Optimizer

from caco_fast.data import Batch, TrainLoader
from caco_fast.distributed import rank
from caco_fast.engine.checkpoint import (
    CheckpointStore,
    CheckpointWriteError,
    capture_random_states,
    restore_random_states,
)
from caco_fast.engine.metrics import MetricsWriter
from caco_fast.engine.precision import optimizer_step, require_scale
from caco_fast.engine.progress import Progress
from caco_fast.engine.ranks import Interrupt, Interrupted
from caco_fast.engine.settings import CheckpointConfig, TrainerConfig
from caco_fast.engine.state import PREPARATION, TRAINING, Interval, Position, Rates
from caco_fast.engine.step_graph import StepGraph
from caco_fast.errors import UserError
from caco_fast.evaluate.evaluator import Evaluator
from caco_fast.methods import Method, StepOutput
from caco_fast.models import EncoderPair
from caco_fast.optim import Schedule

log = logging.getLogger("caco_fast.trainer")


class Trainer:
    """Runs a method on a pair of encoders. The caller builds every component; here only their interfaces are known."""

    def __init__(
        self,
        config: TrainerConfig,
        checkpoint: CheckpointConfig,
        *,
        device: torch.device,
        encoders: EncoderPair,
        method: Method,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        schedule: Schedule,
        loader: TrainLoader,
        evaluator: Evaluator | None,
        store: CheckpointStore,
        metrics: MetricsWriter,
        progress: Progress,
        resolved_config: str,
        graph: StepGraph | None = None,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.device = device
        self.encoders = encoders
        self.method = method
        self.optimizer = optimizer
        self.scaler = scaler
        self.schedule = schedule
        self.loader = loader
        self.evaluator = evaluator
        self.store = store
        self.metrics = metrics
        self.progress = progress
        self.resolved_config = resolved_config
        self.graph = graph
        self.interrupt = Interrupt(config.collective_timeout)
        self.position = Position()
        self._interval = Interval()
        # Steps that overflowed gradients made the optimiser, the bank and the EMA skip; each still counts as a step.
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        # Of the chosen positives in the first and the last log line of the training phase, for the summary.
        self.positives: dict[str, float] = {}
        self._rates = Rates(0.0, 0.0, 0.0)
        self._mark = 0.0
        self._saved: tuple[int, int] | None = None
        # On rank 0: whether the latest checkpoint that was due could not be written.
        self.save_failed = False

    def run(self) -> None:
        """From the present position to the end of the run, or to `max_steps`.

        Raises:
            UserError: the loss became NaN or infinite, or the data gave out.
            Interrupted: a signal asked to stop; a checkpoint was written first.
        """
        self.encoders.train()
        self.method.train()
        with self.interrupt, self.progress:
            if self.position.phase == PREPARATION:
                self._prepare()
            if self.position.phase == TRAINING:
                self._train()
            self._save()

    def close(self) -> None:
        """Ends the loader's workers and closes the metrics."""
        self.loader.close()
        self.metrics.close()

    @property
    def finished(self) -> bool:
        return self.position.phase == TRAINING and self.position.epochs_ended >= self.config.epochs

    def _prepare(self) -> None:
        """The bank's initialisation. Its sample orders are epochs -1, -2, ..., so that epoch 0 does not replay them."""
        per_epoch, shown = self.loader.steps_per_epoch, 0
        while self.position.step < (steps := self._preparation_steps()) and not self._out_of_steps():
            if steps != shown:
                self.progress.start_phase("initialisation", steps, self.position.step)
                shown = steps
            epoch, first = divmod(self.position.step, per_epoch)
            for batch in self._batches(-1 - epoch, first, min(per_epoch, steps - epoch * per_epoch)):
                # The schedule's warm-up, or where that is longer than this phase, as long as the phase.
                warmup = max((self.position.step + 1) / steps, self.schedule.warmup_at(self.position.step))
                rates = Rates(self.schedule.lr * warmup, self.schedule.config.key_momentum, warmup)
                self._step(batch, self.method.prepare, rates)
                self._after_step(epoch=-1 - epoch, step=self.position.step)
        if self.position.step >= steps:
            if steps:
                self.method.finish_preparation(self.encoders)
                self.optimizer.state.clear()
            self.position.phase, self.position.step, self.position.phase_seconds = TRAINING, 0, 0.0
            self._interval = Interval()

    def _preparation_steps(self) -> int:
        """Those of the method, and one for each that was skipped, since it has filled no rows."""
        steps = self.method.preparation_steps(self.config.batch_size)
        return steps + int(self.skipped_steps) if steps else 0

    def _train(self) -> None:
        per_epoch = self.loader.steps_per_epoch
        while True:
            epoch, first = divmod(self.position.step, per_epoch)
            if epoch > self.position.epochs_ended:
                self._end_epoch(epoch)
            if self.finished or self._out_of_steps():
                return
            self.progress.start_epoch(epoch, first)
            for batch in self._batches(epoch, first, per_epoch):
                step = self.position.step
                rates = Rates(
                    self.schedule.lr_at(step), self.schedule.key_momentum_at(step + 1), self.schedule.warmup_at(step)
                )
                self._step(batch, self.method, rates)
                self._after_step(epoch, step=self.position.step - epoch * per_epoch)

    def _out_of_steps(self) -> bool:
        return 0 < self.config.max_steps <= self.position.total_steps

    def _batches(self, epoch: int, first: int, end: int) -> Iterator[Batch]:
        """Batches first..end-1 of an epoch, or up to max_steps."""
        count = end - first
        self._mark = time.perf_counter()
        if self.config.max_steps:
            count = min(count, self.config.max_steps - self.position.total_steps)
        with contextlib.closing(self.loader.batches(epoch, first)) as batches:
            yield from itertools.islice(batches, count)

    def _step(self, batch: Batch, objective: Callable[..., StepOutput], rates: Rates) -> None:
        # The host reads the row to fill, so the bank's initialisation is never captured.
        if self.graph is not None and objective is self.method:
            self.graph(lambda views, rates: self._compute(views, self.method, rates), batch.views, rates)
        else:
            onto = dict(device=self.device, memory_format=torch.channels_last, non_blocking=True)
            # On the stream of the steps to come, since torch keeps the memory of each stream apart.
            with self.graph.aside() if self.graph is not None else contextlib.nullcontext():
                self._compute([view.to(**onto) for view in batch.views], objective, rates)
        self._set_lr(rates)
        self._interval.steps += 1
        self._rates = rates
        self.position.step += 1
        self.position.total_steps += 1

    def _compute(self, views: Sequence[torch.Tensor], objective: Callable[..., StepOutput], rates: Rates) -> None:
        """What the device does in a step, and so all of it that a CUDA graph repeats."""
        self._set_lr(rates)
        self.encoders.momentum = rates.key_momentum
        output = objective(views, self.encoders)
        self._interval.add(output)
        if self.device.type == "cpu":
            # On a GPU reading the loss would stall every step; there the log lines and checkpoints look.
            self._require_finite(self.position.total_steps + 1)
        self.optimizer.zero_grad(set_to_none=True)
        skip = optimizer_step(self.optimizer, output.loss, self.scaler)
        self.method.update(rates.warmup, skip)
        self.encoders.advance_key(skip)
        if skip is not None:
            self.skipped_steps += skip != 0

    def _set_lr(self, rates: Rates) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rates.lr

    def _after_step(self, epoch: int, step: int) -> None:
        """Between two steps: the clock, a log line, a checkpoint, a request to stop. `step` counts within `epoch`."""
        values = None
        if self.progress.is_log_step(step - 1):
            self._require_finite(self.position.total_steps)
            require_scale(self.scaler, self.position.total_steps)
            values = self._interval.means()
        now = time.perf_counter()
        self._interval.seconds += now - self._mark
        self.position.phase_seconds += now - self._mark
        self.position.train_seconds += now - self._mark
        if values is not None:
            self._log(values, epoch)
        else:
            self.progress.step()
        every = self.checkpoint.every_steps
        if every and self.position.total_steps % every == 0:
            self._save()
        self._stop_if_asked()
        self._mark = time.perf_counter()

    def _stop_if_asked(self) -> None:
        asked = self.interrupt.agreed()
        if asked is None:
            return
        self._save()
        done = f"stopped by {asked.name} after step {self.position.total_steps}"
        if self.save_failed:
            done += f", without a checkpoint of it: the newest is {self.store.latest() or 'none'}"
        raise Interrupted(done, 128 + asked.value)

    def _log(self, values: dict[str, float], epoch: int) -> None:
        shown = {name: values[name] for name in ("loss", "positive_probability") if name in values}
        self.progress.step({**shown, "lr": self._rates.lr})
        if self.position.phase == TRAINING:
            values |= self.method.rates(self._rates.warmup)
        values |= {
            "lr": self._rates.lr,
            "key_momentum": self._rates.key_momentum,
            "pairs_per_second": self._interval.steps * self.config.batch_size / self._interval.seconds,
            "bad_images": len(self.loader.bad_images),
        }
        if self.scaler.is_enabled():
            values |= {"skipped_steps": int(self.skipped_steps), "loss_scale": self.scaler.get_scale()}
        self.metrics.write(self.position.total_steps, values, epoch=epoch)
        if epoch >= 0 and "positive_probability" in values:
            self.positives.setdefault("positive_probability_start", values["positive_probability"])
            self.positives["positive_probability_end"] = values["positive_probability"]
            if "positive_perplexity" in values:
                self.positives["positive_perplexity_end"] = values["positive_perplexity"]
        self._interval.clear()

    def _end_epoch(self, epochs_done: int) -> None:
        """kNN and a checkpoint where they are due."""
        last = epochs_done == self.config.epochs
        scores = {}
        if self.evaluator is not None and self.evaluator.due(epochs_done, last):
            # An evaluation may take longer than the grace between a signal and the kill.
            self._save()
            self._stop_if_asked()
            scores = self.evaluator.knn(self.encoders.query)
            self.metrics.write(self.position.total_steps, scores, epoch=epochs_done - 1)
            found = ", ".join(f"{name.replace('_', ' ')} {score:.1f} %" for name, score in scores.items())
            log.info("epoch %d/%d: %s", epochs_done, self.config.epochs, found)
        self.position.epochs_ended = epochs_done
        every = self.checkpoint.every_epochs
        if last or scores or (every and epochs_done % every == 0):
            self._save(score=next(iter(scores.values()), None))
        if not last:
            self._count_bad_images()

    def _count_bad_images(self) -> None:
        """Over all ranks. What was trained is kept where they are too many."""
        try:
            self.loader.exchange_bad_images()
        except UserError:
            self._save()
            raise

    def _require_finite(self, step: int) -> None:
        loss = self._interval.sums.get("loss")
        if loss is None or math.isfinite(loss.item()):
            return
        last = self.store.latest()
        way_on = f"the last checkpoint is {last}" if last else "no checkpoint was written yet"
        raise UserError(
            f"the loss is {loss.item()} at step {step}; {way_on}; "
            "lower optimizer.lr or the bank's learning rate, lengthen schedule.warmup_epochs, or take a wider precision"
        )

    def _save(self, score: float | None = None) -> None:
        """Writes a checkpoint of the present position; training goes on where the disk refuses. Every rank takes part.

        With the highest `score` yet it is kept as the best one too.
        """
        at = (self.position.total_steps, self.position.epochs_ended)
        if self._saved == at:
            return
        self._require_finite(self.position.total_steps)
        state = self.state_dict()
        self._saved, self.save_failed = at, False
        if rank() != 0:
            return
        try:
            path = self.store.save(state, self.position.total_steps)
            if score is not None:
                self.store.save_best(path, self.position.total_steps, score)
        except CheckpointWriteError as error:
            self.save_failed = True
            log.error("%s; training goes on without it", error)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, in types that torch.load reads with weights_only=True.

        Every rank calls, for rank 0 to save: a bank that the ranks share is in its state alone.
        """
        epoch, step = divmod(self.position.step, self.loader.steps_per_epoch)
        return {
            "config": self.resolved_config,
            "position": asdict(self.position),
            "loader": {
                "epoch": epoch,
                "step": step,
                "steps_per_epoch": self.loader.steps_per_epoch,
                "batch_size": self.config.batch_size,
                "seed": self.config.seed,
                "draws": self.loader.draws,
                "images": self.loader.images,
            },
            "encoders": self.encoders.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_steps": int(self.skipped_steps),
            "random": capture_random_states(),
            "interval": self._interval.state_dict(),
            "positives": dict(self.positives),
        }

    def load_state_dict(self, state: dict[str, Any], name: str) -> None:
        """Takes up a checkpoint's state; `name` stands in the error lines.

        Raises:
            UserError: other shapes, or a position in an epoch that the present batches do not have.
        """
        position = Position(**state["position"])
        # Checkpoints of the first versions name neither draws nor images.
        then = {"draws": self.loader.draws, "images": self.loader.images} | state["loader"]
        now = {
            "steps_per_epoch": self.loader.steps_per_epoch,
            "batch_size": self.config.batch_size,
            "seed": self.config.seed,
            "draws": self.loader.draws,
            "images": self.loader.images,
        }
        changed = [f"{key} {then[key]} -> {value}" for key, value in now.items() if then[key] != value]
        if changed and (then["step"] or position.phase == PREPARATION):
            raise UserError(
                f"{name} stands in the middle of an epoch, which can't go on with {', '.join(changed)}; "
                "resume with the settings it was made with, or from a checkpoint at an epoch's end"
            )
        if then["draws"] != now["draws"]:
            log.warning("the views have other random numbers from here on: %s, was %s", now["draws"], then["draws"])
        if then["images"] != now["images"]:
            log.warning("other training images from here on: %s, was %s", now["images"], then["images"])
        position.step = then["epoch"] * self.loader.steps_per_epoch + then["step"]
        parts = {"encoders": self.encoders, "method": self.method, "optimizer": self.optimizer, "scaler": self.scaler}
        for part, target in parts.items():
            try:
                target.load_state_dict(state[part])
            except (RuntimeError, ValueError, KeyError, UserError) as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(
                    f"{name} does not fit this configuration ({part}: {reason}); choose another run.folder, "
                    "or the settings it was made with, which stand in config.yaml there"
                ) from None
        self.skipped_steps.fill_(state.get("skipped_steps", 0))
        restore_random_states(state["random"])
        self._interval = Interval(**state["interval"])
        self._interval.sums = {name: value.to(self.device) for name, value in self._interval.sums.items()}
        self.positives = dict(state["positives"])
        self.position = position
        if self.graph is not None:
            self.graph.reset()
        self._saved = (position.total_steps, position.epochs_ended)
