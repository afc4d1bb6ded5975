"""A part of a source: the images that are held out of training, and the others. Legend: N images, M of the part."""

import hashlib
from dataclasses import replace

import numpy as np
from PIL import Image

from caco_fast.data.sources.base import MAX_PIXELS, ArraySource, Source


class Part:
    """The images of a source at some positions; see `Source` for what it gives."""

    def __init__(self, source: Source, positions: np.ndarray) -> None:
        """`positions` [M] int64, ascending."""
        self.source, self.positions = source, positions
        self.classes, self.channels = source.classes, source.channels
        self.mean, self.std = source.mean, source.std
        # Of files; an array has no limit.
        self.max_pixels = getattr(source, "max_pixels", MAX_PIXELS)

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
