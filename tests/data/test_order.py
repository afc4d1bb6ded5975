import numpy as np
import pytest

from caco_fast.data.loaders.base import epoch_order, evaluation_share, step_share, steps_per_epoch, view_seed
from caco_fast.errors import UserError


@pytest.mark.parametrize("epoch", [-2, -1, 0, 1, 1000])
def test_an_epoch_visits_every_image_once_and_can_be_repeated(epoch: int) -> None:
    order = epoch_order(3, epoch, 1000)
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, epoch_order(3, epoch, 1000))


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in (0, 1, 2**40) for epoch in (-2, -1, 0, 1)}
    assert len(orders) == 12


def test_view_seeds_differ_in_every_argument() -> None:
    seeds = {view_seed(s, e, i, v) for s in (0, 1) for e in (-1, 0, 1) for i in (0, 1, 2) for v in (0, 1)}
    assert len(seeds) == 36
    assert view_seed(1, 2, 3, 4) == view_seed(1, 2, 3, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_the_ranks_together_see_the_same_batch_whatever_their_number(world_size: int) -> None:
    order = epoch_order(0, 0, 100)
    for step in range(steps_per_epoch(100, 12, world_size)):
        shares = [step_share(order, step, 12, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(shares), order[12 * step : 12 * step + 12])


@pytest.mark.parametrize(
    ("length", "batch_size", "steps"), [(100, 12, 8), (96, 12, 8), (95, 12, 7), (12, 12, 1)], ids=str
)
def test_what_is_left_after_the_last_whole_batch_is_dropped(length: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(length, batch_size) == steps


def test_fewer_images_than_a_batch_names_both_numbers() -> None:
    with pytest.raises(UserError, match=r"100 images, fewer than one batch of 256"):
        steps_per_epoch(100, 256)


def test_batch_1024_runs_on_one_two_and_four_nodes_of_eight() -> None:
    """The promise of docs/ranks.md."""
    assert [steps_per_epoch(2048, 1024, 8 * nodes) for nodes in (1, 2, 4)] == [2, 2, 2]
    with pytest.raises(UserError, match="batch size 1024 can't be shared evenly by 24 ranks; take 1008, or another"):
        steps_per_epoch(2048, 1024, 24)
    assert [960 % (8 * nodes) for nodes in (1, 2, 3, 4)] == [0] * 4


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch size 10 .* 4 ranks; take 8"):
        steps_per_epoch(100, 10, 4)


@pytest.mark.parametrize("share", [1.0, 0.25, 1e-9])
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_evaluation_shards_are_disjoint_complete_and_of_the_stated_share(share: float, world_size: int) -> None:
    shards = [evaluation_share(103, share, rank, world_size) for rank in range(world_size)]
    joined = np.concatenate(shards)
    assert len(joined) == max(1, round(103 * share)) == len(set(joined))
    assert np.array_equal(joined, evaluation_share(103, share, 0, 1))
    assert joined.min() >= 0 and joined.max() < 103


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="share"):
        evaluation_share(10, share, 0, 1)
