"""The picture of a comparison: final values of every row, and the kNN over the epochs."""

import statistics
from itertools import cycle
from pathlib import Path
from typing import Any

from compare_figures import BASELINES, SCORES
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from caco_fast.storage import atomic_write

COLOURS = ("#1f5fa8", "#d9660b", "#3a8a3e", "#8f4aa3", "#b3303b", "#5b6770", "#0f8f8c", "#a0782a", "#d35ea5", "#2b2b2b")
STYLES = {"raw": "--", "random": ":"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the picture of a written result as PNG."""
    results = result["results"]
    rows = [(row, colour) for row, colour in zip(results["rows"], cycle(COLOURS)) if row["figures"]]
    scores = [score for score in SCORES if any(score in row["figures"] for row, _ in rows)]
    height = max(4.2, 1.6 + 0.42 * len(rows))
    figure = Figure(figsize=(4.4 * len(scores) + 6.2, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.1))
    figure.suptitle(f"{result['settings']['study']}: per cent of the test images", x=0.01, ha="left", fontsize=12)
    panels = figure.subplots(1, len(scores) + 1, width_ratios=[*[4.4] * len(scores), 6.2], squeeze=False)[0]
    for score, axes in zip(scores, panels):
        _final(score, rows, results["baselines"], axes)
    for axes in panels[1 : len(scores)]:
        axes.tick_params(labelleft=False)
    _over_epochs(rows, results["baselines"], panels[-1])
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def _final(score: str, rows: list[tuple[dict[str, Any], str]], baselines: dict[str, Any], axes: Axes) -> None:
    """Every seed as a point, their mean as a bar across, and one standard deviation to both sides."""
    for place, (row, colour) in enumerate(rows):
        values = [run[f"{score}_trained"] for run in row["runs"].values() if f"{score}_trained" in run]
        if not values:
            continue
        found = row["figures"][score]
        axes.errorbar(found["mean"], place, xerr=found["deviation"], color=colour, capsize=4, lw=1.5)
        axes.plot(found["mean"], place, "|", color=colour, ms=18, mew=2.5)
        axes.plot(values, [place] * len(values), "o", color=colour, ms=5, alpha=0.55)
        axes.annotate(f"{found['mean']:.1f}", (found["mean"], place), (0, 11), textcoords="offset points", ha="center")
    for what, name in BASELINES.items():
        if level := baselines.get(f"{score}_{what}"):
            axes.axvline(level["mean"], color="#777777", ls=STYLES[what], lw=1.2, label=name)
    axes.set_title(f"{SCORES[score]}, at the end", loc="left", fontsize=11, fontweight="bold")
    axes.set_yticks(range(len(rows)), [row["name"] for row, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.margins(x=0.12)
    axes.grid(axis="x", color="#e5e5e5")


def _over_epochs(rows: list[tuple[dict[str, Any], str]], baselines: dict[str, Any], axes: Axes) -> None:
    """The mean over the seeds, and from the lowest to the highest seed."""
    for row, colour in rows:
        by_epoch: dict[float, list[float]] = {}
        for run in row["runs"].values():
            for epoch, _, _, value in run.get("curve", []):
                by_epoch.setdefault(epoch, []).append(value)
        epochs = sorted(by_epoch)
        axes.plot(
            epochs, [statistics.fmean(by_epoch[e]) for e in epochs], "o-", color=colour, ms=3.5, label=row["name"]
        )
        lows, highs = ([side(by_epoch[e]) for e in epochs] for side in (min, max))
        axes.fill_between(epochs, lows, highs, color=colour, alpha=0.15, lw=0)
    for what, name in BASELINES.items():
        if level := baselines.get(f"knn_{what}"):
            axes.axhline(level["mean"], color="#777777", ls=STYLES[what], lw=1.2, label=name)
    axes.set_title("kNN over the epochs", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("epoch of training, after any initialisation of a bank")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e5e5e5")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
