"""lars_step_: one step of LARS on a list of tensors, in place.

For a parameter w with gradient g, velocity v, loss scale s:

    d = g / s
    d <- d + weight_decay w             \
    d <- trust |w| / |d| d               > two or more dimensions only; unscaled where either norm is 0
    v <- momentum v + d                 /
    w <- w - lr v
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caco_fast.ops import checks, cuda_optim, tensor_lists
from caco_fast.ops.rates import Rate, check_rate, on_device

OP = "lars_step_"


class LarsSettings(NamedTuple):
    """As `lars_step_` takes them."""

    lr: Rate
    momentum: float
    weight_decay: float
    trust: float
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
    grad_scale: Tensor | None = None,  # []
    skip: Tensor | None = None,  # []
    backend: str = "auto",
) -> None:
    """Move parameters and velocities; gradients stay as they are.

    grads, velocities: as params in shape and dtype. backend "cuda" wants f32, dense in memory, and a gradient and
        velocity in the memory format of their parameter (channels_last is fine).
    lr: a tensor on the device, [], is not looked at.
    grad_scale: s, on the device, by which the gradients are still multiplied; None: they are not.
    skip: a flag on the device, such as GradScaler's found_inf; where it is not 0 nothing changes, whatever is in the
        gradients.

    Raises ValueError or TypeError for a bad argument, RuntimeError if the named backend is not there.
    Source: You et al., arXiv 1708.03888, as contrastive pre-training uses it.
    """
    lists = {"params": params, "grads": grads, "velocities": velocities}
    tensor_lists.check_lengths(OP, lists)
    for name, value in dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust).items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{OP}: {name}: found {value}, wanted 0 or more")
    if not params:
        return
    device = params[0].device
    if isinstance(lr, Tensor):
        check_rate(OP, "lr", lr, device)
    checks.check_flag(OP, "grad_scale", grad_scale, device)
    checks.check_flag(OP, "skip", skip, device)
    chosen = tensor_lists.resolve(OP, backend, device)
    settings = LarsSettings(lr, float(momentum), float(weight_decay), float(trust), grad_scale, skip)
    if chosen == "cuda":
        tensor_lists.check_for_kernels(OP, lists)
        settings = settings._replace(lr=on_device(lr, device))
        torch.ops.caco_fast.lars_step_(list(params), list(grads), list(velocities), *settings)
    else:
        step = lars_step_reference_ if chosen == "reference" else lars_step_foreach_
        step(params, grads, velocities, settings)


def lars_step_reference_(
    params: Sequence[Tensor], grads: Sequence[Tensor], velocities: Sequence[Tensor], settings: LarsSettings
) -> None:
    """As the formula."""
    lr, momentum, weight_decay, trust, grad_scale, skip = settings
    for w, g, v in zip(params, grads, velocities, strict=True):
        d = g if grad_scale is None else g / grad_scale
        if w.ndim > 1:
            d = d + weight_decay * w
            d = trust_ratio(w.norm(), d.norm(), trust) * d
        new_v = momentum * v + d
        new_w = w - lr * new_v
        if skip is not None:
            new_v, new_w = torch.where(skip != 0, v, new_v), torch.where(skip != 0, w, new_w)
        v.copy_(new_v)
        w.copy_(new_w)


def trust_ratio(weight_norm: Tensor, grad_norm: Tensor, trust: float) -> Tensor:
    known = (weight_norm > 0) & (grad_norm > 0)
    return torch.where(known, trust * weight_norm / grad_norm, torch.ones_like(weight_norm))


def lars_step_foreach_(
    params: Sequence[Tensor], grads: Sequence[Tensor], velocities: Sequence[Tensor], settings: LarsSettings
) -> None:
    lr, momentum, weight_decay, trust, grad_scale, skip = settings
    if grad_scale is not None:
        grads = torch._foreach_mul(grads, grad_scale.reciprocal())
    if skip is not None:
        # A product with 0 would keep what is not finite.
        grads = [torch.where(skip != 0, 0.0, g) for g in grads]
        lr, momentum = torch.where(skip != 0, 0.0, lr), torch.where(skip != 0, 1.0, momentum)
    for trusted in (True, False):
        chosen = [at for at, w in enumerate(params) if (w.ndim > 1) == trusted]
        if not chosen:
            continue
        w, d, v = ([tensors[at] for at in chosen] for tensors in (params, grads, velocities))
        if trusted:
            d = torch._foreach_add(d, w, alpha=weight_decay)
            ratios = [trust_ratio(*norms, trust) for norms in zip(torch._foreach_norm(w), torch._foreach_norm(d))]
            torch._foreach_mul_(d, ratios if skip is None else [torch.where(skip != 0, 0.0, r) for r in ratios])
        torch._foreach_mul_(v, momentum)
        torch._foreach_add_(v, d)
        if isinstance(lr, Tensor):
            torch._foreach_sub_(w, torch._foreach_mul(v, lr.to(w[0].dtype)))
        else:
            torch._foreach_add_(w, v, alpha=-lr)


# For the kernels alone: a compiler sees through the operations of torch, and should.
@torch.library.custom_op("caco_fast::lars_step_", mutates_args=("params", "velocities"))
def _lars_step_(
    params: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    trust: float,
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    settings = LarsSettings(lr, momentum, weight_decay, trust, grad_scale, skip)
    cuda_optim.lars_step_(params, grads, velocities, settings)


_lars_step_.register_fake(lambda *arguments: None)
