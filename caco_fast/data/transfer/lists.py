"""Sources from the lists of released sets: text, JSON, MATLAB files, and folders of classes."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caco_fast.data.sources.base import SUFFIXES, FileSource, Names
from caco_fast.errors import UserError


class Release:
    """The folder of a released set; whatever is not as released is one line that says what is expected there."""

    def __init__(self, title: str, folder: Path, expected: str, key: str) -> None:
        """expected: the files of the release, for the line. key: the setting that names the folder above."""
        self.title, self.folder, self.expected, self.key = title, folder, expected, key

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.key}: {self.folder} {what}, expected the release of {self.title}: {self.expected}")

    def read(self, name: str, reader: Callable[[Path], Any]) -> Any:
        """What a reader makes of a file of the release.

        Raises:
            UserError: the file is missing or is not as released.
        """
        path = self.folder / name
        if not path.is_file():
            raise self.wrong(f"has no {name}")
        try:
            return reader(path)
        except ImportError:
            raise UserError(
                f"{self.title} has its labels in MATLAB files, which SciPy reads; install it with: pip install "
                '"caco-fast[evaluate]"'
            ) from None
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise self.wrong(f"has a {name} that can't be read ({type(error).__name__}: {error})") from None

    def lines(self, name: str) -> list[list[str]]:
        """The words of each line of a text file that is not empty."""
        return self.read(name, lambda path: [line.split() for line in path.read_text().splitlines() if line.strip()])

    def source(self, names: Sequence[str], labels: Iterable[int], classes: list[str], images: str = "") -> FileSource:
        """The images `names`, relative to the folder `images`."""
        if not names:
            raise self.wrong("lists no images")
        found = np.fromiter(labels, np.int32, len(names))
        if found.max() >= len(classes) or found.min() < -1:
            raise self.wrong(f"has labels from {found.min()} to {found.max()} for {len(classes)} classes")
        root = self.folder / images
        if not (root / names[0]).is_file():
            raise self.wrong(f"lists {Path(images, names[0])}, which is not there")
        return FileSource(root, Names.of(map(os.fsencode, names)), found, classes)

    def by_name(self, rows: Sequence[tuple[str, str]], classes: list[str], images: str = "") -> FileSource:
        """The images of (name, class) rows."""
        number = {name: label for label, name in enumerate(classes)}
        if unknown := sorted({name for _, name in rows} - number.keys()):
            raise self.wrong(f"has the class {unknown[0]}, which the training images don't have")
        return self.source([name for name, _ in rows], (number[name] for _, name in rows), classes, images)


def matlab(path: Path) -> Mapping[str, Any]:
    """The variables of a MATLAB file; ImportError without SciPy."""
    from scipy.io import loadmat

    return loadmat(path, squeeze_me=True)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def images_in(folder: Path) -> list[str]:
    """The names of the image files in a folder, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
