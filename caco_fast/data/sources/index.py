"""A prepared index of an image folder: its readable files with labels and sizes, in one file (tools/index_data.py).

The file is an .npz. `header` is JSON: format, version, root of the images, and for every split its folder below the
root, its classes and the hash of its list. `<split>.names`, `.ends` (see `Names`), `.labels`, `.sizes` (height, width),
`.bytes` and `.checksums` (CRC-32 of a file) are the list.

Legend: N images of a split.
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from caco_fast.data.config import NO_EVALUATION
from caco_fast.data.sources.base import BadImageError, FileSource, Names, decode
from caco_fast.errors import UserError

FORMAT = "caco_fast image index"
VERSION = 2
# The files of the list that are looked for when an index is opened: enough to see that it belongs to another folder.
_PROBES = 16


@dataclass(frozen=True)
class SplitIndex:
    """The list of one split."""

    folder: str  # below the root of the images; "." if they are in the root itself
    classes: list[str]
    names: Names  # N, relative to `folder`
    labels: np.ndarray  # [N] int32
    sizes: np.ndarray  # [N, 2] int32: height, width
    bytes: np.ndarray  # [N] int64: length of the file
    checksums: np.ndarray  # [N] uint32: CRC-32 of the file

    def arrays(self) -> dict[str, np.ndarray]:
        block = np.frombuffer(self.names.block, dtype=np.uint8)
        lists = {"labels": self.labels, "sizes": self.sizes, "bytes": self.bytes, "checksums": self.checksums}
        return {"names": block, "ends": self.names.ends, **lists}

    def list_hash(self) -> str:
        """SHA-256 of the list: the same for the same images in the same order, wherever they are stored."""
        digest = hashlib.sha256(json.dumps([self.folder, self.classes]).encode())
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array, dtype=_TYPES[name]).tobytes())
        return digest.hexdigest()


_TYPES = {"names": "u1", "ends": "<i8", "labels": "<i4", "sizes": "<i4", "bytes": "<i8", "checksums": "<u4"}


def write_index(file: BinaryIO, root: str, splits: Mapping[str, SplitIndex]) -> None:
    """`root`: directory of the images, absolute or relative to the folder that holds the index."""
    described = {
        name: {"folder": split.folder, "classes": split.classes, "list_hash": split.list_hash()}
        for name, split in splits.items()
    }
    header = {"format": FORMAT, "version": VERSION, "root": root, "splits": described}
    arrays = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
    for name, split in splits.items():
        arrays |= {f"{name}.{part}": array.astype(_TYPES[part]) for part, array in split.arrays().items()}
    np.savez_compressed(file, **arrays)


def read_index(path: Path, split: str) -> tuple[str, SplitIndex]:
    """The stored root and the list of a split. UserError for a file that is no index, damaged, or lacks the split."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = _header(path, stored)
            if split not in header["splits"]:
                raise UserError(
                    f"data.path: the index {path} has no {split} images; make it again from a folder with "
                    f"{'val/' if split == 'test' else 'train/'}, or {NO_EVALUATION}"
                )
            described = header["splits"][split]
            names = Names(stored[f"{split}.names"].tobytes(), stored[f"{split}.ends"])
            lists = [stored[f"{split}.{part}"] for part in ("labels", "sizes", "bytes", "checksums")]
            found = SplitIndex(described["folder"], described["classes"], names, *lists)
            whole = found.list_hash() == described["list_hash"]
    except FileNotFoundError:
        raise UserError(f"data.path: {path} doesn't exist; tools/index_data.py makes an index") from None
    except IsADirectoryError:
        raise UserError(
            f"data.path: {path} is a directory, expected an index file; name the file, or set data.source=folder"
        ) from None
    except PermissionError:
        raise UserError(f"data.path: no permission to read {path}; allow it (chmod u+r)") from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"data.path: {path} is not a readable index ({_line(error)}); {_AGAIN}") from error
    if not whole:
        raise UserError(f"data.path: the list in {path} doesn't have the hash that its header names; {_AGAIN}")
    return header["root"], found


_AGAIN = "make it again by tools/index_data.py"


def _header(path: Path, stored: Any) -> dict[str, Any]:
    # A lone .npy is loaded as an array.
    if not isinstance(stored, np.lib.npyio.NpzFile) or "header" not in stored:
        raise ValueError("it has no header")
    header = json.loads(stored["header"].tobytes())
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError("its header belongs to another kind of file")
    if header["version"] != VERSION:
        raise UserError(f"data.path: the index {path} has version {header['version']}, expected {VERSION}; {_AGAIN}")
    return header


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class IndexSource(FileSource):
    """The images of one split of an index, in the folder's order, without those that the index excludes."""

    def __init__(self, path: str, split: str = "train", root: str = "") -> None:
        """`root`: where the images are, if the index doesn't say so. UserError for an index that doesn't fit."""
        file = Path(path).expanduser()
        stored_root, index = read_index(file, split)
        top = Path(root).expanduser() if root else file.parent / stored_root
        super().__init__(Path(os.path.normpath(top / index.folder)), index.names, index.labels, index.classes)
        self.sizes, self._bytes, self._checksums = index.sizes, index.bytes, index.checksums
        self._check_root(file, "data.root" if root else "the index")

    def image(self, index: int) -> Image.Image:
        return decode(io.BytesIO(self.encoded(index)), self.max_pixels)

    def encoded(self, index: int) -> bytes:
        data = super().encoded(index)
        if len(data) != self._bytes[index]:
            # This is not the file that was decoded to its end and found good.
            raise BadImageError(f"{len(data)} bytes, the index says {self._bytes[index]}: changed since it was made")
        # A checksum also finds a failing disk, which a time of change would not, and takes 1 % of the time of decoding.
        if zlib.crc32(data) != self._checksums[index]:
            raise BadImageError("another checksum than in the index: changed since it was made")
        return data

    def _check_root(self, file: Path, said_by: str) -> None:
        """Raise UserError if the images are elsewhere. The loaders report a single file that is gone."""
        if not self.root.is_dir():
            raise UserError(f"{self.root}, where {said_by} says the images are, is no directory; {_moved(file)}")
        probes = np.linspace(0, len(self) - 1, num=min(_PROBES, len(self)), dtype=np.int64).tolist()
        if not any(self.path(index).exists() for index in probes):
            raise UserError(
                f"{self.root} has none of {len(probes)} images that the index lists ({self.name(probes[0])}, ...); "
                f"{_moved(file)}"
            )


def _moved(file: Path) -> str:
    return f"say where they are with data.root=DIR, or make {file} again by tools/index_data.py"
