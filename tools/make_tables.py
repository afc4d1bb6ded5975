#!/usr/bin/env python3
"""Writes the measured tables of README.md and docs/ from benchmarks/results/: python tools/make_tables.py [--check]

A table stands between `<!-- table: NAME.json -->` and `<!-- end table -->`; the script that wrote NAME.json prints it.
With --check nothing is written, and the exit status is 1 if a table differs from its result.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end table -->)", re.S)


def table(name: str) -> str:
    """The Markdown table of a result, from the script that the result names."""
    result = RESULTS / name
    script = ROOT / json.loads(result.read_text())["script"]
    done = subprocess.run([sys.executable, script, "--table", result], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"error: {script.relative_to(ROOT)} --table {name}: {done.stderr.strip()}")
    return done.stdout.strip()


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
            print(f"error: {name}: a table is not that of its result; run python tools/make_tables.py", file=sys.stderr)
        else:
            page.write_text(made)
            print(f"{name}: tables written")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
