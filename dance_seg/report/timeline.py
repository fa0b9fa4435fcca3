"""What happened along a stream, drawn over the whole width of a page: accuracy, stride, cost; key frames and cuts.

All charts have the same x axis, the frames of the stream, so that they can be read one below the other.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from dance_seg.report.charts import (
    BASE,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    Frame,
    binned,
    element,
    finite,
    joined,
    padded,
    series_class,
    svg,
    written,
)

WIDE = 1080
MOST_MARKS = 700  # key frames drawn one by one; of more, every so many
MOST_POINTS = 540  # of a line; of more, the mean of each bin with the range behind it
MOST_CUTS = 60  # named; of more, only the lines are drawn


@dataclass(frozen=True)
class Timeline:
    """A stream frame by frame, scores in points; NaN where nothing is known."""

    frames: np.ndarray  # (N,) index in the stream
    accuracy: np.ndarray  # (N,) of the student against the teacher, before any update
    key_frames: np.ndarray  # (K,) index in the stream
    before: np.ndarray  # (K,) accuracy before the updates of the key frame
    after: np.ndarray  # (K,) and after them
    strides: np.ndarray  # (K,) from this key frame on
    cuts: tuple[int, ...] = ()  # indices at which the scene changes, where somebody knows
    threshold: float = math.nan  # of accuracy
    limits: tuple[float, float] = (8, 64)  # of the stride
    times_cheaper: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (N,) than the teacher, so far

    @property
    def x_range(self) -> tuple[float, float]:
        """The first and the last frame."""
        return float(self.frames[0]), float(max(self.frames[-1], self.frames[0] + 1))


def accuracy_chart(line: Timeline) -> Markup:
    """Accuracy of each frame, and of key frames before and after their updates, with the threshold and the cuts."""
    known = [values[np.isfinite(values)] for values in (line.accuracy, line.before, line.after)]
    values = np.concatenate([*known, np.array([line.threshold])[np.isfinite([line.threshold])]])
    if not len(values):
        return Markup("")
    frame = _frame(line, padded(float(values.min()), min(float(values.max()), 100.0), False), "points")
    parts = [frame.axes(whole=True), *_cuts(frame, line), *_curve(frame, line.frames, line.accuracy, 0, "each frame")]
    if math.isfinite(line.threshold):
        height = frame.y(line.threshold)
        parts.append(element("line", "boundary", "threshold", x1=LEFT, x2=frame.end, y1=height, y2=height))
        parts.append(written("tick", frame.end, height - 4, f"threshold {line.threshold:g}", "end"))
    for at, before, after in _thinned(line.key_frames, line.before, line.after):
        x, note = frame.x(at), f"key frame {at:.0f}: {before:.1f} before, {after:.1f} after the updates"
        if math.isfinite(before) and math.isfinite(after) and after != before:
            top, bottom = sorted((frame.y(before), frame.y(after)))
            parts.append(element("line", "whisker series-2", x1=x, x2=x, y1=top, y2=bottom))
        if math.isfinite(before):
            parts.append(element("circle", "hollow series-1", note, cx=x, cy=frame.y(before), r=3.5))
        if math.isfinite(after):
            parts.append(element("circle", "point series-2", note, cx=x, cy=frame.y(after), r=3))
    return svg("Accuracy of the student over the stream, before and after updates", parts, WIDE, HEIGHT)


def stride_chart(line: Timeline) -> Markup:
    """The stride from key frame to key frame on a scale of doublings; the key frames are marks on the x axis."""
    at, strides = finite(line.key_frames.tolist(), line.strides.tolist())
    if not len(at):
        return Markup("")
    low, high = (math.log2(max(limit, 1)) for limit in line.limits)
    low, high = min(low, math.log2(max(strides.min(), 1))), max(high, math.log2(max(strides.max(), 1)))
    frame = _frame(line, (low - 0.35, high + 0.25), "frames to the next key frame")
    parts = [_x_axis(frame), *_cuts(frame, line)]
    for power in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1):
        height = frame.y(power)
        parts.append(element("line", "grid", x1=LEFT, x2=frame.end, y1=height, y2=height))
        parts.append(written("tick", LEFT - 6, height + 4, f"{2**power}", "end"))
    logs = np.log2(np.maximum(strides, 1))
    changes = np.flatnonzero(np.diff(logs, prepend=np.nan) != 0)
    corners: list[tuple[float, float]] = []
    for place, k in enumerate(changes):
        end = at[changes[place + 1]] if place + 1 < len(changes) else line.x_range[1]
        corners += [(at[k], logs[k]), (end, logs[k])]
    parts.append(element("polyline", "curve series-0", "stride", points=frame.points(corners)))
    for key_frame, stride in _thinned(at, strides):
        x = frame.x(key_frame)
        note = f"key frame {key_frame:.0f}, then a stride of {stride:.0f}"
        parts.append(element("line", "curve series-1", note, x1=x, x2=x, y1=BASE - 9, y2=BASE))
    return svg("Stride and key frames over the stream", parts, WIDE, HEIGHT)


def cost_chart(line: Timeline) -> Markup:
    """How many times cheaper than the teacher on every frame the stream has been so far."""
    known = {name: values for name, values in line.times_cheaper.items() if np.isfinite(values).any()}
    if not known:
        return Markup("")
    top = max(float(values[np.isfinite(values)].max()) for values in known.values())
    frame = _frame(line, padded(0.0, max(top, 1.0), True), "times cheaper than the teacher")
    parts = [frame.axes(whole=True), *_cuts(frame, line)]
    for series, (name, values) in enumerate(known.items()):
        parts += _curve(frame, line.frames, values, series, name)
    return svg("Cost over the stream against the teacher on every frame", parts, WIDE, HEIGHT)


def _frame(line: Timeline, y_range: tuple[float, float], y_label: str) -> Frame:
    frame = Frame(line.x_range, y_range, "frame", y_label, TOP)
    frame.end = WIDE - RIGHT
    return frame


def _x_axis(frame: Frame) -> Markup:
    """The frame's axes without those of y, whose scale is another."""
    from dance_seg.report.charts import tick_texts, ticks

    parts = [written("axis", 2, frame.top - 14, frame.y_label)]
    values = ticks(frame.x_low, frame.x_high, 6, least=1.0)
    for value, text in zip(values, tick_texts(values), strict=True):
        parts.append(written("tick", frame.x(value), BASE + 15, text, "middle"))
    parts.append(element("line", "base", x1=LEFT, x2=frame.end, y1=BASE, y2=BASE))
    parts.append(written("axis", frame.end, HEIGHT - 6, frame.x_label, "end"))
    return joined(parts)


def _cuts(frame: Frame, line: Timeline) -> list[Markup]:
    parts = []
    for at in line.cuts:
        x = frame.x(at)
        parts.append(element("line", "boundary", f"scene cut at frame {at}", x1=x, x2=x, y1=frame.top, y2=BASE))
        if len(line.cuts) <= MOST_CUTS:
            parts.append(written("tick", x + 3, frame.top + 8, "cut"))
    return parts


def _curve(frame: Frame, x: np.ndarray, y: np.ndarray, series: int, name: str) -> list[Markup]:
    style, parts = series_class(series), []
    xs, ys = finite(x.tolist(), y.tolist())
    if not len(xs):
        return []
    if len(xs) > MOST_POINTS:
        xs, ys, low, high = binned(xs, ys, MOST_POINTS)
        outline = [*zip(xs, high, strict=True), *zip(xs[::-1], low[::-1], strict=True)]
        parts.append(element("polygon", f"range {style}", points=frame.points(outline)))
    points = frame.points(zip(xs, ys, strict=True))
    return [*parts, element("polyline", f"curve {style}", name, points=points)]


def _thinned(*columns: np.ndarray) -> list[tuple[float, ...]]:
    """Rows of the columns: all, or of more than MOST_MARKS every so many."""
    every = max(1, math.ceil(len(columns[0]) / MOST_MARKS))
    return [tuple(float(value) for value in row) for row in zip(*(c[::every] for c in columns), strict=True)]
