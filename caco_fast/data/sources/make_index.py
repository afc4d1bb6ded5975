"""Making an index: every file of a folder is read, decoded to the last pixel and hashed, by several processes.

This is the program of tools/index_data.py. Legend: N files of a split.
"""

import argparse
import hashlib
import io
import os
import signal
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from caco_fast.data.sources.base import FORMATS, MAX_PIXELS, SUFFIXES, BadImageError, FileSource, decode, grey_range
from caco_fast.data.sources.folder import FolderSource, split_folders
from caco_fast.data.sources.index import SplitIndex, read_index, write_index
from caco_fast.errors import UserError
from caco_fast.host import cores, make_socket_folder
from caco_fast.storage import atomic_write, atomic_write_text, lasting_output, remove_leftovers

HELP = """\
Check a folder of images and write an index to train from: python tools/index_data.py /data/imagenet

Every file of train/ and val/ is decoded to its last pixel. Broken, empty and too large files are left out of the index;
wrong suffixes, CMYK, transparent and rescaled grey files and duplicates are reported and kept. Then: data.source=index
data.path=INDEX.

Exit status: 0 written, 1 written with --strict and something was left out, 2 an error that the user can correct, 130 or
143 interrupted, in which case nothing is written.
"""
NAME = "caco_fast_index.npz"
SHOWN = 5

# Files in one task: few enough for an even end, many enough that sending them costs nothing.
_TASK = 32

ZERO_BYTE, BROKEN, SUFFIX, CMYK, DUPLICATE = "zero-byte", "broken", "wrong suffix", "CMYK", "duplicate"
DEPTH, TRANSPARENT = "grey scaled to 8 bits", "transparent"
KINDS = (ZERO_BYTE, BROKEN, SUFFIX, CMYK, DEPTH, TRANSPARENT, DUPLICATE)
EXCLUDED = (ZERO_BYTE, BROKEN)

console = Console(highlight=False, soft_wrap=True)


class Finding(NamedTuple):
    """A finding about one file, for its owner."""

    kind: str  # one of KINDS
    name: str
    reason: str


class _File(NamedTuple):
    """A worker's result for one file; a height of 0 means that it can't be decoded."""

    height: int
    width: int
    length: int
    checksum: int
    digest: int
    findings: list[tuple[str, str]]  # kind, reason


@dataclass
class Inspection:
    """The results for all files of a split."""

    sizes: np.ndarray  # [N, 2] int32: height, width; 0 if a file can't be decoded
    bytes: np.ndarray  # [N] int64
    checksums: np.ndarray  # [N] uint32: CRC-32 of the file's bytes
    digests: np.ndarray  # [N] uint64: BLAKE2 of them
    findings: list[Finding] = field(default_factory=list)

    @property
    def good(self) -> np.ndarray:
        """Whether each file can be decoded, [N] bool."""
        return self.sizes[:, 0] > 0


def inspect(source: FileSource, workers: int, advance: Callable[[int], None] = lambda files: None) -> Inspection:
    """Decode all files of the source in `workers` processes; `advance` is called with each number of files just done.

    UserError if a worker process died (for lack of memory, say), with the files that it may have been reading.
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
    """Files with the bytes of an earlier file of any split: their findings, and a mask [N] of them for each split."""
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
    """The list of the files that `keep` [N] selects. UserError if there is none."""
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
    """(number of the first file, results) for each task, in the order in which they end."""
    # The server imports once. Workers are forked from it, because no thread runs there.
    make_socket_folder()
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    starts = iter(range(0, len(source), _TASK))
    running: dict[Future[list[_File]], int] = {}
    try:
        while True:
            # Only a few tasks ahead: all of them at once would hold the whole list a second time.
            while len(running) < 4 * workers and (start := next(starts, None)) is not None:
                names = [source.names[index] for index in range(start, min(start + _TASK, len(source)))]
                running[pool.submit(_inspect_files, os.fsencode(source.root), names, source.max_pixels)] = start
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
    # PIL warns of odd metadata; only the pixels matter here.
    warnings.simplefilter("ignore")


def _inspect_files(root: bytes, names: list[bytes], max_pixels: int) -> list[_File]:
    return [_inspect_file(os.path.join(root, name), max_pixels) for name in names]


def _inspect_file(path: bytes, max_pixels: int) -> _File:
    nothing = (0, 0, 0, 0, 0)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        return _File(*nothing, [(BROKEN, f"{type(error).__name__}: {error.strerror}")])
    if not data:
        return _File(*nothing, [(ZERO_BYTE, "the file is empty")])
    try:
        width, height = decode(io.BytesIO(data), max_pixels).size
    except BadImageError as error:
        return _File(0, 0, len(data), 0, 0, [(BROKEN, str(error))])
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind, mode = str(image.format), image.mode
        findings = list(_surprising_pixels(image))
    suffix = os.fsdecode(os.path.splitext(path)[1]).lower()
    # MPO is a JPEG with further images behind it, as some cameras write.
    if {"MPO": "JPEG"}.get(kind, kind) != SUFFIXES[suffix]:
        findings.append((SUFFIX, f"a {kind} named {suffix}"))
    if mode == "CMYK":
        findings.append((CMYK, "decoded to RGB without a colour profile"))
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return _File(height, width, len(data), zlib.crc32(data), digest, findings)


def _surprising_pixels(image: Image.Image) -> Iterator[tuple[str, str]]:
    """Findings about what an image looks like in 8 bits and without transparency."""
    scaled = grey_range(image)
    if scaled not in (None, (0.0, 65535.0)):
        yield DEPTH, f"{scaled[0]:g} becomes 0 and {scaled[1]:g} becomes 255, because no value is outside"
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        if alpha.min() < 255:
            yield TRANSPARENT, f"{(alpha < 255).mean():.0%} of it; the colours below are used as they are stored"


@lasting_output()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the program and return its exit status. Errors of the user are printed."""
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        return index_folder(arguments, prog)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no index was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def index_folder(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check the folder, write the index and a report. UserError if the folder or the output can't be used."""
    options = _parse(arguments, prog)
    top, output = Path(options.folder).expanduser(), options.output
    output = Path(output).expanduser() if output else top / NAME
    _check_output(output)
    sources = {"train": FolderSource(str(top), "train")}
    if split_folders(top)[1]:
        sources["test"] = FolderSource(str(top), "test")
    for source in sources.values():
        source.max_pixels = options.max_pixels
    inspections = _inspect_all(sources, options.workers)
    duplicates, repeated = find_duplicates([(sources[name], inspections[name]) for name in sources])
    splits: dict[str, SplitIndex] = {}
    for name, copies in zip(sources, repeated):
        # Others compare with the test set, so nothing that can be decoded is taken out of it.
        keep = inspections[name].good & ~(copies & (options.drop_duplicates and name == "train"))
        splits[name] = split_index(sources[name], inspections[name], top, keep)
    findings = [finding for found in inspections.values() for finding in found.findings] + duplicates
    with atomic_write(output) as file:
        write_index(file, _stored_root(top, output), splits)
    remove_leftovers(output.parent)
    report = output.with_name(output.name + ".report.txt")
    atomic_write_text(report, "".join(f"{kind}\t{name}\t{reason}\n" for kind, name, reason in findings))
    _show(findings, sources, splits, output, report)
    excluded = sum(map(len, sources.values())) - sum(len(split.names) for split in splits.values())
    return 1 if options.strict and excluded else 0


def _parse(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="directory that holds train/<class>/*.JPEG and, for evaluation, val/ or test/")
    parser.add_argument("--output", metavar="FILE.npz", help=f"the index; default {NAME} in the folder")
    parser.add_argument("--workers", type=int, default=cores(), help="number of processes; default: one per core")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        help="leave out larger images, as data.max_pixels does (%(default)s)",
    )
    parser.add_argument("--drop-duplicates", action="store_true", help="keep one of several equal training files")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if anything was left out")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: found {options.workers}, expected 1 or more")
    return options


def _check_output(output: Path) -> None:
    """Raise UserError, before hours of work, if the index can't be written or would replace something else."""
    if output.suffix != ".npz":
        raise UserError(f"--output {output}: the name of an index ends with .npz")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: {output.parent} is no directory")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"no permission to write {output}; name another place with --output FILE.npz")
    if output.exists():
        try:
            read_index(output, "train")
        except UserError as error:
            raise UserError(f"{output} is there and would be replaced, but {error}; remove it first") from None


def _inspect_all(sources: dict[str, FolderSource], workers: int) -> dict[str, Inspection]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    found: dict[str, Inspection] = {}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        for name, source in sources.items():
            task = progress.add_task(str(source.root), total=len(source))
            found[name] = inspect(source, workers, lambda files, task=task: progress.advance(task, files))
    return found


def _stored_root(top: Path, output: Path) -> str:
    """The root in the index: relative if the index is in the folder, so that both can move together; else absolute."""
    root, place = top.resolve(), output.parent.resolve()
    return os.path.relpath(root, place) if place.is_relative_to(root) else str(root)


def _show(
    findings: list[Finding],
    sources: Mapping[str, FileSource],
    splits: Mapping[str, SplitIndex],
    output: Path,
    report: Path,
) -> None:
    counts = Counter(finding.kind for finding in findings)
    for kind in (kind for kind in KINDS if counts[kind]):
        console.print(f"{counts[kind]:,} {kind}{', left out' if kind in EXCLUDED else ''}:", markup=False)
        for found in [finding for finding in findings if finding.kind == kind][:SHOWN]:
            console.print(f"  {found.name}: {found.reason}", markup=False)
        if counts[kind] > SHOWN:
            console.print(f"  ... and {counts[kind] - SHOWN:,} more", markup=False)
    for name, split in splits.items():
        files = f"{len(split.names):,} of {len(sources[name]):,} files in {len(split.classes):,} classes"
        height, width = split.sizes.mean(axis=0)
        on_average = f"{width:.0f} x {height:.0f} pixels, {split.bytes.mean() / 1000:.1f} KB"
        console.print(f"{name}: {files}; on average {on_average}", markup=False)
    console.print(f"all findings: {report}", markup=False)
    console.print(f"train from it with: data.source=index data.path={output}", markup=False)
