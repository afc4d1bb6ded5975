import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caco_fast.data import (
    BadImageError,
    DataConfig,
    ViewConfig,
    build_eval_loader,
    build_source,
    build_train_loader,
)
from caco_fast.data.sources import listing as listing_module
from caco_fast.data.sources.folder import FolderSource
from caco_fast.errors import UserError


def names(source: FolderSource) -> list[str]:
    return [os.path.relpath(source.name(index), source.root) for index in range(len(source))]


def test_images_are_sorted_by_class_and_name_and_labelled(image_folder: Path) -> None:
    source = build_source(DataConfig(path=str(image_folder)), "train")
    assert source.classes == ["ant", "bee"]
    assert names(source) == [f"{kind}/{kind}_{number}.JPEG" for kind in ("ant", "bee") for number in range(6)]
    assert [source.label(index) for index in range(12)] == [0] * 6 + [1] * 6
    assert source.image(0).mode == "RGB" and source.image(0).size == (24, 20)


def test_the_pixels_are_those_of_the_named_file(image_folder: Path) -> None:
    source = FolderSource(str(image_folder))
    for index in (0, 5, 6, 11):
        assert np.array_equal(source.image(index), Image.open(source.name(index)))


@pytest.mark.parametrize("name", ["val", "test"])
def test_test_images_take_the_labels_of_the_training_classes(image_folder: Path, name: str) -> None:
    (image_folder / "val" / "ant").rename(image_folder / "gone")
    (image_folder / "val").rename(image_folder / name)
    source = FolderSource(str(image_folder), "test")
    assert len(source) == 2 and {source.label(0), source.label(1)} == {1} and source.classes == ["ant", "bee"]


def test_a_test_class_unknown_to_training_is_refused(image_folder: Path) -> None:
    (image_folder / "val" / "bee").rename(image_folder / "val" / "wasp")
    with pytest.raises(UserError, match=r"val/wasp is a class that the training set doesn't have"):
        FolderSource(str(image_folder), "test")


def test_images_without_class_folders_have_no_labels(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for name in ("b.jpg", "a.PNG", "ü.webp"):
        write_image(tmp_path / name)
    source = FolderSource(str(tmp_path))
    assert names(source) == ["a.PNG", "b.jpg", "ü.webp"]
    assert source.classes == [] and [source.label(index) for index in range(3)] == [-1] * 3


def test_flat_test_images_have_no_labels(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "train" / "ant" / "a.jpg")
    write_image(tmp_path / "val" / "a.jpg")
    source = FolderSource(str(tmp_path), "test")
    assert source.classes == [] and source.label(0) == -1


def test_subfolders_are_walked_and_other_files_left_out(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for name in ("c/deep/er/x.jpg", "c/y.jpeg", "c/._y.jpeg", ".git/z.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "c" / "notes.txt").write_text("")
    (tmp_path / "Thumbs.db").write_text("")
    source = FolderSource(str(tmp_path))
    assert names(source) == ["c/deep/er/x.jpg", "c/y.jpeg"] and source.classes == ["c"]


def test_images_beside_class_folders_are_left_out_with_a_warning(
    image_folder: Path, write_image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    write_image(image_folder / "train" / "stray.jpg")
    assert len(FolderSource(str(image_folder))) == 12
    assert "the 1 images next to them are left out" in caplog.text


def test_folders_without_images_beside_loose_images_are_no_classes(
    tmp_path: Path, write_image: Callable[..., Path]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "round").symlink_to(tmp_path / "round")
    write_image(tmp_path / "a.jpg")
    source = FolderSource(str(tmp_path))
    assert names(source) == ["a.jpg"] and source.classes == []


def test_a_name_that_is_not_utf8_is_read_and_can_be_printed(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "plain.jpg").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    source = FolderSource(str(tmp_path))
    assert source.image(0).mode == "RGB"
    assert source.name(0).endswith("caf\\xe9.jpg")


def make(tmp_path: Path, image: Image.Image, suffix: str, **options: object) -> np.ndarray:
    image.save(tmp_path / f"image{suffix}", **options)
    decoded = FolderSource(str(tmp_path)).image(0)
    assert decoded.mode == "RGB"
    return np.asarray(decoded).astype(int)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = make(tmp_path, Image.fromarray(levels), ".png")
    assert np.abs(decoded - np.arange(256).reshape(16, 16, 1)).max() <= 1


def test_cmyk_palette_grey_and_transparent_files_become_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (250, 20, 10))
    files = {
        "cmyk.jpg": red.convert("CMYK"),
        "palette.gif": red.quantize(),
        "palette_transparent.png": red.convert("RGBA").quantize(),
        "transparent.png": Image.new("RGBA", (8, 8), (250, 20, 10, 128)),
        "grey.jpg": Image.new("L", (8, 8), 120),
        "grey_transparent.png": Image.new("LA", (8, 8), (120, 10)),
        "bit.png": Image.new("1", (8, 8), 1),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
    source = FolderSource(str(tmp_path))
    wanted = {"grey": (120, 120, 120), "bit": (255, 255, 255)}
    for index, name in enumerate(sorted(files)):
        image = source.image(index)
        assert image.mode == "RGB", name
        colour = wanted.get(name.split("_")[0].split(".")[0], (250, 20, 10))
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= 12, name


def bad_files(folder: Path, good: bytes) -> Iterator[str]:
    """Writes one file of every kind of damage and yields the names."""

    def png_chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    damage = {
        "truncated": good[: len(good) * 2 // 3],
        "header_only": good[:100],
        "empty": b"",
        "html": b"<html>404</html>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "bomb": bomb,
    }
    for name, data in damage.items():
        (folder / f"{name}.jpg").write_bytes(data)
        yield name
    (folder / "directory.jpg").mkdir()
    yield "directory"
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    yield "dangling"


def test_damaged_files_of_every_kind_are_bad_images(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    good = write_image(tmp_path / "good" / "good.jpg", width=200, height=200).read_bytes()
    written = set(bad_files(tmp_path / "good", good))
    source = FolderSource(str(tmp_path))
    found = set()
    for index in range(len(source)):
        try:
            source.image(index)
        except BadImageError as error:
            assert str(error)
            found.add(Path(source.name(index)).stem)
    assert found == written and len(source) == len(written) + 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nowhere", r"nowhere doesn't exist, expected"),
        ("file", r"file is a file, expected"),
        ("empty", r"no images in .*empty, expected"),
        ("only_val", r"only_val has val/ but no train/"),
    ],
)
def test_a_wrong_path_is_one_clear_line(tmp_path: Path, path: str, line: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_val" / "val").mkdir(parents=True)
    with pytest.raises(UserError, match=line) as error:
        FolderSource(str(tmp_path / path))
    assert "\n" not in str(error.value)


def test_a_set_without_test_images_says_so(image_folder: Path) -> None:
    (image_folder / "val").rename(image_folder / "valid")
    with pytest.raises(UserError, match="neither val/ nor test/"):
        FolderSource(str(image_folder), "test")


def test_a_folder_that_may_not_be_read_is_one_clear_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    try:
        # Root reads everything, so the check runs as nobody.
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(UserError, match=r"no permission to read .*closed"):
            FolderSource(str(closed))
    finally:
        os.seteuid(os.getuid())
        closed.chmod(0o700)


def test_encoded_is_the_file_and_a_vanished_file_is_a_bad_image(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (5, 4), (1, 2, 3)).save(folder / "a.png")
    source = FolderSource(str(tmp_path))
    assert source.encoded(0) == (folder / "a.png").read_bytes()
    (folder / "a.png").unlink()
    with pytest.raises(BadImageError, match="FileNotFoundError"):
        source.encoded(0)


def no_listing(*arguments: object) -> None:
    raise AssertionError("a folder was listed")


def test_a_source_that_is_given_is_not_listed_again(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(image_folder), loader="torchvision", workers=0)
    source = build_source(config, "train")
    monkeypatch.setattr(listing_module, "_entries", no_listing)
    loader = build_train_loader(config, [ViewConfig(size=8)], batch_size=4, seed=0, source=source)
    assert len(next(loader.batches(0)).index) == 4
    evaluation = build_eval_loader(config, "train", batch_size=5, source=source)
    assert evaluation.source is source and len(evaluation) == 3
    wrong = DataConfig(path=str(image_folder), mean=[0.5])
    with pytest.raises(UserError, match="data.mean: found 1 values, expected 3"):
        build_eval_loader(wrong, "train", batch_size=5, source=source)


@pytest.mark.parametrize(
    "settings", [{"prefetch": 0}, {"mean": [0.5]}, {"std": [1.0]}, {"loader": "torchvision", "jitter": "fast"}]
)
def test_settings_are_checked_before_a_file_is_listed(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    monkeypatch.setattr(listing_module, "_entries", no_listing)
    with pytest.raises(UserError, match="^data[.][a-z]+: found .* (expected|exact)"):
        build_train_loader(DataConfig(path=str(image_folder), **settings), [ViewConfig(size=8)], batch_size=4, seed=0)
