"""BatchNorm whose statistics are those of all ranks, on any device.

Legend: n values per channel over all ranks, dy gradient of the output, xhat normalised input.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from caco_fast.distributed import all_reduce_sum
from caco_fast.errors import UserError


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with each BatchNorm taking its statistics over all ranks; the keys of its state_dict stay.

    On GPUs these are torch's, which has no CPU implementation; on the CPU (gloo) those of this file.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise_batch_norm(child, device))
    if not isinstance(module, _BatchNorm) or isinstance(module, SyncedBatchNorm):
        return module
    plain = module.affine and module.track_running_stats and module.momentum is not None
    if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d) or not plain:
        raise UserError(f"{module} has no statistics over several CPU ranks; use one rank, GPUs, or a ResNet")
    synced = SyncedBatchNorm(module.num_features, module.eps, module.momentum)
    synced.to(module.weight).load_state_dict(module.state_dict())
    synced.train(module.training)
    for ours, theirs in zip(synced.parameters(), module.parameters()):
        ours.requires_grad_(theirs.requires_grad)
    return synced


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm over the batch dimension, all positions and all ranks: [B, channels, ...] to the same shape."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncedBatchNorm: want [B, channels, ...], found {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return output


class _Normalise(torch.autograd.Function):
    """y = weight xhat + bias; dx = weight / sigma (dy - mean(dy) - xhat mean(dy xhat)), the means over all ranks."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor, eps: float):
        wide = input.to(weight.dtype)
        axes = [0, *range(2, wide.dim())]
        total = torch.cat([wide.sum(axes), wide.new_tensor([wide.numel() / wide.shape[1]])])
        all_reduce_sum(total)
        count = total[-1]
        mean = total[:-1] / count
        shape = (1, -1, *[1] * (wide.dim() - 2))
        centred = wide - mean.view(shape)
        # The second collective buys a variance without cancellation.
        square = (centred * centred).sum(axes)
        all_reduce_sum(square)
        variance = square / count
        inverse = torch.rsqrt(variance + eps)
        normalised = centred * inverse.view(shape)
        ctx.save_for_backward(normalised, weight, inverse, count)
        output = torch.addcmul(bias.view(shape), normalised, weight.view(shape)).to(input.dtype)
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor):
        normalised, weight, inverse, count = ctx.saved_tensors
        wide = grad.to(weight.dtype)
        axes, shape = [0, *range(2, wide.dim())], (1, -1, *[1] * (wide.dim() - 2))
        of_bias, of_weight = wide.sum(axes), (wide * normalised).sum(axes)
        both = torch.stack([of_bias, of_weight])
        all_reduce_sum(both)
        mean_grad, mean_product = (both / count).unbind()
        of_input = wide - mean_grad.view(shape) - normalised * mean_product.view(shape)
        of_input *= (weight * inverse).view(shape)
        # Gradients of weight and bias stay local: DistributedDataParallel averages them with all others.
        return of_input.to(grad.dtype), of_weight, of_bias, None
