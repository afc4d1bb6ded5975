"""The few collectives that the components need; each is the identity in a single process.

Legend: R rows on this rank, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:  # [R, ...] -> [ranks * R, ...]
    """The rows of all ranks in rank order, without gradient. Every rank must bring the same number of rows."""
    rows = rows.detach().contiguous()
    if not is_distributed():
        return rows
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather(list(gathered.chunk(world_size())), rows)
    return gathered


def all_gather_uneven(rows: torch.Tensor) -> torch.Tensor:  # [R, ...], R differs between ranks -> [sum of R, ...]
    """Like `all_gather_rows` for shards of any sizes: each is padded to the longest on the way."""
    if not is_distributed():
        return rows.detach()
    counts = all_gather_rows(torch.tensor([rows.shape[0]], device=rows.device)).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    shards = all_gather_rows(padded).split(max(counts))
    return torch.cat([shard[:count] for shard, count in zip(shards, counts)])


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place, without gradient."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not is_distributed():
        return value
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


def all_gather_objects(value: Any) -> list[Any]:
    """The values of all ranks in rank order."""
    values = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values
