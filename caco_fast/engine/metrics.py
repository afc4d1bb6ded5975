"""What a run measures, over its steps: `metrics.jsonl` always, TensorBoard by default, W&B on request.

One JSON object a line with `step`, `epoch` (negative in the bank's initialisation phase), `time` (seconds since 1970)
and the values. JSON has no word for NaN and the infinities: they stand as the strings "NaN", "Infinity" and
"-Infinity", which `read_metrics` turns back into floats.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco_fast.distributed import rank
from caco_fast.engine.storage import RetryingFile, atomic_write_text
from caco_fast.errors import UserError
from caco_fast.settings import setting

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
METRICS_FILE = "metrics.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbConfig:
    mode: str = setting("off", "Weights & Biases: off, online or offline")
    project: str = setting("caco_fast", "W&B project")
    entity: str | None = setting(None, "W&B user or team; null: the account's own")
    name: str | None = setting(None, "W&B run name; null: the name of the run folder")

    def validate(self) -> None:
        if self.mode not in ("off", "online", "offline"):
            raise UserError(f"wandb.mode: found {self.mode!r}, wanted off, online or offline")


class MetricsWriter:
    """Appends to the metrics of a run folder; on ranks other than 0 it does nothing.

    `resume_at`: the step of the checkpoint that the run goes on from; lines of later steps are cut, so that the file
    reads as one run. None: a new run, which begins an empty file. Nothing is cut before `open`: a start that fails
    before leaves all as it was. A full disk ends neither the run nor the metrics: lines wait in memory.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool = True,
        wandb: WandbConfig | None = None,
        *,
        resume_at: int | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._file: RetryingFile | None = None
        self._opened = True
        self._tensorboard: Any = None
        self._wandb: Any = None
        if rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume_at = resume_at
        self._open_tensorboard = _tensorboard_opener(self.folder / "tensorboard", resume_at) if tensorboard else None
        self._opened = False
        if wandb is not None:
            wandb.validate()
            if wandb.mode != "off":
                self._wandb = _open_wandb(wandb, self.folder, run_config)

    def open(self) -> None:
        """Cuts what `resume_at` leaves behind and takes the files; the first `write` does it otherwise.

        Raises UserError where they can't be written.
        """
        if self._opened:
            return
        self._opened = True
        path = self.folder / METRICS_FILE
        try:
            cut_metrics(path, self._resume_at)
            self._file = RetryingFile(path, log.warning)
            if self._open_tensorboard is not None:
                self._tensorboard = self._open_tensorboard()
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror or error}") from None

    def write(self, step: int, values: Mapping[str, float], *, epoch: int | None = None) -> None:
        """One line, on the disk's side of our buffers when this returns."""
        self.open()
        if self._file is None:
            return
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        line = {"step": int(step), "epoch": epoch, "time": round(time.time(), 3)}
        line |= {name: to_json(value) for name, value in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._to_tensorboard(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step, "epoch": epoch})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._to_tensorboard(lambda board: board.close())
        self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _to_tensorboard(self, act: Callable[[Any], Any]) -> None:
        """Its writer's thread ends at the first error, which the next call raises."""
        if self._tensorboard is None:
            return
        try:
            act(self._tensorboard)
        except OSError as error:
            self._tensorboard = None
            log.warning(
                "%s can't be written: %s; training goes on, TensorBoard's events stop here, metrics.jsonl has all",
                self.folder / "tensorboard",
                error.strerror or error,
            )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl, [] if there is none. A last line cut short by a kill is left out."""
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    texts = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(texts, 1):
        if not text:
            continue
        try:
            line = json.loads(text)
            line["step"] + 0
        except (ValueError, TypeError, KeyError):
            if number == len(texts):
                continue
            raise UserError(f"{path} line {number}: not a JSON object with a step; repair or remove the line") from None
        lines.append(
            {name: NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in line.items()}
        )
    return lines


def cut_metrics(path: Path, step: int | None) -> None:
    """Removes the lines after `step` (None: all lines) from a metrics file, atomically."""
    if not path.exists():
        return
    lines = read_metrics(path.parent)
    kept = [line for line in lines if step is not None and line["step"] <= step]
    if len(kept) < len(lines):
        log.info("%s: %d lines after the step resumed from are cut", path, len(lines) - len(kept))
    texts = (
        json.dumps({name: to_json(value) for name, value in line.items()}, allow_nan=False) + "\n" for line in kept
    )
    atomic_write_text(path, "".join(texts))


def to_json(value: Any) -> Any:
    """The value as JSON can say it: floats that are not finite become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _tensorboard_opener(folder: Path, resume_at: int | None) -> Callable[[], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard is on but not installed: pip install tensorboard, or turn it off") from None
    # TensorBoard hides the points of its older files from this step on, which are those of the future left behind.
    purge = None if not folder.exists() else 0 if resume_at is None else resume_at + 1
    _hush_writer_thread()
    return lambda: SummaryWriter(str(folder), purge_step=purge)


def _hush_writer_thread() -> None:
    """What ends TensorBoard's thread is raised by its next call too, and reported in a line, not as a stack trace."""
    usual = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            usual(args)

    threading.excepthook = hook


def _open_wandb(config: WandbConfig, folder: Path, run_config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"wandb.mode is {config.mode} but wandb is not installed: pip install wandb, or wandb.mode=off"
        ) from None
    # The id makes a resumed run go on in the same W&B run.
    id_file = folder / "wandb_id.txt"
    known = id_file.read_text().strip() if id_file.exists() else None
    run = wandb.init(
        mode=config.mode,
        project=config.project,
        entity=config.entity,
        name=config.name or folder.resolve().name,
        dir=str(folder),
        id=known,
        resume="allow",
        config=dict(run_config or {}),
    )
    atomic_write_text(id_file, f"{run.id}\n")
    run.define_metric("*", step_metric="step")
    return run
