"""Batches of unaugmented images that NVIDIA DALI decodes, for `EvalLoader`.

On a GPU the graph resizes and cuts. On the CPU it only decodes, and torchvision's transform does the rest on uint8
tensors: that is faster there, and nearer to PIL's results (see `dali_graph`).

Legend: b images of one batch, ch channels, h x w pixels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.config import DataConfig
from caco_fast.data.loaders.base import RawBatch
from caco_fast.data.loaders.dali_graph import DaliGraph, EvaluationGraph
from caco_fast.data.loaders.dali_pipeline import DaliPipeline, PipelineBatch
from caco_fast.data.loaders.evaluation import batch_of_one_size
from caco_fast.data.sources.base import BadImageError, Source
from caco_fast.data.views.pil import evaluation_transform


class DaliEvaluationBatches:
    """The batches of `EvaluationBatches` for `parts`, as often as it is iterated; the pixels are on `device`."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        parts: Sequence[np.ndarray],
        device: torch.device,
        in_graph: bool | None = None,
    ) -> None:
        """`parts`: the positions of each batch. `in_graph`: whether DALI resizes too; None: on a GPU it does."""
        self._source, self._config, self._parts, self._device = source, config, parts, device
        self._in_graph = device.type == "cuda" if in_graph is None else in_graph

    def __iter__(self) -> Iterator[RawBatch]:
        # Made for this pass only: between two evaluations DALI's memory is free for training.
        with closing(_Pass(self._source, self._config, self._parts, self._device, self._in_graph)) as made:
            yield from made.batches()


@dataclass
class _EvalBatch(PipelineBatch):
    bad: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of each image that was left out


class _Pass(DaliPipeline[_EvalBatch]):
    """One pass over the parts."""

    def __init__(
        self, source: Source, config: DataConfig, parts: Sequence[np.ndarray], device: torch.device, in_graph: bool
    ) -> None:
        super().__init__(source, threads=config.worker_processes(), prefetch=config.prefetch, device=device)
        self._parts, self._in_graph = parts, in_graph
        self._resize, self._size = config.eval_resize, config.eval_size
        self._transform = evaluation_transform(self._resize, self._size)
        self._finishers = ThreadPoolExecutor(self._threads, "caco_fast evaluation")

    def batches(self) -> Iterator[RawBatch]:
        planned = (_EvalBatch(part) for part in self._parts)
        with closing(self._run(planned)) as run:
            for batch, pixels in run:
                if self._stream is not None:
                    reader = torch.cuda.current_stream(self._device)
                    reader.wait_stream(self._stream)
                    for image in pixels:
                        image.record_stream(reader)
                images = self._images(pixels)
                yield batch_of_one_size(images, batch.held.tolist(), batch.bad, self._source)

    def close(self) -> None:
        self._stop()
        self._finishers.shutdown(cancel_futures=True)

    def _images(self, pixels: list[Tensor]) -> list[Tensor]:
        """b tensors [ch, h, w] uint8 of the output of the graph: a batch [b, h, w, ch], or b images [h, w, ch]."""
        if self._in_graph:
            images = pixels[0] if pixels and pixels[0].ndim == 4 else pixels
            return [image.permute(2, 0, 1) for image in images]
        return list(self._finishers.map(lambda image: self._transform(image.permute(2, 0, 1)), pixels))

    def _new_graph(self) -> DaliGraph:
        channels, count = self._source.channels, max(map(len, self._parts))
        options = dict(threads=self._threads, device=self._device)
        if self._in_graph:
            return EvaluationGraph(self._resize, self._size, channels, count, **options)
        return DaliGraph([], channels, count, crops=False, **options)

    def _feed(self, graph: DaliGraph, batch: _EvalBatch) -> None:
        files = [file.data for file in batch.files]
        if isinstance(graph, EvaluationGraph):
            graph.feed_evaluation(files, [(file.height, file.width) for file in batch.files])
        else:
            graph.feed(files)

    def _replace_bad(self, batch: _EvalBatch, bad: dict[int, BadImageError]) -> None:
        batch.bad += [(self._source.name(int(batch.held[row])), str(error)) for row, error in bad.items()]
        kept = [row for row in range(len(batch.files)) if row not in bad]
        batch.held, batch.files = batch.held[kept], [batch.files[row] for row in kept]
