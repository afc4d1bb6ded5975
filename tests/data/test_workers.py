"""What worker processes lack reaches the trainer as one line that names the remedy, and nothing waits for ever."""

import errno
import multiprocessing.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from multiprocessing import connection, process
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from caco_fast.data.loaders.base import RawBatch
from caco_fast.data.loaders.workers import as_is, from_workers, worker_options
from caco_fast.errors import UserError
from caco_fast.host import SOCKET_FOLDER_BYTES, make_socket_folder

ERRORS = [
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n 4096"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device"), "--shm-size"),
    (OSError(errno.ENOSPC, "No space left on device"), "--shm-size"),
    (ValueError("this can't travel"), "a batch can't be handed over (this can't travel)"),
]


class Unsendable:
    """A tensor's stand-in that fails on its way to another process, in the thread that sends it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class Batches(Dataset[RawBatch]):
    """The first batch is good, and each further one fails with one of ERRORS."""

    def __len__(self) -> int:
        return len(ERRORS) + 1

    def __getitem__(self, item: int) -> RawBatch:
        good = torch.full((2,), item)
        return RawBatch([good if item == 0 else Unsendable(ERRORS[item - 1][0])], good, [])  # type: ignore[list-item]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_an_error_while_a_batch_is_sent_reaches_the_trainer(number: int) -> None:
    order = [0, number + 1, 0]
    loader = DataLoader(Batches(), sampler=order, batch_size=None, collate_fn=as_is, **worker_options(1, 2))
    batches = from_workers(loader)
    assert next(batches).images[0].tolist() == [0, 0]
    with pytest.raises(UserError) as raised:
        next(batches)
    assert ERRORS[number][1] in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error, remedy",
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "lower data.workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "/dev/shm"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n 4096"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n 4096"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n 4096"),
        # The server could not take the request for a worker.
        (EOFError(), "killed or crashed"),
    ],
)
def test_a_worker_that_dies_or_can_not_start_is_one_line_with_a_remedy(error: Exception, remedy: str) -> None:
    def failing() -> Iterator[RawBatch]:
        yield RawBatch([], torch.empty(0), [])
        raise error

    batches = from_workers(failing())
    next(batches)
    with pytest.raises(UserError) as raised:
        next(batches)
    assert remedy in str(raised.value) and "\n" not in str(raised.value)


def test_other_errors_keep_their_stack_trace() -> None:
    def failing() -> Iterator[RawBatch]:
        raise RuntimeError("a fault of the program")
        yield

    with pytest.raises(RuntimeError, match="a fault of the program"):
        next(from_workers(failing()))


@pytest.fixture
def no_folder_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which multiprocessing has not made its folder of sockets."""
    settings = process.current_process()._config  # type: ignore[attr-defined]
    before = settings.pop("tempdir", None)
    # Removed here and not at the end of the process.
    monkeypatch.setattr(multiprocessing.util, "Finalize", lambda *_, **__: None)
    yield
    shutil.rmtree(settings.pop("tempdir", ""), ignore_errors=True)
    if before is not None:
        settings["tempdir"] = before


@pytest.mark.parametrize("length", [SOCKET_FOLDER_BYTES, SOCKET_FOLDER_BYTES + 1, 200])
def test_sockets_can_be_bound_whatever_the_length_of_tmpdir(
    monkeypatch: pytest.MonkeyPatch, no_folder_yet: None, length: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        usual = Path(short) / ("x" * (length - len(short) - 1))
        usual.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(usual))
        make_socket_folder()
        folder = multiprocessing.util.get_temp_dir()
        assert folder.startswith(str(usual)) == (length <= SOCKET_FOLDER_BYTES)
        assert tempfile.gettempdir() == str(usual), "other files stay in TMPDIR"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(connection.arbitrary_address("AF_UNIX"))


def test_a_folder_that_refuses_sockets_is_one_line(monkeypatch: pytest.MonkeyPatch, no_folder_yet: None) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/folder/pymp-x")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match="TMPDIR: /folder/pymp-x can't be written"):
        make_socket_folder()
