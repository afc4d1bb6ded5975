"""Small sets that are read into memory: CIFAR-10, CIFAR-100 and the embedded part of Fashion-MNIST.

CIFAR-10 and CIFAR-100 are read from their release files: the Python pickles (cifar-10-batches-py, cifar-100-python) or
the binary ones (cifar-10-batches-bin, cifar-100-binary). The embedded set is 10,000 + 2,000 images of Fashion-MNIST
(Zalando SE, MIT), drawn by tools/make/embedded.py.

Legend: N images.
"""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caco_fast.data.sources.base import ArraySource, data_directory
from caco_fast.errors import UserError

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# In the order of their labels, which is that of the alphabet.
CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split()
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
SIDE = 32
PIXELS = 3 * SIDE * SIDE
FETCH = "fetch it with: python tools/fetch_cifar10.py DIR"


@dataclass(frozen=True)
class Release:
    """The files of a released set, and what is in them."""

    source: str
    title: str
    python_folder: str
    binary_folder: str
    stems: dict[str, list[str]]
    labels: list[str]  # of an image, in the order of the binary files; the last ones are read
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fetch: str


CIFAR10 = Release(
    "cifar10",
    "CIFAR-10",
    PYTHON_FOLDER,
    BINARY_FOLDER,
    {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    ["labels"],
    CIFAR10_CLASSES,
    CIFAR10_MEAN,
    CIFAR10_STD,
    FETCH,
)
CIFAR100 = Release(
    "cifar100",
    "CIFAR-100",
    "cifar-100-python",
    "cifar-100-binary",
    {"train": ["train"], "test": ["test"]},
    ["coarse_labels", "fine_labels"],
    CIFAR100_CLASSES,
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
    "fetch it with: python -c \"import torchvision; torchvision.datasets.CIFAR100('DIR', download=True)\"",
)

EMBEDDED_FILE = Path(__file__).parents[1] / "embedded" / "fashion_mnist.npz"
EMBEDDED_MEAN = (0.2860,)
EMBEDDED_STD = (0.3530,)
EMBEDDED_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
# Mean and deviation of the pixels of each set.
OWN_PIXELS = {
    "embedded": (EMBEDDED_MEAN, EMBEDDED_STD),
    "cifar10": (CIFAR10.mean, CIFAR10.std),
    "cifar100": (CIFAR100.mean, CIFAR100.std),
}


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
    return _read_release(CIFAR10, path, split)


def cifar100(path: str, split: str) -> ArraySource:
    """The same of CIFAR-100, with its fine labels: 100 classes."""
    return _read_release(CIFAR100, path, split)


def _read_release(release: Release, path: str, split: str) -> ArraySource:
    either = f"{release.python_folder}/ or {release.binary_folder}/"
    root = data_directory(path, f"the directory that holds {either}; {release.fetch}")
    for folder in (root, root / release.python_folder, root / release.binary_folder):
        for suffix, read in (("", _read_pickle), (".bin", _read_binary)):
            if (folder / f"{release.stems['train'][0]}{suffix}").is_file():
                files = [folder / f"{stem}{suffix}" for stem in release.stems[split]]
                parts = [_read(release, read, file) for file in files]
                pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                # [N, h, w, 3]
                images = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
                title, labels = f"{release.source} {split}", labels.astype(np.int64)
                return ArraySource(title, images, labels, release.classes, release.mean, release.std)
    raise UserError(f"{root} holds neither {either.replace(' or ', ' nor ')}; {release.fetch}")


def _read(release: Release, read: Any, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3072] uint8, planes in the order red, green, blue, and labels [N] uint8 of one release file."""
    try:
        pixels, labels = read(file.read_bytes(), release.labels)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the release is incomplete, {release.fetch}") from None
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is not a {release.title} release file: {error}; {release.fetch}") from error
    if labels.size and labels.max() >= len(release.classes):
        raise UserError(
            f"{file} has the label {labels.max()}, expected 0 to {len(release.classes) - 1}; {release.fetch}"
        )
    return pixels, labels


def _read_binary(data: bytes, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    length = len(names) + PIXELS
    if not data or len(data) % length:
        raise ValueError(f"{len(data)} bytes, expected records of {length}")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, length)
    # The labels come before the pixels, and those that are read come last.
    return records[:, len(names) :], records[:, len(names) - 1]


def _read_pickle(data: bytes, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
        # The release was pickled by Python 2, so its keys are bytes.
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        pixels = np.asarray(content["data"])
        labels = np.asarray(content[names[-1]], dtype=np.uint8)
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
