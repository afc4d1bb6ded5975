"""The protocol kNN: its figures are those of the search, by name, and its settings are checked."""

from pathlib import Path

import pytest
import torch
from torch import nn

from caco_fast.data import DataConfig
from caco_fast.errors import UserError
from caco_fast.evaluate import knn_accuracy
from caco_fast.models import BackboneConfig
from caco_fast.pretrained import Pretrained
from caco_fast.protocols import Context
from caco_fast.protocols.knn import KnnConfig, knn
from tests.protocols.test_features import array


def test_figures_are_those_of_every_k_and_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"train": array(57), "test": array(31, seed=1)}
    monkeypatch.setattr("caco_fast.protocols.base.build_source", lambda config, split: sources[split])
    pretrained = Pretrained(nn.Flatten(), "pixels", BackboneConfig(), 3)
    options = dict(device=torch.device("cpu"), autocast=None, batch_size=8, seed=0, folder=tmp_path)
    context = Context(pretrained, DataConfig(source="embedded"), **options)
    found = knn(context, KnnConfig(k=[7, 3], temperatures=[0.1, 0.7]))
    train, test = context.features("train"), context.features("test")
    assert list(found.metrics)[:4] == ["top1_k7_t0.1", "top5_k7_t0.1", "top1_k3_t0.1", "top5_k3_t0.1"]
    for row in found.sweep:
        k, t = row["k"], row["temperature"]
        expected = knn_accuracy(train[0], train[1], test[0], test[1], k=k, classes=4, temperature=t)
        assert found.metrics[f"top1_k{k}_t{t:g}"] == row["top1"] == expected[k]
        # There are four classes.
        assert row["top5"] == 100
    assert len(found.sweep) == 4


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"k": []}, "knn.k: found"),
        ({"k": [0]}, "knn.k: found"),
        ({"k": [5, 5]}, "knn.k: found .* every number once"),
        ({"temperatures": []}, "knn.temperatures: found"),
        ({"temperatures": [0.1, -1.0]}, "knn.temperatures: found"),
        ({"temperatures": [0.1, 0.1]}, "knn.temperatures: found .* every number once"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        KnnConfig(**settings)
