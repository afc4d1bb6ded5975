"""The figures of a classifier are those of scikit-learn and of loops written from their definitions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from caco_fast.evaluate import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")


def made(images: int = 60, classes: int = 5, ties: bool = False) -> tuple[Tensor, Tensor]:
    scores = torch.randn(images, classes, dtype=torch.float64)
    if ties:
        scores = (2 * scores).round()
    relevance = torch.randint(-1, 2, (images, classes))
    # A class that nothing shows.
    relevance[:, 3] = -1
    return scores, relevance


@pytest.mark.parametrize("ties", [False, True])
def test_average_precisions_of_a_class_are_those_of_a_loop(ties: bool) -> None:
    scores, relevance = made(ties=ties)
    for label in (0, 1, 2, 4):
        kept = relevance[:, label] != 0
        s, y = scores[kept, label].numpy(), (relevance[kept, label] > 0).numpy()
        points = []
        for threshold in np.unique(s)[::-1]:
            chosen = s >= threshold
            points.append((y[chosen].mean(), y[chosen].sum() / y.sum()))
        area, before = 0.0, 0.0
        for at, (_, recall) in enumerate(points):
            area += (recall - before) * max(precision for precision, _ in points[at:])
            before = recall
        eleven = np.mean([max(p for p, recall in points if recall >= t / 10 - 1e-9) for t in range(11)])
        assert metrics.area_ap(scores[:, label], relevance[:, label]) == pytest.approx(100 * area)
        assert metrics.eleven_point_ap(scores[:, label], relevance[:, label]) == pytest.approx(100 * eleven)


def test_precision_and_recall_are_those_of_scikit_learn() -> None:
    scores, relevance = made(ties=True)
    kept = relevance[:, 0] != 0
    precision, recall = metrics.precision_recall(scores[:, 0], relevance[:, 0])
    theirs = sklearn_metrics.precision_recall_curve(relevance[kept, 0] > 0, scores[kept, 0])
    # Theirs begins with all images and ends with (1, 0); ours has one point for each score.
    np.testing.assert_allclose(precision.flip(0), theirs[0][:-1])
    np.testing.assert_allclose(recall.flip(0), theirs[1][:-1])


@pytest.mark.parametrize("ties", [False, True])
def test_ap_over_images_is_the_mean_of_scikit_learns(ties: bool) -> None:
    scores, relevance = made(ties=ties)
    values = [
        sklearn_metrics.average_precision_score((y[y != 0] > 0).numpy(), s[y != 0].numpy())
        for s, y in zip(scores, relevance)
        if (y > 0).any()
    ]
    assert metrics.image_ap(scores, relevance) == pytest.approx(100 * np.mean(values))


def test_a_class_without_an_image_does_not_count() -> None:
    scores, relevance = made()
    assert math.isnan(metrics.area_ap(scores[:, 3], relevance[:, 3]))
    for eleven, ap in ((True, metrics.eleven_point_ap), (False, metrics.area_ap)):
        wanted = np.mean([ap(scores[:, label], relevance[:, label]) for label in (0, 1, 2, 4)])
        assert metrics.mean_ap(scores, relevance, eleven_points=eleven) == pytest.approx(wanted)


def test_accuracies_are_those_of_scikit_learn() -> None:
    scores, labels = torch.randn(200, 7), torch.randint(6, (200,))
    for k in (1, 3, 5):
        wanted = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert metrics.top_k(scores, labels, k) == pytest.approx(100 * wanted)
    predicted = scores[:, :6].argmax(1)
    wanted = sklearn_metrics.balanced_accuracy_score(labels, predicted)
    assert metrics.mean_per_class(predicted, labels) == pytest.approx(100 * wanted)


def test_equal_scores_are_ordered_by_their_class() -> None:
    scores = torch.zeros(4, 4)
    assert [metrics.top_k(scores, torch.arange(4), k) for k in (1, 2, 4)] == [25, 50, 100]


def test_standard_error_is_the_spread_of_accuracies() -> None:
    draws = (torch.rand(4000, 300) < 0.8).double().mean(1)
    assert metrics.standard_error(80.0, 300) == pytest.approx(100 * draws.std().item(), rel=0.05)
    labels = torch.arange(300) % 3
    predicted = torch.where(torch.arange(300) % 4 == 0, labels, -1)
    assert metrics.standard_error_per_class(predicted, labels) == pytest.approx(
        metrics.standard_error(25, 300), rel=1e-6
    )
