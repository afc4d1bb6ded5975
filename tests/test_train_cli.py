"""tools/train.py as a user runs it: what it refuses and how, and that killing it at any moment loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from caco_fast.config import to_yaml
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from tests.engine.tiny_run import config, write_images
from tests.tool import load_tool

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def file(images, tmp_path_factory) -> Path:
    """The tiny run as a configuration file, long enough to be killed."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(to_yaml(config(images, "trainer.epochs=6", "evaluation.every_epochs=0")))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "train.py"), *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=180, cwd=ROOT)


REFUSALS = {
    "unknown key": (["optimzer.lr=1"], "unknown setting 'optimzer'; did you mean 'optimizer"),
    "mistyped value": (["trainer.epochs=many"], "trainer.epochs"),
    "method": (["method=cocoa"], "method: found 'cocoa', expected one of caco, "),
    "backbone": (["backbone.name=resnet05"], "timm knows no architecture 'resnet05'; nearest: "),
    "missing path": (["data.path=/no/such/folder"], "/no/such/folder"),
    "fewer images than a batch": (["trainer.batch_size=64"], "64"),
    "a bank that no memory holds": (["caco.bank_size=1000000000000"], "memory"),
    "GPU": (["trainer.device=cuda"], "sees no GPU"),
    "precision": (["trainer.precision=fp16"], "trainer.precision"),
    "resume": (["--resume", "/no/such/checkpoint.pt"], "/no/such/checkpoint.pt"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_gets_one_clear_line(file, tmp_path, case, capsys, monkeypatch):
    """In this process, for speed: main() is all that the script does."""
    arguments, wanted = REFUSALS[case]
    if case == "GPU" and torch.cuda.is_available():
        pytest.skip("a GPU is present")
    tool = load_tool("train")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file), f"run.folder={tmp_path / 'run'}", *arguments])
    assert tool.main() == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ") and len(printed.splitlines()) == 1
    assert wanted in printed


def test_an_empty_folder_is_named(file, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    done = run("--config", file, f"data.path={tmp_path / 'data'}", f"run.folder={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and str(tmp_path / "data") in done.stderr
    assert "Traceback" not in done.stderr


def test_print_config_shows_the_resolved_whole(file):
    done = run("--config", file, "--print-config", "optimizer.lr=0.125")
    assert done.returncode == 0
    shown = yaml.safe_load(done.stdout)
    assert shown["optimizer"]["lr"] == 0.125 and shown["caco"]["bank_size"] == 37
    assert "# K, rows of the bank" in done.stdout


def start(file: Path, folder: Path) -> subprocess.Popen:
    arguments = ["--config", file, "--resume", "auto", f"run.folder={folder}", "checkpoint.every_steps=2"]
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if any(line["step"] >= step for line in read_metrics(folder)):
            return
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read()


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(file, folder)
    assert process.wait(timeout=180) == 0, process.stdout.read()
    return folder


def assert_same_end(folder: Path, whole: Path) -> None:
    def losses(of: Path) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in read_metrics(of)]

    assert losses(folder) == losses(whole)
    ends = []
    for of in (folder, whole):
        store = CheckpointStore(of / "checkpoints")
        ends.append(store.load(store.latest()))
    for part in ("encoders", "method"):
        assert all(torch.equal(ends[0][part][key], value) for key, value in ends[1][part].items())


def test_killed_and_resumed_it_ends_where_it_would_have(file, tmp_path, whole):
    folder = tmp_path / "run"
    # In the initialisation, in the first epoch and later; the last start runs to the end.
    for step in (3, 9, 20):
        process = start(file, folder)
        wait_for_step(process, folder, step)
        process.kill()
        process.wait()
    process = start(file, folder)
    assert process.wait(timeout=180) == 0
    assert "resuming from" in process.stdout.read()
    assert_same_end(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_it_after_a_checkpoint(file, tmp_path, whole, number):
    folder = tmp_path / "run"
    process = start(file, folder)
    wait_for_step(process, folder, 7)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    said = process.stdout.read()
    assert f"stopped by {number.name} after step" in said and "--resume auto" in said and "Traceback" not in said
    stopped = int(said.split("after step ")[1].split(";")[0])
    assert CheckpointStore(folder / "checkpoints").latest().name == f"step_{stopped:08d}.pt"
    assert start(file, folder).wait(timeout=180) == 0
    assert_same_end(folder, whole)


def test_two_ranks_learn_what_one_does(file, tmp_path):
    """torchrun over gloo: same images, synchronised BatchNorm, a shared bank; equal to f32 rounding."""
    for ranks, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        settings = ["trainer.max_steps=10", "optimizer.lr=0.03", "evaluation.every_epochs=1"]
        arguments = ["--config", str(file), f"run.folder={folder}", *settings]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*launch, str(ROOT / "tools" / "train.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(one, two):
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["knn_trained"] == summaries[1]["knn_trained"]
