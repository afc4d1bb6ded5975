"""Results do not depend on the order in which threads run, on when asynchronous copies land, or on the launch."""

import itertools

import pytest
import torch

from caco_fast.ops import bank_attend, bank_select, bank_step_
from tests.ops.cases import Case, rounded
from tests.oracle import attend, unit_rows

SCHEDULES = [
    dict(seed=seed, greedy=greedy, lazy_copies=lazy, os_threads=threads)
    for seed, greedy, lazy, threads in [
        *((seed, greedy, lazy, 1) for seed, greedy, lazy in itertools.product((1, 7), (False, True), (False, True))),
        (11, False, True, 2),
    ]
]


def run_all(channels: int) -> list[torch.Tensor]:
    queries, bank = Case(140, 150, channels, torch.bfloat16).make()
    lse, mean_row = bank_attend(queries, bank, 0.1, backend="cuda")
    index, similarity = bank_select(queries, bank, backend="cuda")
    stepped, velocity = bank.clone(), torch.zeros_like(bank)
    bank_step_(
        stepped, velocity, queries, lse, temperature=0.1, lr=0.5, momentum=0.9, row_weight=torch.full((140,), 1 / 140),
        positives=index.unsqueeze(1), backend="cuda",
    )  # fmt: skip
    again = bank_attend(queries, stepped, 0.1, backend="cuda")
    return [lse, mean_row, index, similarity, stepped, velocity, *again]


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, int], list[torch.Tensor]]:
    return {}


@pytest.mark.parametrize("channels", [64, 512])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(f"{k}={int(v)}" for k, v in s.items()))
def test_every_schedule_gives_the_same_bits(cuda_ops, emulated, path, expected, channels, schedule):
    if (path, channels) not in expected:
        expected[path, channels] = run_all(channels)
    emulated.set_schedule(**schedule)
    for found, wanted in zip(run_all(channels), expected[path, channels], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_any_split_of_the_bank_merges_to_the_same_result(cuda_ops, emulated, path, monkeypatch, multiprocessors):
    monkeypatch.setattr(cuda_ops, "target_for", lambda device: emulated.Target(path, 0, multiprocessors, 0))
    queries, bank = Case(9, 1100, 64, torch.bfloat16).make()
    operand = cuda_ops.operand_dtype(queries, cuda_ops.target_for(bank.device))
    low_unit = rounded(operand, queries, bank)[1]
    lse, mean_row = bank_attend(queries, bank, 0.1, backend="cuda")
    expected_lse, _, expected_mean = attend(queries.double(), low_unit, 0.1)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=4e-5)
    torch.testing.assert_close(mean_row.double(), expected_mean, rtol=0, atol=1e-3)
    index, _ = bank_select(queries, bank, backend="cuda")
    assert torch.equal(index, (queries.double() @ unit_rows(bank)[0].T).argmax(dim=1))
