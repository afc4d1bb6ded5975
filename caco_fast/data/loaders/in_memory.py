"""The training loader for small sets: all images as one uint8 tensor on the training device, augmented there.

Legend: N images held, B images of this rank in one step, ch channels, H x W pixels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.config import DataConfig, ViewConfig
from caco_fast.data.loaders.base import BadImages, Batch, TrainLoader, none_readable
from caco_fast.data.sources.base import BadImageError, Source
from caco_fast.data.views.batched import make_views
from caco_fast.data.views.draws import draw_views
from caco_fast.errors import UserError
from caco_fast.host import available_bytes

# The rest is for the training itself.
_MEMORY_SHARE = 0.5
# Views made at a time on a CPU: with fewer the calls cost more than the pixels, with more large views leave the cache.
_CPU_CHUNK = 256


class MemoryLoader(TrainLoader):
    """Holds every image and makes the views of a batch together; see `TrainLoader` for what it gives.

    The order of the images and the recipe are those of the torchvision loader. The random numbers of a view are also a
    function of (seed, epoch, index, view), but other numbers. Views are on `device`. On a CPU a thread works one batch
    ahead.
    """

    random_numbers = "batched"

    def __init__(self, source: Source, config: DataConfig, views: Sequence[ViewConfig], **options: Any) -> None:
        """Decode the whole set; `options`: see `TrainLoader`.

        UserError if the set is too large, has images of several sizes, or has too many unreadable images.
        """
        super().__init__(source, config, views, **options)
        self._views = list(views)
        images, self._readable = _read_all(source, self._bad, self._device, world_size=self._share[2])
        self._images: Tensor | None = images.to(self._device)  # [N, H, ch, W]
        self._mean_and_std = self._normalisation()

    def _batches(self, epoch: int, shares: Iterator[np.ndarray]) -> Iterator[Batch]:
        if self._device.type != "cpu":
            # A GPU gets its work ahead of time anyway.
            yield from (self._batch(epoch, index) for index in shares)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="caco_fast views") as thread:
            ahead = None
            for index in shares:
                ready, ahead = ahead, thread.submit(self._batch, epoch, index)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def close(self) -> None:
        super().close()
        self._images = None

    def _batch(self, epoch: int, index: np.ndarray) -> Batch:
        made: list[Tensor] = []
        for config in self._views:
            numbers = np.arange(len(made), len(made) + config.count)
            # All views of one kind are made together: [count * B], view by view.
            views = self._make(config, epoch, np.tile(index, config.count), np.repeat(numbers, len(index)))
            made.extend(views.split(len(index)))
        return Batch(made, torch.from_numpy(self._readable[index]))

    @torch.no_grad()
    def _make(self, config: ViewConfig, epoch: int, index: np.ndarray, view: np.ndarray) -> Tensor:
        _, height, channels, width = self._images.shape
        draws = draw_views(config, height, width, channels, seed=self._seed, epoch=epoch, index=index, view=view)
        size = _CPU_CHUNK if self._device.type == "cpu" else len(index)
        parts = [slice(start, start + size) for start in range(0, len(index), size)]
        # The random numbers of a replaced image stay those of the drawn one.
        held = self._readable[index]
        # The trainer may ask for the next batch inside its autocast; pixels need more than 8 bits of mantissa.
        with torch.autocast(self._device.type, enabled=False):
            constant = (config, *self._mean_and_std, self._jitter, self._dtype)
            views = [make_views(self._images, held[p], draws.take(p), *constant) for p in parts]
        return torch.cat(views) if len(views) > 1 else views[0]


def _read_all(source: Source, bad: BadImages, device: torch.device, world_size: int) -> tuple[Tensor, np.ndarray]:
    """All images, [N, H, ch, W] uint8 on the host, and for each position the next readable one, [N] int64."""
    images: Tensor | None = None
    good: list[int] = []
    for index in range(len(source)):
        try:
            image = np.asarray(source.image(index))
        except BadImageError as error:
            bad.add([(source.name(index), str(error))])
            continue
        height, width = image.shape[:2]
        if images is None:
            _check_size(len(source) * image.size, device, world_size)
            images = torch.empty((len(source), height, source.channels, width), dtype=torch.uint8)
        elif (height, width) != (images.shape[1], images.shape[3]):
            raise UserError(
                f"{source.name(index)} has {width} x {height} pixels, {source.name(good[0])} has "
                f"{images.shape[3]} x {images.shape[1]}; images of different sizes can't be held as one block: "
                f"set data.loader=torchvision"
            )
        images[index] = torch.tensor(image).view(height, width, source.channels).permute(0, 2, 1)
        good.append(index)
    if images is None:
        raise none_readable(len(source))
    # After the last good image the set begins again.
    following = np.searchsorted(good, np.arange(len(source)))
    return images, np.array(good)[following % len(good)]


def _check_size(pixels: int, device: torch.device, world_size: int) -> None:
    """Raise UserError if `pixels` bytes for each rank are more than half of the free memory."""
    free = free_bytes(device)
    # Ranks on GPUs have one each; on a CPU they share its memory.
    needed = pixels if device.type == "cuda" else pixels * world_size
    if free is not None and needed > _MEMORY_SHARE * free:
        raise UserError(
            f"the training set takes {needed / 2**30:.1f} GiB as pixels, more than half of the {free / 2**30:.1f} GiB "
            f"that are free on {device}; set data.loader=torchvision"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device, in bytes; None if the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()
