"""Reading whole batches, in a worker process or in the training process.

Legend: B images of this rank in one step, V views of an image, ch channels, h x w pixels.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from caco_fast.data.order import view_seed
from caco_fast.data.settings import ViewConfig
from caco_fast.data.source import BadImageError, Source, as_pil
from caco_fast.data.views import evaluation_transform, keep_random_state, reseed, view_transform
from caco_fast.distributed import all_gather_objects
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

LISTED = 20


class RawBatch(NamedTuple):
    """What a worker sends: pixels are still uint8, a quarter of the bytes to copy between processes and devices."""

    images: list[Tensor]  # V tensors [B, ch, h, w] uint8; empty where no good image was found
    index: Tensor  # [B] int64
    bad: list[tuple[str, str]]  # (name, reason) of each image that could not be read
    error: str = ""  # a line for the user; a UserError raised in a worker would arrive with a stack trace in its text


def as_is(batch: Any) -> Any:
    """A collate function for datasets that give whole batches."""
    return batch


class ViewBatches(Dataset[RawBatch]):
    """A dataset whose items are whole batches of views; its keys are (epoch, positions)."""

    def __init__(self, source: Source, views: Sequence[ViewConfig], seed: int, bad_limit: int) -> None:
        self.source, self.seed, self.bad_limit = source, seed, bad_limit
        self.transforms = [
            transform for view in views for transform in [view_transform(view, source.channels)] * view.count
        ]
        self.sizes = [view.size for view in views for _ in range(view.count)]

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> RawBatch:
        epoch, positions = key
        shapes = [(len(positions), self.source.channels, size, size) for size in self.sizes]
        images = [torch.empty(shape, dtype=torch.uint8) for shape in shapes]
        index = torch.empty(len(positions), dtype=torch.int64)
        bad: dict[str, str] = {}
        with keep_random_state():
            for row, position in enumerate(positions):
                found = self._next_good(int(position), bad)
                if found is None:
                    return RawBatch([], index, list(bad.items()))
                index[row], image = found
                for view, transform in enumerate(self.transforms):
                    # The seed is that of the drawn image, so that nothing else changes where one is replaced.
                    reseed(view_seed(self.seed, epoch, int(position), view))
                    images[view][row] = transform(image)
        return RawBatch(images, index, list(bad.items()))

    def _next_good(self, position: int, bad: dict[str, str]) -> tuple[int, Any] | None:
        """The first readable image at `position` or after it, wrapping around; None once too many are unreadable."""
        for step in range(len(self.source)):
            candidate = (position + step) % len(self.source)
            try:
                return candidate, as_pil(self.source.image(candidate))
            except BadImageError as error:
                bad[self.source.name(candidate)] = str(error)
            if len(bad) > self.bad_limit:
                break
        return None


class EvaluationBatches(Dataset[RawBatch]):
    """A dataset whose items are batches of unaugmented images; its keys are positions, bad images are left out."""

    def __init__(self, source: Source, resize: int | None, size: int | None) -> None:
        self.source = source
        self.transform = evaluation_transform(resize, size)

    def __getitem__(self, positions: Sequence[int]) -> RawBatch:
        images, index, bad = [], [], []
        for position in map(int, positions):
            try:
                image = as_pil(self.source.image(position))
            except BadImageError as error:
                bad.append((self.source.name(position), str(error)))
                continue
            images.append(self.transform(image))
            index.append(position)
        return batch_of_one_size(images, index, bad, self.source)


def batch_of_one_size(
    images: Sequence[Tensor], index: Sequence[int], bad: list[tuple[str, str]], source: Source
) -> RawBatch:
    """The images [ch, h, w] at the positions `index` as one batch; an error in it where they differ in size."""
    shown = torch.tensor(index, dtype=torch.int64)
    for image, position in zip(images, index, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{width} x {height}" for _, height, width in (image.shape, images[0].shape)]
            error = (
                f"{source.name(position)} has {sizes[0]} pixels, {source.name(index[0])} has {sizes[1]}; "
                f"set data.eval_resize and data.eval_size, for instance to 256 and 224"
            )
            return RawBatch([], shown, bad, error)
    return RawBatch([torch.stack(list(images))] if images else [], shown, bad)


class BadImages:
    """The unreadable images found so far: named once each in the log, and an end to the run when they are too many."""

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
        """Every rank learns what the others found; each calls. UserError on all of them where together it is too much.

        An image counts once however many ranks have met it, and is not named in the log again.
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
