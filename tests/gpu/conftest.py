"""The compiled kernels on a GPU, each path that runs there."""

import pytest
import torch

from tests.ops.backends import choose_path, filled_memory

__all__ = ["filled_memory"]


@pytest.fixture(params=["of this GPU", "sm80"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, filled_memory: None) -> torch.device:
    """A GPU whose launches go to one path; memory from torch.empty is filled with NaN."""
    choose_path(monkeypatch, sm80=request.param == "sm80")
    return torch.device("cuda")
