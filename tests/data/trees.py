"""Small trees in the layouts of the released transfer sets: the colour of an image says which one it is."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from caco_fast.data.transfer.voc import VOC_CLASSES


class Tree:
    """A tree that is written; `held` is what it should give, by split: (label or targets, colour) of each image."""

    def __init__(self, root: Path, noise: bool = False) -> None:
        """noise: write random pixels, for tests of what is learned from the images."""
        self.root, self.noise = root, np.random.default_rng(0) if noise else None
        self.held: dict[str, list[tuple[object, int]]] = {}
        self._count = 0

    def image(self, path: Path, label: object = None, split: str = "") -> None:
        """Write an image of 12 x 12 pixels of a new grey value."""
        self._count += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (12, 12), (self._count,) * 3)
        if self.noise is not None:
            image = Image.fromarray(self.noise.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        image.save(path, quality=100)
        if split:
            self.held.setdefault(split, []).append((label, self._count))

    def text(self, path: Path, lines: list[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def make_tree(name: str, root: Path, per_class: int = 3, noise: bool = False) -> Tree:
    tree = Tree(root, noise)
    globals()[f"_{name}"](tree, per_class)
    return tree


def _food101(tree: Tree, n: int) -> None:
    top = tree.root / "food-101"
    for split in ("train", "test"):
        listed = {name: [f"{name}/{split}{i}" for i in range(n)] for name in ("apple_pie", "waffles")}
        for label, images in enumerate(listed.values()):
            for image in images:
                tree.image(top / "images" / f"{image}.jpg", label, split)
        tree.text(top / "meta" / f"{split}.json", [json.dumps(listed)])


def _sun397(tree: Tree, n: int) -> None:
    top, classes = tree.root / "SUN397", ["/a/abbey", "/a/apartment_building/outdoor", "/z/zoo"]
    tree.text(top / "ClassName.txt", classes)
    for split, file in (("train", "Training_01"), ("test", "Testing_01")):
        lines = []
        for label, name in enumerate(classes):
            for i in range(n):
                lines.append(f"{name}/sun_{split}{i}.jpg")
                tree.image(top / lines[-1].lstrip("/"), label, split)
        tree.text(top / f"{file}.txt", lines)


def _cars(tree: Tree, n: int) -> None:
    from scipy.io import savemat

    top, names = tree.root / "stanford_cars", ["AM General Hummer", "Acura RL"]
    (top / "devkit").mkdir(parents=True)
    savemat(top / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    for split in ("train", "test"):
        rows = []
        for i in range(2 * n):
            file = f"{i + 1:05d}.jpg"
            tree.image(top / f"cars_{split}" / file, i % 2, split)
            rows.append((1, 1, 2, 2, i % 2 + 1, file))
        fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        where = top / "devkit" / "cars_train_annos.mat" if split == "train" else top / "cars_test_annos_withlabels.mat"
        savemat(where, {"annotations": np.array(rows, dtype=fields)})


def _aircraft(tree: Tree, n: int) -> None:
    top = tree.root / "fgvc-aircraft-2013b" / "data"
    for number, split in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(("707-320", "Cessna 172", "F/A-18")):
            for i in range(n):
                lines.append(f"{number}{label}{i:05d} {name}")
                tree.image(top / "images" / f"{lines[-1].split()[0]}.jpg", label, split)
        tree.text(top / f"images_variant_{split}.txt", lines)


def _dtd(tree: Tree, n: int) -> None:
    top = tree.root / "dtd" / "dtd"
    for split in ("train", "val", "test"):
        lines = [f"{name}/{name}_{split}{i}.jpg" for name in ("banded", "zigzagged") for i in range(n)]
        for line in lines:
            tree.image(top / "images" / line, int(line.startswith("zig")), split)
        tree.text(top / "labels" / f"{split}1.txt", lines)


def _pets(tree: Tree, n: int) -> None:
    top = tree.root / "oxford-iiit-pet"
    for split, file in (("train", "trainval"), ("test", "test")):
        lines = []
        for label, name in enumerate(("Abyssinian", "american_bulldog", "yorkshire_terrier")):
            for i in range(n):
                lines.append(f"{name}_{split}{i} {label + 1} 1 1")
                tree.image(top / "images" / f"{name}_{split}{i}.jpg", label, split)
        tree.text(top / "annotations" / f"{file}.txt", lines)


def _caltech101(tree: Tree, n: int) -> None:
    top = tree.root / "caltech101" / "101_ObjectCategories"
    (top / "BACKGROUND_Google").mkdir(parents=True)
    for label, name in enumerate(("Faces", "accordion")):
        for i in range(30 + n):
            tree.image(top / name / f"image_{i + 1:04d}.jpg", label, "all")


def _flowers102(tree: Tree, n: int) -> None:
    from scipy.io import savemat

    top = tree.root / "flowers-102"
    count = 9 * n
    labels = [i % 3 + 1 for i in range(count)]
    ids = np.random.default_rng(0).permutation(count) + 1
    parts = dict(zip(("train", "val", "test"), (ids[:n], ids[n : 3 * n], ids[3 * n :])))
    split_of = {int(i): split for split, part in parts.items() for i in part}
    for i in range(1, count + 1):
        tree.image(top / "jpg" / f"image_{i:05d}.jpg", labels[i - 1] - 1, split_of[i])
    savemat(top / "imagelabels.mat", {"labels": np.array(labels)})
    savemat(top / "setid.mat", dict(zip(("trnid", "valid", "tstid"), parts.values())))


def _voc2007(tree: Tree, n: int) -> None:
    top = tree.root / "VOCdevkit" / "VOC2007"
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train", "val", "test")):
        targets = rng.integers(-1, 2, (4 * n, 20))
        for i, row in enumerate(targets):
            tree.image(top / "JPEGImages" / f"{number}{i:05d}.jpg", row.tolist(), split)
        for column, name in enumerate(VOC_CLASSES):
            lines = [f"{number}{i:05d} {row[column]:>2d}" for i, row in enumerate(targets)]
            tree.text(top / "ImageSets" / "Main" / f"{name}_{split}.txt", lines)


def _birdsnap(tree: Tree, n: int) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(("Acadian_Flycatcher", "Yellow_Warbler")):
            for i in range(n):
                tree.image(tree.root / "birdsnap" / split / name / f"{i}.jpg", label, split)


def _inat18(tree: Tree, n: int) -> None:
    top, categories = tree.root / "inat18", [{"id": i, "name": str(i)} for i in range(3)]
    for split, file in (("train", "train2018"), ("test", "val2018")):
        images, annotations = [], []
        for i in range(3 * n):
            name = f"train_val2018/Plantae/{i % 3}/{split}{i}.jpg"
            tree.image(top / name, i % 3, split)
            images.append({"id": i, "file_name": name})
            annotations.append({"id": i, "image_id": i, "category_id": i % 3})
        # The order of the annotations is not that of the images.
        held = {"images": images, "annotations": annotations[::-1], "categories": categories}
        tree.text(top / f"{file}.json", [json.dumps(held)])


def _places205(tree: Tree, n: int) -> None:
    top = tree.root / "places205"
    for split, file in (("train", "train"), ("test", "val")):
        lines = []
        for label, name in ((0, "a/abbey"), (204, "y/yard")):
            for i in range(n):
                lines.append(f"{name}/gsun_{split}{i}.jpg {label}")
                tree.image(top / "images256" / lines[-1].split()[0], label, split)
        tree.text(top / "trainvalsplit_places205" / f"{file}_places205.csv", lines)
