"""What the operations on lists of tensors share: their backends and checks.

`reference` goes tensor by tensor and reads like the formula. `foreach` is torch's multi-tensor operations, which
process all tensors in a few launches; `auto` takes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "foreach")


def resolve(op: str, backend: str, device: torch.device) -> str:
    """The backend that runs, which is the named one if there is a name. Both run on every device."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")
    return "foreach" if backend == "auto" else backend


def check_lengths(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    (first, expected), *others = ((name, len(tensors)) for name, tensors in lists.items())
    for name, found in others:
        if found != expected:
            raise ValueError(f"{op}: {name}: found {found} tensors, expected {expected} as in {first}")
