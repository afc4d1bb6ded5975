"""Folders of anyone's own images: every image of a tree, without labels, or train/ and val/ where they are there."""

import logging
import os
from pathlib import Path

import numpy as np

from caco_fast.data.sources.base import SUFFIXES, FileSource, Names, data_directory
from caco_fast.data.sources.folder import FolderSource, holds_test_images, split_folders
from caco_fast.data.sources.listing import list_images
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")


class TreeSource(FileSource):
    """Every image below a folder, flat or deep, without labels."""

    def __init__(self, root: Path) -> None:
        """List the files, without opening them.

        UserError if there are none, or if a folder below has train/ and val/ of its own, which would be mixed.
        """
        listing = list_images(root)
        listing.report()
        if not listing.names:
            found = f" (but {listing.left_out.total()} other files: {listing.suffixes()})" if listing.left_out else ""
            raise UserError(f"data.path: no images in {root}{found}, expected files of {', '.join(SUFFIXES)}")
        tests = holds_test_images(listing)
        split = next((above for test in tests if split_folders(above := (root / test).parent)[0]), None)
        if split and split != root:
            raise UserError(
                f"data.path: {root} is above {split}, which has train/ and test images; set data.path={split}"
            )
        if tests:
            log.warning("%s: the images of %s/ are trained on too", root, ", ".join(tests[:3]))
        names = Names.of(map(os.fsencode, listing.names))
        super().__init__(root, names, np.full(len(names), -1, dtype=np.int32), [])


def images_of(path: str, split: str = "train") -> FileSource:
    """The images of a folder: as `FolderSource` gives them if it has train/ and val/ or test/, else the whole tree."""
    root = data_directory(path, "a directory with images in it")
    train, tests = split_folders(root)
    if (train and tests) or split != "train":
        return FolderSource(path, split)
    return TreeSource(root)
