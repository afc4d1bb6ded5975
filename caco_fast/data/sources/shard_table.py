"""The place of each image in a tar of a WebDataset: found by reading the tar's headers once, and kept with the shards.

The tables of all shards of a directory are one file there; a shard that was written since is read again. If the
directory can't be written, the headers are read at every start.

Legend: N images of a shard.
"""

import json
import logging
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from caco_fast.data.sources.base import SUFFIXES, Names
from caco_fast.data.sources.listing import is_image
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.data")

CACHE = ".caco_fast_shards.npz"
VERSION = 2
# Of several images in a sample, the first with one of these suffixes is taken.
_USUAL = (".jpg", ".jpeg", ".png")
LABEL_KEYS = ("cls", "label")
_BLOCK = 512
_LISTED = 20
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


# What a shard may hold that is not used, in the words of the log.
DOTTED = "images left out: the key of a sample ends at the first dot of a name, so name them without further dots"
FURTHER = "images left out, because their sample has another one"
NO_IMAGE = "samples left out, because they have no image"
LINK = "links left out, because no member before them has the name to which they lead"
LABEL = "labels not used, because they are not numbers from 0, which evaluation needs"


@dataclass(frozen=True)
class ShardTable:
    """The images of one shard."""

    names: Names  # N
    offsets: np.ndarray  # [N] int64: of the first byte in the tar
    lengths: np.ndarray  # [N] int64
    labels: np.ndarray  # [N] int32, -1 without one
    notes: Mapping[str, tuple[int, str]]  # how many of DOTTED, FURTHER, ... there are, and the first of them


class _Stamp(NamedTuple):
    """The state of the shard that a table belongs to."""

    name: str
    size: int
    modified: int  # ns


class _BrokenShard(Exception):
    """A shard that can't be used; the message is the reason."""


def shard_tables(shards: Sequence[Path], cache: Path) -> list[ShardTable]:
    """The table of each shard; the log says what they hold that is not used.

    UserError, with their names, if some shards are broken or compressed.
    """
    stamps = [_stamp(shard, cache) for shard in shards]
    known = _read_cache(cache / CACHE)
    missing = [number for number, stamp in enumerate(stamps) if stamp not in known]
    if missing:
        log.info("reading the headers of %d shards in %s", len(missing), cache)
    broken = []
    for number in missing:
        try:
            known[stamps[number]] = read_headers(shards[number])
        except _BrokenShard as error:
            broken.append(f"{shards[number]}: {error}")
    if broken:
        more = [f"... and {len(broken) - _LISTED} more"] if len(broken) > _LISTED else []
        first = f"{len(broken)} of {len(shards)} shards can't be used; fetch or write them again:"
        raise UserError("\n  ".join([first, *broken[:_LISTED], *more]))
    if missing:
        _write_cache(cache / CACHE, known)
    tables = [known[stamp] for stamp in stamps]
    _report(shards, tables)
    return tables


def _report(shards: Sequence[Path], tables: Sequence[ShardTable]) -> None:
    for kind in (DOTTED, FURTHER, NO_IMAGE, LINK, LABEL):
        found = [(*table.notes[kind], shard) for shard, table in zip(shards, tables) if kind in table.notes]
        if found:
            count, (_, first, shard) = sum(number for number, _, _ in found), found[0]
            log.warning("%d %s; the first is %s:%s", count, kind, shard, first)


def read_headers(shard: Path) -> ShardTable:
    """The table of one tar, made without reading the images."""
    names, offsets, lengths, labels = [], [], [], []
    notes = _Notes()
    for members in _samples(shard, notes):
        plain = [member for suffix, member in members.items() if f".{suffix}" in SUFFIXES]
        usual = [member for suffix, member in members.items() if f".{suffix}" in _USUAL]
        dotted = [member for suffix, member in members.items() if "." in suffix and is_image(suffix)]
        if not plain:
            notes.add(DOTTED if dotted else NO_IMAGE, *(member.name for member in dotted or [*members.values()][:1]))
            continue
        image = (usual or plain)[0]
        notes.add(FURTHER, *(member.name for member in plain + dotted if member is not image))
        names.append(os.fsencode(image.name))
        offsets.append(image.offset)
        lengths.append(image.length)
        labels.append(_label(members, notes))
    lists = np.array(offsets, np.int64), np.array(lengths, np.int64), np.array(labels, np.int32)
    return ShardTable(Names.of(names), *lists, notes)


class _Notes(dict[str, tuple[int, str]]):
    """How often each thing was found, and the first of them."""

    def add(self, kind: str, *found: str) -> None:
        for name in found:
            count, first = self.get(kind, (0, name))
            self[kind] = count + 1, first


class _Member(NamedTuple):
    name: str
    offset: int
    length: int
    data: bytes | None  # of labels only


def _samples(shard: Path, notes: _Notes) -> list[dict[str, _Member]]:
    """Members by suffix, for each key, in the order of their first members. The key ends at a name's first dot.

    The members of a key need not follow each other. A suffix that comes again begins another sample.
    """
    samples: list[dict[str, _Member]] = []
    latest: dict[tuple[str, str], dict[str, _Member]] = {}
    for member in _members(shard, notes):
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        # Names such as __info__.json are for the whole shard.
        if not stem or stem.startswith("__"):
            continue
        key, suffix = (folder, stem), suffix.lower()
        if key not in latest or suffix in latest[key]:
            latest[key] = {}
            samples.append(latest[key])
        latest[key][suffix] = member
    return samples


def _members(shard: Path, notes: _Notes) -> Iterator[_Member]:
    found: dict[str, _Member] = {}
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            length = os.fstat(file.fileno()).st_size
            while (member := archive.next()) is not None:
                # tarfile would keep every member.
                archive.members.clear()
                if member.islnk() or member.issym():
                    # A hard link names its target from the top, a symbolic one from its own folder.
                    folder = "" if member.islnk() else os.path.dirname(member.name)
                    target = found.get(os.path.normpath(os.path.join(folder, member.linkname)))
                    if target is not None:
                        yield target._replace(name=member.name)
                    else:
                        notes.add(LINK, member.name)
                    continue
                if not member.isreg():
                    continue
                end = member.offset_data + member.size
                if end > length or member.issparse():
                    raise _BrokenShard(f"{member.name} continues to byte {end}, the file ends at {length}")
                data = None
                if member.name.lower().endswith((".cls", ".json")):
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                name = os.path.normpath(member.name)
                found[name] = _Member(member.name, member.offset_data, member.size, data)
                yield found[name]
            # tarfile takes invalid bytes and a cut header for the end; a complete tar ends with a block of zeros.
            file.seek(archive.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise _BrokenShard(f"it breaks off at byte {archive.offset} of {length}")
    except (OSError, tarfile.TarError) as error:
        raise _BrokenShard(_reason(shard, error)) from error


def _reason(shard: Path, error: Exception) -> str:
    with suppress(OSError), open(shard, "rb") as file:
        start = file.read(8)
        for magic, name in _MAGIC.items():
            if start.startswith(magic):
                return f"it is compressed by {name}; no single image can be reached in it, decompress it"
    return f"{type(error).__name__}: {error}"


def _label(members: dict[str, _Member], notes: _Notes) -> int:
    """The label of a sample, -1 if it has none or one that is not a number from 0."""
    member = members.get("cls") or members.get("json")
    if member is None:
        return -1
    text = (member.data or b"").decode("utf-8", "replace").strip()
    found: object = text
    try:
        if "cls" not in members:
            entries = json.loads(text)
            entries = entries if isinstance(entries, dict) else {}
            found = next((entries[key] for key in LABEL_KEYS if key in entries), None)
            if found is None:
                return -1
        # Some writers keep numbers as 3.0.
        label = float(str(found))
    except ValueError:
        label = -1.0
    if label.is_integer() and 0 <= label < 2**31:
        return int(label)
    notes.add(LABEL, f"{member.name} holds {str(found)[:40]!r}")
    return -1


def _stamp(shard: Path, top: Path) -> _Stamp:
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"{shard} can't be read: {error.strerror}") from error
    return _Stamp(os.path.relpath(shard, top), status.st_size, status.st_mtime_ns)


def _read_cache(path: Path) -> dict[_Stamp, ShardTable]:
    """The tables that earlier runs kept; none if the file is missing or damaged, because it can be made again."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            if header["version"] != VERSION:
                return {}
            block, ends = stored["names"].tobytes(), stored["ends"]
            offsets, lengths, labels = stored["offsets"], stored["lengths"], stored["labels"]
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
        return {}
    tables, start = {}, 0
    for *stamp, count, notes in header["shards"]:
        part = slice(start, start + count)
        first = int(ends[start - 1]) if start else 0
        last = int(ends[start + count - 1]) if count else first
        names = Names(block[first:last], ends[part] - first)
        tables[_Stamp(*stamp)] = ShardTable(names, offsets[part], lengths[part], labels[part], notes)
        start += count
    return tables


def _write_cache(path: Path, tables: dict[_Stamp, ShardTable]) -> None:
    """Write the file completely or not at all; ranks may write it at the same time."""
    # One entry for each shard, the one of its present state.
    latest = {stamp.name: (stamp, table) for stamp, table in tables.items()}
    chosen = list(latest.values())
    header = {"version": VERSION, "shards": [[*stamp, len(table.labels), table.notes] for stamp, table in chosen]}
    parts = [table for _, table in chosen]
    starts = np.cumsum([0] + [len(table.names.block) for table in parts])
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        "names": np.frombuffer(b"".join(table.names.block for table in parts), dtype=np.uint8),
        "ends": np.concatenate([table.names.ends + start for table, start in zip(parts, starts)]),
        **{
            name: np.concatenate([getattr(table, name) for table in parts]) for name in ("offsets", "lengths", "labels")
        },
    }
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = file.name
            np.savez_compressed(file, **arrays)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        log.info("the table of the shards can't be kept in %s (%s); it is made at every start", path, error.strerror)
        with suppress(OSError):
            os.unlink(temporary)
