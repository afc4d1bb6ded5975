"""Logistic regression whose penalty is chosen on validation images, fitted again with these, and tested once.

The penalty lambda |W|^2 / 2 is added to the sum of the losses, as SimCLR (appendix B.8) and BYOL have it.

Legend: N rows of this rank, K classes, R coordinates.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from caco_fast.evaluate import metrics
from caco_fast.evaluate.linear_probe import held_out
from caco_fast.evaluate.rows import Rows, coordinates, over_ranks, places, require_finite
from caco_fast.evaluate.solvers import accuracy, logistic_path, scores_of_all
from caco_fast.protocols.base import FeatureSet

# The search ends after so many weaker penalties in a row that were no better. Each costs twice as much as the last.
PATIENCE = 8
# Share of the first gradient at which a fit of the search has converged, and its most evaluations. The last fit has to
# meet those of `logistic_path`.
SEARCH_TOLERANCE, SEARCH_EVALUATIONS = 1e-3, 300


def penalties(count: int) -> list[float]:
    """lambda from 1e5 to 1e-6, in equal ratios."""
    return torch.logspace(5, -6, count, dtype=torch.float64).tolist()


def choose_and_test(
    score: "Score",
    train: FeatureSet,
    val: FeatureSet | None,
    test: FeatureSet,
    tries: Sequence[float],
    held_out_share: float,
    name: str,
    *,
    key: str,
    device: torch.device,
) -> tuple[dict[str, float], list[dict[str, Any]], float]:
    """The figures on the test images, the penalties tried, and the standard error of the first figure (collective).

    val: the images to choose on; None: a seeded share of the training images. name: of the first figure.
    key: the protocol, for the line of an error.

    Raises:
        UserError: features are NaN or infinite, on all ranks alike.
    """
    if val is not None:
        features, labels = torch.cat([train.features, val.features]), torch.cat([train.labels, val.labels])
        chosen_on = torch.cat([torch.zeros(len(train.labels)), torch.ones(len(val.labels))]).bool()
    else:
        features, labels = train.features, train.labels
        place = places(len(labels), train.index, labels.device)
        chosen_on = held_out(place, over_ranks(len(labels), labels.device), held_out_share)
    require_finite(key, features, test.features)
    features, labels, chosen_on = (value.to(device) for value in (features, labels, chosen_on))
    whole = Rows(features, labels, coordinates(features)).ready()
    kept, out = whole.take(~chosen_on), whole.take(chosen_on)
    tried: list[dict[str, Any]] = []
    best = 0
    for penalty, (weight, converged) in zip(tries, score.path(kept, tries, search=True)):
        tried.append({"lambda": penalty, "validation": score.of(out, weight), "converged": converged})
        if tried[-1]["validation"] > tried[best]["validation"]:
            best = len(tried) - 1
        if len(tried) - best > PATIENCE:
            break
    # Towards the chosen penalty from stronger ones, as in the search.
    weight = list(score.path(whole, tries[: best + 1][-2:]))[-1][0]
    figures, error = score.all(Rows(test.features.to(device), test.labels.to(device), whole.at), weight, name)
    for row in tried:
        row["chosen"] = row is tried[best]
    return figures, tried, error


class Score:
    """The metric of a set, and the classifiers that go with it."""

    def __init__(self, metric: str, classes: int) -> None:
        self.metric, self.classes = metric, classes

    def path(self, rows: Rows, penalties: Sequence[float], search: bool = False) -> Iterator[tuple[Tensor, bool]]:
        """The weights [K, R + 1] for each penalty, and whether the fit converged (collective)."""
        limits: dict[str, Any] = {}
        if search:
            limits = {"tolerance": SEARCH_TOLERANCE, "max_evaluations": SEARCH_EVALUATIONS}
        if self.metric != "voc":
            count = rows.count()
            for fit in logistic_path(rows, self.classes, [penalty / count for penalty in penalties], **limits):
                yield fit.weight, fit.converged
            return
        paths = [self._of_class(rows, label, penalties, limits) for label in range(self.classes)]
        for found in zip(*paths):
            yield torch.stack([weight for weight, _ in found]), all(converged for _, converged in found)

    def _of_class(
        self, rows: Rows, label: int, penalties: Sequence[float], limits: dict[str, Any]
    ) -> Iterator[tuple[Tensor, bool]]:
        """One class against the others; images in which it is hard to see are left out."""
        target = rows.labels[:, label]
        own = rows._replace(labels=(target > 0).long()).take(target != 0)
        count = own.count()
        # Two rows of weights that are opposite have half the square of their difference, which is the classifier.
        for fit in logistic_path(own, 2, [2 * penalty / count for penalty in penalties], **limits):
            yield fit.weight[1] - fit.weight[0], fit.converged

    def of(self, rows: Rows, weight: Tensor) -> float:
        """The figure on the rows of all ranks (collective)."""
        # The commonest one needs no scores of all rows at once.
        return accuracy(rows, weight) if self.metric == "top1" else self._with_scores(rows, weight)[0]

    def _with_scores(self, rows: Rows, weight: Tensor) -> tuple[float, Tensor, Tensor]:
        """The figure, and the scores and labels of all ranks that it comes from (collective)."""
        found, labels = scores_of_all(rows, weight)
        if self.metric == "voc":
            return metrics.mean_ap(found, labels, eleven_points=True), found, labels
        return metrics.mean_per_class(found.argmax(1), labels), found, labels

    def all(self, rows: Rows, weight: Tensor, name: str) -> tuple[dict[str, float], float]:
        """Every figure of the set by its name, the set's own first, and its standard error (collective)."""
        if self.metric == "top1":
            value = self.of(rows, weight)
            return {name: value}, metrics.standard_error(value, rows.count())
        value, found, labels = self._with_scores(rows, weight)
        if self.metric == "voc":
            area, of_images = metrics.mean_ap(found, labels, eleven_points=False), metrics.image_ap(found, labels)
            figures = {name: value, f"{name}_area_map": area, f"{name}_ap_over_images": of_images}
            return figures, metrics.standard_error(value, len(labels))
        figures = {name: value, f"{name}_top1": metrics.top_k(found, labels, 1)}
        return figures, metrics.standard_error_per_class(found.argmax(1), labels)
