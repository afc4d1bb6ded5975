"""Augmented views of a whole batch at once, each image with parameters of its own, on the device that holds them.

The recipe and the formulas are those of the torchvision loader (crop, jitter, grey, blur, solarise, flip, normalise);
only the rounding to 256 levels after every operation is left out. Crop, resize, flip and blur are linear along each
axis, so they are products with one small matrix for each image and axis; pixels lie as [B, y, ch, x], where both
products are plain batched ones. Every decision is taken on the host, from the draws: a GPU is never waited for.

Legend: B views, N images held, ch channels, H x W pixels of an image, s x s of a view, S slots of the colour jitter.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.batched_draws import CONTRAST, HUE, SATURATION, ViewDraws
from caco_fast.data.settings import ViewConfig

# ITU-R 601, as torchvision rounds it.
_LUMINANCE = (0.2989, 0.587, 0.114)


def make_views(
    images: Tensor, index: np.ndarray, draws: ViewDraws, config: ViewConfig, mean: Tensor, std: Tensor
) -> Tensor:
    """Views [B, ch, s, s] float32, normalised, of images[index]; row i has the parameters draws[i], made for `config`.

    `images` [N, H, ch, W] uint8 and `mean`, `std` [ch] float32 lie on one device, where the views are made; `index` [B]
    int64 on the host.
    """
    # Side by side, the images whose hue shifts in the same slot are a slice, and the others are left alone.
    order, hue_ends = _by_hue_slot(draws)
    draws = draws.take(order)
    rows, restore = to_device(np.stack([index[order], np.argsort(order)]), images.device)  # each [B]
    parameters = to_device(_table(draws), images.device)
    top, left, height, width, flip, radius, solarize, hue, *blends = parameters  # each [B]

    pixels = images.index_select(0, rows).float().mul_(1 / 255)  # [B, H, ch, W]
    vertical = crop_matrices(top, height, torch.zeros_like(flip), pixels.shape[1], config.size)  # [B, s, H]
    horizontal = crop_matrices(left, width, flip, pixels.shape[3], config.size)  # [B, s, W]
    pixels = along_axes(pixels, vertical, horizontal)  # [B, s, ch, s]
    for slot in range(draws.order.shape[1]):
        pixels = blend(pixels, *blends[3 * slot : 3 * slot + 3])
        chosen = slice(hue_ends[slot], hue_ends[slot + 1])
        if chosen.start < chosen.stop:
            pixels[chosen] = shift_hue(pixels[chosen], hue[chosen])
    if draws.grey.any():
        pixels = blend(pixels, *blends[-3:])
    if draws.sigma.any():
        reach = int(box_radius(np.float64(config.blur_sigma[1]))) + 1
        blur = blur_matrices(radius, reach, config.size)
        pixels = along_axes(pixels, blur, blur)
    if draws.solarize.any():
        # torchvision inverts the levels from 128, which is 127.5 before rounding: 1 - x replaces x where it is smaller.
        # In an image that stays as it is, it is 3 - x, which never is.
        pixels = torch.minimum(pixels, (3 - 2 * solarize)[:, None, None, None] - pixels)
    views = pixels.permute(0, 2, 1, 3).index_select(0, restore)  # [B, ch, s, s]
    return views.sub_(mean[:, None, None]).div_(std[:, None, None])


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, started without waiting for it: from pinned memory, where the device is a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _by_hue_slot(draws: ViewDraws) -> tuple[np.ndarray, np.ndarray]:
    """An order [B] of the views by the slot in which their hue shifts, and where each slot's ends, [S + 1].

    Views without such a slot come first, so entry 0 is their number.
    """
    slots = draws.order.shape[1]
    shifts = (draws.order == HUE) & (draws.factors[:, [HUE]] != 0)  # [B, S]
    slot = np.where(shifts.any(axis=1), shifts.argmax(axis=1), -1) if slots else np.full(len(draws.flip), -1)
    return np.argsort(slot, kind="stable"), np.cumsum(np.bincount(slot + 1, minlength=slots + 1))


def _table(draws: ViewDraws) -> np.ndarray:
    """What the device needs to know of each view, as rows [8 + 3 (S + 1), B] float32.

    Box, flip, radius of the blur, solarise, shift of the hue; then the coefficients of `blend`, for each slot of the
    jitter and for dropping the colour.
    """
    rows = [*draws.box.T, draws.flip, box_radius(draws.sigma), draws.solarize, draws.factors[:, HUE]]
    for operation in draws.order.T:  # [B]
        factor = np.where(operation == HUE, 1.0, draws.factors[np.arange(len(operation)), operation])
        rows += [factor, (operation == SATURATION) * (1 - factor), (operation == CONTRAST) * (1 - factor)]
    rows += [~draws.grey, draws.grey, np.zeros_like(draws.grey)]
    return np.stack(rows).astype(np.float32)


def crop_matrices(start: Tensor, extent: Tensor, mirrored: Tensor, length: int, size: int) -> Tensor:
    """Matrices [B, size, length] that cut `extent` pixels from `start` out of `length` and resample them to `size`.

    The bilinear (triangle) filter of torchvision's antialiased resize, as wide as one input pixel or one output pixel,
    whichever is larger, cut and renormalised at the edges of the crop. Where `mirrored` is 1, in reversed order.
    start, extent, mirrored: [B] float32.
    """
    place = torch.arange(size, device=start.device, dtype=torch.float32) + 0.5  # [s]
    # Everything between crop and flip treats left and right alike, so the flip may as well come first.
    place = place + mirrored[:, None] * (size - 2 * place)  # [B, s]
    scale = (extent / size)[:, None]
    centre = start[:, None] + scale * place  # [B, s]
    pixel = torch.arange(length, device=start.device, dtype=torch.float32)  # [length]
    inside = ((pixel >= start[:, None]) & (pixel < (start + extent)[:, None])).float()  # [B, length]
    distance = (pixel + 0.5 - centre[:, :, None]).abs_()  # [B, s, length]
    weights = distance.mul_(-1 / scale.clamp_min(1)[:, :, None]).add_(1).clamp_min_(0).mul_(inside[:, None, :])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def along_axes(pixels: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """vertical [B, s, H] and horizontal [B, s, W] applied to pixels [B, H, ch, W]: [B, s, ch, s]."""
    batch, height, channels, width = pixels.shape
    size = vertical.shape[1]
    pixels = torch.bmm(vertical, pixels.reshape(batch, height, channels * width))  # [B, s, ch W]
    pixels = torch.bmm(pixels.view(batch, size * channels, width), horizontal.transpose(1, 2))  # [B, s ch, s]
    return pixels.view(batch, size, channels, size)


def blend(pixels: Tensor, keep: Tensor, own: Tensor, average: Tensor) -> Tensor:
    """keep * pixels + own * their grey + average * mean grey of the image, clamped to [0, 1]; coefficients [B].

    Brightness f is (f, 0, 0), contrast (f, 0, 1 - f), saturation (f, 1 - f, 0), dropping the colour (0, 1, 0).
    """
    if pixels.shape[2] == 1:
        grey = pixels
    else:
        red, green, blue = pixels.split(1, dim=2)  # [B, y, 1, x]
        grey = (red * _LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])
    mean = grey.mean(dim=(1, 2, 3))  # [B]
    keep, own, offset = (value[:, None, None, None] for value in (keep, own, average * mean))
    if pixels.shape[2] == 1:
        return torch.addcmul(offset, pixels, keep + own).clamp_(0, 1)
    return torch.addcmul(torch.addcmul(offset, grey, own), pixels, keep).clamp_(0, 1)


def shift_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """The hue of pixels [B, y, 3, x] in HSV turned by shift [B], in turns.

    With the hue h in sixths of a turn, V the largest and V - D the smallest of a pixel's channels, channel n is
    V - D clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6, n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = pixels.unbind(2)  # [B, y, x]
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    # Where the spread is zero so are the differences below, and any hue will do.
    divisor = spread.clamp_min(torch.finfo(torch.float32).tiny)
    # torch.where would read better, and is slow on a CPU: the weights are 0 where that channel is the largest, else 1.
    green_or_blue = torch.lerp(
        (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4), (value - green).sign_()
    )
    hue = torch.lerp((green - blue).div_(divisor), green_or_blue, (value - red).sign_()).add_(6 * shift[:, None, None])
    channel = torch.arange(5, 0, -2, device=pixels.device)[:, None]  # red 5, green 3, blue 1
    sixths = hue[:, :, None] + channel
    sixths = sixths.sub_((sixths * (1 / 6)).floor_().mul_(6))  # [B, y, 3, x]
    amount = torch.minimum(sixths, 4 - sixths).clamp_(0, 1)
    return torch.addcmul(value[:, :, None], spread[:, :, None], amount, value=-1)


def box_radius(sigma: np.ndarray) -> np.ndarray:
    """Radius of the box filter that three times over has the standard deviation sigma, as PIL's GaussianBlur takes it.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (2011), eq. 7, 11, 14.
    """
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + fraction


def blur_matrices(radius: Tensor, reach: int, size: int) -> Tensor:
    """Matrices [B, size, size] of three box filters of a radius [B] <= reach, in pixels; radius 0 is the identity.

    The box weighs the pixels at its two ends by the fractional part of the radius, and repeats the border's pixels.
    """
    offset = torch.arange(-reach, reach + 1, device=radius.device, dtype=torch.float32)
    taps = (radius[:, None] + 1 - offset.abs()).clamp_(0, 1) / (2 * radius + 1)[:, None]  # [B, 2 reach + 1]
    box = (taps @ _reads(reach, size, radius.device)).view(-1, size, size)
    return torch.bmm(torch.bmm(box, box), box)


@lru_cache(maxsize=16)
def _reads(reach: int, size: int, device: torch.device) -> Tensor:
    """Which pixel each tap reads for each output pixel, as one-hot rows, [2 reach + 1, size * size] float32."""
    pixel = np.clip(np.arange(size) + np.arange(-reach, reach + 1)[:, None], 0, size - 1)  # [2 reach + 1, s]
    return to_device((pixel[:, :, None] == np.arange(size)).astype(np.float32).reshape(2 * reach + 1, -1), device)
