"""The part with t-SNE maps of the features: the trained encoder beside the random-initialised one (paper, Fig. 5).

Legend: P points, D feature size.
"""

from collections.abc import Sequence
from html import escape

import torch
from PIL import Image
from torch import Tensor

from caco_fast.errors import UserError
from caco_fast.protocols.sheet import thumbnail
from caco_fast.protocols.tsne import FEWEST, NEAREST, embed, kept
from caco_fast.report.blocks import guarded
from caco_fast.report.drawing import beside
from caco_fast.report.image_sheet import image_element
from caco_fast.report.parts import Block, Facts, Part, Picture
from caco_fast.report.sample import Sample

PERPLEXITY = 30.0
# Of the descent: half of scikit-learn's number, in half of the time, for a picture that hardly differs.
STEPS = 500
# Units of the SVG of a map, of a point and of an image; and images of a map.
SIDE, POINT, IMAGE, IMAGES = 320, 3.2, 26, 12
# Pixels of such an image.
PIXELS = 48
# Two shades of each colour would not be told apart; these are seen on white and on black.
COLOURS = (
    "#3b7dd8", "#e8842c", "#3fa34d", "#d6453d", "#9467bd", "#a0674b", "#e377c2", "#8a8f98", "#b5a818", "#22b3c4",
)  # fmt: skip


def map_part(sample: Sample) -> Part:
    """Both maps, with the share of near points of one class."""
    lead = (
        "Each point is an image, and near points are images with similar features (t-SNE). Compare the two maps; "
        "sizes of groups and distances between them mean nothing."
    )
    return Part("map", "A map of the features", guarded(lambda: _blocks(sample), "the map of the features"), lead)


def _blocks(sample: Sample) -> list[Block]:
    seen = sample.map
    count = len(seen.index)
    if count < FEWEST:
        raise UserError(f"found {count} images, expected at least {FEWEST}")
    perplexity = min(PERPLEXITY, (count - 1) / 3.5)
    maps = [embed(rows, perplexity, 0, STEPS) for rows in (seen.outputs[0], seen.outputs[2])]
    titles = "trained", "random-initialised"
    drawn = [_map(sample, points, title) for points, title in zip(maps, titles)]
    names = [sample.classes[label] for label in seen.labels.unique().tolist()] if sample.classes else []
    of = f"of {len(names)} classes" if names else "without labels"
    alt = f"Two maps of {count:,} images {of}: by the trained encoder, and by the random-initialised one."
    caption = f"{count:,} images {of}" + (", one colour for each class." if names else ".")
    blocks: list[Block] = [Picture(beside(*drawn) + _legend(names), alt, caption)]
    if names:
        shares = [f"{kept(points, seen.labels):.1f} %" for points in maps]
        what = f"of the {NEAREST} nearest points, same class"
        blocks.append(Facts([(f"{what}: {title}", share) for title, share in zip(titles, shares)]))
    return blocks


def _map(sample: Sample, points: Tensor, title: str) -> str:
    """One map: a path of dots for each class, and a few images."""
    seen = sample.map
    places = placed(points)
    groups = seen.labels.unique().tolist()
    parts = []
    for number, label in enumerate(groups):
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places[seen.labels == label].tolist())
        name = f"<title>{escape(sample.classes[label])}</title>" if sample.classes else ""
        parts.append(f'<path d="{dots}" stroke="{COLOURS[number % len(COLOURS)]}">{name}</path>')
    for point in spread_out(places, IMAGES, 1.6 * IMAGE):
        image = thumbnail(seen.source, int(seen.index[point]), PIXELS)
        if image is not None:
            parts.append(_small(image, sample, point, places[point].tolist(), groups))
    return (
        f'<svg viewBox="0 0 {SIDE} {SIDE + 20}" style="width:100%" fill="currentColor" font-family="inherit">'
        f'<text x="0" y="13" font-size="13" font-weight="600">{title}</text><g transform="translate(0 20)" '
        f'stroke-width="{POINT}" stroke-linecap="round" fill="none">{"".join(parts)}</g></svg>'
    )


def _small(image: Image.Image, sample: Sample, point: int, place: Sequence[float], groups: Sequence[int]) -> str:
    x, y = (min(max(value - IMAGE / 2, 1), SIDE - IMAGE - 1) for value in place)
    label = int(sample.map.labels[point])
    colour = COLOURS[groups.index(label) % len(COLOURS)]
    name = f"<title>{escape(sample.classes[label])}</title>" if sample.classes else ""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{IMAGE}" height="{IMAGE}"'
    return f'<g>{name}{image_element(image, x, y, IMAGE)}<rect {box} stroke="{colour}" stroke-width="2"/></g>'


def placed(points: Tensor) -> Tensor:  # [P, 2] -> [P, 2]
    """The points in the units of the SVG, with equal scales, but for some far ones at its border."""
    low, high = (points.quantile(at, dim=0) for at in (0.002, 0.998))
    scale = (SIDE - 2 * POINT) / float((high - low).max().clamp_min(1e-9))
    return ((points - (low + high) / 2) * scale + SIDE / 2).clamp(POINT, SIDE - POINT)


def spread_out(points: Tensor, most: int, apart: float) -> list[int]:
    """Points in the densest places, as long as they are `apart` from each other."""
    distance = torch.cdist(points.double(), points.double())
    near = distance.topk(min(NEAREST + 1, len(points)), dim=1, largest=False).values[:, -1]
    found: list[int] = []
    for point in near.argsort(stable=True).tolist():
        if len(found) < most and all(distance[point, other] >= apart for other in found):
            found.append(point)
    return found


def _legend(names: Sequence[str]) -> str:
    entries = "".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="color:{COLOURS[number % len(COLOURS)]}">'
        f"&#9679;</span> {escape(name)}</span> "
        for number, name in enumerate(names)
    )
    return f'<div style="font-size:.85em">{entries}</div>' if names else ""
