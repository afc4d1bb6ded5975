"""Folders of images: `path/train/<class>/*.JPEG`, and `path/val` or `path/test` for evaluation.

Legend: N images.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from caco_fast.data.source import BadImageError, data_directory
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("val", "test")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What the suffixes stand for; a file of another kind under such a name is refused (PIL would run Ghostscript on EPS).
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


class FolderSource:
    """The images of one split of a folder, in the order of their sorted classes and names.

    Names are kept in one block of bytes: a list of 1.3 million Python strings would be copied into every worker
    process as soon as their reference counts are touched.
    """

    channels = 3
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, path: str, split: str = "train") -> None:
        """Lists the files, without opening them. UserError for a folder that is missing, unreadable or empty."""
        top = data_directory(path, "the directory that holds train/ and val/")
        self.root = _split_folder(top, split)
        entries = _entries(self.root)
        folders = _folders(entries)
        self.classes = folders if split == "train" else _training_classes(top, folders)
        position = {name: label for label, name in enumerate(self.classes)}
        names: list[bytes] = []
        labels: list[np.ndarray] = []
        for folder in folders:
            if self.classes and folder not in position:
                raise UserError(
                    f"{self.root / folder} is a class that the training set doesn't have; "
                    f"the folders of {self.root} must be named as those of the training set"
                )
            before = len(names)
            names.extend(os.fsencode(f"{folder}/{name}") for name in _images_below(self.root / folder))
            labels.append(np.full(len(names) - before, position.get(folder, -1), dtype=np.int32))
        loose = [entry.name for entry in entries if _is_image(entry.name)]
        if names and loose:
            log.warning("%s has class folders; the %d images beside them are left out", self.root, len(loose))
        elif loose:
            names = [os.fsencode(name) for name in loose]
            labels = [np.full(len(names), -1, dtype=np.int32)]
            self.classes = []
        if not names:
            raise UserError(f"no images in {self.root}; wanted <class>/*.JPEG, or image files ({', '.join(SUFFIXES)})")
        self._names = b"".join(names)
        self._ends = np.fromiter(itertools.accumulate(map(len, names)), dtype=np.int64, count=len(names))  # [N]
        self._labels = np.concatenate(labels)  # [N]

    def __len__(self) -> int:
        return len(self._ends)

    def image(self, index: int) -> Image.Image:
        """The decoded image as RGB, its EXIF orientation ignored as the published recipes do."""
        return decode(self._path(index))

    def encoded(self, index: int) -> bytes:
        try:
            return self._path(index).read_bytes()
        except OSError as error:
            raise BadImageError(f"{type(error).__name__}: {error}") from error

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return str(self.root / self._raw_name(index).decode("utf-8", "backslashreplace"))

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._raw_name(index))

    def _raw_name(self, index: int) -> bytes:
        return self._names[self._ends[index - 1] if index else 0 : self._ends[index]]


def decode(file: Path | BinaryIO) -> Image.Image:
    """A file's image as RGB, its EXIF orientation ignored; BadImageError where PIL can't decode it."""
    # PIL raises nearly any exception on damaged files; only its work on this one file stands inside the try.
    try:
        with Image.open(file, formats=_FORMATS) as image:
            image.load()
            return _as_rgb(image)
    except Exception as error:
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _split_folder(path: Path, split: str) -> Path:
    tests = [path / name for name in TEST_FOLDERS if (path / name).is_dir()]
    if split == "train":
        if (path / "train").is_dir():
            return path / "train"
        if tests:
            raise UserError(f"{path} has {tests[0].name}/ but no train/; put the training images into {path / 'train'}")
        return path
    if not tests:
        raise UserError(f"{path} has neither val/ nor test/; evaluation needs one, with the class folders of train/")
    return tests[0]


def _training_classes(path: Path, folders: list[str]) -> list[str]:
    """The class list that the labels of the test images refer to: that of the training set, where it has one."""
    train = path / "train"
    if not train.is_dir():
        return folders
    return _folders(_entries(train))


def _folders(entries: list[os.DirEntry[str]]) -> list[str]:
    # os.path.isdir takes a link that leads nowhere, or to itself, for what it is: no folder.
    return [entry.name for entry in entries if not _is_image(entry.name) and os.path.isdir(entry.path)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except PermissionError as error:
        raise UserError(f"no permission to read {folder}; allow it with chmod u+rx, or run as its owner") from error
    except OSError as error:
        raise UserError(f"can't list {folder}: {error.strerror}") from error


def _images_below(folder: Path) -> Iterator[str]:
    """Names of the images in a class folder and its subfolders, relative to it; no file is opened or stat'ed."""
    for entry in _entries(folder):
        if _is_image(entry.name):
            yield entry.name
        elif entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in _images_below(folder / entry.name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: PIL would clip at 255 instead of scaling.
        levels = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray((levels // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
