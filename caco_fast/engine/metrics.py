"""The measurements of a run over its steps: `metrics.jsonl` always, TensorBoard by default, W&B on request.

Each line is a JSON object with `step`, `epoch` (negative in the bank's initialisation), `time` (seconds since 1970) and
the values. JSON has no NaN and no infinities, so these are the strings "NaN", "Infinity" and "-Infinity", which
`read_metrics` turns back into floats.
"""

import functools
import io
import json
import logging
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from caco_fast.distributed import rank
from caco_fast.errors import UserError
from caco_fast.settings import setting
from caco_fast.storage import RetryingFile, atomic_write_text

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
METRICS_FILE = "metrics.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbConfig:
    mode: str = setting("off", "Weights & Biases: off, online or offline")
    project: str = setting("caco_fast", "W&B project")
    entity: str | None = setting(None, "W&B user or team; null: the default of the account")
    name: str | None = setting(None, "W&B run name; null: the name of the run folder")

    def __post_init__(self) -> None:
        if self.mode not in ("off", "online", "offline"):
            raise UserError(f"wandb.mode: found {self.mode!r}, expected off, online or offline")


class MetricsWriter:
    """A writer that appends to the metrics of a run folder. On ranks other than 0 it does nothing.

    `resume_at` is the step of the checkpoint that the run resumes from, None for a new run. Lines of later steps are
    cut, so that the file reads as one run; a new run begins with an empty file. Nothing is written before `open`, so a
    start that fails earlier changes nothing. A full disk does not end the run: its lines wait in memory.
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
        self._resume_at = resume_at
        self._open_tensorboard = _tensorboard_opener(self.folder / "tensorboard", resume_at) if tensorboard else None
        self._open_wandb = None
        if wandb is not None and wandb.mode != "off":
            self._open_wandb = _wandb_opener(wandb, self.folder, run_config)
        self._opened = False

    def open(self) -> None:
        """Cut the lines after `resume_at` and open the files. The first `write` does this if it was not called.

        Raises UserError if the files can't be written.
        """
        if self._opened:
            return
        self._opened = True
        path = self.folder / METRICS_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            cut_metrics(path, self._resume_at)
            self._file = RetryingFile(path, log.warning)
            if self._open_tensorboard is not None:
                self._tensorboard = self._open_tensorboard()
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror or error}") from None
        if self._open_wandb is not None:
            self._wandb = self._open_wandb()

    def write(self, step: int, values: Mapping[str, float], *, epoch: int | None = None) -> None:
        """Write one line. It has left this process when this returns, unless the disk is full."""
        self.open()
        if self._file is None:
            return
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        line = {"step": int(step), "epoch": epoch, "time": round(time.time(), 3)}
        line |= {name: to_json(value) for name, value in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._to_tensorboard(lambda board: [board.add_scalar(name, value, step) for name, value in numbers.items()])
        self._to_wandb(lambda run: run.log({**numbers, "step": step, "epoch": epoch}))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._to_tensorboard(lambda board: board.close())
        self._tensorboard = None
        self._to_wandb(lambda run: run.finish())
        self._wandb = None

    def _to_wandb(self, act: Callable[[Any], Any]) -> None:
        """Use the run of W&B, or give it up: its errors are of many kinds, and none is worth the training."""
        if self._wandb is None:
            return
        try:
            act(self._wandb)
        except Exception as error:
            self._wandb = None
            log.warning("W&B: %s; training continues without it, metrics.jsonl has all", _one_line(error))

    def _to_tensorboard(self, act: Callable[[Any], Any]) -> None:
        """Use TensorBoard's writer, or give it up. Its thread ends at the first error, which the next call raises."""
        if self._tensorboard is None:
            return
        try:
            act(self._tensorboard)
        except OSError as error:
            self._tensorboard = None
            log.warning(
                "%s can't be written: %s; training continues, TensorBoard's events stop here, metrics.jsonl has all",
                self.folder / "tensorboard",
                error.strerror or error,
            )


def peak_memory(device: torch.device) -> int:
    """The most bytes in use at one time so far: by tensors on a GPU, or by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl, [] if there is none. A last line that a kill cut short is left out."""
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
    """Remove the lines after `step` (None: all lines) from a metrics file, atomically."""
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


def add_pictures(folder: Path, pictures: Mapping[str, bytes], step: int) -> None:
    """Give TensorBoard PNG or JPEG files by their names, in an events file of their own."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for name, data in pictures.items():
            with Image.open(io.BytesIO(data)) as image:
                writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


def to_json(value: Any) -> Any:
    """The value in a form that JSON allows: floats that are not finite become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _tensorboard_opener(folder: Path, resume_at: int | None) -> Callable[[], Any] | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning(
            "run.tensorboard: tensorboard is not installed, so there are no events of it, metrics.jsonl has all; "
            "pip install tensorboard, or set run.tensorboard=false"
        )
        return None
    # TensorBoard hides the points of older files from this step on: the run was resumed from before them.
    purge = None if not folder.exists() else 0 if resume_at is None else resume_at + 1
    _silence_tensorboard_thread()
    return lambda: SummaryWriter(str(folder), purge_step=purge)


@functools.cache
def _silence_tensorboard_thread() -> None:
    """Keep Python from printing a stack trace when TensorBoard's thread meets an OSError. Installed once a process.

    The next call of the writer raises the same error, which is then logged as one line.
    """
    usual = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            usual(args)

    threading.excepthook = hook


def _wandb_opener(config: WandbConfig, folder: Path, run_config: Mapping[str, Any] | None) -> Callable[[], Any]:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"wandb.mode is {config.mode} but wandb is not installed: pip install wandb, or wandb.mode=off"
        ) from None
    return lambda: _open_wandb(wandb, config, folder, run_config)


def _open_wandb(wandb: Any, config: WandbConfig, folder: Path, run_config: Mapping[str, Any] | None) -> Any:
    # With its id a resumed run continues the same W&B run.
    id_file = folder / "wandb_id.txt"
    known = id_file.read_text().strip() if id_file.exists() else None
    try:
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
        run.define_metric("*", step_metric="step")
    # No network and no login are errors of W&B's own kinds.
    except Exception as error:
        log.warning(
            "wandb.mode: %s does not start: %s; training continues without W&B, metrics.jsonl has all; run "
            "wandb login, or set wandb.mode=offline",
            config.mode,
            _one_line(error),
        )
        return None
    atomic_write_text(id_file, f"{run.id}\n")
    return run


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
