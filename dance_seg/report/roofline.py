"""How much of the machine a network used: the roofline of `tools.measure_cost RUN --roofline` as a picture and a table.

Both axes are logarithmic, as is usual: GMAC/s over MACs per byte. The roof rises with the memory's speed and is level
at that of the matrix products; a point's distance below it is what was not used.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from dance_seg.report.charts import (
    BASE,
    HEIGHT,
    LEFT,
    Frame,
    Mark,
    element,
    joined,
    series_class,
    svg,
    written,
)
from dance_seg.report.page import Cell, Chart, Key, Lines, Section, Table, figure_text
from dance_seg.report.runs import Run, number, section

TITLE = "How much of the machine was used"
NOT_MEASURED = "Not measured; python -m tools.measure_cost RUN --roofline does."


def roofline(run: Run) -> Section:
    """The roofline of a run, from its cost.json; a note where it was not measured."""
    return roofline_section(section(run.other_costs, "roofline"))


def roofline_section(record: Mapping[str, Any]) -> Section:
    """The section of one roofline record, as dance_seg.cost.roofline.Roofline.as_record gives it."""
    peak = section(record, "peak")
    gmacs, gigabytes = number(peak.get("gmacs_per_second")), number(peak.get("gigabytes_per_second"))
    given = record.get("operations")
    operations = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    total, training = section(record, "total"), section(record, "training")
    if not (gmacs and gigabytes and gmacs > 0 and gigabytes > 0 and total):
        return Section(TITLE, note=NOT_MEASURED)
    # A training whose products were of another type has another roof: it stands in the table alone.
    same_roof = section(record, "training_peak").get("dtype", peak.get("dtype")) == peak.get("dtype")
    usages = [*operations, total, *([training] if same_roof else [])]
    marks = [
        Mark(intensity, speed, str(usage.get("name", "")), series)
        for series, usage in enumerate(usages)
        if (intensity := number(usage.get("macs_per_byte"))) and (speed := number(usage.get("gmacs_per_second")))
    ]
    chart = Chart(
        "Roofline",
        roofline_chart(gmacs, gigabytes, marks, title="Speed attained over MACs per byte, below the machine's roof"),
        note="Both axes are logarithmic. Below the slope memory is waited for, below the level part the products.",
        keys=tuple(Key(mark.label, series_class(mark.series)) for mark in marks),
    )
    size = record.get("input_size")
    shown = "x".join(str(length) for length in size) if isinstance(size, list) else "?"
    note = (
        f"One forward of {record.get('batch', '?')} x {shown} on {peak.get('device', '?')}, {peak.get('dtype', '?')}, "
        f"{peak.get('threads', '?')} threads: at best {figure_text(gmacs)} GMAC/s in matrix products and "
        f"{figure_text(gigabytes)} GB/s in copies, measured here; the two meet at "
        f"{figure_text(gmacs / gigabytes)} MACs per byte."
    )
    said = record.get("notes")
    lines = tuple(str(line) for line in said) if isinstance(said, list) else ()
    return Section(TITLE, (chart, usage_table(operations, total, training), *((Lines(lines),) if lines else ())), note)


def usage_table(
    operations: Sequence[Mapping[str, Any]], total: Mapping[str, Any], training: Mapping[str, Any]
) -> Table:
    """Time, speed and share of the roof: each kind of operation, the network, and training where it is known."""
    watched = sum(number(usage.get("seconds")) or 0.0 for usage in operations)
    rows = []
    for usage in (*operations, total, *([training] if training else ())):
        seconds = number(usage.get("seconds")) or 0.0
        of_time = f"{100 * seconds / watched:.0f} %" if watched and any(usage is one for one in operations) else ""
        share = number(usage.get("share"))
        rows.append(
            (
                Cell(str(usage.get("name", ""))),
                Cell(f"{figure_text(1000 * seconds)} ms" if seconds < 1 else f"{figure_text(seconds)} s", of_time),
                Cell(figure_text(number(usage.get("macs_per_byte")) or 0.0)),
                Cell(figure_text(speed) if (speed := number(usage.get("gmacs_per_second"))) else "–"),
                Cell("–" if share is None else f"{100 * share:.0f} %", f"bound by {usage.get('bound', '?')}"),
            )
        )
    return Table(
        ("operations", "time", "MACs per byte", "GMAC/s", "of the roof"),
        tuple(rows),
        title="By kind of operation",
        note="Each kind is timed on its own. Caches are faster than memory, so a share can exceed 100 %.",
    )


def roofline_chart(gmacs: float, gigabytes: float, marks: Sequence[Mark], *, title: str) -> Markup:
    """The roof of a machine (peak GMAC/s, GB/s) and points (MACs per byte, GMAC/s) below it, log-log."""
    marks = [mark for mark in marks if mark.x > 0 and mark.y > 0 and math.isfinite(mark.x + mark.y)]
    ridge = gmacs / gigabytes
    x_low, x_high = decades(min(ridge / 10, *(mark.x for mark in marks)), max(ridge * 10, *(mark.x for mark in marks)))
    y_low, y_high = decades(min(gmacs / 10, *(mark.y for mark in marks)), max(gmacs, *(mark.y for mark in marks)))
    frame = Frame((x_low, x_high), (y_low, y_high), "MACs per byte", "GMAC/s")
    # The slope enters the frame on the left or from below.
    start = max(x_low, y_low - math.log10(gigabytes))
    roof = [
        (start, start + math.log10(gigabytes)),
        (math.log10(ridge), math.log10(gmacs)),
        (x_high, math.log10(gmacs)),
    ]
    parts = [log_axes(frame)]
    parts.append(element("polyline", "curve series-ink", "the roof", points=frame.points(roof)))
    for mark in marks:
        note = f"{mark.label}: {mark.y:.3g} GMAC/s at {mark.x:.3g} MACs per byte"
        place = {"cx": frame.x(math.log10(mark.x)), "cy": frame.y(math.log10(mark.y))}
        parts.append(element("circle", f"mark {series_class(mark.series)}", note, **place, r=5))
    return svg(title, parts)


def decades(low: float, high: float) -> tuple[int, int]:
    """The powers of ten around a range.

    >>> decades(0.3, 200), decades(1, 10)
    ((-1, 3), (0, 1))
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return first, max(last, first + 1)


def log_axes(frame: Frame) -> Markup:
    """Grid and labels of axes whose coordinates are powers of ten."""
    parts = [written("axis", 2, frame.top - 14, frame.y_label)]
    for power in range(int(frame.y_low), int(frame.y_high) + 1):
        height = frame.y(power)
        parts.append(element("line", "grid", x1=LEFT, x2=frame.end, y1=height, y2=height))
        parts.append(written("tick", LEFT - 6, height + 4, power_text(power), "end"))
    for power in range(int(frame.x_low), int(frame.x_high) + 1):
        across = frame.x(power)
        parts.append(element("line", "grid", x1=across, x2=across, y1=frame.top, y2=BASE))
        parts.append(written("tick", across, BASE + 15, power_text(power), "middle"))
    parts.append(element("line", "base", x1=LEFT, x2=frame.end, y1=BASE, y2=BASE))
    parts.append(written("axis", frame.end, HEIGHT - 6, frame.x_label, "end"))
    return joined(parts)


def power_text(power: int) -> str:
    """A power of ten as a number that people read.

    >>> power_text(-2), power_text(0), power_text(4), power_text(6)
    ('0.01', '1', '10,000', '1e6')
    """
    if -3 <= power <= 4:
        return f"{10**power:,}" if power >= 0 else f"{10.0**power:.{-power}f}"
    return f"1e{power}"
