"""bank_select on every backend. Legend: R key rows, K bank rows, C channels."""

import pytest
import torch

from caco_fast.ops import bank_select
from tests import oracle
from tests.ops.backends import KERNELS, PLAIN, Backend, over
from tests.ops.cases import (
    ADVERSARIAL,
    KINDS,
    PRECISION_BANK_ROWS,
    RAGGED,
    SHAPES,
    Case,
    inputs,
    make_for_precision,
    unit_rows,
)
from tests.ops.tolerances import CLOSE, SETTLED, SPACING, TILED_SELECT


@over("auto", *PLAIN)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_argmax(backend: Backend, shape, small_tiles):
    keys, bank = inputs(*shape)
    keys = keys + 0.1 * torch.randn_like(keys)
    index, similarity = bank_select(keys, bank, backend.name)
    expected = [max(row) for row in oracle.similarities(keys, bank)]
    torch.testing.assert_close(similarity, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    # Rows that differ in length only may round to either side of a tie; their similarity was compared above.
    if shape[0] in ("random", "duplicates"):
        assert index.tolist() == oracle.select(keys, bank)


def check(backend: Backend, case: Case) -> None:
    keys, bank = case.make()
    index, similarity = bank_select(keys, bank, backend.name)
    exact = keys.double() @ oracle.unit_rows(bank)[0].T
    tolerance = SETTLED * keys.double().norm(dim=1).clamp_min(1)
    chosen = exact.gather(1, index.unsqueeze(1)).squeeze(1)
    # If all rows lie within the rounding of a score, more of them round to the top than are settled.
    missed = SPACING[backend.operand(case.dtype)] / 16 if case.kind == "clustered" else tolerance
    assert (exact.amax(dim=1) - chosen <= missed).all()
    assert ((similarity - chosen).abs() <= tolerance).all()


@over(*KERNELS)
@pytest.mark.parametrize("case", RAGGED + ADVERSARIAL, ids=str)
def test_kernels_find_the_most_similar_row(backend: Backend, case):
    check(backend, case)
    assert backend.take("bank_conflicts") == 0


@over(*KERNELS)
@pytest.mark.parametrize("channels", range(64, 513, 16))
def test_every_sixteenth_channel_count_is_served(backend: Backend, channels):
    check(backend, Case(7, 34, channels))
    assert backend.take("bank_conflicts") == 0


@over(*PLAIN, *KERNELS)
@pytest.mark.parametrize("copies", [2, 9, 200])
@pytest.mark.parametrize("channels", [64, 256, 512])
def test_ties_go_to_the_lowest_index(backend: Backend, copies, channels):
    keys, bank = Case(9, 230, channels).make()
    places = torch.randperm(230, generator=torch.Generator().manual_seed(copies))[: copies + 1].sort().values[1:]
    bank[places] = keys[4] * 2
    index, similarity = bank_select(keys, bank, backend.name)
    assert index[4] == places[0]
    assert similarity[4] == pytest.approx(1, abs=1e-6)


@over(*PLAIN, *KERNELS)
@pytest.mark.parametrize("channels", [64, 512])
def test_ties_go_to_the_lowest_index_below_zero(backend: Backend, channels):
    """Every row points away from the key, the equal ones the least."""
    keys, bank = Case(9, 230, channels).make()
    key, unit = oracle.unit_rows(keys)[0][4].float(), oracle.unit_rows(bank)[0].float()
    across = unit - (unit @ key).unsqueeze(1) * key
    bank = across - 0.5 * key
    places = torch.tensor([11, 12, 77, 100, 228])
    bank[places] = across[3] - 0.1 * key
    index, similarity = bank_select(keys, bank, backend.name)
    assert index[4] == 11
    assert -0.2 < similarity[4] < 0


@over(*PLAIN)
def test_the_lowest_of_equal_rows_across_tiles(backend: Backend):
    directions = unit_rows(40, 16)
    order = torch.randint(40, (PRECISION_BANK_ROWS,))
    keys = directions + 0.01 * torch.randn_like(directions)
    first = [int((order == direction).nonzero()[0]) for direction in range(40)]
    assert bank_select(keys, directions[order], backend.name)[0].tolist() == first


@over(*KERNELS)
def test_near_ties_are_settled_in_f32(backend: Backend):
    """Rows that differ by less than bf16 can tell, the best of them anywhere among rows that round to higher scores."""
    generator = torch.Generator().manual_seed(3)
    keys, bank = Case(100, 300, 128).make()
    near = torch.nn.functional.normalize(keys + 1e-3 * torch.randn(keys.shape, generator=generator), dim=1)
    nearer = torch.nn.functional.normalize(keys + 3e-4 * torch.randn(keys.shape, generator=generator), dim=1)
    bank[100:200], bank[200:] = near, nearer
    index, _ = bank_select(keys, bank, backend.name)
    assert torch.equal(index, (keys.double() @ oracle.unit_rows(bank)[0].T).argmax(dim=1))
    low = keys.bfloat16().float() @ bank.bfloat16().float().T
    assert not torch.equal(low.argmax(dim=1), index), "the case does not need settling"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_tiled_finds_the_f64_maximum(dtype, kind):
    keys, bank = make_for_precision(kind, dtype)
    index, similarity = bank_select(keys, bank, "tiled")
    exact = keys.double() @ torch.nn.functional.normalize(bank.double(), dim=1).T
    best = exact.amax(dim=1)
    assert (best - exact.gather(1, index.unsqueeze(1)).squeeze(1)).max() <= TILED_SELECT
    assert (similarity - best).abs().max() <= TILED_SELECT


def test_tiled_settles_in_f32_if_torch_multiplies_in_bf16():
    """A user may let torch run f32 products in bf16 or TF32; the choice is still that of f32."""
    keys, bank = make_for_precision("random", torch.float32)
    expected, _ = bank_select(keys.double(), bank.double(), "reference")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        index, _ = bank_select(keys, bank, "tiled")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(index, expected)


@over(*PLAIN, *KERNELS)
def test_strided_and_empty_input(backend: Backend):
    keys, bank = Case(4, 20, 64).make()
    index, similarity = bank_select(keys[:0], bank, backend.name)
    assert index.shape == similarity.shape == (0,) and index.dtype == torch.int64
    strided = keys.repeat_interleave(2, dim=1)[:, ::2], bank.T.contiguous().T
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    assert torch.equal(bank_select(*strided, backend.name)[0], bank_select(keys, bank, backend.name)[0])


@over(*KERNELS)
def test_nan_keys_stay_within_the_bank(backend: Backend):
    keys, bank = Case(4, 20, 64).make()
    keys[2] = torch.nan
    index, similarity = bank_select(keys, bank, backend.name)
    assert index[2] == 0 and similarity[2].isnan()
    assert not similarity[[0, 1, 3]].isnan().any()


def test_nothing_carries_a_gradient():
    _, similarity = bank_select(unit_rows(4, 8).requires_grad_(), unit_rows(30, 8).requires_grad_())
    assert not similarity.requires_grad


@over(*PLAIN)
def test_opcheck(backend: Backend):
    torch.library.opcheck(torch.ops.caco_fast.bank_select, (unit_rows(5, 8), unit_rows(17, 8), None, backend.name))
