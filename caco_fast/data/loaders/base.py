"""The parts that all loaders share: batches, the order of the images, unreadable images, the base of training loaders.

The order is a function of (seed, epoch, step) alone, and so is the random seed of every view.

Legend: N images in the training set, B images of this rank in one step, V views of an image, ch channels, h x w pixels.
"""

import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.config import DataConfig, ViewConfig
from caco_fast.data.sources.base import Source
from caco_fast.distributed import all_gather_objects
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

LISTED = 20
_ORDER, _VIEW, _SHARE = range(3)


@dataclass
class Batch:
    """The share of this rank in one training step."""

    # V tensors, in the order of the view entries, each entry repeated `count` times; normalised.
    views: list[Tensor]  # [B, ch, h, w] of the dtype that the loader was built with
    # Positions in the training set, as drawn. If a bad image was replaced: the position of its replacement.
    index: Tensor  # [B] int64


class RawBatch(NamedTuple):
    """A batch whose pixels are still uint8: a quarter of the bytes to copy between processes and devices."""

    images: list[Tensor]  # V tensors [B, ch, h, w] uint8; empty if no good image was found
    index: Tensor  # [B] int64
    bad: list[tuple[str, str]]  # (name, reason) of each image that could not be read
    error: str = ""  # a line for the user; a UserError raised in a worker would arrive with a stack trace in its text


class TrainLoader(ABC):
    """Batches of augmented views, a pure function of (seed, epoch, step) for any number of workers or ranks.

    The images of step s are `epoch_order(seed, epoch, N)[s * batch_size : (s + 1) * batch_size]` over all ranks; rank r
    takes the r-th contiguous share of them. Images after the last whole batch are dropped.
    """

    # The random number system that makes the views, as checkpoints name it. See `random_numbers_id`.
    random_numbers: ClassVar[str]

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        views: Sequence[ViewConfig],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`batch_size` counts the images of all ranks; `dtype` is the dtype of the views."""
        self.steps_per_epoch = steps_per_epoch(len(source), batch_size, world_size)
        # A run can change neither of these two in the middle of an epoch.
        self.draws = random_numbers_id(self.random_numbers, config.jitter)
        self.images = image_list_id(source)
        self._length, self._seed, self._jitter = len(source), seed, config.jitter
        self._share = (batch_size, rank, world_size)
        self._device, self._dtype = torch.device(device), dtype
        self._mean, self._std = list(config.mean or source.mean), list(config.std or source.std)
        # The small addend keeps 0.29 * 100 from becoming 28.
        self._bad = BadImages(int(config.bad_image_limit * len(source) + 1e-6), len(source))
        self._closed = False

    @property
    def length(self) -> int:
        """N."""
        return self._length

    @property
    def bad_images(self) -> dict[str, str]:
        """Name -> reason of every image found unreadable so far, by this rank, or by others before an exchange."""
        return self._bad.reasons

    def exchange_bad_images(self) -> None:
        """Make the bad images of every rank known to all ranks; every rank calls this, between two epochs.

        Raises UserError on every rank if more than `bad_image_limit` of the training set is unreadable.
        """
        self._bad.exchange()

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """The batches first_step, first_step + 1, ... of an epoch; earlier batches are neither read nor decoded.

        `epoch` may be negative: the bank's initialisation uses orders of its own (-1, -2, ...).
        Raises UserError once this rank knows more than `bad_image_limit` of the training set as unreadable.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        order = epoch_order(self._seed, epoch, self._length)
        steps = range(first_step, self.steps_per_epoch)
        yield from self._batches(epoch, (step_share(order, step, *self._share) for step in steps))

    def batches_of(self, epoch: int, shares: Iterable[np.ndarray]) -> Iterator[Batch]:
        """The batches of chosen positions as this epoch shows them. No share [B] is larger than a batch."""
        yield from self._batches(epoch, iter(shares))

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each [ch] float32, on the device."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=self._device) for values in (self._mean, self._std)
        )
        return mean, std

    @abstractmethod
    def _batches(self, epoch: int, shares: Iterator[np.ndarray]) -> Iterator[Batch]:
        """The batch of each share, in order; a share [B] int64 holds positions in the training set."""

    def close(self) -> None:
        """End worker processes and free memory; the loader can't be used afterwards."""
        self._closed = True


def random_numbers_id(kind: str, jitter: str) -> str:
    """A name for what decides the views besides seed and recipe: the random numbers, and how the jitter is computed.

    Checkpoints hold it, so its wording never changes.
    """
    return f"{kind} draws, {jitter} jitter"


def image_list_id(source: Source) -> str:
    """A name for the list of images that the positions of an epoch refer to. Checkpoints hold it."""
    return f"{len(source)} images, list {source.list_hash()[:8]}"


class BadImages:
    """The unreadable images found so far. Each is logged once, and too many of them end the run."""

    def __init__(self, limit: int, total: int) -> None:
        self.limit, self.total = limit, total
        self.reasons: dict[str, str] = {}

    def add(self, found: Sequence[tuple[str, str]]) -> None:
        """Raise UserError, with the list, once more than `limit` of the `total` images are known as unreadable."""
        for name, reason in found:
            if name not in self.reasons:
                self.reasons[name] = reason
                log.warning("bad image %s: %s", name, reason)
        if len(self.reasons) > self.limit:
            raise UserError(self._report())

    def exchange(self) -> None:
        """Tell every rank what the others found; every rank calls this. UserError on all ranks if the sum is too much.

        An image counts once however many ranks have met it, and is not logged again.
        """
        for found in all_gather_objects(self.reasons):
            self.reasons = found | self.reasons
        self.add([])

    def _report(self) -> str:
        lines = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        with tempfile.NamedTemporaryFile(
            "w", prefix="caco_fast_bad_images_", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write("\n".join(lines) + "\n")
        return "\n  ".join(
            [
                f"{len(lines)} of {self.total} training images can't be read, more than the {self.limit} that "
                f"data.bad_image_limit allows; repair or remove them, or raise the limit. All of them: {file.name}",
                *lines[:LISTED],
                *([f"... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []),
            ]
        )


def none_readable(count: int) -> UserError:
    """The error for a training set of which no image can be read."""
    return UserError(f"none of the {count} training images can be read; check data.path")


def _seed_sequence(purpose: int, *numbers: int) -> np.random.SeedSequence:
    # SeedSequence takes no negative numbers, but epochs below zero exist (the bank's initialisation).
    return np.random.SeedSequence([purpose, *(number % 2**64 for number in numbers)])


def view_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """The seed of the random numbers that make one view of one image in one epoch."""
    return int(_seed_sequence(_VIEW, seed, epoch, index, view).generate_state(1)[0])


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which an epoch visits the training set: a permutation [N] int64."""
    return np.random.default_rng(_seed_sequence(_ORDER, seed, epoch)).permutation(length)


def steps_per_epoch(length: int, batch_size: int, world_size: int = 1) -> int:
    """Whole batches in `length` images; UserError if there is none, or if ranks can't share a batch evenly."""
    if batch_size < 1:
        raise UserError(f"batch_size: found {batch_size}, expected 1 or more")
    if batch_size % world_size:
        raise UserError(
            f"the batch size {batch_size} can't be shared evenly by {world_size} ranks; "
            f"take {max(1, batch_size // world_size) * world_size}, or another number of ranks"
        )
    if length < batch_size:
        raise UserError(
            f"the training set has {length} images, fewer than one batch of {batch_size}; "
            f"lower the batch size to {length} or less, or add images"
        )
    return length // batch_size


def step_share(order: np.ndarray, step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Rank's contiguous share of the global batch `order[step * batch_size : (step + 1) * batch_size]`."""
    share = batch_size // world_size
    start = step * batch_size + rank * share
    return order[start : start + share]


def evaluation_share(length: int, share: float, rank: int, world_size: int) -> np.ndarray:
    """Rank's contiguous part of a fixed random `share` of `length` images, in ascending order."""
    if not 0 < share <= 1:
        raise UserError(f"share of the images to evaluate on: found {share}, expected above 0 and at most 1")
    kept = max(1, round(share * length)) if length else 0
    chosen = np.random.default_rng(_seed_sequence(_SHARE)).permutation(length)[:kept]
    return np.sort(chosen)[rank * kept // world_size : (rank + 1) * kept // world_size]
