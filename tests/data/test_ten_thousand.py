"""Ten thousand files over four ranks and three epochs: each exactly once an epoch, up to what fills no batch.

Every file is of one colour, its number, so that what arrives is known by its pixels.

Legend: N files.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from caco_fast.data import DataConfig, ViewConfig, build_source, build_train_loader
from caco_fast.data.loaders.base import epoch_order, step_share, steps_per_epoch

N = 10_000
RANKS, EPOCHS = 4, 3


def png(number: int, width: int, height: int) -> bytes:
    """A PNG of one colour: red, green and blue are the number's three bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + number.to_bytes(3, "big") * width
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(row * height, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """N files of 1 x 1 to 8 x 8 pixels in ten classes; a file's number is its place in the sorted list."""
    folder = tmp_path_factory.mktemp("ten_thousand")
    for label in range(10):
        place = folder / "train" / f"{label}"
        place.mkdir(parents=True)
        for number in range(label * N // 10, (label + 1) * N // 10):
            (place / f"{number:05}.png").write_bytes(png(number, 1 + number % 8, 1 + number // 8 % 8))
    return folder


def numbers(view: torch.Tensor) -> list[int]:
    """The files' numbers from views of one pixel, [B, 3, 1, 1]."""
    levels = (view[:, :, 0, 0] * 255).round().long()
    return (levels * torch.tensor([65536, 256, 1])).sum(1).tolist()


def test_the_listing_holds_every_file_once_in_order(files: Path) -> None:
    source = build_source(DataConfig(path=str(files)), "train")
    assert [int(Path(source.name(index)).stem) for index in range(len(source))] == list(range(N))
    assert [source.label(index) for index in range(N)] == [index // 1000 for index in range(N)]


@pytest.mark.parametrize("batch_size", [256, 500, 4096, 9996])
@pytest.mark.parametrize("length", [N, N - 1, N + 3])
def test_every_index_comes_once_an_epoch_up_to_the_last_batch(length: int, batch_size: int) -> None:
    steps = steps_per_epoch(length, batch_size, RANKS)
    dropped = []
    for epoch in range(EPOCHS):
        order = epoch_order(7, epoch, length)
        shares = [
            np.concatenate([step_share(order, step, batch_size, rank, RANKS) for step in range(steps)])
            for rank in range(RANKS)
        ]
        assert len({len(share) for share in shares}) == 1
        seen = np.concatenate(shares)
        assert np.array_equal(np.sort(seen), np.sort(order[: steps * batch_size]))
        assert len(np.unique(seen)) == len(seen) and length - len(seen) < batch_size
        dropped.append(frozenset(order[steps * batch_size :].tolist()))
    # Other images are left out in every epoch.
    assert len(set(dropped)) == (EPOCHS if length % batch_size else 1)


# PIL and torchvision take 0.6 ms for even the smallest file.
@pytest.mark.parametrize(("loader", "epochs"), [("torchvision", 1), ("dali", EPOCHS)])
def test_the_loaders_of_four_ranks_give_every_file_once_an_epoch(files: Path, loader: str, epochs: int) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    config = DataConfig(path=str(files), loader=loader, workers=0, mean=[0.0] * 3, std=[1.0] * 3)
    plain = ViewConfig(size=1, flip_p=0, jitter_p=0, grey_p=0, blur_p=0)
    batch_size = 1536
    loaders = [
        build_train_loader(config, [plain], batch_size=batch_size, seed=7, rank=rank, world_size=RANKS)
        for rank in range(RANKS)
    ]
    orders = []
    for epoch in range(epochs):
        shares = []
        for rank_loader in loaders:
            shares.append([])
            for batch in rank_loader.batches(epoch):
                assert numbers(batch.views[0]) == batch.index.tolist()
                shares[-1] += batch.index.tolist()
        assert [len(share) for share in shares] == [6 * batch_size // RANKS] * RANKS
        seen = [index for share in shares for index in share]
        assert sorted(seen) == sorted(epoch_order(7, epoch, N)[: 6 * batch_size].tolist())
        assert len(set(seen)) == len(seen) == 9216
        orders.append(tuple(seen))
    assert len(set(orders)) == epochs
    for rank_loader in loaders:
        assert rank_loader.bad_images == {}
        rank_loader.close()
