"""One training step: forward, loss, backward, the optimiser, the bank, and the key encoder's EMA.

The trainer, the benchmarks and the tests all call a TrainStep. `engine/step_graph.py` has its captured form.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from caco_fast.distributed import is_distributed
from caco_fast.engine.precision import optimizer_step
from caco_fast.engine.state import Interval
from caco_fast.errors import UserError
from caco_fast.methods import Method, Phase, StepOutput
from caco_fast.models import EncoderPair
from caco_fast.models.batch_norm import (
    average_over_ranks,
    require_statistics_of_all_ranks,
    statistics_of_this_rank,
)
from caco_fast.ops.rates import Rate

log = logging.getLogger(__name__)


class Rates(NamedTuple):
    """The values of the schedule for one step: numbers, or for a captured step 0-d tensors on the device."""

    lr: Rate
    # Momentum of the EMA at the step's end, which makes the keys of the next step.
    key_momentum: Rate
    # Share of the full rate at which the bank steps.
    warmup: Rate


class TrainStep:
    """One step of a phase on a batch of views: `step.enter(phase)`, then `step(views, rates)` for every batch.

    It owns two sums over steps. `interval` has the values since the last log line. `skipped_steps`, [], counts the
    steps whose fp16 gradients overflowed, so that optimiser, bank and EMA skipped them.

    accumulate: parts of this rank's batch, each with a forward and a backward of its own. Optimiser, bank and EMA step
    once, as with the whole batch. clip_gradient: the largest norm of the gradients; 0 leaves them as they are.
    """

    def __init__(
        self,
        method: Method,
        encoders: EncoderPair,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        *,
        accumulate: int = 1,
        clip_gradient: float = 0.0,
    ) -> None:
        require_parts(method, accumulate)
        self.accumulate = accumulate
        self.clip_gradient = clip_gradient
        self.method = method
        self.encoders = encoders
        self.optimizer = optimizer
        self.scaler = scaler
        self.device = device
        self.interval = Interval()
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        # On a GPU, reading the loss would make the host wait in every step, and of several ranks one alone would stop.
        # There log lines and checkpoints judge the mean over all ranks.
        self.checks_loss = device.type == "cpu" and not is_distributed()
        # A context for each part of a step, by its name, for those who measure it.
        self.span: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()
        self.phase: Phase | None = None
        self._trained: nn.Module | None = None
        self._own_statistics: list[Tensor] = []
        self._first = False

    def enter(self, phase: Phase) -> None:
        """Prepare for the steps of `phase`.

        On several ranks DistributedDataParallel is made anew, since it learns from its first step which parameters get
        gradients.
        """
        self.phase = phase
        self._own_statistics = statistics_of_this_rank(self.encoders, self.method)
        # The old one goes first, and its hooks with it.
        self._trained = None
        with self.aside():
            self._trained = _trained_modules(self.method, self.encoders, phase, self.device)
        # In the phases before the training some parameters may get no gradient.
        self._first = phase.steps is None

    def aside(self) -> AbstractContextManager[None]:
        """The context for steps that are launched one by one, and for making DistributedDataParallel."""
        return nullcontext()

    def reset(self) -> None:
        """Note that a tensor which the step writes to was replaced; a captured step is then captured anew."""

    def __call__(self, views: Sequence[Tensor], rates: Rates) -> None:  # each [B, channels, h, w]
        """One step on this rank's views.

        Raises:
            LossNotFinite: on one CPU, before anything is updated.
            UserError: a parameter of the method gets no gradient, so that it would never be trained.
        """
        self._launch(views, rates)
        if self._first:
            self._first = False
            self._require_gradients()
        # A captured step sets tensors; log lines and checkpoints read numbers.
        self.set_lr(rates.lr)
        self.interval.steps += 1

    def _launch(self, views: Sequence[Tensor], rates: Rates) -> None:
        with self.aside():
            moved = [view.to(self.device, non_blocking=True, memory_format=torch.channels_last) for view in views]
            self.compute(moved, rates)

    def compute(self, views: Sequence[Tensor], rates: Rates) -> None:
        """What the device does in a step, which is all that a CUDA graph repeats."""
        self.set_lr(rates.lr)
        parts = zip(*(view.chunk(self.accumulate) for view in views), strict=True)
        rows = [self._part(of_part, number) for number, of_part in enumerate(parts)]
        with self.span("optimiser"):
            skip, norm = optimizer_step(self.optimizer, self.scaler, self.clip_gradient)
        self.interval.add({"gradient_norm": norm})
        with self.span("loss + bank"):
            # The rows of all parts at once: the bank, and so every part's loss, is that from before the step.
            together = rows[0] if self.accumulate == 1 else [torch.cat(of_parts) for of_parts in zip(*rows)]
            self._phase.update(together, rates.warmup, skip)
        with self.span("EMA"):
            self.encoders.advance_key(rates.key_momentum, skip)
            average_over_ranks(self._own_statistics)
        if skip is not None:
            self.skipped_steps += skip != 0

    def _part(self, views: Sequence[Tensor], part: int) -> Sequence[Tensor]:
        """Forward and backward of one part of the batch; returns the rows for the update."""
        last = part == self.accumulate - 1
        with self.span("loss + bank"):
            output = self._forward(views, last)
        self.interval.add({"loss": output.loss, **output.metrics}, share=1 / self.accumulate)
        if self.checks_loss:
            self.interval.require_finite()
        if part == 0:
            self.optimizer.zero_grad(set_to_none=True)
        loss = self.scaler.scale(output.loss if self.accumulate == 1 else output.loss / self.accumulate)
        with self.span("backward"):
            if last:
                loss.backward()
            else:
                self._add_gradients(loss)
        return output.rows

    def _add_gradients(self, loss: Tensor) -> None:
        """Add the gradients of a part before the last, on this rank alone.

        The hooks of `backward` are those by which DistributedDataParallel averages the sums of all parts, once a step.
        `no_sync` would not do: with a static graph it counts the backward passes of all parts as one.
        """
        trained = [value for group in self.optimizer.param_groups for value in group["params"] if value.requires_grad]
        for value, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            if gradient is not None:
                value.grad = gradient if value.grad is None else value.grad.add_(gradient)

    def set_lr(self, lr: Rate) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def _phase(self) -> Phase:
        if self.phase is None:
            raise RuntimeError("TrainStep: enter(phase) comes before the first step")
        return self.phase

    def _forward(self, views: Sequence[Tensor], averages: bool) -> StepOutput:
        """The objective, whose backward pass averages the gradients over the ranks if `averages`."""
        if self._trained is None or not averages:
            return self._phase.objective(views, self.encoders)
        return StepOutput(*self._trained(*views))

    def _require_gradients(self) -> None:
        """Check that the first step of training gave every parameter a gradient. The host waits for nothing here."""
        for owner, module in (("query encoder", self.encoders.query), ("method", self.method)):
            trained = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
            idle = [name for name, value in trained if value.grad is None]
            if not idle:
                continue
            found = f"{', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''} of the {owner}"
            if module is self.method:
                raise UserError(
                    f"method {type(self.method).__name__}: {found} gets no gradient and would never be trained; use it "
                    "in the loss, or set its requires_grad to False"
                )
            log.warning("%s gets no gradient: it stays as it was initialised", found)


def require_parts(method: Method, accumulate: int) -> None:
    """Tell the method in how many parts its batches come.

    Raises:
        UserError: its loss is not the mean of the losses of parts.
    """
    for module in method.modules():
        if not isinstance(module, Method):
            continue
        if accumulate > 1 and not module.accumulates:
            raise UserError(
                f"trainer.accumulate: found {accumulate}, but the loss of {type(module).__name__} needs its whole "
                "batch at once; set it to 1, and lower trainer.batch_size or use more ranks"
            )
        module.parts = accumulate


class _Objective(nn.Module):
    """The trained modules of a step behind one forward: views in, the fields of StepOutput out."""

    def __init__(self, method: Method, encoders: EncoderPair, phase: Phase) -> None:
        super().__init__()
        self.query = encoders.query
        self.method = method
        # A tuple hides the pair from nn.Module, so that DistributedDataParallel does not see the key encoder.
        self._encoders = (encoders,)
        self._phase = phase

    def forward(self, *views: Tensor) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        output = self._phase.objective(views, self._encoders[0])
        # Only the loss may carry a gradient, or the ranks would wait for one that never comes.
        metrics = {name: value.detach() for name, value in output.metrics.items()}
        return output.loss, metrics, tuple(row.detach() for row in output.rows)


def _trained_modules(
    method: Method, encoders: EncoderPair, phase: Phase, device: torch.device
) -> DistributedDataParallel | None:
    """The objective of a phase, with gradients averaged over all ranks; None on one rank.

    Raises:
        UserError: a BatchNorm whose statistics would be those of one rank.
    """
    if not is_distributed():
        return None
    for module in (encoders, method):
        require_statistics_of_all_ranks(module)
    objective = _Objective(method, encoders, phase)
    # A sharded bank differs from rank to rank, and every rank keeps the other buffers equal by itself.
    buffers = [name for name, _ in objective.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, buffers)
    wrapped = DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # Within a phase every step uses the same parameters.
        static_graph=True,
    )
    # By default it times every hundredth step, for which it waits for the device. A CUDA graph can't hold that.
    wrapped._set_ddp_runtime_logging_sample_rate(2**31 - 1)
    return wrapped
