"""The loss on held-out images: a part of the data by the seed, the method's own loss, and no trace in the training."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from caco_fast.data.sources.arrays import fashion_mnist
from caco_fast.data.sources.folder import FolderSource
from caco_fast.data.sources.part import hold_out
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.errors import UserError
from caco_fast.evaluate.evaluator import EvaluationConfig
from caco_fast.training import train
from tests.engine import tiny_run


def write_unlabelled(folder: Path, count: int = 20) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24 + i, 30), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_seed_decides_which_images_are_held_out(tmp_path: Path) -> None:
    source = FolderSource(str(write_unlabelled(tmp_path / "images")))
    kept, held = hold_out(source, 0.2, seed=3)
    names = [{part.name(i) for i in range(len(part))} for part in (kept, held, source)]
    assert (len(kept), len(held)) == (16, 4)
    assert names[0] | names[1] == names[2] and not names[0] & names[1]
    again, other = (hold_out(source, 0.2, seed=seed)[0] for seed in (3, 4))
    assert again.list_hash() == kept.list_hash() != other.list_hash()
    assert np.array_equal(np.asarray(held.image(1)), np.asarray(source.image(int(held.positions[1]))))


def test_a_set_in_memory_stays_one() -> None:
    source = fashion_mnist("test")
    kept, held = hold_out(source, 0.25, seed=0)
    assert kept.images.shape == (1500, 28, 28, 1) and len(held.labels) == 500
    assert len({kept.list_hash(), held.list_hash(), source.list_hash()}) == 3


@pytest.mark.parametrize("method", ["caco", "moco"])
def test_a_run_without_labels_logs_its_held_out_loss(tmp_path: Path, caplog, method: str) -> None:
    images = write_unlabelled(tmp_path / "images")
    config = tiny_run.config(images, f"method={method}", "evaluation.held_out=0.2", "trainer.log_every=2")
    with caplog.at_level(logging.INFO, "caco_fast"):
        summary = train(config, tmp_path / "run")
    found = [line for line in lines_of(tmp_path / "run") if "held_out_loss" in line]
    assert [line["epoch"] for line in found] == [0, 1]
    assert 0 < found[1]["held_out_positive_probability"] < 1 and "knn_3" not in found[1]
    assert ("held_out_positive_perplexity" in found[1]) == (method == "caco")
    assert summary["held_out_loss"] == found[1]["held_out_loss"]
    assert "no labels, so there is no kNN" in caplog.text and "epoch 2/2: held-out loss" in caplog.text
    # Without a score the newest checkpoint is the best one.
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.load(store.folder / "best.pt")["position"]["epochs_ended"] == 2


def test_the_evaluation_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    images = write_unlabelled(tmp_path / "images")
    for every in (1, 2):
        config = tiny_run.config(
            images, "evaluation.held_out=0.2", f"evaluation.every_epochs={every}", "trainer.joint_views=on"
        )
        train(config, tmp_path / str(every))
    often, seldom = ([line["loss"] for line in lines_of(tmp_path / str(n)) if "loss" in line] for n in (1, 2))
    assert often == seldom
    states = [torch.load(tmp_path / str(n) / "checkpoints/best.pt", weights_only=True)["state"] for n in (1, 2)]
    for part in ("encoders", "method"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name


def test_with_labels_both_are_logged(tmp_path: Path) -> None:
    config = tiny_run.config(tiny_run.write_images(tmp_path / "images"), "evaluation.held_out=0.1", "trainer.epochs=1")
    summary = train(config, tmp_path / "run")
    assert {"held_out_loss", "knn_trained"} <= summary.keys()


def test_no_labels_and_nothing_held_out_is_refused(tmp_path: Path) -> None:
    images = write_unlabelled(tmp_path / "images")
    with pytest.raises(UserError, match=r"have no labels.*set evaluation\.held_out=0\.05"):
        train(tiny_run.config(images), tmp_path / "run")


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.held_out: found 0\.6, expected a share between 0 and 0\.5"):
        EvaluationConfig(held_out=0.6)
