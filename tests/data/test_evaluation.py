from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from caco_fast.data import ArraySource, DataConfig, EvalLoader, build_eval_loader, build_source, index_main
from caco_fast.data.loaders import evaluation
from caco_fast.errors import UserError


def read(source: ArraySource, **options):
    """Images, labels and index of the whole shard."""
    loader = EvalLoader(source, DataConfig(source="embedded"), **{"batch_size": 8, **options})
    batches = list(loader)
    assert len(batches) == len(loader) and all(len(images) <= 8 for images, _, _ in batches)
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def test_every_image_comes_once_in_order_with_its_label(colour_source: ArraySource) -> None:
    images, labels, index = read(colour_source)
    assert index.tolist() == list(range(50)) and labels.tolist() == [row % 5 for row in range(50)]
    pixels = torch.from_numpy(colour_source.images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (colour_source.mean, colour_source.std))
    assert images.dtype == torch.float32 and torch.allclose(images, (pixels - mean) / std, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_shards_of_the_ranks_are_disjoint_and_complete(colour_source: ArraySource, share: float) -> None:
    whole = read(colour_source, share=share)
    shards = [read(colour_source, share=share, rank=rank, world_size=3) for rank in range(3)]
    for part in range(3):
        assert torch.equal(whole[part], torch.cat([shard[part] for shard in shards]))
    assert len(set(whole[2].tolist())) == round(50 * share)


def test_a_loader_can_be_read_again(colour_source: ArraySource) -> None:
    loader = EvalLoader(colour_source, DataConfig(source="embedded", workers=0), batch_size=20)
    first, second = ([index.tolist() for _, _, index in loader] for _ in range(2))
    assert first == second and len(first) == 3


def test_more_ranks_than_images_leave_some_with_nothing(colour_source: ArraySource) -> None:
    config = DataConfig(source="embedded", workers=0)
    counts = [
        sum(
            len(index)
            for _, _, index in EvalLoader(colour_source, config, batch_size=8, share=0.04, rank=r, world_size=4)
        )
        for r in range(4)
    ]
    assert sorted(counts) == [0, 0, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_images_are_resized_and_cropped(image_folder: Path, workers: int, loader_name: str) -> None:
    config = DataConfig(path=str(image_folder), loader=loader_name, workers=workers, eval_resize=16, eval_size=12)
    batches = list(build_eval_loader(config, "test", batch_size=3))
    assert [images.shape for images, _, _ in batches] == [(3, 3, 12, 12), (1, 3, 12, 12)]
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("filter", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_resizes_as_pil_does(image_folder: Path, filter: Image.Resampling, loader_name: str) -> None:
    name = filter.name.lower()
    options = {"loader": loader_name if name == "bilinear" else "auto", "workers": 0, "eval_interpolation": name}
    config = DataConfig(path=str(image_folder), eval_resize=16, eval_size=12, mean=[0.0] * 3, std=[1.0] * 3, **options)
    loader = build_eval_loader(config, "test", batch_size=4)
    (images, _, _) = next(iter(loader))
    for row, image in enumerate(images):
        original = loader.source.image(row)
        width, height = (16 * side // min(original.size) for side in original.size)
        resized = np.asarray(original.resize((width, height), filter))
        top, left = round((height - 12) / 2), round((width - 12) / 2)
        expected = torch.from_numpy(resized[top : top + 12, left : left + 12].copy()).permute(2, 0, 1) / 255
        assert torch.allclose(image, expected, atol=1e-6 if name == "bicubic" or not loader.dali else 0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_differing_sizes_say_which_settings_to_give(
    image_folder: Path, write_image: Callable[..., Path], workers: int, loader_name: str
) -> None:
    write_image(image_folder / "val" / "ant" / "wide.JPEG", width=40)
    config = DataConfig(path=str(image_folder), loader=loader_name, workers=workers)
    with pytest.raises(UserError, match=r"wide.JPEG has 40 x 20 pixels, .* has 24 x 20; set data.eval_resize") as error:
        list(build_eval_loader(config, "test", batch_size=8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("indexed", [False, True])
def test_images_of_differing_sizes_are_refused_before_any_is_decoded(
    image_folder: Path, write_image: Callable[..., Path], indexed: bool
) -> None:
    write_image(image_folder / "train" / "bee" / "wide.JPEG", width=40)
    # A bad image has no size, and is left out later.
    (image_folder / "train" / "bee" / "empty.JPEG").write_bytes(b"")
    place: dict[str, object] = {"path": str(image_folder)}
    if indexed:
        assert index_main([str(image_folder), "--workers", "1"]) == 0
        place = {"source": "index", "path": str(image_folder / "caco_fast_index.npz")}

    def build(batch_size: int = 8, **settings: object) -> object:
        return build_eval_loader(DataConfig(workers=0, **place, **settings), "train", batch_size=batch_size)

    for settings in ({}, {"eval_resize": 16}):
        with pytest.raises(UserError, match="wide.JPEG has .* set data.eval_resize and data.eval_size"):
            build(**settings)
    # The centre has one size, and so has a batch of one image.
    assert build(eval_resize=16, eval_size=12) and build(eval_size=12) and build(batch_size=1)


def test_a_size_that_no_probe_saw_is_refused_when_it_is_met(
    image_folder: Path, write_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, loader_name: str
) -> None:
    monkeypatch.setattr(evaluation, "_PROBES", 1)
    write_image(image_folder / "val" / "ant" / "wide.JPEG", width=40)
    loader = build_eval_loader(DataConfig(path=str(image_folder), loader=loader_name, workers=0), "test", batch_size=8)
    with pytest.raises(UserError, match=r"wide.JPEG has 40 x 20 pixels, .* has 24 x 20; set data.eval_resize"):
        list(loader)


def test_bad_images_are_left_out_and_counted(image_folder: Path, loader_name: str) -> None:
    (image_folder / "val" / "ant" / "ant_1.JPEG").write_bytes(b"")
    (image_folder / "val" / "bee" / "bee_0.JPEG").write_bytes(b"")
    config = DataConfig(path=str(image_folder), loader=loader_name, workers=0, bad_image_limit=0.0)
    loader = build_eval_loader(config, "test", batch_size=2)
    for _ in range(2):
        assert [(labels.tolist(), index.tolist()) for _, labels, index in loader] == [([0], [0]), ([1], [3])]
    assert {Path(name).stem for name in loader.bad_images} == {"ant_1", "bee_0"}


def test_a_whole_batch_of_bad_images_gives_no_batch(image_folder: Path, loader_name: str) -> None:
    for file in (image_folder / "val" / "ant").iterdir():
        file.write_bytes(b"")
    config = DataConfig(path=str(image_folder), loader=loader_name, workers=0)
    assert [labels.tolist() for _, labels, _ in build_eval_loader(config, "test", batch_size=2)] == [[1, 1]]


def test_no_readable_image_is_an_error(image_folder: Path, loader_name: str) -> None:
    for file in (image_folder / "val").rglob("*.JPEG"):
        file.write_bytes(b"")
    config = DataConfig(path=str(image_folder), loader=loader_name, workers=0)
    with pytest.raises(UserError, match="none of the 4 images to evaluate on can be read"):
        list(build_eval_loader(config, "test", batch_size=2))


def test_images_without_labels_are_refused(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "a.jpg")
    config = DataConfig(path=str(tmp_path), workers=0)
    assert len(build_source(config, "train")) == 1
    with pytest.raises(UserError, match="the train images of .* have no labels, which kNN and linear evaluation need"):
        build_eval_loader(config, "train", batch_size=2)
