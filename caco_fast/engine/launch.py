"""The start of one process of a run: its device, its threads and its place among the ranks.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the run is a single process.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from caco_fast.engine.ranks import RankLost, report_error_once
from caco_fast.errors import UserError
from caco_fast.host import cores_of_rank

LEFT_OVER = "start several ranks with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK for a run of one process"
# Number of processes, and a variable that each of them has, for launchers whose processes do not know of each other.
TASKS_OF_LAUNCHERS = (
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
)


class LaunchSettings(Protocol):
    """What a process needs to know at its start; `TrainerConfig` is one."""

    @property
    def device(self) -> str: ...

    @property
    def cpu_threads(self) -> int: ...

    @property
    def deterministic(self) -> bool: ...

    @property
    def collective_timeout(self) -> int: ...


@contextmanager
def launched(config: LaunchSettings, section: str = "trainer.") -> Iterator[torch.device]:
    """Join the process group if torchrun started one, and leave it at the end. Yields this rank's device.

    section: where the user finds these settings, for the lines of errors.

    Raises:
        RankLost: another rank is gone, or did not answer within `collective_timeout`.
        ReportedElsewhere: another rank reports the error that ends the run.
    """
    ranks = _ranks_of_environment()
    if ranks == 1:
        yield _prepare(config, ranks, section)
        return
    timeout = timedelta(seconds=max(1, config.collective_timeout))
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
        store = _store_of_this_start(store, rank, ranks, timeout)
    except (dist.DistError, TimeoutError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankLost(f"the ranks did not meet at {place} ({' '.join(str(error).split())[:120]})") from None
    with report_error_once(dist.PrefixStore("errors", store), rank, ranks):
        device = _prepare(config, ranks, section)
        options: dict[str, Any] = {"backend": "gloo"}
        if device.type == "cuda":
            # With its device NCCL connects all ranks at once. Without, each rank that sends its part of the bank to
            # rank 0 would make a communicator of two.
            options = {"backend": "nccl", "device_id": device}
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(**options, store=group_store, rank=rank, world_size=ranks, timeout=timeout)
        yield device
        # Not after an error: it may wait for ranks that are gone.
        dist.destroy_process_group()


def _ranks_of_environment() -> int:
    """The number of ranks, once the variables that torchrun sets are known to be complete.

    Raises:
        UserError: some are left over or damaged, or another launcher started several processes without them.
    """
    if "WORLD_SIZE" not in os.environ:
        for tasks, of_task in TASKS_OF_LAUNCHERS:
            if of_task in os.environ and (count := os.environ.get(tasks, "1")) not in ("", "1"):
                raise UserError(
                    f"{tasks}: found {count} and no WORLD_SIZE, so each process would be a run of its own; start "
                    f"the ranks with torchrun (docs/ranks.md), or set {tasks}=1 for a run of one process"
                )
        return 1
    ranks = _number_of_environment("WORLD_SIZE", 1)
    if ranks == 1:
        return 1
    if (rank := _number_of_environment("RANK", 0)) >= ranks:
        raise UserError(f"RANK: found {rank}, expected less than WORLD_SIZE={ranks}; {LEFT_OVER}")
    _number_of_environment("MASTER_PORT", 1)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR: found none beside WORLD_SIZE={ranks}, expected the host of rank 0; {LEFT_OVER}")
    for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        if name in os.environ:
            _number_of_environment(name, least)
    return ranks


def _number_of_environment(name: str, least: int) -> int:
    text = os.environ.get(name)
    if text is None or not text.isdecimal() or int(text) < least:
        found = "none" if text is None else repr(text)
        raise UserError(f"{name}: found {found} in the environment, expected a number from {least}; {LEFT_OVER}")
    return int(text)


def _store_of_this_start(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> dist.Store:
    """A part of the store that no earlier start has written to. Raises TimeoutError if a rank does not come.

    torchrun keeps one store over all its restarts, in which a rank would find the addresses of killed ranks. Its count
    of restarts can't name the part, because each machine counts for itself (pytorch issues 135712, 167288). So each
    rank announces a random token, and rank 0 answers under that token with the name of the part.
    """
    token, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    present: set[int] = set()
    while time.monotonic() < end:
        if rank != 0:
            # Again each time: a rank of an earlier start may have written its own token in between.
            store.set(f"token/{rank}", token)
            if store.check([f"part/{token}"]):
                part = dist.PrefixStore(store.get(f"part/{token}").decode(), store)
                part.set(f"present/{rank}", "")
                return part
        else:
            part = dist.PrefixStore(token, store)
            for other in set(range(1, ranks)) - present:
                if store.check([f"token/{other}"]):
                    store.set(f"part/{store.get(f'token/{other}').decode()}", token)
                if part.check([f"present/{other}"]):
                    present.add(other)
            if len(present) == ranks - 1:
                return part
        time.sleep(0.02)
    missing = sorted(set(range(1, ranks)) - present) if rank == 0 else [0]
    raise TimeoutError(f"no sign of rank {', '.join(map(str, missing))} within {timeout.total_seconds():.0f} s")


def _prepare(config: LaunchSettings, ranks: int, section: str) -> torch.device:
    """Set determinism and the number of threads for this process, and return its device."""
    if config.deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    device = _device(config.device, ranks, section)
    if device.type == "cuda":
        # Also for one process: what is left to the default, such as pinned memory, would open a context on GPU 0.
        torch.cuda.set_device(device)
    torch.set_num_threads(config.cpu_threads or _threads_of_environment() or cores_of_rank())
    return device


def _threads_of_environment() -> int:
    """OMP_NUM_THREADS, or 0 if the user has not set it."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    # torchrun sets 1 for several ranks, whatever the cores are.
    by_torchrun = threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") != "1"
    return int(threads) if threads.isdecimal() and not by_torchrun else 0


def _device(name: str, ranks: int, section: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{section}device: found '{name}', expected auto, cpu, cuda or cuda:N") from None
    if device.index is not None and ranks > 1:
        raise UserError(
            f"{section}device: found '{name}', which puts every rank on one GPU; under torchrun use "
            f"{section}device=cuda"
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"{section}device: found '{name}', but torch {torch.__version__} sees no GPU; use {section}device=cpu"
            )
        local_rank = _number_of_environment("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else 0
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"{section}device: found GPU {index}, expected one of the {torch.cuda.device_count()} present"
            )
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UserError(f"{section}device: found '{name}', expected auto, cpu, cuda or cuda:N")
    return device
