"""What all ranks must agree on: settings, code and images before the first step, weights at each checkpoint.

Every rank raises the same error, because a rank that raised alone would leave the others waiting.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from caco_fast.bank import ShardedBank
from caco_fast.distributed import all_gather_objects, broadcast_object, is_distributed, rank
from caco_fast.errors import UserError
from caco_fast.methods import Method
from caco_fast.models import EncoderPair

Result = TypeVar("Result")

# Settings that may differ between ranks: places and resources of a machine. The images there are compared themselves.
OF_A_RANK = ("data.path", "data.root", "data.workers", "data.prefetch", "trainer.cpu_threads", "run.", "wandb.")


def together(action: Callable[[], Result]) -> Result:
    """The result of an action that holds no collective (collective).

    Raises:
        UserError: the first one that any rank's action raised, on all ranks.
    """
    result, line = None, None
    try:
        result = action()
    except UserError as error:
        line = str(error)
    lines = all_gather_objects(line)
    for number, found in enumerate(lines):
        if found is not None:
            raise UserError(found if len(set(lines)) == 1 else f"on rank {number}: {found}") from None
    return result  # type: ignore[return-value]


def on_rank_0(action: Callable[[], Result]) -> Result:
    """What an action of rank 0 returns or raises, on every rank (collective)."""
    return broadcast_object(together(lambda: action() if rank() == 0 else None))


def require_equal_starts(found: Mapping[str, Any], advice: str) -> None:
    """Compare what each rank starts with, by its name (collective).

    Raises:
        UserError: it differs. The line names what, and on which rank.
    """
    of_ranks = all_gather_objects(dict(found))
    for number, theirs in enumerate(of_ranks):
        # Sorted, so that every rank names the same one.
        for name in sorted(of_ranks[0].keys() | theirs.keys()):
            first, other = of_ranks[0].get(name), theirs.get(name)
            if first != other and not name.startswith(OF_A_RANK):
                raise UserError(f"{name}: found {other} on rank {number}, expected {first} as on rank 0; {advice}")


def checksum(tensors: list[Tensor]) -> int:
    """A sum over the bytes of all values, in which each tensor and each byte of a value has its weight.

    Equal tensors have equal sums, and different ones almost surely do not. The host waits for the device once.
    """
    if not tensors:
        return 0
    # Whole numbers, because their sum does not depend on its order, and counts a NaN like any other value.
    sums = [value.detach().reshape(-1).view(torch.uint8).view(-1, value.element_size()) for value in tensors]
    places = [torch.arange(1, 1 + part.shape[1], device=part.device) for part in sums]
    totals = [(part.sum(dim=0, dtype=torch.int64) * place).sum() for part, place in zip(sums, places)]
    weights = torch.arange(1, 1 + len(totals), device=totals[0].device)
    return int((torch.stack(totals) * weights).sum())


def require_equal_ranks(encoders: EncoderPair, method: Method, when: str, latest: Path | None) -> None:
    """Compare the weights of the encoders, and the state of the method that every rank holds (collective).

    Buffers of BatchNorm are left out, since they change no weight. Every rank raises alike.

    Raises:
        UserError: they differ.
    """
    if not is_distributed():
        return
    parts: dict[str, list[Tensor]] = {
        "query encoder": list(encoders.query.parameters()),
        "key encoder": list(encoders.key.parameters()) if encoders.key is not None else [],
        "method": list(_replicated(method)),
    }
    of_ranks = all_gather_objects({name: checksum(tensors) for name, tensors in parts.items()})
    for number, found in enumerate(of_ranks):
        different = [name for name in parts if found[name] != of_ranks[0][name]]
        if different:
            raise UserError(
                f"rank {number} no longer has the weights of rank 0 {when} ({', '.join(different)}); the last "
                f"checkpoint is {latest or 'none'}; look for a faulty device, or a step that differs between ranks"
            )


def _replicated(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a method that every rank holds in whole."""
    if isinstance(module, ShardedBank):
        return
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    for child in module.children():
        yield from _replicated(child)
