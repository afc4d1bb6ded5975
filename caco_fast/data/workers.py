"""Worker processes of a DataLoader: forked from a server that has no threads, and not from the training process.

A process with threads, such as DALI's, autograd's or those of a CUDA driver, can't be forked safely: a lock that one of
them holds stays locked in the child for ever. The server starts once for a process and imports what workers need while
the run is being built; afterwards a worker costs what a fork does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from pickle import PicklingError
from types import ModuleType
from typing import Any


class _Popen(Popen):
    def terminate(self) -> None:
        """As a process does at its exit to those that it has left. They don't heed SIGTERM."""
        self.kill()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: ForkServerProcess) -> Popen:
        with suppress(PicklingError), _nameless_main():
            return _Popen(process)
        # It is given something of the script's own, such as a source of images.
        return _Popen(process)


class _Context(ForkServerContext):
    Process = _Process


def worker_options(workers: int, prefetch: int) -> dict[str, Any]:
    """What a DataLoader with this many workers is given; its dataset is pickled into each of them."""
    if not workers:
        return {"num_workers": 0}
    context = _Context()
    context.set_forkserver_preload(["caco_fast.data.worker_server"])
    forkserver.ensure_running()
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
    """Ends this worker when the training process is gone, be it killed. torch looks for that at the worker's parent,
    which is the server, and the server lives as long as its workers."""
    process.join()
    os._exit(1)


def leave_interrupts_to_the_trainer() -> None:
    """Ctrl-C, torchrun and SLURM reach every process, but the trainer wants its last batches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Inside, multiprocessing finds no script that a new process would have to run again.

    It would do so for what is pickled out of the script, and fail where the script has no `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
