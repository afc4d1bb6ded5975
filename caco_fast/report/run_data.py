"""A run folder as a page needs it: whatever is there is read, and what can't be read is named instead of raised."""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from caco_fast.engine.curves import Points
from caco_fast.engine.metrics import METRICS_FILE, NOT_FINITE
from caco_fast.errors import UserError
from caco_fast.methods import METHODS
from caco_fast.settings_tree import flat_settings

# What a folder has of which a page can be made.
SIGNS = (METRICS_FILE, "config.yaml", "environment.json", "summary.json")
# Counts, which the part on events tells in words, and what places a line.
NO_CURVE = ("step", "epoch", "time", "bad_images", "skipped_rows", "skipped_steps")
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (WARNING|ERROR) (.*)")


@dataclass(frozen=True)
class LogLine:
    time: str  # as the log has it, in the machine's own time zone
    level: str
    text: str


@dataclass(frozen=True)
class RunData:
    """What a run folder holds. All of it may be empty: the run may be young, cut short or of another version."""

    folder: Path
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # by dotted key
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl, by rising step
    summary: Mapping[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)  # of environment.json, the oldest first
    evaluations: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # by the names of their files
    warnings: list[LogLine] = field(default_factory=list)  # of the log, and errors
    problems: list[str] = field(default_factory=list)  # what could not be read, a line each

    @property
    def method(self) -> str:
        return str(self.settings.get("method") or self.header.get("method") or "unknown method")

    @property
    def header(self) -> Mapping[str, Any]:
        """What ran, as the header of the last start's log has it."""
        found = self.starts[-1].get("run") if self.starts else None
        return found if isinstance(found, dict) else {}

    def reads(self, key: str) -> bool:
        """Whether a setting has an effect on the run: in the sections of other methods it has none."""
        section, method = key.partition(".")[0], METHODS.get(self.method)
        if section not in METHODS or method is None:
            return True
        prefix = f"{self.method}."
        own = {name.removeprefix(prefix): value for name, value in self.settings.items() if name.startswith(prefix)}
        return section in method.method.reads(SimpleNamespace(**own))

    @functools.cached_property
    def curves(self) -> Mapping[str, Points]:
        """Steps and values of each measurement, without those that are not finite; in the order of their first line."""
        found: dict[str, Points] = {}
        for line in self.lines:
            for name, value in line.items():
                if name not in NO_CURVE and isinstance(value, (int, float)) and math.isfinite(value):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(line["step"])
                    values.append(value)
        return found

    def points(self, name: str) -> Points:
        return self.curves.get(name, ([], []))

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((line["step"] for line in self.lines), default=self.summary.get("steps") or 0)

    @property
    def finished(self) -> bool:
        return bool(self.summary.get("finished"))

    def number(self, key: str) -> float | None:
        """A number of the summary."""
        value = self.summary.get(key)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def read_run(folder: Path) -> RunData:
    """All that a page shows of a run folder.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise UserError(f"RUN: found {what} at {folder}, expected a run folder")
    if not any((folder / name).is_file() for name in SIGNS) and not any(folder.glob("checkpoints/*.pt")):
        raise UserError(f"RUN: found no run in {folder}, expected a folder with one of {', '.join(SIGNS)}")
    problems: list[str] = []
    summary = _json(folder / "summary.json", problems)
    starts = _json(folder / "environment.json", problems)
    evaluations = {path.stem: _json(path, problems) for path in sorted(folder.glob("evaluation/*.json"))}
    return RunData(
        folder,
        folder.resolve().name,
        _settings(folder / "config.yaml", problems),
        _metrics(folder / METRICS_FILE, problems),
        summary if isinstance(summary, dict) else {},
        [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else [],
        {name: found for name, found in evaluations.items() if isinstance(found, dict) and "protocol" in found},
        _warnings(folder / "log.txt"),
        problems,
    )


def _text(path: Path, problems: list[str]) -> str:
    """The text of a file, empty if there is none."""
    try:
        # A file that was cut within a character is read as far as it goes.
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} can't be read: {error.strerror or error}")
        return ""


def _json(path: Path, problems: list[str]) -> Any:
    text = _text(path, problems)
    try:
        return json.loads(text) if text else None
    except ValueError:
        problems.append(f"{path.name} is not valid JSON and is left out")
        return None


def _settings(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(_text(path, problems))
    except yaml.YAMLError:
        problems.append(f"{path.name} is not valid YAML and is left out")
        return {}
    return flat_settings(tree) if isinstance(tree, dict) else {}


def _metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines that can be read. `read_metrics` refuses a file with a damaged line, and a page shows the others."""
    lines, damaged = [], 0
    texts = _text(path, problems).split("\n")
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text) if text else None
        except ValueError:
            # A kill may cut the last line short.
            damaged += number < len(texts)
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), (int, float)):
            lines.append({name: NOT_FINITE.get(v, v) if isinstance(v, str) else v for name, v in line.items()})
        elif text:
            damaged += 1
    if damaged:
        problems.append(f"{path.name}: {damaged} lines can't be read and are left out")
    return sorted(lines, key=lambda line: line["step"])


def _warnings(path: Path) -> list[LogLine]:
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                if match := LOG_LINE.match(text):
                    found.append(LogLine(*match.groups()))
    except OSError:
        pass
    return found
