"""Writes on disks that are full, and on file systems that lack locks or fsync.

Lines that a full disk refuses wait, are written in order once there is room, and are counted if they are lost.
"""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from caco_fast.storage import ABANDONED_SECONDS, TEMPORARY, RetryingFile, atomic_write_text, lock, remove_leftovers


class Disk:
    """A raw file on a disk with `room` bytes left."""

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, text: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = text[: self.room]
        self.room -= len(taken)
        self.content += taken
        return len(taken)

    def close(self) -> None: ...


@pytest.fixture
def reports() -> list[str]:
    return []


def on_disk(tmp_path: Path, reports: list[str], room: int) -> tuple[RetryingFile, Disk]:
    file, disk = RetryingFile(tmp_path / "lines", reports.append), Disk(room)
    file._file = disk
    return file, disk


def test_lines_are_on_the_disk_at_once(tmp_path: Path, reports: list[str]) -> None:
    file = RetryingFile(tmp_path / "lines", reports.append)
    file.write("one\n")
    assert (tmp_path / "lines").read_text() == "one\n"
    file.close()
    assert reports == []


def test_refused_lines_follow_in_order_when_there_is_room(tmp_path: Path, reports: list[str]) -> None:
    file, disk = on_disk(tmp_path, reports, room=10)
    for number in range(5):
        file.write(f"line {number}\n")
    # The second line was written in part.
    assert disk.content == b"line 0\nlin"
    assert len(reports) == 1 and "can't be written: No space left on device; training continues" in reports[0]
    disk.room = 1000
    file.write("line 5\n")
    assert disk.content.decode().splitlines() == [f"line {number}" for number in range(6)]
    file.close()
    assert len(reports) == 2 and "is written again" in reports[1]


def test_lines_lost_at_the_end_are_counted(tmp_path: Path, reports: list[str]) -> None:
    file, _ = on_disk(tmp_path, reports, room=0)
    for number in range(3):
        file.write(f"line {number}\n")
    file.close()
    assert reports[-1].endswith("lines: 3 lines are lost, the disk never took them")


def test_memory_for_waiting_lines_is_bounded_and_dropped_lines_are_counted(
    tmp_path: Path, reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetryingFile, "LIMIT", 20)
    file, disk = on_disk(tmp_path, reports, room=3)
    for number in range(6):
        file.write(f"line {number}\n")
    disk.room = 1000
    file.close()
    # The line that was begun stays whole, and the newest lines are kept.
    assert disk.content.decode().splitlines() == ["line 0", "line 4", "line 5"]
    assert reports[-1].endswith("3 lines are lost, the disk never took them")


def refusing(code: int, folders_only: bool = False):
    """A stand-in for flock or fsync on a file system that answers with `code`."""

    def call(file, *_: int) -> None:
        if not folders_only or stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
def test_a_file_is_written_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(code))
    atomic_write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text" and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_a_file_is_written_where_folders_have_no_fsync(tmp_path: Path, monkeypatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", refusing(code, folders_only=True))
    atomic_write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_disk_itself_reaches_the_caller(tmp_path: Path, monkeypatch, code: int) -> None:
    monkeypatch.setattr(os, "fsync", refusing(code))
    with pytest.raises(OSError) as raised:
        atomic_write_text(tmp_path / "file", "text")
    assert raised.value.errno == code and not os.listdir(tmp_path)


def test_leftovers_go_unless_their_writer_may_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, free, fresh, old = (tmp_path / f".{name}{TEMPORARY}" for name in ("held", "free", "fresh", "old"))
    held.touch(), free.touch()
    with open(held, "wb") as file:
        assert lock(file)
        remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [held.name]
    held.unlink(), fresh.touch(), old.touch()
    before = old.stat().st_mtime - ABANDONED_SECONDS - 60
    os.utime(old, (before, before))
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [fresh.name]
