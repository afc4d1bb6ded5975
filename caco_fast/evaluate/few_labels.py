"""The accuracy of a linear classifier that sees a few labelled images of each class, over several draws of them.

Legend: N training rows and M test rows of this rank, D feature size.
"""

from typing import Any

import torch
from torch import Tensor

from caco_fast.distributed import all_gather_uneven
from caco_fast.errors import UserError
from caco_fast.evaluate.rows import Rows, coordinates, places, require_finite
from caco_fast.evaluate.solvers import accuracy, cross_entropy, logistic_path

# Weights of |W|^2 / 2 beside the mean loss, on features whose variances add up to 1, from strong to weak.
PENALTIES = tuple(10.0**-power for power in (0, 1, 2, 3, 4, 5))
# The share of the first gradient at which the fits of the cross-validation have converged.
CHOICE = 1e-5


@torch.no_grad()
def few_labels(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    per_class: int,
    seeds: int = 5,
    first_seed: int = 0,
    folds: int = 5,
    train_index: Tensor | None = None,
    key: str = "few labels",
) -> list[dict[str, Any]]:
    """Seed, penalty and per cent of the test rows [M, D] that are labelled correctly, for each draw.

    A draw takes `per_class` random training rows [N, D] of each class. Logistic regression is fitted to them in f64.
    Its penalty is the one with the lowest cross-entropy in a cross-validation of `folds` folds (collective).

    train_index: [N] the dataset index, by default the place in rank order, so that a draw does not depend on the ranks.
    key: the setting of `per_class`, for the line of an error.

    Raises:
        UserError: a class has too few rows, or features are not finite, on all ranks alike.
    """
    require_finite(key, train_features, test_features)
    device = train_features.device
    place, labels = places(len(train_labels), train_index, device), train_labels.to(device, torch.int64)
    order = all_gather_uneven(place).argsort()
    all_labels = all_gather_uneven(labels)[order].cpu()
    found = []
    for seed in range(first_seed, first_seed + seeds):
        drawn = draw(all_labels, per_class, classes, seed, key).sort().values.to(device)
        own = torch.isin(place, drawn)
        # The fold follows from the place in the draw, and so not from the ranks.
        fold = torch.searchsorted(drawn, place[own]) % folds
        features = train_features[own]
        rows = Rows(features, labels[own], coordinates(features), torch.float64).ready()
        l2, weight = _fit(rows, fold, classes, folds)
        test = Rows(test_features.to(device), test_labels.to(device, torch.int64), rows.at, torch.float64)
        found.append({"seed": seed, "l2": l2, "top1": accuracy(test, weight)})
    return found


def draw(labels: Tensor, count: int, classes: int, seed: int, key: str = "few labels") -> Tensor:
    """Positions of `count` random rows of each class, by the seed alone. UserError if a class has fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled, chosen = labels[order], []
    for label in range(classes):
        of_class = order[shuffled == label]
        if len(of_class) < count:
            raise UserError(f"{key}: found {count}, but class {label} has {len(of_class)} images; choose fewer")
        chosen.append(of_class[:count])
    return torch.cat(chosen)


def _fit(rows: Rows, fold: Tensor, classes: int, folds: int) -> tuple[float, Tensor]:
    """The penalty with the lowest cross-entropy over the folds, and the fit to all rows with it (collective)."""
    # Relative to the size of the features, so that the choice does not depend on their unit.
    penalties = [value * float(rows.at.variance.sum()) for value in PENALTIES]
    losses = [0.0] * len(penalties)
    for number in range(folds):
        kept, out = rows.take(fold != number), rows.take(fold == number)
        for at, fit in enumerate(logistic_path(kept, classes, penalties, tolerance=CHOICE)):
            losses[at] += cross_entropy(out, fit.weight)
    best = losses.index(min(losses))
    fit = next(logistic_path(rows, classes, [penalties[best]]))
    return penalties[best], fit.weight
