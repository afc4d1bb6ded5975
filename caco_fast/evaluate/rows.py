"""Rows of features over several ranks, in the coordinates in which linear classifiers are fitted.

A large shard stays in the dtype and the file that it has, and is read block by block. Neither a converted copy of it
nor its logits are ever in memory.

Legend: N rows of this rank, D feature size, R <= D coordinates, K classes, n rows of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.distributed import all_gather_uneven, all_reduce_sum, rank
from caco_fast.errors import UserError
from caco_fast.ops.tiling import f32_products

# n; with their logits for 1,000 classes a block takes 100 MiB at D 2048.
BLOCK = 8192
# Bytes up to which a shard is converted once, and not anew in every step of a fit.
AT_ONCE = 2**30


class Coordinates(NamedTuple):
    """Coordinates z = (x - mean) M of features, in which they are uncorrelated; |W| is the norm of a fit in them."""

    mean: Tensor  # [D]
    matrix: Tensor  # [D, R], M: a rotation, after a scaling of each feature if they are to be standardised
    variance: Tensor  # [R], of z over the training rows of all ranks


class Rows(NamedTuple):
    """Rows of this rank with their labels; `blocks` gives them for a fit."""

    features: Tensor  # [N, D]; with `whole`, [N, R + 1] as `blocks` gives them
    labels: Tensor  # [N], or [N, K] of several labels each
    at: Coordinates
    dtype: torch.dtype = torch.float32  # to compute in
    chosen: Tensor | None = None  # indices of the rows that count; None: all
    whole: bool = False  # the features are coordinates already

    @property
    def own(self) -> int:
        """The number of rows that count, on this rank."""
        return len(self.labels if self.chosen is None else self.chosen)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows [n, D + 1] around the mean, or their coordinates [n, R + 1]; the last column is 1. And their labels."""
        for start in range(0, self.own, BLOCK):
            at = slice(start, start + BLOCK) if self.chosen is None else self.chosen[start : start + BLOCK]
            yield self._block(at), self.labels[at]

    def _block(self, at: slice | Tensor) -> Tensor:
        rows = self.features[at]
        return rows if self.whole else F.pad(rows.to(self.dtype) - self.at.mean.to(self.dtype), (0, 1), value=1.0)

    def outward(self, weight: Tensor) -> Tensor:  # [K, R + 1] -> as many columns as `blocks` has
        """Weights of coordinates as weights of what `blocks` gives."""
        if self.whole:
            return weight
        return torch.cat([weight[:, :-1] @ self.at.matrix.to(weight.dtype).T, weight[:, -1:]], 1)

    def inward(self, gradient: Tensor) -> Tensor:
        """The gradient of the weights of what `blocks` gives, as that of the weights of coordinates. [K, R + 1]"""
        if self.whole:
            return gradient
        return torch.cat([gradient[:, :-1] @ self.at.matrix.to(gradient.dtype), gradient[:, -1:]], 1)

    @f32_products()
    def ready(self) -> "Rows":
        """The same rows, as coordinates at once if they are few."""
        dim = self.at.matrix.shape[1] + 1
        if self.whole or self.own == 0 or self.dtype.itemsize * self.own * dim > AT_ONCE:
            return self
        every = [(self._coordinates(rows), labels) for rows, labels in self.blocks()]
        features, labels = (torch.cat(parts) for parts in zip(*every))
        return self._replace(features=features, labels=labels, chosen=None, whole=True)

    def _coordinates(self, rows: Tensor) -> Tensor:
        return torch.cat([rows[:, :-1] @ self.at.matrix.to(rows.dtype), rows[:, -1:]], 1)

    def take(self, mask: Tensor) -> "Rows":
        """The rows of a mask [N]. A small shard is copied, so that its blocks need no look-up."""
        index = mask.nonzero().flatten()
        if self.whole:
            return self._replace(features=self.features[index], labels=self.labels[index])
        return self._replace(chosen=index if self.chosen is None else self.chosen[index])

    def count(self) -> int:
        """The number of rows over all ranks (collective)."""
        return over_ranks(self.own, self.labels.device)


def over_ranks(count: int, device: torch.device) -> int:
    """The sum of a number of all ranks (collective)."""
    return int(all_reduce_sum(torch.tensor(count, device=device)))


def places(count: int, index: Tensor | None, device: torch.device) -> Tensor:
    """The place of each of this rank's rows among those of all ranks, ordered by their dataset index. [N]"""
    if index is None:
        counts = all_gather_uneven(torch.tensor([count], device=device)).tolist()
        return sum(counts[: rank()]) + torch.arange(count, device=device)
    index = index.to(device, torch.int64)
    return torch.searchsorted(all_gather_uneven(index).sort().values, index)


def require_finite(name: str, *features: Tensor) -> None:
    """Raise UserError on all ranks if a feature of any rank is NaN or infinite (collective). name: begins the line."""
    bad = torch.zeros((), dtype=torch.int64, device=features[0].device)
    for part in features:
        for block in part.split(BLOCK):
            bad += (~block.isfinite()).sum().to(bad.device)
    if int(all_reduce_sum(bad)):
        raise UserError(f"{name}: some features are NaN or infinite, the encoder has diverged")


@f32_products()
@torch.no_grad()
def coordinates(features: Tensor, *, standardise: bool = False, centre: bool = True) -> Coordinates:
    """The principal axes of the rows [N, D] of all ranks, in f64 (collective).

    A fit in them has the same minimum as in the features, because a rotation keeps |W|. It converges in fewer steps,
    because each direction can be scaled by its variance. Directions in which no row differs are left out: a weight
    there is 0.

    standardise: scale each feature to unit deviation first. centre: about the mean; else about 0.
    """
    total = over_ranks(len(features), features.device)
    mean, scale = _moments(features, total)
    scale = scale if standardise else torch.ones_like(scale)
    mean = mean if centre else torch.zeros_like(mean)
    dim = features.shape[1]
    if total < dim:
        # The rows of all ranks are less than the matrix below, and span fewer directions.
        rows = (all_gather_uneven(features).double() - mean) * scale
        _, deviation, axes = torch.linalg.svd(rows, full_matrices=False)
        kept = deviation > 1e-12 * deviation[0]
        kept[0] = True
        return Coordinates(mean, scale.unsqueeze(1) * axes[kept].T, deviation[kept].square() / total)
    covariance = mean.new_zeros(dim, dim)
    exact = torch.float64 if 8 * len(features) * dim <= AT_ONCE else torch.float32
    for part in features.split(BLOCK):
        rows = ((part.to(exact) - mean.to(exact)) * scale.to(exact)).contiguous()
        covariance += rows.T @ rows
    variance, axes = torch.linalg.eigh(all_reduce_sum(covariance) / total)
    return Coordinates(mean, scale.unsqueeze(1) * axes, variance.clamp_min(0))


def _moments(features: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Mean, and 1 / deviation, of each column over the rows of all ranks, [D] each in f64."""
    sums = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in features.split(BLOCK):
        sums += part.sum(0, dtype=torch.float64)
    mean = all_reduce_sum(sums) / total
    squares = torch.zeros_like(sums)
    for part in features.split(BLOCK):
        squares += (part.double() - mean).square().sum(0)
    deviation = (all_reduce_sum(squares) / total).sqrt()
    # A column that is constant up to rounding carries no information; dividing by its deviation would amplify noise.
    return mean, torch.where(deviation > 1e-6 * (1e-6 + mean.abs()), 1 / deviation, 0.0)
