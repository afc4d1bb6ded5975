"""The training loader that uses NVIDIA DALI: threads read ahead, DALI decodes, crops and resizes, batched views finish.

Everything random is drawn on the host from (seed, epoch, index, view), and the order is that of every other loader. So
the reader has no state, and a batch can be made again at any time. A run relies on that after a broken file, and when
it resumes in the middle of an epoch.

Legend: N images of the training set, B images of this rank in one step, V views of an image, ch channels.
"""

import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.config import DataConfig, ViewConfig
from caco_fast.data.loaders.base import Batch, TrainLoader, none_readable
from caco_fast.data.loaders.dali_graph import DaliGraph, crop_views
from caco_fast.data.loaders.dali_pipeline import DaliPipeline, Encoded, PipelineBatch
from caco_fast.data.sources.base import BadImageError, Source
from caco_fast.data.views.batched import finish_crops
from caco_fast.data.views.draws import ViewDraws, draw_views

# Values that one thread finishes at a time on a CPU, for each kind of jitter. They are enough for the calls to cost
# less than the pixels, since threads wait for each other between calls, and few enough for the cache. They depend on
# the view alone, so that the pixels don't depend on the number of threads.
_CPU_VALUES = {"exact": 16 * 3 * 224 * 224, "fast": 8 * 3 * 224 * 224}

# On a GPU an event of its stream, on the CPU the work on parts of the batch.
_Ready = torch.cuda.Event | list[Future[None]]


@dataclass
class _TrainBatch(PipelineBatch):
    epoch: int
    drawn: np.ndarray  # [B] int64: positions as drawn; they decide all random numbers
    draws: list[ViewDraws] = field(default_factory=list)  # V, each [B]


class DaliLoader(TrainLoader, DaliPipeline[_TrainBatch]):
    """Decodes once, cuts all views, finishes them in batches; see `TrainLoader` for what it gives.

    The order of the images is that of the other loaders, the random numbers those of the in-memory loader. Views are on
    `device`, in channels_last. On the CPU they are the same, bit for bit, for any number of threads.
    """

    random_numbers = "batched"

    def __init__(self, source: Source, config: DataConfig, views: Sequence[ViewConfig], **options: Any) -> None:
        """`options`: see `TrainLoader`."""
        TrainLoader.__init__(self, source, config, views, **options)
        threads, prefetch = config.worker_processes(), config.prefetch
        DaliPipeline.__init__(self, source, threads=threads, prefetch=prefetch, device=self._device)
        self._views = [view for view in views for _ in range(view.count)]
        self._mean_and_std = self._normalisation()
        # Each of the threads that finish views runs alone; many threads in each would fight for the cores.
        self._finishers = ThreadPoolExecutor(self._threads, "caco_fast views", torch.set_num_threads, (1,))
        if self._stream is not None:
            # For the mean and the standard deviation.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        super().close()
        self._stop()
        self._finishers.shutdown(cancel_futures=True)

    def _batches(self, epoch: int, shares: Iterator[np.ndarray]) -> Iterator[Batch]:
        made = self._made(epoch, shares)
        with ThreadPoolExecutor(1, "caco_fast loader") as thread:
            try:
                waiting = deque(thread.submit(next, made, None) for _ in range(self._prefetch))
                while (result := waiting.popleft().result()) is not None:
                    waiting.append(thread.submit(next, made, None))
                    yield self._once_ready(*result)
            finally:
                thread.shutdown(cancel_futures=True)
                made.close()

    def _once_ready(self, batch: Batch, ready: _Ready) -> Batch:
        """The batch once it is `ready`. On a GPU the stream of the training step waits for that, not the host."""
        if isinstance(ready, torch.cuda.Event):
            training = torch.cuda.current_stream(self._device)
            training.wait_event(ready)
            for view in batch.views:
                view.record_stream(training)
        else:
            for part in ready:
                part.result()
        return batch

    def _made(self, epoch: int, shares: Iterator[np.ndarray]) -> Iterator[tuple[Batch, _Ready]]:
        planned = (_TrainBatch(share.copy(), epoch, share) for share in shares)
        # Closed here and at once, so that no batch stays in the graph.
        with closing(self._run(planned)) as run:
            for batch, pixels in run:
                yield self._finished(batch, pixels)

    def _new_graph(self) -> DaliGraph:
        size, _, world_size = self._share
        sizes = [view.size for view in self._views]
        count = size // world_size
        return DaliGraph(sizes, self._source.channels, count, threads=self._threads, device=self._device)

    def _feed(self, graph: DaliGraph, batch: _TrainBatch) -> None:
        boxes, flips = [draws.box for draws in batch.draws], [draws.flip for draws in batch.draws]
        graph.feed([file.data for file in batch.files], boxes, flips)

    def _read(self, position: int) -> Encoded | BadImageError:
        known = self._bad.reasons.get(self._source.name(position))
        return super()._read(position) if known is None else BadImageError(known)

    def _replace_bad(self, batch: _TrainBatch, bad: dict[int, BadImageError]) -> None:
        for row, error in bad.items():
            self._replace(batch, row, error)
        size = np.array([(file.height, file.width) for file in batch.files]).T
        batch.draws = [
            draw_views(
                config, *size, self._source.channels,
                seed=self._seed, epoch=batch.epoch, index=batch.drawn, view=np.full(len(batch.drawn), number),
            )
            for number, config in enumerate(self._views)
        ]  # fmt: skip

    def _replace(self, batch: _TrainBatch, row: int, error: BadImageError) -> None:
        """Put the next readable image, in the order of positions, into a bad image's row; UserError past the limit."""
        for _ in range(self._length):
            position = int(batch.held[row])
            self._bad.add([(self._source.name(position), str(error))])
            batch.held[row] = following = (position + 1) % self._length
            file = self._read(following)
            if isinstance(file, Encoded):
                batch.files[row] = file
                return
            error = file
        raise none_readable(self._length)

    def _finished(self, batch: _TrainBatch, pixels: list[Tensor]) -> tuple[Batch, _Ready]:
        """The batch made of the graph's output, crops on a GPU and whole images on the CPU; and what to wait for."""
        finish = self._finished_on_cpu if self._stream is None else self._finished_on_gpu
        views, ready = finish(batch, pixels)
        return Batch(views, torch.from_numpy(batch.held)), ready

    def _finished_on_gpu(self, batch: _TrainBatch, crops: list[Tensor]) -> tuple[list[Tensor], _Ready]:
        with torch.cuda.stream(self._stream):
            views = [
                finish_crops(*view, *self._mean_and_std, self._jitter, self._dtype)
                for view in zip(crops, batch.draws, self._views)
            ]
        return views, self._stream.record_event()

    def _finished_on_cpu(self, batch: _TrainBatch, images: list[Tensor]) -> tuple[list[Tensor], _Ready]:
        channels, views, parts = self._source.channels, [], []
        for number, config in enumerate(self._views):
            views.append(_empty_views(len(images), config.size, channels, self._dtype))
            count = max(1, _CPU_VALUES[self._jitter] // (config.size**2 * channels))
            parts += [(number, slice(start, start + count)) for start in range(0, len(images), count)]

        def finish(number: int, part: slice) -> None:
            config, draws = self._views[number], batch.draws[number].take(part)
            crops = crop_views(images[part], draws.box, draws.flip, config.size)
            constant = (config, *self._mean_and_std, self._jitter, self._dtype)
            finish_crops(crops, draws, *constant, out=views[number][part])

        return views, [self._finishers.submit(finish, *part) for part in parts]


def _empty_views(batch: int, size: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Fresh memory for views [B, ch, s, s] in channels_last, of huge pages if the system has them.

    In pages of 4 KB the first touch of each page would cost as much as a few passes over the pixels.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, batch * size * size * channels * dtype.itemsize, flags=private)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(batch, size, size, channels).permute(0, 3, 1, 2)
