#!/usr/bin/env python3
"""The figures of a run of `make quickstart`: judge them, and record them for the README.

python tools/check/quickstart.py runs/quickstart            # exit status 1 if it learned too little
python tools/check/quickstart.py runs/quickstart --record   # also writes benchmarks/results/quickstart_cpu.json
python tools/check/quickstart.py --table JSON               # the recorded figures as Markdown
"""

import argparse
import json
import sys
from pathlib import Path

from caco_fast.benchmarking import ROOT, write_result

RESULT = ROOT / "benchmarks" / "results" / "quickstart_cpu.json"
ROWS = {"raw": "raw pixels", "random": "random-initialised encoder", "trained": "encoder trained by CaCo"}
# Points by which the trained encoder must be ahead. kNN is ahead of raw pixels by five, with a standard error of 0.9.
MARGIN = 3.0
# Linear classifiers lie two points above those of raw pixels, and rounding moves each by up to one and a half from one
# processor to another. So a run is only held not to fall behind, on few labels by no more than two standard errors.
MARGINS = {"linear_raw": 0.0, "few_raw": -1.8}
# Of the 512 queries of a step, a quarter.
LEAST_PERPLEXITY = 128
COLUMNS = {
    "knn_{}": "kNN, k 200",
    "knn_{}_k20": "kNN, k 20",
    "linear_{}": "linear probe",
    "few_{}": "linear, 10 labels a class",
}


def shortcomings(summary: dict) -> list[str]:
    """Reasons why the run does not show that CaCo learns. Accuracies are per cent of 2,000 test images."""
    needed = [key.format(what) for what in ROWS for key in COLUMNS]
    needed += ["positive_probability_start", "positive_probability_end", "positive_perplexity_end"]
    needed += ["pairs_per_second", "train_seconds", "steps", "initialisation_steps"]
    missing = [key for key in needed if key not in summary]
    if missing:
        return [f"summary.json lacks {', '.join(missing)}"]
    found = []
    if not summary["finished"]:
        found.append("the run is not finished")
    for key in ("knn_{}", "linear_{}", "few_{}"):
        trained = summary[key.format("trained")]
        for what in ("raw", "random"):
            yardstick, margin = summary[key.format(what)], MARGINS.get(key.format(what), MARGIN)
            if trained < yardstick + margin:
                least = f"expected at least {yardstick + margin:.1f} ({ROWS[what]} {margin:+})"
                found.append(f"{key.format('trained')}: found {trained:.1f}, {least}")
    # The probability alone would be high in a bank that has collapsed to a few rows.
    if summary["positive_probability_end"] < 1.5 * summary["positive_probability_start"]:
        found.append("the mean probability of the chosen positive did not rise by half")
    if summary["positive_perplexity_end"] < LEAST_PERPLEXITY:
        found.append(f"the positives spread over {summary['positive_perplexity_end']:.0f} rows: the bank collapsed")
    return found


def table(record: dict) -> str:
    """The figures as Markdown."""
    summary, machine = record["results"], record["machine"]
    # A record of an earlier version has fewer figures.
    columns = {key: title for key, title in COLUMNS.items() if key.format("trained") in summary}
    lines = [
        f"| Fashion-MNIST, 2,000 test images, per cent | {' | '.join(columns.values())} |",
        "|---|" + "--:|" * len(columns),
    ]
    for what, name in ROWS.items():
        cells = [f"{summary[key.format(what)]:.1f}" for key in columns]
        bold = "**" if what == "trained" else ""
        lines.append(f"| {bold}{name}{bold} | " + " | ".join(f"{bold}{cell}{bold}" for cell in cells) + " |")
    start, end = summary["positive_probability_start"], summary["positive_probability_end"]
    lines += [
        "",
        f"10,000 unlabelled images and one seed, on a {machine['cpu_cores']}-core {machine['cpu']}. The standard error "
        f"of an accuracy is 0.9. The first {summary['initialisation_steps']} of the {summary['steps']} steps fill the "
        f"bank with keys. From then on the mean probability of the chosen positive rises from {start:.3f} "
        f"to {end:.3f}. The 512 queries of a step then find their positives in "
        f"{summary['positive_perplexity_end']:.0f} of the 2,048 bank rows.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge a quickstart run, and record it for the README.")
    parser.add_argument("run", type=Path, nargs="?", help="run folder, e.g. runs/quickstart")
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print recorded figures as Markdown and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    if arguments.run is None:
        parser.error("run: found none, expected the run folder; or give --table JSON")
    path = arguments.run / "summary.json"
    if not path.is_file():
        print(f"error: {path}: no such file; make quickstart writes it", file=sys.stderr)
        return 2
    summary = json.loads(path.read_text())
    found = shortcomings(summary)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if not found:
        print(f"{arguments.run}: CaCo's features beat the random encoder, and raw pixels by kNN")
        if arguments.record:
            starts = json.loads((arguments.run / "environment.json").read_text())
            settings = {"config": "caco_fast/configs/quickstart.yaml", "starts": starts}
            print(f"recorded in {write_result(RESULT, settings=settings, results=summary)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
