"""Every backend in f64 against an independent evaluation of the formulas, to 1e-12 over consecutive steps."""

import pytest
import torch

from caco_fast.ops import bank_attend, bank_select, bank_step_
from tests.ops import bank_oracle
from tests.ops.bank_inputs import inputs, unit_rows

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SHAPES = {
    "R7 K13 C5": ("random", 7, 13, 5),
    "R1": ("random", 1, 9, 4),
    "K1": ("random", 4, 1, 3),
    "R1 K1 C1": ("random", 1, 1, 1),
    "duplicate rows": ("duplicates", 6, 12, 4),
    "equal and opposite rows": ("equal and opposite", 5, 11, 6),
    "clustered": ("clustered", 8, 17, 7),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
backends = pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])


@backends
@shapes
@pytest.mark.parametrize("temperature", [0.08, 0.02, 1.0])
def test_attend_is_the_formula(backend, shape, temperature, small_tiles):
    queries, bank = inputs(*shape)
    lse, mean_row = bank_attend(queries, bank, temperature, backend)
    wanted_lse, wanted_mean = bank_oracle.attend(queries, bank, temperature)
    torch.testing.assert_close(lse, wanted_lse, **CLOSE)
    torch.testing.assert_close(mean_row, wanted_mean, **CLOSE)


@backends
@shapes
def test_attend_at_two_temperatures(backend, shape, small_tiles):
    queries, bank = inputs(*shape)
    (lse, other_lse), mean_row = bank_attend(queries, bank, (0.1, 0.02), backend)
    wanted_lse, wanted_mean = bank_oracle.attend(queries, bank, 0.1)
    torch.testing.assert_close(lse, wanted_lse, **CLOSE)
    torch.testing.assert_close(mean_row, wanted_mean, **CLOSE)
    torch.testing.assert_close(other_lse, bank_oracle.attend(queries, bank, 0.02)[0], **CLOSE)


@backends
@shapes
def test_select_is_the_argmax(backend, shape, small_tiles):
    keys, bank = inputs(*shape)
    keys = keys + 0.1 * torch.randn_like(keys)
    index, similarity = bank_select(keys, bank, backend)
    wanted = [max(row) for row in bank_oracle.similarities(keys, bank)]
    torch.testing.assert_close(similarity, torch.tensor(wanted, dtype=torch.float64), **CLOSE)
    # Rows that differ in length only may round to either side of a tie; their similarity was compared above.
    if shape[0] in ("random", "duplicates"):
        assert index.tolist() == bank_oracle.select(keys, bank)


@backends
@shapes
@pytest.mark.parametrize("norm", ["implicit", "project"])
@pytest.mark.parametrize("many", [0, 1, 2], ids=["M0", "M1", "M2"])
def test_steps_follow_the_oracle(backend, shape, norm, many, small_tiles):
    """Five steps with new queries each, loss and bank temperature unequal, row weights unequal."""
    _, bank = inputs(*shape)
    _, rows, bank_rows, channels = shape
    bank /= bank.norm(dim=1, keepdim=True).clamp_max(1)  # Rows shorter than 1 would leap: g grows as 1 / |w|.
    velocity = torch.zeros_like(bank)
    wanted_bank, wanted_velocity = bank.clone(), velocity.clone()
    lr, momentum, temperature = 0.3, 0.9, 0.1
    for _ in range(5):
        queries, keys = unit_rows(rows, channels, torch.float64), unit_rows(rows, channels, torch.float64)
        row_weight = torch.rand(rows, dtype=torch.float64) / rows
        picked = [bank_select(keys if m == 0 else -keys, bank, backend)[0] for m in range(many)]
        positives = torch.stack(picked, dim=1) if many else None
        positive_weight = torch.softmax(torch.randn(rows, many, dtype=torch.float64), dim=1) if many else None

        oracle_arguments = (
            wanted_bank,
            queries,
            temperature,
            row_weight.tolist(),
            positives.tolist() if many else [[]] * rows,
            positive_weight.tolist() if many else [[]] * rows,
        )
        gradient = bank_oracle.gradient_by_loops(*oracle_arguments)
        torch.testing.assert_close(gradient, bank_oracle.gradient_by_autograd(*oracle_arguments), **CLOSE)
        if many == 0:
            of_loss = bank_oracle.gradient_of_loss(wanted_bank, queries, temperature, row_weight.tolist())
            torch.testing.assert_close(gradient, of_loss, **CLOSE)
        wanted_velocity = momentum * wanted_velocity + gradient
        wanted_bank = wanted_bank - lr * wanted_velocity
        if norm == "project":
            wanted_bank = wanted_bank / wanted_bank.norm(dim=1, keepdim=True)

        (_, lse), _ = bank_attend(queries, bank, (0.08, temperature), backend)
        bank_step_(
            bank,
            velocity,
            queries,
            lse,
            temperature=temperature,
            lr=lr,
            momentum=momentum,
            row_weight=row_weight,
            positives=positives,
            positive_weight=positive_weight,
            norm=norm,
            backend=backend,
        )
        torch.testing.assert_close(velocity, wanted_velocity, **CLOSE)
        torch.testing.assert_close(bank, wanted_bank, **CLOSE)


@backends
def test_step_on_a_bank_of_very_unequal_lengths(backend, small_tiles):
    """g is exact relative to its own size, which is 1 / |w|, for lengths from 1e-3 to 1e3."""
    queries = unit_rows(6, 5, torch.float64)
    lengths = torch.logspace(-3, 3, 11, dtype=torch.float64).unsqueeze(1)
    bank = unit_rows(11, 5, torch.float64) * lengths
    velocity = torch.zeros_like(bank)
    positives = bank_select(queries, bank, backend)[0].unsqueeze(1)
    weights = torch.full((6,), 1 / 3, dtype=torch.float64)
    wanted = bank_oracle.gradient_by_loops(bank, queries, 0.08, weights.tolist(), positives.tolist(), [[1.0]] * 6)
    lse, _ = bank_attend(queries, bank, 0.08, backend)
    settings = {"temperature": 0.08, "lr": 0.0, "momentum": 0.9, "row_weight": weights, "positives": positives}
    bank_step_(bank, velocity, queries, lse, **settings, backend=backend)
    torch.testing.assert_close(velocity * lengths, wanted * lengths, **CLOSE)


@backends
def test_a_row_that_is_positive_of_several_queries_takes_all_of_them(backend, small_tiles):
    queries, bank = inputs("random", 7, 9, 4)
    positives = torch.full((7, 2), 4)
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    positive_weight = [[0.5, 0.5]] * 7
    wanted = bank_oracle.gradient_by_loops(bank, queries, 0.1, weights.tolist(), positives.tolist(), positive_weight)
    velocity = torch.zeros_like(bank)
    lse, _ = bank_attend(queries, bank, 0.1, backend)
    settings = {"temperature": 0.1, "lr": 0.0, "momentum": 0.5, "row_weight": weights, "positives": positives}
    bank_step_(bank, velocity, queries, lse, **settings, backend=backend)  # positive_weight defaults to 1 / M
    torch.testing.assert_close(velocity, wanted, **CLOSE)


@backends
@shapes
def test_gradient_of_lse(backend, shape, small_tiles):
    queries, bank = inputs(*shape)
    queries.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: bank_attend(q, bank, 0.3, backend)[0], queries)
    pair = torch.autograd.grad(bank_attend(queries, bank, (0.3, 0.1), backend)[0][0].sum(), queries)[0]
    single = torch.autograd.grad(bank_attend(queries, bank, 0.3, backend)[0].sum(), queries)[0]
    torch.testing.assert_close(pair, single, **CLOSE)
