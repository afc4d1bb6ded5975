"""The sets of the transfer protocol (Kornblith et al. 2019; CaCo paper, Table V), by name, with their splits.

Every reader gives the splits as they were released. Where no validation split was released, `val` is None, and the
protocol holds a part of the training images out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caco_fast.data.sources.arrays import cifar10, cifar100, fashion_mnist
from caco_fast.data.sources.base import ArraySource, Source
from caco_fast.data.sources.folder import FolderSource
from caco_fast.data.transfer.lists import Release, images_in, matlab, read_json
from caco_fast.data.transfer.voc import VOC_FOLDERS, voc2007
from caco_fast.errors import UserError

# Training images of each class of Caltech-101; their choice is random, and no list of it was published.
CALTECH_TRAIN = 30


@dataclass(frozen=True)
class TransferSet:
    """The splits of a set, and how it is scored."""

    title: str
    train: Source
    val: Source | None
    test: Source
    metric: str  # top1, mean_per_class or voc
    published: dict[str, int]  # number of images of each split

    @property
    def counts(self) -> dict[str, dict[str, int | None]]:
        """Found and published number of images, by split."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {
            name: {"found": len(source), "published": self.published.get(name)}
            for name, source in splits.items()
            if source is not None
        }


Splits = tuple[Source, Source | None, Source]


@dataclass(frozen=True)
class Known:
    """What is known of a set before its files are read."""

    title: str
    read: Callable[[Release, int], Splits]  # (release, seed)
    folders: tuple[str, ...]  # where the release may be, below the root; the first one that exists
    expected: str
    metric: str = "top1"
    published: dict[str, int] | None = None


def _food101(release: Release, _: int) -> Splits:
    def by_class(path: Path) -> dict[str, list[str]]:
        return {str(name): list(images) for name, images in read_json(path).items()}

    listed = {split: release.read(f"meta/{split}.json", by_class) for split in ("train", "test")}
    classes = sorted(listed["train"])
    rows = {split: [(f"{n}.jpg", name) for name in sorted(of) for n in of[name]] for split, of in listed.items()}
    return release.by_name(rows["train"], classes, "images"), None, release.by_name(rows["test"], classes, "images")


def _sun397(release: Release, _: int) -> Splits:
    classes = [row[0] for row in release.lines("ClassName.txt")]
    found = []
    for split in ("Training_01", "Testing_01"):
        names = [row[0] for row in release.lines(f"{split}.txt")]
        found.append(release.by_name([(name.lstrip("/"), name.rpartition("/")[0]) for name in names], classes))
    return found[0], None, found[1]


def _cars(release: Release, _: int) -> Splits:
    def annotations(path: Path) -> list[tuple[str, int]]:
        rows = np.atleast_1d(matlab(path)["annotations"])
        return [(str(row["fname"]), int(row["class"]) - 1) for row in rows]

    names = release.read("devkit/cars_meta.mat", lambda path: [str(name) for name in matlab(path)["class_names"]])
    train = release.read("devkit/cars_train_annos.mat", annotations)
    test = release.read("cars_test_annos_withlabels.mat", annotations)
    made = [
        release.source([name for name, _ in rows], [label for _, label in rows], names, images)
        for rows, images in ((train, "cars_train"), (test, "cars_test"))
    ]
    return made[0], None, made[1]


def _aircraft(release: Release, _: int) -> Splits:
    made, classes = [], []
    for split in ("train", "val", "test"):
        # A variant may have blanks in its name.
        lines = release.read(f"data/images_variant_{split}.txt", lambda path: path.read_text().splitlines())
        rows = [(f"{number}.jpg", name) for number, _, name in (line.strip().partition(" ") for line in lines) if name]
        classes = classes or sorted({name for _, name in rows})
        made.append(release.by_name(rows, classes, "data/images"))
    return made[0], made[1], made[2]


def _dtd(release: Release, _: int) -> Splits:
    listed = [[row[0] for row in release.lines(f"labels/{split}1.txt")] for split in ("train", "val", "test")]
    classes = sorted({name.partition("/")[0] for name in listed[0]})
    made = [release.by_name([(name, name.partition("/")[0]) for name in names], classes, "images") for names in listed]
    return made[0], made[1], made[2]


def _pets(release: Release, _: int) -> Splits:
    made, classes = [], []
    for split in ("trainval", "test"):
        rows = [(f"{row[0]}.jpg", row[0].rpartition("_")[0]) for row in release.lines(f"annotations/{split}.txt")]
        classes = classes or sorted({name for _, name in rows})
        made.append(release.by_name(rows, classes, "images"))
    return made[0], None, made[1]


def _caltech101(release: Release, seed: int) -> Splits:
    """30 random images of each class to train on, the others to test, BACKGROUND_Google as a class if it is there."""
    root = release.folder / "101_ObjectCategories"
    if not root.is_dir():
        raise release.wrong("has no 101_ObjectCategories")
    images = {folder.name: images_in(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    classes = [name for name, found in images.items() if found]
    rng = np.random.default_rng([seed, 0x43414C54])
    rows: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []
    for name in classes:
        chosen = set(rng.permutation(len(images[name]))[:CALTECH_TRAIN].tolist())
        for position, image in enumerate(images[name]):
            rows[position not in chosen].append((f"{name}/{image}", name))
    made = [release.by_name(part, classes, "101_ObjectCategories") for part in rows]
    return made[0], None, made[1]


def _flowers102(release: Release, _: int) -> Splits:
    labels = release.read("imagelabels.mat", lambda path: np.atleast_1d(matlab(path)["labels"]).astype(np.int64) - 1)
    splits = release.read("setid.mat", lambda path: [matlab(path)[name] for name in ("trnid", "valid", "tstid")])
    classes = [str(number + 1) for number in range(int(labels.max()) + 1)]
    made = [
        release.source([f"image_{n:05d}.jpg" for n in ids], labels[ids - 1].tolist(), classes, "jpg")
        for ids in (np.atleast_1d(part).astype(np.int64) for part in splits)
    ]
    return made[0], made[1], made[2]


def _voc2007(release: Release, _: int) -> Splits:
    return tuple(voc2007(release, split) for split in ("train", "val", "test"))  # type: ignore[return-value]


def _inat18(release: Release, seed: int) -> Splits:
    def annotations(path: Path) -> tuple[list[str], list[int], int]:
        held = read_json(path)
        label = {row["image_id"]: row["category_id"] for row in held["annotations"]}
        images = sorted(held["images"], key=lambda row: row["id"])
        number = 1 + max(row["id"] for row in held["categories"])
        return [row["file_name"] for row in images], [label[row["id"]] for row in images], number

    (names, labels, number), (test_names, test_labels, _) = (
        release.read(f"{split}.json", annotations) for split in ("train2018", "val2018")
    )
    classes = [str(label) for label in range(number)]
    return release.source(names, labels, classes), None, release.source(test_names, test_labels, classes)


def _places205(release: Release, _: int) -> Splits:
    made = []
    for split in ("train", "val"):
        name = f"trainvalsplit_places205/{split}_places205.csv"
        rows = release.lines(name)
        if any(len(row) != 2 or not row[1].isdecimal() for row in rows):
            raise release.wrong(f"has a {name} with other lines than a path and a number")
        number, classes = [int(row[1]) for row in rows], [str(label) for label in range(205)]
        made.append(release.source([row[0] for row in rows], number, classes, "images256"))
    return made[0], None, made[1]


def _folder(release: Release, _: int) -> Splits:
    return FolderSource(str(release.folder), "train"), None, FolderSource(str(release.folder), "test")


def _cifar10(release: Release, _: int) -> Splits:
    return cifar10(str(release.folder), "train"), None, cifar10(str(release.folder), "test")


def _cifar100(release: Release, _: int) -> Splits:
    return cifar100(str(release.folder), "train"), None, cifar100(str(release.folder), "test")


def _embedded(release: Release, _: int) -> Splits:
    return fashion_mnist("train"), None, fashion_mnist("test")


def _digits(release: Release, _: int) -> Splits:
    """A fifth of the 1,797 digits of scikit-learn to test, always the same ones; no split of them was published."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            'digits: they come with scikit-learn, which is not installed; pip install "caco-fast[evaluate]"'
        ) from None
    held: Any = load_digits()
    pixels = np.round(held.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
    order = np.random.default_rng(0x44494749).permutation(len(pixels))
    mean, std = (float(value) / 255 for value in (pixels.mean(), pixels.std()))
    made = []
    for split, part in (("train", order[len(order) // 5 :]), ("test", order[: len(order) // 5])):
        labels, names = held.target[part].astype(np.int64), [str(digit) for digit in range(10)]
        made.append(ArraySource(f"digits {split}", pixels[part], labels, names, (mean,), (std,)))
    return made[0], None, made[1]


_PER_CLASS = "mean_per_class"
TRANSFER_SETS: dict[str, Known] = {
    "food101": Known(
        "Food-101", _food101, ("food-101",), "food-101/meta/train.json and test.json, food-101/images/<class>/*.jpg",
        published={"train": 75_750, "test": 25_250},
    ),
    "cifar10": Known(
        "CIFAR-10", _cifar10, ("cifar10", ""), "cifar-10-batches-py/ or cifar-10-batches-bin/",
        published={"train": 50_000, "test": 10_000},
    ),
    "cifar100": Known(
        "CIFAR-100", _cifar100, ("cifar100", ""), "cifar-100-python/ or cifar-100-binary/",
        published={"train": 50_000, "test": 10_000},
    ),
    "birdsnap": Known(
        "Birdsnap", _folder, ("birdsnap",), "birdsnap/train/<class>/*.jpg and birdsnap/test/<class>/*.jpg",
        published={"train": 47_386, "test": 2_443},
    ),
    "sun397": Known(
        "SUN397, split 1", _sun397, ("SUN397",), "SUN397/ClassName.txt, Training_01.txt, Testing_01.txt, a/abbey/*.jpg",
        published={"train": 19_850, "test": 19_850},
    ),
    "cars": Known(
        "Stanford Cars", _cars, ("stanford_cars",),
        "stanford_cars/devkit/*.mat, cars_test_annos_withlabels.mat, cars_train/*.jpg, cars_test/*.jpg",
        published={"train": 8_144, "test": 8_041},
    ),
    "aircraft": Known(
        "FGVC Aircraft", _aircraft, ("fgvc-aircraft-2013b",),
        "fgvc-aircraft-2013b/data/images_variant_train.txt, _val, _test, data/images/*.jpg", _PER_CLASS,
        {"train": 3_334, "val": 3_333, "test": 3_333},
    ),
    "voc2007": Known(
        "PASCAL VOC2007", _voc2007, tuple(map(str, VOC_FOLDERS)),
        "VOCdevkit/VOC2007/ImageSets/Main/<class>_train.txt, _val, _test, JPEGImages/*.jpg", "voc",
        {"train": 2_501, "val": 2_510, "test": 4_952},
    ),
    "dtd": Known(
        "DTD, split 1", _dtd, ("dtd/dtd", "dtd"), "dtd/labels/train1.txt, val1.txt, test1.txt, images/<class>/*.jpg",
        published={"train": 1_880, "val": 1_880, "test": 1_880},
    ),
    "pets": Known(
        "Oxford-IIIT Pets", _pets, ("oxford-iiit-pet",),
        "oxford-iiit-pet/annotations/trainval.txt and test.txt, images/*.jpg", _PER_CLASS,
        {"train": 3_680, "test": 3_669},
    ),
    "caltech101": Known(
        "Caltech-101", _caltech101, ("caltech101",), "caltech101/101_ObjectCategories/<class>/*.jpg", _PER_CLASS,
        {"train": 3_060, "test": 6_084},
    ),
    "flowers102": Known(
        "Flowers-102", _flowers102, ("flowers-102",), "flowers-102/setid.mat, imagelabels.mat, jpg/image_*.jpg",
        _PER_CLASS, {"train": 1_020, "val": 1_020, "test": 6_149},
    ),
    "inat18": Known(
        "iNaturalist 2018", _inat18, ("inat18", "inaturalist2018", ""),
        "train2018.json, val2018.json, and train_val2018/ as they name it",
        published={"train": 437_513, "test": 24_426},
    ),
    "places205": Known(
        "Places205", _places205, ("places205", ""),
        "trainvalsplit_places205/train_places205.csv and val_places205.csv, images256/",
        published={"train": 2_448_873, "test": 20_500},
    ),
    "digits": Known("digits of scikit-learn", _digits, ("",), "", published={"train": 1_438, "test": 359}),
    "embedded": Known("Fashion-MNIST, embedded", _embedded, ("",), "", published={"train": 10_000, "test": 2_000}),
}  # fmt: skip


def open_set(name: str, root: str | Path, seed: int = 0, key: str = "transfer.root") -> TransferSet:
    """A set by its name, or `folder:PATH` for train/ and test/ of class folders.

    root: the folder in which the release folders are. seed: of Caltech's random split. key: the setting of `root`, for
    the line of an error.

    Raises:
        UserError: there is no such set, or its files are not as released.
    """
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser()
        release = Release(path.name, path, "train/<class>/ and test/<class>/", key)
        train, val, test = _folder(release, seed)
        return TransferSet(path.name, train, val, test, "top1", {})
    if name not in TRANSFER_SETS:
        raise UserError(f"found the set '{name}', expected one of {', '.join(TRANSFER_SETS)}, or folder:PATH")
    known, top = TRANSFER_SETS[name], Path(root).expanduser()
    needs_files = bool(known.expected)
    if needs_files and not str(root):
        raise UserError(f"{key}: found nothing, but {known.title} is read from files; set {key}=DIR")
    if needs_files and not top.is_dir():
        raise UserError(f"{key}: {top} is no folder, expected one that holds {known.expected}")
    folder = next((top / part for part in known.folders if (top / part).is_dir()), top / known.folders[0])
    try:
        train, val, test = known.read(Release(known.title, folder, known.expected, key), seed)
    except UserError as error:
        # Readers that training uses too name its setting, or none.
        found = str(error).removeprefix("data.path: ")
        raise UserError(found if found.startswith((f"{key}: ", known.title, name)) else f"{key}: {found}") from None
    return TransferSet(known.title, train, val, test, known.metric, known.published or {})
