"""The training loop: the phases of a run, with logs, kNN and checkpoints between their steps.

Legend: a step is one optimiser step on `batch_size` images over all ranks.
"""

import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from caco_fast.data import Batch, TrainLoader
from caco_fast.distributed import broadcast_object, rank
from caco_fast.engine.agreement import require_equal_ranks
from caco_fast.engine.checkpoint import (
    CheckpointStore,
    CheckpointWriteError,
    capture_random_states,
    load_parts,
    restore_random_states,
)
from caco_fast.engine.metrics import MetricsWriter, peak_memory
from caco_fast.engine.precision import require_scale
from caco_fast.engine.profile import Profiler
from caco_fast.engine.progress import Progress
from caco_fast.engine.ranks import Interrupt, Interrupted
from caco_fast.engine.settings import CheckpointConfig, TrainerConfig
from caco_fast.engine.state import Interval, LossNotFinite, Position
from caco_fast.engine.step import Rates, TrainStep
from caco_fast.errors import UserError
from caco_fast.evaluate.evaluator import Evaluator
from caco_fast.evaluate.held_out import HeldOut, describe
from caco_fast.methods import Phase
from caco_fast.optim import Schedule

log = logging.getLogger("caco_fast.trainer")

# Names of the phases in checkpoints of format version 1.
PHASES_OF_VERSION_1 = {"preparation": "initialisation"}


class Trainer:
    """The loop over the phases of a method. The caller builds every component; the loop knows only their interfaces."""

    def __init__(
        self,
        config: TrainerConfig,
        checkpoint: CheckpointConfig,
        *,
        step: TrainStep,
        schedule: Schedule,
        loader: TrainLoader,
        evaluator: Evaluator | None,
        held_out: HeldOut | None = None,
        store: CheckpointStore,
        metrics: MetricsWriter,
        progress: Progress,
        resolved_config: str,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.step = step
        self.schedule = schedule
        self.loader = loader
        self.evaluator = evaluator
        self.held_out = held_out
        self.store = store
        self.metrics = metrics
        self.progress = progress
        self.resolved_config = resolved_config
        self.method, self.encoders = step.method, step.encoders
        self.phases = self.method.phases(config.batch_size)
        self.interrupt = Interrupt(config.collective_timeout, 3600 * config.max_hours)
        self.profiler = Profiler(config.profile, metrics.folder, step.device)
        self.position = Position(phase=self.phases[0].name)
        # Metrics of the chosen positives in the first and the last log line of the training, and the last ones of the
        # held-out images, for the summary.
        self.positives: dict[str, float] = {}
        # The step at which kNN was last computed, and its scores.
        self.scores: tuple[int, dict[str, float]] | None = None
        self._saved: tuple[int, int] | None = None
        # On rank 0: whether the latest checkpoint that was due could not be written.
        self.save_failed = False

    def run(self) -> None:
        """Train from the present position to the end of the run, or to `max_steps` or `max_hours`.

        Raises:
            UserError: the loss became NaN or infinite, or the data ran out.
            Interrupted: a signal asked to stop; a checkpoint was written first.
        """
        self.encoders.train()
        self.method.train()
        self.profiler.after(self.position.total_steps)
        with self.interrupt, self.progress:
            for phase in self.phases[self.phases.index(self.phase) :]:
                if not self._run_phase(phase):
                    break
                if phase is not self.phases[-1]:
                    self._finish_phase(phase)
            if self.interrupt.out_of_time:
                done = self.position.total_steps
                log.info("trainer.max_hours: the time is over after step %d; continue with --resume auto", done)
            self._save()

    def close(self) -> None:
        """End the loader's workers, close the metrics and the profile, and drop a captured step.

        NCCL waits at its end for every graph that holds its collectives, and the trainer may live longer than that.
        """
        self.profiler.close()
        self.step.reset()
        self.loader.close()
        self.metrics.close()

    @property
    def phase(self) -> Phase:
        """The phase of the present position."""
        return next(phase for phase in self.phases if phase.name == self.position.phase)

    @property
    def training(self) -> bool:
        """Whether the run is in its last phase, which follows the schedule."""
        return self.phase.steps is None

    @property
    def finished(self) -> bool:
        return self.training and self.position.epochs_ended >= self.config.epochs

    def _run_phase(self, phase: Phase) -> bool:
        """Do the steps of a phase from the present position, epoch by epoch.

        Returns whether the phase is complete. It is not if `max_steps` or `max_hours` came first.
        """
        self.step.enter(phase)
        per_epoch, shown = self.loader.steps_per_epoch, None
        while True:
            epoch, first = divmod(self.position.step, per_epoch)
            if phase.steps is None and epoch > self.position.epochs_ended:
                self._end_epoch(epoch)
            steps = self._steps_of(phase)
            done = self.position.step >= steps
            if done or self._ends_early():
                return done
            end = min(per_epoch, steps - epoch * per_epoch)
            if phase.steps is None:
                self.progress.start_epoch(epoch, first)
            else:
                if steps != shown:
                    self.progress.start_phase(phase.name, steps, self.position.step)
                    shown = steps
                # The orders of images are those of epochs -1, -2, ..., so that epoch 0 does not repeat them.
                epoch = -1 - epoch
            self._run_epoch(phase, epoch, first, end, steps)

    def _run_epoch(self, phase: Phase, epoch: int, first: int, end: int, steps: int) -> None:
        """Do a step on each of the batches first..end-1 of an epoch, or up to `max_steps` or `max_hours`.

        steps: the number of steps of the whole phase.
        """
        mark = time.perf_counter()
        for batch in self._batches(epoch, first, end):
            self.step.interval.waited += time.perf_counter() - mark
            rates = self._rates(phase, steps)
            self._step(batch, rates)
            step = self.position.step - (epoch * self.loader.steps_per_epoch if epoch >= 0 else 0)
            values = self._values() if self.progress.is_log_step(step - 1) else None
            self._count_seconds(time.perf_counter() - mark)
            if values is not None:
                self._log(values, rates, epoch)
            else:
                self.progress.step()
            if self.checkpoint.every_steps and self.position.total_steps % self.checkpoint.every_steps == 0:
                self._save()
            self.profiler.after(self.position.total_steps)
            self._stop_if_asked()
            if self._ends_early():
                break
            mark = time.perf_counter()

    def _step(self, batch: Batch, rates: Rates) -> None:
        try:
            self.step(batch.views, rates)
        except LossNotFinite as error:
            raise self._not_finite(error.loss, self.position.total_steps + 1) from None
        self.position.step += 1
        self.position.total_steps += 1

    def _rates(self, phase: Phase, steps: int) -> Rates:
        step = self.position.step
        if phase.steps is None:
            lr, momentum = self.schedule.lr_at(step), self.schedule.key_momentum_at(step + 1)
            return Rates(lr, momentum, self.schedule.warmup_at(step))
        # The schedule's warm-up, which ends with this phase at the latest.
        warmup = max((step + 1) / steps, self.schedule.warmup_at(step))
        momentum = self.schedule.config.key_momentum if phase.key_momentum is None else phase.key_momentum
        return Rates(self.schedule.lr * warmup, momentum, warmup)

    def _steps_of(self, phase: Phase) -> int:
        """All steps of a phase. A phase before the training may repeat the steps that were skipped."""
        if phase.steps is None:
            return self.config.epochs * self.loader.steps_per_epoch
        return phase.steps + (int(self.step.skipped_steps) if phase.repeats_skipped else 0)

    def _finish_phase(self, phase: Phase) -> None:
        phase.finish(self.encoders)
        self.step.optimizer.state.clear()
        following = self.phases[self.phases.index(phase) + 1]
        self.position.phase, self.position.step, self.position.phase_seconds = following.name, 0, 0.0
        self.step.interval = Interval()

    def _ends_early(self) -> bool:
        return self.interrupt.out_of_time or 0 < self.config.max_steps <= self.position.total_steps

    def _batches(self, epoch: int, first: int, end: int) -> Iterator[Batch]:
        count = end - first
        if self.config.max_steps:
            count = min(count, self.config.max_steps - self.position.total_steps)
        batches = self.loader.batches(epoch, first)
        try:
            yield from itertools.islice(batches, count)
        finally:
            # Ends the loader's work on the batches that are not taken.
            batches.close()

    def _values(self) -> dict[str, float]:
        """Means of the steps since the last log line, over all ranks (collective)."""
        values = self.step.interval.means()
        # All ranks judge the same mean, so that none of them stops alone and leaves the others waiting.
        if not math.isfinite(values["loss"]):
            raise self._not_finite(values["loss"], self.position.total_steps)
        require_scale(self.step.scaler, self.position.total_steps)
        return values

    def _count_seconds(self, seconds: float) -> None:
        self.step.interval.seconds += seconds
        self.position.phase_seconds += seconds
        self.position.train_seconds += seconds

    def _stop_if_asked(self) -> None:
        asked = self.interrupt.agreed()
        if asked is None:
            return
        self._save()
        done = f"stopped by {asked.name} after step {self.position.total_steps}"
        if self.save_failed:
            done += f", without a checkpoint of it: the newest is {self.store.latest() or 'none'}"
        raise Interrupted(done, 128 + asked.value)

    def _log(self, values: dict[str, float], rates: Rates, epoch: int) -> None:
        """One line on the console and in metrics.jsonl."""
        interval, scaler = self.step.interval, self.step.scaler
        lr, key_momentum, warmup = map(float, rates)
        shown = [name for name in ("loss", *self.method.shown) if name in values]
        if self.training:
            values |= self.method.rates(warmup)
        values |= {
            "lr": lr,
            "key_momentum": key_momentum,
            "pairs_per_second": interval.steps * self.config.batch_size / interval.seconds,
            "data_wait": interval.waited / interval.seconds,
            "peak_memory_gib": peak_memory(self.step.device) / 2**30,
            "bad_images": len(self.loader.bad_images),
        }
        if scaler.is_enabled():
            values |= {"skipped_steps": int(self.step.skipped_steps), "loss_scale": scaler.get_scale()}
        shown += ["lr", "pairs_per_second", "data_wait", "peak_memory_gib"]
        shown += ["skipped_steps"] if values.get("skipped_steps") else []
        self.progress.step({name: values[name] for name in shown})
        self.metrics.write(self.position.total_steps, values, epoch=epoch)
        if self.training and "positive_probability" in values:
            self.positives.setdefault("positive_probability_start", values["positive_probability"])
            self.positives["positive_probability_end"] = values["positive_probability"]
            if "positive_perplexity" in values:
                self.positives["positive_perplexity_end"] = values["positive_perplexity"]
        interval.clear()

    def _end_epoch(self, epochs_done: int) -> None:
        """Evaluate, by kNN and on the held-out images, and write a checkpoint, if they are due."""
        last = epochs_done == self.config.epochs
        parts = [part for part in (self.evaluator, self.held_out) if part is not None and part.due(epochs_done, last)]
        scores: dict[str, float] = {}
        if parts:
            # An evaluation may take longer than the grace between a signal and the kill.
            self._save()
            self._stop_if_asked()
            scores = self._evaluate(epochs_done)
        self.position.epochs_ended = epochs_done
        every = self.checkpoint.every_epochs
        milestone = self.checkpoint.keep_every > 0 and epochs_done % self.checkpoint.keep_every == 0
        if last or parts or milestone or (every and epochs_done % every == 0):
            self._save(
                score=next(iter(scores.values()), None),
                best=last or bool(parts),
                milestone=epochs_done if milestone else None,
            )
        if not last:
            self._count_bad_images()

    def _evaluate(self, epochs_done: int) -> dict[str, float]:
        """Log what the evaluations find, and return the kNN accuracies, of which there are none without labels."""
        scores: dict[str, float] = {}
        if self.evaluator is not None:
            scores = self.evaluator.knn(self.encoders.query)
            self.scores = (self.position.total_steps, scores)
        held_out = self.held_out.measure(self.method, self.encoders) if self.held_out is not None else {}
        self.positives |= held_out
        self.metrics.write(self.position.total_steps, scores | held_out, epoch=epochs_done - 1)
        found = [f"{name.replace('_', ' ')} {score:.1f} %" for name, score in scores.items()]
        found += [describe(held_out)] if held_out else []
        log.info("epoch %d/%d: %s", epochs_done, self.config.epochs, ", ".join(found))
        return scores

    def _count_bad_images(self) -> None:
        """Exchange bad images over all ranks. If they are too many, what was trained is kept before the run ends."""
        try:
            self.loader.exchange_bad_images()
        except UserError:
            self._save()
            raise

    def _not_finite(self, loss: float, step: int) -> UserError:
        last = self.store.latest()
        way_on = f"the last checkpoint is {last}" if last else "no checkpoint was written yet"
        return UserError(
            f"the loss is {loss} at step {step}; {way_on}; "
            "lower optimizer.lr or the bank's learning rate, lengthen schedule.warmup_epochs, or take a wider precision"
        )

    def _save(self, score: float | None = None, best: bool = False, milestone: int | None = None) -> None:
        """Write a checkpoint of the present position (collective); training continues if the disk refuses it.

        A checkpoint with the highest `score` yet is kept as the best one too. With `best`, and without any score in
        the run, so is the newest: nothing tells which one is better. That of a `milestone`, an epoch, is kept for good.
        Where only the end of the epoch is new since the checkpoint of this step, a note of it takes the place of a
        second file.

        Raises:
            UserError: the loss is not finite, or the ranks no longer have the same weights.
        """
        step, ended = at = (self.position.total_steps, self.position.epochs_ended)
        if self._saved == at:
            return
        again = self._saved is not None and self._saved[0] == step and self._is_written(step)
        state = None if again else self._checked_state()
        self._saved, self.save_failed = at, False
        if rank() != 0:
            return
        try:
            path = self.store.save(state, step) if state is not None else self.store.note_epoch(step, ended)
            if score is not None:
                self.store.save_best(path, step, score)
            elif best:
                self.store.save_newest_as_best(path, step)
            if milestone is not None:
                self.store.save_milestone(path, milestone)
        except CheckpointWriteError as error:
            self.save_failed = True
            log.error("%s; training continues without it", error)

    def _is_written(self, step: int) -> bool:
        """Whether the checkpoint of a step is in the run folder, as rank 0 knows (collective)."""
        return broadcast_object(not self.save_failed and self.store.path_of(step).exists())

    def _checked_state(self) -> dict[str, Any]:
        """The state, once the loss is finite and the ranks are found equal (collective)."""
        if self.step.interval.steps:
            self._values()
        require_equal_ranks(self.encoders, self.method, f"at step {self.position.total_steps}", self.store.latest())
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to continue, in types that torch.load reads with weights_only=True (collective).

        Rank 0 saves it: a bank that the ranks share is in its state alone.
        """
        epoch, step = divmod(self.position.step, self.loader.steps_per_epoch)
        return {
            "config": self.resolved_config,
            "position": asdict(self.position),
            "loader": {"epoch": epoch, "step": step, **self._data_of_this_run()},
            "encoders": self.encoders.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "skipped_steps": int(self.step.skipped_steps),
            "random": capture_random_states(),
            "interval": self.step.interval.state_dict(),
            "positives": dict(self.positives),
        }

    def _data_of_this_run(self) -> dict[str, Any]:
        """The values that the position within an epoch depends on."""
        return {
            "steps_per_epoch": self.loader.steps_per_epoch,
            "batch_size": self.config.batch_size,
            "seed": self.config.seed,
            "draws": self.loader.draws,
            "images": self.loader.images,
        }

    def load_state_dict(self, state: dict[str, Any], name: str) -> None:
        """Continue from a checkpoint's state; `name` is its name in error lines.

        Raises:
            UserError: other shapes, or a position in an epoch that the present batches do not have.
        """
        position = Position(**state["position"])
        position.phase = PHASES_OF_VERSION_1.get(position.phase, position.phase)
        if position.phase not in (phase.name for phase in self.phases):
            raise UserError(f"{name} is in a phase '{position.phase}' that this method does not have")
        now = self._data_of_this_run()
        # Checkpoints of the first versions name neither draws nor images.
        then = {"draws": now["draws"], "images": now["images"]} | state["loader"]
        changed = [f"{key} {then[key]} -> {value}" for key, value in now.items() if then[key] != value]
        if changed and (then["step"] or position.phase != self.phases[-1].name):
            raise UserError(
                f"{name} is in the middle of an epoch, which can't continue with {', '.join(changed)}; "
                "resume with the settings it was made with, or from a checkpoint at an epoch's end"
            )
        if then["draws"] != now["draws"]:
            log.warning("the views have other random numbers from here on: %s, was %s", now["draws"], then["draws"])
        if then["images"] != now["images"]:
            log.warning("other training images from here on: %s, was %s", now["images"], then["images"])
        position.step = then["epoch"] * self.loader.steps_per_epoch + then["step"]
        parts = {"encoders": self.encoders, "method": self.method, "optimizer": self.step.optimizer}
        load_parts(parts, self.step.scaler, state, name)
        self.step.skipped_steps.fill_(state.get("skipped_steps", 0))
        restore_random_states(state["random"])
        self.step.interval.load_state_dict(state["interval"], self.step.device)
        self.positives = dict(state["positives"])
        self.position = position
        self.step.reset()
        self._saved = (position.total_steps, position.epochs_ended)
