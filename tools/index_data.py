#!/usr/bin/env python3
"""Checks a folder of images and writes an index to train from: python tools/index_data.py /data/imagenet

Every file of train/ and val/ is decoded to its last pixel. Broken and empty files are left out of the index; wrong
suffixes, CMYK files and duplicates are reported and kept. Then: data.source=index data.path=INDEX.

Exit status: 0 written, 1 written with --strict and something was left out, 2 the user can mend it, 130 or 143
interrupted, in which case nothing is written.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from caco_fast.data.files import FileSource
from caco_fast.data.folder import TEST_FOLDERS, FolderSource
from caco_fast.data.index import SplitIndex, read_index, write_index
from caco_fast.data.make_index import EXCLUDED, KINDS, Finding, Inspection, find_duplicates, inspect, split_index
from caco_fast.engine.storage import atomic_write, atomic_write_text, remove_leftovers
from caco_fast.errors import UserError

NAME = "caco_fast_index.npz"
SHOWN = 5

console = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    top, output = Path(options.folder).expanduser(), options.output
    output = Path(output).expanduser() if output else top / NAME
    _check_output(output)
    sources = {"train": FolderSource(str(top), "train")}
    if any((top / name).is_dir() for name in TEST_FOLDERS):
        sources["test"] = FolderSource(str(top), "test")
    inspections = _inspect_all(sources, options.workers)
    duplicates, repeated = find_duplicates([(sources[name], inspections[name]) for name in sources])
    splits: dict[str, SplitIndex] = {}
    for name, copies in zip(sources, repeated):
        # A test set is what others compare with; nothing that can be decoded is taken out of it.
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="directory that holds train/<class>/*.JPEG and, for evaluation, val/ or test/")
    parser.add_argument("--output", metavar="FILE.npz", help=f"the index; default {NAME} in the folder")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: cores")
    parser.add_argument("--drop-duplicates", action="store_true", help="keep one of several equal training files")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if anything was left out")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: found {options.workers}, wanted 1 or more")
    return options


def _check_output(output: Path) -> None:
    """UserError, before hours of work, where the index can't be written or would replace something else."""
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
    """Relative where the index lies within the folder, so that both may be moved together; else absolute."""
    root, place = top.resolve(), output.parent.resolve()
    return os.path.relpath(root, place) if place.is_relative_to(root) else str(root)


def _show(
    findings: list[Finding], sources: dict[str, FileSource], splits: dict[str, SplitIndex], output: Path, report: Path
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


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; no index was written", file=sys.stderr)
        sys.exit(130)
