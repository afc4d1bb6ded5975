"""ema_update_: the exponential moving average of a list of tensors, in place.

g <- m g + (1 - m) f = g + w (f - g),  w = 1 - m
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from caco_fast.ops import checks, cuda_optim, tensor_lists
from caco_fast.ops.rates import Rate, check_rate, on_device

OP = "ema_update_"


@torch.no_grad()
def ema_update_(
    averages: Sequence[Tensor],
    values: Sequence[Tensor],
    weight: Rate,
    *,
    skip: Tensor | None = None,  # []
    backend: str = "auto",
) -> None:
    """Move every average towards its value.

    averages: g, of any shapes and strides; values: f, of the same shapes. backend "cuda" wants f32, dense in memory,
        in both lists alike (channels_last is fine).
    weight: w in [0, 1]; a tensor on the device, [], is not looked at.
    skip: a flag on the device, such as GradScaler's found_inf; where it is not 0 nothing changes.

    Raises ValueError or TypeError for a bad argument, RuntimeError if the named backend is not there.
    Source: momentum encoder of MoCo (arXiv 1911.05722, eq. 2).
    """
    tensor_lists.check_lengths(OP, {"averages": averages, "values": values})
    if not isinstance(weight, Tensor) and not 0 <= weight <= 1:
        raise ValueError(f"{OP}: weight: found {weight}, wanted a number in [0, 1]")
    if not averages:
        return
    device = averages[0].device
    if isinstance(weight, Tensor):
        check_rate(OP, "weight", weight, device)
    checks.check_flag(OP, "skip", skip, device)
    chosen = tensor_lists.resolve(OP, backend, device)
    if chosen == "cuda":
        tensor_lists.check_for_kernels(OP, {"averages": averages, "values": values})
        torch.ops.caco_fast.ema_update_(list(averages), list(values), on_device(weight, device), skip)
    else:
        update = ema_update_reference_ if chosen == "reference" else ema_update_foreach_
        update(averages, values, weight, skip)


def ema_update_reference_(
    averages: Sequence[Tensor], values: Sequence[Tensor], weight: Rate, skip: Tensor | None
) -> None:
    """As the formula."""
    for average, value in zip(averages, values, strict=True):
        moved = average + weight * (value - average)
        average.copy_(moved if skip is None else torch.where(skip != 0, average, moved))


def ema_update_foreach_(
    averages: Sequence[Tensor], values: Sequence[Tensor], weight: Rate, skip: Tensor | None
) -> None:
    if skip is None and not isinstance(weight, Tensor):
        torch._foreach_lerp_(averages, values, weight)
        return
    # lerp takes no weight that only the device knows.
    change = torch._foreach_sub(values, averages)
    weight = weight if skip is None else torch.where(skip != 0, 0.0, weight)
    torch._foreach_mul_(change, weight.to(averages[0].dtype))
    torch._foreach_add_(averages, change)


# For the kernels alone: a compiler sees through the operations of torch, and should.
@torch.library.custom_op("caco_fast::ema_update_", mutates_args=("averages",))
def _ema_update_(averages: list[Tensor], values: list[Tensor], weight: Tensor, skip: Tensor | None) -> None:
    cuda_optim.ema_update_(averages, values, weight, skip)


_ema_update_.register_fake(lambda *arguments: None)
