"""The progress of a run: a live bar on a terminal, plain lines elsewhere, and the same lines in the run's log.

A line reads `epoch 3/20 step 120/400 | loss 7.0312 | positive 0.021 | lr 0.3000 | 2,410 pairs/s | data 3 % | 41.2 GiB |
eta 0:03:10`. `data` is the share of the time in which the trainer waited for images, and the GiB are the peak of the
memory. The eta is that of the whole run. Before the epochs it reads `eta 0:00:20 of the initialisation`. Only rank 0
prints.
"""

import io
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from caco_fast.distributed import rank

LABELS = {"positive_probability": "positive", "bank_lr": "bank lr"}
# The values that do not follow their name.
FORMATS: dict[str, Callable[[float], str]] = {
    "pairs_per_second": "{:,.0f} pairs/s".format,
    "data_wait": lambda share: f"data {100 * share:.0f} %",
    "peak_memory_gib": "{:.1f} GiB".format,
    "skipped_steps": "skipped {:,}".format,
}

# All output goes through one console, so that it appears above a live bar.
console = Console(highlight=False, soft_wrap=True)
log = logging.getLogger(__name__)


class Progress:
    """The display of a run of `total_epochs` epochs, as a context manager that leaves the terminal clean on any exit.

    `step` counts every step and never reads a tensor. Values come on log steps only, where the trainer synchronises
    anyway, so the speed between two of them is right on a GPU too. `plain` None means lines if stdout is no terminal.
    """

    def __init__(
        self, total_epochs: int, steps_per_epoch: int, batch_size: int, log_every: int = 10, plain: bool | None = None
    ) -> None:
        self.total_epochs = total_epochs
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.log_every = log_every
        self.pairs_per_second = 0.0
        self._plain = not console.is_terminal if plain is None else plain
        self._bar: RichProgress | None = None
        self._task = TaskID(-1)
        self._title = self._phase_suffix = ""
        self._steps = self._step = 0
        self._later_steps = total_epochs * steps_per_epoch
        self._started = time.monotonic()
        self._steps_here = 0
        self._line = ""

    def __enter__(self) -> "Progress":
        log_to_console()
        if rank() == 0 and not self._plain:
            self._bar = _TwoLines(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[eta]}"),
                console=console,
                refresh_per_second=4,
                transient=True,
            )
            self._bar.start()
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            # The bar is erased, but its last line stays.
            self._leave_line()
            self._bar = None

    def start_phase(self, name: str, steps: int, first_step: int = 0) -> None:
        """Begin a phase of steps before the epochs, such as the bank's initialisation.

        Its steps do not take as long as those of the epochs, so the eta is that of this phase alone.
        """
        self._start(name, steps, first_step, later=0)
        self._phase_suffix = f" of the {name}"

    def start_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Begin an epoch, counted from 0. `first_step` is the first step to do, which a resumed run may begin with."""
        if self._phase_suffix:
            self._phase_suffix, self._started, self._steps_here = "", time.monotonic(), 0
        later = (self.total_epochs - epoch - 1) * self.steps_per_epoch
        self._start(f"epoch {epoch + 1}/{self.total_epochs}", self.steps_per_epoch, first_step, later)

    def is_log_step(self, step: int) -> bool:
        """Whether step `step` (from 0) of the epoch or phase needs values: every `log_every`-th, and the last."""
        return (step + 1) % self.log_every == 0 or step + 1 == self._steps

    def step(self, values: Mapping[str, float] | None = None) -> None:
        """Count one finished step. On log steps `values` are loss, lr, pairs_per_second, ... as plain numbers."""
        self._step += 1
        self._steps_here += 1
        if rank() != 0:
            return
        if values is not None:
            self.pairs_per_second = values.get("pairs_per_second", self.pairs_per_second)
            shown = " | ".join(_shown(name, value) for name, value in values.items())
            eta = f"eta {self._eta_run()}{self._phase_suffix}"
            self._line = f"{self._title} step {self._step}/{self._steps} | {shown} | {eta}"
            log.info(self._line, extra={"file_only": self._bar is not None})
            if self._bar is not None:
                bar_eta = f"eta {self._eta_phase()}"
                if not self._phase_suffix:
                    bar_eta += f", run {self._eta_run()}"
                self._bar.update(self._task, values=shown, eta=bar_eta)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step)
        if self._step == self._steps:
            # One line of each finished epoch stays above the bar, and above later messages about the epoch.
            self._leave_line()

    def _leave_line(self) -> None:
        if self._bar is not None and self._line:
            console.print(self._line, markup=False)
        self._line = ""

    def _start(self, title: str, steps: int, first_step: int, later: int) -> None:
        self._title, self._steps, self._step, self._later_steps = title, steps, first_step, later
        if self._bar is None:
            return
        if self._bar.tasks:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=steps, completed=first_step, values="", eta="")

    def _eta_phase(self) -> str:
        return _clock((self._steps - self._step) * self.batch_size / max(self.pairs_per_second, 1e-9))

    def _eta_run(self) -> str:
        # Over everything that this process did, with evaluation and checkpoints.
        seconds_per_step = (time.monotonic() - self._started) / max(self._steps_here, 1)
        return _clock((self._steps - self._step + self._later_steps) * seconds_per_step)


class _TwoLines(RichProgress):
    """A bar with the values on a second line: on one line they do not fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["values"], overflow="ellipsis", no_wrap=True)


class _ConsoleHandler(logging.Handler):
    """A handler that prints log records on the console, above a live bar; records marked `file_only` are skipped."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        if record.levelno >= logging.WARNING:
            style = "yellow" if record.levelno < logging.ERROR else "red"
            console.print(Text(f"{record.levelname.lower()}: {message}", style=style))
        else:
            console.print(message, markup=False)


def log_to_console() -> None:
    """Send the log of caco_fast to the terminal on rank 0. A second call changes nothing."""
    logger = logging.getLogger("caco_fast")
    if rank() == 0 and not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
        logger.setLevel(min(logger.level or logging.INFO, logging.INFO))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Show a table on the console and in the log, on rank 0, and return it as plain text.

    The first column is text, and the others are aligned to the right. Floats have one decimal.
    """
    plain = Console(file=io.StringIO(), width=10_000, color_system=None)
    plain.print(_table(title, columns, rows, box.ASCII2))
    text = "\n".join(line.rstrip() for line in plain.file.getvalue().splitlines())  # type: ignore[attr-defined]
    if rank() == 0:
        on_terminal = console.is_terminal
        if on_terminal:
            console.print(_table(title, columns, rows, box.ROUNDED), soft_wrap=False)
        log.info("\n%s", text, extra={"file_only": on_terminal})
    return text


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]], style: box.Box) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=style)
    for position, column in enumerate(columns):
        made.add_column(Text(column), justify="left" if position == 0 else "right")
    for row in rows:
        made.add_row(*(Text(f"{cell:.1f}" if isinstance(cell, float) else str(cell)) for cell in row))
    return made


def _shown(name: str, value: float) -> str:
    return FORMATS[name](value) if name in FORMATS else f"{LABELS.get(name, name)} {_number(name, value)}"


def _number(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if "positive" in name:
        return f"{value:.3f}"
    # Four decimals, unless they would hide a small value, such as a learning rate of 1e-5.
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(min(seconds, 3.6e7) + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
