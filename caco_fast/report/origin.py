"""The parts of a page that say where a run comes from: its events, its settings, and its starts."""

import functools
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from caco_fast.config import config_class, flat_settings, load_config, to_yaml
from caco_fast.configs import shipped
from caco_fast.errors import UserError
from caco_fast.report.parts import Block, Facts, Missing, Part, Table
from caco_fast.report.run_data import LogLine, RunData
from caco_fast.settings_tree import with_bases

# More lines of a log are counted and not shown.
MOST_WARNINGS = 40
# Settings that say where things are and not what is done.
PLACES = ("run.folder", "data.path", "data.root")
COUNTS = {
    "bad_images": "unreadable images, each replaced by the next good one",
    "skipped_steps": "steps skipped, because gradients of fp16 overflowed",
    "skipped_rows": "rows of the bank left out of a step, the most in one log line",
}


def events(run: RunData) -> Part:
    """What happened besides training: stops, resumes, skipped steps, bad images, warnings."""
    found = list(_events(run))
    blocks: list[Block] = [Facts(found)] if found else []
    if run.warnings:
        groups = Counter((line.level, _alike(line.text)) for line in run.warnings)
        seen: set[tuple[str, str]] = set()
        rows = []
        for line in run.warnings:
            key = (line.level, _alike(line.text))
            if key not in seen:
                seen.add(key)
                rows.append([line.time, line.level.lower(), _first(line, groups[key])])
        if len(rows) > MOST_WARNINGS:
            blocks.append(Missing(f"{len(rows) - MOST_WARNINGS} more lines; log.txt has all"))
        blocks.append(Table(["time", "level", "line of log.txt"], rows[:MOST_WARNINGS]))
    lead = "" if blocks else "No stop, no skipped step, no bad image and no warning."
    return Part("events", "Events", blocks, lead)


def _events(run: RunData) -> Iterator[tuple[str, str]]:
    for number, start in enumerate(run.starts[1:], 2):
        resumed = start.get("resumed_from")
        what = f"resumed from {Path(str(resumed)).name}" if resumed else "started over, without a checkpoint"
        yield f"start {number}", f"{began(start)}: {what}"
    if not run.finished:
        yield "end", f"the run has not reached its end; its last log line is of step {run.steps:,}"
    for name, title in COUNTS.items():
        values = [line[name] for line in run.lines if isinstance(line.get(name), (int, float))]
        if most := max(values, default=0):
            where = next(line["step"] for line in run.lines if line.get(name))
            yield name.replace("_", " "), f"{most:,.0f} {title}; the first by step {where:,}"


def _alike(text: str) -> str:
    """A line without its numbers and names of files, so that repetitions are found."""
    return re.sub(r"\S*[/\\]\S+|\d[\d.,]*", "#", text)


def _first(line: LogLine, count: int) -> str:
    return line.text if count == 1 else f"{line.text} (and {count - 1:,} more like it)"


def settings(run: RunData) -> Part:
    """The settings that differ from the shipped preset, and from the defaults."""
    if not run.settings:
        return Part("settings", "Settings", [Missing("the settings, because config.yaml is missing or damaged")])
    blocks: list[Block] = []
    defaults = _defaults()
    # A setting that came after this run was at its default then.
    own = defaults | dict(run.settings)
    name, known = preset_of(run)
    if name:
        differ = differences(own, _shipped_settings(name))
        rows = [[key, told(mine), told(other)] for key, (mine, other) in differ.items()]
        if rows:
            how = "the preset of the command line" if known else "the nearest preset"
            blocks.append(Table(["setting", "this run", "preset"], rows, f"What differs from {name}, {how}."))
        else:
            blocks.append(Facts([(f"what differs from {name}", "nothing")]))
    else:
        blocks.append(Missing(f"a preset to compare with, because no shipped one is of the method {run.method}"))
    rows = [[key, told(mine), told(other)] for key, (mine, other) in differences(own, defaults).items()]
    if rows:
        caption = f"{len(rows)} settings that differ from the defaults of the program"
        blocks.append(Table(["setting", "this run", "default"], rows, caption, folded=True))
    lead = "Where a preset says auto, the program chose." if name else ""
    return Part("settings", "Settings", blocks, lead)


def preset_of(run: RunData) -> tuple[str, bool]:
    """The shipped configuration that a run began with, and whether the command line named it.

    Otherwise it is the nearest one of the method, and empty if there is none.
    """
    for start in reversed(run.starts):
        if (given := _given(str(start.get("command") or ""))) in shipped():
            return given, True
    distances = {
        name: len(differences(run.settings, _defaults() | preset))
        for name, preset in _presets().items()
        if preset.get("method") == run.method
    }
    return (min(distances, key=lambda name: distances[name]) if distances else ""), False


def _given(command: str) -> str:
    """The name behind --config in a command line."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith("--config"):
            given = word.partition("=")[2] or following
            return Path(given).name.removesuffix(".yaml")
    return ""


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    """What the files of all shipped configurations say: reading each with its types would take a second."""
    return {
        name: dict(item for _, tree in with_bases(name, config_class()) for item in flat_settings(tree).items())
        for name in shipped()
    }


@functools.cache
def _shipped_settings(name: str) -> dict[str, Any]:
    try:
        return flat_settings(yaml.safe_load(to_yaml(load_config(shipped()[name]))))
    except UserError:
        return {}


@functools.cache
def _defaults() -> dict[str, Any]:
    return flat_settings(yaml.safe_load(to_yaml(load_config(None))))


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of which both sides know and that differ, or that one side alone has: value here, value there."""
    keys = [key for key in [*mine, *(key for key in other if key not in mine)] if key not in PLACES]
    found = {key: (mine.get(key), other.get(key)) for key in keys}
    return {key: pair for key, pair in found.items() if _plain(pair[0]) != _plain(pair[1])}


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def told(value: Any) -> str:
    """A setting as its user writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if value != "" else "(empty)"


def environment(run: RunData) -> Part:
    """The machine, the versions and the commit of the last start, and what changed between starts."""
    if not run.starts:
        return Part("environment", "Environment", [Missing("the environment, because environment.json is missing")])
    last = run.starts[-1]
    blocks: list[Block] = [Facts(list(_machine(last)))]
    rows = [
        [
            str(number),
            began(start),
            Path(str(start["resumed_from"])).name if start.get("resumed_from") else "-",
            f"{(start.get('commit') or '-')[:10]}{', changed' if start.get('dirty') else ''}",
            str((start.get("machine") or {}).get("host", "-")),
            str((start.get("run") or {}).get("ranks", "-")),
            str(start.get("command", "-")),
        ]
        for number, start in enumerate(run.starts, 1)
    ]
    header = ["start", "time", "resumed from", "commit", "host", "ranks", "command"]
    return Part("environment", "Environment", [*blocks, Table(header, rows, "Every start of the run.")])


def began(start: Mapping[str, Any]) -> str:
    """When a start was, to the minute."""
    time = str(start.get("started") or "")
    return f"{time[:10]} {time[11:16]} UTC" if len(time) > 16 else "at an unknown time"


def _machine(start: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    machine, header = start.get("machine") or {}, start.get("run") or {}
    if header.get("device"):
        yield "device", f"{header['device']}, {header.get('ranks', 1)} rank{'s' * (header.get('ranks', 1) != 1)}"
    if machine:
        yield "processor", f"{machine.get('cpu')}, {machine.get('cpu_cores')} cores, {machine.get('memory_gib')} GiB"
        gpus = Counter(machine.get("gpus") or [])
        yield "GPUs", ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "none"
        yield "system", f"{machine.get('system')}, host {machine.get('host')}"
    for key in ("precision", "loader"):
        if header.get(key):
            yield key, str(header[key])
    for bank in start.get("banks") or []:
        yield "bank", f"{bank.get('backend')}, because {bank.get('reason')}; products in {bank.get('products')}"
    if versions := start.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
