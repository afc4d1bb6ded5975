"""The bank operations on the compiled kernels of csrc/, for `backend="cuda"` and for `auto` on a GPU that they serve.

Products run in fp16 for fp16 rows and in bf16 for all others, on GPUs of sm_70 to 75 in fp16 for all, accumulated in
f32; bank and velocity stay f32. The similarity that `select` returns, and the choice between rows that rounding leaves
in question, are f32. Queries that enter products in fp16 must be shorter than 6e4. Calls only enqueue work on the
current stream: they may be captured in a CUDA graph.

Memory beside the results (P: C rounded up to 64, 128, 256 or 512), from torch's allocator:
    operand copy of the bank  2 K P bytes for each operand type in use; kept until the bank is freed, or `forget`
    attend                    2 R P, and 4 R P + 16 R for each part of the bank (64 at most, few when R is large)
    select                    2 R P, and 64 R for each part
    step                      2 R P, 8 R with R rounded up to 384, and the sort of R M positives

Legend: R query or key rows, K bank rows, C channels, M positives per row, P padded channels.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

import caco_fast._C as kernels
from caco_fast.ops.rates import Rate, on_device


@functools.cache
def serving_path(device: torch.device) -> int:
    """The kernel path for this GPU, or 0 if none of the compiled ones runs on it."""
    if device.type != "cuda":
        return 0
    return kernels.path_serving(*torch.cuda.get_device_capability(device))


def available(device: torch.device) -> bool:
    """Whether the compiled kernels run on this device."""
    return serving_path(device) != 0


def why_not(device: torch.device) -> str | None:
    """One line for the user where the kernels do not run on this device."""
    if available(device):
        return None
    if device.type != "cuda":
        return f"the kernels run on CUDA GPUs, found {device}"
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}"
    if major < 7:
        return f"{gpu}, the kernels need sm_70 or later"
    needed = " and nvcc 12, as CUDA 13 has no sm_70" if (major, minor) < (7, 5) else ""
    wanted = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    return f"{gpu}, built for {';'.join(kernels.arches)}: rebuild with CACO_ARCHES={wanted}{needed}"


def target_for(device: torch.device) -> kernels.Target:
    """Where a launch goes: path, device, its multiprocessors, and the current stream."""
    path = serving_path(device)
    if path == 0:
        raise RuntimeError(f"caco_fast: {why_not(device)}")
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return kernels.Target(path, index, properties.multi_processor_count, torch.cuda.current_stream(device).cuda_stream)


def capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@dataclass
class OperandCopy:
    """Unit rows of a bank in operand type, and the state of the bank that they were made of."""

    rows: Tensor  # [K, P]
    version: int
    storage: StorageWeakRef
    address: int
    stream: int

    def is_current(self, bank: Tensor) -> bool:
        return (
            self.version == bank._version
            and self.address == bank.data_ptr()
            and self.storage == StorageWeakRef(bank.untyped_storage())
            and self.stream == stream_of(bank.device)
            and self.rows.shape[0] == bank.shape[0]
        )


# Operand copies by bank tensor, each {operand dtype: copy}; an entry goes with its tensor.
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

# Banks that a captured graph steps: a replay changes them without counting versions, so no copy of them is kept.
_stepped_by_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def forget(bank: Tensor) -> None:
    """Drop the operand copies of a bank. Needed only after a write that torch does not see: through `bank.data`, a raw
    pointer, or a collective that writes into it; every other in-place operation is noticed by itself."""
    _copies.pop(bank, None)


def attend(queries: Tensor, bank: Tensor, temperatures: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(lse [R], lse at the second temperature [R] or [0], mean_row [R, C]), as `attend_tiled`."""
    check_bank("bank_attend", bank)
    (rows, channels), bank_rows = queries.shape, bank.shape[0]
    lse = bank.new_empty((len(temperatures), rows))
    mean_row = bank.new_empty((rows, channels))
    if rows > 0:
        target = target_for(bank.device)
        dtype = operand_dtype(queries, target)
        query_operand = make_operand(queries.float().contiguous(), dtype, normalise=False, target=target)
        bank_operand = unit_operand(bank, dtype, target)
        workspace = scratch(kernels.bank_attend_workspace(rows, bank_rows, channels, target), bank)
        kernels.bank_attend(
            target,
            queries=query_operand.data_ptr(),
            bank=bank_operand.data_ptr(),
            lse=lse.data_ptr(),
            mean_row=mean_row.data_ptr(),
            workspace=workspace.data_ptr(),
            rows=rows,
            bank_rows=bank_rows,
            channels=channels,
            type=type_name(dtype),
            temperatures=temperatures,
        )
    return lse[0], lse[1].clone() if len(temperatures) == 2 else bank.new_empty(0), mean_row


def select(keys: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """(index [R] int64, similarity [R] f32), as `select_tiled`."""
    check_bank("bank_select", bank)
    (rows, channels), bank_rows = keys.shape, bank.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device=bank.device)
    similarity = bank.new_empty(rows)
    if rows > 0:
        target = target_for(bank.device)
        dtype = operand_dtype(keys, target)
        exact_keys, exact_bank = keys.float().contiguous(), bank.contiguous()
        key_operand = make_operand(exact_keys, dtype, normalise=False, target=target)
        bank_operand = unit_operand(bank, dtype, target)
        workspace = scratch(kernels.bank_select_workspace(rows, bank_rows, channels, target), bank)
        kernels.bank_select(
            target,
            keys=key_operand.data_ptr(),
            bank=bank_operand.data_ptr(),
            exact_keys=exact_keys.data_ptr(),
            exact_bank=exact_bank.data_ptr(),
            index=index.data_ptr(),
            similarity=similarity.data_ptr(),
            workspace=workspace.data_ptr(),
            rows=rows,
            bank_rows=bank_rows,
            channels=channels,
            type=type_name(dtype),
        )
    return index, similarity


def step_(
    bank: Tensor,
    velocity: Tensor,
    queries: Tensor,
    lse: Tensor,
    temperature: float,
    lr: Rate,
    momentum: float,
    row_weight: Tensor,
    positives: Tensor | None,
    positive_weight: Tensor | None,
    norm: str,
    skip: Tensor | None = None,
) -> None:
    """As `step_tiled_`, with `skip`; positives outside the bank are ignored. Writes the operand copy that the next
    attend reads as well."""
    check_bank("bank_step_", bank)
    (rows, channels), bank_rows = queries.shape, bank.shape[0]
    many = 0 if positives is None or rows == 0 else positives.shape[1]
    if many > kernels.max_positives:
        raise ValueError(f"bank_step_: positives: found M = {many}, wanted at most {kernels.max_positives}")
    target = target_for(bank.device)
    dtype = operand_dtype(queries, target)
    exact_queries = queries.float().contiguous()
    exact_bank, exact_velocity = bank.contiguous(), velocity.contiguous()
    query_operand = make_operand(exact_queries, dtype, normalise=False, target=target)
    lse, row_weight = lse.float().contiguous(), row_weight.float().contiguous()
    lr = on_device(lr, bank.device)
    sorted_rows = places = weights = None
    if many > 0:
        sorted_rows, places = positives.flatten().long().sort(stable=True)  # the order of the rows i within a bank row
        weights = positive_weight.float().contiguous()
    bank_operand = exact_bank.new_empty((bank_rows, kernels.padded_channels(channels)), dtype=dtype)
    workspace = scratch(kernels.bank_step_workspace(rows), bank)
    kernels.bank_step(
        target,
        bank=exact_bank.data_ptr(),
        velocity=exact_velocity.data_ptr(),
        bank_operand=bank_operand.data_ptr(),
        queries=query_operand.data_ptr(),
        exact_queries=exact_queries.data_ptr(),
        lse=lse.data_ptr(),
        row_weight=row_weight.data_ptr(),
        positive_row=address_or_null(sorted_rows),
        positive_place=address_or_null(places),
        positive_weight=address_or_null(weights),
        workspace=workspace.data_ptr(),
        rows=rows,
        bank_rows=bank_rows,
        channels=channels,
        positives=many,
        type=type_name(dtype),
        temperature=temperature,
        lr=lr.data_ptr(),
        momentum=momentum,
        project=norm == "project",
        skip=address_or_null(skip),
    )
    if exact_bank is not bank:
        bank.copy_(exact_bank)
    if exact_velocity is not velocity:
        velocity.copy_(exact_velocity)
    if not bank.is_inference():
        torch.autograd.graph.increment_version(bank)  # the kernel's write, so that no other copy passes for current
    if capturing(bank.device):
        _stepped_by_graphs[bank] = True
    remember(bank, bank_operand)


def check_bank(op: str, bank: Tensor) -> None:
    rows, channels = bank.shape
    if bank.dtype != torch.float32:
        raise TypeError(f"{op}: backend 'cuda': found a {bank.dtype} bank, wanted torch.float32")
    if channels > kernels.max_channels:
        raise ValueError(f"{op}: backend 'cuda': found C = {channels}, wanted at most {kernels.max_channels}")
    if rows >= 2**31:
        raise ValueError(f"{op}: backend 'cuda': found K = {rows}, wanted below 2^31")


def operand_dtype(rows: Tensor, target: kernels.Target) -> torch.dtype:
    """What the matrix products of these rows take; fp16 for all rows where the path has no bf16."""
    return torch.float16 if rows.dtype == torch.float16 or not target.takes_bfloat16 else torch.bfloat16


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scratch(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def address_or_null(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def make_operand(rows: Tensor, dtype: torch.dtype, normalise: bool, target: kernels.Target) -> Tensor:
    """Contiguous f32 rows [N, C] in operand type, padded with zeros to [N, P]."""
    count, channels = rows.shape
    operand = rows.new_empty((count, kernels.padded_channels(channels)), dtype=dtype)
    if count > 0:
        kernels.bank_operand(
            target,
            rows=rows.data_ptr(),
            operand=operand.data_ptr(),
            count=count,
            channels=channels,
            type=type_name(dtype),
            normalise=normalise,
        )
    return operand


def unit_operand(bank: Tensor, dtype: torch.dtype, target: kernels.Target) -> Tensor:
    """The bank's unit rows in operand type [K, P]: the kept copy if the bank is still as it was, else a new one.

    During the capture of a CUDA graph the copy is always made anew: a replay does not come by here, and the bank may
    have changed since.
    """
    copy = None if bank.is_inference() else _copies.get(bank, {}).get(dtype)
    if copy is not None and not capturing(bank.device) and copy.is_current(bank):
        return copy.rows
    operand = make_operand(bank.detach().contiguous(), dtype, normalise=True, target=target)
    remember(bank, operand)
    return operand


def remember(bank: Tensor, operand: Tensor) -> None:
    """Keep the operand copy, unless there is no telling when it becomes stale: an inference tensor counts no versions,
    and neither does a graph's replay, whose memory is not for others either."""
    if bank.is_inference() or capturing(bank.device) or bank in _stepped_by_graphs:
        _copies.pop(bank, None)
        return
    storage = StorageWeakRef(bank.untyped_storage())
    copy = OperandCopy(operand, bank._version, storage, bank.data_ptr(), stream_of(bank.device))
    if bank not in _copies:
        _copies[bank] = {}
    _copies[bank][operand.dtype] = copy
