"""The compiled kernels on a GPU, each path that runs there, behind the fixtures of tests/csrc."""

import os
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

# What torch wants for deterministic matrix products of its own, in the references; read when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from caco_fast.ops import backends
from tests.csrc import cases

PATHS = ("of this GPU", "sm80")


def missing() -> str | None:
    """Why nothing runs here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    module = backends.cuda_backend()
    if module is None:
        return "no compiled kernels; run `python setup.py build_ext`"
    return module.why_not(torch.device("cuda"))


@pytest.fixture(params=PATHS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """caco_fast.ops.cuda sending its launches to one path; memory from torch.empty is filled with NaN."""
    if reason := missing():
        pytest.skip(reason)
    module = backends.cuda_backend()
    if request.param == "sm80":
        if module.serving_path(torch.device("cuda")) == 80:
            pytest.skip("sm80 is the path of this GPU")
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("this GPU is older than sm_80")
        monkeypatch.setattr(module, "serving_path", lambda device: 80 if device.type == "cuda" else 0)
    takes_bfloat16 = getattr(module.target_for(torch.device("cuda")), "takes_bfloat16", True)
    monkeypatch.setattr(cases, "with_bfloat16", takes_bfloat16, raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # for the NaN; a reference may do what it likes
    yield module
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device(kernels: ModuleType) -> torch.device:
    return torch.device("cuda")


def on(device: torch.device, operation: Callable, written: int) -> Callable:
    """The operation for CPU tensors: copies them to the device, and back its results and the first `written`
    arguments."""

    def call(*arguments: object) -> object:
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
        results = operation(*moved)
        for value, copy in zip(arguments[:written], moved):
            value.copy_(copy)
        return None if results is None else tuple(result.cpu() for result in results)

    return call


@pytest.fixture
def cuda_ops(kernels: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As in tests/csrc, `backend="cuda"` answers for CPU tensors, but by running on the GPU."""
    for name, written in (("attend", 0), ("select", 0), ("step_", 2)):
        monkeypatch.setattr(kernels, name, on(device, getattr(kernels, name), written))
    monkeypatch.setattr(kernels, "available", lambda device: True)
    return kernels


@pytest.fixture
def emulated() -> SimpleNamespace:
    """What tests/csrc ask of the emulator that a GPU does not count."""
    return SimpleNamespace(take_counters=lambda: {"bank_conflicts": 0}, set_schedule=lambda **settings: None)
