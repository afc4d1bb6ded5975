"""A sheet of small images as one inline SVG: every image once in one JPEG, with frames and titles on hover."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageChops

from caco_fast.protocols.sheet import WRONG, square

# In units of the SVG, which is as wide as the page lets it be. On a phone of 360 pixels a unit is some 0.7 of one.
CELL, GAP, APART, HEAD, LINE = 48, 4, 16, 20, 15
QUALITY = 80


@dataclass(frozen=True)
class Cell:
    image: Image.Image | None  # None: it can't be read
    title: str  # shown on hover
    wrong: bool = False  # framed
    under: str = ""  # a few letters below it
    scale: float = 1.0  # side, as a share of the cell's


@dataclass(frozen=True)
class Group:
    """Rows of cells of one length under a heading."""

    heading: str
    rows: Sequence[Sequence[Cell]]


def image_sheet(groups: Sequence[Group], below: bool = False) -> str:
    """The groups next to each other, or below each other, as `<svg>`."""
    cells = [cell for group in groups for row in group.rows for cell in row]
    atlas = _Atlas([cell.image for cell in cells if cell.image is not None])
    height = CELL + GAP + (LINE if any(cell.under for cell in cells) else 0)
    parts, left, top, right = [], 0, 0, 0
    for group in groups:
        parts.append(f'<text x="{left}" y="{top + HEAD - 6}" font-size="14">{escape(group.heading)}</text>')
        for number, row in enumerate(group.rows):
            for column, cell in enumerate(row):
                parts.append(_cell(cell, atlas, left + column * (CELL + GAP), top + HEAD + number * height))
        right = max(right, left + len(group.rows[0]) * (CELL + GAP) - GAP)
        bottom = top + HEAD + len(group.rows) * height
        left, top = (0, bottom + GAP) if below else (right + APART, 0)
    style = f"width:100%;max-width:{1.4 * right:.0f}px"
    return (
        f'<svg viewBox="-2 0 {right + 4} {bottom}" style="{style}" fill="currentColor" font-family="inherit">'
        f"{atlas.definition}{''.join(parts)}</svg>"
    )


def image_element(image: Image.Image, x: float, y: float, size: float) -> str:
    """One image as `<image>`, for those that lie anywhere."""
    return f'<image href="{_data_uri(image)}" x="{x:.1f}" y="{y:.1f}" width="{size:g}" height="{size:g}"/>'


class _Atlas:
    """All images as squares of one JPEG, of the size of the largest; `take` shows one of them."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        side = self.side = max((image.width for image in images), default=1)
        self.columns = max(1, math.ceil(math.sqrt(len(images))))
        rows = math.ceil(len(images) / self.columns)
        sheet = Image.new("RGB", (self.columns * side, max(1, rows) * side))
        for number, image in enumerate(images):
            sheet.paste(square(image, side), self._corner(number))
        data = _data_uri(sheet)
        # Several sheets are on one page.
        self.name = "i" + hashlib.sha256(data.encode()).hexdigest()[:8]
        width, height = sheet.size
        self.definition = (
            f'<defs><image id="{self.name}" width="{width}" height="{height}" href="{data}"/></defs>' if images else ""
        )
        self._next = 0

    def take(self, x: float, y: float, size: float) -> str:
        """The next image at a place."""
        left, top = self._corner(self._next)
        self._next += 1
        # Half a pixel less on each side, which would show the neighbour.
        box = f"{left + 0.5} {top + 0.5} {self.side - 1} {self.side - 1}"
        # The style has priority over a page's rule for all pictures, such as `svg {height: auto}`.
        place = f'x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" style="height:{size:g}px"'
        return f'<svg {place} viewBox="{box}"><use href="#{self.name}"/></svg>'

    def _corner(self, number: int) -> tuple[int, int]:
        return number % self.columns * self.side, number // self.columns * self.side


def _cell(cell: Cell, atlas: _Atlas, x: float, y: float) -> str:
    size = round(CELL * cell.scale, 1)
    drawn = f"<title>{escape(cell.title)}</title>"
    if cell.image is not None:
        drawn += atlas.take(x, y, size)
    if cell.image is None or cell.wrong:
        colour = WRONG if cell.wrong else "currentColor"
        box = f'x="{x - 0.5:g}" y="{y - 0.5:g}" width="{size + 1:g}" height="{size + 1:g}"'
        drawn += f'<rect {box} fill="none" stroke="{colour}" stroke-width="{3 if cell.wrong else 0.5}"/>'
    if cell.under:
        drawn += f'<text x="{x + CELL / 2:g}" y="{y + CELL + 12:g}" font-size="12" text-anchor="middle">'
        drawn += f"{escape(cell.under)}</text>"
    return f"<g>{drawn}</g>"


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    # Grey ones take a third fewer bytes. Without subsampling colours don't flow over from one square into the next.
    grey = _is_grey(image)
    image.convert("L" if grey else "RGB").save(file, "JPEG", quality=QUALITY, optimize=True, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = image.convert("RGB").split()
    return all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))
