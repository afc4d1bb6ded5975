"""bank_attend on every backend. Legend: R query rows, K bank rows, C channels."""

import pytest
import torch
from torch import Tensor

from caco_fast.ops import bank_attend
from tests import oracle
from tests.ops.backends import KERNELS, PLAIN, Backend, over
from tests.ops.cases import ADVERSARIAL, KINDS, RAGGED, SHAPES, Case, inputs, make_for_precision, unit_rows
from tests.ops.tolerances import (
    CLOSE,
    SPACING,
    assert_as_good_as_low_precision,
    assert_attended,
    assert_twice_plain,
)

TEMPERATURES = (0.1, 0.07)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
kinds = pytest.mark.parametrize("kind", KINDS)


# In f64, against loops over floats


@over("auto", *PLAIN)
@shapes
@pytest.mark.parametrize("temperature", [0.08, 0.02, 1.0])
def test_the_formula(backend: Backend, shape, temperature, small_tiles):
    queries, bank = inputs(*shape)
    lse, mean_row = bank_attend(queries, bank, temperature, backend.name)
    expected_lse, expected_mean = oracle.attend_by_loops(queries, bank, temperature)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)
    torch.testing.assert_close(mean_row, expected_mean, **CLOSE)


@over("auto", *PLAIN)
@shapes
def test_two_temperatures(backend: Backend, shape, small_tiles):
    queries, bank = inputs(*shape)
    (lse, other_lse), mean_row = bank_attend(queries, bank, (0.1, 0.02), backend.name)
    expected_lse, expected_mean = oracle.attend_by_loops(queries, bank, 0.1)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)
    torch.testing.assert_close(mean_row, expected_mean, **CLOSE)
    torch.testing.assert_close(other_lse, oracle.attend_by_loops(queries, bank, 0.02)[0], **CLOSE)


@over("auto", *PLAIN)
@shapes
def test_gradient_of_lse(backend: Backend, shape, small_tiles):
    queries, bank = inputs(*shape)
    queries.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: bank_attend(q, bank, 0.3, backend.name)[0], queries)
    pair = torch.autograd.grad(bank_attend(queries, bank, (0.3, 0.1), backend.name)[0][0].sum(), queries)[0]
    single = torch.autograd.grad(bank_attend(queries, bank, 0.3, backend.name)[0].sum(), queries)[0]
    torch.testing.assert_close(pair, single, **CLOSE)


# The kernels, element by element


def check(backend: Backend, case: Case, temperatures: tuple[float, ...] = TEMPERATURES) -> None:
    queries, bank = case.make()
    lse, mean_row = bank_attend(queries, bank, temperatures, backend.name)
    assert lse[0].dtype == mean_row.dtype == torch.float32
    assert_attended(backend.operand(case.dtype), temperatures, lse, mean_row, queries, bank)


@over(*KERNELS)
@pytest.mark.parametrize("case", RAGGED + ADVERSARIAL, ids=str)
def test_kernels_are_exact_up_to_the_rounding_of_p(backend: Backend, case):
    check(backend, case)
    assert backend.take("bank_conflicts") == 0


@over(*KERNELS)
@pytest.mark.parametrize("channels", range(64, 513, 16))
def test_every_sixteenth_channel_count_is_served(backend: Backend, channels):
    check(backend, Case(7, 34, channels))
    assert backend.take("bank_conflicts") == 0


@over(*KERNELS)
@pytest.mark.parametrize("case", RAGGED + ADVERSARIAL, ids=str)
def test_kernels_are_as_good_as_low_precision_torch(backend: Backend, case):
    queries, bank = case.make()
    lse, mean_row = bank_attend(queries, bank, TEMPERATURES[0], backend.name)
    expected_lse, _, expected_mean = oracle.attend(queries, oracle.unit_rows(bank)[0], TEMPERATURES[0])
    operand = backend.operand(case.dtype)
    low_unit = oracle.unit_rows(bank)[0].to(operand)
    low_scores = queries.to(operand) @ low_unit.T / TEMPERATURES[0]
    low_lse = torch.logsumexp(low_scores.float(), dim=1)
    low_mean = torch.softmax(low_scores.float(), dim=1).to(operand) @ low_unit
    constant = SPACING[operand] / 4
    scale = queries.float().norm(dim=1).amax().item() / TEMPERATURES[0]
    assert_as_good_as_low_precision(lse, low_lse, expected_lse, constant * scale)
    assert_as_good_as_low_precision(mean_row, low_mean, expected_mean, constant)


@over(*KERNELS)
@pytest.mark.parametrize("temperature", [0.02, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_at_extreme_temperatures(backend: Backend, temperature, dtype):
    """At 0.02 a row's probabilities span e^100; the best row of some queries is the opposite one only."""
    queries, bank = Case(40, 150, 64, dtype, "equal_and_opposite").make()
    bank[:40] = bank[-40:]
    pair = (temperature, temperature / 6)
    lse, mean_row = bank_attend(queries, bank, pair, backend.name)
    assert_attended(backend.operand(dtype), pair, lse, mean_row, queries, bank)


@over(*KERNELS)
@pytest.mark.parametrize("kind", ["ascending", "descending"])
def test_kernels_with_a_maximum_that_moves_in_every_tile(backend: Backend, kind):
    queries, bank = Case(20, 400, 64, torch.bfloat16, "clustered").make()
    order = (queries.float().mean(0) @ bank.T).argsort(descending=kind == "descending")
    bank = bank[order].contiguous()
    lse, mean_row = bank_attend(30 * queries, bank, TEMPERATURES, backend.name)
    assert_attended(backend.operand(queries.dtype), TEMPERATURES, lse, mean_row, 30 * queries, bank)


@over(*KERNELS)
@pytest.mark.parametrize(
    "bank, error, words",
    [
        (torch.ones(3, 64, dtype=torch.float64), TypeError, "found a torch.float64 bank, expected torch.float32"),
        (torch.ones(3, 528), ValueError, "found C = 528, expected at most 512"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(backend: Backend, bank, error, words):
    with pytest.raises(error, match=words):
        bank_attend(torch.ones(2, bank.shape[1], dtype=bank.dtype), bank, 0.1, backend.name)


# The tiled form, against plain torch in the same precision


def plain_attend(queries: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Dense, all in the queries' precision."""
    unit = torch.nn.functional.normalize(bank, dim=1).to(queries.dtype)
    logits = queries @ unit.T / temperature
    return torch.logsumexp(logits, dim=1), torch.softmax(logits, dim=1) @ unit


@dtypes
@kinds
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_tiled_errs_at_most_twice_as_much_as_plain_torch(dtype, kind, temperature):
    queries, bank = make_for_precision(kind, dtype)
    exact_lse, exact_mean = bank_attend(queries.double(), bank.double(), temperature, "reference")
    plain_lse, plain_mean = plain_attend(queries, bank, temperature)
    queries.requires_grad_()
    lse, mean_row = bank_attend(queries, bank, temperature, "tiled")
    (gradient,) = torch.autograd.grad(lse.sum(), queries)
    assert (lse.dtype, mean_row.dtype, gradient.dtype) == (torch.float32, torch.float32, dtype)
    assert_twice_plain(lse.detach(), plain_lse, exact_lse, dtype, "lse")
    assert_twice_plain(mean_row, plain_mean, exact_mean, dtype, "mean_row")
    assert_twice_plain(gradient, (plain_mean / temperature).to(dtype), exact_mean / temperature, dtype, "gradient")


@dtypes
def test_tiled_two_temperatures_are_two_calls(dtype):
    queries, bank = make_for_precision("random", dtype)
    (lse, other_lse), mean_row = bank_attend(queries, bank, (0.1, 0.02), "tiled")
    for temperature, pair in [(0.1, lse), (0.02, other_lse)]:
        torch.testing.assert_close(pair, bank_attend(queries, bank, temperature, "tiled")[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean_row, bank_attend(queries, bank, 0.1, "tiled")[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("temperature", [0.02, 0.1])
@kinds
def test_tiled_with_queries_of_any_length(length, temperature, kind):
    """Exponents reach 40 / 0.02 = 2000 here; without a running maximum exp would overflow, or all of it underflow."""
    queries, bank = make_for_precision(kind, torch.float32)
    lse, mean_row = bank_attend(length * queries, bank, temperature, "tiled")
    exact_lse, exact_mean = bank_attend((length * queries).double(), bank.double(), temperature, "reference")
    plain_lse, plain_mean = plain_attend(length * queries, bank, temperature)
    assert_twice_plain(lse, plain_lse, exact_lse, torch.float32, "lse")
    assert_twice_plain(mean_row, plain_mean, exact_mean, torch.float32, "mean_row")


def test_tiled_computes_fp16_queries_in_f32():
    queries, bank = make_for_precision("random", torch.float16)
    lse, mean_row = bank_attend(queries, bank, 0.02, "tiled")
    expected_lse, expected_mean = bank_attend(queries.float(), bank, 0.02, "tiled")
    assert torch.equal(lse, expected_lse)
    assert torch.equal(mean_row, expected_mean)


# What every backend keeps


@over(*PLAIN, *KERNELS)
def test_strided_and_empty_input(backend: Backend):
    queries, bank = Case(24, 60, 128).make()
    wide = torch.stack([queries, queries], dim=2)[:, :, 0]
    strided = torch.stack([bank, bank], dim=1)[:, 0]
    assert not wide.is_contiguous() and not strided.is_contiguous()
    expected, found = (bank_attend(*rows, 0.1, backend.name) for rows in ((queries, bank), (wide, strided)))
    if backend.name == "cuda":
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    torch.testing.assert_close(found, expected)
    empty = queries[:0].clone().requires_grad_()
    (lse, other_lse), mean_row = bank_attend(empty, bank, (0.1, 0.2), backend.name)
    assert (lse.shape, other_lse.shape, mean_row.shape) == ((0,), (0,), (0, 128))
    lse.sum().backward()
    assert empty.grad.shape == (0, 128)


@over(*PLAIN, *KERNELS)
def test_gradient_is_the_mean_row(backend: Backend):
    queries, bank = Case(12, 50, 64).make()
    queries.requires_grad_()
    lse, mean_row = bank_attend(queries, bank, 0.1, backend.name)
    lse.sum().backward()
    torch.testing.assert_close(queries.grad, mean_row / 0.1)


@over(*PLAIN)
def test_nan_in_a_query_shows_in_its_result_only(backend: Backend):
    queries, bank = unit_rows(4, 8), unit_rows(30, 8)
    queries[2, 3] = torch.nan
    lse, mean_row = bank_attend(queries, bank, 0.1, backend.name)
    assert lse.isnan().tolist() == [False, False, True, False]
    assert mean_row.isnan().all(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    "temperature", [0.0, -0.1, float("nan"), float("inf"), (0.1, 0.0), (0.1, 0.2, 0.3), ()], ids=str
)
def test_bad_temperature_is_named(temperature):
    with pytest.raises(ValueError, match="bank_attend: temperature: found"):
        bank_attend(torch.ones(2, 4), torch.ones(3, 4), temperature)


@pytest.mark.parametrize(
    "operand, error, words",
    [
        (torch.zeros(2, 64).bfloat16(), ValueError, r"operand: found shape \[2, 64\], expected \[3, P\]"),
        (torch.zeros(3, 64), TypeError, "operand: found torch.float32, expected torch.bfloat16"),
    ],
)
def test_bad_operand_is_named(operand, error, words):
    with pytest.raises(error, match=words):
        bank_attend(torch.ones(2, 4), torch.ones(3, 4), 0.1, operand=operand)


def test_what_carries_a_gradient_and_what_does_not():
    queries, bank = unit_rows(4, 8).requires_grad_(), unit_rows(30, 8).requires_grad_()
    for pair in [(0.1, 0.2), (0.1, 0.1)]:
        (lse, other_lse), mean_row = bank_attend(queries, bank, pair)
        assert (lse.requires_grad, other_lse.requires_grad, mean_row.requires_grad) == (True, False, False)
    assert torch.autograd.grad(lse.sum(), bank, allow_unused=True)[0] is None


@over(*PLAIN)
def test_opcheck(backend: Backend):
    queries, bank = unit_rows(5, 8).requires_grad_(), unit_rows(17, 8)
    for temperatures in ([0.1], [0.1, 0.05]):
        torch.library.opcheck(torch.ops.caco_fast.bank_attend, (queries, bank, temperatures, None, backend.name))
