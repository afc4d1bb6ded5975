"""Which images a step sees, and the random seed of every view: functions of (seed, epoch, ...) alone.

Legend: N images in the training set.
"""

from __future__ import annotations

import numpy as np

from caco_fast.errors import UserError

_ORDER, _VIEW, _SHARE = range(3)


def _seed_sequence(purpose: int, *numbers: int) -> np.random.SeedSequence:
    # SeedSequence takes no negative numbers, but epochs below zero exist (the bank's initialisation).
    return np.random.SeedSequence([purpose, *(number % 2**64 for number in numbers)])


def view_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """The seed of the random numbers that make one view of one image in one epoch."""
    return int(_seed_sequence(_VIEW, seed, epoch, index, view).generate_state(1)[0])


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which an epoch goes through the training set: a permutation [N] int64."""
    return np.random.default_rng(_seed_sequence(_ORDER, seed, epoch)).permutation(length)


def steps_per_epoch(length: int, batch_size: int, world_size: int = 1) -> int:
    """Whole batches in `length` images; UserError where there is none, or where ranks can't share a batch evenly."""
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}; it must be 1 or more")
    if batch_size % world_size:
        raise UserError(
            f"the batch size {batch_size} can't be shared evenly by {world_size} ranks; "
            f"take {max(1, batch_size // world_size) * world_size}, or another number of ranks"
        )
    if length < batch_size:
        raise UserError(
            f"the training set has {length} images, fewer than one batch of {batch_size}; "
            f"lower the batch size to {length} or less, or add images"
        )
    return length // batch_size


def step_share(order: np.ndarray, step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Rank's contiguous share of the global batch `order[step * batch_size : (step + 1) * batch_size]`."""
    share = batch_size // world_size
    start = step * batch_size + rank * share
    return order[start : start + share]


def evaluation_share(length: int, share: float, rank: int, world_size: int) -> np.ndarray:
    """Rank's contiguous part of a fixed random `share` of `length` images, in ascending order."""
    if not 0 < share <= 1:
        raise UserError(f"the share of the images to evaluate on is {share}; it must be above 0 and at most 1")
    kept = max(1, round(share * length)) if length else 0
    chosen = np.random.default_rng(_seed_sequence(_SHARE)).permutation(length)[:kept]
    return np.sort(chosen)[rank * kept // world_size : (rank + 1) * kept // world_size]
