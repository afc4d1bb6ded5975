"""The part on the bank: how often its rows are chosen, how long and how alike they are, and what images they are like.

The row that an image chooses is the one most similar to its key (eq. 11). For a queue of keys it is the nearest key.

Legend: N images, K bank rows, C embedding size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.ops import bank_select
from caco_fast.ops.tiling import f32_products
from caco_fast.protocols.images import evenly_spaced
from caco_fast.report.blocks import guarded, share_of
from caco_fast.report.drawing import bars, beside, histogram, lorenz
from caco_fast.report.image_sheet import Cell, Group, image_sheet
from caco_fast.report.parts import Block, Facts, Missing, Part, Picture, Table
from caco_fast.report.sample import Sample

# Rows that are compared with all others.
COMPARED = 2048
# Rows of each group of the sheet, and how many of them are in a line.
SHOWN, LINE = 16, 8
CHOSEN = (
    "Every image chooses the row most similar to its key, which is its positive. A bank is in use if many rows are "
    "chosen about as often; rows that most images choose are hubs, which teach little."
)
NEGATIVES = "The rows are negatives. An image chooses the row nearest to it, which is its hardest negative."
QUEUE = "The rows are embeddings of past images. An image chooses the nearest one."
# Classes in the table.
CLASSES = 12


def bank_part(sample: Sample) -> Part:
    """What the bank is like, as far as it can be said."""
    bank = sample.saved.bank
    assert bank is not None
    name = "bank" if sample.saved.learned else "queue"
    charts = guarded(lambda: _choices(sample, bank, name), "how often rows are chosen")
    shape = guarded(lambda: _shape(bank, name), "norms of the rows")
    images = guarded(lambda: _as_images(sample, bank), "rows as their nearest images")
    lead = QUEUE
    if sample.saved.learned:
        lead = CHOSEN if sample.chooses else NEGATIVES
    return Part("bank", f"The {name}", [*charts, *shape, *images], lead)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the choices: the number of rows in use, in effect."""
    return float(torch.special.entr(counts.double() / counts.sum()).sum().exp())


@f32_products()
def nearest_rows(bank: Tensor, most: int = COMPARED) -> Tensor:
    """The cosine of each row, or of `most` evenly spaced ones, to the row nearest to it."""
    unit = F.normalize(bank, dim=1)
    chosen = evenly_spaced(len(bank), most).to(bank.device)
    similarity = unit[chosen] @ unit.T
    similarity[torch.arange(len(chosen), device=bank.device), chosen] = -torch.inf
    return similarity.max(1).values.cpu()


def _choices(sample: Sample, bank: Tensor, name: str) -> list[Block]:
    counts = sample.counts
    images, rows = int(counts.sum()), len(bank)
    chosen = int((counts > 0).sum())
    half = int((counts.sort(descending=True).values.cumsum(0) < images / 2).sum()) + 1
    facts = [
        ("images that chose", f"{images:,}"),
        ("rows", f"{rows:,}"),
        ("rows chosen at least once", f"{chosen:,} ({100 * chosen / rows:.1f} %)"),
        ("dead rows, which no image chose", f"{rows - chosen:,} ({100 * (rows - chosen) / rows:.1f} %)"),
        ("perplexity of the choices, in rows", f"{perplexity(counts):,.1f}"),
        ("rows that half of the images chose", f"{half:,}"),
    ]
    if images < rows:
        facts[3] = (facts[3][0], f"{facts[3][1]}; {images:,} images can choose no more than {images:,} rows")
    drawn = beside(
        _histogram_of(counts),
        lorenz("Share of the choices", "share of the rows, least chosen first", counts),
    )
    alt = (
        f"Two charts of how {images:,} images chose rows of the {name}: {chosen:,} of {rows:,} rows were chosen, "
        f"and {half:,} of them by half of the images."
    )
    caption = "The further the curve is below the diagonal, the fewer rows have most of the choices."
    return [Facts(facts), Picture(drawn, alt, caption)]


def _histogram_of(counts: Tensor) -> str:
    """Bars of rows by their number of choices: 0, 1, 2 to 3, 4 to 7, and so on."""
    places = torch.where(counts > 0, counts.clamp_min(1).double().log2().floor() + 1, 0.0).long()
    height = places.bincount()
    names = ["0", "1", *(f"{2**n}–{2 ** (n + 1) - 1}" for n in range(1, len(height) - 1))][: len(height)]
    hover = [f"{count:,} rows were chosen {name} times" for count, name in zip(height.tolist(), names)]
    # Not below every bar where they would touch.
    every = math.ceil(len(names) / 6)
    labels = [name if number % every == 0 else "" for number, name in enumerate(names)]
    return bars("Rows by their choices", "times that a row was chosen", height.tolist(), labels, hover)


def _shape(bank: Tensor, name: str) -> list[Block]:
    norms, cosines = bank.norm(dim=1), nearest_rows(bank)
    low, middle, high = norms.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    drawn = beside(
        histogram("Length of the rows", "norm", norms, "rows"),
        histogram("Cosine to the nearest other row", "cosine", cosines, "rows"),
    )
    alt = (
        f"Two histograms of the rows of the {name}: norms with a median of {middle:.3g} (5 % below {low:.3g}, 5 % "
        f"above {high:.3g}), and the cosine to the nearest other row with a median of {float(cosines.median()):.2f}."
    )
    caption = "Rows near a cosine of 1 are copies of each other."
    if len(cosines) < len(bank):
        caption += f" The cosines are those of {len(cosines):,} rows to all {len(bank):,}."
    return [Picture(drawn, alt, caption)]


def _as_images(sample: Sample, bank: Tensor) -> list[Block]:
    # The rows ask, and the images are the bank that they search.
    unit, keys = F.normalize(bank, dim=1).to(sample.device), sample.keys().to(sample.device)
    found, similarity = (value.cpu() for value in bank_select(unit, keys))
    counts = sample.counts
    source, index, labels = sample.train.source, sample.train.index, sample.train.labels

    def cell(row: int) -> Cell:
        place, count = int(found[row]), int(counts[row])
        title = f"row {row:,}: chosen {count:,} times; cosine to this image {float(similarity[row]):.2f}"
        if sample.classes:
            title += f"; {sample.classes[int(labels[place])]}"
        return Cell(sample.thumbnail(source, index[place]), title, under=f"{count:,}×")

    groups = [
        Group(heading, [list(map(cell, rows[start : start + LINE])) for start in range(0, len(rows), LINE)])
        for heading, rows in rows_shown(counts)
        if rows
    ]
    drawn = image_sheet(groups, below=True)
    alt = "Rows of the bank, each as the training image nearest to it, with the number of images that chose the row."
    blocks: list[Block] = [Picture(drawn, alt, "Each row as the training image nearest to it, and its choices.")]
    if sample.classes:
        blocks.append(_classes(sample, labels[found], counts, labels))
    else:
        blocks.append(Missing("the class that each row is like, since the images have no labels"))
    return blocks


def rows_shown(counts: Tensor) -> list[tuple[str, list[int]]]:
    """Rows of the sheet: the most chosen ones, those in the middle of all that were chosen, and the least chosen."""
    order = counts.argsort(descending=True, stable=True).tolist()
    most, least = order[:SHOWN], order[SHOWN:][-SHOWN:]
    rest = order[SHOWN:-SHOWN]
    between = [row for row in rest if counts[row] > 0] or rest
    start = max(0, (len(between) - SHOWN) // 2)
    middle = between[start : start + SHOWN]
    return [("most chosen", most), ("in the middle", middle), ("least chosen", least)]


def _classes(sample: Sample, of_rows: Tensor, counts: Tensor, of_images: Tensor) -> Table:
    """How many rows are like images of each class, and how often these are chosen. [K], [K], [N]"""
    number = len(sample.classes)
    rows, images = of_rows.bincount(minlength=number), of_images.bincount(minlength=number)
    chosen = torch.zeros(number, dtype=torch.int64).index_add_(0, of_rows, counts)
    order = rows.argsort(descending=True, stable=True).tolist()
    shown = order if number <= CLASSES else order[: CLASSES // 2] + order[-CLASSES // 2 :]
    lines = [
        [
            sample.classes[label],
            share_of(rows[label], rows.sum()),
            share_of(chosen[label], chosen.sum()),
            share_of(images[label], images.sum()),
        ]
        for label in shown
    ]
    caption = "Each row has the class of the image nearest to it."
    if number > CLASSES:
        caption += f" The {CLASSES // 2} classes with the most and the fewest rows, of {number:,}."
    return Table(["class", "rows", "choices", "images"], lines, caption)
