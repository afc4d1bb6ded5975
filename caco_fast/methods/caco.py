"""CaCo (Wang et al., 2022): both positives and negatives are rows of one learned bank.

The formulas are in docs/method.md; equation numbers are those of the paper.

Legend: B images on this rank, R query rows, M positives per row, K bank rows, C embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caco_fast.bank import LearnableBank
from caco_fast.distributed import all_gather_rows, world_size
from caco_fast.errors import UserError
from caco_fast.methods.base import Embeddings, StepOutput, register
from caco_fast.methods.learned_bank import OPERANDS, LearnedBankConfig, LearnedBankMethod
from caco_fast.models import EncoderPair


@dataclass(frozen=True)
class CaCoConfig(LearnedBankConfig):
    def __post_init__(self) -> None:
        self.check("caco")


class CaCoLoss(nn.Module):
    """The CaCo loss over a learnable bank, for any training loop:

        loss = criterion(q_a, q_b, k_a, k_b); loss.backward(); optimizer.step(); bank.step(lr)

    In training mode each call with `record` keeps on the bank what its next `step` needs (eq. 7-10).

    Two 0-d tensors describe the last call. `positive_probability` is the mean probability of this rank's chosen
    positives (paper, Fig. 4). `positive_perplexity` is the effective number of rows that the chosen positives spread
    over, in training mode those of all ranks.
    """

    def __init__(
        self,
        bank: LearnableBank,
        temperature: float = 0.08,
        bank_temperature: float = 0.08,
        operands: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.bank = bank
        self.temperature = temperature
        self.bank_temperature = bank_temperature
        self.operands = operands
        self.positive_probability = torch.tensor(0.0)
        self.positive_perplexity = torch.tensor(0.0)

    def forward(
        self,
        q_a: Tensor,  # [B, C] queries of view a, L2-normalised
        q_b: Tensor,  # [B, C]
        k_a: Tensor,  # [B, C] keys of view a, L2-normalised
        k_b: Tensor,  # [B, C]
        small: Sequence[Tensor] = (),  # each [B, C], queries of small crops
        record: bool = True,
    ) -> Tensor:
        """The 0-d loss (eq. 3).

        Two views: the two halves summed. With `small` crops: the mean over the 2 pairs with a large query plus the mean
        over the pairs of each small query with both keys (paper, multi-crop).

        record: in training mode, whether the bank keeps the rows for its next step.

        Raises:
            ValueError: queries and keys of different shapes.
        """
        batch = q_a.shape[0]
        crops = {f"small[{i}]": crop for i, crop in enumerate(small)}
        for name, rows in {"q_b": q_b, "k_a": k_a, "k_b": k_b, **crops}.items():
            if rows.shape != q_a.shape:
                raise ValueError(f"CaCoLoss: {name}: found shape {list(rows.shape)}, expected {list(q_a.shape)} as q_a")
        of_a, of_b = self._positives(k_b, k_a)  # [B] each: the positive of q_a comes from view b
        queries, positives, shares = [q_a, q_b], [of_a, of_a, of_b, of_b], [0.5 if small else 1.0] * 2
        for crop in small:
            queries.append(crop)
            positives += [of_a, of_b]
            shares.append(1.0 / len(small))
        # Every row gets two positives, so that one launch serves all queries; a large one has the same twice.
        pairs = torch.cat(positives).view(len(queries), 2, batch).transpose(1, 2).reshape(-1, 2)
        if not small:
            pairs = pairs[:, :1]
        # Filled on the device: a tensor made from a list would make the host wait.
        dtype, device = self.bank.bank.dtype, q_a.device
        weights = torch.cat([torch.full((batch,), share / batch, dtype=dtype, device=device) for share in shares])
        return self._objective(torch.cat(queries), pairs, weights, record)

    @torch.no_grad()
    def _positives(self, *keys: Tensor) -> tuple[Tensor, ...]:
        """The most probable positive of each key (eq. 11): index [B] per argument."""
        # Not in `operands`: a key that was rounded may be nearest to another row.
        index, _ = self.bank.select(torch.cat(keys))
        return index.split([k.shape[0] for k in keys])

    def _objective(
        self,
        queries: Tensor,  # [R, C]
        positives: Tensor,  # [R, M]
        row_weight: Tensor,  # [R], sums to the number of means in the loss
        record: bool,
    ) -> Tensor:
        shares = torch.full_like(positives, 1.0 / positives.shape[1], dtype=self.bank.bank.dtype)
        recorded = record and self.training and torch.is_grad_enabled()
        loss, probability = self.bank.contrast(
            queries,
            positives,
            shares,
            self.temperature,
            self.bank_temperature,
            self.operands,
            # The loss is a mean over this rank's images, which DistributedDataParallel averages; the bank's step sums
            # over the rows of all ranks.
            row_weight / world_size() if recorded else None,
        )
        self.positive_probability = probability.mean()
        chosen = all_gather_rows(positives) if recorded else positives
        self.positive_perplexity = _perplexity(chosen, self.bank.size)
        return (row_weight * loss).sum()


def _perplexity(index: Tensor, rows: int) -> Tensor:
    """exp of the entropy of the chosen rows: the number of rows in use, in effect."""
    flat = index.reshape(-1)
    share = torch.zeros(rows, device=index.device).index_add_(0, flat, torch.ones(flat.shape, device=index.device))
    share /= flat.numel()
    return torch.special.entr(share).sum().exp()


@register("caco", CaCoConfig, "CaCo: the learnable bank")
class CaCo(LearnedBankMethod):
    """Two large views and any number of small ones, against one learned bank."""

    def __init__(self, config: CaCoConfig, dim: int) -> None:
        super().__init__(config)
        bank = config.make_bank(dim)
        self.criterion = CaCoLoss(bank, config.temperature, config.bank_temperature, OPERANDS[config.operands])

    @property
    def bank(self) -> LearnableBank:
        # Not a second submodule: state_dict would hold the bank twice.
        return self.criterion.bank

    def check_views(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2:
            raise UserError(f"views: found {len(sizes)} in all, expected 2 large views and any number of small ones")
        if min(sizes[:2]) < max(sizes[2:], default=0):
            raise UserError(
                f"views: found sizes {', '.join(map(str, sizes))}, expected the 2 large ones first, as caco takes them"
            )

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        return Embeddings(encoders.queries(views), encoders.keys(views[:2]))

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        (q_a, q_b, *small), (k_a, k_b) = embeddings
        loss = self.criterion(q_a, q_b, k_a, k_b, small, record)
        metrics = {
            "positive_probability": self.criterion.positive_probability,
            "positive_perplexity": self.criterion.positive_perplexity,
        }
        return StepOutput(loss, metrics)

    def adversarial_loss(self, embeddings: Embeddings, anchor: Tensor, other: Tensor) -> Tensor:
        """The half of view a: the positive is the row nearest to k_b, and nothing of the bank gets a gradient."""
        _, k_b = embeddings.keys
        positive, _ = self.bank.select(k_b)
        lse, _ = self.bank.attend(other.to(self.criterion.operands), self.config.temperature)
        return (lse - self.bank.similarity(other, positive) / self.config.temperature).mean()

    def losses(self) -> Sequence[nn.Module]:
        # With several ranks the loss may hold collectives, which a graph can't.
        return (self.criterion,) if world_size() == 1 else ()
