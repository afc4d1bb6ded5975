"""The ablation of the paper (Table VII): where positives and negatives come from, while all else is CaCo's.

The formulas, and what each combination means, are in docs/method.md.

Legend: B images on this rank, N ranks, R = 2 B query rows, K rows of bank or queue, C embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from caco_fast.bank import KeyQueue, LearnableBank
from caco_fast.distributed import all_gather_rows, world_size
from caco_fast.errors import UserError
from caco_fast.methods.base import Embeddings, Method, StepOutput, build_method, register, use_of
from caco_fast.methods.caco import CaCoConfig
from caco_fast.methods.info_nce import batch_logits, own_rows
from caco_fast.methods.learned_bank import OPERANDS, LearnedBankMethod
from caco_fast.models import EncoderPair
from caco_fast.ops.checks import BankUse
from caco_fast.ops.rates import Rate
from caco_fast.settings import setting

POSITIVES = ("key", "queue", "bank")
NEGATIVES = ("batch", "queue", "bank")
SELECT_BY = ("key", "query")


@dataclass(frozen=True)
class AblationConfig:
    positives: str = setting(
        "bank",
        "positive of a query: key (of the other view), or the nearest row of a queue of keys or of the learned bank; "
        "temperatures, K and all else are in the section caco",
    )
    negatives: str = setting("bank", "batch (the other keys of the other view), queue (of keys), or bank (learned)")
    select_by: str = setting(
        "key",
        "the row of the queue is the one nearest to the key of the other view, or to the query itself: key, query",
    )

    def __post_init__(self) -> None:
        for name, known in (("positives", POSITIVES), ("negatives", NEGATIVES), ("select_by", SELECT_BY)):
            if getattr(self, name) not in known:
                found = f"found '{getattr(self, name)}', expected one of {', '.join(known)}"
                raise UserError(f"ablation.{name}: {found}")
        if self.positives == "bank" and self.negatives != "bank":
            raise UserError(
                f"ablation.negatives: found '{self.negatives}' with ablation.positives=bank, expected bank, for rows "
                "that are never negatives have nothing to learn from until a key selects them; set negatives=bank, or "
                "positives=queue"
            )
        if self.select_by != "key" and self.positives != "queue":
            raise UserError(
                f"ablation.select_by: found '{self.select_by}' with ablation.positives={self.positives}, expected key, "
                "for only a queue is searched by the query; set positives=queue"
            )

    @property
    def has_queue(self) -> bool:
        return "queue" in (self.positives, self.negatives)


class Candidates(nn.Module):
    """Where the positives of the rows come from: the keys, or a queue if one is named.

    With positives from the queue and negatives from elsewhere, the candidates of a query are its row of the queue and
    the negatives; its own key is not among them.
    """

    def __init__(self, config: AblationConfig, caco: CaCoConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.temperature = caco.temperature
        self.queue = KeyQueue(caco.bank_size, dim, backend=caco.backend) if config.has_queue else None

    def positives(self, queries: Tensor, keys: Tensor) -> Tensor:  # [R, C] each -> [R, C]
        """The positive of every query, without gradient. keys: of the other view."""
        if self.queue is None or self.config.positives != "queue":
            return keys
        index, _ = self.queue.select(keys if self.config.select_by == "key" else queries.detach())
        return self.queue.rows(index)

    def enqueue(self, rows: Sequence[Tensor], skip: Tensor | None) -> None:
        if self.queue is not None:
            for keys in rows:
                self.queue.enqueue(keys, skip=skip)

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        if self.queue is None:
            return []
        attends, selects = self.config.negatives == "queue", self.config.positives == "queue"
        temperatures = ((self.temperature,),) if attends else ()
        return [use_of(self.queue, "caco.backend", images * views, temperatures=temperatures, selects=selects)]


class BothViews(Method):
    """A row without positives from the bank: both views are queries and keys."""

    candidates: Candidates

    def check_views(self, sizes: Sequence[int]) -> None:
        if len(sizes) != 2:
            config = self.candidates.config
            raise UserError(
                f"views: found {len(sizes)} views of an image, expected 2 for ablation.positives={config.positives} "
                f"with negatives={config.negatives}"
            )

    def embed(self, views: Sequence[Tensor], encoders: EncoderPair) -> Embeddings:
        return Embeddings(encoders.queries(views), encoders.keys(views))


def both_ways(embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """Queries of view a and then b, and the keys of the other view of each. [R, C] each"""
    (q_a, q_b), (k_a, k_b) = embeddings
    return torch.cat([q_a, q_b]), torch.cat([k_b, k_a])


def similarity(queries: Tensor, positives: Tensor) -> Tensor:  # [R, C] each -> [R]
    # Multiplied and summed, since autocast would do a dot product in low precision.
    return (queries.to(positives.dtype) * positives).sum(dim=1)


def summed_halves(lse: Tensor, logit: Tensor, keys: Sequence[Tensor]) -> StepOutput:  # [R] each
    """The loss, whose halves are each a mean over the batch, and are summed; the keys are rows for a queue."""
    probability = (logit - lse).detach().exp().mean()
    return StepOutput(2 * (lse - logit).mean(), {"positive_probability": probability}, tuple(keys))


@register("ablation", AblationConfig, "the ablation of the paper: positives and negatives from batch, queue or bank")
class Ablation(BothViews):
    """The rows without a learned bank; `build` makes the others of their own classes."""

    def __init__(self, config: AblationConfig, caco: CaCoConfig, dim: int) -> None:
        super().__init__()
        self.candidates = Candidates(config, caco, dim)
        self.accumulates = config.negatives != "batch"

    @classmethod
    def build(cls, config: Any, dim: int, sections: Mapping[str, Any]) -> Method:
        if config.positives == "bank":
            return build_method("caco", dim, sections)
        if config.negatives == "bank":
            return NegativesFromBank(config, sections["caco"], dim)
        return cls(config, sections["caco"], dim)

    @classmethod
    def reads(cls, config: Any) -> Sequence[str]:
        return (cls.section, "caco")

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        queries, keys = both_ways(embeddings)
        temperature, queue = self.candidates.temperature, self.candidates.queue
        logit = similarity(queries, self.candidates.positives(queries, keys)) / temperature
        if queue is None or self.candidates.config.negatives == "batch":
            lse = self._lse_of_batch(embeddings, logit)
        else:
            lse, _ = queue.attend(queries, temperature)
            if self.candidates.config.positives == "key":
                lse = torch.logaddexp(lse, logit)
        return summed_halves(lse, logit, embeddings.keys)

    def _lse_of_batch(self, embeddings: Embeddings, logit: Tensor) -> Tensor:  # [R] -> [R]
        """lse over the keys of all ranks, where the positive takes the place of the query's own key."""
        (q_a, q_b), (k_a, k_b) = embeddings
        halves = ((q_a, all_gather_rows(k_b)), (q_b, all_gather_rows(k_a)))
        logits = torch.cat([batch_logits(q, keys, self.candidates.temperature) for q, keys in halves])  # [R, N B]
        own = own_rows(q_a).repeat(2).unsqueeze(1)
        return logits.scatter(1, own, logit.to(logits.dtype).unsqueeze(1)).logsumexp(dim=1)

    def update(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        self.candidates.enqueue(rows, skip)

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        return self.candidates.bank_uses(images, views)


class NegativesFromBank(BothViews, LearnedBankMethod):
    """Negatives from a bank that is only adversarial: its step is that of M = 0, and raises the loss of the encoder."""

    # Its settings are those of CaCo.
    section = "caco"

    def __init__(self, config: AblationConfig, caco: CaCoConfig, dim: int) -> None:
        super().__init__(caco)
        self.candidates = Candidates(config, caco, dim)
        self.negatives = caco.make_bank(dim)
        self.operands = OPERANDS[caco.operands]

    @property
    def bank(self) -> LearnableBank:
        return self.negatives

    def loss(self, embeddings: Embeddings, record: bool = True) -> StepOutput:
        queries, keys = both_ways(embeddings)
        temperature, bank_temperature = self.config.temperature, self.config.bank_temperature
        positive = similarity(queries, self.candidates.positives(queries, keys))
        operands = queries.to(self.operands)
        (lse, bank_lse), _ = self.bank.attend(operands, (temperature, bank_temperature))
        logit = positive / temperature
        if record and self.training and torch.is_grad_enabled():
            # The softmax of the bank's step has the positive among its candidates too.
            joint = torch.logaddexp(bank_lse, positive.detach() / bank_temperature)
            images = embeddings.queries[0].shape[0] * world_size()
            self.bank.record(operands, joint, bank_temperature, torch.full_like(joint, 1 / images))
        return summed_halves(torch.logaddexp(lse, logit), logit, embeddings.keys)

    def update(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        super().update(rows, warmup, skip)
        self.candidates.enqueue(rows, skip)

    def fill(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        super().fill(rows, warmup, skip)
        self.candidates.enqueue(rows, skip)

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        return [*super().bank_uses(images, views), *self.candidates.bank_uses(images, views)]
