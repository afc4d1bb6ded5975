"""The backends, small tiles and a fresh compiler for the tests of the operations."""

import pytest
import torch

from caco_fast.ops import tiling
from tests.ops.backends import backend, cuda_ops, emulated, filled_memory, path

__all__ = ["backend", "cuda_ops", "emulated", "filled_memory", "path"]


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
