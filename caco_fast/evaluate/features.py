"""The features of a frozen encoder over a data set. Legend: N rows of this rank, D feature size."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

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


class SizedBatches(Protocol):
    """An iterable of (images, labels, index) batches whose number is known."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    loader: SizedBatches,
    device: torch.device | str,
    autocast: AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D], labels [N] and dataset indices [N] of a loader's (images, labels, index), on `device`.

    Features are in the dtype that the encoder computes: in bf16 those of ImageNet take 5 GiB at D 2048, in f32 10 GiB.
    The encoder runs in evaluation mode and without gradient. Each of its modules then returns to its former mode.
    Raises UserError if the loader is empty.
    """
    features, labels, indices, rows = torch.empty(0), [], [], 0
    with evaluation_mode(encoder), autocast or nullcontext():
        for images, label, index in loader:
            found = encoder(images.to(device, non_blocking=True))  # [b, D]
            labels.append(label.to(device, torch.int64, non_blocking=True))
            indices.append(index.to(device, torch.int64, non_blocking=True))
            if rows == 0:
                # In one piece from the start: a list of batches would take the memory twice when it is joined.
                features = found.new_empty(len(loader) * len(found), found.shape[1])
            elif rows + len(found) > len(features):
                # The first batch was smaller than others, because some of its images can't be read.
                features = torch.cat([features, found.new_empty(len(features) // 8 + len(found), found.shape[1])])
            features[rows : rows + len(found)] = found
            rows += len(found)
    if rows == 0:
        raise UserError("evaluation: found no images, expected at least one")
    return features[:rows], torch.cat(labels), torch.cat(indices)
