"""A classifier from a few labels: draws, choice and accuracy beside scikit-learn's, on any number of ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from caco_fast.distributed import rank, world_size
from caco_fast.errors import UserError
from caco_fast.evaluate.few_labels import PENALTIES, draw, few_labels
from tests.ranks import run_ranks


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping groups of four classes in a space with very unequal axes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    rows = centres[labels] + 0.8 * torch.randn(count, 6, generator=generator)
    return rows * torch.tensor([5.0, 3.0, 1.0, 1.0, 0.3, 0.1]) + 2, labels


TRAIN, TEST = blobs(300, 1), blobs(200, 2)


def found(**options: Any) -> list[dict[str, Any]]:
    return few_labels(*TRAIN, *TEST, classes=4, **{"per_class": 10, "seeds": 3} | options)


def test_a_draw_takes_each_class_alike_by_the_seed_alone() -> None:
    labels = torch.arange(60) % 4
    first, again, other = (draw(labels, 5, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.bincount(labels[first]).tolist() == [5] * 4 and len(set(first.tolist())) == 20
    with pytest.raises(UserError, match="^x.per_class: found 16, but class 0 has 15 images; choose fewer"):
        draw(labels, 16, 4, 0, "x.per_class")


def test_penalty_and_accuracy_are_those_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    features, labels = TRAIN[0].double().numpy(), TRAIN[1].numpy()
    for one in found():
        own = draw(TRAIN[1], 10, 4, one["seed"]).sort().values.numpy()
        x, y = features[own], labels[own]
        total = ((x - x.mean(0)) ** 2).mean(0).sum()

        def fitted(rows: np.ndarray, answers: np.ndarray, l2: float) -> Any:
            model = linear_model.LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-10, max_iter=10_000)
            return model.fit(rows, answers)

        losses = []
        for value in PENALTIES:
            loss = 0.0
            for fold in range(5):
                out = np.arange(len(x)) % 5 == fold
                model = fitted(x[~out], y[~out], value * total)
                loss -= model.predict_log_proba(x[out])[np.arange(out.sum()), y[out]].mean()
            losses.append(loss)
        best = PENALTIES[int(np.argmin(losses))] * total
        assert one["l2"] == pytest.approx(best, rel=1e-6)
        theirs = fitted(x, y, best).score(TEST[0].double().numpy(), TEST[1].numpy())
        # One row near a border may change its side.
        assert one["top1"] == pytest.approx(100 * theirs, abs=100.1 / 200)


def test_more_labels_are_better() -> None:
    few, many = (np.mean([one["top1"] for one in found(per_class=count)]) for count in (2, 50))
    assert 30 < few < many - 3


def on_ranks() -> list[dict[str, Any]]:
    parts = [torch.arange(rank(), len(part[1]), world_size()) for part in (TRAIN, TEST)]
    (train, labels), (test, answers) = ((part[0][own], part[1][own]) for part, own in zip((TRAIN, TEST), parts))
    return few_labels(train, labels, test, answers, classes=4, per_class=10, seeds=3, train_index=parts[0])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_do_not_matter(ranks: int) -> None:
    alone = found()
    for theirs in run_ranks(on_ranks, ranks):
        assert [one["seed"] for one in theirs] == [0, 1, 2]
        assert [one["l2"] for one in theirs] == pytest.approx([one["l2"] for one in alone])
        assert [one["top1"] for one in theirs] == pytest.approx([one["top1"] for one in alone], abs=0.51)


def test_features_that_are_not_finite_are_one_line() -> None:
    train = TRAIN[0].clone()
    train[3, 2] = torch.nan
    with pytest.raises(UserError, match="some features are NaN or infinite"):
        few_labels(train, TRAIN[1], *TEST, classes=4, per_class=5)
