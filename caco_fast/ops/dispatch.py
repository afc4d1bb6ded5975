"""What every operation does before it computes: check its arguments, and find the backend that runs.

`reference` is dense and reads like the formula, `tiled` is plain torch in little memory, `cuda` the compiled kernels:
the module `caco_fast.ops.kernels`, which is imported on first use and may be absent.

Legend: R query or key rows, K bank rows, C channels.
"""

import functools
import importlib
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from caco_fast.ops.tiling import operand_dtype

BACKENDS = ("auto", "reference", "tiled", "cuda")
ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BANK_DTYPES = (torch.float32, torch.float64)
OPERAND_DTYPES = (torch.bfloat16, torch.float16)
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "f32", torch.float64: "f64"}


@functools.cache
def cuda_backend() -> ModuleType | None:
    """The module `caco_fast.ops.kernels`, or None if the kernels were not built."""
    try:
        return importlib.import_module("caco_fast.ops.kernels")
    except ModuleNotFoundError as error:
        # Any other missing module is a fault in the backend itself and must be seen.
        if error.name == "caco_fast._C":
            return None
        raise


def served_by_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `backend` means the compiled kernels for a bank of this dtype on this device."""
    kernels = cuda_backend()
    if kernels is None or backend not in ("auto", "cuda") or dtype == torch.float64:
        return False
    return bool(kernels.available(device))


class Choice(NamedTuple):
    """The backend that runs, and why it does."""

    backend: str
    reason: str


def choose(op: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """The named backend, or for `auto` the fastest that can run. A named backend is never replaced.

    op: who asks, for the error line. dtype: of the bank. Raises RuntimeError if the named backend is not there.
    """
    if backend == "auto":
        if dtype == torch.float64:
            return Choice("reference", "the bank is f64")
        reason = why_no_kernels(device)
        return Choice("cuda", "the kernels run on this device") if reason is None else Choice("tiled", reason)
    if backend == "cuda":
        kernels = cuda_backend()
        if kernels is None:
            raise RuntimeError(
                f"{op}: backend: found 'cuda' without compiled kernels, expected them; "
                "run `python setup.py build_ext`, or use backend='auto'"
            )
        if not kernels.available(device):
            raise RuntimeError(f"{op}: backend='cuda': {kernels.why_not(device)}, or use backend='auto'")
    return Choice(backend, "the settings name it")


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `choose` takes."""
    return choose(op, backend, device, dtype).backend


def why_no_kernels(device: torch.device) -> str | None:
    """Why the compiled kernels do not serve a device, or None if they do."""
    kernels = cuda_backend()
    if kernels is not None and kernels.available(device):
        return None
    if device.type != "cuda":
        return f"device is {device.type}"
    if kernels is None:
        return "the extension was not built (CACO_CUDA=1 python setup.py build_ext builds it)"
    return str(kernels.why_not(device))


def products(chosen: str, device: torch.device, dtype: torch.dtype) -> str:
    """The precision of the matrix products of rows in this dtype on a chosen backend, against an f32 bank."""
    kernels, rows = cuda_backend(), torch.empty(0, dtype=dtype)
    if chosen == "cuda" and kernels is not None:
        dtype = kernels.operand_dtype(rows, kernels.target_for(device))
    else:
        dtype = operand_dtype(rows) if chosen == "tiled" else torch.float32
    return PRECISIONS[dtype]


def check_backend(op: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")


def check_rows_and_bank(op: str, name: str, rows: Tensor, bank: Tensor) -> None:
    """Rows [R, C] and a bank [K, C] on one device, K >= 1; f64 rows go with an f64 bank and only with it."""
    check_tensor(op, name, rows)
    check_tensor(op, "bank", bank)
    if rows.dim() != 2:
        raise ValueError(f"{op}: {name}: found shape {shape(rows)}, expected [R, C]")
    if bank.dim() != 2 or bank.shape[0] == 0:
        raise ValueError(f"{op}: bank: found shape {shape(bank)}, expected [K, C] with at least one row")
    if rows.shape[1] != bank.shape[1]:
        raise ValueError(
            f"{op}: {name}: found shape {shape(rows)}, expected [R, {bank.shape[1]}] as the bank {shape(bank)}"
        )
    if rows.dtype not in ROW_DTYPES:
        raise TypeError(f"{op}: {name}: found {rows.dtype}, expected a floating dtype of 16 to 64 bits")
    if bank.dtype not in BANK_DTYPES:
        raise TypeError(f"{op}: bank: found {bank.dtype}, expected torch.float32 (or torch.float64)")
    if (rows.dtype == torch.float64) != (bank.dtype == torch.float64):
        raise TypeError(f"{op}: {name}: found {rows.dtype} with a {bank.dtype} bank, expected both float64 or neither")
    check_device(op, name, rows, bank)


def check_operand(op: str, operand: Tensor | None, bank: Tensor) -> None:
    """The unit rows of the bank in bf16 or fp16, padded with zeros to P columns: [K, P], or None."""
    if operand is None:
        return
    check_tensor(op, "operand", operand)
    if operand.dim() != 2 or operand.shape[0] != bank.shape[0] or operand.shape[1] < bank.shape[1]:
        raise ValueError(
            f"{op}: operand: found shape {shape(operand)}, expected [{bank.shape[0]}, P], a row a bank row"
        )
    if operand.dtype not in OPERAND_DTYPES:
        raise TypeError(f"{op}: operand: found {operand.dtype}, expected torch.bfloat16 or torch.float16")
    check_device(op, "operand", operand, bank)


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: found {type(value).__name__}, expected a tensor")


def check_flag(op: str, name: str, flag: Tensor | None, device: torch.device) -> None:
    """One f32 number on the device that the operation runs on, or None."""
    if flag is None:
        return
    check_tensor(op, name, flag)
    if flag.numel() != 1 or flag.dtype != torch.float32 or flag.device != device:
        found = f"{flag.dtype} {shape(flag)} on {flag.device}"
        raise ValueError(f"{op}: {name}: found {found}, expected one torch.float32 on {device}")


def check_like(op: str, name: str, value: Tensor, expected: tuple[int, ...], what: str, bank: Tensor) -> None:
    """A floating tensor of the expected shape on the bank's device."""
    check_tensor(op, name, value)
    if tuple(value.shape) != expected:
        raise ValueError(f"{op}: {name}: found shape {shape(value)}, expected {list(expected)} ({what})")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name}: found {value.dtype}, expected a floating dtype")
    check_device(op, name, value, bank)


def check_device(op: str, name: str, value: Tensor, bank: Tensor) -> None:
    if value.device != bank.device:
        raise ValueError(f"{op}: {name}: found on {value.device}, expected on {bank.device} as the bank")


def check_temperature(op: str, temperature: float) -> None:
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"{op}: temperature: found {temperature}, expected a finite number above 0")


def shape(value: Tensor) -> list[int]:
    return list(value.shape)
