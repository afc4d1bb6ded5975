"""Lines that a full disk refuses wait, are written in order once there is room, and are counted if they are lost."""

import errno
from pathlib import Path

import pytest

from caco_fast.storage import RetryingFile


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
