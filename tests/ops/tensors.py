"""Lists of tensors for the tests of EMA and LARS."""

import torch
from torch import Tensor

SHAPES = ((4, 3), (2, 3, 3, 3), (5,), (), (0, 2), (3, 3), (7, 4, 1, 1), (255,), (1, 1))


def draw(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    return tensors


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def assert_same(left: list[Tensor], right: list[Tensor], atol: float = 0.0) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
