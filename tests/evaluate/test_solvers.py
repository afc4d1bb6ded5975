"""Our classifiers are those of scikit-learn in f64: logistic regression by its minimum, the SVM by LIBLINEAR's.

Legend: N rows, D features, K classes.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from caco_fast.data import DataConfig, build_source
from caco_fast.distributed import rank, world_size
from caco_fast.evaluate.rows import Rows, coordinates
from caco_fast.evaluate.solvers import Columns, Fit, features_weights, logistic_path, squared_hinge
from tests.ranks import run_ranks

linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
LinearSVC = pytest.importorskip("sklearn.svm").LinearSVC


def blobs(count: int, dim: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % classes
    return torch.randn(classes, dim)[labels] + 1.5 * torch.randn(count, dim), labels


def ill_conditioned() -> tuple[Tensor, Tensor]:
    features, labels = blobs(120, 12)
    return features * torch.logspace(-2, 2, 12) + torch.linspace(-30, 30, 12), labels


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:300]), torch.tensor(labels[:300])


def fashion() -> tuple[Tensor, Tensor]:
    source = build_source(DataConfig(source="embedded"), "train")
    return torch.tensor(source.images[:150]).flatten(1) / 255.0, torch.tensor(source.labels[:150])


SETS = {
    "blobs": lambda: blobs(200, 7),
    "ill-conditioned": ill_conditioned,
    "more features than rows": lambda: blobs(40, 90),
    "digits": digits,
    "Fashion-MNIST": fashion,
    "a class without rows": lambda: (blobs(90, 5)[0], torch.arange(90) % 3 * 2),
}


def objective(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, c: float) -> float:
    """scikit-learn's, from its documentation."""
    logits = features.double() @ weight.T + bias
    return float(0.5 * weight.square().sum() + c * torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))


def fit(features: Tensor, labels: Tensor, c: float, classes: int, dtype: torch.dtype = torch.float64) -> Fit:
    rows = Rows(features, labels, coordinates(features), dtype)
    return list(logistic_path(rows, classes, [10 / (c * len(rows.labels)), 1 / (c * len(rows.labels))]))[-1]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_logistic_regression_has_the_minimum_of_scikit_learn(name: str, c: float) -> None:
    features, labels = SETS[name]()
    found = fit(features, labels, c, int(labels.max()) + 1)
    assert found.converged and found.gradient <= 1e-8
    weight, bias = features_weights(found.weight, coordinates(features))
    seen = labels.unique()
    unseen = sorted(set(range(len(bias))) - set(seen.tolist()))
    assert bool((bias[unseen] == -torch.inf).all()) and not weight[unseen].any()
    oracle = linear_model.LogisticRegression(C=c, tol=1e-9, max_iter=20000)
    oracle.fit(features.double().numpy(), labels.numpy())
    theirs = torch.tensor(oracle.coef_), torch.tensor(oracle.intercept_)
    labels = torch.searchsorted(seen, labels)
    ours = objective(features, labels, weight[seen], bias[seen], c)
    # scikit-learn's L-BFGS stops a little above the minimum of an ill-conditioned problem.
    assert ours <= objective(features, labels, *theirs, c) * (1 + 1e-9)
    p = (features.double() @ weight[seen].T + bias[seen]).softmax(1)
    np.testing.assert_allclose(p, oracle.predict_proba(features.double().numpy()), atol=2e-3)
    if name in ("blobs", "digits"):
        torch.testing.assert_close(weight[seen], theirs[0], rtol=1e-3, atol=1e-4)


def test_f32_and_a_shard_that_is_read_block_by_block_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = digits()
    exact = fit(features, labels, 0.1, 10)
    monkeypatch.setattr("caco_fast.evaluate.rows.BLOCK", 64)
    monkeypatch.setattr("caco_fast.evaluate.rows.AT_ONCE", 1000)
    for dtype in (torch.float32, torch.float64):
        found = fit(features, labels, 0.1, 10, dtype)
        assert found.converged and found.loss == pytest.approx(exact.loss, rel=1e-5)


def test_a_fit_that_does_not_converge_says_so(caplog: pytest.LogCaptureFixture) -> None:
    features, labels = digits()
    (found,) = logistic_path(Rows(features, labels, coordinates(features)), 10, [1e-6], max_evaluations=3)
    assert not found.converged and found.gradient > 1e-5 and found.evaluations == 3
    assert "logistic regression with l2 1e-06 stopped at" in caplog.text


def of_ranks(name: str) -> float:
    """The loss of a fit of all ranks, of which the first has the rows of one class alone."""
    features, labels = SETS[name]()
    order = labels.argsort(stable=True)
    first = int((labels == labels.min()).sum())
    own = order[:first] if rank() == 0 else order[first:].chunk(world_size() - 1)[rank() - 1]
    found = fit_of_all(features[own], labels[own])
    assert found.converged
    return found.loss


def fit_of_all(features: Tensor, labels: Tensor) -> Fit:
    return list(logistic_path(Rows(features, labels, coordinates(features), torch.float64), 10, [0.01]))[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks", [("blobs", 2), ("more features than rows", 3)])
def test_ranks_find_what_one_finds(name: str, ranks: int) -> None:
    torch.manual_seed(0)
    alone = fit_of_all(*SETS[name]()).loss
    assert run_ranks(of_ranks_seeded, ranks, name) == pytest.approx([alone] * ranks, rel=1e-9)


def of_ranks_seeded(name: str) -> float:
    torch.manual_seed(0)
    return of_ranks(name)


def hinge_loss(features: Tensor, y: Tensor, w: Tensor, b: Tensor, c: float) -> float:
    slack = (1 - y * (features @ w + b)).clamp_min(0)
    return float((w.square().sum() + b.square()) / 2 + c * (torch.where(y > 0, 2.0, 1.0) * slack.square()).sum())


@pytest.mark.parametrize("name", ["blobs", "ill-conditioned", "more features than rows", "digits"])
def test_svm_has_the_minimum_of_liblinear(name: str) -> None:
    features, labels = SETS[name]()
    features = features.double()
    if name != "blobs":
        # VISSL's features are of unit length too, and LIBLINEAR is slow on others.
        features = features / features.norm(dim=1, keepdim=True)
    folds = torch.arange(len(labels)) // 2 % 3
    relevance = torch.where(labels.unsqueeze(1) == torch.arange(3), 1, -1)
    relevance[::7, 1] = 0
    costs = (0.01, 1.0, 20.0)
    columns = Columns(
        torch.tensor([0, 1, 2] * 2), torch.tensor(costs * 2, dtype=torch.float64), torch.tensor([-1, -1, -1, 0, 1, 2])
    )
    at = coordinates(features, centre=False)
    found, converged = squared_hinge(Rows(features, relevance, at, torch.float64), columns, folds, tolerance=1e-8)
    assert bool(converged.all())
    weight, bias = features_weights(found, at)
    for number, (label, c, fold) in enumerate(zip(*columns)):
        kept = (relevance[:, label] != 0) & (folds != fold)
        y = relevance[kept, label].double()
        oracle = LinearSVC(C=float(c), class_weight={1: 2, -1: 1}, tol=1e-7, max_iter=20_000, dual=False)
        oracle.fit(features[kept].numpy(), y.numpy())

        theirs = torch.tensor(oracle.coef_[0]), torch.tensor(oracle.intercept_[0])
        ours, wanted = (
            hinge_loss(features[kept], y, w, b, float(c)) for w, b in ((weight[number], bias[number]), theirs)
        )
        assert ours <= wanted * (1 + 1e-7)
        scale = theirs[0].abs().max()
        torch.testing.assert_close(weight[number] / scale, theirs[0] / scale, rtol=0, atol=5e-3)
