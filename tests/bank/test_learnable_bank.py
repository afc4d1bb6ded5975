"""LearnableBank: recording, stepping, filling, state, and the lines it says when something is wrong.

Legend: R query rows, K bank rows, C channels, M positives per row, B images.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.bank import KeyQueue, LearnableBank, memory
from caco_fast.errors import UserError
from caco_fast.ops import bank_step_


def unit(rows: int, channels: int = 8) -> Tensor:
    return normalize(torch.randn(rows, channels), dim=1)


def make_bank(size: int = 24, dim: int = 8, **settings) -> LearnableBank:
    return LearnableBank(size, dim, generator=torch.Generator().manual_seed(3), **settings)


def record(bank: LearnableBank, queries: Tensor, many: int | None, weight: float = 0.25) -> tuple[Tensor, ...]:
    """Record queries with M positives that are drawn at random; returns what was recorded."""
    lse, _ = bank.attend(queries, 0.1)
    row_weight = torch.full((len(queries),), weight)
    positives = None if many is None else torch.randint(bank.size, (len(queries), many))
    bank.record(queries, lse, 0.1, row_weight, positives)
    return queries, lse, row_weight, positives


def test_starts_with_unit_rows_at_rest_drawn_from_the_generator():
    bank, again = make_bank(), make_bank()
    torch.testing.assert_close(bank.bank.norm(dim=1), torch.ones(24))
    assert torch.equal(bank.bank, again.bank)
    assert not bank.velocity.any()
    assert list(bank.parameters()) == []


@pytest.mark.parametrize("norm", ["implicit", "project"])
@pytest.mark.parametrize("many", [None, 0, 1, 2], ids=lambda many: f"M {many}")
def test_step_is_the_operation_on_what_was_recorded(many, norm):
    bank = make_bank(norm=norm, momentum=0.5, weight_decay=0.1)
    bank.velocity.normal_()
    wanted_bank, wanted_velocity = bank.bank.clone(), bank.velocity.clone()
    queries, lse, row_weight, positives = record(bank, unit(6), many)
    bank.step(0.7)
    settings = {
        "temperature": 0.1,
        "lr": 0.7,
        "momentum": 0.5,
        "row_weight": row_weight,
        "norm": norm,
        "weight_decay": 0.1,
    }
    bank_step_(wanted_bank, wanted_velocity, queries, lse, **settings, positives=positives)
    assert torch.equal(bank.bank, wanted_bank)
    assert torch.equal(bank.velocity, wanted_velocity)


def test_records_of_different_m_add_up():
    """One step with three records moves the bank as far as the three gradients together."""
    bank = make_bank(momentum=0.0)
    start = bank.bank.clone()
    total = torch.zeros_like(start)
    recorded = []
    for many in (1, 2, None):
        queries = unit(5)
        lse, _ = bank.attend(queries, 0.1)
        positives = None if many is None else torch.randint(bank.size, (5, many))
        recorded.append((queries, lse, torch.full((5,), 0.2), positives))
        alone, velocity = start.clone(), torch.zeros_like(start)
        settings = {"temperature": 0.1, "lr": 1.0, "momentum": 0.0, "row_weight": recorded[-1][2]}
        bank_step_(alone, velocity, queries, lse, **settings, positives=positives)
        total += velocity
    for queries, lse, row_weight, positives in recorded:
        bank.record(queries, lse, 0.1, row_weight, positives)
    bank.step(1.0)
    torch.testing.assert_close(bank.velocity, total)
    torch.testing.assert_close(bank.bank, start - total)


def test_accumulating_two_halves_is_the_whole_batch():
    queries, whole, halves = unit(8), make_bank(), make_bank()
    positives = whole.select(queries)[0].unsqueeze(1)
    lse, _ = whole.attend(queries, 0.1)
    whole.record(queries, lse, 0.1, torch.full((8,), 1 / 4), positives)
    whole.step(1.0)
    for part in (slice(0, 4), slice(4, 8)):
        halves.record(queries[part], lse[part], 0.1, torch.full((4,), 1 / 2), positives[part])
    halves.step(1.0, scale=0.5)
    torch.testing.assert_close(halves.bank, whole.bank)


def test_a_record_is_detached_and_consumed():
    bank = make_bank()
    queries = unit(4).requires_grad_()
    lse, _ = bank.attend(queries, 0.1)
    bank.record(queries, lse, 0.1, torch.full((4,), 0.5), bank.select(queries)[0].unsqueeze(1))
    bank.step(1.0)
    (lse.sum() + bank.similarity(queries, torch.tensor([0, 1, 2, 3])).sum()).backward()
    assert queries.grad.isfinite().all() and queries.grad.any()
    with pytest.raises(UserError, match="no rows were recorded since the last step"):
        bank.step(1.0)


def test_steps_on_fixed_queries_first_raise_the_probability_of_their_positives():
    """Negatives move towards the queries as well, so with more steps it falls again; 11 are before that."""
    bank = make_bank(size=64)
    queries = unit(16)
    probability = []
    for _ in range(11):
        lse, _ = bank.attend(queries, 0.1)
        index, similarity = bank.select(queries)
        probability.append((similarity / 0.1 - lse).exp().mean().item())
        bank.record(queries, lse, 0.1, torch.full((16,), 1 / 16), index.unsqueeze(1))
        bank.step(0.05)
    assert probability[-1] > 1.4 * probability[0]
    assert bank.select(queries)[1].mean() > 0.9


def test_similarity_is_differentiable_in_the_queries():
    bank = make_bank()
    bank.bank.mul_(3)
    queries, index = unit(3).requires_grad_(), torch.tensor([5, 0, 5])
    similarity = bank.similarity(queries, index)
    rows = normalize(bank.bank, dim=1)[index]
    torch.testing.assert_close(similarity, (queries * rows).sum(dim=1))
    torch.testing.assert_close(torch.autograd.grad(similarity.sum(), queries)[0], rows)
    torch.testing.assert_close(bank.rows(index.view(3, 1)), rows.view(3, 1, 8))


def test_queries_are_kept_in_their_dtype():
    bank = make_bank()
    queries = unit(4).bfloat16()
    record(bank, queries, 1)
    assert bank.pending.records[0].queries.dtype == torch.bfloat16
    bank.step(1.0)
    assert bank.bank.isfinite().all()


def test_rows_that_are_not_finite_are_left_out_and_counted():
    spoilt, clean = make_bank(), make_bank()
    queries = unit(5)
    lse, _ = clean.attend(queries, 0.1)
    weight = torch.full((5,), 0.2)
    keep = torch.tensor([0, 2, 4])
    clean.record(queries[keep], lse[keep], 0.1, weight[keep])
    clean.step(1.0)
    queries[1, 3], lse[3] = torch.nan, torch.inf
    spoilt.record(queries, lse, 0.1, weight)
    spoilt.step(1.0)
    torch.testing.assert_close(spoilt.bank, clean.bank)
    assert (spoilt.skipped_rows.item(), clean.skipped_rows.item()) == (2, 0)


def test_records_without_steps_are_refused():
    bank = make_bank(max_records=3)
    for _ in range(3):
        record(bank, unit(2), 1)
    with pytest.raises(UserError, match=r"3 records wait for a bank step.*call bank.step\(lr\)"):
        record(bank, unit(2), 1)
    assert bank.discard() == 3
    record(bank, unit(2), 1)


def test_bad_records_are_named():
    bank, queries = make_bank(), unit(4)
    lse, weight = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"record: queries: found shape \[4, 7\], expected \[R, 8\]"):
        bank.record(queries[:, :7], lse, 0.1, weight)
    with pytest.raises(ValueError, match=r"record: lse: found shape \[3\], expected 4 rows"):
        bank.record(queries, lse[:3], 0.1, weight)
    with pytest.raises(ValueError, match=r"record: positives: found shape \[4\], expected \[R, M\]"):
        bank.record(queries, lse, 0.1, weight, torch.zeros(4, dtype=torch.int64))
    bank.record(queries, lse, 0.1, weight)
    with pytest.raises(ValueError, match="record: temperature: found 0.2, expected 0.1"):
        bank.record(queries, lse, 0.2, weight)


@pytest.mark.parametrize(
    "settings", [{"momentum": 1.0}, {"norm": "l2"}, {"max_records": 0}, {"weight_decay": -1.0}], ids=str
)
def test_bad_settings_are_named(settings):
    with pytest.raises(UserError, match=f"LearnableBank: {next(iter(settings))}: found"):
        make_bank(**settings)


@pytest.mark.parametrize("size, dim", [(0, 8), (8, 0)])
def test_an_empty_bank_is_refused(size, dim):
    with pytest.raises(UserError, match=f"found size {size} and dim {dim}, expected at least 1"):
        LearnableBank(size, dim)


def test_too_little_memory_names_the_bytes(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    with pytest.raises(UserError, match=r"of 1,000 x 8 needs 64,000 bytes.*free \(10,000 bytes\)"):
        LearnableBank(1000, 8)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    with pytest.raises(
        UserError, match=r"needs 20,480,000,000,000,000 bytes, more than the memory that torch could get"
    ):
        LearnableBank(10**13, 256)


@pytest.mark.parametrize("kind, needed", [(LearnableBank, "6,400"), (KeyQueue, "3,200")])
def test_too_little_memory_on_the_device_names_the_bytes(kind, needed):
    def full(tensor):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UserError, match=f"of 100 x 8 needs {needed} bytes.*that torch could get: .*more GPUs"):
        kind(100, 8)._apply(full)


def test_fill_writes_unit_rows_until_the_bank_is_full():
    bank = make_bank(size=10)
    bank.velocity.fill_(1)
    before = bank.bank.clone()
    keys = 5 * unit(7)
    assert bank.fill(keys, start=2) == 9
    torch.testing.assert_close(bank.bank[2:9], normalize(keys, dim=1))
    assert torch.equal(bank.bank[[0, 1, 9]], before[[0, 1, 9]])
    assert not bank.velocity[2:9].any() and bank.velocity[[0, 1, 9]].all()
    more = unit(7)
    assert bank.fill(more, start=9) == 10
    torch.testing.assert_close(bank.bank[9], more[0])
    torch.testing.assert_close(bank.bank[2:9], normalize(keys, dim=1))
    assert bank.fill(more, start=10) == 10


def test_fill_wraps_on_request():
    bank = make_bank(size=10)
    keys = unit(27)
    assert bank.fill(keys, start=4, wrap=True) == 1
    expected = torch.empty(10, 8)
    for i, key in enumerate(keys):
        expected[(4 + i) % 10] = key
    torch.testing.assert_close(bank.bank, expected)


def test_fill_names_what_is_wrong():
    bank = make_bank(size=10)
    with pytest.raises(ValueError, match=r"keys: found shape \[2, 5\], expected \[R, 8\]"):
        bank.fill(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"start: found 11, expected a row in \[0, 10\]"):
        bank.fill(unit(2), start=11)


def test_normalise_keeps_directions_and_velocity():
    bank = make_bank()
    bank.velocity.normal_()
    directions, velocity = bank.bank.clone(), bank.velocity.clone()
    bank.bank.mul_(torch.rand(24, 1) + 0.1)
    bank.normalise()
    torch.testing.assert_close(bank.bank, directions)
    assert torch.equal(bank.velocity, velocity)


def test_state_is_bank_and_velocity_and_goes_round(tmp_path):
    bank = make_bank()
    record(bank, unit(6), 1)
    bank.step(1.0)
    assert list(bank.state_dict()) == ["bank", "velocity"]
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other = LearnableBank(24, 8)
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    queries = unit(6)
    for each in (bank, other):
        lse, _ = each.attend(queries, 0.1)
        each.record(queries, lse, 0.1, torch.full((6,), 1 / 6), each.select(queries)[0].unsqueeze(1))
        each.step(1.0)
    assert torch.equal(bank.bank, other.bank) and torch.equal(bank.velocity, other.velocity)


@pytest.mark.parametrize("size, dim", [(25, 8), (24, 7)])
def test_loading_a_bank_of_another_size_is_one_clear_line(size, dim):
    saved = torch.nn.ModuleDict({"head": LearnableBank(size, dim)}).state_dict()
    with pytest.raises(UserError, match=rf"saved 'head.bank' has shape \[{size}, {dim}\], expected \[24, 8\]"):
        torch.nn.ModuleDict({"head": make_bank()}).load_state_dict(saved)
