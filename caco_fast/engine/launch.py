"""The start of one process of a run: its device, its threads and its place among the ranks.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the run is a single process.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from caco_fast.engine.ranks import RankLost, report_error_once
from caco_fast.engine.settings import TrainerConfig
from caco_fast.errors import UserError


@contextmanager
def launched(config: TrainerConfig) -> Iterator[torch.device]:
    """Join the process group if torchrun started one, and leave it at the end. Yields this rank's device.

    Raises:
        RankLost: another rank is gone, or did not answer within `collective_timeout`.
        ReportedElsewhere: another rank reports the error that ends the run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield _prepare(config)
        return
    timeout = timedelta(seconds=max(1, config.collective_timeout))
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
        store = _store_of_this_start(store, rank, ranks, timeout)
    except (dist.DistError, TimeoutError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankLost(f"the ranks did not meet at {place} ({' '.join(str(error).split())[:120]})") from None
    with report_error_once(dist.PrefixStore("errors", store), rank, ranks):
        device = _prepare(config)
        backend = "gloo"
        if device.type == "cuda":
            backend = "nccl"
            torch.cuda.set_device(device)
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=ranks, timeout=timeout)
        yield device
        # Not after an error: it may wait for ranks that are gone.
        dist.destroy_process_group()


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


def _prepare(config: TrainerConfig) -> torch.device:
    """Set determinism and the number of threads for this process, and return its device."""
    if config.deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    device = _device(config.device)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.cpu_threads or max(1, (os.cpu_count() or 1) // local_ranks))
    return device


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"trainer.device: found '{name}', expected auto, cpu, cuda or cuda:N") from None
    if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"trainer.device: found '{name}', which puts every rank on one GPU; under torchrun use trainer.device=cuda"
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"trainer.device: found '{name}', but torch {torch.__version__} sees no GPU; use trainer.device=cpu"
            )
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"trainer.device: found GPU {index}, expected one of the {torch.cuda.device_count()} present"
            )
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UserError(f"trainer.device: found '{name}', expected auto, cpu, cuda or cuda:N")
    return device
