"""Banks on several gloo processes, whole on each or shared, do what one process does with the global batch.

Legend: N ranks, R query rows of a rank, K bank rows, C channels, M positives per row.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.bank import KeyQueue, LearnableBank, ShardedBank
from caco_fast.bank.sharded import most_similar, shards
from caco_fast.distributed import all_gather_rows, rank, world_size
from caco_fast.errors import UserError
from tests.ranks import run_ranks

# 12 rows are shared evenly by 2, 3 and 4 ranks, 31 bank rows by none of them.
ROWS, SIZE, DIM, STEPS = 12, 31, 8, 3
KINDS = {"replicated": LearnableBank, "sharded": ShardedBank}


def own(rows: Tensor) -> Tensor:
    return rows.chunk(world_size())[rank()]


def whole(rows: Tensor) -> Tensor:
    return all_gather_rows(rows)


def batches(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [normalize(torch.randn(ROWS, DIM, generator=generator), dim=1).to(dtype) for _ in range(STEPS)]


def train(kind: str, dtype: torch.dtype, norm: str, device: str = "cpu") -> dict[str, Any]:
    """Fill, enqueue and step with this share of each global batch; M is 0, 1 and 2 in turn, and once all of them."""
    backend = "tiled" if device == "cuda" else "auto"
    bank = KINDS[kind](SIZE, DIM, norm=norm, backend=backend, generator=torch.Generator().manual_seed(9)).to(device)
    if dtype == torch.float64:
        bank.double()
    queue = KeyQueue(SIZE, DIM, generator=torch.Generator().manual_seed(9)).to(device)
    start, found = 0, {}
    for step, batch in enumerate(batches(dtype)):
        rows = own(batch).to(device)
        queue.enqueue(rows)
        start = bank.fill(rows, start)
        for many in range(3) if step == 2 else [step]:
            queries = rows.clone().requires_grad_()
            lse, mean_row = bank.attend(queries, 0.1)
            (gradient,) = torch.autograd.grad(lse.sum(), queries)
            positive, similarity = bank.select(rows)
            of_positive = bank.similarity(queries, positive)
            positives = positive.unsqueeze(1).expand(-1, many).contiguous() if many else None
            bank.record(rows, lse, 0.1, lse.new_full((len(rows),), 1 / ROWS), positives)
            values = dict(lse=lse, mean_row=mean_row, gradient=gradient, positive=positive, similarity=similarity)
            values |= {"unit": bank.rows(positive.view(-1, 1)), "of_positive": of_positive}
            found |= {f"{name} {step} {many}": whole(value) for name, value in values.items()}
        bank.step(1.0)
    ends = [bank.fill(own(batches(dtype)[0]).to(device), at, wrap=True) for at in (3, 25)]
    bank.normalise()
    found |= {"next rows": torch.tensor([start, *ends]), "queue": queue.queue}
    found |= {"shard": bank.bank, "shard velocity": bank.velocity}
    found = {name: value.cpu() for name, value in found.items()}
    return found | {"own": (bank.own.start, bank.own.stop), "state": {k: v.cpu() for k, v in bank.state_dict().items()}}


def ties() -> tuple[Tensor, Tensor]:
    """Rows 2, 9, 20 and 30 of the bank are one direction, in several lengths; -0.0 and 0.0 are equal too."""
    bank = ShardedBank(SIZE, DIM, generator=torch.Generator().manual_seed(9))
    for row, length in ((2, 1.0), (9, 2.0), (20, 0.5), (30, 4.0)):
        if row in bank.own:
            bank.bank[row - bank.own.start] = length * torch.eye(DIM)[3]
    keys = torch.stack([torch.eye(DIM)[3], -torch.eye(DIM)[3]])
    index, similarity = bank.select(keys)
    zeros = torch.tensor([-0.0 if rank() == 0 else 0.0])
    first, _ = most_similar(torch.tensor([rank()]), zeros)
    return torch.cat([index, first]), similarity


def not_finite() -> tuple[Tensor, Tensor, Tensor]:
    """A NaN in a query of the last rank, and one in a key: the row is left out of the step everywhere."""
    bank = ShardedBank(SIZE, DIM, generator=torch.Generator().manual_seed(9))
    rows = own(batches(torch.float32)[0]).clone()
    if rank() == world_size() - 1:
        rows[-1, 2] = torch.nan
    positive, _ = bank.select(rows)
    weights = torch.full((len(rows),), 1 / ROWS)
    bank.contrast(rows, positive.view(-1, 1), torch.ones(len(rows), 1), 0.1, 0.07, row_weight=weights)
    bank.step(1.0)
    return positive, bank.skipped_rows, bank.bank.isfinite().all()


def refusals() -> list[str]:
    with pytest.raises(UserError) as few:
        ShardedBank(world_size() - 1, DIM)
    made_before = ShardedBank(SIZE, DIM)
    made_before.ranks = 1
    with pytest.raises(UserError) as late:
        made_before.select(torch.ones(1, DIM))
    return [str(few.value), str(late.value)]


TRAINED = {
    f"{kind} {norm} {name}": (kind, dtype, norm)
    for kind in KINDS
    for name, dtype, norm in (("f64", torch.float64, "implicit"), ("f32", torch.float32, "project"))
} | {"replicated implicit bf16": ("replicated", torch.bfloat16, "implicit")}
TRAINED |= {"sharded implicit bf16": ("sharded", torch.bfloat16, "implicit")}


def on_rank() -> dict[str, Any]:
    found = {name: train(*arguments) for name, arguments in TRAINED.items()}
    return found | {"ties": ties(), "not finite": not_finite(), "refusals": refusals()}


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda ranks: f"{ranks} ranks")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(on_rank, request.param)


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return {name: train("replicated", *rest) for name, (kind, *rest) in TRAINED.items() if kind == "replicated"}


@pytest.mark.parametrize("name", TRAINED)
def test_ranks_do_what_one_process_does(name: str, ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    kind, *rest = TRAINED[name]
    # Worst seen: 2e-15, 1.5e-6, and 7e-3 of gradients in bf16.
    tolerance = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2e-2}[rest[0]]
    compare_ranks([found[name] for found in ranks], single["replicated " + name.partition(" ")[2]], kind, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_gpus_over_nccl_do_what_one_process_does(kind: str) -> None:
    ranks = run_ranks(train, min(4, torch.cuda.device_count()), kind, torch.float32, "implicit", "cuda", backend="nccl")
    compare_ranks(ranks, train("replicated", torch.float32, "implicit"), kind, 2e-5)


def compare_ranks(ranks: list[dict[str, Any]], expected: dict[str, Any], kind: str, tolerance: float) -> None:
    """Every value on every rank, its shard, and the whole bank where it is."""

    def compare(found: Tensor, expected: Tensor, what: str) -> None:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")

    for number, found in enumerate(ranks):
        found = dict(found)
        state, bounds = found.pop("state"), slice(*found.pop("own"))
        compare(found.pop("shard"), expected["state"]["bank"][bounds], "shard")
        compare(found.pop("shard velocity"), expected["state"]["velocity"][bounds], "shard velocity")
        assert list(state) == (["bank", "velocity"] if kind == "replicated" or number == 0 else [])
        for key, value in state.items():
            compare(value, expected["state"][key], key)
        for key, value in found.items():
            compare(value, expected[key], key)


def test_replicas_are_equal_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for name, (kind, *_) in TRAINED.items():
        if kind == "replicated":
            for other in ranks[1:]:
                assert torch.equal(ranks[0][name]["shard"], other[name]["shard"])


def test_ties_over_ranks_go_to_the_lowest_index(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        index, similarity = found["ties"]
        assert index[0] == 2 and index[2] == 0
        assert similarity[0] == 1


def test_a_row_that_is_not_finite_is_left_out_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for positive, skipped, finite in (found["not finite"] for found in ranks):
        assert ((0 <= positive) & (positive < SIZE)).all()
        assert skipped == 1 and finite


def test_refusals_are_one_line(ranks: list[dict[str, Any]]) -> None:
    few, late = ranks[-1]["refusals"]
    assert few == (
        f"the bank: found {len(ranks) - 1} rows for {len(ranks)} ranks, expected at least one on each: "
        "take a larger bank, fewer ranks, or caco.bank_parallel=replicated"
    )
    assert late == f"ShardedBank: made for 1 ranks, found {len(ranks)}: make it after init_process_group"


def test_in_one_process_the_shard_is_the_whole() -> None:
    assert shards(5) == [range(5)]
    found, expected = train("sharded", torch.float32, "implicit"), train("replicated", torch.float32, "implicit")
    torch.testing.assert_close(found, expected)
