"""Files whose pixels are easily got wrong: each way of reading them gives the same verdict and the same pixels."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from caco_fast.data import DataConfig, build_source
from caco_fast.data.sources.base import BadImageError, decode, grey_range
from caco_fast.data.sources.folder import FolderSource
from caco_fast.data.sources.index import IndexSource
from caco_fast.data.sources.make_index import main
from caco_fast.errors import UserError

RAMP = np.linspace(0, 1, 1024).reshape(32, 32)


def by_pil(data: bytes, max_pixels: int = 10**6) -> np.ndarray | str:
    try:
        return np.asarray(decode(io.BytesIO(data), max_pixels))
    except BadImageError as error:
        return str(error)


def by_dali(data: bytes, max_pixels: int = 10**6) -> np.ndarray | str:
    """What the DALI loader makes of one file: DALI's pixels, or PIL's of what DALI is not given or refuses."""
    from caco_fast.data.loaders.dali_graph import DaliGraph
    from caco_fast.data.loaders.dali_pipeline import prepare

    try:
        file = prepare(data, max_pixels)
    except BadImageError as error:
        return str(error)
    graph = DaliGraph([], 3, 1, threads=1, device=torch.device("cpu"), crops=False)
    try:
        graph.feed([file.data])
        return np.asarray(graph.collect()[0])
    except RuntimeError:
        return by_pil(data, max_pixels)


@pytest.fixture(params=["pil", "dali"])
def read(request: pytest.FixtureRequest) -> Callable[..., np.ndarray | str]:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
        return by_dali
    return by_pil


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("values", "kind", "ends"),
    [
        (RAMP.astype(np.float32), "TIFF", (0, 1)),
        ((RAMP * 255).astype(np.float32), "TIFF", (0, 255)),
        ((RAMP * 2 - 1).astype(np.float32), "TIFF", (-1, 1)),
        (np.where(RAMP > 0, RAMP * 900, np.nan).astype(np.float32), "TIFF", (0, 4095)),
        # An overshoot of a filter.
        ((RAMP * 1.001).astype(np.float32), "TIFF", (0, 1.001)),
        ((RAMP > 0.5).astype(np.int32), "TIFF", (0, 1)),
        ((RAMP * 5).astype(np.uint16), "PNG", (0, 5)),
        ((RAMP * 4095).astype(np.uint16), "PNG", (0, 4095)),
        ((RAMP * 4095).astype(np.uint16), "TIFF", (0, 4095)),
        ((RAMP * 65535).astype(np.uint16), "PNG", (0, 65535)),
        ((RAMP * 4095).astype(np.int32), "TIFF", (0, 4095)),
        ((RAMP * 5095 - 1000).astype(np.int32), "TIFF", (-1000, 4095)),
        ((RAMP * 2e9).astype(np.int32), "TIFF", (0, 2e9)),
        (np.full((4, 4), -7, np.int32), "TIFF", (-7, -7)),
    ],
)
def test_grey_of_more_than_8_bits_is_scaled(
    read: Callable[..., np.ndarray | str], values: np.ndarray, kind: str, ends: tuple[float, float]
) -> None:
    data = saved(Image.fromarray(values), kind)
    with Image.open(io.BytesIO(data)) as image:
        low, high = grey_range(image)
    assert (low, high) == pytest.approx(ends, abs=1e-6)
    wanted = np.nan_to_num((values.astype(float) - low) * 255 / (high - low))
    assert np.abs(read(data) - wanted[..., None]).max() <= 1


def test_the_colour_below_transparency_is_the_stored_one(read: Callable[..., np.ndarray | str]) -> None:
    image = Image.new("RGBA", (8, 8), (250, 20, 10, 0))
    for data in (saved(image, "PNG"), saved(image, "WEBP", lossless=True, exact=True)):
        assert (read(data) == (250, 20, 10)).all()


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("chunk", ["text", "international text", "profile"])
def test_large_metadata_of_a_png_is_no_damage(read: Callable[..., np.ndarray | str], chunk: str) -> None:
    info = PngImagePlugin.PngInfo()
    if chunk == "profile":
        data = saved(photo(), "PNG", icc_profile=bytes(2_000_000))
    else:
        (info.add_text if chunk == "text" else info.add_itxt)("key", "a" * 2_000_000, zip=True)
        data = saved(photo(), "PNG", pnginfo=info)
    assert np.array_equal(read(data), np.asarray(photo()))


def test_a_damaged_png_is_bad_for_every_reader(read: Callable[..., np.ndarray | str]) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("key", "words")
    whole = saved(photo(), "PNG", pnginfo=info)
    for place in (whole.index(b"words"), whole.index(b"IDAT") + 20, len(whole) // 2):
        flipped = bytearray(whole)
        flipped[place] ^= 0x55
        assert isinstance(read(bytes(flipped)), str), place
    assert isinstance(read(whole[: len(whole) // 2]), str)
    # Nothing of the pixels is missing.
    assert np.array_equal(read(whole[:-12]), np.asarray(photo()))
    assert np.array_equal(read(whole), np.asarray(photo()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_too_many_pixels_are_a_bad_image_that_names_the_setting(
    read: Callable[..., np.ndarray | str], kind: str
) -> None:
    data = saved(photo(), kind)
    line = "40 pixels are too many; if it is meant, raise data.max_pixels (it is 1199)"
    assert read(data, 1199) == f"30 x {line}"
    assert read(data, 1200).shape == (40, 30, 3)


def test_the_setting_reaches_the_source(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    source = build_source(DataConfig(path=str(tmp_path), max_pixels=1199), "train")
    with pytest.raises(BadImageError, match="raise data.max_pixels"):
        source.image(0)
    with pytest.raises(UserError, match="data.max_pixels: found 0, expected 1 or more$"):
        DataConfig(path=str(tmp_path), max_pixels=0).validate()


def test_more_pixels_than_pil_takes_can_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = saved(photo(), "PNG")
    assert "raise data.max_pixels (it is 400)" in by_pil(data, 400)
    assert by_pil(data, 1200).shape == (40, 30, 3)


def test_the_index_gives_the_same_verdicts_and_names_what_it_rescaled(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("key", "a" * 2_000_000, zip=True)
    files = {
        "deep.png": saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
        "flipped.png": saved(photo(), "PNG").replace(b"IDAT", b"IDAU"),
        "float.tif": saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        "text.png": saved(photo(), "PNG", pnginfo=info),
        "twelve.png": saved(Image.fromarray((RAMP * 4095).astype(np.uint16)), "PNG"),
        "wide.png": saved(Image.new("RGB", (300, 20)), "PNG"),
    }
    files["opaque.png"] = saved(Image.new("RGBA", (8, 8), (1, 2, 3, 255)), "PNG")
    files["clear.gif"] = saved(Image.new("P", (8, 8)), "GIF", transparency=0)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert main([str(tmp_path), "--workers", "1", "--max-pixels", "5000"]) == 0
    report = (tmp_path / "caco_fast_index.npz.report.txt").read_text().splitlines()
    found = {(line.split("\t")[0], Path(line.split("\t")[1]).name): line.split("\t")[2] for line in report}
    assert set(found) == {
        ("broken", "flipped.png"),
        ("broken", "wide.png"),
        ("grey scaled to 8 bits", "float.tif"),
        ("grey scaled to 8 bits", "twelve.png"),
        ("transparent", "clear.gif"),
    }
    assert "data.max_pixels" in found["broken", "wide.png"]
    assert found["grey scaled to 8 bits", "twelve.png"].startswith("0 becomes 0 and 4095 becomes 255")
    assert found["transparent", "clear.gif"].startswith("100% of it")
    index, folder = IndexSource(str(tmp_path / "caco_fast_index.npz")), FolderSource(str(tmp_path))
    pixels = {folder.name(number): number for number in range(len(folder))}
    for number in range(len(index)):
        assert np.array_equal(index.image(number), folder.image(pixels[index.name(number)]))


def test_the_checksum_of_a_png_chunk_is_looked_at_before_the_pixels_only(
    read: Callable[..., np.ndarray | str],
) -> None:
    whole = saved(photo(), "PNG")
    words = b"tEXtkey\0words"
    damaged = (5 + 4).to_bytes(4, "big") + words + (zlib.crc32(words) ^ 1).to_bytes(4, "big")
    assert isinstance(read(whole[:33] + damaged + whole[33:]), str)
    assert np.array_equal(read(whole[:-12] + damaged + whole[-12:]), np.asarray(photo()))
