"""A source of images, which is a fixed, ordered list of images with labels, and the kinds that several sources share.

Legend: N images, h x w pixels, ch channels.
"""

import errno
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from caco_fast.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The suffixes of image files, and the format that each stands for.
SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".jp2", ".j2k", ".jpf", ".jpx"), "JPEG2000"),
    **{".bmp": "BMP", ".dib": "DIB", ".gif": "GIF", ".webp": "WEBP", ".avif": "AVIF", ".tga": "TGA"},
}
if importlib.util.find_spec("PIL._avif") is None:
    # An older PIL, or one without libavif.
    del SUFFIXES[".avif"]
# The formats that PIL may decode, whatever a file's suffix says. PIL would give EPS, another one, to Ghostscript. TGA
# comes last: its files begin with nothing by which they are known.
FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))

# Pixels of the largest image that is decoded, by default: as many as PIL itself decodes.
MAX_PIXELS = 178_956_970
# PIL refuses a PNG for a text or a colour profile above 1 MB, which says nothing about its pixels; DALI doesn't.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 256 * 1024**2
# The ranges in which people store grey values: 8, 12 and 16 bits of integers; 0 to 1, or one of the others, of floats.
_RANGES = {"I": (255, 4095, 65535), "F": (1, 255, 4095, 65535)}


class BadImageError(Exception):
    """An image that can't be read; the message is the reason. Loaders continue with the next good image."""


class Source(Protocol):
    """Images by position; the same positions in every process and every run."""

    # An empty list if the images have no labels; every label is -1 then.
    classes: list[str]
    channels: int
    # One value for each channel, of pixels scaled to [0, 1].
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image | np.ndarray:
        """A PIL image (mode RGB or L) or a uint8 array [h, w, ch]; BadImageError if it can't be read."""
        ...

    def encoded(self, index: int) -> bytes:
        """The image file's bytes, undecoded and unchecked (JPEG, PNG, ...); BadImageError if they can't be read."""
        ...

    def label(self, index: int) -> int: ...

    def name(self, index: int) -> str:
        """The name of the image in a log line."""
        ...

    def list_hash(self) -> str:
        """A hash of the images and their order; it does not depend on the place where they are stored."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """A small set whose images are all in memory."""

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


class Names:
    """N names in one block of bytes.

    1.3 million Python strings would take several times the memory, in every worker process again.
    """

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        """`ends` [N] int64: where each name ends in `block`."""
        self.block, self.ends = block, ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Names":
        listed = list(names)
        ends = np.cumsum(np.fromiter(map(len, listed), dtype=np.int64, count=len(listed)))
        return cls(b"".join(listed), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.block[self.ends[index - 1] if index else 0 : self.ends[index]]

    def hash(self) -> str:
        return hashlib.sha256(self.ends.astype("<i8").tobytes() + self.block).hexdigest()

    def take(self, chosen: np.ndarray) -> "Names":
        """The names at the positions `chosen` [M]."""
        return self.of(self[index] for index in chosen.tolist())


class FileSource:
    """Image files named relative to `root`; see `Source` for what it gives."""

    channels = 3
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    max_pixels = MAX_PIXELS

    def __init__(self, root: Path, names: Names, labels: np.ndarray, classes: list[str]) -> None:
        """`labels` [N] int32, -1 for an image without a label."""
        self.root, self.names, self.labels, self.classes = root, names, labels, classes

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """The decoded image as RGB, its EXIF orientation ignored as the published recipes do."""
        return decode(self.path(index), self.max_pixels)

    def encoded(self, index: int) -> bytes:
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise unreadable(error) from error

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return str(self.root / self.names[index].decode("utf-8", "backslashreplace"))

    def list_hash(self) -> str:
        return self.names.hash()

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])


def decode(file: Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file's image as RGB, its EXIF orientation ignored; BadImageError if it is too large or PIL can't decode it."""
    # PIL would warn of images above this, and refuse those of twice the size, without a setting.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    # PIL raises nearly any exception on damaged files; only its work on this one file is inside the try.
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_pixels(image, max_pixels)
            image.load()
            return _as_rgb(image)
    except (BadImageError, Image.DecompressionBombError) as error:
        raise BadImageError(f"{error}; if it is meant, raise data.max_pixels (it is {max_pixels})") from error
    except UnidentifiedImageError as error:
        # PIL's own message ends with the address of an object.
        raise BadImageError("UnidentifiedImageError: cannot identify image file") from error
    except Exception as error:
        raise unreadable(error) from error


def unreadable(error: Exception) -> BadImageError:
    """The error of one image for an exception that came of reading its file.

    A process that may open no more files learns nothing about the image, so that error is raised as it is.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error
    return BadImageError(f"{type(error).__name__}: {error}")


def header_size(file: Path | BinaryIO) -> tuple[int, int]:
    """Height and width of a file's image, by its header alone; BadImageError if PIL doesn't know the file."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:
        raise unreadable(error) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in _RANGES:
        # PIL would clip at 255 instead of scaling.
        low, high = grey_range(image)
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=low, posinf=high, neginf=low)
        image = Image.fromarray(((values - low) * 255 / (high - low)).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def grey_range(image: Image.Image) -> tuple[float, float] | None:
    """The values that become 0 and 255 in a grey image of more than 8 bits; None for any other image.

    The smallest of the usual ranges that holds all values. If they use less than a sixteenth of it, or fit into none,
    they mean something else: then from the smallest to the largest value.
    """
    if image.mode[0] not in _RANGES:
        return None
    values = np.asarray(image, dtype=np.float64)
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    usual = next((top for top in _RANGES[image.mode[0]] if low >= 0 and high <= top), None)
    if usual is not None and high >= usual / 16:
        return 0.0, float(usual)
    return float(low), float(max(high, low + 1e-12))


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise BadImageError(f"{image.width} x {image.height} pixels are too many")


def data_directory(path: str, expected: str, key: str = "data.path") -> Path:
    """The setting `key` as a Path. UserError if it is missing, a file or closed; `expected` says what it should be."""
    root = Path(path).expanduser()
    try:
        os.scandir(root).close()
        # Entering a directory needs a permission of its own.
        os.stat(os.path.join(root, "."))
    except FileNotFoundError:
        raise UserError(f"{key}: {root} doesn't exist, expected {expected}") from None
    except NotADirectoryError:
        raise UserError(f"{key}: {root} is a file, expected {expected}") from None
    except PermissionError:
        raise UserError(f"{key}: no permission to read {root}; allow it (chmod u+rx) or run as its owner") from None
    except OSError as error:
        raise UserError(f"{key}: can't read {root}: {error.strerror}") from error
    return root
