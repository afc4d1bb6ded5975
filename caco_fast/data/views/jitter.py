"""Colour jitter and grey for a whole batch, exact or fast; each image has its own parameters.

`exact` is torchvision's: brightness, contrast about the mean grey, saturation and the hue of HSV, in an order drawn for
each image, clamped after every one of them. `fast` is one linear map of the colours for each image, clamped once: the
same factors in a fixed order, with the hue turned by rotating the colours about the grey axis of the RGB cube. That is
HSV's turn for thirds of the circle, and nearer to it between them than a rotation in YIQ.
Pixels are [B, y, ch, x] in [0, 1].

Legend: B views, ch channels, S slots of the colour jitter.
"""

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.views.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws

# ITU-R 601, as torchvision rounds it.
_LUMINANCE = (0.2989, 0.587, 0.114)


def by_hue_slot(draws: ViewDraws) -> tuple[np.ndarray, np.ndarray]:
    """An order [B] of the views by the slot in which their hue shifts, and where each slot's ends, [S + 1].

    In this order, the images whose hue shifts in the same slot are a slice, so the others stay as they are. Views whose
    hue does not shift come first, so entry 0 is their number.
    """
    slots = draws.order.shape[1]
    shifts = (draws.order == HUE) & (draws.factors[:, [HUE]] != 0)  # [B, S]
    slot = np.where(shifts.any(axis=1), shifts.argmax(axis=1), -1) if slots else np.full(len(draws.flip), -1)
    return np.argsort(slot, kind="stable"), np.cumsum(np.bincount(slot + 1, minlength=slots + 1))


def exact_table(draws: ViewDraws) -> np.ndarray:
    """The input of `exact_jitter` for each view, as rows [1 + 3 (S + 1), B] float32.

    The shift of the hue; then the coefficients of `blend`, for each slot of the jitter and for dropping the colour.
    """
    rows = [draws.factors[:, HUE]]
    for operation in draws.order.T:  # [B]
        factor = np.where(operation == HUE, 1.0, draws.factors[np.arange(len(operation)), operation])
        rows += [factor, (operation == SATURATION) * (1 - factor), (operation == CONTRAST) * (1 - factor)]
    rows += [~draws.grey, draws.grey, np.zeros_like(draws.grey)]
    return np.stack(rows).astype(np.float32)


def exact_jitter(pixels: Tensor, table: Tensor, draws: ViewDraws, hue_ends: np.ndarray) -> None:
    """Jitter and grey of pixels [B, y, ch, x], sorted by `by_hue_slot`, in place."""
    hue, *blends = table  # each [B]
    neutral = (draws.factors == (1, 1, 1, 0)).all(axis=1)
    first = int(np.append(neutral, False).argmin())
    for slot in range(draws.order.shape[1]):
        start, stop = hue_ends[slot : slot + 2]
        for part in (slice(first, max(first, start)), slice(stop, len(neutral))):
            if part.start < part.stop:
                keep, own, average = (row[part] for row in blends[3 * slot : 3 * slot + 3])
                operations = draws.order[part, slot]
                blend_(
                    pixels[part],
                    keep,
                    own if (operations == SATURATION).any() else None,
                    average if (operations == CONTRAST).any() else None,
                )
        if start < stop:
            shift_hue_(pixels[start:stop], hue[start:stop])
    if draws.grey.any():
        blend_(pixels, *blends[-3:-1], None)


def fast_table(draws: ViewDraws) -> np.ndarray:
    """The input of `fast_jitter` for each view, as rows [10, B] float32: a matrix [3, 3] by rows, a weight of the mean.

    Brightness, contrast, saturation, hue, grey; the last three leave grey as it is, so the mean's share passes them.
    """
    brightness, contrast, saturation = (_factor(draws, n)[:, None, None] for n in (BRIGHTNESS, CONTRAST, SATURATION))
    luminance = np.tile(_LUMINANCE, (3, 1)) / sum(_LUMINANCE)  # [3, 3], each row the grey of a pixel
    colours = _grey_axis_rotation(2 * np.pi * _factor(draws, HUE))
    colours = colours @ (saturation * np.eye(3) + (1 - saturation) * luminance)  # [B, 3, 3]
    colours = brightness * contrast * np.where(draws.grey[:, None, None], luminance @ colours, colours)
    return np.concatenate([colours.reshape(-1, 9), (brightness * (1 - contrast))[:, :, 0]], axis=1).T.astype(np.float32)


def _grey_axis_rotation(angle: np.ndarray) -> np.ndarray:
    """Matrices [B, 3, 3] that turn red, green, blue by angle [B] about (1, 1, 1), red towards green (Rodrigues)."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return cos * np.eye(3) + sin * cross + (1 - cos) / 3


def _factor(draws: ViewDraws, operation: int) -> np.ndarray:
    """The factor of an operation, [B], neutral if the recipe doesn't have the operation."""
    neutral = 0.0 if operation == HUE else 1.0
    return np.where((draws.order == operation).any(axis=1), draws.factors[:, operation], neutral)


def fast_jitter(pixels: Tensor, table: Tensor) -> Tensor:
    """The linear map of each image's colours, and a weight times its mean grey on top, clamped to [0, 1]; a copy."""
    batch, height, channels, width = pixels.shape
    if channels == 1:
        # Every row of the matrix sums to brightness * contrast.
        scale = table[:3].sum(dim=0).view(-1, 1, 1, 1)
        offset = (table[9] * pixels.mean(dim=(1, 2, 3))).view(-1, 1, 1, 1)
        return torch.addcmul(offset, pixels, scale).clamp_(0, 1)
    red, green, blue = pixels.mean(dim=(1, 3)).unbind(1)  # [B]
    grey = _LUMINANCE[0] * red + _LUMINANCE[1] * green + _LUMINANCE[2] * blue
    colours = table[:9].T.reshape(batch, 1, 3, 3).expand(-1, height, -1, -1)
    return torch.matmul(colours, pixels).add_((table[9] * grey).view(-1, 1, 1, 1)).clamp_(0, 1)


def blend_(pixels: Tensor, keep: Tensor, own: Tensor | None, average: Tensor | None) -> None:
    """keep * pixels + own * their grey + average * mean grey of the image, clamped to [0, 1]; coefficients [B].

    Brightness f is (f, 0, 0), contrast (f, 0, 1 - f), saturation (f, 1 - f, 0), dropping the colour (0, 1, 0); None
    means zeros. All is done in place, by operations with two operands, because a CPU vectorises those.
    """
    keep, own, average = (value if value is None else value[:, None, None, None] for value in (keep, own, average))
    if own is None and average is None:
        pixels.mul_(keep).clamp_(0, 1)
        return
    if pixels.shape[2] == 1:
        grey = pixels.clone()
    else:
        red, green, blue = pixels.split(1, dim=2)  # [B, y, 1, x]
        grey = (red * _LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])
    mean = None if average is None else average * grey.mean(dim=(1, 2, 3), keepdim=True)  # [B, 1, 1, 1]
    if own is None:
        addend = mean
    else:
        addend = grey.mul_(own) if mean is None else grey.mul_(own).add_(mean)
    pixels.mul_(keep).add_(addend).clamp_(0, 1)


def shift_hue_(pixels: Tensor, shift: Tensor) -> None:
    """The hue of pixels [B, y, 3, x] in HSV turned by shift [B], in turns, in place.

    With the hue h in sixths of a turn, V the largest and V - D the smallest of a pixel's channels, channel n is
    V - D clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6, n = 5, 3, 1 for red, green, blue. That is
    V - 2 D + D clamp(| |k - 5| - 3 |, 1, 2) for any k from -1 to 11, which spares the mod: h is in [-1, 5).
    D is taken into the clamp, and h is never made but for D h, which needs no division.
    """
    value = pixels.amax(dim=2)  # [B, y, x]
    channels = pixels.unbind(2)
    red, green, blue = (torch.sub(value, channel) for channel in channels)  # V - red, V - green, V - blue
    spread = torch.maximum(red, green)
    torch.maximum(spread, blue, out=spread)
    # torch.where would read better, but is slow on a CPU. The weights are 0 if that channel is the largest, else 1.
    hue = torch.lerp((red - blue).add_(spread, alpha=2), (green - red).add_(spread, alpha=4), green.sign())
    hue = torch.lerp(blue - green, hue, red.sign())  # D h
    base = value.sub_(spread, alpha=2)
    twice = spread * 2.0
    number = torch.arange(5, 0, -2, device=pixels.device)  # red 5, green 3, blue 1
    turned = (number + 6 * shift[:, None]).remainder_(6).sub_(5)  # [B, 3]
    for channel, turn in zip(channels, turned.T):
        amount = torch.addcmul(hue, spread, turn[:, None, None]).abs_()  # D |k - 5|
        amount.sub_(spread, alpha=3).abs_()
        torch.minimum(amount, twice, out=amount)
        torch.maximum(amount, spread, out=amount)
        torch.add(amount, base, out=channel)
