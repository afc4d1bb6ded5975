"""Test images with their nearest training images by cosine similarity: a sheet to look at, and how often they agree.

Legend: Q queries, N training rows of this rank, D feature size, k neighbours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from caco_fast.data import BadImageError, Source
from caco_fast.data.sources.base import as_pil
from caco_fast.distributed import all_gather_objects, all_gather_uneven
from caco_fast.engine.agreement import on_rank_0
from caco_fast.protocols.base import Context, Result, register
from caco_fast.settings import require_at_least, setting
from caco_fast.storage import atomic_write

# Rows of a rank that are compared at a time.
BLOCK = 65536
# Test images that the figure is a mean over; the sheet shows some of them.
MEASURED = 2000
CELL, GAP, FRAME, TEXT = 72, 6, 3, 16
RIGHT, WRONG, PAPER, INK = "#3a8a3e", "#c8321e", "#ffffff", "#222222"


@dataclass(frozen=True)
class NeighboursConfig:
    queries: int = setting(16, "test images on the sheet, evenly spaced over the set")
    k: int = setting(8, "neighbours of each")

    def __post_init__(self) -> None:
        require_at_least("neighbours.queries", self.queries, 1)
        require_at_least("neighbours.k", self.k, 1)


@register("neighbours", NeighboursConfig, "a sheet of test images with their nearest training images")
def neighbours(context: Context, settings: NeighboursConfig) -> Result:
    train, test = context.features("train"), context.features("test")
    rows, answers, places = (all_gather_uneven(value) for value in (test.features, test.labels, test.index))
    chosen = _spaced(len(rows), MEASURED)
    queries, answers, places = rows[chosen], answers[chosen], places[chosen]
    similarity, found = _nearest(queries.to(context.device), train.features, settings.k)
    # Few numbers, so that every rank may have all of them.
    parts = all_gather_objects((similarity.cpu(), train.labels[found].cpu(), train.index[found].cpu()))
    similarity, labels, index = (torch.cat(part, dim=1) for part in zip(*parts))
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, : settings.k]
    labels, index = labels.gather(1, order), index.gather(1, order)
    right = labels == answers.unsqueeze(1)
    path = context.folder / "neighbours.png"
    shown = _spaced(len(queries), settings.queries)

    def write() -> None:
        sheet = _sheet(test.source, places[shown].tolist(), train.source, index[shown].tolist(), right[shown].tolist())
        with atomic_write(path) as file:
            sheet.save(file, "PNG")

    on_rank_0(write)
    share = 100.0 * right.double().mean().item()
    return Result({f"same_class_of_{index.shape[1]}": share}, files=[path.name])


def _spaced(count: int, most: int) -> Tensor:
    """At most `most` positions, evenly spaced over `count`."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def _nearest(queries: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [Q, D], [N, D]
    """Similarities and rows of this rank's k nearest, [Q, k] each; fewer where the rank has fewer rows."""
    unit = F.normalize(queries.float(), dim=1)
    best, place = unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for start in range(0, len(features), BLOCK):
        block = F.normalize(features[start : start + BLOCK].to(unit.device).float(), dim=1)
        values, columns = (unit @ block.T).topk(min(k, len(block)), dim=1)
        best, place = torch.cat([best, values], 1), torch.cat([place, columns + start], 1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        place = place.gather(1, kept)
    return best, place.cpu()


def _sheet(
    test: Source, queries: list[int], train: Source, index: list[list[int]], right: list[list[bool]]
) -> Image.Image:
    """A row for each query: the image, its class, and its neighbours in frames that say whether their class agrees."""
    step, label = CELL + 2 * FRAME + GAP, 110
    width = GAP + step + label + step * len(index[0])
    sheet = Image.new("RGB", (width, GAP + TEXT + GAP + step * len(queries)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((GAP, GAP), "test image", INK, font)
    draw.text((GAP + step + label, GAP), "nearest training images: green, the same class; red, another", INK, font)
    for row, (query, found) in enumerate(zip(queries, index)):
        top = GAP + TEXT + GAP + row * step
        _paste(sheet, draw, test, query, (GAP, top), None)
        name = test.classes[test.label(query)] if test.classes else ""
        draw.text((GAP + step, top + CELL // 2), name[:16], INK, font)
        for column, position in enumerate(found):
            colour = RIGHT if right[row][column] else WRONG
            _paste(sheet, draw, train, position, (GAP + step + label + step * column, top), colour)
    return sheet


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, source: Source, index: int, at: tuple[int, int], frame: str | None
) -> None:
    x, y = at
    if frame:
        draw.rectangle((x, y, x + CELL + 2 * FRAME - 1, y + CELL + 2 * FRAME - 1), fill=frame)
    try:
        image = as_pil(source.image(index)).convert("RGB")
    except BadImageError:
        # It could be read a moment ago; an empty frame says enough.
        return
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    small = image.crop((left, top, left + side, top + side)).resize((CELL, CELL), Image.Resampling.BICUBIC)
    sheet.paste(small, (x + FRAME, y + FRAME))
