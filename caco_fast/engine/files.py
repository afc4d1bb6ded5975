"""Writing a file so that a reader finds the old one or the new one, and never a part."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".writing"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yields a file open for writing that takes the name `path` only when the block ends without an error.

    The contents are on the disk before the name is (fsync, rename, fsync of the folder). An OSError, as of a full disk,
    reaches the caller; the temporary file is removed and an older `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            # Tells `remove_leftovers` in another process that this write is alive; the kernel drops it when we die.
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
    with atomic_write(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, as fsync of a file makes its contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of writers that were killed; those of writers still at work stay."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
