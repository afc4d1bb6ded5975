"""A folder with good images, and with files damaged in every way that is known to stop a loader."""

import ctypes
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

# Files that every loader must find unreadable, and unusual files that can be decoded. `vanished` is an intact file
# until `VanishingFile` removes it.
BAD = ("truncated", "header_cut", "zero_bytes", "html", "random_bytes", "closed", "vanished", "directory")
ODD = ("png", "cmyk", "sixteen_bit", "one_pixel", "long_strip", "gif")
GOOD = 34


def write_faulty_images(folder: Path) -> Path:
    """Write train/{cold,warm} with GOOD images and the 14 files above, and val with 6 images and two bad ones."""
    random = np.random.default_rng(0)

    def photo(path: Path, tint: int, width: int = 40, height: int = 36) -> Path:
        small = random.integers(0, 90, (5, 5, 3), dtype=np.uint8) + np.array((tint, 90, 160 - tint), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image.save(path, "JPEG", quality=95)
        return path

    for number in range(GOOD):
        photo(folder / "train" / ("cold", "warm")[number % 2] / f"{number:02}.JPEG", 30 + 100 * (number % 2))
    for number, name in enumerate(BAD + ODD):
        path = photo(folder / "train" / ("cold", "warm")[number % 2] / f"{5 + number:02}_{name}.JPEG", 80)
        _damage(name, path, random)
    for number in range(6):
        photo(folder / "val" / ("cold", "warm")[number % 2] / f"{number}.JPEG", 30 + 100 * (number % 2))
    (folder / "val" / "cold" / "2_zero_bytes.JPEG").write_bytes(b"")
    (folder / "val" / "warm" / "5_html.JPEG").write_text("<html>404</html>")
    return folder


def _damage(name: str, path: Path, random: np.random.Generator) -> None:
    data = path.read_bytes()
    match name:
        case "truncated":
            path.write_bytes(data[: len(data) * 2 // 3])
        case "header_cut":
            path.write_bytes(data[40:])
        case "zero_bytes":
            path.write_bytes(b"")
        case "html":
            path.write_text("<html><body>404 not found</body></html>")
        case "random_bytes":
            path.write_bytes(random.bytes(5000))
        case "closed":
            path.chmod(0)
        case "directory":
            path.unlink()
            path.mkdir()
        case "png":
            Image.open(path).save(path, "PNG")
        case "gif":
            Image.open(path).save(path, "GIF")
        case "cmyk":
            Image.open(path).convert("CMYK").save(path, "JPEG")
        case "sixteen_bit":
            Image.fromarray(random.integers(0, 65536, (30, 30), dtype=np.uint16)).save(path, "PNG")
        case "one_pixel":
            Image.new("RGB", (1, 1), (200, 10, 10)).save(path, "JPEG")
        case "long_strip":
            Image.new("RGB", (20_000, 10), (10, 200, 10)).save(path, "JPEG")


class VanishingFile(logging.Handler):
    """A handler that removes a file when the log reports a step of the first epoch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        if "epoch 1/" in record.getMessage():
            self.path.unlink(missing_ok=True)


def obey_permissions() -> None:
    """Drop two capabilities, so that root too may only read what file permissions allow.

    Use it in a process of its own, because they can't be regained.
    """
    if os.geteuid() != 0:
        return
    override, search = 1, 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits of each
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for place in range(3):
        sets[place] &= ~(1 << override | 1 << search)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")
