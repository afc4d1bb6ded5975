"""Test images with their nearest training images by cosine similarity: a sheet to look at, and how often they agree.

Legend: Q queries, N training rows of this rank, D feature size, k neighbours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.distributed import all_gather_objects, all_gather_uneven
from caco_fast.engine.agreement import on_rank_0
from caco_fast.ops.tiling import f32_products
from caco_fast.protocols.base import Context, Result, register
from caco_fast.protocols.images import evenly_spaced
from caco_fast.protocols.sheet import Picture, Row, draw_sheet, framed
from caco_fast.settings import require_at_least, setting

# Rows of a rank that are compared at a time.
BLOCK = 65536
# Test images that the figure is a mean over; the sheet shows some of them.
MEASURED = 2000


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
    chosen = evenly_spaced(len(rows), MEASURED)
    queries, answers, places = rows[chosen], answers[chosen], places[chosen]
    similarity, found = nearest(queries.to(context.device), train.features, settings.k)
    # Few numbers, so that every rank may have all of them.
    parts = all_gather_objects((similarity.cpu(), train.labels[found].cpu(), train.index[found].cpu()))
    similarity, labels, index = (torch.cat(part, dim=1) for part in zip(*parts))
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, : settings.k]
    labels, index = labels.gather(1, order), index.gather(1, order)
    right = labels == answers.unsqueeze(1)
    path = context.folder / "neighbours.png"
    shown = evenly_spaced(len(queries), settings.queries)

    rows_shown = [
        Row(
            Picture(test.source, int(places[query])),
            [[framed(train.source, int(i), bool(r)) for i, r in zip(index[query], right[query])]],
        )
        for query in shown.tolist()
    ]
    title = "nearest training images: green, the same class; red, another"
    on_rank_0(lambda: draw_sheet(rows_shown, [title], path))
    share = 100.0 * right.double().mean().item()
    return Result({f"same_class_of_{index.shape[1]}": share}, files=[path.name])


@f32_products()
def nearest(queries: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [Q, D], [N, D]
    """Similarities and rows of this rank's k nearest, [Q, k] each, nearest first; fewer where it has fewer rows."""
    unit = F.normalize(queries.float(), dim=1)
    best, place = unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for start in range(0, len(features), BLOCK):
        block = F.normalize(features[start : start + BLOCK].to(unit.device).float(), dim=1)
        values, columns = (unit @ block.T).topk(min(k, len(block)), dim=1)
        best, place = torch.cat([best, values], 1), torch.cat([place, columns + start], 1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        place = place.gather(1, kept)
    return best, place.cpu()
