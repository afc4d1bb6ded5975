"""PASCAL VOC2007 as a classification: which of 20 classes are in an image, and which of these are hard to see."""

from pathlib import Path

import numpy as np

from caco_fast.data.sources.base import FileSource
from caco_fast.data.transfer.lists import Release

VOC_CLASSES = """
    aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep
    sofa train tvmonitor
""".split()


class VocSource(FileSource):
    """Images with several labels each. `label` gives -1, since there is not one class of an image."""

    def __init__(self, images: FileSource, targets: np.ndarray) -> None:
        """`targets` [N, 20] int8: 1 in the image, -1 not in it, 0 only as an object that is marked as difficult."""
        super().__init__(images.root, images.names, images.labels, images.classes)
        self.targets = targets


def voc2007(release: Release, split: str) -> VocSource:
    """The images of a split of ImageSets/Main: train, val or test."""
    names: list[str] | None = None
    columns = []
    for name in VOC_CLASSES:
        file = f"ImageSets/Main/{name}_{split}.txt"
        rows = release.lines(file)
        if any(len(row) != 2 or row[1] not in ("1", "0", "-1") for row in rows):
            raise release.wrong(f"has a {file} with other lines than an image and 1, 0 or -1")
        if names is None:
            names = [row[0] for row in rows]
        if [row[0] for row in rows] != names:
            raise release.wrong(f"has a {file} with other images than {VOC_CLASSES[0]}_{split}.txt")
        columns.append([int(row[1]) for row in rows])
    files = [f"{name}.jpg" for name in names or []]
    images = release.source(files, [-1] * len(files), VOC_CLASSES, "JPEGImages")
    return VocSource(images, np.array(columns, dtype=np.int8).T)


VOC_FOLDERS = (Path("VOCdevkit", "VOC2007"), Path("VOC2007"), Path("."))
