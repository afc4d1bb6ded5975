"""Image files below one directory, by number: what folders and indexes share.

Legend: N images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from caco_fast.data.source import BadImageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What PIL may decode, whatever a file's suffix says; of other kinds it would hand EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


class Names:
    """N names in one block of bytes.

    1.3 million Python strings would take each worker process, which has a copy of its own, several times the memory.
    """

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        """`ends` [N] int64: where each name ends in `block`."""
        self.block, self.ends = block, ends

    @staticmethod
    def of(names: Iterable[bytes]) -> Names:
        listed = list(names)
        ends = np.cumsum(np.fromiter(map(len, listed), dtype=np.int64, count=len(listed)))
        return Names(b"".join(listed), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.block[self.ends[index - 1] if index else 0 : self.ends[index]]

    def hash(self) -> str:
        return hashlib.sha256(self.ends.astype("<i8").tobytes() + self.block).hexdigest()

    def take(self, chosen: np.ndarray) -> Names:
        """Some of the names, by position, [M] -> M names."""
        return Names.of(self[index] for index in chosen.tolist())


class FileSource:
    """Image files named relative to `root`; see `Source` for what it gives."""

    channels = 3
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, root: Path, names: Names, labels: np.ndarray, classes: list[str]) -> None:
        """`labels` [N] int32, -1 where an image has none."""
        self.root, self.names, self.labels, self.classes = root, names, labels, classes

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """The decoded image as RGB, its EXIF orientation ignored as the published recipes do."""
        return decode(self.path(index))

    def encoded(self, index: int) -> bytes:
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise BadImageError(f"{type(error).__name__}: {error}") from error

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return str(self.root / self.names[index].decode("utf-8", "backslashreplace"))

    def list_hash(self) -> str:
        return self.names.hash()

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])


def decode(file: Path | BinaryIO) -> Image.Image:
    """A file's image as RGB, its EXIF orientation ignored; BadImageError where PIL can't decode it."""
    # PIL raises nearly any exception on damaged files; only its work on this one file stands inside the try.
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            return _as_rgb(image)
    except UnidentifiedImageError as error:
        # PIL's line ends with the address of an object.
        raise BadImageError("UnidentifiedImageError: cannot identify image file") from error
    except Exception as error:
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: PIL would clip at 255 instead of scaling.
        levels = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray((levels // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
