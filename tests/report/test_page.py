"""The frame of a page: what is written from names and settings is escaped, and pictures don't disturb each other."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from caco_fast.engine.curves import COLOURS
from caco_fast.report.page import render
from caco_fast.report.parts import Facts, Missing, Part, Picture, Table
from caco_fast.report.plots import Frame, Panel, Series, curves, short, thin

HOSTILE = "<script>alert('a')</script> & \"b\""
VOID = {"meta", "img", "br", "link", "input"}


class Document(HTMLParser):
    """What a browser would find: elements with their attributes, and text; nesting is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page(*parts: Part) -> Document:
    return Document(render("a title", "below it", parts, "at the end"))


def test_names_and_values_are_escaped_and_shown_as_they_are() -> None:
    blocks = [
        Table([HOSTILE, "b"], [[HOSTILE, HOSTILE]], HOSTILE),
        Table(["a"], [], HOSTILE, folded=True),
        Facts([(HOSTILE, HOSTILE)]),
        Missing(HOSTILE),
        Picture("<svg></svg>", HOSTILE, HOSTILE),
    ]
    text = render(HOSTILE, HOSTILE, [Part("a", HOSTILE, blocks, HOSTILE)], HOSTILE)
    assert "<script" not in text
    document = Document(text)
    assert document.words().count(HOSTILE) >= 14 and not document.all("script")
    assert [each["aria-label"] for each in document.all("div") if each.get("role") == "img"] == [HOSTILE]


def test_the_page_loads_nothing_from_anywhere() -> None:
    document = page(Part("a", "A", [Missing("nothing")]))
    policy = next(each["content"] for each in document.all("meta") if "http-equiv" in each)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not document.all("link") and not document.all("script")


def test_contents_lead_to_the_parts_also_if_two_have_one_name() -> None:
    document = page(Part("a", "first", []), Part("a", "second", []))
    targets = [each["href"].removeprefix("#") for each in document.all("a")]
    assert targets == [each["id"] for each in document.all("section")] and len(set(targets)) == 2


def test_identities_of_two_pictures_are_kept_apart_with_their_references() -> None:
    one = '<svg><path id="x"/><use xlink:href="#x"/><use href="#x"/><g clip-path="url(#x)"/></svg>'
    text = render("", "", [Part("a", "", [Picture(one, ""), Picture(one, "")])], "")
    found = re.findall(r'id="(p\d-x)"', text)
    assert len(set(found)) == 2
    for name in found:
        assert text.count(f'"#{name}"') == 2 and text.count(f"url(#{name})") == 1


def test_colours_of_figures_follow_the_scheme_of_the_reader() -> None:
    text = render("", "", [Part("a", "", [Picture(f'<svg fill="{COLOURS[0]}"><a stroke="#000000"/></svg>', "")])], "")
    assert '<svg fill="var(--blue)"><a stroke="var(--ink)"/></svg>' in text
    photo = "<img src='data:image/jpeg;base64,#000000'>"
    assert photo in render("", "", [Part("a", "", [Picture(photo, "")])], "")


def test_columns_of_numbers_align_at_the_right() -> None:
    rows = [["a", "1,234.5", "1.0 ± 0.2", "12 %", "x1"], ["b", "-", "3", "-0.5", "2"]]
    document = page(Part("a", "A", [Table(["", "1", "2", "3", "4"], rows)]))
    assert [each.get("class") for each in document.all("td")] == ["number", "number", "number", None] * 2


def test_a_long_curve_is_drawn_as_means_with_their_range() -> None:
    x = list(range(10_007))
    y = list(np.random.default_rng(0).normal(size=len(x)))
    places, means, low, high = thin(x, y, 100)
    assert len(places) == len(means) == 100 and low is not None and high is not None
    # Bins of nearly equal size that hold each value once.
    bins = np.split(np.array(y), np.round(np.arange(1, 100) * len(x) / 100).astype(int))
    assert np.allclose(means, [part.mean() for part in bins]) and min(low) == min(y) and max(high) == max(y)
    assert thin(x[:100], y[:100], 100) == (x[:100], y[:100], None, None)


def test_a_picture_says_its_values_on_hover() -> None:
    series = [Series("k <20>", [10, 20, 30], [70.0, 71.5, 80.25], COLOURS[0]), Series("b", [20], [1.0], COLOURS[1])]
    picture = curves([Panel("kNN", "%", series)], Frame(last=30, shaded=10), "alt")
    titles = re.findall(r"<title>(.*?)</title>", picture.content)
    # Once for a wide and once for a narrow screen.
    assert titles == [f"step {x}: k &lt;20&gt; {y}, b 1" for x, y in ((10, "70.0"), (20, "71.5"), (30, "80.2"))] * 2


@pytest.mark.parametrize("value, told", [(0.003, "0.003"), (708, "708"), (12_000, "12k"), (1.2e6, "1.2M"), (0, "0")])
def test_scales_are_told_in_short(value: float, told: str) -> None:
    assert short(value) == told
