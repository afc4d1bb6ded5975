"""The training loader by NVIDIA DALI: threads read ahead, DALI decodes, crops and resizes, batched views do the rest.

Everything random is drawn on the host from (seed, epoch, index, view), and the order is that of every other loader. So
there is no reader state: a batch can be made anew at any time, which is how a run goes on after a broken file, and in
mid-epoch after a stop.

Legend: N images of the training set, B images of this rank in one step, V views of an image, ch channels.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from caco_fast.data.batched_draws import ViewDraws, draw_views
from caco_fast.data.batched_views import finish_crops
from caco_fast.data.dali_flights import DaliFlights, Flight
from caco_fast.data.dali_graph import DaliGraph, crop_views
from caco_fast.data.encoded import Encoded
from caco_fast.data.loader import Batch, draws_name, images_name
from caco_fast.data.order import epoch_order, step_share, steps_per_epoch
from caco_fast.data.reading import BadImages
from caco_fast.data.settings import DataConfig, ViewConfig
from caco_fast.data.source import BadImageError, Source
from caco_fast.errors import UserError

# Values finished at a time by one thread on a CPU, by the kind of jitter: enough for the calls to cost less than the
# pixels, since threads wait for each other between calls, and few enough for the cache. A function of the view alone,
# so that the pixels don't depend on the number of threads.
_CPU_VALUES = {"exact": 16 * 3 * 224 * 224, "fast": 8 * 3 * 224 * 224}

# On a GPU an event of its stream, on the CPU the work on parts of the batch.
_Ready = torch.cuda.Event | list[Future[None]]


@dataclass
class _Flight(Flight):
    epoch: int
    drawn: np.ndarray  # [B] int64: positions as drawn; all random numbers are theirs
    draws: list[ViewDraws] = field(default_factory=list)  # V, each [B]


class DaliLoader(DaliFlights[_Flight]):
    """Decodes once, cuts all views, finishes them in batches; see `TrainLoader` for what it gives.

    The order of the images is that of the other loaders, the random numbers those of the memory loader. Views lie on
    `device`, in channels_last. On the CPU they are the same, bit for bit, for any number of threads.
    """

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
        super().__init__(source, threads=config.worker_processes(), prefetch=config.prefetch, device=device)
        self.steps_per_epoch = steps_per_epoch(len(source), batch_size, world_size)
        self.draws = draws_name("batched", config.jitter)
        self.images = images_name(source)
        self._seed, self._jitter, self._dtype = seed, config.jitter, dtype
        self._views = [view for view in views for _ in range(view.count)]
        self._share = (batch_size, rank, world_size)
        self._bad = BadImages(int(config.bad_image_limit * len(source) + 1e-6), len(source))
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self._device)
            for values in (config.mean or source.mean, config.std or source.std)
        )
        # Each of the threads that finish views runs by itself; many threads in each would fight for the cores.
        self._finishers = ThreadPoolExecutor(self._threads, "caco_fast views", torch.set_num_threads, (1,))
        if self._stream is not None:
            # For the mean and the standard deviation.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @property
    def bad_images(self) -> dict[str, str]:
        return self._bad.reasons

    def exchange_bad_images(self) -> None:
        self._bad.exchange()

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        if self._readers is None:
            raise RuntimeError("the loader is closed")
        made = self._batches(epoch, first_step)
        with ThreadPoolExecutor(1, "caco_fast loader") as thread:
            try:
                waiting = deque(thread.submit(next, made, None) for _ in range(self._prefetch))
                while (result := waiting.popleft().result()) is not None:
                    waiting.append(thread.submit(next, made, None))
                    yield self._handed_over(*result)
            finally:
                thread.shutdown(cancel_futures=True)
                made.close()

    def close(self) -> None:
        super().close()
        self._finishers.shutdown(cancel_futures=True)

    def _handed_over(self, batch: Batch, ready: _Ready) -> Batch:
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

    def _batches(self, epoch: int, first_step: int) -> Iterator[tuple[Batch, _Ready]]:
        order = epoch_order(self._seed, epoch, len(self._source))
        shares = (step_share(order, step, *self._share) for step in range(first_step, self.steps_per_epoch))
        planned = (_Flight(share.copy(), epoch, share) for share in shares)
        # Closed here and at once, so that no batch stays in the graph.
        with closing(self._flown(planned)) as flown:
            for flight, pixels in flown:
                yield self._finished(flight, pixels)

    def _new_graph(self) -> DaliGraph:
        size, rank, world_size = self._share
        sizes = [view.size for view in self._views]
        count = size // world_size
        return DaliGraph(sizes, self._source.channels, count, threads=self._threads, device=self._device)

    def _board(self, graph: DaliGraph, flight: _Flight) -> None:
        boxes, flips = [draws.box for draws in flight.draws], [draws.flip for draws in flight.draws]
        graph.feed([file.data for file in flight.files], boxes, flips)

    def _read(self, position: int) -> Encoded | BadImageError:
        known = self._bad.reasons.get(self._source.name(position))
        return super()._read(position) if known is None else BadImageError(known)

    def _settle(self, flight: _Flight, bad: dict[int, BadImageError]) -> None:
        for row, error in bad.items():
            self._replace(flight, row, error)
        size = np.array([(file.height, file.width) for file in flight.files]).T
        flight.draws = [
            draw_views(
                config, *size, self._source.channels,
                seed=self._seed, epoch=flight.epoch, index=flight.drawn, view=np.full(len(flight.drawn), number),
            )
            for number, config in enumerate(self._views)
        ]  # fmt: skip

    def _replace(self, flight: _Flight, row: int, error: BadImageError) -> None:
        """Puts the next readable image, in the order of positions, into a bad one's slot; UserError past the limit."""
        for _ in range(len(self._source)):
            position = int(flight.held[row])
            self._bad.add([(self._source.name(position), str(error))])
            flight.held[row] = following = (position + 1) % len(self._source)
            file = self._read(following)
            if isinstance(file, Encoded):
                flight.files[row] = file
                return
            error = file
        raise UserError(f"none of the {len(self._source)} training images can be read; check data.path")

    def _finished(self, flight: _Flight, pixels: list[Tensor]) -> tuple[Batch, _Ready]:
        """The batch of what the graph gave: crops on a GPU, else whole images; and what to wait for."""
        finish = self._finished_on_cpu if self._stream is None else self._finished_on_gpu
        views, ready = finish(flight, pixels)
        return Batch(views, torch.from_numpy(flight.held)), ready

    def _finished_on_gpu(self, flight: _Flight, crops: list[Tensor]) -> tuple[list[Tensor], _Ready]:
        with torch.cuda.stream(self._stream):
            views = [
                finish_crops(*view, self._mean, self._std, self._jitter, self._dtype)
                for view in zip(crops, flight.draws, self._views)
            ]
        return views, self._stream.record_event()

    def _finished_on_cpu(self, flight: _Flight, images: list[Tensor]) -> tuple[list[Tensor], _Ready]:
        channels, views, parts = self._source.channels, [], []
        for number, config in enumerate(self._views):
            views.append(_room(len(images), config.size, channels, self._dtype))
            count = max(1, _CPU_VALUES[self._jitter] // (config.size**2 * channels))
            parts += [(number, slice(start, start + count)) for start in range(0, len(images), count)]

        def finish(number: int, part: slice) -> None:
            config, draws = self._views[number], flight.draws[number].take(part)
            crops = crop_views(images[part], draws.box, draws.flip, config.size)
            constant = (config, self._mean, self._std, self._jitter, self._dtype)
            finish_crops(crops, draws, *constant, out=views[number][part])

        return views, [self._finishers.submit(finish, *part) for part in parts]


def _room(batch: int, size: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Fresh memory for views [B, ch, s, s] in channels_last, of huge pages where there are such.

    In pages of 4 KB the first touch of each would cost as much as a few passes over the pixels.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, batch * size * size * channels * dtype.itemsize, flags=private)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(batch, size, size, channels).permute(0, 3, 1, 2)
