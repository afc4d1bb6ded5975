"""One run from its configuration: prepare, build, resume, train, report."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from caco_fast import report
from caco_fast.build import build_trainer, settled
from caco_fast.config import Config, flat_settings, to_yaml
from caco_fast.distributed import broadcast_object, rank, world_size
from caco_fast.engine.checkpoint import CheckpointStore, resolve_resume
from caco_fast.engine.kernel_check import BankBackend, settle_banks
from caco_fast.engine.launch import launched
from caco_fast.engine.progress import log_to_console
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError

log = logging.getLogger("caco_fast.training")

# Settings that change neither the model nor what it learns from; a resumed run may change them without a warning.
FREE_SECTIONS = (
    "run.",
    "checkpoint.",
    "evaluation.",
    "wandb.",
    # It is read at the first start alone.
    "backbone.init",
    "trainer.log_every",
    "trainer.max_steps",
    "trainer.collective_timeout",
    "data.workers",
    "data.prefetch",
)


def train(config: Config, folder: Path, resume: str = "never") -> dict[str, Any]:
    """Train and evaluate; return the content of summary.json.

    `resume` is auto (the newest checkpoint of the folder, if any), never, or the path of a checkpoint.

    Raises:
        UserError: anything that the user can correct, in one line.
        Interrupted: a signal asked to stop; a checkpoint was written.
        RankLost, ReportedElsewhere: another rank failed; see engine/ranks.py.
    """
    with launched(config.trainer) as device:
        log_to_console()
        config = settled(config, device)
        run = RunFolder(folder)
        store = CheckpointStore(run.checkpoints, keep=config.checkpoint.keep)
        # Rank 0 decides, because the others may see the folder later.
        if rank() == 0:
            resume = run.resume_in_restart(resume, store.latest())
        checkpoint = broadcast_object(resolve_resume(resume, store) if rank() == 0 else None)
        state = store.load(checkpoint) if checkpoint else None
        run.claim(resume=resume, resumed_from=checkpoint)
        try:
            summary = broadcast_object(report.summary_if_done(config, run, state))
            return summary or _run(config, run, store, device, checkpoint, state)
        except RuntimeError as error:
            what, found, _ = str(error).partition(" does not have a deterministic implementation")
            if not found:
                raise
            line = f"trainer.deterministic: {what} is not on {device}; take trainer.deterministic=false"
            raise UserError(line) from None
        finally:
            run.close()


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
        banks = check_banks(config, trainer, device)
        if trainer.evaluator is not None and config.evaluation.baselines:
            report.score_baselines(config, run, trainer.evaluator, trainer.encoders.query)
        if state is not None:
            _report_changes(config, state["config"])
            trainer.load_state_dict(state, str(checkpoint))
            at = trainer.position
            log.info("resuming from %s, at %s step %d", checkpoint, at.phase, at.step)
        run.start(to_yaml(config), resumed_from=checkpoint, banks=[asdict(bank) for bank in banks])
        if not trainer.finished:
            trainer.metrics.open()
            trainer.run()
        summary = report.finish(config, run, trainer)
        if broadcast_object(trainer.save_failed):
            raise UserError(
                f"the run ended without its last checkpoint; the newest one is {store.latest() or 'none'}; make room "
                "and continue from there with --resume auto"
            )
        return summary
    finally:
        trainer.close()


def check_banks(config: Config, trainer: Trainer, device: torch.device) -> list[BankBackend]:
    """Log which backend the bank's operations run on, and why; kernels are checked first (collective)."""
    settings = config.trainer
    banks = settle_banks(
        trainer.method,
        images=-(-settings.batch_size // world_size()),
        views=sum(view.count for view in config.views),
        device=device,
        seed=settings.seed,
        timeout=settings.collective_timeout,
    )
    for bank in banks:
        log.info("%s", bank)
    return banks


def _report_changes(config: Config, before: str) -> None:
    """Log each setting that differs from those the checkpoint was made with."""
    then, now = (flat_settings(yaml.safe_load(text)) for text in (before, to_yaml(config)))
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key) and not key.startswith(FREE_SECTIONS):
            log.warning("resuming with another %s: %s, was %s", key, now.get(key), then.get(key))
