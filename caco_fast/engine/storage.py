"""Writing a file so that a reader finds the old one or the new one and never a part, or line by line on a full disk."""

import fcntl
import io
import os
from collections import deque
from collections.abc import Callable, Iterator
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


class RetryingFile:
    """A text file to append to, made with its first line. What a full disk refuses waits in memory, in order, and is
    tried again each time.

    `report` gets a line when the disk begins to refuse, when it takes text again, and when text is lost for good: at
    the end, or the oldest beyond `LIMIT` bytes.
    """

    LIMIT = 2**24

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path = path
        self._report = report
        self._file: io.RawIOBase | None = None
        self._waiting: deque[bytes] = deque()
        self._refused = False
        self._lost = 0

    def write(self, line: str) -> None:
        """One or more whole lines; on the disk's side of our buffers when this returns, unless the disk refused."""
        self._waiting.append(line.encode())
        self._drain()
        while sum(map(len, self._waiting)) > self.LIMIT:
            # A line of which the beginning is on the disk stays whole.
            del self._waiting[1 if len(self._waiting) > 1 else 0]
            self._lost += 1

    def flush(self) -> None:
        """Nothing: `write` keeps nothing back by choice."""

    def close(self) -> None:
        if self._waiting:
            self._drain()
        if lost := self._lost + len(self._waiting):
            self._report(f"{self.path}: {lost} lines are lost, the disk never took them")
        if self._file is not None:
            self._file.close()

    def _drain(self) -> None:
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)
            while self._waiting:
                text = self._waiting[0]
                taken = self._file.write(text) or 0
                if taken == len(text):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = text[taken:]
        except OSError as error:
            if not self._refused:
                self._refused = True
                reason = error.strerror or error
                self._report(f"{self.path} can't be written: {reason}; training goes on, its lines wait in memory")
            return
        if self._refused:
            self._refused = False
            self._report(f"{self.path} is written again, with the lines that waited")


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of writers that were killed; those of writers still at work stay."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
