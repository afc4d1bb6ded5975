"""Whole runs: what they leave behind, how they end, and that a resumed one is the one never stopped, bit for bit."""

import json
import math
from pathlib import Path

import pytest
import torch

from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.errors import UserError
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images

METHODS = {
    "caco": (),
    "caco-project": ("caco.norm=project",),
    "caco-multicrop": ("views=[{size: 32}, {size: 32}, {count: 2, size: 16, scale: [0.05, 0.14]}]",),
    "adco": ("method=adco", "adco.symmetric=true"),
    "moco": ("method=moco",),
    "moco-symmetric": ("method=moco", "moco.symmetric=true"),
}
# Those of resumed runs that need more than `method`.
RESUMED = {
    "nnclr": ("method=nnclr", "nnclr={queue_size: 37, predictor_hidden: 16}"),
    "clae-caco": ("method=clae", "clae.base=caco"),
    "cacr": ("method=cacr",),
    "cacr-queue": ("method=cacr", "cacr={form: queue, queue_size: 37}"),
    "cacr-global": ("method=cacr", "cacr={form: global, predictor_hidden: 16}"),
    "ablation": ("method=ablation", "ablation={positives: queue, negatives: bank}"),
    "ablation-batch": ("method=ablation", "ablation={positives: queue, negatives: batch}"),
}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


def last_state(folder: Path) -> dict:
    store = CheckpointStore(folder / "checkpoints")
    return store.load(store.latest())


def assert_same(left, right, where: str = "state") -> None:
    """Equal to the last bit, through all nesting."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert left == right, where


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_and_leaves_its_figures(images, tmp_path, method):
    summary = train(config(images, *METHODS[method]), tmp_path / "run")
    folder = tmp_path / "run"
    # 37 rows at batch 8 fill in 5 steps; then 2 epochs of 5 steps.
    assert summary["steps"] == (15 if method.startswith(("caco", "adco")) else 10)
    assert summary["finished"] and 0 <= summary["knn_trained"] <= 100 and summary["pairs_per_second"] > 0
    assert json.loads((folder / "summary.json").read_text()) == summary
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, summary["steps"] + 1))
    assert [line["step"] for line in lines if "knn_3" in line] == [summary["steps"] - 5, summary["steps"]]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    initialisation = {line["key_momentum"] for line in lines if "loss" in line and line["epoch"] < 0}
    assert initialisation == ({0.999} if method.startswith(("caco", "adco")) else set())
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "environment.json", "log.txt", "curves.png"}
    assert (folder / "checkpoints" / "best.pt").exists()


@pytest.mark.parametrize(
    ("method", "loader", "stop"),
    [
        pytest.param("caco", "torchvision", 3, id="caco-torchvision-initialisation"),
        pytest.param("caco", "torchvision", 5, id="caco-torchvision-its-end"),
        pytest.param("caco", "memory", 8, id="caco-memory-mid-epoch"),
        pytest.param("caco", "dali", 8, id="caco-dali-mid-epoch-with-more-threads"),
        pytest.param("caco", "torchvision", 10, id="caco-torchvision-epoch-end"),
        pytest.param("adco", "memory", 8, id="adco-memory-mid-epoch"),
        pytest.param("moco", "torchvision", 8, id="moco-torchvision-mid-epoch"),
        pytest.param("simclr", "memory", 8, id="simclr-mid-epoch"),
        pytest.param("nnclr", "memory", 8, id="nnclr-mid-epoch"),
        pytest.param("clae-caco", "memory", 8, id="clae-over-caco-mid-epoch"),
        pytest.param("cacr", "memory", 8, id="cacr-mid-epoch"),
        pytest.param("cacr-queue", "memory", 8, id="cacr-queue-mid-epoch"),
        pytest.param("cacr-global", "memory", 8, id="cacr-global-mid-epoch"),
        pytest.param("ablation", "torchvision", 8, id="ablation-queue-and-bank-mid-epoch"),
        pytest.param("ablation-batch", "torchvision", 3, id="ablation-queue-and-batch-mid-epoch"),
    ],
)
def test_a_resumed_run_is_the_one_never_stopped(images, tmp_path, method, stop, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    settings = (*RESUMED.get(method, (f"method={method}",)), f"data.loader={loader}", "trainer.log_every=2")
    train(config(images, *settings), tmp_path / "whole")
    train(config(images, *settings, f"trainer.max_steps={stop}"), tmp_path / "parts")
    more = ("data.workers=2",) if loader == "dali" else ()
    summary = train(config(images, *settings, *more), tmp_path / "parts", "auto")
    assert summary["finished"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = last_state(tmp_path / "whole"), last_state(tmp_path / "parts")
    for state in (whole, parts):
        # The clock is the one thing that may differ.
        for clock in ("train_seconds", "phase_seconds"):
            del state["position"][clock]
        del state["interval"]["seconds"], state["config"]
    assert_same(parts, whole)


def test_resuming_a_finished_run_changes_nothing(images, tmp_path):
    first = train(config(images), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    second = train(config(images), tmp_path / "run", "auto")
    assert second == first
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_finished_run_is_evaluated_anew_only_for_other_settings(images, tmp_path, monkeypatch):
    from caco_fast.evaluate.evaluator import Evaluator

    train(config(images), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "scores", lambda *_: pytest.fail("evaluated again"))
        train(config(images, "evaluation.batch_size=8"), tmp_path / "run", "auto")
    assert "knn_trained_k1" in train(config(images, "evaluation.k=[3, 1]"), tmp_path / "run", "auto")
    assert train(config(images, "trainer.epochs=3"), tmp_path / "run", "auto")["steps"] == 20


def test_two_runs_from_one_seed_are_equal_and_from_two_are_not(images, tmp_path):
    runs = {name: train(config(images, f"trainer.seed={seed}"), tmp_path / name) and losses(tmp_path / name)
            for name, seed in (("a", 1), ("b", 1), ("c", 2))}  # fmt: skip
    assert runs["a"] == runs["b"] != runs["c"]


def test_a_used_folder_is_refused_without_resume(images, tmp_path):
    train(config(images, "trainer.max_steps=1"), tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run.*--resume auto"):
        train(config(images), tmp_path / "run")


def test_changed_settings_are_named_on_resume(images, tmp_path, caplog):
    train(config(images, "trainer.max_steps=7"), tmp_path / "run")
    train(config(images, "optimizer.lr=0.1"), tmp_path / "run", "auto")
    assert "resuming with another optimizer.lr: 0.1, was 0.3" in caplog.text


def test_another_kind_of_draws_is_named_at_an_epochs_end(images, tmp_path, caplog):
    train(config(images, "trainer.max_steps=10"), tmp_path / "run")
    train(config(images, "data.loader=memory"), tmp_path / "run", "auto")
    assert "other random numbers from here on: batched draws, exact jitter, was torchvision draws" in caplog.text


@pytest.mark.parametrize(("steps", "goes_on"), [(7, False), (10, True)])
def test_other_training_images_are_refused_in_mid_epoch_and_named_at_its_end(tmp_path, caplog, steps, goes_on):
    images = write_images(tmp_path / "images")
    train(config(images, f"trainer.max_steps={steps}"), tmp_path / "run")
    # As many steps as before, in which every image behind it would be another one.
    (images / "train" / "cold" / "003.png").rename(images / "train" / "cold" / "9.png")
    if goes_on:
        train(config(images), tmp_path / "run", "auto")
        assert "other training images from here on: 40 images, list " in caplog.text
    else:
        with pytest.raises(UserError, match="middle of an epoch.*images 40 images, list .* -> 40 images, list"):
            train(config(images), tmp_path / "run", "auto")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("trainer.batch_size=10", "middle of an epoch.*batch_size 8 -> 10"),
        ("trainer.seed=5", "middle of an epoch.*seed 0 -> 5"),
        ("data.loader=memory", "middle of an epoch.*torchvision draws, exact jitter -> batched draws, exact jitter"),
        ("projector.dim=8", "does not fit this configuration"),
        ("caco.bank_size=64", "does not fit this configuration"),
    ],
)
def test_a_change_that_the_position_or_the_shapes_do_not_bear_is_refused(images, tmp_path, change, line):
    train(config(images, "trainer.max_steps=7"), tmp_path / "run")
    with pytest.raises(UserError, match=line):
        train(config(images, change), tmp_path / "run", "auto")


def test_a_truncated_checkpoint_is_refused_and_the_one_before_offered(images, tmp_path):
    train(config(images), tmp_path / "run")
    newest = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"step_00000015\.pt .*--resume \S*step_00000010\.pt"):
        train(config(images), tmp_path / "run", "auto")
    resumed = train(config(images), tmp_path / "run", str(newest.with_name("step_00000010.pt")))
    assert resumed["finished"]


def test_a_diverging_loss_stops_the_run_before_it_poisons_a_checkpoint(images, tmp_path):
    with pytest.raises(UserError, match=r"the loss is (nan|-?inf) at step \d+; .*lower optimizer.lr"):
        train(config(images, "optimizer={name: sgd, lr: 1e30}", "evaluation.every_epochs=0"), tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        state = CheckpointStore(path.parent).load(path)
        assert all(value.isfinite().all() for value in state["method"].values())


def test_training_goes_on_where_the_disk_refuses_a_checkpoint(images, tmp_path, monkeypatch, caplog):
    from caco_fast.engine.checkpoint import CheckpointWriteError

    def full(self, state, step):
        raise CheckpointWriteError("no space left on device")

    monkeypatch.setattr(CheckpointStore, "save", full)
    with pytest.raises(UserError, match="the run ended without its last checkpoint; the newest one is none; make room"):
        train(config(images), tmp_path / "run")
    assert caplog.text.count("training continues without it") == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def test_baselines_and_linear_probe_stand_in_the_summary(images, tmp_path):
    settings = ("evaluation.baselines=true", "evaluation.linear_probe=true", "trainer.max_steps=1")
    summary = train(config(images, *settings), tmp_path / "run")
    for what in ("raw", "random", "trained"):
        assert {f"knn_{what}", f"knn_{what}_k5", f"linear_{what}"} <= summary.keys()
    # The colours of the two classes are told apart by raw pixels.
    assert summary["knn_raw"] == 100


def test_images_without_classes_train_without_evaluation(images, tmp_path):
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    for path in (images / "train").rglob("*.png"):
        (flat / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="no labels"):
        train(config(flat.parent), tmp_path / "refused")
    summary = train(config(flat.parent, "evaluation.every_epochs=0"), tmp_path / "run")
    assert summary["finished"] and "knn_trained" not in summary


def test_a_start_that_failed_leaves_the_folder_free(images, tmp_path):
    with pytest.raises(UserError, match="optimizer.name"):
        train(config(images, "optimizer.name=adam"), tmp_path / "run")
    assert train(config(images, "trainer.max_steps=1"), tmp_path / "run")["steps"] == 1


def test_a_resume_that_failed_leaves_the_run_as_it_was(images, tmp_path):
    train(config(images), tmp_path / "run")
    folder = tmp_path / "run"
    kept = ("config.yaml", "metrics.jsonl", "environment.json")
    before = {name: (folder / name).read_text() for name in kept}
    with pytest.raises(UserError, match="does not fit"):
        train(config(images, "projector.dim=8"), folder, str(folder / "checkpoints" / "step_00000010.pt"))
    assert {name: (folder / name).read_text() for name in kept} == before
    assert not list(folder.glob("config.*.yaml"))


def test_raw_pixels_of_large_sets_are_left_out_with_a_line(images, tmp_path, monkeypatch, caplog):
    # 50 images of 3 x 40 x 40 are 960,000 bytes in f32.
    monkeypatch.setattr("caco_fast.figures.RAW_LIMIT", 960_000 - 1)
    summary = train(config(images, "evaluation.baselines=true", "trainer.max_steps=1"), tmp_path / "run")
    assert "knn_random" in summary and "knn_raw" not in summary
    assert "evaluation.baselines: raw pixels are left out" in caplog.text


def test_an_epoch_whose_end_was_missed_is_ended_on_resume(images, tmp_path, monkeypatch):
    """Killed after the checkpoint of the epoch's last step, before its kNN."""
    from caco_fast.engine.trainer import Trainer

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_end_epoch", lambda self, done: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config(images, "checkpoint.every_steps=5"), tmp_path / "run")
    train(config(images, "checkpoint.every_steps=5"), tmp_path / "run", "auto")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "knn_3" in line] == [10, 15]


def test_a_checkpoint_from_elsewhere_does_not_cut_the_run_that_is_there(images, tmp_path):
    train(config(images, "trainer.max_steps=7"), tmp_path / "other")
    train(config(images), tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    elsewhere = CheckpointStore(tmp_path / "other" / "checkpoints").latest()
    with pytest.raises(UserError, match="already holds a run"):
        train(config(images), tmp_path / "run", str(elsewhere))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before
    assert train(config(images), tmp_path / "new", str(elsewhere))["finished"]


def test_every_knn_has_its_checkpoint_so_that_the_best_is_kept(images, tmp_path):
    train(config(images, "checkpoint.every_epochs=0"), tmp_path / "run")
    scores = {line["step"]: line["knn_3"] for line in read_metrics(tmp_path / "run") if "knn_3" in line}
    step, score = CheckpointStore(tmp_path / "run" / "checkpoints").best()
    assert score == max(scores.values()) and scores[step] == score


def test_views_together_are_refused_where_a_batch_norm_mixes_them(images, tmp_path, monkeypatch):
    from caco_fast.models import batch_norm

    monkeypatch.delitem(batch_norm.REPLACED, torch.nn.BatchNorm2d)
    with pytest.raises(UserError, match="trainer.joint_views: resnet18 has a normalisation .*; set it to auto or off"):
        train(config(images, "trainer.joint_views=on"), tmp_path / "refused")
    assert train(config(images, "trainer.max_steps=1"), tmp_path / "run")["steps"] == 1


def test_a_run_shorter_than_a_log_interval_ends_well(images, tmp_path):
    summary = train(config(images, "trainer.max_steps=2", "trainer.log_every=10"), tmp_path / "run")
    assert summary["steps"] == 2 and not summary["finished"]


@pytest.mark.parametrize(
    "setting", ["evaluation.k=[3, 3]", "checkpoint.keep=0", "trainer.cpu_threads=-1", "trainer.batch_size=1"]
)
def test_a_setting_out_of_range_is_named(images, tmp_path, setting):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        train(config(images, setting), tmp_path / "run")


def test_baselines_are_scored_anew_for_other_neighbours(images, tmp_path):
    train(config(images, "evaluation.baselines=true", "trainer.max_steps=1"), tmp_path / "run")
    summary = train(
        config(images, "evaluation.baselines=true", "trainer.max_steps=2", "evaluation.k=[1]"), tmp_path / "run", "auto"
    )
    assert summary["baselines"]["k"] == [1]


@pytest.mark.parametrize("steps, phase", [(3, "preparation"), (8, "training")])
def test_a_checkpoint_of_format_version_1_continues_bit_for_bit(images, tmp_path, steps, phase):
    """Version 1 has another name for the first phase, and settings that are gone since."""
    settings = ("evaluation.every_epochs=0",)
    train(config(images, *settings), tmp_path / "whole")
    train(config(images, *settings, f"trainer.max_steps={steps}"), tmp_path / "parts")
    path = CheckpointStore(tmp_path / "parts" / "checkpoints").latest()
    payload = torch.load(path, weights_only=True)
    payload["version"] = 1
    payload["state"]["position"]["phase"] = phase
    payload["state"]["config"] += "\nof_another_version: 1\n"
    torch.save(payload, path)
    train(config(images, *settings), tmp_path / "parts", "auto")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
