"""The work that `ops.py` times: every operation through caco_fast, and written in plain torch for comparison.

A variant of a bank operation is `dense eager`, `dense eager TF32`, `dense compiled TF32`, or a backend with the dtype
of its rows, such as `tiled bfloat16`. Loss and bank have the same temperature, as by CaCo's defaults; a variant that
ends in `2 t` has another one for the bank, so that attend takes two exponentials of a score. The dense form has the
passes of the released algorithm: normalise the bank, similarities [R, K], softmax at both temperatures, coefficients
[R, K], gradient [K, C], tangent, momentum, update.
A variant of an operation on lists of tensors is `loop`, `foreach`, `foreach, flag` or `foreach compiled`.

This module calls only what `caco_fast.ops` and `caco_fast.bank` export, so that it can run an older version of the
package.

Legend: R query and key rows, K bank rows, C channels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import normalize

from caco_fast.bank import LearnableBank
from caco_fast.ops import ema_update_, lars_step_

TEMPERATURE, OTHER_TEMPERATURE, LR, MOMENTUM = 0.08, 0.1, 3.0, 0.9
EMA_WEIGHT = 0.01
LARS = dict(lr=0.1, momentum=0.9, weight_decay=1.5e-6, trust=0.001)

PARTS = ("bank_attend", "bank_select", "bank_step")
BANK_OPERATIONS = ("bank", *PARTS)  # `bank` is the three parts, one after the other
LIST_OPERATIONS = ("ema_update", "lars_step")
DENSE, LOOP = "dense eager", "loop"

Call = Callable[[], None]


class Outcome(NamedTuple):
    """What an operation made, to be compared with another variant's."""

    tensors: list[Tensor]
    positives: Tensor | None = None  # [R]: the bank rows that were chosen, if they decide rows of the tensors


@dataclass
class Work:
    """One variant of an operation."""

    parts: dict[str, Call]  # in the order in which they run
    outcome: Callable[[], Outcome]

    def run(self) -> None:
        for part in self.parts.values():
            part()


class BankInputs:
    def __init__(self, rows: int, bank_rows: int, channels: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def unit(count: int) -> Tensor:
            return normalize(torch.randn(count, channels, generator=generator, device=device), dim=1)

        self.queries, self.keys = unit(rows), unit(rows)  # [R, C]
        self.bank, self.velocity = unit(bank_rows), torch.zeros(bank_rows, channels, device=device)  # [K, C]
        self.row_weight = torch.full((rows,), 2 / rows, device=device)  # [R], two views of R / 2 images


def temperatures(variant: str) -> tuple[float, float]:
    """The temperatures of the loss and of the bank."""
    return TEMPERATURE, OTHER_TEMPERATURE if variant.endswith("2 t") else TEMPERATURE


def bank_work(operation: str, variant: str, inputs: BankInputs) -> Work:
    """The bank's step, or one part of it. The parts that `bank_step` needs have run before."""
    kept: dict[str, Tensor] = {}
    if variant.startswith("dense"):
        transform = functools.partial(torch.compile, dynamic=False) if "compiled" in variant else lambda call: call
        calls = dense_parts(inputs, kept, temperatures(variant)[1], transform)
    else:
        backend, dtype = variant.split()[:2]
        calls = package_parts(inputs, kept, temperatures(variant), backend, getattr(torch, dtype))
    parts = dict(zip(PARTS, calls, strict=True))
    if operation == "bank_step":
        parts["bank_attend"]()
        parts["bank_select"]()
    if operation != "bank":
        parts = {operation: parts[operation]}

    def outcome() -> Outcome:
        if operation == "bank_attend":
            return Outcome([kept["mean row"].float()])
        if operation == "bank_select":
            # Rows of nearly the same similarity may change places, so not the indices are compared.
            return Outcome([(inputs.keys * normalize(inputs.bank, dim=1)[kept["positive"]]).sum(dim=1)])
        return Outcome([inputs.velocity], kept["positive"])

    return Work(parts, outcome)


def dense_attend(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(unit rows [K, C], similarities [R, K], lse [R], mean row [R, C])"""
    unit = normalize(bank, dim=1)
    similarity = queries @ unit.T
    lse = torch.logsumexp(similarity / TEMPERATURE, dim=1)
    # What autograd does with the loss: softmax [R, K] and a product with the bank.
    return unit, similarity, lse, torch.softmax(similarity / TEMPERATURE, dim=1) @ unit


def dense_select(keys: Tensor, bank: Tensor) -> Tensor:
    return (keys @ normalize(bank, dim=1).T).argmax(dim=1)  # [R]


def dense_update_(
    inputs: tuple[Tensor, ...], temperature: float, unit: Tensor, similarity: Tensor, positive: Tensor
) -> None:
    queries, bank, velocity, row_weight = inputs
    rows = torch.arange(len(queries), device=queries.device)
    p = torch.softmax(similarity / temperature, dim=1)  # [R, K]
    p[rows, positive] = 1 - p[rows, positive]
    pull = p * row_weight.unsqueeze(1)  # [R, K]
    along = (pull * similarity).sum(dim=0)  # [K]
    tangent = pull.T @ queries - along.unsqueeze(1) * unit  # [K, C]
    gradient = -tangent / bank.norm(dim=1, keepdim=True) / temperature
    velocity.mul_(MOMENTUM).add_(gradient)
    bank.sub_(LR * velocity)


def dense_parts(
    inputs: BankInputs, kept: dict[str, Tensor], bank_temperature: float, transform: Callable[[Callable], Callable]
) -> tuple[Call, Call, Call]:
    """The three parts in plain torch. The step takes attend's similarities, as in the released code."""
    attend_part, select_part, update_part_ = map(transform, (dense_attend, dense_select, dense_update_))
    changed = (inputs.queries, inputs.bank, inputs.velocity, inputs.row_weight)

    def attend() -> None:
        kept["unit"], kept["similarity"], _, kept["mean row"] = attend_part(inputs.queries, inputs.bank)

    def select() -> None:
        kept["positive"] = select_part(inputs.keys, inputs.bank)

    def step() -> None:
        update_part_(changed, bank_temperature, kept["unit"], kept["similarity"], kept["positive"])

    return attend, select, step


def package_parts(
    inputs: BankInputs, kept: dict[str, Tensor], temperatures: tuple[float, float], backend: str, dtype: torch.dtype
) -> tuple[Call, Call, Call]:
    """The three parts by a LearnableBank, as a run calls them, with rows of the given dtype and a bank in f32."""
    queries, keys = inputs.queries.to(dtype), inputs.keys.to(dtype)
    bank = LearnableBank(*inputs.bank.shape, momentum=MOMENTUM, backend=backend).to(inputs.bank.device)
    bank.bank.copy_(inputs.bank)
    inputs.bank, inputs.velocity = bank.bank, bank.velocity
    bank.attend(queries[:1], temperatures[0])  # Here the kernels' copy of the bank is made, which a run keeps.

    def attend() -> None:
        (_, kept["lse"]), kept["mean row"] = bank.attend(queries, temperatures)

    def select() -> None:
        kept["positive"], _ = bank.select(keys)

    def step() -> None:
        bank.record(queries, kept["lse"], temperatures[1], inputs.row_weight, kept["positive"].unsqueeze(1))
        bank.step(LR)

    return attend, select, step


@functools.cache
def encoder_shapes() -> list[torch.Size]:
    """The shapes of the parameters of ResNet-50 with CaCo's projector."""
    width, dim = 2048, 256
    with torch.device("meta"):
        backbone = torchvision.models.resnet50()
        backbone.fc = nn.Identity()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width))]
        encoder = nn.Sequential(backbone, *hidden, nn.Linear(width, dim, bias=False))
    return [parameter.shape for parameter in encoder.parameters()]


class ListInputs:
    """Parameters of two encoders in channels_last, gradients, velocities, and an overflow flag that is not set."""

    def __init__(self, shapes: list[torch.Size], device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(shape: torch.Size) -> Tensor:
            values = 0.1 * torch.randn(shape, generator=generator, device=device)
            return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values

        self.params, self.keys, self.velocities, self.grads = ([draw(s) for s in shapes] for _ in range(4))
        self.flag = torch.zeros((), device=device)  # []

    def double(self) -> "ListInputs":
        """A copy in f64."""
        copy = ListInputs([], str(self.flag.device))
        for name in ("params", "keys", "velocities", "grads"):
            setattr(copy, name, [tensor.double() for tensor in getattr(self, name)])
        return copy


def list_work(operation: str, variant: str, inputs: ListInputs) -> Work:
    update, loop = (ema_update_, ema_loop_) if operation == "ema_update" else (lars_step_, lars_loop_)
    if variant == LOOP:
        function, options = loop, {}
    else:
        function = torch.compile(update, dynamic=False) if variant.endswith("compiled") else update
        options = {"skip": inputs.flag if variant.endswith("flag") else None}
    if operation == "ema_update":
        call = functools.partial(function, inputs.keys, inputs.params, EMA_WEIGHT, **options)
        changed = inputs.keys
    else:
        call = functools.partial(function, inputs.params, inputs.grads, inputs.velocities, **LARS, **options)
        changed = inputs.params + inputs.velocities
    return Work({operation: call}, lambda: Outcome(changed))


def ema_loop_(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    for average, value in zip(averages, values, strict=True):
        average.mul_(1 - weight).add_(value, alpha=weight)


def lars_loop_(
    params: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float,
) -> None:
    for w, g, v in zip(params, grads, velocities, strict=True):
        d = g
        if w.ndim > 1:
            d = g + weight_decay * w
            ratio = trust * w.norm() / d.norm()
            d = d * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        v.mul_(momentum).add_(d)
        w.sub_(v, alpha=lr)
