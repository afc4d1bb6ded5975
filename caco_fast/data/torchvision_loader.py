"""The training loader by torchvision transforms in worker processes.

Legend: B images of this rank in one step, V views of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from caco_fast.data.loader import Batch, draws_name, images_name
from caco_fast.data.order import epoch_order, step_share, steps_per_epoch
from caco_fast.data.reading import BadImages, RawBatch, ViewBatches, as_is
from caco_fast.data.settings import DataConfig, ViewConfig
from caco_fast.data.source import Source
from caco_fast.data.views import normalize
from caco_fast.data.workers import worker_options
from caco_fast.errors import UserError


class _Keys(Sampler[tuple[int, np.ndarray]]):
    """The keys of the batches to read next. The epoch travels in the key, so workers live on from epoch to epoch."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class TorchvisionLoader:
    """Reads, augments and collates in worker processes; see `TrainLoader` for what it gives."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        views: Sequence[ViewConfig],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(len(source), batch_size, world_size)
        if config.jitter != "exact":
            raise UserError(
                f"data.jitter={config.jitter} needs data.loader=dali or memory; the torchvision loader is exact"
            )
        self.draws = draws_name("torchvision", config.jitter)
        self.images = images_name(source)
        self._length, self._batch_size, self._seed = len(source), batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._device, self._dtype = torch.device(device), dtype
        self._mean, self._std = config.mean or source.mean, config.std or source.std
        # The small addend keeps 0.29 * 100 from becoming 28.
        limit = int(config.bad_image_limit * len(source) + 1e-6)
        self._bad = BadImages(limit, len(source))
        self._keys = _Keys()
        workers = config.worker_processes()
        self._loader: DataLoader[RawBatch] | None = DataLoader(
            ViewBatches(source, views, seed, limit),
            sampler=self._keys,
            batch_size=None,
            collate_fn=as_is,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            # A generator of its own: the default one would draw a number from torch's global generator each epoch.
            generator=torch.Generator().manual_seed(0),
            **worker_options(workers, config.prefetch),
        )

    @property
    def bad_images(self) -> dict[str, str]:
        return self._bad.reasons

    def exchange_bad_images(self) -> None:
        self._bad.exchange()

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        order = epoch_order(self._seed, epoch, self._length)
        steps = range(first_step, self.steps_per_epoch)
        share = (self._batch_size, self._rank, self._world_size)
        self._keys.keys = [(epoch, step_share(order, step, *share)) for step in steps]
        for raw in self._loader:
            self._bad.add(raw.bad)
            if not raw.images:
                raise UserError(f"none of the {self._length} training images can be read; check data.path")
            views = [normalize(v.to(self._device, non_blocking=True), self._mean, self._std) for v in raw.images]
            yield Batch([view.to(self._dtype) for view in views], raw.index)

    def close(self) -> None:
        # The workers end when the last reference to the loader and its iterator is gone.
        self._loader = None
