"""Runs a function on several ranks, each a process of its own: over gloo, or over NCCL with a GPU each."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The server imports torch and the package once; the ranks are forked from it, before any thread was started.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "caco_fast.training"])
# Enough on a shared machine; a run of ranks takes a tenth of it if nothing else runs.
SECONDS = 300


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, backend: str = "gloo") -> list[Any]:
    """The results of `function(*arguments)` by rank. It is at the top level of a module, so that it can be pickled."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_rank, args=(function, rank, ranks, folder, arguments, backend), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        # One rank that fails leaves the others waiting for it.
        end = time.monotonic() + SECONDS
        while (
            any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes) and time.monotonic() < end
        ):
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        assert codes == [0] * ranks, f"exit codes of the ranks: {codes} (None: it was still running)"
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def _rank(
    function: Callable[..., Any], rank: int, ranks: int, folder: str, arguments: tuple[Any, ...], backend: str
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=SECONDS),
    )
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
