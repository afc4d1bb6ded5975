"""TF32 is for encoders: the bank's plain products and the evaluation are f32 whatever the encoders compute in."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from caco_fast.evaluate.few_labels import few_labels
from caco_fast.evaluate.knn import knn_accuracy
from caco_fast.evaluate.linear_probe import linear_probe
from caco_fast.evaluate.rows import Rows, coordinates
from caco_fast.evaluate.solvers import Columns, scores, squared_hinge
from caco_fast.ops.bank_attend import attend_reference, attend_tiled
from caco_fast.ops.bank_select import select_reference, select_tiled
from caco_fast.protocols.head_training import LinearRecipe
from caco_fast.protocols.heads import Heads
from caco_fast.protocols.neighbours import nearest


def heads() -> Heads:
    return Heads(4, 2, [0.1, 1.0], LinearRecipe(), seed=0, device=torch.device("cpu"))


ROWS, BANK, LABELS = torch.randn(6, 4), torch.randn(9, 4), torch.arange(9) % 2
PRODUCTS = {
    "attend, tiled": lambda: attend_tiled(ROWS, BANK, [0.1]),
    "attend, reference": lambda: attend_reference(ROWS, BANK, [0.1]),
    "select, tiled": lambda: select_tiled(ROWS, BANK),
    "select, reference": lambda: select_reference(ROWS, BANK),
    "kNN": lambda: knn_accuracy(BANK, LABELS, ROWS, LABELS[:6], k=[1], classes=2),
    "linear probe": lambda: linear_probe(BANK, LABELS, ROWS, LABELS[:6], classes=2),
    "few labels": lambda: few_labels(BANK, LABELS, ROWS, LABELS[:6], classes=2, per_class=3, seeds=1),
    "scores": lambda: list(scores(Rows(BANK, LABELS, coordinates(BANK)), torch.randn(2, 5))),
    "SVM": lambda: squared_hinge(
        Rows(BANK, 2 * LABELS[:, None] - 1, coordinates(BANK, centre=False)),
        Columns(torch.tensor([0]), torch.tensor([1.0], dtype=torch.float64), torch.tensor([-1])),
        torch.zeros(9, dtype=torch.int64),
    ),
    "heads, a step": lambda: heads().step(BANK, LABELS, 1.0, 9),
    "heads, scores": lambda: heads().accuracy(BANK, LABELS),
    "neighbours": lambda: nearest(ROWS, BANK, 2),
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
