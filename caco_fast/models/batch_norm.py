"""BatchNorm of several views in one batch, with the statistics of each view, taken over all ranks.

Legend: S segments (views) of a batch, B rows of each on this rank, C channels, n values per channel of a segment over
all ranks; x input, y output, dx and dy their gradients, xhat = (x - mean) / sigma.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from caco_fast.distributed import all_gather_rows, all_reduce_sum, world_size
from caco_fast.errors import UserError
from caco_fast.models.batch_norm_kernels import Running, kernels_for


class SegmentedBatchNorm(_BatchNorm):
    """BatchNorm of `segments` equal parts of the batch, each with statistics of its own over all ranks.

    [S * B, C, ...] to the same shape: the result of S forwards of [B, C, ...], including the running statistics, which
    take the segments in order. On several ranks one collective forward and one backward serve all segments, and the
    ranks may bring different B.

    A norm may hold further sets of weights and statistics (`add_norm_sets`): set 0 is its own, set n is `further[n-1]`.
    The context `segmented` sets `segments` and `norm_set`.
    """

    segments = 1
    norm_set = 0
    # Whether views together cost less than views apart.
    joins_views = True
    # Whether forwards may be repeated in the backward pass (`recompute_activations`).
    recomputes = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.further = nn.ModuleList()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"{type(self).__name__}: found {list(input.shape)}, expected [B, channels, ...]")

    def forward(self, input: Tensor) -> Tensor:
        if self.norm_set:
            return self.further[self.norm_set - 1](input)
        normalise = super().forward
        if not self.training:
            return normalise(input)
        if self.recomputes and torch._C._current_graph_task_id() >= 0:
            # Within a backward pass: the running statistics have these values already.
            with self._statistics_kept():
                return self._over_ranks(input) if world_size() > 1 else normalise(input)
        if input.shape[0] % self.segments:
            found = f"{list(input.shape)} in {self.segments} segments"
            raise ValueError(f"{type(self).__name__}: found {found}, expected [segments * B, channels, ...]")
        if world_size() > 1:
            return self._over_ranks(input)
        if self.segments == 1:
            return normalise(input)
        return torch.cat([normalise(segment) for segment in input.chunk(self.segments)])

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """A context in which a forward leaves the running statistics as they are."""
        own = self.running_mean, self.running_var, self.num_batches_tracked
        self.running_mean, self.running_var, self.num_batches_tracked = (value.clone() for value in own)
        try:
            yield
        finally:
            self.running_mean, self.running_var, self.num_batches_tracked = own

    def _over_ranks(self, input: Tensor) -> Tensor:
        running = Running(self.running_mean, self.running_var, self.momentum)
        output, mean, variance, count = _OverRanks.apply(
            input, self.weight, self.bias, running, self.eps, self.segments
        )
        with torch.no_grad():
            self.num_batches_tracked.add_(self.segments)
            if variance is None:
                return output
            unbiased = variance * (count / (count - 1))
            for segment in range(self.segments):
                self.running_mean.lerp_(mean[segment], self.momentum)
                self.running_var.lerp_(unbiased[segment], self.momentum)
        return output


class SegmentedBatchNormAct(SegmentedBatchNorm):
    """SegmentedBatchNorm followed by the dropout and activation that timm's BatchNormAct2d holds."""

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
    """Replace every BatchNorm of `module` that has a segmented form by that form; the keys of state_dict stay."""
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


def add_norm_sets(module: nn.Module, sets: int, momentum: float = 0.01) -> None:
    """Give every BatchNorm of `module` the weights and statistics of `sets` sets in all, which start equal.

    Source: CLAE (arXiv 2010.12050), section 3.3, with its momentum of 0.01 for the running statistics of further sets.

    Raises:
        UserError: a BatchNorm that can hold one set only.
    """
    if sets == 1:
        return
    for child in list(module.modules()):
        if mixes_views(child) or (isinstance(child, SegmentedBatchNorm) and not child.joins_views):
            raise UserError(f"{type(child).__name__} can't hold a second set of statistics; set backbone.apex to off")
        if isinstance(child, SegmentedBatchNorm):
            child.further = nn.ModuleList(_further_set(child, momentum) for _ in range(sets - 1))


def drop_norm_sets(module: nn.Module) -> None:
    """Leave only set 0 in every BatchNorm of `module`."""
    for child in list(module.modules()):
        if isinstance(child, SegmentedBatchNorm):
            child.further = nn.ModuleList()


def _further_set(norm: SegmentedBatchNorm, momentum: float) -> SegmentedBatchNorm:
    further = SegmentedBatchNorm(norm.num_features, norm.eps, momentum, device=norm.weight.device)
    further.to(norm.weight.dtype)
    with torch.no_grad():
        further.weight.copy_(norm.weight)
        further.bias.copy_(norm.bias)
    for ours, theirs in zip(further.parameters(), norm.parameters()):
        ours.requires_grad_(theirs.requires_grad)
    return further


def separable(module: nn.Module) -> bool:
    """Whether several views may pass `module` as one batch: each BatchNorm in it can tell them apart and gains."""
    return not any(mixes_views(child) or not getattr(child, "joins_views", True) for child in module.modules())


def require_statistics_of_all_ranks(module: nn.Module) -> None:
    """Raise UserError if a BatchNorm of `module` would take its statistics from this rank alone."""
    for child in module.modules():
        if mixes_views(child):
            raise UserError(f"{child} has no statistics over several ranks; use one rank, or a ResNet")


def mixes_views(module: nn.Module) -> bool:
    """Whether a module takes statistics over all rows of a batch, or seems to by its buffers."""
    tracks = any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))
    return (tracks or isinstance(module, _BatchNorm)) and not isinstance(module, SegmentedBatchNorm)


@contextmanager
def segmented(module: nn.Module, segments: int, norm_set: int = 0) -> Iterator[None]:
    """A context in which the BatchNorms of `module` see their batch as `segments` views, and use the set `norm_set`."""
    norms = [child for child in module.modules() if isinstance(child, SegmentedBatchNorm)]
    for norm in norms:
        # A further set is reached through the norm that holds it.
        norm.segments, norm.norm_set = segments, norm_set if norm.further else 0
    try:
        yield
    finally:
        for norm in norms:
            norm.segments, norm.norm_set = 1, 0


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
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor, running: Running, eps: float, segments: int):
        kernels = kernels_for(input)
        own_mean, own_spread = kernels.moments(input, segments, weight.dtype, eps)  # [S, C] each
        own_count = torch.full_like(own_mean[:, :1], input.numel() // (segments * input.shape[1]))  # [S, 1]
        gathered = _gather_ranks(torch.cat([own_mean, own_spread, own_count], dim=1))  # [ranks, S, 2 C + 1]
        channels = input.shape[1]
        means, spreads, counts = gathered.split([channels, channels, 1], dim=2)
        mean, inverse, count, variance = kernels.merge(input, means, spreads, counts, running, eps)
        output = kernels.normalise(input, weight, bias, mean, inverse, eps)
        ctx.save_for_backward(input, weight, mean, inverse, count)
        ctx.mark_non_differentiable(mean, count, *([] if variance is None else [variance]))
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
        return of_input, of_weight, of_bias, None, None, None
