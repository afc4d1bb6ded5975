"""The operations on lists of tensors on the compiled kernels of csrc/optim, for `backend="cuda"`.

The kernels read from a table on the device where the tensors stand. It is written again when one has moved, as
gradients do from step to step, by kernels that carry the addresses as their parameters: nothing is copied from host
memory, the host waits for nothing, and calls may be captured in a CUDA graph.

Memory, from torch's allocator: the table, 40 bytes a tensor, kept until the first tensor is freed; for a LARS step 8
bytes for every 16384 elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from caco_fast.ops import backends

if TYPE_CHECKING:
    from caco_fast.ops.lars_step import LarsSettings


@dataclass(frozen=True)
class Table:
    records: Tensor
    # What it was written of: elements and addresses of the tensors, and the stream that orders the writing.
    written_of: tuple[Any, ...]


# Tables by the first tensor that is written to; an entry goes with its tensor.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def ema_update_(averages: list[Tensor], values: list[Tensor], weight: Tensor, skip: Tensor | None) -> None:
    cuda = backends.cuda_backend()
    target = cuda.target_for(averages[0].device)
    table = table_of([averages, values], target)
    cuda.kernels.ema_update(
        target,
        table=table.data_ptr(),
        tensors=len(averages),
        chunks=chunks_of(averages),
        skip=cuda.address_or_null(skip),
        weight=weight.data_ptr(),
    )


def lars_step_(
    params: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    settings: "LarsSettings",
) -> None:
    cuda = backends.cuda_backend()
    target = cuda.target_for(params[0].device)
    # Those of two or more dimensions first: the norms are of them alone.
    order = sorted(range(len(params)), key=lambda at: params[at].ndim < 2)
    params, grads, velocities = ([tensors[at] for at in order] for tensors in (params, grads, velocities))
    trusted = sum(w.ndim > 1 for w in params)
    trusted_chunks = chunks_of(params[:trusted])
    table = table_of([params, grads, velocities], target)
    workspace = cuda.scratch(cuda.kernels.lars_step_workspace(trusted, trusted_chunks), params[0])
    cuda.kernels.lars_step(
        target,
        table=table.data_ptr(),
        tensors=len(params),
        trusted=trusted,
        chunks=chunks_of(params),
        trusted_chunks=trusted_chunks,
        grad_scale=cuda.address_or_null(settings.grad_scale),
        skip=cuda.address_or_null(settings.skip),
        workspace=workspace.data_ptr(),
        lr=settings.lr.data_ptr(),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        trust=settings.trust,
    )


def chunks_of(tensors: Sequence[Tensor]) -> int:
    size = backends.cuda_backend().kernels.chunk_elements
    return sum(-(-tensor.numel() // size) for tensor in tensors)


def table_of(lists: list[list[Tensor]], target: Any) -> Tensor:
    """The device's table of these lists: the one kept from before if no tensor has moved since, else a new one.

    During the capture of a CUDA graph always a new one, which is not kept: the graph writes it again at every replay,
    and its memory is not for others.
    """
    cuda, first = backends.cuda_backend(), lists[0][0]
    counts = [tensor.numel() for tensor in lists[0]]
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    written_of = (counts, addresses, cuda.stream_of(first.device))
    capturing = cuda.capturing(first.device)
    kept = _tables.get(first)
    if kept is not None and kept.written_of == written_of and not capturing:
        return kept.records
    records = cuda.scratch(cuda.kernels.tensor_table_bytes(len(counts)), first)
    cuda.kernels.write_tensor_table(target, counts=counts, lists=addresses, table=records.data_ptr())
    if not capturing:
        _tables[first] = Table(records, written_of)
    return records
