"""The learnable bank: rows that serve as positives and negatives and are trained by a gradient of their own.

Legend: R query rows on this rank, K bank rows, C channels, M positives per row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from caco_fast.bank.memory import check_loaded_shape, enough_memory, moved, overlap, random_unit_rows
from caco_fast.bank.operand import OperandCopy
from caco_fast.bank.pending import PendingRows, Rows, gather_rows
from caco_fast.distributed import all_gather_rows
from caco_fast.errors import UserError
from caco_fast.ops import bank_attend, bank_select, bank_step_
from caco_fast.ops.rates import Rate
from caco_fast.ops.tiling import unit_rows

NORMS = ("implicit", "project")


class Contrast(NamedTuple):
    """What queries give against the bank and their positives in it."""

    loss: Tensor  # [R]: lse_i - sum_m o_im s_i,pi_m / t, differentiable in the queries
    probability: Tensor  # [R, M] of the positives, without gradient


class LearnableBank(nn.Module):
    """K rows with a velocity each. A step of training is attend, select, record, and after the optimiser `step(lr)`.

        lse, _ = bank.attend(q, 0.08)                          # differentiable in q
        positives, _ = bank.select(k)
        loss = (lse - bank.similarity(q, positives) / 0.08).mean()
        bank.record(q, lse, 0.08, weight, positives.unsqueeze(1))   # weight [R] = 1 / (images of the global batch)
        loss.backward(); optimizer.step(); bank.step(lr=3.0)

    size: K, any number of rows. dim: C. momentum: mu in [0, 1). norm: "implicit" stores rows of any length, as
    the released code does; "project" rescales them to unit length after each step. weight_decay: wd, of the rows as
    they are stored, inside the velocity. backend: of the bank operations. max_records: records kept without a step
    before that is taken for a mistake. generator: draws the first rows; on several ranks give all the same seed, for
    each keeps the whole bank and they stay equal; `ShardedBank` keeps a part on each.

    state_dict: `bank` [K, C] and `velocity` [K, C], f32. Raises UserError if 2 K C numbers do not fit the memory.
    Source: CaCo, eq. 7-11; AdCo with records that have no positives.
    """

    bank: Tensor  # [K, C]
    velocity: Tensor  # [K, C]
    skipped_rows: Tensor  # []

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        momentum: float = 0.9,
        norm: str = "implicit",
        weight_decay: float = 0.0,
        backend: str = "auto",
        max_records: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise UserError(f"LearnableBank: momentum: found {momentum}, expected a number in [0, 1)")
        if not 0 <= weight_decay < float("inf"):
            raise UserError(f"LearnableBank: weight_decay: found {weight_decay}, expected 0 or more")
        if norm not in NORMS:
            raise UserError(f"LearnableBank: norm: found {norm!r}, expected 'implicit' or 'project'")
        self.size = size
        # The rows of all K that this rank keeps: bank and velocity hold no others.
        self.own = self._own_rows(size)
        with enough_memory("the bank with its velocity", len(self.own), dim, copies=2):
            bank = random_unit_rows(size, dim, generator, self.own)
            self.register_buffer("bank", bank)
            self.register_buffer("velocity", torch.zeros_like(bank))
        # Rows that a step left out because they were not finite; on the device, so that the host does not wait for it.
        self.register_buffer("skipped_rows", torch.zeros((), dtype=torch.int64, device=bank.device), persistent=False)
        self.momentum, self.weight_decay, self.norm, self.backend = momentum, weight_decay, norm, backend
        self.pending = PendingRows(max_records)
        self.operand = OperandCopy(backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LearnableBank":
        with moved("the bank with its velocity", len(self.own), self.dim, copies=2):
            return super()._apply(fn, recurse)

    def _own_rows(self, size: int) -> range:
        return range(size)

    @property
    def dim(self) -> int:
        return self.bank.shape[1]

    @overload
    def attend(self, queries: Tensor, temperature: float) -> tuple[Tensor, Tensor]: ...
    @overload
    def attend(self, queries: Tensor, temperature: tuple[float, float]) -> tuple[tuple[Tensor, Tensor], Tensor]: ...
    def attend(
        self, queries: Tensor, temperature: float | tuple[float, float]
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
        """`ops.bank_attend` on this bank: lse [R] (a pair for two temperatures) and mean_row [R, C]."""
        operand = self.operand.for_attend(self.bank, queries)
        return bank_attend(queries, self.bank, temperature, self.backend, operand=operand)

    def select(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """`ops.bank_select` on this bank: index [R] of the most similar row and its similarity [R]."""
        return bank_select(keys, self.bank, self.backend, operand=self.operand.for_select(self.bank))

    def rows(self, index: Tensor) -> Tensor:
        """Unit rows u at these indices, as constants. [...] -> [..., C]"""
        return unit_rows(self.bank[index.flatten()])[0].view(*index.shape, self.dim)

    def similarity(self, queries: Tensor, index: Tensor) -> Tensor:
        """s = q . u of row i of the queries and bank row index[i], differentiable in the queries. [R, C], [R] -> [R]"""
        # Multiplied and summed, since autocast would do a dot product in low precision.
        return (queries.to(self.bank.dtype) * self.rows(index)).sum(dim=-1)

    def contrast(
        self,
        queries: Tensor,  # [R, C]
        positives: Tensor,  # [R, M]
        positive_weight: Tensor,  # [R, M]
        temperature: float,
        bank_temperature: float,
        operands: torch.dtype = torch.float32,
        row_weight: Tensor | None = None,  # [R]
    ) -> Contrast:
        """The loss of every query against its positives in the bank (eq. 3), and with `row_weight` a `record` of it.

        operands: dtype of the queries in attend and step. row_weight, positive_weight: as in `record`.
        """
        operand_rows = queries.to(operands)
        (lse, bank_lse), _ = self.attend(operand_rows, (temperature, bank_temperature))
        # Not a matrix product, which an autocast around the caller's loop would run in low precision.
        similarity = (queries.to(self.bank.dtype).unsqueeze(1) * self.rows(positives)).sum(dim=2)  # [R, M]
        logits = similarity / temperature
        if row_weight is not None:
            self.record(operand_rows, bank_lse, bank_temperature, row_weight, positives, positive_weight)
        loss = lse - (positive_weight * logits).sum(dim=1)
        return Contrast(loss, (logits - lse.unsqueeze(1)).detach().exp())

    def record(
        self,
        queries: Tensor,  # [R, C]
        lse: Tensor,  # [R]
        temperature: float,
        row_weight: Tensor,  # [R]
        positives: Tensor | None = None,  # [R, M]
        positive_weight: Tensor | None = None,  # [R, M]
    ) -> None:
        """Keep detached rows for the coming `step`; several records add up, as in gradient accumulation.

        temperature: of the bank, and of lse; the same in all records of one step. row_weight: 1 / B with B the images
        of the global batch, for the step sums over the rows of all ranks. Records may differ in M.
        """
        if queries.dim() != 2 or queries.shape[1] != self.dim:
            found = list(queries.shape)
            raise ValueError(f"LearnableBank.record: queries: found shape {found}, expected [R, {self.dim}]")
        self.pending.add(Rows(queries, lse, row_weight, positives, positive_weight), temperature)

    @torch.no_grad()
    def step(self, lr: Rate, scale: float = 1.0, *, skip: Tensor | None = None) -> None:
        """One bank step with all recorded rows of all ranks, which are consumed.

        lr: eta, a number or on the device, []. scale: multiplies the row weights, 1 / n for gradients accumulated over
        n batches. skip: a flag on the device, such as GradScaler's found_inf: if it is not 0, the rows are consumed,
        and nothing else changes.
        Every rank must have recorded as many rows with the same M. A row that is not finite is left out and counted in
        `skipped_rows`, for one of them would turn the whole bank into NaN; nothing is raised, since that would make the
        host wait for the device. A trainer looks at its loss before it comes here.

        Raises UserError if nothing was recorded.
        """
        rows, temperature = self.pending.take(self.bank)
        rows = self._of_all_ranks(rows)
        finite = rows.queries.isfinite().all(dim=1) & rows.lse.isfinite() & rows.row_weight.isfinite()  # [R]
        self.skipped_rows += (~finite).sum() if skip is None else (~finite).sum() * (skip == 0)
        operand = self.operand.for_attend(self.bank, rows.queries)
        bank_step_(
            self.bank,
            self.velocity,
            rows.queries.masked_fill(~finite.unsqueeze(1), 0),
            rows.lse.masked_fill(~finite, 0),
            temperature=temperature,
            lr=lr,
            momentum=self.momentum,
            row_weight=rows.row_weight.masked_fill(~finite, 0) * scale,
            positives=rows.positives,
            positive_weight=rows.positive_weight,
            norm=self.norm,
            weight_decay=self.weight_decay,
            skip=skip,
            backend=self.backend,
            operand=operand,
        )
        if operand is not None:
            self.operand.written(self.bank)
        else:
            self.operand.refresh(self.bank)

    def _of_all_ranks(self, rows: Rows) -> Rows:
        """The recorded rows, as the step of this rank's bank rows takes them."""
        return gather_rows(rows)

    def discard(self) -> int:
        """Forget the recorded rows, as after a loss that is not finite. Returns how many records there were."""
        return self.pending.discard()

    @torch.no_grad()
    def fill(
        self, keys: Tensor, start: int = 0, wrap: bool = False, *, skip: Tensor | None = None
    ) -> int:  # [R, C], []
        """Write the keys of all ranks, as unit rows at rest, from row `start` on; every rank brings as many.

        Keys beyond the last row are dropped, or with `wrap` continue at row 0. Returns the row after the last one:
        `size` when the bank is full (with `wrap` a number below `size`). If the flag `skip` is not 0, no row changes.
        Source: CaCo, initialisation of the bank.
        """
        if keys.dim() != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"LearnableBank.fill: keys: found shape {list(keys.shape)}, expected [R, {self.dim}]")
        if not 0 <= start <= self.size:
            raise ValueError(f"LearnableBank.fill: start: found {start}, expected a row in [0, {self.size}]")
        unit, _ = unit_rows(all_gather_rows(keys).to(self.bank.dtype))
        end = start + unit.shape[0]
        if wrap:
            # Of more keys than the bank has rows the last stay.
            unit = unit[-self.size :]
            start = (end - unit.shape[0]) % self.size
            self._write(0, unit[self.size - start :], skip)
        self._write(start, unit[: self.size - start], skip)
        return end % self.size if wrap else min(end, self.size)

    def _write(self, start: int, unit: Tensor, skip: Tensor | None) -> None:  # [n, C], []
        """Put unit rows at rest at bank rows start..start+n-1, as far as this rank keeps them."""
        here, there = overlap(self.own, range(start, start + unit.shape[0]))
        current = self.operand.is_current(self.bank)
        for rows, new in ((self.bank, unit[there]), (self.velocity, torch.zeros_like(unit[there]))):
            rows[here] = new if skip is None else torch.where(skip != 0, rows[here], new)
        self.operand.refresh(self.bank, here if current else None)

    @torch.no_grad()
    def normalise(self) -> None:
        """Rescale every row to unit length, in place. The velocity is kept."""
        self.bank.copy_(unit_rows(self.bank)[0])
        self.operand.refresh(self.bank)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {}
        for key in (prefix + "bank", prefix + "velocity"):
            check_loaded_shape(state_dict, key, (self.size, self.dim), type(self).__name__)
            if isinstance(state_dict.get(key), Tensor):
                own[key] = state_dict[key][self.own.start : self.own.stop]
        super()._load_from_state_dict({**state_dict, **own}, prefix, *rest)
        self.operand.refresh(self.bank)

    def extra_repr(self) -> str:
        settings = (
            f"momentum={self.momentum}, weight_decay={self.weight_decay}, norm={self.norm!r}, backend={self.backend!r}"
        )
        return f"size={self.size}, dim={self.dim}, {settings}"
