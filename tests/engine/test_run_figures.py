"""What a run says of itself: its header, the figures of a line, a trace, milestones, and the end of its time."""

import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caco_fast import training
from caco_fast.cli.train import main
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import peak_memory, read_metrics
from caco_fast.engine.profile import steps_to_profile
from caco_fast.engine.ranks import Interrupt
from caco_fast.engine.settings import CheckpointConfig, TrainerConfig
from caco_fast.errors import UserError
from tests.engine.tiny_run import SETTINGS, config
from tests.ranks import run_ranks

SHORT = ("evaluation.every_epochs=0", "evaluation.baselines=false", "evaluation.linear_probe=false")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 5 steps of initialisation and 3 epochs of 5 steps."""
    settings = config(images, *SHORT, "trainer.epochs=3", "checkpoint.keep=1", "checkpoint.keep_every=2")
    folder = tmp_path_factory.mktemp("run") / "a"
    # The two steps are in different phases.
    training.train(replace(settings, trainer=replace(settings.trainer, profile="5:6")), folder)
    return folder


def test_header_in_the_log_and_in_the_environment(run: Path, images: Path) -> None:
    lines = [line.split(" INFO ")[1] for line in (run / "log.txt").read_text().splitlines() if " INFO " in line]
    first_step = next(number for number, line in enumerate(lines) if "step 1/5" in line)
    header = lines[:first_step]
    assert f"caco: 3 epochs of 5 steps, in {run}" in header
    assert "model: resnet18 with 18,048 trained parameters, in f32 on the CPU (threads: 1)" in header
    assert f"images: 40 of {images}, by the loader torchvision" in header
    assert "batch: 8 images a step, on one rank" in header
    assert any(line.startswith("bank: tiled, because") for line in header)
    (start,) = json.loads((run / "environment.json").read_text())
    assert (start["run"]["parameters"], start["run"]["images"], start["run"]["ranks"]) == (18048, 40, 1)


def test_figures_of_the_log_are_those_of_the_metrics(run: Path) -> None:
    shown = re.findall(r"([\d,]+) pairs/s \| data (\d+) % \| ([\d.]+) GiB \| eta", (run / "log.txt").read_text())
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert len(lines) == 20 and shown == [
        (f"{line['pairs_per_second']:,.0f}", f"{100 * line['data_wait']:.0f}", f"{line['peak_memory_gib']:.1f}")
        for line in lines
    ]
    assert all(0 < line["data_wait"] < 1 and line["gradient_norm"] > 0 for line in lines)


def test_peak_memory_of_the_process() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # The two are counted a little differently. A wrong unit would be off by 1024.
    assert 0.9 * resident < peak_memory(torch.device("cpu")) < 100 * resident


def test_trace_of_the_steps(run: Path) -> None:
    with gzip.open(run / "profile_5_6.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"].startswith("Optimizer.step#") for event in events) == 2
    assert f"trace of the steps 5 to 6: {run / 'profile_5_6.json.gz'}" in (run / "log.txt").read_text()


@pytest.mark.parametrize("text", ["5", "6:5", "0:3", "a:b", "3:"])
def test_other_texts_name_no_steps(text: str) -> None:
    with pytest.raises(UserError, match=rf"trainer.profile: found '{text}', expected FIRST:LAST"):
        TrainerConfig(profile=text)
    assert steps_to_profile("") is None


def test_milestones_stay(run: Path) -> None:
    found = {path.name for path in (run / "checkpoints").glob("*.pt")}
    assert found == {"epoch_0002.pt", "step_00000020.pt", "best.pt"}
    assert CheckpointStore(run / "checkpoints").load(run / "checkpoints" / "epoch_0002.pt")["position"]["step"] == 10


def test_milestones_of_another_past_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for epoch in (1, 2, 3):
        store.save_milestone(store.save({}, 10 * epoch), epoch)
    store.save_milestone(store.save({}, 20), 2)
    assert sorted(path.name for path in tmp_path.glob("epoch_*.pt")) == ["epoch_0001.pt", "epoch_0002.pt"]


@pytest.mark.parametrize("make, name", [(TrainerConfig, "max_hours"), (CheckpointConfig, "keep_every")])
def test_bounds(make: type, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: found -1, expected"):
        make(**{name: -1})


def test_a_run_out_of_time_stops_with_a_checkpoint_and_goes_on(images: Path, tmp_path: Path, caplog) -> None:
    settings = (*SHORT, "trainer.epochs=1")
    summary = training.train(config(images, *settings, "trainer.max_hours=1e-9"), tmp_path)
    assert not summary["finished"] and summary["steps"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.pt")] == ["step_00000001.pt"]
    log = (tmp_path / "log.txt").read_text()
    assert "trainer.max_hours: the time is over after step 1; continue with --resume auto" in log
    assert training.train(config(images, *settings), tmp_path, resume="auto")["finished"]
    assert "resuming with another trainer.max_hours" not in (tmp_path / "log.txt").read_text()


def one_rank_out_of_time() -> list[bool]:
    """After each step, whether the ranks agree to end; only rank 1 is out of time."""
    with Interrupt(max_seconds=1e-9 if torch.distributed.get_rank() == 1 else 1e9) as interrupt:
        asked = []
        for _ in range(3):
            assert interrupt.agreed() is None
            asked.append(interrupt.out_of_time)
    return asked


def test_ranks_end_together() -> None:
    assert run_ranks(one_rank_out_of_time, 2) == [[False, True, True]] * 2


def test_a_dry_run_leaves_nothing(images: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [*SETTINGS, f"data.path={images}", "trainer.accumulate=2", "trainer.checkpoint_activations=true"]
    assert main(["--dry-run", *settings]) == 0
    shown = capsys.readouterr().out
    assert f"caco: 2 epochs of 5 steps, in {tmp_path}/runs/caco" in shown
    assert "batch: 8 images a step, on one rank in 2 parts" in shown
    assert re.search(r"dry run: initialisation step 2, loss \d\.\d{4}, \d+\.\d\d s", shown)
    assert re.search(r"dry run: training step 2, loss \d+\.\d{4}, \d+\.\d\d s", shown)
    assert re.search(r"dry run: peak memory \d+\.\d GiB on rank 0; nothing was written", shown)
    assert list(tmp_path.iterdir()) == []
