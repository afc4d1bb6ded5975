"""The linear evaluation on cached features: V views of every image pass the backbone once, the classifiers many times.

Legend: N training images, V views of an image, D feature size, B rows of a step over all ranks.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caco_fast.data import Source
from caco_fast.data.loaders.base import epoch_order, steps_per_epoch
from caco_fast.data.sources.part import labels_of
from caco_fast.distributed import all_gather_uneven, rank, world_size
from caco_fast.errors import UserError
from caco_fast.protocols.base import Context, Result, register
from caco_fast.protocols.features import AugmentedView, FeatureSet
from caco_fast.protocols.head_training import HeadTraining, LinearRecipe
from caco_fast.protocols.heads import Heads
from caco_fast.protocols.images import crop_view, labelled, shown_in_tests
from caco_fast.protocols.linear import FOLDER, chosen_recipe, finished_result, held_out_images
from caco_fast.protocols.presets import overridable
from caco_fast.protocols.resuming import Resumable
from caco_fast.settings import require_at_least, setting

LinearCachedConfig = overridable(
    LinearRecipe,
    "linear_cached",
    FOLDER,
    views=(int, setting(10, "views of every image; 1: the centre crop, without augmentation")),
    size=(int | None, setting(None, "side of the training crop in pixels; null: that of the test view")),
)


@register("linear_cached", LinearCachedConfig, "linear classifiers on cached features of a few augmented views")
def linear_cached(context: Context, settings: Any) -> Result:
    require_at_least("linear_cached.views", settings.views, 1)
    chosen = chosen_recipe(context, settings, "linear_cached")
    recipe: LinearRecipe = chosen.recipe
    train, test = labelled(context, "linear_cached")
    kept, held = held_out_images(train, recipe, context.seed, "linear_cached")
    views = [_features(context, kept, recipe, settings, view) for view in range(settings.views)]
    # Positions of the images of which every view could be made.
    usable = functools.reduce(np.intersect1d, (all_gather_uneven(view.index).numpy() for view in views))
    labels = torch.from_numpy(labels_of(kept).astype(np.int64))
    try:
        # One rank's, because ranks need not share a batch evenly.
        steps = steps_per_epoch(len(usable), recipe.batch_size)
    except UserError as error:
        raise UserError(f"linear_cached.batch_size: {error}") from None
    data = shown_in_tests(context, recipe)
    key = dataclasses.asdict(recipe) | {
        **{"images": kept.list_hash(), "usable": len(usable), "classes": len(train.classes)},
        **{"views": settings.views, "size": settings.size},
        **context.identity(),
    }
    training = HeadTraining(
        "linear_cached",
        Heads(
            *(context.pretrained.width, len(train.classes), recipe.all_lrs(), recipe),
            seed=context.seed,
            device=context.device,
        ),
        recipe,
        steps,
        test=context.features("test", data, test),
        held=None if held is None else context.features("train", data, held),
        resumable=Resumable("linear_cached", context.folder, key),
    )

    def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        view, order = views[epoch % len(views)], epoch_order(context.seed, epoch, len(usable))
        features = _near(view.features, context.device)
        # A step takes the rows of its images that this rank holds.
        start, stop = (number * len(kept) // world_size() for number in (rank(), rank() + 1))
        for step in range(first, steps):
            positions = usable[order[step * recipe.batch_size : (step + 1) * recipe.batch_size]]
            own = torch.from_numpy(positions[(positions >= start) & (positions < stop)])
            rows = torch.searchsorted(view.index, own).to(features.device)
            yield features[rows].to(context.device), labels[own].to(context.device)

    training.run(batches)
    result = finished_result(context, training, chosen, train, held, settings.size, len(usable))
    result.deviations["linear_cached.views"] = {"found": settings.views, "preset": "a new one in each epoch"}
    return result


def _features(context: Context, source: Source, recipe: LinearRecipe, settings: Any, view: int) -> FeatureSet:
    """Features of one view of this rank's training images, from the cache if they are there (collective)."""
    if settings.views == 1:
        return context.features("train", shown_in_tests(context, recipe), source)
    crop = crop_view(context, source, recipe, settings.size)
    return context.features("train", source=source, view=AugmentedView(crop, context.seed, view))


def _near(features: Tensor, device: torch.device) -> Tensor:
    """The features on the device if half of its free memory holds them, else as they are, mapped from the disk."""
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return features.to(device)
    return features
