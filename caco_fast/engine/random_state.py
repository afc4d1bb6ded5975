"""The states of all random number generators as plain values and tensors, fit for a checkpoint."""

import logging
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from caco_fast.distributed import is_distributed, rank, world_size

log = logging.getLogger(__name__)


def capture() -> dict[str, Any]:
    """The generators of this process: Python, numpy, torch on the CPU, and on every CUDA device if CUDA is in use."""
    name, key, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(key.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached_gaussian),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Puts the generators back; on another number of CUDA devices those that both have, with a warning."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, key, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    # Copies, because the state may be mapped from a file that is about to go.
    torch.set_rng_state(state["torch"].clone())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if state["cuda"] and len(state["cuda"]) != devices:
        log.warning("random states: saved for %d CUDA devices, found %d; training goes on, not bit for bit",
                    len(state["cuda"]), devices)  # fmt: skip
    for device, saved in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(saved.clone(), device)


def capture_ranks() -> list[dict[str, Any]]:
    """`capture()` of every rank, in rank order, on all ranks: the checkpoint that rank 0 writes serves them all."""
    if not is_distributed():
        return [capture()]
    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, capture())
    return states


def restore_ranks(states: list[dict[str, Any]]) -> None:
    """Puts back this rank's own generators; on another number of ranks nothing is restored, with a warning."""
    if len(states) == world_size():
        restore(states[rank()])
    elif rank() == 0:
        log.warning(
            "random states: saved by %d ranks, found %d; training goes on, not bit for bit", len(states), world_size()
        )
