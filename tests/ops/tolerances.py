"""How far the results of the operations may lie from f64: two kinds of bounds, and what they are made of.

The kernels are compared element by element with f64 on the same rounded operands, so that only the rounding within the
kernel remains. The tiled form follows the rule of FlashAttention and cut cross-entropy: the error is at most twice that
of plain torch in the same precision, plus a constant.

Legend: R query rows, K bank rows, C channels.
"""

import torch
from torch import Tensor

from tests import oracle
from tests.ops.cases import rounded

# f64 against the oracle.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

# Relative distance of neighbouring values just above 1: rounding to nearest is off by at most half of it.
SPACING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# f32 sums, logarithm and scaling of the kernels; relative to the largest |s| / t.
LSE = 4e-6
# A similarity settled in f32, relative to |key|.
SETTLED = 3e-7
# A similarity that the tiled form settles.
TILED_SELECT = 1e-6

# Added to twice the error of plain torch, in units of the result's largest value.
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


def assert_attended(
    operand: torch.dtype, temperatures: tuple[float, ...], lse: tuple[Tensor, ...], mean_row: Tensor,
    queries: Tensor, bank: Tensor,
) -> None:  # fmt: skip
    """Kernels against f64 on the same rounded operands: only the rounding of p remains."""
    rows, unit = rounded(operand, queries, bank)
    largest = (rows @ unit.T).abs().amax().item()
    for t, found in zip(temperatures, lse, strict=True):
        expected, _, _ = oracle.attend(rows, unit, t)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=LSE * max(largest / t, 1))
    _, p, expected = oracle.attend(rows, unit, temperatures[0])
    bound = (SPACING[operand] / 2 + 3e-6 * largest / temperatures[0]) * (p @ unit.abs()) + 1e-6
    assert share(mean_row, expected, bound) <= 1


def velocity_bound(
    operand: torch.dtype, bank: Tensor, queries: Tensor, p: Tensor, temperature: float, row_weight: Tensor,
    velocity: Tensor,
) -> Tensor:  # [K, C]  # fmt: skip
    """What rounding can do to G_j = sum_i a_i p_ij q_i: of the score (in the exponent), of a_i p_ij, of q_i."""
    unit, inverse = oracle.unit_rows(bank)
    rows, low_unit = rounded(operand, queries, bank)
    exact = queries.double() @ unit.T
    score_error = (rows @ low_unit.T - exact).abs() / temperature + 1e-5
    relative = 1.2 * score_error + SPACING[operand] + 1e-6 * exact.abs().amax() / temperature
    of_pulled = (row_weight.double().unsqueeze(1) * (p * relative + 2.0**-36)).T @ queries.double().abs() + 1e-7
    bound = inverse / temperature * (of_pulled + (of_pulled * unit.abs()).sum(1, keepdim=True) * unit.abs()) + 1e-6
    return bound + 1e-6 * velocity.abs().amax(dim=1, keepdim=True)


def bank_bound(of_velocity: Tensor, lr: float, bank: Tensor) -> Tensor:
    return lr * of_velocity + 1e-6 * bank.abs().amax(dim=1, keepdim=True)


def share(found: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest error as a share of its bound."""
    return float(((found.double() - expected).abs() / bound).amax())


def assert_as_good_as_low_precision(found: Tensor, low: Tensor, expected: Tensor, constant: float) -> None:
    """Kernels against torch in the operands' precision. constant: for when that happens to be exact."""
    error, low_error = (found - expected).abs(), (low.double() - expected).abs()
    assert error.amax() <= 2 * low_error.amax() + constant
    assert error.square().mean().sqrt() <= 1.5 * low_error.square().mean().sqrt() + constant / 2


def assert_twice_plain(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, name: str) -> None:
    """The tiled form against plain torch in the same precision: largest and RMS error."""
    assert found.isfinite().all(), f"{name}: not finite"
    slack = SLACK[dtype] * exact.abs().max().item()
    error, plain_error = (found.double() - exact).abs(), (plain.double() - exact).abs()
    largest, plain_largest = error.max(), plain_error.max()
    assert largest <= 2 * plain_largest + slack, f"{name}: largest error {largest}, plain {plain_largest}"
    rms, plain_rms = error.square().mean().sqrt(), plain_error.square().mean().sqrt()
    assert rms <= 2 * plain_rms + slack, f"{name}: RMS error {rms}, plain {plain_rms}"
