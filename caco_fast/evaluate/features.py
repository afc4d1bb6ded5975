"""The features of a frozen encoder over a data set. Legend: N rows of this rank, D feature size."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from caco_fast.errors import UserError


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
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    features, labels, indices = [], [], []
    try:
        with autocast or nullcontext():
            for images, label, index in loader:
                features.append(encoder(images.to(device, non_blocking=True)).float())  # [b, D]
                labels.append(label.to(device, torch.int64, non_blocking=True))
                indices.append(index.to(device, torch.int64, non_blocking=True))
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not features:
        raise UserError("evaluation: found no images, expected at least one")
    return torch.cat(features), torch.cat(labels), torch.cat(indices)
