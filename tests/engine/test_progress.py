"""The display of a run: lines in a log, a bar on a terminal, and tables that are legible in both."""

import io
import logging
import re
import time
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from caco_fast.engine import progress as module
from caco_fast.engine.progress import Progress, table

VALUES = {"loss": 7.03123, "positive_probability": 0.0213, "lr": 0.3, "pairs_per_second": 141.2}
LINE = r"loss 7\.0312 \| positive 0\.021 \| lr 0\.3000 \| [\d,]+ pairs/s \| eta \d+:\d\d:\d\d"


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The output of a console that is no terminal."""
    yield from _screen(monkeypatch, terminal=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The output of a terminal of 80 columns, with its control codes."""
    yield from _screen(monkeypatch, terminal=True)


def _screen(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> Iterator[io.StringIO]:
    shown = io.StringIO()
    console = Console(
        file=shown, force_terminal=terminal, force_interactive=terminal, width=80, highlight=False, soft_wrap=True
    )
    monkeypatch.setattr(module, "console", console)
    yield shown
    logger = logging.getLogger("caco_fast")
    for handler in [handler for handler in logger.handlers if isinstance(handler, module._ConsoleHandler)]:
        logger.removeHandler(handler)


def run(progress: Progress, epochs: int, steps: int) -> None:
    with progress:
        for epoch in range(epochs):
            progress.start_epoch(epoch)
            for step in range(steps):
                progress.step(VALUES if progress.is_log_step(step) else None)


def test_plain_lines(screen: io.StringIO) -> None:
    run(Progress(3, 25, 256, log_every=10), epochs=3, steps=25)
    lines = screen.getvalue().splitlines()
    places = [f"epoch {epoch}/3 step {step}/25" for epoch in (1, 2, 3) for step in (10, 20, 25)]
    assert [line.split(" | ")[0] for line in lines] == places
    assert all(re.fullmatch(rf"epoch \d/3 step \d+/25 \| {LINE}", line) for line in lines)
    assert lines[-1].endswith("eta 0:00:00")


def test_phase_before_the_epochs_has_its_name(screen: io.StringIO) -> None:
    progress = Progress(3, 25, 256, log_every=10)
    with progress:
        progress.start_phase("initialisation", 30, first_step=19)
        progress.step(VALUES)
    assert re.fullmatch(rf"initialisation step 20/30 \| {LINE} of the initialisation\n", screen.getvalue())


def test_rate_and_eta(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(2, 100, 64, log_every=10) as progress:
        progress.start_epoch(0, first_step=50)
        for _ in range(10):
            clock[0] += 0.5
            progress.step(None)
        progress.step(VALUES)
    # 11 steps in 5 s; 39 left in this epoch and 100 in the next. The speed is that of the metrics.
    assert screen.getvalue().startswith("epoch 1/2 step 61/100 |")
    assert "| 141 pairs/s | eta 0:01:03" in screen.getvalue()


def test_steps_without_values_touch_no_tensor(screen: io.StringIO) -> None:
    with Progress(1, 5, 8, log_every=5) as progress:
        progress.start_epoch(0)
        # A meta tensor can't be read: any look at it would raise.
        unreadable = {"loss": torch.zeros((), device="meta")}
        for step in range(4):
            progress.step(unreadable if progress.is_log_step(step) else None)
    assert screen.getvalue() == ""


def test_bar_with_messages_above_and_a_line_of_each_epoch(terminal: io.StringIO) -> None:
    progress = Progress(2, 4, 8, log_every=2)
    with progress:
        for epoch in range(2):
            progress.start_epoch(epoch)
            for step in range(4):
                progress.step(VALUES if progress.is_log_step(step) else None)
            progress._bar.refresh()
            logging.getLogger("caco_fast.test").warning("bad image [a.jpg]")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n")
    assert re.search(r"epoch 1/2 ━+ 4/4 eta 0:00:00, run 0:00:0\d", shown)
    assert shown.count("warning: bad image [a.jpg]\n") == 2
    for epoch in (1, 2):
        assert len(re.findall(rf"^epoch {epoch}/2 step 4/4 \| {LINE}$", shown, re.M)) == 1
    assert max(len(line) for line in shown.splitlines() if "━" in line) <= 80
    # The cursor is hidden while the bar lives, and shown again.
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_messages_about_an_epoch_are_below_its_last_line(terminal: io.StringIO) -> None:
    with Progress(2, 4, 8, log_every=2) as progress:
        for epoch in range(2):
            progress.start_epoch(epoch)
            for step in range(4):
                progress.step(VALUES if progress.is_log_step(step) else None)
            logging.getLogger("caco_fast.test").info("epoch %d/2: knn 60 %%", epoch + 1)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n")
    said = re.findall(r"^epoch \d/2(?: step 4/4 \||: knn)", shown, re.M)
    assert said == ["epoch 1/2 step 4/4 |", "epoch 1/2: knn", "epoch 2/2 step 4/4 |", "epoch 2/2: knn"]


def test_time_left_in_the_epochs_forgets_the_steps_before_them(
    screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(1, 10, 64, log_every=10) as progress:
        for start, seconds in ((lambda: progress.start_phase("initialisation", 20), 1), (progress.start_epoch, 4)):
            start(*([0] if seconds == 4 else []))
            for _ in range(5):
                clock[0] += seconds
                progress.step(VALUES)
    lines = screen.getvalue().splitlines()
    assert lines[4].endswith("eta 0:00:15 of the initialisation") and lines[-1].endswith("eta 0:00:20")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["exception", "ctrl-c"])
def test_terminal_is_left_clean_on(terminal: io.StringIO, error: type[BaseException]) -> None:
    with pytest.raises(error):
        with Progress(2, 4, 8, log_every=1) as progress:
            progress.start_epoch(0)
            progress.step(VALUES)
            raise error
    assert "\x1b[?25h" in terminal.getvalue()
    assert re.search(r"epoch 1/2 step 1/4 \| loss 7\.0312 .*\n$", terminal.getvalue())


def test_bar_leaves_lines_in_the_log_file_only(terminal: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="caco_fast"):
        run(Progress(1, 4, 8, log_every=2), epochs=1, steps=4)
    assert [message.split(" | ")[0] for message in caplog.messages] == ["epoch 1/1 step 2/4", "epoch 1/1 step 4/4"]
    assert terminal.getvalue().count("step 2/4") == 0


TABLE = """Fashion-MNIST
+-----------------+---------+--------+
| features        | kNN 200 | linear |
+-----------------+---------+--------+
| raw [pixels]    |    72.6 |   83.3 |
| trained encoder |    77.9 |      - |
+-----------------+---------+--------+"""


def test_table_in_a_file(screen: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    module.log_to_console()
    rows = [["raw [pixels]", 72.61, 83.3], ["trained encoder", 77.9, "-"]]
    with caplog.at_level(logging.INFO, logger="caco_fast"):
        text = table("Fashion-MNIST", ["features", "kNN 200", "linear"], rows)
    assert text == TABLE
    assert screen.getvalue() == f"\n{TABLE}\n"
    assert caplog.messages == [f"\n{TABLE}"]


def test_table_on_a_terminal_is_drawn_once_in_lines(terminal: io.StringIO) -> None:
    module.log_to_console()
    table("Fashion-MNIST", ["features", "kNN 200"], [["raw", 72.6]])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert shown.count("raw") == 1 and "╭" in shown


@pytest.mark.parametrize(
    "value, text", [(1e-5, "1.00e-05"), (0.0, "0.0000"), (0.3, "0.3000"), (1234567, "1,234,567"), (float("nan"), "nan")]
)
def test_numbers(value: float, text: str) -> None:
    assert module._number("lr", value) == text
