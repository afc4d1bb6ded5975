"""The page of a run folder and of several: every kind of run has one, and its figures are those of the folder."""

import base64
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from caco_fast.cli import main
from caco_fast.errors import UserError
from caco_fast.report import dynamics, headline, origin, write
from caco_fast.report.run_data import read_run
from caco_fast.report.write import ReportConfig, report, write_report
from tests.report.made_up import LINES, START, SUMMARY, line, run_folder
from tests.report.test_page import Document

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def drawn() -> None:
    """Asked for by a test in which curves are drawn."""


@pytest.fixture(autouse=True)
def few_drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the curves out of other tests, because drawing takes most of the time of a page."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("caco_fast.report.plots._svg", lambda *_: "<svg></svg>")


def document(*folders: Path) -> Document:
    path, _ = write_report(folders, ReportConfig(), torch.device("cpu"))
    text = path.read_text()
    assert "can't be made (" not in text
    return Document(text)


def sections(page: Document) -> list[str | None]:
    return [each["id"] for each in page.all("section")]


def test_a_finished_run_shows_its_figures(tmp_path: Path) -> None:
    page = document(run_folder(tmp_path / "run"))
    words = page.words()
    for shown in (
        "trained encoder 73.8 78.5 82.2",
        "raw pixels 61.2 - -",
        "resnet18, 1.0 M trained parameters",
        "100 steps; 12 epochs of 39 after 30 steps that fill the bank",
        "2.0 h",
        "1,234 image pairs/s",
        "recipe quickstart: CaCo on the embedded Fashion-MNIST subset",
        "No stop, no skipped step, no bad image and no warning.",
    ):
        assert shown in words, shown
    for name in ("headline", "dynamics", "training", "evaluations", "speed", "events", "settings", "environment"):
        assert name in sections(page)
    # A style inside of a picture would hold for all the others.
    assert len(page.all("style")) == 1
    alts = " ".join(str(each["aria-label"]) for each in page.all("div") if each.get("role") == "img")
    assert "positive probability: from 0.01 to 0.1; kNN accuracy: k 200 from 70.5 to 71, k 20 from 75 to 75" in alts


def test_an_unfinished_run_has_a_page_that_says_so(tmp_path: Path) -> None:
    words = document(run_folder(tmp_path / "run", lines=LINES[:4] + LINES[-2:-1], summary=None)).words()
    assert "because the run has not ended yet" in words and "in epoch 1 of 12; not finished" in words
    assert "k 200 70.5 %, k 20 75.0 % at step 50" in words


def test_a_run_that_only_began_has_a_page(tmp_path: Path) -> None:
    words = document(run_folder(tmp_path / "run", lines=None, summary=None, starts=None)).words()
    assert words.count(dynamics.NO_LINES) == 3


def test_without_labels_the_held_out_values_are_shown(tmp_path: Path) -> None:
    lines = [*LINES[:-2], {"step": 100, "epoch": 0, "held_out_loss": 7.5, "held_out_positive_probability": 0.05}]
    summary = {key: value for key, value in SUMMARY.items() if key.split("_")[0] not in ("knn", "linear")}
    page = document(run_folder(tmp_path / "run", lines=lines, summary=summary | {"held_out_loss": 7.5}))
    assert "because the images have no labels, or evaluation was off" in page.words()
    assert "loss on held-out images 7.5" in page.words()
    alts = " ".join(str(each.get("aria-label")) for each in page.all("div"))
    assert "loss, held-out images 7.5" in alts and "kNN" not in alts


def test_evaluations_are_beside_published_figures_with_their_pictures(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    assert "caco-fast evaluate" in document(folder).words()
    record = {
        "protocol": "linear",
        "metrics": {"top1": 71.25, "top5": 90.5},
        "headline": "top1",
        "standard_error": 0.25,
        "published": [{"who": "CaCo <paper>", "value": 71.3, "where": "Table I", "metric": ""}],
        "deviations": {"linear.epochs": {"found": 1, "preset": 100}},
        "notes": ["a note"],
        "files": ["sheet.png", "gone.png", "../../secret.png"],
        "source": {"step": 100},
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "sheet.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    for name, content in (("linear-caco", record), ("other", {"protocol": "x"}), ("foreign", {"a": 1})):
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    (folder / "evaluation" / "damaged.json").write_text("{")
    page = document(folder)
    for shown in (
        "linear-caco top1 71.2 ± 0.2 71.3 CaCo <paper> step 100",
        "top5 90.5",
        "linear.epochs is 1, the preset has 100",
        "a note",
        "the picture gone.png of linear-caco, which is gone",
        "the picture secret.png of linear-caco, which is gone",
        "evaluation/other.json, which is of another version",
        "damaged.json is not valid JSON",
    ):
        assert shown in page.words(), shown
    assert [each["alt"] for each in page.all("img")] == ["picture sheet of the evaluation linear-caco"]


def test_events_are_told(tmp_path: Path) -> None:
    starts = [START, START | {"resumed_from": "runs/a/checkpoints/step_00000050.pt"}, START]
    lines = LINES[:-3] + [line(95, bad_images=2, skipped_steps=1), line(100, bad_images=3, skipped_steps=1)]
    warning = "2026-01-02 03:04:06,678 WARNING bad image a/{}.png: cut\n"
    folder = run_folder(tmp_path / "run", starts=starts, lines=lines, log=warning.format(1) + warning.format(2))
    words = document(folder).words()
    for shown in (
        "resumed from step_00000050.pt",
        "started over, without a checkpoint",
        "3 unreadable images, each replaced by the next good one; the first by step 95",
        "1 steps skipped, because gradients of fp16 overflowed; the first by step 95",
        "bad image a/1.png: cut (and 1 more like it)",
    ):
        assert shown in words, shown
    assert dynamics.frame_of(read_run(folder)).marks == {50.0: "the run was resumed"}


def test_settings_that_differ_from_the_preset_and_the_defaults(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", "caco.bank_lr=0.5", "views.1.blur_p=0.25", "run.folder=/a/b"))
    assert origin.preset_of(run) == ("quickstart", True)
    (table, folded) = (block for block in origin.settings(run).blocks if hasattr(block, "rows"))
    assert sorted(table.rows) == [["caco.bank_lr", "0.5", "10.0"], ["views.1.blur_p", "0.25", "0.0"]]
    assert folded.folded and ["data.source", "embedded", "folder"] in folded.rows


def test_without_a_command_the_nearest_preset_is_found(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "run", "trainer.batch_size=128", config="small_moco", starts=None))
    assert origin.preset_of(run) == ("small_moco", False)


def test_multi_crop_views_are_settings_like_others(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", config="imagenet_resnet50_multicrop_800ep_batch2048", starts=None)
    words = document(folder).words()
    assert "what differs from imagenet_resnet50_multicrop_800ep_batch2048 nothing" in words and "recipe" not in words


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 1, "epoch": 0}],
        [{"step": 1, "epoch": None, "loss": "NaN"}, {"step": 1, "loss": "Infinity", "knn_20": None}],
        [{"step": 0, "epoch": -1, "loss": 7.0, "positive_probability": 0.0}],
        [{"step": 5.0, "epoch": 0, "loss": True, "new_metric": 3.5, "text": "words", "list": [1]}],
    ],
    ids=["empty", "not-finite", "step-0", "unknown"],
)
def test_odd_metrics_are_no_error(lines: list, tmp_path: Path) -> None:
    document(run_folder(tmp_path / "run", lines=lines))


@pytest.mark.parametrize(
    "summary, start",
    [
        ({"finished": True, "steps": None, "evaluated": None, "knn_trained": "NaN"}, {"run": None, "machine": None}),
        ({"finished": 1, "train_seconds": "long", "evaluated": [1]}, {"run": {"images": "many"}, "banks": None}),
        ({}, {"started": None, "command": 'an "open quote', "commit": None, "versions": None}),
    ],
)
def test_folders_of_other_versions_are_no_error(summary: dict, start: dict, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", summary=summary, starts=[start])
    (folder / "config.yaml").write_text("method: of_another_version\ntrainer: {epochs: many, batch_size: null}\n")
    assert "of_another_version" in document(folder).words()


def test_what_a_method_measures_has_a_panel_and_nothing_else(tmp_path: Path) -> None:
    lines = [{"step": step, "epoch": 0, "loss": 1.0, "attraction": 0.5, "repulsion": 1.5} for step in (1, 2)]
    run = read_run(run_folder(tmp_path / "run", lines=[each | {"adversarial_loss": 2.0} for each in lines]))
    (picture,) = dynamics.training(run).blocks
    assert picture.alt.split("; ") == [
        "loss: from 1 to 1",
        "attraction and repulsion: attraction from 0.5 to 0.5, repulsion from 1.5 to 1.5",
        "adversarial loss: from 2 to 2.",
    ]
    (missing,) = dynamics.dynamics(run).blocks
    assert missing.reason == "caco measures no positive probability, and kNN is off here"


@pytest.mark.usefixtures("drawn")
def test_a_long_log_makes_a_page_of_bounded_size(tmp_path: Path) -> None:
    def size(count: int) -> int:
        lines = [line(step, loss=7 + math.sin(step)) for step in range(count)]
        folder = run_folder(tmp_path / str(count), lines=lines)
        write_report([folder], ReportConfig(), torch.device("cpu"))
        return (folder / write.PAGE).stat().st_size

    assert size(8000) < 1.1 * size(2000) < 1.5e6


@pytest.mark.usefixtures("drawn")
def test_several_runs_of_different_methods_are_compared(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "x" / "run", "trainer.batch_size=128")
    lines = [{"step": 10, "epoch": 0, "loss": 1.0, "attraction": 0.5}]
    second = run_folder(tmp_path / "y" / "run", config="small_cacr", lines=lines, summary=None)
    page = document(first, second)
    assert (first / "report" / "compare.html").is_file() and not (first / write.PAGE).exists()
    words = page.words()
    for shown in (
        "2 runs compared: caco, cacr",
        "x/run caco 73.8 78.5 82.2 100 128 1,234 2.00",
        "y/run cacr - - - 10 256",
        "method caco cacr",
        "trainer.batch_size 128 256",
        # A setting without an effect on a run is not shown as one of that run.
        "caco.bank_size 2048 -",
        "cacr.form - batch",
    ):
        assert shown in words, shown
    # At equal images, and so at half as many steps of twice the batch.
    alts = " ".join(str(each.get("aria-label")) for each in page.all("div") if each.get("role") == "img")
    assert "loss: x/run from 7.9 to 7, y/run 1" in alts
    assert "images seen 1,280: x/run 7.9, y/run 1" in page.words()


def test_an_error_in_a_part_costs_that_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def evaluations(run: object) -> None:
        raise RuntimeError("planted <b>")

    monkeypatch.setattr(headline, "evaluations", evaluations)
    path, _ = write_report([run_folder(tmp_path / "run")], ReportConfig(), torch.device("cpu"))
    page = Document(path.read_text())
    assert "this part can't be made (RuntimeError: planted <b>)" in page.words() and "environment" in sections(page)
    assert "report: the part on evaluations can't be made: RuntimeError: planted <b>" in caplog.text


def test_the_command_writes_a_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A folder may have an equals sign in its name.
    folder = run_folder(tmp_path / "lr=0.1")
    assert main(["report", str(folder), f"out={tmp_path / 'new' / 'page.html'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").is_file() and not (folder / "report").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "RUN: found none, expected one run folder or more"),
        (["{tmp}/none"], "RUN: found no such folder at "),
        (["{tmp}/run", "{tmp}/none"], "RUN: found no such folder at "),
        (["{tmp}"], "RUN: found no run in "),
        (["{tmp}/run", "out={tmp}"], "out: found the folder "),
        (["{tmp}/run", "out={tmp}/run/config.yaml/page.html"], "out: "),
        (["{tmp}/run", "devise=cpu"], "argument 'devise=cpu': unknown setting 'devise'; did you mean 'device'?"),
        (["{tmp}/run", "device=tpu"], "device: found 'tpu'"),
        (["{tmp}/run", "cpu_threads=-1"], "cpu_threads: found -1, expected at least 0"),
    ],
)
def test_what_a_user_can_correct_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "run")
    assert main(["report", *(each.format(tmp=tmp_path) for each in arguments)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {said}") and line.count("\n") == 1


def test_several_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="WORLD_SIZE: found 4, expected one process; start without torchrun"):
        report([run_folder(tmp_path / "run")], ReportConfig())


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, "-m", "caco_fast", "report", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "RUN|key=value" in done.stdout
