"""One process of a run: its device, its threads and its place among the ranks.

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

from caco_fast.engine.one_voice import RankLost, one_voice
from caco_fast.engine.settings import TrainerConfig
from caco_fast.errors import UserError


@contextmanager
def launched(config: TrainerConfig) -> Iterator[torch.device]:
    """Joins the process group where torchrun started one, and leaves it at the end; gives this rank's device.

    Raises:
        RankLost: another rank is gone, or did not answer within `collective_timeout`.
        SaidElsewhere: the error that ends the run leaves on another rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield _prepare(config)
        return
    timeout = timedelta(seconds=max(1, config.collective_timeout))
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
        store = _room_of_this_start(store, rank, ranks, timeout)
    except (dist.DistError, TimeoutError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankLost(f"the ranks did not meet at {place} ({' '.join(str(error).split())[:120]})") from None
    with one_voice(dist.PrefixStore("one voice", store), rank, ranks):
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


def _room_of_this_start(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> dist.Store:
    """A part of the store that no earlier start has written to. Raises TimeoutError where not all ranks come.

    torchrun keeps one store over all its restarts, in which a rank finds the addresses of those that were killed; its
    count of restarts is no name for the part, because each machine counts for itself (pytorch issues 135712, 167288).
    So each rank says hello by a name of its own, and under that name, which nobody knew before, gets that of the part.
    """
    me, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    there: set[int] = set()
    while time.monotonic() < end:
        if rank != 0:
            # Again each time: an earlier start's rank may have said its own in between.
            store.set(f"hello/{rank}", me)
            if store.check([f"welcome/{me}"]):
                room = dist.PrefixStore(store.get(f"welcome/{me}").decode(), store)
                room.set(f"here/{rank}", "")
                return room
        else:
            room = dist.PrefixStore(me, store)
            for other in set(range(1, ranks)) - there:
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", me)
                if room.check([f"here/{other}"]):
                    there.add(other)
            if len(there) == ranks - 1:
                return room
        time.sleep(0.02)
    missing = sorted(set(range(1, ranks)) - there) if rank == 0 else [0]
    raise TimeoutError(f"no sign of rank {', '.join(map(str, missing))} within {timeout.total_seconds():.0f} s")


def _prepare(config: TrainerConfig) -> torch.device:
    if config.deterministic:
        # Read when cuBLAS starts.
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
        raise UserError(f"trainer.device: found '{name}', want auto, cpu, cuda or cuda:N") from None
    if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"trainer.device: '{name}' puts every rank on one GPU; under torchrun use trainer.device=cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"trainer.device: '{name}' asked for, but torch {torch.__version__} sees no GPU; use trainer.device=cpu"
            )
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"trainer.device: GPU {index} asked for, {torch.cuda.device_count()} present")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UserError(f"trainer.device: found '{name}', want auto, cpu, cuda or cuda:N")
    return device
