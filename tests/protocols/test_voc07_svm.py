"""The SVMs of VOC2007 against LIBLINEAR on the same features, folds and values of C."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caco_fast.data.transfer import open_set
from caco_fast.errors import UserError
from caco_fast.protocols import PROTOCOLS, Result
from caco_fast.protocols.voc07_svm import Voc07SvmConfig
from tests.data.trees import make_tree
from tests.protocols.test_transfer_protocol import Diverged, context
from tests.ranks import run_ranks

svm = pytest.importorskip("sklearn.svm", reason="scikit-learn is not installed")
COSTS = [0.1, 10.0]


def run(root: Path, out: Path) -> Result:
    settings = Voc07SvmConfig(root=str(root), costs=COSTS, folds=2, resize=12, size=12)
    return PROTOCOLS["voc07_svm"].run(context(out, 3, 12), settings)


def pixels(source: Any) -> np.ndarray:
    images = np.stack([np.asarray(source.image(i), dtype=np.float64) for i in range(len(source))])
    rows = ((images.transpose(0, 3, 1, 2) / 255 - 0.3) / 0.4).reshape(len(images), -1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def area(scores: np.ndarray, targets: np.ndarray) -> float:
    """The area under the precision-recall curve whose precision only falls."""
    scores, relevant = scores[targets != 0], targets[targets != 0] > 0
    if not relevant.any():
        return float("nan")
    order = np.argsort(-scores)
    hits = np.cumsum(relevant[order])
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / hits[-1]
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return 100 * float((np.diff(np.r_[0, recall]) * precision).sum())


def fitted(x: np.ndarray, y: np.ndarray, cost: float) -> Any:
    model = svm.LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-10, max_iter=500_000)
    return model.fit(x[y != 0], y[y != 0])


def test_the_figure_is_that_of_liblinear(tmp_path: Path) -> None:
    make_tree("voc2007", tmp_path, per_class=5, noise=True)
    found = run(tmp_path, tmp_path / "out")
    splits = open_set("voc2007", tmp_path)
    x = np.concatenate([pixels(splits.train), pixels(splits.val)])
    y = np.concatenate([splits.train.targets, splits.val.targets])
    fold, aps = np.arange(len(x)) % 2, []
    chosen = {row["class"]: row["C"] for row in found.sweep if row["chosen"]}
    for label, name in enumerate(splits.train.classes):
        values = {}
        for cost in COSTS:
            of_folds = []
            for out in (0, 1):
                model = fitted(x[fold != out], y[fold != out, label], cost)
                of_folds.append(area(model.decision_function(x[fold == out]), y[fold == out, label]))
            values[cost] = float(np.nanmean(of_folds))
        (ours,) = ([row["validation"] for row in found.sweep if row["class"] == name],)
        assert ours == pytest.approx(list(values.values()), abs=0.5)
        model = fitted(x, y[:, label], chosen[name])
        aps.append(area(model.decision_function(pixels(splits.test)), splits.test.targets[:, label]))
    assert found.metrics["map"] == pytest.approx(float(np.nanmean(aps)), abs=0.3)
    assert found.deviations["voc07_svm.folds"] == {"found": 2, "preset": 3}
    assert found.counts["voc2007"]["test"] == {"found": 20, "published": 4952}


def on_ranks(root: str, out: str) -> dict[str, float]:
    return run(Path(root), Path(out)).metrics


@pytest.mark.slow
def test_two_ranks_find_nearly_the_same_as_one(tmp_path: Path) -> None:
    make_tree("voc2007", tmp_path, per_class=5, noise=True)
    alone = on_ranks(str(tmp_path), str(tmp_path / "one"))
    # The folds follow from the order in which the ranks hold the images.
    first, second = run_ranks(on_ranks, 2, str(tmp_path), str(tmp_path / "two"))
    assert first == second
    assert first["map"] == pytest.approx(alone["map"], abs=5)


@pytest.mark.parametrize(
    "settings, line",
    [
        (dict(costs=[]), "voc07_svm.costs"),
        (dict(costs=[0.0]), "voc07_svm.costs"),
        (dict(folds=1), "voc07_svm.folds: found 1, expected at least 2"),
        (dict(size=0), "voc07_svm.size"),
    ],
)
def test_settings_out_of_range_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        Voc07SvmConfig(**settings)


def test_features_of_an_encoder_that_diverged_are_refused_in_one_line(tmp_path: Path) -> None:
    make_tree("voc2007", tmp_path, per_class=4)
    settings = Voc07SvmConfig(root=str(tmp_path), costs=COSTS, folds=2, resize=12, size=12)
    with pytest.raises(UserError, match="^voc07_svm: some features are NaN or infinite"):
        PROTOCOLS["voc07_svm"].run(context(tmp_path / "out", 3, 12, Diverged), settings)


def test_a_missing_release_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^voc07_svm.root: .*expected the release of PASCAL VOC2007"):
        PROTOCOLS["voc07_svm"].run(context(tmp_path, 3, 12), Voc07SvmConfig(root=str(tmp_path)))
