"""Methods whose bank is learned: how the bank is made, filled with keys before it is learned, and stepped.

Legend: B images on this rank, K bank rows, C embedding size.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caco_fast.bank import NORMS, LearnableBank, ShardedBank
from caco_fast.distributed import is_distributed
from caco_fast.errors import UserError
from caco_fast.methods.base import BACKEND_HELP, Method, Phase, StepOutput, check_settings, use_of
from caco_fast.methods.info_nce import info_nce
from caco_fast.models import EncoderPair
from caco_fast.ops.checks import BankUse
from caco_fast.ops.rates import Rate
from caco_fast.settings import setting

log = logging.getLogger(__name__)

# How several ranks hold the bank; `auto` is sharded on several ranks.
BANKS = {"sharded": ShardedBank, "replicated": LearnableBank}
# Dtype of the queries. The kernels multiply f32 queries in bf16, which `auto` accepts and `f32` does not.
OPERANDS = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": torch.float32}


@dataclass(frozen=True)
class LearnedBankConfig:
    """Settings that all methods with a learned bank share."""

    bank_size: int = setting(65536, "K, rows of the bank")
    temperature: float = setting(0.08, "t, temperature of the encoder's loss")
    bank_temperature: float = setting(0.08, "t_m, temperature of the bank's step")
    bank_lr: float = setting(3.0, "eta, learning rate of the bank")
    bank_warmup: bool = setting(True, "whether bank_lr follows the warm-up of the schedule; false: constant")
    bank_momentum: float = setting(0.9, "mu, momentum of the bank's velocity")
    bank_weight_decay: float = setting(0.0, "wd, weight decay of the bank's rows, a part of their velocity")
    bank_parallel: str = setting(
        "auto", "sharded: every rank keeps K / ranks rows; replicated: all of them; auto: sharded on several ranks"
    )
    norm: str = setting(
        "implicit", "implicit: rows keep the length they grow to (released code); project: unit rows (paper, IV-C)"
    )
    warm_start_steps: int = setting(
        0, "steps in which the bank is a queue of keys before it is learned; 0: until it is full, as published"
    )
    warm_start_temperature: float | None = setting(
        0.2, "temperature of the InfoNCE loss in those steps; null: that of the loss"
    )
    warm_start_key_momentum: float = setting(
        0.999, "EMA momentum of the key encoder in those steps (0 to 1); 0.999: as in the released code"
    )
    operands: str = setting(
        "auto",
        "dtype of the queries in bank_attend and bank_step: bf16, fp16, f32 (products too: no CUDA kernels), or auto: "
        "f32, but the kernels multiply in bf16 (fp16 before sm_80)",
    )
    backend: str = setting("auto", BACKEND_HELP)

    def check(self, section: str) -> None:
        """Raise UserError for a value out of range; `section` is the method's name."""
        if self.operands not in OPERANDS:
            raise UserError(f"{section}.operands: found '{self.operands}', expected one of {', '.join(OPERANDS)}")
        if self.operands == "f32" and self.backend == "cuda":
            raise UserError(
                f"{section}.operands: found 'f32' with {section}.backend=cuda, but the kernels multiply in bf16 or "
                "fp16; set operands to auto, bf16 or fp16, or backend to auto"
            )
        if self.warm_start_steps < 0:
            raise UserError(f"{section}.warm_start_steps: found {self.warm_start_steps}, expected 0 or more")
        positive = ["temperature", "bank_temperature"]
        if self.warm_start_temperature is not None:
            positive.append("warm_start_temperature")
        check_settings(section, self, positive)
        momentum = self.warm_start_key_momentum
        if not 0 <= momentum <= 1:
            raise UserError(f"{section}.warm_start_key_momentum: found {momentum}, expected a number in [0, 1]")
        if not self.bank_lr >= 0:
            raise UserError(f"{section}.bank_lr: found {self.bank_lr}, expected 0 or more")
        if not 0 <= self.bank_weight_decay < float("inf"):
            raise UserError(f"{section}.bank_weight_decay: found {self.bank_weight_decay}, expected 0 or more")
        if not 0 <= self.bank_momentum < 1:
            raise UserError(f"{section}.bank_momentum: found {self.bank_momentum}, expected a number in [0, 1)")
        if self.norm not in NORMS:
            raise UserError(f"{section}.norm: found '{self.norm}', expected one of {', '.join(NORMS)}")
        if self.bank_parallel not in ("auto", *BANKS):
            found = f"found '{self.bank_parallel}', expected one of auto, {', '.join(BANKS)}"
            raise UserError(f"{section}.bank_parallel: {found}")

    def make_bank(self, dim: int) -> LearnableBank:
        many = "sharded" if is_distributed() else "replicated"
        kind = BANKS[many if self.bank_parallel == "auto" else self.bank_parallel]
        backend = "tiled" if self.needs_f32_products else self.backend
        return kind(
            self.bank_size,
            dim,
            momentum=self.bank_momentum,
            norm=self.norm,
            weight_decay=self.bank_weight_decay,
            backend=backend,
        )

    @property
    def initial_temperature(self) -> float:
        """The temperature of the loss while keys fill the bank."""
        return self.temperature if self.warm_start_temperature is None else self.warm_start_temperature

    @property
    def needs_f32_products(self) -> bool:
        """Whether `auto` may not take the kernels, which have no f32 products."""
        return self.operands == "f32" and self.backend == "auto"


class LearnedBankMethod(Method):
    """A method whose bank first takes keys, as a queue, and is then learned.

    A subclass defines `bank` and the training. This class defines the initialisation before it and the bank's step.
    """

    accumulates = True
    next_row: Tensor  # []

    def __init__(self, config: LearnedBankConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))
        # `next_row` as the host knows it; None where only the device does.
        self._next_row: int | None = 0

    @property
    def bank(self) -> LearnableBank:
        raise NotImplementedError

    def update(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        """Step the bank with the rows that `loss` recorded on it."""
        self.bank.step(self.bank_rate(warmup), scale=1 / self.parts, skip=skip)

    def bank_rate(self, warmup: Rate) -> Rate:
        """eta at this share of the full rate of the encoder."""
        return self.config.bank_lr * (warmup if self.config.bank_warmup else 1.0)

    def bank_uses(self, images: int, views: int) -> Sequence[BankUse]:
        # A small view has both large ones as positives.
        return self.uses_of(images * views, positives=2 if views > 2 else 1)

    def uses_of(self, rows: int, positives: int) -> Sequence[BankUse]:
        """The use of the bank by steps of R rows with M positives each."""
        config = self.config
        reason = f"{self.section}.operands=f32 needs f32 products, which the kernels do not have"
        use = use_of(
            self.bank,
            f"{self.section}.backend",
            rows,
            temperatures=((config.temperature, config.bank_temperature), (config.initial_temperature,)),
            step_temperature=config.bank_temperature,
            dtype=OPERANDS[config.operands],
            positives=positives,
            reason=reason if config.needs_f32_products else None,
        )
        return [use]

    def rates(self, warmup: float) -> dict[str, float]:
        return {"bank_lr": float(self.bank_rate(warmup)), "skipped_rows": float(self.bank.skipped_rows)}

    def phases(self, batch_size: int) -> list[Phase]:
        until_full = -(-self.config.bank_size // batch_size)
        if 0 < self.config.warm_start_steps < until_full:
            log.warning(
                "%s.warm_start_steps %d leaves random rows in the bank, which %d steps would fill",
                self.section,
                self.config.warm_start_steps,
                until_full,
            )
        initialisation = Phase(
            "initialisation",
            self.initialise,
            self.fill,
            steps=self.config.warm_start_steps or until_full,
            key_momentum=self.config.warm_start_key_momentum,
            finish=lambda encoders: encoders.copy_query_to_key(),
            repeats_skipped=True,
            capturable=False,
        )
        return [initialisation, *super().phases(batch_size)]

    def initialise(self, views: Sequence[Tensor], encoders: EncoderPair) -> StepOutput:
        """InfoNCE of q_a against its key k_b and the bank, whose rows the keys then fill (bank initialisation)."""
        (q_a,) = encoders.queries(views[:1])
        (k_b,) = encoders.keys(views[1:2])
        temperature = self.config.initial_temperature
        loss, probability = info_nce(q_a, k_b, self.bank.attend(q_a, temperature)[0], temperature)
        return StepOutput(loss, {"positive_probability": probability}, (k_b,))

    def fill(self, rows: Sequence[Tensor], warmup: Rate, skip: Tensor | None = None) -> None:
        """Write the keys of this step to the next rows of the bank."""
        (keys,) = rows
        # The batch that reaches the last row ends there: the bank fills once, then continues as a queue from row 0.
        start = int(self.next_row) if self._next_row is None else self._next_row
        next_row = self.bank.fill(keys, start, skip=skip) % self.bank.size
        after = torch.full_like(self.next_row, next_row)
        self.next_row.copy_(after if skip is None else torch.where(skip != 0, self.next_row, after))
        self._next_row = next_row if skip is None else None

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._next_row = None
