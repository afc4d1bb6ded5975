"""Batched views against torchvision's own functions, image by image, on the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from caco_fast.data.config import ViewConfig
from caco_fast.data.views import batched
from caco_fast.data.views.batched import make_views
from caco_fast.data.views.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, draw_views

CONFIG = ViewConfig(solarize_p=0.2)
JITTER = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}


def photographs(count: int, side: int, channels: int) -> np.ndarray:
    """Images [count, side, side, channels] uint8 with smooth shapes, edges and a little noise; seeded."""
    generator = np.random.default_rng(side * 10 + channels)
    y, x = np.mgrid[0:side, 0:side] / side
    images = np.empty((count, side, side, channels))
    for image in images:
        base, slope_x, slope_y, disc = generator.uniform(-150, 150, (4, channels))
        centre_y, centre_x, radius = generator.uniform(0.2, 0.6, 3)
        inside = (y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2
        image[:] = 128 + base / 2 + slope_x * (x[..., None] - 0.5) + slope_y * (y[..., None] - 0.5)
        image += disc * inside[..., None] + generator.normal(0, 6, image.shape)
    return images.clip(0, 255).astype(np.uint8)


def held(images: np.ndarray) -> Tensor:
    """The images in the loader's layout: [N, H, ch, W]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 1, 3, 2)))


def together(images: np.ndarray, draws: ViewDraws, config: ViewConfig) -> Tensor:
    """Views in [0, 1], not normalised."""
    channels = images.shape[3]
    index = np.arange(len(images))
    return make_views(held(images), index, draws, config, torch.zeros(channels), torch.ones(channels))


def one_by_one(images: np.ndarray, draws: ViewDraws, size: int, *, rounded: bool) -> Tensor:
    """The same views by torchvision: on PIL images with 256 levels after every operation, or in float throughout.

    In float the blur is left out: torchvision has PIL's on PIL images only.
    """
    views = []
    for row, image in enumerate(images):
        picture = Image.fromarray(image.squeeze()) if rounded else torch.from_numpy(image).permute(2, 0, 1) / 255
        picture = F.resized_crop(picture, *draws.box[row].tolist(), size=[size, size], antialias=True)
        for operation in draws.order[row]:
            picture = JITTER[operation](picture, float(draws.factors[row, operation]))
        if draws.grey[row]:
            picture = F.to_grayscale(picture, num_output_channels=3)
        if rounded and draws.sigma[row]:
            picture = picture.filter(ImageFilter.GaussianBlur(float(draws.sigma[row])))
        if draws.solarize[row]:
            picture = F.solarize(picture, 128 if rounded else 127.5 / 255)
        if draws.flip[row]:
            picture = F.horizontal_flip(picture)
        views.append(F.to_dtype(F.pil_to_tensor(picture), torch.float32, scale=True) if rounded else picture)
    return torch.stack(views)


def drawn(config: ViewConfig, count: int, side: int, channels: int) -> ViewDraws:
    index = np.arange(count)
    return draw_views(config, side, side, channels, seed=1, epoch=2, index=index, view=np.zeros_like(index))


def only(draws: ViewDraws, **changes: np.ndarray) -> ViewDraws:
    """The draws with everything but the crop switched off, except for `changes`."""
    rows = len(draws.flip)
    off = np.zeros(rows, dtype=bool)
    plain = dict(
        order=np.empty((rows, 0), dtype=np.int64), factors=np.tile([1.0, 1, 1, 0], (rows, 1)),
        grey=off, sigma=np.zeros(rows), solarize=off, flip=off,
    )  # fmt: skip
    return ViewDraws(box=draws.box, **(plain | changes))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side, size", [(28, 28), (32, 32), (32, 20), (96, 96), (40, 96)])
def test_whole_view_without_blur_is_torchvision_in_float(side: int, size: int, channels: int) -> None:
    config = ViewConfig(size=size, blur_p=0.0, solarize_p=0.0)
    images = photographs(64, side, channels)
    draws = drawn(config, len(images), side, channels)
    ours, theirs = together(images, draws, config), one_by_one(images, draws, size, rounded=False)
    # The hue of a pixel that is grey up to rounding is arbitrary, but moves that pixel by rounding only.
    assert (ours - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("side, size", [(28, 28), (96, 40), (24, 64)])
def test_crop_and_flip_are_torchvisions_to_rounding(side: int, size: int) -> None:
    config = ViewConfig(size=size)
    images = photographs(64, side, 3)
    draws = drawn(config, len(images), side, 3)
    draws = only(draws, flip=draws.flip)
    assert draws.flip.any() and not draws.flip.all()
    ours, theirs = together(images, draws, config), one_by_one(images, draws, size, rounded=False)
    assert (ours - theirs).abs().max() < 2e-6


def test_crop_of_images_that_are_not_square() -> None:
    images = photographs(32, 40, 3)[:, :25]
    config = ViewConfig(size=16)
    index = np.arange(len(images))
    draws = only(draw_views(config, 25, 40, 3, seed=3, epoch=0, index=index, view=index))
    ours, theirs = together(images, draws, config), one_by_one(images, draws, 16, rounded=False)
    assert (ours - theirs).abs().max() < 2e-6


@pytest.mark.parametrize("operation", list(JITTER), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.4])
def test_one_colour_operation_is_torchvisions_to_rounding(operation: int, factor: float) -> None:
    images = photographs(32, 32, 3)
    images[0] = 77  # a grey image has no hue
    images[1], images[2] = 0, 255
    factor = factor - 0.9 if operation == HUE and factor else factor
    draws = drawn(ViewConfig(size=32), len(images), 32, 3)
    factors = np.tile([1.0, 1, 1, 0], (len(images), 1))
    factors[:, operation] = factor
    draws = only(draws, order=np.full((len(images), 1), operation), factors=factors)
    ours, theirs = together(images, draws, ViewConfig(size=32)), one_by_one(images, draws, 32, rounded=False)
    assert (ours - theirs).abs().max() < 2e-6


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("size", [5, 28, 96])
def test_blur_is_pils_to_the_rounding_of_its_passes(size: int, sigma: float) -> None:
    config = ViewConfig(size=size, blur_sigma=(0.1, sigma))
    images = photographs(16, size, 3)
    draws = only(drawn(config, len(images), size, 3), sigma=np.full(len(images), sigma))
    draws.box[:] = (0, 0, size, size)
    levels = (together(images, draws, config) - one_by_one(images, draws, size, rounded=True)).abs() * 255
    # PIL rounds to whole levels after each of its six passes.
    assert levels.max() < 4 and levels.mean() < 0.8


@pytest.mark.parametrize("size", [56, 57, 113, 200])
def test_blur_by_bands_is_that_of_the_whole_matrix(size: int) -> None:
    pixels, sigma = torch.rand(3, size, 3, size), np.array([0.1, 1.0, 2.0])
    radius = torch.from_numpy(batched.box_radius(sigma)).float()
    whole = batched.blur_matrices(radius, 2, size)
    assert torch.allclose(batched.blur(pixels, radius, 2), batched.along_axes(pixels, whole, whole), atol=1e-6)


def test_no_blur_beside_blurred_images_leaves_pixels_untouched() -> None:
    images = photographs(8, 28, 1)
    draws = drawn(ViewConfig(size=28), len(images), 28, 1)
    sigma = np.where(np.arange(8) % 2, 1.3, 0.0)
    plain, some = (together(images, only(draws, sigma=s), ViewConfig(size=28)) for s in (np.zeros(8), sigma))
    assert torch.equal(some[::2], plain[::2])
    assert (some[1::2] - plain[1::2]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_solarise_inverts_from_level_128() -> None:
    images = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (2, 1, 1, 1))
    draws = only(drawn(ViewConfig(size=16), 2, 16, 1), solarize=np.array([True, False]))
    draws.box[:] = (0, 0, 16, 16)
    levels = (together(images, draws, ViewConfig(size=16)) * 255).round().to(torch.uint8)
    assert torch.equal(levels[0], F.solarize(torch.from_numpy(images[0, ..., 0])[None], 128))
    assert torch.equal(levels[1], torch.from_numpy(images[1, ..., 0])[None])


@pytest.mark.parametrize("side, channels, mean_limit", [(28, 1, 0.9), (32, 3, 1.6), (96, 3, 1.6)])
def test_whole_view_deviates_from_the_pil_view_by_its_rounding_only(
    side: int, channels: int, mean_limit: float
) -> None:
    config = ViewConfig(size=side, solarize_p=0.2)
    images = photographs(100, side, channels)
    draws = drawn(config, len(images), side, channels)
    levels = (together(images, draws, config) - one_by_one(images, draws, side, rounded=True)).abs() * 255
    print(f"side {side}, {channels} channels: mean {levels.mean():.3f} levels, max {levels.max():.1f}")
    assert levels.mean() < mean_limit


@pytest.mark.parametrize("channels", [1, 3])
def test_view_of_an_image_does_not_depend_on_the_rest_of_the_batch(channels: int) -> None:
    config = ViewConfig(size=32, solarize_p=0.2)
    images = photographs(50, 32, channels)
    draws = drawn(config, len(images), 32, channels)
    whole = together(images, draws, config)
    for rows in (np.array([49, 3, 17]), *np.arange(50)[:, None], np.arange(50)[::-1]):
        part = together(images[rows], draws.take(rows), config)
        assert (part - whole[torch.from_numpy(rows.copy())]).abs().max() < 1e-6


def test_normalisation_is_that_of_mean_and_std() -> None:
    images = photographs(6, 32, 3)
    draws = drawn(CONFIG, 6, 32, 3)
    config = ViewConfig(size=32)
    plain = together(images, draws, config)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    views = make_views(held(images), np.arange(6), draws, config, mean, std)
    assert views.shape == (6, 3, 32, 32) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(views, F.normalize(plain, mean.tolist(), std.tolist()), atol=1e-6)


@pytest.mark.parametrize(
    "operation, factor",
    [(BRIGHTNESS, 0.7), (CONTRAST, 0.6), (SATURATION, 0.8), (HUE, 1 / 3), (HUE, -1 / 3), (HUE, 0.0)],
)
def test_fast_jitter_is_torchvisions_where_that_is_linear(operation: int, factor: float) -> None:
    images = photographs(8, 32, 3)
    factors = np.tile([1.0, 1, 1, 0], (len(images), 1))
    factors[:, operation] = factor
    config = ViewConfig(size=32)
    draws = only(drawn(config, 8, 32, 3), order=np.full((8, 1), operation), factors=factors)
    ours = make_views(held(images), np.arange(8), draws, config, torch.zeros(3), torch.ones(3), "fast")
    # The luminance coefficients are normalised here, and torchvision's sum to 0.9999.
    assert (ours - one_by_one(images, draws, 32, rounded=False)).abs().max() < 2e-4


@pytest.mark.parametrize("channels, limit", [(1, 1.5), (3, 8)])
def test_fast_jitter_stays_near_the_exact_one(channels: int, limit: float) -> None:
    config = ViewConfig(size=32, blur_p=0.0, scale=(1.0, 1.0))
    images = photographs(64, 32, channels)
    draws = drawn(config, len(images), 32, channels)
    exact, fast = (
        make_views(held(images), np.arange(64), draws, config, torch.zeros(channels), torch.ones(channels), jitter)
        for jitter in ("exact", "fast")
    )
    grey = torch.from_numpy(draws.grey)
    assert 0.1 < (fast - exact).abs().mean() * 255 < limit
    assert all(view.std(dim=0).max() < 1e-5 for view in fast[grey])


def test_nothing_reads_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is no data to read: a host synchronisation in the chain would raise here."""
    monkeypatch.setattr(batched, "to_device", lambda array, device: torch.from_numpy(array).to("meta"))
    images = torch.empty((9, 32, 3, 32), dtype=torch.uint8, device="meta")
    config = ViewConfig(size=32, solarize_p=0.2)
    draws = drawn(config, 300, 32, 3)
    index = np.arange(300) % 9
    views = make_views(images, index, draws, config, torch.empty(3, device="meta"), torch.empty(3, device="meta"))
    assert views.shape == (300, 3, 32, 32) and views.device.type == "meta"
