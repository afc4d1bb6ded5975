"""Features in a folder: written in shards from several ranks, and mapped from the disk when they are read.

    features.partial    [N, D] while it is written: one row for each image, in the order of the source
    done-<start>.json   a shard that is on the disk: its rows, their checksum, the images left out
    features.bin        [R, D] once all shards are there: the rows of the images that can be read
    index.bin           [R] int64, their positions in the source
    manifest.json       what the features are of, and the checksums; a folder without it is not complete

Nothing here waits for other ranks, except that ranks must not finish before all of them have written.

Legend: N images of the source, R of them readable, D feature size.
"""

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.storage import atomic_write, atomic_write_text, lock

VERSION = 1
# Bytes that are copied at a time where images were left out.
PIECE = 2**26


class Stored(NamedTuple):
    """The rows of a complete folder at some positions."""

    features: Tensor  # [R, D], mapped: only what is read takes memory, and the system may drop it again
    index: Tensor  # [R] int64
    bad: dict[str, str]  # name -> reason of the images of the whole source that were left out


@dataclass(frozen=True)
class Shard:
    """The rows `start` to `stop` of `features.partial` that are on the disk."""

    start: int
    stop: int
    width: int  # D; 0 if no image of the shard can be read
    dtype: str
    checksum: int  # of the rows of readable images
    bad: dict[int, tuple[str, str]]  # position -> (name, reason)

    @property
    def good(self) -> np.ndarray:
        """The positions of its readable images."""
        return np.setdiff1d(np.arange(self.start, self.stop), list(self.bad))


class FeatureCache:
    """The folder of one set of features below `root`; `settings` say all that the features depend on."""

    def __init__(self, root: Path, settings: dict[str, Any], count: int) -> None:
        # Through JSON, as it is read back: tuples become lists.
        self.settings = json.loads(json.dumps({"version": VERSION, **settings}))
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.count = root / key, count

    def read(self, first: int, last: int) -> Stored | None:
        """The rows of the positions `first` to `last`, checked; None if the folder is not complete, or damaged."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            if manifest["settings"] != self.settings:
                return None
            rows, width, dtype = manifest["rows"], manifest["width"], getattr(torch, manifest["dtype"])
            positions = np.fromfile(self.folder / "index.bin", dtype="<i8")
            size = (self.folder / "features.bin").stat().st_size
            if size != rows * width * dtype.itemsize or zlib.crc32(positions.tobytes()) != manifest["index"]:
                return None
            whole = torch.from_file(str(self.folder / "features.bin"), False, rows * width, dtype=dtype)
            whole = whole.view(rows, width)
            for start, stop, checksum in manifest["shards"]:
                own = slice(*np.searchsorted(positions, (start, stop)).tolist())
                if start < last and stop > first and _checksum(whole[own]) != checksum:
                    return None
            own = slice(*np.searchsorted(positions, (first, last)).tolist())
            return Stored(whole[own], torch.from_numpy(positions[own].astype(np.int64)), manifest["bad"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            # Whatever is wrong with it, the features can be made again.
            return None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context in which no other program writes to the folder (of one rank)."""
        with self.reporting():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "lock", "wb")
        with file:
            try:
                lock(file)
            except BlockingIOError:
                raise UserError(
                    f"features: another program writes to {self.folder}; wait for its end, or name another cache folder"
                ) from None
            yield

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """A context in which an error of the disk becomes one line."""
        try:
            yield
        except OSError as error:
            there = sum(shard.stop - shard.start for shard in self.shards())
            advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "repair it"
            raise UserError(
                f"features: can't write to {self.folder}: {error.strerror}; {advice} and start again: the features of "
                f"{there:,} of {self.count:,} images are kept"
            ) from None

    def shards(self) -> list[Shard]:
        """The shards that are on the disk, by position. None that overlaps another, or that can't be read."""
        found: list[Shard] = []
        for path in self.folder.glob("done-*.json"):
            with suppress(OSError, ValueError, TypeError, AttributeError):
                record = json.loads(path.read_text())
                record["bad"] = {int(position): tuple(reason) for position, reason in record["bad"].items()}
                found.append(Shard(**record))
        kept: list[Shard] = []
        for shard in sorted(found, key=lambda shard: shard.start):
            if shard.stop <= self.count and (not kept or shard.start >= kept[-1].stop):
                kept.append(shard)
        return kept

    def prepare(self) -> np.ndarray:
        """The positions whose features are missing. A folder with damage is emptied first."""
        shards = self.shards()
        sizes = {self.count * shard.width * getattr(torch, shard.dtype).itemsize for shard in shards if shard.width}
        # Without the first one, a program ended after the last shard and before the manifest.
        files = (self.folder / "features.partial", self.folder / "features.bin")
        found = {path.stat().st_size for path in files if path.exists()}
        if (
            (self.folder / "manifest.json").exists()
            or len(sizes) > 1
            or not sizes <= found
            or bool(found) > bool(sizes)
        ):
            self.clear()
            shards = []
        missing = np.ones(self.count, dtype=bool)
        for shard in shards:
            missing[shard.start : shard.stop] = False
        return missing.nonzero()[0]

    def clear(self) -> None:
        """Remove all but the lock."""
        for path in self.folder.glob("*"):
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def write(
        self, start: int, features: Tensor, index: np.ndarray, stop: int, bad: dict[int, tuple[str, str]]
    ) -> None:
        """Put a shard on the disk: `features` [n, D] of the readable positions `index` [n] within start to stop."""
        width = features.shape[1] if len(index) else 0
        with self.reporting():
            if width:
                rows = features.contiguous()
                if len(index) < stop - start:
                    rows = features.new_zeros(stop - start, width)
                    rows[torch.from_numpy(index - start)] = features
                size = width * features.element_size()
                _write_at(self.folder / "features.partial", start * size, _bytes(rows), self.count * size)
            dtype = str(features.dtype).removeprefix("torch.")
            shard = Shard(start, stop, width, dtype, _checksum(features), bad)
            atomic_write_text(self.folder / f"done-{start}.json", json.dumps(vars(shard)))

    def finish(self) -> None:
        """Make the folder complete, once every position is in a shard."""
        shards = self.shards()
        first = next((shard for shard in shards if shard.width), None)
        if first is None:
            # They may be repaired.
            self.clear()
            raise UserError(f"features: none of the {self.count} images can be read")
        positions = np.concatenate([shard.good for shard in shards]).astype("<i8")
        partial, final = self.folder / "features.partial", self.folder / "features.bin"
        with self.reporting():
            if partial.exists() and len(positions) == self.count:
                os.replace(partial, final)
            elif partial.exists():
                _copy_rows(partial, final, positions, first.width * getattr(torch, first.dtype).itemsize)
            with atomic_write(self.folder / "index.bin") as file:
                file.write(positions.tobytes())
            manifest = {
                "settings": self.settings,
                "rows": len(positions),
                "width": first.width,
                "dtype": first.dtype,
                "index": zlib.crc32(positions.tobytes()),
                "shards": [(shard.start, shard.stop, shard.checksum) for shard in shards],
                "bad": dict(reason for shard in shards for reason in shard.bad.values()),
            }
            atomic_write_text(self.folder / "manifest.json", json.dumps(manifest, indent=1))
            for path in [partial, *self.folder.glob("done-*.json")]:
                path.unlink(missing_ok=True)


def _bytes(rows: Tensor) -> memoryview:
    return memoryview(rows.contiguous().view(torch.uint8).numpy()).cast("B") if rows.numel() else memoryview(b"")


def _checksum(rows: Tensor) -> int:
    return zlib.crc32(_bytes(rows))


def _write_at(path: Path, offset: int, content: memoryview, size: int) -> None:
    """Write within a file of `size` bytes, which is made if it isn't there, and wait for the disk."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(descriptor).st_size < size:
            # All of it at once, so that a disk that is too small says so at the first shard.
            _reserve(descriptor, size)
        while content:
            written = os.pwrite(descriptor, content, offset)
            content, offset = content[written:], offset + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, size)


def _copy_rows(source: Path, target: Path, positions: np.ndarray, size: int) -> None:
    """Copy the rows of `size` bytes at some positions, in pieces."""
    rows = np.memmap(source, dtype=np.uint8, mode="r").reshape(-1, size)
    with atomic_write(target) as file:
        for part in np.array_split(positions, max(1, len(positions) * size // PIECE)):
            file.write(rows[part].tobytes())
