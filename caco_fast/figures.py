"""The figures of a run: baselines before it, summary.json, the curves and the table at its end."""

import logging
from pathlib import Path
from typing import Any

import torch

from caco_fast.config import Config, settings_of
from caco_fast.distributed import all_gather_objects, broadcast_object, rank, world_size
from caco_fast.engine.metrics import add_pictures, peak_memory, read_metrics
from caco_fast.engine.progress import table
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.trainer import Trainer
from caco_fast.evaluate.evaluator import Evaluator
from caco_fast.evaluate.held_out import describe
from caco_fast.models import Encoder

log = logging.getLogger("caco_fast.training")

# Bytes of raw pixels as features, of all ranks together.
RAW_LIMIT = 4 * 2**30


def facts(config: Config, trainer: Trainer) -> dict[str, Any]:
    """What runs: model, data, batch, device. The header of the log shows it, and environment.json keeps it."""
    device, ranks = trainer.step.device, world_size()
    gpu = device.type == "cuda"
    return {
        "method": config.method,
        "epochs": config.trainer.epochs,
        "steps_per_epoch": trainer.loader.steps_per_epoch,
        "model": config.backbone.name,
        "parameters": sum(p.numel() for p in [*trainer.encoders.query.parameters(), *trainer.method.parameters()]),
        "precision": config.trainer.precision,
        "device": torch.cuda.get_device_name(device) if gpu else f"the CPU (threads: {torch.get_num_threads()})",
        "ranks": ranks,
        "images": trainer.loader.length,
        "data": config.data.path or config.data.source,
        "loader": type(trainer.loader).__module__.rpartition(".")[2],
        "batch_size": config.trainer.batch_size,
        "images_of_a_rank": config.trainer.batch_size // ranks,
        "parts": config.trainer.accumulate,
    }


def announce(found: dict[str, Any], folder: Path) -> None:
    """Log the header of a run."""
    log.info("{method}: {epochs:,} epochs of {steps_per_epoch:,} steps".format(**found) + f", in {folder.resolve()}")
    log.info("model: {model} with {parameters:,} trained parameters, in {precision} on {device}".format(**found))
    log.info("images: {images:,} of {data}, by the loader {loader}".format(**found))
    of_a_rank = "{images_of_a_rank:,} on each of {ranks} ranks" if found["ranks"] > 1 else "on one rank"
    parts = " in {parts} parts" if found["parts"] > 1 else ""
    log.info(f"batch: {{batch_size:,}} images a step, {of_a_rank}{parts}".format(**found))


def summary_if_done(config: Config, run: RunFolder, state: dict[str, Any] | None) -> dict[str, Any]:
    """Show and return the summary of a finished run that is resumed; {} if there is something left to do.

    state: the checkpoint that the run would resume from. Rank 0 alone looks.
    """
    if rank() != 0 or state is None or state["position"]["epochs_ended"] < config.trainer.epochs:
        return {}
    summary = run.read_summary()
    here = summary.get("finished") and summary["steps"] == state["position"]["total_steps"]
    if not here or summary.get("evaluated") != _evaluated(config):
        log.info("the run in %s is complete, but not evaluated with these settings", run.path)
        return {}
    log.info("the run in %s is complete; for another one choose another run.folder", run.path)
    show(config, run, summary)
    return summary


def baselines(config: Config, run: RunFolder, evaluator: Evaluator, encoder: Encoder) -> dict[str, Any]:
    """The scores of raw pixels and of the random-initialised encoder, for the summary (collective).

    {} if the summary has them for these settings. Call it before a checkpoint is loaded, so that the encoder is the
    random-initialised one in a resumed run too.
    """
    asked = {"k": list(config.evaluation.k), "share": config.evaluation.train_share, "seed": config.trainer.seed}
    # Rank 0 decides, because the others may see the folder later.
    if broadcast_object(run.read_summary().get("baselines") == asked):
        return {}
    raw: dict[str, float] = {}
    if (size := evaluator.raw_bytes()) > RAW_LIMIT:
        log.warning(
            "evaluation.baselines: raw pixels are left out: as features they take %.0f GiB, and at most %.0f GiB are "
            "allowed; lower evaluation.train_share",
            size / 2**30,
            RAW_LIMIT / 2**30,
        )
    else:
        log.info("scoring raw pixels (a linear probe of them takes some 20 s)")
        raw = _named("raw", evaluator.raw_scores())
    log.info("scoring the random-initialised encoder")
    return raw | _named("random", evaluator.scores(encoder)) | {"baselines": asked}


def finish(config: Config, run: RunFolder, trainer: Trainer) -> dict[str, Any]:
    """Write summary.json and curves.png, show the figures, and return the summary (collective)."""
    at = trainer.position
    own_steps = max(at.step - at.imported_steps, 0)
    values: dict[str, Any] = {
        "finished": trainer.finished,
        "steps": at.total_steps,
        "train_seconds": round(at.train_seconds, 1),
        "initialisation_steps": at.total_steps - at.step if trainer.training else at.total_steps,
        # Of the present phase: a step of the initialisation does half the work of a step of training.
        "pairs_per_second": round(own_steps * config.trainer.batch_size / max(at.phase_seconds, 1e-9), 1),
        # Of rank 0 since its last start, before the final evaluation.
        "peak_memory_gib": round(peak_memory(trainer.step.device) / 2**30, 3),
    }
    if at.imported_steps:
        values["imported_steps"] = at.imported_steps
    values |= trainer.positives
    # Each rank knows the bad images that it met itself.
    values["bad_images"] = len(set().union(*all_gather_objects(list(trainer.loader.bad_images))))
    if trainer.evaluator is not None:
        # The kNN of the last epoch is still that of these weights.
        known = trainer.scores is not None and trainer.scores[0] == at.total_steps
        scores = trainer.evaluator.scores(trainer.encoders.query, trainer.scores[1] if known else None)
        values |= _named("trained", scores)
    summary = run.summary(values | {"evaluated": _evaluated(config)})
    if rank() == 0:
        _draw(run, summary)
        show(config, run, summary)
    return broadcast_object(summary)


def publish(config: Config, run: RunFolder, device: torch.device, again: bool) -> None:
    """Make the page of a run, give its pictures to TensorBoard, and log where it is. Rank 0 calls it, after the others.

    Nothing of the run depends on it, so an error is one line of the log. again: also where there is a page already.
    """
    if not config.run.report:
        return
    # Imported here, because matplotlib takes a second to import and the other ranks don't need it.
    from caco_fast.report.write import PAGE, ReportConfig, pictures_of, write_report

    try:
        path = run.path / PAGE
        if again or not path.exists():
            path, parts = write_report([run.path], ReportConfig(), device)
            if config.run.tensorboard:
                add_pictures(run.path, pictures_of(run.path, parts), run.read_summary()["steps"])
        log.info("the page of the run: %s", path)
    except Exception as error:
        log.error(
            "the page of the run can't be made: %s: %s; nothing else is missing, and `caco-fast report %s` tries again",
            *(type(error).__name__, " ".join(str(error).split()), run.path),
        )


def show(config: Config, run: RunFolder, summary: dict[str, Any]) -> None:
    """Log the figures of a summary, and its scores as a table."""
    few = config.evaluation.few_labels
    columns = [f"kNN {k}" for k in config.evaluation.k] + ["linear probe"] * config.evaluation.linear_probe
    columns += [f"linear, {few} labels a class"] if few else []
    keys = list(_named("{}", {f"knn_{k}": 0.0 for k in config.evaluation.k}))
    keys += ["linear_{}"] * config.evaluation.linear_probe + ["few_{}"] * (few > 0)
    names = {"raw": "raw pixels", "random": "random encoder", "trained": "trained encoder"}
    rows = [
        [name, *(float(summary[key.format(what)]) for key in keys)]
        for what, name in names.items()
        if all(key.format(what) in summary for key in keys)
    ]
    if rows:
        table("test accuracy, per cent", ["features", *columns], rows)
    if "positive_probability_start" in summary:
        start, end = summary["positive_probability_start"], summary["positive_probability_end"]
        log.info("mean probability of the chosen positive: %.4f at the start, %.4f at the end", start, end)
    if held_out := {name: value for name, value in summary.items() if name.startswith("held_out_")}:
        log.info("at the end: %s", describe(held_out))
    pairs, seconds = summary["pairs_per_second"], summary["train_seconds"]
    first = summary["initialisation_steps"]
    steps = summary["steps"] - summary.get("imported_steps", 0)
    log.info("%d steps in %.0f s, of which %d fill the bank; %s pairs/s", steps, seconds, first, f"{pairs:,.0f}")
    log.info("everything is in %s: summary.json, curves.png, metrics.jsonl, config.yaml, checkpoints/", run.path)


def _draw(run: RunFolder, summary: dict[str, Any]) -> None:
    # Imported here, because matplotlib takes a second to import and the other ranks don't need it.
    from caco_fast.engine.curves import draw_curves

    try:
        if read_metrics(run.path):
            draw_curves(run.path, summary)
    except OSError as error:
        log.error("%s can't be written: %s", run.path / "curves.png", error.strerror or error)


def _evaluated(config: Config) -> dict[str, Any]:
    """The settings that the scores in summary.json depend on, besides those of the training."""
    free = ("evaluation.every_epochs", "evaluation.batch_size", "evaluation.held_out")
    data = ("data.source", "data.path", "data.eval_resize", "data.eval_size", "data.mean", "data.std")
    settings = settings_of(config)
    return {
        key: value
        for key, value in settings.items()
        if key in data or (key.startswith("evaluation.") and key not in free)
    }


def _named(what: str, scores: dict[str, float]) -> dict[str, float]:
    """Scores by their names in summary.json: knn_<what> for the first k, knn_<what>_k<k> for others, linear_<what>."""
    named: dict[str, float] = {}
    for name, score in scores.items():
        kind, _, k = name.partition("_")
        first = f"{kind}_{what}" not in named
        named[f"{kind}_{what}" if first else f"{kind}_{what}_k{k}"] = round(score, 2)
    return named
