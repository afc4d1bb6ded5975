"""Make caco_fast/data/embedded/fashion_mnist.npz from the files of Debian's package dataset-fashion-mnist.

The same input always gives the same arrays, and the same file byte for byte with the same numpy and zlib. On Debian:
`apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb fm`, then
`python tools/make/embedded.py fm/usr/share/datasets/fashion-mnist`.

Legend: N images.
"""

import argparse
import gzip
import struct
import sys
from pathlib import Path

import numpy as np

from caco_fast.data.sources.arrays import EMBEDDED_CLASSES, EMBEDDED_FILE
from caco_fast.errors import UserError

SEED = 20170825
PER_CLASS = {"train": 1000, "test": 200}
STEMS = {"train": "train", "test": "t10k"}


def read_idx(file: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes: 0, 0, 8, the number of axes, each axis as a big-endian int, the values."""
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"can't read {file}: {error}") from error
    if data[:3] != b"\0\0\x08":
        raise UserError(f"{file} is not an idx file of bytes: it starts with {data[:4].hex(' ')}, expected 00 00 08")
    axes = data[3]
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def draw(labels: np.ndarray, per_class: int, generator: np.random.Generator) -> np.ndarray:
    """Positions of `per_class` images of every class, in ascending order."""
    members = [np.flatnonzero(labels == label) for label in range(len(EMBEDDED_CLASSES))]
    chosen = [generator.choice(positions, per_class, replace=False) for positions in members]
    return np.sort(np.concatenate(chosen))


def subset(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the embedded file: {train,test}_images [N, 28, 28] and {train,test}_labels [N], uint8."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    arrays = {}
    for split, stem in STEMS.items():
        images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz")
        chosen = draw(labels, PER_CLASS[split], generator)
        arrays |= {f"{split}_images": images[chosen], f"{split}_labels": labels[chosen]}
    return arrays


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=EMBEDDED_FILE)
    parser.add_argument("--check", action="store_true", help="write nothing; compare the arrays with those of --out")
    options = parser.parse_args(arguments)
    arrays = subset(options.folder)
    if options.check:
        with np.load(options.out, allow_pickle=False) as found:
            same = sorted(found) == sorted(arrays) and all(np.array_equal(found[name], arrays[name]) for name in arrays)
        if not same:
            raise UserError(f"{options.out} differs from what {options.folder} gives; make it again without --check")
        print(f"{options.out} is what {options.folder} gives")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out, **arrays)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
