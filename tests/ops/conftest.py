"""One thread, a fixed seed, and small tiles for the tests of the bank operations."""

import pytest
import torch

from caco_fast.ops import tiling


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 3 x 4, so that small inputs cross tile borders and end in ragged tiles."""
    monkeypatch.setattr(tiling, "CPU_TILE_ROWS", 3)
    monkeypatch.setattr(tiling, "CPU_TILE_ELEMENTS", 12)
    monkeypatch.setattr(tiling, "TILE_BANK_ROWS_MIN", 1)


@pytest.fixture
def fresh_compile():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
