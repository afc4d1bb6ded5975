"""The collectives that the components need, and a count of their bytes. In a single process each is the identity.

Legend: N ranks, R rows on this rank, C channels.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# Bytes of a shard that rank 0's device holds at a time on the way to rank 0's main memory.
GATHER_PIECE = 64 * 2**20


@dataclass(eq=False)
class Traffic:
    """Bytes of the tensor collectives of this module, by the name of the function.

    payload: the size of the whole tensor that is gathered, reduced or scattered, counted once as in papers.
    sent: what every rank sends if the collective runs as a ring. This is (N - 1) / N of the payload, and twice that for
    an all-reduce. For `gather_to_first` both are what this rank sends.
    """

    payload: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the collectives of the block. Blocks may be nested. Objects, as in `broadcast_object`, are not counted."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _count(name: str, tensor: torch.Tensor, passes: float) -> None:
    """Add one collective to the running counts. passes: how often a rank sends the payload."""
    for traffic in _counting:
        size = tensor.numel() * tensor.element_size()
        traffic.calls[name] += 1
        traffic.payload[name] += size
        traffic.sent[name] += round(passes * size)


def _ring_share() -> float:
    """The share of a tensor that every rank sends when its parts travel once around the ring."""
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
    """The rows of all ranks in rank order, without gradient. Every rank must give the same number of rows."""
    rows = rows.detach().contiguous()
    if not is_distributed():
        return rows
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows)
    _count("all_gather_rows", gathered, _ring_share())
    return gathered


def all_gather_rows_with_gradient(rows: torch.Tensor) -> torch.Tensor:  # [R, C] -> [N R, C]
    """The rows of all ranks in rank order, with gradient. Every rank must give the same number of rows.

    The gradient of this rank's rows is the sum over all ranks of what their losses give for these rows, so it is the
    gradient of the *sum* of the ranks' losses. DistributedDataParallel then divides the parameters' gradients by N,
    which makes them the gradient of the *mean* of the ranks' losses: a loss needs no factor of N of its own. This holds
    if each rank averages over its own rows, and also if every rank computes the same loss of all rows.

    Every rank must run the backward pass through the result, which is a collective too. torch.compile keeps the call as
    one operation of its graph, without a break.

    Raises:
        ValueError: on a CPU, if the ranks give different numbers of rows. On a GPU the check would stall the host.
    """
    return _gather_rows(rows) if is_distributed() else rows


@torch.library.custom_op("caco_fast::gather_rows", mutates_args=())
def _gather_rows(rows: torch.Tensor) -> torch.Tensor:  # [R, C] -> [N R, C]
    if rows.device.type == "cpu":
        # gloo would abort one rank, and give another one garbage.
        counts = all_gather_objects(rows.shape[0])
        if len(set(counts)) > 1:
            raise ValueError(f"all_gather_rows_with_gradient: found {counts} rows on the ranks, expected equal numbers")
    return all_gather_rows(rows)


@_gather_rows.register_fake
def _(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))


# An operation too, so that a compiled backward pass keeps it as one.
@torch.library.custom_op("caco_fast::scatter_rows", mutates_args=())
def _scatter_rows(rows: torch.Tensor) -> torch.Tensor:  # [N R, C] -> [R, C]
    return reduce_scatter_rows(rows)


@_scatter_rows.register_fake
def _(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((rows.shape[0] // world_size(), *rows.shape[1:]))


_gather_rows.register_autograd(lambda _, gradient: _scatter_rows(gradient))


def all_gather_uneven(rows: torch.Tensor) -> torch.Tensor:  # [R, ...], R differs between ranks -> [sum of R, ...]
    """The rows of all ranks in rank order for shards of any sizes, each padded to the longest one on the way."""
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
        _count("all_reduce_sum", value, 2 * _ring_share())
    return value


def all_reduce_max(value: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        _count("all_reduce_max", value, 2 * _ring_share())
    return value


def all_reduce_logsumexp(value: torch.Tensor) -> torch.Tensor:
    """The elementwise log sum exp over all ranks, without gradient and without overflow at any magnitude."""
    if not is_distributed():
        return value.detach()
    top = all_reduce_max(value.detach().clone())
    return top + all_reduce_sum((value.detach() - top).exp()).log()


def reduce_scatter_rows(rows: torch.Tensor) -> torch.Tensor:  # [N R, ...] -> [R, ...]
    """The sum over all ranks of this rank's rows, which are the R rows from rank * R on, without gradient."""
    rows = rows.detach().contiguous()
    if not is_distributed():
        return rows
    if rows.shape[0] % world_size():
        raise ValueError(
            f"reduce_scatter_rows: found {rows.shape[0]} rows, expected a multiple of {world_size()} ranks"
        )
    own = rows.new_empty((rows.shape[0] // world_size(), *rows.shape[1:]))
    dist.reduce_scatter_tensor(own, rows)
    _count("reduce_scatter_rows", rows, _ring_share())
    return own


def gather_to_first(rows: torch.Tensor, counts: list[int]) -> torch.Tensor | None:  # [R, ...] -> [sum of R, ...]
    """The rows of all ranks in rank order, in rank 0's main memory; None on the others. counts: R of every rank.

    The rows travel in pieces, so that no device holds more than its own rows and one piece.
    """
    rows = rows.detach().contiguous()
    if not is_distributed():
        return rows
    if len(counts) != world_size() or counts[rank()] != rows.shape[0]:
        raise ValueError(
            f"gather_to_first: found {rows.shape[0]} rows on rank {rank()}, expected {counts} on {world_size()} ranks"
        )
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


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks in rank order. group: of all ranks, in place of the default one."""
    values = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value, group=group)
    return values
