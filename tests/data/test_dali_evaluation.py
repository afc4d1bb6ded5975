"""Evaluation by DALI: the images of the PIL path, the same ones left out, and the loader that `data.loader` names."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from caco_fast.data import ArraySource, DataConfig, EvalLoader, build, build_eval_loader
from caco_fast.data.sources.folder import FolderSource
from caco_fast.data.views.pil import evaluation_box, evaluation_transform
from caco_fast.errors import UserError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")

from caco_fast.data.loaders import dali_evaluation, dali_pipeline
from caco_fast.data.loaders.dali_evaluation import DaliEvaluationBatches
from caco_fast.data.loaders.dali_pipeline import Encoded

# Resize and centre crop; the last two crop more than some of the images have.
SIZES = [(256, 224), (64, 48), (64, 64), (None, 150), (None, 200), (40, 55)]
ONE_CLASS = {"eval_resize": 24, "eval_size": 20, "workers": 1}


@pytest.fixture
def photographs(pictures: list[Path], tmp_path: Path) -> Path:
    (tmp_path / "val" / "a").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        (tmp_path / "val" / "a" / f"{number}.JPEG").symlink_to(picture)
    return tmp_path


def pixels(path: Path, resize: int | None, size: int | None, in_graph: bool | None) -> torch.Tensor:
    """All images of a folder [N, ch, h, w] in grey levels: by PIL if `in_graph` is None, else by DALI."""
    config = DataConfig(path=str(path), workers=1, eval_resize=resize, eval_size=size)
    source = FolderSource(path, "test")
    if in_graph is None:
        transform = evaluation_transform(resize, size)
        return torch.stack([transform(source.image(position)) for position in range(len(source))]).float()
    parts = np.array_split(np.arange(len(source)), range(5, len(source), 5))
    made = DaliEvaluationBatches(source, config, parts, torch.device("cpu"), in_graph)
    return torch.cat([raw.images[0] for raw in made]).float()


@pytest.mark.parametrize("resize, size", SIZES)
@pytest.mark.parametrize("in_graph, mean, largest", [(False, 0.1, 1), (True, 0.4, 16)])
def test_images_are_pils(
    photographs: Path, resize: int | None, size: int, in_graph: bool, mean: float, largest: int
) -> None:
    apart = (pixels(photographs, resize, size, in_graph) - pixels(photographs, resize, size, None)).abs()
    assert apart.shape == (8, 3, size, size) and apart.mean() <= mean and apart.max() <= largest


def test_sizes_and_centres_are_rounded_as_torchvision_does() -> None:
    generator = np.random.default_rng(0)
    for height, width, resize, size in generator.integers(1, 90, (300, 4)).tolist():
        for chosen in ((resize, size), (resize, None), (None, size)):
            resized, start = evaluation_box(height, width, *chosen)
            whole = evaluation_transform(chosen[0], None)(torch.zeros(1, height, width, dtype=torch.uint8))
            assert tuple(whole.shape[1:]) == resized
            if chosen[1] is not None:
                # The value of each pixel is its place, so that the crop shows where it was cut.
                numbered = torch.arange(1, 1 + resized[0] * resized[1]).reshape(1, *resized)
                found = evaluation_transform(None, size)(numbered)[0]
                place = [torch.arange(size) + first for first in start]
                inside = [(axis >= 0) & (axis < side) for axis, side in zip(place, resized)]
                expected = place[0][:, None] * resized[1] + place[1] + 1
                assert torch.equal(found, torch.where(inside[0][:, None] & inside[1], expected, 0))


@pytest.mark.parametrize("in_graph", [False, True])
def test_images_of_one_size_need_no_settings(photographs: Path, in_graph: bool) -> None:
    for file in (photographs / "val" / "a").iterdir():
        if Image.open(file).size != (500, 375):
            file.unlink()
    assert torch.equal(pixels(photographs, None, None, in_graph), pixels(photographs, None, None, None))
    smaller = pixels(photographs, 30, None, in_graph)
    assert smaller.shape == (2, 3, 30, 40) and (smaller - pixels(photographs, 30, None, None)).abs().max() <= 16


def test_grey_images_are_resized_too() -> None:
    small = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 1), dtype=np.uint8)
    images = small.repeat(6, axis=1).repeat(6, axis=2)
    source = ArraySource("grey", images, np.arange(6), list("abcdef"), (0.5,), (0.25,))
    config = DataConfig(source="embedded", eval_resize=16, eval_size=12, workers=0)
    ours, theirs = (next(iter(EvalLoader(source, config, batch_size=6, dali=dali))) for dali in (True, False))
    assert ours[0].shape == (6, 1, 12, 12) and torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    assert (ours[0] - theirs[0]).abs().max() * 0.25 * 255 < 1.01


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """12 images in one class; DALI and PIL refuse 2, 3 and 11, and only decoding tells; 9 is empty."""
    (tmp_path / "val" / "a").mkdir(parents=True)
    for number in range(12):
        file = tmp_path / "val" / "a" / f"{number:02}.JPEG"
        small = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 32)).save(file, "JPEG")
        if number in (2, 3, 11):
            # The Huffman table.
            data = bytearray(file.read_bytes())
            place = data.index(b"\xff\xc4")
            data[place + 5 : place + 17] = b"\xff" * 12
            file.write_bytes(data)
    (tmp_path / "val" / "a" / "09.JPEG").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_files_that_break_the_graph_are_left_out_and_named(
    broken: Path, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(path=str(broken), loader="dali", **ONE_CLASS)
    loader = build_eval_loader(config, "test", batch_size=batch_size)
    # In this process: a worker forked next to DALI's threads may wait for ever for a lock that one of them held.
    by_pil = DataConfig(path=str(broken), loader="torchvision", **(ONE_CLASS | {"workers": 0}))
    other = build_eval_loader(by_pil, "test", batch_size=12)
    expected = next(iter(other))[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="caco_fast.data"):
        for _ in range(2):
            images, labels, index = (torch.cat(parts) for parts in zip(*loader))
            assert index.tolist() == [0, 1, 4, 5, 6, 7, 8, 10] and labels.tolist() == [0] * 8
            assert (images - expected).abs().max() * 0.23 * 255 < 2.1
    assert sorted(Path(name).stem for name in loader.bad_images) == ["02", "03", "09", "11"]
    assert loader.bad_images == other.bad_images
    assert len([record for record in caplog.records if "bad image" in record.getMessage()]) == 4


@pytest.mark.parametrize("in_graph", [False, True])
def test_what_only_dali_refuses_is_decoded_by_pil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_graph: bool
) -> None:
    (tmp_path / "val" / "a").mkdir(parents=True)
    for number in range(5):
        small = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 32)).save(tmp_path / "val" / "a" / f"{number}.gif")
    expected = pixels(tmp_path, 24, 20, in_graph)

    def as_they_are(data: bytes, max_pixels: int) -> Encoded:
        return Encoded(np.frombuffer(data, dtype=np.uint8), 32, 40)

    monkeypatch.setattr(dali_pipeline, "prepare", as_they_are)
    assert torch.equal(pixels(tmp_path, 24, 20, in_graph), expected)


def test_an_error_that_is_no_files_fault_is_not_taken_for_one(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(dali_evaluation.DaliGraph):
        def collect(self) -> list[torch.Tensor]:
            raise RuntimeError("out of memory")

    for number in (2, 3, 9, 11):
        (broken / "val" / "a" / f"{number:02}.JPEG").unlink()
    monkeypatch.setattr(dali_evaluation, "DaliGraph", Full)
    loader = build_eval_loader(DataConfig(path=str(broken), loader="dali", **ONE_CLASS), "test", batch_size=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(loader)
    assert loader.bad_images == {}


def test_shards_are_the_whole_and_a_pass_that_is_left_does_not_leak_into_the_next(photographs: Path) -> None:
    config = DataConfig(path=str(photographs), loader="dali", **ONE_CLASS)
    loader = build_eval_loader(config, "test", batch_size=2)
    left = iter(loader)
    next(left)
    whole = list(loader)
    assert len(whole) == len(loader) == 4 and torch.equal(next(left)[0], whole[1][0])
    left.close()
    shards = [build_eval_loader(config, "test", batch_size=2, rank=rank, world_size=9) for rank in range(9)]
    images, index = (torch.cat([batch[part] for shard in shards for batch in shard]) for part in (0, 2))
    assert index.tolist() == list(range(8)) and torch.equal(images, torch.cat([batch[0] for batch in whole]))


def test_the_setting_of_the_training_loader_chooses(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_dali(**settings: object) -> bool:
        settings = {"path": str(image_folder)} | settings
        return build_eval_loader(DataConfig(**settings), "test", batch_size=4).dali

    array = {"source": "embedded", "path": ""}
    assert by_dali() and by_dali(loader="dali") and by_dali(loader="dali", eval_resize=40, **array)
    assert not by_dali(loader="torchvision") and not by_dali(loader="dali", **array)
    assert not by_dali(eval_resize=40, **array)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert not by_dali()
    with pytest.raises(UserError, match="DALI is not installed"):
        by_dali(loader="dali")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("resize, size", SIZES)
def test_images_on_a_gpu_are_those_of_the_cpu(photographs: Path, resize: int | None, size: int) -> None:
    config = DataConfig(path=str(photographs), loader="dali", workers=1, eval_resize=resize, eval_size=size)
    pair = [build_eval_loader(config, "test", batch_size=5, device=device) for device in ("cpu", "cuda")]
    for left, right in zip(*pair, strict=True):
        assert right[0].device.type == "cuda" and torch.equal(left[1], right[1]) and torch.equal(left[2], right[2])
        # nvJPEG's decoding and DALI's resize are what differs.
        assert (left[0] - right[0].cpu()).abs().mean() * 0.23 * 255 < 1.5
