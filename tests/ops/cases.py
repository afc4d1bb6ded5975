"""Inputs for the tests of the bank operations.

Legend: R query or key rows, K bank rows, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    rows: int
    bank_rows: int
    channels: int
    dtype: torch.dtype = torch.float32  # of queries and keys
    kind: str = "random"

    def __str__(self) -> str:
        return f"R{self.rows}-K{self.bank_rows}-C{self.channels}-{str(self.dtype)[6:]}-{self.kind}"

    def make(self, seed: int = 0) -> tuple[Tensor, Tensor]:  # [R, C] in dtype, [K, C] f32
        generator = torch.Generator().manual_seed(seed)

        def unit(count: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(count, self.channels, generator=generator), dim=1)

        queries, bank = unit(self.rows), unit(self.bank_rows)
        shared = min(self.rows, self.bank_rows)
        if self.kind == "clustered":  # all rows within a few hundredths of one direction
            centre = unit(1)
            queries, bank = centre + 0.02 * queries, centre + 0.02 * bank
        elif self.kind == "duplicates":  # every bank row occurs several times
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


def unit_rows(rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, channels, dtype=torch.float64), dim=1).to(dtype)


def inputs(kind: str, rows: int, bank_rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Unit queries [R, C] and a bank [K, C] in f64; the bank's rows have lengths from 0.01 to 100, duplicates 1."""
    queries = unit_rows(rows, channels, torch.float64)
    lengths = 10 ** (4 * torch.rand(bank_rows, 1, dtype=torch.float64) - 2)
    directions = unit_rows(bank_rows, channels, torch.float64)
    if kind == "clustered":
        centres = unit_rows(5, channels, torch.float64)
        directions = centres[torch.arange(bank_rows) % 5] + 0.02 * directions
    elif kind == "duplicates":
        directions = directions[torch.arange(bank_rows) % max(bank_rows // 3, 1)]
        lengths = torch.ones_like(lengths)
    elif kind == "equal and opposite":
        directions = queries[torch.arange(bank_rows) % rows] * (1 - 2 * (torch.arange(bank_rows) % 2)).unsqueeze(1)
    elif kind == "all opposite":
        queries = queries[:1].expand(rows, channels).clone()
        directions = -queries[:1] + 0.05 * directions
    else:
        assert kind == "random"
    return queries, directions * lengths


def rounded(operand: torch.dtype, queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix operands as the kernels see them, in f64: queries, and the bank's unit rows computed in f32."""
    norm = bank.norm(dim=1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    return queries.to(operand).double(), (bank * inverse).to(operand).double()


SHAPES = {
    "R7 K13 C5": ("random", 7, 13, 5),
    "R1": ("random", 1, 9, 4),
    "K1": ("random", 4, 1, 3),
    "R1 K1 C1": ("random", 1, 1, 1),
    "duplicate rows": ("duplicates", 6, 12, 4),
    "equal and opposite rows": ("equal and opposite", 5, 11, 6),
    "clustered": ("clustered", 8, 17, 7),
}
KINDS = ("random", "clustered", "duplicates", "equal and opposite", "all opposite")
# R and K exceed the CPU's tile of 512 x 1024 and are multiples of nothing.
PRECISION_ROWS, PRECISION_BANK_ROWS, PRECISION_CHANNELS = 523, 2311, 48


def make_for_precision(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries [R, C] in dtype, bank [K, C] in f32."""
    queries, bank = inputs(kind, PRECISION_ROWS, PRECISION_BANK_ROWS, PRECISION_CHANNELS)
    return queries.to(dtype), bank.float()
