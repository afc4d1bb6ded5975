"""One process of a run: its device, its threads and its place among the ranks.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them the run is a single process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from caco_fast.engine.settings import TrainerConfig
from caco_fast.errors import UserError


@contextmanager
def launched(config: TrainerConfig) -> Iterator[torch.device]:
    """Joins the process group where torchrun started one, and leaves it at the end; gives this rank's device."""
    config.validate()
    device = _device(config.device)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.cpu_threads or max(1, (os.cpu_count() or 1) // local_ranks))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


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
