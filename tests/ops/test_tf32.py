"""TF32 is for encoders: the bank's plain products and the evaluation are f32 whatever the encoders compute in."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from caco_fast.evaluate.knn import knn_accuracy
from caco_fast.evaluate.linear_probe import linear_probe
from caco_fast.ops.bank_attend import attend_reference, attend_tiled
from caco_fast.ops.bank_select import select_reference, select_tiled

ROWS, BANK, LABELS = torch.randn(6, 4), torch.randn(9, 4), torch.arange(9) % 2
PRODUCTS = {
    "attend, tiled": lambda: attend_tiled(ROWS, BANK, [0.1]),
    "attend, reference": lambda: attend_reference(ROWS, BANK, [0.1]),
    "select, tiled": lambda: select_tiled(ROWS, BANK),
    "select, reference": lambda: select_reference(ROWS, BANK),
    "kNN": lambda: knn_accuracy(BANK, LABELS, ROWS, LABELS[:6], k=[1], classes=2),
    "linear probe": lambda: linear_probe(BANK, LABELS, ROWS, LABELS[:6], classes=2),
}


class Allowed(TorchDispatchMode):
    """Whether TF32 is allowed at each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func) or "linear" in str(func):
            self.seen.append(torch.backends.cuda.matmul.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32() -> Iterator[None]:
    """A process whose encoders compute in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_outside_of_the_encoders_are_f32(name: str, tf32: None) -> None:
    product: Callable[[], Any] = PRODUCTS[name]
    with Allowed() as allowed:
        product()
    assert allowed.seen and not any(allowed.seen)
    assert torch.backends.cuda.matmul.allow_tf32, "the encoders keep TF32"
