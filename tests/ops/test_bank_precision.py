"""The tiled backend in f32 and bf16 against f64, bounded by what plain torch in the same precision achieves.

The rule of FlashAttention and of cut cross-entropy: the largest elementwise error is at most twice that of plain torch
in the same precision, plus a small constant; and the same for the RMS error.

Legend: R query rows, K bank rows, C channels.
"""

import pytest
import torch
from torch import Tensor

from caco_fast.ops import bank_attend, bank_select, bank_step_
from tests.ops.bank_inputs import inputs, unit_rows

# Added to twice plain torch's error, in units of the result's largest value.
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
# R and K exceed the CPU's tile of 512 x 1024 and are multiples of nothing.
ROWS, BANK_ROWS, CHANNELS = 523, 2311, 48

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
kinds = pytest.mark.parametrize(
    "kind", ["random", "clustered", "duplicates", "equal and opposite", "all opposite"], ids=lambda kind: kind
)


def make(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries [R, C] in dtype, bank [K, C] in f32."""
    queries, bank = inputs(kind, ROWS, BANK_ROWS, CHANNELS)
    return queries.to(dtype), bank.float()


def assert_within_bound(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, name: str) -> None:
    assert found.isfinite().all(), f"{name}: not finite"
    slack = SLACK[dtype] * exact.abs().max().item()
    error, plain_error = (found.double() - exact).abs(), (plain.double() - exact).abs()
    assert error.max() <= 2 * plain_error.max() + slack, (
        f"{name}: largest error {error.max()}, plain {plain_error.max()}"
    )
    rms, plain_rms = error.square().mean().sqrt(), plain_error.square().mean().sqrt()
    assert rms <= 2 * plain_rms + slack, f"{name}: RMS error {rms}, plain {plain_rms}"


def plain_attend(queries: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Dense, all in the queries' precision."""
    unit = torch.nn.functional.normalize(bank, dim=1).to(queries.dtype)
    logits = queries @ unit.T / temperature
    return torch.logsumexp(logits, dim=1), torch.softmax(logits, dim=1) @ unit


@dtypes
@kinds
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_attend(dtype, kind, temperature):
    queries, bank = make(kind, dtype)
    exact_lse, exact_mean = bank_attend(queries.double(), bank.double(), temperature, "reference")
    plain_lse, plain_mean = plain_attend(queries, bank, temperature)
    queries.requires_grad_()
    lse, mean_row = bank_attend(queries, bank, temperature, "tiled")
    (gradient,) = torch.autograd.grad(lse.sum(), queries)
    assert (lse.dtype, mean_row.dtype, gradient.dtype) == (torch.float32, torch.float32, dtype)
    assert_within_bound(lse.detach(), plain_lse, exact_lse, dtype, "lse")
    assert_within_bound(mean_row, plain_mean, exact_mean, dtype, "mean_row")
    plain_gradient = (plain_mean / temperature).to(dtype)
    assert_within_bound(gradient, plain_gradient, exact_mean / temperature, dtype, "gradient")


@dtypes
def test_two_temperatures_are_two_calls(dtype):
    queries, bank = make("random", dtype)
    (lse, other_lse), mean_row = bank_attend(queries, bank, (0.1, 0.02), "tiled")
    for temperature, pair in [(0.1, lse), (0.02, other_lse)]:
        torch.testing.assert_close(pair, bank_attend(queries, bank, temperature, "tiled")[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean_row, bank_attend(queries, bank, 0.1, "tiled")[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("temperature", [0.02, 0.1])
@kinds
def test_attend_with_queries_of_any_length(length, temperature, kind):
    """Exponents reach 40 / 0.02 = 2000 here; without a running maximum exp would overflow, or all of it underflow."""
    queries, bank = make(kind, torch.float32)
    lse, mean_row = bank_attend(length * queries, bank, temperature, "tiled")
    exact_lse, exact_mean = bank_attend((length * queries).double(), bank.double(), temperature, "reference")
    plain_lse, plain_mean = plain_attend(length * queries, bank, temperature)
    assert_within_bound(lse, plain_lse, exact_lse, torch.float32, "lse")
    assert_within_bound(mean_row, plain_mean, exact_mean, torch.float32, "mean_row")


def plain_step(
    bank: Tensor, velocity: Tensor, queries: Tensor, lse: Tensor, positive: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Dense, similarities, coefficients and their product in the queries' precision. New bank and velocity."""
    dtype = queries.dtype
    norm = bank.norm(dim=1, keepdim=True)
    unit = bank / norm
    similarity = queries @ unit.to(dtype).T
    p = torch.exp(similarity / temperature - lse.to(dtype).unsqueeze(1))
    rows = torch.arange(len(queries))
    p[rows, positive] = 1 - p[rows, positive]
    along = (p * similarity).sum(dim=0).float().unsqueeze(1)
    tangent = weight * ((p.T @ queries).float() - along * unit)
    velocity = 0.9 * velocity - tangent / (norm * temperature)
    return bank - 0.5 * velocity, velocity


@dtypes
@kinds
def test_step(dtype, kind):
    queries, bank = make(kind, dtype)
    bank /= bank.norm(dim=1, keepdim=True).clamp_max(1)
    temperature, weight = 0.1, 2 / ROWS
    velocity = 0.01 * torch.randn_like(bank)
    exact_lse, _ = bank_attend(queries.double(), bank.double(), temperature, "reference")
    positive, _ = bank_select(queries.double(), bank.double(), "reference")
    plain_bank, plain_velocity = plain_step(bank, velocity, queries, exact_lse.float(), positive, weight, temperature)
    results = {}
    for backend, kind_of_float in [("reference", torch.float64), ("tiled", torch.float32)]:
        new_bank, new_velocity = bank.to(kind_of_float, copy=True), velocity.to(kind_of_float, copy=True)
        rows = queries.double() if backend == "reference" else queries
        bank_step_(
            new_bank,
            new_velocity,
            rows,
            exact_lse,
            temperature=temperature,
            lr=0.5,
            momentum=0.9,
            row_weight=torch.full((ROWS,), weight),
            positives=positive.unsqueeze(1),
            backend=backend,
        )
        results[backend] = new_bank, new_velocity
    (exact_bank, exact_velocity), (found_bank, found_velocity) = results["reference"], results["tiled"]
    assert_within_bound(found_velocity, plain_velocity, exact_velocity, dtype, "velocity")
    assert_within_bound(found_bank, plain_bank, exact_bank, dtype, "bank")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "fp16"])
@kinds
def test_select_finds_the_f64_maximum_to_1e_6(dtype, kind):
    keys, bank = make(kind, dtype)
    index, similarity = bank_select(keys, bank, "tiled")
    exact = keys.double() @ torch.nn.functional.normalize(bank.double(), dim=1).T
    best = exact.amax(dim=1)
    assert (best - exact.gather(1, index.unsqueeze(1)).squeeze(1)).max() <= 1e-6
    assert (similarity - best).abs().max() <= 1e-6


def test_select_settles_in_f32_when_torch_multiplies_in_bf16():
    """A user may let torch run f32 products in bf16 or TF32; the choice is still that of f32."""
    keys, bank = make("random", torch.float32)
    wanted, _ = bank_select(keys.double(), bank.double(), "reference")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        index, _ = bank_select(keys, bank, "tiled")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(index, wanted)


def test_select_gives_the_lowest_of_equal_rows_across_tiles():
    directions = unit_rows(40, 16)
    order = torch.randint(40, (BANK_ROWS,))
    bank = directions[order]
    keys = directions + 0.01 * torch.randn_like(directions)
    first = [int((order == direction).nonzero()[0]) for direction in range(40)]
    for backend in ("reference", "tiled"):
        index, _ = bank_select(keys, bank, backend)
        assert index.tolist() == first, backend


def test_fp16_queries_are_computed_in_f32():
    queries, bank = make("random", torch.float16)
    lse, mean_row = bank_attend(queries, bank, 0.02, "tiled")
    wanted_lse, wanted_mean = bank_attend(queries.float(), bank, 0.02, "tiled")
    assert torch.equal(lse, wanted_lse)
    assert torch.equal(mean_row, wanted_mean)
