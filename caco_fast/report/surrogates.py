"""The part on the rows that test images choose, as images (paper, Fig. 3), and how often they have the same class.

Legend: N training images, M test images, K bank rows, C embedding size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.ops import bank_select
from caco_fast.ops.tiling import f32_products
from caco_fast.protocols.images import evenly_spaced
from caco_fast.protocols.surrogates import HARDEST, RANDOM, by_chance
from caco_fast.report.blocks import guarded, share_of
from caco_fast.report.image_sheet import Cell, Group, image_sheet
from caco_fast.report.parts import Block, Missing, Part, Picture, Table
from caco_fast.report.sample import Sample

QUERIES = 12
HEADINGS = "image", "nearest", "the next rows", "random rows"
OF_POSITIVES = "image", "positive", "hardest negatives", "random rows"
NEAREST = "Test images with the row nearest to each of them, the next ones, and two random ones."
CHOSEN = "Test images with the row that is the positive of each of them, its hardest negatives, and two random rows."


def surrogates_part(sample: Sample) -> Part:
    """The sheet, and the share of right surrogates in each checkpoint that the run kept."""
    blocks = guarded(lambda: [_sheet(sample), _shares(sample)], "the rows of some images")
    lead = f"{CHOSEN if sample.chooses else NEAREST} A row is shown as its surrogate, the training image nearest to it."
    return Part("surrogates", "Rows as images", blocks, lead)


def right_surrogates(bank: Tensor, train: Tensor, labels: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of the rows' surrogates [K], and of those which the test images choose [M].

    bank: [K, C]. train, test: embeddings [N, C], [M, C]. labels: of the training images [N].
    """
    of_rows = labels[bank_select(F.normalize(bank, dim=1), train)[0].cpu()]
    return of_rows, of_rows[bank_select(test, bank)[0].cpu()]


def _shares(sample: Sample) -> Block:
    if not sample.classes:
        return Missing("how often the surrogate has the class of the image, since the images have no labels")
    train, test, device = sample.train, sample.test, sample.device
    earlier = zip(sample.earlier, train.outputs[-len(sample.earlier) :], test.outputs[-len(sample.earlier) :])
    every = [*earlier, (sample.saved, train.outputs[1], test.outputs[1])]
    lines = []
    for saved, of_train, of_test in every:
        assert saved.bank is not None
        rows = saved.bank.to(device), of_train.to(device), train.labels, of_test.to(device)
        of_rows, found = right_surrogates(*rows)
        chance = 100.0 * by_chance(of_rows, test.labels)
        lines.append([f"step {saved.step:,}", share_of((found == test.labels).sum(), len(found)), f"{chance:.1f} %"])
    caption = f"How often the surrogate of the nearest row has the class of the image, of {len(test.labels):,} images."
    return Table(["checkpoint", "same class", "a random row"], lines, caption)


def _sheet(sample: Sample) -> Picture:
    train, test, bank = sample.train, sample.test, sample.saved.bank
    assert bank is not None
    # In the order of the set, whose neighbours are often of one class.
    shown = test.index.argsort()[evenly_spaced(len(test.index), QUERIES)]
    unit, embeddings = F.normalize(bank, dim=1), train.outputs[1].to(sample.device)
    surrogate = bank_select(unit.to(sample.device), embeddings)[0].cpu()
    with f32_products():
        similarity = test.outputs[1][shown] @ unit.T
    near = similarity.topk(min(1 + HARDEST, len(bank)), dim=1).indices
    random = torch.randint(len(bank), (len(shown), RANDOM), generator=torch.Generator().manual_seed(0))

    def cell(query: int, row: int, cosine: float) -> Cell:
        place = int(surrogate[row])
        title = f"row {row:,}: cosine to the image {cosine:.2f}"
        if sample.classes:
            title += f"; {sample.classes[int(train.labels[place])]}"
        wrong = bool(sample.classes) and int(train.labels[place]) != int(test.labels[query])
        return Cell(sample.thumbnail(train.source, train.index[place]), title, wrong)

    lines: list[list[list[Cell]]] = [[], [], [], []]
    for number, query in enumerate(shown.tolist()):
        name = sample.classes[int(test.labels[query])] if sample.classes else test.source.name(int(test.index[query]))
        lines[0].append([Cell(sample.thumbnail(test.source, test.index[query]), name)])
        for line, rows in zip(lines[1:], (near[number, :1], near[number, 1:], random[number])):
            line.append([cell(query, row, float(similarity[number, row])) for row in rows.tolist()])
    headings = OF_POSITIVES if sample.chooses else HEADINGS
    groups = [Group(heading, rows) for heading, rows in zip(headings, lines) if rows[0]]
    alt = (
        f"{len(shown)} images, each with the training images nearest to the row nearest to it, to the next "
        f"{HARDEST} rows and to {RANDOM} random ones."
    )
    return Picture(image_sheet(groups), alt, sample.caption)
