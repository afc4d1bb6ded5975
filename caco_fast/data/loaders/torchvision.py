"""The training loader that augments with torchvision transforms, and the worker processes that it and evaluation use.

Workers are forked from a server that has no threads, and not from the training process. A process with threads, such as
DALI's, autograd's or those of a CUDA driver, can't be forked safely: a lock that one of them holds stays locked in the
child for ever. The server starts once for a process and imports what workers need while the run is being built;
afterwards a worker costs as much as a fork.

Legend: B images of this rank in one step, V views of an image.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from pickle import PicklingError
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from caco_fast.data.config import DataConfig, ViewConfig, require_exact_jitter
from caco_fast.data.loaders.base import Batch, RawBatch, TrainLoader, none_readable, view_seed
from caco_fast.data.sources.base import BadImageError, Source, as_pil
from caco_fast.data.views.pil import keep_random_state, normalize, reseed, view_transform
from caco_fast.host import STOP_SIGNALS


class TorchvisionLoader(TrainLoader):
    """Reads, augments and collates in worker processes; see `TrainLoader` for what it gives."""

    random_numbers = "torchvision"

    def __init__(self, source: Source, config: DataConfig, views: Sequence[ViewConfig], **options: Any) -> None:
        """`options`: see `TrainLoader`."""
        super().__init__(source, config, views, **options)
        require_exact_jitter(config.jitter)
        self._keys = _Keys()
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
        for raw in self._loader:
            self._bad.add(raw.bad)
            if not raw.images:
                raise none_readable(self._length)
            views = [normalize(v.to(self._device, non_blocking=True), self._mean, self._std) for v in raw.images]
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


def as_is(batch: Any) -> Any:
    """A collate function for datasets that give whole batches."""
    return batch


class _Popen(Popen):
    def terminate(self) -> None:
        """Kill the worker, because it ignores SIGTERM. A process calls this at its exit for each worker it has left."""
        self.kill()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: ForkServerProcess) -> Popen:
        with suppress(PicklingError), _nameless_main():
            return _Popen(process)
        # The worker is given something that the script itself defines, such as a source of images.
        return _Popen(process)


class _Context(ForkServerContext):
    Process = _Process


def worker_options(workers: int, prefetch: int) -> dict[str, Any]:
    """The arguments of a DataLoader with this many workers; its dataset is pickled into each of them."""
    if not workers:
        return {"num_workers": 0}
    context = _Context()
    context.set_forkserver_preload(["caco_fast.data.loaders.worker_preload"])
    forkserver.ensure_running()
    return {
        "num_workers": workers,
        "prefetch_factor": prefetch,
        "multiprocessing_context": context,
        "worker_init_fn": _begin,
    }


def _begin(worker: int) -> None:
    leave_interrupts_to_the_trainer()
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(process: Any) -> None:
    """End this worker when the training process is gone, even if it was killed.

    torch watches the worker's parent for that. Here the parent is the server, which lives as long as its workers.
    """
    process.join()
    os._exit(1)


def leave_interrupts_to_the_trainer() -> None:
    """Ignore the signals that Ctrl-C, torchrun and SLURM send to every process: the trainer needs its last batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Hide the script from multiprocessing, so that a new process does not run it again.

    multiprocessing would run it for what is pickled out of the script, and would fail if the script has no
    `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
