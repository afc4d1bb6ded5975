#!/usr/bin/env python3
"""Compare methods and settings: rows x seeds of ordinary runs, with a table, a picture and JSON.

python tools/compare.py positives_negatives --base cifar10_resnet18 --seeds 0 1 2 --out runs/ablation
python tools/compare.py bank_size --base quickstart --seeds 0 1 2
python tools/compare.py methods --jobs 2                     # the small configuration of every method
python tools/compare.py quickstart small_moco trainer.epochs=6
python tools/compare.py --base quickstart --variant "caco.bank_lr=0.3" --variant "caco.bank_size=4096"
python tools/compare.py --table runs/ablation/compare.json   # a result as Markdown

A study that was stopped continues with the same command; finished runs are skipped. docs/compare.md says how to read
the figures. Exit status: 0 done, 1 a run failed, 2 the user can correct it, 128 + n stopped by signal n.
"""

import argparse
import re
import sys
from pathlib import Path

from compare_figures import figures_of, summarise, table
from compare_plot import draw
from compare_runs import Stopped, plan, run_all
from compare_studies import STUDIES, make_study

from caco_fast.benchmarking import read_result, run_script, write_result
from caco_fast.errors import UserError
from caco_fast.storage import atomic_write_text


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "given", nargs="*", metavar="STUDY|CONFIG|key=value", help=f"{', '.join(STUDIES)}, or configurations; settings"
    )
    found.add_argument("--base", metavar="NAME|FILE", help="configuration that a study or variants change")
    found.add_argument(
        "--variant", action="append", default=[], metavar="'key=value ...'", help="a row beside the base"
    )
    found.add_argument("--seeds", nargs="+", default=["0"], metavar="N", help="trainer.seed of the runs; 0")
    found.add_argument("--out", type=Path, help="folder of the runs and of the results; default runs/compare/STUDY")
    found.add_argument("--jobs", type=int, help="runs at a time; default one for each device, or one")
    found.add_argument("--devices", default="", help="cuda:0,cuda:1 or cpu; default: as the configurations say")
    found.add_argument("--output", type=Path, metavar="JSON", help="also write the result here")
    found.add_argument("--table", type=Path, metavar="JSON", help="print a result as Markdown and do nothing else")
    return found


def main() -> int:
    options = parser().parse_intermixed_args()
    if options.table:
        print(table(read_result(options.table)))
        return 0
    # Settings may follow the seeds.
    settings = [given for given in (*options.given, *options.seeds) if "=" in given]
    seeds = _seeds([given for given in options.seeds if "=" not in given])
    devices = [device for device in options.devices.split(",") if device]
    jobs = max(len(devices), 1) if options.jobs is None else options.jobs
    _check(settings, devices, jobs)
    study = make_study([given for given in options.given if "=" not in given], options.base, options.variant, settings)
    out = options.out or Path("runs", "compare", study.name)
    runs = plan(study.rows, seeds, out, settings)
    try:
        errors = run_all(runs, jobs, devices)
    except Stopped as stopped:
        print(f"{stopped}; the same command continues", file=sys.stderr)
        return stopped.exit_code

    rows = [
        {
            "name": row.name,
            "config": row.config,
            "settings": list(row.settings),
            "published": row.published,
            "runs": {str(run.seed): figures_of(run, errors.get(run.name)) for run in runs if run.row is row},
        }
        for row in study.rows
    ]
    asked = {
        "study": study.name,
        "source": study.source,
        "base": options.base,
        "settings": settings,
        "seeds": seeds,
        "jobs": jobs,
        "devices": devices,
    }
    results = summarise(rows)
    for path in filter(None, (out / "compare.json", options.output)):
        write_result(path, settings=asked, results=results)
    result = read_result(out / "compare.json")
    atomic_write_text(out / "compare.md", table(result) + "\n")
    draw(result, out / "compare.png")
    print(f"\n{table(result)}\n\nwritten to {out}: compare.json, compare.md, compare.png")
    return int(bool(errors))


def _seeds(given: list[str]) -> list[int]:
    """The seeds as numbers.

    Raises:
        UserError: one is no number, or is there twice.
    """
    for seed in given:
        if not seed.isdecimal():
            raise UserError(f"--seeds: found '{seed}', expected whole numbers from 0")
        if given.count(seed) > 1:
            raise UserError(f"--seeds: found {seed} twice, expected each seed once")
    return [int(seed) for seed in given]


def _check(settings: list[str], devices: list[str], jobs: int) -> None:
    """Raise UserError for options that no study can have."""
    for setting in settings:
        if setting.startswith(("trainer.seed=", "run.folder=", "trainer.device=")):
            name = setting.split("=")[0]
            raise UserError(f"{name}: found it as a setting, expected --seeds, --out or --devices")
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise UserError(f"--devices: found '{device}', expected cpu, cuda or cuda:N, with commas between")
    if jobs < 1:
        raise UserError(f"--jobs: found {jobs}, expected 1 or more")


if __name__ == "__main__":
    run_script(main)
