"""Several runs on one page: a table of their figures, their curves on the same axes, and the settings that differ."""

import os
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from caco_fast.engine.curves import COLOURS
from caco_fast.report import dynamics, headline
from caco_fast.report.origin import PLACES, told
from caco_fast.report.parts import Block, Facts, Missing, Part, Table
from caco_fast.report.plots import Frame, Panel, Series, curves
from caco_fast.report.run_data import RunData

# Beyond the colours of other curves; more runs than these share colours.
MORE_COLOURS = ("#b3261e", "#00797a", "#7a6000", "#6b6b6b")
# Name in metrics.jsonl, title, unit.
CURVES = (
    ("positive_probability", "positive probability", "log scale"),
    ("positive_perplexity", "rows chosen as positives", "perplexity"),
    ("loss", "loss", "nats"),
    ("gradient_norm", "gradient norm", ""),
    ("lr", "learning rate", ""),
    ("pairs_per_second", "speed", "image pairs/s"),
    ("peak_memory_gib", "peak memory", "GiB"),
)


def parts(runs: Sequence[RunData], page: Path) -> Iterator[Part]:
    """The parts of a page on several runs. page: where it will be, for the links to the pages of the runs."""
    names = distinct_names(runs)
    yield Part("headline", "At a glance", [_table(runs, names), *_problems(runs, names)])
    yield _curves(runs, names)
    yield _settings(runs, names)
    yield Part("pages", "Pages of the runs", [Facts([(name, _page(run, page)) for name, run in zip(names, runs)])])


def distinct_names(runs: Sequence[RunData]) -> list[str]:
    """The names of the folders, with as many of the folders above as tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def _table(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    columns: dict[str, str] = {}
    for run in runs:
        # The k of a run that has no scores yet are not known.
        columns |= headline.score_columns(run.summary) if "evaluated" in run.summary else {}
    header = ["run", "method", *columns.values(), "steps", "batch", "pairs/s", "hours", "GiB", "state"]
    rows = []
    for name, run in zip(names, runs):
        scores = [run.number(key.format("trained")) for key in columns]
        speed, seconds, memory = headline.speed_of(run), run.number("train_seconds"), run.number("peak_memory_gib")
        rows.append(
            [
                *(name, run.method),
                *(f"{score:.1f}" if score is not None else "-" for score in scores),
                *(f"{run.steps:,}", told(run.settings.get("trainer.batch_size", "-"))),
                f"{speed:,.0f}" if speed else "-",
                f"{seconds / 3600:.2f}" if seconds else "-",
                f"{memory:.1f}" if memory else "-",
                "finished" if run.finished else "not finished",
            ]
        )
    return Table(header, rows, "Accuracies of the trained encoders on the test images, per cent.")


def _problems(runs: Sequence[RunData], names: Sequence[str]) -> Iterator[Missing]:
    for name, run in zip(names, runs):
        for problem in run.problems:
            yield Missing(f"{name}: {problem}")


def _curves(runs: Sequence[RunData], names: Sequence[str]) -> Part:
    # At equal images runs of different batches are compared fairly.
    batches = [run.settings.get("trainer.batch_size") for run in runs]
    scales = [batch for batch in batches if isinstance(batch, int)]
    known = len(scales) == len(runs)
    scales = scales if known else [1] * len(runs)
    last = max((run.steps * scale for run, scale in zip(runs, scales)), default=1)
    frame = Frame("images seen" if known else "step", max(last, 1))
    panels = [panel for panel in _panels(runs, names, scales) if panel.series]
    lead = "One colour for each run, on the same axes. Losses of different methods can't be compared by their height."
    blocks: list[Block] = [Missing(dynamics.NO_LINES)]
    if panels:
        blocks = [curves(panels, frame, f"{'; '.join(map(dynamics.told, panels))}.", columns=2)]
    return Part("curves", "Curves", blocks, lead if panels else "")


def _panels(runs: Sequence[RunData], names: Sequence[str], scales: Sequence[int]) -> Iterator[Panel]:
    def series(of_run: Sequence[tuple[RunData, str]], log: bool = False) -> list[Series]:
        found = []
        for (run, key), name, scale, colour in zip(of_run, names, scales, cycle(COLOURS + MORE_COLOURS)):
            x, y = run.points(key)
            each = Series(_brief(name), [scale * at for at in x], y, colour)
            found.append(dynamics.above_zero(each) if log else each)
        return [each for each in found if each.x]

    for k in _shared_k(runs):
        yield Panel(f"kNN accuracy, k {k}", "per cent", series([(run, f"knn_{k}") for run in runs]))
    for key, title, unit in CURVES:
        log = unit == "log scale"
        yield Panel(title, unit, series([(run, key) for run in runs], log), log=log)


def _brief(name: str) -> str:
    """A name that a legend has room for."""
    return name if len(name) <= 28 else f"{name[:14]}\u2026{name[-13:]}"


def _shared_k(runs: Sequence[RunData]) -> list[str]:
    """The k of kNN that most runs have, at most two of them, so that the picture stays small."""
    count: dict[str, int] = {}
    for run in runs:
        for name in run.curves:
            if name.startswith("knn_"):
                count[name.removeprefix("knn_")] = count.get(name.removeprefix("knn_"), 0) + 1
    return sorted(count, key=lambda k: -count[k])[:2]


def _settings(runs: Sequence[RunData], names: Sequence[str]) -> Part:
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in PLACES)
    rows = []
    for key in keys:
        values = [told(run.settings[key]) if key in run.settings and run.reads(key) else "-" for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return Part("settings", "Settings that differ", [], "All settings are equal.")
    return Part("settings", "Settings that differ", [Table(["setting", *names], rows)])


def _page(run: RunData, page: Path) -> str:
    own = run.folder / "report" / "index.html"
    where = os.path.relpath(own.resolve(), page.parent.resolve())
    return where if own.is_file() else f"no page yet; caco-fast report {run.folder} makes it"
