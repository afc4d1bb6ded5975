"""A bank that the ranks share: each keeps K / N rows with their velocity, and steps them with the rows of all ranks.

A step of training sends, whatever K is: the keys of all ranks to all (f32, for a rounded key may be nearest to another
row), a packed maximum of (similarity, index), the queries of all ranks to all (as operands), their positives and
weights, the log-sum-exp of every shard, and one sum [N R, C + M] of which each rank takes its own R rows. Everything
that the bank's step needs is then at hand.

Merging the shards r, each with its lse_ir and softmax mean O_ir over its own rows:

    lse_i = log sum_r exp(lse_ir),   O_i = sum_r exp(lse_ir - lse_i) O_ir

and as the positive row u_pi is on one rank only, O_i - u_pi, the gradient of the loss, is a sum over ranks too.

Legend: N ranks, R query rows on this rank, K bank rows of which k on this rank, C channels, M positives per row.
"""

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from caco_fast.bank.learnable import Contrast, LearnableBank
from caco_fast.bank.pending import Rows, gather_rows
from caco_fast.distributed import (
    all_gather_rows,
    all_reduce_logsumexp,
    all_reduce_max,
    gather_to_first,
    rank,
    reduce_scatter_rows,
    world_size,
)
from caco_fast.errors import UserError
from caco_fast.ops import bank_attend
from caco_fast.ops.packed import pack, unpack
from caco_fast.ops.tiling import unit_rows


class ShardedBank(LearnableBank):
    """A `LearnableBank` for several ranks: the same calls with the same answers, of which each rank asks for its rows.

    Every call but `step`, `normalise` and `discard` is a collective: all ranks make it, with as many rows. Indices are
    those of the whole bank. Give every rank's generator the same seed: a row is drawn the same, whoever keeps it.

    state_dict is that of a LearnableBank, for any number of ranks to load: rank 0 gets all K rows, in main memory, and
    saves them; on the other ranks it holds none. load_state_dict takes the whole on every rank.

    Raises UserError if there are fewer rows than ranks, or other ranks than when it was made.
    """

    def _own_rows(self, size: int) -> range:
        self.ranks = world_size()
        return shards(size)[rank()]

    def _gather(self, rows: Tensor) -> Tensor:  # [R, ...] -> [N R, ...]
        if world_size() != self.ranks:
            raise UserError(
                f"ShardedBank: made for {self.ranks} ranks, found {world_size()}: make it after init_process_group"
            )
        return all_gather_rows(rows)

    @overload
    def attend(self, queries: Tensor, temperature: float) -> tuple[Tensor, Tensor]: ...
    @overload
    def attend(self, queries: Tensor, temperature: tuple[float, float]) -> tuple[tuple[Tensor, Tensor], Tensor]: ...
    def attend(
        self, queries: Tensor, temperature: float | tuple[float, float]
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
        lse, mean_row = self._attend(self._gather(queries), temperature)
        mean_row = reduce_scatter_rows(mean_row)  # [R, C]
        of_this_rank = lse[:, own_slice(queries)]  # [1 or 2, R]
        first_temperature = temperature if isinstance(temperature, (float, int)) else temperature[0]
        first = WithGradient.apply(queries, of_this_rank[0], mean_row / first_temperature)
        return (first if len(lse) == 1 else (first, of_this_rank[1])), mean_row

    def _attend(
        self,
        queries: Tensor,  # [N R, C]
        temperature: float | tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        """For the queries of all ranks: lse [1 or 2, N R] over the whole bank, and this shard's part of mean_row."""
        operand = self.operand.for_attend(self.bank, queries)
        part, mean_row = bank_attend(queries, self.bank, temperature, self.backend, operand=operand)
        part = torch.stack(part if isinstance(part, tuple) else (part,))
        lse = all_reduce_logsumexp(part)
        return lse, mean_row * (part[0] - lse[0]).exp().unsqueeze(1)

    def select(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        index, similarity = super().select(self._gather(keys))
        index, similarity = most_similar(index + self.own.start, similarity)
        return index[own_slice(keys)], similarity[own_slice(keys)]

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        return reduce_scatter_rows(self._kept_rows(self._gather(flat))).view(*index.shape, self.dim)

    def _kept_rows(self, index: Tensor) -> Tensor:
        """Unit rows u at these indices of the whole bank, and zeros for those on other ranks. [...] -> [..., C]"""
        local, kept = self._local(index)
        unit, _ = unit_rows(self.bank[local.flatten()])
        return unit.view(*index.shape, self.dim) * kept.unsqueeze(-1)

    def _local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into this rank's rows, and whether the row is here; if it is not, the index is any one of ours."""
        local = index - self.own.start
        # Spread over all rows, since the step's kernel is slow where thousands of positives meet on one row.
        return local.remainder(len(self.own)), (local >= 0) & (local < len(self.own))

    def contrast(
        self,
        queries: Tensor,
        positives: Tensor,
        positive_weight: Tensor,
        temperature: float,
        bank_temperature: float,
        operands: torch.dtype = torch.float32,
        row_weight: Tensor | None = None,
    ) -> Contrast:
        """The contrast of a replicated bank, but similarities to positives are those of the queries as operands."""
        gathered = self._gather(queries.to(operands))  # [N R, C]
        everyone, weights = all_gather_rows(positives), all_gather_rows(positive_weight)  # [N R, M]
        lse, mean_row = self._attend(gathered, (temperature, bank_temperature))
        chosen = self._kept_rows(everyone)  # [N R, M, C]
        similarity = (gathered.to(self.bank.dtype).unsqueeze(1) * chosen).sum(dim=2)  # [N R, M]
        direction = mean_row - (weights.unsqueeze(2) * chosen).sum(dim=1)  # [N R, C]
        merged = reduce_scatter_rows(torch.cat([direction, similarity], dim=1))  # [R, C + M]
        direction, similarity = merged[:, : self.dim], merged[:, self.dim :]
        if row_weight is not None:
            rows = Rows(gathered, lse[1], all_gather_rows(row_weight), everyone, weights)
            self.pending.add(rows, bank_temperature)
        logits, own_lse = similarity / temperature, lse[0, own_slice(queries)]
        loss = own_lse - (positive_weight * logits).sum(dim=1)
        loss = WithGradient.apply(queries, loss, direction / temperature)
        return Contrast(loss, (logits - own_lse.unsqueeze(1)).exp())

    def record(
        self,
        queries: Tensor,
        lse: Tensor,
        temperature: float,
        row_weight: Tensor,
        positives: Tensor | None = None,
        positive_weight: Tensor | None = None,
    ) -> None:
        rows = gather_rows(Rows(queries, lse, row_weight, positives, positive_weight))
        super().record(rows.queries, rows.lse, temperature, rows.row_weight, rows.positives, rows.positive_weight)

    def _of_all_ranks(self, rows: Rows) -> Rows:
        # They were gathered when they were recorded.
        if rows.positives is None or rows.positive_weight is None:
            return rows
        local, kept = self._local(rows.positives)
        return rows._replace(positives=local, positive_weight=rows.positive_weight * kept)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        counts = [len(rows) for rows in shards(self.size)]
        for key in ("bank", "velocity"):
            whole = gather_to_first(destination.pop(prefix + key), counts)
            if whole is not None:
                destination[prefix + key] = whole

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.own.start}:{self.own.stop}"


class WithGradient(torch.autograd.Function):
    """Values [R] of the queries [R, C] whose gradient is known: slope [R, C]."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = queries.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grad.unsqueeze(1) * slope).to(ctx.dtype), None, None


def shards(size: int) -> list[range]:
    """Which of K rows each rank keeps; their numbers differ by one at most."""
    ranks = world_size()
    if size < ranks:
        raise UserError(
            f"the bank: found {size} rows for {ranks} ranks, expected at least one on each: take a larger bank, fewer "
            "ranks, or caco.bank_parallel=replicated"
        )
    return [range(size * r // ranks, size * (r + 1) // ranks) for r in range(ranks)]


def own_slice(rows: Tensor) -> slice:
    """The place of this rank's rows among the gathered ones."""
    return slice(rank() * rows.shape[0], (rank() + 1) * rows.shape[0])


def most_similar(index: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar of every rank's candidates [N R], ties to the lowest index: one maximum over the ranks."""
    if similarity.dtype != torch.float32:
        # An f64 similarity leaves no room for the index.
        best = all_reduce_max(similarity.clone())
        candidate = torch.where(similarity == best, -index, torch.iinfo(torch.int64).min)
        return -all_reduce_max(candidate), best
    best, index = unpack(all_reduce_max(pack(similarity, index)))
    return index, best
