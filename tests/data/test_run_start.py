"""What a run does with its images before the first step."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from caco_fast.build import build_trainer, settled
from caco_fast.data.sources import folder
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.run_folder import RunFolder
from caco_fast.errors import UserError
from tests.engine.tiny_run import config, write_images

CPU = torch.device("cpu")


def build(images: Path, run: Path, *settings: str) -> None:
    store = CheckpointStore(run / "checkpoints", keep=1)
    build_trainer(settled(config(images, *settings), CPU), RunFolder(run), store, CPU).close()


def test_each_split_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", train=4, test=2)
    listed: list[str] = []
    original = folder.list_images

    def counted(root: Path, **options: object) -> object:
        listed.append(root.name)
        return original(root, **options)

    monkeypatch.setattr(folder, "list_images", counted)
    build(images, tmp_path / "run", "data.eval_size=32")
    assert listed == ["train", "val"]


def test_images_of_several_sizes_are_refused_before_training(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", train=4, test=2)
    Image.new("RGB", (60, 50)).save(images / "train" / "warm" / "wide.png")
    with pytest.raises(UserError, match="wide.png has 60 x 50 pixels, .* set data.eval_resize and data.eval_size"):
        build(images, tmp_path / "run")
    build(images, tmp_path / "other", "data.eval_resize=36", "data.eval_size=32")
    build(images, tmp_path / "off", "evaluation.every_epochs=0")


def test_the_way_to_turn_evaluation_off_is_named(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", train=4, test=2)
    (images / "val").rename(tmp_path / "val")
    with pytest.raises(UserError, match="neither val/ nor test/.*evaluation.every_epochs=0"):
        build(images, tmp_path / "run")
    (images / "train").rename(images / "class")
    (images / "class" / "cold").rename(tmp_path / "flat")
    with pytest.raises(UserError, match="have no labels.*evaluation.every_epochs=0"):
        build(tmp_path / "flat", tmp_path / "other", "trainer.batch_size=4")
    build(tmp_path / "flat", tmp_path / "off", "evaluation.every_epochs=0", "trainer.batch_size=4")
