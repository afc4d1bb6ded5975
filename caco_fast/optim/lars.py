"""LARS (You et al., arXiv 1708.03888) as contrastive pre-training uses it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from caco_fast.ops import lars_step_


class LARS(Optimizer):
    """SGD with momentum whose step on each tensor is scaled by its trust ratio.

    For a parameter w of two or more dimensions with gradient d:

        d <- d + weight_decay w
        d <- trust |w| / |d| d          (unscaled if either norm is 0)
        v <- momentum v + d
        w <- w - lr v

    With `lr_in_velocity` the last two lines are those of SimCLR's code, which differ where lr changes:

        v <- momentum v + lr d
        w <- w - v

    Tensors of one dimension (biases, BatchNorm) get neither decay nor trust scaling. The norms never leave the device.

    Under a GradScaler it unscales and skips on the device, as torch's fused optimisers do: the scaler sets `grad_scale`
    and `found_inf` for the call of `step`.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1.5e-6,
        trust: float = 0.001,
        lr_in_velocity: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("trust", trust)):
            if not value >= 0.0:
                raise ValueError(f"LARS: {name} must not be negative, found {value}")
        options = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, lr_in_velocity=lr_in_velocity)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            lars_step_(
                params,
                [p.grad for p in params],
                [self._velocity(p) for p in params],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                trust=group["trust"],
                # A state that was saved before this setting has none.
                lr_in_velocity=group.get("lr_in_velocity", False),
                grad_scale=getattr(self, "grad_scale", None),
                skip=getattr(self, "found_inf", None),
            )
        return loss

    def _velocity(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state["velocity"]
