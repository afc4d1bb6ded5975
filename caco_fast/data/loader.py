"""What every training loader gives, whichever way it reads and augments.

Legend: B images of this rank in one step, V views of an image, ch channels, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from caco_fast.data.source import Source


@dataclass
class Batch:
    """This rank's share of one training step."""

    # V tensors, in the order of the view entries, each entry repeated `count` times; normalised.
    views: list[Tensor]  # [B, ch, h, w] of the dtype that the loader was built with
    # Positions in the training set, as drawn; where a bad image was replaced, that of its replacement.
    index: Tensor  # [B] int64


class TrainLoader(Protocol):
    """Batches of augmented views, a pure function of (seed, epoch, step) whatever the number of workers or ranks.

    The images of step s are `epoch_order(seed, epoch, N)[s * batch_size : (s + 1) * batch_size]` over all ranks; rank r
    takes the r-th contiguous share of them. What is left after the last whole batch is dropped.
    """

    # What kind of random numbers makes the views: a run can't change it in mid-epoch. See `draws_name`.
    draws: str
    # Which images there are, in which order; a run can't change that in mid-epoch either. See `images_name`.
    images: str

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def bad_images(self) -> dict[str, str]:
        """Name -> reason of every image found unreadable so far, by this rank, or by others before an exchange."""
        ...

    def exchange_bad_images(self) -> None:
        """Makes those of every rank known to all, each of which calls, between two epochs.

        Raises UserError on every rank if more than `bad_image_limit` of the training set is unreadable.
        """
        ...

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches first_step, first_step + 1, ... of an epoch; those before are neither read nor decoded.

        `epoch` may be negative: the bank's initialisation uses orders of its own (-1, -2, ...).
        Raises UserError once this rank knows more than `bad_image_limit` of the training set as unreadable.
        """
        ...

    def close(self) -> None:
        """Ends worker processes and frees memory; the loader can't be used afterwards."""
        ...


def draws_name(kind: str, jitter: str) -> str:
    """A name for what decides the views beside seed and recipe: the kind of draws, and how the jitter is computed."""
    return f"{kind} draws, {jitter} jitter"


def images_name(source: Source) -> str:
    """A name for the list of images that the positions of an epoch refer to."""
    return f"{len(source)} images, list {source.list_hash()[:8]}"
