"""Small sets that are read into memory: CIFAR-10 and the embedded part of Fashion-MNIST.

CIFAR-10 is read from its release files: the Python pickles (cifar-10-batches-py) or the binary ones
(cifar-10-batches-bin). The embedded set is 10,000 + 2,000 images of Fashion-MNIST (Zalando SE, MIT), drawn by
tools/make/embedded.py.

Legend: N images.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from caco_fast.data.sources.base import ArraySource, data_directory
from caco_fast.errors import UserError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
SIDE = 32
PIXELS = 3 * SIDE * SIDE
FETCH = "fetch it with: python tools/fetch_cifar10.py DIR"

_STEMS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}

EMBEDDED_FILE = Path(__file__).parents[1] / "embedded" / "fashion_mnist.npz"
EMBEDDED_MEAN = (0.2860,)
EMBEDDED_STD = (0.3530,)
EMBEDDED_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def fashion_mnist(split: str) -> ArraySource:
    """The embedded training (10,000) or test images (2,000), 28 x 28 grey, 10 classes."""
    try:
        with np.load(EMBEDDED_FILE, allow_pickle=False) as arrays:
            images = arrays[f"{split}_images"]  # [N, 28, 28]
            labels = arrays[f"{split}_labels"]  # [N]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"can't read the embedded images in {EMBEDDED_FILE} ({error}); install the package again"
        ) from error
    return ArraySource(
        f"embedded {split}", images[..., None], labels.astype(np.int64), EMBEDDED_CLASSES, EMBEDDED_MEAN, EMBEDDED_STD
    )


def cifar10(path: str, split: str) -> ArraySource:
    """The 50,000 training or 10,000 test images, from whichever of the two release folders is in or at `path`."""
    root = data_directory(path, f"the directory that holds {PYTHON_FOLDER}/ or {BINARY_FOLDER}/; {FETCH}")
    for folder in (root, root / PYTHON_FOLDER, root / BINARY_FOLDER):
        for suffix, read in (("", _read_pickle), (".bin", _read_binary)):
            if (folder / f"data_batch_1{suffix}").exists():
                parts = [_read(read, folder / f"{stem}{suffix}") for stem in _STEMS[split]]
                return _source(split, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    raise UserError(f"{root} holds neither {PYTHON_FOLDER}/ nor {BINARY_FOLDER}/; {FETCH}")


def _source(split: str, pixels: np.ndarray, labels: np.ndarray) -> ArraySource:
    images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))  # [N, h, w, 3]
    return ArraySource(f"cifar10 {split}", images, labels.astype(np.int64), CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD)


def _read(read: Any, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3072] uint8, planes in the order red, green, blue, and labels [N] uint8 of one release file."""
    try:
        pixels, labels = read(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the release is incomplete, {FETCH}") from None
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is not a CIFAR-10 release file: {error}; {FETCH}") from error
    if labels.size and labels.max() >= len(CIFAR10_CLASSES):
        raise UserError(f"{file} has the label {labels.max()}, expected 0 to {len(CIFAR10_CLASSES) - 1}; {FETCH}")
    return pixels, labels


def _read_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not data or len(data) % (1 + PIXELS):
        raise ValueError(f"{len(data)} bytes, expected records of {1 + PIXELS}")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0]


def _read_pickle(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
        # The release was pickled by Python 2, so its keys are bytes.
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        pixels = np.asarray(content["data"])
        labels = np.asarray(content["labels"], dtype=np.uint8)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise ValueError(f"data {pixels.dtype} {list(pixels.shape)}, expected uint8 [{len(labels)}, {PIXELS}]")
    return pixels, labels


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that makes numpy arrays of numbers and nothing else, so that a tampered file can't run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        # Protocol 2 as Python 3 writes it keeps bytes as text and calls this to get them back.
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which a data file has no use for")


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    # Every array is pickled as this empty one and then given its state.
    return np.empty(0, dtype=np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
