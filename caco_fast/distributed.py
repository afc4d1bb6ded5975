"""The collectives that the components need, each the identity in a single process; and a count of their bytes.

Legend: N ranks, R rows on this rank, C channels.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# Bytes that rank 0's device holds of a shard on its way to rank 0's memory.
GATHER_PIECE = 64 * 2**20


@dataclass(eq=False)
class Traffic:
    """Bytes of the tensor collectives of this module, by the name of the function.

    payload: of the whole tensor that is gathered, reduced or scattered, counted once, as the papers do.
    sent: what every rank sends where a collective runs as a ring: (N - 1) / N of the payload, twice that for an
    all-reduce. Of `gather_to_first` both are what this rank sends.
    """

    payload: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts the collectives of the block; blocks may be nested. Broadcast objects are not counted."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _count(name: str, tensor: torch.Tensor, passes: float) -> None:
    """passes: how often a rank sends the payload."""
    for traffic in _counting:
        size = tensor.numel() * tensor.element_size()
        traffic.calls[name] += 1
        traffic.payload[name] += size
        traffic.sent[name] += round(passes * size)


def _round() -> float:
    """The share of a tensor that every rank sends when its parts go once round the ring."""
    return (world_size() - 1) / world_size()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:  # [R, ...] -> [N R, ...]
    """The rows of all ranks in rank order, without gradient. Every rank must bring the same number of rows."""
    rows = rows.detach().contiguous()
    if not is_distributed():
        return rows
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows)
    _count("all_gather_rows", gathered, _round())
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
        _count("all_reduce_sum", value, 2 * _round())
    return value


def all_reduce_max(value: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        _count("all_reduce_max", value, 2 * _round())
    return value


def all_reduce_logsumexp(value: torch.Tensor) -> torch.Tensor:
    """log sum exp over all ranks, elementwise, without gradient; safe at any magnitude."""
    if not is_distributed():
        return value.detach()
    top = all_reduce_max(value.detach().clone())
    return top + all_reduce_sum((value.detach() - top).exp()).log()


def reduce_scatter_rows(rows: torch.Tensor) -> torch.Tensor:  # [N R, ...] -> [R, ...]
    """The sum over all ranks of this rank's rows, those at rank * R and on, without gradient."""
    rows = rows.detach().contiguous()
    if not is_distributed():
        return rows
    own = rows.new_empty((rows.shape[0] // world_size(), *rows.shape[1:]))
    dist.reduce_scatter_tensor(own, rows)
    _count("reduce_scatter_rows", rows, _round())
    return own


def gather_to_first(rows: torch.Tensor, counts: list[int]) -> torch.Tensor | None:  # [R, ...] -> [sum of R, ...]
    """The rows of all ranks in rank order, in rank 0's main memory; None on the others. counts: R of every rank.

    They travel in pieces, so that no device holds more than its own rows and one piece.
    """
    rows = rows.detach().contiguous()
    if not is_distributed():
        return rows
    step = max(1, GATHER_PIECE // max(1, rows.shape[1:].numel() * rows.element_size()))
    if rank() != 0:
        for piece in rows.split(step):
            dist.send(piece, 0)
        _count("gather_to_first", rows, 1)
        return None
    whole = torch.empty((sum(counts), *rows.shape[1:]), dtype=rows.dtype)
    whole[: counts[0]] = rows
    start = counts[0]
    for source, count in enumerate(counts[1:], start=1):
        for piece in whole[start : start + count].split(step):
            on_device = piece if rows.device.type == "cpu" else rows.new_empty(piece.shape)
            dist.recv(on_device, source)
            if on_device is not piece:
                piece.copy_(on_device)
        start += count
    return whole


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
