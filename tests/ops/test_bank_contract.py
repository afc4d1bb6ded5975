"""What callers rely on besides figures: errors, empty and strided input, memory, same bits, autocast, torch.compile.

Legend: R query rows, K bank rows, C channels, M positives per row.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from caco_fast.ops import backends as backend_module
from caco_fast.ops import bank_attend, bank_select, bank_step_
from caco_fast.ops.bank_attend import attend_tiled
from caco_fast.ops.bank_select import select_tiled
from caco_fast.ops.bank_step import step_tiled_
from tests.ops.bank_inputs import inputs, unit_rows

backends = pytest.mark.parametrize("backend", ["reference", "tiled"])


def make_step_arguments(rows: int = 5, bank_rows: int = 9, channels: int = 4, many: int = 1) -> dict:
    queries, bank = unit_rows(rows, channels), unit_rows(bank_rows, channels)
    return {
        "bank": bank,
        "velocity": torch.zeros_like(bank),
        "queries": queries,
        "lse": bank_attend(queries, bank, 0.1)[0],
        "temperature": 0.1,
        "lr": 1.0,
        "momentum": 0.9,
        "row_weight": torch.full((rows,), 1 / rows),
        "positives": torch.randint(bank_rows, (rows, many)),
        "positive_weight": torch.full((rows, many), 1 / many),
    }


# Errors

BAD_ROWS = {
    "rows of one dimension": (torch.ones(4), torch.ones(3, 4), ValueError, r"found shape \[4\], wanted \[R, C\]"),
    "rows of other channels": (
        torch.ones(2, 5),
        torch.ones(3, 4),
        ValueError,
        r"found shape \[2, 5\], wanted \[R, 4\]",
    ),
    "integer rows": (torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4), TypeError, "found torch.int64"),
    "empty bank": (torch.ones(2, 4), torch.ones(0, 4), ValueError, r"bank: found shape \[0, 4\].*at least one row"),
    "bf16 bank": (torch.ones(2, 4), torch.ones(3, 4).bfloat16(), TypeError, "bank: found torch.bfloat16, wanted"),
    "f64 rows with an f32 bank": (torch.ones(2, 4).double(), torch.ones(3, 4), TypeError, "both float64 or neither"),
    "other device": (torch.ones(2, 4), torch.ones(3, 4, device="meta"), ValueError, "found on cpu, wanted on meta"),
    "no tensor": ([[1.0]], torch.ones(3, 4), TypeError, "found list, wanted a tensor"),
}


@pytest.mark.parametrize("case", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_named(case):
    rows, bank, error, message = case
    with pytest.raises(error, match=f"bank_attend: .*{message}"):
        bank_attend(rows, bank, 0.1)
    with pytest.raises(error, match=f"bank_select: .*{message}"):
        bank_select(rows, bank)


@pytest.mark.parametrize(
    "temperature", [0.0, -0.1, float("nan"), float("inf"), (0.1, 0.0), (0.1, 0.2, 0.3), ()], ids=str
)
def test_bad_temperature_is_named(temperature):
    with pytest.raises(ValueError, match="bank_attend: temperature: found"):
        bank_attend(torch.ones(2, 4), torch.ones(3, 4), temperature)


BAD_STEPS = {
    "velocity shape": ({"velocity": torch.zeros(3, 4)}, ValueError, r"velocity: found shape \[3, 4\], wanted \[9, 4\]"),
    "velocity dtype": ({"velocity": torch.zeros(9, 4).double()}, TypeError, "velocity: found torch.float64"),
    "lse shape": ({"lse": torch.zeros(4)}, ValueError, r"lse: found shape \[4\], wanted \[5\]"),
    "row_weight dtype": ({"row_weight": torch.ones(5).long()}, TypeError, "row_weight: found torch.int64"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: found 0.0"),
    "lr": ({"lr": float("nan")}, ValueError, "lr: found nan"),
    "lr of two": ({"lr": torch.ones(2)}, ValueError, r"lr: found torch.float32 \[2\] on cpu, wanted a number, or one"),
    "negative lr": ({"lr": -1.0}, ValueError, "lr: found -1.0"),
    "momentum": ({"momentum": 1.0}, ValueError, r"momentum: found 1.0, wanted a number in \[0, 1\)"),
    "norm": ({"norm": "l2"}, ValueError, "norm: found 'l2', wanted 'implicit' or 'project'"),
    "backend": ({"backend": "fast"}, ValueError, "backend: found 'fast', wanted one of auto, reference, tiled, cuda"),
    "positives shape": ({"positives": torch.zeros(5).long()}, ValueError, r"positives: found shape \[5\]"),
    "positives dtype": ({"positives": torch.zeros(5, 1)}, TypeError, "positives: found torch.float32"),
    "positive too large": ({"positives": torch.full((5, 1), 9)}, IndexError, r"found 9, wanted a bank row in \[0, 8\]"),
    "positive below 0": ({"positives": torch.full((5, 1), -1)}, IndexError, r"found -1, wanted a bank row in \[0, 8\]"),
    "weight of other M": ({"positive_weight": torch.ones(5, 2)}, ValueError, r"positive_weight: found shape \[5, 2\]"),
    "weight alone": ({"positives": None}, ValueError, "positive_weight: .*without positives"),
}


@pytest.mark.parametrize("case", BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_bad_step_is_named_and_changes_nothing(case):
    changes, error, message = case
    arguments = make_step_arguments()
    bank = arguments["bank"].clone()
    with pytest.raises(error, match=f"bank_step_: .*{message}"):
        bank_step_(**{**arguments, **changes})
    assert torch.equal(arguments["bank"], bank)


def test_cuda_backend_that_is_not_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(backend_module, "cuda_backend", lambda: None)
    with pytest.raises(RuntimeError, match="bank_select: backend='cuda' wants the compiled kernels, found none"):
        bank_select(torch.ones(2, 4), torch.ones(3, 4), "cuda")


def test_cuda_backend_without_a_path_for_the_device_says_why(monkeypatch):
    class Kernels:
        available = staticmethod(lambda device: False)
        why_not = staticmethod(lambda device: f"the kernels run on CUDA GPUs, found {device}")

    monkeypatch.setattr(backend_module, "cuda_backend", lambda: Kernels)
    with pytest.raises(
        RuntimeError, match="bank_attend: backend='cuda': the kernels run on CUDA GPUs, found cpu, or use"
    ):
        bank_attend(torch.ones(2, 4), torch.ones(3, 4), 0.1, "cuda")
    assert bank_attend(torch.ones(2, 4), torch.ones(3, 4), 0.1)[0].isfinite().all()


def test_auto_takes_the_cuda_backend_where_it_offers_a_path(monkeypatch):
    class Kernels:
        @staticmethod
        def available(device: torch.device) -> bool:
            return device.type == "cpu"

        @staticmethod
        def select(keys: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full((len(keys),), 2), torch.ones(len(keys))

    monkeypatch.setattr(backend_module, "cuda_backend", lambda: Kernels)
    assert bank_select(torch.ones(2, 4), torch.ones(3, 4))[0].tolist() == [2, 2]
    assert bank_select(torch.ones(2, 4).double(), torch.ones(3, 4).double())[0].tolist() == [0, 0]


# Shapes and strides


@backends
def test_no_rows(backend):
    arguments = make_step_arguments()
    empty, bank = torch.empty(0, 4, requires_grad=True), arguments["bank"]
    (lse, other_lse), mean_row = bank_attend(empty, bank, (0.1, 0.2), backend)
    assert (lse.shape, other_lse.shape, mean_row.shape) == ((0,), (0,), (0, 4))
    lse.sum().backward()
    assert empty.grad.shape == (0, 4)
    index, similarity = bank_select(empty, bank, backend)
    assert (index.shape, index.dtype, similarity.shape) == ((0,), torch.int64, (0,))
    before, velocity = bank.clone(), torch.randn_like(bank)
    wanted = 0.5 * velocity
    settings = {"temperature": 0.1, "lr": 2.0, "momentum": 0.5, "row_weight": torch.empty(0), "backend": backend}
    bank_step_(bank, velocity, empty, lse, **settings, positives=torch.empty(0, 1, dtype=torch.int64))
    torch.testing.assert_close(velocity, wanted)
    torch.testing.assert_close(bank, before - 2 * wanted)


@backends
def test_strided_input(backend):
    queries, bank = inputs("random", 7, 11, 6)
    queries, bank = queries.float(), bank.float()
    strided_queries = queries.repeat_interleave(2, dim=1)[:, ::2]
    strided_bank = bank.T.contiguous().T
    assert not strided_queries.is_contiguous() and not strided_bank.is_contiguous()
    wanted, found = bank_attend(queries, bank, 0.1, backend), bank_attend(strided_queries, strided_bank, 0.1, backend)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(bank_select(strided_queries, strided_bank, backend)[0], bank_select(queries, bank, backend)[0])
    results = []
    for rows, target in [(queries, bank.clone()), (strided_queries, strided_bank.clone())]:
        velocity = torch.zeros_like(target)
        settings = {"temperature": 0.1, "lr": 0.1, "momentum": 0.9, "row_weight": torch.full((14,), 1 / 7)[::2]}
        bank_step_(target, velocity, rows, wanted[0], **settings, backend=backend)
        results.append((target, velocity))
    torch.testing.assert_close(results[1], results[0])


@backends
def test_a_zero_row_stays_at_rest(backend):
    arguments = make_step_arguments()
    arguments["bank"][3] = 0
    arguments["lse"], _ = bank_attend(arguments["queries"], arguments["bank"], 0.1, backend)
    bank_step_(**arguments, backend=backend)
    assert arguments["bank"].isfinite().all()
    assert not arguments["bank"][3].any()


# Memory and determinism


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returned in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_tiled_never_holds_the_similarities_or_a_gradient_of_the_bank(dtype):
    rows, bank_rows, channels = 600, 32768, 128
    queries, bank = unit_rows(rows, channels).to(dtype), unit_rows(bank_rows, channels)
    velocity, weight = torch.zeros_like(bank), torch.full((rows,), 1 / rows)
    with LargestAllocation() as largest:
        lse, other_lse, _ = attend_tiled(queries, bank, [0.1, 0.08])
        index, _ = select_tiled(queries, bank)
        step_tiled_(
            bank, velocity, queries, lse, 0.1, 1.0, 0.9, weight, index.unsqueeze(1), weight.unsqueeze(1), "project"
        )
    assert largest.bytes > 0
    assert largest.bytes < bank_rows * channels * 2 / 2, "not even half of a bf16 copy of the bank"
    assert largest.bytes < rows * bank_rows * 2 / 4, "not even a quarter of bf16 similarities"


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        arguments = make_step_arguments(rows=700, bank_rows=3000, channels=32)
        arguments["positives"][:] = 7
        bank_step_(**arguments, backend="tiled")
        results.append((arguments["bank"], arguments["velocity"], arguments["lse"]))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@backends
def test_autocast_does_not_lower_the_precision(backend):
    start = make_step_arguments(rows=6, bank_rows=50, channels=16)
    results = []
    for enabled in (False, True):
        step = {**start, "bank": start["bank"].clone(), "velocity": start["velocity"].clone()}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            attended = bank_attend(step["queries"], step["bank"], 0.1, backend)
            selected = bank_select(step["queries"], step["bank"], backend)
            bank_step_(**step, backend=backend)
        results.append((*attended, *selected, step["bank"], step["velocity"]))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@backends
def test_nan_in_a_query_shows_in_its_result_only(backend):
    queries, bank = unit_rows(4, 8), unit_rows(30, 8)
    queries[2, 3] = torch.nan
    lse, mean_row = bank_attend(queries, bank, 0.1, backend)
    assert lse.isnan().tolist() == [False, False, True, False]
    assert mean_row.isnan().all(dim=1).tolist() == [False, False, True, False]


# Autograd and torch.compile


def test_what_carries_a_gradient_and_what_does_not():
    queries, bank = unit_rows(4, 8).requires_grad_(), unit_rows(30, 8).requires_grad_()
    for pair in [(0.1, 0.2), (0.1, 0.1)]:
        (lse, other_lse), mean_row = bank_attend(queries, bank, pair)
        assert (lse.requires_grad, other_lse.requires_grad, mean_row.requires_grad) == (True, False, False)
    index, similarity = bank_select(queries, bank)
    assert not similarity.requires_grad
    bank_gradient = torch.autograd.grad(lse.sum(), bank, allow_unused=True)[0]
    assert bank_gradient is None


@backends
def test_an_lr_on_the_device_is_the_number(backend):
    step = make_step_arguments(bank_rows=300, channels=16) | {"backend": backend, "lr": 0.3}
    other = step | {"bank": step["bank"].clone(), "velocity": step["velocity"].clone()}
    bank_step_(**step)
    bank_step_(**other | {"lr": torch.tensor(0.3, dtype=torch.float64)})
    torch.testing.assert_close(other["bank"], step["bank"], rtol=3e-7, atol=1e-7)
    assert torch.equal(other["velocity"], step["velocity"])


@backends
def test_opcheck(backend):
    queries, bank = unit_rows(5, 8).requires_grad_(), unit_rows(17, 8)
    torch.library.opcheck(torch.ops.caco_fast.bank_attend, (queries, bank, [0.1], backend))
    torch.library.opcheck(torch.ops.caco_fast.bank_attend, (queries, bank, [0.1, 0.05], backend))
    torch.library.opcheck(torch.ops.caco_fast.bank_select, (queries.detach(), bank, backend))
    for many in (None, 2):
        step = make_step_arguments(rows=5, bank_rows=17, channels=8, many=many or 1)
        positives, weights = (step["positives"], step["positive_weight"]) if many else (None, None)
        state = (step["bank"], step["velocity"], step["queries"], step["lse"])
        settings = (0.1, 1.0, None, 0.9, step["row_weight"], positives, weights, "project", None, backend)
        torch.library.opcheck(torch.ops.caco_fast.bank_step_, (*state, *settings))


def training_step(queries: Tensor, keys: Tensor, bank: Tensor, velocity: Tensor) -> Tensor:
    (lse, bank_lse), _ = bank_attend(queries, bank, (0.1, 0.07))
    index, _ = bank_select(keys, bank)
    loss = (lse - (queries * normalize(bank[index], dim=1)).sum(dim=1) / 0.1).mean()
    weight = torch.full((len(queries),), 1 / len(queries))
    settings = {"temperature": 0.07, "lr": 1.0, "momentum": 0.9, "row_weight": weight}
    bank_step_(bank, velocity, queries, bank_lse, **settings, positives=index.unsqueeze(1))
    return loss


def run_training_step(function, queries: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    queries, bank, velocity = queries.clone().requires_grad_(), start.clone(), torch.zeros_like(start)
    loss = function(queries, queries.detach().flip(0), bank, velocity)
    loss.backward()
    return loss.detach(), queries.grad, bank, velocity


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_training_step_in_one_graph(compiler, fresh_compile):
    queries, bank = unit_rows(5, 8), unit_rows(17, 8)
    compiled = torch.compile(training_step, fullgraph=True, backend=compiler)
    torch.testing.assert_close(
        run_training_step(compiled, queries, bank), run_training_step(training_step, queries, bank)
    )
