"""Trees that other people have: links, capitals, other suffixes, split folders in unexpected places."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caco_fast.data.sources.folder import FolderSource
from caco_fast.data.sources.listing import list_images
from caco_fast.errors import UserError

WriteImage = Callable[..., Path]


def names(source: FolderSource) -> list[str]:
    return [os.path.relpath(source.name(index), source.root) for index in range(len(source))]


def test_a_linked_folder_below_a_class_is_followed(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "d" / "train" / "a" / "0.jpg")
    write_image(tmp_path / "elsewhere" / "deep" / "1.jpg")
    (tmp_path / "d" / "train" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    assert names(FolderSource(str(tmp_path / "d"))) == ["a/0.jpg", "a/more/deep/1.jpg"]


def test_links_make_no_loop_and_no_image_counts_twice(tmp_path: Path, write_image: WriteImage) -> None:
    top = tmp_path / "d"
    for name in ("train/a/0.jpg", "train/b/1.jpg", "val/a/2.jpg"):
        write_image(top / name)
    write_image(tmp_path / "else" / "in" / "3.jpg")
    links = {
        "train/a/self": top / "train" / "a",
        "train/a/up": top,
        "train/a/val": top / "val" / "a",
        "train/b/again": top / "train" / "a",
        "train/b/in": tmp_path / "else" / "in",
        "train/b/out": tmp_path / "else",
        "train/c": top / "train" / "b",
    }
    for name, target in links.items():
        (top / name).symlink_to(target)
    (tmp_path / "else" / "in" / "round").symlink_to(tmp_path / "else")
    source = FolderSource(str(top))
    assert sorted(Path(name).name for name in names(source)) == ["0.jpg", "1.jpg", "3.jpg"]
    # A link to another class is no class, in training or in its test images.
    assert source.classes == ["a", "b"] == FolderSource(str(top), "test").classes


def test_what_is_left_out_is_counted_by_suffix_and_said_once(
    tmp_path: Path, write_image: WriteImage, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/0.jpg", "a/@eaDir/0.jpg", "__MACOSX/1.jpg"):
        write_image(tmp_path / name)
    for name in ("a/0.xml", "a/1.XML", "a/scan.heic", "b"):
        (tmp_path / name).write_text("")
    listing = list_images(tmp_path)
    assert listing.names == ["a/0.jpg"] and listing.folders == ["a"]
    assert listing.left_out == {".xml": 2, ".heic": 1, "": 1}
    assert len(FolderSource(str(tmp_path))) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("4 files are no images by their suffix and are left out: .xml 2, .heic 1, no suffix 1")


def test_an_unreadable_kind_of_file_is_named_where_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_text("")
    with pytest.raises(UserError, match=r"no images in .* \(but 1 other files: .heic 1\), expected"):
        FolderSource(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "dib", "pbm", "pnm", "jp2", "tga", "avif", "TIF", "apng"])
def test_every_suffix_that_counts_is_decoded(tmp_path: Path, suffix: str) -> None:
    pixels = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    image = Image.fromarray(pixels)
    if suffix == "avif":
        pytest.importorskip("PIL._avif", reason="this PIL reads no AVIF")
    image.convert("1" if suffix == "pbm" else "RGB").save(tmp_path / f"image.{suffix}")
    found = np.asarray(FolderSource(str(tmp_path)).image(0)).astype(int)
    assert found.shape == (16, 16, 3)
    if suffix != "pbm":
        assert np.abs(found - pixels).max() <= 12


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "VAL"), ("train", "Val")])
def test_capitals_of_the_split_folders_do_not_matter(
    tmp_path: Path, write_image: WriteImage, train: str, test: str
) -> None:
    for name in (f"{train}/ant/0.jpg", f"{train}/bee/1.jpg", f"{test}/bee/2.jpg"):
        write_image(tmp_path / name)
    source, held = FolderSource(str(tmp_path)), FolderSource(str(tmp_path), "test")
    assert names(source) == ["ant/0.jpg", "bee/1.jpg"] and source.classes == ["ant", "bee"]
    assert names(held) == ["bee/2.jpg"] and held.classes == source.classes and held.label(0) == 1


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        # ImageNet as it is unpacked, with its XML files.
        (("Data/CLS-LOC/train/n1/0.jpg", "Data/CLS-LOC/val/1.jpg", "Annotations/CLS-LOC/val/1.xml"), "Data/CLS-LOC"),
        (("images/train/0.jpg", "images/val/1.jpg", "labels/val/1.txt"), "images"),
        (("Training/a/0.jpg", "Testing/a/1.jpg"), None),
        (("dog/train/0.jpg", "dog/val/1.jpg", "cat/train/2.jpg", "cat/val/3.jpg"), None),
        (("dog/0.jpg", "dog/test/1.jpg"), None),
    ],
)
def test_test_images_below_the_folder_are_refused(
    tmp_path: Path, write_image: WriteImage, files: tuple[str, ...], advice: str | None
) -> None:
    for name in files:
        write_image(tmp_path / name)
    with pytest.raises(UserError, match="holds test images in .*/, which would be trained on") as error:
        FolderSource(str(tmp_path))
    told = str(error.value).partition("; set ")[2]
    assert told == (f"data.path={tmp_path / advice}" if advice else "data.path to a folder with train/ and val/ in it")
    if advice:
        assert len(FolderSource(str(tmp_path / advice))) == 1


def test_a_folder_named_test_in_a_named_train_folder_is_said(
    tmp_path: Path, write_image: WriteImage, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train/a/0.jpg", "train/a/Test/1.jpg"):
        write_image(tmp_path / name)
    assert len(FolderSource(str(tmp_path))) == 2
    assert "train holds a/Test/: its images are trained on" in caplog.text
