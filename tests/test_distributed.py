"""The collectives: the identity in one process, rank order over several."""

from typing import Any

import torch

from caco_fast import distributed
from caco_fast.distributed import (
    all_gather_objects,
    all_gather_rows,
    all_gather_uneven,
    all_reduce_logsumexp,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_object,
    count_traffic,
    gather_to_first,
    rank,
    reduce_scatter_rows,
    world_size,
)
from tests.ranks import run_ranks


def test_one_process_is_rank_0_of_1_and_every_collective_the_identity() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    barrier()
    constant = rows.detach()
    with count_traffic() as traffic:
        results = [each(rows) for each in (all_gather_rows, all_gather_uneven, all_reduce_logsumexp)]
        results += [reduce_scatter_rows(rows), gather_to_first(rows, [3])]
        results += [all_reduce_sum(constant.clone()), all_reduce_max(constant.clone())]
    for result in results:
        assert torch.equal(result, rows)
        assert not result.requires_grad
    assert not traffic.calls
    assert broadcast_object({"a": 1}) == {"a": 1} and all_gather_objects("a") == ["a"]


def in_pieces(rows: torch.Tensor) -> torch.Tensor | None:
    """gather_to_first, a row at a time."""
    whole = distributed.GATHER_PIECE
    distributed.GATHER_PIECE = 1
    try:
        return gather_to_first(rows, [0, 1, 2])
    finally:
        distributed.GATHER_PIECE = whole


def counted() -> dict[str, Any]:
    """What each collective sends of 6 rows of 2 f32, 2 of them this rank's: payload and bytes sent."""
    own, whole = torch.zeros(2, 2), torch.zeros(6, 2)
    with count_traffic() as outer:
        with count_traffic() as inner:
            all_gather_rows(own)
        reduce_scatter_rows(whole)
        all_reduce_sum(whole)
        all_reduce_max(whole)
        gather_to_first(own, [2, 2, 2])
    assert dict(inner.payload) == {"all_gather_rows": 48}
    return {name: (outer.calls[name], outer.payload[name], outer.sent[name]) for name in outer.calls}


def on_rank() -> dict[str, Any]:
    me = rank()
    rows = torch.arange(6).view(2, 3) + 100 * me
    uneven = torch.full((me, 2), float(me))
    summed = torch.tensor([1.0, me])
    return {
        "rank": (me, world_size()),
        "transposed": all_gather_rows(rows.T),
        "rows": all_gather_rows(rows),
        "none": all_gather_rows(rows[:0]),
        "uneven": all_gather_uneven(uneven),
        "all_empty": all_gather_uneven(uneven[:0]),
        "is_in_place": all_reduce_sum(summed) is summed,
        "sum": summed,
        "object": broadcast_object(f"from rank {me}"),
        "objects": all_gather_objects(["rank", me] * me),
        "max": all_reduce_max(torch.tensor([1.0, me])),
        "logsumexp": all_reduce_logsumexp(torch.tensor([1000.0 * me, 0.0])),
        "scattered": reduce_scatter_rows(torch.arange(12.0).view(6, 2) * (me + 1)),
        "gathered": gather_to_first(uneven, [0, 1, 2]),
        "in_pieces": in_pieces(uneven),
        "counted": counted(),
    }


def test_three_ranks() -> None:
    results = run_ranks(on_rank, 3)
    rows = [torch.arange(6).view(2, 3) + 100 * rank for rank in range(3)]
    for rank_number, found in enumerate(results):
        assert found["rank"] == (rank_number, 3)
        assert torch.equal(found["rows"], torch.cat(rows))
        assert torch.equal(found["transposed"], torch.cat([r.T for r in rows]))
        assert found["none"].shape == (0, 3)
        assert found["uneven"].tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert found["all_empty"].shape == (0, 2)
        assert found["is_in_place"] and found["sum"].tolist() == [3.0, 3.0]
        assert found["object"] == "from rank 0"
        assert found["objects"] == [[], ["rank", 1], ["rank", 2, "rank", 2]]
        assert found["max"].tolist() == [1.0, 2.0]
        torch.testing.assert_close(found["logsumexp"], torch.tensor([2000.0, torch.tensor(3.0).log()]))
        mine = slice(2 * rank_number, 2 * rank_number + 2)
        assert torch.equal(found["scattered"], 6 * torch.arange(12.0).view(6, 2)[mine])
        for name in ("gathered", "in_pieces"):
            assert (found[name] is None) == (rank_number > 0)
        assert found["counted"].pop("gather_to_first", None) == (None if rank_number == 0 else (1, 16, 16))
        assert found["counted"] == {
            "all_gather_rows": (1, 48, 32),
            "reduce_scatter_rows": (1, 48, 32),
            "all_reduce_sum": (1, 48, 64),
            "all_reduce_max": (1, 48, 64),
        }
    for name in ("gathered", "in_pieces"):
        assert results[0][name].tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
