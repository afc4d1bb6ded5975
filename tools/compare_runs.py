"""The runs of a comparison: every row with every seed, each a process of the trainer with a folder of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from compare_studies import Row

from caco_fast.benchmarking import ROOT
from caco_fast.config import flat_settings, to_yaml
from caco_fast.configs import find_config
from caco_fast.errors import UserError
from caco_fast.host import STOP_SIGNALS, cores
from caco_fast.training import FREE_SECTIONS

# Settings that say where a run is made, or that the device decides.
PLACE = ("run.folder", "trainer.device", "trainer.precision")
# Between two looks at the processes.
POLL_SECONDS = 0.2


class Stopped(Exception):
    """A signal asked the comparison to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: Row
    seed: int
    folder: Path
    settings: tuple[str, ...]  # key=value of all rows

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def output(self) -> Path:
        """What the process prints."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    def asked(self) -> tuple[str, ...]:
        return (*self.settings, f"trainer.seed={self.seed}")

    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def is_finished(self) -> bool:
        """Whether nothing is left to do.

        Raises:
            UserError: the folder holds a run with other settings; or the settings are wrong.
        """
        config = self.row.load(self.asked())
        path = self.folder / "config.yaml"
        if not path.is_file():
            return False
        wanted = flat_settings(yaml.safe_load(to_yaml(config)))
        found = flat_settings(yaml.safe_load(path.read_text()))
        other = [key for key in wanted if key in found and key not in PLACE and found[key] != wanted[key]]
        foreign = [key for key in other if not key.startswith(FREE_SECTIONS)]
        if foreign:
            key = foreign[0]
            raise UserError(
                f"{self.folder}: found a run with {key}={found[key]}, expected {wanted[key]}; choose another --out, or "
                "remove that folder"
            )
        return not other and bool(self.summary().get("finished"))

    def command(self, device: str | None) -> list[str]:
        given = [*self.row.settings, *self.asked(), f"run.folder={self.folder}", "run.plain=true"]
        if device:
            given.append(f"trainer.device={device}")
        config = str(find_config(self.row.config))
        return [sys.executable, "-m", "caco_fast", "train", "--config", config, "--resume", "auto", *given]


def plan(rows: Sequence[Row], seeds: Sequence[int], out: Path, settings: Sequence[str]) -> list[Run]:
    """All runs, the first seed of every row first, so that a study that is stopped has all rows."""
    return [
        Run(row, seed, out / f"{row.slug}_seed{seed}", (*settings, *_free(settings))) for seed in seeds for row in rows
    ]


def _free(settings: Sequence[str]) -> tuple[str, ...]:
    """What every run is spared unless it is asked for."""
    spared = ("run.tensorboard", "run.report")
    return tuple(f"{key}=false" for key in spared if not any(given.startswith(f"{key}=") for given in settings))


def run_all(runs: Sequence[Run], jobs: int, devices: Sequence[str]) -> dict[str, str]:
    """Train what is not finished, `jobs` at a time; returns the error line of each run that failed, by its name.

    Raises:
        Stopped: a signal asked to stop; every process has ended, with a checkpoint.
    """
    waiting = deque(run for run in runs if not run.is_finished())
    if done := len(runs) - len(waiting):
        print(f"{done} of {len(runs)} runs are finished already", flush=True)
    errors: dict[str, str] = {}
    active: dict[int, tuple[Run, subprocess.Popen[bytes], float]] = {}
    # Noted, and looked at below, so that no process is missed that starts at that moment.
    signals: list[int] = []
    before = {number: signal.signal(number, lambda got, _: signals.append(got)) for number in STOP_SIGNALS}
    try:
        while waiting or active:
            for slot in range(jobs):
                if slot not in active and waiting and not signals:
                    run = waiting.popleft()
                    device = devices[slot % len(devices)] if devices else None
                    print(f"{run.name}: starts{f' on {device}' if device else ''}", flush=True)
                    active[slot] = (run, _start(run, jobs, device), time.monotonic())
            time.sleep(POLL_SECONDS)
            if signals:
                _stop([process for _, process, _ in active.values()], signals)
                raise Stopped(signals[0])
            for slot, (run, process, since) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[slot]
                if line := _failure(run, process.returncode):
                    errors[run.name] = line
                print(f"{run.name}: {line or 'done'}, after {time.monotonic() - since:.0f} s", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return errors


def _start(run: Run, jobs: int, device: str | None) -> subprocess.Popen[bytes]:
    run.output.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    # The package that this tool was started with, wherever the process runs.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    with open(run.output, "ab") as output:
        # In a session of its own, so that Ctrl-C reaches this process alone, which then stops all.
        return subprocess.Popen(
            run.command(device), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> None:
    """Ask all to stop, and wait for their checkpoints; a second signal ends them at once."""
    print("stopping: the runs write their checkpoints; a second signal ends them without", flush=True)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if len(signals) > 1:
                process.kill()


def _failure(run: Run, status: int) -> str:
    """The line that says why a run failed; empty if it is finished."""
    if status == 0 and run.summary().get("finished"):
        return ""
    lines = [line.strip() for line in run.output.read_text(errors="replace").splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    if status == 0:
        return "error: it ended before its last epoch; a setting such as trainer.max_steps stops it"
    return wrong[-1] if wrong else f"error: it ended with status {status}"
