"""The imbalanced parts of a labelled training set: their sizes, which images they hold, and who gets them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from caco_fast.build import build_trainer, settled
from caco_fast.config import load_config
from caco_fast.data import DataConfig, build_eval_loader, build_source, build_train_loader
from caco_fast.data.config import ViewConfig
from caco_fast.data.sources.base import ArraySource, FileSource, Names
from caco_fast.data.sources.part import imbalanced
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.run_folder import RunFolder
from caco_fast.errors import UserError


def labelled(counts: list[int]) -> ArraySource:
    """Images of one pixel, the classes mixed; each image's pixel is its number modulo 256."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    images = (np.arange(len(labels)) % 256).astype(np.uint8).reshape(-1, 1, 1, 1)
    return ArraySource("set", images, labels, [str(c) for c in range(len(counts))], (0.5,), (0.25,))


def counts_of(source: ArraySource, imbalance: str) -> list[int]:
    part = imbalanced(source, DataConfig(imbalance=imbalance))
    return np.bincount([part.label(index) for index in range(len(part))], minlength=len(source.classes)).tolist()


def test_cifar_10_has_the_published_numbers_of_images() -> None:
    cifar = labelled([5000] * 10)
    assert counts_of(cifar, "linear") == [500 * (c + 1) for c in range(10)] and sum(counts_of(cifar, "linear")) == 27500
    assert counts_of(cifar, "exponential") == [int(5000 * math.e ** (c + 1) / math.e**10) for c in range(10)]
    assert sum(counts_of(cifar, "exponential")) == 7904
    assert counts_of(cifar, "none") == [5000] * 10


def test_cifar_100_goes_by_tens_of_its_classes() -> None:
    cifar = labelled([500] * 100)
    assert counts_of(cifar, "linear") == [50 * (c // 10 + 1) for c in range(100)]
    assert counts_of(cifar, "exponential") == [int(500 * math.exp(c // 10 + 1 - 10)) for c in range(100)]


def test_other_numbers_of_classes_and_images() -> None:
    assert counts_of(labelled([30, 7, 9]), "linear") == [10, 4, 9]
    assert counts_of(labelled([3] * 25), "linear") == [3 * (c * 10 // 25 + 1) // 10 for c in range(25)]
    assert counts_of(labelled([8]), "exponential") == [8]


def test_the_part_is_a_random_one_and_always_the_same() -> None:
    source = labelled([200] * 4)
    part, again = (imbalanced(source, DataConfig(imbalance="linear")) for _ in range(2))
    assert np.array_equal(part.images, again.images) and part.list_hash() == again.list_hash() != source.list_hash()
    # In the order of the whole set, and not its beginning.
    assert np.array_equal(part.images[part.labels == 3], source.images[source.labels == 3])
    first = np.flatnonzero(source.labels == 0)
    kept = np.flatnonzero(np.isin(source.images[first].ravel(), part.images[part.labels == 0].ravel()))
    assert kept.max() > 100


def test_image_files_are_taken_by_their_labels(tmp_path: Path) -> None:
    names = Names.of(f"{number}.png".encode() for number in range(40))
    source = FileSource(tmp_path, names, np.arange(40, dtype=np.int32) % 4, ["a", "b", "c", "d"])
    part = imbalanced(source, DataConfig(imbalance="linear"))
    assert len(part) == 2 + 5 + 7 + 10
    assert all(int(Path(part.name(index)).stem) % 4 == part.label(index) for index in range(len(part)))


def test_training_alone_is_imbalanced() -> None:
    config = DataConfig(source="embedded", imbalance="linear")
    loader = build_train_loader(config, [ViewConfig(size=28)], batch_size=8, seed=0)
    assert loader.steps_per_epoch == 5500 // 8
    assert len(build_eval_loader(config, "train", batch_size=8).source) == 10_000
    assert len(build_eval_loader(config, "test", batch_size=8).source) == 2_000


def test_a_run_trains_on_the_part_and_evaluates_on_all(tmp_path: Path) -> None:
    settings = (
        "data.imbalance=exponential",
        "evaluation.held_out=0.1",
        "trainer.batch_size=64",
        "run.tensorboard=false",
        "run.report=false",
    )
    config = load_config("quickstart", settings)
    device = torch.device("cpu")
    store = CheckpointStore(tmp_path / "checkpoints")
    trainer = build_trainer(settled(config, device), RunFolder(tmp_path), store, device)
    assert trainer.loader.steps_per_epoch * 64 < 1500
    assert len(trainer.evaluator.train.source) == 9000
    loader = trainer.held_out.open_loader()
    assert loader.steps_per_epoch * 64 > 900
    loader.close()
    trainer.close()


def test_images_without_labels_are_refused() -> None:
    source = replace(labelled([4]), classes=[], labels=np.full(4, -1))
    with pytest.raises(UserError) as error:
        build_train_loader(DataConfig(imbalance="linear"), [ViewConfig(size=8)], batch_size=2, seed=0, source=source)
    assert str(error.value) == (
        "data.imbalance: found linear, but the training images have no labels; set it to none, or put them into one "
        "folder for each class"
    )


def test_an_unknown_imbalance_is_refused() -> None:
    with pytest.raises(UserError, match="data.imbalance: found 'long', expected one of none, linear, exponential"):
        build_source(DataConfig(source="embedded", imbalance="long"), "train")
