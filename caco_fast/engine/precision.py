"""The precision that the encoders compute in, and the optimiser's step under the gradient scaling of fp16."""

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from caco_fast.distributed import broadcast_object
from caco_fast.errors import UserError
from caco_fast.host import computes_in_bf16

# A loss scale under which gradients overflow for another reason than their size.
LEAST_SCALE = 2.0**-10

AUTOCAST = {"f32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def settled_precision(precision: str, device: torch.device) -> str:
    """The precision that `auto` stands for on a device: bf16 if it has that, else fp16 on a GPU, f32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    # Without instructions for it bf16 is emulated, and several times slower than f32.
    return "bf16" if computes_in_bf16() else "f32"


def autocast_dtype(precision: str, device: torch.device, key: str = "trainer.precision") -> torch.dtype | None:
    """The autocast dtype of a precision on a device; None computes in f32 (or TF32).

    Raises:
        UserError: the device does not have this precision.
    """
    if device.type == "cpu" and precision in ("fp16", "tf32"):
        raise UserError(f"{key}: {precision} needs a GPU; on the CPU use f32 or bf16")
    if device.type == "cuda" and precision == "bf16" and torch.cuda.get_device_capability(device)[0] < 8:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{key}: {name} has no bf16; use {key}=fp16")
    return AUTOCAST[precision]


def prepare_frozen(precision: str, device: torch.device, deterministic: bool) -> tuple[str, torch.dtype | None]:
    """Set this process up for a frozen encoder: its precision, and the dtype of autocast, None for none (collective).

    Raises:
        UserError: the device does not have this precision.
    """
    # Rank 0 decides, because all ranks have one precision.
    settled = broadcast_object(settled_precision(precision, device))
    autocast = autocast_dtype(settled, device, key="precision")
    use_tf32(settled == "tf32")
    tune_convolutions(deterministic)
    return settled, autocast


def use_tf32(allowed: bool) -> None:
    """Let every f32 product and convolution of this process compute in TF32 on a GPU, or in f32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def tune_convolutions(deterministic: bool) -> None:
    """Let cuDNN time its algorithms for each new shape and keep the fastest, unless all results must repeat."""
    torch.backends.cudnn.benchmark = not deterministic


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of fp16 gradients. For every other precision it is disabled and changes nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def optimizer_step(
    optimizer: Optimizer, scaler: torch.amp.GradScaler, clip: float = 0.0
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Take the optimiser's step, after the backward pass of the scaled loss.

    clip: the largest norm of all gradients together; larger ones are scaled down to it. 0 leaves them as they are.

    Returns:
        With a scaler, a 0-d flag on the device. The flag is not 0 if a gradient overflowed and the optimiser has
        skipped the step. Bank and key encoder take the flag and skip it too, and the host never reads it. All ranks
        have the same flag, because DistributedDataParallel has averaged their gradients. Without a scaler, None.
        The norm of the gradients before clipping, 0-d on the device; 0 in a skipped step.
    """
    if scaler.is_enabled():
        # Unscaled before the step, so that the norms of LARS are those of the gradients themselves.
        scaler.unscale_(optimizer)
    trained = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
    norm = get_total_norm([value.grad for value in trained])
    if clip:
        clip_grads_with_norm_(trained, clip, norm)
    if not scaler.is_enabled():
        optimizer.step()
        return None, norm
    scaler.step(optimizer)
    (overflowed,) = scaler._found_inf_per_device(optimizer).values()  # torch has no public name for it
    scaler.update()
    return overflowed, norm.masked_fill(overflowed != 0, 0)


def require_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Check that the scale has not fallen too far. The host waits for it.

    Raises:
        UserError: the scale is so small that no step can succeed.
    """
    if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
        raise UserError(
            f"trainer.precision: the fp16 gradients are not finite at step {step} even with the loss scaled by "
            f"{scaler.get_scale():.1g}, so that every step is skipped; lower optimizer.lr, or take bf16 or f32"
        )
