"""The figures of a comparison: what its runs left behind, their statistics, and the tables in Markdown."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from compare_runs import Run

from caco_fast.engine.metrics import read_metrics

KEPT = (
    "steps",
    "initialisation_steps",
    "train_seconds",
    "pairs_per_second",
    "peak_memory_gib",
    "positive_probability_end",
)
SCORES = {"knn": "kNN", "linear": "linear probe"}
BASELINES = {"raw": "raw pixels", "random": "random encoder"}
CONFIDENCE = 0.95


def figures_of(run: Run, error: str | None) -> dict[str, Any]:
    """The figures of one run, or its error line."""
    summary = run.summary()
    if error or not summary.get("finished"):
        return {"error": error or "error: it has not finished"}
    batch = run.row.load(run.asked()).trainer.batch_size
    scores = {
        f"{score}_{what}": summary[f"{score}_{what}"]
        for what in ("trained", *BASELINES)
        for score in SCORES
        if f"{score}_{what}" in summary
    }
    kept = {name: summary[name] for name in KEPT if name in summary}
    k = next(iter(summary.get("evaluated", {}).get("evaluation.k", [])), None)
    return {**scores, **kept, "images": summary["steps"] * batch, "k": k, "curve": curve(run, f"knn_{k}", batch)}


def curve(run: Run, name: str, batch: int) -> list[list[float]]:
    """[epoch, images, seconds of training, kNN] of every evaluation in the run."""
    lines = read_metrics(run.folder)
    steps, seconds = [0.0], [0.0]
    for line in lines:
        # The speed is the mean since the log line before.
        if "pairs_per_second" in line and line["step"] > steps[-1]:
            seconds.append(seconds[-1] + (line["step"] - steps[-1]) * batch / line["pairs_per_second"])
            steps.append(line["step"])
    return [
        [line["epoch"] + 1, line["step"] * batch, round(float(np.interp(line["step"], steps, seconds)), 1), line[name]]
        for line in lines
        if name in line
    ]


def at_budget(curve: Sequence[Sequence[float]], column: int, budget: float) -> float | None:
    """The kNN at so many images (column 1) or seconds (2), between evaluations on a straight line."""
    places = [point[column] for point in curve]
    if not places or budget < places[0]:
        return None
    return round(float(np.interp(budget, places, [point[3] for point in curve])), 2)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The x with P(|T| < x) = confidence of Student's t: bisection of its distribution (Abramowitz-Stegun 26.7.3)."""

    def inside(angle: float) -> float:
        """P(|T| < sqrt(freedom) tan(angle)), a finite sum for a whole number of degrees of freedom."""
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = freedom % 2
        term, total = (cosine if odd else 1.0), 0.0
        for k in range(odd, freedom - 1, 2):
            total += term
            term *= (k + 1) / (k + 2) * cosine * cosine
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample: n - 1), which one value does not have."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"seeds": len(values), "mean": statistics.fmean(values), "deviation": deviation}


def paired(values: Mapping[str, float], first: Mapping[str, float]) -> dict[str, Any]:
    """The mean difference over the seeds that both have, and half of its interval: t s / sqrt(n), n - 1 degrees."""
    differences = [values[seed] - first[seed] for seed in values if seed in first]
    if not differences:
        return {"seeds": 0, "mean": None, "half_interval": None}
    count, half = len(differences), None
    if count > 1:
        half = t_quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return {"seeds": count, "mean": statistics.fmean(differences), "half_interval": half}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result of a study. rows: each with its name and `runs`, the figures of each seed."""
    done = [{seed: run for seed, run in row["runs"].items() if "error" not in run} for row in rows]
    every = [run for runs in done for run in runs.values()]
    budgets = {
        name: min((run["curve"][-1][column] for run in every if run["curve"]), default=None)
        for name, column in (("images", 1), ("seconds", 2))
    }
    for row, runs in zip(rows, done):
        found: dict[str, Any] = {}
        for score in SCORES:
            name = f"{score}_trained"
            values, first = ({s: r[name] for s, r in each.items() if name in r} for each in (runs, done[0]))
            if values:
                found[score] = spread(list(values.values()))
                if row is not rows[0]:
                    found[score]["difference"] = paired(values, first)
        for name in ("images", "train_seconds", "pairs_per_second", "peak_memory_gib"):
            if values := [run[name] for run in runs.values() if name in run]:
                found[name] = statistics.fmean(values)
        for name, column in (("images", 1), ("seconds", 2)):
            reached = [at_budget(run["curve"], column, budgets[name]) for run in runs.values() if run["curve"]]
            if reached and None not in reached:
                found[f"knn_at_equal_{name}"] = spread(reached)
        row["figures"] = found
    # They depend on the seed and on the encoder: these are those of the first row that has them.
    baselines = {
        f"{score}_{what}": spread(values)
        for what in BASELINES
        for score in SCORES
        if (
            values := next(
                filter(None, ([r[f"{score}_{what}"] for r in d.values() if f"{score}_{what}" in r] for d in done)), None
            )
        )
    }
    return {"rows": list(rows), "baselines": baselines, "equal_budget": budgets}


def table(result: dict[str, Any]) -> str:
    """A written result as Markdown."""
    results, settings = result["results"], result["settings"]
    rows, first = results["rows"], results["rows"][0]
    scores = [score for score in SCORES if any(score in row["figures"] for row in rows)]
    published = any(row["published"] is not None for row in rows)
    k = next((run["k"] for row in rows for run in row["runs"].values() if run.get("k")), None)
    names = {"knn": f"kNN (k {k})", "linear": "linear probe"}
    header = ["row", "seeds"]
    for score in scores:
        header += [names[score], f"minus {first['name']}"]
    lines = _markdown([*header, *["published"] * published])
    for row in rows:
        found = row["figures"]
        cells = [row["name"], str(max((found[score]["seeds"] for score in scores if score in found), default=0))]
        for score in scores:
            cells += [_mean(found.get(score)), _difference(found.get(score, {}).get("difference"))]
        lines.append(_line([*cells, *[_number(row["published"])] * published]))
    for what, name in BASELINES.items():
        of_this = [results["baselines"].get(f"{score}_{what}") for score in scores]
        if any(of_this):
            cells = [cell for value in of_this for cell in (_mean(value), "")]
            lines.append(_line([name, str(max(v["seeds"] for v in of_this if v)), *cells, *[""] * published]))
    budgets = results["equal_budget"]
    images, seconds = ("-" if value is None else f"{value:,.0f}" for value in budgets.values())
    header = ["row", "images seen", "training, s", "pairs/s", "peak memory, GiB"]
    lines += ["", *_markdown([*header, f"kNN at {images} images", f"kNN at {seconds} s"])]
    for row in rows:
        found = row["figures"]
        cells = [
            row["name"],
            *(_number(found.get(name), 0) for name in ("images", "train_seconds", "pairs_per_second")),
        ]
        cells.append(_number(found.get("peak_memory_gib"), 2))
        lines.append(_line([*cells, *(_mean(found.get(f"knn_at_equal_{name}")) for name in ("images", "seconds"))]))
    errors = [
        f"- {row['name']}, seed {s}: {r['error']}" for row in rows for s, r in row["runs"].items() if "error" in r
    ]
    lines += ["", "Runs that are missing above:", "", *errors] if errors else []
    return "\n".join([*lines, "", *_notes(result, settings, published)])


def _notes(result: dict[str, Any], settings: dict[str, Any], published: bool) -> list[str]:
    machine = result["machine"]
    device = ", ".join(machine["gpus"]) or f"{machine['cpu_cores']}-core {machine['cpu']}"
    seeds = ", ".join(map(str, settings["seeds"]))
    notes = [
        f"Per cent of the test images, with the standard deviation over the seeds ({seeds}). A difference is the mean "
        f"over the seeds of both rows, with its {CONFIDENCE:.0%} interval by Student's t, which one seed does not "
        "have. The initialisation of a bank counts as images and time. The last two columns compare all rows where the "
        f"shortest one ends, between two evaluations of the others. Machine: {device}; runs at a time: "
        f"{settings['jobs']}."
    ]
    return [*notes, *([f"Published: {settings['source']}."] if published else [])]


def _markdown(header: Sequence[str]) -> list[str]:
    return [_line(header), _line(["---", *["--:"] * (len(header) - 1)])]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _mean(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "-"
    deviation = found["deviation"]
    return f"{found['mean']:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _difference(found: Mapping[str, Any] | None) -> str:
    if not found or found["mean"] is None:
        return ""
    half = found["half_interval"]
    return f"{found['mean']:+.1f}" + ("" if half is None else f" ± {half:.1f}")
