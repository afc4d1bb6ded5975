"""Run folders of every kind are read: what can't be read is named, and nothing raises but a folder without a run."""

import math
from pathlib import Path

import pytest

from caco_fast.errors import UserError
from caco_fast.report.run_data import read_run
from tests.report.made_up import LINES, run_folder


def test_a_line_that_a_kill_cut_short_is_left_out_without_a_word(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "lo')
    run = read_run(folder)
    assert len(run.lines) == len(LINES) and run.problems == [] and run.steps == 100


def test_damaged_lines_are_counted_and_the_others_read(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('no json\n[1]\n{"loss": 1}\n{"step": 5, "loss": "NaN"}\n' + text)
    run = read_run(folder)
    assert run.problems == ["metrics.jsonl: 3 lines can't be read and are left out"]
    assert len(run.lines) == len(LINES) + 1 and math.isnan(run.lines[0]["loss"])


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "config.yaml"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", "a: [", "\x00"])
def test_damaged_files_are_named_and_left_out(name: str, content: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / name).write_text(content)
    run = read_run(folder)
    assert all(problem.startswith(name) for problem in run.problems)
    assert run.steps == 100 and isinstance(run.method, str)


def test_warnings_and_errors_of_the_log_are_found(tmp_path: Path) -> None:
    log = "2026-01-02 03:04:05,678 INFO a\n2026-01-02 03:04:06,678 WARNING bad image x.png: cut\n  more\n"
    run = read_run(run_folder(tmp_path / "run", log=log))
    assert [(each.time, each.level, each.text) for each in run.warnings] == [
        ("2026-01-02 03:04:06", "WARNING", "bad image x.png: cut")
    ]


@pytest.mark.parametrize("what", ["no such folder", "a file", "no run"])
def test_a_folder_without_a_run_is_one_line(what: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "no run").mkdir()
    with pytest.raises(UserError, match=f"^RUN: found {what}.*, expected a "):
        read_run(tmp_path / what)


def test_settings_of_other_methods_have_no_effect(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path / "clae", config="small_clae"))
    assert [run.reads(key) for key in ("clae.eps", "simclr.temperature", "caco.bank_lr", "trainer.epochs")] == [
        *(True, True, False, True)
    ]
    ablation = read_run(run_folder(tmp_path / "ablation", config="small_none"))
    assert ablation.reads("caco.temperature") and not ablation.reads("moco.temperature")
