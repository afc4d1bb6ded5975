"""Inputs for the tests of the bank operations.

Legend: R query rows, K bank rows, C channels.
"""

import torch
from torch import Tensor


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
