"""The end of a run: its page is made once the ranks have parted, and no error of it costs the run anything."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from caco_fast.report import write
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images

SHORT = ("trainer.max_steps=7", "evaluation={baselines: false, linear_probe: false}", "run.report=true")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def last_line(folder: Path) -> str:
    return (folder / "log.txt").read_text().splitlines()[-1]


def test_a_run_ends_with_its_page_and_tensorboard_has_its_pictures(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(images, *SHORT, "run.tensorboard=true"), folder)
    page = (folder / "report" / "index.html").read_text()
    assert '<section id="dynamics"' in page and "data:image/jpeg;base64," in page
    assert last_line(folder).endswith(f"INFO the page of the run: {folder / 'report' / 'index.html'}")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    shown = events.Tags()["images"]
    assert "curves" in shown and len(shown) == 1 + page.count("data:image/")
    assert [event.step for event in events.Images("curves")] == [7] and "loss" in events.Tags()["scalars"]


def test_an_error_of_the_page_is_a_line_and_the_run_is_whole(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(write, "render", fails)
    monkeypatch.setattr(write, "picture_parts", lambda *_: iter(()))
    folder = tmp_path / "run"
    assert train(config(images, *SHORT), folder)["steps"] == 7
    assert (folder / "summary.json").exists() and (folder / "checkpoints" / "step_00000007.pt").exists()
    assert "ERROR the page of the run can't be made: MemoryError: planted; nothing else is missing" in last_line(folder)
    assert last_line(folder).endswith(f"`caco-fast report {folder}` tries again")
