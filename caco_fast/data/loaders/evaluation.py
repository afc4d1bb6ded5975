"""Images and labels for evaluation: every image of the rank's shard once, in order, without augmentation.

Legend: b images of one batch, ch channels, h x w pixels.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from caco_fast.data.config import DataConfig
from caco_fast.data.loaders.base import BadImages, RawBatch, evaluation_share
from caco_fast.data.loaders.workers import as_is, from_workers, worker_options
from caco_fast.data.sources.base import ArraySource, BadImageError, FileSource, Source, as_pil, header_size
from caco_fast.data.sources.index import IndexSource
from caco_fast.data.views.pil import evaluation_box, evaluation_transform, normalize
from caco_fast.errors import UserError

# Images whose headers are read before training: on a network's disk that takes a second or two.
_PROBES = 200


class EvalLoader:
    """Gives (images [b, ch, h, w] float32 normalised, labels [b] int64, index [b] int64) as often as it is iterated.

    The shards of the ranks are contiguous, disjoint and complete, so they may differ by one image; nothing is padded.
    Unreadable images are left out, logged and kept in `bad_images`; UserError if no image of the shard can be read.
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
            raise UserError(f"evaluation.batch_size: found {batch_size}, expected 1 or more")
        self.source, self.dali = source, dali
        # Whether a shard without a readable image is no error.
        self.may_be_empty = False
        self.positions = evaluation_share(len(source), share, rank, world_size)
        self._device = torch.device(device)
        self._view = config.eval_resize, config.eval_size, config.eval_interpolation
        self._mean, self._std = config.mean or source.mean, config.std or source.std
        self._scale = [torch.tensor(values, dtype=torch.float32, device=device) for values in (self._mean, self._std)]
        # No limit here: the training loader stops a run whose training set has too many bad images.
        self._bad = BadImages(len(source), len(source))
        self._parts = np.array_split(self.positions, range(batch_size, len(self.positions), batch_size))
        self._batches = self._by_dali(config) if dali else self._by_pil(config)

    def _by_dali(self, config: DataConfig) -> Iterable[RawBatch]:
        # Here, because DALI need not be installed.
        from caco_fast.data.loaders.dali_evaluation import DaliEvaluationBatches

        return DaliEvaluationBatches(self.source, config, self._parts, self._device)

    def _by_pil(self, config: DataConfig) -> Iterable[RawBatch]:
        # An image in memory is ready before a worker has started.
        held = isinstance(self.source, ArraySource) and config.eval_resize is None
        workers = 0 if held else config.worker_processes()
        return DataLoader(
            EvaluationBatches(self.source, *self._view),
            sampler=self._parts,
            batch_size=None,
            collate_fn=as_is,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
            **worker_options(workers, config.prefetch),
        )

    @property
    def bad_images(self) -> dict[str, str]:
        """Name -> reason of every image that was left out so far."""
        return self._bad.reasons

    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the set's first image as it will be given, the same on all ranks; None: can't be read."""
        images = EvaluationBatches(self.source, *self._view)[range(min(1, len(self.source)))].images
        return (images[0].shape[2], images[0].shape[3]) if images else None

    def denormalise(self, images: Tensor) -> Tensor:  # [b, ch, h, w]
        """Back to pixel values in [0, 1]."""
        mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in (self._mean, self._std))
        return images * std + mean

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        readable = 0
        for raw in from_workers(self._batches):
            self._bad.add(raw.bad)
            readable += len(raw.index)
            if raw.images:
                images = normalize(raw.images[0].to(self._device, non_blocking=True), *self._scale)
                labels = torch.tensor([self.source.label(index) for index in raw.index.tolist()], dtype=torch.int64)
                yield images, labels, raw.index
        if len(self.positions) and not readable and not self.may_be_empty:
            raise UserError(f"none of the {len(self.positions)} images to evaluate on can be read; check data.path")


def check_sizes(source: Source, config: DataConfig, positions: np.ndarray) -> None:
    """Raise UserError if images at `positions` can't be in one batch, as far as an index or some of the headers say.

    A run should learn that before it trains, and not at its first evaluation.
    """
    if config.eval_size is not None or isinstance(source, ArraySource):
        return
    first: tuple[int, tuple[int, int], tuple[int, int]] | None = None
    for position, (height, width) in _known_sizes(source, positions):
        made, _ = evaluation_box(height, width, config.eval_resize, None)
        first = first or (position, made, (height, width))
        if made != first[1]:
            other = (source.name(first[0]), first[1])
            raise UserError(_several_sizes((source.name(position), made), other))


def _known_sizes(source: Source, positions: np.ndarray) -> Iterator[tuple[int, tuple[int, int]]]:
    """Height and width of the images at `positions`: of all if an index says them, else of some, by their headers."""
    if isinstance(source, IndexSource):
        _, first = np.unique(source.sizes[positions], axis=0, return_index=True)
        yield from ((int(at), tuple(source.sizes[at].tolist())) for at in positions[np.sort(first)])
        return
    probes = np.unique(np.linspace(0, len(positions) - 1, num=min(_PROBES, len(positions)), dtype=np.int64))
    for position in positions[probes].tolist():
        # Those that can't be read are left out later, too.
        with suppress(BadImageError):
            yield (
                position,
                header_size(
                    source.path(position) if isinstance(source, FileSource) else io.BytesIO(source.encoded(position))
                ),
            )


def _several_sizes(image: tuple[str, tuple[int, ...]], other: tuple[str, tuple[int, ...]]) -> str:
    (name, (height, width)), (other_name, (other_height, other_width)) = image, other
    return (
        f"{name} has {width} x {height} pixels, {other_name} has {other_width} x {other_height}; "
        f"set data.eval_resize and data.eval_size, for instance to 256 and 224"
    )


class EvaluationBatches(Dataset[RawBatch]):
    """A dataset whose items are batches of unaugmented images; its keys are positions, bad images are left out."""

    def __init__(self, source: Source, resize: int | None, size: int | None, interpolation: str) -> None:
        self.source = source
        self.transform = evaluation_transform(resize, size, interpolation)

    def __getitem__(self, positions: Sequence[int]) -> RawBatch:
        images, index, bad = [], [], []
        for position in map(int, positions):
            try:
                image = as_pil(self.source.image(position))
            except BadImageError as error:
                bad.append((self.source.name(position), str(error)))
                continue
            images.append(self.transform(image))
            index.append(position)
        return batch_of_one_size(images, index, bad, self.source)


def batch_of_one_size(
    images: Sequence[Tensor], index: Sequence[int], bad: list[tuple[str, str]], source: Source
) -> RawBatch:
    """The images [ch, h, w] at the positions `index` as one batch, or a batch with an error if their sizes differ."""
    shown = torch.tensor(index, dtype=torch.int64)
    for image, position in zip(images, index, strict=True):
        if image.shape != images[0].shape:
            first = source.name(index[0]), tuple(images[0].shape[1:])
            return RawBatch([], shown, bad, _several_sizes((source.name(position), tuple(image.shape[1:])), first))
    return RawBatch([torch.stack(list(images))] if images else [], shown, bad)
