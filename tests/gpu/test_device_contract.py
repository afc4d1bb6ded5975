"""What callers rely on on a GPU: same bits, streams, graphs, torch.compile, no waiting, sizes that only a GPU holds.

Legend: R query or key rows, K bank rows, C channels.
"""

import gc

import pytest
import torch
from torch import Tensor

from caco_fast.bank import LearnableBank
from caco_fast.ops import bank_attend, bank_select, bank_step_
from tests.ops.cases import Case
from tests.oracle import attend, unit_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

TEMPERATURES = (0.08, 0.1)
LONG_SLEEP = 50_000_000  # cycles; some 30 ms, far longer than launching a step takes


class Setting:
    """One training step's tensors on a device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        queries, bank = case.make()
        self.queries, self.bank = queries.to(device), bank.to(device)
        noise = torch.randn(queries.shape, generator=torch.Generator().manual_seed(1))
        self.keys = self.queries + (0.02 * noise).to(self.queries)
        self.velocity = torch.zeros_like(self.bank)
        self.row_weight = torch.full((case.rows,), 1 / case.rows, device=device)

    def copy(self) -> "Setting":
        other = object.__new__(Setting)
        other.__dict__.update({name: value.clone() for name, value in self.__dict__.items()})
        return other

    def step(self, backend: str = "cuda", norm: str = "implicit") -> list[Tensor]:
        """A whole training step; everything that it computes or changes."""
        (lse, bank_lse), mean_row = bank_attend(self.queries, self.bank, TEMPERATURES, backend)
        index, similarity = bank_select(self.keys, self.bank, backend)
        bank_step_(
            self.bank, self.velocity, self.queries, bank_lse, temperature=TEMPERATURES[1], lr=0.5, momentum=0.9,
            row_weight=self.row_weight, positives=index.unsqueeze(1), norm=norm, weight_decay=0.01, backend=backend,
        )  # fmt: skip
        return [lse, bank_lse, mean_row, index, similarity, self.bank, self.velocity]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


CASES = [Case(512, 65536, 256), Case(130, 8191, 128, torch.bfloat16), Case(33, 4099, 512, torch.float16)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_that_of_the_reference_in_f64(device, case):
    setting = Setting(case, device)
    exact = setting.copy()
    for name, value in vars(setting).items():
        setattr(exact, name, value.double())
    start = exact.bank.clone()
    found, expected = setting.step(), exact.step("reference")
    rounding = 2.0**-11 if case.dtype == torch.float16 else 2.0**-8
    for left, right in zip(found[:2], expected[:2]):
        torch.testing.assert_close(left.double(), right, rtol=0, atol=2 * rounding)
    torch.testing.assert_close(found[4].double(), expected[4], rtol=0, atol=1e-6)
    for name, at, origin in (("mean row", 2, 0), ("bank", 5, start), ("velocity", 6, 0)):
        error, size = (found[at].double() - expected[at]).norm(), (expected[at] - origin).norm()
        assert error <= 4 * rounding * size, f"{name}: off by {error / size:.2e} of its size"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ten_launches_give_the_same_bits(device, case):
    start = Setting(case, device)
    expected = start.copy().step()
    side, load = torch.cuda.Stream(device), torch.randn(2048, 2048, device=device)
    side.wait_stream(torch.cuda.current_stream(device))
    for _ in range(10):
        with torch.cuda.stream(side):  # blocks of the kernels come and go in another order
            for _ in range(5):
                load = torch.tanh(load + 1)
        assert same(start.copy().step(), expected)


def test_work_waits_for_what_its_stream_still_has_to_write(device):
    start = Setting(CASES[1], device)
    expected = start.copy().step()
    setting, side = start.copy(), torch.cuda.Stream(device)
    queries = torch.full_like(setting.queries, torch.nan)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_SLEEP)
        queries.copy_(setting.queries)
        setting.queries = queries
        found = setting.step()
    torch.cuda.current_stream(device).wait_stream(side)
    assert same(found, expected)


def test_a_bank_stepped_on_one_stream_is_attended_on_another(device):
    bank, queries, side = learnable(device), Setting(CASES[1], device).queries, torch.cuda.Stream(device)
    bank_step(bank, queries)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        found = bank.attend(queries, 0.1)
    torch.cuda.current_stream(device).wait_stream(side)
    assert same(list(found), list(bank_attend(queries, bank.bank, 0.1, "cuda")))


def test_nothing_waits_for_the_gpu(device):
    setting = Setting(CASES[1], device)
    setting.copy().step()  # the first launch loads the kernels
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(LONG_SLEEP)
        setting.step()
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the calls returned after the work had ended"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("norm", ["implicit", "project"])
def test_a_captured_graph_replays_steps_of_the_same_bits(device, norm):
    start = Setting(CASES[1], device)
    eager, captured = start.copy(), start.copy()
    for _ in range(3):
        expected = [value.clone() for value in eager.step(norm=norm)]

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        captured.copy().step(norm=norm)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured.step(norm=norm)
    assert torch.equal(captured.bank, start.bank), "capturing must not run anything"
    for _ in range(3):
        graph.replay()
    assert same(results, expected)
    # Outside of the graph the bank that it changed unseen is read as it is now.
    found = bank_attend(captured.queries, captured.bank, 0.1, "cuda")
    expected = bank_attend(captured.queries, captured.bank.clone(), 0.1, "cuda")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_torch_compile_gives_loss_and_gradient_in_one_graph(device):
    torch._dynamo.reset()
    setting = Setting(CASES[1], device)

    def loss(queries: Tensor, keys: Tensor, bank: Tensor) -> Tensor:
        lse, _ = bank_attend(queries, bank, 0.1, "cuda")
        _, similarity = bank_select(keys, bank, "cuda")
        return (lse - similarity / 0.1).mean()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        queries = setting.queries.clone().requires_grad_()
        value = function(queries, setting.keys, setting.bank)
        value.backward()
        results.append((value.detach(), queries.grad))
    torch.testing.assert_close(results[1], results[0])


def test_the_gradient_is_the_mean_row(device):
    setting = Setting(Case(40, 1000, 256), device)
    queries = setting.queries.requires_grad_()
    lse, mean_row = bank_attend(queries, setting.bank, 0.1, "cuda")
    lse.sum().backward()
    torch.testing.assert_close(queries.grad, mean_row / 0.1)


def learnable(device: torch.device) -> LearnableBank:
    return LearnableBank(8191, 128, backend="cuda", generator=torch.Generator().manual_seed(0)).to(device)


def bank_step(bank: LearnableBank, queries: Tensor) -> None:
    lse, _ = bank.attend(queries, 0.1)
    positives, _ = bank.select(queries.float())
    weight = torch.full((len(queries),), 1 / len(queries), device=queries.device)
    bank.record(queries, lse, 0.1, weight, positives.unsqueeze(1))
    bank.step(0.5)


def test_the_copy_that_a_step_writes_is_that_of_the_new_bank(device):
    bank, queries = learnable(device), Setting(CASES[1], device).queries
    for _ in range(3):
        bank_step(bank, queries)
        assert same(list(bank.attend(queries, 0.1)), list(bank_attend(queries, bank.bank, 0.1, "cuda")))


def test_replays_of_a_banks_step_keep_its_copy(device):
    """The graph reads and writes the copy in place; outside of it the bank is read as it then is."""
    bank, eager, queries = learnable(device), learnable(device), Setting(CASES[1], device).queries
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        bank_step(bank, queries)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bank_step(bank, queries)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        bank_step(eager, queries)
    assert same([bank.bank, bank.velocity], [eager.bank, eager.velocity])
    assert same(list(bank.attend(queries, 0.1)), list(bank_attend(queries, bank.bank, 0.1, "cuda")))


def test_auto_is_the_kernels_and_a_learnable_bank_trains_on_them(device):
    def train(backend: str) -> Tensor:
        bank = LearnableBank(4096, 128, backend=backend, generator=torch.Generator().manual_seed(0)).to(device)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            q, k = torch.nn.functional.normalize(torch.randn(2, 64, 128, generator=generator), dim=2).to(device)
            lse, _ = bank.attend(q, 0.1)
            positives, _ = bank.select(k)
            bank.record(q, lse, 0.1, torch.full((64,), 1 / 64, device=device), positives.unsqueeze(1))
            bank.step(lr=3.0)
        return bank.bank

    assert torch.equal(train("auto"), train("cuda"))
    start, tiled = LearnableBank(4096, 128, generator=torch.Generator().manual_seed(0)).bank, train("tiled")
    moved = (tiled - start.to(device)).norm()
    assert moved > 0 and (train("cuda") - tiled).norm() < 0.02 * moved


def test_another_gpu_than_the_current_one_computes(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    found, expected = (Setting(CASES[1], torch.device("cuda", at)).step() for at in (1, 0))
    assert found[0].device.index == 1 and torch.cuda.current_device() == 0
    assert same([value.cpu() for value in found], [value.cpu() for value in expected])


def test_rows_beyond_2_to_the_31_elements_are_found_and_stepped(device):
    """64-bit offsets: the last rows of bank, velocity and operand copy lie beyond 2^31 elements."""
    rows, channels, bank_rows = 64, 256, 2**23 + 2**16 + 5
    free, _ = torch.cuda.mem_get_info(device)
    if free < 4 * bank_rows * channels * 4:
        pytest.skip(f"{free / 2**30:.0f} GiB of GPU memory free, expected {bank_rows * channels * 16 / 2**30:.0f}")
    generator = torch.Generator(device).manual_seed(0)
    bank = torch.randn(bank_rows, channels, device=device, generator=generator)
    places = torch.arange(bank_rows - rows, bank_rows, device=device)
    queries = torch.nn.functional.normalize(bank[-rows:], dim=1)
    index, similarity = bank_select(queries, bank, "cuda")
    assert torch.equal(index, places)
    torch.testing.assert_close(similarity, torch.ones_like(similarity), rtol=0, atol=1e-6)
    lse, _ = bank_attend(queries, bank, 0.02, "cuda")
    before, velocity = bank[-rows:].clone(), torch.zeros_like(bank)
    row_weight = torch.full((rows,), 1 / rows, device=device)
    # With p about 0 the positive alone pulls, and its tangent vanishes: only momentum moves the row.
    velocity[-rows:] = 1.0
    bank_step_(
        bank, velocity, queries, lse + 50, temperature=0.1, lr=0.5, momentum=0.5, row_weight=row_weight, backend="cuda"
    )  # fmt: skip
    torch.testing.assert_close(bank[-rows:], before - 0.25, rtol=0, atol=1e-3)
    assert torch.linalg.vector_norm(velocity[: bank_rows - rows], ord=torch.inf) < 1e-3
    del bank, velocity
    gc.collect()
    torch.cuda.empty_cache()


def test_rows_of_the_f64_softmax_at_a_bank_of_a_million(device):
    case = Case(16, 2**20 + 3, 128, torch.bfloat16)
    setting = Setting(case, device)
    (lse, _), mean_row = bank_attend(setting.queries, setting.bank, TEMPERATURES, "cuda")
    low_unit = unit_rows(setting.bank)[0].float().bfloat16().double()
    expected, p, expected_mean = attend(setting.queries.double(), low_unit, TEMPERATURES[0])
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-4)
    assert ((mean_row - expected_mean).abs() <= 2.0**-8 * (p @ low_unit.abs()) + 1e-5).all()
