"""LARS (You et al., arXiv 1708.03888) as contrastive pre-training uses it."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum whose step on each tensor is scaled by its trust ratio.

    For a parameter w of two or more dimensions with gradient d:

        d <- d + weight_decay w
        d <- trust |w| / |d| d          (unscaled where either norm is 0)
        v <- momentum v + d
        w <- w - lr v

    Tensors of one dimension (biases, BatchNorm) get neither decay nor trust scaling. The norms never leave the device.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1.5e-6,
        trust: float = 0.001,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("trust", trust)):
            if not value >= 0.0:
                raise ValueError(f"LARS: {name} must not be negative, found {value}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for trusted in (True, False):
                params = [p for p in group["params"] if p.grad is not None and (p.ndim > 1) == trusted]
                if params:
                    self._step_tensors(params, group, trusted)
        return loss

    def _step_tensors(self, params: list[Tensor], group: dict, trusted: bool) -> None:
        velocities = []
        for p in params:
            state = self.state[p]
            if "velocity" not in state:
                state["velocity"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            velocities.append(state["velocity"])
        grads = [p.grad for p in params]
        if trusted:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            ratios = []
            for weight, grad in zip(torch._foreach_norm(params), torch._foreach_norm(grads)):
                known = (weight > 0) & (grad > 0)
                ratios.append(torch.where(known, group["trust"] * weight / grad, torch.ones_like(weight)))
            torch._foreach_mul_(grads, ratios)
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, grads)
        torch._foreach_add_(params, velocities, alpha=-group["lr"])
