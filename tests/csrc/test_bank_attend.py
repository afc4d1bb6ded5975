"""bank_attend on emulated kernels. Legend: R query rows, K bank rows, C channels."""

import pytest
import torch

from caco_fast.ops import bank_attend
from tests.csrc.cases import ADVERSARIAL, RAGGED, SPACING, Case, attend, rounded, unit_rows

LSE_TOLERANCE = 4e-6  # f32 sums, logarithm and scaling; relative to the largest |s| / t
TEMPERATURES = (0.1, 0.07)


def check_against_rounded_operands(
    case: Case, temperatures: tuple[float, float], lse, other_lse, mean_row, queries, bank
):
    """Against f64 on the same rounded operands, where only the rounding of p remains: a bound for every element."""
    rows, unit = rounded(case, queries, bank)
    for t, found in zip(temperatures, (lse, other_lse)):
        expected, _, _ = attend(rows, unit, t)
        largest = (rows @ unit.T).abs().amax().item() / t
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=LSE_TOLERANCE * max(largest, 1))
    _, p, expected = attend(rows, unit, temperatures[0])
    largest = (rows @ unit.T).abs().amax() / temperatures[0]
    bound = (SPACING[case.operand] / 2 + 3e-6 * largest) * (p @ unit.abs()) + 1e-6
    excess = ((mean_row - expected).abs() / bound).max().item()
    assert excess <= 1, f"mean_row is off by {excess:.2f} times the bound"


@pytest.mark.parametrize("case", RAGGED + ADVERSARIAL, ids=str)
def test_attend_is_exact_up_to_the_rounding_of_p(cuda_ops, emulated, case):
    queries, bank = case.make()
    (lse, other_lse), mean_row = bank_attend(queries, bank, TEMPERATURES, backend="cuda")
    assert lse.dtype == mean_row.dtype == torch.float32
    check_against_rounded_operands(case, TEMPERATURES, lse, other_lse, mean_row, queries, bank)
    assert emulated.take_counters()["bank_conflicts"] == 0


@pytest.mark.parametrize("case", RAGGED + ADVERSARIAL, ids=str)
def test_attend_is_as_good_as_low_precision_torch(cuda_ops, case):
    queries, bank = case.make()
    lse, mean_row = bank_attend(queries, bank, TEMPERATURES[0], backend="cuda")
    expected_lse, _, expected_mean = attend(queries.double(), unit_rows(bank)[0], TEMPERATURES[0])
    low_queries, low_unit = queries.to(case.operand), unit_rows(bank)[0].to(case.operand)
    low_scores = low_queries @ low_unit.T / TEMPERATURES[0]
    low_lse = torch.logsumexp(low_scores.float(), dim=1)
    low_mean = torch.softmax(low_scores.float(), dim=1).to(case.operand) @ low_unit
    for found, low, expected in ((lse, low_lse, expected_lse), (mean_row, low_mean, expected_mean)):
        error, low_error = (found - expected).abs(), (low.double() - expected).abs()
        scale = queries.float().norm(dim=1).amax().item() / TEMPERATURES[0]
        # Rounded operands, where the low-precision result happens to be exact (a query equal to a bank row: s = 1).
        constant = SPACING[case.operand] / 4 * (scale if found is lse else 1)
        assert error.amax() <= 2 * low_error.amax() + constant
        assert error.square().mean().sqrt() <= 1.5 * low_error.square().mean().sqrt() + constant / 2


@pytest.mark.parametrize("temperature", [0.02, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_at_extreme_temperatures(cuda_ops, temperature, dtype):
    """At 0.02 a row's probabilities span e^100; the best row of some queries is the opposite one only."""
    case = Case(40, 150, 64, dtype, "equal_and_opposite")
    queries, bank = case.make()
    bank[:40] = bank[-40:]
    pair = (temperature, temperature / 6)
    (lse, other_lse), mean_row = bank_attend(queries, bank, pair, backend="cuda")
    check_against_rounded_operands(case, pair, lse, other_lse, mean_row, queries, bank)


@pytest.mark.parametrize("kind", ["ascending", "descending"])
def test_attend_with_a_maximum_that_moves_in_every_tile(cuda_ops, kind):
    case = Case(20, 400, 64, torch.bfloat16, "clustered")
    queries, bank = case.make()
    order = (queries.float().mean(0) @ bank.T).argsort(descending=kind == "descending")
    bank = bank[order].contiguous()
    (lse, other_lse), mean_row = bank_attend(30 * queries, bank, TEMPERATURES, backend="cuda")
    check_against_rounded_operands(case, TEMPERATURES, lse, other_lse, mean_row, 30 * queries, bank)


def test_attend_of_strided_and_empty_input(cuda_ops):
    queries, bank = Case(24, 60, 128).make()
    wide = torch.stack([queries, queries], dim=2)[:, :, 0]
    assert not wide.is_contiguous()
    expected = bank_attend(queries, bank, 0.1, backend="cuda")
    found = bank_attend(wide, torch.stack([bank, bank], dim=1)[:, 0], 0.1, backend="cuda")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    lse, mean_row = bank_attend(queries[:0], bank, 0.1, backend="cuda")
    assert lse.shape == (0,) and mean_row.shape == (0, 128)


@pytest.mark.parametrize(
    "bank, error, words",
    [
        (torch.ones(3, 64, dtype=torch.float64), TypeError, "found a torch.float64 bank, wanted torch.float32"),
        (torch.ones(3, 528), ValueError, "found C = 528, wanted at most 512"),
    ],
)
def test_attend_refuses_what_the_kernels_cannot_do(cuda_ops, bank, error, words):
    with pytest.raises(error, match=words):
        bank_attend(torch.ones(2, bank.shape[1], dtype=bank.dtype), bank, 0.1, backend="cuda")


def test_attend_gradient_is_the_mean_row(cuda_ops):
    queries, bank = Case(12, 50, 64).make()
    queries.requires_grad_()
    lse, mean_row = bank_attend(queries, bank, 0.1, backend="cuda")
    lse.sum().backward()
    torch.testing.assert_close(queries.grad, mean_row / 0.1)
