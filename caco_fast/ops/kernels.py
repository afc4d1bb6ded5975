"""The compiled kernels of csrc/, as the operations call them: where a launch goes, its operands and its memory.

Products run in fp16 for fp16 rows and in bf16 for all others; on GPUs of sm_70 to 75 they run in fp16 for all. Sums are
f32; bank and velocity stay f32. The similarity that `bank_select` returns, and its choice between rows that rounding
leaves in question, are f32. Queries that enter products in fp16 must be shorter than 6e4. Calls only enqueue work on
the current stream: they may be captured in a CUDA graph, after a first call of the same kind outside of it, for CUDA
loads a kernel when it is first called. (The trainer launches some steps before it captures one.)

Memory beside the results (P: C rounded up to 64, 128, 256 or 512), from torch's allocator:
    unit rows of the bank  2 K P bytes, unless the caller holds them and passes `operand`
    attend                 2 R P, and 4 R P + 16 R for each part of the bank (64 at most, few when R is large)
    select                 2 R P, and 64 R for each part
    step                   2 R P, and 8 R with R rounded up to 384
    Queries and keys in the dtype of the products need no 2 R P if C = P.

Legend: R query or key rows, K bank rows, C channels, M positives per row, P padded channels.
"""

import functools
from typing import Any

import torch
from torch import Tensor

import caco_fast._C as _C


@functools.cache
def serving_path(device: torch.device) -> int:
    """The kernel path for this GPU, or 0 if none of the compiled ones runs on it."""
    if device.type != "cuda":
        return 0
    return int(_C.path_serving(*torch.cuda.get_device_capability(device)))


def available(device: torch.device) -> bool:
    """Whether the compiled kernels run on this device."""
    return serving_path(device) != 0


def path_name(device: torch.device) -> str:
    """The family of kernels that serves a device: sm_70, sm_80 or sm_90a."""
    path = serving_path(device)
    return f"sm_{path}a" if path == 90 else f"sm_{path}"


def why_not(device: torch.device) -> str | None:
    """One line for the user if the kernels do not run on this device, else None."""
    if available(device):
        return None
    if device.type != "cuda":
        return f"the kernels run on CUDA GPUs, found {device}"
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}"
    if major < 7:
        return f"{gpu}, the kernels need sm_70 or later"
    needed = " and nvcc 12, as CUDA 13 has no sm_70" if (major, minor) < (7, 5) else ""
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    return f"{gpu}, built for {';'.join(_C.arches)}: rebuild with CACO_ARCHES={arch}{needed}"


def target_for(device: torch.device) -> _C.Target:
    """Where a launch goes: path, device, its multiprocessors, and the current stream."""
    path = serving_path(device)
    if path == 0:
        raise RuntimeError(f"caco_fast: {why_not(device)}")
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _C.Target(path, index, properties.multi_processor_count, torch.cuda.current_stream(device).cuda_stream)


def capturing(device: torch.device) -> bool:
    """Whether work on this device is being captured in a CUDA graph: then nothing runs before the first replay."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def launch(operation: str, target: _C.Target, **fields: Any) -> None:
    """Launch an operation with every field of its parameter struct in bank.h; a tensor stands for its address."""
    params = getattr(_C, PARAMS[operation])()
    if fields.keys() != set(params.fields):
        raise TypeError(f"{operation}: fields: found {sorted(fields)}, expected {sorted(params.fields)}")
    for name, value in fields.items():
        setattr(params, name, field(value))
    getattr(_C, operation)(target, params)


PARAMS = {
    "bank_operand": "OperandParams",
    "bank_attend": "AttendParams",
    "bank_select": "SelectParams",
    "bank_step": "StepParams",
}


def field(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return 0 if value is None else value


def check_bank(op: str, bank: Tensor) -> None:
    rows, channels = bank.shape
    if bank.dtype != torch.float32:
        raise TypeError(f"{op}: backend 'cuda': found a {bank.dtype} bank, expected torch.float32")
    if channels > _C.max_channels:
        raise ValueError(f"{op}: backend 'cuda': found C = {channels}, expected at most {_C.max_channels}")
    if rows >= 2**31:
        raise ValueError(f"{op}: backend 'cuda': found K = {rows}, expected below 2^31")


def operand_dtype(rows: Tensor, target: _C.Target) -> torch.dtype:
    """The dtype of the matrix products of these rows: fp16 for all rows if the path has no bf16."""
    return torch.float16 if rows.dtype == torch.float16 or not target.takes_bfloat16 else torch.bfloat16


def empty_operand(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for rows [N, C] in operand type: [N, P]."""
    return rows.new_empty((rows.shape[0], _C.padded_channels(rows.shape[1])), dtype=dtype)


def write_operand(operand: Tensor, rows: Tensor, unit: bool, target: _C.Target) -> None:
    """Write rows [N, C], at unit length or as they are, to operand [N, P], padded with zeros."""
    rows = rows.detach().float().contiguous()
    if rows.shape[0] > 0:
        count, channels = rows.shape
        launch(
            "bank_operand", target, rows=rows, operand=operand, count=count, channels=channels, type=operand.dtype,
            normalise=unit,
        )  # fmt: skip


def row_operand(rows: Tensor, dtype: torch.dtype, target: _C.Target) -> Tensor:
    """Queries or keys [R, C] as the matrix products take them: a copy, or the rows if they are that already. [R, P]"""
    ready = rows.dtype == dtype and rows.shape[1] == _C.padded_channels(rows.shape[1])
    if ready and rows.is_contiguous() and rows.data_ptr() % 16 == 0:
        return rows
    operand = empty_operand(rows, dtype)
    write_operand(operand, rows, unit=False, target=target)
    return operand


def unit_operand(bank: Tensor, dtype: torch.dtype, target: _C.Target) -> Tensor:
    """The bank's unit rows as the matrix products take them. [K, P]"""
    operand = empty_operand(bank, dtype)
    write_operand(operand, bank, unit=True, target=target)
    return operand


def operand_for(rows: Tensor, bank: Tensor, operand: Tensor | None, target: _C.Target) -> Tensor:
    """The copy that the caller holds, which then decides the dtype of the products, or one made for this call."""
    if operand is None:
        return unit_operand(bank, operand_dtype(rows, target), target)
    check_layout(operand, bank)
    return operand


def check_layout(operand: Tensor, bank: Tensor) -> None:
    padded = _C.padded_channels(bank.shape[1])
    if operand.shape[1] != padded or not operand.is_contiguous():
        found = f"shape {list(operand.shape)} with strides {operand.stride()}"
        raise ValueError(f"operand: found {found}, expected contiguous rows of {padded} as `unit_operand` makes them")


def workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)
