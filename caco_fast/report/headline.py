"""The parts of a page that say how good a run is: its headline, and its evaluations beside published numbers."""

import base64
import html
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from caco_fast.configs import first_sentence, shipped
from caco_fast.evaluation import rows_of
from caco_fast.report.dynamics import PERPLEXITY, PROBABILITY, knn
from caco_fast.report.origin import preset_of
from caco_fast.report.parts import Block, Facts, Missing, Part, Picture, Table
from caco_fast.report.run_data import RunData

FEATURES = {"raw": "raw pixels", "random": "random encoder", "trained": "trained encoder"}
# Larger pictures of an evaluation are named and not shown, so that a page stays small.
LARGEST_PICTURE = 600_000


def headline(run: RunData) -> Part:
    """What was trained, how far it is, how good it became and how fast."""
    blocks: list[Block] = []
    if (scores := score_table(run.summary)) is not None:
        blocks.append(scores)
    else:
        blocks.append(Missing(_why_no_scores(run)))
    blocks.append(Facts(list(_facts(run))))
    blocks += [Missing(problem) for problem in run.problems]
    return Part("headline", "At a glance", blocks)


def score_table(summary: Mapping[str, Any]) -> Table | None:
    """Test accuracies of the trained encoder beside those of raw pixels and of a random encoder."""
    columns = score_columns(summary)
    rows = []
    for what, name in FEATURES.items():
        values = [summary.get(key.format(what)) for key in columns]
        if any(isinstance(value, (int, float)) for value in values):
            rows.append([name, *(f"{value:.1f}" if isinstance(value, (int, float)) else "-" for value in values)])
    if not any(row[0] == FEATURES["trained"] for row in rows):
        return None
    return Table(["features", *columns.values()], rows, "Accuracy on the test images, per cent.")


def score_columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """The scores that a summary has: their keys, with {} for the features, and how a table names them."""
    evaluated = summary.get("evaluated")
    evaluated = evaluated if isinstance(evaluated, dict) else {}
    k = evaluated.get("evaluation.k") or []
    names = {("knn_{}" if place == 0 else f"knn_{{}}_k{each}"): f"kNN, k {each}" for place, each in enumerate(k)}
    names |= {"knn_{}": names.get("knn_{}", "kNN"), "linear_{}": "linear probe"}
    names["few_{}"] = f"linear, {evaluated.get('evaluation.few_labels') or 'few'} labels a class"
    return {key: name for key, name in names.items() if any(key.format(what) in summary for what in FEATURES)}


def _why_no_scores(run: RunData) -> str:
    if not run.finished and not run.summary.get("steps"):
        return "the accuracy of the trained encoder, because the run has not ended yet"
    return "the accuracy of the trained encoder, because the images have no labels, or evaluation was off"


def _facts(run: RunData) -> Iterator[tuple[str, str]]:
    header, summary = run.header, run.summary
    yield "method", run.method
    preset, known = preset_of(run)
    # What the nearest preset says of itself need not hold for this run.
    if known:
        yield "recipe", f"{preset}: {first_sentence(shipped()[preset])}"
    if header.get("model"):
        millions = header.get("parameters", 0) / 1e6
        yield "model", f"{header['model']}, {millions:.1f} M trained parameters"
    if isinstance(header.get("images"), int):
        yield "images", f"{header['images']:,} of {header.get('data')}"
    if run.settings.get("trainer.batch_size"):
        yield "batch", f"{run.settings['trainer.batch_size']:,} images a step"
    yield "length", _length(run)
    series = knn(run).series
    if series and not run.finished:
        found = ", ".join(f"{each.label} {each.y[-1]:.1f} %" for each in series)
        yield "kNN so far", f"{found} at step {series[0].x[-1]:,}"
    yield from _evaluated(run)
    if seconds := run.number("train_seconds"):
        yield "time", _time(run, seconds)
    if speed := speed_of(run):
        yield "speed", f"{speed:,.0f} image pairs/s"
    if memory := run.number("peak_memory_gib"):
        yield "peak memory", f"{memory:.1f} GiB on rank 0"
    for name, title in ((PROBABILITY, "positive probability"), (PERPLEXITY, "rows chosen as positives")):
        first, last = run.number(f"{name}_start"), run.number(f"{name}_end")
        if last is not None:
            shown = [f"{value:.3g}" for value in (first, last) if value is not None]
            yield title, " at the start, ".join(shown) + " at the end"
    for name, value in summary.items():
        if name.startswith("held_out_") and isinstance(value, (int, float)):
            yield name.removeprefix("held_out_").replace("_", " ") + " on held-out images", f"{value:.4g}"


def _evaluated(run: RunData) -> Iterator[tuple[str, str]]:
    """The headline of each evaluation, beside what papers published."""
    for name, record in run.evaluations.items():
        with suppress(KeyError, TypeError, ValueError, StopIteration):
            _, metric, found, published = next(rows_of({name: record}))
            yield name, f"{found} ({metric}); published: {published}"


def _length(run: RunData) -> str:
    epochs, per_epoch = run.settings.get("trainer.epochs"), run.header.get("steps_per_epoch")
    first = run.number("initialisation_steps")
    text = f"{run.steps:,} steps"
    if isinstance(epochs, int) and isinstance(per_epoch, int):
        # Epochs count from 0, and those of the initialisation are negative.
        done = 0 if not run.lines else max(run.lines[-1].get("epoch") or 0, 0) + 1
        text += f"; {epochs:,} epochs of {per_epoch:,}" if run.finished else f"; in epoch {done:,} of {epochs:,}"
    if first and run.finished:
        text += f" after {first:,.0f} steps that fill the bank"
    return text if run.finished else f"{text}; not finished"


def _time(run: RunData, seconds: float) -> str:
    hours = seconds / 3600
    text = f"{hours:,.1f} h" if hours >= 2 else f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
    ranks, gpus = run.header.get("ranks"), bool((run.starts[-1].get("machine") or {}).get("gpus")) if run.starts else 0
    if gpus and isinstance(ranks, int) and not str(run.header.get("device", "")).startswith("the CPU"):
        text += f" on {ranks} GPUs, {hours * ranks:,.1f} GPU hours"
    return text


def speed_of(run: RunData) -> float | None:
    """Image pairs per second, of the summary or of the last log lines."""
    if speed := run.number("pairs_per_second"):
        return speed
    last = [line["pairs_per_second"] for line in run.lines[-20:] if isinstance(line.get("pairs_per_second"), float)]
    return sum(last) / len(last) if last else None


def evaluations(run: RunData) -> Part:
    """Every result in evaluation/, each next to what papers published, with its pictures."""
    lead = "Results of `caco-fast evaluate`, beside published ones. Per cent, unless the name says otherwise."
    if not run.evaluations:
        reason = f"evaluations by the protocols of papers; make them with: caco-fast evaluate {run.folder} knn linear"
        return Part("evaluations", "Evaluations", [Missing(reason)])
    blocks: list[Block] = []
    rows: list[list[str]] = []
    notes: list[tuple[str, str]] = []
    for name, record in run.evaluations.items():
        try:
            own = [[*row, _weights(record) if row[0] else ""] for row in rows_of({name: record})]
        except (KeyError, TypeError, ValueError):
            blocks.append(Missing(f"evaluation/{name}.json, which is of another version"))
            continue
        rows += own
        notes += _notes(name, record)
        blocks += _pictures(run.folder / "evaluation", name, record)
    if rows:
        blocks.insert(0, Table(["protocol", "what", "found", "published", "weights"], rows))
    if notes:
        blocks.insert(1, Facts(notes))
    return Part("evaluations", "Evaluations", blocks, lead)


def _weights(record: Mapping[str, Any]) -> str:
    step = (record.get("source") or {}).get("step")
    return f"step {step:,}" if isinstance(step, int) else "-"


def _notes(name: str, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, found in (record.get("deviations") or {}).items():
        yield name, f"{key} is {found.get('found')}, the preset has {found.get('preset')}"
    for note in record.get("notes") or []:
        yield name, str(note)


def _pictures(folder: Path, name: str, record: Mapping[str, Any]) -> Iterator[Block]:
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}
    for file in record.get("files") or []:
        path = folder / Path(str(file)).name
        if path.suffix not in kinds:
            continue
        if not path.is_file() or path.stat().st_size > LARGEST_PICTURE:
            yield Missing(f"the picture {path.name} of {name}, which is {'too large' if path.is_file() else 'gone'}")
            continue
        data = base64.b64encode(path.read_bytes()).decode()
        alt = f"picture {path.stem} of the evaluation {name}"
        content = f'<img src="data:image/{kinds[path.suffix]};base64,{data}" alt="{html.escape(alt)}">'
        yield Picture(content, alt, f"{name}: {path.name}")
