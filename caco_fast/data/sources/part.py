"""A part of a source: the images that are held out of training, the others, or an imbalanced part of these.

Legend: N images, M of the part.
"""

import hashlib
import math
from dataclasses import replace

import numpy as np
from PIL import Image

from caco_fast.data.config import DataConfig
from caco_fast.data.sources.base import MAX_PIXELS, ArraySource, Source
from caco_fast.errors import UserError

# Classes share a part of their images by tenths of all classes: each of CIFAR-10 alone, those of CIFAR-100 by tens.
GROUPS = 10


class Part:
    """The images of a source at some positions; see `Source` for what it gives."""

    def __init__(self, source: Source, positions: np.ndarray) -> None:
        """`positions` [M] int64, ascending."""
        self.source, self.positions = source, positions
        self.classes, self.channels = source.classes, source.channels
        self.mean, self.std = source.mean, source.std
        # Of files; an array has no limit.
        self.max_pixels = getattr(source, "max_pixels", MAX_PIXELS)
        # Whether only PIL may read the images.
        self.by_pil = getattr(source, "by_pil", False)

    def __len__(self) -> int:
        return len(self.positions)

    def image(self, index: int) -> Image.Image | np.ndarray:
        return self.source.image(int(self.positions[index]))

    def encoded(self, index: int) -> bytes:
        return self.source.encoded(int(self.positions[index]))

    def label(self, index: int) -> int:
        return self.source.label(int(self.positions[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.positions[index]))

    def list_hash(self) -> str:
        return hashlib.sha256(self.source.list_hash().encode() + self.positions.astype("<i8").tobytes()).hexdigest()


def take(source: Source, positions: np.ndarray) -> Source:
    """The images at `positions` [M]. Those of a set in memory stay one, for the loaders that need no decoding."""
    if not isinstance(source, ArraySource):
        return Part(source, positions)
    title = f"{source.title}, part {hashlib.sha256(positions.astype('<i8').tobytes()).hexdigest()[:8]}"
    return replace(source, title=title, images=source.images[positions], labels=source.labels[positions])


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """The images to train on, and a random share of all that is held out. The seed alone decides which."""
    count = max(1, round(share * len(source)))
    # The second number keeps these draws apart from those of other uses of the seed.
    order = np.random.default_rng([seed % 2**64, 0x48454C44]).permutation(len(source))
    return take(source, np.sort(order[count:])), take(source, np.sort(order[:count]))


def imbalanced(source: Source, config: DataConfig) -> Source:
    """The part of the training images that `data.imbalance` leaves: of class c the first int(f N_c) of a fixed shuffle.

    f = (g + 1) / G for linear, e^(g + 1 - G) for exponential, where g is the class's group of G. The part does not
    depend on `trainer.seed`, so that runs of several seeds see the same images.

    Source: CACR (arXiv 2105.03746), for CIFAR-10 and CIFAR-100.

    Raises:
        UserError: the images have no labels.
    """
    if config.imbalance == "none":
        return source
    if not source.classes:
        raise UserError(
            f"data.imbalance: found {config.imbalance}, but the training images have no labels; set it to none, or put "
            "them into one folder for each class"
        )
    classes, labels = len(source.classes), labels_of(source)
    order = np.random.default_rng(0x494D42).permutation(len(source))
    counts = np.bincount(labels, minlength=classes)
    kept = np.array([_kept(config.imbalance, label, classes, int(count)) for label, count in enumerate(counts)])
    return take(source, np.sort(first_of_classes(labels, order, kept)))


def first_of_classes(labels: np.ndarray, order: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The positions of the first `kept[c]` images of each class c in an order, [N] like the labels."""
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=len(kept))
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
    return by_class[place < np.repeat(kept, counts)]


def _kept(imbalance: str, label: int, classes: int, count: int) -> int:
    """int(f N_c) of class `label`."""
    groups = min(GROUPS, classes)
    group = label * groups // classes
    if imbalance == "linear":
        # In whole numbers, so that no product is rounded down to one image less.
        return (group + 1) * count // groups
    return int(math.exp(group + 1 - groups) * count)


def labels_of(source: Source) -> np.ndarray:  # [N] int64
    """The label of every image."""
    if isinstance(source, ArraySource):
        return source.labels
    return np.fromiter((source.label(index) for index in range(len(source))), dtype=np.int64, count=len(source))
