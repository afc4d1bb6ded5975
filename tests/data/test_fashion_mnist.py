import gzip
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from caco_fast.data import DataConfig, build_source
from caco_fast.data.sources.arrays import EMBEDDED_FILE, EMBEDDED_MEAN, EMBEDDED_STD
from caco_fast.errors import UserError
from tests.tool import load_tool


@pytest.fixture
def tool() -> ModuleType:
    return load_tool("make/embedded")


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_the_embedded_set_is_balanced_and_has_its_known_statistics(split: str, per_class: int) -> None:
    source = build_source(DataConfig(source="embedded"), split)
    assert source.images.shape == (10 * per_class, 28, 28, 1) and source.images.dtype == np.uint8
    assert np.bincount(source.labels).tolist() == [per_class] * 10
    assert abs(source.images.mean() / 255 - EMBEDDED_MEAN[0]) < 0.005
    assert abs(source.images.std() / 255 - EMBEDDED_STD[0]) < 0.005
    assert len(np.unique(source.images.reshape(len(source), -1), axis=0)) > 0.99 * len(source)


def test_the_labels_belong_to_the_images() -> None:
    source = build_source(DataConfig(source="embedded"), "train")
    test = build_source(DataConfig(source="embedded"), "test")
    means = np.stack([source.images[source.labels == label].mean(axis=0).ravel() for label in range(10)])
    pixels = test.images.reshape(len(test), -1).astype(np.float64)
    nearest = ((pixels[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    # The nearest class mean is right for two images of three; shuffled labels would give one of ten.
    assert (nearest == test.labels).mean() > 0.6


def test_the_licence_lies_next_to_the_images() -> None:
    assert "Zalando" in (EMBEDDED_FILE.parent / "LICENSE").read_text()


def write_idx(file: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


def test_the_tool_draws_the_same_file_again_and_checks_it(tool: ModuleType, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for stem, per_class in (("train", 1100), ("t10k", 250)):
        labels = generator.permutation(np.repeat(np.arange(10, dtype=np.uint8), per_class))
        images = np.zeros((len(labels), 28, 28), dtype=np.uint8)
        images[:, 0, 0] = labels
        images[:, 0, 1] = np.arange(len(labels)) % 251
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", labels)
    first, second = tmp_path / "a" / "first.npz", tmp_path / "second.npz"
    for out in (first, second):
        tool.main([str(tmp_path), "--out", str(out)])
    assert first.read_bytes() == second.read_bytes()
    with np.load(first) as arrays:
        assert np.array_equal(arrays["train_images"][:, 0, 0], arrays["train_labels"])
        assert np.bincount(arrays["test_labels"]).tolist() == [200] * 10
    tool.main([str(tmp_path), "--out", str(first), "--check"])
    with pytest.raises(UserError, match=r"fashion_mnist.npz differs from what .* gives"):
        tool.main([str(tmp_path), "--check"])


def test_the_tool_names_what_it_cannot_read(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't read .*train-images-idx3-ubyte.gz"):
        tool.main([str(tmp_path), "--out", str(tmp_path / "out.npz")])
