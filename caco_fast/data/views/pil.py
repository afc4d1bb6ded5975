"""The published views by torchvision transforms v2, on PIL images as the published recipes run them.

Everything random comes from torch's global CPU generator, as in torchvision; `keep_random_state` and `reseed` guard it.
Legend: B images, h x w pixels, ch channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from caco_fast.data.config import ViewConfig


class GaussianBlur(v2.Transform):
    """Blur of a PIL image, sigma uniform in `sigma` pixels of the view, as MoCo v2's recipe does it.

    PIL's filter approximates the Gaussian by three box filters whose width follows from sigma, so no kernel size
    has to be chosen. Sigma is not scaled with the view: for very small ones set `blur_sigma` smaller.
    """

    _transformed_types = (Image.Image,)

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.low, self.high = sigma

    def make_params(self, flat_inputs: list[Any]) -> dict[str, float]:
        return {"sigma": torch.empty(1).uniform_(self.low, self.high).item()}

    def transform(self, inpt: Image.Image, params: dict[str, float]) -> Image.Image:
        return inpt.filter(ImageFilter.GaussianBlur(radius=params["sigma"]))


def view_transform(config: ViewConfig, channels: int) -> v2.Compose:
    """PIL image -> uint8 tensor [ch, size, size]: one random view. Grey images skip what acts on colour only."""
    colour = {"saturation": config.saturation, "hue": config.hue} if channels == 3 else {}
    jitter = v2.ColorJitter(config.brightness, config.contrast, **colour)
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(config.size, scale=tuple(config.scale), ratio=tuple(config.ratio)),
        v2.RandomApply([jitter], p=config.jitter_p),
    ]
    if channels == 3:
        steps.append(v2.RandomGrayscale(p=config.grey_p))
    steps += [
        v2.RandomApply([GaussianBlur(tuple(config.blur_sigma))], p=config.blur_p),
        v2.RandomSolarize(threshold=128, p=config.solarize_p),
        v2.RandomHorizontalFlip(p=config.flip_p),
        v2.PILToTensor(),
    ]
    return v2.Compose(steps)


def evaluation_transform(resize: int | None, size: int | None, interpolation: str = "bilinear") -> v2.Compose:
    """PIL image -> uint8 tensor [ch, h, w]: shorter side to `resize`, then the centre `size` x `size`; None skips.

    A uint8 tensor [ch, h, w] is accepted too. The part of the centre that lies outside the image is black.
    """
    steps: list[v2.Transform] = [v2.Resize(resize, v2.InterpolationMode(interpolation))] if resize else []
    steps += [v2.CenterCrop(size)] if size else []
    return v2.Compose([*steps, v2.PILToTensor()])


def evaluation_box(
    height: int, width: int, resize: int | None, size: int | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The geometry of `evaluation_transform`: the size of an image after the resize, and where in it the centre starts.

    Both (vertical, horizontal) in pixels, rounded as torchvision does; a start is negative if the image is smaller.
    """
    shorter = min(height, width)
    resized = tuple(int(resize * side / shorter) if resize else side for side in (height, width))
    if size is None:
        return resized, (0, 0)
    return resized, tuple(-((size - side) // 2) if size > side else round((side - size) / 2) for side in resized)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, ch, h, w] -> float32, scaled to [0, 1], minus mean [ch], divided by std [ch], all on one device."""
    # Not by torchvision, which takes numbers and would wait for the device to copy them there.
    return F.to_dtype(images, torch.float32, scale=True).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Leave torch's global CPU generator as it was; `reseed` may be used inside."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def reseed(seed: int) -> None:
    """Seed torch's global CPU generator only; torch.manual_seed would queue a call on every accelerator too."""
    torch.default_generator.manual_seed(seed)
