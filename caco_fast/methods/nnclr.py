"""NNCLR (Dwibedi et al., arXiv 2104.14548): the anchor is the queue's row nearest to a view, not the view itself.

The formulas are in docs/method.md.

Legend: b images on this rank, K queue rows, C embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.bank import KeyQueue
from caco_fast.errors import UserError
from caco_fast.methods.base import BACKEND_HELP, Embeddings, Method, StepOutput, check_settings, register, use_of
from caco_fast.methods.info_nce import batch_info_nce
from caco_fast.models import EncoderPair, build_mlp
from caco_fast.ops.checks import BankUse
from caco_fast.ops.rates import Rate
from caco_fast.settings import require_at_least, setting


@dataclass(frozen=True)
class NNCLRConfig:
    queue_size: int = setting(65536, "K, past projections of view a among which the neighbour is found")
    temperature: float = setting(0.1, "t, temperature of the loss")
    predictor_hidden: int = setting(4096, "width of the predictor's hidden layer, which has BatchNorm and ReLU")
    backend: str = setting("auto", BACKEND_HELP)

    def __post_init__(self) -> None:
        check_settings("nnclr", self, ("temperature",))
        require_at_least("nnclr.predictor_hidden", self.predictor_hidden, 1)


@register("nnclr", NNCLRConfig, "NNCLR: nearest neighbours as positives")
class NNCLR(Method):
    """L = 1/2 mean_i [ lse_l(n(z_a,i) . p_b,l / t) - n(z_a,i) . p_b,i / t ] + 1/2 (views swapped).

    z are projections, p = predictor(z) and n(z) is the queue's row nearest to z, a constant; l runs over all ranks.
    """

    key_encoder = False

    def __init__(self, config: NNCLRConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.queue = KeyQueue(config.queue_size, dim, backend=config.backend)
        self.predictor = build_mlp([dim, config.predictor_hidden, dim], bias=True)

    def check_views(self, sizes: Sequence[int]) -> None:
        if len(sizes) != 2:
            raise UserError(f"views: found {len(sizes)} views of an image, expected 2 for nnclr")

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        return Embeddings(encoders.queries(views))

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        projections = embeddings.queries
        # The predictor's BatchNorm takes its statistics per view, as the encoder's does.
        p_a, p_b = (normalize(self.predictor(z), dim=1) for z in projections)
        n_a, n_b = self._neighbours(torch.cat(tuple(projections))).chunk(2)
        halves = [batch_info_nce(n, p, self.config.temperature) for n, p in ((n_a, p_b), (n_b, p_a))]
        loss, probability = (torch.stack(values).mean() for values in zip(*halves))
        return StepOutput(loss, {"positive_probability": probability}, (projections[0].detach(),))

    @torch.no_grad()
    def _neighbours(self, rows: Tensor) -> Tensor:  # [R, C] -> [R, C]
        index, _ = self.queue.select(rows)
        return self.queue.rows(index).to(rows.dtype)

    def update(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        (of_a,) = rows
        self.queue.enqueue(of_a, skip=skip)

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        return [use_of(self.queue, f"{self.section}.backend", images * views, temperatures=(), selects=True)]
