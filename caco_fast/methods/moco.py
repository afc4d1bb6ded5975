"""MoCo v2 (Chen et al., arXiv 2003.04297): the baseline, with a queue of past keys as negatives.

Legend: B images on this rank, K queue rows, C embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from caco_fast.bank import KeyQueue
from caco_fast.errors import UserError
from caco_fast.methods.base import Method, StepOutput, check_settings
from caco_fast.methods.info_nce import info_nce
from caco_fast.models import EncoderPair
from caco_fast.ops import bank_attend
from caco_fast.ops.rates import Rate
from caco_fast.settings import setting


@dataclass(frozen=True)
class MoCoConfig:
    queue_size: int = setting(65536, "K, keys in the queue")
    temperature: float = setting(0.2, "t of the loss")
    symmetric: bool = setting(False, "each view is query once and key once; the loss is the mean of both")
    backend: str = setting("auto", "bank operations: auto, reference, tiled or cuda")


class MoCo(Method):
    """L = mean_i [ lse(q_i . k_i / t  U  {q_i . n_j / t}_j) - q_i . k_i / t ] over a FIFO queue `n` of past keys."""

    def __init__(self, config: MoCoConfig, dim: int) -> None:
        super().__init__()
        check_settings("moco", config, ("temperature",))
        self.config = config
        self.queue = KeyQueue(config.queue_size, dim)
        self._keys: list[torch.Tensor] = []

    def check_views(self, sizes: Sequence[int]) -> None:
        if len(sizes) != 2:
            raise UserError(f"views: moco takes 2 views of an image, found {len(sizes)}")

    def forward(self, views: Sequence[torch.Tensor], encoders: EncoderPair) -> StepOutput:
        queries = encoders.queries(views if self.config.symmetric else views[:1])
        # The key of view a's query is view b, and the reverse.
        self._keys = encoders.keys([views[1], views[0]] if self.config.symmetric else views[1:])
        queue, temperature = self.queue.queue, self.config.temperature
        halves = [
            info_nce(q, k, bank_attend(q, queue, temperature, self.config.backend)[0], temperature)
            for q, k in zip(queries, self._keys)
        ]
        loss = torch.stack([half[0] for half in halves]).mean()
        return StepOutput(loss, {"positive_probability": torch.stack([half[1] for half in halves]).mean()})

    def update(self, warmup: Rate, skip: torch.Tensor | None = None) -> None:
        for keys in self._keys:
            self.queue.enqueue(keys, skip=skip)
        self._keys = []
