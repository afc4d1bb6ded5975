"""Replicated banks on two gloo processes: equal on both ranks, and equal to one process with the global batch.

Legend: R query rows of a rank, K bank rows, C channels.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.functional import normalize

from caco_fast.bank import KeyQueue, LearnableBank

RANKS, ROWS, SIZE, DIM, STEPS = 2, 6, 31, 8, 3

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def batches(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (RANKS * ROWS, DIM)
    return [normalize(torch.randn(shape, generator=generator), dim=1).to(dtype) for _ in range(STEPS)]


def train(share: slice, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Fill, enqueue and step with this share of each global batch; M is 1 and 2 in turn."""
    bank = LearnableBank(SIZE, DIM, generator=torch.Generator().manual_seed(9))
    queue = KeyQueue(SIZE, DIM, generator=torch.Generator().manual_seed(9))
    start = 0
    for step, batch in enumerate(batches(dtype)):
        rows = batch[share]
        start = bank.fill(rows, start)
        queue.enqueue(rows)
        lse, _ = bank.attend(rows, 0.1)
        positive, _ = bank.select(rows)
        positives = positive.unsqueeze(1).expand(-1, 1 + step % 2)
        bank.record(rows, lse, 0.1, torch.full((len(rows),), 1 / len(batch)), positives)
        bank.step(1.0)
    return {**bank.state_dict(), **queue.state_dict(), "start": torch.tensor(start)}


def run_rank(rank: int, folder: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        torch.save(train(slice(rank * ROWS, (rank + 1) * ROWS), dtype), Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_two_ranks_keep_equal_banks_that_are_those_of_one_process(tmp_path, dtype):
    multiprocessing.spawn(run_rank, (str(tmp_path), dtype), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS))
    single = train(slice(None), dtype)
    for name, wanted in single.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], wanted)
