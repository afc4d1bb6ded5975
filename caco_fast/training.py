"""One run from its configuration: builds every component, resumes, trains, evaluates, and leaves its figures behind."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from caco_fast.config import Config, from_yaml, settings_of, to_yaml
from caco_fast.data import build_eval_loader, build_source, build_train_loader
from caco_fast.distributed import all_gather_objects, broadcast_object, is_distributed, rank, world_size
from caco_fast.engine.checkpoint import CheckpointStore, resolve_resume
from caco_fast.engine.compiling import compile_step
from caco_fast.engine.launch import launched
from caco_fast.engine.metrics import MetricsWriter, read_metrics
from caco_fast.engine.precision import autocast_dtype, gradient_scaler, settled_precision
from caco_fast.engine.progress import Progress, log_to_console, table
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.state import TRAINING
from caco_fast.engine.step_graph import StepGraph, build_step_graph
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError
from caco_fast.evaluate.evaluator import Evaluator
from caco_fast.methods import METHODS
from caco_fast.models import Encoder, EncoderPair, build_encoder_pair
from caco_fast.optim import Schedule, build_optimizer, peak_lr

log = logging.getLogger("caco_fast.training")

# Settings that change neither the model nor what it learns from; a resumed run may have others without a word.
FREE_SECTIONS = (
    "run.",
    "checkpoint.",
    "evaluation.",
    "wandb.",
    "trainer.log_every",
    "trainer.max_steps",
    "trainer.collective_timeout",
    "data.workers",
    "data.prefetch",
)


# Bytes of raw pixels as features, of all ranks together: every rank gathers them for the linear probe.
RAW_LIMIT = 4 * 2**30


def train(config: Config, folder: Path, resume: str = "never") -> dict[str, Any]:
    """Trains and evaluates; returns what summary.json holds.

    `resume` is auto (the newest checkpoint of the folder, if any), never, or the path of a checkpoint.

    Raises:
        UserError: whatever the user can mend, in one line.
        Interrupted: a signal asked to stop; a checkpoint was written.
        RankLost, ReportedElsewhere: see engine/ranks.py.
    """
    with launched(config.trainer) as device:
        log_to_console()
        config = settled(config, device)
        config.checkpoint.validate()
        run = RunFolder(folder)
        store = CheckpointStore(run.checkpoints, keep=config.checkpoint.keep)
        # Rank 0 decides, because the others may see the folder later.
        if rank() == 0:
            resume = run.resume_in_restart(resume, store.latest())
        checkpoint = broadcast_object(resolve_resume(resume, store) if rank() == 0 else None)
        state = store.load(checkpoint) if checkpoint else None
        run.claim(resume=resume, resumed_from=checkpoint)
        try:
            summary = broadcast_object(_summary_if_done(config, run, state))
            return summary or _run(config, run, store, device, checkpoint, state)
        except RuntimeError as error:
            what, found, _ = str(error).partition(" does not have a deterministic implementation")
            if not found:
                raise
            line = f"trainer.deterministic: {what} is not on {device}; take trainer.deterministic=false"
            raise UserError(line) from None
        finally:
            run.close()


def settled(config: Config, device: torch.device) -> Config:
    """The configuration with what depends on the device decided, so that a run's own copy says what it ran with."""
    # Rank 0 decides, because one step has one precision.
    precision = broadcast_object(settled_precision(config.trainer.precision, device))
    return replace(config, trainer=replace(config.trainer, precision=precision))


def build_trainer(
    config: Config, run: RunFolder, store: CheckpointStore, device: torch.device, resume_at: int | None = None
) -> Trainer:
    """Every component of a run, from its own section of the configuration. `resume_at`: where its metrics go on."""
    config = settled(config, device)
    if config.method not in METHODS:
        raise UserError(f"method: found '{config.method}', want one of {', '.join(METHODS)}")
    config.trainer.validate()
    config.checkpoint.validate()
    config.evaluation.validate()
    torch.manual_seed(config.trainer.seed)
    graph = build_step_graph(config.trainer, device)
    encoders = _build_encoders(config, device, graph)
    method = METHODS[config.method](getattr(config, config.method), config.projector.dim)
    method.check_views([view.size for view in config.views for _ in range(view.count)])
    method.to(device)
    if config.trainer.compile:
        compile_step(encoders, method, device)
    loader = build_train_loader(
        config.data,
        config.views,
        batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        rank=rank(),
        world_size=world_size(),
        device=device,
        dtype=autocast_dtype(config.trainer.precision, device) or torch.float32,
    )
    trainer_config, optimizer = config.trainer, config.optimizer
    batch_size = trainer_config.batch_size
    lr = peak_lr(optimizer, batch_size)
    scaler = gradient_scaler(trainer_config.precision, device)
    return Trainer(
        trainer_config,
        config.checkpoint,
        device=device,
        encoders=encoders,
        method=method,
        optimizer=build_optimizer(
            optimizer, encoders.query.parameters(), batch_size, scaler.is_enabled(), captured=graph is not None
        ),
        scaler=scaler,
        schedule=Schedule(config.schedule, lr, trainer_config.epochs, loader.steps_per_epoch),
        loader=loader,
        evaluator=_build_evaluator(config, device),
        store=store,
        metrics=MetricsWriter(
            run.path, config.run.tensorboard, config.wandb, resume_at=resume_at, run_config=settings_of(config)
        ),
        progress=Progress(
            trainer_config.epochs,
            loader.steps_per_epoch,
            trainer_config.batch_size,
            trainer_config.log_every,
            plain=True if config.run.plain else None,
        ),
        resolved_config=to_yaml(config),
        graph=graph,
    )


def _run(
    config: Config,
    run: RunFolder,
    store: CheckpointStore,
    device: torch.device,
    checkpoint: Path | None,
    state: dict[str, Any] | None,
) -> dict[str, Any]:
    trainer = build_trainer(config, run, store, device, state["position"]["total_steps"] if state else None)
    try:
        evaluator = trainer.evaluator
        if evaluator is not None and config.evaluation.baselines:
            _score_baselines(config, run, evaluator, trainer.encoders.query)
        if state is not None:
            _report_changes(config, state["config"])
            trainer.load_state_dict(state, str(checkpoint))
            at = trainer.position
            log.info("resuming from %s, at %s step %d", checkpoint, at.phase, at.step)
        run.start(to_yaml(config), resumed_from=checkpoint)
        if not trainer.finished:
            trainer.metrics.open()
            trainer.run()
        summary = _finish(config, run, trainer)
        if broadcast_object(trainer.save_failed):
            raise UserError(
                f"the run ended without its last checkpoint, the newest is {store.latest() or 'none'}; make room and "
                "go on from there with --resume auto"
            )
        return summary
    finally:
        trainer.close()


def _summary_if_done(config: Config, run: RunFolder, state: dict[str, Any] | None) -> dict[str, Any]:
    """Shows and returns the summary of a finished run that is resumed, {} where there is something left to do."""
    if rank() != 0 or state is None or state["position"]["epochs_ended"] < config.trainer.epochs:
        return {}
    summary = run.read_summary()
    here = summary.get("finished") and summary["steps"] == state["position"]["total_steps"]
    if not here or summary.get("evaluated") != _evaluated(config):
        log.info("the run in %s is complete, but not evaluated with these settings", run.path)
        return {}
    log.info("the run in %s is complete; for another one choose another run.folder", run.path)
    _show(config, run, summary)
    return summary


def _evaluated(config: Config) -> dict[str, Any]:
    """The settings that the scores in summary.json depend on, beside those of the training."""
    free = ("evaluation.every_epochs", "evaluation.batch_size")
    data = ("data.source", "data.path", "data.eval_resize", "data.eval_size", "data.mean", "data.std")
    settings = settings_of(config)
    return {
        key: value
        for key, value in settings.items()
        if key in data or (key.startswith("evaluation.") and key not in free)
    }


def _score_baselines(config: Config, run: RunFolder, evaluator: Evaluator, encoder: Encoder) -> None:
    """Raw pixels and the encoder as it was drawn, unless the summary has them for these very settings.

    Before a checkpoint is loaded, so that the encoder is the random-initialised one in a resumed run too.
    """
    asked = {"k": list(config.evaluation.k), "share": config.evaluation.train_share, "seed": config.trainer.seed}
    # Rank 0 decides, because the others may see the folder later.
    if broadcast_object(run.read_summary().get("baselines") == asked):
        return
    raw: dict[str, float] = {}
    if (size := evaluator.raw_bytes()) > RAW_LIMIT:
        log.warning(
            "evaluation.baselines: raw pixels are left out, as features they take %.0f GiB of at most %.0f GiB; "
            "evaluation.train_share makes them fewer",
            size / 2**30,
            RAW_LIMIT / 2**30,
        )
    else:
        log.info("scoring raw pixels (a linear probe of them takes some 20 s)")
        raw = _named("raw", evaluator.raw_scores())
    log.info("scoring the random-initialised encoder")
    run.summary(raw | _named("random", evaluator.scores(encoder)) | {"baselines": asked})


def _finish(config: Config, run: RunFolder, trainer: Trainer) -> dict[str, Any]:
    """The figures of the run as it now stands: summary.json, curves.png and, where it is evaluated, a table."""
    at = trainer.position
    values: dict[str, Any] = {
        "finished": trainer.finished,
        "steps": at.total_steps,
        "train_seconds": round(at.train_seconds, 1),
        "initialisation_steps": at.total_steps - at.step if at.phase == TRAINING else at.total_steps,
        # Of the present phase: a step of the initialisation does half the work of one of training.
        "pairs_per_second": round(at.step * config.trainer.batch_size / max(at.phase_seconds, 1e-9), 1),
    }
    values |= trainer.positives
    # Each rank knows those that it met itself.
    values["bad_images"] = len(set().union(*all_gather_objects(list(trainer.loader.bad_images))))
    if trainer.evaluator is not None:
        values |= _named("trained", trainer.evaluator.scores(trainer.encoders.query))
    summary = run.summary(values | {"evaluated": _evaluated(config)})
    if rank() == 0:
        # Here, because matplotlib takes a second to import and the other ranks don't need it.
        from caco_fast.engine.curves import draw_curves

        try:
            if read_metrics(run.path):
                draw_curves(run.path, summary)
        except OSError as error:
            log.error("%s can't be written: %s", run.path / "curves.png", error.strerror or error)
        _show(config, run, summary)
    return broadcast_object(summary)


def _show(config: Config, run: RunFolder, summary: dict[str, Any]) -> None:
    columns = [f"kNN {k}" for k in config.evaluation.k] + ["linear probe"] * config.evaluation.linear_probe
    keys = list(_named("{}", {f"knn_{k}": 0.0 for k in config.evaluation.k}))
    keys += ["linear_{}"] * config.evaluation.linear_probe
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
    pairs, seconds = summary["pairs_per_second"], summary["train_seconds"]
    first = summary["initialisation_steps"]
    steps = summary["steps"]
    log.info("%d steps in %.0f s, of which %d fill the bank; %s pairs/s", steps, seconds, first, f"{pairs:,.0f}")
    log.info("everything is in %s: summary.json, curves.png, metrics.jsonl, config.yaml, checkpoints/", run.path)


def _named(what: str, scores: dict[str, float]) -> dict[str, float]:
    """Scores by their names in summary.json: knn_<what> for the first k, knn_<what>_k<k> for others, linear_<what>."""
    named: dict[str, float] = {}
    for name, score in scores.items():
        kind, _, k = name.partition("_")
        first = f"{kind}_{what}" not in named
        named[f"{kind}_{what}" if first else f"{kind}_{what}_k{k}"] = round(score, 2)
    return named


def _build_encoders(config: Config, device: torch.device, graph: StepGraph | None) -> EncoderPair:
    channels = build_source(config.data, "train").channels
    autocast = autocast_dtype(config.trainer.precision, device)
    joint_views = is_distributed() if config.trainer.joint_views == "auto" else config.trainer.joint_views == "on"
    options = dict(autocast=autocast, joint_views=joint_views, ema_backend=config.optimizer.backend)
    encoders = build_encoder_pair(config.backbone, config.projector, channels, **options)
    if config.trainer.joint_views == "on" and not encoders.query.joint_views:
        raise UserError(
            f"trainer.joint_views: {config.backbone.name} has a normalisation that takes its statistics over all views "
            "of a batch; set it to auto or off"
        )
    encoders.to(device, memory_format=torch.channels_last)
    if is_distributed():
        with graph.aside() if graph is not None else nullcontext():
            encoders.distribute(device)
    return encoders


def _build_evaluator(config: Config, device: torch.device) -> Evaluator | None:
    if not config.evaluation.wanted:
        return None
    options = dict(batch_size=config.evaluation.batch_size, rank=rank(), world_size=world_size(), device=device)
    train = build_eval_loader(config.data, "train", share=config.evaluation.train_share, **options)
    test = build_eval_loader(config.data, "test", **options)
    return Evaluator(
        config.evaluation, train, test, classes=len(train.source.classes), denormalise=train.denormalise, device=device
    )


def _report_changes(config: Config, before: str) -> None:
    """Names each setting that differs from those the checkpoint was made with."""
    try:
        then = settings_of(from_yaml(before))
    except UserError as error:
        log.warning("the checkpoint's settings can't be compared with the present ones: %s", error)
        return
    now = settings_of(config)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key) and not key.startswith(FREE_SECTIONS):
            log.warning("resuming with another %s: %s, was %s", key, now.get(key), then.get(key))
