"""The part on the views: images as the augmentation of the run shows them to the encoders."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from caco_fast.data import ArraySource, Source, ViewConfig, build_train_loader
from caco_fast.protocols.images import evenly_spaced
from caco_fast.report.blocks import guarded
from caco_fast.report.image_sheet import Cell, Group, image_sheet
from caco_fast.report.parts import Block, Part, Picture, Table
from caco_fast.report.sample import Sample

IMAGES = 8
# The most views of an image that are shown.
COLUMNS = 9


def views_part(sample: Sample) -> Part:
    """The sheet, and the recipe of the views as a table."""
    lead = "The first column is the middle of the image; the others are random views of it, by the recipe of the run."
    blocks = [*guarded(lambda: [_sheet(sample)], "views"), _recipe(sample.config.views)]
    return Part("views", "The views", blocks, lead)


def _sheet(sample: Sample) -> Block:
    source = sample.train_source
    positions = evenly_spaced(len(source), IMAGES).numpy()
    sizes = [view.size for view in sample.config.views for _ in range(view.count)][:COLUMNS]
    drawn, index = views_of(sample, source, positions)
    largest = max(sizes)
    originals = [[Cell(sample.thumbnail(source, at), source.name(int(at)))] for at in index]
    groups = [Group("image", originals)]
    for size in sorted(set(sizes), reverse=True):
        columns = [number for number, own in enumerate(sizes) if own == size]
        rows = [
            [
                Cell(_image(drawn[number][row]), f"view {number + 1}, {size} px", scale=max(0.4, size / largest))
                for number in columns
            ]
            for row in range(len(index))
        ]
        groups.append(Group(f"{size} px", rows))
    total = sum(view.count for view in sample.config.views)
    caption = f"{total} views of an image" + (f", of which {len(sizes)} are shown." if total > len(sizes) else ".")
    alt = f"{len(index)} training images, each with {len(sizes)} of its random views."
    return Picture(image_sheet(groups), alt, caption)


def views_of(sample: Sample, source: Source, positions: np.ndarray) -> tuple[list[Tensor], list[int]]:
    """The views [B, ch, h, w] of images in epoch 0, in [0, 1], and the positions that they are of."""
    data = replace(sample.config.data, imbalance="none", bad_image_limit=1.0, workers=0)
    if not isinstance(source, ArraySource):
        # The oracle of every loader's views; it starts no process here, and no pipeline on a GPU.
        data = replace(data, loader="torchvision", jitter="exact")
    loader = build_train_loader(
        data,
        sample.config.views,
        batch_size=len(positions),
        seed=sample.config.trainer.seed,
        # All of them, because the views of an image depend on its position.
        source=source,
    )
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean or source.mean, data.std or source.std))
    try:
        (batch,) = loader.batches_of(0, [positions])
    finally:
        loader.close()
    return [(view * std + mean).clamp(0, 1) for view in batch.views], batch.index.tolist()


def _image(view: Tensor) -> Image.Image:  # [ch, h, w]
    pixels = (255 * view).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")


def _recipe(views: list[ViewConfig]) -> Table:
    header = ["views", "size", "area of the crop", "flip", "jitter", "grey", "blur", "solarise"]
    rows = [
        [
            f"{view.count} ×" if view.count > 1 else "1",
            f"{view.size} px",
            f"{view.scale[0]:g} to {view.scale[1]:g}",
            *(f"{p:g}" for p in (view.flip_p, view.jitter_p, view.grey_p, view.blur_p, view.solarize_p)),
        ]
        for view in views
    ]
    return Table(header, rows, "How views are drawn: the last five columns are probabilities.")
