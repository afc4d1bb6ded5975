"""The training loader that augments with torchvision transforms in worker processes.

Legend: B images of this rank in one step, V views of an image.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from caco_fast.data.config import DataConfig, ViewConfig, require_exact_jitter
from caco_fast.data.loaders.base import Batch, RawBatch, TrainLoader, none_readable, view_seed
from caco_fast.data.loaders.workers import as_is, from_workers, worker_options
from caco_fast.data.sources.base import BadImageError, Source, as_pil
from caco_fast.data.views.pil import keep_random_state, normalize, reseed, view_transform


class TorchvisionLoader(TrainLoader):
    """Reads, augments and collates in worker processes; see `TrainLoader` for what it gives."""

    random_numbers = "torchvision"

    def __init__(self, source: Source, config: DataConfig, views: Sequence[ViewConfig], **options: Any) -> None:
        """`options`: see `TrainLoader`."""
        super().__init__(source, config, views, **options)
        require_exact_jitter(config.jitter)
        self._keys = _Keys()
        self._scale = self._normalisation()
        workers = config.worker_processes()
        self._loader: DataLoader[RawBatch] | None = DataLoader(
            ViewBatches(source, views, self._seed, self._bad.limit),
            sampler=self._keys,
            batch_size=None,
            collate_fn=as_is,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            # A generator of its own: the default one would draw a number from torch's global generator each epoch.
            generator=torch.Generator().manual_seed(0),
            **worker_options(workers, config.prefetch),
        )

    def _batches(self, epoch: int, shares: Iterator[np.ndarray]) -> Iterator[Batch]:
        self._keys.keys = [(epoch, share) for share in shares]
        for raw in from_workers(self._loader):
            self._bad.add(raw.bad)
            if not raw.images:
                raise none_readable(self._length)
            views = [normalize(view.to(self._device, non_blocking=True), *self._scale) for view in raw.images]
            yield Batch([view.to(self._dtype) for view in views], raw.index)

    def close(self) -> None:
        super().close()
        # The workers end when the last reference to the loader and its iterator is gone.
        self._loader = None


class _Keys(Sampler[tuple[int, np.ndarray]]):
    """The keys of the batches to read next. A key holds the epoch, so workers can stay for the next epoch."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class ViewBatches(Dataset[RawBatch]):
    """A dataset whose items are whole batches of views; its keys are (epoch, positions)."""

    def __init__(self, source: Source, views: Sequence[ViewConfig], seed: int, bad_limit: int) -> None:
        self.source, self.seed, self.bad_limit = source, seed, bad_limit
        self.transforms = [
            transform for view in views for transform in [view_transform(view, source.channels)] * view.count
        ]
        self.sizes = [view.size for view in views for _ in range(view.count)]

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> RawBatch:
        epoch, positions = key
        shapes = [(len(positions), self.source.channels, size, size) for size in self.sizes]
        images = [torch.empty(shape, dtype=torch.uint8) for shape in shapes]
        index = torch.empty(len(positions), dtype=torch.int64)
        bad: dict[str, str] = {}
        with keep_random_state():
            for row, position in enumerate(positions):
                found = self._next_good(int(position), bad)
                if found is None:
                    return RawBatch([], index, list(bad.items()))
                index[row], image = found
                for view, transform in enumerate(self.transforms):
                    # The seed is that of the drawn image, so that a replaced image changes nothing else.
                    reseed(view_seed(self.seed, epoch, int(position), view))
                    images[view][row] = transform(image)
        return RawBatch(images, index, list(bad.items()))

    def _next_good(self, position: int, bad: dict[str, str]) -> tuple[int, Any] | None:
        """The first readable image at `position` or after it, wrapping around; None once too many are unreadable."""
        for step in range(len(self.source)):
            candidate = (position + step) % len(self.source)
            try:
                return candidate, as_pil(self.source.image(candidate))
            except BadImageError as error:
                bad[self.source.name(candidate)] = str(error)
            if len(bad) > self.bad_limit:
                break
        return None
