"""An overview of a run: `curves.png`, small plots over the steps, from the run folder's metrics.jsonl."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from caco_fast.engine.metrics import read_metrics
from caco_fast.errors import UserError
from caco_fast.storage import atomic_write

Points = tuple[list[float], list[float]]
COLOURS = ("#1f5fa8", "#d9660b", "#3a8a3e", "#8f4aa3")
INITIALISATION = "#ece7da"
COLUMNS = 3
KNN = "weighted kNN"
# By their names in the summary: label and line style.
BASELINES = {"raw": ("raw pixels", "--"), "random": ("random encoder", ":")}


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    belongs: Callable[[str], bool]
    from_zero: bool = True
    own_scales: bool = False


def trained(name: str) -> str:
    """The name of the same measurement on the training images: those on held-out images share its panel."""
    return name.removeprefix("held_out_")


# What describes the machine or the schedule: the report has it, and an overview does without it.
BESIDE = """step epoch time gradient_norm key_momentum data_wait peak_memory_gib bad_images skipped_rows skipped_steps
loss_scale""".split()
PANELS = (
    Panel("loss", "nats", lambda name: trained(name) == "loss", from_zero=False),
    Panel("positive probability", "", lambda name: trained(name) == "positive_probability"),
    Panel("rows chosen as positives", "perplexity", lambda name: trained(name) == "positive_perplexity"),
    Panel(KNN, "per cent", lambda name: name.startswith("knn"), from_zero=False),
    Panel("attraction and repulsion", "", lambda name: trained(name) in ("attraction", "repulsion"), from_zero=False),
    # Rates differ by orders of magnitude (encoder 0.3, bank 3), so two scales show the shape of both.
    Panel("learning rates", "", lambda name: name == "lr" or name.endswith("_lr"), own_scales=True),
    Panel("speed", "pairs/s", lambda name: name == "pairs_per_second"),
)


def draw_curves(run_folder: Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Draw `curves.png` and return its path. What a run does not measure has no panel.

    Steps of the bank's initialisation (negative epochs) are shaded. If the run's `summary` has scores of raw pixels and
    of the random encoder, they are drawn in the kNN panel. Raises UserError if the run has no metrics.
    """
    run_folder = Path(run_folder)
    lines = read_metrics(run_folder)
    if not lines:
        raise UserError(f"curves: {run_folder} has no metrics.jsonl with a line in it")
    initialised = max((line["step"] for line in lines if (line.get("epoch") or 0) < 0), default=None)
    panels = panels_of(lines)
    rows = -(-max(len(panels), 1) // COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.1, wspace=0.03)
    figure = Figure(figsize=(4.5 * COLUMNS, 3.6 * rows), dpi=120, layout=layout)
    shading = " (shaded: initialisation of the bank)" if initialised is not None else ""
    result = _result(lines, summary or {})
    headline = f"{run_folder.resolve().name}: {result}{lines[-1]['step']:,} steps{shading}"
    figure.suptitle(headline, x=0.01, ha="left", fontsize=12)
    grid = figure.subplots(rows, COLUMNS).flat
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for panel, axes in zip(panels, grid):
        _draw(panel, axes, lines, initialised)
        if panel.title == KNN:
            _draw_baselines(axes, summary or {})
    path = run_folder / "curves.png"
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
    return path


def panels_of(lines: list[dict[str, Any]]) -> list[Panel]:
    """The panels that have something to show, and one for each other measurement of the method."""
    names = {name: None for line in lines for name in line if name not in BESIDE}
    measured = [name for name in names if points(lines, name)[0]]
    known = [panel for panel in PANELS if any(map(panel.belongs, measured))]
    others = {trained(name) for name in measured if not any(panel.belongs(name) for panel in PANELS)}
    return known + [own_panel(name) for name in sorted(others)]


def own_panel(name: str) -> Panel:
    """A panel of one measurement and of the same on held-out images."""
    return Panel(name.replace("_", " "), "", lambda other: trained(other) == name, from_zero=False)


def _result(lines: list[dict[str, Any]], summary: Mapping[str, Any]) -> str:
    """The last kNN accuracy with the first k, and the baselines, as the beginning of the headline."""
    k = next(iter((summary.get("evaluated") or {}).get("evaluation.k", [])), None)
    values = points(lines, f"knn_{k}")[1]
    if not values:
        return ""
    baselines = [
        f"{label} {format_value(summary[f'knn_{name}'])}"
        for name, (label, _) in BASELINES.items()
        if f"knn_{name}" in summary
    ]
    return ", ".join([f"kNN (k {k}) {format_value(values[-1])} %", *baselines]) + "; "


def _draw_baselines(axes: Axes, summary: Mapping[str, Any]) -> None:
    """Draw each baseline as a level line in the colour of its k, and name the line styles below the title."""
    curves = {str(line.get_gid()): line for line in axes.get_lines()}
    drawn = set()
    for position, k in enumerate((summary.get("evaluated") or {}).get("evaluation.k", [])):
        for name, (label, style) in BASELINES.items():
            level = summary.get(f"knn_{name}" if position == 0 else f"knn_{name}_k{k}")
            if level is not None and (curve := curves.get(f"knn_{k}")) is not None:
                axes.axhline(level, color=curve.get_color(), ls=style, lw=1.2)
                drawn.add(f"{'- -' if style == '--' else '· ·'} {label}")
    if drawn:
        axes.set_title(", ".join(sorted(drawn)), loc="right", fontsize=9, color="#555555")


def _draw(panel: Panel, axes: Axes, lines: list[dict[str, Any]], initialised: int | None) -> None:
    names = sorted({name for line in lines for name in line if panel.belongs(name)}, key=lambda name: (len(name), name))
    series = {name: found for name in names if (found := points(lines, name))[0]}
    first, last = min(line["step"] for line in lines), max(line["step"] for line in lines)
    pad = 0.03 * (last - min(first, 0)) or 1
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_xlim(min(first, 0) - pad, last + pad)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.25)
    if initialised is not None:
        axes.axvspan(min(first, 0) - pad, initialised, color=INITIALISATION, zorder=0)
    two_scales = panel.own_scales and len(series) == 2
    scales = [axes, axes.twinx()] if two_scales else [axes] * len(series)
    drawn = []
    for scale, colour, (name, (steps, values)) in zip(scales, cycle(COLOURS), series.items()):
        mark = "o" if len(steps) <= 40 else None
        drawn += scale.plot(steps, values, color=colour, lw=1.6, marker=mark, ms=3.5, label=_label(name), gid=name)
        scale.yaxis.set_major_locator(MaxNLocator(5))
        scale.margins(y=0.12)
        if panel.from_zero:
            scale.set_ylim(bottom=0)
        if panel.unit == "pairs/s":
            scale.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if two_scales:
            scale.set_ylabel(_label(name), color=colour)
            scale.tick_params(axis="y", colors=colour)
            scale.spines["top"].set_visible(False)
    if len(series) == 1 and not panel.own_scales:
        steps, values = next(iter(series.values()))
        # Loss and probability mean something else in the initialisation, so the comparison begins after it.
        trained = [value for step, value in zip(steps, values) if initialised is None or step > initialised] or values
        ends = f"{format_value(trained[0])} \u2192 {format_value(trained[-1])}"
        axes.set_title(ends, loc="right", fontsize=10, color="#555555")
    elif not two_scales:
        for line, (_, values) in zip(drawn, series.values()):
            line.set_label(f"{line.get_label()}: {format_value(values[-1])}")
        axes.legend(handles=drawn, fontsize=9, loc="lower right", framealpha=0.85, edgecolor="none")


def points(lines: list[dict[str, Any]], name: str) -> Points:
    """Steps and values of a series. Values that are not finite are left out, so that the curve has no gaps."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _label(name: str) -> str:
    return name.replace("_", " ").replace("knn", "k")


def format_value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 20 else f"{value:.3g}"
