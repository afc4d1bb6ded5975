"""The comparison of the compiled kernels with plain torch: problems, bounds of the error, and checks.

`caco_fast.selftest` runs the checks over fixed shapes against the reference, and every run on its own shape against the
tiled form before its first step (`caco_fast.engine.kernel_check`). Plain torch computes in f64. The operands of a
problem are exact in the kernels' dtype, so that both see the same products and the bounds are those of rounding within
the kernels.

Legend: R query or key rows, K bank rows, C channels, P padded channels, M positives per row.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caco_fast.ops import dispatch
from caco_fast.ops.bank_attend import bank_attend
from caco_fast.ops.bank_select import bank_select
from caco_fast.ops.bank_step import bank_step_

LR, MOMENTUM = 0.5, 0.9
# Half the distance between neighbouring values near 1.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Elements of the largest f64 tile that a bound is computed from.
TILE_ELEMENTS = 2**24


class Check(NamedTuple):
    name: str
    share: float  # the largest error as a share of what is allowed there; above 1 it fails
    found: str  # what is wrong if it fails

    @property
    def passed(self) -> bool:
        return self.share <= 1  # False for NaN


class Problem(NamedTuple):
    """Rows whose operands are exact, so that plain torch in f64 sees the products that the kernels see."""

    queries: Tensor  # [R, C] as given
    bank: Tensor  # [K, C]
    unit: Tensor  # [K, C] f64
    first: Tensor  # [K], the lowest index of a row that is equal
    operand: torch.dtype
    temperatures: tuple[float, ...]  # one or two; the last is that of the step
    positives: int = 1  # M
    norm: str = "implicit"
    weight_decay: float = 0.0
    exact: str = "reference"  # the backend that the kernels are compared with

    @property
    def rounding(self) -> float:
        return ROUNDING[self.operand]


def make_problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    temperatures: tuple[float, ...],
    *,
    generator: torch.Generator | None = None,
    copies: bool = False,
    **settings: Any,
) -> Problem:
    """A random problem of R rows in dtype, K bank rows and C channels.

    generator: draws the rows, on its device; by default on the CPU, so that they are the same for every device.
    copies: whether the last quarter of the bank repeats rows before it, such that there are ties. settings: further
    fields of the problem.
    """
    rows, bank_rows, channels = shape
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
    # Unit rows of 4^n elements +-2^-n, in lengths that are powers of 2: exact in every dtype, and so are their norms.
    halvings = next(n for n in (4, 3, 2, 1, 0) if 4**n <= channels)
    places = torch.rand(bank_rows, channels, **drawn).argsort(dim=1)[:, : 4**halvings]
    signs = 2.0 * torch.randint(0, 2, places.shape, **drawn) - 1
    unit = torch.zeros(bank_rows, channels, device=places.device).scatter_(1, places, signs / 2**halvings)
    lengths = 2.0 ** torch.randint(-3, 4, (bank_rows, 1), **drawn)
    queries = torch.nn.functional.normalize(torch.randn(rows, channels, **drawn), dim=1)
    near = min(rows, bank_rows)
    queries[:near] += unit[:near]  # some rows much more similar than all others, as in training
    first = torch.arange(bank_rows, device=places.device)
    repeated = bank_rows // 4 if copies else 0
    if repeated:
        first[-repeated:] = torch.randint(0, bank_rows - repeated, (repeated,), **drawn)
        unit, lengths = unit[first], lengths[first]
    queries = torch.nn.functional.normalize(queries, dim=1).to(device, dtype)
    kernels = dispatch.cuda_backend()
    assert kernels is not None
    operand = kernels.operand_dtype(queries, kernels.target_for(device))
    return Problem(
        queries.to(operand).to(dtype),
        (unit * lengths).to(device),
        unit.to(device).double(),
        first.to(device),
        operand,
        temperatures,
        **settings,
    )


def attend(
    p: Problem, backend: str, queries: Tensor, bank: Tensor, operand: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """`bank_attend` at the temperatures of a problem: lse, one or two, and mean_row."""
    temperature = p.temperatures[0] if len(p.temperatures) == 1 else (p.temperatures[0], p.temperatures[1])
    lse, mean_row = bank_attend(queries, bank, temperature, backend, operand=operand)
    return lse if isinstance(lse, tuple) else (lse,), mean_row


def check_attend(p: Problem, operand: Tensor | None = None) -> Iterator[Check]:
    found, again = (attend(p, "cuda", p.queries, p.bank, operand) for _ in range(2))
    exact = attend(p, p.exact, p.queries.double(), p.bank.double())
    allowed = torch.tensor([lse_bound(t) for t in p.temperatures], device=p.bank.device).unsqueeze(1)
    yield compare("lse", torch.stack(found[0]), torch.stack(exact[0]), allowed)
    yield compare("mean row", found[1], exact[1], mean_row_bound(p))
    yield same("attend twice the same bits", (*found[0], found[1]), (*again[0], again[1]))


def lse_bound(temperature: float) -> float:
    return 1e-5 / temperature + 1e-5


def mean_row_bound(p: Problem) -> Tensor:  # [R, C]
    """What rounding p_ij, and the score in its exponent, can do to sum_j p_ij u_j."""
    parts = []
    for queries in p.queries.double().split(max(1, TILE_ELEMENTS // len(p.bank))):
        probability = torch.softmax(queries @ p.unit.T / p.temperatures[0], dim=1)  # [r, K]
        parts.append(probability @ p.unit.abs())
    return (1.1 * p.rounding + 3e-6 / p.temperatures[0]) * torch.cat(parts) + 1e-5


def check_select(p: Problem, operand: Tensor | None = None) -> Iterator[Check]:
    index, similarity = bank_select(p.queries, p.bank, backend="cuda", operand=operand)
    _, best = bank_select(p.queries.double(), p.bank.double(), backend=p.exact)
    outside = (index < 0) | (index >= len(p.bank))
    if outside.any():
        yield Check("select", float("inf"), f"gives row {int(index[outside][0])} of {len(p.bank)}")
        return
    chosen = (p.queries.double() * p.unit[index]).sum(dim=1)
    later = index != p.first[index]
    if later.any():
        at = int(index[later][0])
        yield Check("select", float("inf"), f"takes row {at} before the equal row {int(p.first[at])}")
    else:
        yield compare("select", chosen, best, 1e-6)
    yield compare("select's similarity", similarity, chosen, 1e-6)


def check_step(p: Problem, operand: Tensor | None = None) -> Iterator[Check]:
    nearest, _ = bank_select(p.queries.double(), p.bank.double(), backend=p.exact)
    positives = torch.stack([nearest.roll(m) for m in range(p.positives)], dim=1) if p.positives else None  # [R, M]
    lse = attend(p, p.exact, p.queries.double(), p.bank.double())[0][-1].float()
    if positives is None:
        # Without positives in the bank, columns beside it may have a share of the softmax (AdCo): here a half.
        lse = lse + math.log(2)
    first, second = (None if operand is None else operand.clone() for _ in range(2))
    bank, velocity = step(p, "cuda", p.bank, positives, lse, first)
    again = step(p, "cuda", p.bank, positives, lse, second)
    exact_bank, exact_velocity = step(p, p.exact, p.bank.double(), positives, lse)
    allowed = velocity_bound(p, lse)
    yield compare("velocity", velocity, exact_velocity, allowed)
    moved = p.bank.double() - LR * exact_velocity
    of_bank = LR * allowed + 1e-6 * moved.abs().amax()
    if p.norm == "project":
        length, unit = moved.norm(dim=1, keepdim=True), exact_bank.abs()
        of_bank = 1.1 * (of_bank + (of_bank * unit).sum(dim=1, keepdim=True) * unit) / length + 1e-6
    yield compare("bank", bank, exact_bank, of_bank)
    yield same("step twice the same bits", (bank, velocity), again)
    if first is not None:
        # The copy that the kernels of the next step read.
        written, exact = first[:, : bank.shape[1]], torch.nn.functional.normalize(bank.double(), dim=1)
        yield compare("unit rows", written, exact, 1.01 * p.rounding * exact.abs() + 1e-6)


def step(
    p: Problem, backend: str, bank: Tensor, positives: Tensor | None, lse: Tensor, operand: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The new bank and velocity, from copies. An operand is written in place."""
    bank = bank.clone()
    velocity = torch.full_like(bank, 0.01)
    bank_step_(
        bank,
        velocity,
        p.queries.double() if bank.dtype == torch.float64 else p.queries,
        lse,
        temperature=p.temperatures[-1],
        lr=LR,
        momentum=MOMENTUM,
        row_weight=torch.full_like(lse, 1 / len(p.queries)),
        positives=positives,
        norm=p.norm,
        weight_decay=p.weight_decay,
        backend=backend,
        operand=operand,
    )
    return bank, velocity


def velocity_bound(p: Problem, lse: Tensor) -> Tensor:  # [K, C]
    """What rounding a_i p_ij and q_i can do to G_j = sum_i a_i p_ij q_i, and through it to the tangent."""
    temperature, queries, rows = p.temperatures[-1], p.queries.double(), len(p.queries)
    parts = []
    for unit in p.unit.split(max(1, TILE_ELEMENTS // max(rows, 1))):
        pull = torch.exp(queries @ unit.T / temperature - lse.double().unsqueeze(1)) / rows  # [R, k]
        parts.append(2 * p.rounding * (pull.T @ queries.abs()))
    allowed, unit = torch.cat(parts), p.unit.abs()
    allowed = allowed + (allowed * unit).sum(dim=1, keepdim=True) * unit + 1e-6 / rows
    return allowed / (temperature * p.bank.double().norm(dim=1, keepdim=True)) + 1e-6


def compare(name: str, found: Tensor, exact: Tensor, allowed: Tensor | float) -> Check:
    """The error at the place where it is the largest share of what is allowed there. A NaN is larger than all."""
    error = (found.double() - exact).abs()
    bound = torch.as_tensor(allowed, dtype=torch.float64, device=error.device).expand_as(error)
    at = int((error / bound).argmax())
    largest, there = float(error.flatten()[at]), float(bound.flatten()[at])
    return Check(name, largest / there, f"differs by {largest:.1e}, where {there:.1e} is allowed")


def same(name: str, found: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> Check:
    equal = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return Check(name, 0.0 if equal else float("inf"), "two calls with the same rows differ")


class BankUse(NamedTuple):
    """What the steps of a method ask of the bank operations on one rank."""

    setting: str  # the setting that chooses the backend, such as "caco.backend"
    backend: str
    rows: int  # R
    bank_rows: int  # K
    channels: int  # C
    temperatures: tuple[tuple[float, ...], ...]  # of each kind of call of `bank_attend`
    step_temperature: float | None = None  # None: `bank_step_` is not called
    dtype: torch.dtype = torch.float32  # of the queries; keys are f32
    positives: int = 1  # M
    norm: str = "implicit"
    weight_decay: float = 0.0  # of the bank
    reason: str | None = None  # why the method asks for this backend, if no setting names it
    selects: bool = False  # whether `bank_select` is called; it is wherever `bank_step_` is
