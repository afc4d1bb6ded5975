"""The DALI loader: the views of the memory loader, resume, ranks, kinds of files, and files that break it."""

import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from caco_fast.config import load_config
from caco_fast.data import ArraySource, Batch, DataConfig, ViewConfig, build, build_train_loader
from caco_fast.data.loaders.base import epoch_order
from caco_fast.data.loaders.in_memory import MemoryLoader
from caco_fast.data.loaders.torchvision import TorchvisionLoader
from caco_fast.errors import UserError
from caco_fast.training import train

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")

from caco_fast.data.loaders import dali, dali_pipeline
from caco_fast.data.loaders.dali import DaliLoader
from caco_fast.data.loaders.dali_pipeline import Encoded

QUICKSTART = Path(__file__).parents[2] / "caco_fast" / "configs" / "quickstart.yaml"
VIEWS = [ViewConfig(count=2, size=16, blur_p=0.5, solarize_p=0.2), ViewConfig(size=8, scale=(0.1, 0.3))]
# Crops and flips off, so that a view is its image, resized.
PLAIN = ViewConfig(size=16, scale=(1.0, 1.0), ratio=(0.001, 1000.0), flip_p=0, jitter_p=0, grey_p=0, blur_p=0)


def make(source: object, views: list[ViewConfig] = VIEWS, **options: object) -> DaliLoader:
    settings = {key: options.pop(key) for key in ("workers", "jitter", "bad_image_limit") if key in options}
    config = DataConfig(source="embedded", loader="dali", **({"workers": 1} | settings))
    return DaliLoader(source, config, views, **({"batch_size": 10, "seed": 3} | options))


def same(left: Batch, right: Batch) -> bool:
    views = zip(left.views, right.views, strict=True)
    return torch.equal(left.index, right.index) and all(torch.equal(*pair) for pair in views)


def levels(left: torch.Tensor, right: torch.Tensor, std: tuple[float, ...]) -> torch.Tensor:
    """Absolute difference of normalised views in grey levels."""
    return (left - right).abs() * torch.tensor(std)[:, None, None] * 255


@pytest.fixture
def smooth_source() -> ArraySource:
    """30 smooth colour images of 40 x 32 pixels."""
    small = np.random.default_rng(0).integers(0, 256, (30, 4, 5, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((40, 32), Image.BICUBIC)) for image in small])
    return ArraySource("smooth", images, np.zeros(30, dtype=np.int64), ["one"], (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


@pytest.mark.parametrize("jitter", ["exact", "fast"])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_the_memory_loaders_to_one_rounding(smooth_source: ArraySource, channels: int, jitter: str) -> None:
    if channels == 1:
        grey = np.ascontiguousarray(smooth_source.images[..., :1])
        smooth_source = ArraySource("grey", grey, smooth_source.labels, ["one"], (0.5,), (0.25,))
    config = DataConfig(source="embedded", jitter=jitter)
    other = MemoryLoader(smooth_source, config, VIEWS, batch_size=10, seed=3)
    for epoch in (-1, 0):
        for ours, theirs in zip(make(smooth_source, jitter=jitter).batches(epoch), other.batches(epoch), strict=True):
            assert torch.equal(ours.index, theirs.index)
            for mine, view in zip(ours.views, theirs.views, strict=True):
                assert mine.is_contiguous(memory_format=torch.channels_last) and mine.dtype == torch.float32
                # The crop is rounded to whole levels, as PIL does. Solarising turns that into a jump at level 128.
                apart = levels(mine, view, smooth_source.std)
                assert apart.mean() < 0.5 and (apart > 4).float().mean() < 0.01


@pytest.mark.parametrize("workers", [1, 3])
def test_a_resumed_epoch_is_bit_for_bit_the_rest_with_any_number_of_threads(
    smooth_source: ArraySource, workers: int
) -> None:
    whole = list(make(smooth_source, batch_size=6).batches(1))
    assert len(whole) == 5
    loader = make(smooth_source, batch_size=6, workers=workers)
    for first in (4, 1):
        rest = list(loader.batches(1, first))
        assert len(rest) == 5 - first and all(map(same, whole[first:], rest))
    loader.close()


def test_an_epoch_that_is_left_does_not_leak_into_the_next(smooth_source: ArraySource) -> None:
    loader = make(smooth_source, batch_size=3)
    batches = loader.batches(0)
    next(batches)
    batches.close()
    assert all(map(same, loader.batches(1), make(smooth_source, batch_size=3).batches(1)))


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_batch_that_one_rank_would_see(smooth_source: ArraySource, world_size: int) -> None:
    alone = list(make(smooth_source).batches(1))
    loaders = [make(smooth_source, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(alone, *(loader.batches(1) for loader in loaders), strict=True):
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        for number, view in enumerate(whole.views):
            assert torch.allclose(torch.cat([part.views[number] for part in parts]), view, atol=1e-5)


KINDS: dict[str, Callable[[Image.Image, io.BytesIO], None]] = {
    "jpeg": lambda image, file: image.save(file, "JPEG", quality=95),
    "progressive": lambda image, file: image.save(file, "JPEG", quality=95, progressive=True),
    "grey jpeg": lambda image, file: image.convert("L").save(file, "JPEG", quality=95),
    "cmyk": lambda image, file: image.convert("CMYK").save(file, "JPEG", quality=95),
    "png": lambda image, file: image.save(file, "PNG"),
    "grey png": lambda image, file: image.convert("L").save(file, "PNG"),
    "palette": lambda image, file: image.quantize(32).save(file, "PNG"),
    "transparent": lambda image, file: image.convert("RGBA").save(file, "PNG"),
    "16 bits": lambda image, file: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(
        file, "PNG"
    ),
    "gif": lambda image, file: image.save(file, "GIF"),
    "webp": lambda image, file: image.save(file, "WEBP", lossless=True),
    "tiff": lambda image, file: image.save(file, "TIFF"),
    "bmp": lambda image, file: image.save(file, "BMP"),
    "one pixel": lambda image, file: image.resize((1, 1)).save(file, "PNG"),
    "long": lambda image, file: image.resize((2000, 10)).save(file, "JPEG", quality=95),
    "turned by exif": lambda image, file: image.save(file, "JPEG", quality=95, exif=_turned()),
    "trailing bytes": lambda image, file: file.write(_jpeg(image) + b"padding"),
}


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_every_kind_of_file_is_the_image_that_pil_makes_of_it(smooth_source: ArraySource, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number, save in enumerate(KINDS.values()):
        file = io.BytesIO()
        save(Image.fromarray(smooth_source.images[number]), file)
        (tmp_path / "train" / "a" / f"{number:02}.JPEG").write_bytes(file.getvalue())
    pair = [
        build_train_loader(
            DataConfig(path=str(tmp_path), loader=name, workers=0), [PLAIN], batch_size=len(KINDS), seed=0
        )
        for name in ("dali", "torchvision")
    ]
    ours, theirs = (next(loader.batches(0)) for loader in pair)
    assert all(loader.bad_images == {} for loader in pair) and torch.equal(ours.index, theirs.index)
    apart = levels(ours.views[0], theirs.views[0], (0.229, 0.224, 0.225)).amax(dim=(1, 2, 3))
    off = {
        name: float(apart[row]) for row, name in enumerate(np.array(list(KINDS))[ours.index.numpy()]) if apart[row] > 2
    }
    assert off == {}


def break_table(data: bytes) -> bytes:
    """A JPEG whose Huffman tables are nonsense, which only decoding finds."""
    place = data.index(b"\xff\xc4")
    return data[: place + 5] + b"\xff" * 12 + data[place + 17 :]


@pytest.fixture
def broken(smooth_source: ArraySource, tmp_path: Path) -> Path:
    """20 images, of which DALI and PIL refuse numbers 4, 5 and 19, and a header can't tell; number 6 is larger."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(20):
        data = _jpeg(Image.fromarray(smooth_source.images[number]).resize((60, 50) if number == 6 else (40, 32)))
        file = tmp_path / "train" / "a" / f"{number:02}.JPEG"
        file.write_bytes(break_table(data) if number in (4, 5, 19) else data)
    return tmp_path


def test_files_that_break_the_graph_are_named_replaced_and_cost_one_graph_each_at_most(
    broken: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []
    graph = dali.DaliGraph
    monkeypatch.setattr(dali, "DaliGraph", lambda *a, **k: graphs.append(1) or graph(*a, **k))
    config = DataConfig(path=str(broken), loader="dali", workers=1, bad_image_limit=0.15)
    loader = build_train_loader(config, [PLAIN, *VIEWS], batch_size=4, seed=0)
    with caplog.at_level(logging.WARNING, logger="caco_fast.data"):
        for epoch in (0, 1):
            batches = list(loader.batches(epoch))
            index = torch.cat([batch.index for batch in batches]).tolist()
            assert index == [{4: 6, 5: 6, 19: 0}.get(position, position) for position in epoch_order(0, epoch, 20)]
            # The first image after the broken ones is seen whole at each of its places, whatever its own size.
            whole = torch.cat([batch.views[0] for batch in batches])[torch.tensor(index) == 6]
            assert len(whole) == 3 and (whole == whole[0]).all()
    assert sorted(Path(name).stem for name in loader.bad_images) == ["04", "05", "19"]
    assert len([record for record in caplog.records if record.name == "caco_fast.data"]) == 3
    assert 2 <= len(graphs) <= 4
    loader.close()


def test_a_broken_file_leaves_all_other_views_as_they_were(broken: Path, smooth_source: ArraySource) -> None:
    config = DataConfig(path=str(broken), loader="dali", workers=1, bad_image_limit=0.15)
    patched = list(build_train_loader(config, VIEWS, batch_size=4, seed=0).batches(0))
    for number in (4, 5, 19):
        data = _jpeg(Image.fromarray(smooth_source.images[number]))
        (broken / "train" / "a" / f"{number:02}.JPEG").write_bytes(data)
    whole = list(build_train_loader(config, VIEWS, batch_size=4, seed=0).batches(0))
    for left, right in zip(patched, whole, strict=True):
        intact = left.index == right.index
        for mine, view in zip(left.views, right.views, strict=True):
            assert torch.allclose(mine[intact], view[intact], atol=1e-5)
            assert not any(torch.equal(*pair) for pair in zip(mine[~intact], view[~intact]))


def test_more_broken_files_than_the_limit_stop_the_run(broken: Path) -> None:
    config = DataConfig(path=str(broken), loader="dali", workers=1, bad_image_limit=0.1)
    with pytest.raises(UserError, match="3 of 20 training images can't be read, more than the 2"):
        list(build_train_loader(config, VIEWS, batch_size=4, seed=0).batches(0))


def test_what_only_dali_refuses_is_decoded_by_pil(
    smooth_source: ArraySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(smooth_source.images[number]).save(tmp_path / "train" / "a" / f"{number}.gif")
    config = DataConfig(path=str(tmp_path), loader="dali", workers=1)
    expected = list(build_train_loader(config, [PLAIN], batch_size=3, seed=0).batches(0))

    def as_they_are(data: bytes, max_pixels: int) -> Encoded:
        return Encoded(np.frombuffer(data, dtype=np.uint8), 32, 40)

    monkeypatch.setattr(dali_pipeline, "prepare", as_they_are)
    loader = build_train_loader(config, [PLAIN], batch_size=3, seed=0)
    assert all(map(same, loader.batches(0), expected)) and loader.bad_images == {}


def test_an_error_that_is_no_files_fault_is_not_taken_for_one(
    smooth_source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: dali.DaliGraph) -> None:
        if self.sizes:
            raise RuntimeError("out of memory")
        self._pipe.share_outputs()
        self._pipe.release_outputs()

    monkeypatch.setattr(dali.DaliGraph, "collect", full)
    loader = make(smooth_source)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(loader.batches(0))
    assert loader.bad_images == {}


def test_an_error_in_a_thread_that_finishes_views_is_raised(
    smooth_source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("a mistake in the views")

    monkeypatch.setattr(dali, "finish_crops", broken)
    with pytest.raises(ValueError, match="a mistake in the views"):
        next(make(smooth_source).batches(0))


def test_a_closed_loader_says_so(smooth_source: ArraySource) -> None:
    loader = make(smooth_source)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.batches(0))


def test_the_generators_are_left_alone(smooth_source: ArraySource) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    view = next(make(smooth_source).batches(0)).views[0]
    assert not view.requires_grad
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_large_sets_take_dali_and_small_ones_stay_in_memory(image_folder: Path) -> None:
    loader = build_train_loader(DataConfig(path=str(image_folder)), VIEWS, batch_size=4, seed=0)
    assert isinstance(loader, DaliLoader)
    loader.close()
    assert isinstance(build_train_loader(DataConfig(source="embedded"), VIEWS, batch_size=4, seed=0), MemoryLoader)


def test_without_dali_the_default_says_what_it_takes_and_an_explicit_wish_is_refused(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, logger="caco_fast.data"):
        loader = build_train_loader(DataConfig(path=str(image_folder), workers=0), VIEWS, batch_size=4, seed=0)
    assert isinstance(loader, TorchvisionLoader)
    assert [record.getMessage().count("caco-fast[dali-cuda") for record in caplog.records] == [1]
    with pytest.raises(UserError, match=r"DALI is not installed.*pip install .caco-fast\[dali-cuda1[23]\]"):
        build_train_loader(DataConfig(path=str(image_folder), loader="dali"), VIEWS, batch_size=4, seed=0)


def test_fast_jitter_is_refused_by_the_torchvision_loader(image_folder: Path) -> None:
    config = DataConfig(path=str(image_folder), loader="torchvision", jitter="fast")
    with pytest.raises(UserError, match="data.jitter: found fast, but the torchvision loader is exact"):
        build_train_loader(config, VIEWS, batch_size=4, seed=0)


def test_quickstart_trains_with_it(tmp_path: Path) -> None:
    overrides = ["data.loader=dali", "data.workers=1", "trainer.max_steps=2", "run.plain=true"]
    overrides += ["run.tensorboard=false", "run.report=false"]
    settings = load_config(
        QUICKSTART, [*overrides, "evaluation={every_epochs: 0, linear_probe: false, baselines: false}"]
    )
    summary = train(settings, tmp_path)
    assert summary["steps"] == 2 and summary["bad_images"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_views_on_a_gpu_are_those_of_the_cpu(smooth_source: ArraySource) -> None:
    loader = make(smooth_source, device="cuda")
    for left, right in zip(make(smooth_source).batches(0), loader.batches(0), strict=True):
        assert torch.equal(left.index, right.index)
        for mine, view in zip(left.views, right.views, strict=True):
            assert view.device.type == "cuda" and view.is_contiguous(memory_format=torch.channels_last)
            # PNG decodes alike; DALI's own resize is what differs.
            assert levels(mine, view.cpu(), smooth_source.std).mean() < 1
    loader.close()
