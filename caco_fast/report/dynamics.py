"""The parts of a page that show metrics.jsonl: the paper's Fig. 4, the training, and the speed."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle

from caco_fast.engine.curves import BASELINES, COLOURS, trained
from caco_fast.report.parts import Block, Missing, Part, Picture
from caco_fast.report.plots import Frame, Panel, Series, curves
from caco_fast.report.run_data import RunData

PROBABILITY, PERPLEXITY = "positive_probability", "positive_perplexity"
NO_LINES = "metrics.jsonl has no line yet; the run writes one every trainer.log_every steps"
# Of the speed: title, unit, and by what a value is multiplied.
SPEED: Mapping[str, tuple[str, str, float]] = {
    "pairs_per_second": ("speed", "image pairs/s", 1.0),
    "data_wait": ("wait for images", "% of the time", 100.0),
    "peak_memory_gib": ("peak memory", "GiB", 1.0),
    "loss_scale": ("loss scale of fp16", "", 1.0),
}
TITLES = {"lr": "learning rate", "bank_lr": "learning rate of the bank", "key_momentum": "momentum of the key encoder"}
# What is drawn together, under a title.
TOGETHER = {"attraction": "attraction and repulsion", "repulsion": "attraction and repulsion"}


def dynamics(run: RunData) -> Part:
    """The paper's Fig. 4: do the positives become probable, and do the features become better with them?"""
    found = [panel for panel in (_probability(run), knn(run), _rows(run)) if panel.series]
    if not found:
        reason = NO_LINES if not run.lines else f"{run.method} measures no positive probability, and kNN is off here"
        return Part("dynamics", "Positives and accuracy", [Missing(reason)])
    lead = "The paper's Fig. 4, over one axis." if len(found) > 1 else ""
    if PROBABILITY in run.curves and knn(run).series:
        lead += " In a healthy run the chosen positive becomes more probable while the accuracy of the features rises."
    frame = frame_of(run)
    caption = "Shaded: the steps that fill the bank." if frame.shaded is not None else ""
    if frame.marks:
        caption += f" Dotted upright lines: {', '.join(sorted(set(frame.marks.values())))}."
    blocks: list[Block] = [curves(found, frame, f"{'; '.join(map(told, found))}.", caption.strip())]
    if not knn(run).series:
        blocks.append(Missing("kNN during the run; it needs labelled test images, and evaluation.every_epochs above 0"))
    return Part("dynamics", "Positives and accuracy", blocks, lead)


def training(run: RunData) -> Part:
    """Loss, rates, and whatever else the method measures."""
    if not run.lines:
        return Part("training", "Loss and rates", [Missing(NO_LINES)])
    shown = (PROBABILITY, PERPLEXITY)
    names = [name for name in run.curves if trained(name) not in shown and not name.startswith("knn")]
    grouped: dict[str, list[str]] = {}
    for name in sorted((name for name in names if name not in SPEED), key=_order):
        key = trained(name)
        grouped.setdefault(TOGETHER.get(key) or TITLES.get(key) or key.replace("_", " "), []).append(name)
    panels = [Panel(title, "", series_of(run, found, title)) for title, found in grouped.items()]
    return Part("training", "Loss and rates", [_small(panels, run)] if panels else [Missing(NO_LINES)])


def speed(run: RunData) -> Part:
    """Pairs per second, the wait for images, and memory."""
    panels = []
    for name in (name for name in SPEED if name in run.curves):
        title, unit, scale = SPEED[name]
        x, y = run.points(name)
        panels.append(Panel(title, unit, [Series(title, x, [scale * each for each in y], COLOURS[0])], from_zero=True))
    lead = "A wait for images of more than some per cent means that the loader is slower than the model."
    blocks: list[Block] = [_small(panels, run)] if panels else [Missing(NO_LINES)]
    return Part("speed", "Speed and memory", blocks, lead if panels else "")


def knn(run: RunData) -> Panel:
    """The kNN accuracies of the run, with the levels of raw pixels and of the random encoder for the first k."""
    asked = (run.summary.get("evaluated") or {}).get("evaluation.k") or run.settings.get("evaluation.k") or []
    first = [f"knn_{k}" for k in asked] if isinstance(asked, list) else []
    names = sorted((name for name in run.curves if name.startswith("knn")), key=lambda name: (len(name), name))
    names = [name for name in first if name in names] + [name for name in names if name not in first]
    series = [
        Series(name.replace("knn_", "k "), *run.points(name), colour) for name, colour in zip(names, cycle(COLOURS))
    ]
    levels = []
    if series:
        for key, (label, style) in BASELINES.items():
            if (level := run.number(f"knn_{key}")) is not None:
                levels.append((label, level, series[0].colour, style))
    return Panel("kNN accuracy", "per cent", series, levels=levels)


def frame_of(run: RunData) -> Frame:
    """The axis of a run's pictures: its steps, the initialisation, and where it was resumed."""
    initialised = [line["step"] for line in run.lines if (line.get("epoch") or 0) < 0]
    marks = {}
    for start in run.starts:
        if found := re.search(r"step_0*(\d+)\.pt$", str(start.get("resumed_from") or "")):
            marks[float(found[1])] = "the run was resumed"
    return Frame("step", max(run.steps, 1), max(initialised, default=None), marks)


def series_of(run: RunData, names: Sequence[str], title: str) -> list[Series]:
    """Series of one panel: on training and on held-out images, or of several measurements."""
    several = len({trained(name) for name in names}) > 1
    labels = {name: trained(name).replace("_", " ") if several else title for name in names}
    return [
        Series(
            f"{labels[name]}, held-out images" if name != trained(name) else labels[name],
            *run.points(name),
            colour,
        )
        for name, colour in zip(names, cycle(COLOURS))
    ]


def told(panel: Panel) -> str:
    """What a panel shows, in words: for readers who can't see it."""

    def ends(series: Series) -> str:
        span = f"from {series.y[0]:.3g} to {series.y[-1]:.3g}" if len(series.y) > 1 else f"{series.y[0]:.3g}"
        return f"{series.label} {span}" if series.label != panel.title else span

    return f"{panel.title}: {', '.join(map(ends, panel.series))}"


def _probability(run: RunData) -> Panel:
    names = [name for name in run.curves if trained(name) == PROBABILITY]
    series = series_of(run, names, "positive probability")
    return Panel("positive probability", "log scale", [above_zero(each) for each in series], log=True)


def above_zero(series: Series) -> Series:
    """The points that a logarithmic axis can show."""
    kept = [(x, y) for x, y in zip(series.x, series.y) if y > 0]
    return Series(series.label, [x for x, _ in kept], [y for _, y in kept], series.colour)


def _rows(run: RunData) -> Panel:
    names = [name for name in run.curves if trained(name) == PERPLEXITY]
    return Panel("rows chosen as positives", "perplexity", series_of(run, names, "rows chosen"), from_zero=True)


def _small(panels: Sequence[Panel], run: RunData) -> Picture:
    return curves(panels, frame_of(run), f"{'; '.join(map(told, panels))}.", columns=2)


def _order(name: str) -> tuple[int, str]:
    known = ["loss", *TOGETHER, "gradient_norm", "lr", "bank_lr", "key_momentum"]
    key = trained(name)
    return (known.index(key) if key in known else 3, name)
