"""Numbers that change from step to step: as a float, or as a 0-d tensor on the device.

The replay of a CUDA graph repeats floats as they were when it was captured; a tensor it reads anew.
"""

import torch
from torch import Tensor

Rate = float | Tensor


def check_rate(op: str, name: str, rate: Tensor, device: torch.device) -> None:
    """Refuse a rate of another shape, dtype or device. Its value stays unread: reading it would make the host wait."""
    if rate.dim() != 0 or not rate.is_floating_point() or rate.device != device:
        found = f"{rate.dtype} {list(rate.shape)} on {rate.device}"
        raise ValueError(f"{op}: {name}: found {found}, expected a number, or one of 0 dimensions on {device}")


def on_device(rate: Rate, like: Tensor) -> Tensor:
    """The rate as a tensor [] on the device of `like`, in its dtype."""
    if isinstance(rate, Tensor):
        return rate.to(like.dtype)
    return torch.full((), rate, dtype=like.dtype, device=like.device)
