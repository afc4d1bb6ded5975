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

# How torch words a refused allocation on the CPU, which is a plain RuntimeError there.
REFUSALS = ("can't allocate memory", "not enough memory")


def random_unit_rows(size: int, dim: int, generator: torch.Generator | None) -> Tensor:
    """f32 rows drawn evenly from the unit sphere, on the generator's device. [K, C]"""
    device = generator.device if generator is not None else None
    rows = torch.randn(size, dim, generator=generator, device=device, dtype=torch.float32)
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


@contextmanager
def enough_memory(what: str, size: int, dim: int, copies: int) -> Iterator[None]:
    """Where `copies` f32 tensors [K, C] are made: a UserError that names the bytes if they do not fit."""
    if size < 1 or dim < 1:
        raise UserError(f"{what}: found size {size} and dim {dim}, wanted at least 1 each")
    wanted = copies * size * dim * 4
    message = f"{what} of {size:,} x {dim:,} wants {wanted:,} bytes, more than the memory"
    advice = "choose a smaller bank size or dim"
    # Linux grants memory that is not there and ends the process when it is touched, so ask first.
    free = available_bytes() if torch.get_default_device().type == "cpu" else None
    if free is not None and wanted > free:
        raise UserError(f"{message} that is free ({free:,} bytes): {advice}")
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in REFUSALS):
            raise UserError(f"{message} that torch could get: {advice}") from None
        raise


def check_loaded_shape(state: Mapping[str, Any], key: str, buffer: Tensor, what: str) -> None:
    """Refuse a saved bank of another size."""
    saved = state.get(key)
    if isinstance(saved, Tensor) and saved.shape != buffer.shape:
        raise UserError(
            f"{what}: the saved {key!r} has shape {list(saved.shape)}, wanted {list(buffer.shape)}: "
            "set size and dim as they were when it was saved"
        )
