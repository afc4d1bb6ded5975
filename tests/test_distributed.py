"""The collectives: the identity in one process, rank order over several."""

from typing import Any

import torch
from ranks import run_ranks

from caco_fast.distributed import (
    all_gather_objects,
    all_gather_rows,
    all_gather_uneven,
    all_reduce_sum,
    barrier,
    broadcast_object,
    rank,
    world_size,
)


def test_one_process_is_rank_0_of_1_and_every_collective_the_identity() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    barrier()
    for gathered in (all_gather_rows(rows), all_gather_uneven(rows), all_reduce_sum(rows.detach().clone())):
        assert torch.equal(gathered, rows)
        assert not gathered.requires_grad
    assert broadcast_object({"a": 1}) == {"a": 1} and all_gather_objects("a") == ["a"]


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
