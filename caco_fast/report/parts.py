"""What a page is made of: parts with a title, and in each of them pictures, tables and lines of text.

Whoever makes a part knows nothing of HTML pages, and the page knows nothing of runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Picture:
    """An inline `<svg>` or an `<img>` with a data URI."""

    content: str  # HTML that is shown as it is: whoever makes it escapes what comes from names and settings
    alt: str  # what a reader who can't see it should know
    caption: str = ""


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]  # the first cell of a row names it; the page escapes all
    caption: str = ""
    folded: bool = False  # whether it only opens when the reader asks; it then needs a caption


@dataclass(frozen=True)
class Facts:
    """Names with their values, such as `dead rows: 12 %`."""

    values: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Missing:
    """What the part would show, and why it doesn't: one sentence that says how to get it."""

    reason: str


Block: TypeAlias = Picture | Table | Facts | Missing


@dataclass(frozen=True)
class Part:
    anchor: str  # of links: letters and hyphens
    title: str
    blocks: Sequence[Block]
    lead: str = ""  # one or two sentences on how to read it
