"""One run from its configuration: prepare, build, resume, train, report."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from caco_fast import figures, provenance
from caco_fast.bank import LearnableBank
from caco_fast.build import build_trainer, settled
from caco_fast.config import Config, flat_settings, settings_of, to_yaml
from caco_fast.data.loaders.base import image_list_id
from caco_fast.distributed import broadcast_object, rank, world_size
from caco_fast.engine.agreement import on_rank_0, require_equal_starts, together
from caco_fast.engine.checkpoint import CheckpointStore, resolve_resume
from caco_fast.engine.kernel_check import BankBackend, settle_banks
from caco_fast.engine.launch import launched
from caco_fast.engine.metrics import peak_memory
from caco_fast.engine.progress import log_to_console
from caco_fast.engine.rehearsal import rehearse
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError
from caco_fast.models.weights import split_choices
from caco_fast.pretrained.released import imported_state, read_released

log = logging.getLogger("caco_fast.training")

# The first step also allocates and loads libraries.
REHEARSED_STEPS = 2

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
    "trainer.max_hours",
    "trainer.profile",
    "trainer.collective_timeout",
    "data.workers",
    "data.prefetch",
)


def train(
    config: Config, folder: Path, resume: str = "never", released: str = "", trust: bool = False
) -> dict[str, Any]:
    """Train and evaluate; return the content of summary.json.

    `resume` is auto (the newest checkpoint of the folder, if any), never, or the path of a checkpoint.
    `released` is a checkpoint of CaCo or AdCo that a run without a checkpoint continues from: FILE, or FILE@epoch=N to
    continue at another epoch of the schedule. `trust`: whether pickled classes in it are loaded, which runs its code.

    Raises:
        UserError: anything that the user can correct, in one line.
        Interrupted: a signal asked to stop; a checkpoint was written.
        RankLost, ReportedElsewhere: another rank failed; see engine/ranks.py.
    """
    run = RunFolder(folder)
    try:
        with _started(config) as (config, device):
            # Before the store, which removes what killed runs left behind.
            together(run.reserve)
            store = CheckpointStore(run.checkpoints, keep=config.checkpoint.keep)
            # Rank 0 decides, because the others may see the folder later.
            checkpoint = on_rank_0(lambda: _resumed_from(run, store, resume))
            state = together(lambda: store.load(checkpoint)) if checkpoint else None
            known = broadcast_object(figures.summary_if_done(config, run, state))
            if known:
                _claim(run, checkpoint)
            summary = known or _run(config, run, store, device, checkpoint, state, released, trust)
            first = rank() == 0
        # The ranks have parted, so that none of them waits for the page.
        if first:
            figures.publish(config, run, device, again=not known)
        return summary
    finally:
        run.close()


def dry_run(config: Config, folder: Path) -> None:
    """Build all, do the first steps of each phase, show loss, time and memory, and leave nothing behind.

    folder: where the run would be. Raises what `train` raises.
    """
    outputs = replace(config.run, tensorboard=False)
    trained = replace(config.trainer, max_steps=0, profile="")
    config = replace(config, run=outputs, trainer=trained, wandb=replace(config.wandb, mode="off"))
    with _started(config) as (config, device), TemporaryDirectory() as scratch:
        run = RunFolder(Path(scratch))
        trainer = together(lambda: build_trainer(config, run, CheckpointStore(run.checkpoints), device))
        try:
            check_banks(config, trainer, device)
            figures.announce(figures.facts(config, trainer), folder)
            for done in rehearse(trainer, REHEARSED_STEPS):
                log.info("dry run: {} step {}, loss {:.4f}, {:.2f} s without the wait for its images".format(*done))
            log.info("dry run: peak memory %.1f GiB on rank 0; nothing was written", peak_memory(device) / 2**30)
        finally:
            trainer.close()


@contextmanager
def _started(config: Config) -> Iterator[tuple[Config, torch.device]]:
    """The settled configuration and the device of this rank, once all ranks are found to start alike."""
    with launched(config.trainer) as device:
        log_to_console()
        advice = "start all ranks with the same settings and the same code"
        require_equal_starts({**settings_of(config), "code": provenance.code()}, advice)
        try:
            config.data.validate()
            yield settled(config, device), device
        except RuntimeError as error:
            what, found, _ = str(error).partition(" does not have a deterministic implementation")
            if not found:
                raise
            line = f"trainer.deterministic: {what} is not on {device}; take trainer.deterministic=false"
            raise UserError(line) from None


def _resumed_from(run: RunFolder, store: CheckpointStore, resume: str) -> Path | None:
    """The checkpoint to resume from, if this start may write to the folder."""
    resume = run.resume_in_restart(resume, store.latest())
    checkpoint = resolve_resume(resume, store)
    run.require_free(resume, checkpoint)
    return checkpoint


def _claim(run: RunFolder, checkpoint: Path | None) -> None:
    """Make the folder and open the logs (collective)."""
    on_rank_0(lambda: run.claim(resumed_from=checkpoint))
    # After rank 0 has made the folder, because their logs are in it.
    if rank() != 0:
        run.claim()


def _run(
    config: Config,
    run: RunFolder,
    store: CheckpointStore,
    device: torch.device,
    checkpoint: Path | None,
    state: dict[str, Any] | None,
    released: str,
    trust: bool,
) -> dict[str, Any]:
    if state is not None:
        _compare_settings(config, state["config"], str(checkpoint))
    resume_at = state["position"]["total_steps"] if state else None
    trainer = together(lambda: build_trainer(config, run, store, device, resume_at))
    try:
        require_equal_starts(_images(trainer), "give all ranks the same images, in files of the same names")
        banks = check_banks(config, trainer, device)
        baselines: dict[str, Any] = {}
        if trainer.evaluator is not None and config.evaluation.baselines:
            baselines = figures.baselines(config, run, trainer.evaluator, trainer.encoders.query)
        if state is not None:
            together(lambda: trainer.load_state_dict(state, str(checkpoint)))
            at = trainer.position
            log.info("resuming from %s, at %s step %d", checkpoint, at.phase, at.step)
        elif released:
            _import(config, trainer, released, trust)
        # From here on nothing refuses this start, and the folder may change.
        _claim(run, checkpoint)
        if baselines:
            run.summary(baselines)
        found = figures.facts(config, trainer)
        figures.announce(found, run.path)
        run.start(to_yaml(config), resumed_from=checkpoint, banks=[asdict(bank) for bank in banks], run=found)
        if not trainer.finished:
            trainer.metrics.open()
            trainer.run()
        summary = figures.finish(config, run, trainer)
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


def _import(config: Config, trainer: Trainer, name: str, trust: bool) -> None:
    """Give a new run the state of a released checkpoint (collective)."""
    fresh = trainer.state_dict()
    file, choices = split_choices(name)
    if len(choices) > 1 or (choices and not choices[0].startswith("epoch=")):
        raise UserError(f"--import {name}: found @{choices[-1]}, expected nothing or @epoch=N behind the file")
    wanted = {key: value.shape for key, value in trainer.encoders.state_dict().items()}
    released = together(lambda: read_released(file, wanted, trust=trust))
    if released.method != config.method:
        raise UserError(
            f"--import {file}: found a checkpoint of {released.method}, but method={config.method}; take a "
            f"configuration of {released.method}"
        )
    bank = next((key for key, module in trainer.method.named_modules() if isinstance(module, LearnableBank)), "")
    size, dim = released.bank.shape
    if size != (own := getattr(config, config.method).bank_size):
        raise UserError(f"{config.method}.bank_size: found {own}, expected {size}, the rows of the bank in {file}")
    epoch = int(choices[0].removeprefix("epoch=")) if choices else released.epochs
    if epoch >= config.trainer.epochs:
        raise UserError(
            f"--import {file}: found a checkpoint of {released.epochs} epochs, but trainer.epochs="
            f"{config.trainer.epochs}; set that above {epoch}, or begin the schedule anew with --import {file}@epoch=0"
        )
    per_epoch, phase = trainer.loader.steps_per_epoch, trainer.phases[-1].name
    state = imported_state(fresh, released, bank, epoch, phase, per_epoch)
    together(lambda: trainer.load_state_dict(state, f"--import {file}"))
    # The released code does this at the beginning of a step, and ours at the end of the step before.
    trainer.encoders.advance_key(trainer.schedule.key_momentum_at(trainer.position.step))
    log.info(
        "imported %s: %s after %d epochs, %d tensors of both encoders, bank [%d, %d] with its velocity; training "
        "continues in epoch %d of %d, and the optimiser begins at rest",
        *(file, released.method, released.epochs, len(released.encoders), size, dim, epoch + 1, config.trainer.epochs),
    )


def _images(trainer: Trainer) -> dict[str, str]:
    """What names the lists of images that this rank trains on and is evaluated on."""
    named = {"training images": trainer.loader.images}
    source = getattr(getattr(trainer.evaluator, "test", None), "source", None)
    return named if source is None else named | {"test images": image_list_id(source)}


def _compare_settings(config: Config, before: str, name: str) -> None:
    """Log each setting that differs from those of a checkpoint, `before`.

    Raises:
        UserError: another optimiser, which can't use the state of the one before it.
    """
    then, now = (flat_settings(yaml.safe_load(text)) for text in (before, to_yaml(config)))
    kind = then.get("optimizer.name", config.optimizer.name)
    if kind != config.optimizer.name:
        raise UserError(
            f"optimizer.name: found {config.optimizer.name}, expected {kind}, which {name} was made with; resume with "
            f"optimizer.name={kind}, or start anew in another run.folder"
        )
    # A setting that came after the checkpoint was at its default then.
    defaults = flat_settings(yaml.safe_load(to_yaml(Config())))
    for key in sorted(then.keys() | now.keys()):
        if key not in then and now[key] == defaults.get(key):
            continue
        if then.get(key) != now.get(key) and not key.startswith(FREE_SECTIONS):
            log.warning("resuming with another %s: %s, was %s", key, now.get(key), then.get(key))
