"""lars_step_: one step of LARS on a list of tensors, in place.

For a parameter w with gradient g, velocity v, loss scale s:

    d = g / s
    d <- d + weight_decay w             \
    d <- trust |w| / |d| d               > two or more dimensions only; unscaled if either norm is 0
    v <- momentum v + d                 /
    w <- w - lr v

and with `lr_in_velocity`, in place of the last two lines:

    v <- momentum v + lr d
    w <- w - v

Kernels  none: torch's multi-tensor operations
Tests    tests/ops/test_lars_step.py
Time     python tools/bench/ops.py lars_step
Keep     fewer than 80 launches for ResNet-50 with its projector; norms of unscaled gradients; `skip`, `grad_scale` and
         an lr on the device read there; gradients as they were; no change if skipped, whatever the gradients hold
Free     which foreach operations do it, the order of roundings
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caco_fast.ops import dispatch, tensor_lists
from caco_fast.ops.rates import Rate, check_rate

OP = "lars_step_"


class LarsSettings(NamedTuple):
    """The settings of `lars_step_`."""

    lr: Rate
    momentum: float
    weight_decay: float
    trust: float
    lr_in_velocity: bool
    grad_scale: Tensor | None
    skip: Tensor | None


@torch.no_grad()
def lars_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocities: Sequence[Tensor],
    *,
    lr: Rate,
    momentum: float,
    weight_decay: float,
    trust: float,
    lr_in_velocity: bool = False,
    grad_scale: Tensor | None = None,  # []
    skip: Tensor | None = None,  # []
    backend: str = "auto",
) -> None:
    """Move parameters and velocities; gradients stay as they are.

    grads, velocities: like params in shape, dtype and device.
    lr: the value of a tensor [] on the device is not read by the host.
    lr_in_velocity: the velocity adds up steps, each of its own lr, so that a change of lr acts on new gradients alone.
    grad_scale: s, on the device, by which the gradients are still multiplied; None: they are not.
    skip: a flag on the device, such as GradScaler's found_inf; if it is not 0, nothing changes, whatever the gradients
        hold.

    Raises ValueError or TypeError for a bad argument.
    Source: You et al., arXiv 1708.03888, as contrastive pre-training uses it.
    """
    tensor_lists.check_lengths(OP, {"params": params, "grads": grads, "velocities": velocities})
    for name, value in dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust).items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{OP}: {name}: found {value}, expected 0 or more")
    if not params:
        return
    device = params[0].device
    if isinstance(lr, Tensor):
        check_rate(OP, "lr", lr, device)
    dispatch.check_flag(OP, "grad_scale", grad_scale, device)
    dispatch.check_flag(OP, "skip", skip, device)
    settings = LarsSettings(lr, float(momentum), float(weight_decay), float(trust), lr_in_velocity, grad_scale, skip)
    chosen = tensor_lists.resolve(OP, backend, device)
    step = lars_step_reference_ if chosen == "reference" else lars_step_foreach_
    step(list(params), list(grads), list(velocities), settings)


def lars_step_reference_(
    params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], settings: LarsSettings
) -> None:
    """The formula, tensor by tensor."""
    lr, momentum, weight_decay, trust, lr_in_velocity, grad_scale, skip = settings
    of_gradient, of_velocity = (lr, 1.0) if lr_in_velocity else (1.0, lr)
    for w, g, v in zip(params, grads, velocities, strict=True):
        d = g if grad_scale is None else g / grad_scale
        if w.ndim > 1:
            d = d + weight_decay * w
            d = trust_ratio(w.norm(), d.norm(), trust) * d
        new_v = momentum * v + of_gradient * d
        new_w = w - of_velocity * new_v
        if skip is not None:
            new_v, new_w = torch.where(skip != 0, v, new_v), torch.where(skip != 0, w, new_w)
        v.copy_(new_v)
        w.copy_(new_w)


def trust_ratio(weight_norm: Tensor, grad_norm: Tensor, trust: float) -> Tensor:
    known = (weight_norm > 0) & (grad_norm > 0)
    return torch.where(known, trust * weight_norm / grad_norm, 1.0)


def lars_step_foreach_(
    params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], settings: LarsSettings
) -> None:
    directions = scaled_directions(params, grads, settings)
    if settings.lr_in_velocity:
        lr = settings.lr
        directions = list(torch._foreach_mul(directions, lr.to(params[0].dtype) if isinstance(lr, Tensor) else lr))
        settings = settings._replace(lr=1.0)
    if settings.skip is not None:
        step_unless_skipped_(params, directions, velocities, settings)
        return
    torch._foreach_mul_(velocities, settings.momentum)
    torch._foreach_add_(velocities, directions)
    lr = settings.lr
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(velocities, lr.to(params[0].dtype)))
    else:
        torch._foreach_add_(params, velocities, alpha=-lr)


def scaled_directions(params: list[Tensor], grads: list[Tensor], settings: LarsSettings) -> list[Tensor]:
    """d of every parameter; those of one dimension may be the gradients themselves."""
    if settings.grad_scale is not None:
        grads = list(torch._foreach_mul(grads, settings.grad_scale.reciprocal()))
    directions = list(grads)
    trusted = [at for at, w in enumerate(params) if w.ndim > 1]
    if trusted:
        w = [params[at] for at in trusted]
        d = torch._foreach_add([grads[at] for at in trusted], w, alpha=settings.weight_decay)
        # All ratios at once: one by one they would take seven launches a tensor.
        norms = torch.stack(torch._foreach_norm(w) + torch._foreach_norm(d)).view(2, -1)
        torch._foreach_mul_(d, trust_ratio(norms[0], norms[1], settings.trust).unbind())
        for at, direction in zip(trusted, d, strict=True):
            directions[at] = direction
    return directions


def step_unless_skipped_(
    params: list[Tensor], directions: list[Tensor], velocities: list[Tensor], settings: LarsSettings
) -> None:
    """SGD's step by torch's fused operation, which reads the flag on the device: a product with 0 would keep NaN."""
    lr, momentum, skip = settings.lr, settings.momentum, settings.skip
    assert skip is not None
    side_by_side = []
    for w, d, v in zip(params, directions, velocities, strict=True):
        if is_dense(w) and same_order(w, d) and same_order(w, v):
            side_by_side.append((w, d.as_strided(w.shape, w.stride()), v.as_strided(w.shape, w.stride())))
        else:
            # The fused operation walks the memory of the three side by side, which these do not allow.
            moved = momentum * v + d
            w.copy_(torch.where(skip != 0, w, w - lr * moved))
            v.copy_(torch.where(skip != 0, v, moved))
    if side_by_side:
        torch._fused_sgd_(
            *map(list, zip(*side_by_side)),
            weight_decay=0.0,
            momentum=momentum,
            lr=lr.float() if isinstance(lr, Tensor) else lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=(skip != 0).float(),  # 1 is the only number that it takes for a set flag
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
    """Whether strides are equal; they do not matter along a dimension of length 1."""
    return all(a == b for a, b, length in zip(left.stride(), right.stride(), left.shape) if length != 1)
