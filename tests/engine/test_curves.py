"""The plots in curves.png: any measurements can be drawn, in whole runs and in short ones."""

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from caco_fast.engine.curves import INITIALISATION, KNN, PANELS, _draw, _draw_baselines, _result, draw_curves, panels_of
from caco_fast.engine.metrics import MetricsWriter, read_metrics
from caco_fast.errors import UserError

SHADE = np.array([int(INITIALISATION[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def draw(folder: Path, lines: list[tuple[int, int, dict]]) -> np.ndarray:
    writer = MetricsWriter(folder, tensorboard=False)
    for step, epoch, values in lines:
        writer.write(step, values, epoch=epoch)
    writer.close()
    path = draw_curves(folder)
    assert path == folder / "curves.png"
    return matplotlib.image.imread(path)[..., :3]


def shaded_share(image: np.ndarray) -> float:
    return float((np.abs(image - SHADE).max(-1) < 0.01).mean())


def whole_run(step: int) -> dict:
    return {"loss": 8 - step / 50, "lr": 0.3, "bank_lr": 3.0, "positive_probability": 0.1, "pairs_per_second": 1000.0}


def test_whole_run_with_initialisation_shaded(tmp_path: Path) -> None:
    lines = [(step, -1 if step <= 30 else 0, whole_run(step)) for step in range(10, 101, 10)]
    lines += [(step, 0, {"knn_20": 70.0 + step / 10, "knn_200": 60.0}) for step in (50, 100)]
    image = draw(tmp_path, lines)
    assert image.shape[0] > 700 and image.shape[1] > 1200
    # A third of five panels, which cover most of the picture.
    assert 0.05 < shaded_share(image) < 0.3


def test_baselines_of_the_summary_are_drawn_in_the_knn_panel(tmp_path: Path) -> None:
    lines = [(step, 0, whole_run(step) | {"knn_20": 70.0 + step / 10, "knn_200": 60.0}) for step in range(10, 101, 10)]
    plain = draw(tmp_path, lines)
    levels = {"knn_raw": 50.0, "knn_raw_k20": 65.0, "knn_random": 40.0, "knn_random_k20": 55.0}
    summary = {"evaluated": {"evaluation.k": [200, 20]}, **levels}
    drawn = _level_lines(tmp_path, summary)
    assert sorted(drawn) == sorted(levels.values()) and not _level_lines(tmp_path, {})
    assert np.abs(matplotlib.image.imread(draw_curves(tmp_path, summary))[..., :3] - plain).max() > 0.1
    headline = _result(read_metrics(tmp_path), summary)
    assert headline == "kNN (k 200) 60.0 %, raw pixels 50.0, random encoder 40.0; "


def _level_lines(folder: Path, summary: dict) -> list[float]:
    axes = Figure().subplots()
    panel = next(panel for panel in PANELS if panel.title == KNN)
    _draw(panel, axes, read_metrics(folder), None)
    before = len(axes.get_lines())
    _draw_baselines(axes, summary)
    return [float(line.get_ydata()[0]) for line in axes.get_lines()[before:]]


def test_without_initialisation_nothing_is_shaded(tmp_path: Path) -> None:
    assert shaded_share(draw(tmp_path, [(step, 0, whole_run(step)) for step in range(10, 101, 10)])) < 0.001


@pytest.mark.parametrize(
    "lines",
    [
        [(1, 0, {"loss": 7.0})],
        [(0, -1, {"loss": 7.0, "lr": 0.1})],
        [(1, 0, {"loss": math.nan}), (2, 0, {"loss": math.inf, "lr": 0.0})],
        [(5, 0, {"knn_20": 50.0}), (5, 0, {"unknown": 1.0})],
        [(step, 0, {f"{name}_lr": 0.1 for name in "abc"}) for step in (1, 2)],
    ],
    ids=["one-point", "step-0", "not-finite", "one-knn", "three-rates"],
)
def test_short_and_odd_runs_are_drawn(tmp_path: Path, lines: list) -> None:
    assert draw(tmp_path, lines).std() > 0.01


def test_only_what_is_measured_has_a_panel(tmp_path: Path) -> None:
    values = {
        "loss": 1.0,
        "attraction": 0.5,
        "repulsion": 1.5,
        "lr": 0.1,
        "key_momentum": 0.99,
        "adversarial_loss": 2.0,
    }
    draw(
        tmp_path, [(1, 0, values), (2, 0, {"held_out_loss": 1.0, "held_out_adversarial_loss": 3.0, "knn_20": math.nan})]
    )
    titles = [panel.title for panel in panels_of(read_metrics(tmp_path))]
    assert titles == ["loss", "attraction and repulsion", "learning rates", "adversarial loss"]


def test_no_metrics_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no metrics.jsonl with a line in it"):
        draw_curves(tmp_path)
