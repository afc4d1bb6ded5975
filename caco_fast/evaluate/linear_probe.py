"""The accuracy of a linear classifier on standardised frozen features: the quick probe of the trainer.

Every rank keeps its own shard of the features. A large shard stays in the dtype that it has (see `evaluate/rows.py`).

Legend: N training rows and M test rows of this rank, D feature size.
"""

import torch
from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.evaluate.rows import Rows, coordinates, over_ranks, places, require_finite
from caco_fast.evaluate.solvers import MAX_EVALUATIONS, accuracy, cross_entropy, logistic_path

# Weights of |W|^2 / 2 to try, from strong to weak. Each fit starts from the solution of the one before.
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
HELD_OUT = 0.1
# The share of the first gradient that is left. A tenth of it takes some 1.5 times as long, and changed no accuracy of
# the quickstart's encoders by more than 0.05.
TOLERANCE = 1e-4


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    l2: float | None = None,
    max_iter: int = MAX_EVALUATIONS,
    train_index: Tensor | None = None,
) -> float:
    """Per cent of test rows [M, D] that the classifier fitted to the training rows [N, D] labels correctly.

    Features are standardised by the training rows' mean and deviation. The loss is mean cross-entropy + l2 |W|^2 / 2
    (no penalty on the bias), minimised until `TOLERANCE` of its first gradient is left (`logistic_path`). Rounding may
    still change the label of an image or two on a border. With `l2` None it takes the one of `PENALTIES` with least
    cross-entropy on a tenth of the training rows, which has no ties as the accuracy has, and fits again to all of them.
    The test rows play no part in the choice. `max_iter` bounds the evaluations of the loss in each fit.

    Each rank gives its own shard of both sets, and all ranks return the same figure. `train_index` (the dataset index,
    by default the place in rank order) decides which rows are in that tenth, so that it does not depend on the ranks.
    """
    device = train_features.device
    place = places(len(train_features), train_index, device)
    total, tested = (over_ranks(count, device) for count in (len(place), len(test_labels)))
    if total == 0 or tested == 0:
        raise UserError(f"linear probe: found {total} training and {tested} test images, expected at least 1 of each")
    require_finite("linear probe", train_features, test_features)
    at = coordinates(train_features, standardise=True)
    train = Rows(train_features, train_labels.to(device, torch.int64), at).ready()
    start = None
    if l2 is None:
        l2, start = _choose_penalty(train, place, classes, max_iter) if total >= 20 else (PENALTIES[0], None)
    fit = next(logistic_path(train, classes, [l2], tolerance=TOLERANCE, max_evaluations=max_iter, start=start))
    test = Rows(test_features.to(device), test_labels.to(device, torch.int64), at)
    return accuracy(test, fit.weight)


def _choose_penalty(train: Rows, place: Tensor, classes: int, max_iter: int) -> tuple[float, Tensor]:
    """The best of the penalties, and its solution on the rows that are not held out."""
    is_out = held_out(place, train.count(), HELD_OUT)
    kept, out = train.take(~is_out), train.take(is_out)
    best, lowest = None, float("inf")
    for fit in logistic_path(kept, classes, PENALTIES, tolerance=TOLERANCE, max_evaluations=max_iter):
        loss = cross_entropy(out, fit.weight)
        if best is not None and loss >= lowest:
            # The loss has one minimum along the path, and weaker penalties take most of the time.
            break
        best, lowest = fit, loss
    return best.l2, best.weight


def held_out(place: Tensor, total: int, share: float, seed: int = 0) -> Tensor:
    """Whether each of this rank's rows is in a fixed random share of those of all ranks. [N]"""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    out = torch.zeros(total, dtype=torch.bool)
    out[order[: max(1, int(total * share))]] = True
    return out.to(place.device)[place]
