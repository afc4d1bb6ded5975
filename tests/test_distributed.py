"""The collectives: the identity in one process, rank order over several ranks, and the gradient of a gather."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from caco_fast import distributed
from caco_fast.distributed import (
    all_gather_objects,
    all_gather_rows,
    all_gather_rows_with_gradient,
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


def gather_row_by_row(rows: torch.Tensor) -> torch.Tensor | None:
    """gather_to_first in pieces of one row."""
    usual = distributed.GATHER_PIECE
    distributed.GATHER_PIECE = 1
    try:
        return gather_to_first(rows, [0, 1, 2])
    finally:
        distributed.GATHER_PIECE = usual


def counted() -> dict[str, Any]:
    """Calls, payload and bytes sent of each collective, for 6 rows of 2 f32 of which 2 are this rank's."""
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
        "row_by_row": gather_row_by_row(uneven),
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
        for name in ("gathered", "row_by_row"):
            assert (found[name] is None) == (rank_number > 0)
        assert found["counted"].pop("gather_to_first", None) == (None if rank_number == 0 else (1, 16, 16))
        assert found["counted"] == {
            "all_gather_rows": (1, 48, 32),
            "reduce_scatter_rows": (1, 48, 32),
            "all_reduce_sum": (1, 48, 64),
            "all_reduce_max": (1, 48, 64),
        }
    for name in ("gathered", "row_by_row"):
        assert results[0][name].tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]


CHANNELS, DIM, IMAGES = 5, 4, 12


def contrastive_loss(queries: torch.Tensor, rows: torch.Tensor, first: int) -> torch.Tensor:
    """The mean over this rank's queries [R, C] of InfoNCE against the rows [N R, C] of all ranks.

    The positive of query i is row first + i.
    """
    targets = first + torch.arange(len(queries))
    return F.cross_entropy(queries @ rows.T / 0.3, targets)


def encoder_gradient(loss_of_all_rows: bool) -> torch.Tensor:
    """The gradient of an encoder's weight after DistributedDataParallel's mean, on this rank's share of the images."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(IMAGES, CHANNELS, generator=generator, dtype=torch.float64) for _ in range(2))
    encoder = torch.nn.Linear(CHANNELS, DIM, bias=False, dtype=torch.float64)
    with torch.no_grad():
        encoder.weight.copy_(torch.randn(DIM, CHANNELS, generator=generator, dtype=torch.float64))
    forward = DistributedDataParallel(encoder) if world_size() > 1 else encoder
    share = IMAGES // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    queries, keys = forward(torch.cat([left[own], right[own]])).tanh().chunk(2)
    rows = all_gather_rows_with_gradient(keys)
    if loss_of_all_rows:
        contrastive_loss(all_gather_rows_with_gradient(queries), rows, 0).backward()
    else:
        contrastive_loss(queries, rows, own.start).backward()
    return encoder.weight.grad


@pytest.mark.parametrize("loss_of_all_rows", [False, True], ids=["loss-of-own-rows", "loss-of-all-rows"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradient_through_the_gather_is_that_of_one_process(ranks: int, loss_of_all_rows: bool) -> None:
    """The mean of the ranks' losses is the loss of all images in one process; the gradients agree without a factor."""
    expected = encoder_gradient(loss_of_all_rows)
    for found in run_ranks(encoder_gradient, ranks, loss_of_all_rows):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def gathered_gradient() -> dict[str, Any]:
    """Gradients by dtype, of losses that weigh all rows by rank + 1; the gradient of a compiled function; the calls."""

    def weighted(rows: torch.Tensor) -> torch.Tensor:
        return (2 * all_gather_rows_with_gradient(3 * rows)).sum()

    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = torch.full((2, 3), 1.0 + rank(), dtype=dtype, requires_grad=True)
        ((rank() + 1) * all_gather_rows_with_gradient(rows)).sum().backward()
        found[str(dtype)] = rows.grad
    rows = torch.ones(2, 3, requires_grad=True)
    torch.compile(weighted, backend="aot_eager", fullgraph=True)(rows).backward()
    found["compiled"] = rows.grad.clone()
    with count_traffic() as traffic:
        weighted(rows).backward()
    found["calls"] = dict(traffic.calls)
    return found


def test_gradient_of_a_gather_is_summed_over_the_ranks_in_any_dtype_and_compiled() -> None:
    for found in run_ranks(gathered_gradient, 2):
        assert found.pop("calls") == {"all_gather_rows": 1, "reduce_scatter_rows": 1}
        assert torch.equal(found.pop("compiled"), torch.full((2, 3), 12.0))
        for name, gradient in found.items():
            assert str(gradient.dtype) == name and torch.equal(gradient, torch.full_like(gradient, 3.0))


def test_gather_with_gradient_is_the_identity_in_one_process() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert all_gather_rows_with_gradient(rows) is rows


def refusals() -> list[str]:
    """The lines of calls whose rows do not fit the ranks. No rank is left waiting."""
    calls = (
        lambda: all_gather_rows_with_gradient(torch.ones(2 + rank(), 3)),
        lambda: reduce_scatter_rows(torch.ones(3, 3)),
        lambda: gather_to_first(torch.ones(2, 3), [1, 1]),
    )
    lines = []
    for call in calls:
        with pytest.raises(ValueError) as refused:
            call()
        lines.append(str(refused.value))
    return lines


def test_rows_that_do_not_fit_the_ranks_are_one_line() -> None:
    for rank_number, lines in enumerate(run_ranks(refusals, 2)):
        assert lines == [
            "all_gather_rows_with_gradient: found [2, 3] rows on the ranks, expected equal numbers",
            "reduce_scatter_rows: found 3 rows, expected a multiple of 2 ranks",
            f"gather_to_first: found 2 rows on rank {rank_number}, expected [1, 1] on 2 ranks",
        ]
