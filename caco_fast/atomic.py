"""Writing a file so that a reader finds the old one or the new one, and never a part of one."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".writing"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes the name `path` only when the block ends without an error.

    The contents are on the disk before the name is (fsync, rename, fsync of the folder). An OSError, for example on a
    full disk, reaches the caller; then the temporary file is removed and an older `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            # The lock tells `remove_leftovers` in another process that this write is alive. It ends with this process.
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, like fsync does for the contents of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; those of writers still at work stay."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
