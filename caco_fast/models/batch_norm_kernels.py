"""The passes over the activations in a BatchNorm over several ranks: as formulas, and by torch's kernels.

Both take x and dy as [S * B, C, ...] and per-segment values as [S, C], and leave the collectives to the caller.

Legend: N ranks, S segments (views) of a batch, B rows of each on this rank, C channels, n values per channel of a
segment over all ranks; x input, dx and dy the gradients of input and output; spread: what a form sends of its variance.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Running(NamedTuple):
    """Running statistics that a merge may update."""

    mean: Tensor  # [C]
    variance: Tensor  # [C]
    momentum: float


class Merged(NamedTuple):
    mean: Tensor  # [S, C]
    inverse: Tensor  # [S, C], 1 / sigma
    count: Tensor  # [S, 1], n
    # [S, C], for the running statistics; None if the merge has updated them.
    variance: Tensor | None


class Formulas:
    """Plain torch, for the CPU and for torch.compile, which fuses it with its neighbours."""

    @staticmethod
    def moments(x: Tensor, segments: int, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and spread of this rank's values in `dtype`, [S, C] each."""
        wide = x.to(dtype)
        values = x.numel() // (segments * x.shape[1])
        mean = _sum(wide, segments) / values
        return mean, _sum((wide - _broadcast(mean, x)).square(), segments) / values

    @staticmethod
    def merge(
        x: Tensor,
        means: Tensor,  # [N, S, C]
        spreads: Tensor,  # [N, S, C]
        counts: Tensor,  # [N, S, 1]
        running: Running,
        eps: float,
    ) -> Merged:
        """The statistics over all ranks."""
        # Chan, Golub and LeVeque (1979): exact from moments of the parts, without the cancellation of E[x^2] - E[x]^2.
        count = counts.sum(dim=0)
        mean = (counts * means).sum(dim=0) / count
        variance = (counts * (spreads + (means - mean).square())).sum(dim=0) / count
        return Merged(mean, torch.rsqrt(variance + eps), count, variance)

    @staticmethod
    def normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
        """weight (x - mean) / sigma + bias, in the dtype of x."""
        centred = x.to(mean.dtype) - _broadcast(mean, x)
        return torch.addcmul(_broadcast(bias[None], x), centred, _broadcast(weight * inverse, x)).to(x.dtype)

    @staticmethod
    def sums(dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        """The sums of dy and of dy (x - mean) on this rank, [2, S, C]."""
        wide, centred = dy.to(mean.dtype), x.to(mean.dtype) - _broadcast(mean, x)
        return torch.stack([_sum(wide, len(mean)), _sum(wide * centred, len(mean))])

    @staticmethod
    def input_gradient(
        dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, sums: Tensor, count: Tensor
    ) -> Tensor:
        """dx from the sums over all ranks [2, S, C] and n [S, 1]."""
        mean_dy, mean_product = sums / count
        centred = x.to(mean.dtype) - _broadcast(mean, x)
        along = centred * _broadcast(mean_product * inverse.square(), x)
        dx = (dy.to(mean.dtype) - _broadcast(mean_dy, x) - along) * _broadcast(weight * inverse, x)
        return dx.to(dy.dtype)


class CudaKernels:
    """The kernels of torch's SyncBatchNorm, one call per segment. Its layouts: contiguous or channels_last."""

    @staticmethod
    def moments(x: Tensor, segments: int, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
        # The spread is 1 / sqrt(variance + eps).
        found = [torch.batch_norm_stats(part, eps) for part in _parts(x, segments)]
        return torch.stack([mean for mean, _ in found]), torch.stack([inverse for _, inverse in found])

    @staticmethod
    def merge(x: Tensor, means: Tensor, spreads: Tensor, counts: Tensor, running: Running, eps: float) -> Merged:
        # One launch a segment, which updates the running statistics too; the formulas are nine and more.
        segments = zip(_parts(x, means.shape[1]), means.unbind(1), spreads.unbind(1), counts.squeeze(2).unbind(1))
        found = [torch.batch_norm_gather_stats_with_counts(part, m, s, *running, eps, n) for part, m, s, n in segments]
        mean, inverse = (torch.stack(values) for values in zip(*found))
        return Merged(mean, inverse, counts.sum(dim=0), None)

    @staticmethod
    def normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
        parts = _parts(x, len(mean))
        if len(parts) == 1:
            return torch.batch_norm_elemt(parts[0], weight, bias, mean[0], inverse[0], eps)
        output = torch.empty_like(x, memory_format=_layout(x))
        for part, out, m, i in zip(parts, output.chunk(len(mean)), mean, inverse):
            torch.batch_norm_elemt(part, weight, bias, m, i, eps, out=out)
        return output

    @staticmethod
    def sums(dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        segments = zip(_parts(dy, len(mean)), _parts(x, len(mean)), mean, inverse)
        # Only the two sums for the input's gradient are requested.
        found = [torch.batch_norm_backward_reduce(d, p, m, i, None, True, False, False) for d, p, m, i in segments]
        return torch.stack([torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])])

    @staticmethod
    def input_gradient(
        dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, sums: Tensor, count: Tensor
    ) -> Tensor:
        segments = zip(_parts(dy, len(mean)), _parts(x, len(mean)), mean, inverse, *sums, count.to(torch.int32))
        found = [torch.batch_norm_backward_elemt(d, p, m, i, weight, s, t, n) for d, p, m, i, s, t, n in segments]
        return found[0] if len(found) == 1 else torch.cat(found)


def kernels_for(x: Tensor) -> type[Formulas] | type[CudaKernels]:
    return CudaKernels if x.is_cuda and not torch.compiler.is_compiling() else Formulas


def _sum(wide: Tensor, segments: int) -> Tensor:  # [S * B, C, ...] -> [S, C]
    return wide.unflatten(0, (segments, -1)).sum([1, *range(3, wide.dim() + 1)])


def _broadcast(values: Tensor, x: Tensor) -> Tensor:  # [S or 1, C] -> [S * B, C, 1, ...]
    # The values get the rows of x. If x were viewed by segments instead, a custom Function would return a view, and
    # torch refuses an in-place ReLU on that.
    segments, channels = values.shape
    rows = values[:, None].expand(segments, len(x) // segments, channels).reshape(len(x), channels)
    return rows.view(*rows.shape, *[1] * (x.dim() - 2))


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _parts(x: Tensor, segments: int) -> tuple[Tensor, ...]:
    return x.contiguous(memory_format=_layout(x)).chunk(segments)
