"""What is drawn: sheets of images, charts and the places of a map."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import torch
from PIL import Image

from caco_fast.report.drawing import TOP, bars, histogram, lorenz
from caco_fast.report.image_sheet import CELL, GAP, Cell, Group, image_sheet
from caco_fast.report.map import SIDE, placed, spread_out

SVG = "{http://www.w3.org/2000/svg}"
COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (200, 200, 20), (20, 200, 200)]


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_a_sheet_shows_every_image_at_its_place() -> None:
    cells = [Cell(Image.new("RGB", (64, 64), colour), f"image {n}") for n, colour in enumerate(COLOURS)]
    root = parsed(image_sheet([Group("first", [[cells[0]], [cells[1]]]), Group("second", [cells[2:4], cells[3:5]])]))
    (atlas,) = root.iter(f"{SVG}image")
    pixels = Image.open(io.BytesIO(base64.b64decode(atlas.get("href", "").partition(",")[2]))).convert("RGB")
    found = {}
    for shown in root.iter(f"{SVG}svg"):
        if shown is root:
            continue
        left, top, width, height = map(float, shown.get("viewBox", "").split())
        middle = pixels.getpixel((int(left + width / 2), int(top + height / 2)))
        nearest = min(range(5), key=lambda n: sum(abs(a - b) for a, b in zip(COLOURS[n], middle)))
        found[float(shown.get("x", 0)), float(shown.get("y", 0))] = nearest
    columns, rows = sorted({x for x, _ in found}), sorted({y for _, y in found})
    assert [[found.get((x, y)) for x in columns] for y in rows] == [[0, 2, 3], [1, 3, 4]]
    assert columns[2] - columns[1] == rows[1] - rows[0] == CELL + GAP < columns[1] - columns[0]
    assert [title.text for title in root.iter(f"{SVG}title")] == [f"image {n}" for n in (0, 1, 2, 3, 3, 4)]


def test_names_are_escaped() -> None:
    cell = Cell(Image.new("RGB", (8, 8)), "<b>&", under="<i>")
    root = parsed(image_sheet([Group("<u>", [[cell]])]))
    assert {element.text for element in root.iter() if element.text} == {"<b>&", "<i>", "<u>"}
    assert "<b>" not in bars("<b>", "<b>", [1.0], ["<b>"], ["<b>"])


def test_an_image_that_cannot_be_read_leaves_its_place() -> None:
    cells = [Cell(None, "gone", wrong=True), Cell(Image.new("RGB", (64, 64), "red"), "there")]
    root = parsed(image_sheet([Group("", [cells])]))
    assert len(list(root.iter(f"{SVG}use"))) == 1
    assert [rect.get("stroke") for rect in root.iter(f"{SVG}rect")] == ["#c8321e"]
    assert "<use" not in image_sheet([Group("", [cells[:1]])])


def test_bars_are_as_high_as_their_counts() -> None:
    root = parsed(bars("title", "unit", [4.0, 2.0, 0.0], ["a", "b", "c"], ["of a", "of b", "of c"]))
    drawn = [float(rect.get("height", 0)) for rect in root.iter(f"{SVG}rect") if rect.get("fill") != "transparent"]
    assert drawn[1:] == [drawn[0] / 2, 0]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts == ["title", "a", "4", "b", "2", "c", "0", "unit"]


def test_a_histogram_counts_in_equal_parts() -> None:
    values = torch.cat([torch.zeros(5), torch.full((3,), 0.99), torch.tensor([2.0])])
    titles = re.findall("<title>(.*?)</title>", histogram("t", "u", values, "rows", bins=2))
    assert titles == ["8 rows from 0 to 1.00", "1 rows from 1.00 to 2.00"]
    assert "4 rows" in histogram("t", "u", torch.ones(4), "rows")


def test_a_lorenz_curve_ends_at_the_corners_and_names_half() -> None:
    svg = lorenz("t", "u", torch.tensor([0, 0, 1, 1, 2, 4]))
    assert "<title>1 of 6 rows have half of the choices</title>" in svg
    points = re.findall(r"([\d.]+),([\d.]+)", re.search('polyline points="([^"]*)"', svg)[1])  # type: ignore[index]
    heights = [float(y) for _, y in points]
    assert heights == sorted(heights, reverse=True) and heights[0] == heights[1] and heights[-1] == TOP


def test_places_keep_distances_and_stay_inside() -> None:
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 20.0])
    found = placed(points)
    assert float(found.min()) >= 0 and float(found.max()) <= SIDE
    inside = ((found > 4) & (found < SIDE - 4)).all(1)
    assert int(inside.sum()) > 190
    a, b = (torch.pdist(value[inside].double()) for value in (points, found))
    torch.testing.assert_close(b, a * (b[0] / a[0]), atol=0.01, rtol=1e-3)


def test_images_of_a_map_are_in_dense_places_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.cat([torch.randn(50, 2, generator=generator) + torch.tensor([x, 0.0]) for x in (50.0, 150.0)])
    lonely = torch.tensor([[300.0, 300.0]])
    found = spread_out(torch.cat([dense, lonely]), 2, 40.0)
    assert sorted(point // 50 for point in found) == [0, 1]
    assert len(spread_out(dense, 12, 40.0)) == 2
