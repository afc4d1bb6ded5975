"""Features of a frozen backbone over a source, computed once and kept (`evaluate.cache`).

Every rank computes a share of what is missing. Then each rank reads its own share, whatever number of ranks has
written.

Legend: N images of this rank, D feature size, b images of a batch.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from caco_fast.data import (
    ArraySource,
    BadImageError,
    DataConfig,
    EvalLoader,
    Source,
    TrainLoader,
    ViewConfig,
    build_eval_loader,
    build_train_loader,
)
from caco_fast.data.loaders.base import evaluation_share
from caco_fast.data.sources.part import take
from caco_fast.distributed import all_gather_objects, rank, world_size
from caco_fast.engine.agreement import on_rank_0, together
from caco_fast.errors import UserError
from caco_fast.evaluate import extract_features
from caco_fast.evaluate.cache import FeatureCache, Stored
from caco_fast.evaluate.features import evaluation_mode

# Images of a shard, and seconds after which a shard ends anyway: what a kill may cost.
SHARD, SECONDS = 4096, 30.0
# Seconds between two lines of the log.
LINE = 60.0
# Images whose bytes, and files whose size and time, tell a source from another one with the same names.
READ, SEEN = 64, 10_000

log = logging.getLogger("caco_fast.features")


class FeatureSet(NamedTuple):
    """The shard of this rank of the features of a split, in the order of the images."""

    features: Tensor  # [N, D] in the dtype that the backbone computed, on the CPU; a memory-mapped file if cached
    labels: Tensor  # [N] int64
    index: Tensor  # type: ignore[assignment]  # [N] int64, positions in the source
    source: Source
    # Name -> reason of the images that can't be read: of all ranks if cached, else of this one.
    bad: dict[str, str] = {}


@dataclass(frozen=True)
class AugmentedView:
    """One random view of each image, a function of (seed, epoch, image) as in training."""

    view: ViewConfig
    seed: int
    epoch: int


@dataclass(frozen=True)
class Extraction:
    """What features are of, and how they are computed."""

    encoder: nn.Module
    precision: Callable[[], AbstractContextManager]
    source: Source
    split: str
    config: DataConfig  # how images are read
    view: AugmentedView | None  # None: the image as evaluation shows it
    batch_size: int
    device: torch.device
    labelled: bool  # whether images without labels are an error

    def without_cache(self) -> FeatureSet:
        """The features of this rank, in memory (collective)."""
        positions = evaluation_share(len(self.source), 1.0, rank(), world_size())

        def extract() -> FeatureSet:
            batches = _Batches(self, positions)
            found = extract_features(self.encoder, batches, self.device, self.precision())
            features, labels, index = (value.cpu() for value in found)
            return FeatureSet(features, labels, index, self.source, dict(batches.bad))

        return together(extract)

    def cached(self, root: Path, computed_by: dict[str, Any], whole: bool = False) -> FeatureSet:
        """The features of this rank, mapped from a folder below `root`, which is filled first (collective).

        computed_by: what the features depend on besides the images and their view. whole: those of all ranks.
        """
        settings = on_rank_0(lambda: {**computed_by, **self._pixels()})
        cache = FeatureCache(root, settings, len(self.source))
        share = evaluation_share(len(self.source), 1.0, *((0, 1) if whole else (rank(), world_size())))
        first, last = (int(share[0]), int(share[-1]) + 1) if len(share) else (0, 0)
        title = f"features of {len(self.source):,} {self.split} images"

        def read(fill: bool) -> Stored | None:
            stored = cache.read(first, last)
            if stored is None and fill:
                raise UserError(
                    f"features: {cache.folder} is complete and can't be read; name a cache folder that all ranks share"
                )
            return stored

        # One rank that finds damage makes all of them begin again.
        complete = all(all_gather_objects(read(fill=False) is not None))
        if complete:
            _say("%s: read from %s", title, cache.folder)
        else:
            with ExitStack() as stack:
                # Rank 0 keeps the lock while all of them write.
                together(lambda: stack.enter_context(cache.writing()) if rank() == 0 else None)
                self._fill(cache, title)
        stored = together(lambda: read(fill=True))
        assert stored is not None
        if stored.bad:
            name, reason = next(iter(stored.bad.items()))
            _say(
                "%s: %d are left out, since they can't be read; the first is %s (%s); remove %s to try them again",
                title, len(stored.bad), name, reason, cache.folder, level=logging.WARNING,
            )  # fmt: skip
        labels = [self.source.label(position) for position in stored.index.tolist()]
        return FeatureSet(
            stored.features, torch.tensor(labels, dtype=torch.int64), stored.index, self.source, stored.bad
        )

    def _fill(self, cache: FeatureCache, title: str) -> None:
        missing = on_rank_0(cache.prepare)
        done = len(self.source) - len(missing)
        _say("%s: extracting into %s%s", title, cache.folder, f", {done:,} are there already" if done else "")
        start = time.perf_counter()
        own = np.array_split(missing, world_size())[rank()]
        together(lambda: self._write(cache, own, len(missing), title))
        on_rank_0(cache.finish)
        spent = time.perf_counter() - start
        _say("%s: %s extracted in %.1f s, %s images/s", title, f"{len(missing):,}", spent, _rate(len(missing), spent))

    def _write(self, cache: FeatureCache, positions: np.ndarray, total: int, title: str) -> None:
        """Extract the features at `positions`, shard by shard."""
        if len(positions) == 0:
            return
        batches = _Batches(self, positions)
        # On the device until a shard ends, since each copy waits for the device.
        rows, index, done, begun = [], [], 0, time.perf_counter()
        shard_begun = line = begun
        with torch.no_grad(), evaluation_mode(self.encoder), self.precision():
            for images, _, found in batches:
                rows.append(self.encoder(images))
                index.append(found.numpy())
                now = time.perf_counter()
                if sum(map(len, index)) >= SHARD or now - shard_begun > SECONDS:
                    end = int(np.searchsorted(positions, index[-1][-1])) + 1
                    _write_shards(cache, self.source, positions[done:end], rows, index, batches.bad)
                    rows, index, done, shard_begun = [], [], end, now
                    if now - line > LINE:
                        line = now
                        counts = f"{done * world_size():,} of {total:,}"
                        rate = _rate(done * world_size(), now - begun)
                        _say("%s: about %s, %s images/s", title, counts, rate)
        _write_shards(cache, self.source, positions[done:], rows, index, batches.bad)

    def _pixels(self) -> dict[str, Any]:
        """All that the pixels depend on."""
        config, source = self.config, self.source
        evaluation = {name: value for name, value in vars(config).items() if name.startswith("eval_")}
        random = {**dataclasses.asdict(self.view), "jitter": config.jitter} if self.view is not None else {}
        return {
            "split": self.split,
            "images": fingerprint(source),
            "view": random or evaluation,
            "mean": list(config.mean or source.mean),
            "std": list(config.std or source.std),
            "max_pixels": config.max_pixels,
            "loader": config.loader,
        }


class _Batches:
    """Batches (images [b, ch, h, w], labels [b], positions [b]) of the images at `positions` that can be read."""

    def __init__(self, work: Extraction, positions: np.ndarray) -> None:
        self.work, self.positions = work, positions
        size = min(work.batch_size, len(work.source))
        self.parts = np.split(positions, range(size, len(positions), size))
        options: dict[str, Any] = {"batch_size": size, "device": work.device}
        if work.view is None:
            part = work.source if len(positions) == len(work.source) else take(work.source, positions)
            loader = build_eval_loader(work.config, work.split, **options, source=part, labelled=work.labelled)
            # A share that is left after a stop may have bad images alone.
            loader.may_be_empty = True
            self.loader: EvalLoader | TrainLoader = loader
        else:
            # Of the whole source, because the view of an image depends on its position there.
            config = dataclasses.replace(work.config, imbalance="none", bad_image_limit=1.0)
            views = [dataclasses.replace(work.view.view, count=1)]
            self.loader = build_train_loader(config, views, **options, seed=work.view.seed, source=work.source)

    @property
    def bad(self) -> dict[str, str]:
        """Name -> reason of every image that was left out so far."""
        return self.loader.bad_images

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if isinstance(self.loader, EvalLoader):
            for images, labels, index in self.loader:
                yield images, labels, torch.from_numpy(self.positions)[index]
            return
        assert self.work.view is not None
        try:
            for part, batch in zip(self.parts, self.loader.batches_of(self.work.view.epoch, self.parts)):
                # In place of a bad image the loader gives another one.
                good = torch.from_numpy(part) == batch.index.cpu()
                if good.any():
                    positions = torch.from_numpy(part)[good]
                    labels = torch.tensor([self.work.source.label(position) for position in positions.tolist()])
                    yield batch.views[0][good.to(batch.views[0].device)], labels, positions
        finally:
            self.loader.close()


def _write_shards(
    cache: FeatureCache,
    source: Source,
    positions: np.ndarray,
    rows: list[Tensor],
    index: list[np.ndarray],
    reasons: dict[str, str],
) -> None:
    """Write the features `rows` at `index`, of all images at `positions`: a shard for each run of them."""
    if len(positions) == 0:
        return
    features = torch.cat(rows).cpu() if rows else torch.empty(0, 0)
    readable = np.concatenate(index) if index else positions[:0]
    for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
        start, stop = int(run[0]), int(run[-1]) + 1
        own = slice(*np.searchsorted(readable, (start, stop)).tolist())
        names = {int(position): source.name(int(position)) for position in np.setdiff1d(run, readable[own])}
        bad = {position: (name, reasons.get(name, "unreadable")) for position, name in names.items()}
        cache.write(start, features[own], readable[own], stop, bad)


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells the images of a source from others: their list, and the contents of some of them.

    Two folders may have the same names. The bytes of some images are read, and the size and the time of change of up to
    `SEEN` files, so that an image of a small set may not change unnoticed.
    """
    digest = hashlib.sha256()
    if isinstance(source, ArraySource):
        digest.update(np.ascontiguousarray(source.images))
    else:
        for position in np.unique(np.linspace(0, len(source) - 1, READ, dtype=np.int64)).tolist():
            try:
                digest.update(source.encoded(position))
            except BadImageError as error:
                digest.update(str(error).encode())
    if (path := getattr(source, "path", None)) is not None:
        for position in np.unique(np.linspace(0, len(source) - 1, SEEN, dtype=np.int64)).tolist():
            try:
                found = path(position).stat()
                digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
            except OSError as error:
                digest.update(f"{error.errno}\n".encode())
    return {"count": len(source), "list": source.list_hash(), "contents": digest.hexdigest()}


def _rate(count: int, seconds: float) -> str:
    return f"{count / max(seconds, 1e-9):,.0f}"


def _say(line: str, *values: Any, level: int = logging.INFO) -> None:
    if rank() == 0:
        log.log(level, line, *values)
