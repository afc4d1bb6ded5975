"""The emulated kernels, and caco_fast.ops.cuda running on them."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

from caco_fast.ops import backends
from tests.csrc import cases
from tests.csrc.cases import PATHS
from tests.emulation import build as emulated_build


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module caco_fast._C with kernels that run on the CPU; built once, kept in build/emulated."""
    reason = emulated_build.missing_tool()
    if reason:
        pytest.skip(reason)
    return emulated_build.build_module()


@pytest.fixture(params=PATHS, ids=lambda path: f"sm{path}")
def path(request: pytest.FixtureRequest) -> int:
    """The kernel path that the operations of `cuda_ops` run on."""
    return request.param


@pytest.fixture
def device() -> torch.device:
    """Where tests make their tensors; tests/gpu has one of its own."""
    return torch.device("cpu")


@pytest.fixture
def cuda_ops(emulated: ModuleType, path: int, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """caco_fast.ops.cuda over the emulated kernels, answering `backend="cuda"` for CPU tensors.

    The emulated GPU has three multiprocessors, so that a bank of a few hundred rows is already split. Memory from
    torch.empty is filled with NaN.
    """
    monkeypatch.setitem(sys.modules, "caco_fast._C", emulated)
    monkeypatch.setattr("caco_fast._C", emulated, raising=False)
    monkeypatch.delitem(sys.modules, "caco_fast.ops.cuda", raising=False)
    module = importlib.import_module("caco_fast.ops.cuda")
    monkeypatch.setattr(module, "available", lambda device: True)
    monkeypatch.setattr(module, "target_for", lambda device: emulated.Target(path, 0, 3, 0))
    monkeypatch.setattr(cases, "with_bfloat16", emulated.Target(path, 0, 3, 0).takes_bfloat16)
    backends.cuda_backend.cache_clear()
    emulated.set_schedule()
    emulated.take_counters()
    torch.use_deterministic_algorithms(True)
    yield module
    torch.use_deterministic_algorithms(False)
    sys.modules.pop("caco_fast.ops.cuda", None)
    backends.cuda_backend.cache_clear()
