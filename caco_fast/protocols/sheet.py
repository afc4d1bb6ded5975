"""A sheet of images: in each row a test image with its class, and the images that were found for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from caco_fast.data import BadImageError, Source
from caco_fast.data.sources.base import as_pil
from caco_fast.storage import atomic_write

CELL, GAP, FRAME, TEXT, NAME = 72, 6, 3, 16, 110
# Between groups of images.
APART = 18
STEP = CELL + 2 * FRAME + GAP
RIGHT, WRONG, PAPER, INK = "#3a8a3e", "#c8321e", "#ffffff", "#222222"


@dataclass(frozen=True)
class Picture:
    source: Source
    index: int
    frame: str | None = None  # a colour


@dataclass(frozen=True)
class Row:
    query: Picture
    groups: Sequence[Sequence[Picture]]


def framed(source: Source, index: int, right: bool) -> Picture:
    """An image in a frame that says whether its class is that of the query."""
    return Picture(source, index, RIGHT if right else WRONG)


def draw_sheet(rows: Sequence[Row], titles: Sequence[str], path: Path) -> None:
    """Draw the rows, with a title above each group of what was found, and write them as PNG."""
    lefts = [GAP + STEP + NAME]
    for group in rows[0].groups:
        lefts.append(lefts[-1] + STEP * len(group) + APART)
    sheet = Image.new("RGB", (lefts.pop() - APART, GAP + TEXT + GAP + STEP * len(rows)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for left, title in zip([GAP, *lefts], ["test image", *titles]):
        draw.text((left, GAP), title, INK, font)
    for number, row in enumerate(rows):
        top, source = GAP + TEXT + GAP + number * STEP, row.query.source
        _paste(sheet, draw, row.query, (GAP, top))
        name = source.classes[source.label(row.query.index)] if source.classes else ""
        draw.text((GAP + STEP, top + CELL // 2), name[:16], INK, font)
        for left, group in zip(lefts, row.groups):
            for column, picture in enumerate(group):
                _paste(sheet, draw, picture, (left + STEP * column, top))
    with atomic_write(path) as file:
        sheet.save(file, "PNG")


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Picture, at: tuple[int, int]) -> None:
    x, y = at
    if picture.frame:
        draw.rectangle((x, y, x + CELL + 2 * FRAME - 1, y + CELL + 2 * FRAME - 1), fill=picture.frame)
    # It could be read a moment ago; an empty frame says enough.
    if (small := thumbnail(picture.source, picture.index, CELL)) is not None:
        sheet.paste(small, (x + FRAME, y + FRAME))


def thumbnail(source: Source, index: int, side: int) -> Image.Image | None:
    """The square in the middle of an image at this size; None: the image can't be read."""
    try:
        image = as_pil(source.image(index)).convert("RGB")
    except BadImageError:
        return None
    return square(image, side)


def square(image: Image.Image, side: int) -> Image.Image:
    """The square in the middle of an image at this size."""
    own = min(image.size)
    left, top = (image.width - own) // 2, (image.height - own) // 2
    return image.crop((left, top, left + own, top + own)).resize((side, side), Image.Resampling.BICUBIC)
