"""A similarity and its index as one int64, so that one maximum or top-k finds both, ties to the lowest index."""

import torch
from torch import Tensor

# The lower half holds the index reversed: of equal similarities the lowest index gives the largest number.
LOW_BITS = 2**32 - 1


def pack(similarity: Tensor, index: Tensor) -> Tensor:
    """int64 in the order of (similarity, -index). similarity: f32; index: in [0, 2^32).

    The bits of a float order like an integer once those of the negative ones are flipped; adding 0 makes -0 into 0.
    """
    bits = (similarity + 0.0).contiguous().view(torch.int32)
    return (in_order(bits).long() << 32) | (LOW_BITS - index)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(similarity, index)"""
    return in_order((packed >> 32).int()).view(torch.float32), LOW_BITS - (packed & LOW_BITS)


def in_order(bits: Tensor) -> Tensor:
    """Flip all bits but the sign's where it is set; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
