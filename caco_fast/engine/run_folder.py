"""The folder of one run: what ran, the checkpoints to resume from, and the results.

config.yaml        the resolved configuration (config.1.yaml, ...: those of earlier starts, if it changed)
environment.json   commit, versions, machine, command line, backend of the bank: one entry for each start of the run
log.txt            the log of all starts
log.rank1.txt      warnings of the other ranks, such as bad images that rank 0 never met; only if there are any
metrics.jsonl      see metrics.py; tensorboard/ holds the same values
checkpoints/       see checkpoint.py
.lock              the process that trains here, or was the last to do so
summary.json       the final figures
curves.png         see curves.py
report/            the page of the run; see caco_fast/report
"""

import itertools
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, BinaryIO

from caco_fast import provenance
from caco_fast.distributed import rank
from caco_fast.engine.metrics import METRICS_FILE, to_json
from caco_fast.engine.progress import console
from caco_fast.errors import UserError
from caco_fast.storage import RetryingFile, atomic_write_text, lock

log = logging.getLogger(__name__)


def _is_task_of_many() -> bool:
    """Whether SLURM or MPI started several processes of this command, of which none knows the others."""
    counts = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return "RANK" not in os.environ and any(count.isdigit() and int(count) > 1 for count in counts)


def current_job() -> dict[str, str]:
    """The launchers that started this process and may restart it: torchrun (its run id or process id) and SLURM."""
    found = {}
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        found["torchrun"] = run if run != "none" else f"{socket.gethostname()} {os.getppid()}"
    if slurm := os.environ.get("SLURM_JOB_ID"):
        found["slurm"] = slurm
    return found


def is_restart_of(job: Mapping[str, str]) -> bool:
    """Whether this process is a restart by the launcher of an earlier start, `job`."""
    restarts = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}
    return any(
        job.get(kind) == name and int(os.environ.get(restarts[kind], "0")) > 0 for kind, name in current_job().items()
    )


class RunFolder:
    """The paths of a run folder; `claim` creates it and `start` describes the run in it.

    Rank 0 writes. The other ranks only use the paths and log their own warnings. A start that is refused before `claim`
    has created or changed nothing: until then log lines wait in memory, from `reserve` on.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.log = self.path / "log.txt"
        self.metrics = self.path / METRICS_FILE
        self.checkpoints = self.path / "checkpoints"
        self.summary_file = self.path / "summary.json"
        self._lock: BinaryIO | None = None
        self._early: MemoryHandler | None = None
        self._handler: logging.Handler | None = None
        self._unwritten: dict[str, Any] = {}

    def holds_run(self) -> bool:
        """Whether a run has trained here. A start that failed before its first log line leaves the folder free."""
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        return logged or any(self.checkpoints.glob("*.pt"))

    def reserve(self) -> None:
        """Keep log lines for `claim`, and keep others from a folder that holds a run.

        Raises:
            UserError: another process trains there.
        """
        self._early = MemoryHandler(sys.maxsize, sys.maxsize, flushOnClose=False)
        self._listen(self._early)
        if rank() == 0 and self.holds_run():
            self._take_lock()

    def require_free(self, resume: str, resumed_from: Path | None) -> None:
        """Check that a start may write here. Nothing is written.

        resume: the option that the user gave. resumed_from: the checkpoint that it means.

        Raises:
            UserError: the folder holds a run that this start does not continue.
        """
        # A resume from elsewhere would cut the metrics and prune the checkpoints of the run in this folder.
        foreign = resumed_from is not None and resumed_from.resolve().parent != self.checkpoints.resolve()
        if (resume == "never" or foreign) and self.holds_run() and not self._own_starts():
            raise UserError(
                f"run folder {self.path} already holds a run: continue it with --resume auto, or choose another folder"
            )

    def claim(self, *, resume: str = "auto", resumed_from: Path | None = None) -> None:
        """Create the folder and open its log, once nothing can refuse this start any more.

        With `auto`, a run that was killed before its first checkpoint starts over here.

        Raises:
            UserError: see `require_free`; or another process trains here, or it can't be written.
        """
        if rank() != 0:
            self._log_to(self.path / f"log.rank{rank()}.txt", logging.WARNING)
            return
        self.require_free(resume, resumed_from)
        with self._writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._take_lock()
            # `reserve` found no run here, but one may have come and gone since.
            self.require_free("never", None)
        with self._writing():
            self.log.touch()
        self._log_to(self.log, logging.INFO)

    def start(
        self,
        config_yaml: str,
        *,
        resumed_from: Path | None = None,
        banks: Sequence[Mapping[str, Any]] = (),
        run: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the configuration and the environment, once all components are built.

        banks: the backend of every bank, and how it was chosen. run: what else runs, as the header of the log has it.
        """
        if rank() == 0:
            with self._writing():
                self._write_config(config_yaml)
                self._write_environment(resumed_from, banks, run or {})

    def resume_in_restart(self, resume: str, latest: Path | None) -> str:
        """The value of `--resume` to follow: the given one, but `auto` if torchrun or SLURM restarted this very run.

        A restart has the arguments of the first start. With those it would be refused (`never`) or start over (a path).
        """
        own = self._own_starts()
        if not own or resume == "auto":
            return resume
        since = datetime.fromisoformat(own[-1]["started"]).timestamp()
        if resume != "never" and (latest is None or latest.stat().st_mtime < since):
            return resume
        log.info("this is a restart of the run in %s: --resume %s means auto", self.path, resume)
        return "auto"

    def summary(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Merge the values into summary.json, atomically, and return all of it. Ranks other than 0 only return {}.

        If the disk refuses, the values go to the log.
        """
        if rank() != 0:
            return {}
        merged = self.read_summary() | {name: to_json(value) for name, value in values.items()}
        try:
            atomic_write_text(self.summary_file, json.dumps(merged, indent=2) + "\n")
        except OSError as error:
            log.error("%s can't be written: %s; it lacks %s", self.summary_file, error.strerror or error, values)
            self._unwritten = merged
        return merged

    def read_summary(self) -> dict[str, Any]:
        if self._unwritten:
            return self._unwritten
        return json.loads(self.summary_file.read_text()) if self.summary_file.exists() else {}

    def close(self) -> None:
        """Close log.txt, and let others train here."""
        self._close_log()
        if self._early is not None:
            logging.getLogger("caco_fast").removeHandler(self._early)
            self._early = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _close_log(self) -> None:
        if self._handler is not None:
            logging.getLogger("caco_fast").removeHandler(self._handler)
            self._handler.close()
            self._file.close()
            self._handler = None

    def _take_lock(self) -> None:
        """Lock the folder for this process, until it closes the folder or dies in whatever way."""
        path = self.path / ".lock"
        with self._writing():
            file = open(path, "a+b", buffering=0)
        try:
            locked = lock(file)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"run folder {self.path} is in use by {holder}; wait for it or stop it, or choose another run.folder"
                + ("; under srun or mpirun, start the ranks by torchrun (docs/ranks.md)" if _is_task_of_many() else "")
            ) from None
        if not locked:
            log.warning(
                "run folder %s: its file system has no locks, so a second run there would not be noticed", self.path
            )
        # Kept open, because closing it unlocks it. A full disk only costs the name of the holder.
        self._lock = file
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, which started at {now}\n".encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run folder {self.path} can't be written: {error.strerror or error}") from error

    def _log_to(self, path: Path, level: int) -> None:
        self._close_log()
        self._file = RetryingFile(path, lambda line: console.print(f"warning: {line}", markup=False))
        self._handler = logging.StreamHandler(self._file)
        self._handler.setLevel(level)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._listen(self._handler)
        if self._early is not None:
            for record in self._early.buffer:
                if record.levelno >= level:
                    self._handler.handle(record)
            logging.getLogger("caco_fast").removeHandler(self._early)
            self._early = None

    def _listen(self, handler: logging.Handler) -> None:
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

    def _starts(self) -> list[dict[str, Any]]:
        return json.loads(self.environment.read_text()) if self.environment.exists() else []

    def _own_starts(self) -> list[dict[str, Any]]:
        """The latest starts in this folder, newest first, as far as their launcher is the one of this restart."""
        return list(itertools.takewhile(lambda start: is_restart_of(start.get("job", {})), reversed(self._starts())))

    def _write_environment(
        self, resumed_from: Path | None, banks: Sequence[Mapping[str, Any]], run: Mapping[str, Any]
    ) -> None:
        starts = self._starts()
        starts.append(
            {
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": provenance.command_line(),
                "resumed_from": str(resumed_from) if resumed_from else None,
                "job": current_job(),
                **provenance.commit(),
                "versions": provenance.versions(),
                "machine": provenance.hardware(),
                "run": dict(run),
                "banks": list(banks),
            }
        )
        atomic_write_text(self.environment, json.dumps(starts, indent=2) + "\n")
