"""SimCLR (Chen et al., arXiv 2002.05709) and the one-way InfoNCE of CLAE's authors: all candidates are of the batch.

The formulas are in docs/method.md.

Legend: b images on this rank, B on all ranks, C embedding size.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from caco_fast.distributed import all_gather_rows_with_gradient
from caco_fast.errors import UserError
from caco_fast.methods.base import Embeddings, Method, StepOutput, check_settings, register
from caco_fast.methods.info_nce import batch_info_nce, batch_logits, own_rows, without
from caco_fast.models import EncoderPair
from caco_fast.settings import setting


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:  # [b, C] each
    """NT-Xent: each of the 2B rows of all ranks against all others, its positive the other view of its image.

    Returns:
        The mean over this rank's 2b rows, and the mean probability of the positive without gradient, both 0-d.
    """
    rows = torch.cat([a, b])
    own = own_rows(rows)  # [2b]
    logits = batch_logits(rows, all_gather_rows_with_gradient(rows), temperature)  # [2b, 2B]
    # A row is not a candidate of itself.
    losses = cross_entropy(without(own.unsqueeze(1), logits), own.roll(len(a)), reduction="none")
    return losses.mean(), (-losses).detach().exp().mean()


class BatchMethod(Method):
    """Two views against each other and the other images of all ranks, by the query encoder alone."""

    key_encoder = False

    def __init__(self, config: Any, dim: int) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def contrast(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and mean probability of the positive, [] each, of the embeddings of two views, [b, C] each."""

    def check_views(self, sizes: Sequence[int]) -> None:
        if len(sizes) != 2:
            raise UserError(f"views: found {len(sizes)} views of an image, expected 2 for {self.section}")

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        return Embeddings(encoders.queries(views))

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        loss, probability = self.contrast(*embeddings.queries)
        return StepOutput(loss, {"positive_probability": probability})

    def adversarial_loss(self, embeddings: Embeddings, anchor: Tensor, other: Tensor) -> Tensor:
        return self.contrast(anchor, other)[0]


@dataclass(frozen=True)
class SimCLRConfig:
    temperature: float = setting(0.1, "t, temperature of the loss; 0.1 on ImageNet, 0.5 on CIFAR-10")

    def __post_init__(self) -> None:
        check_settings("simclr", self, ("temperature",))


@register("simclr", SimCLRConfig, "SimCLR: the other images of the batch as negatives")
class SimCLR(BatchMethod):
    """L = mean over the 2B rows z_i of [ lse_{l != i}(z_i . z_l / t) - z_i . z_i' / t ], z_i' the other view of z_i."""

    def contrast(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return nt_xent(a, b, self.config.temperature)


@dataclass(frozen=True)
class InfoNCEConfig:
    temperature: float = setting(0.1, "t, temperature of the loss")

    def __post_init__(self) -> None:
        check_settings("infonce", self, ("temperature",))


@register("infonce", InfoNCEConfig, "one-way InfoNCE over the batch, a base of CLAE")
class InfoNCE(BatchMethod):
    """L = mean_i [ lse_l(a_i . b_l / t) - a_i . b_i / t ]: view a looks for its image among the views b."""

    def contrast(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return batch_info_nce(a, b, self.config.temperature)
