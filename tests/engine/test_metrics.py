"""Metrics are valid JSON for any values, read as one run after a resume, and name a writer that is not installed."""

import json
import math
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from caco_fast.engine.metrics import METRICS_FILE, MetricsWriter, WandbConfig, read_metrics
from caco_fast.errors import UserError


def write_steps(folder: Path, steps: range, resume_at: int | None = None) -> None:
    writer = MetricsWriter(folder, tensorboard=False, resume_at=resume_at)
    for step in steps:
        writer.write(step, {"loss": 10.0 - step}, epoch=step // 4)
    writer.close()


def steps_in(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_lines_come_back(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 7.25, "images": 512}, epoch=-1)
    # On the disk at once, so that a killed run keeps its lines.
    (line,) = read_metrics(tmp_path)
    writer.close()
    assert line["time"] > 1.7e9
    assert {name: line[name] for name in ("step", "epoch", "loss", "images")} == {
        "step": 1,
        "epoch": -1,
        "loss": 7.25,
        "images": 512,
    }


def test_values_that_json_does_not_allow(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    raw = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert (raw["a"], raw["b"], raw["c"]) == ("NaN", "Infinity", "-Infinity")
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"]) and line["b"] == math.inf and line["c"] == -math.inf
    # A resume rewrites the file and does not change them.
    MetricsWriter(tmp_path, tensorboard=False, resume_at=1).close()
    assert json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse) == raw


def test_resume_cuts_the_future_and_reads_as_one_run(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 9))
    write_steps(tmp_path, range(6, 12), resume_at=5)
    assert steps_in(tmp_path) == list(range(1, 12))


def test_new_run_begins_an_empty_file(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 9))
    write_steps(tmp_path, range(1, 3))
    assert steps_in(tmp_path) == [1, 2]


def test_line_cut_short_by_a_kill_is_left_out_and_removed_on_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text()[:-9])
    assert steps_in(tmp_path) == [1, 2]
    write_steps(tmp_path, range(3, 5), resume_at=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text().replace('"step": 2', '"step" 2'))
    with pytest.raises(UserError, match="metrics.jsonl line 2: not a JSON object"):
        read_metrics(tmp_path)


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_hides_the_points_after_the_step_resumed_from(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_at, steps in [(None, range(1, 9)), (5, range(6, 8))]:
        writer = MetricsWriter(tmp_path, resume_at=resume_at)
        for step in steps:
            writer.write(step, {"loss": 100.0 * (resume_at or 0) + step})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [*((s, s) for s in range(1, 6)), (6, 506), (7, 507)]


def test_writers_install_the_thread_hook_once(tmp_path: Path) -> None:
    MetricsWriter(tmp_path / "a").close()
    hook = threading.excepthook
    MetricsWriter(tmp_path / "b").close()
    assert threading.excepthook is hook


def test_missing_wandb_names_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="mode is online but wandb is not installed: pip install wandb"):
        MetricsWriter(tmp_path, tensorboard=False, wandb=WandbConfig(mode="online"))


def test_without_tensorboard_one_warning_and_the_metrics_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5]
    (said,) = caplog.messages
    assert said.startswith("run.tensorboard: tensorboard is not installed")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_without_network_or_login_wandb_is_given_up_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    def act(name: str, result: Any = None) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == fails:
                raise ConnectionError("api_key not configured\n(no-tty)")
            return result

        return call

    run = types.SimpleNamespace(id="a", log=act("log"), finish=act("finish"), define_metric=act("define_metric"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=act("init", run)))
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb=WandbConfig(mode="online"))
    for step in (1, 2):
        writer.write(step, {"loss": 0.5})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    (said,) = caplog.messages
    assert "api_key not configured (no-tty)" in said and "training continues without" in said and "\n" not in said


def test_wandb_off_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricsWriter(tmp_path, tensorboard=False, wandb=WandbConfig()).close()


def test_unknown_wandb_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found 'on', expected off, online or offline"):
        MetricsWriter(tmp_path, tensorboard=False, wandb=WandbConfig(mode="on"))


def test_wandb_gets_the_values_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        id = "abc123"

        def __init__(self) -> None:
            self.logged: list[dict] = []

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, values: dict) -> None:
            self.logged.append(values)

        def finish(self) -> None: ...

    runs, options = [], []

    def init(**given: object) -> Run:
        options.append(given)
        runs.append(Run())
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_at in (None, 1):
        writer = MetricsWriter(
            tmp_path, tensorboard=False, wandb=WandbConfig(mode="offline"), resume_at=resume_at, run_config={"lr": 0.3}
        )
        writer.write(1, {"loss": 2.0}, epoch=0)
        writer.close()
    assert runs[0].logged == [{"loss": 2.0, "step": 1, "epoch": 0}]
    assert [given["id"] for given in options] == [None, "abc123"]
    assert options[0]["config"] == {"lr": 0.3} and options[0]["name"] == tmp_path.name
