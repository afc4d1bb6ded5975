"""The bank's operand copy: reused while it is current, never used when it is not."""

import gc
import weakref

import pytest
import torch

from caco_fast.ops import bank_attend, bank_select, bank_step_
from tests.csrc import cases
from tests.csrc.cases import Case


def attend_launches(emulated, queries, bank) -> int:
    emulated.take_counters()
    bank_attend(queries, bank, 0.1, backend="cuda")
    return emulated.take_counters()["launches"]


WITHOUT_COPY, WITH_COPY = 4, 3  # query operand, (bank operand), attend, merge


def step(bank, velocity, queries, norm="implicit"):
    rows = queries.shape[0]
    lse, _ = bank_attend(queries, bank, 0.1, backend="cuda")
    bank_step_(
        bank, velocity, queries, lse, temperature=0.1, lr=0.5, momentum=0.9, row_weight=torch.full((rows,), 1 / rows),
        norm=norm, backend="cuda",
    )  # fmt: skip


@pytest.fixture
def setting(cuda_ops):
    return Case(10, 70, 64, torch.bfloat16).make()


def test_copy_is_made_once_and_shared_by_attend_and_select(emulated, setting):
    queries, bank = setting
    assert attend_launches(emulated, queries, bank) == WITHOUT_COPY
    assert attend_launches(emulated, queries, bank) == WITH_COPY
    # A copy for each operand type; on sm_70 there is one type.
    assert attend_launches(emulated, queries.half(), bank) == (WITHOUT_COPY if cases.with_bfloat16 else WITH_COPY)
    assert attend_launches(emulated, queries.half(), bank) == WITH_COPY


WRITES = {
    "add_": lambda bank: bank.add_(0.1),
    "copy_": lambda bank: bank.copy_(torch.ones_like(bank)),
    "of a view": lambda bank: bank[3:5].mul_(-1),
    "of a detached alias": lambda bank: bank.detach().mul_(-1),
    "index": lambda bank: bank.__setitem__(7, 0.5),
    "set_": lambda bank: bank.set_(torch.rand_like(bank)),
    "new data": lambda bank: setattr(bank, "data", torch.rand_like(bank)),
}


@pytest.mark.parametrize("write", WRITES)
def test_copy_is_remade_after_a_write(cuda_ops, emulated, setting, write):
    queries, bank = setting
    bank_attend(queries, bank, 0.1, backend="cuda")
    WRITES[write](bank)
    found = bank_attend(queries, bank, 0.1, backend="cuda")
    expected = bank_attend(queries, bank.clone(), 0.1, backend="cuda")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_copy_of_the_other_type_is_remade_after_a_step(cuda_ops, setting):
    queries, bank = setting
    bank_attend(queries.half(), bank, 0.1, backend="cuda")
    step(bank, torch.zeros_like(bank), queries)
    found = bank_attend(queries.half(), bank, 0.1, backend="cuda")
    expected = bank_attend(queries.half(), bank.clone(), 0.1, backend="cuda")
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("norm", ["implicit", "project"])
@pytest.mark.parametrize("channels", [64, 80, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_writes_the_copy_that_the_next_attend_reads(cuda_ops, emulated, norm, channels, dtype):
    queries, bank = Case(10, 70, channels, dtype).make()
    velocity = torch.zeros_like(bank)
    for _ in range(3):
        step(bank, velocity, queries, norm)
        assert attend_launches(emulated, queries, bank) == WITH_COPY
        found = bank_attend(queries, bank, 0.1, backend="cuda")
        expected = bank_attend(queries, bank.clone(), 0.1, backend="cuda")
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_copy_goes_with_its_bank(cuda_ops):
    queries, bank = Case(10, 70, 64, torch.bfloat16).make()
    bank_attend(queries, bank, 0.1, backend="cuda")
    dtype = cuda_ops.operand_dtype(queries, cuda_ops.target_for(bank.device))
    operand = weakref.ref(cuda_ops._copies[bank][dtype].rows)
    assert operand() is not None
    del bank
    gc.collect()
    assert operand() is None


def test_inference_tensors_work_without_a_copy(cuda_ops, emulated):
    with torch.inference_mode():
        queries, bank = Case(10, 70, 64).make()
        assert attend_launches(emulated, queries, bank) == WITHOUT_COPY
        bank.add_(0.1)
        assert attend_launches(emulated, queries, bank) == WITHOUT_COPY
        index, _ = bank_select(queries, bank, backend="cuda")
        assert index.shape == (10,)


def test_a_captured_step_keeps_no_copy(cuda_ops, emulated, setting, monkeypatch):
    """A replay changes the bank unseen, so after the capture every attend makes its own copy."""
    queries, bank = setting
    monkeypatch.setattr(cuda_ops, "capturing", lambda device: True)
    step(bank, torch.zeros_like(bank), queries)
    monkeypatch.setattr(cuda_ops, "capturing", lambda device: False)
    assert attend_launches(emulated, queries, bank) == WITHOUT_COPY
    assert attend_launches(emulated, queries, bank) == WITHOUT_COPY


def test_forget_drops_the_copy(cuda_ops, emulated, setting):
    queries, bank = setting
    bank_attend(queries, bank, 0.1, backend="cuda")
    bank.data.mul_(-1)  # a write that no counter sees
    cuda_ops.forget(bank)
    assert attend_launches(emulated, queries, bank) == WITHOUT_COPY
