"""The features of a frozen encoder over a data set. Legend: N rows of this rank, D feature size."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from caco_fast.errors import UserError


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """A context in which modules are in evaluation mode. Each module within them then returns to its former mode."""
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    device: torch.device | str,
    autocast: AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D] f32, labels [N] and dataset indices [N] of a loader's (images, labels, index), on `device`.

    The encoder runs in evaluation mode and without gradient. Each of its modules then returns to its former mode.
    Raises UserError if the loader is empty.
    """
    features, labels, indices = [], [], []
    with evaluation_mode(encoder), autocast or nullcontext():
        for images, label, index in loader:
            features.append(encoder(images.to(device, non_blocking=True)).float())  # [b, D]
            labels.append(label.to(device, torch.int64, non_blocking=True))
            indices.append(index.to(device, torch.int64, non_blocking=True))
    if not features:
        raise UserError("evaluation: found no images, expected at least one")
    return torch.cat(features), torch.cat(labels), torch.cat(indices)
