"""AdCo (Hu et al., arXiv 2011.08435): the negatives are a bank that is learned against the encoder.

The formulas are in docs/method.md.

Legend: B images on this rank, N ranks, R query rows on this rank, S batch keys in a softmax, K bank rows, C embedding
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caco_fast.bank import LearnableBank
from caco_fast.distributed import all_gather_rows, world_size
from caco_fast.errors import UserError
from caco_fast.methods.base import Embeddings, StepOutput, register
from caco_fast.methods.info_nce import batch_logits, own_rows
from caco_fast.methods.learned_bank import OPERANDS, LearnedBankConfig, LearnedBankMethod
from caco_fast.models import EncoderPair
from caco_fast.ops.checks import BankUse
from caco_fast.settings import setting


@dataclass(frozen=True)
class AdCoConfig(LearnedBankConfig):
    temperature: float = setting(0.12, "t, temperature of the encoder's loss")
    bank_temperature: float = setting(0.02, "t_m, temperature of the bank's step")
    bank_weight_decay: float = setting(1e-4, "wd, weight decay of the bank's rows, a part of their velocity")
    bank_lr: float = setting(3.0, "eta, learning rate of the bank")
    bank_warmup: bool = setting(False, "whether bank_lr follows the warm-up of the schedule; false: constant")
    symmetric: bool = setting(
        False, "use each view once as query and once as key; loss and bank gradient are the mean of both"
    )
    batch_negatives: bool = setting(
        True, "whether the other keys of the global batch are negatives beside the bank; true rules out accumulate"
    )
    warm_start_temperature: float | None = setting(
        None, "temperature of the InfoNCE loss while keys fill the bank; null: that of the loss"
    )

    def __post_init__(self) -> None:
        self.check("adco")


@register("adco", AdCoConfig, "AdCo: keys as positives, the learnable bank as negatives")
class AdCo(LearnedBankMethod):
    """One key and any number of queries of an image, or both views each way, against one learned bank of negatives."""

    config: AdCoConfig

    def __init__(self, config: AdCoConfig, dim: int) -> None:
        super().__init__(config)
        self.negatives = config.make_bank(dim)
        self.operands = OPERANDS[config.operands]
        # The keys of the other parts of a batch would be missing.
        self.accumulates = not config.batch_negatives

    @property
    def bank(self) -> LearnableBank:
        return self.negatives

    def check_views(self, sizes: Sequence[int]) -> None:
        found = f"views: found {len(sizes)} views of an image"
        if self.config.symmetric and len(sizes) != 2:
            raise UserError(f"{found}, expected 2 for adco.symmetric=true; set it to false for multi-crop")
        if len(sizes) < 2:
            raise UserError(f"{found}, expected a query, its key, and any number of further queries; add a view")
        if sizes[1] < max(sizes):
            raise UserError(
                f"views: found sizes {', '.join(map(str, sizes))}, expected none above the second, which adco takes as "
                "key; change their order"
            )

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        if self.config.symmetric:
            # The key of a query comes from the other view.
            return Embeddings(encoders.queries(views), encoders.keys([views[1], views[0]]))
        return Embeddings(encoders.queries([views[0], *views[2:]]), encoders.keys(views[1:2]))

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        loss, probability = self._contrast(embeddings.queries, embeddings.keys, record)
        return StepOutput(loss, {"positive_probability": probability})

    def adversarial_loss(self, embeddings: Embeddings, anchor: Tensor, other: Tensor) -> Tensor:
        return self._contrast([other], embeddings.keys[:1], record=False)[0]

    def _contrast(
        self,
        queries: Sequence[Tensor],  # each [B, C]
        keys: Sequence[Tensor],  # each [B, C]: one for all queries, or one for each
        record: bool,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the mean probability of the keys without gradient; both 0-d.

            sum over the queries of  mean_i [ lse( {q_i . k_l / t}_l  U  {s_ij / t}_j ) - q_i . k_i / t ] / keys

        record: in training mode, whether the bank keeps the rows for its next step.
        """
        config, bank = self.config, self.bank
        rows = torch.cat(list(queries))  # [R, C]
        operands = rows.to(self.operands)
        (lse, bank_lse), _ = bank.attend(operands, (config.temperature, config.bank_temperature))
        # Not rounded to `operands`: there are few of them.
        halves = rows.to(lse.dtype).chunk(len(keys))
        pairs = [self._similarities(q, k.to(lse.dtype)) for q, k in zip(halves, keys, strict=True)]
        similarity = torch.cat([all_keys for all_keys, _ in pairs])  # [R, S]
        own = torch.cat([own for _, own in pairs]) / config.temperature  # [R]
        lse = _joint(lse, similarity, config.temperature)
        weight = 1 / (len(keys) * keys[0].shape[0])
        if record and self.training and torch.is_grad_enabled():
            joint_lse = _joint(bank_lse, similarity.detach(), config.bank_temperature)
            # The loss is a mean over this rank's images, which DistributedDataParallel averages; the bank's step sums
            # over the rows of all ranks.
            row_weight = torch.full_like(joint_lse, weight / world_size())
            bank.record(operands, joint_lse, config.bank_temperature, row_weight)
        return (lse - own).sum() * weight, (own - lse).detach().exp().mean()

    def _similarities(self, queries: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:  # [R, C], [B, C]
        """q_i . k_l with the keys in the softmax [R, S], and with the own key [R]. R is a multiple of B."""
        many = queries.shape[0] // key.shape[0]
        if not self.config.batch_negatives:
            own = (queries * key.repeat(many, 1)).sum(dim=1)
            return own.unsqueeze(1), own
        similarity = batch_logits(queries, all_gather_rows(key), 1.0)
        return similarity, similarity.gather(1, own_rows(key).repeat(many).unsqueeze(1)).squeeze(1)

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        # Of the views all but the key are queries.
        return self.uses_of(images * (2 if self.config.symmetric else views - 1), positives=0)


def _joint(lse: Tensor, similarity: Tensor, temperature: float) -> Tensor:  # [R], [R, S] -> [R]
    """The log-sum-exp over the bank and the keys of the batch together."""
    return torch.logaddexp(lse, torch.logsumexp(similarity / temperature, dim=1))
