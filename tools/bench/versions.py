#!/usr/bin/env python3
"""Training steps and loaders of this tree next to another commit, in turns on the same CPU.

    python tools/bench/versions.py --base main [--cases initialisation training memory] [--rounds 5]
    python tools/bench/versions.py --table benchmarks/results/bench_versions_cpu.json      the result as Markdown

Two processes, one for each tree, work in turns, so that a disturbance of the machine meets both. Each round gives a
ratio, and the result is the median over the rounds with the 20th and 80th percentile. The losses and the views of both
trees are compared too.

Cases: steps of the quickstart, in the bank's initialisation and in training; views of the loaders: the quickstart's
images in memory, and JPEG files of 500 x 375 by DALI and by torchvision, with the views of ImageNet's configurations.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from caco_fast.benchmarking import RESULTS, ROOT, Bench, checked_out, run_script, spread, write_result
from caco_fast.errors import UserError

STEPS, LOADERS = ("initialisation", "training"), ("memory", "dali", "torchvision")
FILES = 64  # photographs
WORKER = Path(__file__).with_name("versions_worker.py")


class Tree:
    """A process that measures the package of one tree."""

    def __init__(self, root: Path, files: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=root,
        )
        self._read()

    def measure(self, case: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise UserError(
                "the process that measures ended early; run the same case with this tree's own tools to see why"
            )
        return line

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Tree":
        return self


def write_photos(folder: Path) -> None:
    """Smooth random pictures, whose JPEG files have the size of ImageNet's."""
    import numpy as np
    from PIL import Image

    place = folder / "train" / "a"
    place.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(FILES):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{number}.jpg", quality=90)


def measure(base: str, cases: list[str], rounds: int) -> dict[str, Any]:
    """Rates of both trees, their ratio, and whether both computed the same, by case."""
    turns = ["steps"] * any(case in STEPS for case in cases) + [case for case in cases if case in LOADERS]
    ratios, rates, same = defaultdict(list), defaultdict(lambda: defaultdict(list)), defaultdict(lambda: True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_photos(scratch / "photos")
        roots = {"base": stack.enter_context(checked_out(base)), "this": ROOT}
        trees = {name: stack.enter_context(Tree(root, scratch / "photos")) for name, root in roots.items()}
        # The first round warms both up.
        for turn in range(rounds + 1):
            for work in turns:
                order = list(trees) if turn % 2 else list(trees)[::-1]
                found = {name: trees[name].measure(work) for name in order}
                if not turn:
                    continue
                for case in (case for case in found["this"]["rate"] if case in cases):
                    same[case] &= found["this"]["same"] == found["base"]["same"]
                    ratios[case].append(found["this"]["rate"][case] / found["base"]["rate"][case])
                    for name, answer in found.items():
                        rates[case][name].append(answer["rate"][case])
    return {
        case: {
            "ratio": spread(ratios[case], 3),
            "images_per_s": {name: round(statistics.median(values), 1) for name, values in rates[case].items()},
            "same_results": same[case],
        }
        for case in cases
    }


def table(record: dict[str, Any]) -> str:
    lines = [
        f"This tree next to {record['settings']['base']}, {record['machine']['cpu']}, one thread, "
        f"{record['settings']['rounds']} rounds; a ratio above 1 means that this tree is faster",
        "",
        "| case | base, images/s | this, images/s | ratio (p20-p80) | same results |",
        "|---|--:|--:|--:|---|",
    ]
    for case, found in record["results"].items():
        ratio, rate = found["ratio"], found["images_per_s"]
        spreads = f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"
        equal = "to the bit" if found["same_results"] else "no"
        lines.append(f"| {case} | {rate['base']:,.0f} | {rate['this']:,.0f} | {spreads} | {equal} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    bench = Bench(__doc__, table, "bench_versions_cpu.json")
    bench.parser.add_argument("--base", default="main", help="commit to compare with")
    bench.parser.add_argument("--cases", nargs="+", choices=(*STEPS, *LOADERS), default=[*STEPS, *LOADERS])
    bench.parser.add_argument("--rounds", type=int, default=5, help="turns of each tree after the first")
    options = bench.parse(arguments, positive=["rounds"])
    results = measure(options.base, options.cases, options.rounds)
    settings = {"base": options.base, "rounds": options.rounds}
    bench.show(write_result(options.output or RESULTS / "bench_versions_cpu.json", settings=settings, results=results))


if __name__ == "__main__":
    run_script(main)
