"""A source whose images get the number of channels that a backbone takes: grey as three equal ones, colour as grey.

Legend: N images, h x w pixels, ch channels.
"""

from dataclasses import replace

import numpy as np
from PIL import Image

from caco_fast.data.sources.base import ArraySource, Source, as_pil
from caco_fast.data.sources.part import Part

MODES = {1: "L", 3: "RGB"}
# Of red, green and blue in PIL's grey (ITU-R 601-2).
LUMA = (0.299, 0.587, 0.114)


class _Converted(Part):
    """The images of a source in another mode; see `Source` for what it gives."""

    def __init__(self, source: Source, channels: int) -> None:
        super().__init__(source, np.arange(len(source)))
        self.mean, self.std = (_converted(values, channels) for values in (source.mean, source.std))
        self.channels = channels
        # Another decoder of files would give the channels of the file.
        self.by_pil = True

    def image(self, index: int) -> Image.Image | np.ndarray:
        return as_pil(self.source.image(index)).convert(MODES[self.channels])

    def list_hash(self) -> str:
        return f"{self.source.list_hash()} as {MODES[self.channels]}"


def with_channels(source: Source, channels: int) -> Source:
    """The source itself if its images have that many channels, else the same images with 1 or 3 of them."""
    if source.channels == channels or channels not in MODES:
        return source
    if not isinstance(source, ArraySource):
        return _Converted(source, channels)
    images = np.stack([_pixels(image, channels) for image in source.images])
    mean, std = (_converted(values, channels) for values in (source.mean, source.std))
    return replace(source, title=f"{source.title} as {MODES[channels]}", images=images, mean=mean, std=std)


def _pixels(image: np.ndarray, channels: int) -> np.ndarray:  # [h, w, ch]
    found = np.asarray(as_pil(image).convert(MODES[channels]))
    return found[..., None] if channels == 1 else found


def _converted(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return values * channels
    return (sum(weight * value for weight, value in zip(LUMA, values)),)
