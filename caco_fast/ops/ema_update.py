"""ema_update_: the exponential moving average of a list of tensors, in place.

g <- m g + (1 - m) f = g + w (f - g),  w = 1 - m

Kernels  none: torch's multi-tensor operations
Tests    tests/ops/test_ema_update.py
Time     python tools/bench/ops.py ema_update
Keep     a few launches for all tensors; `skip` and a weight on the device read there; exact at w = 0
Free     which foreach operations do it, the order of roundings
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from caco_fast.ops import dispatch, tensor_lists
from caco_fast.ops.rates import Rate, check_rate

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

    averages: g, of any shapes and strides; values: f, of the same shapes.
    weight: w in [0, 1]; the value of a tensor [] on the device is not read by the host.
    skip: a flag on the device, such as GradScaler's found_inf; if it is not 0, nothing changes.

    Raises ValueError or TypeError for a bad argument.
    Source: momentum encoder of MoCo (arXiv 1911.05722, eq. 2).
    """
    tensor_lists.check_lengths(OP, {"averages": averages, "values": values})
    if not isinstance(weight, Tensor) and not 0 <= weight <= 1:
        raise ValueError(f"{OP}: weight: found {weight}, expected a number in [0, 1]")
    if not averages:
        return
    device = averages[0].device
    if isinstance(weight, Tensor):
        check_rate(OP, "weight", weight, device)
    dispatch.check_flag(OP, "skip", skip, device)
    chosen = tensor_lists.resolve(OP, backend, device)
    update = ema_update_reference_ if chosen == "reference" else ema_update_foreach_
    update(list(averages), list(values), weight, skip)


def ema_update_reference_(averages: list[Tensor], values: list[Tensor], weight: Rate, skip: Tensor | None) -> None:
    """The formula, tensor by tensor."""
    for average, value in zip(averages, values, strict=True):
        moved = average + weight * (value - average)
        average.copy_(moved if skip is None else torch.where(skip != 0, average, moved))


def ema_update_foreach_(averages: list[Tensor], values: list[Tensor], weight: Rate, skip: Tensor | None) -> None:
    if skip is None and not isinstance(weight, Tensor):
        torch._foreach_lerp_(averages, values, weight)
        return
    # lerp takes no weight that only the device knows.
    change = torch._foreach_sub(values, averages)
    if skip is not None:
        weight = torch.where(skip != 0, 0.0, weight)
    if isinstance(weight, Tensor):
        torch._foreach_mul_(change, weight.to(averages[0].dtype))
    torch._foreach_add_(averages, change)
