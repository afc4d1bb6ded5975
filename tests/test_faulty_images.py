"""Broken files never stop a run: 1 and 2 ranks train past them, and the log names every bad one."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from caco_fast.errors import UserError
from caco_fast.training import train
from tests.engine.tiny_run import config
from tests.faulty_images import BAD, GOOD, ODD, VanishingFile, obey_permissions, write_faulty_images
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent

LOADERS = ["torchvision", "dali"]
EPOCHS = 2


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    return request.param


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_faulty_images(tmp_path / "images")


def overrides(loader: str, limit: float) -> list[str]:
    return [
        f"data.loader={loader}",
        "data.workers=0",
        f"data.bad_image_limit={limit}",
        "data.eval_resize=32",
        "data.eval_size=32",
        "views=[{size: 16, count: 2}]",
        f"trainer.epochs={EPOCHS}",
        "checkpoint.every_epochs=0",
        f"evaluation={{every_epochs: {EPOCHS}, k: [3], batch_size: 16}}",
    ]


def train_on_rank(images: str, folder: str, settings: list[str]) -> dict[str, Any]:
    """The run's summary, in a process of its own."""
    obey_permissions()
    (vanishing,) = Path(images).glob("train/*/*_vanished.JPEG")
    logging.getLogger("caco_fast").addHandler(VanishingFile(vanishing))
    return train(config(Path(images), *settings), Path(folder))


@pytest.mark.parametrize("ranks", [1, 2])
def test_trains_past_bad_images_and_names_them(images: Path, tmp_path: Path, loader: str, ranks: int) -> None:
    run = tmp_path / "run"
    summaries = run_ranks(train_on_rank, ranks, str(images), str(run), overrides(loader, limit=0.5))
    steps = EPOCHS * ((GOOD + len(BAD) + len(ODD)) // 8)
    summary = summaries[0]
    assert summary["finished"] and summary["bad_images"] == len(BAD)
    assert summary["steps"] - summary["initialisation_steps"] == steps
    reasons: dict[str, set[str]] = {}
    for log in run.glob("log*.txt"):
        for name, reason in re.findall(r"bad image .*/train/\w+/\d+_(\w+)\.JPEG: (.+)", log.read_text()):
            reasons.setdefault(name, set()).add(reason)
    assert set(reasons) == set(BAD)
    assert any("ermission" in reason for reason in reasons["closed"])
    assert all("No such file" in reason for reason in reasons["vanished"])
    # Bad images of the evaluation are named too.
    logged = "".join(log.read_text() for log in run.glob("log*.txt"))
    assert set(re.findall(r"bad image .*/val/\w+/(\w+)\.JPEG: ", logged)) == {"2_zero_bytes", "5_html"}


def stopped_line(images: str, folder: str, settings: list[str]) -> None:
    """End the process as tools/train.py does, and leave the error line in a file."""
    try:
        train(config(Path(images), *settings), Path(folder))
    except UserError as error:
        Path(images, f"stopped_{os.getpid()}").write_text(str(error))
        os._exit(2)


def test_over_the_limit_two_ranks_stop_with_the_list(images: Path, tmp_path: Path, loader: str) -> None:
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[.*\b2\b.*\]"):
        run_ranks(stopped_line, 2, str(images), str(tmp_path / "run"), overrides(loader, limit=2 / 48))
    for line in images.glob("stopped_*"):
        first, *listed = line.read_text().splitlines()
        wanted = r"(\d+) of 48 training images can't be read, more than the 2 that .* All of them: (\S+)"
        count, written = re.fullmatch(wanted, first).groups()
        assert len(listed) == int(count) >= 3 and all("/images/train/" in entry for entry in listed)
        assert Path(written).read_text().splitlines() == [entry.strip() for entry in listed]
        Path(written).unlink()
    assert list(images.glob("stopped_*"))
