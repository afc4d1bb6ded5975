"""The images below a folder, flat or deep, with linked folders: listed by their names, without opening a file.

Legend: N images.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from caco_fast.data.sources.base import SUFFIXES
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

# What file managers and storage systems put between images: thumbnails, deleted files. Hidden folders are left out too.
_NO_IMAGES = frozenset(("@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found"))
_SHOWN = 6


@dataclass
class Listing:
    """What is below a folder. The names are relative to it and sorted, folder by folder."""

    root: Path
    names: list[str] = field(default_factory=list)  # N
    folders: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # files that are no images, by their suffix
    cut: list[str] = field(default_factory=list)  # linked folders that are not followed

    def report(self) -> None:
        """Say once, in the log, what was left out."""
        if self.left_out:
            log.warning(
                "%s: %d files are no images by their suffix and are left out: %s",
                self.root,
                self.left_out.total(),
                self.suffixes(),
            )
        if self.cut:
            log.warning(
                "%s: %d linked folders are left out, because they lead to images that are listed anyway or belong to "
                "another split; the first is %s",
                self.root,
                len(self.cut),
                self.cut[0],
            )

    def suffixes(self) -> str:
        """The suffixes of the files left out, the most frequent first: `.txt 12, .xml 3`."""
        shown = [f"{suffix or 'no suffix'} {count}" for suffix, count in self.left_out.most_common(_SHOWN)]
        return ", ".join(shown + ["..."] * (len(self.left_out) > _SHOWN))


def list_images(root: Path, apart: Sequence[Path] = ()) -> Listing:
    """The images below `root`. UserError for a folder that can't be listed.

    Linked folders are followed, but not into `root` or a folder of `apart`, nor to one that holds them. No folder is
    listed twice. So links can't make a loop, and no image counts twice.
    """
    listing = Listing(root)
    taken = [os.path.realpath(folder) for folder in (root, *apart)]
    linked: set[str] = set()

    def walk(inside: str, real: str, by_link: bool) -> None:
        if by_link and real in linked:
            listing.cut.append(inside)
            return
        if by_link:
            linked.add(real)
        for entry in _entries(os.path.join(root, inside)):
            name = f"{inside}/{entry.name}" if inside else entry.name
            if is_image(entry.name):
                listing.names.append(name)
            elif entry.is_dir(follow_symlinks=False):
                listing.folders.append(name)
                walk(name, os.path.join(real, entry.name), by_link)
            elif not _is_linked_folder(entry):
                listing.left_out[suffix_of(entry.name)] += 1
            elif (target := _followed(entry, taken)) is None:
                listing.cut.append(name)
            else:
                listing.folders.append(name)
                walk(name, target, True)

    walk("", taken[0], False)
    return listing


def list_folders(root: Path, apart: Sequence[Path] = ()) -> list[str]:
    """The folders directly in `root`, those that `list_images` walks; nothing below them is listed."""
    taken = [os.path.realpath(folder) for folder in (root, *apart)]
    return [
        entry.name
        for entry in _entries(root)
        if not is_image(entry.name)
        and (entry.is_dir(follow_symlinks=False) or (_is_linked_folder(entry) and _followed(entry, taken) is not None))
    ]


def is_image(name: str) -> bool:
    """Whether a file counts as an image, by its suffix."""
    return suffix_of(name) in SUFFIXES


def suffix_of(name: str) -> str:
    """The suffix of a file name, in small letters and with its dot; empty if there is none."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    # os.path.isdir says no to a link that leads nowhere, or to itself.
    return entry.is_symlink() and os.path.isdir(entry.path)


def _followed(entry: os.DirEntry[str], taken: Sequence[str]) -> str | None:
    """The folder to which a link leads; None if it is in one of `taken`, or holds one."""
    target = os.path.realpath(entry.path)
    return None if any(_within(target, other) or _within(other, target) for other in taken) else target


def _within(folder: str, other: str) -> bool:
    return os.path.commonpath([folder, other]) == other


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name, without hidden ones and those of file managers."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in _NO_IMAGES]
    except PermissionError as error:
        raise UserError(f"no permission to read {folder}; allow it with chmod u+rx, or run as its owner") from error
    except OSError as error:
        raise UserError(f"can't list {folder}: {error.strerror}") from error
    return sorted(found, key=lambda entry: entry.name)
