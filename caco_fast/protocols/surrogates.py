"""The bank as images (paper Fig. 3): each row's surrogate is the training image whose embedding is nearest to it.

The positive of a test image is the bank row that is most similar to its embedding (eq. 11), and its hardest negatives
are the next ones. The headline is how often the surrogate of the positive has the class of the test image.

Legend: N images of this rank, M test images of all ranks, K bank rows, C embedding size.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caco_fast.distributed import all_gather_objects, all_gather_uneven
from caco_fast.engine.agreement import on_rank_0, together
from caco_fast.errors import UserError
from caco_fast.ops import bank_select
from caco_fast.ops.tiling import f32_products
from caco_fast.pretrained.encoders import read_encoders
from caco_fast.protocols.base import Context, Result, register
from caco_fast.protocols.images import evenly_spaced
from caco_fast.protocols.sheet import Picture, Row, draw_sheet, framed
from caco_fast.settings import require_at_least, setting

# Rows of features that are embedded at a time.
BLOCK = 8192
HARDEST, RANDOM = 4, 2
TITLES = ["positive", "hardest negatives", "random rows"]


@dataclass(frozen=True)
class SurrogatesConfig:
    queries: int = setting(12, "test images on the sheet, evenly spaced over the set")

    def __post_init__(self) -> None:
        require_at_least("surrogates.queries", self.queries, 1)


@register("surrogates", SurrogatesConfig, "the rows of a learned bank as their nearest images")
def surrogates(context: Context, settings: SurrogatesConfig) -> Result:
    projector, bank = together(lambda: _head_and_bank(context))
    train, test = context.features("train"), context.features("test")
    place, label = _nearest_images(bank, _embed(projector, train.features, context), train.labels, train.index)
    queries = _embed(projector, all_gather_uneven(test.features), context)  # [M, C]
    answers, places = all_gather_uneven(test.labels), all_gather_uneven(test.index)
    positives = bank_select(queries, bank)[0].cpu()
    right = label[positives] == answers
    figures = {
        "surrogate_has_class": 100.0 * right.double().mean().item(),
        # What a row that is chosen by chance would give.
        "random_row_has_class": 100.0 * by_chance(label, answers),
        "rows_chosen": float(len(positives.unique())),
    }
    shown = evenly_spaced(len(queries), settings.queries)
    with f32_products():
        similarity = queries[shown] @ F.normalize(bank, dim=1).T
    nearest = similarity.topk(min(1 + HARDEST, len(bank)), dim=1).indices.cpu()
    random = torch.randint(len(bank), (len(shown), RANDOM), generator=torch.Generator().manual_seed(context.seed))
    path = context.folder / "surrogates.png"
    sheet = [
        Row(
            Picture(test.source, int(places[query])),
            [
                [framed(train.source, int(place[row]), bool(label[row] == answers[query])) for row in group]
                for group in (rows[:1], rows[1:-RANDOM], rows[-RANDOM:])
            ],
        )
        for query, rows in zip(shown.tolist(), torch.cat([nearest, random], 1).tolist())
    ]
    on_rank_0(lambda: draw_sheet(sheet, TITLES, path))
    return Result(figures, files=[path.name])


def by_chance(label: Tensor, answers: Tensor) -> float:
    """The probability that the surrogate of a random row has the class of a random test image."""
    classes = int(torch.cat([label, answers]).max()) + 1
    of_rows, of_queries = (value.bincount(minlength=classes).double() / len(value) for value in (label, answers))
    return float(of_rows @ of_queries)


def _head_and_bank(context: Context) -> tuple[nn.Module, Tensor]:
    """The projector of the queries' encoder, and the rows [K, C] of the bank, on the device.

    Raises:
        UserError: the source is no run of ours, or its method has no learned bank.
    """
    pretrained = context.pretrained
    if pretrained.config is None:
        raise UserError(f"surrogates: {pretrained.title} has no bank, expected a run of a method with a learned bank")
    path = Path(pretrained.origin["path"])
    saved = read_encoders(path)
    if saved.bank is None or not saved.learned:
        raise UserError(f"surrogates: the method {pretrained.config.method} of {path} has no learned bank")
    return saved.query.projector.to(context.device), saved.bank.to(context.device)


@torch.no_grad()
def _embed(projector: nn.Module, features: Tensor, context: Context) -> Tensor:
    """Unit embeddings [N, C] of features [N, D]."""
    parts = [projector(part.to(context.device).float()) for part in features.split(BLOCK)]
    return F.normalize(torch.cat(parts), dim=1)


def _nearest_images(bank: Tensor, keys: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Dataset index and label of the image nearest to each bank row, [K] each, over the images of all ranks."""
    # The rows ask, and the images are the bank that they search.
    found, similarity = bank_select(F.normalize(bank, dim=1), keys)
    parts = all_gather_objects((similarity.cpu(), index[found.cpu()], labels[found.cpu()]))
    similarity, place, label = (torch.stack(part) for part in zip(*parts))
    best = similarity.argmax(0, keepdim=True)
    return place.gather(0, best)[0], label.gather(0, best)[0]
