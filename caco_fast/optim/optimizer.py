"""The encoder's optimiser from its settings."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from caco_fast.errors import UserError
from caco_fast.optim.apex import fused_sgd
from caco_fast.optim.lars import LARS
from caco_fast.settings import setting, switch

NAMES = ("lars", "sgd", "adamw")


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = setting("lars", "lars, sgd or adamw; Adam is adamw with weight_decay 0")
    lr: float = setting(0.3, "learning rate; with scale_lr the one at batch 256")
    scale_lr: bool = setting(True, "multiply lr by batch / 256; false: use lr as it is")
    momentum: float = setting(0.9, "momentum of lars and sgd")
    weight_decay: float = setting(1.5e-6, "weight decay; lars leaves one-dimensional tensors out")
    decay_1d: bool = setting(
        True,
        "whether sgd and adamw decay one-dimensional tensors (biases, norms) too, as the code of MoCo v2 and v3 does",
    )
    trust: float = setting(0.001, "trust coefficient of lars")
    lr_in_velocity: bool = setting(False, "lars: v <- momentum v + lr d; w <- w - v, as in SimCLR's code")
    apex: str = setting("off", "FusedSGD of NVIDIA Apex in place of torch's sgd: on, off, or auto: if it is built")

    def __post_init__(self) -> None:
        object.__setattr__(self, "apex", switch("optimizer.apex", self.apex))
        if self.name not in NAMES:
            raise UserError(f"optimizer.name: found '{self.name}', expected one of {', '.join(NAMES)}")
        if not self.lr > 0:
            raise UserError(f"optimizer.lr: found {self.lr}, expected a number above 0")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum: found {self.momentum}, expected a number in [0, 1)")
        if not self.weight_decay >= 0:
            raise UserError(f"optimizer.weight_decay: found {self.weight_decay}, expected 0 or more")
        if not self.trust > 0:
            raise UserError(f"optimizer.trust: found {self.trust}, expected a number above 0")
        if self.lr_in_velocity and self.name != "lars":
            raise UserError(f"optimizer.lr_in_velocity: it is a setting of lars, not of {self.name}; set it to false")
        if self.apex == "on" and self.name != "sgd":
            raise UserError(f"optimizer.apex: Apex serves sgd here, not {self.name}; set it to off or auto")


def peak_lr(config: OptimizerConfig, batch_size: int) -> float:
    """The learning rate after warm-up at this global batch size."""
    return config.lr * batch_size / 256 if config.scale_lr else config.lr


def build_optimizer(
    config: OptimizerConfig,
    params: Iterable[Tensor],
    batch_size: int,
    scaled: bool = False,
    captured: bool = False,
) -> Optimizer:
    """The optimiser of the settings.

    scaled: the optimiser runs under a GradScaler, and reads the overflow flag on the device. captured: it runs in a
    CUDA graph, and reads its lr on the device too.
    """
    params = list(params)
    if config.apex == "on" and captured:
        raise UserError("optimizer.apex: FusedSGD reads its lr on the host; set it or trainer.cuda_graph to off")
    optimizer = _optimizer(config, _groups(config, params), peak_lr(config, batch_size), scaled, captured)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def _groups(config: OptimizerConfig, params: list[Tensor]) -> list[dict[str, Any]]:
    """The groups of parameters: all in one, unless some are not decayed."""
    if config.decay_1d or config.name == "lars":
        return [{"params": params}]
    several = [value for value in params if value.ndim > 1]
    one = [value for value in params if value.ndim <= 1]
    groups = [{"params": several}, {"params": one, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]], lr: float, scaled: bool, captured: bool
) -> Optimizer:
    # Of torch's own optimisers the fused form alone leaves lr, and whether a step is skipped, to the device.
    fused = True if scaled or captured else None
    if config.name == "lars":
        return LARS(groups, lr, config.momentum, config.weight_decay, config.trust, config.lr_in_velocity)
    if config.name == "sgd":
        apex = "off" if captured else config.apex
        if (of_apex := fused_sgd(apex, groups, lr, config.momentum, config.weight_decay)) is not None:
            return of_apex
        optimizer = SGD(groups, lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
        if fused:
            optimizer.register_step_pre_hook(_start_at_rest)
        return optimizer
    if captured:
        # It warns at the steps before the capture.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    return AdamW(groups, lr, weight_decay=config.weight_decay, fused=fused, capturable=captured)


def _start_at_rest(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make momentum buffers of zeros.

    torch's fused SGD (2.11) makes them of uninitialised memory. A first step that is skipped leaves that as it is, and
    the second step takes it for momentum.
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Replace the settings in a checkpoint's state by this optimiser's own: a resumed run follows its configuration.

    torch would put back those of the run that wrote it: weight decay, momentum, and the code that computes a step.
    """
    if len(state["param_groups"]) != len(optimizer.param_groups):
        raise UserError("it has other groups of parameters; set optimizer.decay_1d as it was")
    groups = zip(state["param_groups"], optimizer.param_groups)
    return {**state, "param_groups": [{**own, "params": saved["params"]} for saved, own in groups]}
