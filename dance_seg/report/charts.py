"""Small SVG charts for pages that open offline: lines, stacked shares, histograms, scatters.

Every chart is drawn in the same coordinates (WIDTH x HEIGHT) and takes its colours from the page's style sheet, so that
it follows light and dark. Text is escaped. Values that are not finite are left out; with nothing to draw a chart is
empty markup. Every chart has a `title`, which is read to those who cannot see it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 390, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 30, 38
BASE = HEIGHT - BOTTOM  # where the x axis lies
MAX_POINTS = 300  # a line with more is drawn as the mean of each bin, with the range behind it
SERIES = 8  # colours told apart by eye; further series are grey
MOST_DOTS = 1500  # of a cloud
RAMP = 7  # steps from the palest to the strongest shade of an ordered scale


@dataclass(frozen=True)
class Line:
    """One curve: values y at x, in the colour of a series."""

    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    series: int = 0
    markers: bool = False


@dataclass(frozen=True)
class Mark:
    """One point with its label."""

    x: float
    y: float
    label: str
    series: int = 0
    hollow: bool = False
    spread: float = 0.0  # of y, up and down


@dataclass(frozen=True)
class Span:
    """A shaded part of the x axis and what it means."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Layer:
    """One layer of a stack, from the bottom up: a height for each column. Shade 0 is neutral, 1 the palest."""

    name: str
    values: Sequence[float]
    shade: int


class Frame:
    """The axes of a chart: from data to drawing coordinates, and the grid."""

    def __init__(
        self, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str, top: int = TOP
    ) -> None:
        self.x_low, self.x_high = x_range if x_range[1] > x_range[0] else (x_range[0] - 0.5, x_range[0] + 0.5)
        self.y_low, self.y_high = y_range if y_range[1] > y_range[0] else (y_range[0] - 0.5, y_range[0] + 0.5)
        self.x_label, self.y_label, self.top = x_label, y_label, top
        self.end = WIDTH - RIGHT

    def x(self, value: float) -> float:
        """Drawing coordinate of a value on the x axis."""
        return round(LEFT + (float(value) - self.x_low) / (self.x_high - self.x_low) * (self.end - LEFT), 1)

    def y(self, value: float) -> float:
        """Drawing coordinate of a value on the y axis."""
        return round(BASE - (float(value) - self.y_low) / (self.y_high - self.y_low) * (BASE - self.top), 1)

    def points(self, xy: Iterable[tuple[float, float]]) -> str:
        """Coordinates of a polyline."""
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in xy)

    def axes(self, *, percent: bool = False, whole: bool = False) -> Markup:
        """Grid lines, tick labels and the two axis labels; y in percent, x in whole numbers."""
        parts = [written("axis", 2, self.top - 14, self.y_label)]
        values = ticks(self.y_low, self.y_high, 4)
        for value, text in zip(values, tick_texts(values, percent), strict=True):
            height = self.y(value)
            parts.append(element("line", "grid", x1=LEFT, x2=self.end, y1=height, y2=height))
            parts.append(written("tick", LEFT - 6, height + 4, text, "end"))
        values = ticks(self.x_low, self.x_high, 6, least=1.0 if whole else 0.0)
        for value, text in zip(values, tick_texts(values), strict=True):
            parts.append(written("tick", self.x(value), BASE + 15, text, "middle"))
        parts.append(element("line", "base", x1=LEFT, x2=self.end, y1=BASE, y2=BASE))
        parts.append(written("axis", self.end, HEIGHT - 6, self.x_label, "end"))
        return joined(parts)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_end: float = 0.0,
    from_zero: bool = False,
    whole: bool = False,
    marks: Sequence[Mark] = (),
    spans: Sequence[Span] = (),
) -> Markup:
    """Curves over one x axis from 0 to `x_end` at least.

    `from_zero` begins the y axis at 0, `whole` labels whole numbers of x only, as for epochs.
    """
    drawn: list[tuple[Line, np.ndarray, np.ndarray]] = []
    for line in lines:
        x, y = finite(line.x, line.y)
        if len(x):
            drawn.append((line, x, y))
    if not drawn:
        return Markup("")
    all_x, all_y = np.concatenate([x for _, x, _ in drawn]), np.concatenate([y for _, _, y in drawn])
    frame = Frame(
        (min(0.0, float(all_x.min())), max(float(all_x.max()), x_end)),
        padded(float(all_y.min()), float(all_y.max()), from_zero),
        x_label,
        y_label,
    )
    parts = [_span(frame, span) for span in spans]
    parts.append(frame.axes(whole=whole))
    parts += [_curve(frame, line, x, y) for line, x, y in drawn]
    parts += [_mark(frame, mark) for mark in marks]
    return svg(title, parts)


def stacked_chart(
    layers: Sequence[Layer],
    *,
    title: str,
    x_label: str,
    y_label: str,
    notes: Sequence[str] = (),
    line: Line | None = None,
) -> Markup:
    """Shares (0 to 1), stacked: column k from k to k + 1. `notes` are shown on pointing at a column."""
    if not layers or not len(layers[0].values):
        return Markup("")
    heights = np.array([layer.values for layer in layers], dtype=float)
    columns = heights.shape[1]
    edges = np.concatenate([np.zeros((1, columns)), np.cumsum(heights, axis=0)])
    frame = Frame((0, columns), (0, max(1.0, float(edges[-1].max()))), x_label, y_label)
    parts = []
    for number, layer in enumerate(layers):
        above = [(k + side, edges[number + 1, k]) for k in range(columns) for side in (0, 1)]
        below = [(k + side, edges[number, k]) for k in reversed(range(columns)) for side in (1, 0)]
        parts.append(element("polygon", f"shade-{layer.shade}", points=frame.points(above + below)))
    parts.append(frame.axes(percent=True, whole=True))
    if line is not None:
        x, y = finite(line.x, line.y)
        parts.append(_curve(frame, line, x, y))
    for number, note in enumerate(notes[:columns]):
        left, right = frame.x(number), frame.x(number + 1)
        parts.append(_box("touch", left, right, frame.top, BASE, note))
    return svg(title, parts)


def histogram(
    values: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_label: str = "images",
    boundaries: Sequence[tuple[float, str]] = (),
    marked_below: float | None = None,
    bins: int = 36,
) -> Markup:
    """Counts of values, with labelled vertical lines; bars whose centre lies below `marked_below` are neutral grey."""
    (data,) = finite(values)
    if not len(data):
        return Markup("")
    alike = np.ptp(data) <= 1e-9 * np.abs(data).max()  # too narrow to be divided into bins
    counts, edges = np.histogram(data, bins=1 if alike else min(bins, len(data)))
    top = TOP + 14 * (len(boundaries) > 0)
    frame = Frame((float(edges[0]), float(edges[-1])), (0, float(counts.max()) * 1.04), x_label, y_label, top)
    parts = [frame.axes()]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            style = "shade-0" if marked_below is not None and (left + right) / 2 < marked_below else "shade-4"
            note = f"{left:.4g} to {right:.4g}: {count}"
            parts.append(_box(style, frame.x(left) + 0.5, frame.x(right) - 0.5, frame.y(count), BASE, note))
    for value, text in boundaries:
        x = frame.x(value)
        parts.append(element("line", "boundary", x1=x, x2=x, y1=top - 8, y2=BASE))
        parts.append(written("tick", x, top - 12, text, "middle"))
    return svg(title, parts)


def scatter(
    points: Sequence[Mark],
    *,
    title: str,
    x_label: str,
    y_label: str,
    front: Sequence[tuple[float, float]] = (),
    labelled: bool = True,
) -> Markup:
    """Labelled points with their spread; x begins at 0, since it is a cost whose ratios are to be seen.

    `front` is drawn as the stairs that bound what has been reached: points in the order of their cost.
    """
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not shown:
        return Markup("")
    low, high = padded(min(p.y - p.spread for p in shown), max(p.y + p.spread for p in shown), False)
    air = max(0.0, 2 - (high - low)) / 2  # a tenth of a point must not look like a gulf
    frame = Frame((0, max(p.x for p in shown) * 1.06 or 1), (low - air, high + air), x_label, y_label)
    parts = [frame.axes()]
    if front:
        parts.append(_stairs(frame, front))
    parts += [_whisker(frame, point) for point in shown if point.spread]
    parts += [_circle(frame, point) for point in shown]
    if labelled:
        parts += _labels(frame, shown)
    return svg(title, parts)


def cloud(x: Sequence[float], y: Sequence[float], *, title: str, x_label: str, y_label: str, bins: int = 12) -> Markup:
    """Many points, and the mean of y in bins of equally many points. Of more than MOST_DOTS every so many is drawn."""
    xs, ys = finite(x, y)
    if not len(xs):
        return Markup("")
    # A few far outliers would press all others to the floor: they are drawn at the edge.
    top = float(np.quantile(ys, 0.995)) * 1.15 or 1.0
    frame = Frame((float(xs.min()), float(xs.max())), (min(0.0, float(ys.min())), top), x_label, y_label)
    every = max(1, math.ceil(len(xs) / MOST_DOTS))
    order = np.argsort(xs, kind="stable")[::every]
    dots = [
        element("circle", "dot series-0", cx=frame.x(a), cy=frame.y(min(b, top)), r=2)
        for a, b in zip(xs[order], ys[order], strict=True)
    ]
    parts = [frame.axes(), *dots]
    if len(xs) >= 3 * bins:
        mean_x, mean_y, _, _ = binned(xs, ys, bins)
        means = Line(mean_x.tolist(), np.minimum(mean_y, top).tolist(), "mean", series=1, markers=True)
        parts.append(_curve(frame, means, np.asarray(means.x), np.asarray(means.y)))
    return svg(title, parts)


def element(name: str, style: str, note: str = "", **attributes: Any) -> Markup:
    """An SVG element with its style class; the note is shown on pointing at it.

    >>> element("line", "grid", x1=0)
    Markup('<line class="grid" x1="0"/>')
    >>> element("rect", "touch", "a < b")
    Markup('<rect class="touch"><title>a &lt; b</title></rect>')
    """
    given = joined(Markup(' {}="{}"').format(key, value) for key, value in attributes.items())
    if not note:
        return Markup('<{} class="{}"{}/>').format(name, style, given)
    return Markup('<{} class="{}"{}><title>{}</title></{}>').format(name, style, given, note, name)


def written(style: str, x: float, y: float, text: str, anchor: str = "start") -> Markup:
    """A text at a place."""
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(style, x, y, anchor, text)


def svg(title: str, parts: Sequence[Markup], width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """The drawing around its parts."""
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, title)
    return head + joined(parts) + Markup("</svg>")


def joined(parts: Iterable[Markup]) -> Markup:
    """Parts one after the other."""
    return Markup("").join(parts)


def ticks(low: float, high: float, about: int, least: float = 0.0) -> list[float]:
    """Round numbers from `low` to `high`, about so many, and at least so far apart.

    >>> ticks(0, 12, 6), ticks(0.0, 1.0, 4), ticks(0, 2, 6, least=1.0)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 1.0, 2.0])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (factor * power) - about))
    step = max(step, least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def tick_texts(values: Sequence[float], percent: bool = False) -> list[str]:
    """Tick labels that all have the same number of decimals.

    >>> tick_texts([0.0, 0.05, 0.1]), tick_texts([0, 2000]), tick_texts([0, 0.5], percent=True)
    (['0.00', '0.05', '0.10'], ['0', '2,000'], ['0 %', '50 %'])
    """
    values = [100 * value for value in values] if percent else list(values)
    largest = max((abs(value) for value in values), default=0.0)
    if 0 < largest < 1e-3:
        return [f"{value:.0e}".replace("e-0", "e-") if value else "0" for value in values]
    if largest >= 1e6:
        return [f"{value / 1e6:g} M" if value else "0" for value in values]
    decimals = next((d for d in range(5) if all(abs(v - round(v, d)) <= 1e-6 * largest for v in values)), 5)
    return [f"{value:,.{decimals}f}" + (" %" if percent else "") for value in values]


def shades(count: int) -> list[int]:
    """Shades for an ordered scale of `count` steps, from pale to the strongest.

    >>> shades(1), shades(3)
    ([7], [1, 4, 7])
    """
    if count == 1:
        return [RAMP]
    return [1 + round(index * (RAMP - 1) / (count - 1)) for index in range(count)]


def series_class(series: int) -> str:
    """The style of a series; beyond the colours that the eye tells apart all are grey."""
    return f"series-{series}" if series < SERIES else "series-other"


def finite(*columns: Sequence[float]) -> tuple[np.ndarray, ...]:
    """The columns as arrays, without the rows in which any value is not finite."""
    arrays = [np.asarray(column, dtype=float) for column in columns]
    good = np.logical_and.reduce([np.isfinite(array) for array in arrays])
    return tuple(array[good] for array in arrays)


def padded(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    """The y range of a chart: a little air above and below, never below zero for values that are not.

    >>> padded(0.0, 100.0, False), padded(50.0, 50.0, False)
    ((0.0, 106.0), (47.5, 52.5))
    """
    wide = high - low if high - low > 1e-6 * abs(high) else 0.0
    air = 0.06 * wide or 0.05 * abs(high) or 0.5
    bottom = 0.0 if from_zero or 0 <= low < air else low - air
    return min(bottom, low), high + air


def binned(
    x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, lowest and highest y of at most `most` bins with equal numbers of points, in the order of x.

    >>> [values.tolist() for values in binned(np.arange(4.0), np.array([1.0, 3.0, 5.0, 9.0]), most=2)]
    [[0.5, 2.5], [2.0, 7.0], [1.0, 5.0], [3.0, 9.0]]
    """
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    starts = np.unique(np.linspace(0, len(x), min(most, len(x)), endpoint=False).astype(int))
    sizes = np.diff([*starts, len(x)])
    mean_x, mean_y = np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes
    return mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def _curve(frame: Frame, line: Line, x: np.ndarray, y: np.ndarray) -> Markup:
    style, parts = series_class(line.series), []
    if len(x) > MAX_POINTS:
        x, y, low, high = binned(x, y)
        outline = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
        parts.append(element("polygon", f"range {style}", points=frame.points(outline)))
    points = list(zip(x, y, strict=True))
    parts.append(element("polyline", f"curve {style}", line.name, points=frame.points(points)))
    if len(points) == 1 or (line.markers and len(points) <= 60):
        for a, b in points:
            note = f"{line.name} {b:.4g} at {a:.4g}".strip()
            parts.append(element("circle", f"point {style}", note, cx=frame.x(a), cy=frame.y(b), r=3))
    return joined(parts)


def _mark(frame: Frame, mark: Mark) -> Markup:
    return _circle(frame, mark) + joined(_labels(frame, [mark]))


def _circle(frame: Frame, mark: Mark) -> Markup:
    style = f"{'hollow' if mark.hollow else 'mark'} {series_class(mark.series)}"
    return element("circle", style, mark.label, cx=frame.x(mark.x), cy=frame.y(mark.y), r=5)


def _labels(frame: Frame, marks: Sequence[Mark]) -> list[Markup]:
    """The names of marks above them, or where another name is already, below or further away."""
    found, taken = [], list[tuple[float, float, float]]()
    circles = [(frame.x(mark.x) - 6, frame.x(mark.x) + 6, frame.y(mark.y) + 4) for mark in marks]
    for mark in sorted(marks, key=lambda mark: -mark.y):
        x, y = frame.x(mark.x), frame.y(mark.y)
        at_end = x > (LEFT + frame.end) / 2
        width = 6.6 * len(mark.label)
        left, right = (x + 4 - width, x + 4) if at_end else (x - 4, x - 4 + width)
        mine = (x - 6, x + 6, y + 4)
        for height in (max(y - 10, frame.top - 8), y + 19, y - 25, y + 33, y - 40):
            others = taken + [circle for circle in circles if circle != mine]
            if not any(left < end and begin < right and abs(height - at) < 13 for begin, end, at in others):
                break
        else:
            continue  # no room: the name is shown on pointing at the mark
        taken.append((left, right, height))
        found.append(
            written("value", x + 4 if at_end else x - 4, round(height, 1), mark.label, "end" if at_end else "start")
        )
    return found


def _whisker(frame: Frame, mark: Mark) -> Markup:
    x, low, high = frame.x(mark.x), frame.y(mark.y - mark.spread), frame.y(mark.y + mark.spread)
    return element("line", f"whisker {series_class(mark.series)}", x1=x, x2=x, y1=high, y2=low)


def _stairs(frame: Frame, front: Sequence[tuple[float, float]]) -> Markup:
    corners = [(front[0][0], frame.y_low)]
    for (x, y), (next_x, _) in zip(front, [*front[1:], (frame.x_high, 0.0)], strict=True):
        corners += [(x, y), (next_x, y)]
    return element("polyline", "front", "Pareto front", points=frame.points(corners))


def _span(frame: Frame, span: Span) -> Markup:
    left, right = frame.x(span.start), frame.x(span.end)
    box = _box("span", left, right, frame.top, BASE, span.label)
    return box + written("tick", right - 4, BASE - 7, span.label, "end")


def _box(style: str, left: float, right: float, top: float, bottom: float, note: str) -> Markup:
    width, height = round(max(right - left, 0.5), 1), round(bottom - top, 1)
    return element("rect", style, note, x=round(left, 1), y=round(top, 1), width=width, height=height)
