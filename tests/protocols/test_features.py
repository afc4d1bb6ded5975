"""Features are computed once, whatever stops the work, and read again by any number of ranks."""

import dataclasses
import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from caco_fast.data import ArraySource, DataConfig, ViewConfig, build_source, build_train_loader
from caco_fast.data.loaders.base import evaluation_share
from caco_fast.errors import UserError
from caco_fast.evaluate.cache import FeatureCache
from caco_fast.models import BackboneConfig
from caco_fast.pretrained import Pretrained
from caco_fast.protocols import AugmentedView, Context, FeatureSet
from caco_fast.protocols import features as module
from tests.ranks import run_ranks

COUNT = 23


class Stopped(Exception):
    """A stand-in for a kill."""


class Small(nn.Sequential):
    """A backbone that counts its images, and stops at a given one."""

    def __init__(self, seed: int = 0, channels: int = 3) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self[1].running_mean.normal_()
        self.seen, self.stop_at = 0, 10**9

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        if self.seen > self.stop_at:
            raise Stopped
        return super().forward(images)


def array(count: int = COUNT, seed: int = 0, channels: int = 3) -> ArraySource:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 9, 8, channels), dtype=np.uint8)
    labels = random.integers(0, 4, count)
    return ArraySource("made up", images, labels, list("abcd"), (0.5,) * channels, (0.2,) * channels)


def folder_of(path: Path, bad: tuple[int, ...] = (), count: int = COUNT) -> DataConfig:
    """A folder of images of two classes; those at the positions `bad` can't be read."""
    images = array(count).images
    for position in range(count):
        file = path / "train" / ("a" if position < 9 else "b") / f"{position:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[position]).save(file)
        if position in bad:
            file.write_bytes(file.read_bytes()[:50])
    return DataConfig(path=str(path), workers=0, eval_size=8, loader="torchvision")


def context(folder: Path, backbone: nn.Module | None = None, data: DataConfig | None = None, **options: Any) -> Context:
    pretrained = Pretrained(backbone or Small(), "small", BackboneConfig(), 3)
    known = dict(device=torch.device("cpu"), autocast=None, batch_size=4, seed=0, folder=folder)
    # Not folded, so that the module that counts is the one that computes.
    made = Context(pretrained, data or DataConfig(source="embedded"), **{**known, **options})
    made.folded = pretrained.backbone
    return made


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 5)


def same(found: FeatureSet, expected: FeatureSet) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3])) and found[0].dtype == expected[0].dtype


def bad_of(name: str) -> tuple[int, ...]:
    return {"none": (), "some": (0, 4, 5, 6, 7, 8, 9, 22), "a-whole-shard": tuple(range(3, 17))}[name]


@pytest.mark.parametrize("bad", ["none", "some", "a-whole-shard"])
def test_the_cache_gives_the_features_of_a_plain_pass(tmp_path: Path, bad: str) -> None:
    data = folder_of(tmp_path / "data", bad_of(bad))
    expected = context(tmp_path, data=data, cache=None).features("train")
    assert not list(tmp_path.glob("features"))
    first = context(tmp_path, data=data).features("train")
    backbone = Small()
    again = context(tmp_path, backbone, data).features("train")
    assert same(first, expected) and same(again, expected) and backbone.seen == 0
    assert len(expected.index) == COUNT - len(bad_of(bad)) and len(set(expected.labels.tolist())) == 2
    names = {str(tmp_path / "data" / "train" / ("a" if p < 9 else "b") / f"{p:03}.png") for p in bad_of(bad)}
    assert set(first.bad) == set(again.bad) == set(expected.bad) == names
    # Mapped from the file, and nothing is left of the writing.
    (folder,) = (tmp_path / "features").iterdir()
    if (maps := Path("/proc/self/maps")).exists():
        assert str(folder / "features.bin") in maps.read_text()
    assert {path.name for path in folder.iterdir()} == {"features.bin", "index.bin", "manifest.json", "lock"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_features_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    autocast = None if dtype == torch.float32 else dtype
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(9 * 8 * 3, 5))
    expected = context(tmp_path, backbone, autocast=autocast, cache=None).features("train", source=array())
    found = context(tmp_path, backbone, autocast=autocast).features("train", source=array())
    assert same(found, expected) and found.features.dtype == dtype


def of_ranks(folder: Path, data: DataConfig) -> tuple[torch.Tensor, ...]:
    module.SHARD = 5
    found = context(folder, data=data).features("train")
    return tuple(value.clone() for value in found[:3])


@pytest.mark.slow
@pytest.mark.parametrize("writers, readers", [(2, 3), (3, 1)])
def test_any_number_of_ranks_reads_what_others_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    data = folder_of(tmp_path / "data", bad_of("some"))
    expected = context(tmp_path, data=data, cache=None).features("train")
    written = run_ranks(of_ranks, writers, tmp_path, data)
    read = run_ranks(of_ranks, readers, tmp_path, data) if readers > 1 else [of_ranks(tmp_path, data)]
    for shards in (written, read):
        assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*shards), expected[:3]))
    for number, (_, _, index) in enumerate(read):
        assert set(index.tolist()) <= set(evaluation_share(COUNT, 1.0, number, readers).tolist())
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_stop_costs_no_more_than_a_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = context(tmp_path, cache=None).features("train", source=array())
    backbone = Small()
    backbone.stop_at = 17
    with pytest.raises(Stopped):
        context(tmp_path, backbone).features("train", source=array())
    # Batches of 4 and shards of 5 or more: 16 images are on the disk.
    backbone = Small()
    with caplog.at_level(logging.INFO):
        found = context(tmp_path, backbone).features("train", source=array())
    assert backbone.seen == COUNT - 16 and same(found, expected)
    assert "16 are there already" in caplog.text


@pytest.mark.slow
def test_ranks_continue_what_one_rank_left(tmp_path: Path) -> None:
    expected = context(tmp_path, cache=None).features("train", source=array())
    backbone = Small()
    backbone.stop_at = 10
    with pytest.raises(Stopped):
        context(tmp_path, backbone).features("train", source=array())
    again = run_ranks(of_array, 2, tmp_path)
    assert torch.equal(torch.cat([features for features, _ in again]), expected.features)
    assert [seen for _, seen in again] == [8, 7]


def of_array(folder: Path) -> tuple[torch.Tensor, int]:
    module.SHARD = 5
    backbone = Small()
    found = context(folder, backbone).features("train", source=array())
    return found.features.clone(), backbone.seen


def test_a_share_that_is_left_may_have_no_readable_image(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", (20, 21, 22))
    backbone = Small()
    backbone.stop_at = 20 - 1
    expected = context(tmp_path, data=data, cache=None).features("train")
    with pytest.raises(Stopped):
        context(tmp_path, backbone, data).features("train")
    assert same(context(tmp_path, data=data).features("train"), expected)


def spoil_row(folder: Path) -> None:
    data = bytearray((folder / "features.bin").read_bytes())
    data[100] ^= 1
    (folder / "features.bin").write_bytes(data)


def shorten(folder: Path) -> None:
    (folder / "features.bin").write_bytes((folder / "features.bin").read_bytes()[:-24])


def shift_index(folder: Path) -> None:
    (np.fromfile(folder / "index.bin", dtype="<i8")[::-1]).tofile(folder / "index.bin")


def other_settings(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["weights"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "a bit": spoil_row,
    "short": shorten,
    "index": shift_index,
    "foreign": other_settings,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"rows": 2'),
    "a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "no features": lambda folder: (folder / "features.bin").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_the_features_are_made_again(tmp_path: Path, kind: str) -> None:
    first = context(tmp_path).features("train", source=array())
    expected = FeatureSet(first.features.clone(), *first[1:])
    (folder,) = (tmp_path / "features").iterdir()
    DAMAGE[kind](folder)
    backbone = Small()
    assert same(context(tmp_path, backbone).features("train", source=array()), expected) and backbone.seen == COUNT
    assert same(context(tmp_path, backbone).features("train", source=array()), expected) and backbone.seen == COUNT


def test_damage_to_a_shard_that_is_written_is_noticed(tmp_path: Path) -> None:
    expected = context(tmp_path, cache=None).features("train", source=array())
    for spoil in (
        lambda f: next(f.glob("done-*")).write_text("{"),
        lambda f: (f / "features.partial").write_bytes(b"x"),
    ):
        backbone = Small()
        backbone.stop_at = 17
        with pytest.raises(Stopped):
            context(tmp_path, backbone).features("train", source=array())
        (folder,) = (tmp_path / "features").iterdir()
        spoil(folder)
        assert same(context(tmp_path).features("train", source=array()), expected)
        FeatureCache.clear(type("Folder", (), {"folder": folder})())


def test_what_features_depend_on_has_a_folder_of_its_own(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data")

    def folders(backbone: nn.Module | None = None, view: AugmentedView | None = None, **changes: Any) -> int:
        options = {name: changes.pop(name) for name in list(changes) if name == "autocast"}
        context(tmp_path, backbone, dataclasses.replace(data, **changes), **options).features("train", view=view)
        return len(list((tmp_path / "features").iterdir()))

    assert folders() == folders() == 1
    assert folders(Small(seed=1)) == 2
    assert folders(eval_size=7) == 3
    assert folders(eval_resize=10) == 4
    assert folders(mean=[0.1, 0.2, 0.3]) == 5
    assert folders(std=[0.1, 0.2, 0.3]) == 6
    assert folders(autocast=torch.bfloat16) == 7
    assert folders(view=AugmentedView(ViewConfig(size=8), seed=0, epoch=0)) == 8
    assert folders(view=AugmentedView(ViewConfig(size=8), seed=0, epoch=1)) == 9
    assert folders(view=AugmentedView(ViewConfig(size=8), seed=1, epoch=0)) == 10
    assert folders(view=AugmentedView(ViewConfig(size=8, flip_p=0.0), seed=0, epoch=0)) == 11
    # The same names with other contents.
    image = tmp_path / "data" / "train" / "b" / "010.png"
    Image.fromarray(array(seed=5).images[0]).save(image)
    assert folders() == 12
    assert folders() == 12


def test_splits_with_the_same_names_are_apart(tmp_path: Path) -> None:
    ours = context(tmp_path)
    one, other = (ours.features(split, source=array()) for split in ("train", "test"))
    assert torch.equal(one.features, other.features) and len(list((tmp_path / "features").iterdir())) == 2


def test_labels_are_those_of_the_source_now(tmp_path: Path) -> None:
    first = context(tmp_path).features("train", source=array())
    relabelled = dataclasses.replace(array(), labels=3 - array().labels)
    assert torch.equal(context(tmp_path).features("train", source=relabelled).labels, 3 - first.labels)


@pytest.mark.parametrize("after", [0, 1, 2], ids=["at-once", "after-one", "after-two"])
def test_a_full_disk_is_one_line_and_keeps_what_was_written(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def full(*arguments: Any, pwrite: Any = os.pwrite) -> int:
        written.append(0)
        if len(written) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        kept = f"{8 * after} of 23 images are kept"
        with pytest.raises(UserError, match=f"No space left on device; free some space and start again: .*{kept}"):
            context(tmp_path).features("train", source=array())
    backbone = Small()
    context(tmp_path, backbone).features("train", source=array())
    assert backbone.seen == COUNT - 8 * after


def test_a_folder_that_is_being_written_is_refused(tmp_path: Path) -> None:
    ours = context(tmp_path)
    ours.features("train", source=array())
    (folder,) = (tmp_path / "features").iterdir()
    (folder / "manifest.json").unlink()
    cache = FeatureCache(tmp_path, {}, 1)
    cache.folder = folder
    with cache.writing(), pytest.raises(UserError, match="another program writes to"):
        ours.features("train", source=array())


def test_no_readable_image_is_one_line(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", tuple(range(COUNT)))
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 23 images can be read"):
            context(tmp_path, data=data).features("train")


def test_images_without_labels_need_permission(tmp_path: Path) -> None:
    source = dataclasses.replace(array(), classes=[], labels=np.full(COUNT, -1))
    with pytest.raises(UserError, match="have no labels"):
        context(tmp_path).features("train", source=source)
    assert context(tmp_path).features("train", source=source, labelled=False).labels.eq(-1).all()


@pytest.mark.parametrize("loader", ["torchvision", "memory", "dali"])
def test_augmented_views_are_those_of_training(tmp_path: Path, loader: str) -> None:
    """Whatever the batches are, an image has the view that the training loader draws for (seed, epoch, image)."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    data = dataclasses.replace(folder_of(tmp_path / "data"), loader=loader)
    source, view = build_source(data, "train"), ViewConfig(size=8)
    found = context(tmp_path, data=data).features("train", view=AugmentedView(view, seed=3, epoch=2))
    plain = context(tmp_path, data=data, cache=None).features("train", view=AugmentedView(view, seed=3, epoch=2))
    training = build_train_loader(data, [view], batch_size=7, seed=3, source=source)
    batches = list(training.batches(epoch=2))
    training.close()
    index = torch.cat([batch.index for batch in batches])
    with torch.no_grad():
        expected = Small().eval()(torch.cat([batch.views[0] for batch in batches]))
    assert found.index.tolist() == plain.index.tolist() == list(range(COUNT)) and len(index) == 21
    torch.testing.assert_close(found.features[index], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain.features, found.features, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found.features, context(tmp_path, data=data).features("train").features, atol=1e-2)


def test_an_image_that_cannot_be_read_has_no_augmented_view(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", bad_of("some"))
    view = AugmentedView(ViewConfig(size=8), seed=3, epoch=2)
    found = context(tmp_path, data=data).features("train", view=view)
    assert set(found.index.tolist()) == set(range(COUNT)) - set(bad_of("some")) and len(found.bad) == 8


def test_the_context_folds_the_backbone(tmp_path: Path) -> None:
    pretrained = Pretrained(Small().eval(), "small", BackboneConfig(), 3)
    options = dict(device=torch.device("cpu"), autocast=None, batch_size=4, seed=0, folder=tmp_path)
    made = Context(pretrained, DataConfig(source="embedded"), **options)
    found = made.features("train", source=array()).features
    assert not any(isinstance(part, nn.BatchNorm2d) for part in made.folded.made.modules())
    expected = context(tmp_path, cache=None).features("train", source=array()).features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
