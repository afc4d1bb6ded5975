"""Runs whose BatchNorm takes its statistics over groups of images, with shuffled keys."""

from pathlib import Path
from typing import Any

import pytest
import torch

from caco_fast import build, training
from caco_fast.distributed import rank
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.settings import TrainerConfig
from caco_fast.errors import UserError
from tests.engine.graph_steps import batch_at, losses, make_trainer, state_of
from tests.engine.replay import NoHostWaits
from tests.engine.test_training import assert_same, last_state
from tests.engine.tiny_run import config
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

MOCO = ("method=moco", "moco.symmetric=true", "optimizer={name: sgd, lr: 0.03}", "evaluation.every_epochs=0")
GROUPS = (*MOCO, "trainer.batch_norm_images=4")


def run_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def test_a_run_goes_on_where_it_was_stopped(images: Path, tmp_path: Path) -> None:
    """Bit for bit, from the middle of an epoch, with the orders of the keys."""
    training.train(config(images, *GROUPS), tmp_path / "whole")
    training.train(config(images, *GROUPS, "trainer.max_steps=8"), tmp_path / "parts")
    training.train(config(images, *GROUPS), tmp_path / "parts", resume="auto")
    assert run_losses(tmp_path / "parts") == run_losses(tmp_path / "whole")
    whole, parts = last_state(tmp_path / "whole"), last_state(tmp_path / "parts")
    assert_same(parts["encoders"], whole["encoders"])
    assert_same(parts["method"], whole["method"])
    # Two views of each step.
    assert int(whole["encoders"]["shuffle.count"]) == 20


def test_one_group_on_one_rank_is_the_default_bit_for_bit(images: Path, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for folder, more in (("a", ()), ("b", ("trainer.batch_norm_images=8",))):
        trainer = make_trainer(images, tmp_path / folder, *MOCO, *more)
        found.append({"losses": losses(trainer, steps=4), **state_of(trainer)})
    assert_same(*found)


def test_groups_and_the_shuffle_change_the_training(images: Path, tmp_path: Path) -> None:
    ways = (MOCO, GROUPS, (*GROUPS, "trainer.shuffle_keys=false"))
    trainers = [make_trainer(images, tmp_path / str(at), *way) for at, way in enumerate(ways)]
    assert len({tuple(losses(trainer, steps=2)) for trainer in trainers}) == 3
    assert [trainer.encoders.shuffle is not None for trainer in trainers] == [False, True, False]


def test_a_run_may_be_resumed_with_other_groups(images: Path, tmp_path: Path, caplog) -> None:
    training.train(config(images, *MOCO, "trainer.max_steps=3"), tmp_path / "run")
    assert training.train(config(images, *GROUPS), tmp_path / "run", resume="auto")["finished"]
    assert "resuming with another trainer.batch_norm_images: 4, was 0" in caplog.text


def test_the_host_waits_for_nothing(images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(images, tmp_path, *GROUPS)
    losses(trainer, steps=3)
    trainer.step.checks_loss = False
    with NoHostWaits():
        trainer.step(batch_at(3, (32, 32)).views, trainer._rates(trainer.phases[-1], 10))


def on_a_rank(images: Path, folder: Path) -> tuple[dict[str, Any], bool]:
    trainer = make_trainer(images, folder / str(rank()), *GROUPS[:-1], "trainer.batch_norm_images=4")
    losses(trainer, steps=2)
    return trainer.encoders.state_dict(), trainer.encoders.query.joint_views


def test_ranks_hold_the_same_statistics_and_views_pass_apart(images: Path, tmp_path: Path) -> None:
    (first, joint), (second, _) = run_ranks(on_a_rank, 2, images, tmp_path)
    assert_same(second, first)
    assert not joint and int(first["shuffle.count"]) == 4


@pytest.mark.parametrize(
    "settings, line",
    [
        (("batch_norm_images=3",), r"found 3, expected 0 or a divisor of the 8 images .* \(batch 8, ranks 1, accumula"),
        (("batch_norm_images=16",), "found 16, expected 0 or a divisor of the 8 images that a rank embeds at a time"),
        (("batch_norm_images=8", "accumulate=2"), "found 8, expected 0 or a divisor of the 4 images"),
    ],
)
def test_groups_that_do_not_divide_a_ranks_batch_are_refused(settings, line, images: Path) -> None:
    with pytest.raises(UserError, match=f"trainer.batch_norm_images: {line}"):
        build.settled(config(images, *(f"trainer.{given}" for given in settings)), torch.device("cpu"))


@pytest.mark.parametrize("images_of_a_group", [1, -2])
def test_a_group_has_two_images_at_least(images_of_a_group: int) -> None:
    with pytest.raises(UserError, match="trainer.batch_norm_images: found .*, expected 0 .all. or at least 2"):
        TrainerConfig(batch_norm_images=images_of_a_group)
