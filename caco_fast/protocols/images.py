"""The images that a protocol trains on: their labels, their augmented views, and what of them is held out."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from caco_fast.data import ArraySource, DataConfig, Source, TrainLoader, ViewConfig, build_train_loader
from caco_fast.data.sources.part import hold_out, labels_of
from caco_fast.distributed import rank, world_size
from caco_fast.engine.agreement import checksum, together
from caco_fast.errors import UserError
from caco_fast.protocols.base import Context
from caco_fast.protocols.presets import TrainingRecipe

# BYOL's number of held-out images of ImageNet, and the largest share of a smaller set.
HELD_OUT, HELD_OUT_SHARE = 10_009, 0.05
# The test view of ImageNet in every publication: shorter side, centre crop.
PUBLISHED_VIEW = {"eval_resize": 256, "eval_size": 224}


def labelled(context: Context, name: str) -> tuple[Source, Source]:
    """The training and the test images, which have the same classes (collective)."""

    def found() -> tuple[Source, Source]:
        train, test = context.source("train"), context.source("test")
        if not train.classes:
            raise UserError(f"{name}: the training images have no labels; put them into one folder for each class")
        if list(train.classes) != list(test.classes):
            raise UserError(
                f"{name}: found {len(train.classes)} classes of training and {len(test.classes)} of test images, "
                "expected the same ones in the same order"
            )
        return train, test

    return together(found)


def split_held_out(source: Source, count: int | None, seed: int) -> tuple[Source, Source | None]:
    """The images to train on, and those held out; None: BYOL's number, or a share of a small set."""
    if count is None:
        count = min(HELD_OUT, int(HELD_OUT_SHARE * len(source)))
    if count == 0:
        return source, None
    if count >= len(source):
        raise UserError(f"held_out: found {count}, expected fewer than the {len(source)} training images")
    return hold_out(source, count / len(source), seed)


def crop_view(context: Context, source: Source, recipe: TrainingRecipe, size: int | None) -> ViewConfig:
    """A random crop with a flip; None: of the size of the test view."""
    low, high = recipe.crop_scale
    size = _crop_size(context, source, size)
    return ViewConfig(
        size=size, scale=(low, high), flip_p=recipe.flip_p, jitter_p=0.0, grey_p=0.0, blur_p=0.0, solarize_p=0.0
    )


def _crop_size(context: Context, source: Source, size: int | None) -> int:
    # Sets in memory have images of one size.
    own = source.images.shape[1] if isinstance(source, ArraySource) else PUBLISHED_VIEW["eval_size"]
    return size or context.data.eval_size or own


def crop_loader(
    context: Context, source: Source, recipe: TrainingRecipe, size: int | None, name: str
) -> tuple[TrainLoader, Tensor]:
    """The loader of random crops with flips, and the label of every image of `source`, [N] on the device (collective).

    size: of the crop; None: that of the test view.
    """
    view = crop_view(context, source, recipe, size)

    def build() -> TrainLoader:
        if len(source) < recipe.batch_size:
            raise UserError(
                f"{name}.batch_size: found {recipe.batch_size}, expected no more than the {len(source)} training "
                f"images; set {name}.batch_size"
            )
        return build_train_loader(
            # Of all images, since the labels are those of all.
            replace(context.data, imbalance="none"),
            [view],
            batch_size=recipe.batch_size,
            seed=context.seed,
            rank=rank(),
            world_size=world_size(),
            device=context.device,
            source=source,
        )

    return together(build), torch.from_numpy(labels_of(source).astype(np.int64)).to(context.device)


def shown_in_tests(context: Context, recipe: TrainingRecipe) -> DataConfig:
    """The data whose images are shown as the recipe's test view does."""
    return replace(context.data, eval_interpolation=recipe.interpolation)


def view_deviations(context: Context, source: Source, size: int | None, name: str) -> dict[str, Any]:
    """How the views differ from the published ones of ImageNet: shorter side 256, centre and random crops of 224."""
    found = {f"data.{key}": (getattr(context.data, key), value) for key, value in PUBLISHED_VIEW.items()}
    found[f"{name}.size"] = _crop_size(context, source, size), PUBLISHED_VIEW["eval_size"]
    return {key: {"found": ours, "preset": theirs} for key, (ours, theirs) in found.items() if ours != theirs}


def evenly_spaced(count: int, most: int) -> Tensor:
    """At most `most` positions, evenly spaced over `count`."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def weights_sum(module: nn.Module) -> int:
    """A checksum of all weights and buffers."""
    return checksum(list(module.state_dict().values()))
