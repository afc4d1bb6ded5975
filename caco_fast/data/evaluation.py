"""Images and labels for evaluation: every image of the rank's shard once, in order, without augmentation.

Legend: b images of one batch, ch channels, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from caco_fast.data.order import evaluation_share
from caco_fast.data.reading import BadImages, EvaluationBatches, RawBatch, as_is
from caco_fast.data.settings import DataConfig
from caco_fast.data.source import ArraySource, Source
from caco_fast.data.views import normalize
from caco_fast.data.workers import worker_options
from caco_fast.errors import UserError


class EvalLoader:
    """Gives (images [b, ch, h, w] float32 normalised, labels [b] int64, index [b] int64) as often as it is iterated.

    The shards of the ranks are contiguous, disjoint and complete, so they may differ by one image; nothing is padded.
    Unreadable images are left out, logged and kept in `bad_images`; UserError where none of the shard can be read.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        share: float = 1.0,
        device: torch.device | str = "cpu",
        dali: bool = False,
    ) -> None:
        """`dali`: whether NVIDIA DALI decodes, in this process, or PIL in worker processes."""
        if batch_size < 1:
            raise UserError(f"the evaluation batch size is {batch_size}; it must be 1 or more")
        self.source, self.dali = source, dali
        self.positions = evaluation_share(len(source), share, rank, world_size)
        self._device = torch.device(device)
        self._mean, self._std = config.mean or source.mean, config.std or source.std
        # Left out without an end to the run: what is bad in the training set is stopped by the training loader.
        self._bad = BadImages(len(source), len(source))
        self._parts = np.array_split(self.positions, range(batch_size, len(self.positions), batch_size))
        self._batches = self._by_dali(config) if dali else self._by_pil(config)

    def _by_dali(self, config: DataConfig) -> Iterable[RawBatch]:
        from caco_fast.data.dali_evaluation import DaliEvaluationBatches

        return DaliEvaluationBatches(self.source, config, self._parts, self._device)

    def _by_pil(self, config: DataConfig) -> Iterable[RawBatch]:
        # An image that lies in memory is taken sooner than a worker is started.
        held = isinstance(self.source, ArraySource) and config.eval_resize is None
        workers = 0 if held else config.worker_processes()
        return DataLoader(
            EvaluationBatches(self.source, config.eval_resize, config.eval_size),
            sampler=self._parts,
            batch_size=None,
            collate_fn=as_is,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
            **worker_options(workers, config.prefetch),
        )

    @property
    def bad_images(self) -> dict[str, str]:
        return self._bad.reasons

    def denormalise(self, images: Tensor) -> Tensor:  # [b, ch, h, w]
        """Back to pixel values in [0, 1]."""
        mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in (self._mean, self._std))
        return images * std + mean

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        readable = 0
        for raw in self._batches:
            self._bad.add(raw.bad)
            if raw.error:
                raise UserError(raw.error)
            readable += len(raw.index)
            if raw.images:
                images = normalize(raw.images[0].to(self._device, non_blocking=True), self._mean, self._std)
                labels = torch.tensor([self.source.label(index) for index in raw.index.tolist()], dtype=torch.int64)
                yield images, labels, raw.index
        if len(self.positions) and not readable:
            raise UserError(f"none of the {len(self.positions)} images to evaluate on can be read; check data.path")
