"""The backends that the tests of the operations run on: plain torch, the emulated kernels of each path, and a GPU.

Test bodies make CPU tensors. On a GPU the operations are wrapped, so that they copy tensors there and back.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# Deterministic matrix products need it in the references; it is read when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch import Tensor

from caco_fast.ops import dispatch
from tests.emulation import build as emulation

# The families of kernels, as csrc/bank.h numbers them.
PATHS = (70, 80, 90)
PLAIN = ("reference", "tiled")
EMULATED = tuple(f"sm{path}" for path in PATHS)
GPU = tuple(pytest.param(name, marks=pytest.mark.gpu) for name in ("gpu", "gpu sm80"))
KERNELS = (*EMULATED, *GPU)
# Of each operation: its implementation on the kernels, and how many of its first arguments it writes.
CUDA = (
    ("caco_fast.ops.bank_attend", "attend_cuda", 0),
    ("caco_fast.ops.bank_select", "select_cuda", 0),
    ("caco_fast.ops.bank_step", "step_cuda_", 2),
)


def over(*names: Any) -> pytest.MarkDecorator:
    """Run a test over these backends, which its fixture `backend` sets up."""
    return pytest.mark.parametrize("backend", names, indirect=True)


@dataclass(frozen=True)
class Backend:
    name: str  # as the operations take it
    bfloat16: bool = True  # whether its products run in bf16
    emulated: ModuleType | None = None

    def operand(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the products of these rows."""
        return torch.float16 if dtype == torch.float16 or not self.bfloat16 else torch.bfloat16

    def set_schedule(self, **settings: Any) -> None:
        if self.emulated is not None:
            self.emulated.set_schedule(**settings)

    def take(self, counter: str) -> int:
        """What the emulator has counted since; a GPU counts nothing."""
        return 0 if self.emulated is None else int(self.emulated.take_counters()[counter])


@functools.cache
def emulated_module() -> ModuleType:
    return emulation.build_module()


def kernels_over(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, path: int) -> ModuleType:
    """caco_fast.ops.kernels over the emulated ones, which answer for CPU tensors.

    The emulated GPU has three multiprocessors, so that a bank of a few hundred rows is already split. Memory from
    torch.empty is filled with NaN.
    """
    monkeypatch.setitem(sys.modules, "caco_fast._C", emulated)
    monkeypatch.setattr("caco_fast._C", emulated, raising=False)
    monkeypatch.delitem(sys.modules, "caco_fast.ops.kernels", raising=False)
    module = importlib.import_module("caco_fast.ops.kernels")
    monkeypatch.setattr(module, "available", lambda device: True)
    monkeypatch.setattr(module, "serving_path", lambda device: path)
    monkeypatch.setattr(module, "target_for", lambda device: emulated.Target(path, 0, 3, 0))
    dispatch.cuda_backend.cache_clear()
    emulated.set_schedule()
    emulated.take_counters()
    return module


def drop_kernels() -> None:
    sys.modules.pop("caco_fast.ops.kernels", None)
    dispatch.cuda_backend.cache_clear()


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module caco_fast._C with kernels that run on the CPU; built once, kept in build/emulated."""
    if reason := emulation.missing_tool():
        pytest.skip(reason)
    return emulated_module()


@pytest.fixture
def filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=PATHS, ids=lambda path: f"sm{path}")
def path(request: pytest.FixtureRequest) -> int:
    """The kernel path of `cuda_ops`."""
    return int(request.param)


@pytest.fixture
def cuda_ops(
    emulated: ModuleType, path: int, monkeypatch: pytest.MonkeyPatch, filled_memory: None
) -> Iterator[ModuleType]:
    """caco_fast.ops.kernels over the emulated kernels of one path."""
    yield kernels_over(emulated, monkeypatch, path)
    drop_kernels()


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    name = request.param
    if name not in ("auto", *PLAIN):
        request.getfixturevalue("filled_memory")
    if name in EMULATED:
        module, number = request.getfixturevalue("emulated"), int(name[2:])
        kernels_over(module, monkeypatch, number)
        yield Backend("cuda", bool(module.Target(number, 0, 3, 0).takes_bfloat16), module)
        drop_kernels()
    elif name.startswith("gpu"):
        yield on_gpu(monkeypatch, sm80=name.endswith("sm80"))
    else:
        yield Backend(name)


def missing_gpu() -> str | None:
    """Why nothing runs on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    kernels = dispatch.cuda_backend()
    if kernels is None:
        return "no compiled kernels; run `python setup.py build_ext`"
    return kernels.why_not(torch.device("cuda"))


def choose_path(monkeypatch: pytest.MonkeyPatch, sm80: bool) -> ModuleType:
    """The compiled kernels of this GPU's path, or those of sm80."""
    if reason := missing_gpu():
        pytest.skip(reason)
    device, kernels = torch.device("cuda"), dispatch.cuda_backend()
    if sm80:
        if kernels.serving_path(device) == 80:
            pytest.skip("sm80 is the path of this GPU")
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("this GPU is older than sm_80")
        monkeypatch.setattr(kernels, "serving_path", lambda device: 80 if device.type == "cuda" else 0)
    return kernels


def on_gpu(monkeypatch: pytest.MonkeyPatch, sm80: bool) -> Backend:
    device, kernels = torch.device("cuda"), choose_path(monkeypatch, sm80)
    for module_name, name, written in CUDA:
        module = importlib.import_module(module_name)
        monkeypatch.setattr(module, name, there_and_back(device, getattr(module, name), written))
    monkeypatch.setattr(kernels, "available", lambda device: True)
    return Backend("cuda", bool(kernels.target_for(device).takes_bfloat16))


def there_and_back(device: torch.device, operation: Callable[..., Any], written: int) -> Callable[..., Any]:
    """The operation for CPU tensors: it copies them to the device, and its results and what it wrote back."""

    def call(*arguments: Any) -> Any:
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
        results = operation(*moved)
        for value, copy in zip(arguments[:written], moved):
            value.copy_(copy)
        return None if results is None else tuple(result.cpu() for result in results)

    return call
