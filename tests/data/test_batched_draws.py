"""The parameters of batched views: distributed as torchvision's, and each image's own."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from caco_fast.data.config import ViewConfig
from caco_fast.data.views.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, draw_views, uniforms

MANY = 20_000


def drawn(
    config: ViewConfig, *, height: int = 40, width: int = 32, channels: int = 3, rows: int = MANY, **where: int
) -> ViewDraws:
    index = np.arange(rows)
    view = np.full(rows, where.pop("view", 0))
    return draw_views(config, height, width, channels, index=index, view=view, **({"seed": 5, "epoch": 0} | where))


def distance(left: np.ndarray, right: np.ndarray) -> float:
    """The Kolmogorov-Smirnov statistic: the largest difference of the two empirical distribution functions."""
    points = np.union1d(left, right)
    ranks = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (left, right)]
    return float(np.abs(ranks[0] - ranks[1]).max())


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize("height, width", [(28, 28), (40, 32), (96, 30)])
def test_crop_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    rows = 4000
    ours = drawn(ViewConfig(scale=scale), height=height, width=width, rows=rows).box
    crop = v2.RandomResizedCrop(8, scale=scale)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    drawn_by_torchvision = [crop.make_params([image]) for _ in range(rows)]
    theirs = np.array([[p[name] for name in ("top", "left", "height", "width")] for p in drawn_by_torchvision])
    # 1.95 sqrt(2 / rows) is passed by one pair of equal distributions in a thousand.
    limit = 1.95 * np.sqrt(2 / rows)
    for column, name in enumerate(("top", "left", "height", "width")):
        assert distance(ours[:, column], theirs[:, column]) < limit, name
    assert distance(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]) < limit
    assert distance(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]) < limit


@pytest.mark.parametrize(
    "height, width, box", [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (30, 30, (0, 0, 30, 30))]
)
def test_box_after_ten_misfits_is_torchvisions_central_one(height: int, width: int, box: tuple[int, ...]) -> None:
    # An area of one pixel rounds to nothing, so no try fits.
    config = ViewConfig(scale=(1e-6, 1e-6))
    crop = v2.RandomResizedCrop(8, scale=config.scale, ratio=config.ratio)
    theirs = crop.make_params([torch.empty(3, height, width)])
    assert (theirs["top"], theirs["left"], theirs["height"], theirs["width"]) == box
    assert (drawn(config, height=height, width=width, rows=50).box == box).all()


def test_crop_boxes_lie_inside_the_image_and_reach_its_borders() -> None:
    top, left, height, width = drawn(ViewConfig(scale=(0.1, 0.3))).box.T
    assert top.min() == left.min() == 0 and height.min() > 0 and width.min() > 0
    assert (top + height).max() == 40 and (left + width).max() == 32


def test_probabilities_are_those_of_the_settings() -> None:
    config = ViewConfig(jitter_p=0.8, grey_p=0.2, blur_p=0.1, solarize_p=0.3, flip_p=0.5)
    draws = drawn(config)
    jittered = (draws.factors != (1, 1, 1, 0)).any(axis=1)
    found = [jittered, draws.grey, draws.sigma > 0, draws.solarize, draws.flip]
    for mask, wanted in zip(found, (0.8, 0.2, 0.1, 0.3, 0.5), strict=True):
        # Four standard deviations.
        assert abs(mask.mean() - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / MANY)
    # No two of them go together.
    assert np.abs(np.corrcoef(found) - np.eye(5)).max() < 4 / np.sqrt(MANY)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_probabilities_zero_and_one_are_never_and_always(probability: float) -> None:
    names = ("jitter_p", "grey_p", "blur_p", "solarize_p", "flip_p")
    draws = drawn(ViewConfig(**dict.fromkeys(names, probability)))
    jittered = (draws.factors != (1, 1, 1, 0)).any(axis=1)
    for mask in (jittered, draws.grey, draws.sigma > 0, draws.solarize, draws.flip):
        assert (mask == bool(probability)).all()


def test_factors_are_uniform_in_their_ranges() -> None:
    config = ViewConfig(jitter_p=1.0, blur_p=1.0, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    draws = drawn(config)
    ranges = {BRIGHTNESS: (0.6, 1.4), CONTRAST: (0.0, 2.5), SATURATION: (0.8, 1.2), HUE: (-0.1, 0.1)}
    even = np.linspace(0, 1, MANY)
    for operation, (low, high) in ranges.items():
        assert distance((draws.factors[:, operation] - low) / (high - low), even) < 1.95 / np.sqrt(MANY)
    assert distance((draws.sigma - 0.1) / 1.9, even) < 1.95 / np.sqrt(MANY)


def test_every_order_of_the_jitter_is_as_likely() -> None:
    order = drawn(ViewConfig()).order
    assert order.shape == (MANY, 4)
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts / MANY - 1 / 24).max() < 4 * np.sqrt(1 / 24 / MANY)


def test_grey_images_and_zero_strengths_have_fewer_slots() -> None:
    assert set(np.unique(drawn(ViewConfig(), channels=1, rows=99).order)) == {BRIGHTNESS, CONTRAST}
    assert not drawn(ViewConfig(grey_p=1.0), channels=1, rows=99).grey.any()
    assert drawn(ViewConfig(hue=0.0, contrast=0.0), rows=99).order.shape == (99, 2)
    assert drawn(ViewConfig(jitter_p=0.0), rows=99).order.shape == (99, 0)


def test_numbers_of_a_view_are_its_own() -> None:
    """The same whatever else is drawn with it, and others for another seed, epoch, image or view."""
    index, view = np.array([7, 3, 7, 9]), np.array([0, 0, 1, 2])
    numbers = uniforms(1, -1, index, view, 30)
    assert numbers.shape == (4, 30) and 0 <= numbers.min() and numbers.max() < 1
    for row in range(4):
        assert np.array_equal(uniforms(1, -1, index[[row]], view[[row]], 30)[0], numbers[row])
        # Drawing fewer numbers changes none of them.
        assert np.array_equal(uniforms(1, -1, index[[row]], view[[row]], 5)[0], numbers[row, :5])
    others = [uniforms(2, -1, index, view, 30), uniforms(1, 0, index, view, 30), uniforms(-1, 1, index, view, 30)]
    together = np.concatenate([numbers, *others]).ravel()
    assert len(np.unique(together)) == len(together)


def test_numbers_are_recorded_ones() -> None:
    """A change of the hash would change every run ever resumed, and machines must agree."""
    found = uniforms(2**64 - 1, -3, np.array([123456]), np.array([1]), 3)[0]
    assert np.array_equal(found, [0.1509875873173454, 0.4055527557299794, 0.6799993019897843])


def test_neighbouring_keys_are_uncorrelated() -> None:
    grid = [
        uniforms(seed, epoch, np.arange(500), np.full(500, view), 8)
        for seed in (0, 1)
        for epoch in (0, 1)
        for view in (0, 1)
    ]
    numbers = np.stack(grid)  # [8, 500, 8]
    streams = numbers.transpose(0, 2, 1).reshape(64, 500)
    off_diagonal = np.abs(np.corrcoef(streams) - np.eye(64))
    assert off_diagonal.max() < 5 / np.sqrt(500)
    lagged = [np.corrcoef(numbers[:, :-1, draw].ravel(), numbers[:, 1:, draw].ravel())[0, 1] for draw in range(8)]
    assert np.abs(lagged).max() < 5 / np.sqrt(numbers[:, 1:, 0].size)
