"""Augmented views of a whole batch at once, on the device that holds the images; each image has its own parameters.

The recipe and the formulas are those of the torchvision loader (crop, jitter, grey, blur, solarise, flip, normalise);
only the rounding to 256 levels after every operation is left out. Crop, resize, flip and blur are linear along each
axis, so they are products with one small matrix for each image and axis. Pixels are [B, y, ch, x], for which both
products are plain batched ones. Every decision is made on the host, from the draws: the host never waits for a GPU.

Legend: B views, N images held, ch channels, H x W pixels of an image, s x s of a view.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.config import ViewConfig
from caco_fast.data.views.draws import ViewDraws
from caco_fast.data.views.jitter import by_hue_slot, exact_jitter, exact_table, fast_jitter, fast_table

# Rows that one product of the blur makes.
_BLOCK = 56


def make_views(
    images: Tensor,
    index: np.ndarray,
    draws: ViewDraws,
    config: ViewConfig,
    mean: Tensor,
    std: Tensor,
    jitter: str = "exact",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Views [B, ch, s, s] in channels_last, normalised, of images[index]; row i has the parameters draws[i].

    Everything is computed in float32, and rounded once to `dtype`.
    `images` [N, H, ch, W] uint8 and `mean`, `std` [ch] float32 are on one device, on which the views are made. `index`
    [B] int64 is on the host. `draws` were made for `config`; `jitter` is exact or fast, see `jitter`.
    """
    order, hue_ends = by_hue_slot(draws)
    draws = draws.take(order)
    rows = to_device(index[order], images.device)  # [B]
    boxes = np.stack([*draws.box.T, draws.flip]).astype(np.float32)
    top, left, height, width, flip = to_device(boxes, images.device)  # each [B]
    pixels = images.index_select(0, rows).float().mul_(1 / 255)  # [B, H, ch, W]
    vertical = crop_matrices(top, height, torch.zeros_like(flip), pixels.shape[1], config.size)  # [B, s, H]
    horizontal = crop_matrices(left, width, flip, pixels.shape[3], config.size)  # [B, s, W]
    pixels = along_axes(pixels, vertical, horizontal)  # [B, s, ch, s]
    return _finish(pixels, draws, order, hue_ends, config, mean, std, jitter, dtype)


def finish_crops(
    crops: Tensor,
    draws: ViewDraws,
    config: ViewConfig,
    mean: Tensor,
    std: Tensor,
    jitter: str = "exact",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The views of `make_views`, made from crops [B, s, s, ch] uint8 that are cut, resized and flipped as `draws` say.

    `out` takes the views: [B, ch, s, s] of `dtype` in channels_last.
    """
    crops, order, hue_ends = crops.permute(0, 1, 3, 2), np.arange(len(crops)), None
    if jitter == "exact":
        order, hue_ends = by_hue_slot(draws)
        crops, draws = crops.index_select(0, to_device(order, crops.device)), draws.take(order)
    pixels = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    torch.mul(crops, 1 / 255, out=pixels)
    return _finish(pixels, draws, order, hue_ends, config, mean, std, jitter, dtype, out)


def _finish(
    pixels: Tensor,
    draws: ViewDraws,
    order: np.ndarray,
    hue_ends: np.ndarray | None,
    config: ViewConfig,
    mean: Tensor,
    std: Tensor,
    jitter: str,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Everything after crop and flip, on pixels [B, s, ch, s] that are overwritten; row i goes to place order[i].

    `hue_ends` is needed for exact jitter, see `by_hue_slot`.
    """
    if jitter == "exact":
        exact_jitter(pixels, to_device(exact_table(draws), pixels.device), draws, hue_ends)
    else:
        pixels = fast_jitter(pixels, to_device(fast_table(draws), pixels.device))
    blurred = np.flatnonzero(draws.sigma)
    if len(blurred):
        radius = to_device(box_radius(draws.sigma[blurred]).astype(np.float32), pixels.device)
        reach = int(box_radius(np.float64(config.blur_sigma[1]))) + 1
        if len(blurred) == len(pixels):
            pixels = blur(pixels, radius, reach)
        else:
            rows = to_device(blurred, pixels.device)
            pixels.index_copy_(0, rows, blur(pixels.index_select(0, rows), radius, reach))
    if draws.solarize.any():
        # torchvision inverts the levels from 128, which is 127.5 before rounding: 1 - x replaces x if it is smaller.
        # For an image that stays as it is, 3 - x takes its place, which is never smaller.
        solarize = to_device(draws.solarize.astype(np.float32), pixels.device)
        pixels = torch.minimum(pixels, (3 - 2 * solarize)[:, None, None, None] - pixels)
    pixels = pixels.sub_(mean[:, None]).div_(std[:, None]).to(dtype)
    if out is not None:
        for place, view in zip(order.tolist(), pixels.permute(0, 2, 1, 3)):
            out[place].copy_(view)
        return out
    if (order[1:] < order[:-1]).any():
        pixels = pixels.index_select(0, to_device(np.argsort(order), pixels.device))
    return pixels.permute(0, 2, 1, 3).contiguous(memory_format=torch.channels_last)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, started without waiting for it; a GPU gets it from pinned memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def crop_matrices(start: Tensor, extent: Tensor, mirrored: Tensor, length: int, size: int) -> Tensor:
    """Matrices [B, size, length] that cut `extent` pixels from `start` out of `length` and resample them to `size`.

    The bilinear (triangle) filter of torchvision's antialiased resize, as wide as one input pixel or one output pixel,
    whichever is larger, cut and renormalised at the edges of the crop. The order is reversed if `mirrored` is 1.
    start, extent, mirrored: [B] float32.
    """
    place = torch.arange(size, device=start.device, dtype=torch.float32) + 0.5  # [s]
    # Everything between crop and flip treats left and right alike, so the flip may come first.
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


def box_radius(sigma: np.ndarray) -> np.ndarray:
    """Radius of the box filter that, applied three times, has the standard deviation sigma, as in PIL's GaussianBlur.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (2011), eq. 7, 11, 14.
    """
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + fraction


def blur(pixels: Tensor, radius: Tensor, reach: int) -> Tensor:
    """Three box filters of a radius [B] <= reach along both axes of pixels [B, s, ch, s]."""
    batch, size, channels, _ = pixels.shape
    side = min(size, _BLOCK + 6 * reach)
    matrices = blur_matrices(radius, reach, side)
    # Away from the borders each row of the matrix is the row above it, moved by a pixel, and zero outside a band.
    rows = pixels.reshape(batch, size, channels * size)
    blurred = torch.empty_like(rows)
    for place, reads, block in _bands(size, side, 3 * reach):
        torch.bmm(matrices[block], rows[:, reads], out=blurred[:, place])
    columns = blurred.view(batch, size * channels, size)
    blurred = torch.empty_like(columns)
    for place, reads, block in _bands(size, side, 3 * reach):
        torch.bmm(columns[:, :, reads], matrices[block].transpose(1, 2), out=blurred[:, :, place])
    return blurred.view(pixels.shape)


@lru_cache(maxsize=16)
def _bands(size: int, side: int, reach: int) -> list[tuple[slice, slice, tuple[slice, slice, slice]]]:
    """Blocks of a banded matrix [size, size]: its rows, its columns, and their place in the B matrices [side, side]."""
    length, bands = min(size, _BLOCK), []
    for start in (*range(0, size - length, length), size - length):
        low, high = max(0, start - reach), min(size, start + length + reach)
        # At the end the small matrix is aligned with the end, else with the first column that is read.
        origin = size - side if high == size else low
        block = slice(None), slice(start - origin, start - origin + length), slice(low - origin, high - origin)
        bands.append((slice(start, start + length), slice(low, high), block))
    return bands


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
