"""Checkpoints do not depend on the number of ranks: saved on 4 ranks, a run resumes on 1 or 3 as if never stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from caco_fast.distributed import rank
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.training import train
from tests.engine.tiny_run import config
from tests.ranks import run_ranks

# 2 steps of initialisation, and 3 in each epoch. Log lines come at odd steps of a phase. No number of ranks divides K.
SETTINGS = (
    "trainer.batch_size=12",
    "trainer.log_every=2",
    "caco.bank_size=37",
    "caco.warm_start_steps=2",
    "caco.bank_lr=0.1",
    # At ten times this rate, so small a network amplifies rounding a hundredfold a step.
    "optimizer.lr=0.003",
    "evaluation.every_epochs=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
)
PREPARATION, MID_EPOCH, EPOCH_END, END = 1, 4, 5, 8


def run(images: Path, folder: Path, *overrides: str, resume: str = "never") -> None:
    train(config(images, *SETTINGS, *overrides), folder, resume=resume)


def run_several(images: Path, runs: list[tuple[Path, str, list[str]]]) -> int:
    for folder, resume, overrides in runs:
        run(images, folder, *overrides, resume=resume)
    return rank()


def log_lines(folder: Path) -> list[dict[str, Any]]:
    names = ("step", "epoch", "loss", "positive_probability", "positive_perplexity")
    return [{name: line[name] for name in names if name in line} for line in read_metrics(folder)]


def state(folder: Path, step: int) -> dict[str, Any]:
    store = CheckpointStore(folder / "checkpoints")
    return store.load(folder / "checkpoints" / f"step_{step:08d}.pt")


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(images, folder)
    return folder


@pytest.fixture(scope="module")
def on_four(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 4 ranks, stopped at the end of the first epoch."""
    folder = tmp_path_factory.mktemp("four")
    run_ranks(run_several, 4, images, [(folder, "never", [f"trainer.max_steps={EPOCH_END}"])])
    return folder


def stopped_at(step: int, on_four: Path, folder: Path) -> tuple[Path, str]:
    """A copy of the run of 4 ranks, and its checkpoint of this step."""
    shutil.copytree(on_four, folder)
    return folder, str(folder / "checkpoints" / f"step_{step:08d}.pt")


def assert_same_run(folder: Path, whole: Path) -> None:
    """Compare every log line and the last checkpoint, to f32 rounding. Worst seen: 1.3e-5 and 1.0e-5."""
    found, wanted = log_lines(folder), log_lines(whole)
    assert len(found) == len(wanted) >= 4
    for ours, theirs in zip(found, wanted):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = state(folder, END), state(whole, END)
    for part in ("method", "encoders"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            torch.testing.assert_close(
                ours[part][name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=f"{part}.{name}": f"{n}: {m}"
            )


def test_four_ranks_save_the_whole_bank(on_four: Path, whole: Path) -> None:
    for step in (PREPARATION, MID_EPOCH, EPOCH_END):
        ours, theirs = (state(folder, step)["method"] for folder in (on_four, whole))
        assert ours.keys() == theirs.keys() >= {"criterion.bank.bank", "criterion.bank.velocity"}
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("step", [PREPARATION, MID_EPOCH, EPOCH_END])
def test_one_rank_resumes(step: int, images: Path, on_four: Path, whole: Path, tmp_path: Path) -> None:
    folder, checkpoint = stopped_at(step, on_four, tmp_path / "run")
    run(images, folder, resume=checkpoint)
    assert_same_run(folder, whole)


def test_three_ranks_resume(images: Path, on_four: Path, whole: Path, tmp_path: Path) -> None:
    cases = [
        (*stopped_at(MID_EPOCH, on_four, tmp_path / "mid-epoch"), []),
        (*stopped_at(EPOCH_END, on_four, tmp_path / "replicated"), ["caco.bank_parallel=replicated"]),
    ]
    run_ranks(run_several, 3, images, cases)
    for folder, _, _ in cases:
        assert_same_run(folder, whole)
