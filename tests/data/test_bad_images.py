import errno
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from caco_fast.data import DataConfig, TrainLoader, ViewConfig, build_train_loader
from caco_fast.data.loaders.base import epoch_order
from caco_fast.data.loaders.torchvision import TorchvisionLoader
from caco_fast.data.sources.base import ArraySource
from caco_fast.errors import UserError

VIEWS = [ViewConfig(size=8), ViewConfig(size=8)]
# Positions in the sorted listing: two in a row, and the last, so that its replacement wraps around.
BAD = {"a_02": "truncated", "a_03": "empty", "a_07": "text", "a_09": "vanished", "a_11": "directory"}
FOLLOWING = {2: 4, 3: 4, 7: 8, 9: 10, 11: 0}


@pytest.fixture
def damaged(tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    """12 images in one class, five of them damaged (the one to vanish is still there)."""
    for number in range(12):
        file = write_image(tmp_path / "train" / "a" / f"a_{number:02}.jpg", seed=number)
        match BAD.get(file.stem):
            case "truncated":
                file.write_bytes(file.read_bytes()[:-300])
            case "empty":
                file.write_bytes(b"")
            case "text":
                file.write_text("<html>not found</html>")
            case "directory":
                file.unlink()
                file.mkdir()
    return tmp_path


def build(path: Path, name: str, limit: float, workers: int = 0) -> TrainLoader:
    config = DataConfig(path=str(path), loader=name, workers=workers, bad_image_limit=limit)
    loader = build_train_loader(config, VIEWS, batch_size=6, seed=0)
    (path / "train" / "a" / "a_09.jpg").unlink(missing_ok=True)
    return loader


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_by_the_next_good_one(damaged: Path, workers: int, loader_name: str) -> None:
    loader = build(damaged, loader_name, limit=0.5, workers=workers)
    for epoch in (0, 1):
        index = torch.cat([batch.index for batch in loader.batches(epoch)]).tolist()
        assert index == [FOLLOWING.get(position, position) for position in epoch_order(0, epoch, 12).tolist()]
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_once_with_their_reason(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture, loader_name: str
) -> None:
    loader = build(damaged, loader_name, limit=0.5, workers=workers)
    with caplog.at_level(logging.WARNING, logger="caco_fast.data"):
        for epoch in (0, 1, 2):
            for _ in loader.batches(epoch):
                pass
    loader.close()
    assert {Path(name).stem for name in loader.bad_images} == set(BAD)
    reasons = {BAD[Path(name).stem]: reason for name, reason in loader.bad_images.items()}
    assert "truncated" in reasons["truncated"] and "No such file" in reasons["vanished"]
    assert "directory" in reasons["directory"] and "cannot identify" in reasons["text"]
    lines = [record.getMessage() for record in caplog.records if record.name == "caco_fast.data"]
    assert sorted(lines) == sorted(f"bad image {name}: {reason}" for name, reason in loader.bad_images.items())


def test_the_other_images_are_augmented_as_if_nothing_were_bad(
    damaged: Path, tmp_path_factory: pytest.TempPathFactory, write_image: Callable[..., Path], loader_name: str
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    for number in range(12):
        write_image(whole / "train" / "a" / f"a_{number:02}.jpg", seed=number)
    left = torch.cat([batch.views[1] for batch in build(damaged, loader_name, limit=0.5).batches(0)])
    config = DataConfig(path=str(whole), loader=loader_name, workers=0)
    right = torch.cat([batch.views[1] for batch in build_train_loader(config, VIEWS, batch_size=6, seed=0).batches(0)])
    for row, position in enumerate(epoch_order(0, 0, 12).tolist()):
        assert torch.equal(left[row], right[row]) == (position not in FOLLOWING)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_images_than_the_limit_stop_the_run_with_the_list(
    damaged: Path, workers: int, loader_name: str
) -> None:
    loader = build(damaged, loader_name, limit=4 / 12, workers=workers)
    with pytest.raises(UserError, match=r"5 of 12 training images can't be read, more than the 4") as error:
        list(loader.batches(0))
    loader.close()
    first, *listed = str(error.value).splitlines()
    assert len(listed) == 5 and "data.bad_image_limit" in first
    written = Path(first.split("All of them: ")[1])
    assert written.read_text().splitlines() == [line.strip() for line in listed]
    written.unlink()


def test_a_limit_of_as_many_as_there_are_is_kept_to_exactly(damaged: Path, loader_name: str) -> None:
    assert len(list(build(damaged, loader_name, limit=5 / 12).batches(0))) == 2


def test_only_the_first_twenty_are_listed(tmp_path: Path, loader_name: str) -> None:
    for number in range(30):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    loader = build_train_loader(
        DataConfig(path=str(tmp_path), loader=loader_name, workers=0, bad_image_limit=0.8), VIEWS, batch_size=6, seed=0
    )
    with pytest.raises(UserError, match=r"25 of 30 training images") as error:
        list(loader.batches(0))
    lines = str(error.value).splitlines()
    assert len(lines) == 22 and lines[-1].strip() == "... and 5 more"
    Path(lines[0].split("All of them: ")[1]).unlink()


def test_no_readable_image_at_all_is_an_error_even_without_a_limit(tmp_path: Path, loader_name: str) -> None:
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    loader = build_train_loader(
        DataConfig(path=str(tmp_path), loader=loader_name, workers=0, bad_image_limit=1.0), VIEWS, batch_size=4, seed=0
    )
    with pytest.raises(UserError, match="none of the 8 training images can be read"):
        list(loader.batches(0))


def test_an_error_of_our_own_is_not_taken_for_a_bad_image(
    colour_source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ArraySource, index: int) -> None:
        raise ValueError("a mistake in the source")

    monkeypatch.setattr(ArraySource, "image", broken)
    config = DataConfig(source="embedded", workers=0, bad_image_limit=1.0)
    loader = TorchvisionLoader(colour_source, config, VIEWS, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="a mistake in the source"):
        next(loader.batches(0))
    assert loader.bad_images == {}


def test_too_few_descriptors_are_no_fault_of_the_image(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images of a run on a machine with a low limit would else be counted as bad."""
    loader = build(damaged, "torchvision", limit=0.5)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match="open files, which is too low .* raise it .ulimit -n 4096."):
        next(loader.batches(0))
    assert not loader.bad_images
    loader.close()
