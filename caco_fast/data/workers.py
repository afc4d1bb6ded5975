"""Worker processes of a DataLoader: forked from a server that has no threads, and not from the training process.

A process with threads, such as DALI's, autograd's or those of a CUDA driver, can't be forked safely: a lock that one of
them holds stays locked in the child for ever. The server starts once for a process and imports what workers need while
the run is being built; afterwards a worker costs what a fork does.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver
from typing import Any


def worker_options(workers: int, prefetch: int) -> dict[str, Any]:
    """What a DataLoader with this many workers is given; its dataset is pickled into each of them."""
    if not workers:
        return {"num_workers": 0}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "caco_fast.data.worker_server"])
    forkserver.ensure_running()
    return {
        "num_workers": workers,
        "prefetch_factor": prefetch,
        "multiprocessing_context": context,
        "worker_init_fn": leave_interrupts_to_the_trainer,
    }


def leave_interrupts_to_the_trainer(worker: int = 0) -> None:
    """Ctrl-C, torchrun and SLURM reach every process, but the trainer wants its last batches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
