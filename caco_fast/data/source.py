"""A source of images: a fixed, ordered list of images with labels.

Legend: N images, h x w pixels, ch channels.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from caco_fast.errors import UserError


class BadImageError(Exception):
    """An image that can't be read; the message is the reason. Loaders go on with the next good one."""


class Source(Protocol):
    """Images by position; the same positions in every process and every run."""

    # An empty list where the images carry no labels; every label is -1 then.
    classes: list[str]
    channels: int
    # One value for each channel, of pixels scaled to [0, 1].
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image | np.ndarray:
        """A PIL image (mode RGB or L) or a uint8 array [h, w, ch]; BadImageError where it can't be read."""
        ...

    def encoded(self, index: int) -> bytes:
        """The image file's bytes, undecoded and unchecked (JPEG, PNG, ...); BadImageError where they can't be read."""
        ...

    def label(self, index: int) -> int: ...

    def name(self, index: int) -> str:
        """What to call the image in a log line."""
        ...

    def list_hash(self) -> str:
        """Another one for other images, or the same in another order; the same wherever they lie."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """A small set that lies in memory whole."""

    title: str
    images: np.ndarray  # [N, h, w, ch] uint8
    labels: np.ndarray  # [N] int64
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def encoded(self, index: int) -> bytes:
        file = io.BytesIO()
        as_pil(self.images[index]).save(file, "PNG")
        return file.getvalue()

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.title} image {index}"

    def list_hash(self) -> str:
        return hashlib.sha256(f"{self.title} {self.images.shape}".encode()).hexdigest()


def as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    """The image as PIL: mode L for one channel, RGB for three."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def data_directory(path: str, wanted: str) -> Path:
    """`data.path` as a Path. UserError, which says what is `wanted` there, if it is missing, a file or closed to us."""
    root = Path(path).expanduser()
    try:
        os.scandir(root).close()
        # Entering a directory needs a permission of its own.
        os.stat(os.path.join(root, "."))
    except FileNotFoundError:
        raise UserError(f"data.path: {root} doesn't exist; wanted {wanted}") from None
    except NotADirectoryError:
        raise UserError(f"data.path: {root} is a file, not a directory; wanted {wanted}") from None
    except PermissionError:
        raise UserError(f"data.path: no permission to read {root}; allow it (chmod u+rx) or run as its owner") from None
    except OSError as error:
        raise UserError(f"data.path: can't read {root}: {error.strerror}") from error
    return root
