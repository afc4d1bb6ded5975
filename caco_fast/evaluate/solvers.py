"""Linear classifiers on frozen features, fitted until they have converged: logistic regression and squared-hinge SVMs.

Both are fitted by L-BFGS in the principal axes of the features (see `coordinates`), each scaled by the square root of
its curvature. The minimum is that of the objective in the features as they are.

Legend: N rows of this rank, D feature size, R coordinates, K classes, n rows of a block, A problems.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.distributed import all_gather_uneven, all_reduce_sum
from caco_fast.evaluate.minimise import minimise
from caco_fast.evaluate.rows import Coordinates, Rows
from caco_fast.ops.tiling import f32_products

log = logging.getLogger("caco_fast.evaluate")

# The norm of the gradient, as a share of that at zero weights, at which a fit has converged.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
MAX_EVALUATIONS = 2000


class Fit(NamedTuple):
    """A fitted classifier in the coordinates of its rows, and how well it converged."""

    weight: Tensor  # [K, R + 1], the last column is the bias about the mean; -inf for a class without a row
    l2: float
    loss: float
    gradient: float  # its norm as a share of that at zero weights
    evaluations: int
    converged: bool


@torch.no_grad()
def logistic_path(
    rows: Rows, classes: int, penalties: Sequence[float], *, tolerance: float | None = None,
    max_evaluations: int = MAX_EVALUATIONS, start: Tensor | None = None,
) -> Iterator[Fit]:  # fmt: skip
    """Logistic regression for each weight of |W|^2 / 2, in the order given, from the solution of the one before.

    The loss is the mean cross-entropy over the rows of all ranks + l2 |W|^2 / 2, without a penalty on the bias: with
    l2 = 1 / (C N) that of scikit-learn. A class without a row gets the bias -inf, since no other one is a minimum
    (collective).

    start: weights [K, R + 1] near the solution for the first penalty.
    """
    problem = _Softmax(rows, classes)
    weight = problem.zeros() if start is None else start[problem.seen].nan_to_num(neginf=0.0)
    for l2 in penalties:
        scale = problem.curvature(l2).rsqrt().to(rows.dtype)
        at_zero = (problem(problem.zeros(), l2)[1] * scale).double().norm().unsqueeze(0)

        found = minimise(
            partial(problem.scaled, scale, l2), (weight / scale).view(1, -1), at_zero,
            tolerance=tolerance or TOLERANCE[rows.dtype], max_evaluations=max_evaluations,
        )  # fmt: skip
        weight = found.point.view_as(weight) * scale
        converged, gradient = bool(found.converged), float(found.gradient)
        if not converged:
            log.warning("logistic regression with l2 %.3g stopped at %.1e of its first gradient", l2, gradient)
        yield Fit(problem.of_all_classes(weight), l2, float(found.loss), gradient, found.evaluations, converged)


class _Softmax:
    """The mean cross-entropy over the rows of all ranks, for the classes that they have."""

    def __init__(self, rows: Rows, classes: int) -> None:
        self.counts = all_reduce_sum(torch.bincount(_chosen(rows), minlength=classes))
        self.total, self.classes = int(self.counts.sum()), classes
        self.seen = self.counts.nonzero().flatten()
        number = torch.cumsum(self.counts > 0, 0) - 1
        self.rows = rows._replace(labels=number[rows.labels])

    def zeros(self) -> Tensor:  # [K seen, R + 1]
        device, dim = self.rows.features.device, self.rows.at.matrix.shape[1] + 1
        return torch.zeros(len(self.seen), dim, dtype=self.rows.dtype, device=device)

    def curvature(self, l2: float) -> Tensor:  # [R + 1] f64
        """The second derivative along each coordinate where every class is equally likely, but for its scale."""
        curvature = F.pad(self.rows.at.variance, (0, 1), value=1.0) / len(self.seen)
        curvature[:-1] += l2
        return curvature

    def __call__(self, weight: Tensor, l2: float) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(self.rows, weight, l2, self.total)

    def scaled(self, scale: Tensor, l2: float, point: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient in variables of which the weights are `scale` times, for `minimise`."""
        loss, gradient = self(point.view(len(self.seen), -1) * scale, l2)
        return loss.unsqueeze(0), (gradient * scale).view(1, -1)

    def of_all_classes(self, weight: Tensor) -> Tensor:
        every = F.pad(weight.new_zeros(self.classes, weight.shape[1] - 1), (0, 1), value=-torch.inf)
        return every.index_copy(0, self.seen, weight)


def features_weights(weight: Tensor, at: Coordinates) -> tuple[Tensor, Tensor]:  # [K, R + 1]
    """Weights [K, D] and bias [K] for features as they are, in f64: the logits are x W^T + b."""
    outward = weight[:, :-1].double() @ at.matrix.T
    return outward, weight[:, -1].double() - outward @ at.mean


@f32_products()
@torch.no_grad()
def accuracy(rows: Rows, weight: Tensor) -> float:
    """Per cent of the rows of all ranks that the classifier labels correctly (collective)."""
    correct = torch.zeros((), dtype=torch.int64, device=weight.device)
    for logits, labels in scores(rows, weight):
        correct += logits.argmax(1).eq(labels).sum()
    return 100.0 * int(all_reduce_sum(correct)) / rows.count()


@f32_products()
@torch.no_grad()
def cross_entropy(rows: Rows, weight: Tensor) -> float:
    """The mean over the rows of all ranks whose class the classifier knows (collective)."""
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for logits, labels in scores(rows, weight):
        # An unknown class costs infinitely much with any penalty.
        loss = F.cross_entropy(logits.double(), labels, reduction="none")
        known = loss.isfinite()
        sums += torch.stack([loss[known].sum(), known.sum()])
    total, count = all_reduce_sum(sums).tolist()
    return total / max(count, 1)


@torch.no_grad()
def scores(rows: Rows, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits [n, K] of this rank's rows, block by block, and their labels."""
    with f32_products():
        outward = rows.outward(weight)
    for x, labels in rows.blocks():
        # Not around the loop: what the caller does between two blocks is its own.
        with f32_products():
            logits = x @ outward.T
        yield logits, labels


def scores_of_all(rows: Rows, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The logits [N of all ranks, K] and the labels of the rows of all ranks, on every rank (collective)."""
    parts = list(scores(rows, weight))
    logits = torch.cat([part for part, _ in parts]) if parts else weight.new_empty(0, len(weight))
    labels = torch.cat([part for _, part in parts]) if parts else rows.labels[:0]
    return all_gather_uneven(logits), all_gather_uneven(labels)


def _chosen(rows: Rows) -> Tensor:
    return rows.labels if rows.chosen is None else rows.labels[rows.chosen]


@f32_products()
@torch.no_grad()
def loss_and_gradient(rows: Rows, weight: Tensor, l2: float, count: int) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the `count` rows of all ranks + l2 |W|^2 / 2, [] f64, and its gradient [K, R + 1]."""
    loss = weight.new_zeros((), dtype=torch.float64)
    outward = rows.outward(weight)
    gradient = torch.zeros_like(outward)
    for x, labels in rows.blocks():
        own = labels.unsqueeze(1)
        log_p = (x @ outward.T).log_softmax(1)  # [n, K]
        loss -= log_p.gather(1, own).sum(dtype=torch.float64)
        # The derivative of the logits: p minus 1 for the label.
        slope = log_p.exp_().scatter_add_(1, own, torch.full_like(own, -1, dtype=log_p.dtype))
        gradient.addmm_(slope.T, x)
    penalised = F.pad(weight[:, :-1], (0, 1))
    loss = all_reduce_sum(loss) / count + l2 / 2 * penalised.square().sum(dtype=torch.float64)
    return loss, rows.inward(all_reduce_sum(gradient)) / count + l2 * penalised


class Columns(NamedTuple):
    """A one-vs-rest problems to solve together: each a class, a C, and a part of the rows that is left out."""

    label: Tensor  # [A] the class
    cost: Tensor  # [A] f64, C
    fold: Tensor  # [A] the fold whose rows are left out; -1: none


@f32_products()
@torch.no_grad()
def squared_hinge(
    rows: Rows, columns: Columns, folds: Tensor, *, positive_weight: float = 2.0, tolerance: float | None = None,
    max_evaluations: int = MAX_EVALUATIONS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Linear SVMs: 1/2 |w|^2 + 1/2 b^2 + C sum_n c_n max(0, 1 - y_n (w x_n + b))^2 for every column (collective).

    The labels of `rows` are [N, K] of 1, -1 and 0, which leaves a row out. c_n is `positive_weight` for 1, else 1. The
    bias is penalised, as in LIBLINEAR with an intercept scaling of 1. folds: [N], the fold of each row. `rows` should
    have coordinates about 0 (`coordinates(..., centre=False)`), in which |w| is that of the features.

    Returns the weights of each column, [A, R + 1], and whether each one converged, [A].
    """
    total = rows.count()
    l2 = 1 / (columns.cost * total)  # [A]
    variance = F.pad(rows.at.variance, (0, 1), value=1.0)
    scale = (2 * variance + l2.unsqueeze(1)).rsqrt().to(rows.dtype)  # [A, R + 1]
    folded = rows._replace(labels=torch.cat([rows.labels.long(), folds.unsqueeze(1)], 1)).ready()

    def evaluate(point: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        weight = point * scale[numbers]
        outward = folded.outward(weight)
        loss = weight.new_zeros(len(weight), dtype=torch.float64)
        gradient = torch.zeros_like(outward)
        for x, labels in folded.blocks():
            y = labels[:, columns.label[numbers]]  # [n, A]
            y = y.masked_fill_(labels[:, -1:] == columns.fold[numbers], 0).to(x.dtype)
            slack = (1 - y * (x @ outward.T)).clamp_min_(0)
            cost = torch.where(y > 0, positive_weight, y.abs())
            loss += (cost * slack.square()).sum(0, dtype=torch.float64)
            gradient.addmm_((-2 * cost * y * slack).T, x)
        own = l2[numbers].to(weight.dtype).unsqueeze(1)
        loss = all_reduce_sum(loss) / total + l2[numbers] / 2 * weight.square().sum(1, dtype=torch.float64)
        gradient = folded.inward(all_reduce_sum(gradient)) / total + own * weight
        return loss, gradient * scale[numbers]

    start = torch.zeros_like(scale)
    numbers = torch.arange(len(start), device=start.device)
    at_zero = evaluate(start, numbers)[1].double().norm(dim=1)
    found = minimise(
        evaluate, start, at_zero, tolerance=tolerance or TOLERANCE[rows.dtype], max_evaluations=max_evaluations
    )
    if not bool(found.converged.all()):
        left = int((~found.converged).sum())
        log.warning("%d of %d SVMs stopped at up to %.1e of the first gradient", left, len(start), found.gradient.max())
    return found.point * scale, found.converged
