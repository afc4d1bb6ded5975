"""bank_select on emulated kernels. Legend: R key rows, K bank rows, C channels."""

import pytest
import torch

from caco_fast.ops import bank_select
from tests.csrc.cases import ADVERSARIAL, RAGGED, SPACING, Case, unit_rows

F32_TOLERANCE = 3e-7  # of a settled similarity, relative to |key|


@pytest.mark.parametrize("case", RAGGED + ADVERSARIAL, ids=str)
def test_select_finds_the_most_similar_row(cuda_ops, emulated, case):
    keys, bank = case.make()
    index, similarity = bank_select(keys, bank, backend="cuda")
    exact = keys.double() @ unit_rows(bank)[0].T
    tolerance = F32_TOLERANCE * keys.double().norm(dim=1).clamp_min(1)
    chosen = exact.gather(1, index.unsqueeze(1)).squeeze(1)
    # Where all rows lie within the rounding of a score, more of them round to the top than are settled.
    missed = SPACING[case.operand] / 16 if case.kind == "clustered" else tolerance
    assert (exact.amax(dim=1) - chosen <= missed).all()
    assert ((similarity - chosen).abs() <= tolerance).all()
    assert emulated.take_counters()["bank_conflicts"] == 0


@pytest.mark.parametrize("copies", [2, 9, 200])
@pytest.mark.parametrize("channels", [64, 256, 512])
def test_select_gives_ties_to_the_lowest_index(cuda_ops, copies, channels):
    keys, bank = Case(9, 230, channels).make()
    places = torch.randperm(230, generator=torch.Generator().manual_seed(copies))[: copies + 1].sort().values[1:]
    bank[places] = keys[4] * 2
    index, similarity = bank_select(keys, bank, backend="cuda")
    assert index[4] == places[0]
    assert similarity[4] == pytest.approx(1, abs=1e-6)


def test_select_settles_near_ties_in_f32(cuda_ops):
    """Rows that differ by less than bf16 can tell, the best of them anywhere among rows that round to higher scores."""
    generator = torch.Generator().manual_seed(3)
    keys, bank = Case(100, 300, 128).make()
    near = torch.nn.functional.normalize(keys + 1e-3 * torch.randn(keys.shape, generator=generator), dim=1)
    nearer = torch.nn.functional.normalize(keys + 3e-4 * torch.randn(keys.shape, generator=generator), dim=1)
    bank[100:200], bank[200:] = near, nearer
    index, _ = bank_select(keys, bank, backend="cuda")
    assert torch.equal(index, (keys.double() @ unit_rows(bank)[0].T).argmax(dim=1))
    low = keys.bfloat16().float() @ bank.bfloat16().float().T
    assert not torch.equal(low.argmax(dim=1), index), "the case does not need settling"


def test_select_of_nothing(cuda_ops):
    keys, bank = Case(4, 20, 64).make()
    index, similarity = bank_select(keys[:0], bank, backend="cuda")
    assert index.shape == similarity.shape == (0,) and index.dtype == torch.int64


def test_select_of_nan_keys_stays_within_the_bank(cuda_ops):
    keys, bank = Case(4, 20, 64).make()
    keys[2] = torch.nan
    index, similarity = bank_select(keys, bank, backend="cuda")
    assert index[2] == 0 and similarity[2].isnan()
    assert not similarity[[0, 1, 3]].isnan().any()
