"""Folders of images: `path/train/<class>/*.JPEG`, and `path/val` or `path/test` for evaluation.

Legend: N images.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from caco_fast.data.config import NO_EVALUATION
from caco_fast.data.sources.base import SUFFIXES, FileSource, Names, data_directory
from caco_fast.data.sources.listing import Listing, list_folders, list_images
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

TEST_FOLDERS = ("val", "test")
# Other names that people give to images that are not to be trained on.
_TEST_WORDS = frozenset((*TEST_FOLDERS, "valid", "validation", "testing"))


class FolderSource(FileSource):
    """The images of one split of a folder, in the order of their sorted classes and names."""

    def __init__(self, path: str, split: str = "train") -> None:
        """List the files, without opening them. UserError for a folder that is missing, unreadable or empty.

        UserError too if test images would be trained on: `path` is a folder above train/ and val/, say.
        """
        top = data_directory(path, "the directory that holds train/ and val/")
        train, tests = split_folders(top)
        root = _root(top, split, train, tests)
        listing = list_images(root, apart=tests if split == "train" else ())
        if split == "train":
            _refuse_test_images(top, listing)
        listing.report()
        folders = [folder for folder in listing.folders if "/" not in folder]
        classes = folders if split == "train" or train is None else list_folders(train, apart=tests)
        if classes and (unknown := sorted(set(folders) - set(classes))):
            raise UserError(
                f"{root / unknown[0]} is a class that the training set doesn't have; "
                f"give the folders of {root} the names of the training set's"
            )
        names = [name for name in listing.names if "/" in name]
        if names:
            if loose := len(listing.names) - len(names):
                log.warning("%s has class folders; the %d images next to them are left out", root, loose)
        else:
            names, classes = listing.names, []
            log.info("%s has no class folders with images, so its images have no labels", root)
        if not names:
            found = f" (but {listing.left_out.total()} other files: {listing.suffixes()})" if listing.left_out else ""
            raise UserError(
                f"no images in {root}{found}, expected <class>/*.JPEG, or image files ({', '.join(SUFFIXES)})"
            )
        position = {name: label for label, name in enumerate(classes)}
        labels = (position.get(name.partition("/")[0], -1) for name in names)
        super().__init__(root, Names.of(map(os.fsencode, names)), np.fromiter(labels, np.int32, len(names)), classes)


def split_folders(top: Path) -> tuple[Path | None, list[Path]]:
    """The folder of the training images, if there is one, and those of test images. Train/ and VAL/ count too."""
    with os.scandir(top) as entries:
        named = [entry for entry in entries if entry.name.lower() in ("train", *TEST_FOLDERS)]
    # Of train/ and Train/, the one in small letters is taken.
    names = sorted((entry.name for entry in named if entry.is_dir()), reverse=True)
    found = {name.lower(): top / name for name in names}
    return found.get("train"), [found[name] for name in TEST_FOLDERS if name in found]


def _root(top: Path, split: str, train: Path | None, tests: list[Path]) -> Path:
    if split == "train":
        if tests and not train:
            raise UserError(
                f"{top} has {tests[0].name}/ but no train/; put the training images into {top / 'train'}, or set "
                f"data.path to the folder of the training images alone"
            )
        return train or top
    if not tests:
        raise UserError(
            f"{top} has neither val/ nor test/; evaluation needs one, with the class folders of train/; put one "
            f"there, or {NO_EVALUATION}"
        )
    return tests[0]


def _refuse_test_images(top: Path, listing: Listing) -> None:
    """Raise UserError if a folder that is to be trained on as a whole holds test images; warn if it is named train/."""
    found = holds_test_images(listing)
    if not found:
        return
    if listing.root != top:
        log.warning(
            "%s holds %s/: its images are trained on; if they are test images, put them next to train/",
            listing.root,
            ", ".join(found[:3]),
        )
        return
    above = sorted({os.path.dirname(listing.root / folder) for folder in found})
    ready = [folder for folder in above if split_folders(Path(folder))[0]]
    advice = f"data.path={ready[0]}" if len(ready) == 1 else "data.path to a folder with train/ and val/ in it"
    raise UserError(
        f"data.path: {top} holds test images in {found[0]}/, which would be trained on, and no train/; set {advice}"
    )


def holds_test_images(listing: Listing) -> list[str]:
    """The folders with images whose names say that the images are for testing."""
    found = [folder for folder in listing.folders if folder.rpartition("/")[2].lower() in _TEST_WORDS]
    held = {folder for name in listing.names for folder in _parents(name)} if found else set()
    return [folder for folder in found if folder in held]


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
