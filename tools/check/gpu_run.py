"""Runs the stages of tools/check/gpu.py, and keeps the result of each at once: a cut loses one stage at most."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from gpu_stages import ROOT, WORK, Command, Stage, wheels

OUTPUT_LINES, LINE_LENGTH = 40, 400
LEAST_SECONDS = 5  # with less time left a stage is not begun
SAMPLED = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,clocks_event_reasons.active"
# Each process leads a group, which is ended with its children. No session of its own: what ends this script by its
# session, as a machine that is given back does, ends all.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
Result = dict[str, Any]


class Runner:
    """Runs stages one after the other, and what they need beforehand beside them.

    The folder receives log<suffix>.txt as it is printed, and clocks<suffix>.csv with clocks and power of the GPU.
    """

    def __init__(self, folder: Path, seconds: float, suffix: str = "") -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.suffix = folder, suffix
        self.end = time.monotonic() + seconds
        self.log = (folder / f"log{suffix}.txt").open("ab")
        self.running: list[subprocess.Popen] = []
        self.beside: dict[str, list[tuple[Command, subprocess.Popen, Path]]] = {}

    def run(
        self,
        stages: list[Stage],
        keep: Callable[[dict[str, Result]], object],
        follow_up: Stage | None = None,
    ) -> dict[str, Result]:
        """The results by name, given to `keep` after every stage.

        follow_up: a stage to run after the first one that ran out of time where a kernel may hang.
        """
        results: dict[str, Result] = {}
        todo = list(stages)
        try:
            self._sample()
            self._start_beside(todo)
            while todo:
                stage = todo.pop(0)
                reason = self._left_out(stage, results)
                results[stage.name] = {"status": f"not run: {reason}"} if reason else self.run_stage(stage)
                keep(results)
                tell(stage, results[stage.name])
                if follow_up and stage.waits and results[stage.name]["status"] == "timed out":
                    todo.insert(0, follow_up)
                    follow_up = None
        finally:
            for process in self.running:
                end_group(process)
            self.log.close()
        return results

    def run_stage(self, stage: Stage) -> Result:
        """Run a stage within its limit. A failure is a result, not an exception."""
        print(f"{stage.name} ...", flush=True)
        start = time.monotonic()
        seconds = min(stage.limit_s, self.end - start)
        end, status, place = start + seconds, "passed", self.log.tell()
        self._write(f"\n=== {stage.name}, at most {seconds:.0f} s\n")
        for command, process, log in self.beside.pop(stage.name, []):
            status = self._wait(command, process, end - time.monotonic()) if status == "passed" else status
            self._write(log.read_text(errors="replace"))
        for command in stage.commands:
            if status == "passed":
                status = self._run_command(command, environment_of(stage), end - time.monotonic())
        text = self._text_since(place)
        if status == "passed" and not re.search(stage.expected, text):
            status = f"failed: the output lacks {stage.expected!r}"
        lines = [line[:LINE_LENGTH] for line in text.strip().splitlines()[1:]]
        kept = [line for line in lines if stage.shown and re.search(stage.shown, line)]
        if status != "passed":
            kept = [line for line in kept if line not in lines[-OUTPUT_LINES:]] + lines[-OUTPUT_LINES:]
        return {
            "status": status,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
            "limit_s": round(seconds),
            "output": kept or lines[-1:],
        }

    def _left_out(self, stage: Stage, results: dict[str, Result]) -> str | None:
        for name in stage.needs:
            found = results.get(name, {}).get("status", "passed")
            # A self-test that took too long says nothing; without a build nothing can run.
            if found.startswith("failed") or (name == "build" and found != "passed"):
                return f"{name} has not passed"
        for package in stage.packages:
            if not importlib.util.find_spec(package) and not any(package in Path(wheel).name for wheel in wheels()):
                return f"the package {package} is missing; bring it: python tools/check/gpu.py --collect-wheels"
        return None if self.end - time.monotonic() >= LEAST_SECONDS else "no time left"

    def _run_command(self, command: Command, environment: dict[str, str], seconds: float) -> str:
        if seconds <= 0:
            return "timed out"
        try:
            process = self._start(command, self.log, environment)
        except OSError as error:
            return f"failed: {command[0]}: {error.strerror}"
        return self._wait(command, process, seconds)

    def _start(self, command: Command, output: IO[bytes], environment: dict[str, str]) -> subprocess.Popen:
        settings: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "env": environment, "cwd": ROOT}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **settings, **GROUP)
        self.running.append(process)
        return process

    def _wait(self, command: Command, process: subprocess.Popen, seconds: float) -> str:
        try:
            code = process.wait(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            end_group(process)
            self.running.remove(process)
        return "passed" if code == 0 else f"failed: {Path(command[0]).name} ended with status {code}"

    def _start_beside(self, stages: list[Stage]) -> None:
        for stage in stages:
            for number, command in enumerate(stage.beforehand):
                log = WORK / f"{stage.name.replace(' ', '_')}_{number}.log"
                with log.open("wb") as output:
                    process = self._start(command, output, environment_of(stage))
                self.beside.setdefault(stage.name, []).append((command, process, log))

    def _sample(self) -> None:
        """Clocks and power, five times a second, until the end."""
        if tool := shutil.which("nvidia-smi"):
            command = (tool, f"--query-gpu={SAMPLED}", "--format=csv,nounits", "-lms", "200")
            with (self.folder / f"clocks{self.suffix}.csv").open("wb") as output:
                self._start(command, output, dict(os.environ))

    def _write(self, text: str) -> None:
        self.log.write(text.encode())
        self.log.flush()

    def _text_since(self, place: int) -> str:
        with open(self.log.name, "rb") as log:
            log.seek(place)
            return log.read().decode(errors="replace")


def environment_of(stage: Stage) -> dict[str, str]:
    path = [str(ROOT), *wheels(), os.environ.get("PYTHONPATH", "")]
    common = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **common, **stage.environment}


def end_group(process: subprocess.Popen) -> None:
    """End a process, and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def tell(stage: Stage, result: Result) -> None:
    print(f"{result['status']}: {stage.name} ({result.get('seconds', 0)} s): {stage.claim}", flush=True)
    for line in result.get("output", ()):
        print(f"    {line}", flush=True)


def counts(results: dict[str, Result]) -> dict[str, int]:
    """How many stages passed, failed, ran out of time (which is no failure: nothing is known), and were not run."""
    found = [result["status"].partition(":")[0] for result in results.values()]
    return {status: found.count(status) for status in ("passed", "failed", "timed out", "not run")}


def merged(before: dict[str, Result], later: dict[str, Result]) -> dict[str, Result]:
    """Results of the same sources together. A later one counts, but not if it decides nothing and the earlier does."""
    together = dict(before)
    for name, result in later.items():
        decides = result["status"].startswith(("passed", "failed"))
        if decides or not together.get(name, {"status": ""})["status"].startswith(("passed", "failed")):
            together[name] = result
    return together
