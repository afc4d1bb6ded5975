"""The transfer sets, from trees in their real layouts: each image with its label, and lines for what is wrong."""

import builtins
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from caco_fast.data import Source
from caco_fast.data.transfer import TRANSFER_SETS, VocSource, open_set
from caco_fast.errors import UserError
from tests.data.trees import Tree, make_tree

TREES = [name for name in TRANSFER_SETS if name not in ("cifar10", "cifar100", "digits", "embedded")]


def made(name: str, root: Path) -> Tree:
    if name in ("cars", "flowers102"):
        pytest.importorskip("scipy")
    return make_tree(name, root)


def held(source: Source) -> list[tuple[object, int]]:
    """What the source says of each image, and which image it is, by its colour."""
    several = isinstance(source, VocSource)
    said = [source.targets[i].tolist() if several else source.label(i) for i in range(len(source))]
    return sorted(((label, round(float(np.asarray(source.image(i)).mean()))) for i, label in enumerate(said)), key=str)


@pytest.mark.parametrize("name", [name for name in TREES if name != "caltech101"])
def test_every_image_has_its_label_and_its_split(name: str, tmp_path: Path) -> None:
    tree = made(name, tmp_path)
    found = open_set(name, tmp_path)
    assert held(found.train) == sorted(tree.held["train"], key=str)
    assert held(found.test) == sorted(tree.held["test"], key=str)
    assert (found.val is None) == ("val" not in tree.held)
    if found.val is not None:
        assert held(found.val) == sorted(tree.held["val"], key=str)
    assert found.train.classes == found.test.classes
    published = TRANSFER_SETS[name].published
    assert found.counts["train"] == {"found": len(tree.held["train"]), "published": published["train"]}


def test_caltech_draws_30_images_of_each_class(tmp_path: Path) -> None:
    tree = make_tree("caltech101", tmp_path)
    splits = {seed: open_set("caltech101", tmp_path, seed) for seed in (0, 0, 1)}
    for found in splits.values():
        assert Counter(label for label, _ in held(found.train)) == {0: 30, 1: 30}
        assert sorted(held(found.train) + held(found.test)) == sorted(tree.held["all"])
        assert found.train.classes == ["Faces", "accordion"]
    assert held(splits[0].train) == held(open_set("caltech101", tmp_path).train) != held(splits[1].train)


def test_the_background_of_caltech_is_a_class_if_it_has_images(tmp_path: Path) -> None:
    tree = make_tree("caltech101", tmp_path)
    tree.image(tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google" / "image_0001.jpg")
    assert open_set("caltech101", tmp_path).train.classes == ["BACKGROUND_Google", "Faces", "accordion"]


def test_the_digits_and_the_embedded_images_need_no_files() -> None:
    pytest.importorskip("sklearn")
    digits, embedded = open_set("digits", ""), open_set("embedded", "")
    assert (len(digits.train), len(digits.test)) == (1438, 359) and digits.train.channels == 1
    names = {digits.train.image(i).tobytes() for i in range(1438)} & {
        digits.test.image(i).tobytes() for i in range(359)
    }
    assert len(names) < 5
    assert {digits.test.label(i) for i in range(359)} == set(range(10))
    assert (len(embedded.train), len(embedded.test), embedded.metric) == (10_000, 2_000, "top1")


def test_any_folder_of_classes_is_a_set(tmp_path: Path) -> None:
    tree = make_tree("birdsnap", tmp_path)
    found = open_set(f"folder:{tmp_path / 'birdsnap'}", "")
    assert held(found.train) == sorted(tree.held["train"]) and found.counts["test"] == {"found": 6, "published": None}


def damage(name: str, root: Path) -> None:
    """Something that is wrong with a tree."""
    if name == "sun397":
        (root / "SUN397" / "Testing_01.txt").write_text("/q/quarry/sun_1.jpg\n")
    elif name == "food101":
        (root / "food-101" / "meta" / "test.json").write_text(json.dumps(["apple"]))
    elif name == "voc2007":
        path = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "dog_val.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    elif name == "dtd":
        shutil.rmtree(root / "dtd" / "dtd" / "images" / "banded")
    elif name == "places205":
        path = root / "places205" / "trainvalsplit_places205" / "val_places205.csv"
        path.write_text(path.read_text().replace(" 204", " 205"))
    elif name == "pets":
        (root / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("")


@pytest.mark.parametrize(
    "name, line",
    [
        ("sun397", "has the class /q/quarry, which the training images don't have"),
        ("food101", "has a meta/test.json that can't be read"),
        ("voc2007", "dog_val.txt with other images than aeroplane_val.txt"),
        ("dtd", r"lists images/banded/banded_train0.jpg, which is not there"),
        ("places205", "has labels from 0 to 205 for 205 classes"),
        ("pets", "lists no images"),
    ],
)
def test_what_is_not_as_released_is_one_line(name: str, line: str, tmp_path: Path) -> None:
    make_tree(name, tmp_path)
    damage(name, tmp_path)
    with pytest.raises(UserError, match=line) as raised:
        open_set(name, tmp_path, key="transfer.root")
    assert str(raised.value).startswith("transfer.root: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name in TRANSFER_SETS if TRANSFER_SETS[name].expected])
def test_a_missing_set_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^transfer\.root: ") as raised:
        open_set(name, tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="transfer.root: found nothing"):
        open_set(name, "")
    with pytest.raises(UserError, match="transfer.root: .* is no folder"):
        open_set(name, tmp_path / "nowhere")


def test_unknown_sets_and_missing_packages_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="found the set 'food', expected one of food101, "):
        open_set("food", tmp_path)
    pytest.importorskip("scipy")
    make_tree("flowers102", tmp_path)
    imports = builtins.__import__

    def without(name: str, *rest: object, **named: object) -> object:
        if name.partition(".")[0] in ("scipy", "sklearn"):
            raise ImportError(name)
        return imports(name, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"Flowers-102 has its labels in MATLAB files.*caco-fast\[evaluate\]"):
        open_set("flowers102", tmp_path)
    with pytest.raises(UserError, match=r"digits: .*caco-fast\[evaluate\]"):
        open_set("digits", "")
