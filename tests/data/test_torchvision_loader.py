import os
import pickle
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from caco_fast.data import ArraySource, Batch, DataConfig, ViewConfig, build, build_train_loader
from caco_fast.data.loaders import torchvision as module
from caco_fast.data.loaders.base import epoch_order
from caco_fast.data.loaders.torchvision import TorchvisionLoader, ViewBatches
from caco_fast.data.sources.folder import FolderSource
from caco_fast.errors import UserError
from tests.engine.replay import NoHostWaits

VIEWS = [ViewConfig(size=8, blur_p=1.0), ViewConfig(size=8, blur_p=0.1, solarize_p=0.2)]


def config(workers: int = 0) -> DataConfig:
    return DataConfig(source="embedded", loader="torchvision", workers=workers)


def read(source: ArraySource, workers: int = 0, epochs: tuple[int, ...] = (0,), first_step: int = 0, **options):
    """All batches of the epochs, by a loader of its own."""
    loader = TorchvisionLoader(source, config(workers), VIEWS, **{"batch_size": 12, "seed": 1, **options})
    batches = [batch for epoch in epochs for batch in loader.batches(epoch, first_step)]
    loader.close()
    return batches


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.index, b.index) and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(colour_source: ArraySource, workers: int) -> None:
    epochs = (-1, 0, 1)
    assert same(read(colour_source, 0, epochs), read(colour_source, workers, epochs))


def test_epochs_and_seeds_give_other_orders_and_other_views(colour_source: ArraySource) -> None:
    runs = [read(colour_source, epochs=(epoch,), seed=seed) for seed in (0, 1) for epoch in (-1, 0, 1)]
    assert len({tuple(batch.index.tolist()) for run in runs for batch in run}) == 6 * 4
    # The same image, found in two epochs, is augmented differently.
    first, second = runs[1], runs[2]
    views = [{int(i): view for batch in run for i, view in zip(batch.index, batch.views[0])} for run in (first, second)]
    shared = views[0].keys() & views[1].keys()
    assert shared and not any(torch.equal(views[0][index], views[1][index]) for index in shared)


def test_views_are_normalised_without_numbers_from_the_host(colour_source, monkeypatch) -> None:
    """On a GPU each of them would be a copy that the host waits for."""
    loader = TorchvisionLoader(colour_source, config(), VIEWS, batch_size=12, seed=1)
    read_by_workers, raw = module.from_workers, []
    monkeypatch.setattr(module, "from_workers", lambda batches: raw.extend(read_by_workers(batches)) or raw)
    wanted = list(loader.batches(0))
    monkeypatch.setattr(module, "from_workers", lambda _: raw)
    with NoHostWaits(), monkeypatch.context() as patch:
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, lambda *_, **__: pytest.fail("a tensor is made of numbers"))
        found = list(loader.batches(0))
    assert len(found) == loader.steps_per_epoch and same(found, wanted)


def test_the_two_views_of_an_image_differ(colour_source: ArraySource) -> None:
    batch = read(colour_source)[0]
    assert (batch.views[0] != batch.views[1]).flatten(1).any(1).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_disjoint_shares_of_the_same_batches(colour_source: ArraySource, world_size: int) -> None:
    whole = read(colour_source)
    shares = [read(colour_source, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.index, torch.cat([share[step].index for share in shares]))
        for view in range(2):
            assert torch.equal(batch.views[view], torch.cat([share[step].views[view] for share in shares]))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_remaining_batches(colour_source: ArraySource, workers: int) -> None:
    whole = read(colour_source)
    for first_step in range(5):
        assert same(whole[first_step:], read(colour_source, workers, first_step=first_step))


def test_skipped_batches_are_not_decoded(colour_source: ArraySource, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    image = ArraySource.image
    monkeypatch.setattr(ArraySource, "image", lambda self, index: decoded.append(index) or image(self, index))
    batches = read(colour_source, first_step=3)
    assert decoded == batches[0].index.tolist() == epoch_order(1, 0, 50)[36:48].tolist()


def test_the_last_images_that_fill_no_batch_are_dropped(colour_source: ArraySource) -> None:
    loader = TorchvisionLoader(colour_source, config(), VIEWS, batch_size=12, seed=1)
    assert loader.steps_per_epoch == 4 == len(list(loader.batches(0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_broken_off_leaves_the_next_one_whole(colour_source: ArraySource, workers: int) -> None:
    loader = TorchvisionLoader(colour_source, config(workers), VIEWS, batch_size=12, seed=1)
    for _ in loader.batches(0):
        break
    assert same(list(loader.batches(1)), read(colour_source, epochs=(1,)))
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.batches(2))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_of_the_process_is_left_alone(colour_source: ArraySource, workers: int) -> None:
    def state() -> tuple:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = state()
    read(colour_source, workers, (0, 1))
    assert state() == before


def test_the_random_state_of_the_process_has_no_influence(colour_source: ArraySource) -> None:
    torch.manual_seed(1)
    first = read(colour_source)
    torch.manual_seed(2)
    assert same(first, read(colour_source))


def test_multi_crop_gives_each_entry_as_often_as_it_counts(colour_source: ArraySource) -> None:
    views = [ViewConfig(size=10, count=2, scale=(0.14, 1.0)), ViewConfig(size=6, count=3, scale=(0.05, 0.14))]
    loader = TorchvisionLoader(colour_source, config(), views, batch_size=4, seed=0)
    batch = next(loader.batches(0))
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 10, 10)] * 2 + [(4, 3, 6, 6)] * 3
    assert all(view.dtype == torch.float32 for view in batch.views) and batch.index.dtype == torch.int64
    assert not any(torch.equal(batch.views[2], batch.views[view]) for view in (3, 4))


def test_views_are_normalised_with_the_sources_or_the_given_numbers(colour_source: ArraySource) -> None:
    plain = ViewConfig(size=12, scale=(1, 1), ratio=(1, 1), flip_p=0, jitter_p=0, grey_p=0, blur_p=0)
    for mean, std in ((None, None), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])):
        settings = DataConfig(source="embedded", workers=0, mean=mean, std=std)
        batch = next(TorchvisionLoader(colour_source, settings, [plain], batch_size=4, seed=0).batches(0))
        pixels = torch.from_numpy(colour_source.images[batch.index.numpy()]).permute(0, 3, 1, 2) / 255
        wanted_mean = torch.tensor(mean or colour_source.mean).reshape(3, 1, 1)
        wanted_std = torch.tensor(std or colour_source.std).reshape(3, 1, 1)
        assert torch.allclose(batch.views[0], (pixels - wanted_mean) / wanted_std, atol=1e-5)


def test_the_embedded_set_trains_through_the_builder() -> None:
    loader = build_train_loader(config(), [ViewConfig(size=28, count=2)], batch_size=16, seed=0)
    assert loader.steps_per_epoch == 625
    batch = next(loader.batches(0))
    assert [tuple(view.shape) for view in batch.views] == [(16, 1, 28, 28)] * 2
    assert batch.index.tolist() == epoch_order(0, 0, 10_000)[:16].tolist()
    assert loader.bad_images == {}


@pytest.mark.parametrize("installed, large", [(True, "DaliLoader"), (False, "TorchvisionLoader")])
def test_auto_keeps_small_sets_in_memory_and_reads_folders(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, large: str
) -> None:
    if installed:
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    monkeypatch.setattr(build, "_dali_installed", lambda: installed)

    def kind(**settings: object) -> str:
        return type(build_train_loader(DataConfig(workers=0, **settings), VIEWS, batch_size=4, seed=0)).__name__

    assert kind(source="embedded") == "MemoryLoader"
    assert kind(source="embedded", loader="torchvision") == "TorchvisionLoader"
    assert kind(path=str(image_folder)) == large
    assert kind(path=str(image_folder), loader="memory") == "MemoryLoader"
    monkeypatch.setattr(build, "MEMORY_LIMIT", 10_000 * 28 * 28 - 1)
    assert kind(source="embedded") == large


def test_a_script_of_its_own_may_train_with_workers_and_end_as_it_likes(image_folder: Path, tmp_path: Path) -> None:
    """Without a guard around its body, and without closing the loader."""
    script = tmp_path / "script.py"
    script.write_text(
        "from caco_fast.data import DataConfig, ViewConfig, build_train_loader\n"
        f"data = DataConfig(path={str(image_folder)!r}, loader='torchvision', workers=2)\n"
        "loader = build_train_loader(data, [ViewConfig(size=16)], batch_size=4, seed=0)\n"
        "batches = loader.batches(0)\n"
        "print(tuple(next(batches).views[0].shape))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(4, 3, 16, 16)\n", "")


def test_workers_and_their_server_end_with_a_process_that_is_killed(image_folder: Path) -> None:
    lines = [
        "import time",
        "from caco_fast.data import DataConfig, ViewConfig, build_train_loader",
        f"data = DataConfig(path={str(image_folder)!r}, loader='torchvision', workers=2)",
        "batches = build_train_loader(data, [ViewConfig(size=16)], batch_size=4, seed=0).batches(0)",
        "next(batches)",
        "print('there', flush=True)",
        "time.sleep(600)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "there\n"
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_workers_can_be_started_afresh_and_not_only_forked(image_folder: Path) -> None:
    batches = ViewBatches(FolderSource(str(image_folder)), VIEWS, seed=0, bad_limit=0)
    copy = pickle.loads(pickle.dumps(batches))
    assert all(torch.equal(a, b) for a, b in zip(batches[3, [1, 7]].images, copy[3, [1, 7]].images, strict=True))


@pytest.mark.parametrize(
    ("settings", "views", "options", "line"),
    [
        ({"source": "imagenet"}, VIEWS, {}, r"data.source: found 'imagenet', expected one of folder, images, index, "),
        ({"loader": "daly"}, VIEWS, {}, r"data.loader: found 'daly'"),
        ({"jitter": "quick"}, VIEWS, {}, r"data.jitter: found 'quick', expected one of exact, fast"),
        ({"source": "folder"}, VIEWS, {}, r"data.path: found nothing"),
        ({"workers": -1}, VIEWS, {}, r"data.workers: found -1, expected 0 or more"),
        ({"mean": [0.5, 0.5, 0.5]}, VIEWS, {}, r"data.mean: found 3 values, expected 1"),
        ({"std": [0.0]}, VIEWS, {}, r"data.std: found \[0.0\]"),
        ({"bad_image_limit": 1.5}, VIEWS, {}, r"data.bad_image_limit: found 1.5"),
        ({}, [], {}, r"views: found none"),
        ({}, [VIEWS[0], ViewConfig(blur_p=2.0)], {}, r"views\[1\].blur_p: found 2.0"),
        ({}, [ViewConfig(scale=(0.5, 0.2))], {}, r"views\[0\].scale: found \[0.5, 0.2\]"),
        ({}, [ViewConfig(size=0)], {}, r"views\[0\].size: found 0"),
        ({}, VIEWS, {"batch_size": 20_000}, r"10000 images, fewer than one batch of 20000"),
        ({}, VIEWS, {"batch_size": 0}, r"batch_size: found 0"),
        ({}, VIEWS, {"batch_size": 10, "world_size": 4}, r"batch size 10 can't be shared evenly by 4 ranks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_settings_are_one_clear_line(settings: dict, views: list, options: dict, line: str) -> None:
    wrong = DataConfig(**{"source": "embedded", "loader": "torchvision", "workers": 0, **settings})
    with pytest.raises(UserError, match=line) as error:
        build_train_loader(wrong, views, **{"batch_size": 8, "seed": 0, **options})
    assert "\n" not in str(error.value)


_LOCK = threading.Lock()


class LockedSource(ArraySource):
    """Takes a lock to give an image, as a library might that has threads."""

    def image(self, index: int) -> np.ndarray:
        assert _LOCK.acquire(timeout=5), "held by a thread of another process"
        _LOCK.release()
        return super().image(index)


def test_a_lock_that_a_thread_holds_when_workers_start_is_free_in_them(colour_source: ArraySource) -> None:
    with _LOCK:
        assert len(read(LockedSource(**vars(colour_source)), workers=1)) == 4
