"""The accuracy of a linear classifier on frozen features: multinomial logistic regression, solved by L-BFGS.

Every rank keeps its own shard of the features, and the ranks add up loss and gradient. A large shard stays in the dtype
that it has, and a fit reads it block by block, so that neither an f32 copy of it nor its logits are ever in memory.

Legend: N training rows and M test rows of this rank, D feature size, n rows of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.distributed import all_gather_uneven, all_reduce_sum, rank
from caco_fast.errors import UserError
from caco_fast.ops.tiling import f32_products

# Weights of |W|^2 / 2 to try, from strong to weak. Each fit starts from the solution of the one before.
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
HELD_OUT = 0.1
# n; with their logits for 1,000 classes a block takes 100 MiB at D 2048.
BLOCK = 8192
# Bytes up to which a shard is standardised once, and not anew in every step of a fit.
AT_ONCE = 2**30


@f32_products()
@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    l2: float | None = None,
    max_iter: int = 100,
    train_index: Tensor | None = None,
) -> float:
    """Per cent of test rows [M, D] that the classifier fitted to the training rows [N, D] labels correctly.

    Features are standardised by the training rows' mean and deviation. The loss is mean cross-entropy + l2 |W|^2 / 2
    (no penalty on the bias), minimised by full-batch L-BFGS with strong Wolfe steps, which is deterministic. With `l2`
    None it takes the best of `PENALTIES` on a tenth of the training rows, and fits again to all of them. The test rows
    play no part in the choice.

    Each rank gives its own shard of both sets, and all ranks return the same figure. `train_index` (the dataset index,
    by default the place in rank order) decides which rows are in that tenth, so that it does not depend on the ranks.
    """
    device = train_features.device
    place = _places(len(train_features), train_index, device)
    total, tested = (_over_ranks(count, device) for count in (len(place), len(test_labels)))
    if total == 0 or tested == 0:
        raise UserError(f"linear probe: found {total} training and {tested} test images, expected at least 1 of each")
    if _count_not_finite(train_features) + _count_not_finite(test_features):
        raise UserError("linear probe: some features are NaN or infinite, the encoder has diverged")
    mean, scale = _standardisation(train_features, total)
    train = Rows(train_features, train_labels.to(device, torch.int64), mean, scale).ready()
    test = Rows(test_features.to(device), test_labels.to(device, torch.int64), mean, scale)
    if l2 is None:
        l2 = _choose_penalty(train, place, classes, max_iter) if total >= 20 else PENALTIES[0]
    return test.accuracy(_fit(train, classes, l2, max_iter))


class Rows(NamedTuple):
    """Rows of this rank with their labels; `blocks` gives them standardised."""

    features: Tensor  # [N, D]; without `mean`, [N, D + 1] as `blocks` gives them
    labels: Tensor  # [N]
    mean: Tensor | None  # [D], of the training rows of all ranks
    scale: Tensor | None  # [D], 1 / deviation of them
    chosen: Tensor | None = None  # indices of the rows that count; None: all

    @property
    def own(self) -> int:
        """The number of rows that count, on this rank."""
        return len(self.labels if self.chosen is None else self.chosen)

    @property
    def dim(self) -> int:  # D + 1
        return self.features.shape[1] + (self.mean is not None)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows with zero mean and unit deviation over the training rows, and a 1 for the bias, [n, D + 1]; labels."""
        for start in range(0, self.own, BLOCK):
            at = slice(start, start + BLOCK) if self.chosen is None else self.chosen[start : start + BLOCK]
            rows = self.features[at]
            if self.mean is not None:
                rows = F.pad((rows.float() - self.mean) * self.scale, (0, 1), value=1.0)
            yield rows, self.labels[at]

    def ready(self) -> "Rows":
        """The same rows, standardised at once if they are few."""
        if self.own == 0 or 4 * self.own * self.dim > AT_ONCE:
            return self
        rows, labels = zip(*self.blocks())
        return Rows(torch.cat(rows), torch.cat(labels), None, None)

    def count(self) -> int:
        """The number of rows over all ranks (collective)."""
        return _over_ranks(self.own, self.labels.device)

    def accuracy(self, weight: Tensor) -> float:  # [classes, D + 1]
        """Per cent of the rows of all ranks that the classifier labels correctly (collective)."""
        correct = torch.zeros((), dtype=torch.int64, device=weight.device)
        for rows, labels in self.blocks():
            correct += (rows @ weight.T).argmax(1).eq(labels).sum()
        return 100.0 * int(all_reduce_sum(correct)) / self.count()


def _over_ranks(count: int, device: torch.device) -> int:
    """The sum of a number of all ranks (collective)."""
    return int(all_reduce_sum(torch.tensor(count, device=device)))


def _places(count: int, index: Tensor | None, device: torch.device) -> Tensor:
    """The place of each of this rank's rows among those of all ranks, ordered by their dataset index. [N]"""
    if index is None:
        counts = all_gather_uneven(torch.tensor([count], device=device)).tolist()
        return sum(counts[: rank()]) + torch.arange(count, device=device)
    index = index.to(device, torch.int64)
    return torch.searchsorted(all_gather_uneven(index).sort().values, index)


def _choose_penalty(train: Rows, place: Tensor, classes: int, max_iter: int) -> float:
    total = train.count()
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(total, dtype=torch.bool)
    out[order[: max(1, int(total * HELD_OUT))]] = True
    is_out = out.to(place.device)[place]  # [N]
    kept, held_out = (train._replace(chosen=mask.nonzero().flatten()).ready() for mask in (~is_out, is_out))
    weight, scores = None, []
    for l2 in PENALTIES:
        weight = _fit(kept, classes, l2, max_iter, start=weight)
        scores.append(held_out.accuracy(weight))
    # The first of equal scores has the strongest penalty.
    return PENALTIES[scores.index(max(scores))]


def _standardisation(features: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Mean, and 1 / deviation, of each column over the training rows of all ranks, [D] each."""
    sums = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in features.split(BLOCK):
        sums += part.sum(0, dtype=torch.float64)
    mean = all_reduce_sum(sums) / total
    squares = torch.zeros_like(sums)
    for part in features.split(BLOCK):
        squares += (part.double() - mean).square().sum(0)
    deviation = (all_reduce_sum(squares) / total).sqrt()
    # A column that is constant up to rounding carries no information; dividing by its deviation would amplify noise.
    scale = torch.where(deviation > 1e-6 * (1e-6 + mean.abs()), 1 / deviation, 0.0)
    return mean.float(), scale.float()


def _count_not_finite(features: Tensor) -> int:
    """How many values of all ranks are NaN or infinite (collective)."""
    bad = torch.zeros((), dtype=torch.int64, device=features.device)
    for part in features.split(BLOCK):
        bad += (~part.isfinite()).sum()
    return int(all_reduce_sum(bad))


def _fit(rows: Rows, classes: int, l2: float, max_iter: int, start: Tensor | None = None) -> Tensor:  # [classes, D + 1]
    zeros = torch.zeros(classes, rows.dim, device=rows.features.device)
    weight = (zeros if start is None else start.clone()).requires_grad_()
    count = rows.count()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_iter,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
    )

    def closure() -> Tensor:
        loss, weight.grad = loss_and_gradient(rows, weight.detach(), l2, count)
        return loss

    optimizer.step(closure)
    return weight.detach()


@torch.no_grad()
def loss_and_gradient(rows: Rows, weight: Tensor, l2: float, count: int) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the `count` rows of all ranks + l2 |W|^2 / 2, [], and its gradient [classes, D + 1]."""
    loss = weight.new_zeros((), dtype=torch.float64)
    gradient = torch.zeros_like(weight)
    for x, labels in rows.blocks():
        own = labels.unsqueeze(1)
        log_p = (x @ weight.T).log_softmax(1)  # [n, classes]
        loss -= log_p.gather(1, own).sum(dtype=torch.float64)
        # The derivative of the logits: p minus 1 for the label.
        slope = log_p.exp_().scatter_add_(1, own, torch.full_like(own, -1, dtype=log_p.dtype))
        gradient.addmm_(slope.T, x)
    penalised = F.pad(weight[:, :-1], (0, 1))
    loss = all_reduce_sum(loss) / count + l2 / 2 * penalised.square().sum()
    return loss.to(weight.dtype), all_reduce_sum(gradient) / count + l2 * penalised
