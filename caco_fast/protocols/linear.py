"""The linear evaluation of publications: classifiers on the frozen backbone's features of augmented images.

The backbone runs once for a batch, and all learning rates are trained on what it gives.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from caco_fast.data import Source
from caco_fast.errors import UserError
from caco_fast.evaluate.features import evaluation_mode
from caco_fast.protocols.base import Context, Published, Result, register
from caco_fast.protocols.head_training import HeadTraining, LinearRecipe
from caco_fast.protocols.heads import Heads
from caco_fast.protocols.images import (
    HELD_OUT,
    crop_loader,
    labelled,
    shown_in_tests,
    split_held_out,
    view_deviations,
    weights_sum,
)
from caco_fast.protocols.presets import Chosen, choose, overridable, preset_of
from caco_fast.protocols.resuming import Resumable
from caco_fast.settings import setting

FOLDER = "linear"
LinearConfig = overridable(
    LinearRecipe,
    "linear",
    FOLDER,
    size=(int | None, setting(None, "side of the training crop in pixels; null: that of the test view")),
)
# ResNet-50 on ImageNet, as the paper of CaCo gives them.
PUBLISHED = {
    "caco": [
        Published("CaCo, 200 epochs, batch 4096", 72.0, "CaCo paper, Table I"),
        Published("CaCo, 800 epochs, batch 4096", 75.3, "CaCo paper, Table II"),
    ],
    "moco": [Published("MoCo v2, 200 epochs", 67.5, "CaCo paper, Table I")],
    "adco": [Published("AdCo, 200 epochs", 68.2, "CaCo paper, Table I")],
    "mocov3": [Published("MoCo v3, 1000 epochs", 74.6, "CaCo paper, Table II")],
    "byol": [Published("BYOL, 1000 epochs", 74.3, "CaCo paper, Table II")],
    "swav": [Published("SwAV, multi-crop, 800 epochs", 75.3, "CaCo paper, Table III")],
    "dino": [Published("DINO, multi-crop, 800 epochs", 75.3, "CaCo paper, Table III")],
}


@register("linear", LinearConfig, "linear classifiers on augmented images, several learning rates at once")
def linear(context: Context, settings: Any) -> Result:
    chosen = chosen_recipe(context, settings, "linear")
    recipe: LinearRecipe = chosen.recipe
    train, test = labelled(context, "linear")
    kept, held = held_out_images(train, recipe, context.seed, "linear")
    loader, labels = crop_loader(context, kept, recipe, settings.size, "linear")
    before = weights_sum(context.backbone)
    key = dataclasses.asdict(recipe) | {
        **{"images": loader.images, "draws": loader.draws, "classes": len(train.classes), "size": settings.size},
        **context.identity(),
    }
    data = shown_in_tests(context, recipe)
    with closing(loader), evaluation_mode(context.backbone):
        training = HeadTraining(
            "linear",
            Heads(
                *(context.pretrained.width, len(train.classes), recipe.all_lrs(), recipe),
                seed=context.seed,
                device=context.device,
            ),
            recipe,
            loader.steps_per_epoch,
            test=context.features("test", data, test),
            held=None if held is None else context.features("train", data, held),
            resumable=Resumable("linear", context.folder, key),
        )

        def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
            with closing(loader.batches(epoch, first)) as given:
                for batch in given:
                    with torch.no_grad(), context.precision():
                        features = context.folded(batch.views[0])
                    yield features, labels[batch.index.to(labels.device)]
            loader.exchange_bad_images()

        training.run(batches)
    if weights_sum(context.backbone) != before:
        raise RuntimeError("linear: the backbone changed while it was evaluated")
    return finished_result(context, training, chosen, train, held, settings.size)


def chosen_recipe(context: Context, settings: Any, name: str) -> Chosen:
    """The recipe that the settings name, or that of the framework that trained the backbone."""
    preset = settings.preset or preset_of(context.pretrained, FOLDER, "caco")
    return choose(settings, LinearRecipe, name, FOLDER, preset)


def held_out_images(train: Source, recipe: LinearRecipe, seed: int, name: str) -> tuple[Source, Source | None]:
    """The images to train on, and those held out to choose the learning rate."""
    try:
        return split_held_out(train, None if recipe.held_out < 0 else recipe.held_out, seed)
    except UserError as error:
        raise UserError(f"{name}.{error}") from None


def finished_result(
    context: Context,
    training: HeadTraining,
    chosen: Chosen,
    train: Source,
    held: Source | None,
    size: int | None,
    usable: int | None = None,
) -> Result:
    """The result of the heads, with what was different from the preset and how many images there were.

    size: of the crop, as the user gave it. usable: images that were trained on; None: all that are not held out.
    """
    result = training.result()
    key, held_out = f"{training.name}.held_out", 0 if held is None else len(held)
    result.deviations = chosen.deviations | view_deviations(context, train, size, training.name)
    result.deviations.pop(key, None)
    if held_out != (of_preset := HELD_OUT if chosen.preset == "byol" else 0):
        result.deviations[key] = {"found": held_out, "preset": of_preset}
    images = len(train) - held_out if usable is None else usable
    left = images % chosen.recipe.batch_size
    if left:
        result.notes.append(
            f"each epoch leaves out {left} of {images} images, which fill no batch; other ones each time"
        )
    found = {"train": images, "held_out": held_out, "test": len(training.test.source)}
    result.counts = {"images": {split: {"found": count} for split, count in found.items()}}
    if len(train.classes) == 1000 and len(training.test.source) == 50_000:
        result.published = list(PUBLISHED.get(chosen.preset, []))
        published = {"train": 1_281_167, "test": 50_000}
        result.counts = {"images": {k: {"found": n, "published": published.get(k)} for k, n in found.items()}}
    return result
