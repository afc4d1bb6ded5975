"""The embedded set: 10,000 + 2,000 images of Fashion-MNIST (Zalando SE, MIT), drawn by tools/make/embedded.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from caco_fast.data.source import ArraySource
from caco_fast.errors import UserError

FILE = Path(__file__).parent / "embedded" / "fashion_mnist.npz"
MEAN = (0.2860,)
STD = (0.3530,)
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def fashion_mnist(split: str) -> ArraySource:
    """The embedded training (10,000) or test images (2,000), 28 x 28 grey, 10 classes."""
    try:
        with np.load(FILE, allow_pickle=False) as arrays:
            images = arrays[f"{split}_images"]  # [N, 28, 28]
            labels = arrays[f"{split}_labels"]  # [N]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't read the embedded images in {FILE} ({error}); install the package again") from error
    return ArraySource(f"embedded {split}", images[..., None], labels.astype(np.int64), CLASSES, MEAN, STD)
