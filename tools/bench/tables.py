#!/usr/bin/env python3
"""Write the measured tables of README.md and docs/ from benchmarks/results/: python tools/bench/tables.py [--check]

A table is between `<!-- table: NAME.json -->` and `<!-- end table -->`; the script that wrote NAME.json prints it.
`<!-- table: results -->` is the list of all results: what was measured, where, and at which commit.
With --check nothing is written, and the exit status is 1 if a table differs from its result.
"""

import argparse
import ast
import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "check")]

import gpu_status  # noqa: E402

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end table -->)", re.S)


def table(name: str) -> str:
    """The Markdown table of a result, from the script that the result names."""
    if name == "results":
        return results()
    result = RESULTS / name
    script = ROOT / json.loads(result.read_text())["script"]
    try:
        return run_here(script, "--table", str(result)).strip()
    except SystemExit as end:
        raise SystemExit(f"error: {script.relative_to(ROOT)} --table {name}: status {end.code}") from None


def run_here(script: Path, *arguments: str) -> str:
    """What a script prints. It runs in this process, because a fresh one takes seconds to import torch."""
    printed = io.StringIO()
    argv, path = sys.argv, sys.path[:]
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv, sys.path[:] = argv, path
    return printed.getvalue()


def results() -> str:
    """The list of all results, and on which GPUs which kernels are proved."""
    lines = ["| result | what | where | when | commit |", "|---|---|---|---|---|"]
    checks = gpu_status.read_results(RESULTS)
    # What a check of a GPU has measured is named in its own row.
    measured = {name for check in checks for name in check["results"].get("files", ())}
    proofs = [gpu_status.short(record) for record in gpu_status.together(checks)]
    for path in sorted(path for path in RESULTS.glob("*.json") if path.name not in measured):
        result = json.loads(path.read_text())
        gpus = ", ".join(result["machine"]["gpus"])
        where, commit = gpus or f"{result['machine']['cpu']}, no GPU", (result["commit"] or "")[:7]
        if result["dirty"]:
            commit += " with changes"
        files = result["results"].get("files", ()) if path.stem.startswith("gpu_check") else ()
        link = ", ".join(f"[{name.removesuffix('.json')}](benchmarks/results/{name})" for name in (path.name, *files))
        lines.append(f"| {link} | {purpose(ROOT / result['script'])} | {where} | {result['time'][:10]} | {commit} |")
    return "\n".join([*lines, "", *(proofs or ["On a GPU `csrc/` has not been proved, nor anything else measured."])])


def purpose(script: Path) -> str:
    """The first sentence of a script's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(script.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"[:.](?: |$)", text)[0].replace("|", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the measured tables of README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="only compare; exit status 1 if a table is out of date")
    arguments = parser.parse_args()

    stale = False
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        name, text = page.relative_to(ROOT), page.read_text()
        made = BLOCK.sub(lambda block: f"{block[1]}{table(block[2])}\n{block[3]}", text)
        if made == text:
            print(f"{name}: every table is that of its result")
        elif arguments.check:
            stale = True
            print(f"error: {name}: a table is not that of its result; run tools/bench/tables.py", file=sys.stderr)
        else:
            page.write_text(made)
            print(f"{name}: tables written")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
