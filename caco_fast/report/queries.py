"""Test images on a sheet, and the training images that are shown for each of them."""

from caco_fast.protocols.images import evenly_spaced
from caco_fast.report.image_sheet import Cell
from caco_fast.report.sample import Sample


def shown(sample: Sample, count: int) -> list[int]:
    """Rows of the sample's test images, evenly spaced over the set, whose neighbours are often of one class."""
    index = sample.test.index
    return index.argsort()[evenly_spaced(len(index), count)].tolist()


def asked(sample: Sample, query: int) -> Cell:
    """A test image, named by its class, or by its file where there are no labels."""
    test = sample.test
    index = int(test.index[query])
    name = sample.classes[int(test.labels[query])] if sample.classes else test.source.name(index)
    return Cell(sample.thumbnail(test.source, index), name)


def answer(sample: Sample, query: int, place: int, title: str) -> Cell:
    """A training image for a test image, both by their rows in the sample; framed if its class is another."""
    train = sample.train
    wrong = False
    if sample.classes:
        label = int(train.labels[place])
        title += f"; {sample.classes[label]}"
        wrong = label != int(sample.test.labels[query])
    return Cell(sample.thumbnail(train.source, train.index[place]), title, wrong)
