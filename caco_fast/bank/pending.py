"""Rows that wait for the next bank step: recorded during the forward passes, consumed by the step.

Legend: R query rows, C channels, M positives per row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from caco_fast.distributed import all_gather_rows
from caco_fast.errors import UserError


class Rows(NamedTuple):
    queries: Tensor  # [R, C]
    lse: Tensor  # [R]
    row_weight: Tensor  # [R]
    positives: Tensor | None  # [R, M] int64
    positive_weight: Tensor | None  # [R, M]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """The rows with a function applied to every tensor."""
        positives = None if self.positives is None else change(self.positives)
        weight = None if self.positive_weight is None else change(self.positive_weight)
        return Rows(change(self.queries), change(self.lse), change(self.row_weight), positives, weight)


def gather_rows(rows: Rows) -> Rows:
    """The rows of all ranks, in rank order; every rank brings as many, with the same M."""
    return rows.each(all_gather_rows)


class PendingRows:
    """Detached rows of one or more forward passes at one temperature."""

    def __init__(self, max_records: int) -> None:
        if max_records < 1:
            raise UserError(f"LearnableBank: max_records: found {max_records}, expected at least 1")
        self.max_records = max_records
        self.records: list[Rows] = []
        self.temperature = 0.0

    def add(self, rows: Rows, temperature: float) -> None:
        count = rows.queries.shape[0]
        for name, value in zip(rows._fields, rows, strict=True):
            if value is not None and (value.dim() == 0 or value.shape[0] != count):
                found = list(value.shape)
                raise ValueError(f"LearnableBank.record: {name}: found shape {found}, expected {count} rows as queries")
        if rows.positives is not None and rows.positives.dim() != 2:
            found = list(rows.positives.shape)
            raise ValueError(f"LearnableBank.record: positives: found shape {found}, expected [R, M]")
        if self.records and temperature != self.temperature:
            expected = f"{self.temperature} as in the records before"
            raise ValueError(f"LearnableBank.record: temperature: found {temperature}, expected {expected}")
        if len(self.records) >= self.max_records:
            raise UserError(
                f"{len(self.records)} records wait for a bank step, more than max_records allows: call bank.step(lr) "
                "after optimizer.step()"
            )
        positives, positive_weight = rows.positives, rows.positive_weight
        if positives is not None and positive_weight is None:
            many = max(positives.shape[1], 1)
            positive_weight = torch.full(positives.shape, 1 / many, device=positives.device)
        kept = rows._replace(positives=positives, positive_weight=positive_weight)
        self.records.append(kept.each(Tensor.detach))
        self.temperature = temperature

    def discard(self) -> int:
        count = len(self.records)
        self.records.clear()
        return count

    def take(self, bank: Tensor) -> tuple[Rows, float]:
        """All records as one, and their temperature; nothing is left behind."""
        if not self.records:
            raise UserError(
                "bank.step(lr): no rows were recorded since the last step: run the criterion in training mode and with "
                "gradients enabled first, and call step once per optimizer.step()"
            )
        rows = concatenate(self.records, bank)
        self.discard()
        return rows, self.temperature


def concatenate(records: list[Rows], bank: Tensor) -> Rows:
    """One record of all rows; missing positives are padded with index 0 at weight 0."""
    # A concatenation of bf16 and f32 rows is f32.
    queries = torch.cat([record.queries for record in records])
    lse = torch.cat([record.lse.to(bank.dtype) for record in records])
    row_weight = torch.cat([record.row_weight.to(bank.dtype) for record in records])
    many = max(0 if record.positives is None else record.positives.shape[1] for record in records)
    if many == 0:
        return Rows(queries, lse, row_weight, None, None)
    positives, weights = [], []
    for record in records:
        if record.positives is None or record.positive_weight is None:
            count = record.queries.shape[0]
            positives.append(torch.zeros((count, many), dtype=torch.int64, device=bank.device))
            weights.append(torch.zeros((count, many), dtype=bank.dtype, device=bank.device))
        else:
            missing = (0, many - record.positives.shape[1])
            positives.append(pad(record.positives.long(), missing))
            weights.append(pad(record.positive_weight.to(bank.dtype), missing))
    return Rows(queries, lse, row_weight, torch.cat(positives), torch.cat(weights))
