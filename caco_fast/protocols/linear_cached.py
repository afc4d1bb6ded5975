"""The linear evaluation on cached features: V views of every image pass the backbone once, the classifiers many times.

Legend: N training images, V views of an image, D feature size, B rows of this rank in a step.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caco_fast.data import Source
from caco_fast.data.loaders.base import epoch_order, step_share, steps_per_epoch
from caco_fast.data.sources.part import labels_of
from caco_fast.distributed import all_gather_uneven, all_reduce_sum, barrier, broadcast_object, rank, world_size
from caco_fast.engine.agreement import on_rank_0, together
from caco_fast.engine.ranks import Interrupt, Interrupted
from caco_fast.errors import UserError
from caco_fast.evaluate.features import evaluation_mode
from caco_fast.protocols.base import Context, Result, register
from caco_fast.protocols.head_training import HeadTraining, LinearRecipe
from caco_fast.protocols.heads import Heads
from caco_fast.protocols.images import crop_loader, labelled, weights_sum
from caco_fast.protocols.linear import FOLDER, chosen_recipe, finished_result, held_out_images
from caco_fast.protocols.presets import overridable
from caco_fast.protocols.resuming import Resumable
from caco_fast.settings import require_at_least, setting
from caco_fast.storage import atomic_write_text

log = logging.getLogger("caco_fast.evaluation")

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
LinearCachedConfig = overridable(
    LinearRecipe,
    "linear_cached",
    FOLDER,
    views=(int, setting(10, "views of every image; 1: the centre crop, without augmentation")),
    dtype=(str, setting("bf16", "bf16 or f32: how the features are kept on the disk")),
    size=(int | None, setting(None, "side of the training crop in pixels; null: that of the test view")),
)


@register("linear_cached", LinearCachedConfig, "linear classifiers on cached features of a few augmented views")
def linear_cached(context: Context, settings: Any) -> Result:
    if settings.dtype not in DTYPES:
        raise UserError(f"linear_cached.dtype: found '{settings.dtype}', expected bf16 or f32")
    require_at_least("linear_cached.views", settings.views, 1)
    chosen = chosen_recipe(context, settings, "linear_cached")
    recipe: LinearRecipe = chosen.recipe
    train, test = labelled(context, "linear_cached")
    kept, held = held_out_images(train, recipe, context.seed, "linear_cached")
    key = {
        **{"weights": weights_sum(context.backbone), "images": kept.list_hash(), "seed": context.seed},
        **{"dtype": settings.dtype, "size": settings.size, "autocast": str(context.autocast)},
        **{"crop": list(recipe.crop_scale), "flip": recipe.flip_p, "centre": settings.views == 1},
        "data": dataclasses.asdict(context.data) | {"workers": None, "prefetch": None, "path": None, "root": None},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = context.folder / f"views-{broadcast_object(digest)}"
    cache = ViewCache(folder, len(kept), context.pretrained.width, DTYPES[settings.dtype])
    fill(cache, context, kept, recipe, settings)
    labels = torch.from_numpy(labels_of(kept).astype(np.int64))
    good = torch.ones(len(kept), dtype=torch.bool)
    good[[position for view in range(settings.views) for position in cache.unreadable(view)]] = False
    usable = good.nonzero().flatten()
    try:
        steps = steps_per_epoch(len(usable), recipe.batch_size, world_size())
    except UserError as error:
        raise UserError(f"linear_cached.batch_size: {error}") from None
    training = HeadTraining(
        "linear_cached",
        Heads(
            *(context.pretrained.width, len(train.classes), recipe.all_lrs(), recipe),
            seed=context.seed,
            device=context.device,
        ),
        recipe,
        steps,
        test=context.features("test", source=test),
        held=None if held is None else context.features("train", source=held),
        resumable=Resumable(
            "linear_cached", context.folder, key | dataclasses.asdict(recipe) | {"views": settings.views}
        ),
    )

    def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows, order = cache.rows(epoch % settings.views), epoch_order(context.seed, epoch, len(usable))
        if context.device.type == "cuda" and rows.nbytes < torch.cuda.mem_get_info(context.device)[0] / 2:
            rows = rows.to(context.device)
        for step in range(first, steps):
            chosen_rows = usable[step_share(order, step, recipe.batch_size, rank(), world_size())]
            features = rows[chosen_rows.to(rows.device)].to(context.device)
            yield features, labels[chosen_rows].to(context.device)

    training.run(batches)
    result = finished_result(context, training, chosen, len(train.classes), len(usable), held)
    result.deviations["linear_cached.views"] = {"found": settings.views, "preset": recipe.epochs}
    result.notes.append(f"features of {settings.views} views are kept in {folder}; remove it to free the disk")
    return result


def fill(cache: "ViewCache", context: Context, source: Source, recipe: LinearRecipe, settings: Any) -> None:
    """Compute the views that the cache has not got yet, each in one pass over the images (collective)."""
    missing = [view for view in range(settings.views) if not cache.has(view)]
    if not missing:
        return
    if settings.views == 1:
        cache.prepare(0)
        found, good = context.features("train", source=source), torch.zeros(len(source), dtype=torch.bool)
        cache.rows(0)[found.index] = found.features.to(cache.dtype)
        good[all_gather_uneven(found.index)] = True
        cache.finish(0, good)
        return
    # A pass takes every image, so that the batch of the classifiers has no say in it.
    own = max(1, min(context.batch_size, len(source)) // world_size())
    passes = dataclasses.replace(recipe, batch_size=own * world_size())
    loader, _ = crop_loader(context, source, passes, settings.size, "linear_cached")
    with closing(loader), evaluation_mode(context.backbone), torch.no_grad(), Interrupt() as interrupt:
        for view in missing:
            cache.prepare(view)
            rows, start = cache.rows(view), rank() * len(source) // world_size()
            good = torch.zeros(len(source), dtype=torch.int64)
            given = loader.every_image(view)
            # The ranks' parts may differ by a batch, and all ranks look for a signal equally often.
            for _ in range(-(-len(source) // (own * world_size()))):
                if (batch := next(given, None)) is not None:
                    at = slice(start, start + len(batch.index))
                    images = batch.views[0].contiguous(memory_format=torch.channels_last)
                    with context.precision():
                        rows[at] = context.backbone(images).cpu().to(cache.dtype)
                    good[at] = batch.index.cpu() == torch.arange(at.start, at.stop)
                    start = at.stop
                if (asked := interrupt.agreed()) is not None:
                    text = f"stopped by {asked.name} in view {view + 1}; the same command continues with this view"
                    raise Interrupted(f"linear_cached: {text}", 128 + asked.value)
            cache.finish(view, all_reduce_sum(good.to(context.device)).cpu() > 0)
            log.info("linear_cached: view %d/%d of %d images", view + 1, settings.views, len(source))
            loader.exchange_bad_images()


class ViewCache:
    """The features of views of all training images, in one file for each view, which all ranks share."""

    def __init__(self, folder: Path, images: int, dim: int, dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, (images, dim), dtype

    def has(self, view: int) -> bool:
        """Whether a view is complete, as rank 0 sees it (collective)."""
        return broadcast_object(self._done(view).is_file())

    def rows(self, view: int) -> Tensor:
        """The features of a view, [N, D], mapped from its file, to read or to write."""
        count = self.shape[0] * self.shape[1]
        return torch.from_file(str(self._file(view)), shared=True, size=count, dtype=self.dtype).view(self.shape)

    def prepare(self, view: int) -> None:
        """Make the file of a view at its full size (collective).

        Raises:
            UserError: the disk has no room, or the folder is not the same one for all ranks.
        """
        size = self.shape[0] * self.shape[1] * self.dtype.itemsize

        def make() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self._file(view), "wb") as file:
                    # Room is taken now, since a mapped file that meets a full disk kills the process.
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise UserError(f"linear_cached: {self._file(view)} can't be written: {error.strerror}") from None

        on_rank_0(make)
        together(self._require)

    def finish(self, view: int, good: Tensor) -> None:
        """Mark a view as complete, with the images that could be read, [N] (collective)."""
        barrier()
        if rank() == 0:
            bad = (~good).nonzero().flatten().tolist()
            atomic_write_text(self._done(view), json.dumps({"images": self.shape[0], "unreadable": bad}))
        barrier()

    def unreadable(self, view: int) -> list[int]:
        return json.loads(self._done(view).read_text())["unreadable"]

    def _require(self) -> None:
        if not self.folder.is_dir():
            raise UserError(f"linear_cached: {self.folder} is not on this machine; the ranks need one folder for all")

    def _file(self, view: int) -> Path:
        return self.folder / f"view{view:03d}.bin"

    def _done(self, view: int) -> Path:
        return self.folder / f"view{view:03d}.json"
