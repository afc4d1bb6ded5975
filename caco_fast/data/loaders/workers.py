"""The worker processes in which training and evaluation read images, and what ends them, in words.

Workers are forked from a server that has no threads, and not from the training process. A process with threads, such as
DALI's, autograd's or those of a CUDA driver, can't be forked safely: a lock that one of them holds stays locked in the
child for ever. The server starts once for a process and imports what workers need while the run is being built;
afterwards a worker costs as much as a fork.
"""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, queues
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from pickle import PicklingError
from types import ModuleType
from typing import Any

import torch

from caco_fast.data.loaders.base import RawBatch
from caco_fast.errors import UserError
from caco_fast.host import STOP_SIGNALS, make_socket_folder

# Workers hand over their batches through files here.
SHARED_MEMORY = "/dev/shm"
# What torch says in its errors about workers, which have no type or number of their own.
_DESCRIPTORS = ("Too many open files", "ancdata")
_MEMORY = ("shared memory", "No space left on device")
_DEATH = ("exited unexpectedly", "is killed by signal")


def from_workers(batches: Iterable[RawBatch]) -> Iterator[RawBatch]:
    """The batches of a DataLoader with any number of workers.

    Raises:
        UserError: a worker died, or can't start or hand over a batch; the line names the remedy.
    """
    try:
        iterator = iter(batches)
        while (raw := next(iterator, None)) is not None:
            if raw.error:
                raise UserError(raw.error)
            yield raw
    except (RuntimeError, OSError, EOFError) as error:
        if line := _remedy(error):
            raise UserError(line) from error
        raise


def _remedy(error: Exception) -> str:
    """A line for the user about what workers lack; empty if the error is another one."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or any(word in text for word in _DESCRIPTORS):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"worker processes: found a limit of {limit} open files, which is too low for their batches; raise it "
            "(ulimit -n 4096), or lower data.workers or data.prefetch"
        )
    room = "shared memory"
    with suppress(OSError):
        disk = shutil.disk_usage(SHARED_MEMORY)
        room = f"{SHARED_MEMORY} ({disk.free / 2**20:.0f} of {disk.total / 2**20:.0f} MiB free)"
    if getattr(error, "errno", None) == errno.ENOSPC or any(word in text for word in _MEMORY):
        return (
            f"worker processes: {room} has no room for their batches; give it more (docker run --shm-size=8g or "
            "--ipc=host), or lower data.workers or data.prefetch"
        )
    if isinstance(error, EOFError) or any(word in text for word in _DEATH):
        return (
            f"worker processes: one was killed or crashed, most likely for lack of main memory or of room in {room}; "
            "lower data.workers or data.prefetch"
        )
    return ""


class _Queue(queues.Queue):
    """A queue that tells its reader what can't be sent. Otherwise the reader would wait for it for ever."""

    def _on_queue_feeder_error(self, error: Exception, item: Any) -> None:  # type: ignore[override]
        if not isinstance(item, tuple) or (isinstance(item[1], RawBatch) and item[1].error):
            # The connection itself is broken. The trainer notices that this worker is gone.
            os._exit(1)
        reason = _remedy(error) or f"worker processes: a batch can't be handed over ({error})"
        # An empty tensor needs neither memory nor a descriptor.
        self.put((item[0], RawBatch([], torch.empty(0, dtype=torch.int64), [], reason)))


class _Popen(Popen):
    def terminate(self) -> None:
        """Kill the worker, because it ignores SIGTERM. A process calls this at its exit for each worker it has left."""
        self.kill()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: ForkServerProcess) -> Popen:
        with suppress(PicklingError), _nameless_main():
            return _Popen(process)
        # The worker is given something that the script itself defines, such as a source of images.
        return _Popen(process)


class _Context(ForkServerContext):
    Process = _Process

    def Queue(self, maxsize: int = 0) -> queues.Queue:
        return _Queue(maxsize, ctx=self.get_context())


def as_is(batch: Any) -> Any:
    """A collate function for datasets that give whole batches."""
    return batch


def worker_options(workers: int, prefetch: int) -> dict[str, Any]:
    """The arguments of a DataLoader with this many workers; its dataset is pickled into each of them."""
    if not workers:
        return {"num_workers": 0}
    context = _Context()
    context.set_forkserver_preload(["caco_fast.data.loaders.worker_preload"])
    make_socket_folder()
    try:
        forkserver.ensure_running()
    except OSError as error:
        raise UserError(_remedy(error) or f"worker processes can't start: {error}") from error
    return {
        "num_workers": workers,
        "prefetch_factor": prefetch,
        "multiprocessing_context": context,
        "worker_init_fn": _begin,
    }


def _begin(worker: int) -> None:
    leave_interrupts_to_the_trainer()
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(process: Any) -> None:
    """End this worker when the training process is gone, even if it was killed.

    torch watches the worker's parent for that. Here the parent is the server, which lives as long as its workers.
    """
    process.join()
    os._exit(1)


def leave_interrupts_to_the_trainer() -> None:
    """Ignore the signals that Ctrl-C, torchrun and SLURM send to every process: the trainer needs its last batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Hide the script from multiprocessing, so that a new process does not run it again.

    multiprocessing would run it for what is pickled out of the script, and would fail if the script has no
    `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
