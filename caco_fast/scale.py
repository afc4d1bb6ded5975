"""Settings that follow from the images and the device, where nothing is given: `run.scale_to_images`.

A choice takes the place of a default, so every setting of the file or the command line has priority over it. The rules
are in the order in which they need each other: a batch that is given changes the bank, the epochs and the lr too.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from caco_fast.config import Config, load_config, settings_of
from caco_fast.data import BadImageError, Source, build_source
from caco_fast.data.sources.base import as_pil
from caco_fast.data.sources.part import imbalanced
from caco_fast.errors import UserError
from caco_fast.methods import METHODS, registered

FEWEST = 16
LOOKED_AT = 32  # images whose sizes are read
SMALL_VIEW = 64  # pixels; the usual stem of a ResNet leaves too little of views up to this size


@dataclass(frozen=True)
class Facts:
    """What the choices depend on, besides settings that are given."""

    images: int
    side: float  # pixels of the shorter side of a typical image
    gpu: bool
    ranks: int

    def __str__(self) -> str:
        kind = "GPU" if self.gpu else "CPU"
        devices = f"a {kind}" if self.ranks == 1 else f"{self.ranks} ranks on {kind}s"
        return f"{self.images:,} images of some {self.side:.0f} pixels, on {devices}"


Choices = dict[str, Any]


def load_scaled(path: Path | str | None, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """`load_config`, and with `run.scale_to_images` its choices; and a line that names them, or "".

    Without `data.path` nothing is chosen.
    """
    asked = load_config(path, [given for given in overrides if given.startswith("run.scale_to_images=")])
    if not asked.run.scale_to_images:
        return load_config(path, overrides), ""
    # Both views are there from the beginning, so that settings can name each of them.
    chosen: Choices = {"views": _views(224)}
    config = load_config(path, overrides, chosen)
    if not config.data.path:
        return config, ""
    facts = _look(config)
    for rule in RULES:
        chosen |= rule(config, facts)
        config = load_config(path, overrides, chosen)
    settings = settings_of(config)
    shown = {**chosen, "views.0.size": chosen["views"][0]["size"]}
    taken = [f"{key}={value}" for key, value in shown.items() if settings.get(key) == value]
    return config, f"chosen for {facts}: {' '.join(taken)}"


def _look(config: Config) -> Facts:
    # The run lists the images again, and then reports what is left out.
    logger = logging.getLogger("caco_fast.data")
    before, logger.disabled = logger.disabled, True
    try:
        source = imbalanced(build_source(config.data, "train"), config.data)
    finally:
        logger.disabled = before
    if len(source) < FEWEST:
        raise UserError(f"data.path: found {len(source)} images in {config.data.path}, expected at least {FEWEST}")
    device = config.trainer.device
    gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return Facts(len(source), _side(source), gpu, int(os.environ.get("WORLD_SIZE") or 1))


def _side(source: Source) -> float:
    """The median of the shorter sides of some images; bad ones are left to the loader, which reports them."""
    sides = []
    for position in range(0, len(source), max(1, len(source) // LOOKED_AT)):
        try:
            sides.append(min(as_pil(source.image(position)).size))
        except BadImageError:
            continue
    return median(sides) if sides else 224


def _views(size: int) -> list[dict[str, Any]]:
    """View a and view b as published. Blur with the usual sigmas leaves nothing of small ones."""
    blur = size > SMALL_VIEW
    return [{"size": size, "blur_p": 1.0 * blur}, {"size": size, "blur_p": 0.1 * blur, "solarize_p": 0.2}]


def _model_and_batch(config: Config, facts: Facts) -> Choices:
    """A ResNet-50 with views of 224 pixels on GPUs, a ResNet-18 with views of 96 on CPUs, fewer for small images."""
    size = min(224 if facts.gpu else 96, max(32, int(facts.side) // 32 * 32))
    # A quarter of the images at most, so that an epoch has some steps.
    batch = min((128 if facts.gpu else 64) * facts.ranks, _power_of_two(facts.images / 4))
    return {
        "backbone.name": "resnet50" if facts.gpu else "resnet18",
        "projector.hidden": 2048 if facts.gpu else 512,
        "projector.dim": 256 if facts.gpu else 128,
        "views": _views(size),
        "trainer.batch_size": max(batch, 2 * facts.ranks) // facts.ranks * facts.ranks,
        "evaluation.held_out": 0.1 if facts.images < 1000 else 0.02,
    }


def _length_and_bank(config: Config, facts: Facts) -> Choices:
    """Some 1,000 steps on a CPU and 50,000 on GPUs, within limits; K is at most a quarter of the images."""
    epochs = (50_000 if facts.gpu else 1_000) / _steps_per_epoch(config, facts)
    fewest, most = (100, 400) if facts.gpu else (10, 200)
    size = config.views[0].size
    resnet = config.backbone.name.startswith("resnet")
    # A ViT takes views of its own size alone, unless it is told that they may have others.
    options = {"dynamic_img_size": True} if config.backbone.name.startswith("vit") else {}
    return {
        "trainer.epochs": min(most, max(fewest, math.ceil(epochs))),
        **{key: _power_of_two(min(65536, facts.images / 4)) for key in _own(config, "bank_size", "queue_size")},
        "backbone.stem": "small_stride2" if resnet and size <= SMALL_VIEW else "imagenet",
        "backbone.options": {"zero_init_last": False} if resnet else options,
        "data.eval_resize": round(min(size * 8 / 7, max(size, facts.side))),
        "data.eval_size": size,
        # Adam's steps have the length of lr, so it follows the root of the batch.
        "optimizer.lr": _two_digits(1e-3 * math.sqrt(config.trainer.batch_size / 256)),
    }


def _shares_of_the_run(config: Config, facts: Facts) -> Choices:
    """Warm-up, the time in which the bank is a queue, and intervals, as shares of the run's length."""
    epochs, steps = config.trainer.epochs, _steps_per_epoch(config, facts)
    warm_starts = {}
    for key in _own(config, "warm_start_steps"):
        rows = getattr(config, key.partition(".")[0]).bank_size
        warm_starts[key] = max(-(-rows // config.trainer.batch_size), epochs * steps // 5)
    return {
        "schedule.warmup_epochs": _two_digits(epochs / 20),
        **warm_starts,
        "evaluation.every_epochs": max(1, epochs // 10),
        "checkpoint.every_epochs": max(1, epochs // 20),
    }


RULES: tuple[Callable[[Config, Facts], Choices], ...] = (_model_and_batch, _length_and_bank, _shares_of_the_run)


def _own(config: Config, *names: str) -> list[str]:
    """The settings of these names in the sections that the run's method reads."""
    section = getattr(config, config.method)
    # CACR has a queue in one of its forms.
    if getattr(section, "form", "queue") != "queue":
        return []
    read = registered(config.method).method.reads(section)
    return [f"{name}.{of.name}" for name in read for of in fields(METHODS[name].config) if of.name in names]


def _steps_per_epoch(config: Config, facts: Facts) -> int:
    held_out = config.evaluation.held_out if config.evaluation.holds_out else 0.0
    return max(1, int(facts.images * (1 - held_out)) // config.trainer.batch_size)


def _power_of_two(most: float) -> int:
    return 2 ** int(math.log2(most))


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
