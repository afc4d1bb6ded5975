"""The in-memory loader: order, shards, resume, replaced images, and what it refuses."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from caco_fast.data import build_train_loader
from caco_fast.data.config import DataConfig, ViewConfig
from caco_fast.data.loaders import in_memory
from caco_fast.data.loaders.base import epoch_order
from caco_fast.data.loaders.in_memory import MemoryLoader
from caco_fast.data.loaders.torchvision import TorchvisionLoader
from caco_fast.data.sources.base import ArraySource, BadImageError
from caco_fast.errors import UserError

EMBEDDED = DataConfig(source="embedded")
VIEWS = [ViewConfig(count=2, size=12, solarize_p=0.2), ViewConfig(size=8, scale=(0.1, 0.3))]
# Crops and flips off, so that a view is its image, normalised.
PLAIN = ViewConfig(size=12, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_p=0, jitter_p=0, grey_p=0, blur_p=0)


@dataclass
class PatchySource:
    """Another source with some of its images unreadable."""

    good: ArraySource
    broken: set[int] = field(default_factory=set)

    def __getattr__(self, name: str) -> object:
        return getattr(self.good, name)

    def __len__(self) -> int:
        return len(self.good)

    def image(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise BadImageError("no image at all")
        return self.good.image(index)


def make(source: ArraySource | PatchySource, views: list[ViewConfig] = VIEWS, **options: object) -> MemoryLoader:
    config = options.pop("config", EMBEDDED)
    return MemoryLoader(source, config, views, **({"batch_size": 10, "seed": 3} | options))


def plain_pixels(source: ArraySource, index: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(source.images[index]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (source.mean, source.std))
    return (pixels - mean) / std


def test_batches_hold_the_views_in_order_and_every_image_once(colour_source: ArraySource) -> None:
    loader = make(colour_source, batch_size=15)
    batches = list(loader.batches(0))
    assert len(batches) == loader.steps_per_epoch == 3
    assert [list(view.shape) for view in batches[0].views] == [[15, 3, 12, 12], [15, 3, 12, 12], [15, 3, 8, 8]]
    assert not torch.equal(batches[0].views[0], batches[0].views[1])
    index = torch.cat([batch.index for batch in batches])
    assert index.dtype == torch.int64 and np.array_equal(index, epoch_order(3, 0, 50)[:45])


def test_order_is_that_of_the_torchvision_loader(colour_source: ArraySource) -> None:
    other = TorchvisionLoader(colour_source, DataConfig(source="embedded", workers=0), [PLAIN], batch_size=10, seed=3)
    ours = make(colour_source, [PLAIN])
    for epoch in (-1, 0, 1):
        for mine, theirs in zip(ours.batches(epoch, 2), other.batches(epoch, 2), strict=True):
            assert torch.equal(mine.index, theirs.index)
            assert torch.allclose(mine.views[0], theirs.views[0], atol=1e-5)


def test_unaugmented_view_is_the_normalised_image(colour_source: ArraySource) -> None:
    batch = next(make(colour_source, [PLAIN]).batches(0))
    assert torch.allclose(batch.views[0], plain_pixels(colour_source, batch.index.numpy()), atol=1e-5)


def test_mean_and_std_of_the_settings_replace_the_sources(colour_source: ArraySource) -> None:
    config = DataConfig(source="embedded", mean=[0.0, 0.0, 0.0], std=[0.5, 0.5, 0.5])
    batch = next(make(colour_source, [PLAIN], config=config).batches(0))
    pixels = torch.from_numpy(colour_source.images[batch.index]).permute(0, 3, 1, 2) / 255
    assert torch.allclose(batch.views[0], 2 * pixels, atol=1e-5)


def test_folder_of_images_of_one_size_is_held_too(image_folder: Path) -> None:
    config = DataConfig(path=str(image_folder), loader="memory")
    loader = build_train_loader(config, VIEWS, batch_size=4, seed=0)
    assert isinstance(loader, MemoryLoader)
    assert [list(view.shape) for view in next(loader.batches(0)).views] == [
        [4, 3, 12, 12],
        [4, 3, 12, 12],
        [4, 3, 8, 8],
    ]


def test_epochs_and_seeds_differ_and_repeat(colour_source: ArraySource) -> None:
    first = next(make(colour_source).batches(0))
    again = next(make(colour_source).batches(0))
    assert all(torch.equal(*pair) for pair in zip(first.views, again.views, strict=True))
    other_epoch, other_seed = (
        next(loader.batches(e)) for loader, e in ((make(colour_source), 1), (make(colour_source, seed=4), 0))
    )
    assert not torch.equal(first.index, other_epoch.index) and not torch.equal(first.index, other_seed.index)
    # The same image looks different in another epoch.
    once, later = (
        dict(zip(b.index.tolist(), b.views[0])) for b in (first, *make(colour_source, batch_size=50).batches(1))
    )
    assert not any(torch.allclose(view, later[index]) for index, view in once.items())


@pytest.mark.parametrize("epoch", [-1, 2])
def test_resumed_epoch_is_bit_for_bit_the_rest(colour_source: ArraySource, epoch: int) -> None:
    whole, resumed = list(make(colour_source).batches(epoch)), list(make(colour_source).batches(epoch, 3))
    assert len(resumed) == 2
    for left, right in zip(whole[3:], resumed, strict=True):
        assert torch.equal(left.index, right.index)
        assert all(torch.equal(*pair) for pair in zip(left.views, right.views, strict=True))


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_batch_that_one_rank_would_see(colour_source: ArraySource, world_size: int) -> None:
    alone = list(make(colour_source).batches(1))
    loaders = [make(colour_source, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(alone, *(loader.batches(1) for loader in loaders), strict=True):
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        for number, view in enumerate(whole.views):
            assert torch.allclose(torch.cat([part.views[number] for part in parts]), view, atol=1e-5)


def test_views_do_not_depend_on_the_chunks_of_the_cpu(
    colour_source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = next(make(colour_source).batches(0))
    monkeypatch.setattr(in_memory, "_CPU_CHUNK", 3)
    chunked = next(make(colour_source).batches(0))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(whole.views, chunked.views, strict=True))


@pytest.mark.parametrize(
    "replaced", [{7: 9, 8: 9, 48: 0, 49: 0}, {0: 2, 1: 2, 49: 2}], ids=["in the middle", "at both ends"]
)
def test_bad_images_are_replaced_by_the_next_good_one_and_named(
    colour_source: ArraySource, replaced: dict[int, int]
) -> None:
    config = DataConfig(source="embedded", bad_image_limit=0.1, workers=0)
    patchy = PatchySource(colour_source, set(replaced))
    loader = make(patchy, [PLAIN], config=config, batch_size=50)
    (batch,) = loader.batches(0)
    assert loader.bad_images == {f"random image {index}": "no image at all" for index in replaced}
    assert batch.index.tolist() == [replaced.get(index, index) for index in epoch_order(3, 0, 50)]
    assert torch.allclose(batch.views[0], plain_pixels(colour_source, batch.index.numpy()), atol=1e-5)
    (other,) = TorchvisionLoader(patchy, config, [PLAIN], batch_size=50, seed=3).batches(0)
    assert torch.equal(batch.index, other.index)


def test_a_replaced_image_leaves_all_other_views_as_they_were(colour_source: ArraySource) -> None:
    config = DataConfig(source="embedded", bad_image_limit=0.1)
    (whole,) = make(colour_source, batch_size=50).batches(0)
    (patched,) = make(PatchySource(colour_source, {5}), config=config, batch_size=50).batches(0)
    same = whole.index != 5
    for left, right in zip(whole.views, patched.views, strict=True):
        assert torch.equal(left[same], right[same]) and not torch.equal(left[~same], right[~same])


@pytest.mark.parametrize(
    "broken, limit", [({4, 5}, 0.02), (set(range(50)), 1.0)], ids=["over the limit", "all of them"]
)
def test_too_many_bad_images_are_refused(colour_source: ArraySource, broken: set[int], limit: float) -> None:
    with pytest.raises(UserError, match="can(.)t be read|can be read"):
        make(PatchySource(colour_source, broken), config=DataConfig(source="embedded", bad_image_limit=limit))


def test_images_of_differing_size_are_refused(colour_source: ArraySource) -> None:
    patchy = PatchySource(colour_source)
    patchy.image = lambda index: colour_source.images[index][: 12 - (index == 30)]
    with pytest.raises(UserError, match="image 30 has 12 x 11 pixels.* 12 x 12.*data.loader=torchvision"):
        make(patchy)


def test_a_set_too_large_for_memory_is_refused(colour_source: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = colour_source.images.size
    monkeypatch.setattr(in_memory, "free_bytes", lambda device: 2 * pixels)
    make(colour_source)
    with pytest.raises(UserError, match="more than half.*data.loader=torchvision"):
        make(colour_source, rank=0, world_size=2)


def test_free_memory_is_known_and_plausible() -> None:
    assert 2**20 < in_memory.free_bytes(torch.device("cpu")) < 2**50


def test_too_few_images_are_refused(colour_source: ArraySource) -> None:
    with pytest.raises(UserError, match="fewer than one batch"):
        make(colour_source, batch_size=51)


def test_thread_ends_with_the_epoch_and_when_it_is_left(colour_source: ArraySource) -> None:
    # Loaders of other tests may still have threads, so only new ones count.
    others = set(threading.enumerate())

    def threads() -> set[threading.Thread]:
        return set(threading.enumerate()) - others

    loader = make(colour_source)
    epoch = loader.batches(0)
    next(epoch)
    assert threads()
    epoch.close()
    assert not threads()
    assert len(list(loader.batches(0))) == 5
    assert not threads()


def test_errors_in_the_thread_reach_the_caller(colour_source: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(colour_source)
    epoch = loader.batches(0)
    next(epoch)

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of chalk")

    monkeypatch.setattr(in_memory, "make_views", fail)
    with pytest.raises(RuntimeError, match="out of chalk"):
        list(epoch)


def test_views_need_no_gradient_and_leave_the_generators_alone(colour_source: ArraySource) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    batch = next(make(colour_source).batches(0))
    assert not batch.views[0].requires_grad and not batch.views[0].is_inference()
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_closed_loader_says_so(colour_source: ArraySource) -> None:
    loader = make(colour_source)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.batches(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_views_on_a_gpu_are_those_of_the_cpu_and_nothing_waits(colour_source: ArraySource) -> None:
    expected, loader = list(make(colour_source).batches(0)), make(colour_source, device="cuda")
    batches = loader.batches(0)
    found = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += batches
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for left, right in zip(expected, found, strict=True):
        assert torch.equal(left.index, right.index)
        assert all(torch.allclose(mine, view.cpu(), atol=1e-4) for mine, view in zip(left.views, right.views))


def test_autocast_of_the_trainer_does_not_reach_the_pixels(colour_source: ArraySource) -> None:
    loader = make(colour_source)
    index = np.arange(10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loader._batch(0, index)
    assert all(torch.equal(*pair) for pair in zip(inside.views, loader._batch(0, index).views, strict=True))
