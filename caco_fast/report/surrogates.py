"""The part on the rows that test images choose, as images (paper, Fig. 3), and how often they have the same class.

Legend: N training images, M test images, K bank rows, C embedding size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from caco_fast.ops import bank_select
from caco_fast.ops.tiling import f32_products
from caco_fast.pretrained.encoders import Saved
from caco_fast.protocols.surrogates import HARDEST, RANDOM, by_chance
from caco_fast.report.blocks import guarded, share_of
from caco_fast.report.image_sheet import Cell, Group, image_sheet
from caco_fast.report.parts import Block, Missing, Part, Picture, Table
from caco_fast.report.queries import answer, asked, shown
from caco_fast.report.sample import Sample

QUERIES = 12
HEADINGS = "image", "nearest", "the next rows", "random rows"
OF_POSITIVES = "image", "positive", "hardest negatives", "random rows"
NEAREST = "Test images with the row nearest to each of them, the next ones, and two random ones."
CHOSEN = "Test images with the row that is the positive of each of them, its hardest negatives, and two random rows."


def surrogates_part(sample: Sample) -> Part:
    """The sheet, and the share of right surrogates in each checkpoint that the run kept."""
    blocks = guarded(lambda: _blocks(sample), "the rows of some images")
    lead = f"{CHOSEN if sample.chooses else NEAREST} A row is shown as its surrogate, the training image nearest to it."
    return Part("surrogates", "Rows as images", blocks, lead)


def _blocks(sample: Sample) -> list[Block]:
    bank = sample.saved.bank
    assert bank is not None
    surrogate = _surrogates(bank, sample.train.outputs[1], sample.device)
    return [_sheet(sample, bank, surrogate), _shares(sample, surrogate)]


def _surrogates(bank: Tensor, train: Tensor, device: torch.device) -> Tensor:  # [K, C], [N, C] -> [K]
    """The training image nearest to each row."""
    return bank_select(F.normalize(bank, dim=1).to(device), train.to(device))[0].cpu()


def _shares(sample: Sample, surrogate: Tensor) -> Block:
    if not sample.classes:
        return Missing("how often the surrogate has the class of the image, since the images have no labels")
    train, test, device = sample.train, sample.test, sample.device
    lines = []

    def add(saved: Saved, surrogate: Tensor, of_test: Tensor) -> None:
        assert saved.bank is not None
        of_rows = train.labels[surrogate]
        found = of_rows[bank_select(of_test.to(device), saved.bank.to(device))[0].cpu()]
        chance = 100.0 * by_chance(of_rows, test.labels)
        lines.append([f"step {saved.step:,}", share_of((found == test.labels).sum(), len(found)), f"{chance:.1f} %"])

    many = len(sample.earlier)
    for saved, of_train, of_test in zip(sample.earlier, train.outputs[-many:], test.outputs[-many:]):
        assert saved.bank is not None
        add(saved, _surrogates(saved.bank, of_train, device), of_test)
    add(sample.saved, surrogate, test.outputs[1])
    caption = f"How often the surrogate of the nearest row has the class of the image, of {len(test.labels):,} images."
    return Table(["checkpoint", "same class", "a random row"], lines, caption)


def _sheet(sample: Sample, bank: Tensor, surrogate: Tensor) -> Picture:
    queries = shown(sample, QUERIES)
    with f32_products():
        similarity = sample.test.outputs[1][queries] @ F.normalize(bank, dim=1).T
    near = similarity.topk(min(1 + HARDEST, len(bank)), dim=1).indices
    random = torch.randint(len(bank), (len(queries), RANDOM), generator=torch.Generator().manual_seed(0))

    def cell(number: int, row: int) -> Cell:
        title = f"row {row:,}: cosine to the image {float(similarity[number, row]):.2f}"
        return answer(sample, queries[number], int(surrogate[row]), title)

    lines: list[list[list[Cell]]] = [[], [], [], []]
    for number, query in enumerate(queries):
        lines[0].append([asked(sample, query)])
        for line, rows in zip(lines[1:], (near[number, :1], near[number, 1:], random[number])):
            line.append([cell(number, row) for row in rows.tolist()])
    headings = OF_POSITIVES if sample.chooses else HEADINGS
    groups = [Group(heading, rows) for heading, rows in zip(headings, lines) if rows[0]]
    alt = (
        f"{len(queries)} images, each with the training images nearest to the row nearest to it, to the next "
        f"{HARDEST} rows and to {RANDOM} random ones."
    )
    return Picture(image_sheet(groups), alt, sample.caption)
