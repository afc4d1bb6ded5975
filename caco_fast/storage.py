"""Safe writes: whole files of which a reader never sees a part, lines that survive a full disk, and output that does
not end with its terminal.
"""

import errno
import fcntl
import io
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

TEMPORARY = ".writing"
# Errors of the disk itself. Any other answer to fsync means that the file system has none for such a file.
DISK_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
# Where files can't be locked, a temporary file that was not written to for so long has no living writer.
ABANDONED_SECONDS = 3600.0


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a file open for writing that gets the name `path` only if the block ends without an error.

    The contents reach the disk before the name does (fsync, rename, fsync of the folder). An OSError, such as that of a
    full disk, reaches the caller. The temporary file is then removed, and an older `path` is untouched. A file system
    without locks or without fsync (Lustre, CIFS, FUSE) does without them.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            # Tells `remove_leftovers` in another process that this write is alive. The kernel unlocks it when we die.
            lock(file)
            yield file
            file.flush()
            _sync(file.fileno())
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
    """Make the names in a folder durable, as fsync does for the contents of a file, if the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        # Written to and not readable, as some network file systems have it.
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: BinaryIO) -> bool:
    """Lock a file for this process until it closes the file or dies; False if the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise


class RetryingFile:
    """A text file to append to, created with its first line.

    Lines that a full disk refuses wait in memory and are tried again, in order, with each further line. `report` gets a
    message when the disk begins to refuse, when it takes lines again, and when lines are lost. Lines are lost if they
    still wait at the end, or if they are the oldest beyond `LIMIT` bytes.
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
        """Append one or more whole lines. They have left this process on return, unless the disk refused."""
        self._waiting.append(line.encode())
        self._drain()
        while sum(map(len, self._waiting)) > self.LIMIT:
            # The first line may be on the disk in part, so it stays.
            del self._waiting[1 if len(self._waiting) > 1 else 0]
            self._lost += 1

    def flush(self) -> None:
        """Do nothing: `write` buffers no lines unless the disk refuses them. Logging handlers call this."""

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
                self._report(f"{self.path} can't be written: {reason}; training continues, its lines wait in memory")
            return
        if self._refused:
            self._refused = False
            self._report(f"{self.path} is written again, with the lines that waited")


class LastingOutput:
    """A text stream whose reader may go: a closed terminal, or a pipe. What is written after that is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def lasting_output() -> Iterator[None]:
    """A context, and a decorator, in which a program does not end because nobody reads its output any more."""
    with redirect_stdout(LastingOutput(sys.stdout)), redirect_stderr(LastingOutput(sys.stderr)):
        yield


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed, but not those of writers that still run."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError), open(leftover, "r+b") as file:
            if lock(file) or time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED_SECONDS:
                leftover.unlink()
