"""Argument checks of the bank operations: an error names operation, argument, what was found and what is wanted.

Legend: R query or key rows, K bank rows, C channels, M positives per row.
"""

import math

import torch
from torch import Tensor

from caco_fast.ops.backends import BACKENDS

ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BANK_DTYPES = (torch.float32, torch.float64)


def check_backend(op: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: found {backend!r}, wanted one of {', '.join(BACKENDS)}")


def check_rows_and_bank(op: str, name: str, rows: Tensor, bank: Tensor) -> None:
    """Rows [R, C] and a bank [K, C] on one device, K >= 1; f64 rows go with an f64 bank and only with it."""
    check_tensor(op, name, rows)
    check_tensor(op, "bank", bank)
    if rows.dim() != 2:
        raise ValueError(f"{op}: {name}: found shape {shape(rows)}, wanted [R, C]")
    if bank.dim() != 2 or bank.shape[0] == 0:
        raise ValueError(f"{op}: bank: found shape {shape(bank)}, wanted [K, C] with at least one row")
    if rows.shape[1] != bank.shape[1]:
        raise ValueError(
            f"{op}: {name}: found shape {shape(rows)}, wanted [R, {bank.shape[1]}] as the bank {shape(bank)}"
        )
    if rows.dtype not in ROW_DTYPES:
        raise TypeError(f"{op}: {name}: found {rows.dtype}, wanted a floating dtype of 16 to 64 bits")
    if bank.dtype not in BANK_DTYPES:
        raise TypeError(f"{op}: bank: found {bank.dtype}, wanted torch.float32 (or torch.float64)")
    if (rows.dtype == torch.float64) != (bank.dtype == torch.float64):
        raise TypeError(f"{op}: {name}: found {rows.dtype} with a {bank.dtype} bank, wanted both float64 or neither")
    check_device(op, name, rows, bank)


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: found {type(value).__name__}, wanted a tensor")


def check_flag(op: str, name: str, flag: Tensor | None, device: torch.device) -> None:
    """One f32 number on the device that the operation runs on, or None."""
    if flag is None:
        return
    check_tensor(op, name, flag)
    if flag.numel() != 1 or flag.dtype != torch.float32 or flag.device != device:
        found = f"{flag.dtype} {shape(flag)} on {flag.device}"
        raise ValueError(f"{op}: {name}: found {found}, wanted one torch.float32 on {device}")


def check_like(op: str, name: str, value: Tensor, wanted: tuple[int, ...], what: str, bank: Tensor) -> None:
    """A floating tensor of the wanted shape on the bank's device."""
    check_tensor(op, name, value)
    if tuple(value.shape) != wanted:
        raise ValueError(f"{op}: {name}: found shape {shape(value)}, wanted {list(wanted)} ({what})")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name}: found {value.dtype}, wanted a floating dtype")
    check_device(op, name, value, bank)


def check_device(op: str, name: str, value: Tensor, bank: Tensor) -> None:
    if value.device != bank.device:
        raise ValueError(f"{op}: {name}: found on {value.device}, wanted on {bank.device} as the bank")


def check_temperature(op: str, temperature: float) -> None:
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"{op}: temperature: found {temperature}, wanted a finite number above 0")


def check_step_settings(op: str, lr: float, momentum: float, norm: str) -> None:
    if not math.isfinite(lr) or lr < 0:
        raise ValueError(f"{op}: lr: found {lr}, wanted a finite number, 0 or more")
    if not 0 <= momentum < 1:
        raise ValueError(f"{op}: momentum: found {momentum}, wanted a number in [0, 1)")
    if norm not in ("implicit", "project"):
        raise ValueError(f"{op}: norm: found {norm!r}, wanted 'implicit' or 'project'")


def check_positives(op: str, positives: Tensor, rows: int, bank: Tensor) -> None:
    check_tensor(op, "positives", positives)
    if positives.dim() != 2 or positives.shape[0] != rows:
        raise ValueError(f"{op}: positives: found shape {shape(positives)}, wanted [R, M] with R = {rows}")
    if positives.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: positives: found {positives.dtype}, wanted torch.int64")
    check_device(op, "positives", positives, bank)


def check_positive_range(op: str, positives: Tensor, bank_rows: int) -> None:
    """On the CPU only: looking at the values on an accelerator would make the host wait for it."""
    if positives.device.type != "cpu" or positives.numel() == 0:
        return
    low, high = (int(bound) for bound in positives.aminmax())
    if low < 0 or high >= bank_rows:
        found = low if low < 0 else high
        raise IndexError(f"{op}: positives: found {found}, wanted a bank row in [0, {bank_rows - 1}]")


def shape(value: Tensor) -> list[int]:
    return list(value.shape)
