"""Making an index: every file of a folder is read, decoded to the last pixel and hashed, by several processes.

Legend: N files of a split.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from caco_fast.data.files import FORMATS, FileSource, decode
from caco_fast.data.index import SplitIndex
from caco_fast.data.source import BadImageError
from caco_fast.errors import UserError

# Files in one task: few enough for an even end, many enough that sending them costs nothing.
_TASK = 32

ZERO_BYTE, BROKEN, SUFFIX, CMYK, DUPLICATE = "zero-byte", "broken", "wrong suffix", "CMYK", "duplicate"
KINDS = (ZERO_BYTE, BROKEN, SUFFIX, CMYK, DUPLICATE)
EXCLUDED = (ZERO_BYTE, BROKEN)

_KIND_OF_SUFFIX = {
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    **dict.fromkeys((".ppm", ".pgm"), "PPM"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".png": "PNG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP"},
}


class Finding(NamedTuple):
    """Something about one file that its owner may want to know."""

    kind: str  # one of KINDS
    name: str
    reason: str


class _File(NamedTuple):
    """What a worker says of one file; a height of 0 stands for one that can't be decoded."""

    height: int
    width: int
    length: int
    checksum: int
    digest: int
    findings: list[tuple[str, str]]  # kind, reason


@dataclass
class Inspection:
    """What all files of a split turned out to be."""

    sizes: np.ndarray  # [N, 2] int32: height, width; 0 where a file can't be decoded
    bytes: np.ndarray  # [N] int64
    checksums: np.ndarray  # [N] uint32: CRC-32 of the file's bytes
    digests: np.ndarray  # [N] uint64: BLAKE2 of them
    findings: list[Finding] = field(default_factory=list)

    @property
    def good(self) -> np.ndarray:
        """[N] bool"""
        return self.sizes[:, 0] > 0


def inspect(source: FileSource, workers: int, advance: Callable[[int], None] = lambda files: None) -> Inspection:
    """Decodes all files of the source in `workers` processes; `advance` is told of each so many that are done.

    UserError where a worker process died (as of a lack of memory), with the files it may have been at.
    """
    count = len(source)
    lists = (np.zeros(count, kind) for kind in (np.int64, np.uint32, np.uint64))
    found = Inspection(np.zeros((count, 2), np.int32), *lists)
    findings: dict[int, list[Finding]] = {}
    for start, files in _in_processes(source, workers):
        for index, file in enumerate(files, start):
            found.sizes[index] = file.height, file.width
            found.bytes[index] = file.length
            found.checksums[index] = file.checksum
            found.digests[index] = file.digest
            if file.findings:
                findings[index] = [Finding(kind, source.name(index), reason) for kind, reason in file.findings]
        advance(len(files))
    found.findings = [finding for index in sorted(findings) for finding in findings[index]]
    return found


def find_duplicates(sources: Sequence[tuple[FileSource, Inspection]]) -> tuple[list[Finding], list[np.ndarray]]:
    """Files with the bytes of an earlier one, over all splits in turn, and which they are in each split, [N] bool."""
    digests = np.concatenate([found.digests for _, found in sources])
    good = np.concatenate([found.good for _, found in sources])
    ends = np.cumsum([len(source) for source, _ in sources])

    def name(place: int) -> str:
        part = int(np.searchsorted(ends, place, side="right"))
        return sources[part][0].name(place - (int(ends[part - 1]) if part else 0))

    # Stable, so that of equal files the first comes first.
    order = np.argsort(digests, kind="stable")
    order = order[good[order]]
    repeats = np.flatnonzero(digests[order[1:]] == digests[order[:-1]]) + 1  # places in `order`
    repeated = np.zeros(len(digests), dtype=bool)
    repeated[order[repeats]] = True
    originals = order[np.searchsorted(digests[order], digests[order[repeats]])]
    pairs = sorted(zip(order[repeats].tolist(), originals.tolist()))
    findings = [Finding(DUPLICATE, name(copy), f"the same bytes as {name(first)}") for copy, first in pairs]
    return findings, np.split(repeated, ends[:-1])


def split_index(source: FileSource, found: Inspection, top: Path, keep: np.ndarray) -> SplitIndex:
    """The list of the files that `keep` [N] names. UserError where there is none."""
    kept = np.flatnonzero(keep)
    if not len(kept):
        raise UserError(f"none of the {len(source)} images in {source.root} can be decoded; no index was written")
    return SplitIndex(
        folder=os.path.relpath(source.root, top),
        classes=source.classes,
        names=source.names.take(kept),
        labels=source.labels[kept],
        sizes=found.sizes[kept],
        bytes=found.bytes[kept],
        checksums=found.checksums[kept],
    )


def _in_processes(source: FileSource, workers: int) -> Iterator[tuple[int, list[_File]]]:
    """(number of the first file, what was found) for each task, in the order in which they end."""
    # The server imports once, and the workers are forked from it, where no thread runs.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    starts = iter(range(0, len(source), _TASK))
    running: dict[Future[list[_File]], int] = {}
    try:
        while True:
            # A few tasks ahead: all of them at once would be the whole list a second time.
            while len(running) < 4 * workers and (start := next(starts, None)) is not None:
                names = [source.names[index] for index in range(start, min(start + _TASK, len(source)))]
                running[pool.submit(_inspect_files, os.fsencode(source.root), names)] = start
            if not running:
                return
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(task), task.result()
    except BrokenProcessPool:
        at = min(running.values(), default=0)
        raise UserError(
            f"a worker process was killed, most likely for lack of memory, at one of the files from "
            f"{source.name(at)}; try again with fewer --workers, or look at the files there"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal, but only one should report it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Of odd metadata; what matters here is whether the pixels can be had.
    warnings.simplefilter("ignore")


def _inspect_files(root: bytes, names: list[bytes]) -> list[_File]:
    return [_inspect_file(os.path.join(root, name)) for name in names]


def _inspect_file(path: bytes) -> _File:
    nothing = (0, 0, 0, 0, 0)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        return _File(*nothing, [(BROKEN, f"{type(error).__name__}: {error.strerror}")])
    if not data:
        return _File(*nothing, [(ZERO_BYTE, "the file is empty")])
    try:
        width, height = decode(io.BytesIO(data)).size
    except BadImageError as error:
        return _File(0, 0, len(data), 0, 0, [(BROKEN, str(error))])
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind, mode = str(image.format), image.mode
    findings = []
    suffix = os.fsdecode(os.path.splitext(path)[1]).lower()
    # MPO is a JPEG with further images behind it, as some cameras write.
    if {"MPO": "JPEG"}.get(kind, kind) != _KIND_OF_SUFFIX[suffix]:
        findings.append((SUFFIX, f"a {kind} named {suffix}"))
    if mode == "CMYK":
        findings.append((CMYK, "decoded to RGB without a colour profile"))
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return _File(height, width, len(data), zlib.crc32(data), digest, findings)
