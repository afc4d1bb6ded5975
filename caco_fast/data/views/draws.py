"""The random numbers of batched views: each image has its own, in whatever batch, rank or process it is drawn.

They are made on the host, in float64: a few dozen numbers for each image, the same on every device, and known before
the pixels are touched, so that the host never waits for a GPU.

Legend: B views (one for each image and view number), S slots of the colour jitter.
"""

import math
from dataclasses import dataclass

import numpy as np

from caco_fast.data.config import ViewConfig

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_TRIES = 10
# How many uniform numbers one view takes: area and aspect of each try, place of the crop, one for each operation.
_DRAWS = 2 * _TRIES + 2 + 4 + 4 + 6


@dataclass(frozen=True)
class ViewDraws:
    """The parameters of B views."""

    box: np.ndarray  # [B, 4] int64: top, left, height, width in pixels of the image
    order: np.ndarray  # [B, S] int64: the colour operation in each slot, one of BRIGHTNESS to HUE
    factors: np.ndarray  # [B, 4] float64: three factors and the shift of the hue; 1, 1, 1, 0 if the jitter is off
    grey: np.ndarray  # [B] bool
    sigma: np.ndarray  # [B] float64, in pixels of the view; 0 if there is no blur
    solarize: np.ndarray  # [B] bool
    flip: np.ndarray  # [B] bool

    def take(self, chosen: np.ndarray | slice) -> "ViewDraws":
        """The draws of some of the views, by position or by slice."""
        return ViewDraws(**{name: array[chosen] for name, array in vars(self).items()})


def draw_views(
    config: ViewConfig,
    height: int | np.ndarray,
    width: int | np.ndarray,
    channels: int,
    *,
    seed: int,
    epoch: int,
    index: np.ndarray,
    view: np.ndarray,
) -> ViewDraws:
    """Parameters of the views `view` [B] of the images `index` [B], distributed as torchvision's transforms draw them.

    Each row is a function of (seed, epoch, index, view) and of its image's size alone. Images are `height` x `width`,
    one number for all or one for each row [B]; with one channel the jitter has no saturation or hue, and nothing is
    made grey.
    """
    random = iter(uniforms(seed, epoch, index, view, _DRAWS).T)
    rows = len(index)
    area = np.stack([next(random) for _ in range(_TRIES)])
    aspect = np.stack([next(random) for _ in range(_TRIES)])
    box = _crop_boxes(config, np.asarray(height), np.asarray(width), area, aspect, next(random), next(random))

    jittered = next(random) < config.jitter_p
    factors = np.empty((rows, 4))
    for operation, strength in enumerate((config.brightness, config.contrast, config.saturation)):
        factors[:, operation] = _between(max(0.0, 1 - strength), 1 + strength, next(random))
    factors[:, HUE] = _between(-config.hue, config.hue, next(random))
    factors[~jittered] = (1, 1, 1, 0)
    # Sorting independent uniform numbers gives every order with the same probability.
    ranks = np.stack([next(random) for _ in range(4)], axis=1)
    operations = np.array(jitter_operations(config, channels), dtype=np.int64)
    order = operations[np.argsort(ranks[:, operations], axis=1)]

    return ViewDraws(
        box=box,
        order=order,
        factors=factors,
        grey=(next(random) < config.grey_p) & (channels == 3),
        sigma=np.where(next(random) < config.blur_p, _between(*config.blur_sigma, next(random)), 0.0),
        solarize=next(random) < config.solarize_p,
        flip=next(random) < config.flip_p,
    )


def jitter_operations(config: ViewConfig, channels: int) -> list[int]:
    """The colour operations that can change an image: of non-zero strength, and with one channel the first two only."""
    if config.jitter_p == 0:
        return []
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    return [operation for operation in range(4 if channels == 3 else 2) if strengths[operation] > 0]


def uniforms(seed: int, epoch: int, index: np.ndarray, view: np.ndarray, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each (index, view), [B, count] float64: a hash of the four and a counter.

    The hash is the output function of SplitMix64 (Steele, Lea, Flood 2014) with the numbers mixed in one by one.
    """
    state = np.zeros(1, dtype=np.uint64)
    for number in (seed, epoch, index, view):
        state = _mix(state ^ np.asarray(number).astype(np.int64).astype(np.uint64))
    # Steps of an odd number, as in SplitMix64, so that the states of one view are all different.
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state[:, None] + counter) >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _between(low: float, high: float, uniform: np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform


def _crop_boxes(
    config: ViewConfig,
    height: np.ndarray,
    width: np.ndarray,
    area: np.ndarray,
    aspect: np.ndarray,
    down: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:
    """Boxes [B, 4] of RandomResizedCrop: the first of the tries [tries, B] that fits, else the largest central crop."""
    low, high = config.ratio
    target = height * width * _between(*config.scale, area)
    ratio = np.exp(_between(math.log(low), math.log(high), aspect))
    widths = np.rint(np.sqrt(target * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(target / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=0)[None]
    found = fits.any(axis=0)

    # The image cut to the nearest permitted ratio; all of the image if its own ratio is within the limits.
    most_width = np.where(width / height <= high, width, np.maximum(1, np.rint(height * high))).astype(np.int64)
    most_height = np.where(width / height >= low, height, np.maximum(1, np.rint(width / low))).astype(np.int64)
    box_width = np.where(found, np.take_along_axis(widths, first, axis=0)[0], most_width)
    box_height = np.where(found, np.take_along_axis(heights, first, axis=0)[0], most_height)
    top = np.where(found, np.floor(down * (height - box_height + 1)), (height - most_height) // 2)
    left = np.where(found, np.floor(right * (width - box_width + 1)), (width - most_width) // 2)
    return np.stack([top.astype(np.int64), left.astype(np.int64), box_height, box_width], axis=1)
