"""Encoded images made ready for a decoder other than PIL: their size, read from the header, and bytes it decodes alike.

Plain 8-bit JPEG and PNG go through as they are. All else that PIL decodes (CMYK, 16 bits, palettes, GIF, WebP, TIFF)
is decoded by PIL here and handed on as bare pixels, a PNM file, so that every kind of file looks the same to every
loader. A JPEG without an end is left to PIL's judgement too, because others decode what there is without a word.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image

from caco_fast.data.files import decode

_PNG = b"\x89PNG\r\n\x1a\n"
# Baseline, extended and progressive, all of them Huffman-coded. The others are rare, and GPUs don't decode them.
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_START_OF_SCAN, _ADOBE = 0xDA, 0xEE
_END_OF_IMAGE = b"\xff\xd9"


class Encoded(NamedTuple):
    """An image file for a decoder."""

    data: np.ndarray  # [bytes] uint8
    height: int
    width: int


def prepare(data: bytes) -> Encoded:
    """The image of a file's bytes; BadImageError where PIL can't decode it, or where it is too large to be true."""
    size = _plain_jpeg(data) or _plain_png(data)
    # PIL refuses what it takes for a decompression bomb, and says so.
    if size is None or (Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > 2 * Image.MAX_IMAGE_PIXELS):
        return through_pil(data)
    return Encoded(np.frombuffer(data, dtype=np.uint8), *size)


def through_pil(data: bytes) -> Encoded:
    """The same image decoded by PIL, as a PNM file; BadImageError where PIL can't."""
    image = decode(io.BytesIO(data))
    header = f"P6\n{image.width} {image.height}\n255\n".encode()
    return Encoded(np.frombuffer(header + image.tobytes(), dtype=np.uint8), image.height, image.width)


def _plain_png(data: bytes) -> tuple[int, int] | None:
    """Height and width of a grey or RGB PNG of 8 bits; None for anything else."""
    if len(data) < 33 or not data.startswith(_PNG) or data[12:16] != b"IHDR":
        return None
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    return (height, width) if depth == 8 and colour in (0, 2) and width and height else None


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width of a complete grey or YCbCr JPEG of 8 bits; None for anything else."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    size = None
    position, end = 2, len(data) - 4
    while position < end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:
            # A fill byte.
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        if marker in _FRAMES:
            if marker not in _PLAIN_FRAMES or len(segment) < 6:
                return None
            depth, height, width, components = struct.unpack(">BHHB", segment[:6])
            if depth != 8 or components not in (1, 3) or not height or not width:
                return None
            size = height, width
        elif marker == _ADOBE and segment.startswith(b"Adobe") and segment[11:12] != b"\x01":
            # Its three components may be RGB as they stand, which not every decoder looks for.
            return None
        elif marker == _START_OF_SCAN:
            return size if data.rfind(_END_OF_IMAGE, position) >= 0 else None
        position += 2 + length
    return None
