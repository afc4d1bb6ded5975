"""The sets that are read into memory: CIFAR-10 from its release files, and the embedded part of Fashion-MNIST."""

import gzip
import pickle
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from caco_fast.data import DataConfig, build_source
from caco_fast.data.sources.arrays import (
    BINARY_FOLDER,
    CIFAR10_CLASSES,
    EMBEDDED_FILE,
    EMBEDDED_MEAN,
    EMBEDDED_STD,
    PYTHON_FOLDER,
    cifar10,
    cifar100,
)
from caco_fast.errors import UserError
from tests.tool import load_tool

STEMS = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def records(stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Four random images as [4, 3072] planes, and labels."""
    generator = np.random.default_rng(STEMS.index(stem))
    return generator.integers(0, 256, (4, 3072), dtype=np.uint8), generator.integers(0, 10, 4, dtype=np.uint8)


def write_python(root: Path, name: str = PYTHON_FOLDER) -> Path:
    folder = root / name
    folder.mkdir()
    for stem in STEMS:
        pixels, labels = records(stem)
        content = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": stem.encode()}
        (folder / stem).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def write_binary(root: Path) -> Path:
    folder = root / BINARY_FOLDER
    folder.mkdir()
    for stem in STEMS:
        pixels, labels = records(stem)
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{stem}.bin")
    return folder


@pytest.mark.parametrize("write", [write_python, write_binary], ids=["python", "binary"])
@pytest.mark.parametrize("inside", [False, True], ids=["above", "inside"])
def test_both_release_formats_give_the_same_images(tmp_path: Path, write, inside: bool) -> None:
    folder = write(tmp_path)
    config = DataConfig(source="cifar10", path=str(folder if inside else tmp_path))
    source = build_source(config, "train")
    assert len(source) == 20 and source.classes == CIFAR10_CLASSES and source.channels == 3
    pixels, labels = records("data_batch_3")
    for row in range(4):
        assert source.label(8 + row) == labels[row]
        assert np.array_equal(source.image(8 + row), pixels[row].reshape(3, 32, 32).transpose(1, 2, 0))
    test = build_source(config, "test")
    assert len(test) == 4 and np.array_equal(test.labels, records("test_batch")[1])


@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar_100_is_read_with_its_fine_labels(tmp_path: Path, form: str) -> None:
    folder = tmp_path / f"cifar-100-{form}"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        pixels = generator.integers(0, 256, (3, 3072), dtype=np.uint8)
        fine, coarse = np.array([99, 0, 57], dtype=np.uint8), np.array([19, 4, 4], dtype=np.uint8)
        if form == "python":
            content = {b"data": pixels, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
            (folder / split).write_bytes(pickle.dumps(content, protocol=2))
        else:
            np.concatenate([coarse[:, None], fine[:, None], pixels], axis=1).tofile(folder / f"{split}.bin")
    for path in (tmp_path, folder):
        for split in ("train", "test"):
            source = build_source(DataConfig(source="cifar100", path=str(path)), split)
            assert source.labels.tolist() == [99, 0, 57] and len(source.classes) == 100
            assert [source.classes[label] for label in source.labels] == ["worm", "apple", "pear"]
        assert np.array_equal(source.image(1), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))


def test_a_folder_without_cifar_100_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither cifar-100-python/ nor cifar-100-binary/; fetch it with: python -c"):
        cifar100(str(tmp_path), "train")


def test_a_file_as_python_2_wrote_it_is_read(tmp_path: Path) -> None:
    folder = write_python(tmp_path)
    # Python 2 wrote bytes as its str (opcode U), and numpy's functions under their old module.
    pixels, labels = records("data_batch_1")
    parts = [b"(dp0\n", b"U\x04data", b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"]
    dtype = b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"
    raw = pixels.tobytes()
    parts += [b"(I1\n(I4\nI3072\nt", dtype, b"I00\n", b"T" + len(raw).to_bytes(4, "little") + raw, b"tbs"]
    parts += [b"U\x06labels(l", *(b"I%d\na" % label for label in labels), b"s."]
    (folder / "data_batch_1").write_bytes(b"".join(parts))
    source = cifar10(str(tmp_path), "train")
    assert np.array_equal(source.labels[:4], labels)
    assert np.array_equal(source.images[0].transpose(2, 0, 1).ravel(), pixels[0])


class Harmful:
    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = write_python(tmp_path)
    harmful = Harmful()
    Harmful.path = tmp_path / "was_here"
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": harmful, b"labels": []}, protocol=2))
    with pytest.raises(UserError, match=r"data_batch_2 is not a CIFAR-10 release file: .*io.open"):
        cifar10(str(tmp_path), "train")
    assert not Harmful.path.exists()


def damage_missing(folder: Path) -> None:
    (folder / "data_batch_4.bin").unlink()


def damage_truncated(folder: Path) -> None:
    file = folder / "data_batch_4.bin"
    file.write_bytes(file.read_bytes()[:-1])


def damage_label(folder: Path) -> None:
    file = folder / "data_batch_4.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (damage_missing, r"data_batch_4.bin is missing"),
        (damage_truncated, r"data_batch_4.bin is not .*: 12291 bytes, expected records of 3073"),
        (damage_label, r"data_batch_4.bin has the label 10, expected 0 to 9"),
    ],
    ids=["missing", "truncated", "label"],
)
def test_a_damaged_release_is_one_clear_line(tmp_path: Path, damage, line: str) -> None:
    damage(write_binary(tmp_path))
    with pytest.raises(UserError, match=line) as error:
        cifar10(str(tmp_path), "train")
    assert "\n" not in str(error.value) and "tools/fetch_cifar10.py" in str(error.value)


def test_a_truncated_pickle_is_one_clear_line(tmp_path: Path) -> None:
    file = write_python(tmp_path) / "test_batch"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="test_batch is not a CIFAR-10 release file"):
        cifar10(str(tmp_path), "test")


def test_a_folder_without_the_release_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither cifar-10-batches-py/ nor .*tools/fetch_cifar10.py"):
        cifar10(str(tmp_path), "train")


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
