"""The part on nearest neighbours: test images with the training images nearest to them, and classes that are confused.

Legend: N training images, M test images, D feature size, k neighbours.
"""

from collections import Counter

import torch
from torch import Tensor

from caco_fast.protocols.neighbours import nearest
from caco_fast.report.blocks import guarded, share_of
from caco_fast.report.image_sheet import Group, image_sheet
from caco_fast.report.parts import Block, Facts, Missing, Part, Picture, Table
from caco_fast.report.queries import answer, asked, shown
from caco_fast.report.sample import Sample

QUERIES, K = 24, 8
# Neighbours that vote, and temperature of their votes, as in the evaluation of a run.
VOTERS, TEMPERATURE = 20, 0.2
PAIRS = 8


def neighbours_part(sample: Sample) -> Part:
    """The sheet and the table."""
    lead = "Test images, and the training images whose features are nearest to theirs by cosine similarity."
    return Part("neighbours", "Nearest neighbours", guarded(lambda: _blocks(sample), "nearest neighbours"), lead)


def _blocks(sample: Sample) -> list[Block]:
    train, test = sample.train, sample.test
    features = test.outputs[0].to(sample.device)
    similarity, found = (value.cpu() for value in nearest(features, train.outputs[0], VOTERS))
    blocks: list[Block] = [_sheet(sample, similarity, found)]
    if not sample.classes:
        return [*blocks, Missing("which classes are confused, since the images have no labels")]
    labels = train.labels[found]
    guesses = votes(similarity, labels, len(sample.classes))
    right = share_of((guesses == test.labels).sum(), len(guesses))
    same = labels[:, :K] == test.labels.unsqueeze(1)
    facts = Facts(
        [
            (f"neighbours of the same class, of {same.shape[1]}", share_of(same.sum(), same.numel())),
            (f"kNN (k {labels.shape[1]}) with the sampled images alone", right),
            ("training and test images", f"{len(train.index):,} and {len(test.index):,}"),
        ]
    )
    return [*blocks, facts, _confused(sample, guesses)]


def votes(similarity: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The class with the most votes for each test image [M], each vote exp(cosine / t). [M, k], [M, k]"""
    weight = (similarity.double() / TEMPERATURE).exp()
    return torch.zeros(len(labels), classes, dtype=torch.float64).scatter_add_(1, labels, weight).argmax(1)


def confused_pairs(guesses: Tensor, answers: Tensor) -> list[tuple[int, int, int]]:
    """(class, class that it is taken for, how often), the most frequent first."""
    pairs = Counter((a, g) for a, g in zip(answers.tolist(), guesses.tolist()) if a != g)
    return sorted(((a, g, count) for (a, g), count in pairs.items()), key=lambda pair: (-pair[2], pair[:2]))


def _confused(sample: Sample, guesses: Tensor) -> Table:
    counts = sample.test.labels.bincount(minlength=len(sample.classes))
    lines = [
        [sample.classes[a], sample.classes[g], f"{count:,} of {int(counts[a]):,}", share_of(count, counts[a])]
        for a, g, count in confused_pairs(guesses, sample.test.labels)[:PAIRS]
    ]
    return Table(["class", "taken for", "images", "of the class"], lines, "The classes that kNN confuses most often.")


def _sheet(sample: Sample, similarity: Tensor, found: Tensor) -> Picture:
    queries, near = [], []
    for query in shown(sample, QUERIES):
        queries.append([asked(sample, query)])
        pairs = list(zip(found[query].tolist(), similarity[query].tolist()))[:K]
        near.append([answer(sample, query, place, f"cosine {cosine:.2f}") for place, cosine in pairs])
    groups = [Group("image", queries), Group("nearest training images", near)]
    alt = f"{len(queries)} images, each with the {len(near[0])} training images nearest to it, nearest first."
    return Picture(image_sheet(groups), alt, sample.caption)
