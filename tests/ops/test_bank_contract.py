"""What the three operations have in common: errors, the choice of a backend, memory, autocast, torch.compile.

Legend: R query rows, K bank rows, C channels, M positives per row.
"""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from caco_fast.ops import bank_attend, bank_select, bank_step_, dispatch, tiling
from caco_fast.ops.bank_attend import attend_tiled
from caco_fast.ops.bank_select import select_tiled
from caco_fast.ops.bank_step import step_tiled_
from tests.ops.cases import unit_rows

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


def test_a_processor_without_bf16_sums_products_of_bf16_in_f32(monkeypatch):
    monkeypatch.setattr(tiling, "_CPU_HAS_BF16", False)
    left, right = torch.randn(5, 64).bfloat16(), torch.randn(64, 7).bfloat16()
    found = tiling.product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=0, atol=1e-5)


# Errors

BAD_ROWS = {
    "rows of one dimension": (torch.ones(4), torch.ones(3, 4), ValueError, r"found shape \[4\], expected \[R, C\]"),
    "rows of other channels": (
        torch.ones(2, 5),
        torch.ones(3, 4),
        ValueError,
        r"found shape \[2, 5\], expected \[R, 4\]",
    ),
    "integer rows": (torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4), TypeError, "found torch.int64"),
    "empty bank": (torch.ones(2, 4), torch.ones(0, 4), ValueError, r"bank: found shape \[0, 4\].*at least one row"),
    "bf16 bank": (torch.ones(2, 4), torch.ones(3, 4).bfloat16(), TypeError, "bank: found torch.bfloat16, expected"),
    "f64 rows with an f32 bank": (torch.ones(2, 4).double(), torch.ones(3, 4), TypeError, "both float64 or neither"),
    "other device": (torch.ones(2, 4), torch.ones(3, 4, device="meta"), ValueError, "found on cpu, expected on meta"),
    "no tensor": ([[1.0]], torch.ones(3, 4), TypeError, "found list, expected a tensor"),
}


@pytest.mark.parametrize("case", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_named(case):
    rows, bank, error, message = case
    with pytest.raises(error, match=f"bank_attend: .*{message}"):
        bank_attend(rows, bank, 0.1)
    with pytest.raises(error, match=f"bank_select: .*{message}"):
        bank_select(rows, bank)


def test_cuda_backend_that_is_not_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(dispatch, "cuda_backend", lambda: None)
    with pytest.raises(
        RuntimeError, match="bank_select: backend: found 'cuda' without compiled kernels, expected them"
    ):
        bank_select(torch.ones(2, 4), torch.ones(3, 4), "cuda")


def test_cuda_backend_without_a_path_for_the_device_says_why(monkeypatch):
    class Kernels:
        available = staticmethod(lambda device: False)
        why_not = staticmethod(lambda device: f"the kernels run on CUDA GPUs, found {device}")

    monkeypatch.setattr(dispatch, "cuda_backend", lambda: Kernels)
    with pytest.raises(
        RuntimeError, match="bank_attend: backend='cuda': the kernels run on CUDA GPUs, found cpu, or use"
    ):
        bank_attend(torch.ones(2, 4), torch.ones(3, 4), 0.1, "cuda")
    assert bank_attend(torch.ones(2, 4), torch.ones(3, 4), 0.1)[0].isfinite().all()


def test_auto_takes_the_cuda_backend_where_it_offers_a_path(monkeypatch):
    class Kernels:
        available = staticmethod(lambda device: device.type == "cpu")

    def select(keys: Tensor, bank: Tensor, operand: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.full((len(keys),), 2), torch.ones(len(keys))

    monkeypatch.setattr(dispatch, "cuda_backend", lambda: Kernels)
    monkeypatch.setattr(sys.modules["caco_fast.ops.bank_select"], "select_cuda", select)
    assert bank_select(torch.ones(2, 4), torch.ones(3, 4))[0].tolist() == [2, 2]
    assert bank_select(torch.ones(2, 4).double(), torch.ones(3, 4).double())[0].tolist() == [0, 0]


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
            bank,
            velocity,
            queries,
            lse,
            0.1,
            torch.tensor(1.0),
            0.9,
            0.01,
            weight,
            index.unsqueeze(1),
            weight.unsqueeze(1),
            "project",
        )
    assert largest.bytes > 0
    assert largest.bytes < bank_rows * channels * 2 / 2, "not even half of a bf16 copy of the bank"
    assert largest.bytes < rows * bank_rows * 2 / 4, "not even a quarter of bf16 similarities"


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


# Autograd and torch.compile


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
