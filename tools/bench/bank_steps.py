"""One training step on a bank, in ways to compare: dense in plain torch, and through the operations of caco_fast.

Legend: R query and key rows, K bank rows, C channels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.ops import bank_attend, bank_select, bank_step_

TEMPERATURE, BANK_TEMPERATURE, LR, MOMENTUM = 0.08, 0.1, 3.0, 0.9
PARTS = ("attend", "select", "step")
DENSE = "dense eager"


class Inputs:
    def __init__(self, rows: int, bank_rows: int, channels: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def unit(count: int) -> Tensor:
            return normalize(torch.randn(count, channels, generator=generator, device=device), dim=1)

        self.queries, self.keys = unit(rows), unit(rows)  # [R, C]
        self.bank, self.velocity = unit(bank_rows), torch.zeros(bank_rows, channels, device=device)  # [K, C]
        self.row_weight = torch.full((rows,), 2 / rows, device=device)  # [R], two views of R / 2 images


Step = Iterator[tuple[str, Callable[[], None]]]


def dense_attend(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(unit rows [K, C], similarities [R, K], lse [R], mean row [R, C])"""
    unit = normalize(bank, dim=1)
    similarity = queries @ unit.T
    lse = torch.logsumexp(similarity / TEMPERATURE, dim=1)
    # What autograd does with the loss: softmax [R, K] and a product with the bank.
    return unit, similarity, lse, torch.softmax(similarity / TEMPERATURE, dim=1) @ unit


def dense_select(keys: Tensor, bank: Tensor) -> Tensor:
    return (keys @ normalize(bank, dim=1).T).argmax(dim=1)  # [R]


def dense_update_(inputs: tuple[Tensor, ...], unit: Tensor, similarity: Tensor, positive: Tensor) -> None:
    queries, bank, velocity, row_weight = inputs
    rows = torch.arange(len(queries), device=queries.device)
    p = torch.softmax(similarity / BANK_TEMPERATURE, dim=1)  # [R, K]
    p[rows, positive] = 1 - p[rows, positive]
    pull = p * row_weight.unsqueeze(1)  # [R, K]
    along = (pull * similarity).sum(dim=0)  # [K]
    tangent = pull.T @ queries - along.unsqueeze(1) * unit  # [K, C]
    gradient = -tangent / bank.norm(dim=1, keepdim=True) / BANK_TEMPERATURE
    velocity.mul_(MOMENTUM).add_(gradient)
    bank.sub_(LR * velocity)


def dense_step(inputs: Inputs, transform: Callable[[Callable], Callable] = lambda function: function) -> Step:
    """The three parts in plain eager torch; similarities of attend are kept for the step, as the released code does.

    transform: applied to each part's function, such as torch.compile.
    """
    attend_part, select_part, update_part_ = map(transform, (dense_attend, dense_select, dense_update_))
    changed = (inputs.queries, inputs.bank, inputs.velocity, inputs.row_weight)
    kept: dict[str, Tensor] = {}

    def attend() -> None:
        kept["unit"], kept["similarity"], _, _ = attend_part(inputs.queries, inputs.bank)

    def select() -> None:
        kept["positive"] = select_part(inputs.keys, inputs.bank)

    def step() -> None:
        update_part_(changed, kept["unit"], kept["similarity"], kept["positive"])

    yield from zip(PARTS, (attend, select, step))


def operations_step(inputs: Inputs, backend: str, dtype: torch.dtype) -> Step:
    """The same through the bank operations, rows in the given dtype, bank in f32."""
    queries, keys = inputs.queries.to(dtype), inputs.keys.to(dtype)
    kept: dict[str, Tensor] = {}

    def attend() -> None:
        (_, kept["lse"]), _ = bank_attend(queries, inputs.bank, (TEMPERATURE, BANK_TEMPERATURE), backend)

    def select() -> None:
        kept["positive"], _ = bank_select(keys, inputs.bank, backend)

    def step() -> None:
        bank_step_(
            inputs.bank,
            inputs.velocity,
            queries,
            kept["lse"],
            temperature=BANK_TEMPERATURE,
            lr=LR,
            momentum=MOMENTUM,
            row_weight=inputs.row_weight,
            positives=kept["positive"].unsqueeze(1),
            backend=backend,
        )

    yield from zip(PARTS, (attend, select, step))


def make_step(variant: str, inputs: Inputs) -> Step:
    if variant == DENSE:
        return dense_step(inputs)
    backend, dtype = variant.split()
    return operations_step(inputs, backend, getattr(torch, dtype))
