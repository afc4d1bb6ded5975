"""What the results of tools/check/gpu.py prove of the present sources, by kernel path."""

import json
from pathlib import Path
from typing import Any

from gpu_run import merged
from gpu_stages import Machine, kernel_paths, paths_run, stages

from caco_fast.errors import UserError

Record = dict[str, Any]


def read_results(*folders: Path) -> list[Record]:
    """Every gpu_check_*.json of the folders, the earliest first."""
    records = []
    for path in (path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("gpu_check_*.json"))):
        try:
            record = json.loads(path.read_text())
            record["settings"]["csrc_hash"], record["settings"]["capability"], record["results"]["stages"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a result of tools/check/gpu.py; remove it or run the tool again") from None
        records.append(record)
    return sorted(records, key=lambda record: record["time"])


def together(records: list[Record]) -> list[Record]:
    """One record for each GPU and content hash, with the stages of all calls."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        key = record["settings"]["gpu"], record["settings"]["csrc_hash"]
        before = found[key]["results"]["stages"] if key in found else {}
        found[key] = {**record, "results": {"stages": merged(before, record["results"]["stages"])}}
    return list(found.values())


def pending(record: Record, path: str | None) -> dict[str, str]:
    """Stages that the proof of a path lacks, and their status; None: of those that are no part of a proof."""
    results = record["results"]["stages"]
    needed = [
        stage.name
        for stage in stages(Machine(record["settings"]["capability"]))
        if (path in stage.paths if path else not stage.paths)
    ]
    found = {name: results.get(name, {}).get("status", "not run") for name in needed}
    return {name: status for name, status in found.items() if status != "passed"}


def paths_of(record: Record, present: list[str]) -> list[str]:
    return paths_run(record["settings"]["capability"], present)


def where(record: Record) -> str:
    settings = record["settings"]
    return f"{settings['gpu']}, driver {settings['driver']}, nvcc {settings['nvcc']}, {record['time'][:10]}"


def status(records: list[Record], present: str, all_paths: list[str]) -> tuple[list[str], bool]:
    """Lines that name, for each path, the proofs of the sources with hash `present`; whether every path is proved."""
    lines, proved = [f"csrc/ has the content hash {present}"], set()
    of_present = []
    for record in together(records):
        settings = record["settings"]
        if settings["csrc_hash"] == present:
            of_present.append(record)
        else:
            name = f"of other sources ({settings['csrc_hash']})"
            lines.append(f"{name}: {where(record)}; proves nothing about the present ones")
    machines = [Machine(path.removeprefix("sm")) for path in kernel_paths()]
    claims = {stage.name: stage.claim for machine in machines for stage in stages(machine)}
    for path in all_paths:
        runs = [record for record in of_present if path in paths_of(record, all_paths)]
        for record in runs:
            lacking = pending(record, path)
            lines.append(f"{path}: {'proved in part' if lacking else 'PROVED'} on {where(record)}")
            lines += [f"  pending: {name} ({found}): {claims[name]}" for name, found in lacking.items()]
            proved |= set() if lacking else {path}
        if not runs:
            lines.append(f"{path}: pending: has run under emulation only")
            needed = [stage for stage in stages(Machine(path.removeprefix("sm"))) if path in stage.paths]
            lines += [f"  pending: {stage.name}: {stage.claim}" for stage in needed]
    for record in of_present:
        lines += [
            f"not measured on {record['settings']['gpu']}: {name} ({found}): {claims[name]}"
            for name, found in pending(record, None).items()
        ]
    return lines, set(all_paths) <= proved


def short(record: Record) -> str:
    """One sentence for the README: what is proved on this GPU, and what is pending."""
    parts = []
    for path in reversed(paths_of(record, kernel_paths())):
        lacking = [f"{name} ({found.partition(':')[0]})" for name, found in pending(record, path).items()]
        parts.append(f"{path} lacks {', '.join(lacking)}" if lacking else f"{path} is proved")
    settings = record["settings"]
    return f"`csrc/` with the content hash {settings['csrc_hash']} on {settings['gpu']}: {'; '.join(parts)}."
