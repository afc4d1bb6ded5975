"""MoCo v2 (Chen et al., arXiv 2003.04297): the baseline, with a queue of past keys as negatives.

Legend: B images on this rank, K queue rows, C embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caco_fast.bank import KeyQueue
from caco_fast.errors import UserError
from caco_fast.methods.base import BACKEND_HELP, Embeddings, Method, StepOutput, check_settings, register, use_of
from caco_fast.methods.info_nce import info_nce
from caco_fast.models import EncoderPair
from caco_fast.ops.checks import BankUse
from caco_fast.ops.rates import Rate
from caco_fast.settings import setting


@dataclass(frozen=True)
class MoCoConfig:
    queue_size: int = setting(65536, "K, keys in the queue")
    temperature: float = setting(0.2, "t, temperature of the loss")
    symmetric: bool = setting(
        False, "use each view once as query and once as key; the loss is the sum of both, so lr 0.03 is 0.06 of a mean"
    )
    backend: str = setting("auto", BACKEND_HELP)

    def __post_init__(self) -> None:
        check_settings("moco", self, ("temperature",))


@register("moco", MoCoConfig, "MoCo v2: the queue of keys")
class MoCo(Method):
    """L = mean_i [ lse(q_i . k_i / t  U  {q_i . n_j / t}_j) - q_i . k_i / t ] over a FIFO queue `n` of past keys.

    The symmetric loss is the sum of that of (q_a, k_b) and that of (q_b, k_a), as the authors have it.
    """

    accumulates = True

    def __init__(self, config: MoCoConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.queue = KeyQueue(config.queue_size, dim, backend=config.backend)

    def check_views(self, sizes: Sequence[int]) -> None:
        if len(sizes) != 2:
            raise UserError(f"views: found {len(sizes)} views of an image, expected 2 for moco")

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        symmetric = self.config.symmetric
        # The keys of view a come first, since they are the first to enter the queue.
        return Embeddings(
            encoders.queries(views if symmetric else views[:1]), encoders.keys(views if symmetric else views[1:])
        )

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        temperature = self.config.temperature
        # The key of a query is that of the other view.
        halves = [
            info_nce(q, k, self.queue.attend(q, temperature)[0], temperature)
            for q, k in zip(embeddings.queries, reversed(embeddings.keys), strict=True)
        ]
        losses, probabilities = (torch.stack(values) for values in zip(*halves))
        return StepOutput(losses.sum(), {"positive_probability": probabilities.mean()}, tuple(embeddings.keys))

    def adversarial_loss(self, embeddings: Embeddings, anchor: Tensor, other: Tensor) -> Tensor:
        temperature = self.config.temperature
        # The last key is that of view b.
        return info_nce(other, embeddings.keys[-1], self.queue.attend(other, temperature)[0], temperature)[0]

    def update(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        for keys in rows:
            self.queue.enqueue(keys, skip=skip)

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        # The halves of a symmetric loss attend one after the other.
        return [use_of(self.queue, f"{self.section}.backend", images, temperatures=((self.config.temperature,),))]
