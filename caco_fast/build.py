"""Every component of a run, built from its own section of the configuration."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from caco_fast.config import Config, settings_of, to_yaml
from caco_fast.data import (
    Source,
    TrainLoader,
    build_eval_loader,
    build_source,
    build_train_loader,
    hold_out,
    validate_views,
)
from caco_fast.distributed import broadcast_object, is_distributed, rank, world_size
from caco_fast.engine.agreement import together
from caco_fast.engine.checkpoint import CheckpointStore
from caco_fast.engine.compiling import compile_step
from caco_fast.engine.kernel_check import require_backend
from caco_fast.engine.metrics import MetricsWriter
from caco_fast.engine.precision import autocast_dtype, gradient_scaler, settled_precision, tune_convolutions, use_tf32
from caco_fast.engine.progress import Progress
from caco_fast.engine.run_folder import RunFolder
from caco_fast.engine.settings import TrainerConfig
from caco_fast.engine.step import TrainStep
from caco_fast.engine.step_graph import CapturedStep, build_capture
from caco_fast.engine.trainer import Trainer
from caco_fast.errors import UserError
from caco_fast.evaluate.evaluator import Evaluator
from caco_fast.evaluate.held_out import HeldOut
from caco_fast.methods import METHODS, Method, build_method, registered
from caco_fast.models import (
    EncoderPair,
    build_encoder_pair,
    group_batch_norm,
    recompute_activations,
    require_sizes,
    segment_batch_norm,
)
from caco_fast.optim import Schedule, build_optimizer, peak_lr
from caco_fast.pretrained.places import resolved_init

log = logging.getLogger("caco_fast.training")


def settled(config: Config, device: torch.device) -> Config:
    """The configuration with `trainer.precision` decided for the device, so that a run's copy says what it ran with.

    Raises:
        UserError: there is no such method, a view is wrong, the backbone can't take a size of the images, the named
            backend of the bank does not run on the device, or a way to save memory does not go with another setting.
    """
    # Here, before anything is listed, built or written.
    method = registered(config.method).method
    validate_views(config.views)
    require_sizes(config.backbone, _known_sizes(config))
    for section in method.reads(getattr(config, config.method)):
        if backend := getattr(getattr(config, section), "backend", ""):
            together(partial(require_backend, f"{section}.backend", backend, device))
    _check_memory_savers(config.trainer)
    _check_batch_norm(config.trainer)
    # Rank 0 decides, because one step has one precision.
    precision = broadcast_object(settled_precision(config.trainer.precision, device))
    return replace(config, trainer=replace(config.trainer, precision=precision))


def _known_sizes(config: Config) -> dict[str, tuple[int, int]]:
    """Height and width of the images that the backbone will get, as far as the settings say, by setting."""
    sides = {f"views[{number}].size": view.size for number, view in enumerate(config.views)}
    if config.evaluation.wanted and config.data.eval_size:
        sides["data.eval_size"] = config.data.eval_size
    return {key: (side, side) for key, side in sides.items()}


def build_trainer(
    config: Config, run: RunFolder, store: CheckpointStore, device: torch.device, resume_at: int | None = None
) -> Trainer:
    """A trainer and all that it needs.

    config: as `settled` returns it. resume_at: the step of the checkpoint from which the metrics continue.

    Raises:
        UserError: settings that do not fit each other, the device, or the data.
    """
    registered(config.method)
    autocast = autocast_dtype(config.trainer.precision, device)
    # For encoders alone: the bank operations and the evaluation leave it (`f32_products`).
    use_tf32(config.trainer.precision == "tf32")
    tune_convolutions(config.trainer.deterministic)
    torch.manual_seed(config.trainer.seed)
    capture = build_capture(config.trainer, device)
    validate_views(config.views)
    # Listed once: ImageNet has 1.28 M names.
    source, held_out = _training_images(config)
    # A checkpoint has the weights already, and the file may be gone.
    init = resolved_init(config.backbone.init) if resume_at is None else ""
    backbone = replace(config.backbone, init=init)
    encoders = _build_encoders(replace(config, backbone=backbone), source.channels, device, autocast)
    method = _build_method(config, device)
    if config.trainer.compile:
        compile_step(encoders, method, device)
    loader = _build_loader(config, source, config.trainer.batch_size, device, autocast)
    scaler = gradient_scaler(config.trainer.precision, device)
    optimizer = build_optimizer(
        config.optimizer,
        [*encoders.query.parameters(), *method.parameters()],
        config.trainer.batch_size,
        scaler.is_enabled(),
        captured=capture is not None,
    )
    parts = (method, encoders, optimizer, scaler, device)
    options: dict[str, Any] = dict(accumulate=config.trainer.accumulate, clip_gradient=config.trainer.clip_gradient)
    if capture is None:
        step = TrainStep(*parts, **options)
    else:
        step = CapturedStep(*parts, capture=capture[0], warmup=capture[1], **options)
    epochs, batch_size = config.trainer.epochs, config.trainer.batch_size
    if rank() != 0:
        # All ranks have built the same weights. From here on each draws its own numbers, such as those of drop path.
        torch.manual_seed(config.trainer.seed + rank())
    return Trainer(
        config.trainer,
        config.checkpoint,
        step=step,
        schedule=Schedule(config.schedule, peak_lr(config.optimizer, batch_size), epochs, loader.steps_per_epoch),
        loader=loader,
        evaluator=_build_evaluator(config, source, device),
        held_out=_build_held_out(config, held_out, device, autocast) if held_out is not None else None,
        store=store,
        metrics=MetricsWriter(
            run.path, config.run.tensorboard, config.wandb, resume_at=resume_at, run_config=settings_of(config)
        ),
        progress=Progress(
            epochs,
            loader.steps_per_epoch,
            batch_size,
            config.trainer.log_every,
            plain=True if config.run.plain else None,
        ),
        resolved_config=to_yaml(config),
    )


def _check_memory_savers(trainer: TrainerConfig) -> None:
    """Check what `trainer.accumulate` and `trainer.checkpoint_activations` do not go with."""
    if trainer.accumulate > 1 and trainer.batch_size % (world_size() * trainer.accumulate):
        raise UserError(
            f"trainer.accumulate: found {trainer.accumulate}, expected a number that divides the batch of a rank "
            f"({trainer.batch_size} images over {world_size()} ranks)"
        )
    if not trainer.checkpoint_activations:
        return
    # A CUDA graph can't save the states of random numbers, torch.compile has its own choice of what to keep, and the
    # second computation of joint views would not know how many they are.
    for name, found in (("cuda_graph", trainer.cuda_graph), ("compile", trainer.compile)):
        if found:
            raise UserError(f"trainer.checkpoint_activations: not possible with trainer.{name}=true; set one to false")
    if trainer.joint_views == "on":
        raise UserError("trainer.checkpoint_activations: not possible with trainer.joint_views=on; set that to auto")


def _check_batch_norm(trainer: TrainerConfig) -> None:
    """Check that the images which a rank embeds at a time are whole groups of BatchNorm."""
    ranks, images = world_size(), trainer.batch_norm_images
    at_a_time = trainer.batch_size // (ranks * trainer.accumulate)
    if images and at_a_time % images:
        raise UserError(
            f"trainer.batch_norm_images: found {images}, expected 0 or a divisor of the {at_a_time} images that a rank "
            f"embeds at a time (batch {trainer.batch_size}, ranks {ranks}, accumulate {trainer.accumulate}); "
            "change one of them"
        )


def _shuffle_seed(trainer: TrainerConfig, key_encoder: bool) -> int | None:
    """The seed of the orders of keys, or None where a query shares its statistics with all images anyway."""
    several_groups = 0 < trainer.batch_norm_images < trainer.batch_size // trainer.accumulate
    return trainer.seed if key_encoder and trainer.shuffle_keys and several_groups else None


def method_sections(config: Config) -> Mapping[str, Any]:
    """The settings of every method, by its name."""
    return {name: getattr(config, name) for name in METHODS}


def _build_method(config: Config, device: torch.device) -> Method:
    method = build_method(config.method, config.projector.dim, method_sections(config))
    method.check_views([view.size for view in config.views for _ in range(view.count)])
    # Layers that a method owns, such as a predictor, take their statistics over the same images.
    segment_batch_norm(method)
    group_batch_norm(method, config.trainer.batch_norm_images)
    return method.to(device)


def _build_encoders(config: Config, channels: int, device: torch.device, autocast: torch.dtype | None) -> EncoderPair:
    needs = registered(config.method).method.needs(getattr(config, config.method), method_sections(config))
    recompute = config.trainer.checkpoint_activations
    joint_views = config.trainer.joint_views == "on"
    if config.trainer.joint_views == "auto":
        joint_views = is_distributed() and not recompute and not config.trainer.batch_norm_images
    encoders = build_encoder_pair(
        config.backbone,
        config.projector,
        channels,
        autocast=autocast,
        joint_views=joint_views,
        key_encoder=needs.key_encoder,
        norm_sets=needs.norm_sets,
        norm_images=config.trainer.batch_norm_images,
        shuffle_seed=_shuffle_seed(config.trainer, needs.key_encoder),
    )
    if recompute:
        recompute_activations(encoders.query, config.backbone.name)
    if config.trainer.joint_views == "on" and not encoders.query.joint_views:
        raise UserError(
            f"trainer.joint_views: {config.backbone.name} has a normalisation that takes its statistics over all views "
            "of a batch; set it to auto or off"
        )
    return encoders.to(device, memory_format=torch.channels_last)


def _training_images(config: Config) -> tuple[Source, Source | None]:
    """The images to train on, and those that are held out, if any are."""
    source = build_source(config.data, "train")
    if not config.evaluation.holds_out:
        return source, None
    if len(source) < 2 * world_size() + 2:
        raise UserError(
            f"evaluation.held_out: found {len(source)} images, too few to hold some out; set it to 0 or add images"
        )
    share = max(config.evaluation.held_out, world_size() / len(source))
    return hold_out(source, share, config.trainer.seed)


def _build_loader(
    config: Config, source: Source, batch_size: int, device: torch.device, autocast: torch.dtype | None
) -> TrainLoader:
    """The loader of this rank's share of the views."""
    return build_train_loader(
        config.data,
        config.views,
        batch_size=batch_size,
        seed=config.trainer.seed,
        rank=rank(),
        world_size=world_size(),
        device=device,
        dtype=autocast or torch.float32,
        source=source,
    )


def _build_held_out(config: Config, source: Source, device: torch.device, autocast: torch.dtype | None) -> HeldOut:
    # As few batches as training's size allows, of one size, so that a mean over them is one over nearly all images.
    batches = -(-len(source) // config.trainer.batch_size)
    batch_size = max(1, len(source) // batches // world_size()) * world_size()
    # Bad images are counted by the training's loader, over the far larger part; what is evaluated is not imbalanced.
    data = replace(config.data, bad_image_limit=1.0, imbalance="none")
    held_out = replace(config, data=data)
    return HeldOut(config.evaluation, lambda: _build_loader(held_out, source, batch_size, device, autocast), device)


def _build_evaluator(config: Config, source: Source, device: torch.device) -> Evaluator | None:
    if not config.evaluation.wanted:
        return None
    if not source.classes and config.evaluation.holds_out:
        if rank() == 0:
            log.info("the images have no labels, so there is no kNN: the loss on held-out images takes its place")
        return None
    options = dict(batch_size=config.evaluation.batch_size, rank=rank(), world_size=world_size(), device=device)
    train = build_eval_loader(config.data, "train", share=config.evaluation.train_share, source=source, **options)
    test = build_eval_loader(config.data, "test", **options)
    if config.data.eval_size is None and (size := test.image_size()) is not None:
        require_sizes(config.backbone, {"data.eval_size": size})
    return Evaluator(
        config.evaluation, train, test, classes=len(train.source.classes), denormalise=train.denormalise, device=device
    )
