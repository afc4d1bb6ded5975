"""What the encoders compute in."""

import torch

from caco_fast.errors import UserError

AUTOCAST = {"f32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of a precision on a device; None computes in f32 (or TF32).

    Raises:
        UserError: an unknown precision, or one that the device does not have.
    """
    if precision not in AUTOCAST:
        raise UserError(f"trainer.precision: found '{precision}', want one of {', '.join(AUTOCAST)}")
    if device.type == "cpu" and precision in ("fp16", "tf32"):
        raise UserError(f"trainer.precision: {precision} needs a GPU; on the CPU use f32 or bf16")
    if device.type == "cuda" and precision == "bf16" and torch.cuda.get_device_capability(device)[0] < 8:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"trainer.precision: {name} has no bf16; use trainer.precision=fp16")
    if device.type == "cuda":
        # Under bf16 and fp16 autocast what stays in f32, such as the bank operations and kNN, is meant to be f32.
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return AUTOCAST[precision]


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of fp16 gradients; disabled, so transparent, for every other precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
