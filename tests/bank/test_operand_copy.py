"""The operand copy of a bank: whoever writes the bank writes or renews it, and nobody reads one that is stale.

Legend: R query rows, K bank rows, C channels.
"""

import copy
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from caco_fast.bank import KeyQueue, LearnableBank, ShardedBank
from caco_fast.ops import bank_attend, bank_step_
from tests.ops.cases import unit_rows

SIZE, DIM, ROWS = 70, 64, 10
# Launches of an attend: queries, attend, merge, and the bank where there is no copy.
WITH_COPY, WITHOUT_COPY = 3, 4
# Of the queries there is none if they are what the products take.
AS_THEY_ARE = 1
KINDS = {"learnable": LearnableBank, "sharded": ShardedBank, "queue": KeyQueue}


def make(kind: str = "learnable", dim: int = DIM, **settings: str) -> nn.Module:
    return KINDS[kind](SIZE, dim, backend="cuda", generator=torch.Generator().manual_seed(3), **settings)


def rows_of(bank: nn.Module) -> Tensor:
    return bank.queue if isinstance(bank, KeyQueue) else bank.bank


def launches(emulated: ModuleType, bank: nn.Module, queries: Tensor) -> int:
    emulated.take_counters()
    bank.attend(queries, 0.1)
    return int(emulated.take_counters()["launches"])


def assert_current(bank: nn.Module, queries: Tensor) -> None:
    """An attend gives the bits of one that converts the bank itself."""
    found, expected = bank.attend(queries, 0.1), bank_attend(queries, rows_of(bank), 0.1, "cuda")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def step(bank: LearnableBank, queries: Tensor, skip: Tensor | None = None) -> None:
    lse, _ = bank.attend(queries, 0.1)
    positives, _ = bank.select(queries.float())
    bank.record(queries, lse, 0.1, torch.full((len(queries),), 1 / len(queries)), positives.unsqueeze(1))
    bank.step(0.5, skip=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_made_once(cuda_ops, emulated, kind):
    bank, queries = make(kind), unit_rows(ROWS, DIM)
    assert launches(emulated, bank, queries) == WITHOUT_COPY
    assert launches(emulated, bank, queries) == WITH_COPY
    assert "operand" not in "".join(bank.state_dict())


def test_attend_decides_its_dtype_and_select_reads_it(cuda_ops, emulated):
    bank, queries = make(), unit_rows(ROWS, DIM)
    bank.select(queries)
    assert bank.operand.rows is None
    only_fp16 = not cuda_ops.target_for(queries.device).takes_bfloat16
    found = [launches(emulated, bank, queries.half()) for _ in range(2)]
    assert found == [WITHOUT_COPY - AS_THEY_ARE, WITH_COPY - AS_THEY_ARE]
    assert bank.operand.rows.dtype == torch.float16
    assert launches(emulated, bank, queries) == (WITH_COPY if only_fp16 else WITHOUT_COPY)
    emulated.take_counters()
    index, _ = bank.select(queries)
    assert emulated.take_counters()["launches"] == WITH_COPY
    assert torch.equal(index, (queries.double() @ bank.bank.double().T).argmax(dim=1))
    assert_current(bank, queries)


@pytest.mark.parametrize("norm", ["implicit", "project"])
@pytest.mark.parametrize("channels", [64, 80, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_writes_it(cuda_ops, emulated, norm, channels, dtype):
    bank, queries = make(dim=channels, norm=norm), unit_rows(ROWS, channels, dtype)
    for skip in (None, torch.tensor(0.0), torch.tensor(1.0)):
        step(bank, queries, skip)
        ready = channels != 80 and queries.dtype == bank.operand.rows.dtype
        assert launches(emulated, bank, queries) == WITH_COPY - ready * AS_THEY_ARE
        assert_current(bank, queries)


def test_a_step_of_the_other_dtype_renews_it(cuda_ops, emulated):
    bank, queries = make(), unit_rows(ROWS, DIM)
    bank.attend(queries.half(), 0.1)
    step(bank, queries.bfloat16())
    assert launches(emulated, bank, queries.half()) == WITH_COPY - AS_THEY_ARE
    assert_current(bank, queries.half())


def swap_data(bank: nn.Module) -> None:
    rows_of(bank).data = torch.rand(SIZE, DIM)


def load(bank: nn.Module) -> None:
    bank.load_state_dict(KINDS_OF[type(bank)](SIZE, DIM, generator=torch.Generator().manual_seed(8)).state_dict())


KINDS_OF = {kind: kind for kind in KINDS.values()}
OWN_WRITES = {
    "fill": lambda bank: bank.fill(unit_rows(20, DIM), start=5),
    "fill that wraps": lambda bank: bank.fill(unit_rows(20, DIM), start=60, wrap=True),
    "fill that is skipped": lambda bank: bank.fill(unit_rows(20, DIM), skip=torch.tensor(1.0)),
    "normalise": lambda bank: bank.normalise(),
    "load_state_dict": load,
}
FOREIGN_WRITES = {
    "add_": lambda bank: rows_of(bank).add_(0.1),
    "copy_": lambda bank: rows_of(bank).copy_(torch.ones(SIZE, DIM)),
    "of a view": lambda bank: rows_of(bank)[3:5].mul_(-1),
    "of a detached alias": lambda bank: rows_of(bank).detach().mul_(-1),
    "index": lambda bank: rows_of(bank).__setitem__(7, 0.5),
    "set_": lambda bank: rows_of(bank).set_(torch.rand(SIZE, DIM)),
    "new data": swap_data,
    "a step of the operation": lambda bank: bank_step_(
        rows_of(bank), torch.ones(SIZE, DIM), unit_rows(2, DIM), torch.full((2,), 10.0), temperature=0.1,
        lr=0.5, momentum=0.9, row_weight=torch.ones(2), backend="cuda",
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", OWN_WRITES)
def test_the_banks_own_writes_keep_it(cuda_ops, emulated, write):
    bank, queries = make(), unit_rows(ROWS, DIM)
    bank.attend(queries, 0.1)
    where = bank.operand.rows.data_ptr()
    OWN_WRITES[write](bank)
    assert bank.operand.rows.data_ptr() == where, "a captured step reads it there"
    assert launches(emulated, bank, queries) == WITH_COPY
    assert_current(bank, queries)


@pytest.mark.parametrize("count", [0, 5, SIZE, 2 * SIZE + 3])
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_enqueue_keeps_it(cuda_ops, emulated, count, skip):
    queue, queries = make("queue"), unit_rows(ROWS, DIM)
    queue.attend(queries, 0.1)
    for _ in range(2):
        queue.enqueue(unit_rows(count, DIM), skip=None if skip is None else torch.tensor(skip))
        assert launches(emulated, queue, queries) == WITH_COPY
        assert_current(queue, queries)
    load(queue)
    assert launches(emulated, queue, queries) == WITH_COPY
    assert_current(queue, queries)


@pytest.mark.parametrize("kind", ["learnable", "queue"])
@pytest.mark.parametrize("write", FOREIGN_WRITES)
def test_a_write_by_others_is_noticed(cuda_ops, kind, write):
    bank, queries = make(kind), unit_rows(ROWS, DIM)
    bank.attend(queries, 0.1)
    FOREIGN_WRITES[write](bank)
    assert_current(bank, queries)


@pytest.mark.parametrize("own", ["fill", "step", "enqueue"])
def test_a_write_by_others_is_noticed_after_one_of_its_own(cuda_ops, own):
    """A bank that renews the rows it has written does not take the others for current."""
    bank, queries = make("queue" if own == "enqueue" else "learnable"), unit_rows(ROWS, DIM)
    bank.attend(queries, 0.1)
    rows_of(bank)[50:].mul_(-1)
    {"fill": lambda: bank.fill(queries), "step": lambda: step(bank, queries), "enqueue": lambda: bank.enqueue(queries)}[
        own
    ]()
    assert_current(bank, queries)


def test_a_write_that_no_counter_sees_needs_a_refresh(cuda_ops):
    bank, queries = make(), unit_rows(ROWS, DIM)
    bank.attend(queries, 0.1)
    bank.bank.data.mul_(-1)
    bank.operand.refresh(bank.bank)
    assert_current(bank, queries)


def test_another_device_or_dtype_or_module_has_another(cuda_ops):
    bank, queries = make(), unit_rows(ROWS, DIM)
    bank.attend(queries, 0.1)
    twin = copy.deepcopy(bank)
    twin.bank.mul_(-1)
    assert_current(twin, queries)
    assert_current(bank, queries)
    assert bank.to("cpu", torch.float64).operand.rows is None
    assert bank.float().operand.rows is None
    assert_current(bank, queries)


def test_inference_tensors_work_without_it(cuda_ops, emulated):
    with torch.inference_mode():
        bank, queries = make(), unit_rows(ROWS, DIM)
        for _ in range(2):
            assert launches(emulated, bank, queries) == WITHOUT_COPY
            bank.bank.add_(0.1)
        assert bank.select(queries)[0].shape == (ROWS,)


def test_without_kernels_there_is_none():
    bank = LearnableBank(SIZE, DIM, backend="tiled")
    bank.attend(unit_rows(ROWS, DIM), 0.1)
    assert bank.operand.rows is None


def test_a_capture_makes_none_and_does_not_believe_a_stale_one(cuda_ops, emulated, monkeypatch):
    """What is captured runs at the first replay only."""
    bank, queries = make(), unit_rows(ROWS, DIM)
    monkeypatch.setattr(cuda_ops, "capturing", lambda device: True)
    assert launches(emulated, bank, queries) == WITHOUT_COPY
    assert bank.operand.rows is None
    monkeypatch.setattr(cuda_ops, "capturing", lambda device: False)
    bank.attend(queries, 0.1)
    bank.bank.mul_(-1)
    monkeypatch.setattr(cuda_ops, "capturing", lambda device: True)
    assert launches(emulated, bank, queries) == WITHOUT_COPY
    step(bank, queries)
    assert not bank.operand.is_current(bank.bank)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_step_reads_and_writes_the_one_that_is_current(cuda_ops, emulated, monkeypatch, captured):
    """Attend, select and step convert their queries and nothing else: the step writes the copy, once."""
    bank, queries = make(), unit_rows(ROWS, DIM)
    step(bank, queries)
    where = bank.operand.rows.data_ptr()
    launched = []
    launch = cuda_ops.launch

    def recorded(name: str, target: object, **fields: object) -> None:
        launched.append((name, fields.get("normalise"), fields.get("bank_operand")))
        launch(name, target, **fields)

    monkeypatch.setattr(cuda_ops, "launch", recorded)
    monkeypatch.setattr(cuda_ops, "capturing", lambda device: captured)
    step(bank, queries)
    assert [name for name, *_ in launched].count("bank_operand") == 3
    assert not any(unit for name, unit, _ in launched if name == "bank_operand"), "no pass over the bank"
    assert [operand.data_ptr() for name, _, operand in launched if name == "bank_step"] == [where]
    assert bank.operand.is_current(bank.bank)
    assert_current(bank, queries)


def test_compiled_code_reads_it(cuda_ops, emulated):
    torch._dynamo.reset()
    bank, queries = make(), unit_rows(ROWS, DIM)
    attend = torch.compile(lambda q: bank.attend(q, 0.1)[0], fullgraph=True, backend="eager")
    attend(queries)
    step(bank, queries)
    emulated.take_counters()
    found = attend(queries)
    assert emulated.take_counters()["launches"] == WITH_COPY
    assert torch.equal(found, bank_attend(queries, bank.bank, 0.1, "cuda")[0])
