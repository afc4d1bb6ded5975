#!/usr/bin/env python3
"""Time of the weighted kNN next to lightly's, in turns in one run.

    python tools/bench/knn.py [--train 50000] [--test 2000] [--dim 512] [--threads 1]    # needs: pip install lightly
    python tools/bench/knn.py --table benchmarks/results/bench_knn_cpu.json              # the result as Markdown

Both get the same random features, and lightly the test rows in batches of 512. Seconds are processor seconds. Among
equal similarities lightly takes any, and ours the lowest index.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from caco_fast.benchmarking import RESULTS, Bench, run_script, spread, write_result
from caco_fast.errors import UserError
from caco_fast.evaluate import knn_accuracy

RESULT = RESULTS / "bench_knn_cpu.json"
TEMPERATURE = 0.2
NEIGHBOURS, CLASSES = (20, 200), (10, 1000)


def draw(train: int, test: int, dim: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [N, D] and labels [N] of both sets, around a centre for each class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    labels = [torch.randint(classes, (count,), generator=generator) for count in (train, test)]
    rows = [centres[label] + 4 * torch.randn(len(label), dim, generator=generator) for label in labels]
    return rows[0], labels[0], rows[1], labels[1]


def by_lightly(predict: Callable[..., Tensor], rows: tuple[Tensor, ...], k: int, classes: int) -> float:
    train, labels, test, answers = rows
    bank = normalize(train, dim=1).T.contiguous()
    correct = 0
    for part, answer in zip(normalize(test, dim=1).split(512), answers.split(512)):
        found = predict(part, bank, labels, num_classes=classes, knn_k=k, knn_t=TEMPERATURE)
        correct += int((found[:, 0] == answer).sum())
    return 100.0 * correct / len(test)


def measure(
    predict: Callable[..., Tensor], rows: tuple[Tensor, ...], k: int, classes: int, rounds: int
) -> dict[str, Any]:
    train, labels, test, answers = rows
    calls = {
        "ours": lambda: knn_accuracy(train, labels, test, answers, k=k, classes=classes, temperature=TEMPERATURE)[k],
        "lightly": lambda: by_lightly(predict, rows, k, classes),
    }
    spent: dict[str, list[float]] = {name: [] for name in calls}
    scores: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            scores[name] = call()
            spent[name].append(time.process_time() - start)
    ratios = [theirs / ours for ours, theirs in zip(spent["ours"], spent["lightly"])]
    found: dict[str, Any] = {"k": k, "classes": classes, "lightly_over_ours": spread(ratios)}
    return found | {name: {"accuracy": scores[name], "processor_s": spread(spent[name])} for name in calls}


def table(record: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, machine = record["settings"], record["machine"]
    sizes = f"{settings['train']:,} x {settings['dim']}, {settings['test']:,} queries"
    lines = [
        f"{sizes}; {machine['cpu']}, {settings['threads']} threads, torch {record['versions']['torch']}, lightly "
        f"{settings['lightly']}",
        "",
        "| k | classes | ours, s | lightly, s | lightly / ours (p20-p80) |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in record["results"]:
        ratio = row["lightly_over_ours"]
        seconds = [f"{row[name]['processor_s']['median']:.2f}" for name in ("ours", "lightly")]
        last = f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"
        lines.append("| " + " | ".join([str(row["k"]), str(row["classes"]), *seconds, last]) + " |")
    return "\n".join(lines)


def main() -> None:
    bench = Bench(__doc__, table, RESULT.name)
    for name, default, help in (
        ("train", 50000, "training rows"),
        ("test", 2000, "test rows"),
        ("dim", 512, "size of a feature"),
        ("threads", 1, "threads of torch"),
        ("rounds", 3, "turns of both"),
    ):
        bench.parser.add_argument(f"--{name}", type=int, default=default, help=f"{help}, default {default}")
    options = bench.parse(positive=("train", "test", "dim", "threads", "rounds"))
    try:
        import lightly
        from lightly.utils.benchmarking import knn_predict
    except ImportError as error:
        raise UserError(
            f"lightly, with which this compares, can't be imported ({error}); pip install lightly"
        ) from None
    torch.set_num_threads(options.threads)
    results = []
    for k, classes in itertools.product(NEIGHBOURS, CLASSES):
        rows = draw(options.train, options.test, options.dim, classes)
        results.append(measure(knn_predict, rows, k, classes, options.rounds))
    settings = {name: getattr(options, name) for name in ("train", "test", "dim", "threads", "rounds")}
    settings["lightly"] = lightly.__version__
    bench.show(write_result(options.output or RESULT, settings=settings, results=results))


if __name__ == "__main__":
    run_script(main)
