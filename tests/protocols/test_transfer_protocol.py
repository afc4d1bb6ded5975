"""The transfer protocol against scikit-learn on the same features, and what it does with splits, stops and ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from caco_fast.data import DataConfig
from caco_fast.data.sources.base import as_pil
from caco_fast.data.transfer import open_set
from caco_fast.errors import UserError
from caco_fast.models import BackboneConfig
from caco_fast.pretrained import Pretrained
from caco_fast.protocols import PROTOCOLS, Context, Result
from caco_fast.protocols import transfer as protocol
from caco_fast.protocols.logistic import LogisticConfig
from caco_fast.protocols.penalty_search import PATIENCE
from caco_fast.protocols.transfer import TransferConfig
from tests.data.trees import make_tree
from tests.ranks import run_ranks

linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")


class Pixels(nn.Flatten):
    """A backbone whose features are the normalised pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def context(folder: Path, channels: int = 1, size: int = 8, kind: type[Pixels] = Pixels, **options: Any) -> Context:
    pretrained = Pretrained(kind(channels * size * size), "pixels", BackboneConfig(**options), channels)
    data = DataConfig(source="embedded", workers=0, mean=[0.3] * channels, std=[0.4] * channels)
    given = dict(device=torch.device("cpu"), autocast=None, batch_size=64, seed=0)
    return Context(pretrained, data, folder=folder, **given)  # type: ignore[arg-type]


def run(found: Context, **settings: Any) -> Result:
    return PROTOCOLS["transfer"].run(found, TransferConfig(**{"size": 8, "lambdas": 12} | settings))


def arrays(name: str, split: str, root: str | Path = "") -> tuple[np.ndarray, np.ndarray]:
    """The features and labels that the protocol should see, from the pixels themselves."""
    source = getattr(open_set(name, root), split)
    shown = (as_pil(source.image(i)).resize((8, 8), Image.Resampling.BICUBIC) for i in range(len(source)))
    images = np.stack([np.asarray(image, dtype=np.float64).reshape(8, 8, -1) for image in shown])
    features = (images.transpose(0, 3, 1, 2) / 255 - 0.3) / 0.4
    return features.reshape(len(images), -1), np.array([source.label(i) for i in range(len(source))])


def test_the_digits_are_classified_as_by_scikit_learn(tmp_path: Path) -> None:
    found = run(context(tmp_path), sets=["digits"])
    (chosen,) = (row for row in found.sweep if row["chosen"])
    assert chosen["validation"] == max(row["validation"] for row in found.sweep)
    (train, labels), (test, answers) = arrays("digits", "train"), arrays("digits", "test")
    theirs = linear_model.LogisticRegression(C=1 / chosen["lambda"], tol=1e-7, max_iter=5000).fit(train, labels)
    # One image near a border may change its side.
    assert found.metrics["digits"] == pytest.approx(100 * theirs.score(test, answers), abs=101 / len(answers))
    assert found.metrics["digits"] > 93
    assert found.standard_error == pytest.approx(100 * (0.04 * 0.96 / 359) ** 0.5, rel=0.5)
    assert found.counts["digits"]["test"] == {"found": 359, "published": 359}
    assert found.deviations == {
        "transfer.size": {"found": 8, "preset": 224}, "transfer.lambdas": {"found": 12, "preset": 45}
    }  # fmt: skip


def test_the_search_ends_where_weaker_penalties_are_no_better(tmp_path: Path) -> None:
    found = run(context(tmp_path), sets=["digits"], lambdas=45)
    values = [row["validation"] for row in found.sweep]
    assert values.index(max(values)) == len(values) - 1 - PATIENCE
    assert [row["lambda"] for row in found.sweep] == pytest.approx(np.logspace(5, -6, 45)[: len(values)].tolist())


def test_voc_has_three_figures_under_their_names(tmp_path: Path) -> None:
    make_tree("voc2007", tmp_path, per_class=6)
    found = run(context(tmp_path / "out", 3), sets=["voc2007"], root=str(tmp_path), lambdas=4)
    assert list(found.metrics) == ["voc2007", "voc2007_area_map", "voc2007_ap_over_images"]
    (chosen,) = (row for row in found.sweep if row["chosen"])
    (train, _), (val, _), (test, _) = (arrays("voc2007", split, tmp_path) for split in ("train", "val", "test"))
    splits = open_set("voc2007", tmp_path)
    features, targets = np.concatenate([train, val]), np.concatenate([splits.train.targets, splits.val.targets])
    means = []
    for label in range(20):
        seen, wanted = targets[:, label] != 0, splits.test.targets[:, label]
        model = linear_model.LogisticRegression(C=1 / chosen["lambda"], tol=1e-8, max_iter=5000)
        model.fit(features[seen], targets[seen, label] > 0)
        scores = model.decision_function(test)[wanted != 0]
        means.append(eleven_points(scores, wanted[wanted != 0] > 0))
    assert found.metrics["voc2007"] == pytest.approx(100 * np.mean(means), abs=0.5)


def eleven_points(scores: np.ndarray, relevant: np.ndarray) -> float:
    order = np.argsort(-scores)
    hits = np.cumsum(relevant[order])
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / hits[-1]
    return float(np.mean([precision[recall >= point / 10 - 1e-9].max() for point in range(11)]))


def test_caltech_is_the_mean_over_five_splits(tmp_path: Path) -> None:
    make_tree("caltech101", tmp_path, per_class=4)
    found = run(context(tmp_path / "out", 3), sets=["caltech101"], root=str(tmp_path), lambdas=3)
    assert {row["split"] for row in found.sweep} == set(range(5))
    assert list(found.metrics) == ["caltech101", "caltech101_top1"]
    assert "mean over 5 random splits" in found.notes[-1]
    assert any("found 60 train images, published are 3060" in note for note in found.notes)


def test_colour_and_grey_images_are_shown_as_the_backbone_takes_them(tmp_path: Path) -> None:
    make_tree("dtd", tmp_path, per_class=9)
    grey = run(context(tmp_path / "grey", 1), sets=["dtd"], root=str(tmp_path), lambdas=3)
    colour = run(context(tmp_path / "colour", 3), sets=["dtd", "digits"], root=str(tmp_path), lambdas=3)
    # The images of the tree are grey, so one channel says as much as three.
    assert grey.metrics["dtd"] == colour.metrics["dtd"]
    assert colour.metrics["digits"] > 90


def test_a_stop_keeps_the_sets_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []
    fit = protocol._fit

    def counted(found: Context, settings: TransferConfig, name: str, *rest: Any) -> Any:
        if name == "dtd" and len(fitted) == 1:
            fitted.append("stopped")
            raise KeyboardInterrupt
        fitted.append(name)
        return fit(found, settings, name, *rest)

    monkeypatch.setattr(protocol, "_fit", counted)
    make_tree("dtd", tmp_path)
    options = dict(sets=["digits", "dtd"], root=str(tmp_path), lambdas=2)
    with pytest.raises(KeyboardInterrupt):
        run(context(tmp_path / "out"), **options)
    found = run(context(tmp_path / "out"), **options)
    assert fitted == ["digits", "stopped", "dtd"]
    assert list(found.metrics) == ["digits", "dtd"]
    assert not list((tmp_path / "out").glob("*.state"))


def on_ranks(folder: str) -> dict[str, float]:
    return run(context(Path(folder)), sets=["digits"], lambdas=5).metrics


def test_two_ranks_find_the_same_as_one(tmp_path: Path) -> None:
    alone = on_ranks(str(tmp_path / "one"))
    assert run_ranks(on_ranks, 2, str(tmp_path / "two")) == [alone] * 2


def test_logistic_is_transfer_to_the_own_images(tmp_path: Path) -> None:
    make_tree("birdsnap", tmp_path, per_class=15)
    found, place = context(tmp_path / "out", 3, 12), tmp_path / "birdsnap"
    found.data = replace(found.data, source="folder", path=str(place))
    own = PROTOCOLS["logistic"].run(found, LogisticConfig(lambdas=3, held_out=0.2))
    other = run(found, sets=[f"folder:{place}"], size=12, lambdas=3)
    assert own.metrics == {"top1": pytest.approx(other.metrics[f"folder:{place}"])}
    assert [row["validation"] for row in own.sweep] == [row["validation"] for row in other.sweep]
    with pytest.raises(UserError, match="logistic.held_out: found 0, expected"):
        LogisticConfig(held_out=0)


class Diverged(Pixels):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).masked_fill(input.new_ones(self.num_features).cumsum(0) == 5, torch.inf)


def test_features_of_an_encoder_that_diverged_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^transfer: digits: some features are NaN or infinite"):
        run(context(tmp_path, kind=Diverged), sets=["digits"])
    make_tree("birdsnap", tmp_path, per_class=15)
    found = context(tmp_path / "out", 3, 12, Diverged)
    found.data = replace(found.data, source="folder", path=str(tmp_path / "birdsnap"))
    with pytest.raises(UserError, match="^logistic: some features are NaN or infinite"):
        PROTOCOLS["logistic"].run(found, LogisticConfig(lambdas=3))


def test_published_numbers_are_shown_for_a_resnet50(tmp_path: Path) -> None:
    make_tree("dtd", tmp_path, per_class=9)
    options = dict(sets=["dtd"], root=str(tmp_path), lambdas=2)
    found = run(context(tmp_path / "a", 3, name="resnet50"), **options)
    assert {(each.who, each.value, each.metric) for each in found.published} >= {("CaCo", 76.8, "dtd")}
    assert not run(context(tmp_path / "b", 3, name="resnet18"), **options).published


@pytest.mark.parametrize(
    "settings, line",
    [
        (dict(sets=["food"]), "transfer.sets: found 'food', expected all, food101"),
        (dict(sets=[]), "transfer.sets: found"),
        (dict(sets=["all", "dtd"]), "each once"),
        (dict(size=0), "transfer.size"),
        (dict(lambdas=1), "transfer.lambdas"),
        (dict(held_out=1.0), "transfer.held_out: found 1.0"),
    ],
)
def test_settings_out_of_range_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        TransferConfig(**settings)
