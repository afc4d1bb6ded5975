"""Any tree of images without labels, flat or deep, and train/ and val/ where they are there."""

import logging
from pathlib import Path

import pytest

from caco_fast.data import DataConfig, build_source
from caco_fast.errors import UserError


def touch(top: Path, *names: str) -> DataConfig:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    return DataConfig(source="images", path=str(top))


def names_of(config: DataConfig, split: str = "train") -> list[str]:
    source = build_source(config, split)
    return [str(Path(source.name(i)).relative_to(config.path)) for i in range(len(source))]


def test_every_image_of_a_tree_is_taken_without_a_label(tmp_path: Path, caplog) -> None:
    config = touch(
        tmp_path, "a.JPG", "b.webp", "2023/may/c.png", "2023/d.tif", "2024/d.tif", "notes.txt", ".hidden/e.png"
    )
    with caplog.at_level(logging.WARNING):
        source = build_source(config, "train")
    assert names_of(config) == ["2023/d.tif", "2023/may/c.png", "2024/d.tif", "a.JPG", "b.webp"]
    assert source.classes == [] and source.label(0) == -1
    assert "1 files are no images by their suffix and are left out: .txt 1" in caplog.text


def test_train_and_val_keep_their_labels(tmp_path: Path) -> None:
    config = touch(tmp_path, "train/cat/a.png", "train/dog/b.png", "val/dog/c.png")
    assert build_source(config, "train").classes == ["cat", "dog"]
    assert names_of(config, "test") == ["val/dog/c.png"]


def test_train_alone_is_a_tree_as_any_other(tmp_path: Path) -> None:
    assert names_of(touch(tmp_path, "train/cat/a.png", "more/b.png")) == ["more/b.png", "train/cat/a.png"]


def test_a_folder_named_test_is_trained_on_and_named(tmp_path: Path, caplog) -> None:
    config = touch(tmp_path, "day1/a.png", "day1/test/b.png")
    with caplog.at_level(logging.WARNING):
        assert len(names_of(config)) == 2
    assert "the images of day1/test/ are trained on too" in caplog.text


def test_a_folder_above_train_and_val_is_refused(tmp_path: Path) -> None:
    config = touch(tmp_path, "Data/train/cat/a.png", "Data/val/cat/b.png")
    with pytest.raises(UserError, match=rf"is above {tmp_path}/Data, which has .* set data\.path={tmp_path}/Data"):
        build_source(config, "train")


def test_no_images_is_one_line_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.path: no images in .* \(but 2 other files: \.heic 2\), expected files of"
    ):
        build_source(touch(tmp_path, "a.heic", "b.HEIC"), "train")
