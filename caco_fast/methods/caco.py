"""CaCo: cooperative-adversarial contrastive learning (docs/method.md; the paper is cited by equation).

Legend: B images on this rank, R query rows, M positives of a row, K bank rows, C embedding size.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from caco_fast.bank import NORMS, LearnableBank, ShardedBank
from caco_fast.distributed import all_gather_rows, is_distributed, world_size
from caco_fast.errors import UserError
from caco_fast.methods.base import Method, StepOutput, check_settings
from caco_fast.methods.info_nce import info_nce
from caco_fast.models import EncoderPair
from caco_fast.ops.rates import Rate
from caco_fast.settings import setting

# How several ranks hold the bank; `auto` is sharded where there are several.
BANKS = {"sharded": ShardedBank, "replicated": LearnableBank}
OPERANDS = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class CaCoConfig:
    bank_size: int = setting(65536, "K, rows of the bank")
    temperature: float = setting(0.08, "t of the encoder's loss")
    bank_temperature: float = setting(0.08, "t_m of the bank's step")
    bank_lr: float = setting(3.0, "eta of the bank's step after the warm-up; constant")
    bank_momentum: float = setting(0.9, "mu of the bank's velocity")
    bank_parallel: str = setting(
        "auto", "sharded: every rank keeps K / ranks rows; replicated: all of them; auto: sharded on several ranks"
    )
    norm: str = setting(
        "implicit", "implicit: rows keep the length they grow to (released code); project: unit rows (paper, IV-C)"
    )
    warm_start_steps: int = setting(
        0, "steps in which the bank is a queue of keys before it is learned; 0: until it is full, as published"
    )
    warm_start_temperature: float = setting(0.2, "temperature of the InfoNCE loss in those steps")
    operands: str = setting("f32", "dtype of the queries in attend and step: f32, bf16 or fp16")
    backend: str = setting("auto", "bank operations: auto, reference, tiled or cuda")


log = logging.getLogger(__name__)


class CaCoLoss(nn.Module):
    """The CaCo loss over a learnable bank, for any training loop:

        loss = criterion(q_a, q_b, k_a, k_b); loss.backward(); optimizer.step(); bank.step(lr)

    In training mode each call records on the bank what its next `step` needs (eq. 7-10). `positive_probability` and
    `positive_perplexity` hold 0-d tensors of the last call: the mean probability of the chosen positives (paper,
    Fig. 4) of this rank, and how many rows, in effect, they spread over: in training mode those of all ranks.
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
        q_a: torch.Tensor,  # [B, C] queries of view a, L2-normalised
        q_b: torch.Tensor,  # [B, C]
        k_a: torch.Tensor,  # [B, C] keys of view a, L2-normalised
        k_b: torch.Tensor,  # [B, C]
        small: Sequence[torch.Tensor] = (),  # each [B, C], queries of small crops
    ) -> torch.Tensor:
        """The 0-d loss (eq. 3).

        Two views: the two halves summed. With `small` crops: the mean over the 2 pairs with a large query plus the mean
        over the pairs of each small query with both keys (paper, multi-crop).

        Raises:
            ValueError: queries and keys of different shapes.
        """
        batch = q_a.shape[0]
        crops = {f"small[{i}]": crop for i, crop in enumerate(small)}
        for name, rows in {"q_b": q_b, "k_a": k_a, "k_b": k_b, **crops}.items():
            if rows.shape != q_a.shape:
                raise ValueError(f"CaCoLoss: {name}: found shape {list(rows.shape)}, wanted {list(q_a.shape)} as q_a")
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
        like_bank = dict(dtype=self.bank.bank.dtype, device=q_a.device)
        weights = torch.cat([torch.full((batch,), share / batch, **like_bank) for share in shares])
        return self._objective(torch.cat(queries), pairs, weights)

    @torch.no_grad()
    def _positives(self, *keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The most probable positive of each key (eq. 11): index [B] per argument."""
        # Not in `operands`: a key that was rounded may be nearest to another row.
        index, _ = self.bank.select(torch.cat(keys))
        return index.split([k.shape[0] for k in keys])

    def _objective(
        self,
        queries: torch.Tensor,  # [R, C]
        positives: torch.Tensor,  # [R, M]
        row_weight: torch.Tensor,  # [R], sums to the number of means in the loss
    ) -> torch.Tensor:
        shares = torch.full_like(positives, 1.0 / positives.shape[1], dtype=self.bank.bank.dtype)
        recorded = self.training and torch.is_grad_enabled()
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


def _perplexity(index: torch.Tensor, rows: int) -> torch.Tensor:
    """exp of the entropy of the chosen rows: the number of rows in use, in effect."""
    flat = index.reshape(-1)
    share = torch.zeros(rows, device=index.device).index_add_(0, flat, torch.ones(flat.shape, device=index.device))
    share /= flat.numel()
    return torch.special.entr(share).sum().exp()


class CaCo(Method):
    """Both positives and negatives are rows of one learned bank. Two large views and any number of small ones."""

    def __init__(self, config: CaCoConfig, dim: int) -> None:
        super().__init__()
        if config.operands not in OPERANDS:
            raise UserError(f"caco.operands: found '{config.operands}', want one of {', '.join(OPERANDS)}")
        if config.warm_start_steps < 0:
            raise UserError(f"caco.warm_start_steps: must not be negative, found {config.warm_start_steps}")
        check_settings("caco", config, ("temperature", "bank_temperature", "warm_start_temperature"))
        if not config.bank_lr >= 0:
            raise UserError(f"caco.bank_lr: must not be negative, found {config.bank_lr}")
        if not 0 <= config.bank_momentum < 1:
            raise UserError(f"caco.bank_momentum: found {config.bank_momentum}, wanted a number in [0, 1)")
        if config.norm not in NORMS:
            raise UserError(f"caco.norm: found '{config.norm}', want one of {', '.join(NORMS)}")
        if config.bank_parallel not in ("auto", *BANKS):
            raise UserError(f"caco.bank_parallel: found '{config.bank_parallel}', want one of auto, {', '.join(BANKS)}")
        self.config = config
        many = "sharded" if is_distributed() else "replicated"
        kind = BANKS[many if config.bank_parallel == "auto" else config.bank_parallel]
        bank = kind(config.bank_size, dim, momentum=config.bank_momentum, norm=config.norm, backend=config.backend)
        self.criterion = CaCoLoss(bank, config.temperature, config.bank_temperature, OPERANDS[config.operands])
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))
        self._keys: torch.Tensor | None = None

    @property
    def bank(self) -> LearnableBank:
        # Not a second submodule: state_dict would hold the bank twice.
        return self.criterion.bank

    def check_views(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2:
            raise UserError(f"views: caco takes 2 large views and any number of small ones, found {len(sizes)} in all")
        if min(sizes[:2]) < max(sizes[2:], default=0):
            raise UserError(
                f"views: caco takes the first 2 for the large ones, found sizes {', '.join(map(str, sizes))}; "
                "put the largest first"
            )

    def forward(self, views: Sequence[torch.Tensor], encoders: EncoderPair) -> StepOutput:
        q_a, q_b, *small = encoders.queries(views)
        k_a, k_b = encoders.keys(views[:2])
        loss = self.criterion(q_a, q_b, k_a, k_b, small)
        metrics = {
            "positive_probability": self.criterion.positive_probability,
            "positive_perplexity": self.criterion.positive_perplexity,
        }
        return StepOutput(loss, metrics)

    def update(self, warmup: Rate, skip: torch.Tensor | None = None) -> None:
        if self._keys is None:
            self.bank.step(self.config.bank_lr * warmup, skip=skip)
            return
        # The batch that reaches the last row ends there: the bank fills once, then goes on as a queue from row 0.
        next_row = self.bank.fill(self._keys, int(self.next_row), skip=skip)
        after = torch.full_like(self.next_row, next_row % self.bank.size)
        self.next_row.copy_(after if skip is None else torch.where(skip != 0, self.next_row, after))
        self._keys = None

    def losses(self) -> Sequence[nn.Module]:
        # With several ranks the loss may hold collectives, which a graph can't.
        return (self.criterion,) if world_size() == 1 else ()

    def rates(self, warmup: float) -> dict[str, float]:
        return {"bank_lr": self.config.bank_lr * warmup, "skipped_rows": float(self.bank.skipped_rows)}

    def preparation_steps(self, batch_size: int) -> int:
        until_full = -(-self.config.bank_size // batch_size)
        if 0 < self.config.warm_start_steps < until_full:
            log.warning(
                "caco.warm_start_steps %d leaves random rows in the bank, which %d steps would fill",
                self.config.warm_start_steps,
                until_full,
            )
        return self.config.warm_start_steps or until_full

    def prepare(self, views: Sequence[torch.Tensor], encoders: EncoderPair) -> StepOutput:
        """InfoNCE of q_a against its key k_b and the bank, whose rows the keys then fill (bank initialisation)."""
        (q_a,) = encoders.queries(views[:1])
        (self._keys,) = encoders.keys(views[1:2])
        temperature = self.config.warm_start_temperature
        loss, probability = info_nce(q_a, self._keys, self.bank.attend(q_a, temperature)[0], temperature)
        return StepOutput(loss, {"positive_probability": probability})

    def finish_preparation(self, encoders: EncoderPair) -> None:
        encoders.copy_query_to_key()
