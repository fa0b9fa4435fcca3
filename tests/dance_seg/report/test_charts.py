"""Charts put values where they belong, escape text and bear any figures."""

import itertools
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from dance_seg.report.charts import (
    BASE,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Frame,
    Layer,
    Line,
    Mark,
    Span,
    cloud,
    histogram,
    line_chart,
    scatter,
    stacked_chart,
    ticks,
)

LABELS = {"title": "t", "x_label": "x", "y_label": "y"}


def parts(markup: str, name: str, style: str = "") -> list[xml.Element]:
    """The elements of a drawing with this name and this word in their class."""
    found = xml.fromstring(str(markup)).iter(name)
    return [element for element in found if not style or style in element.get("class", "").split()]


def coordinates(element: xml.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, pair.split(","))) for pair in element.get("points", "").split()]


def test_the_corners_of_the_data_are_the_corners_of_the_frame():
    frame = Frame((0, 10), (0, 5), "x", "y")
    assert (frame.x(0), frame.x(10)) == (LEFT, WIDTH - RIGHT)
    assert (frame.y(0), frame.y(5)) == (BASE, TOP)


def test_a_curve_goes_through_its_points_and_leaves_out_what_is_not_finite():
    drawing = line_chart([Line([0, 1, 2, 4], [0.0, 1.0, float("nan"), 2.0])], **LABELS, x_end=4)
    (curve,) = parts(drawing, "polyline")
    (x0, y0), (x1, y1), (x2, y2) = coordinates(curve)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx(LEFT + (WIDTH - RIGHT - LEFT) / 4, abs=0.1)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # 0, 1, 2 are equally far apart
    assert y0 == BASE  # figures that are never negative begin at zero


def test_a_long_curve_is_drawn_as_means_with_its_range():
    y = np.tile([0.0, 2.0], 5000)
    drawing = line_chart([Line(np.arange(10_000) / 100, y)], **LABELS)
    assert len(drawing) < 30_000
    (band,) = parts(drawing, "polygon", "range")
    assert len({height for _, height in coordinates(band)}) == 2  # 0 and 2
    (curve,) = parts(drawing, "polyline")
    heights = [height for _, height in coordinates(curve)]
    assert max(heights) - min(heights) < 5  # the mean of each bin is about 1


@pytest.mark.parametrize(
    "y", [[5.0], [0.0, 0.0], [1e-12, 1.1e-12], [1e15, 1e15 + 1], [-3.0, -2.0], [1e300, 2e300], [0.1 + 0.2, 0.3]]
)
def test_any_finite_figures_can_be_drawn(y):
    drawing = line_chart([Line(list(range(len(y))), y)], **LABELS)
    assert "nan" not in drawing
    assert "inf" not in drawing
    assert 1 <= len(parts(drawing, "text", "tick")) < 40
    histogram(y, title="t", x_label="x")
    scatter([Mark(abs(value), value, "a") for value in y], **LABELS)


def test_nothing_to_draw_is_empty_markup():
    assert line_chart([], **LABELS) == ""
    assert line_chart([Line([1.0], [float("inf")])], **LABELS) == ""
    assert stacked_chart([], **LABELS) == ""
    assert histogram([], title="t", x_label="x") == ""
    assert scatter([], **LABELS) == ""
    assert cloud([], [], **LABELS) == ""


def test_every_text_is_escaped():
    evil = "<script>alert(1)</script>"
    drawings = [
        line_chart(
            [Line([0, 1], [0, 1], evil, markers=True)],
            title=evil,
            x_label=evil,
            y_label=evil,
            marks=[Mark(1, 1, evil)],
            spans=[Span(0, 1, evil)],
        ),
        stacked_chart([Layer(evil, [1.0], 1)], title=evil, x_label=evil, y_label=evil, notes=[evil]),
        histogram([1, 2], title=evil, x_label=evil, y_label=evil, boundaries=[(1.5, evil)]),
        scatter([Mark(1, 1, evil)], title=evil, x_label=evil, y_label=evil),
    ]
    for drawing in drawings:
        assert "<script" not in drawing
        assert "&lt;script" in drawing
        xml.fromstring(str(drawing))


def test_stacked_layers_lie_on_one_another():
    drawing = stacked_chart([Layer("a", [0.25, 0.5], 1), Layer("b", [0.75, 0.5], 2)], **LABELS)
    lower, upper = (coordinates(element) for element in parts(drawing, "polygon"))
    # Column 0 is divided at a quarter, column 1 at a half; a column has two corners above and two below.
    quarter, half = BASE - (BASE - TOP) / 4, (BASE + TOP) / 2
    assert [y for _, y in lower] == pytest.approx([quarter, quarter, half, half] + 4 * [BASE], abs=0.1)
    assert [y for _, y in upper] == pytest.approx(4 * [TOP] + [half, half, quarter, quarter], abs=0.1)


def test_a_histogram_holds_every_image_and_marks_those_below():
    drawing = histogram([1, 1, 1, 2, 3, 4], title="t", x_label="x", bins=3, marked_below=2)
    grey, blue = parts(drawing, "rect", "shade-0"), parts(drawing, "rect", "shade-4")
    counts = [int(element[0].text.rpartition(" ")[2]) for element in (*grey, *blue)]
    assert (len(grey), len(blue), counts) == (1, 2, [3, 1, 2])


def test_a_scatter_begins_at_cost_zero_and_shows_at_least_two_points():
    drawing = scatter([Mark(50, 60.0, "a"), Mark(100, 60.1, "b", 1)], **LABELS)
    (ax, ay), (bx, by) = ((float(c.get("cx")), float(c.get("cy"))) for c in parts(drawing, "circle"))
    assert (bx - LEFT) == pytest.approx(2 * (ax - LEFT), abs=0.2)
    assert 0 < ay - by < 0.08 * (BASE - TOP)


def test_ticks_are_round_and_inside():
    assert ticks(0.3, 0.71, 4) == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert ticks(0, 200, 6) == [0, 50, 100, 150, 200]


def test_the_front_is_drawn_as_stairs_and_what_is_dominated_is_hollow():
    marks = [Mark(10, 50.0, "a"), Mark(20, 60.0, "b"), Mark(30, 55.0, "c", hollow=True)]
    drawing = scatter(marks, **LABELS, front=[(10, 50.0), (20, 60.0)])
    (stairs,) = parts(drawing, "polyline", "front")
    a, b, _ = ((float(c.get("cx")), float(c.get("cy"))) for c in parts(drawing, "circle"))
    start, first, below_second, second, end = coordinates(stairs)
    assert (start[0], first, second) == (a[0], a, b)
    assert below_second == (b[0], a[1])  # along the cost first, then up to the better score
    assert end[1] == b[1]
    assert end[0] == WIDTH - RIGHT
    assert len(parts(drawing, "circle", "hollow")) == 1


def test_the_spread_of_a_mark_is_a_whisker_as_long_on_both_sides():
    drawing = scatter([Mark(10, 50.0, "a", spread=2.0), Mark(20, 60.0, "b")], **LABELS)
    (whisker,) = parts(drawing, "line", "whisker")
    (circle, _) = parts(drawing, "circle")
    above = float(circle.get("cy")) - float(whisker.get("y1"))
    assert above == pytest.approx(float(whisker.get("y2")) - float(circle.get("cy")), abs=0.2)
    assert above > 5


def test_names_of_marks_do_not_lie_on_one_another():
    marks = [Mark(100 + i, 60 + 0.05 * i, f"a row with a name {i}") for i in range(4)]
    texts = parts(scatter(marks, **LABELS), "text", "value")
    heights = sorted(float(text.get("y")) for text in texts)
    assert len(heights) >= 2
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 13


def test_a_cloud_holds_every_point_and_the_mean_of_equally_many():
    x = np.arange(60.0)
    drawing = cloud(x, np.where(x < 30, 1.0, 3.0), **LABELS, bins=2)
    dots = parts(drawing, "circle", "dot")
    assert len(dots) == 60
    (mean,) = parts(drawing, "polyline")
    (_, low), (_, high) = coordinates(mean)
    levels = {float(dot.get("cy")) for dot in dots}
    assert {low, high} == levels


def test_a_cloud_of_very_many_points_stays_small():
    random = np.random.default_rng(0)
    drawing = cloud(random.random(100_000), random.random(100_000), **LABELS)
    assert len(parts(drawing, "circle", "dot")) <= 1500
    assert len(drawing) < 200_000


def test_an_outlier_does_not_press_a_cloud_to_the_floor():
    y = np.ones(1000)
    y[0] = 1e6
    drawing = cloud(np.arange(1000.0), y, **LABELS)
    heights = sorted({float(dot.get("cy")) for dot in parts(drawing, "circle", "dot")})
    assert heights[0] == TOP  # the outlier, at the edge
    assert heights[-1] < (TOP + BASE) / 2
