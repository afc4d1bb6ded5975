"""Making and loading the [K, C] buffers, with one clear line when that can't work.

Legend: K bank rows, C channels.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.host import available_bytes
from caco_fast.ops.tiling import spans

# How torch words a refused allocation on the CPU, which is a plain RuntimeError there.
REFUSALS = ("can't allocate memory", "not enough memory")


# Rows that are drawn at a time.
DRAW_ROWS = 65536


def random_unit_rows(size: int, dim: int, generator: torch.Generator | None, own: range | None = None) -> Tensor:
    """f32 rows drawn evenly from the unit sphere, on the generator's device: of all K those in `own`, or all. [k, C]

    All K are drawn, a block at a time, so that a row does not depend on who keeps it.
    """
    own = range(size) if own is None else own
    device = generator.device if generator is not None else None
    rows = torch.empty(len(own), dim, device=device, dtype=torch.float32)
    for span in spans(size, DRAW_ROWS):
        drawn = torch.randn(span.stop - span.start, dim, generator=generator, device=device, dtype=torch.float32)
        here, there = overlap(own, range(span.start, span.stop))
        rows[here] = drawn[there]
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def overlap(first: range, second: range) -> tuple[slice, slice]:
    """The places of the common numbers of both ranges, in the first range and in the second."""
    start, stop = max(first.start, second.start), min(first.stop, second.stop)
    stop = max(start, stop)
    return slice(start - first.start, stop - first.start), slice(start - second.start, stop - second.start)


@contextmanager
def enough_memory(what: str, size: int, dim: int, copies: int) -> Iterator[None]:
    """A block that makes `copies` f32 tensors [K, C]: a UserError names the bytes if they do not fit."""
    if size < 1 or dim < 1:
        raise UserError(f"{what}: found size {size} and dim {dim}, expected at least 1 each")
    expected = copies * size * dim * 4
    message = f"{what} of {size:,} x {dim:,} needs {expected:,} bytes, more than the memory"
    advice = "choose a smaller bank size or dim"
    # Linux grants memory that is not there and ends the process when it is touched, so ask first.
    free = available_bytes() if torch.get_default_device().type == "cpu" else None
    if free is not None and expected > free:
        raise UserError(f"{message} that is free ({free:,} bytes): {advice}")
    with refusal_in_words(message, advice):
        yield


@contextmanager
def moved(what: str, size: int, dim: int, copies: int) -> Iterator[None]:
    """A block that moves such tensors to another device: a UserError names the bytes if they do not fit there."""
    message = f"{what} of {size:,} x {dim:,} needs {copies * size * dim * 4:,} bytes, more than the memory"
    with refusal_in_words(message, "choose a smaller bank size or dim, or more GPUs"):
        yield


@contextmanager
def refusal_in_words(message: str, advice: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in REFUSALS):
            raise UserError(f"{message} that torch could get: {advice}") from None
        raise


def check_loaded_shape(state: Mapping[str, Any], key: str, expected: tuple[int, ...], what: str) -> None:
    """Refuse a saved bank of another size."""
    saved = state.get(key)
    if isinstance(saved, Tensor) and saved.shape != expected:
        raise UserError(
            f"{what}: the saved {key!r} has shape {list(saved.shape)}, expected {list(expected)}: "
            "set size and dim as they were when it was saved"
        )
