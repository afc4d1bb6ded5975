"""Numbers that change from step to step: as a float, or as a 0-d tensor on the device.

The replay of a CUDA graph repeats floats as they were when it was captured; a tensor it reads anew.
"""

import torch
from torch import Tensor

Rate = float | Tensor


def check_rate(op: str, name: str, rate: Tensor, device: torch.device) -> None:
    """Its place and kind alone: looking at the value would make the host wait for it."""
    if rate.dim() != 0 or not rate.is_floating_point() or rate.device != device:
        found = f"{rate.dtype} {list(rate.shape)} on {rate.device}"
        raise ValueError(f"{op}: {name}: found {found}, wanted a number, or one of 0 dimensions on {device}")


def on_device(rate: Rate, device: torch.device) -> Tensor:
    """As the kernels read it. []"""
    if isinstance(rate, Tensor):
        return rate.to(torch.float32)
    return torch.full((), rate, dtype=torch.float32, device=device)
