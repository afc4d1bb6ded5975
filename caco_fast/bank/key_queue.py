"""A first-in first-out queue of keys: the negatives of MoCo, the neighbours of NNCLR.

Legend: K queue rows, C channels, R keys on this rank.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn

from caco_fast.bank.memory import check_loaded_shape, enough_memory, moved, random_unit_rows
from caco_fast.bank.operand import OperandCopy
from caco_fast.distributed import all_gather_rows
from caco_fast.ops import bank_attend, bank_select
from caco_fast.ops.tiling import unit_rows


class KeyQueue(nn.Module):
    """The latest `size` keys of the global batches, in a ring; rows are random unit vectors until they are replaced.

    size: K, any number of rows. dim: C. backend: of `attend`. generator: draws the first rows; give the same seed to
    all ranks. state_dict: `queue` [K, C] and `pointer` (int64, the row that is replaced next).
    Source: MoCo (arXiv 1911.05722), section 3.2.
    """

    queue: Tensor  # [K, C]
    pointer: Tensor  # []

    def __init__(self, size: int, dim: int, *, backend: str = "auto", generator: torch.Generator | None = None) -> None:
        super().__init__()
        with enough_memory("the key queue", size, dim, copies=1):
            queue = random_unit_rows(size, dim, generator)
        self.register_buffer("queue", queue)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=queue.device))
        self.backend = backend
        self.operand = OperandCopy(backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeyQueue":
        size, dim = self.queue.shape
        with moved("the key queue", size, dim, copies=1):
            return super()._apply(fn, recurse)

    @overload
    def attend(self, queries: Tensor, temperature: float) -> tuple[Tensor, Tensor]: ...
    @overload
    def attend(self, queries: Tensor, temperature: tuple[float, float]) -> tuple[tuple[Tensor, Tensor], Tensor]: ...
    def attend(
        self, queries: Tensor, temperature: float | tuple[float, float]
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
        """`ops.bank_attend` on the keys: lse [R] (a pair for two temperatures) and mean_row [R, C]."""
        operand = self.operand.for_attend(self.queue, queries)
        return bank_attend(queries, self.queue, temperature, self.backend, operand=operand)

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`ops.bank_select` on the keys: index [R] of the most similar key and its similarity [R]."""
        return bank_select(rows, self.queue, self.backend, operand=self.operand.for_select(self.queue))

    def rows(self, index: Tensor) -> Tensor:
        """Keys at these indices, scaled to unit length, as constants. [...] -> [..., C]"""
        return unit_rows(self.queue[index.flatten()])[0].view(*index.shape, self.queue.shape[1])

    @torch.no_grad()
    def enqueue(self, keys: Tensor, *, skip: Tensor | None = None) -> None:  # [R, C], []
        """Replace the oldest rows by the keys of all ranks, in rank order; every rank brings as many.

        If there are more keys than rows, the latest stay. If the flag `skip` is not 0, nothing changes.
        """
        size, dim = self.queue.shape
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise ValueError(f"KeyQueue.enqueue: keys: found shape {list(keys.shape)}, expected [R, {dim}]")
        keys = all_gather_rows(keys)
        count = keys.shape[0]
        kept = keys[-size:] if count > size else keys
        # All on the device: reading the pointer here would make the host wait.
        rows = torch.arange(count - kept.shape[0], count, device=self.pointer.device)
        rows, kept = (self.pointer + rows) % size, kept.to(self.queue.dtype)
        moved: int | Tensor = count
        if skip is not None:
            kept, moved = torch.where(skip != 0, self.queue[rows], kept), count * (skip == 0)
        current = self.operand.is_current(self.queue)
        self.queue[rows] = kept
        self.operand.refresh(self.queue, rows if current else None)
        self.pointer.add_(moved).remainder_(size)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_loaded_shape(state_dict, prefix + "queue", self.queue.shape, "KeyQueue")
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.operand.refresh(self.queue)

    def extra_repr(self) -> str:
        return f"size={self.queue.shape[0]}, dim={self.queue.shape[1]}"
