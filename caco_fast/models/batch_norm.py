"""BatchNorm of several views that pass as one batch: the statistics are each view's own, over all ranks.

Legend: S segments (views) of a batch, B rows of each on this rank, C channels, n values per channel of a segment over
all ranks; x input, y output, dx and dy their gradients, xhat = (x - mean) / sigma.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from caco_fast.distributed import all_gather_rows, all_reduce_sum, world_size
from caco_fast.errors import UserError
from caco_fast.models.batch_norm_kernels import kernels_for


class SegmentedBatchNorm(_BatchNorm):
    """BatchNorm of `segments` equal parts of the batch, each with statistics of its own over all ranks.

    [S * B, C, ...] to the same shape: what S forwards of [B, C, ...] give, the running statistics included, which
    take the segments in order. Over several ranks one collective forward and one backward serve all segments; the
    ranks may bring different B. `segmented` sets `segments`.
    """

    segments = 1
    # Whether views together cost less than views apart.
    joins_views = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"{type(self).__name__}: want [B, channels, ...], found {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        normalise = super().forward
        if not self.training:
            return normalise(input)
        if input.shape[0] % self.segments:
            found = f"{list(input.shape)} in {self.segments} segments"
            raise ValueError(f"{type(self).__name__}: want [segments * B, channels, ...], found {found}")
        if world_size() > 1:
            return self._over_ranks(input)
        if self.segments == 1:
            return normalise(input)
        return torch.cat([normalise(segment) for segment in input.chunk(self.segments)])

    def _over_ranks(self, input: Tensor) -> Tensor:
        output, mean, variance, count = _OverRanks.apply(input, self.weight, self.bias, self.eps, self.segments)
        with torch.no_grad():
            self.num_batches_tracked.add_(self.segments)
            unbiased = variance * (count / (count - 1))
            for segment in range(self.segments):
                self.running_mean.lerp_(mean[segment], self.momentum)
                self.running_var.lerp_(unbiased[segment], self.momentum)
        return output


class SegmentedBatchNormAct(SegmentedBatchNorm):
    """The same followed by what timm's BatchNormAct2d holds beside it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


REPLACED = {
    nn.BatchNorm1d: SegmentedBatchNorm,
    nn.BatchNorm2d: SegmentedBatchNorm,
    BatchNormAct2d: SegmentedBatchNormAct,
}


def segment_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm that has a segmented form in that form; the keys of its state_dict stay."""
    for name, child in module.named_children():
        setattr(module, name, segment_batch_norm(child))
    form = REPLACED.get(type(module))
    if form is None or not (module.affine and module.track_running_stats and module.momentum is not None):
        return module
    segmented = form(module.num_features, module.eps, module.momentum, device=module.weight.device)
    for name, child in module.named_children():
        segmented.add_module(name, child)
    segmented.to(module.weight.dtype).load_state_dict(module.state_dict())
    for ours, theirs in zip(segmented.parameters(), module.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    segmented.training = module.training
    return segmented


def separable(module: nn.Module) -> bool:
    """Whether several views may pass `module` as one batch: each of its BatchNorms can tell them apart, and gains."""
    return not any(_mixes_views(child) or not getattr(child, "joins_views", True) for child in module.modules())


def require_statistics_of_all_ranks(module: nn.Module) -> None:
    """Raises UserError where a BatchNorm of `module` would take its statistics from this rank alone."""
    for child in module.modules():
        if _mixes_views(child):
            raise UserError(f"{child} has no statistics over several ranks; use one rank, or a ResNet")


def _mixes_views(module: nn.Module) -> bool:
    """Whether it takes, or by its buffers seems to take, statistics over all rows of a batch."""
    tracks = any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))
    return (tracks or isinstance(module, _BatchNorm)) and not isinstance(module, SegmentedBatchNorm)


@contextmanager
def segmented(module: nn.Module, segments: int) -> Iterator[None]:
    """Inside, the BatchNorms of `module` take their batch for `segments` views one after the other."""
    norms = [child for child in module.modules() if isinstance(child, SegmentedBatchNorm)]
    for norm in norms:
        norm.segments = segments
    try:
        yield
    finally:
        for norm in norms:
            norm.segments = 1


# Operations of their own, because torch.compile cannot look into a collective.
@torch.library.custom_op("caco_fast::gather_ranks", mutates_args=())
def _gather_ranks(value: Tensor) -> Tensor:  # [...] -> [ranks, ...]
    return all_gather_rows(value.unsqueeze(0))


@_gather_ranks.register_fake
def _(value: Tensor) -> Tensor:
    return value.new_empty((world_size(), *value.shape))


@torch.library.custom_op("caco_fast::sum_ranks", mutates_args=())
def _sum_ranks(value: Tensor) -> Tensor:
    return all_reduce_sum(value.clone())


@_sum_ranks.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class _OverRanks(torch.autograd.Function):
    """y = weight xhat + bias; dx = weight / sigma (dy - mean(dy) - xhat mean(dy xhat)), the means over all ranks."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor, eps: float, segments: int):
        kernels = kernels_for(input)
        own_mean, own_variance = kernels.moments(input, segments, weight.dtype)  # [S, C] each
        own_count = torch.full_like(own_mean[:, :1], input.numel() // (segments * input.shape[1]))  # [S, 1]
        gathered = _gather_ranks(torch.cat([own_mean, own_variance, own_count], dim=1))  # [ranks, S, 2 C + 1]
        channels = input.shape[1]
        means, variances, counts = gathered.split([channels, channels, 1], dim=2)
        # Chan, Golub and LeVeque (1979): exact from moments of the parts, without the cancellation of E[x^2] - E[x]^2.
        count = counts.sum(dim=0)  # [S, 1]
        mean = (counts * means).sum(dim=0) / count
        variance = (counts * (variances + (means - mean).square())).sum(dim=0) / count
        inverse = torch.rsqrt(variance + eps)
        output = kernels.normalise(input, weight, bias, mean, inverse, eps)
        ctx.save_for_backward(input, weight, mean, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor):
        input, weight, mean, inverse, count = ctx.saved_tensors
        kernels = kernels_for(input)
        sums = kernels.sums(grad, input, mean, inverse)  # [2, S, C]: dy, and dy (x - mean)
        of_input = kernels.input_gradient(grad, input, weight, mean, inverse, _sum_ranks(sums), count)
        # Gradients of weight and bias stay local: DistributedDataParallel averages them with all others.
        of_bias, of_weight = sums[0].sum(dim=0), (sums[1] * inverse).sum(dim=0)
        return of_input, of_weight, of_bias, None, None
