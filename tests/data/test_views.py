"""The recipe, tested on what comes out: images whose pixels tell where they were and what happened to them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from caco_fast.data.config import ViewConfig
from caco_fast.data.views.pil import evaluation_transform, keep_random_state, normalize, reseed, view_transform

PLAIN = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_p=0.0, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarize_p=0.0)


def views(image: Image.Image, count: int, **settings: object) -> Tensor:
    """`count` views [count, ch, size, size] as float, with everything off but what `settings` say."""
    config = ViewConfig(**{**PLAIN, "size": 32, **settings})
    transform = view_transform(config, 1 if image.mode == "L" else 3)
    made = []
    with keep_random_state():
        for seed in range(count):
            reseed(seed)
            made.append(transform(image))
    return torch.stack(made).float()


def flat(*colour: int, side: int = 32) -> Image.Image:
    return Image.new("L" if len(colour) == 1 else "RGB", (side, side), colour if len(colour) > 1 else colour[0])


def check_share(found: float, wanted: float, count: int) -> None:
    """Within 4 standard deviations of a binomial share."""
    assert abs(found - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / count)


def reference_crops(generator: np.random.Generator, count: int, scale: tuple, ratio: tuple, side: int) -> np.ndarray:
    """Widths and heights [count, 2] of the published crop: area uniform, log ratio uniform, ten tries to fit in."""
    crops = np.full((count, 2), side)
    for row in crops:
        for _ in range(10):
            area = side * side * generator.uniform(*scale)
            aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width <= side and height <= side:
                row[:] = width, height
                break
    return crops


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.14, 1.0), (0.05, 0.14)], ids=str)
def test_crops_have_the_published_distribution_of_area_aspect_and_place(scale: tuple[float, float]) -> None:
    side, size, count = 250, 50, 600
    ramp = np.arange(side, dtype=np.uint8)
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp, ramp[:, None]
    made = views(Image.fromarray(pixels), count, scale=scale, ratio=(3 / 4, 4 / 3), size=size)
    # Colour is position, so the colour's slope over the view is the size of the crop; the edges of a resize are curved.
    inner = slice(5, size - 5)
    span = size / (size - 11)
    across, down = made[:, 0].mean(1)[:, inner], made[:, 1].mean(2)[:, inner]
    width, height = (across[:, -1] - across[:, 0]) * span, (down[:, -1] - down[:, 0]) * span
    wanted = reference_crops(np.random.default_rng(0), 20_000, scale, (3 / 4, 4 / 3), side)

    def distance(found: np.ndarray, reference: np.ndarray) -> float:
        """Kolmogorov-Smirnov; above 0.08 one time in a thousand for these counts."""
        at = np.sort(np.concatenate([found, reference]))
        shares = [np.searchsorted(np.sort(values), at, side="right") / len(values) for values in (found, reference)]
        return np.abs(shares[0] - shares[1]).max()

    assert distance((width * height / side**2).numpy(), wanted.prod(1) / side**2) < 0.08
    assert distance((width / height).log().numpy(), np.log(wanted[:, 0] / wanted[:, 1])) < 0.08
    # The centre of a crop is uniform in the space that its size leaves.
    free = side - width
    place = ((across.mean(1) - width / 2) / free)[free > 25]
    assert abs(place.mean() - 0.5) < 0.05 and abs(place.std() - 1 / math.sqrt(12)) < 0.03


@pytest.mark.parametrize("flip_p", [0.0, 0.5, 1.0])
def test_flips(flip_p: float) -> None:
    half = flat(0)
    half.paste(200, (16, 0, 32, 32))
    made = views(half, 400, flip_p=flip_p)
    check_share((made[:, 0, 0, 0] > 100).float().mean().item(), flip_p, 400)


@pytest.mark.parametrize("grey_p", [0.0, 0.2, 1.0])
def test_grey(grey_p: float) -> None:
    made = views(flat(200, 100, 20), 400, grey_p=grey_p)
    grey = (made[:, 0] == made[:, 1]).flatten(1).all(1) & (made[:, 1] == made[:, 2]).flatten(1).all(1)
    check_share(grey.float().mean().item(), grey_p, 400)


@pytest.mark.parametrize("solarize_p", [0.0, 0.2, 1.0])
def test_solarising_inverts_the_levels_from_128(solarize_p: float) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    made = views(Image.fromarray(levels), 400, solarize_p=solarize_p, size=16)[:, 0]
    level = torch.from_numpy(levels).float()
    solarised = (made == torch.where(level >= 128, 255 - level, level)).flatten(1).all(1)
    assert (solarised | (made == level).flatten(1).all(1)).all()
    check_share(solarised.float().mean().item(), solarize_p, 400)


@pytest.mark.parametrize("jitter_p", [0.0, 0.8, 1.0])
def test_jitter_is_drawn_with_its_probability(jitter_p: float) -> None:
    options = dict(brightness=0.4, contrast=0.0, saturation=0.0, hue=0.0)
    made = views(flat(100, 100, 100), 400, jitter_p=jitter_p, **options)[:, 0, 0, 0]
    # A factor within half a level of 1 leaves 100 as it is.
    check_share((made != 100).float().mean().item(), jitter_p * (1 - 0.01 / 0.8), 400)
    if jitter_p == 1:
        assert 60 <= made.min() < 64 and 136 < made.max() <= 140
        assert abs(made.mean() - 100) < 4 * 80 / math.sqrt(12 * 400)


def test_jitter_of_saturation_and_hue_keeps_within_its_strength() -> None:
    off = dict(jitter_p=1.0, brightness=0.0, contrast=0.0)
    image = flat(180, 120, 120)
    grey = 0.299 * 180 + 0.587 * 120 + 0.114 * 120
    red = views(image, 300, **off, saturation=0.2, hue=0.0)[:, 0, 0, 0]
    assert abs(red.min() - (0.8 * 180 + 0.2 * grey)) < 2 and abs(red.max() - (1.2 * 180 - 0.2 * grey)) < 2
    turned = views(image, 300, **off, saturation=0.0, hue=0.1)[:, :, 0, 0]
    assert (turned[:, 0] == 180).all()
    # A tenth of a turn is six tenths of the way from red to yellow, or to magenta.
    assert abs(turned[:, 1].max() - (120 + 0.6 * 60)) < 3 and abs(turned[:, 2].max() - (120 + 0.6 * 60)) < 3


def test_contrast_is_about_the_mean_of_the_grey_image() -> None:
    half = flat(40)
    half.paste(80, (16, 0, 32, 32))
    made = views(half, 300, jitter_p=1.0, brightness=0.0, contrast=0.4, saturation=0.0, hue=0.0)[:, 0, 0]
    dark, bright = made[:, 0], made[:, -1]
    assert ((dark + bright - 120).abs() <= 2).all()
    assert abs((bright - dark).min() - 24) <= 2 and abs((bright - dark).max() - 56) <= 2


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_the_blur_is_a_gaussian_of_the_stated_sigma(sigma: float) -> None:
    step = flat(0, side=33)
    step.paste(255, (17, 0, 33, 33))
    made = views(step, 1, blur_p=1.0, blur_sigma=(sigma, sigma), size=33)[0, 0, 16]
    kernel = torch.exp(-((torch.arange(33.0) - 16) ** 2) / (2 * sigma**2))
    wanted = 255 * torch.cumsum(kernel / kernel.sum(), 0)
    assert (made - wanted.roll(1)).abs()[1:].max() < 4


@pytest.mark.parametrize("blur_p", [0.0, 0.1, 1.0])
def test_blurs_are_drawn_with_their_probability_and_sigma_uniformly(blur_p: float) -> None:
    step = flat(0, side=33)
    step.paste(255, (17, 0, 33, 33))
    made = views(step, 400, blur_p=blur_p, blur_sigma=(1.0, 3.0), size=33)[:, 0, 16]
    # An edge blurred by sigma spreads over a distance proportional to it.
    spread = (made * (255 - made)).sum(1) / 255**2
    check_share((spread > 0).float().mean().item(), blur_p, 400)
    if blur_p == 1:
        sigma = spread * math.sqrt(math.pi)
        assert abs(sigma.min() - 1) < 0.1 and abs(sigma.max() - 3) < 0.15 and abs(sigma.mean() - 2) < 0.15


def test_jitter_comes_before_solarising() -> None:
    settings = dict(jitter_p=1.0, brightness=0.9, contrast=0.0, saturation=0.0, hue=0.0, solarize_p=1.0)
    made = views(flat(100), 300, **settings)[:, 0, 0, 0]
    # Brightness reaches 190; whatever passes 127 is inverted afterwards, so 65 to 127 is all that is left above 65.
    assert made.max() <= 127
    assert (views(flat(100), 300, **{**settings, "solarize_p": 0.0})[:, 0, 0, 0] > 127).any()


def test_blur_comes_before_solarising_and_after_grey() -> None:
    step = flat(0, side=33)
    step.paste(127, (17, 0, 33, 33))
    white = flat(0, side=33)
    white.paste(255, (17, 0, 33, 33))
    settings = dict(blur_p=1.0, blur_sigma=(2.0, 2.0), solarize_p=1.0, size=33)
    # Blur first: the white side becomes a slope that is folded at 128. Solarise first: white becomes black, all is 0.
    assert views(white, 1, **settings).max() > 100
    assert torch.equal(views(step, 1, **settings), views(step, 1, **{**settings, "solarize_p": 0.0}))


def test_grey_images_keep_their_one_channel_and_jitter() -> None:
    made = views(flat(100), 200, jitter_p=1.0, grey_p=1.0, size=16)
    assert made.shape == (200, 1, 16, 16)
    assert made[:, 0, 0, 0].std() > 10


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (100, 200))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    assert torch.equal(evaluation_transform(None, None)(image)[0], torch.from_numpy(ramp.copy()))
    assert evaluation_transform(50, None)(image).shape == (1, 50, 100)
    centre = evaluation_transform(50, 40)(image)[0]
    assert centre.shape == (40, 40)
    assert abs(centre[:, 0].float().mean() - 60.5) < 1 and abs(centre[:, -1].float().mean() - 138.5) < 1


def test_normalising_scales_subtracts_and_divides_each_channel() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.2])
    wanted = (torch.tensor([0, 128 / 255, 1]) - mean) / std
    assert torch.allclose(normalize(images, mean, std).flatten(), wanted)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    views(flat(100, 50, 20), 3, jitter_p=1.0, blur_p=1.0)
    assert torch.equal(before, torch.get_rng_state())
