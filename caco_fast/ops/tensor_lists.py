"""What the operations on lists of tensors share: their backends and checks.

`reference` goes tensor by tensor and reads like the formula, `foreach` is torch's multi-tensor operations, `cuda` the
kernels of csrc/optim. `auto` is foreach until a benchmark on a GPU (tools/bench/ops.py) shows the kernels faster.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from caco_fast.ops import backends

BACKENDS = ("auto", "reference", "foreach", "cuda")


def resolve(op: str, backend: str, device: torch.device) -> str:
    """The backend that runs. A named one is never replaced: RuntimeError where it is not there."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: found backend {backend!r}, wanted one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "foreach"
    return backends.resolve(op, backend, device, torch.float32)


def check_lengths(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    (first, wanted), *others = ((name, len(tensors)) for name, tensors in lists.items())
    for name, found in others:
        if found != wanted:
            raise ValueError(f"{op}: {name}: found {found} tensors, wanted {wanted} as in {first}")


def check_for_kernels(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    """The kernels walk the memory of the tensors side by side: f32, dense, of one shape and order of strides each."""
    (first, wanted), *others = lists.items()
    device = wanted[0].device
    for name, tensors in lists.items():
        for at, tensor in enumerate(tensors):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{op}: {name}[{at}]: backend 'cuda': found {tensor.dtype}, wanted torch.float32")
            if tensor.device != device:
                raise ValueError(f"{op}: {name}[{at}]: found on {tensor.device}, wanted on {device} as {first}[0]")
    for at, tensor in enumerate(wanted):
        if not is_dense(tensor):
            raise ValueError(
                f"{op}: {first}[{at}]: backend 'cuda': found strides {tensor.stride()} for shape {list(tensor.shape)}, "
                "wanted them without gaps; use backend='foreach'"
            )
    for name, tensors in others:
        for at, (tensor, like) in enumerate(zip(tensors, wanted, strict=True)):
            if tensor.shape != like.shape:
                found, as_like = list(tensor.shape), list(like.shape)
                raise ValueError(f"{op}: {name}[{at}]: found shape {found}, wanted {as_like} as {first}[{at}]")
            if tensor.stride() != like.stride() and not same_order(tensor, like):
                raise ValueError(
                    f"{op}: {name}[{at}]: backend 'cuda': found strides {tensor.stride()}, wanted {like.stride()} as "
                    f"{first}[{at}]: give both one memory format, or use backend='foreach'"
                )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return True


def same_order(left: Tensor, right: Tensor) -> bool:
    """Equal strides where they mean something: not along a dimension of length 1."""
    return all(a == b for a, b, length in zip(left.stride(), right.stride(), left.shape) if length != 1)
