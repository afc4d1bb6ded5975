"""Comparisons: their arguments, statistics, runs that fail, stop and continue, and what they write.

The trainer's process is a stand-in, except in the last test.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from caco_fast.config import to_yaml
from caco_fast.errors import UserError
from tests.engine.tiny_run import SETTINGS, write_images
from tests.tool import load_tool

# A trainer: FOLDER CONFIG SCORE. It fails at score 0, and waits for a signal at a score below 0.
TRAINER = """
import json, pathlib, shutil, signal, sys
folder, score = pathlib.Path(sys.argv[1]), float(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
shutil.copy(sys.argv[2], folder / "config.yaml")
with open(folder / "starts", "a") as starts:
    starts.write("start ")
if score == 0:
    print("some words\\nerror: no score")
    sys.exit(2)
if score < 0:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit((folder / "checkpoint").write_text("kept") and 143))
    (folder / "waits").touch()
    signal.pause()
lines = [
    {"step": 10, "epoch": 0, "pairs_per_second": 100.0},
    {"step": 10, "epoch": 0, "knn_200": score - 4},
    {"step": 20, "epoch": 1, "pairs_per_second": 50.0},
    {"step": 20, "epoch": 1, "knn_200": score},
]
(folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0, **line}) + "\\n" for line in lines))
summary = {"finished": True, "steps": 20, "initialisation_steps": 0, "train_seconds": 75.0, "pairs_per_second": 70.0}
summary |= {"peak_memory_gib": 1.25, "knn_trained": score, "linear_trained": score + 5, "knn_raw": 50.0}
summary |= {"linear_raw": 55.0, "evaluated": {"evaluation.k": [200, 20]}}
(folder / "summary.json").write_text(json.dumps(summary))
"""


class Trainer:
    """Scores by row and seed, for the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.script = folder / "trainer.py"
        self.script.write_text(TRAINER)
        self.scores: dict[tuple[str, int], float] = {}
        self.devices: list[str | None] = []

    def command(self, run: Any, device: str | None) -> list[str]:
        self.devices.append(device)
        file = run.folder.with_name(f"{run.folder.name}.asked.yaml")
        file.write_text(to_yaml(run.row.load(run.asked())))
        score = self.scores.get((run.row.name, run.seed), 60.0)
        return [sys.executable, str(self.script), str(run.folder), str(file), str(score)]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    parts = ("compare_studies", "compare_runs", "compare_figures", "compare_plot")
    tool = load_tool("compare")
    yield tool
    for name in ("compare", *parts):
        sys.modules.pop(name, None)


@pytest.fixture
def trainer(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    found = Trainer(tmp_path)
    # A picture takes a second; one test and the run of real trainers draw theirs.
    monkeypatch.setattr(compare, "draw", lambda result, path: None)
    runs = sys.modules["compare_runs"]
    monkeypatch.setattr(runs.Run, "command", lambda run, device: found.command(run, device))
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    return found


def start(compare: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["tools/compare.py", *map(str, arguments)])
    return compare.main()


def starts_of(folder: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text().split()) for path in folder.glob("*/starts")}


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "found nothing to compare, expected one of positives_negatives, bank_size, methods, configurations"),
        (["small_none"], "found one row, none, expected two or more; add a configuration or --variant"),
        (
            ["positives_negative"],
            "positives_negative: found neither a study nor a configuration of that name; the nearest study is "
            "positives_negatives",
        ),
        (["bank_size", "quickstart"], "bank_size: found more beside it, expected a named study alone"),
        (["methods", "--base", "quickstart"], "--base: found quickstart with methods, expected none"),
        (["quickstart", "small_none", "--base", "small_none"], "--base: found small_none beside configurations"),
        (["--variant", "caco.bank_lr=1"], "--variant: found it without --base, expected --base NAME|FILE"),
        (["small_none", "small_none"], "found the row none twice, expected rows of different names"),
        (["quickstart", "small_nome"], "--config small_nome: found no such file"),
        (["bank_size", "trainer.epocs=3"], "unknown setting 'trainer.epocs'; did you mean 'trainer.epochs'?"),
        (["--base", "quickstart", "--variant", "caco.bank_lr=x"], 'caco.bank_lr: found "x", expected a number'),
        (["bank_size", "trainer.seed=3"], "trainer.seed: found it as a setting, expected --seeds"),
        (["bank_size", "--seeds", "1", "1"], "--seeds: found 1 twice, expected each seed once"),
        (["bank_size", "--seeds", "one"], "--seeds: found 'one', expected whole numbers from 0"),
        (["bank_size", "--devices", "gpu"], "--devices: found 'gpu', expected cpu, cuda or cuda:N"),
        (["bank_size", "--jobs", "0"], "--jobs: found 0, expected 1 or more"),
        (["--table", "nowhere.json"], "--table nowhere.json: no such file"),
    ],
)
def test_wrong_arguments_get_one_line(
    compare: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    with pytest.raises(UserError) as error:
        start(compare, monkeypatch, *arguments)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_named_studies(compare: Any) -> None:
    rows = compare.make_study(["positives_negatives"], None, [], []).rows
    methods = [row.load().method for row in rows]
    assert [row.published for row in rows] == [70.2, 70.7, 70.6, 71.3] and methods == ["ablation"] * 4
    rows = compare.make_study(["bank_size"], "imagenet_resnet50_200ep_batch4096", [], []).rows
    assert [(row.load().caco.bank_size, row.published) for row in rows] == [(32768, 71.7), (65536, 72.0), (98304, 72.1)]
    rows = compare.make_study(["bank_size"], None, [], ["caco.bank_size=100"]).rows
    assert [row.settings for row in rows] == [(f"caco.bank_size={k}",) for k in (50, 100, 150)]
    (first, *others) = compare.make_study(["small_none", "quickstart"], None, [], []).rows
    assert (first.name, others[0].name) == ("none", "caco")


def test_student_t_is_that_of_the_tables(compare: Any) -> None:
    figures = sys.modules["compare_figures"]
    # 97.5 % quantiles, from printed tables.
    for freedom, wanted in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert figures.t_quantile(freedom) == pytest.approx(wanted, abs=6e-4)
    assert figures.t_quantile(4, 0.99) == pytest.approx(4.604, abs=6e-4)


def test_the_statistics_by_hand(compare: Any) -> None:
    figures = sys.modules["compare_figures"]
    assert figures.spread([1.0, 2.0, 6.0]) == {"seeds": 3, "mean": 3.0, "deviation": pytest.approx(7**0.5)}
    assert figures.spread([4.0]) == {"seeds": 1, "mean": 4.0, "deviation": None}
    found = figures.paired({"0": 71.0, "1": 73.0, "2": 75.0, "7": 0.0}, {"0": 70.0, "1": 71.0, "2": 72.0})
    # Differences 1, 2, 3: mean 2, deviation 1, so half the interval is 4.3027 / sqrt(3).
    assert found == {"seeds": 3, "mean": 2.0, "half_interval": pytest.approx(2.4841, abs=1e-4)}
    assert figures.paired({"0": 71.0}, {"0": 70.0}) == {"seeds": 1, "mean": 1.0, "half_interval": None}
    assert figures.paired({"0": 71.0}, {"1": 70.0})["mean"] is None
    curve = [[1, 100, 10.0, 50.0], [2, 200, 30.0, 60.0]]
    assert [figures.at_budget(curve, 1, images) for images in (50, 100, 150, 200, 300)] == [None, 50, 55, 60, 60]
    assert figures.at_budget(curve, 2, 20.0) == 55


def test_a_study_writes_table_picture_and_json(
    compare: Any, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, copy = tmp_path / "study", tmp_path / "copy.json"
    trainer.scores = {("Positive", 0): 61.0, ("Positive", 1): 63.0, ("None", 1): 61.0}
    arguments = ("positives_negatives", "--out", out, "--seeds", 0, 1, "trainer.batch_size=100", "--output", copy)
    assert start(compare, monkeypatch, *arguments, "--devices", "cuda:0,cuda:1") == 0
    assert set(trainer.devices) == {"cuda:0", "cuda:1"}
    result = json.loads((out / "compare.json").read_text())
    assert {"machine", "versions", "commit", "content_sha256"} <= result.keys()
    assert result["settings"]["settings"] == ["trainer.batch_size=100"] and result["settings"]["seeds"] == [0, 1]
    positive = result["results"]["rows"][1]
    assert positive["figures"]["knn"]["mean"] == 62.0
    # Differences 1 and 2: mean 1.5, deviation 0.7071, half an interval of 12.706 x 0.5.
    assert positive["figures"]["knn"]["difference"]["half_interval"] == pytest.approx(6.3531, abs=1e-4)
    # 10 steps of 100 images at 100 pairs/s, then 10 at 50.
    assert positive["runs"]["0"]["curve"] == [[1, 1000, 10.0, 57.0], [2, 2000, 30.0, 61.0]]
    text = (out / "compare.md").read_text()
    assert "| Positive | 2 | 62.0 ± 1.4 | +1.5 ± 6.4 | 67.0 ± 1.4 | +1.5 ± 6.4 | 70.7 |" in text
    assert "| raw pixels | 2 | 50.0 ± 0.0 |  | 55.0 ± 0.0 |  |  |" in text
    assert "| Positive | 2,000 | 75 | 70 | 1.25 | 62.0 ± 1.4 | 62.0 ± 1.4 |" in text
    assert "Published: CaCo paper, Table VII" in text
    sys.modules["compare_plot"].draw(result, out / "compare.png")
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert start(compare, monkeypatch, "--table", copy) == 0
    # The load of the machine may differ, but no table shows it.
    assert capsys.readouterr().out == text


def test_a_failing_run_is_named_and_the_others_are_trained(
    compare: Any, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.scores = {("caco", 0): 0.0}
    arguments = ("quickstart", "small_none", "small_positive", "--seeds", 0, 1, "--out", tmp_path / "study")
    assert start(compare, monkeypatch, *arguments, "--jobs", 2) == 1
    text = (tmp_path / "study" / "compare.md").read_text()
    assert "- caco, seed 0: error: no score" in text
    assert "| caco | 1 | 60.0 |" in text and "| none | 2 | 60.0 ± 0.0 | +0.0 |" in text
    trainer.scores = {}
    assert start(compare, monkeypatch, *arguments) == 0
    assert starts_of(tmp_path / "study").pop("caco_seed0") == 2
    assert set(starts_of(tmp_path / "study").values()) == {1, 2}
    assert "error" not in (tmp_path / "study" / "compare.md").read_text()


def test_a_signal_stops_all_runs_and_the_next_start_continues(
    compare: Any, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "study"
    trainer.scores = {("none", 0): -1.0, ("positive", 0): -1.0}
    waiting = [out / f"{row}_seed0" / "waits" for row in ("none", "positive")]

    def interrupt() -> None:
        while not all(path.exists() for path in waiting):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    arguments = ("quickstart", "small_none", "small_positive", "small_negative", "--out", out, "--jobs", 2)
    threading.Thread(target=interrupt, daemon=True).start()
    assert start(compare, monkeypatch, *arguments) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "stopped by SIGINT; the same command continues\n"
    assert signal.getsignal(signal.SIGINT) == before
    assert all(path.with_name("checkpoint").read_text() == "kept" for path in waiting)
    assert not (out / "compare.json").exists()
    trainer.scores = {}
    assert start(compare, monkeypatch, *arguments) == 0
    assert starts_of(out) == {"caco_seed0": 1, "none_seed0": 2, "positive_seed0": 2, "negative_seed0": 1}


def test_finished_runs_are_skipped_and_those_with_other_settings_refused(
    compare: Any, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ("quickstart", "small_none", "--out", tmp_path / "study")
    assert start(compare, monkeypatch, *arguments) == 0
    assert start(compare, monkeypatch, *arguments, "--seeds", 0, 1) == 0
    assert "2 of 4 runs are finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"caco_seed0: found a run with trainer.epochs=12, expected 5; choose another"):
        start(compare, monkeypatch, *arguments, "trainer.epochs=5")
    # Other settings of the evaluation alone: the trainer evaluates anew.
    assert start(compare, monkeypatch, *arguments, "evaluation.k=[20]") == 0
    assert starts_of(tmp_path / "study") == {"caco_seed0": 2, "none_seed0": 2, "caco_seed1": 1, "none_seed1": 1}


def test_a_study_of_real_runs(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.yaml"
    tree: dict[str, Any] = {}
    for given in (*SETTINGS, f"data.path={write_images(tmp_path / 'images')}", "trainer.epochs=1"):
        key, _, value = given.partition("=")
        place = tree
        *sections, last = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    base.write_text(yaml.safe_dump(tree))
    variant = "method=ablation ablation.positives=queue ablation.negatives=batch"
    arguments = ("--base", base, "--variant", variant, "--out", tmp_path / "study", "--jobs", 2)
    assert start(compare, monkeypatch, *arguments) == 0
    result = json.loads((tmp_path / "study" / "compare.json").read_text())
    (caco,), (positive,) = (row["runs"].values() for row in result["results"]["rows"])
    assert (caco["steps"], positive["steps"], caco["images"]) == (10, 5, 80)
    assert caco["peak_memory_gib"] > 0 and positive["curve"][-1][0] == 1
    assert (tmp_path / "study" / "compare.png").stat().st_size > 10_000
    text = (tmp_path / "study" / "compare.md").read_text()
    assert start(compare, monkeypatch, *arguments) == 0
    assert (tmp_path / "study" / "compare.md").read_text() == text
