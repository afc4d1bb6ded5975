"""A resumed run follows its own settings, and one that is refused has left its folder as it was."""

import shutil
from pathlib import Path

import pytest
import torch

from caco_fast.config import to_yaml
from caco_fast.engine.checkpoint import CheckpointStore, load_parts
from caco_fast.errors import UserError
from caco_fast.training import _compare_settings, train
from tests.engine.tiny_run import config

SHORT = ("method=moco", "evaluation.every_epochs=0", "trainer.log_every=1")


@pytest.fixture(scope="module")
def begun(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by LARS that was stopped after its first step."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(config(images, *SHORT, "trainer.max_steps=1"), folder)
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names who trained there last."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_the_settings_of_the_optimiser_are_in_force_after_a_resume(images, run, caplog):
    settings = ("optimizer.momentum=0.5", "optimizer.weight_decay=0.25", "optimizer.trust=0.0625")
    train(config(images, *SHORT, *settings, "trainer.max_steps=2"), run, "auto")
    store = CheckpointStore(run / "checkpoints")
    state = store.load(store.latest())
    (group,) = state["optimizer"]["param_groups"]
    assert state["position"]["total_steps"] == 2
    assert [group[name] for name in ("momentum", "weight_decay", "trust")] == [0.5, 0.25, 0.0625]
    assert "resuming with another optimizer.weight_decay: 0.25, was 1.5e-06" in caplog.text


REFUSED = {
    "another optimiser": (
        ["optimizer.name=sgd"],
        r"optimizer.name: found sgd, expected lars, which \S*step_0+1.pt was",
    ),
    "another shape": (["projector.dim=8"], "does not fit this configuration"),
    "another method": (["method=caco"], "does not fit this configuration"),
    "another batch": (["trainer.batch_size=10"], "in the middle of an epoch.*batch_size 8 -> 10"),
    "no data": (["data.path=/no/such/folder"], "/no/such/folder"),
    "no such model": (["backbone.name=resnet05"], "resnet05"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_resume_changes_nothing_in_the_folder(images, run, case):
    settings, line = REFUSED[case]
    before = content(run)
    with pytest.raises(UserError, match=line):
        train(config(images, *SHORT, *settings), run, "auto")
    assert content(run) == before


@pytest.mark.parametrize("setting", ["data.path=/no/such/folder", "backbone.name=resnet05", "trainer.batch_size=64"])
def test_a_refused_start_makes_no_folder(images, tmp_path, setting):
    with pytest.raises(UserError):
        train(config(images, *SHORT, setting), tmp_path / "runs" / "new")
    assert not (tmp_path / "runs").exists()


def test_lines_from_before_the_folder_is_there_are_in_its_log(begun):
    lines = (begun / "log.txt").read_text()
    assert "bank: " in lines and lines.index("bank: ") < lines.index("step 1/5")


@pytest.mark.parametrize("was, now", [(False, True), (True, False), (True, True)])
def test_a_loss_scale_is_taken_up_dropped_or_kept(was, now, caplog):
    then, scaler = (torch.amp.GradScaler("cpu", init_scale=scale, enabled=on) for scale, on in ((8.0, was), (2.0, now)))
    load_parts({}, scaler, {"scaler": then.state_dict()}, "step_00000001.pt")
    assert scaler.get_scale() == (1.0 if not now else 8.0 if was else 2.0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (was != now)
    assert all(line.startswith("step_00000001.pt has ") and "loss scale" in line for line in lines)


def test_a_setting_that_is_newer_than_the_checkpoint_stood_at_its_default(images, caplog):
    now = config(images, "trainer.clip_gradient=1.0")
    before = "".join(line for line in to_yaml(now).splitlines(True) if "accumulate" not in line and "clip" not in line)
    _compare_settings(now, before, "a checkpoint")
    assert caplog.messages == ["resuming with another trainer.clip_gradient: 1.0, was None"]
