"""The end of an epoch: one checkpoint and one kNN, and nothing is lost if the kNN fails."""

from pathlib import Path

import pytest

from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.evaluate.evaluator import Evaluator
from caco_fast.training import train
from tests.engine.tiny_run import config


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caco_fast.figures._draw", lambda *_: None)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The steps of all checkpoint files, and the features that were extracted."""
    found: dict[str, list[int]] = {"written": [], "extracted": []}
    write, extract = CheckpointStore._write, Evaluator._extract

    def counted_write(self, path, state, step):
        found["written"].append(step)
        write(self, path, state, step)

    def counted_extract(self, *arguments):
        found["extracted"].append(1)
        return extract(self, *arguments)

    monkeypatch.setattr(CheckpointStore, "_write", counted_write)
    monkeypatch.setattr(Evaluator, "_extract", counted_extract)
    return found


def knn_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if "knn_3" in line]


def position(folder: Path) -> dict:
    store = CheckpointStore(folder / "checkpoints")
    return store.load(store.latest())["position"]


def test_each_epoch_is_written_once_and_evaluated_once(images, tmp_path, counts):
    summary = train(config(images, "method=moco"), tmp_path)
    assert counts["written"] == [5, 10] and len(counts["extracted"]) == 2
    assert summary["knn_trained"] == round(read_metrics(tmp_path)[-1]["knn_3"], 2)
    assert position(tmp_path)["epochs_ended"] == 2
    # The note counts for best.pt too.
    store = CheckpointStore(tmp_path / "checkpoints")
    step, _ = store.best()
    assert store.load(tmp_path / "checkpoints" / "best.pt")["position"]["epochs_ended"] == step // 5


def test_a_stop_within_an_epoch_is_evaluated_once_and_with_the_probe_again(images, tmp_path, counts):
    train(config(images, "method=moco", "trainer.max_steps=7", "evaluation.linear_probe=true"), tmp_path)
    assert counts["written"] == [5, 7] and len(counts["extracted"]) == 2
    train(config(images, "method=moco", "evaluation.linear_probe=true"), tmp_path, "auto")
    assert counts["written"] == [5, 7, 10] and len(counts["extracted"]) == 4


def test_a_knn_that_fails_loses_nothing_and_is_done_on_resume(images, tmp_path, counts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "knn", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            train(config(images, "method=moco"), tmp_path)
    assert position(tmp_path)["total_steps"] == 5 and position(tmp_path)["epochs_ended"] == 0
    train(config(images, "method=moco"), tmp_path, "auto")
    assert counts["written"] == [5, 10] and knn_steps(tmp_path) == [5, 10]


def test_a_run_resumed_from_before_a_note_evaluates_its_own_epoch(images, tmp_path, monkeypatch):
    """The note of the epoch that was left behind does not count for the one that takes its place."""
    settings = ("method=moco", "checkpoint.every_steps=1", "checkpoint.keep=9")
    train(config(images, *settings), tmp_path)
    first = str(tmp_path / "checkpoints" / "step_00000007.pt")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "knn", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            train(config(images, *settings), tmp_path, first)
    assert position(tmp_path) | {"total_steps": 10, "epochs_ended": 1} == position(tmp_path)
    train(config(images, *settings), tmp_path, "auto")
    assert knn_steps(tmp_path) == [5, 10]


def test_a_checkpoint_from_elsewhere_is_written_whole_in_the_new_folder(images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "knn", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            train(config(images, "method=moco"), tmp_path / "old")
    elsewhere = str(tmp_path / "old" / "checkpoints" / "step_00000005.pt")
    train(config(images, "method=moco", "trainer.epochs=1"), tmp_path / "new", elsewhere)
    assert position(tmp_path / "new")["epochs_ended"] == 1
    assert (tmp_path / "new" / "checkpoints" / "best.pt").exists()
