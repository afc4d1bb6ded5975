"""Small charts as inline SVG, with a title on hover for each bar; no library, so that they take few bytes."""

import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

from caco_fast.engine.curves import COLOURS

# Units of the SVG, of which a phone of 360 pixels shows one as a pixel.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 180, 4, 34, 34
# Width of a letter, about.
LETTER = 6.5
# Bars that have room for a number above each.
FEW = 9


def beside(*drawings: str, least: int = 260) -> str:
    """Drawings in one line, or below each other where there is no room for `least` pixels each."""
    cells = "".join(f'<div style="flex:1 1 {least}px;min-width:0">{drawing}</div>' for drawing in drawings)
    return f'<div style="display:flex;flex-wrap:wrap;gap:1rem">{cells}</div>'


def bars(title: str, unit: str, counts: Sequence[float], labels: Sequence[str], hover: Sequence[str]) -> str:
    """A bar for each count, and the number above it, if there is room.

    labels: below the bars, empty for none. hover: what a bar says under the pointer.
    """
    step, most, last = (WIDTH - 2 * LEFT) / len(counts), max(*counts, 1e-9), len(counts) - 1
    room, base = HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM
    parts = []
    for number, (count, label, text) in enumerate(zip(counts, labels, hover, strict=True)):
        height, x = room * count / most, LEFT + number * step
        # A bar of any height is seen.
        height = max(height, 1.5) if count else 0
        parts.append(
            f"<g><title>{escape(text)}</title>"
            f'<rect x="{x:.1f}" y="{TOP}" width="{step:.1f}" height="{room}" fill="transparent"/>'
            f'<rect x="{x + 0.08 * step:.1f}" y="{base - height:.1f}" width="{0.84 * step:.1f}" '
            f'height="{height:.1f}" fill="{COLOURS[0]}"/></g>'
        )
        at, anchor = x + step / 2, "middle"
        if len(counts) > FEW:
            at, anchor = {0: (LEFT, "start"), last: (WIDTH - LEFT, "end")}.get(number, (at, anchor))
        # A long label of the last bar ends at the border.
        under = (at, anchor) if at + LETTER * len(label) / 2 <= WIDTH else (WIDTH, "end")
        parts.append(_text(under[0], base + 13, label, under[1]) if label else "")
        if len(counts) <= FEW or count == max(counts):
            parts.append(_text(at, base - height - 4, f"{count:,.0f}", anchor))
    return _chart(title, unit, "".join(parts))


def histogram(title: str, unit: str, values: Tensor, what: str, bins: int = 24) -> str:
    """Bars over equal parts of the range of the values. `what`: of which one each is, such as "rows"."""
    low, high = float(values.min()), float(values.max())
    high = high if high > low else low + 1e-6
    counts = values.float().histc(bins, low, high).tolist()
    edges = [low + (high - low) * number / bins for number in range(bins + 1)]
    labels = [_short(edges[number]) if number in (0, bins // 2) else "" for number in range(bins)]
    labels[-1] = _short(high)
    hover = [f"{count:,.0f} {what} from {_short(a)} to {_short(b)}" for count, a, b in zip(counts, edges, edges[1:])]
    return bars(title, unit, counts, labels, hover)


def lorenz(title: str, unit: str, counts: Tensor) -> str:
    """The share of all that the smallest counts have, over their share of the rows; the diagonal is equality."""
    share = counts.double().sort().values.cumsum(0) / max(1.0, float(counts.sum()))
    rows = len(counts)
    chosen = sorted({round(rows * at / 100) for at in range(101)})
    room, base, width = HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM, WIDTH - 2 * LEFT
    points = [(at / rows, float(share[at - 1]) if at else 0.0) for at in chosen]
    line = " ".join(f"{LEFT + width * x:.1f},{base - room * y:.1f}" for x, y in points)
    half = rows - int((share <= 0.5).sum())
    parts = (
        f"<g><title>{half:,} of {rows:,} rows have half of the choices</title>"
        f'<rect x="{LEFT}" y="{TOP}" width="{width}" height="{room}" fill="transparent"/>'
        f'<path d="M{LEFT} {base}L{LEFT + width} {TOP}" stroke="currentColor" opacity="0.4" stroke-dasharray="3 3"/>'
        f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/></g>'
    )
    ends = _text(LEFT, base + 13, "0 %") + _text(LEFT + width, base + 13, "100 %", anchor="end")
    return _chart(title, unit, parts + ends)


def _chart(title: str, unit: str, content: str) -> str:
    base = HEIGHT - BOTTOM
    axis = f'<path d="M{LEFT} {base + 0.5}H{WIDTH - LEFT}" stroke="currentColor" opacity="0.5"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" style="width:100%;max-width:520px" fill="currentColor" '
        f'font-family="inherit" font-size="12">'
        f'<text x="{LEFT}" y="13" font-weight="600">{escape(title)}</text>{content}{axis}'
        f"{_text(WIDTH / 2, HEIGHT - 5, unit, anchor='middle')}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(value: float) -> str:
    """Three digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
