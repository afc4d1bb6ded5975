"""`caco_fast.pretrain`: the same run as `caco-fast train`, called from Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import caco_fast
from caco_fast.config import to_yaml
from caco_fast.engine.metrics import read_metrics
from caco_fast.errors import UserError
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def file(images, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(config(images, "evaluation.every_epochs=0")))
    return path


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


@pytest.mark.slow
def test_it_is_the_run_of_the_command_line(images, file, tmp_path):
    train(config(images, "evaluation.every_epochs=0", "caco.bank_size=24", "trainer.epochs=1"), tmp_path / "a")
    settings = {"trainer": {"epochs": 1}, "caco.bank_size": 24}
    summary = caco_fast.pretrain(file, out=tmp_path / "b", data=images, **settings)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != []
    assert summary == json.loads((tmp_path / "b" / "summary.json").read_text())


@pytest.mark.slow
def test_it_resumes_and_refuses_a_folder_that_holds_a_run(file, tmp_path):
    with pytest.raises(UserError, match="data.path"):
        caco_fast.pretrain(file, out=tmp_path / "run", data=tmp_path / "none")
    caco_fast.pretrain(file, out=tmp_path / "run", trainer={"epochs": 1})
    with pytest.raises(UserError, match="holds a run"):
        caco_fast.pretrain(file, out=tmp_path / "run")
    summary = caco_fast.pretrain(file, out=tmp_path / "run", resume="auto")
    assert summary["finished"]
    steps = [step for step, _ in losses(tmp_path / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == summary["steps"]


@pytest.mark.parametrize(
    "data, source, path",
    [
        ("embedded", "embedded", ""),
        ("/data/imagenet", "folder", "/data/imagenet"),
        (Path("/data/a b=c"), "folder", "/data/a b=c"),
        ("/data/index.npz", "index", "/data/index.npz"),
        ("/data/train-{000..127}.tar", "webdataset", "/data/train-{000..127}.tar"),
        ({"source": "cifar10", "path": "data/cifar10"}, "cifar10", "data/cifar10"),
    ],
    ids=["embedded", "folder", "path", "index", "shards", "mapping"],
)
def test_data_and_settings_reach_the_configuration(data, source, path, monkeypatch, tmp_path):
    monkeypatch.setattr("caco_fast.training.train", lambda config, folder, resume: {"run": (config, folder, resume)})
    monkeypatch.chdir(tmp_path)
    views = [{"count": 2, "size": 20}]
    config, folder, resume = caco_fast.pretrain(
        data=data, views=views, backbone={"name": "resnet34"}, optimizer={"lr": 1e-5}, wandb={"project": "été"}
    )["run"]
    assert (config.data.source, config.data.path) == (source, path)
    assert [(view.count, view.size) for view in config.views] == [(2, 20)]
    assert config.backbone.name == "resnet34" and config.backbone.stem == "small_stride2"
    assert config.optimizer.lr == 1e-5 and config.wandb.project == "été"
    assert (folder, resume) == (Path("runs/quickstart"), "never")


def test_a_mistyped_setting_is_named():
    with pytest.raises(UserError, match="did you mean 'trainer.epochs'"):
        caco_fast.pretrain(trainer={"epoch": 2})
    with pytest.raises(UserError, match="the nearest name is quickstart"):
        caco_fast.pretrain("quikstart")


@pytest.mark.slow
def test_torch_is_left_as_it_was(file, tmp_path):
    torch.set_num_threads(2)
    caco_fast.pretrain(file, out=tmp_path / "run", trainer={"max_steps": 2, "deterministic": True})
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_it_runs_with_workers_in_a_script_without_a_main_guard(file, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import caco_fast\nprint('once')\n"
        f"caco_fast.pretrain({str(file)!r}, out={str(tmp_path / 'run')!r}, data={{'workers': 2}})\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["workers"] == 2
