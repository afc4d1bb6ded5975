"""The folder of one run: everything needed to tell what ran, go on from it, and read what came out.

config.yaml        the resolved configuration (config.1.yaml, ...: those of earlier starts, where it changed)
environment.json   commit, versions, machine, command line: one entry for each start of the run
log.txt            the log of all starts
log.rank1.txt      warnings of the other ranks, as of bad images that rank 0 never met; only where there are any
metrics.jsonl      see metrics.py; tensorboard/ holds the same
checkpoints/       see checkpoint.py
summary.json       the final figures
curves.png         see curves.py
"""

import json
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from caco_fast import provenance
from caco_fast.distributed import rank
from caco_fast.engine.files import atomic_write_text
from caco_fast.engine.metrics import METRICS_FILE, to_json
from caco_fast.errors import UserError

log = logging.getLogger(__name__)


class RunFolder:
    """Paths of a run folder; `start` makes it. Rank 0 writes; the others read the paths, and keep a log of warnings."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.log = self.path / "log.txt"
        self.metrics = self.path / METRICS_FILE
        self.checkpoints = self.path / "checkpoints"
        self.summary_file = self.path / "summary.json"
        self._handler: logging.Handler | None = None

    def holds_run(self) -> bool:
        """Whether something was trained here; a start that failed before its first log line leaves the folder free."""
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        return logged or any(self.checkpoints.glob("*.pt"))

    def start(self, config_yaml: str, *, resume: str = "auto", resumed_from: Path | None = None) -> None:
        """Makes the folder, opens its log and writes configuration and environment, before anything is trained.

        `resume` is the option as the user gave it, `resumed_from` the checkpoint it led to. Raises UserError for a new
        run (`never`) in a folder that holds one; with `auto`, a run killed before its first checkpoint starts over
        here.
        """
        if rank() != 0:
            self._open_log_of_warnings()
            return
        # Going on from elsewhere would cut the metrics and prune the checkpoints of the run that is here.
        foreign = resumed_from is not None and resumed_from.resolve().parent != self.checkpoints.resolve()
        if (resume == "never" or foreign) and self.holds_run():
            raise UserError(
                f"run folder {self.path} already holds a run: go on with it by --resume auto, or choose another folder"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._open_log()
            self._write_config(config_yaml)
            self._write_environment(resumed_from)
        except OSError as error:
            raise UserError(f"run folder {self.path} can't be written: {error.strerror or error}") from error

    def summary(self, values: Mapping[str, Any]) -> None:
        """Merges the values into summary.json, atomically."""
        if rank() == 0:
            merged = self.read_summary() | {name: to_json(value) for name, value in values.items()}
            atomic_write_text(self.summary_file, json.dumps(merged, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary_file.read_text()) if self.summary_file.exists() else {}

    def close(self) -> None:
        """Closes log.txt."""
        if self._handler is not None:
            logging.getLogger("caco_fast").removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def _open_log(self) -> None:
        self._attach(logging.FileHandler(self.log, encoding="utf-8"))

    def _open_log_of_warnings(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {self.path} can't be written: {error.strerror or error}") from error
        # Made with its first line.
        handler = logging.FileHandler(self.path / f"log.rank{rank()}.txt", encoding="utf-8", delay=True)
        handler.setLevel(logging.WARNING)
        self._attach(handler)

    def _attach(self, handler: logging.Handler) -> None:
        self.close()
        self._handler = handler
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("caco_fast")
        logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
        logger.addHandler(handler)

    def _write_config(self, config_yaml: str) -> None:
        if self.config.exists() and (before := self.config.read_text()) != config_yaml:
            number = next(n for n in range(1, 1_000_000) if not self._earlier_config(n).exists())
            atomic_write_text(self._earlier_config(number), before)
            log.warning(
                "the configuration differs from that of the last start, kept as %s", self._earlier_config(number)
            )
        atomic_write_text(self.config, config_yaml)

    def _earlier_config(self, number: int) -> Path:
        return self.path / f"config.{number}.yaml"

    def _write_environment(self, resumed_from: Path | None) -> None:
        starts = json.loads(self.environment.read_text()) if self.environment.exists() else []
        starts.append(
            {
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": provenance.command_line(),
                "resumed_from": str(resumed_from) if resumed_from else None,
                **provenance.commit(),
                "versions": provenance.versions(),
                "machine": provenance.machine(),
            }
        )
        atomic_write_text(self.environment, json.dumps(starts, indent=2) + "\n")
