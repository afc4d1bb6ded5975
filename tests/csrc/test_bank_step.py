"""bank_step_ on emulated kernels. Legend: R query rows, K bank rows, C channels, M positives per row."""

import pytest
import torch

from caco_fast.ops import bank_attend, bank_step_
from tests.csrc.cases import ADVERSARIAL, RAGGED, SPACING, Case, attend, rounded, step, unit_rows

TEMPERATURE, LR, MOMENTUM = 0.1, 0.5, 0.9


def make_step(case: Case, positives: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    queries, bank = case.make()
    velocity = 0.01 * torch.randn(bank.shape, generator=generator)
    row_weight = (torch.rand(case.rows, generator=generator) + 0.5) / case.rows
    index = torch.randint(0, case.bank_rows, (case.rows, positives), generator=generator)
    weight = torch.rand(case.rows, positives, generator=generator)
    lse, p, _ = attend(queries.double(), unit_rows(bank)[0], TEMPERATURE)
    return queries, bank, velocity, lse.float(), p, row_weight, index, weight


def run(case: Case, positives: int, project: bool = False, seed: int = 1):
    """((bank, velocity) of the kernels, of the formula, error bound of the velocity)"""
    queries, bank, velocity, lse, p, row_weight, index, weight = make_step(case, positives, seed)
    found_bank, found_velocity = bank.clone(), velocity.clone()
    bank_step_(
        found_bank, found_velocity, queries, lse, temperature=TEMPERATURE, lr=LR, momentum=MOMENTUM,
        row_weight=row_weight, positives=index, positive_weight=weight, norm="project" if project else "implicit",
        backend="cuda",
    )  # fmt: skip
    settings = (TEMPERATURE, LR, MOMENTUM, row_weight, index, weight, project)
    expected = step(bank, velocity, queries, p, *settings)

    # What rounding can do to G_j = sum_i a_i p_ij q_i: of the score (in the exponent), of a_i p_ij, of q_i.
    unit, inverse = unit_rows(bank)
    rows, low_unit = rounded(case, queries, bank)
    score_error = (rows @ low_unit.T - queries.double() @ unit.T).abs() / TEMPERATURE + 1e-5
    largest = (queries.double() @ unit.T).abs().amax() / TEMPERATURE
    relative = 1.2 * score_error + SPACING[case.operand] + 1e-6 * largest
    of_pulled = (row_weight.double().unsqueeze(1) * (p * relative + 2.0**-36)).T @ queries.double().abs() + 1e-7
    bound = inverse / TEMPERATURE * (of_pulled + (of_pulled * unit.abs()).sum(1, keepdim=True) * unit.abs()) + 1e-6
    bound += 1e-6 * expected[1].abs().amax(dim=1, keepdim=True)
    return (found_bank, found_velocity), expected, bound


def worst(found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> float:
    return ((found.double() - expected).abs() / bound).amax().item()


@pytest.mark.parametrize("case", RAGGED + ADVERSARIAL, ids=str)
def test_step_follows_the_formula(cuda_ops, emulated, case):
    (bank, velocity), (expected_bank, expected_velocity), bound = run(case, positives=1)
    assert worst(velocity, expected_velocity, bound) <= 1
    assert worst(bank, expected_bank, LR * bound + 1e-6 * expected_bank.abs().amax(dim=1, keepdim=True)) <= 1
    assert emulated.take_counters()["bank_conflicts"] == 0


@pytest.mark.parametrize("schedule", [dict(), dict(seed=5, greedy=True, lazy_copies=False)], ids=["late", "early"])
@pytest.mark.parametrize("case", [Case(700, 20, 64), Case(500, 140, 256), Case(300, 70, 512)], ids=str)
def test_step_with_queries_that_go_round_the_ring(cuda_ops, emulated, case, schedule):
    """More tiles of queries than a ring has stages, so that each stage is filled again."""
    emulated.set_schedule(**schedule)
    (_, velocity), (_, expected), bound = run(case, positives=1)
    assert worst(velocity, expected, bound) <= 1


@pytest.mark.parametrize("positives", [0, 1, 2, 8])
def test_step_with_m_positives(cuda_ops, positives):
    (_, velocity), (_, expected), bound = run(Case(50, 140, 64, torch.bfloat16), positives)
    assert worst(velocity, expected, bound) <= 1


@pytest.mark.parametrize("channels", [64, 200, 512])
def test_step_with_norm_project_gives_unit_rows(cuda_ops, channels):
    (bank, velocity), (expected, expected_velocity), bound = run(
        Case(20, 150, channels, torch.float16), 1, project=True
    )
    assert worst(velocity, expected_velocity, bound) <= 1
    torch.testing.assert_close(bank.double().norm(dim=1), torch.ones(150, dtype=torch.float64), rtol=0, atol=3e-7)
    torch.testing.assert_close(bank.double(), expected, rtol=0, atol=(2 * LR * bound).amax().item())


def test_step_when_all_rows_choose_the_same_bank_row(cuda_ops):
    case = Case(150, 70, 64, torch.bfloat16)
    queries, bank, velocity, lse, p, row_weight, index, weight = make_step(case, 2)
    index.fill_(69)
    found = velocity.clone()
    bank_step_(
        bank.clone(), found, queries, lse, temperature=TEMPERATURE, lr=LR, momentum=MOMENTUM, row_weight=row_weight,
        positives=index, positive_weight=weight, backend="cuda",
    )  # fmt: skip
    _, expected = step(bank, velocity, queries, p, TEMPERATURE, LR, MOMENTUM, row_weight, index, weight, False)
    torch.testing.assert_close(found[69].double(), expected[69], rtol=1e-3, atol=1e-4)


def test_step_moves_a_positive_towards_its_query(cuda_ops):
    """With p = 0 the positive's own pull is 1, and w' = u + (q - s u), all in f32."""
    queries, bank = Case(1, 1, 64).make()
    velocity = torch.zeros_like(bank)
    s = (queries @ bank.T).item()
    bank_step_(
        bank, velocity, queries, torch.full((1,), 1e4), temperature=1.0, lr=1.0, momentum=0.0, row_weight=torch.ones(1),
        positives=torch.zeros(1, 1, dtype=torch.int64), positive_weight=torch.ones(1, 1), backend="cuda",
    )  # fmt: skip
    after = torch.nn.functional.cosine_similarity(queries, bank).item()
    assert after == pytest.approx((s + 1 - s * s) / (2 - s * s) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("weights", ["zero", "some_zero", "huge", "negative"])
def test_step_with_unusual_row_weights(cuda_ops, weights):
    case = Case(40, 90, 64, torch.float16)
    queries, bank, velocity, lse, p, row_weight, index, weight = make_step(case, 1)
    row_weight = {
        "zero": torch.zeros(40),
        "some_zero": row_weight * (torch.arange(40) % 3 == 0),
        "huge": row_weight * 1e6,
        "negative": -row_weight,
    }[weights]
    found = velocity.clone()
    bank_step_(
        bank.clone(), found, queries, lse, temperature=TEMPERATURE, lr=LR, momentum=MOMENTUM, row_weight=row_weight,
        positives=index, positive_weight=weight, backend="cuda",
    )  # fmt: skip
    _, expected = step(bank, velocity, queries, p, TEMPERATURE, LR, MOMENTUM, row_weight, index, weight, False)
    scale = max((expected - MOMENTUM * velocity).abs().amax().item(), 1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-3 * scale)


@pytest.mark.parametrize("set_to", [0.0, 1.0])
def test_step_is_skipped_where_the_flag_is_set(cuda_ops, set_to):
    """And the operand copy is of the bank as it then is: the next attend reads it."""
    queries, bank, velocity, lse, _, row_weight, index, weight = make_step(Case(20, 150, 64), 1)
    settings = dict(
        temperature=TEMPERATURE, lr=LR, momentum=MOMENTUM, row_weight=row_weight, positives=index,
        positive_weight=weight, norm="project", backend="cuda",
    )  # fmt: skip
    stepped, found = (bank.clone(), velocity.clone()), (bank.clone(), velocity.clone())
    bank_step_(*stepped, queries, lse, **settings)
    bank_step_(*found, queries, lse, **settings, skip=torch.tensor(set_to))
    for changed, wanted in zip(found, (bank, velocity) if set_to else stepped):
        assert torch.equal(changed, wanted)
    after, _ = bank_attend(queries, found[0], TEMPERATURE, backend="cuda")
    wanted, _ = bank_attend(queries, found[0].clone(), TEMPERATURE, backend="cuda")
    assert torch.equal(after, wanted)


def test_step_reads_its_lr_on_the_device(cuda_ops):
    queries, bank = Case(3, 50, 64).make()
    lse, _ = bank_attend(queries, bank, TEMPERATURE, backend="cuda")
    found = []
    for lr in (LR, torch.tensor(LR, dtype=torch.float64), torch.tensor(0.0)):
        found.append(bank.clone())
        bank_step_(
            found[-1], torch.zeros_like(bank), queries, lse, temperature=TEMPERATURE, lr=lr, momentum=MOMENTUM,
            row_weight=torch.ones(3), backend="cuda",
        )  # fmt: skip
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], bank) and not torch.equal(found[0], bank)


def test_step_without_rows_only_decays_the_velocity(cuda_ops):
    queries, bank = Case(3, 50, 64).make()
    velocity = torch.ones_like(bank)
    bank_step_(
        bank, velocity, queries[:0], torch.empty(0), temperature=0.1, lr=0.0, momentum=0.5, row_weight=torch.empty(0),
        backend="cuda",
    )  # fmt: skip
    assert torch.equal(velocity, torch.full_like(velocity, 0.5))
