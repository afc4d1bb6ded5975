"""Ranks that would train on different things are refused on every rank alike, before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from caco_fast import build
from caco_fast.config import settings_of
from caco_fast.distributed import rank
from caco_fast.engine.agreement import on_rank_0, require_equal_starts, together
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.metrics import read_metrics
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images
from tests.ranks import run_ranks

SHORT = ("method=moco", "evaluation.every_epochs=0", "trainer.epochs=1")


def line_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "no error"


def refuse_on(number: int) -> int:
    if rank() == number:
        raise UserError("a line")
    return rank()


def find_errors() -> dict[str, Any]:
    def starts(**of_ranks: tuple[Any, Any]) -> str:
        return line_of(lambda: require_equal_starts({name: pair[rank()] for name, pair in of_ranks.items()}, "do this"))

    return {
        "equal": starts(a=(1, 1), b=("x", "x")),
        "differ": starts(b=(1, 1), **{"optimizer.lr": (0.3, 0.1), "z": (1, 2)}),
        "one has more": starts(**{"views.2.size": (96, None)}),
        "place": starts(**{"data.path": ("/a", "/b"), "run.folder": ("a", "b")}),
        "on one": line_of(lambda: together(lambda: refuse_on(1))),
        "on all": line_of(lambda: together(lambda: refuse_on(rank()))),
        "on none": together(lambda: refuse_on(5)),
        "rank 0 decides": on_rank_0(lambda: refuse_on(1)),
        "rank 0 refuses": line_of(lambda: on_rank_0(lambda: refuse_on(0))),
    }


def test_what_differs_is_named_with_its_rank_on_every_rank():
    found = run_ranks(find_errors, 2)
    assert [one.pop("on none") for one in found] == [0, 1]
    assert found[0] == found[1]
    assert found[0] == {
        "equal": "no error",
        "differ": "optimizer.lr: found 0.1 on rank 1, expected 0.3 as on rank 0; do this",
        "one has more": "views.2.size: found None on rank 1, expected 96 as on rank 0; do this",
        "place": "no error",
        "on one": "on rank 1: a line",
        "on all": "a line",
        "rank 0 decides": 0,
        "rank 0 refuses": "on rank 0: a line",
    }


def refused_runs(folder: Path) -> dict[str, str]:
    """The lines of runs of two ranks whose images or settings differ."""
    first, other = folder / "images", folder / f"images{rank()}"
    run = folder / "run"
    return {
        "length": line_of(lambda: train(config(folder / f"longer{rank()}", *SHORT), run)),
        "names": line_of(lambda: train(config(other, *SHORT), run)),
        "missing": line_of(lambda: train(config(folder / ("images0", "none")[rank()], *SHORT), run)),
        "setting": line_of(lambda: train(config(first, *SHORT, f"optimizer.momentum=0.{rank()}"), run)),
    }


def test_runs_of_ranks_that_differ_are_refused_and_leave_no_folder(tmp_path):
    for name in ("images", "images0", "images1", "longer0", "longer1"):
        write_images(tmp_path / name, train=20 + 4 * (name == "longer1"), test=1)
    (tmp_path / "images1" / "train" / "warm" / "003.png").rename(tmp_path / "images1" / "train" / "warm" / "33.png")
    found = run_ranks(refused_runs, 2, tmp_path)
    assert found[0] == found[1]
    lines = found[0]
    assert lines["length"].startswith("training images: found 48 images, list ")
    assert "on rank 1, expected 40 images, list " in lines["length"]
    assert "give all ranks the same images" in lines["names"] and lines["names"].count("40 images, list ") == 2
    assert lines["missing"].startswith("on rank 1: ") and "none" in lines["missing"]
    assert lines["setting"].startswith("optimizer.momentum: found 0.1 on rank 1, expected 0.0 as on rank 0; start all")
    assert not (tmp_path / "run").exists()


def test_other_code_is_another_start(monkeypatch):
    from caco_fast import provenance

    def name(package: Path) -> str:
        monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
        return provenance.code()

    assert name(Path(build.__file__).parent) == name(Path(build.__file__).parent)
    assert name(Path(build.__file__).parent) != name(Path(build.__file__).parent / "ops")
    assert "code" not in settings_of(config(Path("images")))


def run_into_nan(images: Path, folder: Path) -> str:
    """A run on two ranks of which one meets a loss that is not finite, between two log lines."""
    step = Trainer._step

    def poisoned(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        if rank() == 1 and self.position.total_steps == 3:
            self.step.interval.sums["loss"].fill_(float("nan"))

    Trainer._step = poisoned  # type: ignore[method-assign]
    return line_of(lambda: train(config(images, *SHORT, "trainer.log_every=4"), folder))


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_of_them_alike(images, tmp_path):
    lines = run_ranks(run_into_nan, 2, images, tmp_path / "run")
    assert lines[0] == lines[1]
    assert lines[0].startswith("the loss is nan at step 4; no checkpoint was written yet")


def draws_after_building(images: Path, folder: Path) -> tuple[float, list[float]]:
    run = config(images, *SHORT)
    cpu = torch.device("cpu")
    trainer = build.build_trainer(build.settled(run, cpu), RunFolder(folder), CheckpointStore(folder), cpu)
    return float(next(trainer.encoders.query.parameters()).detach().sum()), torch.rand(3).tolist()


def test_ranks_build_the_same_weights_and_then_draw_their_own_numbers(images, tmp_path):
    """Dropout and drop path would drop the same everywhere. Rank 0 draws what a single process does."""
    alone = draws_after_building(images, tmp_path)
    first, second = run_ranks(draws_after_building, 2, images, tmp_path)
    assert first == alone
    assert second[0] == alone[0] and second[1] != alone[1]


def run_in_two_parts(images: Path, folder: Path) -> None:
    settings = ("method=moco", "trainer.epochs=1", "backbone.options.drop_path_rate=0.5", "trainer.log_every=2")
    train(config(images, *settings), folder / "whole")
    train(config(images, *settings, "trainer.max_steps=3"), folder / "parts")
    train(config(images, *settings), folder / "parts", "auto")


def test_a_resumed_run_with_drop_path_is_the_one_never_stopped(images, tmp_path):
    run_ranks(run_in_two_parts, 2, images, tmp_path)
    whole, parts = (
        [line.get("loss", line.get("knn_3")) for line in read_metrics(tmp_path / name)] for name in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 4
