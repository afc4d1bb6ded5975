"""What a method is: views and encoders in, loss and bank or queue update out.

Legend: B images on this rank, C embedding size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from caco_fast.errors import UserError
from caco_fast.models import EncoderPair
from caco_fast.ops.dispatch import BACKENDS
from caco_fast.ops.rates import Rate


@dataclass
class StepOutput:
    """The differentiable loss of one step, and 0-d tensors that the trainer averages between log lines."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Method(nn.Module, ABC):
    """One self-supervised objective with the bank or queue that it learns from.

    The trainer calls, at every step: `forward`, then the backward pass and the optimiser, then `update`, and then lets
    the key encoder follow (`EncoderPair.advance_key`). Everything that must survive a restart is a parameter or buffer,
    so that `state_dict` holds it.

    A method that fills its bank first has `preparation_steps` > 0; during that phase the trainer calls `prepare` in
    place of `forward`, and `finish_preparation` once at its end, before it restarts optimiser and data order.
    """

    @abstractmethod
    def check_views(self, sizes: Sequence[int]) -> None:
        """Raises UserError where the method can't use views of these sides in pixels, in the configured order."""

    @abstractmethod
    def forward(self, views: Sequence[torch.Tensor], encoders: EncoderPair) -> StepOutput:
        """Views [B, channels, h, w] each, in the configured order, to the loss of this step."""

    @abstractmethod
    def update(self, warmup: Rate, skip: torch.Tensor | None = None) -> None:
        """The step of bank or queue, from what the last forward left. `warmup`: share of the full rate, in (0, 1].

        skip: a 0-d flag on the device; where it is not 0 the optimiser has skipped this step, and so does the bank.
        """

    def losses(self) -> Sequence[nn.Module]:
        """The parts of `forward` behind the encoders that torch.compile may take, each without a graph break."""
        return ()

    def rates(self, warmup: float) -> dict[str, float]:
        """The rates of `update` at this warm-up, and what else is read on log steps only."""
        return {}

    def preparation_steps(self, batch_size: int) -> int:
        """How many steps of `prepare` come before training, at this global batch size."""
        return 0

    def prepare(self, views: Sequence[torch.Tensor], encoders: EncoderPair) -> StepOutput:
        raise NotImplementedError(f"{type(self).__name__} has no preparation phase")

    def finish_preparation(self, encoders: EncoderPair) -> None:
        """Called once after the last step of `prepare`."""


def check_settings(section: str, config: Any, positive: Sequence[str]) -> None:
    """Raises UserError where a setting named in `positive` is not above 0, or `backend` unknown to the ops."""
    for name in positive:
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"{section}.{name}: must be above 0, found {getattr(config, name)}")
    if config.backend not in BACKENDS:
        raise UserError(f"{section}.backend: found '{config.backend}', want one of {', '.join(BACKENDS)}")
