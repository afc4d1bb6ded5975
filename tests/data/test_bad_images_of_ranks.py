"""The share of bad images counts all ranks, which tell each other at the end of an epoch."""

from pathlib import Path

import numpy as np
import pytest

from caco_fast.data.loaders.base import BadImages, epoch_order, step_share
from caco_fast.distributed import rank
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.errors import UserError
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images
from tests.ranks import run_ranks

RANKS, BATCH, N = 2, 8, 40


def exchanged(limit: int) -> list[str] | str:
    """Both ranks met image b, and each rank met another one."""
    bad = BadImages(limit, 10)
    bad.add([("b", f"rank {rank()}"), (f"a of {rank()}", "empty")])
    try:
        bad.exchange()
    except UserError as error:
        return str(error).splitlines()[0]
    return sorted(bad.reasons)


def test_an_image_counts_once_whichever_ranks_met_it() -> None:
    assert run_ranks(exchanged, RANKS, 3) == [["a of 0", "a of 1", "b"]] * RANKS
    for line in run_ranks(exchanged, RANKS, 2):
        assert line.startswith("3 of 10 training images can't be read, more than the 2 that")
        Path(line.split("All of them: ")[1]).unlink()


def met_by(number: int) -> set[int]:
    """The images that a rank alone meets in the epoch of the initialisation and in the first."""
    orders = [epoch_order(0, epoch, N) for epoch in (-1, 0)]
    shares = [[step_share(order, step, BATCH, number, RANKS) for step in range(N // BATCH)] for order in orders]
    return set.intersection(*(set(np.concatenate(share).tolist()) for share in shares))


def trained(images: str, folder: str, limit: float) -> str:
    settings = (f"data.bad_image_limit={limit}", "trainer.seed=0", "checkpoint.every_epochs=0")
    try:
        train(config(Path(images), *settings, "evaluation={every_epochs: 0, k: [3]}"), Path(folder))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "trained"


@pytest.mark.parametrize("limit, stops", [(3, True), (4, False)])
def test_too_many_over_all_ranks_stop_the_run_with_a_checkpoint(tmp_path: Path, limit: int, stops: bool) -> None:
    images, run = write_images(tmp_path / "images"), tmp_path / "run"
    files = sorted((images / "train").glob("*/*.png"))
    for number in range(RANKS):
        # The image after a broken one must not be broken too, or one rank would meet both.
        first, *others = sorted(met_by(number))
        for position in (first, next(other for other in others if other > first + 1)):
            files[position].write_bytes(b"")
    said = run_ranks(trained, RANKS, str(images), str(run), limit / N)
    if not stops:
        assert said == ["trained"] * RANKS
        return
    for line in said:
        assert line.startswith("UserError: 4 of 40 training images can't be read, more than the 3")
        Path(line.split("All of them: ")[1]).unlink()
    saved = CheckpointStore(run / "checkpoints")
    position = saved.load(saved.latest())["position"]
    assert (position["phase"], position["step"], position["epochs_ended"]) == ("training", N // BATCH, 1)
