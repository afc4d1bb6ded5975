"""Folders of images: `path/train/<class>/*.JPEG`, and `path/val` or `path/test` for evaluation.

Legend: N images.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from caco_fast.data.sources.base import FileSource, Names, data_directory
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("val", "test")


class FolderSource(FileSource):
    """The images of one split of a folder, in the order of their sorted classes and names."""

    def __init__(self, path: str, split: str = "train") -> None:
        """List the files, without opening them. UserError for a folder that is missing, unreadable or empty."""
        top = data_directory(path, "the directory that holds train/ and val/")
        root = _split_folder(top, split)
        entries = _entries(root)
        folders = _folders(entries)
        classes = folders if split == "train" else _training_classes(top, folders)
        position = {name: label for label, name in enumerate(classes)}
        names: list[bytes] = []
        labels: list[np.ndarray] = []
        for folder in folders:
            if classes and folder not in position:
                raise UserError(
                    f"{root / folder} is a class that the training set doesn't have; "
                    f"give the folders of {root} the names of the training set's"
                )
            before = len(names)
            names.extend(os.fsencode(f"{folder}/{name}") for name in _images_below(root / folder))
            labels.append(np.full(len(names) - before, position.get(folder, -1), dtype=np.int32))
        loose = [entry.name for entry in entries if _is_image(entry.name)]
        if names and loose:
            log.warning("%s has class folders; the %d images next to them are left out", root, len(loose))
        elif loose:
            names = [os.fsencode(name) for name in loose]
            labels = [np.full(len(names), -1, dtype=np.int32)]
            classes = []
        if not names:
            raise UserError(f"no images in {root}, expected <class>/*.JPEG, or image files ({', '.join(SUFFIXES)})")
        super().__init__(root, Names.of(names), np.concatenate(labels), classes)


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
    """The class list that the labels of the test images refer to: the training set's, if there is a training set."""
    train = path / "train"
    if not train.is_dir():
        return folders
    return _folders(_entries(train))


def _folders(entries: list[os.DirEntry[str]]) -> list[str]:
    # os.path.isdir says no to a link that leads nowhere, or to itself.
    return [entry.name for entry in entries if not _is_image(entry.name) and os.path.isdir(entry.path)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name, without hidden ones."""
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
