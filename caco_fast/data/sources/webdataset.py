"""WebDataset shards: tar files of samples, each some consecutive members that share a key (`0001.jpg`, `0001.cls`).

The shards are not streamed. A table says where each image is in its tar, which gives random access: order, shares of
the ranks and resuming are those of a folder. The table is made by reading the headers once; see shard_table.py.

Legend: N images.
"""

import io
import itertools
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from caco_fast.data.sources.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    SUFFIXES,
    BadImageError,
    Names,
    data_directory,
    decode,
    unreadable,
)
from caco_fast.data.sources.shard_table import shard_tables
from caco_fast.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
CLASS_NAMES = ("classes.txt", "classnames.txt")
_TEST_WORDS = frozenset(("val", "valid", "validation", "test"))
_MOST_SHARDS = 1_000_000


class WebDatasetSource:
    """The images of one split of a set of shards, in the order of the sorted shards and of the tars."""

    channels = 3
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    max_pixels = MAX_PIXELS

    def __init__(self, path: str, split: str = "train") -> None:
        """`path`: the directory of the shards, or a brace pattern of them.

        UserError for shards that are missing, broken, compressed or without images, and for labels on some only.
        """
        top, shards = find_shards(path)
        self._shards = [shard for shard in shards if _split_of(shard, top) == split]
        if not self._shards:
            raise UserError(
                f"data.path: none of the {len(shards)} shards of {path} is for {split}; those with "
                f"{', '.join(sorted(_TEST_WORDS))} in their names are the test images, the others the training images"
            )
        tables = shard_tables(self._shards, cache=top)
        counts = [len(table.labels) for table in tables]
        if not sum(counts):
            raise UserError(
                f"no images in the {len(tables)} shards of {path}, expected samples such as 0001.jpg with 0001.cls "
                f"({', '.join(SUFFIXES)})"
            )
        self._shard = np.repeat(np.arange(len(tables), dtype=np.int32), counts)  # [N]
        self._offset = np.concatenate([table.offsets for table in tables])  # [N]
        self._length = np.concatenate([table.lengths for table in tables])  # [N]
        self._labels = np.concatenate([table.labels for table in tables])  # [N]
        self._names = Names.of(table.names[index] for table in tables for index in range(len(table.names)))
        self.classes = self._classes(top)

    def __len__(self) -> int:
        return len(self._offset)

    def image(self, index: int) -> Image.Image:
        """The decoded image as RGB, its EXIF orientation ignored as the published recipes do."""
        return decode(io.BytesIO(self.encoded(index)), self.max_pixels)

    def encoded(self, index: int) -> bytes:
        # Opened for each image, as in a folder: nothing is shared between processes, threads or forks.
        try:
            with open(self._shards[self._shard[index]], "rb", buffering=0) as file:
                file.seek(int(self._offset[index]))
                data = file.read(int(self._length[index]))
        except OSError as error:
            raise unreadable(error) from error
        if len(data) != self._length[index]:
            raise BadImageError(f"the shard ends after {len(data)} of its {self._length[index]} bytes")
        return data

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """The shard and the member's name in it, `train-000.tar:0001.jpg`."""
        return f"{self._shards[self._shard[index]]}:{self._names[index].decode('utf-8', 'backslashreplace')}"

    def list_hash(self) -> str:
        # The shards are sorted, so their contents in order are the list, whatever they are called.
        return self._names.hash()

    def _classes(self, top: Path) -> list[str]:
        """Names of the classes from a file next to the shards, else their numbers; [] if no image has a label."""
        unlabelled = np.flatnonzero(self._labels < 0)
        if len(unlabelled) == len(self):
            return []
        if len(unlabelled):
            raise UserError(
                f"{self.name(int(unlabelled[0]))} has no label that is a number (.cls, or .json with cls or "
                f"label) and {len(unlabelled) - 1} others neither, but the rest of the {len(self)} samples do; label "
                f"all or none"
            )
        count = int(self._labels.max()) + 1
        for name in CLASS_NAMES:
            if (top / name).is_file():
                names = (top / name).read_text(encoding="utf-8").splitlines()
                if len(names) < count:
                    raise UserError(f"{top / name} names {len(names)} classes, the labels go up to {count - 1}")
                return names
        return [str(label) for label in range(count)]


def find_shards(path: str) -> tuple[Path, list[Path]]:
    """The directory that holds all shards, and the sorted shards. UserError if there are none."""
    if "{" in path:
        shards = [Path(name).expanduser() for name in expand_braces(path)]
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise UserError(
                f"data.path: {len(missing)} of the {len(shards)} shards of {path} don't exist, "
                f"the first is {missing[0]}"
            )
        top = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
        _refuse_compressed(shards)
        return top, [shard.absolute() for shard in shards]
    top = data_directory(path, "the directory of the .tar shards, or a pattern: DIR/train-{000..146}.tar")
    files = sorted(itertools.chain(top.glob("*"), top.glob("*/*")))
    files = [file for file in files if not file.name.startswith(".")]
    shards = [file for file in files if file.suffix == ".tar"]
    _refuse_compressed(files)
    if not shards:
        raise UserError(
            f"no .tar shards in {top}, expected WebDataset's, such as train-000.tar, there or one folder below"
        )
    return top, shards


def _refuse_compressed(files: list[Path]) -> None:
    compressed = [file for file in files if file.name.endswith(COMPRESSED)]
    if compressed:
        raise UserError(
            f"{compressed[0]} is compressed ({len(compressed)} such shards), in which no single image can be reached; "
            f"decompress them (gunzip, zstd -d, ...)"
        )


def expand_braces(pattern: str) -> list[str]:
    """Shell braces: `{000..146}` counts, as wide as an end with zeros before it; `{a,b}` lists; both may be nested.

    UserError for a brace without its counterpart, and for more than a million names.
    """
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, cuts = 0, [start]
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0 or (depth == 1 and pattern[place] == ","):
            cuts.append(place)
        if depth == 0:
            break
    else:
        raise UserError(f"data.path: a brace in '{pattern}' is not closed, expected DIR/train-{{000..146}}.tar")
    choices = [pattern[left + 1 : right] for left, right in itertools.pairwise(cuts)]
    if len(choices) == 1:
        choices = _count(choices[0], pattern)
    before, rests = pattern[:start], expand_braces(pattern[cuts[-1] + 1 :])
    return [before + name + rest for choice in choices for name in expand_braces(choice) for rest in rests]


def _count(inner: str, pattern: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if ends is None:
        raise UserError(f"data.path: {{{inner}}} in '{pattern}' is neither {{000..146}} nor {{a,b}}")
    first, last = int(ends[1]), int(ends[2])
    if abs(last - first) >= _MOST_SHARDS:
        raise UserError(f"data.path: {{{inner}}} in '{pattern}' names more than {_MOST_SHARDS} shards")
    padded = any(len(end) > 1 and end[0] == "0" for end in ends.groups())
    width = max(map(len, ends.groups())) if padded else 0
    step = 1 if last >= first else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]


def _split_of(shard: Path, top: Path) -> str:
    words = re.split(r"[^a-z]+", str(shard.relative_to(top)).lower())
    return "test" if _TEST_WORDS.intersection(words) else "train"
