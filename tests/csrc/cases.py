"""Inputs for the kernel tests, and what the kernels should return, evaluated in f64.

Legend: R query or key rows, K bank rows, C channels, M positives per row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# The families of kernels, as csrc/bank.h numbers them.
PATHS = (70, 80, 90)

# Relative distance of neighbouring values just above 1: rounding to nearest is off by at most half of it.
SPACING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# Whether the path under test has bf16 operands; set by the fixture `cuda_ops`.
with_bfloat16 = True


@dataclass(frozen=True)
class Case:
    rows: int
    bank_rows: int
    channels: int
    dtype: torch.dtype = torch.float32  # of queries and keys
    kind: str = "random"

    def __str__(self) -> str:
        return f"R{self.rows}-K{self.bank_rows}-C{self.channels}-{str(self.dtype)[6:]}-{self.kind}"

    @property
    def operand(self) -> torch.dtype:
        return torch.float16 if self.dtype == torch.float16 or not with_bfloat16 else torch.bfloat16

    def make(self, seed: int = 0) -> tuple[Tensor, Tensor]:  # [R, C] in dtype, [K, C] f32
        generator = torch.Generator().manual_seed(seed)

        def unit(count: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(count, self.channels, generator=generator), dim=1)

        queries, bank = unit(self.rows), unit(self.bank_rows)
        shared = min(self.rows, self.bank_rows)
        if self.kind == "clustered":  # all rows within a few hundredths of one direction
            centre = unit(1)
            queries, bank = centre + 0.02 * queries, centre + 0.02 * bank
        elif self.kind == "duplicates":  # every bank row stands there several times
            bank = bank[torch.randint(0, max(self.bank_rows // 5, 1), (self.bank_rows,), generator=generator)]
        elif self.kind == "equal_and_opposite":
            bank[:shared] = queries[:shared]
            bank[-shared:] = -queries[:shared]
        elif self.kind == "norms":  # bank rows of lengths from 1e-3 to 1e3, queries of lengths around 10
            bank = bank * 10 ** (6 * torch.rand(self.bank_rows, 1, generator=generator) - 3)
            queries = 20 * torch.rand(self.rows, 1, generator=generator) * queries
        elif self.kind == "zero_rows":
            bank[::3] = 0
        else:
            assert self.kind == "random", self.kind
        return queries.to(self.dtype), bank


RAGGED = [
    Case(1, 1, 64),
    Case(3, 17, 80, torch.float16),
    Case(64, 64, 64, torch.bfloat16),
    Case(129, 201, 64),
    Case(128, 128, 128, torch.bfloat16),
    Case(65, 131, 128, torch.float16),
    Case(1, 515, 144),
    Case(130, 161, 256),
    Case(128, 96, 256, torch.float16),
    Case(67, 35, 512),
    Case(2, 210, 512, torch.float16),
]
ADVERSARIAL = [
    Case(70, 190, 128, dtype, kind)
    for kind in ("clustered", "duplicates", "equal_and_opposite", "norms", "zero_rows")
    for dtype in (torch.float32, torch.float16)
]


def unit_rows(bank: Tensor) -> tuple[Tensor, Tensor]:
    """u [K, C] and 1 / |w| [K, 1] in f64; both zero for a row of zeros."""
    bank = bank.double()
    norm = bank.norm(dim=1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    return bank * inverse, inverse


def rounded(case: Case, queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix operands as the kernels see them, in f64: queries, and the bank's unit rows computed in f32."""
    norm = bank.norm(dim=1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    return queries.to(case.operand).double(), (bank * inverse).to(case.operand).double()


def attend(queries: Tensor, unit: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse [R], softmax [R, K], mean row [R, C] of f64 queries and unit rows."""
    scores = queries @ unit.T / temperature
    p = torch.softmax(scores, dim=1)
    return torch.logsumexp(scores, dim=1), p, p @ unit


def step(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    p: Tensor,  # [R, K]
    temperature: float,
    lr: float,
    momentum: float,
    row_weight: Tensor,
    positives: Tensor,  # [R, M]
    positive_weight: Tensor,  # [R, M]
    project: bool,
) -> tuple[Tensor, Tensor]:
    """The bank and velocity after one step, straight from the formula, given p in f64."""
    unit, inverse = unit_rows(bank)
    similarity = queries.double() @ unit.T
    c = p.clone()
    for m in range(positives.shape[1]):
        for i in range(positives.shape[0]):
            j = positives[i, m]
            c[i, j] += positive_weight[i, m].double() * (1 - 2 * p[i, j])
    ac = row_weight.double().unsqueeze(1) * c
    gradient = -inverse / temperature * (ac.T @ queries.double() - (ac * similarity).sum(0).unsqueeze(1) * unit)
    velocity = momentum * velocity.double() + gradient
    bank = bank.double() - lr * velocity
    return (unit_rows(bank)[0] if project else bank), velocity
