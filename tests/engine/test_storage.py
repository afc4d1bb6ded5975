"""What a full disk refuses waits, is written in order once there is room, and is never lost in silence."""

import errno
from pathlib import Path

import pytest

from caco_fast.engine.storage import RetryingFile


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
def said() -> list[str]:
    return []


def on_disk(tmp_path: Path, said: list[str], room: int) -> tuple[RetryingFile, Disk]:
    file, disk = RetryingFile(tmp_path / "lines", said.append), Disk(room)
    file._file = disk
    return file, disk


def test_lines_are_on_the_disk_at_once(tmp_path: Path, said: list[str]) -> None:
    file = RetryingFile(tmp_path / "lines", said.append)
    file.write("one\n")
    assert (tmp_path / "lines").read_text() == "one\n"
    file.close()
    assert said == []


def test_what_a_full_disk_refuses_follows_in_order_when_there_is_room(tmp_path: Path, said: list[str]) -> None:
    file, disk = on_disk(tmp_path, said, room=10)
    for number in range(5):
        file.write(f"line {number}\n")
    # The second line is there in part.
    assert disk.content == b"line 0\nlin"
    assert len(said) == 1 and "can't be written: No space left on device; training goes on" in said[0]
    disk.room = 1000
    file.write("line 5\n")
    assert disk.content.decode().splitlines() == [f"line {number}" for number in range(6)]
    file.close()
    assert len(said) == 2 and "is written again" in said[1]


def test_what_is_lost_at_the_end_is_counted(tmp_path: Path, said: list[str]) -> None:
    file, _ = on_disk(tmp_path, said, room=0)
    for number in range(3):
        file.write(f"line {number}\n")
    file.close()
    assert said[-1].endswith("lines: 3 lines are lost, the disk never took them")


def test_memory_for_waiting_lines_is_bounded_and_what_is_dropped_is_counted(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetryingFile, "LIMIT", 20)
    file, disk = on_disk(tmp_path, said, room=3)
    for number in range(6):
        file.write(f"line {number}\n")
    disk.room = 1000
    file.close()
    # The one that was begun stays whole, and the newest are kept.
    assert disk.content.decode().splitlines() == ["line 0", "line 4", "line 5"]
    assert said[-1].endswith("3 lines are lost, the disk never took them")
