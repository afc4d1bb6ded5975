"""Parts of the tiled backends: the tile sizes, unit rows, and one matrix product.

Legend: R query or key rows, K bank rows, C channels; a tile is r rows by k bank rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from caco_fast.host import computes_in_bf16

# exp2 is several times faster than exp in CPU builds of torch, so exponents carry the factor 1/ln 2.
LOG2_E = 1.4426950408889634

# Rows of a tile, and elements of a tile of similarities: on the CPU two f32 tiles and their operands stay within the
# level-3 cache; an accelerator needs fewer, larger launches.
CPU_TILE_ROWS, CPU_TILE_ELEMENTS = 512, 512 * 1024
DEVICE_TILE_ROWS, DEVICE_TILE_ELEMENTS = 4096, 4096 * 4096
TILE_BANK_ROWS_MIN, TILE_BANK_ROWS_MAX = 128, 16384


class Tiles(NamedTuple):
    rows: list[slice]
    bank_rows: list[slice]
    scratch: Tensor  # flat, as many elements as the largest tile

    def scratch_for(self, similarity: Tensor, in_place: bool) -> Tensor:
        """Memory for what is made of a tile of similarities, in the bank's dtype: their own if that fits. [r, k]"""
        if in_place and similarity.dtype == self.scratch.dtype:
            return similarity
        return self.scratch[: similarity.numel()].view(similarity.shape)


def make_tiles(rows: int, bank: Tensor) -> Tiles:
    """Tiles that cover R x K, and scratch memory for one of them in the bank's dtype."""
    on_cpu = bank.device.type == "cpu"
    most_rows, elements = (CPU_TILE_ROWS, CPU_TILE_ELEMENTS) if on_cpu else (DEVICE_TILE_ROWS, DEVICE_TILE_ELEMENTS)
    height = min(rows, most_rows)
    width = min(bank.shape[0], max(TILE_BANK_ROWS_MIN, min(TILE_BANK_ROWS_MAX, elements // max(height, 1))))
    scratch = torch.empty(height * width, dtype=bank.dtype, device=bank.device)
    return Tiles(list(spans(rows, height)), list(spans(bank.shape[0], width)), scratch)


def spans(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, max(step, 1)):
        yield slice(start, min(start + step, total))


@contextmanager
def f32_products() -> Iterator[None]:
    """A context, or a decorator, in which a GPU does not compute f32 products in TF32. That is for encoders alone."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def unit_rows(bank: Tensor) -> tuple[Tensor, Tensor]:
    """u = w / |w| [k, C] and 1 / |w| [k, 1]. A zero row has no direction: both are 0, so it stays where it is."""
    norm = torch.linalg.vector_norm(bank, dim=1, keepdim=True)  # [k, 1]
    inverse = norm.reciprocal().masked_fill_(norm == 0, 0)
    return bank * inverse, inverse


def operand_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of the matrix products. fp16 rows are computed in f32: fp16 probabilities would underflow."""
    return torch.float32 if rows.dtype == torch.float16 else rows.dtype


# torch.mm on the CPU goes to MKL in f32, which takes a slow path on AMD processors (2.3 x slower on Zen 5) and does not
# spread products this narrow over threads; oneDNN does neither, and torch reaches it by this operator only.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

_CPU_HAS_BF16 = computes_in_bf16()


def product(left: Tensor, right: Tensor) -> Tensor:  # [m, n], [n, k] -> [m, k]
    """left right for operands of one dtype: bf16 accumulates in f32, and gives f32 where torch offers that."""
    if left.device.type == "cuda" and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.device.type == "cpu" and left.dtype == torch.bfloat16 and not _CPU_HAS_BF16:
        # Without instructions for it torch's bf16 product takes some 30 times longer. Both sum in f32.
        left, right = left.float(), right.float()
    if left.device.type == "cpu" and left.dtype == torch.float32 and _ONEDNN_LINEAR is not None:
        return _ONEDNN_LINEAR(left, right.T, None, "none", [], "")
    return torch.mm(left, right)
