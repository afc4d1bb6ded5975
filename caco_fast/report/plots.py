"""Curves as inline SVG: drawn twice, for a wide and for a narrow screen, with values that show on hover."""

import bisect
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from caco_fast.engine.curves import INITIALISATION, format_value
from caco_fast.report.parts import Picture

# In CSS pixels: the text column of the page, and a phone.
WIDE, NARROW = 880, 330
INK, SOFT, GRID = "#000000", "#555555", "#b0b0b0"
# A longer curve is drawn as the means of so many bins, with the range of each behind it.
MOST_POINTS = 400
LEGEND_LINE = 14
# Places of a panel at which its values show.
HOVERS = 60


@dataclass(frozen=True)
class Series:
    label: str
    x: Sequence[float]
    y: Sequence[float]  # finite
    colour: str


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    series: Sequence[Series]
    log: bool = False
    from_zero: bool = False
    levels: Sequence[tuple[str, float, str, str]] = ()  # label, value, colour, line style


@dataclass(frozen=True)
class Frame:
    """What all panels of a picture share."""

    label: str = "step"
    last: float = 1.0
    shaded: float | None = None  # the end of the initialisation
    marks: Mapping[float, str] = field(default_factory=dict)  # upright lines: where, and what happened there


def curves(panels: Sequence[Panel], frame: Frame, alt: str, caption: str = "", columns: int = 1) -> Picture:
    """A picture of the panels, over one axis if they are in one column."""
    wide = _svg(panels, frame, WIDE, columns, 190 if columns == 1 else 150)
    narrow = _svg(panels, frame, NARROW, 1, 125)
    return Picture(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>', alt, caption)


def _svg(panels: Sequence[Panel], frame: Frame, width: int, columns: int, inner: int) -> str:
    """The panels in a grid. inner: the height of a panel without its margins."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    # Fixed margins in pixels, because matplotlib's own layout takes as long as the drawing.
    left, right, below = (52, 8, 30) if width == NARROW else (60, 12, 32)
    across = width / columns - left - right
    above = 24 + LEGEND_LINE * max(_legend(panel, across)[1] for panel in panels)
    height = rows * (above + inner + below) + LEGEND_LINE
    margins = {
        "left": left / width,
        "right": 1 - right / width,
        "top": 1 - above / height,
        "bottom": (below + LEGEND_LINE) / height,
        "hspace": (above + below) / inner,
        "wspace": (left + right) / across,
    }
    # At 72 dots an inch, a point is a CSS pixel.
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=margins)
    drawn = list(zip(panels, grid.flat))
    for panel, axes in drawn:
        _draw(panel, axes, frame, across)
    for _, axes in drawn[-columns:]:
        axes.set_xlabel(frame.label, color=SOFT)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()

    def hovers() -> str:
        return "".join(_hovers(panel, axes, frame, height) for panel, axes in drawn)

    return svg_of(figure, hovers, salt=str(width))


def _legend(panel: Panel, across: float) -> tuple[int, int]:
    """The columns and the lines of the legend over a panel that is `across` pixels wide."""
    labels = [series.label for series in panel.series] + [level[0] for level in panel.levels]
    if len(labels) < 2:
        return 0, 0
    columns = max(1, int(across / (6 * max(map(len, labels)) + 36)))
    return columns, -(-len(labels) // columns)


def svg_of(figure: Figure, beside: Callable[[], str] = lambda: "", salt: str = "figure") -> str:
    """A figure as inline SVG with text in the reader's own font.

    beside: makes further elements once the layout is known. salt: tells the identities of two figures apart.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10}):
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Its style would hold for all of the page, so it becomes what the picture's root hands down.
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.S)
    text = text.replace("<svg", '<svg stroke-linejoin="round" stroke-linecap="butt"', 1)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt" viewBox="0 0 ([\d.]+) ([\d.]+)"', _sized, text, count=1)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    # A hundredth of a pixel is enough.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
    # An identity that nothing refers to only costs bytes.
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    return text.replace("</svg>", beside() + "</svg>").strip()


def _sized(match: re.Match[str]) -> str:
    width, height = (round(float(side)) for side in match.groups())
    return f' width="{width}" height="{height}" viewBox="0 0 {width} {height}"'


def _draw(panel: Panel, axes: Axes, frame: Frame, across: float) -> None:
    size = 10 if across < NARROW else 11.5
    axes.set_facecolor("none")
    axes.figure.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=SOFT, labelsize=size - 1, length=3)
    axes.grid(color=GRID, alpha=0.35, linewidth=0.7)
    axes.set_xlim(-0.015 * frame.last, 1.02 * frame.last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    if frame.shaded is not None:
        axes.axvspan(-0.015 * frame.last, frame.shaded, color=INITIALISATION, zorder=0, linewidth=0)
    for x in frame.marks:
        axes.axvline(x, color=SOFT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    for series in panel.series:
        _line(axes, series)
    for label, value, colour, style in panel.levels:
        axes.axhline(value, color=colour, linestyle=style, linewidth=1.1, label=label)
    if panel.log:
        axes.set_yscale("log")
        values = [value for series in panel.series for value in series.y]
        # Within two decades a tick at each would be too few.
        near = max(values) < 100 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
        axes.margins(y=0.12)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    axes.set_ylabel(panel.unit, color=SOFT, fontsize=size - 0.5)
    columns, lines = _legend(panel, across)
    if columns:
        axes.legend(
            *axes.get_legend_handles_labels(),
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.98),
            ncols=columns,
            fontsize=size - 1.5,
            frameon=False,
            labelcolor=SOFT,
            handlelength=1.4,
            columnspacing=1.2,
            labelspacing=0.25,
            borderaxespad=0.1,
        )
    title: dict[str, Any] = {"fontsize": size + 1, "fontweight": "bold", "color": INK}
    axes.set_title(panel.title, loc="left", pad=7 + (LEGEND_LINE - 1) * lines, **title)


def _line(axes: Axes, series: Series) -> None:
    x, y, low, high = thin(series.x, series.y)
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=series.colour, alpha=0.18, linewidth=0)
    mark = "o" if len(x) <= 40 else None
    axes.plot(x, y, color=series.colour, linewidth=1.6, marker=mark, markersize=3, label=series.label)


def thin(
    x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS
) -> tuple[list[float], list[float], list[float] | None, list[float] | None]:
    """A curve of at most `most` points: the means of bins, and their least and largest values (None: all points)."""
    if len(x) <= most:
        return list(x), list(y), None, None
    edges = [round(number * len(x) / most) for number in range(most + 1)]
    bins = list(zip(edges, edges[1:]))
    low, high = [min(y[first:end]) for first, end in bins], [max(y[first:end]) for first, end in bins]
    places, means = ([sum(values[first:end]) / (end - first) for first, end in bins] for values in (x, y))
    # A level curve stays level, whatever the rounding of its sums.
    return places, [min(max(mean, least), most) for mean, least, most in zip(means, low, high)], low, high


def _hovers(panel: Panel, axes: Axes, frame: Frame, height: float) -> str:
    """Invisible bands over a panel, each with the values there as its title."""
    places = sorted({x for series in panel.series for x in thin(series.x, series.y, HOVERS)[0]})
    places = places[:: -(-len(places) // HOVERS) or 1]
    if not places:
        return ""
    box = axes.get_window_extent()
    across = [float(axes.transData.transform((x, 1.0))[0]) for x in places]
    middles = [(left + right) / 2 for left, right in zip(across, across[1:])]
    found = []
    for place, left, right in zip(places, [box.x0, *middles], [*middles, box.x1]):
        values = [f"{series.label} {format_value(_nearest(series, place))}" for series in panel.series]
        title = f"{frame.label} {short(place)}: {', '.join(values)}"
        found.append(
            f'<rect x="{left:.1f}" y="{height - box.y1:.1f}" width="{right - left:.1f}" height="{box.height:.1f}" '
            f'fill="none" pointer-events="all"><title>{html.escape(title)}</title></rect>'
        )
    return "\n".join(found)


def _nearest(series: Series, place: float) -> float:
    at = bisect.bisect_left(series.x, place)
    near = [index for index in (at - 1, at) if 0 <= index < len(series.x)]
    return series.y[min(near, key=lambda index: abs(series.x[index] - place))]


def short(value: float) -> str:
    """A number of a scale: 1200000 -> 1.2M, 12000 -> 12k, 708 -> 708."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
