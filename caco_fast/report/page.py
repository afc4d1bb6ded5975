"""Parts as one HTML page that needs nothing else: no network, no script, no other file."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from caco_fast.report.parts import Facts, Missing, Part, Picture, Table

# Colours of the figures, and the variables of the page's two schemes that take their place.
THEME = {
    "#000000": "--ink",
    "#ffffff": "--paper",
    "#555555": "--soft",
    "#b0b0b0": "--grid",
    "#ece7da": "--shade",
    "#1f5fa8": "--blue",
    "#d9660b": "--orange",
    "#3a8a3e": "--green",
    "#8f4aa3": "--purple",
}
NUMBER = re.compile(r"[-+±]?[\d][\d,.]*( ?(%|±.*|s|h|min|GiB|MiB|k|M))?|-|")


def render(title: str, subtitle: str, parts: Sequence[Part], footer: str) -> str:
    """The page as text. What comes from names and settings is escaped."""
    counter = itertools.count(1)

    def content(picture: Picture) -> Markup:
        return Markup(_themed(_apart(picture.content, f"p{next(counter)}-")))

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"content": content, "numeric": _numeric}
    kinds = {"picture": Picture, "table": Table, "facts": Facts, "missing": Missing}
    environment.tests |= {name: lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()}
    template = environment.get_template("page.html")
    return template.render(title=title, subtitle=subtitle, parts=_distinct(parts), footer=footer) + "\n"


def _distinct(parts: Sequence[Part]) -> list[Part]:
    """The parts with anchors that are unique in the page."""
    seen: dict[str, int] = {}
    found = []
    for part in parts:
        seen[part.anchor] = count = seen.get(part.anchor, 0) + 1
        found.append(part if count == 1 else replace(part, anchor=f"{part.anchor}-{count}"))
    return found


def _apart(content: str, prefix: str) -> str:
    """Inline SVG whose identities are those of no other picture of the page."""
    content = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', content)
    content = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', content)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", content)


def _themed(content: str) -> str:
    """Colours of inline SVG as variables, so that they follow the reader's light or dark scheme."""
    if "<svg" not in content:
        return content
    for colour, variable in THEME.items():
        content = content.replace(colour, f"var({variable})")
    return content


def _numeric(table: Table) -> set[int]:
    """The columns that hold numbers alone; those align at the right."""
    columns = enumerate(zip(*table.rows))
    return {number for number, column in columns if number and all(map(NUMBER.fullmatch, column))}
