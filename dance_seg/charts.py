"""Small SVG charts for pages that open offline: lines, stacked shares, histograms, scatters.

Every chart is drawn in the same coordinates (WIDTH x HEIGHT) and takes its colours from the page's style sheet, so that
it follows light and dark. Text is escaped. Values that are not finite are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 390, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 30, 38
MAX_POINTS = 300  # a line with more is drawn as the mean of each bin, with the range behind it
SERIES = 8  # colours told apart by eye; further series are grey
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
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        x_label: str,
        y_label: str,
        *,
        top: int = TOP,
        right: int = RIGHT,
    ) -> None:
        self.x_low, self.x_high = x_range if x_range[1] > x_range[0] else (x_range[0] - 0.5, x_range[0] + 0.5)
        self.y_low, self.y_high = y_range if y_range[1] > y_range[0] else (y_range[0] - 0.5, y_range[0] + 0.5)
        self.x_label, self.y_label, self.top = x_label, y_label, top
        self.end = WIDTH - right  # where the x axis ends

    def x(self, value: float) -> float:
        """Drawing coordinate of a value on the x axis."""
        return round(LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.end - LEFT), 1)

    def y(self, value: float) -> float:
        """Drawing coordinate of a value on the y axis."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - self.top), 1)

    def axes(self, *, x_ticks: bool = True, percent: bool = False) -> Markup:
        """Grid lines, tick labels and the two axis labels."""
        parts = [Markup('<text class="axis" x="2" y="{}">{}</text>').format(self.top - 14, self.y_label)]
        y_ticks = ticks(self.y_low, self.y_high, 4)
        for value, text in zip(y_ticks, tick_texts(y_ticks, percent), strict=True):
            height = self.y(value)
            parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, self.end, height, height))
            parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 6, height + 4, text))
        if x_ticks:
            values = ticks(self.x_low, self.x_high, 6)
            for value, text in zip(values, tick_texts(values), strict=True):
                parts.append(
                    Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                        self.x(value), HEIGHT - BOTTOM + 15, text
                    )
                )
        base = HEIGHT - BOTTOM
        parts.append(Markup('<line class="base" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, self.end, base, base))
        parts.append(
            Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(self.end, HEIGHT - 6, self.x_label)
        )
        return Markup("").join(parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many.

    >>> ticks(0, 12, 4)
    [0.0, 5.0, 10.0]
    >>> ticks(0.0, 1.0, 4)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (factor * step) - about))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


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


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_end: float | None = None,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
    spans: Sequence[Span] = (),
) -> Markup:
    """Curves over one x axis; `title` is read to those who cannot see it. Nothing to draw gives empty markup."""
    drawn = [(line, *finite(line.x, line.y)) for line in lines]
    drawn = [(line, x, y) for line, x, y in drawn if len(x)]
    if not drawn:
        return Markup("")
    all_x, all_y = np.concatenate([x for _, x, _ in drawn]), np.concatenate([y for _, _, y in drawn])
    frame = Frame(
        (min(0.0, float(all_x.min())), max(float(all_x.max()), x_end or float(all_x.max()))),
        padded(float(all_y.min()), float(all_y.max()), from_zero),
        x_label,
        y_label,
    )
    parts = [_span(frame, span) for span in spans] + [frame.axes()]
    for line, x, y in drawn:
        parts.append(_curve(frame, line, x, y))
    parts += [_mark(frame, mark) for mark in marks]
    return svg(title, parts)


def stacked_chart(
    layers: Sequence[Layer], *, title: str, x_label: str, y_label: str, notes: Sequence[str] = (), line: Line | None = None
) -> Markup:
    """Shares of each column (0 to 1), one column from k to k + 1, stacked; `notes` are shown on pointing at a column."""
    if not layers or not len(layers[0].values):
        return Markup("")
    heights = np.array([layer.values for layer in layers], dtype=float)
    columns = heights.shape[1]
    edges = np.concatenate([np.zeros((1, columns)), np.cumsum(heights, axis=0)])
    top = max(1.0, float(edges[-1].max()))
    frame = Frame((0, columns), (0, top), x_label, y_label)
    parts = []
    for number, layer in enumerate(layers):
        outline = [(i + side, edges[number + 1, i]) for i in range(columns) for side in (0, 1)]
        outline += [(i + side, edges[number, i]) for i in reversed(range(columns)) for side in (1, 0)]
        points = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in outline)
        parts.append(Markup('<polygon class="shade-{}" points="{}"/>').format(layer.shade, points))
    parts.append(frame.axes(percent=True))
    if line is not None:
        parts.append(_curve(frame, line, *finite(line.x, line.y)))
    for number, note in enumerate(notes[:columns]):
        left, right = frame.x(number), frame.x(number + 1)
        parts.append(
            Markup('<rect class="touch" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                left, frame.top, round(right - left, 1), HEIGHT - BOTTOM - frame.top, note
            )
        )
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
    counts, edges = np.histogram(data, bins=min(bins, max(1, len(data))))
    top = TOP + 14 * (len(boundaries) > 0)
    frame = Frame((float(edges[0]), float(edges[-1])), (0, float(counts.max()) * 1.04), x_label, y_label, top=top)
    parts = [frame.axes()]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            shade = 0 if marked_below is not None and (left + right) / 2 < marked_below else 4
            x, width = frame.x(left) + 0.5, frame.x(right) - frame.x(left) - 1
            parts.append(
                Markup('<rect class="shade-{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                    shade,
                    round(x, 1),
                    frame.y(count),
                    round(max(width, 0.5), 1),
                    round(frame.y(0) - frame.y(count), 1),
                    f"{left:.4g} to {right:.4g}: {count}",
                )
            )
    for value, text in boundaries:
        x = frame.x(value)
        parts.append(Markup('<line class="boundary" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(x, x, top - 8, frame.y(0)))
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(x, top - 12, text))
    return svg(title, parts)


def scatter(points: Sequence[Mark], *, title: str, x_label: str, y_label: str) -> Markup:
    """Labelled points; x begins at 0, since it is a cost whose ratios are to be seen."""
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not shown:
        return Markup("")
    low, high = padded(min(p.y for p in shown), max(p.y for p in shown), False)
    high = max(high, low + 1)  # a tenth of a point must not look like a gulf
    frame = Frame((0, max(p.x for p in shown) * 1.06 or 1), (low, high), x_label, y_label)
    return svg(title, [frame.axes(), *(_mark(frame, point) for point in shown)])


def svg(title: str, parts: Sequence[Markup]) -> Markup:
    """The drawing around its parts."""
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)
    return head + Markup("").join(parts) + Markup("</svg>")


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
    """The y range of a chart: a little air above and below, never below zero for values that are not."""
    air = 0.06 * (high - low) or abs(high) * 0.05 or 0.5
    bottom = 0.0 if from_zero or (low >= 0 and low - air < 0) else low - air
    return min(bottom, low), high + air


def binned(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
    style = series_class(line.series)
    parts = []
    if len(x) > MAX_POINTS:
        x, y, low, high = binned(x, y)
        outline = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
        points = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in outline)
        parts.append(Markup('<polygon class="range {}" points="{}"/>').format(style, points))
    points = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in zip(x, y, strict=True))
    parts.append(Markup('<polyline class="curve {}" points="{}"><title>{}</title></polyline>').format(style, points, line.name))
    if line.markers and len(x) <= 60 or len(x) == 1:
        for a, b in zip(x, y, strict=True):
            parts.append(
                Markup('<circle class="point {}" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
                    style, frame.x(a), frame.y(b), f"{line.name} {b:.4g} at {a:.4g}".strip()
                )
            )
    return Markup("").join(parts)


def _mark(frame: Frame, mark: Mark) -> Markup:
    x, y = frame.x(mark.x), frame.y(mark.y)
    anchor, shift = ("end", 4) if x > (LEFT + frame.end) / 2 else ("start", -4)
    return Markup(
        '<circle class="mark {}" cx="{}" cy="{}" r="5"/><text class="value" x="{}" y="{}" text-anchor="{}">{}</text>'
    ).format(series_class(mark.series), x, y, x + shift, max(y - 10, frame.top - 8), anchor, mark.label)


def _span(frame: Frame, span: Span) -> Markup:
    left, right = frame.x(span.start), frame.x(span.end)
    return Markup(
        '<rect class="span" x="{}" y="{}" width="{}" height="{}"/><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(left, frame.top, round(right - left, 1), HEIGHT - BOTTOM - frame.top, right - 4, HEIGHT - BOTTOM - 7, span.label)
